"""Imports compose files and devcontainer files, told by their names.

Without one way in, each caller would have to know which of the readers fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmsandbox.policy.format.rendering import to_yaml
from vmsandbox.policy.importing.draft import Draft, Left, Mapped
from vmsandbox.policy.importing.texts import shown
from vmsandbox.policy.load import read_bounded


@dataclass(frozen=True)
class Imported:
    """policy: as a policy file has it. text: the same as YAML. mapped, left: every key of the files."""

    policy: dict[str, Any]
    text: str
    mapped: tuple[Mapped, ...]
    left: tuple[Left, ...]


def import_files(paths: Sequence[Path], service: str | None = None, folder: Path | None = None) -> Imported:
    """The policy that the hardening in these files comes to, all at once: the stricter value counts.

    Args:
        paths: docker-compose*.yml, devcontainer.json (JSON with comments); each at most 256 KiB.
        service: which service of a compose file; None: the only one.
        folder: where the policy will lie; None: beside the first file.

    Raises:
        UserInputError: one cannot be read or understood, or has several services and none is named.
    """
    draft = Draft(folder or paths[0].parent)
    for path in paths:
        content = read_bounded(path, "the file")
        draft.begin(path, f"{shown(path.name)}: " if len(paths) > 1 else "")
        if path.suffix.lower() in (".json", ".jsonc"):
            from vmsandbox.policy.importing.devcontainer import read_devcontainer

            read_devcontainer(draft, content)
        else:
            from vmsandbox.policy.importing.compose import read_compose

            read_compose(draft, content, service)
    policy = draft.checked()
    return Imported(policy, to_yaml(policy), tuple(draft.mapped), tuple(draft.left))
