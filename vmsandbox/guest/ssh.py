"""SSH over a virtio-serial port: the one module that imports paramiko.

The host key is pinned (the host made it), only the session's own key is offered, and neither an agent, ~/.ssh nor a
configuration file is read. The server is hostile: what it may send before it is authenticated, and how long one
packet may be, is bounded here, because paramiko bounds neither.
"""

from __future__ import annotations

import logging
import shlex
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from vmsandbox.errors import GuestError

# paramiko imports invoke (0.1 s) for `Match exec` in ssh_config files, which are never read here.
_had_invoke = "invoke" in sys.modules
if not _had_invoke:
    sys.modules["invoke"] = None  # type: ignore[assignment]
import paramiko  # noqa: E402
from paramiko.common import MSG_CHANNEL_REQUEST  # noqa: E402
from paramiko.packet import Packetizer  # noqa: E402

if not _had_invoke:
    del sys.modules["invoke"]

# Its log would show a hostile guest's text on the terminal.
logging.getLogger("paramiko").addHandler(logging.NullHandler())
logging.getLogger("paramiko").propagate = False

_HANDSHAKE_BYTES = 256 * 1024  # all that a server may send before it is authenticated
_PACKET_BYTES = 512 * 1024  # RFC 4253 6.1 asks for 35,000; OpenSSH allows 256 KiB
_WINDOW = 4 * 1024 * 1024
_PACKET_PAYLOAD = 64 * 1024
# Seconds. Under emulation (QEMU 7.2, Linux 6.12) one command in a hundred meets a lost wake-up: the driver there holds
# what we sent, and sshd sleeps on it until something else arrives at the port. Then this does.
KEEPALIVE = 0.5
USER_KEY_TYPE = "ssh-ed25519"


@dataclass(frozen=True)
class KeyPair:
    """An Ed25519 key in OpenSSH's formats: the private file's text, the public line ("ssh-ed25519 AAAA…")."""

    private: str
    public: str


def new_key_pair() -> KeyPair:
    """A fresh Ed25519 key from the host's random source."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return KeyPair(private.decode(), public.decode())


class _BoundedPacketizer(Packetizer):
    """Reads that end: a limit for everything before authentication, and for one packet after it."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.budget: int | None = _HANDSHAKE_BYTES

    def _spend(self, size: int) -> None:
        if self.budget is not None:
            self.budget -= size
            if self.budget < 0:
                raise paramiko.SSHException(f"the guest sent over {_HANDSHAKE_BYTES} bytes before its login")

    def read_all(self, n: int, check_rekey: bool = False) -> bytes:
        if not 0 <= n <= _PACKET_BYTES:
            raise paramiko.SSHException(f"the guest sent a packet of {n} bytes")
        self._spend(n)
        return super().read_all(n, check_rekey)

    def _read_timeout(self, timeout: float) -> bytes:  # the version banner is read through this
        untrusted: bytes = super()._read_timeout(timeout)  # type: ignore[misc]
        self._spend(len(untrusted))
        return untrusted


def _handle_request(channel: paramiko.Channel, message: paramiko.Message) -> None:
    """paramiko drops `exit-signal` (RFC 4254 6.10): turn it into the shell's 128+n."""
    start = message.packet.tell()
    if message.get_text() == "exit-signal":
        message.get_boolean()
        name = "SIG" + message.get_text()
        channel.exit_status = 128 + getattr(signal, name, signal.SIGKILL)
        channel.status_event.set()
        return
    message.packet.seek(start)
    channel._handle_request(message)  # type: ignore[attr-defined]


class _Transport(paramiko.Transport):
    _channel_handler_table = {  # noqa: RUF012 - paramiko's own name and type
        **paramiko.Transport._channel_handler_table,  # type: ignore[attr-defined]
        MSG_CHANNEL_REQUEST: _handle_request,
    }
    _preferred_kex = ("curve25519-sha256@libssh.org",)
    _preferred_keys = (USER_KEY_TYPE,)
    _preferred_ciphers = ("aes128-ctr", "aes256-ctr")
    _preferred_macs = ("hmac-sha2-256",)

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(
            sock, default_window_size=_WINDOW, default_max_packet_size=_PACKET_PAYLOAD, server_sig_algs=False
        )
        self.packetizer = _BoundedPacketizer(sock)


class GuestShell:
    """An authenticated SSH connection to a guest. Several channels may be open at once."""

    def __init__(self, transport: _Transport) -> None:
        self._transport = transport

    @classmethod
    def connect(
        cls, sock: socket.socket, *, user: str, host_key: str, user_key: str, deadline: float = 20
    ) -> GuestShell:
        """Log in over a connected socket.

        Args:
            sock: connected to the guest's port; owned by the connection from now on.
            user: account in the guest.
            host_key: the pinned public key, "ssh-ed25519 AAAA…"; another one ends it before any login.
            user_key: the session's private key, OpenSSH's text form.
            deadline: seconds for all of it.

        Raises:
            GuestError: a wrong host key, a refused login, silence, or a flood.
        """
        import io

        sock.settimeout(None)
        until = time.monotonic() + deadline
        transport = _Transport(sock)
        transport.banner_timeout = transport.handshake_timeout = transport.auth_timeout = deadline
        transport.daemon = True
        try:
            transport.start_client(timeout=deadline)
            untrusted_key = transport.get_remote_server_key()
            offered = f"{untrusted_key.get_name()} {untrusted_key.get_base64()}"
            if offered != " ".join(host_key.split()[:2]):
                raise GuestError(
                    "the guest's SSH host key is not the one that this session was given",
                    details=f"expected {host_key}\noffered  {offered[:200]}",
                    resolution="do not trust this guest: stop it",
                )
            key = paramiko.Ed25519Key.from_private_key(io.StringIO(user_key))
            transport.auth_timeout = max(until - time.monotonic(), 1)
            transport.auth_publickey(user, key)
            packetizer = transport.packetizer
            assert isinstance(packetizer, _BoundedPacketizer)
            packetizer.budget = None
            transport.set_keepalive(KEEPALIVE)
        except (paramiko.SSHException, OSError, EOFError, ValueError) as error:
            transport.close()
            raise GuestError(
                "the guest's SSH server did not let this session in",
                details=f"{type(error).__name__}: {error}"[:500],
                resolution="`vmsandbox logs NAME` shows what happened before",
            ) from error
        except BaseException:
            transport.close()
            raise
        return cls(transport)

    def close(self) -> None:
        """End the connection; its port is free again."""
        self._transport.close()

    @property
    def is_open(self) -> bool:
        """Whether the connection still stands."""
        return bool(self._transport.is_active())

    def start(
        self,
        command: Sequence[str] | None,
        *,
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        terminal: tuple[str, int, int] | None = None,
    ) -> Any:
        """Start a command (None: a login shell) and return its channel.

        Args:
            command: the program and its arguments; each reaches the guest as it is, never as shell syntax.
            cwd: folder in the guest.
            env: variables for the command, beside the guest's own.
            terminal: (TERM, columns, rows) for a pseudo-terminal.

        Raises:
            GuestError: the connection is gone or the guest refused.
        """
        try:
            channel = self._transport.open_session(timeout=20)
            if terminal is not None:
                channel.get_pty(*terminal)
            if command is None and cwd is None:
                channel.invoke_shell()
            else:
                channel.exec_command(remote_command(command, cwd, env))
        except (paramiko.SSHException, OSError, EOFError) as error:
            raise GuestError("the guest did not start the command", details=str(error)[:500]) from error
        return channel

    def run(
        self, command: Sequence[str], *, stdin: bytes = b"", timeout: float = 60, limit: int = 1 << 20
    ) -> tuple[int, bytes, bytes]:
        """Run a small command to its end; returns (status, untrusted stdout, untrusted stderr).

        Raises:
            GuestError: it did not end in `timeout` seconds or wrote more than `limit` bytes.
        """
        channel = self.start(command)
        until = time.monotonic() + timeout
        untrusted_out, untrusted_err = bytearray(), bytearray()
        try:
            if stdin:
                channel.sendall(stdin)
            channel.shutdown_write()
            channel.settimeout(0.25)
            while True:
                idle = True
                for ready, receive, untrusted in (
                    (channel.recv_ready, channel.recv, untrusted_out),
                    (channel.recv_stderr_ready, channel.recv_stderr, untrusted_err),
                ):
                    if ready():
                        untrusted += receive(_PACKET_PAYLOAD)
                        idle = False
                if len(untrusted_out) + len(untrusted_err) > limit:
                    raise GuestError(f"the guest wrote more than {limit} bytes", details=shlex.join(command))
                if idle and channel.closed:
                    break
                if idle:
                    _wait_readable(channel)
                if time.monotonic() > until:
                    raise GuestError(
                        f"a command in the guest did not end in {timeout:g} seconds",
                        details=shlex.join(command),
                    )
            return channel.recv_exit_status(), bytes(untrusted_out), bytes(untrusted_err)
        except (paramiko.SSHException, OSError, EOFError) as error:
            raise GuestError("the connection to the guest broke", details=str(error)[:500]) from error
        finally:
            channel.close()


def _wait_readable(channel: Any) -> None:
    """Sleep until the channel has something, at most 50 ms (its close wakes no one by itself)."""
    import select

    with suppress(OSError, ValueError):
        select.select([channel], [], [], 0.05)


def remote_command(command: Sequence[str] | None, cwd: str | None = None, env: dict[str, str] | None = None) -> str:
    """What the guest's shell gets: every word quoted, so that names are data and never syntax."""
    parts = [f"cd -- {shlex.quote(cwd)} || exit 125"] if cwd else []
    words = list(command) if command is not None else ["bash", "-l"]
    prefix = [f"{name}={shlex.quote(value)}" for name, value in (env or {}).items()]
    # exec --: a shell builtin's name, or a name like -c, is looked up as a program.
    parts.append(" ".join([*prefix, "exec --", shlex.join(words)]))
    return "; ".join(parts)


def exit_status(channel: Any, seconds: float) -> int:
    """A command's exit status. Raises GuestError if it does not end within `seconds`."""
    if not channel.status_event.wait(seconds):
        raise GuestError(f"a command in the guest did not end in {seconds:g} seconds")
    status: int = channel.recv_exit_status()
    return status


def send_signal(channel: Any, name: str) -> None:
    """Send a signal ("INT") to the command of a channel (RFC 4254 6.9). A connection that is gone is no error."""
    message = paramiko.Message()
    message.add_byte(bytes([MSG_CHANNEL_REQUEST]))
    message.add_int(channel.remote_chanid)
    message.add_string("signal")
    message.add_boolean(False)
    message.add_string(name)
    with suppress(OSError, EOFError, paramiko.SSHException):
        channel.get_transport()._send_user_message(message)
