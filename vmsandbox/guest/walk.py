"""Decides what of a project goes into a guest, and says what does not and why.

Without it a link to `~/.ssh` would be followed out of the project, a `.env` would be sent, and a FIFO
would block. Every folder is opened relative to the one above it and never through a link, so that a link
swapped in meanwhile leads nowhere. Nothing is skipped silently: it is sent, listed as withheld, or an
error.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Literal, NamedTuple

from vmsandbox.errors import UserInputError
from vmsandbox.guest.walk_errors import changed, mib, os_errors, too_large, unreadable
from vmsandbox.policy.tree.denied import DeniedPaths
from vmsandbox.policy.tree.gitignore import IgnoreFile, is_ignored, read_ignore_file, rules_above
from vmsandbox.policy.tree.gitrepo import find_repository, tracked_files
from vmsandbox.policy.tree.links import stays_inside
from vmsandbox.policy.tree.secrets import built_in
from vmsandbox.policy.values import Policy
from vmsandbox.process import Programs
from vmsandbox.review.text import shown

Kind = Literal["file", "dir", "symlink"]
OURS = ".vmsandbox-apply-"  # begins the names of staging folders (vmsandbox/apply/plan.py)
OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True)
class Limits:
    """What one push may carry. `names` bounds what is looked at, the ignored included."""

    total_bytes: int = 2 << 30
    file_bytes: int = 512 << 20
    files: int = 200_000
    names: int = 1_000_000
    depth: int = 100


class Entry(NamedTuple):
    """One thing to send. `path`: relative, '/' between components, surrogate escapes for bytes that are
    not UTF-8.

    mode: permission bits only (0777). size: bytes of a file, else 0. mtime: seconds. target: of a symlink.
    """

    path: str
    kind: Kind
    mode: int
    size: int
    mtime: int
    target: str | None = None


class Reason(StrEnum):
    """Why something stays on the host."""

    GIT = "git's own folder"
    SECRET = "its name is that of a secret"  # noqa: S105 - not a password
    POLICY = "denied by the policy"
    IGNORED = "ignored by git"
    LINK = "a link that leads out of the project"
    SPECIAL = "not a file, folder or link"
    OURS = "vmsandbox's own, of an apply that is at work or was killed"


class Withheld(NamedTuple):
    """One thing that is not sent; a folder stands for all that is in it. `detail`: the pattern, target or
    type.
    """

    path: str
    reason: Reason
    folder: bool = False
    detail: str = ""


@dataclass
class Walk:
    """What a project has: `entries` to send (a folder before what is in it) and what is `withheld`."""

    root: Path
    limits: Limits
    entries: list[Entry] = field(default_factory=list)
    withheld: list[Withheld] = field(default_factory=list)
    total_bytes: int = 0

    @property
    def counts(self) -> dict[Reason, int]:
        """How many rows of `withheld` each reason has."""
        return dict(Counter(row.reason for row in self.withheld))


def walk_project(root: Path, policy: Policy, *, limits: Limits | None = None, programs: Programs | None = None) -> Walk:
    """Look through a project without following any link out of it. Opens folders and ignore files, no
    other file.

    Raises:
        UserInputError: the project or something in it that should be sent cannot be read, or a limit is
            passed.
        RefusedError: the project lies in a path that the policy denies.
    """
    with os_errors(os.fspath(root)):
        real = root.resolve(strict=True)
        fd = os.open(real, OPEN_FOLDER)
    walk = Walk(real, limits or Limits())
    walker = _Walker(walk, DeniedPaths(policy.filesystem.denied_paths, real), programs or Programs())
    try:
        walker.look(fd)
    finally:
        os.close(fd)
    return walk


class _Walker:
    """One walk in progress."""

    def __init__(self, walk: Walk, denied: DeniedPaths, programs: Programs) -> None:
        self._walk = walk
        self._limits = walk.limits
        self._root = os.fspath(walk.root)
        self._denied = denied
        self._secrets = built_in()
        repository = find_repository(walk.root, programs)
        self._rules_above = rules_above(walk.root, repository) if repository else []
        self._tracked = tracked_files(walk.root, programs) if repository else frozenset[str]()
        self._tracked_folders = _folders_of(self._tracked)
        # As root everything opens; a call for every file would only cost time.
        self._ask_access = os.geteuid() != 0
        self._names = 0
        self._unreadable: list[str] = []

    def look(self, fd: int) -> None:
        """Look through the project's folder, open as `fd`, and raise for what was unreadable or too large."""
        self._folder(fd, "", 0, self._rules_above, ignored=False)
        self._check()

    def _folder(self, fd: int, prefix: str, depth: int, rules: list[IgnoreFile], ignored: bool) -> None:
        """Look through one open folder. `prefix`: its path with a slash, "" for the root. `ignored`:
        git's verdict.
        """
        with os_errors(self._place(prefix)), os.scandir(fd) as listing:
            found = sorted(listing, key=lambda one: one.name)
        if any(one.name == ".gitignore" for one in found):
            content = read_ignore_file(".gitignore", fd, prefix + ".gitignore")
            rules = [*rules, IgnoreFile(content, prefix)] if content else rules
        for one in found:
            self._names += 1
            if self._names > self._limits.names:
                raise self._too_much(f"more than {self._limits.names} names")
            path = prefix + one.name
            is_folder = one.is_dir(follow_symlinks=False)
            if self._withhold_by_name(path, one.name, is_folder):
                continue
            untracked = path not in self._tracked
            one_ignored = untracked and (ignored or is_ignored(path, is_folder, rules))
            if one_ignored and not (is_folder and path in self._tracked_folders):
                self._withhold(path, Reason.IGNORED, is_folder)
            elif is_folder:
                self._enter(fd, one.name, path, depth + 1, rules, one_ignored)
            else:
                self._add(fd, one, path)

    def _check(self) -> None:
        """Raise for what was found unreadable or too large, now that all of it is known."""
        if self._unreadable:
            raise unreadable(self._unreadable)
        largest = max((entry.size for entry in self._walk.entries), default=0)
        if largest > self._limits.file_bytes:
            raise self._too_much(f"a file larger than {mib(self._limits.file_bytes)}")
        if self._walk.total_bytes > self._limits.total_bytes:
            raise self._too_much(f"{mib(self._walk.total_bytes)}; at most {mib(self._limits.total_bytes)} are sent")

    def _withhold(self, path: str, reason: Reason, folder: bool = False, detail: str = "") -> None:
        self._walk.withheld.append(Withheld(path, reason, folder, detail))

    def _withhold_by_name(self, path: str, name: str, is_folder: bool) -> bool:
        if name == ".git":
            self._withhold(path, Reason.GIT, is_folder)
        elif name.startswith(OURS):
            self._withhold(path, Reason.OURS, is_folder)
        elif self._secrets.match(path, name, is_folder):
            self._withhold(path, Reason.SECRET, is_folder)
        elif self._denied and (pattern := self._denied.match(path, name)):
            self._withhold(path, Reason.POLICY, is_folder, pattern)
        else:
            return False
        return True

    def _enter(self, parent: int, name: str, path: str, depth: int, rules: list[IgnoreFile], ignored: bool) -> None:
        if depth > self._limits.depth:
            raise UserInputError(
                f"the project is more than {self._limits.depth} folders deep: {shown(path, 200)}",
                resolution="keep it out with .gitignore or filesystem.denied_paths",
            )
        try:
            fd = os.open(name, OPEN_FOLDER, dir_fd=parent)
        except FileNotFoundError:
            return  # deleted since the listing
        except PermissionError:
            self._unreadable.append(path)
            return
        except OSError as error:
            raise changed(path, error) from error
        try:
            status = os.fstat(fd)
            self._count()
            self._walk.entries.append(Entry(path, "dir", status.st_mode & 0o777, 0, int(status.st_mtime), None))
            self._folder(fd, path + "/", depth, rules, ignored)
        finally:
            os.close(fd)

    def _add(self, parent: int, one: os.DirEntry[str], path: str) -> None:
        """Take a file or a link in, or withhold what is neither."""
        try:
            status = one.stat(follow_symlinks=False)
            form = stat.S_IFMT(status.st_mode)
            target = os.readlink(one.name, dir_fd=parent) if form == stat.S_IFLNK else None
        except FileNotFoundError:
            return
        except OSError as error:
            raise changed(path, error) from error
        mtime = int(status.st_mtime)
        if form == stat.S_IFREG:
            if self._ask_access and not os.access(one.name, os.R_OK, dir_fd=parent):
                self._unreadable.append(path)
                return
            self._walk.total_bytes += status.st_size
            self._count()
            self._walk.entries.append(Entry(path, "file", status.st_mode & 0o777, status.st_size, mtime, None))
        elif target is None:
            self._withhold(path, Reason.SPECIAL, detail=_FORMS.get(form, "unknown"))
        elif stays_inside(self._root, path, target):
            self._count()
            self._walk.entries.append(Entry(path, "symlink", 0o777, 0, mtime, target))
        else:
            self._withhold(path, Reason.LINK, detail=target)

    def _count(self) -> None:
        if len(self._walk.entries) >= self._limits.files:
            raise self._too_much(f"more than {self._limits.files} files and folders")

    def _place(self, prefix: str) -> str:
        return prefix.rstrip("/") or self._root

    def _too_much(self, what: str) -> UserInputError:
        sizes = ((entry.path, entry.kind == "file", entry.size) for entry in self._walk.entries)
        return too_large(what, sizes)


_FORMS = {
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}


def _folders_of(paths: frozenset[str]) -> set[str]:
    """All folders on the way to these paths, and the paths themselves (a submodule is tracked as a
    folder).
    """
    folders: set[str] = set()
    for path in paths:
        while path and path not in folders:
            folders.add(path)
            path = path.rpartition("/")[0]
    return folders
