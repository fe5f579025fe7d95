"""The operating system's errors: given a path, told apart, and turned into the tier's."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CorruptBlockError, TierError, TierTimeoutError, TierUnavailableError

_ADVICE = {
    errno.ENOSPC: "free some space there, or give fewer num_blocks",
    errno.EDQUOT: "raise the quota, or give fewer num_blocks",
    errno.EIO: "check the disk",
    errno.EACCES: "give a path that this process may write to",
    errno.EPERM: "give a path that this process may write to",
    errno.EROFS: "give a path that can be written to",
    errno.EMFILE: "raise this process's limit of open files",
    errno.ELOOP: "symbolic links in the tier's directory are not followed",
}
_PASSING = frozenset(
    (
        *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
        *(errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT, errno.ESTALE, errno.ENODEV, errno.ENXIO),
    )
)
_LOST = frozenset((errno.ENOENT, errno.ENODATA, errno.EBADMSG))


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the path into errors of calls that know descriptors alone."""
    try:
        yield
    except OSError as exc:
        exc.filename = exc.filename or str(path)
        raise


def is_lost(exc: OSError | None) -> bool:
    """Tell whether bytes are gone for good: not there, or where the disk can't read."""
    return exc is not None and exc.errno in (errno.ENOENT, errno.ENODATA, errno.EIO)


def is_full(exc: OSError | None) -> bool:
    """Tell whether there was no space for something."""
    return exc is not None and exc.errno in (errno.ENOSPC, errno.EDQUOT)


def raise_first(outcomes: list[OSError | None]) -> None:
    """Raise the first error among outcomes, if there is one."""
    for outcome in outcomes:
        if outcome is not None:
            raise outcome


def tier_error(exc: OSError, tier: str, what: str, *, payload: bool = False) -> TierError:
    """Return the tier's error for one of the operating system, its cause.

    Args:
        exc: The cause.
        tier: Name of the tier.
        what: What could not be done.
        payload: Whether it was to read one, so that missing or wrong bytes mean a lost block.
    """
    lost = payload and exc.errno in _LOST
    passing = TierUnavailableError if exc.errno in _PASSING else TierError
    kind = CorruptBlockError if lost else passing
    if isinstance(exc, TimeoutError):
        kind = TierTimeoutError
    advice = "the block is lost, store it again" if lost else _ADVICE.get(exc.errno or 0)
    where = f" ({exc.filename})" if exc.filename else ""
    message = f"tier {tier!r}: {what}{where}: {exc.strerror or exc}"
    error = kind(message + (f"; {advice}" if advice else ""), tier=tier)
    error.__cause__ = exc
    return error
