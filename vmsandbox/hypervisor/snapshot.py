"""Snapshots of a running guest, memory and disk together: taken in a moment, and forked like a template.

The guest stands still only while the pages that it wrote, the device state and what its disk holds are copied. Each
snapshot is whole in itself, on the template that its session was forked from: any of them can be deleted, and none
needs another.
"""

from __future__ import annotations

import json
import math
import os
import socket
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmsandbox.errors import HostError, ImageError
from vmsandbox.failpoints import failpoint
from vmsandbox.hypervisor.connection import Host
from vmsandbox.hypervisor.files import fill_sparse, new_sparse, sparse_sha256_of, stamp_of
from vmsandbox.hypervisor.guestmemory import GuestMemory
from vmsandbox.hypervisor.launch import disk_errors
from vmsandbox.hypervisor.ramstream import take_apart, with_devices
from vmsandbox.hypervisor.template import DISK, RAM, STATE, Template, changed_file
from vmsandbox.process import Programs

MANIFEST = "manifest.json"
_DOWNTIME = 30  # milliseconds that QEMU may leave for the pause
_BANDWIDTH = 1 << 40  # bytes a second: no limit
_CONVERGE = 15.0  # seconds; a guest that writes faster than it is copied is then stopped for the rest
_DEADLINE = 120.0
_SOCKET_BUFFER = 8 << 20
_LOOK = 0.002


@dataclass(frozen=True)
class Snapshot(Template):
    """One snapshot: what its session's template is, with what the guest has made of it since. base is never None."""

    @property
    def published_key(self) -> str:
        """The template's, below."""
        assert self.base is not None
        return self.base.key

    @property
    def disks(self) -> tuple[Path, ...]:
        """Of the template below: a fork's own disk is a copy of this one's."""
        assert self.base is not None
        return self.base.disks

    @property
    def initrd(self) -> Path:
        """The template's."""
        assert self.base is not None
        return self.base.initrd

    def make_disk(self, path: Path, programs: Programs) -> None:
        """A copy, whose blocks are shared where the file system can."""
        new_sparse(path, self.disk.stat().st_size)
        fill_sparse(self.disk, path)


@dataclass(frozen=True)
class Taken:
    """What was taken: a folder that `publish_snapshot` makes a snapshot. pause: seconds that the guest stood still."""

    folder: Path
    pause: float


@dataclass(frozen=True)
class Running:
    """A running guest, as `take` needs it. state: of the template that it was forked from, for the firmware's pages."""

    uuid: str
    pid: int
    disk: Path
    memory_bytes: int
    state: Path
    emulated: bool


def take(host: Host, guest: Running, folder: Path) -> Taken:
    """Copy a running guest's memory, device state and disk into `folder`, which is new, empty and the guest's user's.

    Raises:
        HostError: libvirt or QEMU refused, or the disk is full; the guest runs on.
    """
    with disk_errors("taking the snapshot"):
        new_sparse(folder / RAM, guest.memory_bytes)
        ram = os.open(folder / RAM, os.O_RDWR | os.O_CLOEXEC)
        try:
            try:
                memory = GuestMemory(guest.pid, guest.memory_bytes)
            except PermissionError:
                return _take_by_stream(host, guest, folder, ram)
            with closing(memory):
                return _take_directly(host, guest, folder, ram, memory)
        finally:
            os.close(ram)


def _take_directly(host: Host, guest: Running, folder: Path, ram: int, memory: GuestMemory) -> Taken:
    """By what the guest's process has of its own."""
    memory.copy_file(ram)
    memory.copy_written(ram)  # most of it is the same a moment later, and costs less then
    failpoint("snapshot.memory")
    devices = guest.disk.parent / "devices"  # QEMU writes it
    host.suspend(guest.uuid)
    stopped = time.monotonic()
    try:
        memory.copy_written(ram)
        host.qmp(guest.uuid, "xen-save-devices-state", {"filename": str(devices), "live": False})
        _copy_disk(guest, folder)
        failpoint("snapshot.disk")
    finally:
        go_on(host, guest.uuid)
    pause = time.monotonic() - stopped
    try:
        (folder / STATE).write_bytes(with_devices(guest.state, guest.memory_bytes, devices.read_bytes()))
    finally:
        devices.unlink(missing_ok=True)
    return Taken(folder, pause)


def _take_by_stream(host: Host, guest: Running, folder: Path, ram: int) -> Taken:
    """By QEMU's live migration, where this process may not look into QEMU's.

    QEMU's emulation loses track of pages that are written while they are sent (seen with 7.2: a few of 36,000): an
    emulated guest is stopped before.
    """
    with _stream_of(host, guest.uuid) as stream, ThreadPoolExecutor(1, "snapshot") as pool:
        reading = pool.submit(take_apart, stream.recv_into, ram)
        try:
            stopped = time.monotonic()
            if guest.emulated:
                host.suspend(guest.uuid)
            stopped = min(_migrate(host, guest.uuid, reading), stopped if guest.emulated else math.inf)
            failpoint("snapshot.memory")
            _copy_disk(guest, folder)
            failpoint("snapshot.disk")
        finally:
            go_on(host, guest.uuid)
            pause = time.monotonic() - stopped
            stream.shutdown(socket.SHUT_RDWR)
        (folder / STATE).write_bytes(reading.result())
    return Taken(folder, pause)


def _copy_disk(guest: Running, folder: Path) -> None:
    """A guest that stands still has all its writes in the file (QEMU writes its caches out when it stops)."""
    new_sparse(folder / DISK, guest.disk.stat().st_size)
    fill_sparse(guest.disk, folder / DISK)


def publish_snapshot(taken: Taken, target: Path, base: Template, facts: Mapping[str, Any]) -> Snapshot:
    """Make a snapshot of what was taken, in one rename. facts: more for its manifest."""
    with disk_errors("keeping the snapshot"):
        digests = {name: sparse_sha256_of(taken.folder / name) for name in (DISK, RAM, STATE)}
        for name in digests:
            (taken.folder / name).chmod(0o444)
        manifest = {
            **facts,
            "base": base.key,
            "digests": digests,
            "stamps": {name: stamp_of(taken.folder / name) for name in digests},
            "bytes": sum((taken.folder / name).stat().st_blocks * 512 for name in digests),
            "pause": round(taken.pause, 4),
        }
        failpoint("snapshot.digests")
        (taken.folder / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))
        taken.folder.rename(target)
    failpoint("snapshot.published")
    return Snapshot(facts["key"], target, digests, 0.0, base)


def find_snapshot(folder: Path, base: Template, *, thoroughly: bool = False) -> Snapshot:
    """The snapshot in this folder, unchanged since it was taken.

    thoroughly: by the digests of its bytes, also where the files' stamps say that nobody wrote to them.

    Raises:
        ImageError: a file of it was changed, or its manifest cannot be read.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        changed = changed_file(folder, manifest, sparse_sha256_of, thoroughly)
        snapshot = Snapshot(manifest["key"], folder, manifest["digests"], 0.0, base)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ImageError(f"the manifest of snapshot {folder.name!r} cannot be read", details=str(error)) from error
    if changed is not None:
        raise ImageError(
            f"the snapshot {folder.name!r} was changed after it was taken",
            details=f"{changed} does not have the digest in its manifest",
            resolution="roll back to another one (`vmsandbox snapshots NAME`); this one can only be removed",
        )
    if manifest["base"] != base.key:
        raise ImageError(f"the snapshot {folder.name!r} belongs to another template")
    return snapshot


def _stream_of(host: Host, uuid: str) -> socket.socket:
    """Our end of a pair whose other QEMU has, by the name `snapshot`."""
    ours, qemus = socket.socketpair()
    with qemus:
        for sock, option in ((ours, socket.SO_RCVBUF), (qemus, socket.SO_SNDBUF)):
            sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER)
        try:
            host.qmp(
                uuid, "migrate-set-capabilities", {"capabilities": [{"capability": "x-ignore-shared", "state": True}]}
            )
            host.qmp(uuid, "migrate-set-parameters", {"max-bandwidth": _BANDWIDTH, "downtime-limit": _DOWNTIME})
            host.qmp(uuid, "getfd", {"fdname": "snapshot"}, fd=qemus.fileno())
        except BaseException:
            ours.close()
            raise
    return ours


def _migrate(host: Host, uuid: str, reading: Future[bytes]) -> float:
    """Until QEMU has written all of it and the guest stands still; when that was (time.monotonic()).

    Raises:
        HostError: it did not get to the end.
    """
    began = time.monotonic()
    pause = threading.Event()
    suspended: float | None = None
    host.qmp(uuid, "migrate", {"uri": "fd:snapshot"})
    while True:
        said = host.qmp(uuid, "query-migrate")
        now = time.monotonic()
        if said.get("status") == "completed":
            return suspended or now - said.get("downtime", 0) / 1000
        if said.get("status") in ("failed", "cancelled") or now - began > _DEADLINE:
            raise HostError("the guest's memory could not be read", details=json.dumps(said.get("error-desc", said)))
        if reading.done() and (failed := reading.exception()) is not None:
            raise failed
        if suspended is None and now - began > _CONVERGE:
            suspended = now
            host.suspend(uuid)
        pause.wait(_LOOK)


def go_on(host: Host, uuid: str) -> None:
    """Let a guest run again that stands still for a snapshot, whatever came of it. Raises HostError."""
    until = time.monotonic() + 10
    if host.qmp(uuid, "query-migrate").get("status") in ("active", "setup", "device", "pre-switchover"):
        host.qmp(uuid, "migrate_cancel")
    while not host.qmp(uuid, "query-status")["running"]:
        try:
            host.resume(uuid)
        except HostError:  # "Migration is not finalized yet", for some milliseconds
            if time.monotonic() > until:
                raise
            time.sleep(_LOOK)
