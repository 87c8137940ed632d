"""Names that are secret by convention (`.env`, private keys), whatever git and the policy say.

Without it the one file that a person forgot to ignore would be handed to the agent.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from vmsandbox.policy.tree.globs import translate

_LIST = Path(__file__).with_name("secret_names.txt")


class SecretNames:
    """The names of one list in the format that `secret_names.txt` describes."""

    def __init__(self, lines: list[str]) -> None:
        names: list[str] = []
        folders: list[str] = []
        paths: list[str] = []
        exceptions: list[str] = []
        for line in lines:
            glob = line.strip().lower()
            if not glob or glob.startswith("#"):
                continue
            if glob.startswith("!"):
                exceptions.append(translate(glob[1:]))
            elif "/" in glob.rstrip("/"):
                paths.append("(?:.*/)?" + translate(glob.rstrip("/")))
            elif glob.endswith("/"):
                folders.append(translate(glob.rstrip("/")))
            else:
                names.append(translate(glob))
        self._names, self._folders, self._paths, self._exceptions = (
            _any(names),
            _any(folders),
            _any(paths),
            _any(exceptions),
        )

    def match(self, path: str, name: str, is_folder: bool) -> bool:
        """Whether this path (relative to the project; its last component is `name`) is secret by its name."""
        low = name.lower()
        if self._names.fullmatch(low) or (is_folder and self._folders.fullmatch(low)):
            return not self._exceptions.fullmatch(low)
        return self._paths.fullmatch(path.lower()) is not None


@cache
def built_in() -> SecretNames:
    """The list that is shipped with vmsandbox."""
    return SecretNames(_LIST.read_text(encoding="utf-8").splitlines())


def _any(regexes: list[str]) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{one})" for one in regexes) or r"(?!)", re.DOTALL)
