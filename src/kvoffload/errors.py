"""Every error that kvoffload raises, in one tree.

```
OffloadError
├ ConfigError(ValueError)        wrong settings or arguments
├ ClosedError                    used before open or after close
├ WrongLoopError                 used from another event loop, thread or process
├ AccessDeniedError              the service does not let this token do that; also a PermissionError
├ BlockNotFoundError(KeyError)   a block that was asked for is not there
├ NotPinnedError                 complete_load() of what nobody prepared
├ CapacityError                  the rest is pinned or pending
├ LoadTimeoutError(TimeoutError) the caller's deadline passed; recompute
└ TierError                      a tier failed
  ├ TierUnavailableError         try again later
  │ └ TierTimeoutError           the disk did not answer in time; also a LoadTimeoutError
  ├ TierLockedError              another opener holds the tier
  └ CorruptBlockError            the block did not check and was dropped
```

A miss is a result, not an error.
"""

from __future__ import annotations

from collections.abc import Sequence

from .types import BlockHash


class OffloadError(Exception):
    """Base of every error that kvoffload raises."""


class ConfigError(OffloadError, ValueError):
    """A setting or an argument is wrong; says which, what was given and what is allowed."""


class ClosedError(OffloadError):
    """The manager or tier was used before it was opened or after it was closed."""


class WrongLoopError(OffloadError):
    """The manager was used from another event loop, thread or process than it was opened on."""


class AccessDeniedError(OffloadError, PermissionError):
    """A service refused the client's token, or does not allow it this in that namespace."""


class BlockNotFoundError(OffloadError, KeyError):
    """Blocks that were asked for are not ready in any tier.

    Attributes:
        block_hashes: The hashes that are absent or still pending.
    """

    def __init__(self, message: str, *, block_hashes: Sequence[BlockHash]) -> None:
        super().__init__(message)
        self.block_hashes = tuple(block_hashes)

    def __str__(self) -> str:
        # KeyError would show the repr of the message.
        return str(self.args[0])


class NotPinnedError(OffloadError):
    """`complete_load` named a block that no `prepare_load` holds."""


class CapacityError(OffloadError):
    """There is no room, for what is there is pinned or pending."""


class LoadTimeoutError(OffloadError, TimeoutError):
    """The deadline passed before the blocks were read; recompute them."""


class TierError(OffloadError):
    """A tier failed; `__cause__` has the operating system's error where there is one.

    Attributes:
        tier: Name of the tier.
        block_hash: The block concerned, where it is one.
    """

    def __init__(self, message: str, *, tier: str, block_hash: BlockHash | None = None) -> None:
        super().__init__(message)
        self.tier = tier
        self.block_hash = block_hash


class TierUnavailableError(TierError):
    """The tier can't serve now; try again later."""


class TierTimeoutError(TierUnavailableError, LoadTimeoutError):
    """One file operation took longer than the tier's `io_timeout_s`.

    What the operation was to read, recompute. Slots and buffers that it still has stay out of use
    until it is back.
    """


class TierLockedError(TierError):
    """Another opener holds the tier; the message names its process."""


class CorruptBlockError(TierError):
    """A block's bytes did not check; the block was dropped and counts as a miss."""


class DerivedViewWarning(RuntimeWarning):
    """Something derived from a leased view (a slice, an array) outlived its lease.

    It stays readable and never shows another block's bytes, but its slot is out of use until it
    is gone. Copy what you need to keep.
    """
