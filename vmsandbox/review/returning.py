"""What a policy lets come back (`sandbox.return`): places that nothing is taken from, and how much without a person.

Without it a guest that was only to write `src/` could bring a workflow along, and `--accept all` in a script would take
whatever a policy's author had ruled out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from vmsandbox.policy.values import ReturnPolicy
from vmsandbox.review.links import Links
from vmsandbox.review.manifest import Manifest
from vmsandbox.review.risky import PathList
from vmsandbox.review.rules import RiskyPath
from vmsandbox.review.text import shown
from vmsandbox.review.values import FileChange, Finding, Review, Risk


class DeniedReturns:
    """`return.denied_paths`, ready to be asked.

    A pattern without a slash (or with one at its end) is that name at any depth, `./x` and `x/y` begin at the project's
    top; all that is below is meant too. Names are compared as the most forgiving file system would (`review.risky`).
    """

    def __init__(self, patterns: tuple[str, ...]) -> None:
        self._list = PathList([RiskyPath(one, pattern) for pattern in patterns for one in _forms(pattern)])
        self._any = bool(patterns)

    def rule(self, path: str) -> str | None:
        """The pattern that keeps this path (relative to the project) from coming back, or None."""
        return self._list.reason(path) if self._any else None

    def __bool__(self) -> bool:
        return self._any


def _forms(pattern: str) -> tuple[str, ...]:
    """The pattern in the words of risky_paths.yaml: the place itself, and all below it."""
    stem = pattern.rstrip("/")
    anchored = stem.startswith(("./", "/")) or "/" in stem
    while stem.startswith("./"):
        stem = stem[2:].lstrip("/")
    stem = stem.strip("/")
    if stem in ("", "."):
        return ("/**",)
    start = "/" if anchored and not stem.startswith("**/") else ""
    return (start + stem, start + stem + "/")


def under(review: Review, returns: ReturnPolicy, *trees: Manifest) -> Review:
    """The review with what the policy says of it: blocked changes, and a finding about the whole for each limit.

    trees: the two that were compared; through a link of theirs a path may lie in a denied place.
    """
    denied = DeniedReturns(returns.denied_paths)
    changes = review.changes
    if denied:
        links = [Links(tree.items, lambda _path: None) for tree in trees]
        judged = [_judged(change, denied, links) for change in changes]
        changes = tuple(sorted(judged, key=lambda one: not one.blocked))
    limits = tuple(Finding(Risk.RULE, text) for text in over_limits(review, returns))
    return replace(review, changes=changes, findings=(*limits, *review.findings))


def _judged(change: FileChange, denied: DeniedReturns, links: list[Links]) -> FileChange:
    for path in (change.path, change.old_path):
        if path is None:
            continue
        names = [path, *(alias for tree in links for alias in tree.aliases(path))]
        if (found := next(((name, rule) for name in names if (rule := denied.rule(name))), None)) is not None:
            name, rule = found
            text = f"the policy's return.denied_paths has {shown(rule, 200)}"
            if name != change.path:
                text += f": it is {shown(name, 200)}" + ("" if name == change.old_path else " too, through a link")
            return replace(change, findings=(Finding(Risk.RULE, text, blocks=True), *change.findings))
    return change


def over_limits(review: Review, returns: ReturnPolicy) -> list[str]:
    """What there is more of than may be taken without a person, a text for each limit that is passed."""
    counted = (
        ("files", sum(1 for one in review.changes if _is_content(one) and one.after is not None), returns.files),
        ("bytes", sum(_bytes(review)), returns.bytes),
        ("deletions", sum(1 for one in review.changes if _is_content(one) and _is_lost(one)), returns.deletions),
    )
    return [
        f"the policy's return.{key}: {count} came back, {most} may be taken without a person"
        for key, count, most in counted
        if most is not None and count > most
    ]


def _is_content(change: FileChange) -> bool:
    """Whether it is about more than folders."""
    return any(item is not None and item.kind != "dir" for item in (change.before, change.after))


def _bytes(review: Review) -> Iterator[int]:
    for change in review.changes:
        if change.after is not None and change.sort not in ("renamed", "mode_changed"):
            yield change.after.size


def _is_lost(change: FileChange) -> bool:
    """Gone, replaced by something else, or emptied, which is the same under another name."""
    before, after = change.before, change.after
    if before is None or before.kind == "dir" or change.sort == "renamed":
        return False
    return after is None or after.kind != before.kind or (before.size > 0 and after.kind == "file" and after.size == 0)
