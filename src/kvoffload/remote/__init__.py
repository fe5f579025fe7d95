"""Tiers past this machine, on engines that others run: keys instead of slots."""
