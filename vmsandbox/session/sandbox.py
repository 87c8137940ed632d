"""One session from its claim to its end: the Python interface, and what every command of the terminal uses.

    with Sandbox.open(project=".") as sb:
        status = sb.run(["pytest"])

Order is safety here. A resource is written down (the session's folder) before it is made; whatever fails, `close`
runs every step of the teardown; and nothing of the guest is used before its identity is the session's own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from vmsandbox.hypervisor.connection import Host
from vmsandbox.journal import events
from vmsandbox.monitor import Monitor
from vmsandbox.paths import Layout
from vmsandbox.policy.values import Policy
from vmsandbox.process import Programs
from vmsandbox.session.asked.holding import effective_for, held
from vmsandbox.session.asked.request import SessionRequest
from vmsandbox.session.asked.sizes import needs_watcher
from vmsandbox.session.live.limits import ended_at_limit, limited
from vmsandbox.session.live.running import RunningSandbox
from vmsandbox.session.opening.plan import prepare
from vmsandbox.session.opening.starting import back_up, claim, get_ready, start_guest, write_opened
from vmsandbox.session.records.record import Record
from vmsandbox.session.records.unfinished import make_whole
from vmsandbox.session.resources.admitting import room_for
from vmsandbox.session.resources.baseline import keep_baseline
from vmsandbox.session.state.folder import SessionFolder
from vmsandbox.session.state.guestlock import guest_locked
from vmsandbox.session.transfer.enforced import enforced
from vmsandbox.session.upkeep.watching import start_watcher
from vmsandbox.spec import History

if TYPE_CHECKING:
    from vmsandbox.guest.ask import Question
    from vmsandbox.review.changes import Changes
    from vmsandbox.session.live.asking import Asking, Person
    from vmsandbox.session.transfer.collect import Collected
    from vmsandbox.session.transfer.commits import ReturnedCommits

_SNAPSHOT_SECONDS = 20.0  # that something is not copied in because a snapshot is being taken


class Sandbox(RunningSandbox):
    """A running session. Make one with `open`, reach one that runs with `attach`."""

    @classmethod
    def open(
        cls,
        project: str | Path | None = None,
        *,
        policy: Policy | str | Path | None = None,
        request: SessionRequest | None = None,
        layout: Layout | None = None,
        programs: Programs | None = None,
        monitor: Monitor | None = None,
    ) -> Sandbox:
        """Start a guest, and copy the project into it.

        Args:
            project: folder on the host; None starts an empty guest.
            policy: a policy, its file, or a ready-made one's name; None: the project's own, if it has one. It holds
                within the organisation's and the person's, as on the command line.
            request: all that can be asked for; `project` and `policy` override its fields.

        Raises:
            VmsandboxError: it says what failed; nothing is left then.
        """
        asked = request or SessionRequest()
        if project is not None:
            asked = replace(asked, project=Path(project).absolute())
        where = layout or Layout.from_environment()
        listener = monitor or Monitor()
        if not asked.held:
            named = Path(policy) if isinstance(policy, str) else policy
            asked = held(asked, named or (asked.policy if asked.policy != Policy() else None), listener)
        asked.check()
        # 0.3 s of imports, while libvirt and QEMU are at work. Not a daemon thread: the end of the process would
        # tear it out of compiled code, which aborts ("FATAL: exception not rethrown", status 134).
        threading.Thread(target=get_ready, args=(asked.project is not None,)).start()
        runner = programs or Programs()
        if asked.project is not None:
            make_whole(asked.project, listener)  # before it is copied in half old, half new
        host = Host.open()
        try:
            with room_for(asked, where, host, listener) as reserved_as, ExitStack() as origin:
                usual = prepare(asked, where, host, runner, listener)
                prepared = usual
                if asked.origin is not None:
                    from vmsandbox.session.rewind.origin import standing_on

                    prepared = origin.enter_context(standing_on(asked.origin, usual, where, runner))
                folder, info = claim(asked, prepared, where, reserved_as)
                after_start = origin.pop_all()
            sandbox = cls(where, folder, info, listener)
            try:
                with after_start:
                    write_opened(sandbox, asked.policy)
                    keep_baseline(folder, info)
                    backup = back_up(sandbox, asked, runner)
                    start_guest(sandbox, host, asked, prepared, runner)
                sandbox.project_is_open = asked.origin is None  # as its template was frozen
                if asked.origin is not None:
                    from vmsandbox.session.rewind.origin import adopt

                    adopt(sandbox, asked.origin, prepared)
                    with enforced(sandbox, asked.policy, asked.project, sandbox.info.guest_folder):
                        pass
                elif asked.project is not None:
                    sandbox.push(asked.project, asked.policy, runner, asked.history)
                else:
                    with enforced(sandbox, asked.policy, None, None):
                        pass
                if backup is not None:
                    backup.result()
                if sandbox.network is not None:
                    sandbox.network.wait_for_keeper()
                reserved = prepared.limits.memory_reserved_mib
                if needs_watcher(asked.policy.session, reserved):
                    start_watcher(sandbox.folder, sandbox.info, asked.policy.session, runner, reserved)
                if asked.snapshot:
                    from vmsandbox.session.rewind.snapshots import keep_start

                    keep_start(sandbox)
                if asked.keep:  # last: one that was killed before is this process's, and goes with it
                    sandbox.disown()
            except BaseException as error:
                sandbox.failed(error)
                raise
        finally:
            host.close()
        return sandbox

    @classmethod
    def attach(cls, name: str, *, layout: Layout | None = None, monitor: Monitor | None = None) -> Sandbox:
        """A session that runs already; a rollback of it that was broken off is finished first.

        Raises:
            UserInputError: there is none of this name. HostError: the guest that has to go cannot be ended.
        """
        where = layout or Layout.from_environment()
        folder = SessionFolder(where, name)
        if folder.is_between_guests:
            from vmsandbox.session.rewind.recovery import finish_rollback

            finish_rollback(folder)
        return cls(where, folder, folder.info(), monitor or Monitor())

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close("ended" if error is None else f"ended by {type(error).__name__}")

    def asking(self, person: Person | None = None) -> Asking:
        """A context in which the guest's questions about commands are answered (None: with no, and written down)."""
        from vmsandbox.session.live.asking import Asking

        return Asking(self.folder, self.journal, person)

    def run(
        self, command: Sequence[str], *, stdin: int | None = None, answer: Callable[[Question], bool] | None = None
    ) -> int:
        """Run a command with this process's stdout and stderr; returns its exit status.

        Args:
            answer: asked about each command that the policy wants confirmed; None: the answer is no.

        Raises:
            LimitReachedError: it wrote more than it may, or the session's time was up.
        """
        from vmsandbox.guest.streams import join_streams, write_all
        from vmsandbox.session.live.asking import answered_by

        began = time.monotonic()
        with limited(self) as meter, self.asking(answered_by(answer)) as asking:
            channel = self.start(command)
            with ended_at_limit(channel):
                out, err = meter.sink(write_all(1)), meter.sink(write_all(2))
                status = join_streams(channel, stdin, out, err, fed=meter.note, attention=asking)
        self.ended(status, time.monotonic() - began)
        return status

    def push(
        self,
        project: Path,
        policy: Policy | None = None,
        programs: Programs | None = None,
        history: History = History.NONE,
    ) -> None:
        """Copy a project into the guest, and give it a repository of its own (`transfer.project`, `transfer.history`).

        policy: the one that holds (`session.asked.holding`); None: as for `open`.
        """
        from vmsandbox.session.transfer.history import give_history
        from vmsandbox.session.transfer.project import guest_folder_for, push_project

        rules = policy if policy is not None else effective_for(project, None).policy
        runner = programs or Programs()
        Record(self.folder.record_folder(self.info.id)).keep_returns(rules.returns)
        with guest_locked(self.folder, shared=True, patience=_SNAPSHOT_SECONDS), ExitStack() as guard:
            if (now := self.current()).uuid != self.info.uuid:  # rolled back while this waited
                self.disconnect()
            self.info = now
            guard.enter_context(enforced(self, rules, project, guest_folder_for(project)))
            self.info = push_project(self, project, rules, runner, history.value)
            give_history(self, project, history.value, rules, runner)

    def changes(self) -> Changes:
        """What the guest's tree has that was not pushed, and the other way round."""
        from vmsandbox.review.changes import compare

        collected = self.collect()
        return compare(collected.pushed, collected.returned)

    def collect(self) -> Collected:
        """Fetch what changed into the record's quarantine (see `vmsandbox.session.transfer.collect`)."""
        from vmsandbox.session.transfer.collect import collect, refusal_text

        collected = collect(self)
        if collected.refused:
            self.monitor.warning(refusal_text(collected.refused))
        return collected

    def commits(self, project: Path) -> ReturnedCommits:
        """Take the guest's commits into the project's repository, below refs/vmsandbox (`session.transfer.commits`)."""
        from vmsandbox.session.transfer.commits import collect_commits

        landed = collect_commits(self, project, Programs())
        self.journal.append(events.CommitsReturned([branch.ref for branch in landed.branches], list(landed.skipped)))
        return landed
