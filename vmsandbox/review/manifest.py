r"""What a tree contains, as a value: pushed by the host, or reported by a guest that may lie.

Without a strict reader, a guest could name `../x`, fill the host's memory, or crash the program that
judges it.

The format (the host keeps what was pushed and what came back in it; the receiver reports in it): JSON lines
in ASCII, one object an entry, and a last line that says how many, so that a cut-off report is not taken
for deletions.

    {"path":"src/a.py","kind":"file","mode":420,"size":12,"sha256":"…64 hexadecimal digits…"}
    {"path":"src","kind":"dir","mode":493}
    {"path":"link","kind":"symlink","target":"src/a.py"}
    {"path":"pipe","kind":"other","mode":420}
    {"entries":4}

Bytes that are not UTF-8 are surrogate escapes (PEP 383), written `\udc80` to `\udcff`. A file's sha256 is
null if the guest could not read it. `other` is all that is not one of the three, or a folder that could
not be read.
"""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from json.encoder import encode_basestring_ascii as json_text
from typing import Any, Literal, NamedTuple

from vmsandbox.errors import GuestError
from vmsandbox.review.text import shown_bytes

Kind = Literal["file", "dir", "symlink", "other"]
_HEX = frozenset("0123456789abcdef")
_FIELDS: dict[str, frozenset[str]] = {
    "file": frozenset(("path", "kind", "mode", "size", "sha256")),
    "dir": frozenset(("path", "kind", "mode")),
    "symlink": frozenset(("path", "kind", "target")),
    "other": frozenset(("path", "kind", "mode")),
}
_MAX_PATH = 4096  # PATH_MAX, linux/limits.h
_MAX_NAME = 255  # NAME_MAX
_MAX_SIZE = (1 << 63) - 1


class Item(NamedTuple):
    """One entry. mode: permission bits (0777; of a symlink 0). size: bytes of a file, else 0."""

    kind: Kind
    mode: int
    size: int = 0
    sha256: str | None = None
    target: str | None = None


@dataclass(frozen=True)
class ManifestLimits:
    """What is read of a guest's report before it is refused."""

    bytes: int = 256 << 20
    entries: int = 400_000
    line: int = 64 << 10
    depth: int = 128


@dataclass(frozen=True)
class Manifest:
    """All entries of a tree by path (relative, '/' between components, surrogate escapes)."""

    items: Mapping[str, Item]

    def lines(self) -> Iterator[bytes]:
        """The canonical form, line by line: sorted by the path's bytes, keys in a fixed order."""
        for path in sorted(self.items, key=os.fsencode):
            yield entry_line(path, self.items[path])
        yield b'{"entries":%d}\n' % len(self.items)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical form, in lower-case hexadecimal."""
        sha = hashlib.sha256()
        for line in self.lines():
            sha.update(line)
        return sha.hexdigest()

    def collisions(self) -> list[tuple[str, ...]]:
        """Groups of paths that are one and the same on a file system that folds case or Unicode forms."""
        groups: dict[str, list[str]] = defaultdict(list)
        for path in self.items:
            # Twice: folding case can leave a form that is not normalised (Unicode 3.13, D145).
            folded = unicodedata.normalize("NFD", unicodedata.normalize("NFD", path).casefold())
            groups[folded].append(path)
        return sorted(tuple(sorted(group, key=os.fsencode)) for group in groups.values() if len(group) > 1)


def entry_line(path: str, item: Item) -> bytes:
    """One entry's line in the canonical form."""
    if item.kind == "file" and item.sha256 is not None:  # nearly all of them: five times faster than what follows
        form = b'{"path":%s,"kind":"file","mode":%d,"size":%d,"sha256":"%s"}\n'
        return form % (json_text(path).encode("ascii"), item.mode, item.size, item.sha256.encode("ascii"))
    record: dict[str, object] = {"path": path, "kind": item.kind}
    if item.kind == "symlink":
        record["target"] = item.target
    else:
        record["mode"] = item.mode
    if item.kind == "file":
        record["size"] = item.size
        record["sha256"] = item.sha256
    return json.dumps(record, separators=(",", ":")).encode("ascii") + b"\n"


def parse_untrusted_manifest(untrusted_stream: Iterable[bytes], limits: ManifestLimits | None = None) -> Manifest:
    """Read what a guest reports: chunks of bytes of any size, cut anywhere.

    Raises:
        GuestError: anything is not exactly as this module's docstring says, or a limit is passed. The
            stream is not read further then.
    """
    limits = limits or ManifestLimits()
    items: dict[str, Item] = {}
    ended = False
    for number, untrusted_line in enumerate(_untrusted_lines(untrusted_stream, limits), 1):
        if ended:
            raise _bad(number, "something follows the last line", untrusted_line)
        untrusted = _untrusted_object(number, untrusted_line)
        if untrusted.keys() == {"entries"}:
            if type(untrusted["entries"]) is not int or untrusted["entries"] != len(items):
                raise _bad(number, f"the number of entries is not {len(items)}", untrusted_line)
            ended = True
            continue
        try:
            path, item = _entry(untrusted, limits)
            if path in items:
                raise ValueError("the path is there twice")
        except ValueError as error:
            raise _bad(number, str(error), untrusted_line) from None
        items[path] = item
        if len(items) > limits.entries:
            raise GuestError(
                f"the guest reports more than {limits.entries} files",
                resolution="remove what is not needed in the guest, or compare a folder further in",
            )
    if not ended:
        raise GuestError("the guest's report of its files is cut off", resolution="try again")
    for path in items:
        parent = path.rpartition("/")[0]
        if parent and (parent not in items or items[parent].kind != "dir"):
            raise GuestError(
                "the guest's report of its files contradicts itself",
                details=f"no folder for {shown_bytes(os.fsencode(path))}",
            )
    return Manifest(items)


def _untrusted_lines(untrusted_stream: Iterable[bytes], limits: ManifestLimits) -> Iterator[bytes]:
    """Whole lines without their newline; what is behind the last newline is a line too."""
    rest = b""
    total = 0
    for chunk in untrusted_stream:
        total += len(chunk)
        if total > limits.bytes:
            raise GuestError(f"the guest's report of its files is longer than {limits.bytes >> 20} MiB")
        *whole, rest = (rest + chunk).split(b"\n")
        for line in (*whole, rest):
            if len(line) > limits.line:
                raise GuestError(
                    f"the guest's report of its files has a line of more than {limits.line} bytes",
                    details=shown_bytes(line),
                )
        yield from whole
    if rest:
        yield rest


def _untrusted_object(number: int, untrusted_line: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key is there twice")
        return found

    try:
        untrusted = json.loads(untrusted_line.decode("ascii"), object_pairs_hook=unique)
    except (ValueError, RecursionError):  # RecursionError: a line of brackets
        raise _bad(number, "not a JSON object in ASCII with each key once", untrusted_line) from None
    if not isinstance(untrusted, dict):
        raise _bad(number, "not a JSON object", untrusted_line)
    return untrusted


def _entry(untrusted: dict[str, Any], limits: ManifestLimits) -> tuple[str, Item]:
    """One entry checked. Raises ValueError with what is wrong."""
    kind = untrusted.get("kind")
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise ValueError("unknown kind")
    if untrusted.keys() != _FIELDS[kind]:
        raise ValueError("missing or unknown keys")
    path = checked_path(untrusted["path"], limits.depth)
    if kind == "symlink":
        return path, Item("symlink", 0, target=_text(untrusted["target"], "target"))
    mode = _number(untrusted["mode"], 0xFFFF) & 0o777
    if kind == "dir":
        return path, Item("dir", mode)
    if kind == "other":
        return path, Item("other", mode)
    sha256 = untrusted["sha256"]
    if sha256 is not None and not (isinstance(sha256, str) and len(sha256) == 64 and _HEX.issuperset(sha256)):
        raise ValueError("not a SHA-256")
    return path, Item("file", mode, _number(untrusted["size"], _MAX_SIZE), sha256)


def checked_path(untrusted_path: object, depth: int) -> str:
    """A path that can only lie inside the tree it is relative to.

    Raises:
        ValueError: empty, absolute, a component that is empty, '.', '..', '.git' or longer than 255
            bytes, a NUL, more than 4096 bytes or `depth` components, or text that does not stand for
            bytes exactly.
    """
    path = _text(untrusted_path, "path")
    components = path.split("/")
    if len(components) > depth:
        raise ValueError("the path is too deep")
    for component in components:
        if component in ("", ".", ".."):
            raise ValueError("the path is absolute or has an empty, '.' or '..' component")
        if component == ".git":
            raise ValueError("git's own folder may not be reported")
        # A character has at most four bytes: the exact count is needed only for long names.
        if len(component) > _MAX_NAME // 4 and len(os.fsencode(component)) > _MAX_NAME:
            raise ValueError(f"a name is longer than {_MAX_NAME} bytes")
    return path


def _text(untrusted: object, what: str) -> str:
    if not isinstance(untrusted, str) or not untrusted:
        raise ValueError(f"the {what} is not a text, or empty")
    if untrusted.isascii():
        size = len(untrusted)
    else:
        # Exact: UTF-8 hidden in escapes would be a second spelling of the same name.
        try:
            encoded = untrusted.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            raise ValueError(f"the {what} has a surrogate that stands for no byte") from None
        if encoded.decode("utf-8", "surrogateescape") != untrusted:
            raise ValueError(f"the {what} is not in its one spelling")
        size = len(encoded)
    if "\0" in untrusted:
        raise ValueError(f"the {what} has a NUL")
    if size > _MAX_PATH:
        raise ValueError(f"the {what} is longer than {_MAX_PATH} bytes")
    return untrusted


def _number(untrusted: object, largest: int) -> int:
    if type(untrusted) is not int or not 0 <= untrusted <= largest:  # a bool is an int for isinstance
        raise ValueError("not a number in range")
    return untrusted


def _bad(number: int, why: str, untrusted_line: bytes) -> GuestError:
    return GuestError(
        f"the guest's report of its files is malformed: line {number}: {why}",
        details=shown_bytes(untrusted_line),
        resolution="the guest is not to be trusted; stop the session",
    )
