"""Which files a coding agent takes its orders from (`agent_files.yaml`), and which commands its settings would run.

Without it a repository's own `.claude/settings.json` would run what it likes with the first keystroke in the guest, and
nobody would have been told. Whoever wrote the repository wrote these files: they are read under limits, in time in
proportion to their size, and what cannot be read is said instead of passed over.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from vmsandbox.review.linear import LinePattern, one_line_end
from vmsandbox.review.risky import PathList, searchable
from vmsandbox.review.rules import RiskyPath
from vmsandbox.review.secret_shapes import redacted
from vmsandbox.review.text import shown

MOST = 256 << 10  # bytes of a file of settings that is read
_LIST = Path(__file__).with_name("agent_files.yaml")
_VISITS = 20_000  # places of one file that are looked at
_MOST_DOTS = 200
_SHOWN = 300
# A comment, or a string (which may have `//` in it). Each of them takes all that it can: nothing is read twice.
_STRING_OR_COMMENT = re.compile(r'"(?:[^"\\]|\\[\s\S])*+"?|//[^\n]*|/\*(?:[^*]|\*(?!/))*+(?:\*/)?')
_STRING_OR_COMMA = re.compile(r'"(?:[^"\\]|\\[\s\S])*+"?|,(?=\s*+[\]}])')
_NOT_COMMANDS = frozenset(("type", "url", "serverUrl", "httpUrl", "prompt"))
_ASKS = (None, False, "", "ask", "deny", "default", "plan", "on-request", "untrusted", "read-only")


class Order(NamedTuple):
    """What a file of settings asks for. what: for people, safe to show. line: of the file, if it is known."""

    what: str
    line: int | None = None


@dataclass(frozen=True)
class Settings:
    """One group of the list. runs: (key, what another key below it has to be); see agent_files.yaml."""

    of: str
    format: str
    runs: tuple[tuple[str, tuple[str, str] | None], ...]
    allows: tuple[str, ...]
    names: tuple[str, ...]


class AgentFiles:
    """The list that is shipped with vmsandbox, ready to be asked."""

    def __init__(self) -> None:
        import yaml

        data = yaml.load(_LIST.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506
        self._instructions = PathList([RiskyPath(path, "instructions") for path in data["instructions"]])
        self._groups = [_settings(group) for group in data["settings"]]
        numbered = [
            RiskyPath(path, str(number)) for number, group in enumerate(data["settings"]) for path in group["paths"]
        ]
        self._settings = PathList(numbered)

    def about(self, paths: Sequence[str]) -> tuple[bool, list[Settings]]:
        """Whether a file with these names is read as instructions, and as whose settings."""
        instructions, numbers = False, dict[str, None]()
        for name in map(searchable, paths):
            instructions = instructions or self._instructions.reason_for(name) is not None
            numbers.update(dict.fromkeys(self._settings.reasons_for(name)))
        return instructions, [self._groups[int(number)] for number in numbers]


@cache
def agent_files() -> AgentFiles:
    """The one list."""
    return AgentFiles()


def _settings(group: dict[str, Any]) -> Settings:
    runs: list[tuple[str, tuple[str, str] | None]] = []
    for one in group["runs"]:
        if isinstance(one, str):
            runs.append((one, None))
        else:
            runs.append((one["key"], next(iter(one["when"].items()))))
    return Settings(group["of"], group["format"], tuple(runs), tuple(group["allows"]), tuple(group["names"]))


def orders(settings: Settings, data: bytes) -> Iterator[Order]:
    """What this file would run, allow or set. Never an error: what cannot be read is an order too.

    data: all of it, or more than `MOST` bytes.
    """
    if len(data) > MOST:
        yield Order(f"settings of {settings.of}, too large to be read ({MOST >> 10} KiB are)")
        return
    if settings.format == "lines":
        yield from _orders_in_lines(settings, data)
        return
    text = data.decode("utf-8-sig", "replace")
    try:
        tree = _parsed(settings.format, text)
    except (ValueError, RecursionError, MemoryError):
        yield Order(f"settings of {settings.of} that cannot be read: nobody knows what they would run")
        return
    yield from _Reading(settings, text, tree).orders()


def _orders_in_lines(settings: Settings, data: bytes) -> Iterator[Order]:
    lines = one_line_end(data)
    groups = (("would run", [key for key, _ in settings.runs]), ("may without asking", settings.allows))
    for would, expressions in groups:
        for expression in expressions:
            for hit in _line_pattern(expression).hits(lines):
                found = lines[hit.start : hit.end].strip().decode("utf-8", "replace")
                yield Order(f"{settings.of} {would}: {_safe(found)}", lines.count(b"\n", 0, hit.start) + 1)


@cache
def _line_pattern(expression: str) -> LinePattern:
    return LinePattern(expression)


class _Pairs(list[tuple[str, Any]]):
    """An object with all its keys, also those that are there twice: some readers take the first, some the last."""


def _parsed(format_: str, text: str) -> Any:
    if format_ == "toml":
        # tomllib takes the square of the parts of one key: 40,000 of them are six seconds.
        if any(line.count(".") > _MOST_DOTS for line in text.split("\n")):
            raise ValueError("too many dots in a line")
        return tomllib.loads(text)
    bare = _STRING_OR_COMMENT.sub(lambda found: found[0] if found[0][0] == '"' else " ", text)
    bare = _STRING_OR_COMMA.sub(lambda found: found[0] if found[0][0] == '"' else " ", bare)
    return json.loads(bare, object_pairs_hook=_Pairs, strict=False)


@dataclass
class _Reading:
    """One file being looked through."""

    settings: Settings
    text: str
    tree: Any
    left: int = field(default=_VISITS)

    def orders(self) -> Iterator[Order]:
        of = self.settings.of
        for key, when in self.settings.runs:
            for place, value in self._at(self.tree, key.split("."), ""):
                if when is not None and not self._is(value, *when):
                    continue
                commands = list(_commands(value)) or ([_short(value)] if when is not None else [])
                for command in commands:
                    yield self._order(f"{of} would run: {_safe(command)} ({_safe(place)})", command)
        for key in self.settings.allows:
            for place, value in self._at(self.tree, key.split("."), ""):
                if not any(value is one or (value == one and isinstance(one, str)) for one in _ASKS):
                    yield self._order(f"{of} may without asking: {_safe(_short(value))} ({_safe(place)})", value)
        for key in self.settings.names:
            for place, _value in self._at(self.tree, key.split("."), ""):
                yield self._order(f"{of} sets {_safe(place)}", place.rpartition(".")[2])
        if self.left <= 0:
            yield Order(f"settings of {of} with too much in them to be looked through")

    def _order(self, what: str, needle: object) -> Order:
        written = json.dumps(needle, ensure_ascii=False)[1:-1] if isinstance(needle, str) else ""
        at = self.text.find(written) if written else -1
        return Order(what, self.text.count("\n", 0, at) + 1 if at >= 0 else None)

    def _at(self, value: Any, steps: list[str], place: str) -> Iterator[tuple[str, Any]]:
        """(where, value) of what a key leads to. A key of the file may have dots itself: `chat.tools.autoApprove`."""
        self.left -= 1
        if self.left <= 0:
            return
        if not steps:
            yield place, value
            return
        if isinstance(value, list) and not isinstance(value, _Pairs):
            if steps[0] == "*":
                for number, one in enumerate(value):
                    yield from self._at(one, steps[1:], f"{place}.{number}")
            return
        names = {".".join(steps[:count]): steps[count:] for count in range(1, len(steps) + 1)}
        for name, one in _items(value):
            self.left -= 1
            inner = f"{place}.{name}" if place else name
            if steps[0] == "*":
                yield from self._at(one, steps[1:], inner)
            elif name in names:
                yield from self._at(one, names[name], inner)

    def _is(self, value: Any, key: str, wanted: str) -> bool:
        return any(found == wanted for _, found in self._at(value, key.split("."), ""))


def _items(value: Any) -> Sequence[tuple[str, Any]]:
    if isinstance(value, _Pairs):
        return value
    return list(value.items()) if isinstance(value, dict) else ()


def _commands(value: Any) -> Iterator[str]:
    """The command lines that a value stands for: a text, words, `command` with `args`, or several by name."""
    if isinstance(value, str):
        if value.strip():
            yield value
    elif isinstance(value, (list, dict)) and not (isinstance(value, list) and not isinstance(value, _Pairs)):
        items = _items(value)
        names = {name for name, _ in items}
        if "command" in names:
            arguments = [one for name, one in items if name == "args"]
            for name, one in items:
                if name == "command":
                    yield " ".join(filter(None, (_words(one), *map(_words, arguments))))
        elif not names & _NOT_COMMANDS:
            for _, one in items:
                if isinstance(one, str) or (isinstance(one, list) and not isinstance(one, _Pairs)):
                    yield _words(one)
    elif isinstance(value, list) and value:
        yield _words(value)


def _words(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return shlex.join(value)
    return _short(value)


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)[:_SHOWN]


def _safe(text: str) -> str:
    """For people: on one line, without what looks like a key."""
    return shown(redacted(text[: 4 * _SHOWN].encode("utf-8", "replace")), _SHOWN)
