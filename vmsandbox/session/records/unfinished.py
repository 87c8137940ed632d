"""What a killed process left halfway: a project between two states, parts of a return or a backup in a record.

A project is never removed from: it is brought to the whole old or the whole new state, by the journal beside it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from vmsandbox.apply.recovery import Recovered, pending, recover
from vmsandbox.errors import VmsandboxError
from vmsandbox.monitor import Monitor
from vmsandbox.paths import Layout
from vmsandbox.removal import GONE
from vmsandbox.review.text import shown
from vmsandbox.session.records.record import Record
from vmsandbox.session.state.folder import live_sessions

_PARTS = (".backup", "history-*", "commits-*", "quarantine.*")
_REMOVED = f"{GONE}*"  # whoever is at it does not mind help


class Part(NamedTuple):
    """Something halfway that was removed or brought to an end; `problem` says why not."""

    what: str
    why: str
    problem: str = ""


def make_whole(project: Path, monitor: Monitor) -> None:
    """Bring a project to its old or new state if an apply was killed in the middle; says so.

    Raises:
        VmsandboxError: it cannot be done now; nothing was lost.
    """
    for one in recover(project):
        monitor.warning(_told(project, one))


def parts_in_records(layout: Layout) -> Iterator[Part]:
    """Remove what killed processes left in records. Of sessions that are alive only what was being removed."""
    records = sorted(layout.records.glob("*"))  # first: a session that begins now has its folder before its record
    alive = set()
    for folder in live_sessions(layout):
        with suppress(VmsandboxError):
            alive.add(folder.info().id)
    for record in records:
        if record.name.startswith(GONE):
            shutil.rmtree(record, ignore_errors=True)
            yield Part(record.name, "its removal was interrupted")
            continue
        for pattern in (_REMOVED,) if record.name in alive else (*_PARTS, _REMOVED):
            for part in sorted(record.glob(pattern)):
                shutil.rmtree(part, ignore_errors=True)
                yield Part(f"{record.name}/{part.name}", "what made it was interrupted")


def unfinished_projects(layout: Layout, more: Iterable[Path] = ()) -> Iterator[Part]:
    """Bring projects of sessions to their whole state. A folder that is gone or never had any is no matter.

    more: projects that no record names any more.
    """
    seen = set(more)
    for folder in sorted(layout.records.glob("*"), reverse=True):
        with suppress(VmsandboxError):
            seen.add(Record(folder).project)
    for project in sorted(seen):
        try:
            if not project.is_dir() or not pending(project):
                continue
            for one in recover(project):
                yield Part(str(project), _told(project, one))
        except VmsandboxError as error:
            yield Part(str(project), "changes were not applied to the end", error.brief)


def _told(project: Path, one: Recovered) -> str:
    place = shown(str(project))
    if one.outcome == "finished":
        return f"changes that a killed process was applying to {place} are now all there"
    if one.outcome == "undone":
        kept = f"; newer work was kept: {', '.join(map(shown, one.newer))}" if one.newer else ""
        return f"changes that a killed process was applying to {place} were undone{kept}"
    return f"what a killed process had prepared beside {place} was removed"
