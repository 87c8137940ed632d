"""doctor and gc: what this host can do, and what crashed processes left on it."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from vmsandbox.cli.options import EmulationOption, JsonOption
from vmsandbox.cli.output import make_monitor, print_json
from vmsandbox.paths import Layout
from vmsandbox.process import Programs
from vmsandbox.session.opening.plan import ALLOW_EMULATION

_MARKS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("doctor")(doctor)
    app.command("gc")(gc)


def doctor(
    fix: Annotated[bool, typer.Option("--fix", help="Mend what can be mended safely.")] = False,
    allow_emulation: EmulationOption = False,
    json: JsonOption = False,
) -> int:
    """Say what this host can do, which isolation grade it gives and why, and how to mend what is missing."""
    from vmsandbox.session.doctor import diagnose, mend

    layout, programs = Layout.from_environment(), Programs()
    emulation = allow_emulation or os.environ.get(ALLOW_EMULATION) == "1"
    found = diagnose(layout, programs, allow_emulation=emulation)
    mended = []
    if fix:
        found, done = mend(
            found, programs, make_monitor(), again=lambda: diagnose(layout, programs, allow_emulation=emulation)
        )
        mended = list(done)
    if json:
        report = found.as_json()
        report["mended"] = [{"id": item.id, "done": item.done, "error": item.error} for item in mended]
        print_json(report)
    else:
        for item in mended:
            print(f"mended {item.id}: {item.done or 'FAILED: ' + str(item.error)}")
        for check in found.checks:
            print(f"{_MARKS[check.status.value]}  {check.title}: {check.found}")
            if check.remedy and check.status.value != "ok":
                for line in check.remedy.splitlines():
                    print(f"        → {line}")
        grade = found.grade.value if found.grade else "none: no session can run here"
        print(f"\nisolation grade of this host: {grade}")
        for reason in found.grade_reasons:
            print(f"  because {reason}")
        if not found.can_run:
            print("no session can run here yet", file=sys.stderr)
    return 0 if found.can_run else 1


def gc(
    templates: Annotated[bool, typer.Option("--templates", help="Also templates that no session uses now.")] = False,
    older_than: Annotated[
        float | None,
        typer.Option(
            "--older-than", metavar="DAYS", min=0, help="Also records of sessions that ended more than DAYS ago."
        ),
    ] = None,
    new_ledger: Annotated[
        bool, typer.Option("--new-ledger", help="First set a damaged ledger aside and begin another one.")
    ] = False,
    json: JsonOption = False,
) -> int:
    """Remove what crashed or interrupted processes left. Live sessions are not touched."""
    from vmsandbox.hypervisor.connection import Host
    from vmsandbox.session.gc import collect_garbage

    layout = Layout.from_environment()
    if new_ledger:
        from vmsandbox.session.resources.renewal import renew_ledger

        print(f"vmsandbox: the damaged ledger is kept as {renew_ledger(layout)}", file=sys.stderr)
    host = Host.open()
    try:
        removed = collect_garbage(layout, host, all_templates=templates, older_than=older_than)
    finally:
        host.close()
    if json:
        print_json([vars(item) for item in removed])
    for item in [] if json else removed:
        print(f"{'NOT removed' if item.problem else 'removed'} {item.kind} {item.what}: {item.problem or item.why}")
    if not removed and not json:
        print("nothing to remove", file=sys.stderr)
    return 1 if any(item.problem for item in removed) else 0
