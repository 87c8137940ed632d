"""What a running guest must have, and all that it may have: what its live XML is compared with (`livexml`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from vmsandbox.render.domain import DomainPlan
from vmsandbox.render.network import CardPlan
from vmsandbox.spec import NO_LIMITS, Accelerator, GuestLimits


class ChainFile(Protocol):
    """One file of a disk's chain."""

    @property
    def path(self) -> Path:
        """Where it is."""

    @property
    def format(self) -> str:
        """`raw` or `qcow2`: a format that is named is never probed."""


@dataclass(frozen=True)
class ExpectedDevices:
    """What a guest must have, and all that it may have.

    accelerator  what the domain's type must say
    uuid         the domain's UUID
    machine      full machine type ("pc-q35-7.2")
    emulator     QEMU's path
    kernel, initrd, cmdline   of the direct boot
    disk_chain   the one disk's files, the writable one first, then what backs it
    channels     virtio-serial ports: name in the guest → unix socket on the host that QEMU listens on
    serial       the serial port: (kind, path), path None for a pty; None for no serial port
    qemu_args    exactly the arguments in <qemu:commandline>
    rng          whether there is a virtio-rng (always from /dev/urandom)
    card         the one network card; None: there may be none
    limits       of the disk
    balloon      whether there is a memory balloon
    """

    accelerator: Accelerator
    uuid: str
    machine: str
    emulator: str
    kernel: Path
    initrd: Path
    cmdline: str
    disk_chain: Sequence[ChainFile]
    channels: Mapping[str, Path]
    serial: tuple[Literal["unix", "file", "pty"], Path | None] | None
    qemu_args: tuple[str, ...] = ()
    rng: bool = False
    card: CardPlan | None = None
    limits: GuestLimits = NO_LIMITS
    balloon: bool = False

    @classmethod
    def of(cls, plan: DomainPlan, card: CardPlan | None = None) -> ExpectedDevices:
        """What a guest that was made from this plan must have; `card` once it was plugged in."""
        return cls(
            accelerator=plan.shape.accelerator,
            uuid=plan.uuid,
            machine=plan.machine,
            emulator=plan.emulator,
            kernel=plan.kernel,
            initrd=plan.initrd,
            cmdline=plan.cmdline,
            disk_chain=plan.disk_chain,
            channels=plan.channels,
            serial=("unix", plan.console_socket),
            qemu_args=plan.qemu_args,
            card=card,
            limits=plan.limits,
            balloon=plan.shape.balloon,
        )
