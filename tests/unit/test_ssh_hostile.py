"""A hostile SSH server at the other end of the port: the client ends soon, small, and without having logged in."""

from __future__ import annotations

import os
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import paramiko
import pytest

from vmsandbox.errors import GuestError
from vmsandbox.guest.keys import KeyPair, new_key_pair
from vmsandbox.guest.ssh import GuestShell
from vmsandbox.guest.streams import join_streams
from vmsandbox.guest.words import remote_command

DEADLINE = 3.0  # seconds that the client is given
Talk = Callable[[socket.socket], None]


def talk_to(server: Talk, keys: KeyPair, host_key: str) -> tuple[BaseException | None, float]:
    """Connect to a server made of bytes; returns the client's error and how long it took."""
    ours, theirs = socket.socketpair()

    def serve() -> None:
        with theirs, suppress(OSError):
            server(theirs)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    began = time.monotonic()
    problem: BaseException | None = None
    try:
        GuestShell.connect(ours, user="claude-worker", host_key=host_key, user_key=keys.private, deadline=DEADLINE)
    except Exception as error:
        problem = error
    took = time.monotonic() - began
    ours.close()
    thread.join(timeout=5)
    assert not thread.is_alive(), "the client left its socket open"
    return problem, took


def silent(sock: socket.socket) -> None:
    while sock.recv(4096):
        pass


def endless_banner(sock: socket.socket) -> None:
    while True:
        sock.sendall(b"A" * 65536)


def many_banner_lines(sock: socket.socket) -> None:
    while True:
        sock.sendall(b"welcome\r\n" * 1000)


def dripping_banner(sock: socket.socket) -> None:
    for byte in b"SSH-2.0-slow" * 1000:
        sock.sendall(bytes([byte]))
        time.sleep(0.2)


def old_version(sock: socket.socket) -> None:
    sock.sendall(b"SSH-1.5-old\r\n")
    silent(sock)


def huge_packet(sock: socket.socket) -> None:
    sock.sendall(b"SSH-2.0-x\r\n" + struct.pack(">I", 0x7FFFFFF0) + b"\x04\x14")
    while True:
        sock.sendall(b"B" * 65536)


def negative_packet(sock: socket.socket) -> None:
    sock.sendall(b"SSH-2.0-x\r\n" + b"\xff" * 64)
    silent(sock)


def huge_kexinit(sock: socket.socket) -> None:
    """Name lists as long as one packet may be, again and again."""
    names = b",".join(b"kex%d" % number for number in range(3000))
    lists = (struct.pack(">I", len(names)) + names) * 8 + bytes(8)
    payload = b"\x14" + bytes(16) + lists
    padding = 8 - (len(payload) + 5) % 8 + 8
    packet = struct.pack(">IB", len(payload) + padding + 1, padding) + payload + bytes(padding)
    sock.sendall(b"SSH-2.0-x\r\n")
    while True:
        sock.sendall(packet)


def ignored_messages(sock: socket.socket) -> None:
    """SSH_MSG_IGNORE for ever, before the key exchange."""
    packet = struct.pack(">IB", 12, 6) + b"\x02\x00\x00\x00\x00" + bytes(6)
    sock.sendall(b"SSH-2.0-x\r\n")
    while True:
        sock.sendall(packet * 100)


def garbage(sock: socket.socket) -> None:
    sock.sendall(b"SSH-2.0-x\r\n" + os.urandom(4096))
    silent(sock)


def hangs_up(sock: socket.socket) -> None:
    sock.sendall(b"SSH-2.0-x\r\n")


@pytest.mark.parametrize(
    "server",
    [silent, endless_banner, many_banner_lines, dripping_banner, old_version, huge_packet, negative_packet,
     huge_kexinit, ignored_messages, garbage, hangs_up],
    ids=lambda server: server.__name__,
)  # fmt: skip
def test_it_ends_in_time_and_memory(server: Talk) -> None:
    keys = new_key_pair()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    problem, took = talk_to(server, keys, new_key_pair().public)
    assert isinstance(problem, GuestError), problem
    assert took < DEADLINE + 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024, "KiB"
    assert len(problem.details) < 1000
    assert "\x1b" not in problem.details


class Server(paramiko.ServerInterface):
    """A server that lets everybody in, and remembers who asked for what."""

    def __init__(self) -> None:
        self.users: list[str] = []
        self.commands: list[bytes] = []
        self.channels: list[Any] = []
        self.opened = 0
        self.answer = paramiko.OPEN_SUCCEEDED
        self.answers = threading.Event()  # cleared: none comes
        self.answers.set()

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        self.users.append(username)
        return paramiko.AUTH_SUCCESSFUL

    def get_allowed_auths(self, username: str) -> str:
        self.users.append(username)
        return "publickey,password,keyboard-interactive"

    def check_channel_request(self, kind: str, chanid: int) -> int:
        self.answers.wait(10)
        self.opened += 1
        return self.answer

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        self.commands.append(command)
        self.channels.append(channel)
        return True


class Guest:
    """A paramiko server on one end of a socket pair."""

    def __init__(self) -> None:
        self.ours, theirs = socket.socketpair()
        self.host_key, self.user_key = new_key_pair(), new_key_pair()
        import io

        self.server = Server()
        self.transport = paramiko.Transport(theirs)
        self.transport.add_server_key(paramiko.Ed25519Key.from_private_key(io.StringIO(self.host_key.private)))
        self.transport.start_server(event=threading.Event(), server=self.server)

    def connect(self, host_key: str | None = None, user_key: str | None = None) -> GuestShell:
        return GuestShell.connect(
            self.ours, user="claude-worker", host_key=host_key or self.host_key.public,
            user_key=user_key or self.user_key.private, deadline=10,
        )  # fmt: skip


@pytest.fixture
def guest() -> Iterator[Guest]:
    server = Guest()
    yield server
    server.transport.close()
    server.ours.close()


def test_the_right_host_key_is_let_through(guest: Guest) -> None:
    """Or the tests below would pass with a client that never connects."""
    shell = guest.connect()
    assert guest.server.users == ["claude-worker"]
    shell.close()


def test_a_wrong_host_key_ends_it_before_any_login(guest: Guest) -> None:
    with pytest.raises(GuestError, match="host key is not the one"):
        guest.connect(host_key=new_key_pair().public)
    time.sleep(0.2)
    assert guest.server.users == [], "the server saw a login attempt"
    assert not guest.transport.is_authenticated()


def test_only_the_sessions_own_key_is_offered(guest: Guest, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """A server that refuses it is offered no other one: no agent, nothing of ~/.ssh."""
    home = tmp_path / ".ssh"
    home.mkdir()
    (home / "id_ed25519").write_text(new_key_pair().private)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "agent"))
    offered: list[str] = []

    def refuse(_username: str, key: paramiko.PKey) -> int:
        offered.append(key.get_base64())
        return paramiko.AUTH_FAILED

    monkeypatch.setattr(guest.server, "check_auth_publickey", refuse)
    with pytest.raises(GuestError):
        guest.connect()
    assert set(offered) == {guest.user_key.public.split()[1]}


def test_channels_that_the_server_opens_are_refused(guest: Guest) -> None:
    shell = guest.connect()
    for kind, arguments in (
        ("auth-agent@openssh.com", ()),
        ("x11", (None, ("127.0.0.1", 6000))),
        ("forwarded-tcpip", (("127.0.0.1", 22), ("127.0.0.1", 4000))),
        ("session", ()),
        ("direct-tcpip", (("127.0.0.1", 22), ("127.0.0.1", 4000))),
        ("forwarded-streamlocal@openssh.com", ()),
    ):
        with pytest.raises(paramiko.ChannelException):
            guest.transport.open_channel(kind, *arguments, timeout=10)
    assert shell.is_open
    shell.close()


def test_a_flood_of_output_ends_at_the_limit(guest: Guest) -> None:
    shell = guest.connect()

    def flood() -> None:
        while not guest.server.channels:
            time.sleep(0.01)
        with suppress(OSError, EOFError):
            while True:
                guest.server.channels[0].sendall(b"x" * 32768)

    threading.Thread(target=flood, daemon=True).start()
    with pytest.raises(GuestError, match="wrote more than"):
        shell.run(["x"], limit=1 << 20, timeout=20)
    shell.close()


def test_a_server_is_heard_out_before_it_is_left(guest: Guest) -> None:
    shell = guest.connect()
    shell.leave()
    assert guest.server.opened == 1 and not shell.is_open


def test_a_server_that_was_asked_once_is_not_asked_again(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest.server, "answer", paramiko.OPEN_FAILED_RESOURCE_SHORTAGE)
    shell = guest.connect()
    with pytest.raises(GuestError, match="did not start the command"):
        shell.start(["x"])
    shell.leave()
    assert guest.server.opened == 1 and not shell.is_open


def test_a_server_that_never_answers_is_left_all_the_same(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmsandbox.guest.ssh._LEAVE_SECONDS", 0.5)
    shell = guest.connect()
    guest.server.answers.clear()
    began = time.monotonic()
    shell.leave()
    assert not shell.is_open and time.monotonic() - began < 5
    guest.server.answers.set()


def test_a_command_that_never_ends_is_left(guest: Guest) -> None:
    shell = guest.connect()
    began = time.monotonic()
    with pytest.raises(GuestError, match="did not end"):
        shell.run(["x"], timeout=1)
    assert time.monotonic() - began < 5
    shell.close()


def test_a_connection_that_breaks_is_not_taken_for_a_status(guest: Guest) -> None:
    shell = guest.connect()
    channel = shell.start(["x"])
    while not guest.server.channels:
        time.sleep(0.01)
    threading.Timer(0.2, guest.transport.close).start()
    with pytest.raises(GuestError, match="broke"):
        join_streams(channel, None, lambda _data: None, lambda _data: None)


def test_a_server_that_goes_away_is_an_error(guest: Guest) -> None:
    shell = guest.connect()
    guest.transport.close()
    with pytest.raises(GuestError):
        shell.run(["x"], timeout=5)


@pytest.mark.parametrize("word", ["$(id)", "-oProxyCommand=x", "a'b", 'a"b', "a\nb", "--", "", "`id`", "\\", "ü", "!!"])
def test_words_reach_the_guests_shell_as_data(word: str) -> None:
    import subprocess

    line = remote_command(["printf", "%s.", word, word], cwd="/")
    done = subprocess.run(["bash", "-c", line], capture_output=True, check=True)
    assert done.stdout.decode() == f"{word}.{word}."


def test_a_folder_of_any_name_is_data(tmp_path: Any) -> None:
    import subprocess

    folder = tmp_path / "-o $(touch oops) ;'\n"
    folder.mkdir()
    done = subprocess.run(
        ["bash", "-c", remote_command(["pwd", "-P"], cwd=str(folder))], capture_output=True, cwd=tmp_path
    )
    assert done.stdout.decode() == f"{folder.resolve()}\n"
    assert not (tmp_path / "oops").exists()
    missing = subprocess.run(["bash", "-c", remote_command(["true"], cwd="/not/there")], capture_output=True)
    assert missing.returncode == 125, "a command must not run in another folder than the one it was meant for"
