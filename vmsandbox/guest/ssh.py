"""SSH over a virtio-serial port.

The host key is pinned (the host made it), only the session's own key is offered, and neither an agent, ~/.ssh nor a
configuration file is read. `guest.transport` bounds what a hostile server may do.
"""

from __future__ import annotations

import shlex
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from vmsandbox.errors import GuestError
from vmsandbox.guest.forward import Forwarding
from vmsandbox.guest.transport import CONNECTION_ERRORS, PACKET_PAYLOAD, Transport, private_key
from vmsandbox.guest.transport import send_signal as send_signal
from vmsandbox.guest.words import remote_command

# Seconds. Under emulation (QEMU 7.2, Linux 6.12) one command in a hundred meets a lost wake-up: the driver there holds
# what we sent, and sshd sleeps on it until something else arrives at the port. Then this does.
KEEPALIVE = 0.5
_LEAVE_SECONDS = 5.0
PLUMBING = "VMSANDBOX_PLUMBING"  # cloudinit/guest/sshd_config accepts it


class GuestShell:
    """An authenticated SSH connection to a guest. Several channels may be open at once."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._asked = False  # whether a channel was ever asked for

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
        sock.settimeout(None)
        until = time.monotonic() + deadline
        transport = Transport(sock)
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
            transport.auth_timeout = max(until - time.monotonic(), 1)
            transport.auth_publickey(user, private_key(user_key))
            transport.trust()
            transport.set_keepalive(KEEPALIVE)
        except (*CONNECTION_ERRORS, ValueError) as error:
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

    def leave(self) -> None:
        """End the connection to a guest that goes on; its port is free again.

        A server that has just let somebody in has something more to say, and goes on trying: on a port that nobody has
        open any more, with all of a processor, until the next one comes. A server that has opened a channel is past it.
        """
        try:
            if not self._asked:
                with suppress(Exception):  # whatever the guest answers
                    self._open_channel(_LEAVE_SECONDS).close()
        finally:
            self.close()

    def close(self) -> None:
        """End the connection at once."""
        self._transport.close()

    def _open_channel(self, seconds: float = 20) -> Any:
        self._asked = True
        return self._transport.open_session(timeout=seconds)

    @property
    def is_open(self) -> bool:
        """Whether the connection still stands."""
        return bool(self._transport.is_active())

    def forward(self, listening: tuple[str, int], connect: Callable[[], socket.socket], limit: int) -> Forwarding:
        """Let the guest listen on a port of its own whose connections are joined to the host's (`Forwarding`).

        Only asked for here: what is started afterwards finds the port there. `wait_for_port` hears the answer.

        Raises:
            GuestError: the connection is gone.
        """
        forwarding = Forwarding(listening, connect, limit)
        try:
            self._transport.ask_to_forward(forwarding)
        except CONNECTION_ERRORS as error:
            raise GuestError("the connection to the guest broke", details=str(error)[:500]) from error
        return forwarding

    def wait_for_port(self, deadline: float = 20) -> None:
        """Raises GuestError if the guest's SSH server did not open the port within `deadline` seconds."""
        try:
            self._transport.wait_for_port(deadline)
        except CONNECTION_ERRORS as error:
            raise GuestError("the guest opened no port for its network", details=str(error)[:500]) from error

    def start(
        self,
        command: Sequence[str] | None,
        *,
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        terminal: tuple[str, int, int] | None = None,
        plumbing: bool = False,
    ) -> Any:
        """Start a command (None: a login shell) and return its channel.

        Args:
            command: the program and its arguments; each reaches the guest as it is, never as shell syntax.
            cwd: folder in the guest.
            env: variables for the command, beside the guest's own.
            terminal: (TERM, columns, rows) for a pseudo-terminal.
            plumbing: it is the host's own, and works under any system-call filter of the policy (worker-shell).

        Raises:
            GuestError: the connection is gone or the guest refused.
        """
        try:
            channel = self._open_channel()
            if plumbing:
                channel.update_environment({PLUMBING: "1"})
            if terminal is not None:
                channel.get_pty(*terminal)
            if command is None and cwd is None:
                channel.invoke_shell()
            else:
                channel.exec_command(remote_command(command, cwd, env))
        except CONNECTION_ERRORS as error:
            raise GuestError("the guest did not start the command", details=str(error)[:500]) from error
        return channel

    def evaluate(self, script: str) -> Any:
        """Let the login shell itself run a script, without a program or start-up file beside it; returns its channel.

        Raises:
            GuestError: the connection is gone or the guest refused.
        """
        try:
            channel = self._open_channel()
            channel.update_environment({PLUMBING: "check"})
            channel.exec_command(script)
        except CONNECTION_ERRORS as error:
            raise GuestError("the guest did not start its shell", details=str(error)[:500]) from error
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
                        untrusted += receive(PACKET_PAYLOAD)
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
        except CONNECTION_ERRORS as error:
            raise GuestError("the connection to the guest broke", details=str(error)[:500]) from error
        finally:
            channel.close()


def _wait_readable(channel: Any) -> None:
    """Sleep until the channel has something, at most 50 ms (its close wakes no one by itself)."""
    import select

    with suppress(OSError, ValueError):
        select.select([channel], [], [], 0.05)


def exit_status(channel: Any, seconds: float) -> int:
    """A command's exit status. Raises GuestError if it does not end within `seconds`."""
    if not channel.status_event.wait(seconds):
        raise GuestError(f"a command in the guest did not end in {seconds:g} seconds")
    status: int = channel.recv_exit_status()
    return status
