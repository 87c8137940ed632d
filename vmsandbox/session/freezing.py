"""Stops a guest's processors, and lets them go on: nothing in it runs, nothing of it is lost.

It is what a person (or the broker's alarm) does to look before anything more happens.
"""

from __future__ import annotations

import json
from contextlib import suppress

from vmsandbox.errors import GuestError, RefusedError, UserInputError
from vmsandbox.journal import events
from vmsandbox.session.clock import set_clock
from vmsandbox.session.folder import SessionFolder
from vmsandbox.session.info import SessionInfo

BY_NETWORK = "network"  # the watch of a filtered card, which ends with its alarm


def freeze_guest(folder: SessionFolder, info: SessionInfo, *, by: str, reason: str) -> None:
    """Stop a guest's processors. Raises HostError if libvirt cannot; a guest that is frozen stays so."""
    from vmsandbox.hypervisor.connection import Host

    host = Host.open()
    try:
        host.suspend(info.uuid)
    finally:
        host.close()
    (folder.path / "frozen").write_text(json.dumps({"by": by, "reason": reason}))
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


def _frozen_by(folder: SessionFolder) -> str:
    with suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads((folder.path / "frozen").read_text())["by"])
    return ""
