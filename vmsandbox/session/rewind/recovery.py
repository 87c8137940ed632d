"""Finishes what a process that died had begun with a running session's guest: a rollback, a snapshot.

Until then such a session may have two guests, or one that stands still.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from vmsandbox.errors import UserInputError, VmsandboxError
from vmsandbox.paths import Layout
from vmsandbox.session.rewind.replug import MARK
from vmsandbox.session.rewind.rollback import recover
from vmsandbox.session.rewind.snapshots import recover_snapshots
from vmsandbox.session.state.folder import SessionFolder, live_sessions
from vmsandbox.session.state.guestlock import guest_locked


def recovered_guests(layout: Layout) -> Iterator[tuple[str, str, str]]:
    """Look at every session; (its name, what was done, what could not be). One that somebody works on is left alone."""
    for folder in live_sessions(layout):
        try:
            if not _is_halfway(folder):
                continue
            with guest_locked(folder):
                if done := recover(folder):
                    yield folder.name, done, ""
                for one in recover_snapshots(folder, folder.info()):
                    yield folder.name, one, ""
        except UserInputError:
            continue  # somebody is at it
        except (VmsandboxError, OSError) as error:
            yield folder.name, "its rollback or snapshot was interrupted", str(error)


def finish_rollback(folder: SessionFolder) -> None:
    """Finish or undo a rollback that was broken off; one that is under way is left alone. Raises HostError."""
    with suppress(UserInputError), guest_locked(folder):
        recover(folder)


def _is_halfway(folder: SessionFolder) -> bool:
    signs = ("next.json", "snapshots/.taking-*", "snapshots/.gone-*", MARK)
    return any(next(folder.path.glob(sign), None) for sign in signs)
