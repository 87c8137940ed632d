"""paramiko's transport, made safe for a server that is hostile: the one module that imports paramiko.

What a server may send before it is authenticated, how long one packet may be, how much it may send unread, and which
channels it may open is bounded here, because paramiko bounds none of it.
"""

from __future__ import annotations

import io
import logging
import signal
import socket
import sys
import threading
from contextlib import suppress
from typing import Any

from vmsandbox.guest.forward import WINDOW as _FORWARD_WINDOW
from vmsandbox.guest.forward import Forwarding

# paramiko imports invoke (0.1 s) for `Match exec` in ssh_config files, which are never read here.
_had_invoke = "invoke" in sys.modules
if not _had_invoke:
    sys.modules["invoke"] = None  # type: ignore[assignment]
import paramiko  # noqa: E402
from paramiko.common import (  # noqa: E402
    MSG_CHANNEL_DATA,
    MSG_CHANNEL_EXTENDED_DATA,
    MSG_CHANNEL_OPEN,
    MSG_CHANNEL_OPEN_FAILURE,
    MSG_CHANNEL_OPEN_SUCCESS,
    MSG_CHANNEL_REQUEST,
    MSG_GLOBAL_REQUEST,
    MSG_REQUEST_FAILURE,
    MSG_REQUEST_SUCCESS,
    OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED,
    OPEN_FAILED_RESOURCE_SHORTAGE,
)
from paramiko.packet import Packetizer  # noqa: E402

if not _had_invoke:
    del sys.modules["invoke"]

# Its log would show a hostile guest's text on the terminal.
logging.getLogger("paramiko").addHandler(logging.NullHandler())
logging.getLogger("paramiko").propagate = False

_HANDSHAKE_BYTES = 256 * 1024  # all that a server may send before it is authenticated
_PACKET_BYTES = 512 * 1024  # RFC 4253 6.1 asks for 35,000; OpenSSH allows 256 KiB
_WINDOW = 4 * 1024 * 1024
PACKET_PAYLOAD = 64 * 1024
_CHANNELS_REMEMBERED = 4096  # closed ones, for messages that come late
KEY_TYPE = "ssh-ed25519"


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


def _within_window(feed: Any) -> Any:
    """paramiko keeps what a server sends beyond the window that it was given: end the connection instead."""

    def checked(channel: Any, message: paramiko.Message) -> None:
        if len(channel.in_buffer) + len(channel.in_stderr_buffer) > channel.in_window_size + _PACKET_BYTES:
            raise paramiko.SSHException("the guest sent more than it was allowed to")
        feed(channel, message)

    return checked


class Transport(paramiko.Transport):
    """One connection. `trust` ends the limit on what is sent, once the server is known to be the right one."""

    _channel_handler_table = {  # noqa: RUF012 - paramiko's own name and type
        **paramiko.Transport._channel_handler_table,  # type: ignore[attr-defined]
        MSG_CHANNEL_REQUEST: _handle_request,
        MSG_CHANNEL_DATA: _within_window(paramiko.Channel._feed),  # type: ignore[attr-defined]
        MSG_CHANNEL_EXTENDED_DATA: _within_window(paramiko.Channel._feed_extended),  # type: ignore[attr-defined]
    }
    _preferred_kex = ("curve25519-sha256@libssh.org",)
    _preferred_keys = (KEY_TYPE,)
    _preferred_ciphers = ("aes128-ctr", "aes256-ctr")
    _preferred_macs = ("hmac-sha2-256",)

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(
            sock, default_window_size=_WINDOW, default_max_packet_size=PACKET_PAYLOAD, server_sig_algs=False
        )
        self._bounded = self.packetizer = _BoundedPacketizer(sock)
        self.forwarding: Forwarding | None = None
        self._answered = threading.Event()
        self._granted = False
        # Bound to this object in newer versions, functions of the class before.
        if not hasattr(self._handler_table[MSG_CHANNEL_OPEN], "__self__"):  # type: ignore[has-type]
            own = {
                MSG_CHANNEL_OPEN: Transport._parse_channel_open,
                MSG_REQUEST_SUCCESS: Transport._parse_request_success,
                MSG_REQUEST_FAILURE: Transport._parse_request_failure,
            }
            self._handler_table = {**self._handler_table, **own}  # type: ignore[has-type]

    def trust(self) -> None:
        """The login is over: no limit on all that is sent any more."""
        self._bounded.budget = None

    def ask_to_forward(self, forwarding: Forwarding) -> None:
        """Ask the server to listen (RFC 4254 7.1). paramiko's own would wait for ever, and let in any port."""
        self.forwarding = forwarding
        request = paramiko.Message()
        request.add_byte(bytes([MSG_GLOBAL_REQUEST]))
        request.add_string("tcpip-forward")
        request.add_boolean(True)
        request.add_string(forwarding.listening[0])
        request.add_int(forwarding.listening[1])
        self._send_user_message(request)  # type: ignore[attr-defined]

    def wait_for_port(self, deadline: float) -> None:
        """Raises SSHException if the server did not open the port. (No other request of ours is answered.)"""
        if not self._answered.wait(deadline) or not self._granted:
            raise paramiko.SSHException("no port was opened for the host")

    def _parse_request_success(self, message: paramiko.Message) -> None:
        self._granted = True
        self._answered.set()

    def _parse_request_failure(self, message: paramiko.Message) -> None:
        self._answered.set()

    def _parse_channel_open(self, message: paramiko.Message) -> None:
        """The forwarded port's channels are let in, up to its limit; all others are refused."""
        start = message.packet.tell()
        kind, chanid, window, packet = message.get_text(), message.get_int(), message.get_int(), message.get_int()
        forwarding = self.forwarding
        if kind != "forwarded-tcpip" or forwarding is None:
            message.packet.seek(start)
            super()._parse_channel_open(message)  # type: ignore[misc]
        elif (message.get_text(), message.get_int()) != forwarding.listening:
            self._refuse_channel(chanid, OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED)
        elif not forwarding.admit():
            self._refuse_channel(chanid, OPEN_FAILED_RESOURCE_SHORTAGE)
        else:
            forwarding.serve(self._open_channel(chanid, window, packet))

    def _refuse_channel(self, chanid: int, reason: int) -> None:
        answer = paramiko.Message()
        answer.add_byte(bytes([MSG_CHANNEL_OPEN_FAILURE]))
        answer.add_int(chanid)
        answer.add_int(reason)
        answer.add_string("")
        answer.add_string("en")
        self._send_message(answer)  # type: ignore[attr-defined]

    def _open_channel(self, chanid: int, window: int, packet: int) -> paramiko.Channel:
        with self.lock:
            own = self._next_channel()  # type: ignore[attr-defined]
            channel: Any = paramiko.Channel(own)
            self._channels.put(own, channel)  # type: ignore[attr-defined]
            self.channels_seen[own] = True
            self.channels_seen.pop(own - _CHANNELS_REMEMBERED, None)  # a guest may open and close them for ever
            channel._set_transport(self)
            channel._set_window(_FORWARD_WINDOW, PACKET_PAYLOAD)
            channel._set_remote_channel(chanid, window, packet)
        answer = paramiko.Message()
        answer.add_byte(bytes([MSG_CHANNEL_OPEN_SUCCESS]))
        for number in (chanid, own, _FORWARD_WINDOW, PACKET_PAYLOAD):
            answer.add_int(number)
        self._send_message(answer)  # type: ignore[attr-defined]
        return channel  # type: ignore[no-any-return]


# What a connection that breaks, or a server that refuses, raises.
CONNECTION_ERRORS = (paramiko.SSHException, OSError, EOFError)


def private_key(text: str) -> paramiko.PKey:
    """An Ed25519 key from OpenSSH's text form."""
    return paramiko.Ed25519Key.from_private_key(io.StringIO(text))


def send_signal(channel: Any, name: str) -> None:
    """Send a signal ("INT") to the command of a channel (RFC 4254 6.9). A connection that is gone is no error."""
    message = paramiko.Message()
    message.add_byte(bytes([MSG_CHANNEL_REQUEST]))
    message.add_int(channel.remote_chanid)
    message.add_string("signal")
    message.add_boolean(False)
    message.add_string(name)
    with suppress(*CONNECTION_ERRORS):
        channel.get_transport()._send_user_message(message)
