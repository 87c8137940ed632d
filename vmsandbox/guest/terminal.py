"""An interactive terminal in the guest: raw mode, size changes, and the host's terminal as it was afterwards.

This is the one place where the guest's bytes reach the terminal as they are; every other output is filtered
(`vmsandbox.review.terminal`). SECURITY.md tells what a hostile guest can do to a terminal in the meantime.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from vmsandbox.errors import GuestError
from vmsandbox.guest.streams import Attention, Sink, write_all

# Leave bracketed paste, mouse reports, the alternate screen and hidden cursor; normal attributes. A program that
# was cut off, or a hostile one, may have left them on.
_RESTORE = b"\x1b[?2004l\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?1049l\x1b[?25h\x1b[0m"
_PIECE = 64 * 1024


def terminal_size() -> tuple[str, int, int]:
    """(TERM, columns, rows) of this process's terminal."""
    size = os.get_terminal_size(0)  # not shutil's: COLUMNS and LINES in the environment are a shell's own, or old
    return os.environ.get("TERM", "xterm-256color"), size.columns, size.lines


def run_terminal(
    channel: Any, shown: Callable[[Sink], Sink] | None = None, typed: Callable[[], None] | None = None,
    attention: Attention | None = None,
) -> int:  # fmt: skip
    """Join the process's terminal with a channel that has a pseudo-terminal; returns the exit status.

    Ctrl-C and every other key go to the guest, but for those that answer what wants `attention`. Raises GuestError if
    the connection broke.

    Args:
        shown: makes of what writes onto the terminal what is called instead. What that raises ends it.
        typed: called whenever a person typed something.
    """
    stdin, stdout = sys.stdin.fileno(), sys.stdout.fileno()
    plain = write_all(stdout)
    before = termios.tcgetattr(stdin)

    with _size_changes() as resized:
        try:
            tty.setraw(stdin)
            _pump(channel, stdin, resized, shown(plain) if shown else plain, typed, attention)
        finally:
            termios.tcsetattr(stdin, termios.TCSADRAIN, before)
            with suppress(OSError):
                os.write(stdout, _RESTORE)
    status: int = channel.recv_exit_status()
    if status < 0:  # none came
        raise GuestError("the connection to the guest broke", resolution="`vmsandbox ls` shows whether it runs")
    return status


@contextmanager
def _size_changes() -> Iterator[int]:
    """A descriptor that can be read from once the terminal's size has changed.

    The handler itself sends nothing: it may interrupt this very thread while that holds a lock of the connection's,
    as it does when a window is dragged, and would wait for it for ever.
    """
    changed, tell = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def resized(_signal: int, _frame: FrameType | None) -> None:
        with suppress(BlockingIOError):  # full: it is told of already
            os.write(tell, b"\0")

    old_handler = signal.signal(signal.SIGWINCH, resized)
    try:
        yield changed
    finally:
        signal.signal(signal.SIGWINCH, old_handler)
        os.close(tell)
        os.close(changed)


def _pump(
    channel: Any, stdin: int, resized: int, write: Sink, seen: Callable[[], None] | None, attention: Attention | None
) -> None:
    sources: list[Any] = [channel, stdin, resized]
    while True:
        ready, _, _ = select.select([*sources, *(attention.sources() if attention else ())], [], [], 0.5)
        if attention is not None and attention.attend():
            _redraw(channel)
            continue  # what was typed has been read, or dropped
        if resized in ready:
            os.read(resized, _PIECE)
            _tell_size(channel)
        if channel in ready or channel.closed:
            data = channel.recv(_PIECE)
            if not data:
                return
            write(data)
        if stdin in ready:
            typed = os.read(stdin, _PIECE)
            if typed:
                channel.sendall(typed)
                if seen is not None:
                    seen()
            else:
                sources.remove(stdin)  # the terminal was closed
                channel.shutdown_write()


def _tell_size(channel: Any, fewer_rows: int = 0) -> None:
    _term, columns, rows = terminal_size()
    with suppress(OSError, EOFError):
        channel.resize_pty(columns, max(rows - fewer_rows, 1))


def _redraw(channel: Any) -> None:
    """Make a program that fills the screen paint it again: it was drawn over."""
    _tell_size(channel, fewer_rows=1)
    _tell_size(channel)
