"""One session from its claim to its end: the Python interface, and what every command of the terminal uses.

    with Sandbox.open(project=".") as sb:
        status = sb.run(["pytest"])

Order is safety here. A resource is written down (the session's folder) before it is made; whatever fails, `close`
runs every step of the teardown; and nothing of the guest is used before its identity is the session's own.
"""

from __future__ import annotations

import os
import threading
import time
import uuid as uuids
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from vmsandbox import __version__
from vmsandbox.errors import VmsandboxError
from vmsandbox.guest.control import connect_ssh
from vmsandbox.hypervisor.connection import Host
from vmsandbox.hypervisor.fork import DOMAIN_PREFIX, ForkRequest, start_fork
from vmsandbox.hypervisor.isolation import Isolation
from vmsandbox.journal import events
from vmsandbox.journal.chain import Journal
from vmsandbox.monitor import Monitor
from vmsandbox.paths import Layout
from vmsandbox.policy.values import Policy
from vmsandbox.process import Programs
from vmsandbox.render.domain import DomainPlan
from vmsandbox.session.enforced import enforced
from vmsandbox.session.folder import (
    SessionFolder,
    SessionInfo,
    new_session_id,
    process_started,
)
from vmsandbox.session.guest_settings import guest_environment
from vmsandbox.session.identity import give_identity
from vmsandbox.session.inspection import inspect_guest
from vmsandbox.session.limits import ended_at_limit, limited, note_activity
from vmsandbox.session.networking import GuestNetwork, NetworkToCome
from vmsandbox.session.plan import Prepared, SessionRequest, prepare
from vmsandbox.session.record import Record
from vmsandbox.session.sizes import disk_free_of
from vmsandbox.session.teardown import tear_down
from vmsandbox.session.unfinished import make_whole
from vmsandbox.session.variables import guest_variables
from vmsandbox.session.watching import needs_watcher, start_watcher
from vmsandbox.spec import WORKER, History, NetworkMode

if TYPE_CHECKING:
    from vmsandbox.guest.ssh import GuestShell
    from vmsandbox.review.changes import Changes
    from vmsandbox.session.asking import Asking, Person
    from vmsandbox.session.backup import Backup
    from vmsandbox.session.collect import Collected
    from vmsandbox.session.commits import ReturnedCommits

LOGIN_DEADLINE = 30  # seconds
IDENTITY_DEADLINE = 30


class Sandbox:
    """A running session. Make one with `open`, reach one that runs with `attach`."""

    def __init__(self, layout: Layout, folder: SessionFolder, info: SessionInfo, monitor: Monitor) -> None:
        self.layout = layout
        self.folder = folder
        self.info = info
        self.monitor = monitor
        self.isolation: Isolation | None = None
        self._journal: Journal | None = None
        self._shell: GuestShell | None = None
        self._port = ExitStack()
        self._network: GuestNetwork | None = None
        self._network_to_come: NetworkToCome | None = None
        self.project_is_open = False  # whether the policy's guard over the project is down (`session.enforced`)

    # -- beginning and end ---------------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        project: str | Path | None = None,
        *,
        policy: Policy | None = None,
        request: SessionRequest | None = None,
        layout: Layout | None = None,
        programs: Programs | None = None,
        monitor: Monitor | None = None,
    ) -> Sandbox:
        """Start a guest, and copy the project into it.

        Args:
            project: folder on the host; None starts an empty guest.
            policy: what may be copied in (default: everything but ignored files and secrets).
            request: all that can be asked for; `project` and `policy` override its fields.

        Raises:
            VmsandboxError: it says what failed; nothing is left then.
        """
        asked = request or SessionRequest()
        if project is not None:
            asked = replace(asked, project=Path(project).absolute())
        if policy is not None:
            asked = replace(asked, policy=policy)
        asked.check()
        where = layout or Layout.from_environment()
        listener = monitor or Monitor()
        # 0.3 s of imports, while libvirt and QEMU are at work. Not a daemon thread: the end of the process would
        # tear it out of compiled code, which aborts ("FATAL: exception not rethrown", status 134).
        threading.Thread(target=_get_ready, args=(asked.project is not None,)).start()
        runner = programs or Programs()
        if asked.project is not None:
            make_whole(asked.project, listener)  # before it is copied in half old, half new
        host = Host.open()
        try:
            prepared = prepare(asked, where, host, runner, listener)
            sandbox = cls._claim(asked, prepared, where, listener)
            try:
                backup = sandbox._back_up(asked, runner)
                sandbox._start(host, asked, prepared, runner)
                sandbox.project_is_open = True  # as its template was frozen
                if asked.project is not None:
                    sandbox.push(asked.project, asked.policy, runner, asked.history)
                else:
                    with enforced(sandbox, asked.policy, None, None):
                        pass
                if backup is not None:
                    backup.result()
                if sandbox._network is not None:
                    sandbox._network.wait_for_keeper()
                if needs_watcher(asked.policy.session):
                    start_watcher(sandbox.folder, sandbox.info, asked.policy.session, runner)
            except BaseException as error:
                sandbox._failed(error)
                raise
        finally:
            host.close()
        return sandbox

    @classmethod
    def attach(cls, name: str, *, layout: Layout | None = None, monitor: Monitor | None = None) -> Sandbox:
        """A session that runs already. Raises UserInputError if there is none of this name."""
        where = layout or Layout.from_environment()
        folder = SessionFolder(where, name)
        return cls(where, folder, folder.info(), monitor or Monitor())

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close("ended" if error is None else f"ended by {type(error).__name__}")

    def close(self, reason: str = "ended") -> list[str]:
        """End the guest and remove everything of the session but its record; returns what could not be removed."""
        self.disconnect()
        if self._network_to_come is not None:
            self._network_to_come.close()
        leftovers = tear_down(self.layout, self.folder, self.info)
        with suppress(VmsandboxError):
            self.journal.append(events.SessionClosed(reason, leftovers))
        return leftovers

    def disconnect(self) -> None:
        """Give the SSH port back; the guest goes on."""
        if self._shell is not None:
            self._shell.close()
            self._shell = None
        self._port.close()

    # -- use -----------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The session's name."""
        return self.info.name

    @property
    def journal(self) -> Journal:
        """The session's journal."""
        if self._journal is None:
            self._journal = self.folder.journal(self.info.id)
        return self._journal

    def shell(self) -> GuestShell:
        """The SSH connection of this object, made on first use."""
        note_activity(self.folder)
        if self._shell is None or not self._shell.is_open:
            from vmsandbox.guest.ssh import GuestShell

            self.disconnect()
            keys = self.folder.keys()
            port = self._port.enter_context(self.folder.ssh_port(self.info.ssh_ports))
            sock = connect_ssh(self.folder.ssh_socket(port), LOGIN_DEADLINE)
            self._shell = GuestShell.connect(
                sock, user=WORKER, host_key=keys.host_key, user_key=keys.user_key, deadline=LOGIN_DEADLINE
            )
            if self._network is not None:
                self._network.join(self._shell)
        return self._shell

    def start(self, command: Sequence[str] | None, *, terminal: tuple[str, int, int] | None = None) -> Any:
        """Start a command (None: a login shell) in the project's folder; returns its SSH channel."""
        shell = self.shell()  # first: where no port is free, no command was started
        self.journal.append(events.CommandStarted(list(command) if command else None, terminal is not None))
        channel = shell.start(command, cwd=self.info.guest_folder, terminal=terminal)
        if self._network is not None:
            self._network.check(shell)
        return channel

    def asking(self, person: Person | None = None) -> Asking:
        """A context in which the guest's questions about commands are answered (None: with no, and written down)."""
        from vmsandbox.session.asking import Asking

        return Asking(self.folder, self.journal, person)

    def ended(self, status: int, seconds: float) -> None:
        """Write down that a command started with `start` has ended."""
        self.journal.append(events.CommandEnded(status, round(seconds, 3)))

    def run(self, command: Sequence[str], *, stdin: int | None = None) -> int:
        """Run a command with this process's stdout and stderr; returns its exit status.

        Raises:
            LimitReachedError: it wrote more than it may, or the session's time was up.
        """
        from vmsandbox.guest.streams import join_streams, write_all

        began = time.monotonic()
        with limited(self) as meter:
            channel = self.start(command)
            with ended_at_limit(channel):
                out, err = meter.sink(write_all(1)), meter.sink(write_all(2))
                status = join_streams(channel, stdin, out, err, fed=meter.note)
        self.ended(status, time.monotonic() - began)
        return status

    def push(
        self,
        project: Path,
        policy: Policy | None = None,
        programs: Programs | None = None,
        history: History = History.NONE,
    ) -> None:
        """Copy a project into the guest, and give it a repository of its own (`session.project`, `session.history`)."""
        from vmsandbox.session.history import give_history
        from vmsandbox.session.project import guest_folder_for, push_project

        rules, runner = policy or Policy(), programs or Programs()
        Record(self.folder.record_folder(self.info.id)).keep_returns(rules.returns)
        with enforced(self, rules, project, guest_folder_for(project)):
            self.info = push_project(self, project, rules, runner, history.value)
            give_history(self, project, history.value, rules, runner)

    def changes(self) -> Changes:
        """What the guest's tree has that was not pushed, and the other way round."""
        from vmsandbox.review.changes import compare

        collected = self.collect()
        return compare(collected.pushed, collected.returned)

    def collect(self) -> Collected:
        """Fetch what changed into the record's quarantine (see `vmsandbox.session.collect`)."""
        from vmsandbox.session.collect import collect, refusal_text

        collected = collect(self)
        if collected.refused:
            self.monitor.warning(refusal_text(collected.refused))
        return collected

    def commits(self, project: Path) -> ReturnedCommits:
        """Take the guest's commits into the project's repository, below refs/vmsandbox (`session.commits`)."""
        from vmsandbox.session.commits import collect_commits

        landed = collect_commits(self, project, Programs())
        self.journal.append(events.CommitsReturned([branch.ref for branch in landed.branches], list(landed.skipped)))
        return landed

    def keep(self) -> None:
        """Let the guest outlive this process, until `stop`. A network that this process holds ends here."""
        if self._network is not None and self._network.egress is not None:
            self._network.close()
            self.info = replace(self.info, network=NetworkMode.NONE.value)
        self.info = replace(self.info, owner_pid=0, owner_started=0)
        self.folder.update(self.info)

    # -- starting ------------------------------------------------------------------------------------------

    @classmethod
    def _claim(cls, asked: SessionRequest, prepared: Prepared, layout: Layout, monitor: Monitor) -> Sandbox:
        uuid = str(uuids.uuid4())
        name = asked.name or f"s-{uuid[:8]}"
        folder = SessionFolder(layout, name)
        session_id = new_session_id(name)
        info = SessionInfo(
            id=session_id,
            name=name,
            uuid=uuid,
            # the id's random end: libvirt may still be forgetting a guest of the same name
            domain=f"{DOMAIN_PREFIX}{name}-{session_id[-6:]}",
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            owner_pid=os.getpid(),
            owner_started=process_started(os.getpid()) or 0,
            image=prepared.image.name,
            image_digest=prepared.image.digest,
            template=prepared.template.key,
            ssh_ports=prepared.shape.ssh_ports,
            memory_mib=prepared.shape.memory_mib,
            vcpus=prepared.shape.vcpus,
            project=str(asked.project) if asked.project else None,
            network=asked.mode.value,
            output_bytes=asked.policy.resources.output,
        )
        folder.claim(info)
        sandbox = cls(layout, folder, info, monitor)
        opened = events.SessionOpened(info.id, name, uuid, info.project, __version__)
        try:
            sandbox.journal.append(opened)
            Record(folder.record_folder(info.id)).keep_returns(asked.policy.returns)
        except BaseException as error:
            sandbox._failed(error)
            raise
        return sandbox

    def _back_up(self, asked: SessionRequest, programs: Programs) -> Future[Backup] | None:
        """Keep the tree of before in the record, while the guest starts."""
        if asked.project is None or not asked.backup:
            return None
        from vmsandbox.session.backup import keep_project

        pool = ThreadPoolExecutor(1, "backup")
        try:
            return pool.submit(keep_project, self.layout, self.info.id, asked.project, programs)
        finally:
            pool.shutdown(wait=False)

    def _start(self, host: Host, asked: SessionRequest, prepared: Prepared, programs: Programs) -> None:
        began = time.monotonic()
        request = ForkRequest(
            name=self.info.domain.removeprefix(DOMAIN_PREFIX),
            uuid=self.info.uuid,
            session_id=self.info.id,
            image=prepared.image,
            template=prepared.template,
            shape=prepared.shape,
            machine=prepared.machine,
            folder=self.folder.vm,
            run_folder=self.folder.run,
            limits=prepared.limits,
        )
        variables = guest_variables(asked.policy, os.environ)
        environment = guest_environment(variables) if variables else None
        self._network_to_come = NetworkToCome(asked, prepared, self.folder, self.info, programs, self.monitor)
        with self.monitor.step(f"starting guest {self.name}"):
            domain, control = start_fork(
                host, request, programs, lambda plan, xml: self._inspect(host, asked.policy, prepared, plan, xml)
            )
            network = self._network_to_come.result()
            keys, machine_id = give_identity(
                control,
                self.name,
                IDENTITY_DEADLINE,
                network.identity if network else environment,
                disk_free_of(prepared.limits),
            )
            self.folder.save_keys(keys)
            if network is not None:
                self._network = network
                network.guest_is_up(domain)
            self.shell()
        owner = (0, 0) if asked.keep else (self.info.owner_pid, self.info.owner_started)
        self.info = replace(self.info, ready=True, owner_pid=owner[0], owner_started=owner[1])
        self.folder.update(self.info)
        self.journal.append(events.GuestReady(keys.host_key, machine_id, round(time.monotonic() - began, 3)))

    def _inspect(self, host: Host, policy: Policy, prepared: Prepared, plan: DomainPlan, live_xml: str) -> None:
        self.isolation = inspect_guest(
            host, prepared, plan, live_xml, self.folder, self.journal, self.info.network, policy
        )
        self.info = replace(self.info, grade=self.isolation.grade.value)
        self.folder.update(self.info)

    def _failed(self, error: BaseException) -> None:
        brief = error.brief if isinstance(error, VmsandboxError) else f"interrupted ({type(error).__name__})"
        details = error.details if isinstance(error, VmsandboxError) else str(error)
        with suppress(VmsandboxError):
            self.journal.append(events.SessionFailed(brief, details))
        self.close("failed to start")


def _get_ready(to_push: bool) -> None:
    import vmsandbox.guest.ssh

    if to_push:
        import vmsandbox.session.project  # noqa: F401
        from vmsandbox.review.incoming import scan

        list(scan("README.md", "é".encode()))  # its lists are read and compiled: 0.1 s
        list(scan("a.py", "é".encode()))
