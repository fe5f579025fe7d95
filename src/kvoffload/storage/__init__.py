"""The cold tier's files: their format, the slots in them, and recovery (docs/disk-format.md).

All of this package blocks and runs on the tier's threads; it raises `OSError`, and always with the
path.
"""
