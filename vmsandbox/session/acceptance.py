"""From what lies in quarantine to the project: reviewed, chosen, applied, written down. In this order only.

The approval names the digest of the tree that was reviewed. Were it bound to anything less, a guest that still runs
could change its mind between the review and the approval.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from vmsandbox.apply.transaction import Applied, apply
from vmsandbox.errors import RefusedError, UserInputError
from vmsandbox.failpoints import failpoint
from vmsandbox.journal import events
from vmsandbox.ledger.book import Kind, LedgerError
from vmsandbox.monitor import Monitor
from vmsandbox.paths import Layout
from vmsandbox.policy.merging.return_rules import exceeds
from vmsandbox.policy.values import ReturnPolicy
from vmsandbox.receive.store import Quarantine
from vmsandbox.review.classify import review as review_trees
from vmsandbox.review.manifest import Item, Manifest
from vmsandbox.review.returning import over_limits, under
from vmsandbox.review.rules import SECURITY_RULES_PATH, CommandRule, PatternRule, ReviewRules, RiskyPath
from vmsandbox.review.rules_load import load_risky_paths, load_security_rules
from vmsandbox.review.select import operations, selection_of
from vmsandbox.review.text import shown
from vmsandbox.review.values import Contents, Operation, Review, Selection
from vmsandbox.session.records.pushed import PushedContents, open_below
from vmsandbox.session.records.record import Record
from vmsandbox.spec import Accept

RISKY_PATHS = ".claude/risky-paths.yaml"
_MOST_RULES = 1 << 20  # bytes


@dataclass(frozen=True)
class Returned:
    """What came back of one session, reviewed.

    base: what the project has of it. old, new: where the bytes of both sides are. returns: what the session's policy
    lets come back, from its record.
    """

    record: Record
    project: Path
    base: Manifest
    quarantine: Quarantine
    rules: ReviewRules
    review: Review
    old: Contents
    returns: ReturnPolicy = field(default_factory=ReturnPolicy)

    @property
    def new(self) -> Contents:
        """The bytes that came back."""
        return self.quarantine


def review_returned(record: Record) -> Returned:
    """Review what lies in a session's quarantine.

    Raises:
        UserInputError: nothing came back, or a rules file of the project is wrong (it says where).
        HostError: the record is damaged.
    """
    project, base, quarantine = record.project, record.base_of_return(), record.quarantine()
    rules = rules_of(project)
    old = PushedContents(project, base)
    returns = record.returns()
    found = under(review_trees(base, quarantine.manifest, old, quarantine, rules), returns, base, quarantine.manifest)
    risks = {finding.risk.value for change in found.changes for finding in change.findings}
    record.journal.append(events.ChangesReviewed(found.digest, len(found.changes), sorted(risks)))
    return Returned(record, project, base, quarantine, rules, found, old, returns)


def review_with_commands(record: Record, layout: Layout, monitor: Monitor) -> Returned:
    """`review_returned`, with the project's `command` rules run in a fresh guest where something changed."""
    returned = review_returned(record)
    if not returned.rules.commands or not returned.review.changes:
        return returned
    from vmsandbox.session.rulecheck import run_command_rules

    both = BothContents(returned.quarantine, returned.old)
    request = record.request()
    extra = run_command_rules(returned.rules.commands, returned.quarantine.manifest, both, request, layout, monitor)
    return replace(returned, review=replace(returned.review, findings=(*extra, *returned.review.findings)))


def rules_of(project: Path) -> ReviewRules:
    """The rules of a project, as they are on the host now: what the guest made of them counts for nothing.

    Raises:
        UserInputError: a file of rules is wrong; it names the file, the key and what would be right.
    """
    patterns: tuple[PatternRule, ...] = ()
    commands: tuple[CommandRule, ...] = ()
    risky: tuple[RiskyPath, ...] = ()
    if (content := _read(project, SECURITY_RULES_PATH)) is not None:
        patterns, commands = load_security_rules(str(project / SECURITY_RULES_PATH), content)
    if (content := _read(project, RISKY_PATHS)) is not None:
        risky = load_risky_paths(str(project / RISKY_PATHS), content)
    return ReviewRules(patterns=patterns, commands=commands, risky_paths=risky)


def refuse_unattended(returned: Returned, how: Accept) -> None:
    """Raise RefusedError if the session's policy does not let so much be taken without a person."""
    look = f"look at it in a terminal: `vmsandbox accept {returned.record.id}`"
    cap = returned.returns.accept
    if exceeds(how, cap):
        raise RefusedError(
            f"the policy lets at most {cap!r} be taken without a person, not {how.value!r}",
            details=f"sandbox.return.accept: {cap}",
            resolution=look,
        )
    over = over_limits(returned.review, returned.returns)
    if over and how is not Accept.NONE:
        raise RefusedError(
            "more came back than the policy lets be taken without a person", details="\n".join(over), resolution=look
        )


def _refuse_more_than_allowed(returned: Returned, selection: Selection) -> None:
    """What nobody has looked at may be no more than the policy's own option would take."""
    cap = returned.returns.accept
    refuse_unattended(returned, Accept(cap) if cap is not None else Accept.ALL)
    if cap is None:
        return
    allowed = {choice.path for choice in selection_of(returned.review, Accept(cap)).choices}
    more = [choice.path for choice in selection.choices if choice.path not in allowed]
    if more:
        listed = "\n".join(shown(path, 200) for path in more[:10])
        raise RefusedError(
            f"the policy lets at most {cap!r} be taken without a person",
            details=f"sandbox.return.accept: {cap}\nchosen beyond it:\n{listed}",
            resolution=f"choose in a terminal: `vmsandbox accept {returned.record.id}`",
        )


def accept(returned: Returned, selection: Selection, by: str, attended: bool = False) -> Applied:
    """Apply what was accepted to the project, all of it or nothing.

    by: who chose: "person", or the option that did. attended: a person sits there; without one the policy's
    `sandbox.return` bounds what may be taken.

    Raises:
        RefusedError: the selection is for another review, or has what may not be taken.
        ConflictError: the project has changed meanwhile; nothing was written.
        HostError: it could not be written; nothing was.
    """
    record = returned.record
    todo = operations(returned.review, selection, returned.base, returned.old, returned.quarantine)
    if not todo:
        raise UserInputError("nothing was chosen")
    if not attended:
        _refuse_more_than_allowed(returned, selection)
    paths = [operation.path for operation in todo]
    with (record.folder / "accepted.jsonl").open("a") as file:
        file.write(_line(selection, by, todo))
    record.journal.append(events.ChangesAccepted(selection.digest, by, len(paths), paths[:100]))
    applying = (Kind.APPLY, str(returned.project))
    with suppress(LedgerError):  # the record and the journal beside the project say it, too
        record.ledger.plan(record.id, applying)
    done = apply(returned.project, todo, BothContents(returned.quarantine, returned.old), label=record.id)
    failpoint("accept.applied")
    record.set_base(returned.base, _with(returned.base, todo))
    failpoint("accept.recorded")
    record.journal.append(events.ChangesApplied(selection.digest, len(paths)))
    record.ledger.gone(record.id, applying)
    return done


class BothContents:
    """What came back, and where the bytes did not change but the place did, what was pushed."""

    def __init__(self, new: Contents, old: Contents) -> None:
        self._new, self._old = new, old

    def open(self, sha256: str) -> BinaryIO | None:
        return self._new.open(sha256) or self._old.open(sha256)


def _with(base: Manifest, done: tuple[Operation, ...]) -> Manifest:
    items: dict[str, Item] = dict(base.items)
    for operation in done:
        if operation.after is None:
            items.pop(operation.path, None)
        else:
            items[operation.path] = operation.after
    return Manifest(items)


def _line(selection: Selection, by: str, todo: tuple[Operation, ...]) -> str:
    chosen = [[operation.path, operation.after.sha256 if operation.after else None] for operation in todo]
    return json.dumps({"digest": selection.digest, "by": by, "operations": chosen}) + "\n"


def _read(project: Path, name: str) -> bytes | None:
    """A file of rules, or None if there is none. A link is not followed: it could lead to what the guest wrote."""
    try:
        fd = open_below(project, name)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserInputError(f"cannot read {project / name}", details=str(error)) from error
    with os.fdopen(fd, "rb") as file:
        content = file.read(_MOST_RULES + 1)
    if len(content) > _MOST_RULES:
        raise UserInputError(f"{project / name} is larger than {_MOST_RULES >> 20} MiB")
    return content
