"""What starting a template and starting a fork have in common: the plan of a domain, and files QEMU may use."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from vmsandbox.errors import HostError
from vmsandbox.hypervisor.connection import Host
from vmsandbox.process import Programs
from vmsandbox.spec import Accelerator, GuestShape

# One host user per session, where libvirt lets us choose: QEMU processes of two sessions cannot touch each
# other's files or memory even if one is taken over. 0x70000000-0x7fffffff is assigned to nothing
# (systemd's UIDS-GIDS document), and needs no passwd entry.
_UID_BASE = 0x70000000
_UID_RANGE = 0x0FFFFFFE


@dataclass(frozen=True)
class Machine:
    """What this host runs guests with: emulator path, machine type, QEMU version."""

    emulator: str
    type: str
    qemu_version: tuple[int, int, int]

    @classmethod
    def of(cls, host: Host, shape: GuestShape) -> Machine:
        """Ask libvirt. Raises HostError if there is no such machine here."""
        emulator, machine = host.emulator_and_machine(
            "kvm" if shape.accelerator is Accelerator.KVM else "qemu", shape.machine
        )
        return cls(emulator, machine, host.qemu_version)

    @property
    def opens_memory_readonly(self) -> bool:
        """QEMU 8.2 added readonly=on,rom=off: a private mapping of a file it cannot write."""
        return self.qemu_version >= (8, 2, 0)


def choose_user(host: Host, shape: GuestShape) -> tuple[int, int] | None:
    """A fresh (uid, gid) for one QEMU process; None leaves the choice to libvirt.

    The group stays libvirt's own, because only it may pass through /var/lib/libvirt/qemu. A process with a user
    of its own has no supplementary groups, so where /dev/kvm is only for the group kvm (Debian's default), KVM
    guests keep libvirt's user; `qemu:///session` cannot choose at all.
    """
    libvirts = host.qemu_user
    if libvirts is None or os.geteuid() != 0:
        return None
    if shape.accelerator is Accelerator.KVM and not _may_open("/dev/kvm", libvirts[1]):
        return libvirts
    return _UID_BASE + secrets.randbelow(_UID_RANGE), libvirts[1]


def _may_open(device: str, gid: int) -> bool:
    with suppress(OSError):
        info = Path(device).stat()
        return bool(info.st_mode & stat.S_IWOTH or (info.st_gid == gid and info.st_mode & stat.S_IWGRP))
    return False


def own_folder(path: Path, user: tuple[int, int] | None, *, parents: bool = True) -> None:
    """Make a folder that only the QEMU user (and root) may enter. parents: those above it too, where they are not."""
    try:
        path.mkdir(mode=0o700, parents=parents)
    except FileExistsError:
        raise HostError(f"a folder is in the way: {path}", resolution="`vmsandbox gc` removes leftovers") from None
    give(path, user)


def give(path: Path, user: tuple[int, int] | None) -> None:
    """Give a file or folder to the QEMU user."""
    if user is not None:
        os.chown(path, *user, follow_symlinks=False)


def create_overlay(programs: Programs, overlay: Path, backing: Path, backing_format: str) -> None:
    """A qcow2 file that holds what differs from `backing` (whose format is named, never probed)."""
    programs.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=off,lazy_refcounts=on",
         "-b", backing, "-F", backing_format, overlay],
        timeout=30,
    )  # fmt: skip
    overlay.chmod(0o600)


@contextmanager
def disk_errors(doing: str) -> Iterator[None]:
    """Turn a full or read-only disk into an error that says so."""
    try:
        yield
    except OSError as error:
        raise HostError(
            f"{doing} failed: {os.strerror(error.errno) if error.errno else error}",
            details=str(error),
            resolution="`vmsandbox gc` gives space back; `vmsandbox doctor` shows what there is",
        ) from error
