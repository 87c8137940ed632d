"""Room for a session, before anything of it is made: what it may come to use is reserved in the ledger, or it waits.

Without it sessions that start at the same moment would each find the same memory free.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from vmsandbox.errors import HostError
from vmsandbox.failpoints import failpoint
from vmsandbox.hypervisor.connection import Host
from vmsandbox.ledger.admission import STARTING, Need, NoRoomError, Room, admitted, release
from vmsandbox.ledger.book import Ledger
from vmsandbox.monitor import Monitor
from vmsandbox.paths import Layout
from vmsandbox.session.asked.request import SessionRequest
from vmsandbox.session.resources.quotas import check_quota
from vmsandbox.session.state.folder import SessionFolder
from vmsandbox.session.state.info import SessionInfo
from vmsandbox.spec import NetworkMode

_MIB = 1 << 20
# QEMU's own beside the guest's memory: its translation cache under emulation, its heap; measured 90 to 120 MiB.
_QEMU = 128 * _MIB
_BROKER = 96 * _MIB
# A guest whose policy sets no limit could fill a disk of 4 GiB and seldom writes a tenth of that: it is counted with
# this. One that finds no more room later is paused, and goes on when there is some (`render.domain`).
DISK_SHARE = 512 * _MIB


@contextmanager
def room_for(asked: SessionRequest, layout: Layout, host: Host, monitor: Monitor) -> Iterator[str]:
    """Reserve what a session may come to use; yields whose the reservation is until the session's claim takes it over.

    It covers the making of its template, too, which is of the same size and before it.

    Raises:
        HostError: there is no room, and it was not asked to wait. UserInputError: there never will be.
        LedgerError: the ledger cannot be used.
    """
    owner = f"{STARTING}{secrets.token_hex(6)}"

    def queued(position: int) -> None:
        monitor.notice(
            "waiting for room on this host" if position == 1 else f"waiting for room: {position - 1} wait before it"
        )

    check_quota(layout)
    ledger = Ledger.of(layout)
    with admitted(
        ledger, owner, need_of(asked, host), lambda: Room.of(layout.live), patience=asked.wait, queued=queued
    ):
        failpoint("session.reserved")
        yield owner


@contextmanager
def room_beside(folder: SessionFolder, info: SessionInfo) -> Iterator[None]:
    """Reserve the memory of a second guest of a session's, which is to take the first one's place; then it goes back.

    Raises:
        HostError: there is no room. LedgerError: the ledger cannot be used.
    """
    ledger = Ledger.of(folder.layout)
    owner = f"{STARTING}{secrets.token_hex(6)}"
    need = Need(f"{info.name}, rolled back", info.memory_mib * _MIB + _QEMU, 0)
    try:
        with admitted(ledger, owner, need, lambda: Room.of(folder.layout.live)):
            yield
            release(ledger, owner)
    except NoRoomError as error:
        raise HostError(
            "this host has no room now for the guest that would take the place of the one that runs",
            details=error.details,
            resolution=f"`vmsandbox stop` another guest; or stop {info.name} and start it anew",
        ) from error


def need_of(asked: SessionRequest, host: Host) -> Need:
    """What a session may come to use at most. Raises what `SessionRequest.sizes` does.

    All of the guest's memory: forks share what they only read, but a guest can write to every page that it has.
    """
    sizes = asked.sizes
    memory = sizes.memory_mib * _MIB + _QEMU
    if asked.mode is not NetworkMode.NONE:
        memory += _BROKER
    disk = sizes.limits.disk_bytes or DISK_SHARE
    # In its own files instead of shared memory (`hypervisor.memory`).
    if sizes.limits.memory_reserved_mib is not None or (host.confined_by_mac and host.qemu_version < (8, 2, 0)):
        disk += sizes.memory_mib * _MIB
    return Need(asked.name or "a session without a name", memory, disk)
