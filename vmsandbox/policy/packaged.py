"""The ready-made policies that are shipped with vmsandbox, by their names: `--policy python-dev`.

Without them a first session would have the choice between no policy and writing one.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from vmsandbox.errors import UserInputError
from vmsandbox.paths import resource_folder

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")


def packaged_names() -> tuple[str, ...]:
    """The names there are."""
    return tuple(sorted(path.stem for path in resource_folder("policies").glob("*.yaml")))


def packaged_policy(path: Path) -> Path:
    """The file of a bare name (`python-dev`, no slash, no dot); any other path as it is.

    The ready-made policy goes before a file of that name: the folder that a session starts in may be somebody else's,
    and what a person names gets more than what lies there.

    Raises:
        UserInputError: it is a bare name, and neither a policy nor a file is called so.
    """
    if not _NAME.fullmatch(str(path)):
        return path
    found = resource_folder("policies") / f"{path}.yaml"
    if found.is_file():
        return found
    if os.path.lexists(path):
        return path
    raise UserInputError(
        f"no policy is called {path}",
        details=f"there are: {', '.join(packaged_names())}",
        resolution="name one of them, or a file",
    )
