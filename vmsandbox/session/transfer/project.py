"""Copies a project into a guest.

The guest's side of both is a program there (`tar`, `vmsandbox-return`); what they say is untrusted. The copy on
the host of what was pushed, with digests of the bytes that were really sent, is what everything is judged by.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from vmsandbox.errors import UserInputError
from vmsandbox.failpoints import failpoint
from vmsandbox.guest.pack import RECORD, pack
from vmsandbox.guest.walk import Walk, walk_project
from vmsandbox.journal import events
from vmsandbox.policy.values import Policy
from vmsandbox.process import Programs
from vmsandbox.review.manifest import Manifest
from vmsandbox.session.live.running import RunningSandbox
from vmsandbox.session.records.record import Record
from vmsandbox.session.state.info import SessionInfo
from vmsandbox.session.transfer.archive import PORT, UNTAR, send_archive
from vmsandbox.session.transfer.collect import SENDER, baseline_file
from vmsandbox.session.transfer.history import HistoryMode, snapshot_on_the_way
from vmsandbox.session.transfer.incoming import Incoming
from vmsandbox.spec import PROJECTS

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
# What the guest lists right after unpacking tells later what was not touched (receive.listing). The sender starts while
# tar is at work, and lists while `.git` comes. A project as small as this comes back whole in less time than that.
_SMALL_FILES, _SMALL_BYTES = 200, 1 << 20


def guest_folder_for(project: Path) -> str:
    """Where a project lies in the guest. An unusual name becomes `project`: fewer surprises in scripts there."""
    name = project.resolve().name
    return f"{PROJECTS}/{name if _PLAIN_NAME.fullmatch(name) else 'project'}"


def push_project(
    sandbox: RunningSandbox,
    project: Path,
    policy: Policy,
    programs: Programs,
    history: HistoryMode = "none",
    only: Callable[[Walk], Walk] | None = None,
) -> SessionInfo:
    """Copy a project into the guest; returns the session's record with where it lies.

    What was in that folder of the guest before is replaced. history: of the guest's own repository; one without any
    comes with the project where it can (else see `history.give_history`). only: what of it is copied in.

    Raises:
        UserInputError: something in the project cannot be read, or it is over a limit.
        RefusedError: the policy denies the project itself, or refuses what was found in it.
        GuestError: the guest did not take it.
    """
    target = guest_folder_for(project)
    with sandbox.monitor.step(f"copying {project.name or project} in"):
        sandbox.monitor.progress(0, None, "looking through the project")
        walk = walk_project(project, policy, programs=programs)
        walk = only(walk) if only else walk
        small = len(walk.entries) <= _SMALL_FILES and walk.total_bytes <= _SMALL_BYTES
        incoming = Incoming(sandbox, walk, policy.push)
        incoming.before()
        failpoint("push.walked")
        baseline = baseline_file(sandbox)
        baseline.unlink(missing_ok=True)

        def on_progress(done: int, whole: int) -> None:
            sandbox.monitor.progress(done, whole, "bytes")

        def send(write: Callable[[bytes], None]) -> Manifest:
            sent = pack(walk, write, on_progress, snapshot, incoming.on_content, RECORD).manifest
            if snapshot is not None:
                snapshot.send(write)
            return sent

        record = sandbox.folder.record_folder(sandbox.info.id)
        with snapshot_on_the_way(project, walk.total_bytes, programs, record, history) as snapshot:
            untrusted_listing, manifest = send_archive(
                sandbox,
                ["sh", "-c", _unpacking(lists=not small, git=snapshot is not None), "sh", target, SENDER],
                send,
            )
            try:
                incoming.check_sent(manifest)
            except UserInputError:
                _remove(sandbox, target)
                raise
            failpoint("push.sent")
            if snapshot is not None:
                snapshot.given(record)
    (record / "pushed.jsonl").write_bytes(b"".join(manifest.lines()))
    if not small:
        baseline.write_bytes(untrusted_listing)  # last: never beside the manifest of an earlier push
    waiting = Record(record).drop_return()
    withheld = [row._asdict() for row in walk.withheld]
    (record / "withheld.json").write_text(json.dumps(withheld, indent=1))
    files = sum(1 for entry in walk.entries if entry.kind == "file")
    sandbox.journal.append(events.ProjectPushed(files, walk.total_bytes, len(withheld), manifest.digest, str(project)))
    info = replace(sandbox.info, guest_folder=target, project=str(project))
    sandbox.folder.update(info)
    failpoint("push.recorded")
    incoming.tell()
    if waiting:
        changes = f"{waiting} change" + "s" * (waiting != 1)
        sandbox.monitor.notice(f"{changes} of what came back before had not been accepted, and went with this push")
    if withheld:
        secret = [row.path for row in walk.withheld if row.reason.name in ("SECRET", "POLICY", "LINK")]
        ignored = len(withheld) - len(secret)
        sandbox.monitor.notice(_withheld_text(secret, ignored, sandbox.name))
    return info


def _unpacking(*, lists: bool, git: bool) -> str:
    """The guest's script: unpacks a project into "$1", and `.git` after it; "$2" lists what was unpacked."""
    unpack = f'{UNTAR} -C "$1"'
    project = f'rm -rf -- "$1" && mkdir -m 0700 -- "$1" && {unpack}'
    if not lists:
        return f"{{ {project}{f' && {unpack}' if git else ''}; }} <{PORT}"
    # The pipe's end tells the sender to begin. A shell knows the status of a pipe's last command only: hence the kill.
    behind = f" && exec >/dev/null && {{ {unpack} || kill $$; }}" if git else ""
    return f'{{ {project} && echo unpacked{behind}; }} <{PORT} | "$2" --baseline "$1"'


def _remove(sandbox: RunningSandbox, target: str) -> None:
    from vmsandbox.guest.ssh import exit_status

    channel = sandbox.shell().start(["rm", "-rf", "--", target], plumbing=True)
    try:
        exit_status(channel, 60)
    finally:
        channel.close()


def _withheld_text(secret: list[str], ignored: int, name: str) -> str:
    from vmsandbox.review.text import shown

    parts = []
    if secret:
        listed = ", ".join(shown(path) for path in secret[:5])
        more = f" and {len(secret) - 5} more" if len(secret) > 5 else ""
        parts.append(f"stayed on the host: {listed}{more}")
    if ignored:
        parts.append(f"{ignored} ignored by git or not sendable")
    return "; ".join(parts) + f" (`vmsandbox logs {name} --withheld` lists all)"
