"""session: one guest from its start to what comes back of it."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vmsandbox.cli.guests import open_guest, run_in, with_policy
from vmsandbox.cli.options import (
    AcceptOption,
    BackupOption,
    CommitsOption,
    EmptyOption,
    EmulationOption,
    HistoryOption,
    ImageOption,
    JsonOption,
    LearnOption,
    MemoryOption,
    NameOption,
    NetOption,
    PolicyOption,
    PortsOption,
    ProjectArgument,
    VcpusOption,
    WaitOption,
)
from vmsandbox.cli.output import guest_command, patience, print_json, tell_differences
from vmsandbox.cli.showing import as_json, print_review, tell_applied, tell_commits
from vmsandbox.errors import UserInputError, VmsandboxError
from vmsandbox.paths import Layout
from vmsandbox.process import Programs
from vmsandbox.session.asked.request import SessionRequest
from vmsandbox.session.live.limits import LimitReachedError
from vmsandbox.session.state.folder import SessionFolder
from vmsandbox.spec import Accept, History, NetworkMode

if TYPE_CHECKING:
    from vmsandbox.session.sandbox import Sandbox
    from vmsandbox.session.transfer.commits import ReturnedCommits


def register(app: typer.Typer) -> None:
    """Add this module's command."""
    app.command("session")(session)


def session(
    path: ProjectArgument = Path(),
    name: NameOption = None,
    policy: PolicyOption = None,
    image: ImageOption = None,
    net: NetOption = None,
    learn: LearnOption = False,
    accept: AcceptOption = None,
    commits: CommitsOption = False,
    history: HistoryOption = History.NONE,
    backup: BackupOption = True,
    allow_emulation: EmulationOption = False,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the guest running afterwards.")] = False,
    rollback: Annotated[
        bool,
        typer.Option(
            "--rollback", help="Use the guest --name (started if there is none), and roll it back afterwards."
        ),
    ] = False,
    empty: EmptyOption = False,
    memory: MemoryOption = None,
    vcpus: VcpusOption = None,
    ssh_ports: PortsOption = 6,
    wait: WaitOption = "",
    json: JsonOption = False,
) -> int:
    """Copy a project into a fresh guest, run COMMAND (or a shell) there, show what changed, throw the guest away.

    vmsandbox session [PATH] [OPTIONS] [-- COMMAND …]
    """
    request = SessionRequest(
        project=None if empty else path, name=name, image=image, network=net, learn=learn, history=history,
        accept=accept, backup=backup, allow_emulation=allow_emulation, keep=keep or rollback, snapshot=rollback,
        memory_mib=memory, vcpus=vcpus, ssh_ports=ssh_ports, wait=patience(wait),
    )  # fmt: skip
    keep = request.keep
    with ExitStack() as alone:
        sandbox = _standing(request, policy, alone) if rollback else open_guest(request, policy)
        reached: LimitReachedError | None = None
        try:
            status = run_in(sandbox, guest_command(), stdout=2 if json else 1)
        except LimitReachedError as limit:
            status, reached = limit.exit_code, limit
        except BaseException as error:
            if not keep:
                sandbox.close(f"ended by {type(error).__name__}")
            raise
        if not keep:
            reached = _stop_watching(sandbox) or reached
        if reached is not None:
            print(f"vmsandbox: {reached.brief} ({reached.details})", file=sys.stderr)
        over = reached is not None and reached.ends_session  # what changed was fetched already, if it could be
        pushed = sandbox.info.guest_folder is not None
        landed: ReturnedCommits | None = None
        if pushed and not over:
            landed = _collect(sandbox, path if commits else None, keep)
        if keep:
            sandbox.disconnect()
        if rollback and not over:
            _roll_back(sandbox)
        left = [] if keep else sandbox.close(f"ended by its limit: {reached.limit}" if over and reached else "ended")
        pushed = pushed and (not over or (sandbox.folder.record_folder(sandbox.info.id) / "quarantine").is_dir())
        network = _network(sandbox, learn, json)
        # The guest is gone before anybody is asked about what it left.
        try:
            outcome = _bring_back(sandbox, accept, json) if pushed else None
        except VmsandboxError as error:
            _advise(error, f"what came back waits in quarantine: `vmsandbox accept {sandbox.info.id}`")
            raise
        if json:
            print_json(_session_report(sandbox, status, outcome, landed, left, network))
        else:
            if landed is not None:
                tell_commits(landed, sys.stderr)
            _tell_end(sandbox, left, keep and not over)
        return status


def _standing(request: SessionRequest, policy: Path | None, alone: ExitStack) -> Sandbox:
    """The guest that stays: as it was at its start, with the project as it is now. alone: keeps it ours for so long."""
    if request.name is None:
        raise UserInputError("--rollback needs the name of the guest that stays", resolution="add --name NAME")
    request, monitor = with_policy(request, policy)
    from vmsandbox.session.standing import alone_in, standing_guest

    if (found := standing_guest(request, Layout.from_environment(), Programs(), monitor, alone)) is not None:
        return found
    from vmsandbox.session.sandbox import Sandbox

    sandbox = Sandbox.open(request.project, request=request, monitor=monitor)
    alone.enter_context(alone_in(sandbox.folder, patience=5))
    return sandbox


def _roll_back(sandbox: Sandbox) -> None:
    from vmsandbox.session.rewind.rollback import roll_back

    roll_back(sandbox, None, Programs())


def _stop_watching(sandbox: Sandbox) -> LimitReachedError | None:
    """The command has ended: no limit ends the session any more. One that did just now is returned."""
    from vmsandbox.session.live.limits import ended_by_limit
    from vmsandbox.session.upkeep.watching import end_watcher, is_watched

    if not is_watched(sandbox.folder):
        return None
    end_watcher(sandbox.folder, finish=True)
    return ended_by_limit(sandbox.folder, sandbox.info)


def _network(sandbox: Sandbox, learn: bool, json: bool) -> dict[str, object] | None:
    """Tell what the guest did with its network; for `--json`, return it."""
    if sandbox.info.network == NetworkMode.NONE:
        return None
    from vmsandbox.cli.egress import network_report, tell_network

    record = sandbox.folder.record_folder(sandbox.info.id)
    if json:
        return network_report(record, sandbox.info.network, learn)
    tell_network(record, learn)
    return None


def _collect(sandbox: Sandbox, commits_into: Path | None, keep: bool) -> ReturnedCommits | None:
    """Fetch what changed. If that fails, the guest goes on: its work is nowhere else."""
    try:
        sandbox.collect()
        return sandbox.commits(commits_into) if commits_into else None
    except VmsandboxError as error:
        sandbox.keep()
        sandbox.disconnect()
        name = sandbox.name
        _advise(error, f"the guest goes on: `vmsandbox changes {name}` tries again, `vmsandbox stop {name}` ends it")
        raise
    except BaseException as error:
        if not keep:
            sandbox.close(f"ended by {type(error).__name__}")
        raise


def _advise(error: VmsandboxError, more: str) -> None:
    error.resolution = "\n".join(filter(None, (error.resolution, more)))


def _bring_back(sandbox: Sandbox, accept: Accept | None, json: bool) -> dict[str, object]:
    """Review what lies in quarantine, take what was asked for; returns it for `--json`."""
    from vmsandbox.cli.returning import PERSON, choose, take
    from vmsandbox.session.acceptance import review_with_commands
    from vmsandbox.session.records.record import find_record

    returned = review_with_commands(find_record(sandbox.layout, sandbox.info.id), sandbox.layout, sandbox.monitor)
    if not json:
        print_review(returned.review, sys.stderr)
    applied = None
    if returned.review.changes and not (json and accept is None):
        selection, by = choose(returned, accept)
        applied = take(returned, selection, by, by == PERSON) if selection else None
    if returned.review.changes and not json:
        tell_applied(returned, applied, sys.stderr)
        if applied is None:
            print(f"vmsandbox: it waits in quarantine: `vmsandbox accept {sandbox.info.id}`", file=sys.stderr)
    return {"changes": as_json(returned), "applied": list(applied.paths) if applied else []}


def _session_report(
    sandbox: Sandbox,
    status: int,
    outcome: dict[str, object] | None,
    landed: ReturnedCommits | None,
    left: list[str],
    network: dict[str, object] | None,
) -> dict[str, object]:
    return {
        "name": sandbox.name,
        "id": sandbox.info.id,
        "status": status,
        "grade": sandbox.info.grade,
        "image": {"name": sandbox.info.image, "digest": sandbox.info.image_digest},
        **(outcome or {"changes": None, "applied": []}),
        "commits": landed.as_json() if landed else None,
        "network": network,
        "record": str(SessionFolder(sandbox.layout, sandbox.name).record_folder(sandbox.info.id)),
        "leftovers": left,
        "differs": list(sandbox.differs),
    }


def _tell_end(sandbox: Sandbox, left: list[str], keep: bool) -> None:
    where = f"record: {sandbox.info.id}"
    if keep:
        end = f"{sandbox.name} goes on: `vmsandbox shell {sandbox.name}`, `vmsandbox stop {sandbox.name}`"
    else:
        end = f"the guest is gone, isolation grade was '{sandbox.info.grade}'"
    print(f"vmsandbox: {end}  ({where})", file=sys.stderr)
    tell_differences(sandbox.differs)
    for item in left:
        print(f"vmsandbox: WARNING: not removed: {item} (`vmsandbox gc` tries again)", file=sys.stderr)
