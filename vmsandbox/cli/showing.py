"""Says what came back and what was taken, to people and as JSON. All of it is the guest's word until it is shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TextIO

from vmsandbox.review.text import shown

if TYPE_CHECKING:
    from vmsandbox.apply.transaction import Applied
    from vmsandbox.review.values import FileChange, Finding, Review
    from vmsandbox.session.acceptance import Returned
    from vmsandbox.session.transfer.commits import ReturnedCommits

MOST_LINES = 60  # changes listed for people; --json has all
_LETTERS = {"added": "A", "modified": "M", "deleted": "D", "renamed": "R", "mode_changed": "X", "kind_changed": "T"}


def tell_applied(returned: Returned, applied: Applied | None, stream: TextIO) -> None:
    """Say what was brought into the project, and what was not."""
    if applied is None:
        print("nothing was brought back", file=stream)
        return
    print(f"{len(applied.paths)} of the project's paths written: {shown(str(returned.project))}", file=stream)
    for path in applied.kept:
        print(f"kept: {shown(path)} (something in it was never in the guest)", file=stream)


def tell_commits(landed: ReturnedCommits, stream: TextIO) -> None:
    """Say which of the guest's branches are in the project's repository now."""
    for branch in landed.branches:
        print(f"{branch.commit[:12]} {branch.ref}", file=stream)
    for text in landed.skipped:
        print(f"not taken: {text}", file=stream)
    for submodule in landed.submodules:
        print(f"submodule, not followed: {shown(str(submodule))}", file=stream)
    if not landed.branches:
        print("no new commits", file=stream)


def print_review(review: Review, stream: TextIO) -> None:
    """The changes for people, riskiest first. All of it is the guest's word, made visible before it is shown."""
    for finding in review.findings:
        print(f"!! {_reason(finding)}", file=stream)
    for change in review.changes[:MOST_LINES]:
        print(_line(change), file=stream)
        for finding in change.findings:
            print(f"    {_reason(finding)}", file=stream)
    if len(review.changes) > MOST_LINES:
        print(f"… and {len(review.changes) - MOST_LINES} more (--json has all)", file=stream)
    counts: dict[str, int] = {}
    for change in review.changes:
        counts[change.sort] = counts.get(change.sort, 0) + 1
    if counts:
        text = ", ".join(f"{count} {sort.replace('_', ' ')}" for sort, count in counts.items())
        risky = sum(1 for change in review.changes if change.findings)
        print(f"{text}; {risky} with a risk class; digest {review.digest[:12]}", file=stream)
    else:
        print("no changes", file=stream)


def as_json(returned: Returned) -> dict[str, Any]:
    """The change lists, and the review of them."""
    from vmsandbox.review.changes import compare

    review = returned.review
    return {
        **compare(returned.base, returned.quarantine.manifest).as_json(),
        "digest": review.digest,
        "findings": [finding._asdict() for finding in review.findings],
        "review": [
            {
                "path": change.path,
                "from": change.old_path,
                "sort": change.sort,
                "blocked": change.blocked,
                "findings": [finding._asdict() for finding in change.findings],
            }
            for change in review.changes
        ],
    }


def _line(change: FileChange) -> str:
    text = f"{_LETTERS[change.sort]} "
    text += f"{shown(change.old_path)} → {shown(change.path)}" if change.old_path else shown(change.path)
    if change.sort == "mode_changed" and change.before and change.after:
        text += f" ({change.before.mode:04o} → {change.after.mode:04o})"
    if change.sort == "kind_changed" and change.before and change.after:
        text += f" ({change.before.kind} → {change.after.kind})"
    return text


def _reason(finding: Finding) -> str:
    where = f" (line {finding.line})" if finding.line else ""
    return f"{'BLOCKED: ' if finding.blocks else ''}{finding.risk}: {finding.text}{where}"
