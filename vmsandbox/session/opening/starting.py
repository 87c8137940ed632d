"""From a claimed name to a guest that has its identity and answers: the first half of a session.

Order is safety here. A resource is written down before it is made, and nothing of the guest is used before its identity
is the session's own.
"""

from __future__ import annotations

import os
import time
import uuid as uuids
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

from vmsandbox import __version__
from vmsandbox.failpoints import failpoint
from vmsandbox.guest.control import ControlPort
from vmsandbox.hypervisor.connection import Host
from vmsandbox.hypervisor.fork import DOMAIN_PREFIX, ForkRequest, start_fork
from vmsandbox.journal import events
from vmsandbox.ledger.book import Kind, Ledger
from vmsandbox.ledger.processes import process_started
from vmsandbox.paths import Layout
from vmsandbox.policy.values import Policy
from vmsandbox.process import Programs
from vmsandbox.render.domain import DomainPlan
from vmsandbox.session.asked.request import Prepared, SessionRequest
from vmsandbox.session.asked.sizes import disk_free_of
from vmsandbox.session.asked.variables import guest_variables
from vmsandbox.session.live.running import RunningSandbox
from vmsandbox.session.live.teardown import tear_down
from vmsandbox.session.network.guest_settings import guest_environment
from vmsandbox.session.network.networking import NetworkToCome
from vmsandbox.session.opening.inspection import inspect_guest
from vmsandbox.session.opening.made import keep_made
from vmsandbox.session.records.record import Record
from vmsandbox.session.state.folder import SessionFolder
from vmsandbox.session.state.info import SessionInfo, new_session_id
from vmsandbox.session.upkeep.clock import note_clock
from vmsandbox.session.upkeep.identity import give_identity

if TYPE_CHECKING:
    from vmsandbox.session.records.backup import Backup

IDENTITY_DEADLINE = 30  # seconds


def claim(
    asked: SessionRequest, prepared: Prepared, layout: Layout, reserved_as: str = ""
) -> tuple[SessionFolder, SessionInfo]:
    """Take the session's name, and write down what is about to be made of it.

    reserved_as: the owner of a reservation that is the session's from now on.

    Raises:
        UserInputError: the name is in use. LedgerError: it cannot be written down.
    """
    uuid = str(uuids.uuid4())
    name = asked.name or f"s-{uuid[:8]}"
    folder = SessionFolder(layout, name)
    session_id = new_session_id(name)
    info = SessionInfo(
        id=session_id,
        name=name,
        uuid=uuid,
        domain=domain_name(name, uuid),
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        owner_pid=os.getpid(),
        owner_started=process_started(os.getpid()) or 0,
        image=prepared.image.name,
        image_digest=prepared.image.digest,
        template=prepared.template.published_key,
        ssh_ports=prepared.shape.ssh_ports,
        memory_mib=prepared.shape.memory_mib,
        vcpus=prepared.shape.vcpus,
        project=str(asked.project) if asked.project else None,
        network=asked.mode.value,
        output_bytes=asked.policy.resources.output,
    )
    ledger = Ledger.of(layout)
    try:
        ledger.plan(
            info.id,
            (Kind.FOLDER, name),
            (Kind.DOMAIN, uuid),
            (Kind.SOCKETS, folder.sockets(info).name),
            (Kind.SOCKETS, folder.net.name),
            reserved_as=reserved_as,
        )
        folder.claim(info)
        keep_made(folder, prepared, asked.policy)
    except BaseException:
        # Torn down only where it says that it is this one's: a record that cannot be read is somebody's, too.
        if not folder.is_of(info) or not tear_down(layout, folder, info):
            ledger.forget(info.id)
        raise
    return folder, info


def domain_name(session: str, uuid: str) -> str:
    """Its end is the guest's own: libvirt may still be forgetting another guest of the session, or of its name."""
    return f"{DOMAIN_PREFIX}{session}-{uuid[-6:]}"


def write_opened(sandbox: RunningSandbox, policy: Policy) -> None:
    """Begin the session's record: that it exists, and what may come back of it."""
    info = sandbox.info
    sandbox.journal.append(events.SessionOpened(info.id, info.name, info.uuid, info.project, __version__))
    failpoint("session.opened")
    Record(sandbox.folder.record_folder(info.id)).keep_returns(policy.returns)


def back_up(sandbox: RunningSandbox, asked: SessionRequest, programs: Programs) -> Future[Backup] | None:
    """Keep the tree of before in the record, while the guest starts."""
    if asked.project is None or not asked.backup:
        return None
    from vmsandbox.session.records.backup import keep_project

    pool = ThreadPoolExecutor(1, "backup")
    try:
        return pool.submit(keep_project, sandbox.layout, sandbox.info.id, asked.project, programs)
    finally:
        pool.shutdown(wait=False)


def start_guest(
    sandbox: RunningSandbox,
    host: Host,
    asked: SessionRequest,
    prepared: Prepared,
    programs: Programs,
    fork: Callable[..., tuple[DomainPlan, ControlPort]] = start_fork,
) -> None:
    """Fork the template, look at what really runs, give it its identity and network, and log in.

    fork: how it is forked (`hypervisor.fork.start_fork`, or alike).

    Raises:
        RefusedError, HostError, GuestError: it is not what was asked for, or did not come up; the caller tears down.
    """
    began = time.monotonic()
    request = ForkRequest(
        name=sandbox.info.domain.removeprefix(DOMAIN_PREFIX),
        uuid=sandbox.info.uuid,
        session_id=sandbox.info.id,
        image=prepared.image,
        template=prepared.template,
        shape=prepared.shape,
        machine=prepared.machine,
        folder=sandbox.folder.vm(sandbox.info),
        run_folder=sandbox.folder.sockets(sandbox.info),
        limits=prepared.limits,
    )
    variables = guest_variables(asked.policy, os.environ)
    environment = guest_environment(variables) if variables else None
    sandbox.network_to_come = NetworkToCome(asked, prepared, sandbox.folder, sandbox.info, programs, sandbox.monitor)
    with sandbox.monitor.step(f"starting guest {sandbox.name}"):
        domain, control = fork(
            host, request, programs, lambda plan, xml: _inspect(sandbox, host, asked.policy, prepared, plan, xml)
        )
        network = sandbox.network_to_come.result()
        keys, machine_id = give_identity(
            control,
            sandbox.name,
            IDENTITY_DEADLINE,
            network.identity if network else environment,
            disk_free_of(prepared.limits),
        )
        failpoint("session.identity")
        note_clock(sandbox.folder)
        sandbox.folder.save_keys(keys)
        failpoint("session.keys")
        if network is not None:
            sandbox.network = network
            network.guest_is_up(domain)
            failpoint("session.network")
        sandbox.shell()
        failpoint("session.login")
    sandbox.info = replace(sandbox.info, ready=True)
    sandbox.folder.update(sandbox.info)
    sandbox.journal.append(events.GuestReady(keys.host_key, machine_id, round(time.monotonic() - began, 3)))
    failpoint("session.ready")


def _inspect(
    sandbox: RunningSandbox, host: Host, policy: Policy, prepared: Prepared, plan: DomainPlan, live_xml: str
) -> None:
    sandbox.isolation = inspect_guest(
        host, prepared, plan, live_xml, sandbox.folder, sandbox.journal, sandbox.info, policy
    )
    sandbox.info = replace(sandbox.info, grade=sandbox.isolation.grade.value)
    sandbox.folder.update(sandbox.info)


def get_ready(to_push: bool) -> None:
    """Import what is needed later, while libvirt and QEMU are at work: 0.3 s."""
    import sqlite3  # noqa: F401 - the ledger's, a moment from now

    import vmsandbox.guest.ssh

    if to_push:
        import vmsandbox.session.transfer.project  # noqa: F401
        from vmsandbox.review.incoming import scan

        list(scan("README.md", "é".encode()))  # its lists are read and compiled: 0.1 s
        list(scan("a.py", "é".encode()))
