"""Stops a guest's processors, and lets them go on: nothing in it runs, nothing of it is lost.

It is what a person (or the broker's alarm) does to look before anything more happens.
"""

from __future__ import annotations

import json
from contextlib import closing, suppress
from typing import TYPE_CHECKING

from vmsandbox.errors import GuestError, HostError, RefusedError, UserInputError
from vmsandbox.journal import events
from vmsandbox.session.state.folder import SessionFolder
from vmsandbox.session.state.info import SessionInfo, write_text
from vmsandbox.session.upkeep.clock import set_clock

if TYPE_CHECKING:
    from vmsandbox.hypervisor.connection import Host

BY_NETWORK = "network"  # the watch of a filtered card, which ends with its alarm


def freeze_guest(folder: SessionFolder, info: SessionInfo, *, by: str, reason: str) -> None:
    """Stop a guest's processors. Raises HostError if libvirt cannot; a guest that is frozen stays so."""
    from vmsandbox.hypervisor.connection import Host

    is_new = not is_frozen(folder)
    mark, text = folder.path / "frozen", json.dumps({"by": by, "reason": reason, "uuid": info.uuid})
    # Written before: whoever lets the guest go on after a snapshot looks for it afterwards (`stay_frozen`).
    with suppress(OSError):  # a full disk keeps no guest from being stopped
        write_text(mark, text)
    try:
        with closing(Host.open()) as host:
            host.suspend(info.uuid)
    except HostError:
        if is_new:
            mark.unlink(missing_ok=True)
        raise
    if not is_frozen(folder):
        write_text(mark, text)
    folder.journal(info.id).append(events.GuestFrozen(by, reason))


def thaw_guest(folder: SessionFolder, info: SessionInfo) -> None:
    """Let a frozen guest go on.

    Raises:
        UserInputError: it is not frozen. HostError: libvirt cannot.
        RefusedError: it was frozen because its network card is not guarded.
    """
    from vmsandbox.hypervisor.connection import Host

    if not is_frozen(folder):
        raise UserInputError(f"session {info.name!r} is not frozen")
    if _frozen_by(folder) == BY_NETWORK:
        raise RefusedError(
            f"session {info.name!r} stays frozen: its network card is not guarded any more, and nobody watches it",
            resolution=f"`vmsandbox stop {info.name}` ends it",
        )
    host = Host.open()
    try:
        host.resume(info.uuid)
    finally:
        host.close()
    (folder.path / "frozen").unlink(missing_ok=True)
    with suppress(GuestError, OSError):  # its clock stood still as well
        set_clock(folder, info)
    folder.journal(info.id).append(events.GuestThawed())


def is_frozen(folder: SessionFolder) -> bool:
    """Whether a guest was frozen and not thawed since."""
    return (folder.path / "frozen").exists()


def stay_frozen(folder: SessionFolder, info: SessionInfo, host: Host) -> None:
    """Stop a guest again that was let go on after it had been frozen. Raises HostError."""
    if is_frozen(folder):
        host.suspend(info.uuid)


def forget_frozen(folder: SessionFolder, gone: SessionInfo) -> None:
    """The guest that was frozen is gone; one that came in its place, and was frozen since, stays so."""
    if _mark(folder, "uuid") in ("", gone.uuid):
        (folder.path / "frozen").unlink(missing_ok=True)


def _frozen_by(folder: SessionFolder) -> str:
    return _mark(folder, "by")


def _mark(folder: SessionFolder, key: str) -> str:
    with suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads((folder.path / "frozen").read_text())[key])
    return ""
