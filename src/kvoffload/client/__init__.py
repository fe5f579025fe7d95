"""A manager that lives in another process: the same contract, over HTTP.

```python
async with AsyncLRUClient("unix:/run/kvoffload.sock") as kv:
    async with kv.request(block_hashes) as request: ...
```

Needs `pip install 'kvoffload[client]'`, and a service (`kvoffload serve`) to talk to.
"""

try:
    import httpx as _httpx  # noqa: F401
except ModuleNotFoundError as exc:
    raise ModuleNotFoundError(
        "kvoffload.client needs httpx: pip install 'kvoffload[client]'", name="httpx"
    ) from exc

from .client import AsyncLRUClient as AsyncLRUClient
from .client import NamespaceClient as NamespaceClient

__all__ = ("AsyncLRUClient", "NamespaceClient")
