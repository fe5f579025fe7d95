"""The sockets that a service listens on, made first, so that mistakes show at once."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError

BACKLOG = 2048
LOCK_WAIT_S = 5.0


@dataclass(frozen=True, slots=True)
class Listener:
    """Sockets that listen.

    Attributes:
        sockets: One, or one for each address that a host name has.
        url: Where a client finds the service.
        path: The Unix socket's file, with what it is known by again; `None` for TCP.
    """

    sockets: list[socket.socket]
    url: str
    path: tuple[Path, os.stat_result] | None = None

    def close(self) -> None:
        """Close the sockets and remove the file, if it is still the same; idempotent."""
        for each in self.sockets:
            each.close()
        if self.path is None:
            return
        path, made = self.path
        with suppress(OSError, ConfigError), _locked(path.parent):
            if os.path.samestat(path.lstat(), made):
                path.unlink()


def listen(*, host: str, port: int, uds: Path | None = None) -> Listener:
    """Listen on a Unix socket if there is a path, on a host and port otherwise.

    Raises:
        ConfigError: It can't be listened there; says why and what to do.
    """
    return _listen_unix(uds) if uds is not None else _listen_tcp(host, port)


def _listen_unix(path: Path) -> Listener:
    path = path.absolute()
    try:
        with _locked(path.parent):
            _remove_stale(path)
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                # Only our user may connect, from the first moment on.
                old = os.umask(0o177)
                try:
                    sock.bind(str(path))
                finally:
                    os.umask(old)
                # At once: who comes next and finds it must see that somebody listens.
                sock.listen(BACKLOG)
                return Listener([sock], f"unix:{path}", (path, path.lstat()))
            except BaseException:
                sock.close()
                raise
    except OSError as exc:
        raise ConfigError(f"can't listen on the Unix socket {path}: {exc.strerror or exc}") from exc


def _remove_stale(path: Path) -> None:
    """Remove the file of a socket that nobody listens on.

    Raises:
        ConfigError: Somebody does, or it is another kind of file.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(
            f"{path} is there already and is no socket: remove it, or give the service another path"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:
            pass  # so many wait to be let in that there is no room for one more
    raise ConfigError(
        f"a process listens on {path} already: use that service, stop it, or give this one "
        "another path"
    )


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keep out others that look for stale sockets in a directory.

    Otherwise two that start at once could both find one, and the second remove the first's new one.

    Raises:
        ConfigError: Somebody holds the lock for long.
        OSError: The directory can't be opened.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        deadline = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ConfigError(f"another process keeps {directory} locked") from None
                time.sleep(0.01)
        yield
    finally:
        os.close(fd)


def _listen_tcp(host: str, port: int) -> Listener:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else str(exc)
        raise ConfigError(f"host {host!r} is no address of this machine: {why}") from exc
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            if port == 0 and sockets:  # the same for all addresses
                address = (address[0], sockets[0].getsockname()[1], *address[2:])
            try:
                sockets.append(_bound(family, kind, protocol, address))
            except OSError as exc:
                if exc.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                missing = exc  # `localhost` is ::1 too, where there may be no IPv6
        if not sockets and missing is not None:
            raise missing
    except OSError as exc:
        for each in sockets:
            each.close()
        if exc.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} of {host} is in use: stop the process that listens there, or give "
                "this service another port"
            ) from exc
        raise ConfigError(f"can't listen on port {port} of {host}: {exc.strerror}") from exc
    shown = f"[{host}]" if ":" in host else host
    return Listener(sockets, f"http://{shown}:{sockets[0].getsockname()[1]}")


def _bound(
    family: int, kind: int, protocol: int, address: tuple[str | int | bytes, ...]
) -> socket.socket:
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock
