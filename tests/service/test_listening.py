"""The sockets that a service listens on."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvoffload import ConfigError
from kvoffload.service import listening
from kvoffload.service.listening import listen


def stale(path: Path) -> None:
    """Leave the file of a socket that nobody listens on."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


def test_a_unix_socket_is_made_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    listener = listen(host="", port=0, uds=path)
    assert listener.url == f"unix:{path}"
    assert path.stat().st_mode & 0o777 == 0o600
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    listener.close()
    assert not path.exists()
    listener.close()


def test_the_umask_is_as_it_was(tmp_path: Path) -> None:
    old = os.umask(0o123)
    try:
        listen(host="", port=0, uds=tmp_path / "socket").close()
        with pytest.raises(ConfigError):
            listen(host="", port=0, uds=tmp_path / ("x" * 200))
        assert os.umask(0o123) == 0o123
    finally:
        os.umask(old)


def test_a_stale_one_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    stale(path)
    listen(host="", port=0, uds=path).close()
    assert not path.exists()


def test_a_live_one_is_refused_even_when_no_more_are_let_in(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with ExitStack() as stack:
        other = stack.enter_context(socket.socket(socket.AF_UNIX))
        other.bind(str(path))
        other.listen(0)
        for _ in range(3):
            with pytest.raises(ConfigError, match="a process listens on"):
                listen(host="", port=0, uds=path)
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            client.connect_ex(str(path))
        assert path.is_socket()


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_is_no_socket_stays(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    if kind == "file":
        path.write_text("mine")
    elif kind == "directory":
        path.mkdir()
    else:
        stale(tmp_path / "other")
        path.symlink_to(tmp_path / "other")
    with pytest.raises(ConfigError, match="is there already and is no socket"):
        listen(host="", port=0, uds=path)
    assert os.path.lexists(path)


def test_one_of_another_kind_stays(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(path))
        with pytest.raises(ConfigError, match="can't listen on the Unix socket"):
            listen(host="", port=0, uds=path)
        assert path.is_socket()


def test_one_that_took_our_place_stays(tmp_path: Path) -> None:
    """Somebody removed ours and made another one: it is not ours to remove."""
    path = tmp_path / "socket"
    listener = listen(host="", port=0, uds=path)
    path.unlink()
    stale(path)
    listener.close()
    assert path.is_socket()


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"can't listen on the Unix socket .*: No such file"):
        listen(host="", port=0, uds=tmp_path / "no" / "socket")


def test_a_directory_that_stays_locked_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "LOCK_WAIT_S", 0.0)
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match=r"keeps .* locked"):
            listen(host="", port=0, uds=tmp_path / "socket")
    finally:
        os.close(fd)


def test_of_many_that_find_a_stale_one_at_once_one_gets_it(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    stale(path)
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from kvoffload import ConfigError\n"
        "from kvoffload.service.listening import listen\n"
        "sys.stdin.readline()\n"
        "try:\n"
        "    listener = listen(host='', port=0, uds=Path(sys.argv[1]))\n"
        "except ConfigError:\n"
        "    print('refused', flush=True)\n"
        "else:\n"
        "    print('listens', flush=True)\n"
        "    sys.stdin.readline()\n"
        "    listener.close()\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    try:
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        answers = [process.stdout.readline() for process in processes if process.stdout]
        assert sorted(answers) == ["listens\n", "refused\n", "refused\n", "refused\n"]
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    finally:
        for process in processes:
            process.communicate("\n", timeout=30)
    assert not path.exists()


def test_any_free_port() -> None:
    listener = listen(host="127.0.0.1", port=0)
    host, port = listener.sockets[0].getsockname()
    assert listener.url == f"http://127.0.0.1:{port}"
    with socket.create_connection((host, port)):
        pass
    with pytest.raises(ConfigError, match=rf"port {port} of 127\.0\.0\.1 is in use"):
        listen(host="127.0.0.1", port=port)
    listener.close()
    listen(host="127.0.0.1", port=port).close()


def test_all_addresses_of_a_name() -> None:
    listener = listen(host="localhost", port=0)
    assert len({sock.getsockname()[1] for sock in listener.sockets}) == 1
    assert listener.url.startswith("http://localhost:")
    listener.close()


def test_a_name_with_an_address_of_nobody_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """`localhost` may be ::1 as well, where there is no IPv6."""
    found = socket.getaddrinfo("127.0.0.1", 0, type=socket.SOCK_STREAM)
    nobody = socket.getaddrinfo("192.0.2.1", 0, type=socket.SOCK_STREAM)

    def both(*_arguments: object, **_options: object) -> object:
        return nobody + found

    monkeypatch.setattr(socket, "getaddrinfo", both)
    listener = listen(host="localhost", port=0)
    assert [sock.getsockname()[0] for sock in listener.sockets] == ["127.0.0.1"]
    listener.close()


def test_ipv6() -> None:
    try:
        listener = listen(host="::1", port=0)
    except ConfigError as exc:
        pytest.skip(f"no IPv6: {exc}")
    assert listener.url.startswith("http://[::1]:")
    listener.close()


@pytest.mark.parametrize(
    ("host", "complaint"),
    [
        ("no.such.host.invalid", "host 'no.such.host.invalid' is no address of this machine"),
        ("x" * 300, "is no address of this machine"),
        ("192.0.2.1", "can't listen on port 0 of 192.0.2.1: "),
    ],
)
def test_an_address_of_nobody(host: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        listen(host=host, port=0)
