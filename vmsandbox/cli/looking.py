"""ls, logs: what is there, what happened."""

from __future__ import annotations

import json as json_module
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from vmsandbox.cli.options import JsonOption, NameArgument
from vmsandbox.cli.output import print_json, print_table
from vmsandbox.errors import VmsandboxError
from vmsandbox.paths import Layout
from vmsandbox.review.text import shown
from vmsandbox.session.state.folder import SessionFolder, live_sessions


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("ls")(list_)
    app.command("logs")(logs)


def list_(json: JsonOption = False) -> int:
    """List sessions. Orphans (their process or guest is gone) are for `gc`."""
    layout = Layout.from_environment()
    rows = [_row(folder) for folder in live_sessions(layout)]
    rows += _orphan_rows(layout)
    if json:
        print_json(rows)
    elif rows:
        columns = ("name", "state", "health", "grade", "network", "image", "created", "project")
        print_table(
            [column.upper() for column in columns], [[row[column] or "-" for column in columns] for row in rows]
        )
    else:
        print("no sessions", file=sys.stderr)
    if not json:
        for row in rows:
            if row["problem"]:
                print(f"vmsandbox: {row['name']}: {row['problem']}", file=sys.stderr)
        _tell_promised(layout)
    return 0


def _tell_promised(layout: Layout) -> None:
    """Say what is reserved of the host, and who waits for room."""
    from vmsandbox.ledger.admission import promised_text
    from vmsandbox.ledger.book import Ledger, LedgerError

    with suppress(LedgerError):
        if text := promised_text(Ledger.of(layout)):
            print(f"vmsandbox: {shown(text, 1000)}", file=sys.stderr)


def _orphan_rows(layout: Layout) -> list[dict[str, Any]]:
    """What the ledger knows of and no session has: its folder was lost, or its making was interrupted."""
    from vmsandbox.ledger.book import Ledger, LedgerError
    from vmsandbox.session.resources.orphans import orphans, told

    try:
        found = orphans(layout, Ledger.of(layout).rows())
    except LedgerError as error:
        print(f"vmsandbox: {error.brief} ({error.details})\n  → {error.resolution}", file=sys.stderr)
        return []
    nothing = dict.fromkeys(("health", "grade", "network", "image", "created", "project"))
    return [
        {**nothing, "name": orphan.session, "state": "orphan", "id": orphan.session,
         "problem": f"nobody owns what is left of it ({told(layout, orphan)}): `vmsandbox gc` removes it"}
        for orphan in found
    ]  # fmt: skip


def _row(folder: SessionFolder) -> dict[str, Any]:
    from vmsandbox.session.network.keeper import keeper_is_alive
    from vmsandbox.session.upkeep.freezing import is_frozen
    from vmsandbox.session.upkeep.watching import health_of

    try:
        info = folder.info()
    except VmsandboxError as error:
        return {"name": folder.name, "state": "damaged", "health": None, "grade": None, "network": None, "image": None,
                "created": None, "project": None, "id": None, "problem": error.brief}  # fmt: skip
    alive = folder.guest_is_alive(info)
    if info.owner_pid > 0 and not info.owner_is_alive:
        state = "orphan"
    elif not info.ready:
        state = "starting" if info.owner_is_alive else "orphan"
    else:
        state = "dead" if not alive else "frozen" if is_frozen(folder) else "running"
    network = info.network
    if alive and keeper_is_alive(folder) is False:
        network += " (gone)"  # its keeper or its broker has ended: nothing of the guest's gets out
    return {
        "name": folder.name,
        "state": state,
        "health": health_of(folder) if alive else None,
        "grade": info.grade,
        "network": network,
        "image": info.image,
        "created": info.created,
        "project": shown(info.project) if info.project else None,
        "id": info.id,
        "problem": None,
    }


def logs(
    name: NameArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more.")] = False,
    egress: Annotated[bool, typer.Option("--egress", help="What the guest asked of the network.")] = False,
    withheld: Annotated[bool, typer.Option("--withheld", help="What stayed on the host, and why.")] = False,
    findings: Annotated[bool, typer.Option("--findings", help="What was found in what was copied in.")] = False,
    json: JsonOption = False,
) -> int:
    """Show a session's events, checked against their chain. NAME may also be the id of an ended session."""
    from vmsandbox.session.records.record import find_record

    layout = Layout.from_environment()
    record = find_record(layout, name).folder
    if withheld:
        return _show_withheld(record, json)
    if findings:
        return _show_findings(record, json)
    if egress:
        from vmsandbox.cli.egress import show_egress

        return show_egress(layout, name, record, follow, json)
    shown_until = 0
    while True:
        records = _records(record)
        for entry in records[shown_until:]:
            print(json_module.dumps(entry) if json else _event_line(entry), flush=True)
        shown_until = len(records)
        if not follow or any(entry["kind"] == "session.closed" for entry in records):
            return 0
        time.sleep(0.3)


def _records(record: Path) -> list[dict[str, Any]]:
    from vmsandbox.journal.chain import verified_records

    path = record / "events.jsonl"
    return list(verified_records(path)) if path.exists() else []


def _event_line(entry: dict[str, Any]) -> str:
    data = " ".join(f"{key}={shown(json_module.dumps(value))}" for key, value in sorted(entry["data"].items()))
    return f"{entry['time'][:23]}Z  {entry['kind']:<18}  {data}"


def _show_findings(record: Path, json: bool) -> int:
    from vmsandbox.session.transfer.incoming import findings_of

    rows = findings_of(record)
    if json:
        print_json(rows)
    else:
        print_table(
            ["KIND", "PATH", "LINE", "WHAT"],
            [
                [str(row["kind"]), shown(str(row["path"])), str(row["line"] or "-"), shown(str(row["what"]))]
                for row in rows
            ],
        )
    return 0


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
