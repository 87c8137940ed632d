"""Joins the channels of one port in the guest that leads to the host (RFC 4254 7) to connections of a unix socket.

The guest decides how many connections there are, how fast it reads and when it goes away. So their number is limited,
nothing is read from one side before the other has taken what came before, and no thread outlives its connection.
This module knows no SSH: `guest.transport` hands it channels that it has let in.
"""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

PIECE = 64 * 1024
WINDOW = 512 * 1024  # of one channel: what the guest may send before it is read
LOOK = 2.0  # seconds after which a side that waits looks whether the other is still there


class Forwarding:
    """A port of the guest and what its connections are joined to.

    Args:
        listening: address and port in the guest.
        connect: a fresh connection on the host; OSError refuses the guest's.
        limit: connections at once.
    """

    def __init__(self, listening: tuple[str, int], connect: Callable[[], socket.socket], limit: int) -> None:
        self.listening = listening
        self.refused = 0  # connections beyond the limit, so far
        self._connect = connect
        self._limit = limit
        self._open = 0
        self._lock = threading.Lock()

    @property
    def open_connections(self) -> int:
        """How many there are now."""
        return self._open

    def admit(self) -> bool:
        """Take a place for one more connection; False if there is none. `serve` gives it back."""
        with self._lock:
            if self._open >= self._limit:
                self.refused += 1
                return False
            self._open += 1
            return True

    def serve(self, channel: Any) -> None:
        """Join a channel that was admitted; returns at once."""
        threading.Thread(target=self._serve, args=(channel,), daemon=True, name="forward").start()

    def _serve(self, channel: Any) -> None:
        try:
            sock = self._connect()
        except OSError:
            channel.close()
            self._leave()
            return
        sock.settimeout(LOOK)
        join = _Join(channel, sock)
        down = threading.Thread(target=join.down, daemon=True, name="forward-down")
        try:
            down.start()
            join.up()
        finally:
            channel.close()
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            if down.ident is not None:
                down.join()
            sock.close()
            self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._open -= 1


class _Join:
    """One channel and one socket: bytes both ways, each half closed where the other side's was."""

    def __init__(self, channel: Any, sock: socket.socket) -> None:
        self._channel = channel
        self._sock = sock
        self._halves = 2
        self._lock = threading.Lock()

    def up(self) -> None:
        """From the guest; returns when the channel is closed."""
        channel = self._channel
        with suppress(OSError, EOFError):
            while untrusted := channel.recv(PIECE):
                self._send(untrusted)
            if not channel.closed:
                self._sock.shutdown(socket.SHUT_WR)
                self._half_done()
                channel.status_event.wait()  # set when it is closed, by either side

    def down(self) -> None:
        """To the guest."""
        try:
            while data := self._receive():
                self._channel.sendall(data)
            if _hung_up(self._sock):
                self._channel.close()
            else:
                self._channel.shutdown_write()
                self._half_done()
        except (OSError, EOFError):
            self._channel.close()

    def _send(self, untrusted: bytes) -> None:
        view = memoryview(untrusted)
        while view:
            try:
                view = view[self._sock.send(view) :]
            except TimeoutError:
                if self._channel.closed:  # nobody waits for it any more
                    raise

    def _receive(self) -> bytes:
        while True:
            try:
                return self._sock.recv(PIECE)
            except TimeoutError:
                if self._channel.closed:
                    raise

    def _half_done(self) -> None:
        with self._lock:
            self._halves -= 1
            both = self._halves == 0
        if both:
            self._channel.close()


def _hung_up(sock: socket.socket) -> bool:
    """Whether the other end of a unix socket is gone, and has not only ended its own sending."""
    poller = select.poll()
    poller.register(sock, select.POLLHUP)
    return any(event & select.POLLHUP for _fd, event in poller.poll(0))
