"""A review as a patch that `git apply` takes.

A plain `diff -u` loses what git's own format keeps: modes, links, renames, binary files, and names with odd bytes.
The format is that of git-diff(1), "Generating patch text with -p". The result is exact bytes: what is shown on
a terminal has to go through `vmsandbox.review.terminal` or `text` first.
"""

from __future__ import annotations

import base64
import hashlib
import re
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from vmsandbox.errors import RefusedError
from vmsandbox.review.linediff import MAX_BYTES, hunks_of
from vmsandbox.review.manifest import Item
from vmsandbox.review.text import shown
from vmsandbox.review.values import Contents, FileChange, Hunk, Review

_PLAIN_NAME = re.compile(rb"[A-Za-z0-9_./+@=%,-]+")
_NAMED_ESCAPES = {7: b"a", 8: b"b", 9: b"t", 10: b"n", 11: b"v", 12: b"f", 13: b"r", 34: b'"', 92: b"\\"}
_NO_BLOB = b"0" * 40
_PIECE = 1 << 20
_LINE = 52  # bytes on one line of a binary patch: the most that its length letter can say


class _NotThere(Exception):
    """The bytes are not there any more, or were never sent."""


def as_patch(review: Review, old: Contents, new: Contents) -> Iterator[bytes]:
    """The patch in pieces, changes in the order of their paths.

    git knows no folders and of modes only whether a file can be run, so a patch has neither empty folders nor
    other modes. What cannot be in it (bytes that are not there, sockets) is named in a comment on top of it.

    Raises:
        RefusedError: bytes do not have the digest that was reviewed.
    """
    for change in sorted(review.changes, key=lambda one: one.path.encode("utf-8", "surrogateescape")):
        try:
            yield from _file_patch(change, old, new)
        except _NotThere as error:
            yield f"# vmsandbox: not in this patch: {shown(change.path)}: {error}\n".encode()


def hunk_bytes(hunk: Hunk) -> bytes:
    """One hunk of a unified diff."""
    parts = [
        b"@@ -%d,%d +%d,%d @@\n" % (hunk.old_start, hunk.old_count, hunk.new_start, hunk.new_count),
    ]
    for sign, line in hunk.lines:
        parts.append(sign.encode() + line)
        if not line.endswith(b"\n"):
            parts.append(b"\n\\ No newline at end of file\n")
    return b"".join(parts)


def quoted_name(path: bytes) -> bytes:
    """A path as git writes it: bare, or in double quotes with C's escapes (git-config(1), core.quotePath)."""
    if _PLAIN_NAME.fullmatch(path):
        return path
    out = bytearray(b'"')
    for byte in path:
        if byte in _NAMED_ESCAPES:
            out += b"\\" + _NAMED_ESCAPES[byte]
        elif 0x20 <= byte < 0x7F:
            out.append(byte)
        else:
            out += b"\\%03o" % byte
    return bytes(out + b'"')


class _Side(NamedTuple):
    """One side of a change as git sees it: an item that is a file or a link, and where its bytes are.

    or_else: where they are too, if the guest had no reason to send what it had been given.
    """

    item: Item
    contents: Contents
    or_else: Contents | None = None

    @property
    def mode(self) -> bytes:
        if self.item.kind == "symlink":
            return b"120000"
        return b"100755" if self.item.mode & 0o100 else b"100644"

    @property
    def key(self) -> tuple[object, ...]:
        """The same for the same bytes."""
        return self.item.kind, self.item.sha256, self.item.target

    @property
    def size(self) -> int:
        return len(self._target) if self.item.kind == "symlink" else self.item.size

    @property
    def _target(self) -> bytes:
        return (self.item.target or "").encode("utf-8", "surrogateescape")

    def pieces(self) -> Iterator[bytes]:
        """Its bytes, checked: the last piece is followed by an error if they were not those reviewed."""
        if self.item.kind == "symlink":
            yield self._target
            return
        sha256 = self.item.sha256
        stream = None if sha256 is None else self.contents.open(sha256)
        if stream is None and sha256 is not None and self.or_else is not None:
            stream = self.or_else.open(sha256)
        if stream is None:
            raise _NotThere("its bytes are not there")
        digest, size = hashlib.sha256(), 0
        with stream:
            while piece := stream.read(_PIECE):
                digest.update(piece)
                size += len(piece)
                yield piece
        if digest.hexdigest() != sha256 or size != self.item.size:
            raise RefusedError("a file's bytes are not those that were reviewed", details=f"SHA-256 {sha256}")

    def blob(self) -> bytes:
        """git's name of these bytes (gitformat: SHA-1 over "blob SIZE NUL" and them), 40 digits."""
        sha = hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        for piece in self.pieces():
            sha.update(piece)
        return sha.hexdigest().encode()


def _file_patch(change: FileChange, old: Contents, new: Contents) -> Iterator[bytes]:
    path = change.path.encode("utf-8", "surrogateescape")
    if any(item is not None and item.kind == "other" for item in (change.before, change.after)):
        raise _NotThere("not a file, folder or link")
    before = _Side(change.before, old) if change.before and change.before.kind != "dir" else None
    after = _Side(change.after, new, old) if change.after and change.after.kind != "dir" else None
    if change.sort == "renamed" and before and after and change.old_path is not None:
        yield _rename(change.old_path.encode("utf-8", "surrogateescape"), path, before, after)
    elif before and after and before.item.kind != after.item.kind:
        after.blob()  # is it there? Before the half of the change is out
        yield from _one(path, before, None, None)
        yield from _one(path, None, after, None)
    else:
        yield from _one(path, before, after, change.hunks)


def _rename(old_path: bytes, path: bytes, before: _Side, after: _Side) -> bytes:
    return (
        _header(old_path, path)
        + _mode_lines(before, after)
        + b"similarity index 100%\nrename from "
        + quoted_name(old_path)
        + b"\nrename to "
        + quoted_name(path)
        + b"\n"
    )


def _one(path: bytes, before: _Side | None, after: _Side | None, hunks: tuple[Hunk, ...] | None) -> Iterator[bytes]:
    """One path that stays what it is, comes or goes. None: not there."""
    if before is None and after is None:
        return  # a folder
    start = _header(path, path) + _mode_lines(before, after)
    if before and after and before.key == after.key:
        if before.mode != after.mode:
            yield start
        return
    if hunks is None:
        hunks = _text_hunks(before, after)
    if hunks is not None:
        if hunks:
            start += b"--- " + (quoted_name(b"a/" + path) if before else b"/dev/null") + b"\n"
            start += b"+++ " + (quoted_name(b"b/" + path) if after else b"/dev/null") + b"\n"
        if hunks or not (before and after):
            yield start + b"".join(map(hunk_bytes, hunks))
        return
    old_blob = before.blob() if before else _NO_BLOB
    new_blob = after.blob() if after else _NO_BLOB
    yield start + b"index " + old_blob + b".." + new_blob + b"\nGIT binary patch\n"
    yield from _literal(after)
    yield b"\n"
    yield from _literal(before)  # with it the patch can be taken back
    yield b"\n"


def _header(old_path: bytes, path: bytes) -> bytes:
    return b"diff --git " + quoted_name(b"a/" + old_path) + b" " + quoted_name(b"b/" + path) + b"\n"


def _mode_lines(before: _Side | None, after: _Side | None) -> bytes:
    if before is None:
        return b"new file mode " + after.mode + b"\n" if after else b""
    if after is None:
        return b"deleted file mode " + before.mode + b"\n"
    if before.mode == after.mode:
        return b""
    return b"old mode " + before.mode + b"\nnew mode " + after.mode + b"\n"


def _text_hunks(before: _Side | None, after: _Side | None) -> tuple[Hunk, ...] | None:
    sides = [side for side in (before, after) if side is not None]
    if any(side.size > MAX_BYTES for side in sides):
        return None
    old, new = (b"".join(side.pieces()) if side else b"" for side in (before, after))
    return hunks_of(old, new)


def _literal(side: _Side | None) -> Iterator[bytes]:
    """A whole file, deflated, base85 with a length letter before each line (git's apply.c, parse_binary_hunk)."""
    yield b"literal %d\n" % (side.size if side else 0)
    deflate = zlib.compressobj()
    waiting = b""
    for piece in side.pieces() if side else ():
        waiting += deflate.compress(piece)
        whole = len(waiting) - len(waiting) % _LINE
        yield _base85(waiting[:whole])
        waiting = waiting[whole:]
    yield _base85(waiting + deflate.flush())


def _base85(data: bytes) -> bytes:
    lines = []
    for start in range(0, len(data), _LINE):
        part = data[start : start + _LINE]
        letter = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"[len(part) - 1 : len(part)]
        lines.append(letter + base64.b85encode(part, pad=True) + b"\n")
    return b"".join(lines)
