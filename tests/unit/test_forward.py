"""A port of the guest that leads to the host: joined both ways, bounded, and nothing else is let in."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import paramiko
import pytest
from paramiko.common import MSG_CHANNEL_DATA
from test_ssh_hostile import Guest

from vmsandbox.errors import GuestError
from vmsandbox.guest.forward import WINDOW, Forwarding
from vmsandbox.guest.ssh import GuestShell

PORT = ("127.0.0.1", 3128)
LIMIT = 4


class Host:
    """A unix socket on the host, with one function per connection."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.connections: list[socket.socket] = []
        self.serve: Callable[[socket.socket], None] = self.echo
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen(64)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                self.connections.append(sock)
                threading.Thread(target=self.serve, args=(sock,), daemon=True).start()

    def echo(self, sock: socket.socket) -> None:
        """Send all back, then say that it ended."""
        with sock, suppress(OSError):
            while data := sock.recv(65536):
                sock.sendall(data)
            sock.sendall(b"END")

    def hold(self, sock: socket.socket) -> None:
        """Neither read nor write."""

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(str(self.path))
        except OSError:
            sock.close()
            raise
        return sock


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = Host(tmp_path / "broker")
    yield made
    made.listener.close()


@pytest.fixture
def guest() -> Iterator[Guest]:
    made = Guest()
    made.server.check_port_forward_request = lambda _address, port: port  # type: ignore[method-assign]
    yield made
    made.transport.close()
    made.ours.close()


@pytest.fixture
def shell(guest: Guest) -> Iterator[GuestShell]:
    made = guest.connect()
    yield made
    made.close()


@pytest.fixture
def forwarding(shell: GuestShell, host: Host) -> Forwarding:
    made = shell.forward(PORT, host.connect, LIMIT)
    shell.wait_for_port()
    return made


def opened(guest: Guest, server: tuple[str, int] = PORT) -> Any:
    """A connection that a program in the guest made to the port."""
    channel = guest.transport.open_channel("forwarded-tcpip", server, ("127.0.0.1", 4000), timeout=10)
    channel.settimeout(10)
    return channel


def read_all(channel: Any) -> bytes:
    found = b""
    while data := channel.recv(65536):
        found += data
    return found


def within(seconds: float, condition: Callable[[], bool]) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "not in time"
        time.sleep(0.01)


def threads() -> int:
    return sum(thread.name.startswith("forward") for thread in threading.enumerate())


def test_bytes_go_both_ways_and_each_side_ends_its_own(guest: Guest, forwarding: Forwarding) -> None:
    channels = [opened(guest) for _ in range(LIMIT)]
    data = bytes(range(256)) * 2000
    for number, channel in enumerate(channels):
        threading.Thread(target=lambda c=channel, n=number: (c.sendall(b"%d" % n + data), c.shutdown_write())).start()
    for number, channel in enumerate(channels):
        assert read_all(channel) == b"%d" % number + data + b"END"
    within(5, lambda: forwarding.open_connections == 0 and threads() == 0)
    assert opened(guest)


def test_channels_that_were_not_asked_for_are_refused(guest: Guest, forwarding: Forwarding) -> None:
    for server in (("127.0.0.1", 22), ("0.0.0.0", 3128), ("localhost", 3128), ("", 0)):
        with pytest.raises(paramiko.ChannelException) as refused:
            opened(guest, server)
        assert refused.value.code == 1
    for kind, arguments in (
        ("auth-agent@openssh.com", ()),
        ("x11", (None, ("127.0.0.1", 6000))),
        ("session", ()),
        ("direct-tcpip", (PORT, ("127.0.0.1", 4000))),
    ):
        with pytest.raises(paramiko.ChannelException):
            guest.transport.open_channel(kind, *arguments, timeout=10)
    assert forwarding.open_connections == 0


def test_their_number_is_limited(guest: Guest, host: Host, forwarding: Forwarding) -> None:
    host.serve = host.hold
    channels = [opened(guest) for _ in range(LIMIT)]
    for _ in range(3):
        with pytest.raises(paramiko.ChannelException) as refused:
            opened(guest)
        assert refused.value.code == 4
    assert forwarding.refused == 3
    channels[0].close()
    within(5, lambda: forwarding.open_connections == LIMIT - 1)
    opened(guest)


def test_a_side_that_does_not_read_holds_the_other_back(guest: Guest, host: Host, forwarding: Forwarding) -> None:
    host.serve = host.hold
    channel = opened(guest)
    channel.settimeout(1)
    sent = 0
    with pytest.raises(TimeoutError):
        while sent < 64 << 20:
            sent += channel.send(b"x" * 65536)
    assert sent < 4 << 20


def test_a_guest_that_sends_more_than_its_window_is_hung_up_on(
    guest: Guest, shell: GuestShell, host: Host, forwarding: Forwarding
) -> None:
    host.serve = host.hold
    channel = opened(guest)
    for _ in range(200):  # 12 MiB
        message = paramiko.Message()
        message.add_byte(bytes([MSG_CHANNEL_DATA]))
        message.add_int(channel.remote_chanid)
        message.add_string(b"x" * 65536)
        with suppress(Exception):
            guest.transport._send_user_message(message)  # type: ignore[attr-defined]
    within(10, lambda: not shell.is_open)
    within(5, lambda: threads() == 0)
    assert 4 * WINDOW < 12 << 20


def test_without_a_broker_the_guest_hears_at_once(guest: Guest, host: Host, forwarding: Forwarding) -> None:
    host.listener.close()
    host.path.unlink()
    with suppress(paramiko.SSHException):  # opened and closed again before its opener has looked
        assert read_all(opened(guest)) == b""
    within(5, lambda: forwarding.open_connections == 0)


def test_a_broker_that_dies_ends_its_connections(guest: Guest, host: Host, forwarding: Forwarding) -> None:
    host.serve = host.hold
    channel = opened(guest)
    channel.sendall(b"waiting")
    within(5, lambda: len(host.connections) == 1)
    assert host.connections[0].recv(100) == b"waiting"  # unread, it would make the close a reset
    host.connections[0].close()
    assert read_all(channel) == b""
    within(5, lambda: channel.closed and threads() == 0)


def test_the_end_of_the_connection_ends_all(
    guest: Guest, shell: GuestShell, host: Host, forwarding: Forwarding
) -> None:
    host.serve = host.hold
    for _ in range(LIMIT):
        opened(guest)
    shell.close()
    within(5, lambda: threads() == 0)


@pytest.mark.parametrize("answer", ["no", "silence"])
def test_a_server_that_opens_no_port(guest: Guest, host: Host, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    shell = guest.connect()

    def decide(_address: str, _port: int) -> bool:
        if answer == "silence":
            time.sleep(3)
        return False

    monkeypatch.setattr(guest.server, "check_port_forward_request", decide)
    began = time.monotonic()
    shell.forward(PORT, host.connect, LIMIT)
    with pytest.raises(GuestError, match="no port"):
        shell.wait_for_port(1)
    assert time.monotonic() - began < 2
    shell.close()
