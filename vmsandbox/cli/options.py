"""The options and arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vmsandbox.cli.complete import session_names
from vmsandbox.spec import Accept, History, NetworkMode

ProjectArgument = Annotated[
    Path, typer.Argument(metavar="[PATH]", help="Project to copy in.", show_default="this folder")
]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The session.", autocompletion=session_names)]
NameOption = Annotated[str | None, typer.Option("--name", "-n", help="Name of the session (default: made up).")]
PolicyOption = Annotated[
    Path | None,
    typer.Option(
        "--policy",
        help="Policy file, or the name of a ready-made one.",
        show_default=".claude/sandbox.yaml or .vmsandbox.yaml of the project",
    ),
]
ImageOption = Annotated[
    str | None,
    typer.Option("--image", help="Image to boot; built on first use.", show_default="the policy's image, else base"),
]
NetOption = Annotated[
    NetworkMode | None,
    typer.Option(
        "--net",
        help="none: nothing; proxy: the policy's hosts, without a card; filtered: the same through one.",
        show_default="the policy's network.mode, else none",
    ),
]
LearnOption = Annotated[
    bool, typer.Option("--learn", help="Let through what no rule allows, and propose the rules for it.")
]
AcceptOption = Annotated[
    Accept | None,
    typer.Option("--accept", help="What comes back without a person.", show_default="asks in a terminal, else nothing"),
]
HistoryOption = Annotated[
    History, typer.Option("--history", help="What of git's history the guest's own repository gets.")
]
CommitsOption = Annotated[
    bool, typer.Option("--commits", help="Take the guest's commits too, as refs/vmsandbox/SESSION/BRANCH.")
]
BackupOption = Annotated[
    bool, typer.Option("--backup/--no-backup", help="Keep the project as it is now (see `restore`).")
]
EmulationOption = Annotated[
    bool, typer.Option("--allow-emulation", help="Go on without KVM. Emulation is NOT a security boundary.")
]
EmptyOption = Annotated[bool, typer.Option("--empty", help="Copy nothing in.")]
MemoryOption = Annotated[
    int | None,
    typer.Option("--memory", metavar="MIB", help="The guest's memory.", show_default="the policy's, else 512"),
]
VcpusOption = Annotated[
    int | None,
    typer.Option("--vcpus", metavar="N", help="The guest's processors.", show_default="the policy's, else 2"),
]
PortsOption = Annotated[int, typer.Option("--ssh-ports", metavar="N", help="SSH connections at once.")]
WaitOption = Annotated[
    str,
    typer.Option(
        "--wait",
        metavar="[=SECONDS]",
        help="Queue where the host has no room for another guest now: --wait for ever, --wait=60 for 60 s.",
        show_default="refuses",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="A JSON document on stdout.")]
