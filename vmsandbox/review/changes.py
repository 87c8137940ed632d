"""What became of a project in the guest: two manifests compared, nothing else looked at.

Without renames a moved folder would be shown as a deletion and as new work. What was withheld when the
project was sent is in neither manifest, so it can never seem deleted.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from vmsandbox.review.manifest import Item, Manifest


class Renamed(NamedTuple):
    """A file that has the same content under another path. Its mode may differ."""

    old: str
    new: str
    before: Item
    after: Item


class Changed(NamedTuple):
    """An entry that is in both manifests and is not the same."""

    path: str
    before: Item
    after: Item


class One(NamedTuple):
    """An entry that is in one manifest only."""

    path: str
    item: Item


@dataclass(frozen=True)
class Changes:
    """All differences, each list sorted by path; an entry is in one list only.

    Paths and link targets are the guest's choice: show them through `vmsandbox.review.text.shown` only.

    added, deleted   not there before; not there any more
    modified         other content (or link target), the mode may differ as well
    mode_changed     the mode alone (folders too)
    renamed          see Renamed
    kind_changed     a file became a link, and so on
    """

    added: tuple[One, ...] = ()
    modified: tuple[Changed, ...] = ()
    deleted: tuple[One, ...] = ()
    mode_changed: tuple[Changed, ...] = ()
    renamed: tuple[Renamed, ...] = ()
    kind_changed: tuple[Changed, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether the two are the same."""
        return not any(self.counts.values())

    @property
    def counts(self) -> dict[str, int]:
        """How many there are of each sort."""
        return {
            "added": len(self.added),
            "modified": len(self.modified),
            "deleted": len(self.deleted),
            "mode_changed": len(self.mode_changed),
            "renamed": len(self.renamed),
            "kind_changed": len(self.kind_changed),
        }

    def as_json(self) -> dict[str, object]:
        """For `--json`. Paths are exact: dump them with ensure_ascii (the default), it escapes all that
        is not text.
        """
        return {
            "counts": self.counts,
            "added": [{"path": path, **_facts(item)} for path, item in self.added],
            "modified": [_both(one) for one in self.modified],
            "deleted": [{"path": path, **_facts(item)} for path, item in self.deleted],
            "mode_changed": [_both(one) for one in self.mode_changed],
            "renamed": [
                {"from": one.old, "path": one.new, "before": _facts(one.before), "after": _facts(one.after)}
                for one in self.renamed
            ],
            "kind_changed": [_both(one) for one in self.kind_changed],
        }


def compare(pushed: Manifest, returned: Manifest) -> Changes:
    """What has to be done to `pushed` to get `returned`."""
    before, after = pushed.items, returned.items
    added = {path for path in after if path not in before}
    deleted = {path for path in before if path not in after}
    renamed = _renames(pushed, returned, deleted, added)
    gone = {one.old for one in renamed}
    come = {one.new for one in renamed}
    modified, mode_changed, kind_changed = [], [], []
    for path in _sorted(path for path in before if path in after):
        old, new = before[path], after[path]
        if old == new:
            continue
        if old.kind != new.kind:
            kind_changed.append(Changed(path, old, new))
        elif (old.sha256, old.size, old.target) != (new.sha256, new.size, new.target):
            modified.append(Changed(path, old, new))
        elif old.mode != new.mode:
            mode_changed.append(Changed(path, old, new))
    return Changes(
        added=tuple(One(path, after[path]) for path in _sorted(added - come)),
        modified=tuple(modified),
        deleted=tuple(One(path, before[path]) for path in _sorted(deleted - gone)),
        mode_changed=tuple(mode_changed),
        renamed=renamed,
        kind_changed=tuple(kind_changed),
    )


def _renames(pushed: Manifest, returned: Manifest, deleted: set[str], added: set[str]) -> tuple[Renamed, ...]:
    """Pair deleted with added files of the same content: the same name first, then in the paths' order.

    Empty files are left out: all of them have the same content, and pairing them says nothing.
    """
    old_by_digest = _by_digest(pushed, deleted)
    new_by_digest = _by_digest(returned, added)
    pairs: list[tuple[str, str]] = []
    for digest, olds in old_by_digest.items():
        news = new_by_digest.get(digest)
        if not news:
            continue
        left: list[str] = []
        by_name: dict[str, list[str]] = defaultdict(list)
        for new in reversed(news):
            by_name[new.rpartition("/")[2]].append(new)
        taken: set[str] = set()
        for old in olds:
            same = by_name.get(old.rpartition("/")[2])
            if same:
                new = same.pop()
                taken.add(new)
                pairs.append((old, new))
            else:
                left.append(old)
        pairs.extend(zip(left, (new for new in news if new not in taken), strict=False))
    pairs.sort(key=lambda pair: os.fsencode(pair[1]))
    return tuple(Renamed(old, new, pushed.items[old], returned.items[new]) for old, new in pairs)


def _by_digest(manifest: Manifest, paths: set[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for path in _sorted(paths):
        item = manifest.items[path]
        if item.kind == "file" and item.sha256 is not None and item.size:
            found[item.sha256].append(path)
    return found


def _sorted(paths: Iterable[str]) -> list[str]:
    return sorted(paths, key=os.fsencode)


def _facts(item: Item) -> dict[str, object]:
    facts: dict[str, object] = {"kind": item.kind}
    if item.kind == "symlink":
        facts["target"] = item.target
    else:
        facts["mode"] = f"{item.mode:04o}"
    if item.kind == "file":
        facts |= {"size": item.size, "sha256": item.sha256}
    return facts


def _both(one: Changed) -> dict[str, object]:
    return {"path": one.path, "before": _facts(one.before), "after": _facts(one.after)}
