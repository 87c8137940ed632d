"""What a review goes by, as values: extra risky paths, security rules, thresholds and limits.

Without them as one value the review would read files, and would not be a function of what was pushed and what
came back alone. `rules_load.py` makes them from people's files.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from vmsandbox.review.linear import LinePattern
from vmsandbox.review.secret_shapes import redacted
from vmsandbox.review.text import shown
from vmsandbox.review.values import Finding, Risk

SECURITY_RULES_PATH = ".claude/security-rules.yaml"
Severity = Literal["error", "warning"]
# sh(1): 126 "found but not executable", 127 "not found".
_NOT_RUN = {126: "could not be run", 127: "was not found"}
_SHOWN = 200


@dataclass(frozen=True)
class PatternRule:
    """A rule on added lines. error blocks, warning flags."""

    id: str
    pattern: LinePattern
    severity: Severity
    message: str


class CommandRule(NamedTuple):
    """A command line that is run inside a guest, never on the host. Status 0 means that all is well."""

    id: str
    command: str
    severity: Severity
    message: str


class RiskyPath(NamedTuple):
    """A pattern of `risky_paths.yaml` and why a file there matters."""

    pattern: str
    reason: str


@dataclass(frozen=True)
class MassDeletion:
    """When deleted or emptied files are too many to be taken without a word.

    Either more than `share` of the files that were pushed and at least `files_of_share`, or more than `files`.
    """

    share: float = 0.2
    files_of_share: int = 10
    files: int = 50


@dataclass(frozen=True)
class ReviewLimits:
    """How much is looked at.

    file_bytes      a larger file is not shown by lines, and only rules and secrets are searched for in it
    scan_bytes      a larger file is not searched at all
    hunk_bytes      lines that a whole review keeps for showing; what is over it is taken whole or not
    lines           lines that one rule or check names in one file
    """

    file_bytes: int = 4 << 20
    scan_bytes: int = 256 << 20
    hunk_bytes: int = 32 << 20
    lines: int = 10


@dataclass(frozen=True)
class ReviewRules:
    """All that a review goes by besides the two trees. The default has the built-in lists alone."""

    patterns: tuple[PatternRule, ...] = ()
    commands: tuple[CommandRule, ...] = ()
    risky_paths: tuple[RiskyPath, ...] = ()
    deletion: MassDeletion = field(default_factory=MassDeletion)
    limits: ReviewLimits = field(default_factory=ReviewLimits)

    @property
    def can_block(self) -> bool:
        """Whether a pattern rule may forbid a change."""
        return any(rule.severity == "error" for rule in self.patterns)


def command_findings(rule: CommandRule, status: int, untrusted_output: bytes) -> tuple[Finding, ...]:
    """What a command rule's run says about the whole review; nothing for status 0.

    A guest that an agent has worked in can make any command end in 0: run it in a fresh guest that was only given
    the returned tree.

    Args:
        status: the command's exit status; 126 and 127 mean that it did not run (as a shell says it).
        untrusted_output: the end of what it wrote. Its last line is shown, with anything that has the shape
            of a secret cut.
    """
    if status == 0:
        return ()
    text = f"rule {shown(rule.id, 80)}: {shown(rule.message, _SHOWN)}: the command {shown(rule.command, _SHOWN)} "
    if status in _NOT_RUN:
        text += f"{_NOT_RUN[status]} in the guest (status {status}), so nothing is known"
    else:
        text += f"ended with status {status}"
    last = redacted(untrusted_output[-65536:]).rstrip().rpartition("\n")[2].strip()
    if last:
        text += f": {shown(last, _SHOWN)}"
    return (Finding(Risk.RULE, text, blocks=rule.severity == "error"),)
