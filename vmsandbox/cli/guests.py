"""start, exec, shell, push, stop: guests that stay, work in them, and their end."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vmsandbox.cli.complete import session_names
from vmsandbox.cli.options import (
    BackupOption,
    EmptyOption,
    EmulationOption,
    HistoryOption,
    ImageOption,
    JsonOption,
    LearnOption,
    MemoryOption,
    NameArgument,
    NameOption,
    NetOption,
    PolicyOption,
    PortsOption,
    ProjectArgument,
    VcpusOption,
    WaitOption,
)
from vmsandbox.cli.output import (
    PlainMonitor,
    guest_command,
    guest_output,
    make_monitor,
    patience,
    print_json,
    tell_differences,
)
from vmsandbox.errors import HostError, UserInputError, VmsandboxError
from vmsandbox.monitor import Monitor
from vmsandbox.paths import Layout
from vmsandbox.session.asked.request import SessionRequest
from vmsandbox.spec import History, NetworkMode

if TYPE_CHECKING:
    from vmsandbox.session.live.asking import Asking, Person
    from vmsandbox.session.live.limits import Meter
    from vmsandbox.session.sandbox import Sandbox


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("start")(start)
    app.command("exec", context_settings={"ignore_unknown_options": True})(exec_)
    app.command("shell")(shell)
    app.command("push")(push)
    app.command("stop")(stop)


def start(
    path: ProjectArgument = Path(),
    name: NameOption = None,
    policy: PolicyOption = None,
    image: ImageOption = None,
    net: NetOption = None,
    learn: LearnOption = False,
    history: HistoryOption = History.NONE,
    backup: BackupOption = True,
    allow_emulation: EmulationOption = False,
    empty: EmptyOption = False,
    memory: MemoryOption = None,
    vcpus: VcpusOption = None,
    ssh_ports: PortsOption = 6,
    origin: Annotated[
        str | None, typer.Option("--from", metavar="NAME:TAG", help="Begin as this snapshot of another session.")
    ] = None,
    snapshot: Annotated[bool, typer.Option(help="Keep its start, so that it can be rolled back to it.")] = True,
    wait: WaitOption = "",
    json: JsonOption = False,
) -> int:
    """Start a guest with a project in it and leave it running, until `stop`."""
    if origin is not None:
        _refuse_beside_origin(image, memory, vcpus, ssh_ports, history, empty)
        request = _forked(origin, path, name, net, learn, allow_emulation, wait)
    else:
        request = SessionRequest(
            project=None if empty else path, name=name, image=image, network=net, learn=learn, history=history,
            backup=backup, allow_emulation=allow_emulation, keep=True, memory_mib=memory, vcpus=vcpus,
            ssh_ports=ssh_ports, wait=patience(wait),
        )  # fmt: skip
    sandbox = open_guest(replace(request, snapshot=snapshot), policy)
    sandbox.disconnect()
    if json:
        info = sandbox.info
        print_json({"name": info.name, "id": info.id, "grade": info.grade, "network": info.network})
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


def push(
    name: NameArgument,
    path: ProjectArgument = Path(),
    policy: PolicyOption = None,
    history: HistoryOption = History.NONE,
) -> int:
    """Copy a project into a running guest (again): what was in its folder there, and not accepted, is lost."""
    from vmsandbox.session.asked.holding import effective_for
    from vmsandbox.session.sandbox import Sandbox

    monitor = make_monitor()
    sandbox = Sandbox.attach(name, monitor=monitor)
    try:
        sandbox.push(path.absolute(), effective_for(path, policy).policy, history=history)
    finally:
        sandbox.disconnect()
    return 0


def stop(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME…", autocompletion=session_names)] = None,
    everything: Annotated[bool, typer.Option("--all", help="Stop every session.")] = False,
) -> int:
    """End guests and remove everything of them but their records: what `changes` has not fetched is lost."""
    from vmsandbox.session.live.teardown import remove_damaged
    from vmsandbox.session.sandbox import Sandbox
    from vmsandbox.session.state.folder import SessionFolder, live_sessions

    layout = Layout.from_environment()
    chosen = [folder.name for folder in live_sessions(layout)] if everything else names or []
    if not chosen and not everything:
        raise UserInputError("which session?", resolution="vmsandbox stop NAME, or --all; `vmsandbox ls` lists them")
    problems: list[str] = []
    unknown: list[str] = []
    for one in chosen:
        try:
            if SessionFolder(layout, one).is_without_record:
                left = remove_damaged(layout, one)
            else:
                sandbox = Sandbox.attach(one, layout=layout)
                left = sandbox.close("stopped")
                tell_differences(sandbox.differs)
        except UserInputError as error:
            if not everything:  # else it has ended by itself since it was listed
                unknown.append(error.brief)  # the others are stopped all the same
            continue
        except HostError:
            left = remove_damaged(layout, one)
        problems += [f"{one}: {item}" for item in left]
    if problems:
        details = "\n".join([*problems, *unknown])
        raise VmsandboxError("not everything could be removed", details=details, resolution="run `vmsandbox gc`")
    if unknown:
        raise UserInputError("; ".join(unknown), resolution="`vmsandbox ls` shows those that run")
    return 0


def _refuse_beside_origin(
    image: str | None, memory: int | None, vcpus: int | None, ssh_ports: int, history: History, empty: bool
) -> None:
    asked = {"--image": image, "--memory": memory, "--vcpus": vcpus, "--empty": empty}
    words = [word for word, value in asked.items() if value]
    words += ["--ssh-ports"] * (ssh_ports != 6) + ["--history"] * (history is not History.NONE)
    if words:
        raise UserInputError(
            f"a session that begins as a snapshot has what that one had: {', '.join(words)} cannot be chosen",
            resolution=f"omit {' '.join(words)}, or start one without --from",
        )


def _forked(
    text: str,
    path: Path,
    name: str | None,
    net: NetworkMode | None,
    learn: bool,
    emulation: bool,
    wait: str,
) -> SessionRequest:
    """What a session asks for that begins as another's snapshot: all that it was, but for its name and network."""
    from vmsandbox.session.rewind.origin import origin_of
    from vmsandbox.session.state.folder import SessionFolder

    source = origin_of(text)
    info = SessionFolder(Layout.from_environment(), source.name).info()
    project = path if path != Path() else Path(info.project) if info.project else None
    return SessionRequest(
        project=project, name=name, image=info.image, network=net or NetworkMode(info.network), learn=learn,
        backup=False, allow_emulation=emulation, keep=True, memory_mib=info.memory_mib, vcpus=info.vcpus,
        ssh_ports=info.ssh_ports, origin=source, wait=patience(wait),
    )  # fmt: skip


def open_guest(request: SessionRequest, policy: Path | None) -> Sandbox:
    """Start a guest with the project and its policy."""
    from vmsandbox.session.sandbox import Sandbox

    request, monitor = with_policy(request, policy)
    return Sandbox.open(request.project, request=request, monitor=monitor)


def with_policy(request: SessionRequest, policy: Path | None) -> tuple[SessionRequest, Monitor]:
    """The request under all policies that hold; what a person should know of them is told."""
    from vmsandbox.session.asked.holding import held

    monitor = make_monitor()
    return held(request, policy, monitor), monitor


def _attached(name: str, command: list[str] | None) -> int:
    from vmsandbox.session.sandbox import Sandbox

    sandbox = Sandbox.attach(name, monitor=PlainMonitor())  # a command's own: no bars, and nothing to import for them
    try:
        return run_in(sandbox, command)
    finally:
        sandbox.disconnect()


def run_in(sandbox: Sandbox, command: list[str] | None, stdout: int = 1) -> int:
    """Run a command, or a shell if there is none; a shell on a terminal gets a terminal.

    Raises:
        LimitReachedError: it wrote more than it may, or the session was ended by a limit meanwhile.
    """
    from vmsandbox.session.live.limits import LimitReachedError, limited

    began = time.monotonic()
    try:
        with limited(sandbox) as meter, sandbox.asking(_person(sandbox.name)) as asking:
            if command is None and os.isatty(0) and os.isatty(1):
                from vmsandbox.guest.terminal import run_terminal, terminal_size

                channel = sandbox.start(None, terminal=terminal_size())
                with _ending(channel):
                    status = run_terminal(channel, meter.sink, meter.note, asking)
            else:
                channel = sandbox.start(command)
                with _ending(channel):
                    status = _join(channel, meter, stdout, asking)
    except LimitReachedError as limit:
        sandbox.ended(limit.exit_code, time.monotonic() - began)
        raise
    sandbox.ended(status, time.monotonic() - began)
    return status


def _person(name: str) -> Person | None:
    """Who is asked about commands, if somebody sits there."""
    from vmsandbox.cli.asking import has_person, person

    return person(name) if has_person() else None


@contextmanager
def _ending(channel: Any) -> Iterator[None]:
    """Ctrl-C goes to the command, too; one that has met its limit is killed; and no channel stays open."""
    from vmsandbox.guest.ssh import send_signal
    from vmsandbox.session.live.limits import ended_at_limit

    try:
        with ended_at_limit(channel):
            yield
    except KeyboardInterrupt:
        send_signal(channel, "INT")
        raise
    finally:
        channel.close()


def _join(channel: Any, meter: Meter, stdout: int, asking: Asking) -> int:
    from vmsandbox.guest.streams import join_streams

    out, err = meter.sink(guest_output(stdout)), meter.sink(guest_output(2))
    return join_streams(channel, _stdin(), out, err, fed=meter.note, attention=asking)


def _stdin() -> int | None:
    try:
        return sys.stdin.fileno()
    except (AttributeError, ValueError, io.UnsupportedOperation):
        return None  # closed
