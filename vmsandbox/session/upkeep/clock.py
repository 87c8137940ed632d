"""Sets a guest's clock again when the host's has jumped: it slept, somebody set it, or the guest stood still.

A guest's clock goes on from what it was told once. What is compared is how far the host's clock of the day is from the
one that only counts while the host is awake: nothing else changes that.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, closing, suppress

from vmsandbox.errors import VmsandboxError
from vmsandbox.guest.control import ControlPort
from vmsandbox.journal import events
from vmsandbox.session.state.folder import SessionFolder
from vmsandbox.session.state.info import SessionInfo
from vmsandbox.session.upkeep.identity import go_on_as
from vmsandbox.session.upkeep.looking import looking

_FILE = "clock"
_TOLERANCE = 1.0  # seconds; what NTP corrects in small steps goes on unseen until it is that much
_DEADLINE = 5.0  # for the guest's answer
_EVERY = 2.0  # seconds between two looks while a command runs


def clock_watch(folder: SessionFolder, info: SessionInfo) -> AbstractContextManager[None]:
    """Mends the clock while a command runs, which may be for hours: `with clock_watch(folder, info): …`."""
    patience = _EVERY

    def look() -> float:
        nonlocal patience
        # a guest that does not answer is asked less often
        patience = _EVERY if mend_clock(folder, info) == 0 else min(patience * 2, 60)
        return patience

    return looking("clock", look, first=_EVERY)


def note_clock(folder: SessionFolder) -> None:
    """The guest was told the time just now. Raises OSError."""
    (folder.path / _FILE).write_text(repr(_host_offset()))


def mend_clock(folder: SessionFolder, info: SessionInfo) -> float:
    """Tell the guest the time if the host's clock has jumped since it was told; by how many seconds, 0 if it has not.

    A guest that does not answer keeps its clock.
    """
    try:
        jump = _host_offset() - float((folder.path / _FILE).read_text())
    except (OSError, ValueError):
        return 0  # not told yet
    if abs(jump) < _TOLERANCE or (folder.path / "frozen").exists():
        return 0
    with suppress(VmsandboxError, OSError):
        set_clock(folder, info)
        folder.journal(info.id).append(events.ClockSet(round(jump, 3)))
    return jump


def set_clock(folder: SessionFolder, info: SessionInfo) -> None:
    """Tell the guest the time now. Raises GuestError, OSError."""
    with closing(ControlPort(folder.sockets(info) / "control")) as control:
        go_on_as(control, _DEADLINE)
    note_clock(folder)


def _host_offset() -> float:
    return time.time() - time.monotonic()
