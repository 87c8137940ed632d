"""The events of the way back: what the guest returned, its review, and what was taken of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vmsandbox.journal.event import Event


@dataclass(frozen=True)
class ReturnReceived(Event):
    """The guest's tree lies in quarantine. `manifest`: its digest. `files`, `bytes`: of what is not as it was pushed.

    refused: what did not come back. confined: what held the receiver ("user", "landlock", "seccomp").
    """

    kind: ClassVar[str] = "return.received"
    manifest: str
    files: int
    bytes: int
    transferred: int
    refused: list[str]
    confined: list[str]
    seconds: float


@dataclass(frozen=True)
class ReturnRefused(Event):
    """What the guest sent back was not acceptable, or could not be kept; nothing of it is left."""

    kind: ClassVar[str] = "return.refused"
    brief: str
    details: str


@dataclass(frozen=True)
class ReturnRulesKept(Event):
    """What the policy lets come back, from now on (`sandbox.return`). `digest`: of the rules in the record."""

    kind: ClassVar[str] = "return.rules"
    accept: str | None
    denied_paths: int
    digest: str


@dataclass(frozen=True)
class ChangesReviewed(Event):
    """What came back was classified. `digest` is of the returned tree's manifest: what an approval names."""

    kind: ClassVar[str] = "changes.reviewed"
    digest: str
    changes: int
    risks: list[str]


@dataclass(frozen=True)
class ChangesAccepted(Event):
    """A person, or an option that a person gave, accepted part of the review with this digest (first 100 paths)."""

    kind: ClassVar[str] = "changes.accepted"
    digest: str
    by: str
    operations: int
    paths: list[str]


@dataclass(frozen=True)
class ChangesApplied(Event):
    """All that was accepted lies in the project now."""

    kind: ClassVar[str] = "changes.applied"
    digest: str
    operations: int


@dataclass(frozen=True)
class CommitsReturned(Event):
    """The guest's commits are in the project's repository, below refs/vmsandbox; what was not taken, and why."""

    kind: ClassVar[str] = "commits.returned"
    refs: list[str]
    skipped: list[str]
