"""The seam for whoever wants to see the operations of a manager: timers, tracers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeAlias

Observer: TypeAlias = Callable[[str, str, int], AbstractContextManager[object]]
"""Called with operation, namespace and number of blocks of each operation of a manager.

The operation is `"request"` (a whole scope), `"load"` (until the bytes are there) or `"store"`.
What it returns is entered before the operation and left after it, with the exception that ended it
if one did. An observer must not raise: what it raises ends the operation.
"""
