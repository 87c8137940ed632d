"""`filesystem.denied_paths`, applied to the tree that is about to be copied into a guest.

Without it a folder that the person marked as secret would be sent with the rest of the project.

What a pattern means (where there is doubt, the stricter reading):
- `./secrets/`, `config/*.yaml`: relative to the project;
- `secrets`, `*.secret` (no slash, or one at the end): that name at any depth;
- `~/.ssh/`, `/etc/`: a place on the host: matters when the project contains it or lies in it;
- a slash at the end is ignored, and all that is below a denied folder is denied.
A plain path that leads through links denies what it leads to as well.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from vmsandbox.errors import RefusedError, UserInputError
from vmsandbox.policy.tree.globs import is_glob, translate


class DeniedPaths:
    """The denied paths of one policy, made ready for one project.

    Args:
        patterns: as written in the policy.
        root: the project's folder, absolute and with no links in it.

    Raises:
        RefusedError: the project itself lies in (or is) a denied path.
        UserInputError: a `~name/` whose home is not known.
    """

    def __init__(self, patterns: Iterable[str], root: Path) -> None:
        self._root = os.fspath(root).rstrip("/") + "/"
        plain: dict[str, str] = {}  # absolute path -> the pattern as written
        globs: list[tuple[re.Pattern[str], str]] = []
        names: list[tuple[re.Pattern[str], str]] = []
        for pattern in patterns:
            stem = pattern.rstrip("/")
            if stem and "/" not in stem and stem not in (".", "..") and not stem.startswith("~"):
                names.append((re.compile(translate(stem), re.DOTALL), pattern))
                if is_glob(stem):
                    continue
            absolute = self._absolute(pattern)
            if is_glob(pattern):
                globs.extend((re.compile(one, re.DOTALL), pattern) for one in _glob_forms(absolute))
            else:
                plain[os.path.normpath(absolute)] = pattern
                plain[os.path.realpath(absolute)] = pattern
        self._plain, self._globs, self._names = plain, globs, names
        self._refuse_inside()

    def __bool__(self) -> bool:
        return bool(self._plain or self._globs or self._names)

    def match(self, path: str, name: str) -> str | None:
        """The pattern that denies this path (relative to the project), or None. Folders above are not
        looked at.
        """
        for regex, pattern in self._names:
            if regex.fullmatch(name):
                return pattern
        absolute = self._root + path
        if found := self._plain.get(absolute):
            return found
        for regex, pattern in self._globs:
            if regex.fullmatch(absolute):
                return pattern
        return None

    def _absolute(self, pattern: str) -> str:
        head, tail = self._root, pattern
        if pattern.startswith("~"):
            user, _, tail = pattern.partition("/")
            head = os.path.expanduser(user)  # noqa: PTH111
            if head.startswith("~"):
                raise UserInputError(
                    f"denied path {pattern!r}: there is no such user's home",
                    resolution="write the path in full in filesystem.denied_paths",
                )
        elif pattern.startswith("/"):
            head = "/"
        if is_glob(pattern):  # the folders' own names are no globs, whatever characters they have
            head = re.sub(r"([*?\[])", r"[\1]", head)
        return "/" + os.path.normpath(f"{head}/{tail}").lstrip("/")

    def _refuse_inside(self) -> None:
        place = self._root.rstrip("/") or "/"
        while True:
            pattern = self._plain.get(place) or next(
                (written for regex, written in self._globs if regex.fullmatch(place)), None
            )
            if pattern:
                raise RefusedError(
                    f"the project lies in a path that the policy denies: {self._root.rstrip('/') or '/'}",
                    details=f"filesystem.denied_paths has {pattern!r}",
                    resolution="choose another project, or change the policy",
                )
            if place == "/":
                return
            place = os.path.dirname(place)  # noqa: PTH120


def _glob_forms(absolute: str) -> set[str]:
    """The glob as written, and with links resolved in the part before its first special character."""
    parts = absolute.split("/")
    first = next(number for number, part in enumerate(parts) if is_glob(part))
    head, tail = "/".join(parts[:first]), "/".join(parts[first:])
    real = os.path.realpath(head or "/").rstrip("/")
    return {translate(f"{head}/{tail}"), re.escape(real + "/") + translate(tail)}
