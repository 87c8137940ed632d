"""ls, changes, logs: what is there, what changed, what happened."""

from __future__ import annotations

import json as json_module
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from vmsandbox.cli.guests import JsonOption, NameArgument
from vmsandbox.cli.output import make_monitor, print_json, print_table
from vmsandbox.errors import UserInputError, VmsandboxError
from vmsandbox.paths import Layout
from vmsandbox.review.text import shown
from vmsandbox.session.folder import SessionFolder, live_sessions

if TYPE_CHECKING:
    from vmsandbox.review.changes import Changes

MOST_LINES = 40  # of each sort of change, for people; --json has all


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("ls")(list_)
    app.command("changes")(changes)
    app.command("logs")(logs)


def list_(json: JsonOption = False) -> int:
    """List sessions. Orphans (their process or guest is gone) are for `gc`."""
    rows = [_row(folder) for folder in live_sessions(Layout.from_environment())]
    if json:
        print_json(rows)
    elif rows:
        columns = ("name", "state", "grade", "image", "created", "project")
        print_table(
            [column.upper() for column in columns], [[row[column] or "-" for column in columns] for row in rows]
        )
    else:
        print("no sessions", file=sys.stderr)
    return 0


def _row(folder: SessionFolder) -> dict[str, Any]:
    from vmsandbox.session.gc import guest_is_alive

    try:
        info = folder.info()
    except VmsandboxError as error:
        return {"name": folder.name, "state": "damaged", "grade": None, "image": None, "created": None,
                "project": None, "id": None, "problem": error.brief}  # fmt: skip
    alive = guest_is_alive(folder, info)
    if info.owner_pid > 0 and not info.owner_is_alive:
        state = "orphan"
    elif not info.ready:
        state = "starting" if info.owner_is_alive else "orphan"
    else:
        state = "running" if alive else "dead"
    return {
        "name": folder.name,
        "state": state,
        "grade": info.grade,
        "image": info.image,
        "created": info.created,
        "project": shown(info.project) if info.project else None,
        "id": info.id,
        "problem": None,
    }


def changes(name: NameArgument, json: JsonOption = False) -> int:
    """List what changed in the guest since the project was copied in."""
    from vmsandbox.session.sandbox import Sandbox

    sandbox = Sandbox.attach(name, monitor=make_monitor())
    try:
        found = sandbox.changes()
    finally:
        sandbox.disconnect()
    if json:
        print_json(found.as_json())
    else:
        print_changes(found, sys.stdout)
    return 0


def print_changes(found: Changes, stream: TextIO) -> None:
    """The change list for people. Every path is the guest's word and made visible before it is shown."""
    if found.is_empty:
        print("no changes", file=stream)
        return
    sections = (
        ("A", [shown(one.path) for one in found.added]),
        ("M", [shown(one.path) for one in found.modified]),
        ("D", [shown(one.path) for one in found.deleted]),
        ("R", [f"{shown(one.old)} → {shown(one.new)}" for one in found.renamed]),
        ("T", [f"{shown(one.path)} ({one.before.kind} → {one.after.kind})" for one in found.kind_changed]),
        ("X", [f"{shown(one.path)} ({one.before.mode:04o} → {one.after.mode:04o})" for one in found.mode_changed]),
    )
    for letter, lines in sections:
        for line in lines[:MOST_LINES]:
            print(f"{letter} {line}", file=stream)
        if len(lines) > MOST_LINES:
            print(f"{letter} … and {len(lines) - MOST_LINES} more (--json has all)", file=stream)
    counts = ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in found.counts.items() if count)
    print(f"{counts} — nothing was brought back", file=stream)


def logs(
    name: NameArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more.")] = False,
    withheld: Annotated[bool, typer.Option("--withheld", help="What stayed on the host, and why.")] = False,
    json: JsonOption = False,
) -> int:
    """Show a session's events, checked against their chain. NAME may also be the id of an ended session."""
    layout = Layout.from_environment()
    record = find_record(layout, name)
    if withheld:
        return _show_withheld(record, json)
    shown_until = 0
    while True:
        records = _records(record)
        for entry in records[shown_until:]:
            print(json_module.dumps(entry) if json else _event_line(entry), flush=True)
        shown_until = len(records)
        if not follow or any(entry["kind"] == "session.closed" for entry in records):
            return 0
        time.sleep(0.3)


def find_record(layout: Layout, name: str) -> Path:
    """The record folder of a live session, of a session id, or of the newest session that had this name.

    Raises UserInputError if there is none.
    """
    try:
        return layout.records / SessionFolder(layout, name).info().id
    except VmsandboxError:
        pass
    ended = sorted(layout.records.glob("*")) if layout.records.is_dir() else []
    matching = [path for path in ended if name in (path.name, path.name[16:-7])]
    if not matching:
        raise UserInputError(
            f"no session was ever called {shown(name)!r} here", resolution=f"look into {layout.records}"
        )
    return matching[-1]


def _records(record: Path) -> list[dict[str, Any]]:
    from vmsandbox.journal.chain import verified_records

    path = record / "events.jsonl"
    return list(verified_records(path)) if path.exists() else []


def _event_line(entry: dict[str, Any]) -> str:
    data = " ".join(f"{key}={shown(json_module.dumps(value))}" for key, value in sorted(entry["data"].items()))
    return f"{entry['time'][:23]}Z  {entry['kind']:<18}  {data}"


def _show_withheld(record: Path, json: bool) -> int:
    path = record / "withheld.json"
    rows = json_module.loads(path.read_text()) if path.exists() else []
    if json:
        print_json(rows)
    else:
        print_table(
            ["PATH", "REASON", "DETAIL"],
            [
                [shown(row["path"]) + ("/" if row["folder"] else ""), row["reason"], shown(row["detail"])]
                for row in rows
            ],
        )
    return 0
