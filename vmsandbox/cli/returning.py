"""changes, accept, restore: what came back, taking it, and having the tree of before again."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vmsandbox.cli.options import CommitsOption, JsonOption, NameArgument
from vmsandbox.cli.output import make_monitor, print_json
from vmsandbox.cli.showing import as_json, print_review, tell_applied, tell_commits
from vmsandbox.errors import RefusedError, UserInputError, VmsandboxError
from vmsandbox.paths import Layout
from vmsandbox.review.text import shown, shown_bytes
from vmsandbox.spec import Accept

if TYPE_CHECKING:
    from vmsandbox.apply.transaction import Applied
    from vmsandbox.monitor import Monitor
    from vmsandbox.review.values import Review, Selection
    from vmsandbox.session.acceptance import Returned
    from vmsandbox.session.records.record import Record
    from vmsandbox.session.transfer.commits import ReturnedCommits

PERSON = "person"


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("changes")(changes)
    app.command("accept")(accept)
    app.command("restore")(restore)


def changes(
    name: NameArgument,
    diff: Annotated[bool, typer.Option("--diff", help="A patch that `git apply` takes.")] = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write one self-contained page to look at.")
    ] = None,
    json: JsonOption = False,
) -> int:
    """Show what changed in a guest since the project was copied in, and why it wants your eyes.

    NAME may also be the id of an ended session: what it left in quarantine.
    """
    returned = returned_of(name)
    if html is not None:
        _write_page(returned, html)
    if diff:
        _write_patch(returned)
    elif json:
        print_json(as_json(returned))
    elif html is None:
        print_review(returned.review, sys.stdout)
    return 0


def accept(
    name: NameArgument,
    paths: Annotated[
        list[str] | None, typer.Argument(metavar="[PATHS…]", help="Only these, or what lies below.")
    ] = None,
    safe: Annotated[bool, typer.Option("--safe", help="All that has no risk class.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="All that is not blocked.")] = False,
    commits: CommitsOption = False,
    digest: Annotated[
        str | None, typer.Option("--digest", help="Refuse unless this is what was reviewed (its first 12 digits do).")
    ] = None,
    json: JsonOption = False,
) -> int:
    """Bring changes into the project: the ones you name, or ask for each in a terminal.

    A change with a risk class has to be named itself: a folder that it lies in does not bring it along.
    """
    if safe and everything:
        raise UserInputError("--safe and --all exclude each other")
    returned = returned_of(name)
    if digest is not None and not (len(digest) >= 12 and returned.review.digest.startswith(digest)):
        raise RefusedError(
            "this is not what was reviewed",
            details=f"it is {returned.review.digest}",
            resolution=f"look at it again: `vmsandbox changes {name}`",
        )
    how = Accept.ALL if everything else Accept.SAFE if safe else None
    if paths:
        selection: Selection | None = _named(returned.review, paths, how)
        by, attended = "paths", _person_is_there()
    else:
        selection, by = choose(returned, how)
        attended = by == PERSON
    if selection is None:
        raise RefusedError(
            "nothing is accepted without a person or a rule of theirs",
            resolution="run it in a terminal, name the paths, or give --safe or --all",
        )
    applied = take(returned, selection, by, attended)
    landed = _take_commits(name, returned) if commits else None
    if json:
        document: dict[str, Any] = {"digest": returned.review.digest, "by": by}
        document["applied"] = list(applied.paths) if applied else []
        document["commits"] = landed.as_json() if landed else None
        print_json(document)
    else:
        tell_applied(returned, applied, sys.stdout)
        if landed is not None:
            tell_commits(landed, sys.stdout)
    return 0


def restore(
    name: NameArgument,
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="DIR", help="An empty or new folder.", show_default="PROJECT-before-ID"),
    ] = None,
) -> int:
    """Write the tree that a project had before a session into a folder of its own (backups are made by themselves)."""
    from vmsandbox.session.records.record import find_record
    from vmsandbox.session.records.restore import restore as restore_backup

    record = find_record(Layout.from_environment(), name)
    target = to
    if target is None:
        project = record.project
        target = project.with_name(f"{project.name}-before-{record.id}")
    with make_monitor().step("restoring the tree of before"):
        restored = restore_backup(record.folder, target)
    for path in restored.left_out:
        print(f"vmsandbox: left out: {path}", file=sys.stderr)
    print(target)
    return 0


# -- what session uses too ---------------------------------------------------------------------------------


def returned_of(name: str) -> Returned:
    """Fetch and review what a live session has, or what an ended one left."""
    from vmsandbox.session.acceptance import review_with_commands
    from vmsandbox.session.records.record import find_record

    layout = Layout.from_environment()
    monitor = make_monitor()
    _collect_if_alive(name, layout, monitor)
    return review_with_commands(find_record(layout, name), layout, monitor)


def choose(returned: Returned, how: Accept | None) -> tuple[Selection | None, str]:
    """What is taken, and who said so; None: nobody did. `how` None asks the person, if there is one."""
    from vmsandbox.review.select import selection_of

    if how is not None:
        from vmsandbox.session.acceptance import refuse_unattended

        refuse_unattended(returned, how)
        return selection_of(returned.review, how), f"--accept {how}"
    if not _person_is_there():
        return None, "nobody"
    from vmsandbox.cli.reviewing import review_in_terminal

    return review_in_terminal(returned.review), PERSON


def take(returned: Returned, selection: Selection, by: str, attended: bool) -> Applied | None:
    """Apply what was chosen, if anything was. attended: by a person, in a terminal."""
    from vmsandbox.session.acceptance import accept as apply_selection

    return apply_selection(returned, selection, by, attended) if selection.choices else None


def _person_is_there() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()


def _named(review: Review, paths: list[str], how: Accept | None) -> Selection:
    """The changes that were named, and below a named folder those without a risk (with --all: with one too)."""
    from vmsandbox.review.select import parents_of
    from vmsandbox.review.values import Choice, Selection

    wanted = [os.path.normpath(path) for path in paths]
    holding = {folder for change in review.changes for folder in parents_of(change.path)}
    chosen: list[Choice] = []
    matched: set[str] = set()
    for change in review.changes:
        exact = [path for path in wanted if path in (change.path, change.old_path)]
        below = [path for path in wanted if path == "." or change.path.startswith(path + "/")]
        matched.update(exact, below)
        if change.path in holding and change.sort == "added":
            continue  # a new folder comes with what is taken in it
        if exact or (below and not change.blocked and (how is Accept.ALL or not change.findings)):
            chosen.append(Choice(change.path))
    if missing := [path for path in wanted if path not in matched]:
        raise UserInputError(
            "these did not change: " + ", ".join(shown(path) for path in missing),
            resolution="`vmsandbox changes NAME` lists what did; paths are relative to the project",
        )
    return Selection(review.digest, tuple(chosen))


def _take_commits(name: str, returned: Returned) -> ReturnedCommits:
    from vmsandbox.session.sandbox import Sandbox

    sandbox = Sandbox.attach(name, monitor=make_monitor())  # an ended session has no commits to give any more
    try:
        return sandbox.commits(returned.project)
    finally:
        sandbox.disconnect()


def _collect_if_alive(name: str, layout: Layout, monitor: Monitor) -> None:
    from vmsandbox.session.sandbox import Sandbox
    from vmsandbox.session.state.folder import SessionFolder

    try:
        SessionFolder(layout, name).info()
    except VmsandboxError:
        return  # ended: what it left in quarantine will do
    sandbox = Sandbox.attach(name, layout=layout, monitor=monitor)
    try:
        sandbox.collect()
    finally:
        sandbox.disconnect()


def _write_patch(returned: Returned) -> None:
    """Exact bytes into a file or pipe; onto a terminal only what cannot drive it."""
    from vmsandbox.review.patch import as_patch

    pieces = as_patch(returned.review, returned.old, returned.new)
    if sys.stdout.isatty():
        for line in b"".join(pieces).split(b"\n"):
            print(shown_bytes(line, None))
        return
    for piece in pieces:
        sys.stdout.buffer.write(piece)
    sys.stdout.buffer.flush()


def _write_page(returned: Returned, target: Path) -> None:
    from vmsandbox.review.page import as_html

    record: Record = returned.record
    facts = {"session": record.id, "project": str(returned.project)}
    page = as_html(returned.review, f"Changes of {returned.project.name}", facts, returned.old, returned.new)
    try:
        target.write_bytes(page)
    except OSError as error:
        raise UserInputError(f"cannot write {target}", details=str(error)) from error
    print(f"vmsandbox: written: {target}", file=sys.stderr)
