"""A command line as the guest's shell takes it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence


def remote_command(command: Sequence[str] | None, cwd: str | None = None, env: dict[str, str] | None = None) -> str:
    """What the guest's shell gets: every word quoted, so that names are data and never syntax."""
    parts = [f"cd -- {shlex.quote(cwd)} || exit 125"] if cwd else []
    words = list(command) if command is not None else ["bash", "-l"]
    prefix = [f"{name}={shlex.quote(value)}" for name, value in (env or {}).items()]
    # exec --: a shell builtin's name, or a name like -c, is looked up as a program.
    parts.append(" ".join([*prefix, "exec --", shlex.join(words)]))
    return "; ".join(parts)
