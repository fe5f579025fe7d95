"""The managers: one module for each class, on one contract."""
