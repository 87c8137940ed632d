"""Judges what came back from a guest: each change with its risks, the worst first.

Without it a person would read ten thousand harmless lines and miss the one in `.vscode/tasks.json`.

`review` is a function: the same trees, bytes and rules give the same Review; it writes nothing, runs nothing and reads
bytes through Contents alone, whose digests it checks. Whatever the guest wrote, it takes time in proportion to it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from vmsandbox.review.changes import Changes, compare
from vmsandbox.review.dependencies import cost_of, package_findings, too_many
from vmsandbox.review.linediff import hunks_of
from vmsandbox.review.links import Links
from vmsandbox.review.manifest import Item, Manifest
from vmsandbox.review.names import collision_findings, name_findings, sort_key
from vmsandbox.review.risky import RiskyPaths
from vmsandbox.review.rules import MassDeletion, ReviewRules
from vmsandbox.review.scan import Added, Scanner, added_lines, as_utf8, pieces
from vmsandbox.review.text import shown
from vmsandbox.review.values import Contents, FileChange, Finding, Hunk, Review, Risk, Sort

_ORDER = {risk: place for place, risk in enumerate(Risk)}
_TRUNCATED = 10  # a file that lost nine tenths of its content counts as deleted, when many do
_TRUNCATED_FROM = 1024  # bytes that it had
_ALL_DIFF_STEPS = 200_000_000  # of comparing lines in one review: some minutes at the very worst
_DIFF_STEPS = 3_000_000  # the most that one comparison takes (linediff)
_ALL_PACKAGE_BYTES = 64 << 20  # of files that name packages; about half a minute at the worst
_SHOWN = 120


class _Entry(NamedTuple):
    """One difference, of whatever sort."""

    path: str
    sort: Sort
    before: Item | None
    after: Item | None
    old_path: str | None = None


class _Looked(NamedTuple):
    """What reading a file's content gave."""

    findings: list[Finding]
    hunks: tuple[Hunk, ...] | None


def review(pushed: Manifest, returned: Manifest, old: Contents, new: Contents, rules: ReviewRules) -> Review:
    """All that changed, with what is risky about it.

    Args:
        pushed: what was copied into the guest. old: its bytes, on the host.
        returned: what came back. new: its bytes, in quarantine; `old` may have those that were there before.
        rules: see ReviewRules. Its commands are not run here (see `rules.command_findings`).

    A file that cannot be read, has other bytes than its digest says, or is no file, folder or link is blocked.
    """
    changes = compare(pushed, returned)
    entries = list(_entries(changes))
    reviewer = _Reviewer(pushed, returned, old, new, rules)
    collisions = collision_findings(
        pushed.items, returned.items, (one.path for one in entries if one.sort in ("added", "renamed", "kind_changed"))
    )
    judged = [reviewer.change(one, collisions.get(one.path)) for one in entries]
    judged.sort(key=lambda one: (_worst(one.findings), sort_key(one.path)))
    return Review(returned.digest, tuple(judged), tuple(_mass_deletion(changes, pushed, rules.deletion)))


def _entries(changes: Changes) -> Iterator[_Entry]:
    for path, item in changes.added:
        yield _Entry(path, "added", None, item)
    for path, before, after in changes.modified:
        yield _Entry(path, "modified", before, after)
    for path, item in changes.deleted:
        yield _Entry(path, "deleted", item, None)
    for old_path, path, before, after in changes.renamed:
        yield _Entry(path, "renamed", before, after, old_path)
    for path, before, after in changes.mode_changed:
        yield _Entry(path, "mode_changed", before, after)
    for path, before, after in changes.kind_changed:
        yield _Entry(path, "kind_changed", before, after)


class _Reviewer:
    """One review in the making: the two trees, and what may still be spent."""

    def __init__(self, pushed: Manifest, returned: Manifest, old: Contents, new: Contents, rules: ReviewRules) -> None:
        self._pushed, self._returned, self._old, self._new, self._rules = pushed, returned, old, new, rules
        self._limits = rules.limits
        self._risky = RiskyPaths(rules.risky_paths)
        self._links = Links(returned.items, self._risky.reason)
        self._scanner = Scanner(rules.patterns, rules.limits.lines)
        self._hunk_bytes, self._diff_steps = rules.limits.hunk_bytes, _ALL_DIFF_STEPS
        self._package_bytes = _ALL_PACKAGE_BYTES

    def change(self, entry: _Entry, collision: Finding | None) -> FileChange:
        findings = [*self._about_place(entry), *self._about_path(entry), *_about_mode(entry)]
        if collision is not None:
            findings.append(collision)
        looked = self._content(entry)
        findings += looked.findings
        unique = sorted(dict.fromkeys(findings), key=lambda one: (_ORDER[one.risk], one.line or 0))
        return FileChange(
            entry.path, entry.sort, entry.before, entry.after, entry.old_path, tuple(unique), looked.hunks
        )

    def _about_place(self, entry: _Entry) -> Iterator[Finding]:
        """What the entry is, was, and lies in."""
        path, before, after = entry.path, entry.before, entry.after
        if after is None:
            yield Finding(Risk.DELETION, f"the {_kind(before)} is gone")
        elif after.kind == "other":
            yield Finding(Risk.UNREADABLE, "neither file, folder nor symbolic link", blocks=True)
        if entry.sort in ("added", "renamed"):
            yield from name_findings(path)
        if after is not None and after.kind == "symlink":
            replaces_folder = before is not None and before.kind == "dir"
            yield from self._links.findings(path, after.target or "", replaces_folder)
        elif after is not None and before is not None and before.kind == "symlink":
            yield Finding(Risk.SYMLINK, f"was a symbolic link to {shown(before.target or '', _SHOWN)}")
        elif entry.sort == "kind_changed":
            yield Finding(Risk.DELETION, f"the {_kind(before)} is gone, a {_kind(after)} is in its place")
        if (parent := self._parent_that_is_none(path)) is not None:
            text = f"its folder became a {_kind(self._returned.items[parent])}: {shown(parent, _SHOWN)}"
            yield Finding(Risk.SYMLINK, text, blocks=after is not None)

    def _parent_that_is_none(self, path: str) -> str | None:
        """The folder above this path that is something else in the returned tree, if there is one."""
        while path := path.rpartition("/")[0]:
            item = self._returned.items.get(path)
            if item is not None and item.kind != "dir":
                return path
        return None

    def _about_path(self, entry: _Entry) -> Iterator[Finding]:
        """Whether something runs or obeys what lies there."""
        if all(item is None or item.kind == "dir" for item in (entry.before, entry.after)):
            return
        gone = "; it is gone" if entry.after is None else ""
        if reason := self._risky.reason(entry.path):
            yield Finding(Risk.AUTO_EXECUTED, shown(reason) + gone)
        elif entry.old_path is not None and (reason := self._risky.reason(entry.old_path)):
            yield Finding(Risk.AUTO_EXECUTED, f"{shown(reason)}; it was {shown(entry.old_path, _SHOWN)}")
        for alias in self._links.aliases(entry.path):
            if reason := self._risky.reason(alias):
                yield Finding(Risk.AUTO_EXECUTED, f"{shown(reason)}: through a link it is {shown(alias, _SHOWN)} too")
                return

    def _content(self, entry: _Entry) -> _Looked:
        """Read what is new (and what was there), and look through it."""
        before, after = entry.before, entry.after
        was_file = before is not None and before.kind == "file"
        if after is None:
            return self._deleted(entry) if was_file else _Looked([], None)
        if after.kind != "file" or entry.sort == "mode_changed":
            return _Looked([], () if entry.sort == "mode_changed" else None)
        if after.sha256 is None:
            return _Looked([_unreadable("the guest could not or would not send its content")], None)
        limits = self._limits
        if after.size > limits.scan_bytes:
            text = f"{_size(after.size)}: too large to be looked at"
            return _Looked([Finding(Risk.UNREADABLE, text, blocks=self._rules.can_block)], None)
        # A file that only moved was not sent again: its bytes are the host's own, by the same digest.
        data = _read(self._new, after)
        if data is None and (data := _read(self._old, after)) is None:
            return _Looked([_unreadable("its content is missing, or is not what its digest says")], None)
        if entry.sort == "renamed":
            return _Looked(self._packages(entry.path, None, data), ())
        if len(data) > limits.file_bytes:
            return self._large(entry.path, data)
        old_data = _read(self._old, before) if was_file and before is not None else None
        findings = self._packages(entry.path, old_data, data)
        if was_file and not data and before is not None and before.size:
            findings.append(Finding(Risk.DELETION, "all of its content is gone"))
        encoded = as_utf8(data)
        if encoded.why_binary:
            findings.append(Finding(Risk.BINARY, encoded.why_binary))
        hunks = self._hunks(old_data, data) if old_data is not None or not was_file else None
        if b"\0" in data:
            return _Looked([*findings, *self._scanner.patterns(Added(encoded.data), has_lines=False)], None)
        added = Added(encoded.data) if hunks is None or old_data is None else added_lines(hunks)
        return _Looked([*findings, *self._scanner.text(added)], self._kept(hunks))

    def _deleted(self, entry: _Entry) -> _Looked:
        assert entry.before is not None
        data = _read(self._old, entry.before) if entry.before.size <= self._limits.file_bytes else None
        if data is None:
            return _Looked([], None)
        return _Looked(self._packages(entry.path, data, None), self._kept(self._hunks(data, b"")))

    def _large(self, path: str, data: bytes) -> _Looked:
        """A file that is not shown: rules and secrets are looked for all the same, or padding would avoid them."""
        text = f"{_size(len(data))}: too large to be shown; only rules and secrets were looked for"
        findings = [Finding(Risk.UNREADABLE, text), *self._packages(path, None, data)]
        if binary := as_utf8(data).why_binary:
            findings.append(Finding(Risk.BINARY, binary))
        for piece, first in pieces(data):
            added = Added(as_utf8(piece).data, first=first)
            findings += self._scanner.patterns(added, has_lines=b"\0" not in data)
        return _Looked(findings[: 20 * self._limits.lines], None)

    def _packages(self, path: str, old: bytes | None, new: bytes | None) -> list[Finding]:
        self._package_bytes -= cost_of(path, len(old or b"") + len(new or b""))
        if self._package_bytes < 0 and cost_of(path, 1):
            return too_many(path)
        return package_findings(path, old, new)

    def _hunks(self, old: bytes | None, new: bytes) -> tuple[Hunk, ...] | None:
        if self._diff_steps <= 0 or (not old and self._hunk_bytes <= 0):
            return None
        hunks = hunks_of(old or b"", new)
        if old and new and hunks is not None:
            # What it cost is not said; Myers' algorithm takes the square of the lines that differ.
            changed = sum(sign != " " for hunk in hunks for sign, _ in hunk.lines)
            self._diff_steps -= min(changed * changed, _DIFF_STEPS)
        return hunks

    def _kept(self, hunks: tuple[Hunk, ...] | None) -> tuple[Hunk, ...] | None:
        """The hunks, as long as there is room for them in the review."""
        if hunks is None or self._hunk_bytes <= 0:
            return None
        self._hunk_bytes -= sum(len(line) for hunk in hunks for _, line in hunk.lines)
        return hunks


def _about_mode(entry: _Entry) -> Iterator[Finding]:
    before, after = entry.before, entry.after
    if after is None or after.kind not in ("file", "dir"):
        return
    if before is None or before.kind != after.kind:
        if after.kind == "file" and after.mode & 0o111:
            yield Finding(Risk.EXECUTABLE, f"a new file that can be run (mode {after.mode:04o})")
    elif before.mode != after.mode:
        runs = after.kind == "file" and after.mode & 0o111 & ~before.mode
        text = f"mode {before.mode:04o} → {after.mode:04o}"
        yield Finding(Risk.EXECUTABLE, f"can be run now: {text}") if runs else Finding(Risk.MODE, text)


def _mass_deletion(changes: Changes, pushed: Manifest, threshold: MassDeletion) -> Iterator[Finding]:
    """A finding about the whole if too much is gone."""
    files = sum(item.kind == "file" for item in pushed.items.values())
    gone = sum(one.item.kind == "file" for one in changes.deleted)
    gone += sum(one.before.kind == "file" for one in changes.kind_changed)
    emptied = sum(
        one.before.kind == "file" and _is_truncated(one.before.size, one.after.size) for one in changes.modified
    )
    lost = gone + emptied
    is_large_share = lost >= threshold.files_of_share and lost > files * threshold.share
    if is_large_share or lost > threshold.files:
        yield Finding(Risk.DELETION, f"{lost} of {files} files are gone or empty ({gone} deleted, {emptied} truncated)")


def _is_truncated(before: int, after: int) -> bool:
    return before > 0 and (after == 0 or (before >= _TRUNCATED_FROM and after * _TRUNCATED < before))


def _read(contents: Contents, item: Item) -> bytes | None:
    """All bytes of a file, if they are what the digest says."""
    if item.sha256 is None:
        return None
    file = contents.open(item.sha256)
    if file is None:
        return None
    with file:
        data = file.read(item.size + 1)
    return data if hashlib.sha256(data).hexdigest() == item.sha256 else None


def _unreadable(text: str) -> Finding:
    return Finding(Risk.UNREADABLE, text, blocks=True)


def _worst(findings: Iterable[Finding]) -> int:
    return min((_ORDER[one.risk] for one in findings), default=len(_ORDER))


def _kind(item: Item | None) -> str:
    names = {"file": "file", "dir": "folder", "symlink": "symbolic link", "other": "special file"}
    return names[item.kind] if item is not None else "entry"


def _size(count: int) -> str:
    return f"{count / (1 << 20):.1f} MiB" if count >= 1 << 20 else f"{count} bytes"
