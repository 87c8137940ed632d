"""session, start, exec, shell, push, stop: what makes guests, works in them and ends them."""

from __future__ import annotations

import io
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vmsandbox.cli.complete import session_names
from vmsandbox.cli.output import guest_command, guest_output, make_monitor, print_json
from vmsandbox.errors import HostError, UserInputError, VmsandboxError
from vmsandbox.monitor import Monitor
from vmsandbox.paths import Layout
from vmsandbox.session.folder import SessionFolder
from vmsandbox.session.plan import SessionRequest
from vmsandbox.spec import Accept, NetworkMode

if TYPE_CHECKING:
    from vmsandbox.policy.values import Policy
    from vmsandbox.review.changes import Changes
    from vmsandbox.session.sandbox import Sandbox

ProjectArgument = Annotated[
    Path, typer.Argument(metavar="[PATH]", help="Project to copy in.", show_default="this folder")
]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The session.", autocompletion=session_names)]
NameOption = Annotated[str | None, typer.Option("--name", "-n", help="Name of the session (default: made up).")]
PolicyOption = Annotated[
    Path | None,
    typer.Option(
        "--policy", help="Policy file.", show_default=".claude/sandbox.yaml or .vmsandbox.yaml of the project"
    ),
]
ImageOption = Annotated[str, typer.Option("--image", help="Image to boot; built on first use.")]
NetOption = Annotated[NetworkMode, typer.Option("--net", help="What the guest may reach.")]
AcceptOption = Annotated[Accept, typer.Option("--accept", help="What may come back without a person.")]
EmulationOption = Annotated[
    bool, typer.Option("--allow-emulation", help="Go on without KVM. Emulation is NOT a security boundary.")
]
EmptyOption = Annotated[bool, typer.Option("--empty", help="Copy nothing in.")]
MemoryOption = Annotated[int, typer.Option("--memory", metavar="MIB", help="The guest's memory.")]
VcpusOption = Annotated[int, typer.Option("--vcpus", metavar="N", help="The guest's processors.")]
PortsOption = Annotated[int, typer.Option("--ssh-ports", metavar="N", help="SSH connections at once.")]
JsonOption = Annotated[bool, typer.Option("--json", help="A JSON document on stdout.")]


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("session")(session)
    app.command("start")(start)
    app.command("exec", context_settings={"ignore_unknown_options": True})(exec_)
    app.command("shell")(shell)
    app.command("push")(push)
    app.command("stop")(stop)


def session(
    path: ProjectArgument = Path(),
    name: NameOption = None,
    policy: PolicyOption = None,
    image: ImageOption = "base",
    net: NetOption = NetworkMode.NONE,
    accept: AcceptOption = Accept.NONE,
    allow_emulation: EmulationOption = False,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the guest running afterwards.")] = False,
    empty: EmptyOption = False,
    memory: MemoryOption = 512,
    vcpus: VcpusOption = 2,
    ssh_ports: PortsOption = 6,
    json: JsonOption = False,
) -> int:
    """Copy a project into a fresh guest, run COMMAND (or a shell) there, show what changed, throw the guest away.

    vmsandbox session [PATH] [OPTIONS] [-- COMMAND …]
    """
    request = SessionRequest(
        project=None if empty else path, name=name, image=image, network=net, accept=accept,
        allow_emulation=allow_emulation, keep=keep, memory_mib=memory, vcpus=vcpus, ssh_ports=ssh_ports,
    )  # fmt: skip
    sandbox = _open(request, policy)
    command = guest_command()
    changes: Changes | None = None
    try:
        status = _run(sandbox, command, stdout=2 if json else 1)
        if sandbox.info.guest_folder:
            changes = sandbox.changes()
    except BaseException as error:
        if not keep:
            sandbox.close(f"ended by {type(error).__name__}")
        raise
    if keep:
        sandbox.disconnect()
    left = [] if keep else sandbox.close()
    if json:
        print_json(_session_report(sandbox, status, changes, left))
    else:
        _tell_end(sandbox, changes, left, keep)
    return status


def start(
    path: ProjectArgument = Path(),
    name: NameOption = None,
    policy: PolicyOption = None,
    image: ImageOption = "base",
    net: NetOption = NetworkMode.NONE,
    allow_emulation: EmulationOption = False,
    empty: EmptyOption = False,
    memory: MemoryOption = 512,
    vcpus: VcpusOption = 2,
    ssh_ports: PortsOption = 6,
    json: JsonOption = False,
) -> int:
    """Start a guest with a project in it and leave it running, until `stop`."""
    request = SessionRequest(
        project=None if empty else path, name=name, image=image, network=net, allow_emulation=allow_emulation,
        keep=True, memory_mib=memory, vcpus=vcpus, ssh_ports=ssh_ports,
    )  # fmt: skip
    sandbox = _open(request, policy)
    sandbox.disconnect()
    if json:
        print_json({"name": sandbox.name, "id": sandbox.info.id, "grade": sandbox.info.grade})
    else:
        print(sandbox.name)
    return 0


def exec_(
    name: NameArgument,
    command: Annotated[list[str] | None, typer.Argument(metavar="-- COMMAND …")] = None,
) -> int:
    """Run a command in a running guest: its streams and its exit status are the command's own."""
    words = (command or []) + (guest_command() or [])
    if not words:
        raise UserInputError("which command?", resolution=f"vmsandbox exec {name} -- COMMAND …")
    return _attached(name, words)


def shell(name: NameArgument) -> int:
    """Open a shell in a running guest."""
    return _attached(name, None)


def push(name: NameArgument, path: ProjectArgument = Path(), policy: PolicyOption = None) -> int:
    """Copy a project into a running guest (again): what was in its folder there is replaced."""
    from vmsandbox.session.sandbox import Sandbox

    monitor = make_monitor()
    sandbox = Sandbox.attach(name, monitor=monitor)
    try:
        sandbox.push(path.absolute(), _policy(path, policy, monitor))
    finally:
        sandbox.disconnect()
    return 0


def stop(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME…", autocompletion=session_names)] = None,
    everything: Annotated[bool, typer.Option("--all", help="Stop every session.")] = False,
) -> int:
    """End guests and remove everything of them but their records."""
    from vmsandbox.session.folder import live_sessions
    from vmsandbox.session.sandbox import Sandbox
    from vmsandbox.session.teardown import remove_damaged

    layout = Layout.from_environment()
    chosen = [folder.name for folder in live_sessions(layout)] if everything else names or []
    if not chosen and not everything:
        raise UserInputError("which session?", resolution="vmsandbox stop NAME, or --all; `vmsandbox ls` lists them")
    problems = []
    for one in chosen:
        try:
            left = Sandbox.attach(one, layout=layout).close("stopped")
        except HostError:
            left = remove_damaged(layout, one)
        problems += [f"{one}: {item}" for item in left]
    if problems:
        raise VmsandboxError(
            "not everything could be removed", details="\n".join(problems), resolution="run `vmsandbox gc`"
        )
    return 0


def _open(request: SessionRequest, policy: Path | None) -> Sandbox:
    from vmsandbox.session.sandbox import Sandbox

    monitor = make_monitor()
    if request.project is not None:
        request = replace(request, policy=_policy(request.project, policy, monitor))
    return Sandbox.open(request.project, request=request, monitor=monitor)


def _policy(project: Path, chosen: Path | None, monitor: Monitor) -> Policy:
    from vmsandbox.policy.load import find_policy, load_policy
    from vmsandbox.policy.values import Policy, unenforced

    path = chosen or (find_policy(project) if project.is_dir() else None)
    if path is None:
        return Policy()
    policy = load_policy(path)
    for text in unenforced(policy):
        monitor.notice(text)
    return policy


def _attached(name: str, command: list[str] | None) -> int:
    from vmsandbox.session.sandbox import Sandbox

    sandbox = Sandbox.attach(name)
    try:
        return _run(sandbox, command)
    finally:
        sandbox.disconnect()


def _run(sandbox: Sandbox, command: list[str] | None, stdout: int = 1) -> int:
    """Run a command, or a shell if there is none; a shell on a terminal gets a terminal."""
    began = time.monotonic()
    if command is None and os.isatty(0) and os.isatty(1):
        from vmsandbox.guest.terminal import run_terminal, terminal_size

        status = run_terminal(sandbox.start(None, terminal=terminal_size()))
    else:
        channel = sandbox.start(command)
        status = _join(channel, stdout)
    sandbox.ended(status, time.monotonic() - began)
    return status


def _join(channel: Any, stdout: int) -> int:
    from vmsandbox.guest.ssh import send_signal
    from vmsandbox.guest.streams import join_streams

    try:
        return join_streams(channel, _stdin(), guest_output(stdout), guest_output(2))
    except KeyboardInterrupt:
        send_signal(channel, "INT")
        raise
    finally:
        channel.close()


def _stdin() -> int | None:
    try:
        return sys.stdin.fileno()
    except (AttributeError, ValueError, io.UnsupportedOperation):
        return None  # closed


def _session_report(sandbox: Sandbox, status: int, changes: Changes | None, left: list[str]) -> dict[str, object]:
    return {
        "name": sandbox.name,
        "id": sandbox.info.id,
        "status": status,
        "grade": sandbox.info.grade,
        "image": {"name": sandbox.info.image, "digest": sandbox.info.image_digest},
        "changes": changes.as_json() if changes else None,
        "record": str(SessionFolder(sandbox.layout, sandbox.name).record_folder(sandbox.info.id)),
        "leftovers": left,
    }


def _tell_end(sandbox: Sandbox, changes: Changes | None, left: list[str], keep: bool) -> None:
    from vmsandbox.cli.looking import print_changes

    if changes is not None:
        print_changes(changes, sys.stderr)
    where = f"record: {sandbox.info.id}"
    if keep:
        end = f"{sandbox.name} goes on: `vmsandbox shell {sandbox.name}`, `vmsandbox stop {sandbox.name}`"
    else:
        end = f"the guest is gone, isolation grade was '{sandbox.info.grade}'"
    print(f"vmsandbox: {end}  ({where})", file=sys.stderr)
    for item in left:
        print(f"vmsandbox: WARNING: not removed: {item} (`vmsandbox gc` tries again)", file=sys.stderr)
