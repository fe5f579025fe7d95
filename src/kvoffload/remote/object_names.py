"""What the blocks of one layout are called in an object store.

```
kvoffload/VERSION/LAYOUT/NAMESPACE/xx/yyyyyyyyyyyyyyyyyyyyyyyyyyyyyy
```

The last two are a digest of the canonical key: of one length whatever a hash is, in characters that
every file system tells apart, and spread evenly, by which stores share objects out among servers
and a folder its files among folders. The header has the key itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import blake2b

from .envelope import VERSION

DIGEST_BYTES = 16
_READABLE = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}|")
_LAST = re.compile(rf"[0-9a-f]{{2}}/[0-9a-f]{{{2 * DIGEST_BYTES - 2}}}")


class ObjectNames:
    """Names of blocks with this layout.

    Attributes:
        nobody: A folder that has nothing in it.
    """

    def __init__(self, layout: int) -> None:
        self._root = f"kvoffload/{VERSION}/{layout:x}"
        self.nobody = f"{self._root}/nobody"

    def of(self, key: bytes) -> str:
        """Return the name of a block by its canonical key."""
        digest = _digest(key)
        return f"{self.folder(key[2 : 2 + key[1]].decode())}/{digest[:2]}/{digest[2:]}"

    def folder(self, namespace: str) -> str:
        """Return the folder of a namespace, readable if that is plain."""
        is_plain = _READABLE.fullmatch(namespace)
        last = f"n-{namespace}" if is_plain else f"h-{_digest(namespace.encode())}"
        return f"{self._root}/{last}"

    def own(self, names: Sequence[str], namespace: str) -> list[str]:
        """Return those names in a namespace's folder that blocks have."""
        start = len(self.folder(namespace)) + 1
        return [name for name in names if _LAST.fullmatch(name[start:])]


def _digest(text: bytes) -> str:
    return blake2b(text, digest_size=DIGEST_BYTES).hexdigest()
