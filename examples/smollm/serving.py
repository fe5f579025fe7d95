"""The chat service in a thread of its own, over a tiny model, for tests that block."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import uvicorn
from examples.smollm.service import Served, app
from examples.smollm.tiny import write_tiny
from tests.service.in_thread import DEADLINE_S, until


class ChatService:
    """A running service: its address, and what it is made of."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.served: Served = app.state.served

    def is_idle(self) -> bool:
        """Whether no chat has pages or pins."""
        engine = self.served.engine
        pinned = engine.kv.get_stats().pinned
        return engine.pool.free_pages == engine.pool.num_pages and pinned == 0

    @contextmanager
    def stuck(self) -> Iterator[Callable[[], bool]]:
        """Let no token be decoded in here; yields what waits until one is about to be."""
        model = self.served.engine.model
        begun, go_on, decode = threading.Event(), threading.Event(), model.decode

        def stuck_decode(*args: object) -> object:
            begun.set()
            go_on.wait(DEADLINE_S)
            return decode(*args)  # type: ignore[arg-type]

        with mock.patch.object(model, "decode", stuck_decode):
            try:
                yield lambda: begun.wait(DEADLINE_S)
            finally:
                go_on.set()


@contextmanager
def running(folder: Path, **settings: object) -> Iterator[ChatService]:
    """Run the service; it must start, and stop, in good order."""
    environment = {"SMOLLM_GGUF": str(write_tiny(folder / "tiny.gguf"))}
    environment |= {f"SMOLLM_{name.upper()}": str(value) for name, value in settings.items()}
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    with mock.patch.dict("os.environ", environment):
        thread.start()
        until(lambda: server.started or not thread.is_alive())
    try:
        assert thread.is_alive()
        yield ChatService(f"http://127.0.0.1:{listening.getsockname()[1]}")
    finally:
        server.should_exit = True
        thread.join(DEADLINE_S)
        listening.close()
    assert not thread.is_alive()
