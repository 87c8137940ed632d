"""What is done about what was found in what goes into a guest: told, written down, or refused, as the policy says.

A policy that refuses has the project looked at before anything of it is sent: taking it out of a guest afterwards would
trust that guest. What is sent then has to be, byte for byte, what was looked at. Without such a policy the files are
looked at while they are sent, which costs no second reading.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from vmsandbox.errors import RefusedError, UserInputError
from vmsandbox.guest.pack import pack
from vmsandbox.guest.walk import Walk
from vmsandbox.journal import events
from vmsandbox.policy.values import PushPolicy
from vmsandbox.review.incoming import KINDS, MOST, Found, IncomingScan, Scanned
from vmsandbox.review.manifest import Manifest
from vmsandbox.review.text import shown
from vmsandbox.session.live.running import RunningSandbox

FINDINGS = "findings.json"
_TOLD = 8  # findings in a notice
_IN_JOURNAL = 30  # the journal cuts longer lists
_WORDS = {
    "secrets": "may be secrets",
    "instructions": "hidden in what an agent reads",
    "agent_configuration": "agents' settings that run or allow something",
}


class Incoming:
    """The look at one push. `on_content` is for `pack`; None where all was looked at before."""

    def __init__(self, sandbox: RunningSandbox, walk: Walk, policy: PushPolicy) -> None:
        self._sandbox, self._walk = sandbox, walk
        self._refused = {kind for kind in KINDS if getattr(policy, kind) == "refuse"}
        self._scan = IncomingScan({one.path: one.target or "" for one in walk.entries if one.kind == "symlink"})
        self._looked_at: Manifest | None = None
        self.on_content: Callable[[str, bytes], object] | None = self._scan

    def before(self) -> None:
        """Call it before anything is sent.

        Raises:
            RefusedError: the project has something that the policy refuses to send; it is written down.
        """
        if not self._refused:
            return
        self._looked_at = pack(self._walk, lambda _archive: None, on_content=self._scan).manifest
        self.on_content = None
        scanned = self._scan.finish()
        refused = [one for one in scanned.findings if one.kind in self._refused]
        kinds = [kind for kind in KINDS if kind in self._refused and scanned.counts[kind]]
        if kinds:
            _write_down(self._sandbox, scanned, refused=True)
            total = sum(scanned.counts[kind] for kind in kinds)
            raise RefusedError(
                "the project has what the policy refuses to send: " + _summary(scanned, kinds),
                details="\n".join(_rows(refused, total)),
                resolution=f"take it out, keep it on the host with filesystem.denied_paths, or change "
                f"{', '.join(f'push.{kind}' for kind in kinds)} in the policy "
                f"(`vmsandbox logs {self._sandbox.info.id} --findings` lists all)",
            )

    def check_sent(self, sent: Manifest) -> None:
        """Call it when all was sent.

        Raises:
            UserInputError: it is not what was looked at: something wrote to the project meanwhile.
        """
        looked_at = self._looked_at
        if looked_at is None or looked_at.digest == sent.digest:
            return
        other = [path for path, item in sent.items.items() if looked_at.items.get(path) != item]
        raise UserInputError(
            "changed between being looked at and being sent: " + ", ".join(shown(path, 200) for path in other[:5]),
            resolution="stop what writes to the project, and try again",
        )

    def tell(self) -> None:
        """Call it when the push is done: write down what was found, and say so."""
        scanned = self._scan.finish()
        _write_down(self._sandbox, scanned, refused=False)
        kinds = [kind for kind in KINDS if scanned.counts[kind]]
        if kinds:
            rows = "\n".join(f"  {row}" for row in _rows(_one_of_each_first(scanned), sum(scanned.counts.values())))
            self._sandbox.monitor.warning(
                f"copied in: {_summary(scanned, kinds)} (`vmsandbox logs {self._sandbox.name} --findings` lists all)\n"
                + rows
            )
        if scanned.partly:
            self._sandbox.monitor.notice(
                f"{scanned.partly} files are larger than {MOST >> 20} MiB: only their beginning was looked at"
            )


def _summary(scanned: Scanned, kinds: list[str]) -> str:
    return "; ".join(f"{scanned.counts[kind]} {_WORDS[kind]}" for kind in kinds)


def _one_of_each_first(scanned: Scanned) -> list[Found]:
    """So that a hundred of one kind do not hide the one of another in a short list."""
    firsts = [next((one for one in scanned.findings if one.kind == kind), None) for kind in reversed(KINDS)]
    first = [one for one in firsts if one is not None]
    return first + [one for one in scanned.findings if not any(one is other for other in first)]


def _rows(findings: list[Found], total: int) -> list[str]:
    """A few findings, safe to show."""
    rows = [f"{shown(one.path, 120)}{f':{one.line}' if one.line else ''}: {one.what}" for one in findings[:_TOLD]]
    return rows + ([f"and {total - len(rows)} more"] if total > len(rows) else [])


def _write_down(sandbox: RunningSandbox, scanned: Scanned, refused: bool) -> None:
    rows: list[dict[str, object]] = [one._asdict() for one in scanned.findings]
    record = sandbox.folder.record_folder(sandbox.info.id)
    (record / FINDINGS).write_text(json.dumps(rows, indent=1))
    sandbox.journal.append(
        events.PushScanned(scanned.files, scanned.partly, scanned.counts, rows[:_IN_JOURNAL], refused)
    )


def findings_of(record: Path) -> list[dict[str, object]]:
    """What was found in the last push of this record's session."""
    path = record / FINDINGS
    return list(json.loads(path.read_text())) if path.exists() else []
