"""What is in the lines that came: secrets, matches of rules, terminal escapes, suspicious Unicode.

Nothing here depends on a file's type: a rule that forbids is not avoided by one byte that is not UTF-8, by a NUL (which
shells skip) or by line ends that only some programs know.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import NamedTuple

from vmsandbox.review.linear import PatternSet, one_line_end
from vmsandbox.review.rules import PatternRule
from vmsandbox.review.secret_shapes import secrets_in
from vmsandbox.review.text import shown
from vmsandbox.review.unicode import first_in_lines, suspicions
from vmsandbox.review.values import Finding, Hunk, Risk

PIECE = 4 << 20
_OVERLAP = 64 << 10
# Tabs, newlines and form feeds (source files have them between sections) do no harm; a carriage return overwrites.
_CONTROLS = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f]|\r(?!\n)")
_NO_CONTROLS = bytes(code for code in range(256) if code >= 0x20 and code != 0x7F) + b"\t\n\f"
_CONTROL_NAMES = {
    "\x1b": "ESC",
    "\x9b": "CSI",
    "\x9d": "OSC",
    "\x90": "DCS",
    "\x07": "BEL",
    "\x08": "BS",
    "\r": "CR",
    "\0": "NUL",
}


class Encoded(NamedTuple):
    """A file's bytes as UTF-8, whatever they were. why_binary: None if they were UTF-8 text without a NUL."""

    data: bytes
    why_binary: str | None


def as_utf8(untrusted: bytes) -> Encoded:
    """Text of any kind made searchable; newlines stay where they are.

    NULs are left out: shells skip them, and UTF-16 has them between its letters.
    """
    why: str | None = None
    if b"\0" in untrusted:
        why = "binary"
        untrusted = untrusted.replace(b"\0", b"")
    if not untrusted.isascii():
        try:
            untrusted.decode("utf-8")
        except UnicodeDecodeError:
            why = why or "not UTF-8 text"
            untrusted = untrusted.decode("latin-1").encode()
    return Encoded(untrusted, why)


@dataclass(frozen=True)
class Added:
    """Lines that came, as UTF-8. numbers: of each line in the new file; None: they follow from `first`."""

    data: bytes
    numbers: Sequence[int] | None = None
    first: int = 1

    @cached_property
    def searchable(self) -> bytes:
        return one_line_end(self.data)

    def line(self, offset: int) -> int:
        """The number in the new file of the line at this offset."""
        number = self.data.count(b"\n", 0, offset)
        if self.numbers is None:
            return self.first + number
        return self.numbers[min(number, len(self.numbers) - 1)]


def added_lines(hunks: Iterable[Hunk]) -> Added:
    """The lines that hunks add, one after the other."""
    lines: list[bytes] = []
    numbers: list[int] = []
    for hunk in hunks:
        number = hunk.new_start
        for sign, line in hunk.lines:
            if sign == "+":
                lines.append(line if line.endswith(b"\n") else line + b"\n")
                numbers.append(number)
            if sign != "-":
                number += 1
    return Added(as_utf8(b"".join(lines)).data, numbers)


class Scanner:
    """Looks through added lines by one set of rules.

    lines: how many lines one rule or check names in one file.
    """

    def __init__(self, rules: Sequence[PatternRule], lines: int) -> None:
        self._rules = tuple(rules)
        self._patterns = PatternSet([rule.pattern for rule in rules])
        self._lines = lines

    def text(self, added: Added) -> list[Finding]:
        """All there is to say about lines of text."""
        return [*self.patterns(added), *self._controls(added), *self._unicode(added)]

    def patterns(self, added: Added, has_lines: bool = True) -> list[Finding]:
        """Rules and secrets alone. has_lines: findings have line numbers."""

        def line(offset: int) -> int | None:
            return added.line(offset) if has_lines else None

        found: list[Finding] = []
        for number, hits in self._patterns.hits(added.searchable):
            rule = self._rules[number]
            text = f"rule {shown(rule.id, 80)}: {shown(rule.message, 200)}"
            starts = (hit.start for hit in hits)
            found += self._named(Risk.RULE, ((start, text) for start in starts), line, rule.severity == "error")
        secrets = (
            (one.start, f"{one.name}: {shown(one.begins)}…") for one in secrets_in(added.searchable, self._lines + 1)
        )
        return [*found, *self._named(Risk.SECRET, secrets, line)]

    def _controls(self, added: Added) -> list[Finding]:
        data = added.data.replace(b"\r\n", b"\n")
        if data.isascii() and not data.translate(None, _NO_CONTROLS):
            return []
        text = added.data.decode("utf-8", "replace")
        return self._by_line(Risk.TERMINAL, text, added, control_places(text))

    def _unicode(self, added: Added) -> list[Finding]:
        if added.data.isascii():
            return []
        text = added.data.decode("utf-8", "replace")
        starts_file = added.line(0) == 1
        return self._by_line(
            Risk.UNICODE, text, added, ((one.offset, one.text) for one in suspicions(text, starts_file))
        )

    def _by_line(self, risk: Risk, text: str, added: Added, places: Iterator[tuple[int, str]]) -> list[Finding]:
        """Findings for offsets into `text`, which is `added.data` decoded: newlines are counted alike in both."""

        def line(offset: int) -> int:
            number = text.count("\n", 0, offset)
            return added.first + number if added.numbers is None else added.numbers[min(number, len(added.numbers) - 1)]

        def first_in_line() -> Iterator[tuple[int, str]]:
            seen: set[int] = set()
            for at, what in places:
                if (number := line(at)) not in seen:
                    seen.add(number)
                    yield at, what

        return self._named(risk, first_in_line(), line)

    def _named(
        self, risk: Risk, places: Iterator[tuple[int, str]], line: Callable[[int], int | None], blocks: bool = False
    ) -> list[Finding]:
        """The first findings, and one that says that there are more."""
        first = list(islice(places, self._lines + 1))
        found = [Finding(risk, text, line(at), blocks) for at, text in first[: self._lines]]
        if len(first) > self._lines:
            found.append(Finding(risk, "and on more lines", None, blocks))
        return found


def control_places(text: str) -> Iterator[tuple[int, str]]:
    """(offset, what it is) of what drives a terminal: the first of each line."""
    return ((found.start(), _control(found[0])) for found in first_in_lines(_CONTROLS, text))


def _control(character: str) -> str:
    name = _CONTROL_NAMES.get(character, f"U+{ord(character):04X}")
    return f"a control character that terminals act on: {name}"


def pieces(untrusted: bytes, size: int = PIECE) -> Iterator[tuple[bytes, int]]:
    """(part, number of its first line) of a large file, cut at line ends; longer lines with an overlap."""
    at, number = 0, 1
    while at < len(untrusted):
        end = min(at + size, len(untrusted))
        if end < len(untrusted) and (newline := untrusted.rfind(b"\n", at, end)) > at:
            end = newline + 1
        yield untrusted[at:end], number
        number += untrusted.count(b"\n", at, end)
        at = end if end == len(untrusted) or untrusted[end - 1 : end] == b"\n" else end - _OVERLAP
