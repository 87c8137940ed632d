"""Reviews of trees in memory, for the tests of the review."""

from __future__ import annotations

from trees import File, Memory, Tree, manifest_of

from vmsandbox.review.classify import review
from vmsandbox.review.rules import ReviewRules
from vmsandbox.review.values import FileChange, Finding, Review, Risk


def judged(old: Tree, new: Tree, rules: ReviewRules | None = None) -> Review:
    """The review of what became of `old`."""
    return review(manifest_of(old), manifest_of(new), Memory(old), Memory(new), rules or ReviewRules())


def change_of(found: Review, path: str) -> FileChange:
    return next(one for one in found.changes if one.path == path)


def findings_in(text: str | bytes, name: str = "notes.txt", rules: ReviewRules | None = None) -> tuple[Finding, ...]:
    """What is found in a new file with this text."""
    data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
    return change_of(judged({}, {name: File(data)}, rules), name).findings


def risks_in(text: str | bytes, name: str = "notes.txt", rules: ReviewRules | None = None) -> set[Risk]:
    return {one.risk for one in findings_in(text, name, rules)}
