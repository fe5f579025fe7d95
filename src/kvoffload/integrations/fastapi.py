"""A manager in a FastAPI application of your own: lifespan, dependency, endpoints.

```python
app = FastAPI(lifespan=lifespan_manager(ManagerSettings(hot_blocks=4096)))


@app.post("/generate")
async def generate(prompt: Prompt, kv: Manager) -> Answer:
    async with kv.request(hash_blocks(prompt.token_ids, 16)) as request: ...
```

Needs `pip install 'kvoffload[server]'`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated

from fastapi import Depends, Request

from ..config import ManagerSettings
from ..managers.async_lru_manager import AsyncLRUManager
from ..managers.lru_manager_factory import LRUManagerFactory
from ..service.access import AccessControl
from ..service.app import Lifespan, create_router, lifespan_of
from ..service.limits import Limits
from ..service.settings import ServiceSettings
from ..service.state import service_of

__all__ = ["Manager", "create_router", "get_manager", "lifespan_manager"]


def lifespan_manager(
    settings: ManagerSettings | ServiceSettings | Callable[[], AsyncLRUManager],
    *,
    access: AccessControl | None = None,
    limits: Limits | None = None,
) -> Lifespan:
    """Return a lifespan that opens a manager, and flushes and closes it when the application ends.

    An application with a lifespan of its own runs it in there:
    `async with lifespan_manager(settings)(app): ...`

    Args:
        settings: What the manager is made from, or a function that makes it: it is made when the
            application starts, for it belongs to that event loop. `ServiceSettings`, which come
            from the environment and a file, have access and limits with them.
        access: Who may call the endpoints of `create_router`; without it nobody may.
        limits: How much those take on.

    Raises:
        ConfigError: On start: a setting is wrong.
        TierLockedError: On start: another process has the cold directory, a second worker of the
            same server perhaps; its message says what to do.
    """
    if isinstance(settings, ServiceSettings):
        if access is None and settings.lets_somebody_in:
            access = settings.access()
        limits = settings.limits() if limits is None else limits
        settings = settings.manager_settings()
    if isinstance(settings, ManagerSettings):
        settings = partial(LRUManagerFactory.create_async, settings)
    return lifespan_of(settings, access, limits or Limits())


async def get_manager(request: Request) -> AsyncLRUManager:
    """Return the application's manager; a dependency, to be awaited on the manager's own loop.

    Use it in `async def` handlers: FastAPI runs others in threads, where the manager refuses.
    """
    return service_of(request).manager


Manager = Annotated[AsyncLRUManager, Depends(get_manager)]
"""The application's manager, as a parameter of a handler."""
