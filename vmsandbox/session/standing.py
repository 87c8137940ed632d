"""A guest that stays, and begins each time where it began: `session --rollback`, for whoever runs the same thing often.

Its project is copied in anew each time; what the time before left behind in the guest is not there any more.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from vmsandbox.errors import RefusedError, UserInputError
from vmsandbox.hypervisor.connection import Host
from vmsandbox.journal import events
from vmsandbox.monitor import Monitor
from vmsandbox.paths import Layout
from vmsandbox.process import Programs
from vmsandbox.session.asked.request import SessionRequest
from vmsandbox.session.opening.made import made_of, unlike
from vmsandbox.session.opening.plan import prepare
from vmsandbox.session.rewind.rollback import roll_back
from vmsandbox.session.rewind.snapshots import START
from vmsandbox.session.sandbox import Sandbox
from vmsandbox.session.state.folder import SessionFolder

# After one of these a guest is as it was at its start.
_FRESH = (events.RolledBack.kind, events.SnapshotTaken.kind)
_USED = (events.CommandStarted.kind, events.ProjectPushed.kind)


@contextmanager
def alone_in(folder: SessionFolder, patience: float = 0) -> Iterator[None]:
    """One at a time uses a guest that stays: the next one's rollback would end this one's command.

    patience: seconds; who started the guest waits for those who only see that it is not theirs yet.

    Raises:
        UserInputError: another one does.
    """
    with os.fdopen(os.open(folder.path / "standing.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)) as lock:
        until = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise UserInputError(
                        f"another `session --rollback` uses {folder.name!r} at this moment",
                        resolution="try again when it has ended, or give another --name",
                    ) from None
            time.sleep(0.1)
        yield


def standing_guest(
    asked: SessionRequest, layout: Layout, programs: Programs, monitor: Monitor, alone: ExitStack
) -> Sandbox | None:
    """The running session of this name at its start, with the project as it is now; None if there is none.

    alone: holds others off until it is closed (`alone_in`).

    Raises:
        UserInputError: it is in use or not ready, or no start of it was kept.
        RefusedError: it was started with another policy, image, size or network.
    """
    assert asked.name is not None
    folder = SessionFolder(layout, asked.name)
    if not folder.path.exists():
        return None
    alone.enter_context(alone_in(folder))
    info = folder.info()
    if not info.ready or info.owner_is_alive:
        raise UserInputError(f"session {info.name!r} is still starting", resolution="try again when it is ready")
    if not folder.guest_is_alive(info):
        raise UserInputError(
            f"the guest of session {info.name!r} is gone", resolution=f"`vmsandbox stop {info.name}`, then again"
        )
    with closing(Host.open()) as host:
        prepared = prepare(asked, layout, host, programs, monitor)
    found = unlike(made_of(folder, programs).prepared, prepared)
    if info.network != asked.mode.value:
        found.append(f"network: {info.network} then, {asked.mode.value} now")
    if found:
        raise RefusedError(
            f"session {info.name!r} was started with something else than is asked for",
            details="\n".join(found),
            resolution=f"`vmsandbox stop {info.name}`; it is started anew then",
        )
    sandbox = Sandbox(layout, folder, info, monitor)
    if _is_used(sandbox):
        roll_back(sandbox, None, programs)
    if asked.project is not None:
        sandbox.push(Path(asked.project), asked.policy, programs, asked.history)
    return sandbox


def _is_used(sandbox: Sandbox) -> bool:
    """Whether anything was done in it since it was at its start. An interrupted end leaves it so."""
    used = True
    for entry in sandbox.journal.read():
        if entry["kind"] in _USED:
            used = True
        elif entry["kind"] in _FRESH and entry["data"]["tag"] == START:
            used = False
    return used
