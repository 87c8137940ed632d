"""Makes a template: boots an image with its seed, waits for cloud-init, and freezes the guest.

A cold boot takes half a minute under emulation; it happens once for a template, and a fork takes a second.
"""

from __future__ import annotations

import shutil
import threading
import time
import uuid as uuids
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from vmsandbox.errors import GuestError, VmsandboxError
from vmsandbox.failpoints import failpoint
from vmsandbox.guest.control import ControlPort, PortClosedError
from vmsandbox.hypervisor.connection import Host
from vmsandbox.hypervisor.console import ConsoleTail
from vmsandbox.hypervisor.files import new_sparse
from vmsandbox.hypervisor.freezing import freeze, publish
from vmsandbox.hypervisor.launch import choose_user, create_overlay, disk_errors, give, own_folder
from vmsandbox.hypervisor.template import (
    DISK,
    INITRD,
    RAM,
    STATE,
    Template,
    TemplatePlan,
    TemplateStore,
    making_lock,
)
from vmsandbox.ledger.book import Kind
from vmsandbox.monitor import Monitor
from vmsandbox.process import Programs
from vmsandbox.render.domain import DiskImage, DomainPlan, render_domain
from vmsandbox.spec import Accelerator, GuestShape

BOOT_DEADLINE = 300  # seconds; emulation on a busy machine is slow


class GuestDiedError(GuestError):
    """The guest ended by itself while it booted. `last_line`: the last thing that its console said."""

    last_line = ""


def obtain_template(
    host: Host, plan: TemplatePlan, store: TemplateStore, programs: Programs, monitor: Monitor
) -> Template:
    """The template for these inputs: found, or made now.

    Raises:
        GuestError: the guest did not come up (the error carries the console's tail).
        ImageError: the template was tampered with.
        HostError: libvirt, QEMU or the disk failed.
    """

    def make() -> Template:
        try:
            return _make(host, plan, store, programs, monitor)
        except GuestDiedError as error:
            if plan.shape.accelerator is not Accelerator.TCG:
                raise
            # QEMU 7.2's emulation breaks a booting kernel now and then. A guest that hangs gets no second try.
            monitor.notice(f"the emulated guest died while it booted, trying once more ({error.last_line})")
            return _make(host, plan, store, programs, monitor)

    return find_or_make(plan.key, store, monitor, make)


def find_or_make(key: str, store: TemplateStore, monitor: Monitor, make: Callable[[], Template]) -> Template:
    """The template of this key, made by one process alone if there is none."""
    if found := store.find(key):
        return found
    waiting = "another vmsandbox is making the same template; waiting for it"
    with store.lock(key, lambda: monitor.notice(waiting)):
        return store.find(key) or make()


def _make(host: Host, plan: TemplatePlan, store: TemplateStore, programs: Programs, monitor: Monitor) -> Template:
    started = time.monotonic()
    with in_the_making(host, plan.shape, store) as (uuid, making, run, user):
        domain = _domain_plan(plan, uuid, making, run, user)
        with monitor.step(f"making template {plan.key[:12]} (first use of this image and shape)"):
            _prepare_files(plan, domain, programs, user)
            failpoint("template.files")
            host.create(render_domain(domain), paused=False)
            failpoint("template.guest")
            _boot(host, domain, monitor)
            failpoint("template.booted")
            freeze(host, uuid, making / STATE)
            host.destroy(uuid)
            failpoint("template.ended")
            monitor.progress(0.95, 1, "computing digests")
            return publish(store, making, plan.key, plan.facts, time.monotonic() - started)


@contextmanager
def in_the_making(
    host: Host, shape: GuestShape, store: TemplateStore
) -> Iterator[tuple[str, Path, Path, tuple[int, int] | None]]:
    """A guest's UUID, folders (files, sockets) and user, for a template that is made; all of it is gone afterwards."""
    uuid = str(uuids.uuid4())
    making = store.folder / f".making-{uuid}"
    run = store.run / f"t-{uuid[:8]}"
    user = choose_user(host, shape)
    owner = f"template:{making.name}"
    things = ((Kind.DOMAIN, uuid), (Kind.TEMPLATE, making.name), (Kind.SOCKETS, run.name))
    store.ledger.plan(owner, *things)
    ended = False
    try:
        with disk_errors("making the template's files"), store.making(making):
            store.run.mkdir(mode=0o711, parents=True, exist_ok=True)
            own_folder(making, user)
            own_folder(run, user)
            failpoint("template.folders")
            yield uuid, making, run, user
    finally:
        with suppress(VmsandboxError):
            host.destroy(uuid)
            ended = True
        shutil.rmtree(making, ignore_errors=True)
        shutil.rmtree(run, ignore_errors=True)
        # What could not be removed stays written down: so `gc` finds it.
        if ended and not any(path.exists() for path in (making, run, making_lock(making))):
            store.ledger.gone(owner, *things)


def _domain_plan(plan: TemplatePlan, uuid: str, making: Path, run: Path, user: tuple[int, int] | None) -> DomainPlan:
    return DomainPlan(
        name=f"vmsandbox-template-{uuid[:8]}",
        uuid=uuid,
        genid=str(uuids.uuid4()),
        shape=plan.shape,
        machine=plan.machine.type,
        emulator=plan.machine.emulator,
        kernel=plan.image.kernel,
        initrd=making / INITRD,
        disk_chain=(DiskImage(making / DISK, "qcow2"), DiskImage(plan.image.root, "raw")),
        run_folder=run,
        ram=making / RAM,
        ram_share=True,
        ram_readonly=False,
        incoming=False,
        session_id=f"template:{making.name}",
        home=making.parent,
        run_as=user,
    )


def _prepare_files(plan: TemplatePlan, domain: DomainPlan, programs: Programs, user: tuple[int, int] | None) -> None:
    initrd = plan.image.initrd.read_bytes()
    # Archives follow each other at multiples of 512 bytes (the kernel's initramfs buffer format).
    domain.initrd.write_bytes(initrd + bytes(-len(initrd) % 512) + plan.seed_archive())
    disk = domain.disk_chain[0].path
    create_overlay(programs, disk, plan.image.root, "raw")
    new_sparse(domain.ram, plan.shape.memory_mib * 1024 * 1024)
    for path in (domain.initrd, disk, domain.ram):
        give(path, user)


def _boot(host: Host, domain: DomainPlan, monitor: Monitor) -> None:
    """Wait until cloud-init is done and the guest has made itself small."""
    until = time.monotonic() + BOOT_DEADLINE
    with ConsoleTail(domain.console_socket) as console, closing(ControlPort(domain.control_socket)) as port:
        try:
            port.connect(10)
            monitor.progress(0.1, 1, "booting and running cloud-init")
            untrusted = _wait_for_hello(host, domain, port, until, monitor)
            if untrusted.get("cloud_init") != "done" or untrusted.get("errors"):
                raise GuestError("cloud-init failed in the template", details=repr(untrusted)[:2000])
            monitor.progress(0.8, 1, "warming up and shrinking its memory")
            port.request("settle", deadline=max(until - time.monotonic(), 1))
            # Frozen with the control port connected, as a fork will have it: no event wakes the guest.
            host.suspend(domain.uuid)
        except VmsandboxError as error:
            tail = console.text()
            died = isinstance(error, PortClosedError) or not host.is_active(domain.uuid)
            failure = GuestDiedError if died else GuestError
            raised = failure(
                "the guest did not come up to become a template",
                details=f"{error.brief}\n{error.details}\n--- the end of its console ---\n{tail or '(silent)'}",
                resolution="`vmsandbox image verify` checks the image; a slow machine may need a second try",
            )
            if isinstance(raised, GuestDiedError):
                raised.last_line = tail.strip().rpartition("\n")[2]
            raise raised from error


def _wait_for_hello(
    host: Host, domain: DomainPlan, port: ControlPort, until: float, monitor: Monitor
) -> dict[str, object]:
    begin = time.monotonic()
    result: list[dict[str, object] | VmsandboxError] = []

    def ask() -> None:
        try:
            result.append(port.request("hello", deadline=max(until - time.monotonic(), 1)))
        except VmsandboxError as error:
            result.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    while asking.is_alive():
        asking.join(0.5)
        monitor.progress(min(0.1 + (time.monotonic() - begin) / 60, 0.75), 1, "booting and running cloud-init")
        if asking.is_alive() and not host.is_active(domain.uuid):
            raise GuestError("the guest ended while it booted")
    if isinstance(result[0], VmsandboxError):
        raise result[0]
    return result[0]
