"""freeze and thaw: a guest whose processors stand still, and go on."""

from __future__ import annotations

from typing import Annotated

import typer

from vmsandbox.cli.options import NameArgument
from vmsandbox.paths import Layout
from vmsandbox.session.state.folder import SessionFolder


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("freeze")(freeze)
    app.command("thaw")(thaw)


def freeze(
    name: NameArgument, reason: Annotated[str, typer.Option("--reason", help="Written into the journal.")] = ""
) -> int:
    """Stop a guest's processors; nothing of it is lost. `thaw` lets it go on."""
    from vmsandbox.session.upkeep.freezing import freeze_guest

    folder = SessionFolder(Layout.from_environment(), name)
    freeze_guest(folder, folder.info(), by="person", reason=reason)
    return 0


def thaw(name: NameArgument) -> int:
    """Let a frozen guest go on."""
    from vmsandbox.session.upkeep.freezing import thaw_guest

    folder = SessionFolder(Layout.from_environment(), name)
    thaw_guest(folder, folder.info())
    return 0
