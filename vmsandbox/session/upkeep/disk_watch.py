"""A guest that the host's disk has no room for is paused by QEMU; here that is noticed, told, and taken back.

QEMU stops a guest at the first write that finds no room (werror=enospc, its default, and ours where no limit of the
policy is met first): nothing of it is lost or damaged. Without somebody who looks, its command would just hang.

libvirt is asked only while there is next to no room, so that a look costs one statvfs(2).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress

from vmsandbox.errors import VmsandboxError
from vmsandbox.hypervisor.connection import Host
from vmsandbox.journal import events
from vmsandbox.session.state.folder import SessionFolder
from vmsandbox.session.state.info import SessionInfo
from vmsandbox.session.upkeep.clock import set_clock
from vmsandbox.session.upkeep.looking import looking

NO_ROOM = 64 << 20  # bytes; QEMU's files grow by clusters
ENOUGH_ROOM = 192 << 20
_EVERY = 1.0  # seconds


def disk_watch(folder: SessionFolder, info: SessionInfo, say: Callable[[str], None]) -> AbstractContextManager[None]:
    """Watches while a command runs: `with disk_watch(folder, info, say): …`. say: tells a person.

    A pause is told of once; the guest goes on when there is room.
    """
    paused = False

    def look() -> float:
        nonlocal paused
        free = free_bytes(folder)
        if not paused and free < NO_ROOM and _is_paused(info):
            paused = True
            folder.journal(info.id).append(events.GuestPaused("the host's disk is full", free))
            say(
                f"the host's disk is full: the guest {info.name} is paused, and goes on when there is room "
                f"({ENOUGH_ROOM >> 20} MiB at {folder.path}); `vmsandbox gc` may make some"
            )
        elif paused and free >= ENOUGH_ROOM:
            paused = False
            if go_on(folder, info):
                say(f"there is room again: the guest {info.name} goes on")
        return _EVERY

    return looking("disk", look, first=_EVERY)


def go_on(folder: SessionFolder, info: SessionInfo) -> bool:
    """Let a guest go on that is paused because of the disk; whether it was. Raises HostError."""
    if not _is_paused(info):
        return False
    host = Host.open()
    try:
        host.resume(info.uuid)
    finally:
        host.close()
    with suppress(VmsandboxError, OSError):
        folder.journal(info.id).append(events.GuestResumed(free_bytes(folder)))
        set_clock(folder, info)  # it stood still as well
    return True


def free_bytes(folder: SessionFolder) -> int:
    """Bytes that there are for a guest's disk. Raises OSError."""
    disk = os.statvfs(folder.path)
    return disk.f_bavail * disk.f_frsize


def _is_paused(info: SessionInfo) -> bool:
    host = Host.open()
    try:
        return host.is_paused_by_disk(info.uuid)
    finally:
        host.close()
