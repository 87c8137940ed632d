"""Asks the person at the terminal whether a command may run in the guest.

The guest has no say in how this looks: its output is held back, the terminal is brought into a known state and shows
the question on a screen of its own; all that the guest chose stands behind a bar, with nothing invisible. What was
typed, or what the terminal answered to a guest's query, before the question could be read answers nothing.
"""

from __future__ import annotations

import os
import select
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from vmsandbox.cli.screen import Quit, Screen
from vmsandbox.guest.ask import Question
from vmsandbox.review.text import shown

TERMINAL = "/dev/tty"
SETTLE = 0.4  # seconds in which a terminal has answered what a guest had asked it
TICK = 0.2
# Character sets, attributes, scroll region, origin, wrapping, reverse video, mouse, pasting: as they are by default.
_KNOWN_STATE = (
    "\x1b\\\x18\x0f\x1b(B\x1b)B\x1b[0m\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?2004l\x1b[?5l\x1b[?6l\x1b[?7h"
    "\x1b[4l\x1b[20l\x1b[r\x1b[?25h"
)
_OWN_SCREEN, _SCREEN_BEFORE = "\x1b[?1049h\x1b[H\x1b[2J", "\x1b[0m\x1b[2J\x1b[?1049l"


def has_person() -> bool:
    """Whether this process may ask somebody: it is in the foreground of a terminal."""
    try:
        fd = os.open(TERMINAL, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(fd)


def person(name: str) -> Callable[[Question, Callable[[], bool]], str]:
    """A `session.live.asking.Person` for the session of this name."""

    def ask(question: Question, is_wanted: Callable[[], bool]) -> str:
        if not has_person():  # it went into the background
            return "no terminal"
        try:
            terminal = os.open(TERMINAL, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
            with os.fdopen(terminal, "w", encoding=_encoding()) as out, _in_lines(terminal):
                return _ask(terminal, out, name, question, is_wanted)
        except (OSError, termios.error):
            return "no terminal"

    return ask


def _ask(terminal: int, out: TextIO, name: str, question: Question, is_wanted: Callable[[], bool]) -> str:
    def wait(fd: int) -> None:
        while not select.select([fd], [], [], TICK)[0]:
            if not is_wanted():
                raise TimeoutError

    plain = os.environ.get("TERM", "dumb") == "dumb"
    screen = Screen(terminal, out, wait)
    out.write("\n" if plain else _KNOWN_STATE + _OWN_SCREEN)
    try:
        screen.host(f"the guest '{name}' asks whether it may run a command; nothing that it writes is shown meanwhile")
        screen.begin_page()
        screen.host(f"{len(question.argv)} words, one to a line (what does not show as itself is escaped):", style="")
        for number, word in enumerate(question.argv):
            screen.said(shown(word) or "(empty)", lead=f"{number:>3}  ")
        screen.host("program, folder, and the rule that asks:", style="")
        for text in (question.program, question.cwd, question.rule):
            screen.said(shown(text))
        skipped = screen.end_page()
        if skipped:
            screen.host("you have not seen all of it", style="bold yellow")
        out.flush()
        time.sleep(SETTLE)
        left = f"{question.seconds:g} s, then it is no"
        answer = screen.ask(f"[y]es, [N]o, [a]lways in this session, for exactly these words ({left})?", flush=True)
        return {"y": "yes", "yes": "yes", "a": "always", "always": "always"}.get(answer.lower(), "no")
    except TimeoutError:
        return "no answer in time"
    except (Quit, KeyboardInterrupt):
        return "no"
    finally:
        with suppress(OSError):
            out.write("" if plain else _SCREEN_BEFORE)
            out.flush()


@contextmanager
def _in_lines(terminal: int) -> Iterator[None]:
    """The terminal in its ordinary mode (a raw shell's is not), and as it was afterwards, with nothing left unread."""
    before = termios.tcgetattr(terminal)
    now = termios.tcgetattr(terminal)
    now[0] = (now[0] | termios.ICRNL) & ~(termios.INLCR | termios.IGNCR)
    now[1] |= termios.OPOST | termios.ONLCR
    now[3] |= termios.ICANON | termios.ECHO | termios.ECHOE | termios.ISIG
    now[6][termios.VMIN], now[6][termios.VTIME] = b"\x01", b"\x00"
    termios.tcsetattr(terminal, termios.TCSAFLUSH, now)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSAFLUSH, before)


def _encoding() -> str:
    return getattr(sys.stderr, "encoding", None) or "utf-8"
