"""Plain values that the layers hand to each other. No behaviour, no input or output."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Accelerator(StrEnum):
    """What runs the guest's instructions."""

    KVM = "kvm"
    TCG = "tcg"  # pure emulation: not a security boundary by QEMU's own security policy


class Grade(StrEnum):
    """How well a session is isolated, worked out from the live guest (SECURITY.md: isolation grades)."""

    ISOLATED = "isolated"
    SEPARATED = "separated"
    EMULATED = "emulated"


class NetworkMode(StrEnum):
    """What a guest may reach: nothing, or the session's broker by a forwarded port or a filtered card."""

    NONE = "none"
    PROXY = "proxy"
    FILTERED = "filtered"


class Accept(StrEnum):
    """What comes back to the project without a person: nothing, what has no risk class, or all that is not blocked."""

    NONE = "none"
    SAFE = "safe"
    ALL = "all"


class History(StrEnum):
    """What of git's history the guest's own repository gets."""

    NONE = "none"
    SHALLOW = "shallow"
    FULL = "full"


@dataclass(frozen=True)
class GuestShape:
    """The virtual machine's size. A fork's must equal its template's (QEMU migration demands it).

    memory_mib: RAM in MiB. vcpus: virtual processors. ssh_ports: how many SSH connections at once.
    card: whether there is an empty slot into which a fork's network card is plugged (`--net filtered`).
    balloon: whether it gives memory back to the host (`GuestLimits.memory_reserved_mib`).
    """

    accelerator: Accelerator
    vcpus: int = 2
    memory_mib: int = 512
    ssh_ports: int = 6
    machine: str = "q35"
    card: bool = False
    balloon: bool = False


@dataclass(frozen=True)
class GuestLimits:
    """What one fork may use of the host. Its template knows nothing of it; None: no limit.

    disk_bytes: size of its overlay's file. write_rate: bytes a second to its disk.
    memory_reserved_mib: what it keeps while its host is short of memory (a balloon takes the rest meanwhile).
    """

    disk_bytes: int | None = None
    write_rate: int | None = None
    memory_reserved_mib: int | None = None


NO_LIMITS = GuestLimits()
WORKER = "claude-worker"
WORKER_UID = 1000  # cloudinit/user-data.yaml
WORKER_HOME = f"/home/{WORKER}"
PROJECTS = f"{WORKER_HOME}/projects"
