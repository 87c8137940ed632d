"""Forks: a running guest made from a template's memory and disk in a few tenths of a second.

No session can write a byte that another reads: the disk is an overlay of its own, and `memory` says how the same
holds for the memory.
"""

from __future__ import annotations

import os
import socket
import uuid as uuids
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vmsandbox.errors import HostError, RefusedError
from vmsandbox.failpoints import failpoint
from vmsandbox.guest.control import ControlPort
from vmsandbox.hypervisor.connection import Host
from vmsandbox.hypervisor.launch import Machine, choose_user, disk_errors, give, own_folder
from vmsandbox.hypervisor.memory import ForkMemory, fork_memory
from vmsandbox.hypervisor.template import ImageFiles, Template
from vmsandbox.process import Programs
from vmsandbox.render.domain import DISK_TARGET, DiskImage, DomainPlan, render_domain
from vmsandbox.spec import NO_LIMITS, GuestLimits, GuestShape

DOMAIN_PREFIX = "vmsandbox-"


@dataclass(frozen=True)
class ForkRequest:
    """What a fork is made of, and where its files go.

    folder is `<live>/<name>/vm` and does not exist yet; nor does run_folder.
    """

    name: str
    uuid: str
    session_id: str
    image: ImageFiles
    template: Template
    shape: GuestShape
    machine: Machine
    folder: Path
    run_folder: Path
    limits: GuestLimits = NO_LIMITS


def plan_fork(request: ForkRequest, memory: ForkMemory, user: tuple[int, int] | None) -> DomainPlan:
    """The domain of a fork: the template's machine with another name, files and identity."""
    return DomainPlan(
        name=DOMAIN_PREFIX + request.name,
        uuid=request.uuid,
        genid=str(uuids.uuid4()),
        shape=request.shape,
        machine=request.machine.type,
        emulator=request.machine.emulator,
        kernel=request.image.kernel,
        initrd=request.template.initrd,
        disk_chain=(
            DiskImage(request.folder / "disk.qcow2", "qcow2"),
            *(DiskImage(disk, "qcow2") for disk in request.template.disks),
            DiskImage(request.image.root, "raw"),
        ),
        run_folder=request.run_folder,
        ram=memory.path,
        ram_share=False,
        ram_readonly=memory.readonly,
        incoming=True,
        session_id=request.session_id,
        home=request.folder.parent.parent,
        run_as=user,
        limits=request.limits,
    )


def start_fork(
    host: Host, request: ForkRequest, programs: Programs, inspect: Callable[[DomainPlan, str], None]
) -> tuple[DomainPlan, ControlPort]:
    """Start a fork and let it run; returns its plan and its control port, connected.

    Args:
        inspect: called with the plan and the live XML while the guest is still paused; what it raises stops it.

    Raises:
        HostError: libvirt or QEMU refused, or the disk is full. The caller destroys the domain and its files.
        RefusedError: a limit is not in force.
    """
    template, live = request.template, request.folder.parent.parent
    user = choose_user(host, request.shape)
    with disk_errors("making the session's files"):
        own_folder(request.folder, user, parents=False)  # a session that was ended meanwhile stays so
        own_folder(request.run_folder, user)
    failpoint("fork.folders")
    with fork_memory(
        host, request.machine, template, request.folder, live, user, programs, own=request.shape.balloon
    ) as memory:
        plan = plan_fork(request, memory, user)
        disk = plan.disk_chain[0].path
        template.make_disk(disk, programs)
        if request.limits.disk_bytes is not None:
            os.truncate(disk, request.limits.disk_bytes)  # sparse: the part that QEMU may use has to be there
        give(disk, user)
        failpoint("fork.disk")
        host.create(render_domain(plan), paused=True)
        failpoint("fork.guest")
        control = ControlPort(plan.control_socket)
        try:
            # Connected before the state is loaded, as when the template was frozen: the guest sees no change.
            control.connect(5)
            inspect(plan, host.live_xml(plan.uuid))
            failpoint("fork.inspected")
            _write_rate_in_force(host, plan)
            memory.wait()
            load_state(host, plan.uuid, template.state)
            failpoint("fork.loaded")
            host.resume(plan.uuid)
            failpoint("fork.resumed")
        except BaseException:
            control.close()
            raise
    return plan, control


def _write_rate_in_force(host: Host, plan: DomainPlan) -> None:
    """The XML repeats what was asked for; QEMU says what it does. Raises RefusedError."""
    wanted = plan.limits.write_rate
    if wanted is not None and (found := host.write_rate(plan.uuid, DISK_TARGET)) != wanted:
        raise RefusedError(
            f"the guest's disk is not limited to {wanted} bytes a second", details=f"QEMU's limit is {found}"
        )


def load_state(host: Host, uuid: str, state: Path) -> None:
    """Feed the template's device state to a QEMU that waits for it."""
    host.qmp(
        uuid,
        "migrate-set-capabilities",
        {"capabilities": [{"capability": "x-ignore-shared", "state": True}]},
    )
    ours, qemus = socket.socketpair()
    with ours:
        with qemus:
            host.qmp(uuid, "getfd", {"fdname": "state"}, fd=qemus.fileno())
        host.qmp(uuid, "migrate-incoming", {"uri": "fd:state"})
        try:
            ours.settimeout(30)
            ours.sendall(state.read_bytes())
            ours.shutdown(socket.SHUT_WR)
        except OSError as error:
            raise HostError("QEMU did not take the template's state", details=str(error)) from error
        host.migration_finished(uuid, deadline=30)
