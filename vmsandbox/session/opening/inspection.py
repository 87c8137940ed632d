"""Looks at a guest that is still paused: only the devices that were asked for, and the grade of what really runs.

Nothing of a request counts here. Were the grade worked out from what was asked for, a libvirt hook or another tool
could add a device or take the confinement away, and the report would still say `isolated`.
"""

from __future__ import annotations

from vmsandbox.hypervisor.connection import Host
from vmsandbox.hypervisor.isolation import Isolation, assess, pid_file, read_pid_file
from vmsandbox.hypervisor.livexml import ExpectedDevices, check_live_xml
from vmsandbox.journal import events
from vmsandbox.journal.chain import Journal
from vmsandbox.ledger.admission import QEMU
from vmsandbox.ledger.book import Kind, Ledger
from vmsandbox.ledger.processes import Process
from vmsandbox.policy.values import Policy
from vmsandbox.render.domain import DomainPlan
from vmsandbox.session.asked.request import Prepared
from vmsandbox.session.asked.sizes import refuse_grade
from vmsandbox.session.state.folder import SessionFolder
from vmsandbox.session.state.info import SessionInfo


def inspect_guest(
    host: Host,
    prepared: Prepared,
    plan: DomainPlan,
    live_xml: str,
    folder: SessionFolder,
    journal: Journal,
    info: SessionInfo,
    policy: Policy,
) -> Isolation:
    """Check a paused guest and write down what it is.

    Raises:
        RefusedError: the live XML has something that was not asked for, or the policy asks for a better grade.
    """
    check_live_xml(live_xml, ExpectedDevices.of(plan))
    pid = read_pid_file(pid_file(host.uri, plan.name))
    folder.pid_file(info).write_text(str(pid))
    _note_process(Ledger.of(folder.layout), plan.session_id, Process.of(pid))
    isolation = assess(live_xml, pid, uri=host.uri, kvm=prepared.kvm)
    journal.append(
        events.ForkStarted(
            image=prepared.image.name,
            image_digest=prepared.image.digest,
            template=prepared.template.key,
            network=info.network,
            vcpus=plan.shape.vcpus,
            memory_mib=plan.shape.memory_mib,
        )
    )
    evidence = {
        name: ("ok: " if check.ok else "missing: ") + check.evidence for name, check in isolation.checks.items()
    }
    journal.append(events.IsolationAssessed(isolation.grade.value, evidence))
    refuse_grade(policy, isolation)
    return isolation


def _note_process(ledger: Ledger, session_id: str, process: Process) -> None:
    """Write the guest's process down, and forget those of guests that were rolled back before it."""
    dead = [
        (Kind.PROCESS, row.identity)
        for row in ledger.rows(session_id)
        if row.kind == Kind.PROCESS and not Process.parse(row.identity.partition(" ")[0]).is_alive
    ]
    if dead:
        ledger.gone(session_id, *dead)
    ledger.plan(session_id, (Kind.PROCESS, f"{process} {QEMU}"))
