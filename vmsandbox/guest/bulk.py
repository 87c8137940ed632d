"""The port that a project goes in through: bytes for one program in the guest, without SSH around them.

The program is started over SSH, with all that SSH is for: keys on both sides, a status, an error text. Only what it
reads comes this way, because under emulation the cipher costs the guest twenty times more than the bytes: 13 MB/s
over SSH, 270 MB/s here. There is nobody to hide them from in between: the socket lies in the session's own folder, and
at its other end is the guest's own QEMU.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from vmsandbox.errors import GuestError
from vmsandbox.guest.control import connect_unix

TICK = 0.5  # seconds


class BulkPort:
    """A connection to the port. Open it before its reader is started: a port without a host reads as ended."""

    def __init__(self, path: Path) -> None:
        self._socket: socket.socket = connect_unix(path, 5)
        self._socket.setblocking(False)

    def write(self, data: bytes, ended: Callable[[], bool], patience: float = 120) -> None:
        """Send all of it.

        Args:
            ended: whether the reader has ended; then nobody would ever take what is left.
            patience: seconds without progress after which it is given up.

        Raises:
            GuestError: the reader ended or takes nothing, or the guest is gone.
        """
        rest = memoryview(data)
        until = time.monotonic() + patience
        while rest:
            if select.select([], [self._socket], [], TICK)[1]:
                try:
                    sent = self._socket.send(rest)
                except BlockingIOError:
                    continue
                except OSError as error:
                    raise GuestError("the guest went away", details=str(error)) from error
                rest = rest[sent:]
                until = time.monotonic() + patience
            elif ended():
                raise GuestError("the guest's program ended before it had taken everything")
            elif time.monotonic() > until:
                raise GuestError(f"the guest took nothing for {patience:g} seconds")

    def nudge(self) -> None:
        """Send a byte that nobody will read; to be done now and then while the reader still has to end.

        An emulated guest may sleep on data that has arrived until more arrives (`vmsandbox.guest.ssh.KEEPALIVE`).
        """
        with suppress(OSError):
            self._socket.send(b"\0")

    def close(self) -> None:
        """End it; what was sent and not read is dropped by the guest."""
        self._socket.close()
