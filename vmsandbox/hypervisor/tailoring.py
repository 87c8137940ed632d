"""Tailors a template to a policy: a fork that is told the policy once, and frozen again.

What a policy asks of the guest (units, mounts, limits, filters) is the same in every session under it. A cold boot for
each new policy would cost a minute, and setting it up in every fork would cost each session its first second.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vmsandbox.errors import GuestError, RefusedError
from vmsandbox.failpoints import failpoint
from vmsandbox.guest.control import ControlPort, PortClosedError
from vmsandbox.hypervisor.connection import Host
from vmsandbox.hypervisor.files import fill_sparse, new_sparse, sha256_of
from vmsandbox.hypervisor.fork import load_state
from vmsandbox.hypervisor.freezing import freeze, publish
from vmsandbox.hypervisor.launch import create_overlay, give
from vmsandbox.hypervisor.making import find_or_make, in_the_making
from vmsandbox.hypervisor.template import RAM, STATE, Template, TemplatePlan, TemplateStore
from vmsandbox.monitor import Monitor
from vmsandbox.process import Programs
from vmsandbox.render.domain import DiskImage, DomainPlan, render_domain

POLICY_DEADLINE = 120.0  # seconds for what the policy sets up
SETTLE_DEADLINE = 120.0


@dataclass(frozen=True)
class TailorPlan:
    """A template, what it was made from, and the policy that a fork of it is told (`render.confinement`)."""

    base: Template
    plan: TemplatePlan
    message: Mapping[str, Any]

    @cached_property
    def key(self) -> str:
        """SHA-256 over every input, in hexadecimal (the first 32 characters)."""
        inputs = {"base": self.base.key, "message": self.message, "code": sha256_of(Path(__file__))}
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]


def tailor_template(
    host: Host, tailor: TailorPlan, store: TemplateStore, programs: Programs, monitor: Monitor
) -> Template:
    """The template for this policy: found, or made now in some seconds.

    Raises:
        GuestError: the guest did not come up, or could not do what the policy asks.
        RefusedError: nobody can log in under it.
        ImageError: the template was tampered with.
        HostError: libvirt, QEMU or the disk failed.
    """
    return find_or_make(tailor.key, store, monitor, lambda: _make(host, tailor, store, programs, monitor))


def _make(host: Host, tailor: TailorPlan, store: TemplateStore, programs: Programs, monitor: Monitor) -> Template:
    started = time.monotonic()
    plan = tailor.plan
    with in_the_making(host, plan.shape, store) as (uuid, making, run, user):
        domain = DomainPlan(
            name=f"vmsandbox-template-{uuid[:8]}",
            uuid=uuid,
            genid=uuid,
            shape=plan.shape,
            machine=plan.machine.type,
            emulator=plan.machine.emulator,
            kernel=plan.image.kernel,
            initrd=making / tailor.base.initrd.name,
            disk_chain=(
                DiskImage(making / tailor.base.disk.name, "qcow2"),
                *(DiskImage(disk, "qcow2") for disk in tailor.base.disks),
                DiskImage(plan.image.root, "raw"),
            ),
            run_folder=run,
            ram=making / RAM,
            ram_share=True,
            ram_readonly=False,
            incoming=True,
            session_id=f"template:{making.name}",
            home=making.parent,
            run_as=user,
        )
        with monitor.step(f"making template {tailor.key[:12]} (first use of this policy)"):
            _prepare_files(tailor, domain, programs, user)
            failpoint("tailor.files")
            host.create(render_domain(domain), paused=True)
            failpoint("tailor.guest")
            _tell(host, domain, tailor, monitor)
            failpoint("tailor.told")
            freeze(host, uuid, making / STATE)
            host.destroy(uuid)
            failpoint("tailor.ended")
            return publish(store, making, tailor.key, plan.facts, time.monotonic() - started, tailor.base)


def _prepare_files(tailor: TailorPlan, domain: DomainPlan, programs: Programs, user: tuple[int, int] | None) -> None:
    base, disk = tailor.base, domain.disk_chain[0].path
    create_overlay(programs, disk, base.disk, "qcow2")
    shutil.copyfile(base.initrd, domain.initrd)
    new_sparse(domain.ram, base.ram.stat().st_size)
    fill_sparse(base.ram, domain.ram)
    for path in (domain.initrd, disk, domain.ram):
        give(path, user)


def _tell(host: Host, domain: DomainPlan, tailor: TailorPlan, monitor: Monitor) -> None:
    """Let the fork run, tell it the policy, and stop it when it is as small and warm as its base was."""
    with closing(ControlPort(domain.control_socket)) as port:
        # Connected before the state is loaded, and while it is frozen: the guest sees no change.
        port.connect(5)
        load_state(host, domain.uuid, tailor.base.state)
        host.resume(domain.uuid)
        monitor.progress(0.3, 1, "setting up what the policy asks for")
        try:
            port.request("policy", deadline=POLICY_DEADLINE, **tailor.message)
        except GuestError as error:
            error.brief = f"the guest could not be set up as the policy asks: {error.brief}"
            raise
        monitor.progress(0.7, 1, "warming up and shrinking its memory")
        try:
            port.request("settle", deadline=SETTLE_DEADLINE)
        except PortClosedError:
            raise
        except GuestError as error:  # it rehearses a login, which its base could
            raise RefusedError(
                "no login works in a guest under this policy, so nothing else would",
                details=error.details,
                resolution="`vmsandbox policy check` names what kernel.seccomp or commands lack for a shell",
            ) from error
        host.suspend(domain.uuid)
