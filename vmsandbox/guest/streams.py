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
from typing import Any, Protocol

from vmsandbox.errors import GuestError

_PIECE = 64 * 1024
Sink = Callable[[bytes], None]


class Attention(Protocol):
    """What wants a look now and then while streams are joined: the guest's questions to a person.

    reading: held by whoever reads the terminal, so that an answer is not sent to the guest instead.
    """

    reading: threading.Lock

    def sources(self) -> list[Any]:
        """What to wait for, for select."""
        ...

    def attend(self) -> bool:
        """Do what there is to do; nothing of the guest's is written meanwhile. Returns whether it used the terminal."""
        ...


def join_streams(
    channel: Any,
    stdin: int | None,
    stdout: Sink,
    stderr: Sink,
    fed: Callable[[], None] | None = None,
    attention: Attention | None = None,
) -> int:
    """Run the streams of a started command until it ends; returns its exit status.

    Args:
        channel: an SSH channel (`GuestShell.start`).
        stdin: a file descriptor to read from; None closes the command's stdin at once.
        stdout, stderr: take what the command writes (untrusted bytes), in order. What they raise ends it.
        fed: called, from a thread of its own, whenever something was passed on to the command.
        attention: is looked at between two pieces.

    Raises:
        GuestError: the connection broke before the command ended.
    """
    if stdin is None:
        channel.shutdown_write()
    else:
        threading.Thread(target=_feed, args=(channel, stdin, fed, attention), daemon=True).start()
    while True:
        idle = True
        if attention is not None:
            attention.attend()
        # One piece of each: a flood keeps no question waiting.
        if channel.recv_ready():
            stdout(channel.recv(_PIECE))
            idle = False
        if channel.recv_stderr_ready():
            stderr(channel.recv_stderr(_PIECE))
            idle = False
        if idle:
            if (channel.exit_status_ready() and (channel.eof_received or channel.closed)) or channel.closed:
                if not (channel.recv_ready() or channel.recv_stderr_ready()):
                    break
            else:
                wait_readable(channel, 0.2, attention)
    status: int = channel.recv_exit_status()
    if status < 0:  # paramiko's value where no status came: the channel is closed, but the command did not say how
        raise GuestError(
            "the connection to the guest broke before the command ended",
            resolution="`vmsandbox ls` shows whether the guest still runs",
        )
    return status


def wait_readable(channel: Any, seconds: float, attention: Attention | None = None) -> None:
    """Sleep until the channel has something to read or ends, or something wants attention, at most `seconds`."""
    try:
        select.select([channel, *(attention.sources() if attention else ())], [], [], seconds)
    except (OSError, ValueError):
        time.sleep(0.01)


def write_all(fd: int) -> Sink:
    """A sink that writes to a file descriptor."""

    def write(data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]

    return write


def _feed(channel: Any, stdin: int, fed: Callable[[], None] | None, attention: Attention | None) -> None:
    with suppress(OSError, EOFError):
        while data := _read(stdin, attention):
            channel.sendall(data)
            if fed is not None:
                fed()
        channel.shutdown_write()


def _read(stdin: int, attention: Attention | None) -> bytes:
    if attention is None:
        return os.read(stdin, _PIECE)
    while True:
        select.select([stdin], [], [])
        with attention.reading:
            # What woke us may have been the answer to a question, which is gone by now.
            if select.select([stdin], [], [], 0)[0]:
                return os.read(stdin, _PIECE)
