"""What the host's git knows of a project: where its repository is, the files it tracks, its ignore rules.

Every git command here goes through `gitrun`, because a repository's own configuration may name programs to run;
without that, listing a project could run its code.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from vmsandbox.errors import HostError
from vmsandbox.policy.tree.gitrun import HostGit
from vmsandbox.process import Finished, Programs

_MAX_SHALLOW = 4 << 20
_MAX_POINTER = 8192  # bytes of a `.git` file, `commondir` or `gitdir`: one path each


@dataclass(frozen=True)
class Repository:
    """The repository that a project lies in. Paths are absolute; `top` is the project or a folder above
    it.

    git_dir: what is behind `top/.git`: a folder, not resolved. None: a `.git` file that leads nowhere.
    """

    top: Path
    exclude_file: Path | None
    git_dir: Path | None = None

    @property
    def common_dir(self) -> Path | None:
        """Where refs and objects are: another folder than `git_dir` for a worktree (gitrepository-layout(5))."""
        if self.git_dir is None:
            return None
        pointed = _pointer(self.git_dir / "commondir")
        return self.git_dir / pointed if pointed else self.git_dir

    def foreign_parts(self) -> list[str]:
        """What of this repository lies elsewhere without that place knowing of it, in words; empty when all is its own.

        A project that was made by someone else can have a `.git` that points into any repository on this host. To hand
        out that one's history, or to write into it, would be their choice and not the person's.
        """
        found = []
        mark = self.top / ".git"
        if self.git_dir is None or self.common_dir is None:
            return [f"{mark} leads nowhere"]
        if mark.is_symlink():
            found.append(f"{mark} is a link")
        if mark.is_file() and not _knows(self.git_dir, mark):
            found.append(f"{mark} points to {self.git_dir}, which does not point back")
        common, own = self.common_dir.resolve(), self.git_dir.resolve()
        if common not in (own, own.parent.parent) or (common != own and own.parent.name != "worktrees"):
            found.append(f"{self.git_dir}/commondir points to {common}")
        for name in ("objects", "objects/pack", "refs", "refs/vmsandbox"):
            real = (common / name).resolve()
            if real != common / name:
                found.append(f"{name} lies in {real}")
        return found

    @property
    def shallow(self) -> frozenset[str]:
        """The commits whose parents this repository does not have: those of a shallow clone (hexadecimal)."""
        content = None if self.common_dir is None else _read(self.common_dir / "shallow", _MAX_SHALLOW)
        return frozenset(re.findall("[0-9a-f]{40,64}", os.fsdecode(content or b"")))

    def borrowed_objects(self) -> list[str]:
        """Files that add another repository's objects to this one's, in words: its history may be that one's."""
        if self.common_dir is None:
            return []
        names = [f"objects/info/{name}" for name in ("alternates", "http-alternates")]
        return [f"{name} adds the objects of another" for name in names if (self.common_dir / name).exists()]


def find_repository(project: Path, programs: Programs) -> Repository | None:
    """Look for `.git` in the project and above it, as git does. `project` is absolute with no links in it."""
    for folder in (project, *project.parents):
        mark = folder / ".git"
        # os.path answers False where pathlib raises: a folder above may be closed to us.
        if os.path.isdir(mark):  # noqa: PTH112
            if os.path.exists(mark / "HEAD"):  # noqa: PTH110
                return Repository(folder, mark / "info" / "exclude", mark)
        elif os.path.isfile(mark):  # noqa: PTH113  # a worktree or a submodule: the folder is elsewhere
            pointed = _pointer(mark, "gitdir: ")
            git_dir = folder / pointed if pointed else None
            found = _git(programs, folder, "rev-parse", "--git-path", "info/exclude")
            if found is None:
                return Repository(folder, None, git_dir)
            return Repository(folder, folder / os.fsdecode(found.stdout.removesuffix(b"\n")), git_dir)
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


def _git(programs: Programs, folder: Path, subcommand: str, *arguments: str) -> Finished | None:
    try:
        found = HostGit(programs, folder=folder).run(subcommand, *arguments, check=False)
    except HostError:
        return None
    return found if found.status == 0 else None


def _pointer(file: Path, prefix: str = "") -> str | None:
    """The path that a file of git's consists of, or None."""
    content = _read(file, _MAX_POINTER)
    if content is None:
        return None
    text = os.fsdecode(content).rstrip("\r\n")
    return text.removeprefix(prefix) if text.startswith(prefix) and "\0" not in text else None


def _read(file: Path, most: int) -> bytes | None:
    """The beginning of a file; None if there is none that can be read. A FIFO in its place does not block."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(fd, "rb") as opened:
        try:
            return opened.read(most)
        except OSError:
            return None


def _knows(git_dir: Path, mark: Path) -> bool:
    """Whether a git folder belongs to the `.git` file that points to it: a worktree's, or a submodule's."""
    back = _pointer(git_dir / "gitdir")
    if back and (git_dir / back).resolve() == mark.resolve():
        return True
    real = git_dir.resolve()
    return any((above / ".git" / "modules").resolve() in real.parents for above in mark.parent.resolve().parents)
