"""snapshot, snapshots, rollback: what a guest was, kept and brought back."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from vmsandbox.cli.complete import session_names, snapshot_tags
from vmsandbox.cli.options import JsonOption, NameArgument
from vmsandbox.cli.output import make_monitor, print_json, print_table

if TYPE_CHECKING:
    from vmsandbox.session.rewind.snapshots import SnapshotRow


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("snapshot")(snapshot)
    app.command("snapshots")(snapshots)
    app.command("rollback")(rollback)


def snapshot(
    name: NameArgument,
    tag: Annotated[str, typer.Argument(metavar="TAG", help="A name for it.")],
    json: JsonOption = False,
) -> int:
    """Keep what a running guest is now, memory and disk together. It stands still for a moment only."""
    from vmsandbox.session.rewind.snapshots import take_snapshot
    from vmsandbox.session.sandbox import Sandbox

    row = take_snapshot(Sandbox.attach(name, monitor=make_monitor()), tag)
    if json:
        print_json(asdict(row))
    else:
        print(
            f"vmsandbox: snapshot {tag}: {_mib(row.bytes)}, the guest stood still for {row.pause * 1000:.0f} ms",
            file=sys.stderr,
        )
    return 0


def snapshots(
    name: NameArgument,
    remove: Annotated[str | None, typer.Option("--remove", metavar="TAG", help="Delete one.")] = None,
    json: JsonOption = False,
) -> int:
    """List a session's snapshots as a tree: what each one was taken after, and what it takes on disk."""
    from vmsandbox.session.rewind.snapshots import remove_snapshot
    from vmsandbox.session.rewind.snapshots import snapshots as rows_of
    from vmsandbox.session.sandbox import Sandbox

    sandbox = Sandbox.attach(name, monitor=make_monitor())
    if remove is not None:
        freed = remove_snapshot(sandbox, remove)
        print(f"vmsandbox: snapshot {remove} is gone: {_mib(freed)} are free again", file=sys.stderr)
        return 0
    rows = rows_of(sandbox.folder)
    if json:
        print_json([asdict(row) for row in rows])
    elif rows:
        print_table(
            ["SNAPSHOT", "TAKEN", "SIZE", "PAUSE"],
            [[text, row.created, _mib(row.bytes), f"{row.pause * 1000:.0f} ms"] for text, row in _tree(rows)],
        )
    else:
        print("no snapshots", file=sys.stderr)
    return 0


def rollback(
    name: Annotated[str, typer.Argument(metavar="NAME", autocompletion=session_names)],
    tag: Annotated[
        str | None, typer.Argument(metavar="[TAG]", help="Default: its start.", autocompletion=snapshot_tags)
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Hash image, template and snapshot, and prove that nothing is left.")
    ] = False,
    json: JsonOption = False,
) -> int:
    """Bring a running session back to a snapshot, or to its start. Its connections end; names and keys stay."""
    from vmsandbox.process import Programs
    from vmsandbox.session.rewind.rollback import roll_back
    from vmsandbox.session.sandbox import Sandbox

    sandbox = Sandbox.attach(name, monitor=make_monitor())
    seconds = roll_back(sandbox, tag, Programs(), thoroughly=verify)
    if json:
        print_json({"name": name, "snapshot": tag or "start", "verified": verify, "seconds": round(seconds, 3)})
    return 0


def _tree(rows: list[SnapshotRow]) -> list[tuple[str, SnapshotRow]]:
    """Each row after the one that it was taken after, indented."""
    known = {row.tag for row in rows}
    out: list[tuple[str, SnapshotRow]] = []

    def add(parent: str | None, depth: int) -> None:
        for row in rows:
            if (row.parent if row.parent in known else None) == parent:
                out.append(("  " * depth + row.tag, row))
                add(row.tag, depth + 1)

    add(None, 0)
    return out


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.0f} MiB"
