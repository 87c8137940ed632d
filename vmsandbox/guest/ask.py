"""Host end of the port on which a guest asks about a command (`cloudinit/guest/vmsandbox_asking.py` is its other end).

All that comes is untrusted: who has root in the guest can ask anything at any time. Each line has a limit, each field a
type and a bound; more nonsense than a broken connection can leave behind ends the listening.
"""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmsandbox.errors import GuestError
from vmsandbox.guest.control import connect_unix

MOST_LINE = 128 << 10  # bytes; a NUL is six of them in JSON
MOST_WORDS = 512
MOST_TEXT = 16 << 10  # characters of all arguments
MOST_SECONDS = 3600.0
MOST_ROWS = 16
_PATIENCE_WITH_NONSENSE = 8  # lines


@dataclass(frozen=True)
class Question:
    """May this run? All texts are untrusted, with surrogate escapes where they were no UTF-8.

    program: the file that would run. rule: what asks for it. seconds: how long the guest waits for the answer.
    """

    id: int
    argv: tuple[str, ...]
    cwd: str
    program: str
    rule: str
    seconds: float


@dataclass(frozen=True)
class Withdrawn:
    """The question of this number needs no answer any more."""

    id: int


@dataclass(frozen=True)
class Denied:
    """A command line that was refused, `times` since it was last told. The texts are untrusted."""

    command: str
    rule: str
    times: int


Message = Question | Withdrawn | Denied


class AskPort:
    """A connection to the port. While it stands the guest knows that somebody is there."""

    def __init__(self, path: Path) -> None:
        self._socket: socket.socket = connect_unix(path, 0)
        self._socket.setblocking(False)
        self._untrusted = bytearray()
        self._nonsense = 0

    def fileno(self) -> int:
        """For select."""
        return self._socket.fileno()

    def messages(self) -> list[Message]:
        """What has arrived, without waiting.

        Raises:
            GuestError: the guest is gone, or talks nonsense: close it.
        """
        found: list[Message] = []
        # One piece per call: a guest that talks without end keeps nothing else waiting.
        with suppress(BlockingIOError):
            try:
                piece = self._socket.recv(MOST_LINE)
            except BlockingIOError:
                raise
            except OSError as error:
                raise GuestError("the guest's port for questions went away", details=str(error)) from error
            if not piece:
                raise GuestError("the guest's port for questions went away")
            self._untrusted += piece
        *lines, rest = bytes(self._untrusted).split(b"\n")
        for untrusted_line in lines:
            if untrusted_line:
                found += self._parsed(untrusted_line)
        self._untrusted = bytearray(rest)
        if len(rest) > MOST_LINE:
            raise GuestError(f"the guest's question is longer than {MOST_LINE} bytes")
        return found

    def answer(self, question: int, word: str) -> None:
        """Send `yes`, `no` or `always` (or, for no, a few words why). A guest that does not read it hears no."""
        with suppress(OSError):
            self._socket.send(json.dumps({"id": question, "answer": word}).encode() + b"\n")

    def nudge(self) -> None:
        """An empty line: an emulated guest may sleep on what has arrived until more does (`guest.ssh.KEEPALIVE`)."""
        with suppress(OSError):
            self._socket.send(b"\n")

    def close(self) -> None:
        """Leave; what is asked from now on is refused at once."""
        self._socket.close()

    def _parsed(self, untrusted_line: bytes) -> list[Message]:
        try:
            return parse_untrusted(untrusted_line)
        except GuestError:
            self._nonsense += 1
            if self._nonsense > _PATIENCE_WITH_NONSENSE:
                raise
            return []


def parse_untrusted(untrusted_line: bytes) -> list[Message]:
    """One line as messages. Raises GuestError if it is none."""
    try:
        untrusted = json.loads(untrusted_line)
        ((kind, value),) = untrusted.items()
        if kind == "ask":
            return [_question(value)]
        if kind == "gone":
            return [Withdrawn(_number(value))]
        if kind == "denied" and isinstance(value, list) and len(value) <= MOST_ROWS:
            return [Denied(_text(one, 200), _text(rule, 500), _number(times)) for one, rule, times in value]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    raise GuestError("what the guest says at its port for questions is malformed", details=repr(untrusted_line[:200]))


def _question(untrusted: dict[str, Any]) -> Question:
    argv = untrusted["argv"]
    seconds = untrusted["seconds"]
    if not isinstance(argv, list) or not 0 < len(argv) <= MOST_WORDS:
        raise ValueError
    words = tuple(_text(word, MOST_TEXT) for word in argv)
    if sum(map(len, words)) > MOST_TEXT or isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise ValueError
    if not 0 <= seconds <= MOST_SECONDS:
        raise ValueError
    where = _text(untrusted["cwd"], 4096), _text(untrusted["program"], 4096)
    return Question(_number(untrusted["id"]), words, *where, _text(untrusted["rule"], 500), float(seconds))


def _text(untrusted: object, limit: int) -> str:
    if not isinstance(untrusted, str) or len(untrusted) > limit:
        raise ValueError
    return untrusted


def _number(untrusted: object) -> int:
    if not isinstance(untrusted, int) or isinstance(untrusted, bool) or not 0 <= untrusted < 1 << 53:
        raise ValueError
    return untrusted
