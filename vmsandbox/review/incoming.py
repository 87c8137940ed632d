"""Looks at what goes into a guest: secrets, hidden text in what an agent obeys, settings that run commands.

Without it a key that slipped into a repository would be handed to an agent, and a README could say to the agent what no
person sees in it. Nothing is changed or left out here: what is found is said; what is done about it is for the policy.

The project is not trusted either (somebody else may have written it): every file is looked at in time in proportion to
its size, and at most `MOST` bytes of it; what is larger is counted, and a finding where an agent would obey it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import islice
from typing import Any, NamedTuple

from vmsandbox.review.agent_files import AgentFiles, Settings, agent_files, orders
from vmsandbox.review.linear import compiled, one_line_end
from vmsandbox.review.links import Links
from vmsandbox.review.manifest import Item
from vmsandbox.review.scan import as_utf8, control_places
from vmsandbox.review.secret_shapes import secrets_in
from vmsandbox.review.unicode import PLANTED, hidden, planted

SECRETS, INSTRUCTIONS, SETTINGS = "secrets", "instructions", "agent_configuration"  # the names of PushPolicy's fields
KINDS = (SECRETS, INSTRUCTIONS, SETTINGS)
MOST = 8 << 20  # bytes of one file that are looked at
_LINES = 10  # findings of one kind in one file that are named
_KEPT = 10_000  # findings that are kept; all are counted
_BETWEEN = b"\x01"  # stands for what is between the texts of a binary
_BINARY = bytes(ord("\n") if code in b"\r\v\f" else code if 0 < code < 0x80 else _BETWEEN[0] for code in range(256))
_BEGINNING = 8192  # bytes: a NUL in them says that it is no text (git's own rule has 8000)


class Found(NamedTuple):
    """One finding. kind: one of `KINDS`. line: from 1, if it is about one. what: for people, safe to show.

    path: as it was sent; show it through `review.text.shown` only.
    """

    kind: str
    path: str
    line: int | None
    what: str


class Scanned(NamedTuple):
    """All that was found. counts: by kind, also of what is not in `findings`. partly: files larger than `MOST`."""

    findings: tuple[Found, ...]
    counts: dict[str, int]
    files: int
    partly: int


def scan(path: str, data: bytes, names: tuple[str, ...] = (), is_whole: bool = True) -> Iterator[Found]:
    """What there is to say about one file.

    names: other paths that give the same file (links). is_whole: `data` is all of it.
    """
    is_instructions, settings = agent_files().about((path, *names))
    return _scan(path, data, is_instructions, settings, is_whole)


class IncomingScan:
    """Sees the files of one push as they are packed (`pack`'s observer) and keeps what is found.

    links: path → target of the symbolic links that are sent too: what a link calls `CLAUDE.md` is read as such.
    """

    def __init__(self, links: Mapping[str, str] | None = None) -> None:
        items = {path: Item("symlink", 0, target=target) for path, target in (links or {}).items()}
        self._links = Links(items, lambda _path: None) if items else None
        self._list: AgentFiles = agent_files()
        self._path: str | None = None
        self._pieces: list[bytes] = []
        self._held = 0
        self._findings: list[Found] = []
        self._counts: Counter[str] = Counter()
        self._files = self._partly = 0

    def __call__(self, path: str, piece: bytes) -> None:
        """The next piece of a file; the pieces of one file follow each other."""
        if path != self._path:
            self._look()
            self._path = path
        if self._held <= MOST:  # one piece more than is looked at says that there is more
            self._pieces.append(piece)
        self._held += len(piece)

    def finish(self) -> Scanned:
        """All that was found in what was seen."""
        self._look()
        self._path = None
        return Scanned(tuple(self._findings), {kind: self._counts[kind] for kind in KINDS}, self._files, self._partly)

    def _look(self) -> None:
        if self._path is None:
            return
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        is_whole = self._held <= MOST
        path, self._pieces, self._held = self._path, [], 0
        self._files += 1
        self._partly += not is_whole
        names = (path, *self._links.aliases(path)) if self._links is not None else (path,)
        for found in _scan(path, data[:MOST], *self._list.about(names), is_whole):
            self._counts[found.kind] += 1
            if len(self._findings) < _KEPT:
                self._findings.append(found)


def _scan(path: str, data: bytes, is_instructions: bool, settings: list[Settings], is_whole: bool) -> Iterator[Found]:
    yield from _secrets(path, data)
    if is_instructions:
        yield from _hidden(path, data)
        if not is_whole:
            yield Found(INSTRUCTIONS, path, None, f"only its first {MOST >> 20} MiB were looked at")
    elif not data.isascii():
        yield from _planted(path, data)
    for one in settings:
        found = (Found(SETTINGS, path, order.line, order.what) for order in orders(one, data))
        yield from _first(found, SETTINGS, path)


def _secrets(path: str, data: bytes) -> Iterator[Found]:
    text, has_lines = _searchable(data)
    rows = (
        Found(SECRETS, path, _line(text, one.start) if has_lines else None, one.name)
        for one in secrets_in(one_line_end(text), _LINES + 1)
    )
    return _first(rows, SECRETS, path)


def _searchable(data: bytes) -> tuple[bytes, bool]:
    """Where secrets are looked for, and whether it has lines as a person sees them."""
    if data.isascii() and b"\0" not in data:
        return data, True
    if data.count(0) * 3 >= len(data):  # UTF-16: every second byte
        return as_utf8(data).data, False
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        # Secrets are ASCII; nearly all bytes that go in may be those of images and archives.
        return data.translate(_BINARY), False
    text = data.replace(b"\0", _BETWEEN)
    return text, _BETWEEN not in text


def _hidden(path: str, data: bytes) -> Iterator[Found]:
    """Everything in instructions that a person does not see, and that drives a terminal."""
    text = _as_text(data)
    yield from _by_line(path, text, control_places(text))
    if not text.isascii():
        yield from _by_line(path, text, ((one.offset, one.text) for one in hidden(text, first_of_file=True)))


def _planted(path: str, data: bytes) -> Iterator[Found]:
    """In any other text (a comment in source code) what no text needs."""
    if b"\0" in data[:_BEGINNING] or _any_planted().search(data) is None:
        return
    text = data.decode("utf-8", "replace")
    yield from _by_line(path, text, ((one.offset, one.text) for one in planted(text)))


@cache
def _any_planted() -> Any:
    return compiled(PLANTED)


def _as_text(data: bytes) -> str:
    for mark, encoding in ((b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be")):
        if data.startswith(mark):
            return data.decode(encoding, "replace")
    return data.decode("utf-8", "replace")


def _by_line(path: str, text: str, places: Iterator[tuple[int, str]]) -> Iterator[Found]:
    rows = (Found(INSTRUCTIONS, path, text.count("\n", 0, at) + 1, what) for at, what in places)
    return _first(rows, INSTRUCTIONS, path)


def _first(rows: Iterator[Found], kind: str, path: str) -> Iterator[Found]:
    """The first of them, and one that says that there are more: a file can be made of nothing else."""
    first = list(islice(rows, _LINES + 1))
    yield from first[:_LINES]
    if len(first) > _LINES:
        yield Found(kind, path, None, "and on more lines")


def _line(data: bytes, offset: int) -> int:
    return data.count(b"\n", 0, offset) + 1
