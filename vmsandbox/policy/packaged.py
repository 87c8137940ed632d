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
    """The file of a bare name (`python-dev`, no slash, no dot) that is no file here; any other path as it is.

    Raises:
        UserInputError: it is a bare name, and neither a file nor a policy is called so.
    """
    if not _NAME.fullmatch(str(path)) or os.path.lexists(path):
        return path
    found = resource_folder("policies") / f"{path}.yaml"
    if not found.is_file():
        raise UserInputError(
            f"no policy is called {path}",
            details=f"there are: {', '.join(packaged_names())}",
            resolution="name one of them, or a file",
        )
    return found
