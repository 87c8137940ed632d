"""The values that the way back is made of: what changed, why it is a risk, what a person took, what will be written.

    returned tree → Review (findings, hunks) → Selection (what was accepted) → Operations (exact bytes) → apply

Each step knows only these values. Paths are the guest's choice: show them through `vmsandbox.review.text.shown` only.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import BinaryIO, Literal, NamedTuple, Protocol

from vmsandbox.review.manifest import Item

Sort = Literal["added", "modified", "deleted", "renamed", "mode_changed", "kind_changed"]


class Contents(Protocol):
    """Where the bytes of files are, by their digest: a quarantine, or the project as it was pushed."""

    def open(self, sha256: str) -> BinaryIO | None:
        """The bytes with this SHA-256 (hexadecimal), or None if they are not there. Who reads checks the digest."""


class Risk(StrEnum):
    """Why a change wants a person's eyes. The order is the order of attention, worst first."""

    RULE = "rule"  # a rule of .claude/security-rules.yaml
    SECRET = "secret"  # noqa: S105 - known shapes of keys and tokens
    AUTO_EXECUTED = "auto-executed"  # something runs it without being asked: CI, hooks, editors, package managers
    TERMINAL = "terminal-escape"
    UNICODE = "suspicious-unicode"
    SYMLINK = "symlink"
    NAME = "name"  # two names that are one on another file system, odd bytes in a name
    EXECUTABLE = "executable"  # a new file that can be run, or a mode that changed to it
    DEPENDENCIES = "dependencies"  # lockfiles and manifests of packages
    BINARY = "binary"
    MODE = "mode"
    DELETION = "deletion"
    UNREADABLE = "unreadable"  # the guest could not or would not send it, or nobody can look at it (too large)


class Finding(NamedTuple):
    """One reason for attention.

    text: for people, already safe to show. line: number in the new file (from 1), if it is about a line.
    blocks: it cannot be accepted as it is (an `error` rule); otherwise it only flags.
    """

    risk: Risk
    text: str
    line: int | None = None
    blocks: bool = False


class Hunk(NamedTuple):
    """A run of lines that changed, with context. Lines keep their line endings; they are bytes, as the file is.

    old_start, new_start: number of the first line (from 1; as `diff -u` counts, so 0 where there is none).
    lines: (" ", "-" or "+", the line).
    """

    old_start: int
    old_count: int
    new_start: int
    new_count: int
    lines: tuple[tuple[str, bytes], ...]


@dataclass(frozen=True)
class FileChange:
    """What became of one path.

    old_path: where it was, of a rename. before, after: None where there is none.
    hunks: None if it is not text, too large, or the old bytes are not there any more; then it is taken whole or not.
    """

    path: str
    sort: Sort
    before: Item | None
    after: Item | None
    old_path: str | None = None
    findings: tuple[Finding, ...] = ()
    hunks: tuple[Hunk, ...] | None = None

    @property
    def blocked(self) -> bool:
        """Whether a finding forbids to accept it."""
        return any(one.blocks for one in self.findings)


@dataclass(frozen=True)
class Review:
    """All changes, the riskiest first.

    digest: of the returned manifest (its canonical form): what an approval names.
    findings: about the whole, not one file (most of the tree deleted, for example).
    """

    digest: str
    changes: tuple[FileChange, ...] = ()
    findings: tuple[Finding, ...] = ()


class Choice(NamedTuple):
    """One accepted change. hunks: indexes into FileChange.hunks; None: the whole change."""

    path: str
    hunks: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Selection:
    """What a person, or a rule that a person wrote, accepted of the review with this digest."""

    digest: str
    choices: tuple[Choice, ...] = ()


class Operation(NamedTuple):
    """One path and exactly what it shall become.

    before: what the host must have there now (None: nothing). Anything else is a conflict, but `after` itself.
    after: None deletes it; a file's bytes are those with `after.sha256`.
    """

    path: str
    before: Item | None
    after: Item | None
