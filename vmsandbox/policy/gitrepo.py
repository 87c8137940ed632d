"""What the host's git knows of a project: the files it tracks and where its ignore rules lie.

git reads the repository's own configuration, which may name programs to run (core.fsmonitor, an ssh
command). The one command that is run here has all of those switched off; without that, listing a project
could run its code.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from vmsandbox.errors import HostError
from vmsandbox.process import Finished, Programs

_QUIET = {
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_OPTIONAL_LOCKS": "0",
    "GIT_TERMINAL_PROMPT": "0",
    # A partial clone with a sparse index would fetch what it lacks, through a program the repository names.
    "GIT_ALLOW_PROTOCOL": "none",
    "GIT_NO_LAZY_FETCH": "1",
}
_SAFE = (
    "--no-pager", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null",
    # The folder may be someone else's (root and a user's project): with the above, only its index is read.
    "-c", "safe.directory=*",
)  # fmt: skip


@dataclass(frozen=True)
class Repository:
    """The repository that a project lies in. Paths are absolute; `top` is the project or a folder above
    it.
    """

    top: Path
    exclude_file: Path | None


def find_repository(project: Path, programs: Programs) -> Repository | None:
    """Look for `.git` in the project and above it, as git does. `project` is absolute with no links in it."""
    for folder in (project, *project.parents):
        mark = folder / ".git"
        # os.path answers False where pathlib raises: a folder above may be closed to us.
        if os.path.isdir(mark):  # noqa: PTH112
            if os.path.exists(mark / "HEAD"):  # noqa: PTH110
                return Repository(folder, mark / "info" / "exclude")
        elif os.path.isfile(mark):  # noqa: PTH113  # a worktree or a submodule: the folder is elsewhere
            found = _git(programs, folder, "rev-parse", "--git-path", "info/exclude")
            if found is None:
                return Repository(folder, None)
            return Repository(folder, folder / os.fsdecode(found.stdout.removesuffix(b"\n")))
    return None


def tracked_files(project: Path, programs: Programs) -> frozenset[str]:
    """The paths in git's index below the project, relative to it, those of submodules too.

    Empty when there is no git or no repository: then an ignored file counts as ignored. Names that are
    not UTF-8 have surrogate escapes.
    """
    found = _git(programs, project, "ls-files", "-z", "--cached", "--recurse-submodules") or _git(
        programs, project, "ls-files", "-z", "--cached"
    )
    return frozenset(os.fsdecode(found.stdout).split("\0")[:-1]) if found else frozenset()


def _git(programs: Programs, folder: Path, *arguments: str) -> Finished | None:
    try:
        found = programs.run(["git", *_SAFE, "-C", folder, *arguments], env=_QUIET, check=False, timeout=120)
    except HostError:
        return None
    return found if found.status == 0 else None
