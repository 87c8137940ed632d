"""Copies a project into a guest, and compares what the guest has with what was copied.

The guest's side of both is a program there (`tar`, `vmsandbox-manifest`); what they say is untrusted. The copy on
the host of what was pushed, with digests of the bytes that were really sent, is what everything is judged by.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmsandbox.errors import GuestError, UserInputError
from vmsandbox.guest.pack import pack
from vmsandbox.guest.streams import wait_readable
from vmsandbox.guest.walk import walk_project
from vmsandbox.journal import events
from vmsandbox.policy.values import Policy
from vmsandbox.process import Programs
from vmsandbox.review.changes import Changes, compare
from vmsandbox.review.manifest import parse_untrusted_manifest
from vmsandbox.session.folder import SessionInfo
from vmsandbox.spec import PROJECTS

if TYPE_CHECKING:
    from vmsandbox.session.sandbox import Sandbox

MANIFEST_PROGRAM = "/usr/lib/vmsandbox/vmsandbox-manifest"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_PIECE = 1 << 20


def guest_folder_for(project: Path) -> str:
    """Where a project lies in the guest. An unusual name becomes `project`: fewer surprises in scripts there."""
    name = project.resolve().name
    return f"{PROJECTS}/{name if _PLAIN_NAME.fullmatch(name) else 'project'}"


def push_project(sandbox: Sandbox, project: Path, policy: Policy, programs: Programs) -> SessionInfo:
    """Copy a project into the guest; returns the session's record with where it lies.

    What was in that folder of the guest before is replaced.

    Raises:
        UserInputError: something in the project cannot be read, or it is over a limit.
        RefusedError: the policy denies the project itself.
        GuestError: the guest did not take it.
    """
    target = guest_folder_for(project)
    with sandbox.monitor.step(f"copying {project.name or project} in"):
        sandbox.monitor.progress(0, None, "looking through the project")
        walk = walk_project(project, policy, programs=programs)
        channel = sandbox.shell().start(
            ["sh", "-c", 'rm -rf -- "$1" && mkdir -m 0700 -- "$1" && exec tar -x -p --no-same-owner -f - -C "$1"',
             "sh", target]
        )  # fmt: skip
        try:
            manifest = pack(
                walk, channel.sendall, lambda done, total: sandbox.monitor.progress(done, total, "bytes")
            ).manifest
            channel.shutdown_write()
            _expect_success(channel)
        except OSError as error:
            raise GuestError("the guest stopped taking the project", details=_last_words(channel)) from error
        finally:
            channel.close()
    record = sandbox.folder.record_folder(sandbox.info.id)
    (record / "pushed.jsonl").write_bytes(b"".join(manifest.lines()))
    withheld = [row._asdict() for row in walk.withheld]
    (record / "withheld.json").write_text(json.dumps(withheld, indent=1))
    files = sum(1 for entry in walk.entries if entry.kind == "file")
    sandbox.journal.append(events.ProjectPushed(files, walk.total_bytes, len(withheld), manifest.digest))
    info = replace(sandbox.info, guest_folder=target, project=str(project))
    sandbox.folder.update(info)
    if withheld:
        secret = [row.path for row in walk.withheld if row.reason.name in ("SECRET", "POLICY", "LINK")]
        ignored = len(withheld) - len(secret)
        sandbox.monitor.notice(_withheld_text(secret, ignored, sandbox.name))
    return info


def list_changes(sandbox: Sandbox) -> Changes:
    """Compare the guest's tree with what was pushed.

    Raises:
        UserInputError: nothing was pushed. GuestError: the guest's manifest is not acceptable.
    """
    record = sandbox.folder.record_folder(sandbox.info.id)
    if sandbox.info.guest_folder is None:
        raise UserInputError(
            f"nothing was copied into session {sandbox.name!r}",
            resolution=f"`vmsandbox push {sandbox.name} PATH` copies a project in",
        )
    pushed = parse_untrusted_manifest([(record / "pushed.jsonl").read_bytes()])
    with sandbox.monitor.step("comparing the guest's files with what was copied in"):
        channel = sandbox.shell().start([MANIFEST_PROGRAM, sandbox.info.guest_folder])
        try:
            channel.shutdown_write()
            returned = parse_untrusted_manifest(_output_of(channel))
            _expect_success(channel)
        finally:
            channel.close()
    changes = compare(pushed, returned)
    (record / "changes.json").write_text(json.dumps(changes.as_json(), indent=1))
    counts = changes.counts
    sandbox.journal.append(
        events.ChangesListed(
            added=counts["added"],
            modified=counts["modified"] + counts["kind_changed"],
            deleted=counts["deleted"],
            renamed=counts["renamed"],
            mode=counts["mode_changed"],
        )
    )
    return changes


def _output_of(channel: Any) -> Iterator[bytes]:
    while True:
        if channel.recv_ready():
            yield channel.recv(_PIECE)
        elif channel.eof_received or channel.closed:
            if not channel.recv_ready():
                return
        else:
            wait_readable(channel, 0.2)


def _expect_success(channel: Any) -> None:
    channel.settimeout(600)
    status = channel.recv_exit_status()
    if status != 0:
        raise GuestError(f"the guest's side failed with status {status}", details=_last_words(channel))


def _last_words(channel: Any) -> str:
    from vmsandbox.review.text import shown_bytes

    untrusted = channel.recv_stderr(4000) if channel.recv_stderr_ready() else b""
    return shown_bytes(untrusted, 2000)


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
