"""The end of a session: torn down, proven, written down. One place, for a command's end, `stop` and the watcher."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from vmsandbox.errors import VmsandboxError
from vmsandbox.failpoints import failpoint
from vmsandbox.journal import events
from vmsandbox.paths import Layout
from vmsandbox.session.live.teardown import tear_down
from vmsandbox.session.resources.baseline import Baseline, baseline_of, differences, kept_baseline
from vmsandbox.session.state.folder import SessionFolder
from vmsandbox.session.state.info import SessionInfo


@dataclass(frozen=True)
class Ended:
    """left: what could not be removed. differs: what is not as it was before the session. In words, both."""

    left: tuple[str, ...] = ()
    differs: tuple[str, ...] = ()


def end_session(layout: Layout, folder: SessionFolder, info: SessionInfo, reason: str) -> Ended:
    """End a session's guest, remove its folders, and prove that all is as it was. Never raises for what is wrong."""
    before = kept_baseline(folder)
    left = tear_down(layout, folder, info)
    journal = folder.journal(info.id)
    differs: list[str] = []
    if before is not None:
        # libvirt is not asked: it may be seconds until it has noticed. The process is gone, or it is told here.
        after = baseline_of(layout, None, info)
        differs = differences(Baseline(before.shared), after)
        failpoint("destroy.proven")
        with suppress(VmsandboxError):
            journal.append(
                events.BaselineDiffers(differs) if differs else events.BaselineProven(after.digest, len(after.shared))
            )
    with suppress(VmsandboxError):
        journal.append(events.SessionClosed(reason, left))
    return Ended(tuple(left), tuple(differs))
