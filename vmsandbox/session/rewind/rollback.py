"""Brings a running session back to a snapshot: another guest, forked from it, takes the place of the one that runs.

The new guest is made whole, and has answered, before the old one ends: what fails until then leaves the session as it
was. `next.json` is written first and names both; the session's record is replaced in one step; whatever comes after is
finished by `recover`, by whomever it is called.
"""

from __future__ import annotations

import importlib
import threading
import time
import uuid as uuids
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace

from vmsandbox.errors import GuestError, HostError, UserInputError
from vmsandbox.failpoints import failpoint
from vmsandbox.guest.control import connect_ssh
from vmsandbox.hypervisor.connection import Host
from vmsandbox.hypervisor.fork import DOMAIN_PREFIX, ForkRequest, start_fork
from vmsandbox.journal import events
from vmsandbox.ledger.book import Kind, Ledger, Thing
from vmsandbox.policy.values import Policy
from vmsandbox.process import Programs
from vmsandbox.render.domain import DomainPlan
from vmsandbox.session.asked.request import Prepared
from vmsandbox.session.live.running import RunningSandbox
from vmsandbox.session.live.teardown import end_guest, remove_guest_files
from vmsandbox.session.opening.inspection import inspect_guest
from vmsandbox.session.opening.made import made_of
from vmsandbox.session.opening.starting import IDENTITY_DEADLINE, domain_name
from vmsandbox.session.resources.admitting import room_beside
from vmsandbox.session.resources.baseline import Baseline, baseline_of, differences, kept_baseline
from vmsandbox.session.rewind.replug import card_will_be_out, free_tap, give_card_back
from vmsandbox.session.rewind.snapshots import known_facts, restore_known, snapshot_of
from vmsandbox.session.state.folder import SessionFolder
from vmsandbox.session.state.guestlock import guest_locked
from vmsandbox.session.state.info import Halfway, SessionInfo
from vmsandbox.session.upkeep.clock import note_clock
from vmsandbox.session.upkeep.freezing import forget_frozen
from vmsandbox.session.upkeep.identity import go_on_as
from vmsandbox.spec import WORKER

_LOGIN_SECONDS = 30
_PROOF_SECONDS = 15.0


def roll_back(sandbox: RunningSandbox, tag: str | None, programs: Programs, *, thoroughly: bool = False) -> float:
    """Put a guest made of a snapshot in the place of the session's own; returns the seconds that it took.

    Connections to the old guest end; keys, names and network of the session stay.

    Args:
        tag: of the snapshot; None: the session's start.
        thoroughly: look at every byte of image, template and snapshot before.

    Raises:
        UserInputError: there is no such snapshot, or the session belongs to a process that runs.
        ImageError: image, template or snapshot was changed. HostError, GuestError: the new guest did not come up.
        The session goes on as it was then.
        HostError, RefusedError: after that, the new guest's network card could not be plugged in, or not guarded as
        before: it is out, which `gc` mends, or the guest is frozen. The rollback itself is done then.
    """
    folder = sandbox.folder
    began = time.monotonic()
    with guest_locked(folder), sandbox.monitor.step(f"rolling {folder.name} back to {tag or 'its start'}"):
        recover(folder)
        before = folder.info()
        _refuse_owned(before)
        snapshot = snapshot_of(folder, before, tag, thoroughly=thoroughly)
        made = made_of(folder, programs, thoroughly=thoroughly)
        proof = _Proof(folder, before) if thoroughly else None
        uuid = str(uuids.uuid4())
        place = known_facts(folder, snapshot.folder.name)
        info = replace(before, uuid=uuid, domain=domain_name(before.name, uuid), **place)
        Ledger.of(folder.layout).plan(info.id, *_things_of(folder, info))
        folder.begin_halfway(Halfway(before, info, snapshot.folder.name))
        failpoint("rollback.written")
        try:
            with room_beside(folder, before):
                _start(sandbox, info, replace(made.prepared, template=snapshot), made.policy, programs)
                failpoint("rollback.ready")
                card_will_be_out(folder, info)
                folder.update(info)  # from here on the session is the new guest
        except BaseException:
            if recover(folder) is None:  # the session was ended meanwhile, and knew nothing of this guest
                end_guest(folder, info)
                remove_guest_files(folder, info)
            raise
        failpoint("rollback.committed")
        recover(folder, lambda: events.RolledBack(snapshot.folder.name, uuid, thoroughly, _since(began)))
        sandbox.disconnect()
        sandbox.info = info
        note_clock(folder)
        try:
            give_card_back(folder, info)
        except GuestError as error:  # it is the guest's own, and goes back by another rollback
            sandbox.monitor.warning(f"{info.name} did not set up its network card: {error.details or error.brief}")
        if proof is not None:
            proof.hold(sandbox, info)
    return time.monotonic() - began


def _since(began: float) -> float:
    return round(time.monotonic() - began, 3)


def _start(sandbox: RunningSandbox, info: SessionInfo, prepared: Prepared, policy: Policy, programs: Programs) -> None:
    """Start the guest that comes, and log in once: only a guest that answers takes another's place."""
    folder = sandbox.folder
    request = ForkRequest(
        name=info.domain.removeprefix(DOMAIN_PREFIX),
        uuid=info.uuid,
        session_id=info.id,
        image=prepared.image,
        template=prepared.template,
        shape=prepared.shape,
        machine=prepared.machine,
        folder=folder.vm(info),
        run_folder=folder.sockets(info),
        limits=prepared.limits,
    )

    def inspect(plan: DomainPlan, live_xml: str) -> None:
        inspect_guest(host, prepared, plan, live_xml, folder, sandbox.journal, info, policy)

    get_ready = threading.Thread(target=importlib.import_module, args=("vmsandbox.guest.ssh",))
    get_ready.start()  # 0.2 s, while libvirt and QEMU are at work
    with closing(Host.open()) as host:
        _domain, control = start_fork(host, request, programs, inspect)
        failpoint("rollback.started")
        go_on_as(control, IDENTITY_DEADLINE)
    get_ready.join()
    _log_in(folder, info)


def _log_in(folder: SessionFolder, info: SessionInfo) -> None:
    """Raises GuestError if the guest lets nobody in."""
    from vmsandbox.guest.ssh import GuestShell

    keys = folder.keys()
    # The last port: those before it may have to notice first that the connection which they had is gone.
    sock = connect_ssh(folder.sockets(info) / f"ssh.{info.ssh_ports - 1}", _LOGIN_SECONDS)
    GuestShell.connect(
        sock, user=WORKER, host_key=keys.host_key, user_key=keys.user_key, deadline=_LOGIN_SECONDS
    ).leave()


def recover(folder: SessionFolder, done: Callable[[], events.Event] | None = None) -> str | None:
    """Finish a rollback whose new guest is the session's, undo one whose is not; what was done, None for nothing.

    Call it under `guest_locked`. Twice is harmless. done: what the journal says of one that was finished.

    Raises:
        HostError: the guest that has to go cannot be ended.
    """
    halfway = folder.halfway()
    if halfway is None:
        return None
    before, coming, tag = halfway.before, halfway.coming, halfway.tag
    is_committed = folder.info().uuid == coming.uuid
    if is_committed:
        restore_known(folder, coming, tag)
        failpoint("rollback.restored")
    gone = before if is_committed else coming
    end_guest(folder, gone)
    failpoint("rollback.ended")
    remove_guest_files(folder, gone)
    if is_committed:
        free_tap(gone)
        forget_frozen(folder, gone)
        failpoint("rollback.freed")
        folder.journal(coming.id).append(done() if done else events.RolledBack(tag, coming.uuid, False, 0.0))
    folder.end_halfway()
    Ledger.of(folder.layout).gone(gone.id, *_things_of(folder, gone))
    return f"its rollback to {tag} was finished" if is_committed else f"its rollback to {tag} was undone"


class _Proof:
    """That image, template and what the host has of the session are after a rollback as they were before it."""

    def __init__(self, folder: SessionFolder, info: SessionInfo) -> None:
        self._folder = folder
        with closing(Host.open()) as host:
            now = baseline_of(folder.layout, host, info)
        kept = kept_baseline(folder)
        self._before = Baseline(kept.shared if kept is not None else now.shared, now.own)

    def hold(self, sandbox: RunningSandbox, info: SessionInfo) -> None:
        """Raises HostError if something is not."""
        until = time.monotonic() + _PROOF_SECONDS
        with closing(Host.open()) as host:
            after = baseline_of(self._folder.layout, host, info, verify=True)
            found = differences(self._before, after)
            while found and time.monotonic() < until:  # libvirt may be seconds until it has noticed the old guest's end
                time.sleep(0.3)
                after = Baseline(after.shared, baseline_of(self._folder.layout, host, info).own)
                found = differences(self._before, after)
        if found:
            sandbox.journal.append(events.BaselineDiffers(found))
            raise HostError(
                f"session {info.name!r} was rolled back, but not everything is as it was",
                details="\n".join(found),
                resolution="`vmsandbox gc` removes what is left; what was changed should not be used any more",
            )
        sandbox.journal.append(events.BaselineProven(after.digest, len(after.shared)))


def _things_of(folder: SessionFolder, info: SessionInfo) -> tuple[Thing, ...]:
    """What is one guest's own. (The row of its process goes with the session: numbers with start times harm nobody.)"""
    return (Kind.DOMAIN, info.uuid), (Kind.SOCKETS, folder.sockets(info).name)


def _refuse_owned(info: SessionInfo) -> None:
    if not info.ready:
        raise UserInputError(f"session {info.name!r} is still starting", resolution="try again when it is ready")
    if info.owner_is_alive:
        raise UserInputError(
            f"session {info.name!r} belongs to a `vmsandbox session` that runs: its command would lose its guest",
            resolution="a guest that `vmsandbox start` made can be rolled back",
        )
