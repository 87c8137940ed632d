"""policy import: the hardening of compose and devcontainer files as a policy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from vmsandbox.cli.options import JsonOption
from vmsandbox.cli.output import print_json
from vmsandbox.errors import UserInputError


def import_files(
    files: Annotated[list[Path], typer.Argument(metavar="FILE…", help="docker-compose*.yml, devcontainer.json.")],
    service: Annotated[
        str | None, typer.Option("--service", metavar="NAME", help="Which service of a compose file.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the policy there, not to stdout.")
    ] = None,
    json: JsonOption = False,
) -> int:
    """Make a policy of other programs' hardening; on stderr: what has no counterpart, and why."""
    from vmsandbox.policy.importing import reading

    found = reading.import_files(files, service, None if output is None else output.parent)
    text = f"# Imported from {', '.join(ascii(one.name)[1:-1] for one in files)}\n{found.text}"
    if output is not None:
        _write(output, text)
    if json:
        print_json(
            {
                "policy": found.policy,
                "text": text,
                "mapped": [{"key": one.key, "to": one.to or None, "how": one.how} for one in found.mapped],
                "not_mapped": [{"key": one.key, "why": one.why} for one in found.left],
            }
        )
        return 0
    if output is None:
        print(text, end="")
    for one in found.mapped:
        if one.how:
            print(f"note: {one.key}{f' -> {one.to}' if one.to else ''}: {one.how}", file=sys.stderr)
    for left in found.left:
        print(f"not mapped: {left.key}: {left.why}", file=sys.stderr)
    return 0


def _write(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserInputError(
            f"the policy cannot be written: {path}",
            details=str(error),
            resolution="name another file: one that is there already is not written over",
        ) from error
