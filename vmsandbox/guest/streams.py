"""Joins a command in the guest with this process's stdin, stdout and stderr.

stdout and stderr stay apart, stdin is passed on in a thread of its own (a command that neither reads nor is read
would block both ways otherwise), and nothing is kept in memory: a flood of output is throttled by SSH's window.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from vmsandbox.errors import GuestError

_PIECE = 64 * 1024
Sink = Callable[[bytes], None]


def join_streams(
    channel: Any, stdin: int | None, stdout: Sink, stderr: Sink, fed: Callable[[], None] | None = None
) -> int:
    """Run the streams of a started command until it ends; returns its exit status.

    Args:
        channel: an SSH channel (`GuestShell.start`).
        stdin: a file descriptor to read from; None closes the command's stdin at once.
        stdout, stderr: take what the command writes (untrusted bytes), in order. What they raise ends it.
        fed: called, from a thread of its own, whenever something was passed on to the command.

    Raises:
        GuestError: the connection broke before the command ended.
    """
    if stdin is None:
        channel.shutdown_write()
    else:
        threading.Thread(target=_feed, args=(channel, stdin, fed), daemon=True).start()
    while True:
        idle = True
        while channel.recv_ready():
            stdout(channel.recv(_PIECE))
            idle = False
        while channel.recv_stderr_ready():
            stderr(channel.recv_stderr(_PIECE))
            idle = False
        if idle:
            if (channel.exit_status_ready() and (channel.eof_received or channel.closed)) or channel.closed:
                if not (channel.recv_ready() or channel.recv_stderr_ready()):
                    break
            else:
                wait_readable(channel, 0.2)
    status: int = channel.recv_exit_status()
    if status < 0:  # paramiko's value where no status came: the channel is closed, but the command did not say how
        raise GuestError(
            "the connection to the guest broke before the command ended",
            resolution="`vmsandbox ls` shows whether the guest still runs",
        )
    return status


def wait_readable(channel: Any, seconds: float) -> None:
    """Sleep until the channel has something to read or ends, at most `seconds`."""
    try:
        select.select([channel], [], [], seconds)
    except (OSError, ValueError):
        time.sleep(0.01)


def write_all(fd: int) -> Sink:
    """A sink that writes to a file descriptor."""

    def write(data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]

    return write


def _feed(channel: Any, stdin: int, fed: Callable[[], None] | None) -> None:
    with suppress(OSError, EOFError):
        while data := os.read(stdin, _PIECE):
            channel.sendall(data)
            if fed is not None:
                fed()
        channel.shutdown_write()
