"""A guest that the host's disk has no room for is paused by QEMU; here that is noticed, told, and taken back.

QEMU stops a guest at the first write that finds no room (werror=enospc, its default, and ours where no limit of the
policy is met first): nothing of it is lost or damaged. Without somebody who looks, its command would just hang.

libvirt is asked only while there is next to no room, so that a look costs one statvfs(2).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress

from vmsandbox.errors import VmsandboxError
from vmsandbox.hypervisor.connection import Host
from vmsandbox.journal import events
from vmsandbox.session.clock import set_clock
from vmsandbox.session.folder import SessionFolder
from vmsandbox.session.info import SessionInfo

NO_ROOM = 64 << 20  # bytes; QEMU's files grow by clusters
ENOUGH_ROOM = 192 << 20
_EVERY = 1.0  # seconds


class DiskWatch:
    """Watches while a command runs: `with DiskWatch(folder, info, say): …`. say: tells a person."""

    def __init__(self, folder: SessionFolder, info: SessionInfo, say: Callable[[str], None]) -> None:
        self._folder = folder
        self._info = info
        self._say = say
        self._end = threading.Event()
        self._paused = False
        self._thread = threading.Thread(target=self._run, name="disk", daemon=True)

    def __enter__(self) -> DiskWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(5)

    def _run(self) -> None:
        while not self._end.wait(_EVERY):
            with suppress(VmsandboxError, OSError):
                self.look()

    def look(self) -> None:
        """Tell of a pause once; let the guest go on when there is room."""
        free = free_bytes(self._folder)
        if not self._paused and free < NO_ROOM and _is_paused(self._info):
            self._paused = True
            self._folder.journal(self._info.id).append(events.GuestPaused("the host's disk is full", free))
            self._say(
                f"the host's disk is full: the guest {self._info.name} is paused, and goes on when there is room "
                f"({ENOUGH_ROOM >> 20} MiB at {self._folder.path}); `vmsandbox gc` may make some"
            )
        elif self._paused and free >= ENOUGH_ROOM:
            self._paused = False
            if go_on(self._folder, self._info):
                self._say(f"there is room again: the guest {self._info.name} goes on")


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
