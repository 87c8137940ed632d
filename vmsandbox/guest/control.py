"""Host end of the control port: one JSON line out, one JSON line back.

The guest is hostile: every reply is bounded in size and time, and what it says is only ever compared with what the
host already knows or shown as text.
"""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

from vmsandbox.errors import GuestError

REPLY_LIMIT = 1 << 16  # bytes
_GREETING = b"vmsandbox\r\n"  # from cloudinit/guest/ssh-port in a new fork, before sshd starts


class PortClosedError(GuestError):
    """QEMU closed the port: the guest is gone."""


class ControlPort:
    """A connection to a guest's control program."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket: socket.socket | None = None

    def connect(self, deadline: float = 5) -> None:
        """Connect to the host's end of the port (QEMU has made it). `deadline` in seconds from now."""
        self._socket = connect_unix(self.path, deadline)

    def close(self) -> None:
        """Leave the port to the next connection."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def request(self, operation: str, *, deadline: float, **fields: Any) -> dict[str, Any]:
        """Ask the guest for one operation and return its (untrusted) reply.

        Raises:
            GuestError: no answer within `deadline` seconds, an oversized or malformed one, or a refusal.
        """
        if self._socket is None:
            self.connect()
        assert self._socket is not None
        message = json.dumps({"op": operation, **fields}).encode() + b"\n"
        until = time.monotonic() + deadline
        try:
            self._socket.settimeout(deadline)
            self._socket.sendall(message)
            untrusted_line = self._read_line(until)
        except TimeoutError:
            raise GuestError(
                f"the guest did not answer '{operation}' within {deadline:g} seconds",
                resolution="`vmsandbox logs NAME` shows how far it came",
            ) from None
        except OSError as error:
            raise PortClosedError("the guest's control port went away", details=str(error)) from error
        return _parse_reply(operation, untrusted_line)

    def _read_line(self, until: float) -> bytes:
        assert self._socket is not None
        untrusted = b""
        while b"\n" not in untrusted:
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._socket.settimeout(left)
            chunk = self._socket.recv(REPLY_LIMIT)
            if not chunk:
                raise ConnectionResetError("closed by QEMU")
            untrusted += chunk
            if len(untrusted) > REPLY_LIMIT:
                raise GuestError(f"the guest's reply is longer than {REPLY_LIMIT} bytes")
        return untrusted.split(b"\n", 1)[0]


def _parse_reply(operation: str, untrusted_line: bytes) -> dict[str, Any]:
    try:
        untrusted = json.loads(untrusted_line)
    except (ValueError, RecursionError):
        untrusted = None
    if not isinstance(untrusted, dict) or not isinstance(untrusted.get("ok"), bool):
        raise GuestError(f"the guest's reply to '{operation}' is malformed", details=repr(untrusted_line[:200]))
    if not untrusted["ok"]:
        raise GuestError(f"the guest could not do '{operation}'", details=repr(untrusted.get("error"))[:1000])
    return untrusted


def connect_unix(path: Path, deadline: float) -> socket.socket:
    """Connect to a unix socket that may be about to appear; `deadline` in seconds from now.

    Raises:
        GuestError: nothing accepts there in time.
    """
    until = time.monotonic() + deadline
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(max(until - time.monotonic(), 0.05))
            sock.connect(str(path))
            return sock
        except OSError as error:
            sock.close()
            if time.monotonic() > until:
                raise GuestError(
                    "the guest's port does not answer",
                    details=f"{path}: {error}",
                    resolution="is the guest still running? `vmsandbox ls`",
                ) from error
            time.sleep(0.005)


def connect_ssh(path: Path, deadline: float) -> socket.socket:
    """Connect to an SSH port once a fresh server is behind it; `deadline` in seconds from now.

    A port knows no connections. Where the one before was cut off a moment ago (a client that was killed), its
    server may not have noticed: it would take our first bytes for its own stream, and we what it still had to
    say. A fresh server speaks first, and in clear; anything else is hung up on, which ends the old one.

    Raises:
        GuestError: nothing accepts there in time, or no server greets.
    """
    until = time.monotonic() + deadline
    patience = 2.0  # longer each time: a slow guest must get to its greeting
    while True:
        sock = connect_unix(path, min(max(until - time.monotonic(), 0.1), 5))
        try:
            untrusted = _peek(sock, min(patience, until - time.monotonic()))
            if untrusted.startswith(_GREETING):
                sock.recv(len(_GREETING))
                untrusted = _peek(sock, until - time.monotonic())
            if untrusted.startswith(b"SSH-"):
                return sock
        except OSError:
            pass  # hung up on
        except BaseException:
            sock.close()
            raise
        sock.close()
        if time.monotonic() > until:
            raise GuestError("no SSH server answers at the guest's port", resolution="try again")
        time.sleep(0.05)  # a hang-up that is too short is not seen in the guest
        patience *= 2


def _peek(sock: socket.socket, seconds: float) -> bytes:
    """What comes first, left in place; empty if nothing comes in time."""
    sock.settimeout(max(seconds, 0.05))
    try:
        return sock.recv(len(_GREETING), socket.MSG_PEEK)
    except TimeoutError:
        return b""
