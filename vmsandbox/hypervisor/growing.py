"""A fork that becomes a template itself: its memory is a file of its own that its writes go to.

An ordinary fork maps its template's memory privately, and what it writes there is gone with it. Here a policy's own
command has a guest with an identity and a network, and what is left of it is frozen (`session.opening.creating`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from vmsandbox.guest.control import ControlPort
from vmsandbox.hypervisor.connection import Host
from vmsandbox.hypervisor.files import fill_sparse, new_sparse
from vmsandbox.hypervisor.fork import ForkRequest, load_state, plan_fork
from vmsandbox.hypervisor.launch import choose_user, create_overlay, disk_errors, give, own_folder
from vmsandbox.hypervisor.memory import ForkMemory
from vmsandbox.hypervisor.template import INITRD, RAM
from vmsandbox.process import Programs
from vmsandbox.render.domain import DomainPlan, render_domain


def start_grown(
    host: Host,
    request: ForkRequest,
    programs: Programs,
    inspect: Callable[[DomainPlan, str], None],
    *,
    making: Path,
) -> tuple[DomainPlan, ControlPort]:
    """Like `fork.start_fork`, with all files of the guest in `making`, which is to become the template's folder.

    Raises:
        HostError: libvirt or QEMU refused, or the disk is full. The caller destroys the domain and its files.
    """
    template = request.template
    user = choose_user(host, request.shape)
    memory = ForkMemory(making / RAM, False, lambda: None)
    plan = replace(
        plan_fork(replace(request, folder=making), memory, user),
        ram_share=True,
        initrd=making / INITRD,
        home=request.folder.parent.parent,
    )
    with disk_errors("making the template's files"):
        own_folder(making, user)
        own_folder(request.run_folder, user)
        disk = plan.disk_chain[0].path
        create_overlay(programs, disk, template.disk, "qcow2")
        shutil.copyfile(template.initrd, plan.initrd)
        new_sparse(making / RAM, template.ram.stat().st_size)
        fill_sparse(template.ram, making / RAM)
        for path in (plan.initrd, disk, making / RAM):
            give(path, user)
    host.create(render_domain(plan), paused=True)
    control = ControlPort(plan.control_socket)
    try:
        # Connected before the state is loaded, as when the template was frozen: the guest sees no change.
        control.connect(5)
        inspect(plan, host.live_xml(plan.uuid))
        load_state(host, plan.uuid, template.state)
        host.resume(plan.uuid)
    except BaseException:
        control.close()
        raise
    return plan, control
