"""Words for what a review says, the same in the terminal and on the page."""

from __future__ import annotations

import re

from vmsandbox.review.manifest import Item
from vmsandbox.review.text import shown
from vmsandbox.review.values import FileChange, Finding, Hunk, Risk, Sort

SORTS: dict[Sort, str] = {
    "added": "new",
    "modified": "changed",
    "deleted": "deleted",
    "renamed": "renamed",
    "mode_changed": "mode",
    "kind_changed": "kind",
}
_GRAVE = frozenset((Risk.RULE, Risk.SECRET, Risk.AUTO_EXECUTED, Risk.TERMINAL, Risk.UNICODE, Risk.SYMLINK))
_TARGET = 300  # characters of a link's target


def grave(risk: Risk) -> bool:
    """Whether accepting it blindly could hurt at once."""
    return risk in _GRAVE


def label(risk: Risk) -> str:
    """The risk's name for people."""
    return risk.value.replace("-", " ")


def sort_text(change: FileChange) -> str:
    """What sort of change it is: `new`, `new folder`, `file → link` …"""
    kinds = {"file": "file", "dir": "folder", "symlink": "link", "other": "other"}
    if change.sort == "kind_changed" and change.before and change.after:
        return f"{kinds[change.before.kind]} → {kinds[change.after.kind]}"
    item = change.after or change.before
    return SORTS[change.sort] + (f" {kinds[item.kind]}" if item is not None and item.kind in ("dir", "symlink") else "")


def said(finding: Finding) -> str:
    """Its text. It should be safe to show already; should it not be, it is made so."""
    return "".join(part if part == "\\" else shown(part) for part in re.split(r"(\\)", finding.text))


def size_text(size: int) -> str:
    """Bytes for people: `12 bytes`, `3.4 MiB`."""
    if size < 1024:
        return f"{size} byte{'' if size == 1 else 's'}"
    amount = float(size)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        amount /= 1024
        if amount < 1024 or unit == "TiB":
            return f"{amount:.1f} {unit}"
    raise AssertionError


def item_text(item: Item | None) -> str:
    """One side of a change, safe to show: `file of 12 bytes, mode 0644`, `link to src/a.py`, `nothing`."""
    if item is None:
        return "nothing"
    if item.kind == "symlink":
        return f"link to {shown(item.target or '', _TARGET)}"
    if item.kind == "dir":
        return f"folder, mode {item.mode:04o}"
    if item.kind == "other":
        return "neither a file, folder nor link"
    return f"file of {size_text(item.size)}, mode {item.mode:04o}"


def has_lines(item: Item | None) -> bool:
    """Whether that side of a change can have lines."""
    return item is not None and item.kind == "file"


def what_became(change: FileChange) -> list[tuple[str, str]]:
    """What the lines of a change do not show: name and value, safe to show. Empty for an ordinary edit."""
    before, after = change.before, change.after
    if change.sort == "added":
        plain = change.hunks is not None and after is not None and after.mode == 0o644
        return [] if plain else [("new", item_text(after))]
    if change.sort == "deleted":
        return [("deleted", item_text(before))]
    if change.sort == "kind_changed" or (before and before.kind == "symlink"):
        return [("was", item_text(before)), ("is", item_text(after))]
    facts = []
    if change.sort == "renamed":
        facts.append(("content", "the same"))
    if before and after and before.mode != after.mode:
        facts.append(("mode", f"{before.mode:04o} → {after.mode:04o}"))
    if change.sort == "modified" and change.hunks is None and before and after:
        facts.append(("content", f"{size_text(before.size)} → {size_text(after.size)}, not shown as lines"))
    return facts


def where_text(hunk: Hunk, old: bool = True, new: bool = True) -> str:
    """Which lines a hunk is about: `lines 2–7 → lines 2–8`. old, new: whether that side is there."""
    sides = []
    for wanted, start, count in ((old, hunk.old_start, hunk.old_count), (new, hunk.new_start, hunk.new_count)):
        if wanted:
            sides.append(f"lines {start}–{start + count - 1}" if count > 1 else f"line {start}")
    return " → ".join(sides)
