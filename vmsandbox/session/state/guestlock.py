"""Who works on a session's guest as a whole: takes a snapshot of it, puts another in its place, or fills it.

    live/<name>/guest.lock

What the guest holds and what the host knows of it change together under this lock, so that a snapshot has both as they
were at one moment.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from vmsandbox.errors import UserInputError
from vmsandbox.session.state.folder import SessionFolder

_LOCK = "guest.lock"
_LOOK = 0.05  # seconds between two tries


@contextmanager
def guest_locked(folder: SessionFolder, *, shared: bool = False, patience: float = 0.0) -> Iterator[None]:
    """Only one process takes or removes a snapshot of a guest, or puts another in its place.

    Args:
        shared: any number (those that use a snapshot, or copy something in), and none of the others, meanwhile.
        patience: seconds to wait for those that hold it.

    Raises:
        UserInputError: another one holds it.
    """
    until = time.monotonic() + patience
    kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
    with os.fdopen(os.open(folder.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b") as lock:
        while True:
            try:
                fcntl.flock(lock, kind)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise UserInputError(
                        f"session {folder.name!r} is being rolled back or filled, or a snapshot of it taken or used",
                        resolution="try again",
                    ) from None
                time.sleep(_LOOK)
        yield
