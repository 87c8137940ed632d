"""Starts and ends the process that watches over one session: its time, its idleness, its health check.

A process of its own, also for `vmsandbox session`: a command that hangs on a full pipe, or was stopped, could not end
its guest in time.
"""

from __future__ import annotations

import json
from contextlib import suppress

from vmsandbox.policy.values import SessionPolicy
from vmsandbox.process import Programs
from vmsandbox.session.state.activity import activity_file
from vmsandbox.session.state.background import end_background, start_background
from vmsandbox.session.state.folder import SessionFolder
from vmsandbox.session.state.info import SessionInfo

KIND = "watcher"
# What the guest made of the project is fetched before it is ended by a limit; this long at most.
COLLECT_SECONDS = 120.0


def start_watcher(
    folder: SessionFolder,
    info: SessionInfo,
    policy: SessionPolicy,
    programs: Programs,
    reserved_mib: int | None = None,
) -> None:
    """Watch over a session that is ready, from now on. Raises HostError if the process cannot be started."""
    if policy.idle is not None:
        activity_file(folder).touch(0o600)
    check = policy.healthcheck
    told = {
        "id": info.id,
        "time": policy.time,
        "idle": policy.idle,
        "reserved": reserved_mib,
        "health": [list(check.test), check.interval, check.timeout, check.retries] if check else None,
    }
    _pid, to, said = start_background(folder, KIND, "watcher", told, programs)
    to.close()
    said.close()


def is_watched(folder: SessionFolder) -> bool:
    """Whether the session has, or had, a watcher."""
    return (folder.path / f"{KIND}.json").exists()


def end_watcher(folder: SessionFolder, *, finish: bool = False) -> None:
    """End a session's watcher. finish: one that is ending the session has all the time that it needs for that.

    Raises:
        HostError: it does not end.
    """
    end_background(folder, KIND, *([COLLECT_SECONDS + 30] if finish else []))


def health_of(folder: SessionFolder) -> str | None:
    """`starting`, `healthy` or `unhealthy`; None for a session without a health check."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads((folder.path / "health.json").read_text())["state"])
    return None
