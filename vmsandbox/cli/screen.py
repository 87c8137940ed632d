"""The terminal while a review runs: what the host says, what a guest wrote, and the person's answers.

A guest may write a line that looks like the host's question, send escape sequences that make the terminal type an
answer, or count on the line being cut at the screen's edge so that its end stands where the host's text begins.
So every line of a guest's text stands behind a bar, is broken by us and not by the terminal, and has no control
character; the host's own lines begin at the edge with a mark, and answers typed before a risky question are dropped.
"""

from __future__ import annotations

import os
import termios
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import TextIO

from vmsandbox.errors import UserInputError
from vmsandbox.review.visible import Piece

MARK = "vmsandbox>"
# Some terminals write a line whose first letter is Hebrew or Arabic from the right: the bar would stand there too.
_LEFT_TO_RIGHT = "\u200e"
_TAB = 4
_NARROWEST = 12
_LONGEST_ANSWER = 4096


class Quit(Exception):
    """The person ended the input (Ctrl-D) or interrupted."""


class Screen:
    """Writes to a terminal and reads from one.

    answers: descriptor of a terminal in its ordinary (line) mode. out: text stream to the terminal.
    wait: returns when there is an answer to be read, or raises.
    """

    def __init__(self, answers: int, out: TextIO, wait: Callable[[int], None] = lambda _answers: None) -> None:
        from rich.console import Console

        if not os.isatty(answers):
            raise UserInputError(
                "a review needs a terminal",
                resolution="without one, --accept says what may be taken; nothing is by default",
            )
        self._answers = answers
        self._out = out
        self._wait = wait
        # What the session before left unread, a terminal's reply to a guest's query among it, answers nothing here.
        termios.tcflush(answers, termios.TCIFLUSH)
        self._console = Console(file=out, highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._utf8 = self._console.encoding.lower().replace("-", "") == "utf8"
        self._on_page: int | None = None  # lines since the page began; None: not paged
        self._skipping = False

    def host(self, text: str = "", style: str = "bold") -> None:
        """A line of the host's own. Nothing that a guest chose belongs here: see `guest`."""
        from rich.text import Text

        self._count()
        if not self._skipping:
            self._console.print(Text(self._encodable(f"{MARK} {text}" if text else ""), style=style))

    def guest(self, pieces: Sequence[Piece], style: str = "", lead: str = "") -> None:
        """A line with a guest's text, behind the bar, on as many lines as it takes.

        lead: the host's own sign before the text. Continued lines have a mark there that no line begins with.
        """
        from rich.text import Text

        bar = "│ " if self._utf8 else "| "
        if len(lead) > self._width() // 2:
            pieces, lead = [Piece(lead), *pieces], ""
        room = self._width() - sum(map(_width_of, bar)) - len(lead)
        if self._utf8 and any(
            unicodedata.bidirectional(sign) in ("R", "AL") for piece in pieces for sign in piece.text
        ):
            bar += _LEFT_TO_RIGHT
        for number, cells in enumerate(self._broken(pieces, room)):
            self._count()
            if self._skipping:
                return
            line = Text(bar, style="dim")
            line.append(lead if number == 0 else "\\"[: len(lead)].ljust(len(lead)), style=style)
            for text, look in cells:
                line.append(text, style=" ".join(part for part in (style, look) if part))
            self._console.print(line)

    def said(self, text: str, style: str = "", lead: str = "") -> None:
        """Text that is safe to show (from `shown`), but holds what a guest chose: behind the bar."""
        self.guest([Piece(text)], style, lead)

    def begin_page(self) -> None:
        """From here on stop at the end of each screenful."""
        self._on_page, self._skipping = 0, False

    def end_page(self) -> bool:
        """Write on without stopping; returns whether the person skipped something of the page."""
        skipped, self._on_page, self._skipping = self._skipping, None, False
        return skipped

    def ask(self, question: str, flush: bool = False) -> str:
        """Ask; returns the answer without blanks around it.

        flush: drop what was typed before the question was there to be read.

        Raises:
            Quit: no answer comes any more.
        """
        from rich.text import Text

        self._console.print(Text(self._encodable(f"{MARK} {question} "), style="bold cyan"), end="")
        self._out.flush()
        if flush:
            termios.tcflush(self._answers, termios.TCIFLUSH)
        try:
            self._wait(self._answers)
            # In line mode one read is one line; further lines stay with the kernel, where a flush drops them.
            answer = os.read(self._answers, _LONGEST_ANSWER)
        except TimeoutError:
            raise
        except (KeyboardInterrupt, OSError):
            answer = b""
        if not answer.endswith(b"\n"):
            self._console.print()
            raise Quit
        return answer.decode("utf-8", "surrogateescape").strip()

    def _count(self) -> None:
        if self._on_page is None or self._skipping:
            return
        self._on_page += 1
        if self._on_page >= max((self._size().lines or 24) - 1, 5):  # 0: a terminal that does not know
            self._on_page = 0
            self._skipping = self.ask("(Enter: show more, s: skip the rest of this)").lower().startswith("s")

    def _size(self) -> os.terminal_size:
        try:
            return os.get_terminal_size(self._answers)
        except OSError:
            return os.terminal_size((80, 24))

    def _width(self) -> int:
        # One less: a terminal may go to the next line as soon as the last column is filled.
        columns = self._size().columns
        return max((columns if columns > 0 else 80) - 1, _NARROWEST)

    def _encodable(self, text: str) -> str:
        if self._utf8:
            return text
        return text.encode(self._console.encoding, "backslashreplace").decode(self._console.encoding)

    def _broken(self, pieces: Iterable[Piece], room: int) -> list[list[tuple[str, str]]]:
        """Lines of (text, style), none wider than the room there is."""
        looks = {"plain": "", "odd": "bold magenta reverse", "note": "dim italic"}
        lines: list[list[tuple[str, str]]] = [[]]
        used = 0
        for piece in pieces:
            look = looks[piece.look] + (" underline" if piece.new else "")
            run = ""
            for character in self._encodable(piece.text):
                shown, width = character, _width_of(character)
                if character == "\t":
                    width = min(_TAB - used % _TAB, room)
                    shown = " " * width
                if used + width > room:
                    lines[-1].append((run, look))
                    lines.append([])
                    run, used = "", 0
                run += shown
                used += width
            lines[-1].append((run, look))
        return lines


def _width_of(character: str) -> int:
    """Columns, rather too many: a line that is broken too early does no harm."""
    if character.isascii():
        return 1
    return 1 if unicodedata.east_asian_width(character) in ("N", "Na", "H") else 2
