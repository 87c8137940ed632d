"""What of a project is not in its last commit: found by hashing, not by asking git.

`git status` and `git stash` run filters and the file system monitor that a repository's configuration names. Here each
file's blob id is worked out and compared with what the commit has, so that no code of the project runs; a file that a
filter would have converted (CRLF, LFS) merely counts as changed and is kept as it is.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from vmsandbox.errors import UserInputError
from vmsandbox.git.objects import GITLINK, LINK
from vmsandbox.guest.walk import OPEN_FOLDER, Entry
from vmsandbox.policy.tree.gitignore import IgnoreFile, is_ignored, read_ignore_file, rules_above
from vmsandbox.policy.tree.gitrepo import Repository, tracked_files
from vmsandbox.policy.tree.gitrun import HostGit
from vmsandbox.process import Programs
from vmsandbox.review.text import shown

_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_PIECE = 1 << 20
_MAX_DEPTH = 120


@dataclass(frozen=True)
class Base:
    """The files of a commit: path → (mode, object id in hexadecimal). Empty: nothing is committed."""

    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    algorithm: str = "sha1"

    @classmethod
    def read(cls, git: HostGit, head: str | None, prefix: str, algorithm: str) -> Base:
        """The files of a commit below `prefix` ("" or "a/b"), relative to it."""
        if head is None:
            return cls({}, algorithm)
        found = git.run("ls-tree", "-r", "-z", "--full-tree", f"{head}:{prefix}", check=False, timeout=300)
        files = {}
        for row in os.fsdecode(found.stdout).split("\0")[:-1] if found.status == 0 else ():
            facts, _, path = row.partition("\t")
            mode, _kind, oid = facts.split(" ")
            files[path] = (int(mode, 8), oid)
        return cls(files, algorithm)


@dataclass
class Uncommitted:
    """entries: all folders (git keeps neither their modes nor empty ones), files and links that are not as committed.

    deleted: committed, but not there. unreadable: could not be looked at.
    """

    entries: list[Entry] = field(default_factory=list)
    deleted: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()


def uncommitted(root: Path, base: Base, repository: Repository | None, programs: Programs) -> Uncommitted:
    """Look through a project without following links. Ignored files are left out, unless git tracks them.

    Raises:
        UserInputError: the project is not a folder that can be read, or is nested too deep.
    """
    look = _Look(base, tracked_files(root, programs) | base.files.keys() if repository else frozenset())
    try:
        fd = os.open(root, OPEN_FOLDER)
    except OSError as error:
        raise UserInputError(f"cannot be read: {shown(os.fspath(root))}", details=str(error)) from error
    try:
        look.folder(fd, "", rules_above(root, repository) if repository else [], ignored=False)
    finally:
        os.close(fd)
    deleted = tuple(sorted(path for path, (mode, _) in base.files.items() if path not in look.seen and mode != GITLINK))
    return Uncommitted(look.entries, deleted, tuple(look.unreadable))


class _Look:
    """One look in progress."""

    def __init__(self, base: Base, tracked: frozenset[str]) -> None:
        self._base = base
        self._tracked = tracked
        self._tracked_folders = {
            path[:at] for path in tracked for at in range(len(path)) if path[at] == "/"
        }  # a submodule's too
        self.entries: list[Entry] = []
        self.seen: set[str] = set()
        self.unreadable: list[str] = []

    def folder(self, fd: int, prefix: str, rules: list[IgnoreFile], ignored: bool) -> None:
        """Look through one open folder; `prefix` is its path with a slash, "" for the root."""
        if prefix.count("/") > _MAX_DEPTH:
            raise UserInputError(f"the project is more than {_MAX_DEPTH} folders deep: {shown(prefix, 200)}")
        with os.scandir(fd) as listing:
            found = sorted(listing, key=lambda one: one.name)
        if any(one.name == ".gitignore" for one in found):
            content = read_ignore_file(".gitignore", fd, prefix + ".gitignore")
            rules = [*rules, IgnoreFile(content, prefix)] if content else rules
        for one in found:
            path = prefix + one.name
            if one.name == ".git":
                continue
            is_folder = one.is_dir(follow_symlinks=False)
            hidden = path not in self._tracked and (ignored or is_ignored(path, is_folder, rules))
            try:
                if is_folder:
                    if not hidden or path in self._tracked_folders:
                        self._enter(fd, one, path, rules, hidden)
                elif not hidden:
                    self._file(fd, one, path)
            except FileNotFoundError:
                continue  # gone since the listing
            except OSError:
                self.seen.add(path)
                self.unreadable.append(path)

    def _enter(self, parent: int, one: os.DirEntry[str], path: str, rules: list[IgnoreFile], hidden: bool) -> None:
        fd = os.open(one.name, OPEN_FOLDER, dir_fd=parent)
        try:
            status = os.fstat(fd)
            self.entries.append(Entry(path, "dir", status.st_mode & 0o777, 0, int(status.st_mtime)))
            self.folder(fd, path + "/", rules, hidden)
        finally:
            os.close(fd)

    def _file(self, parent: int, one: os.DirEntry[str], path: str) -> None:
        status = one.stat(follow_symlinks=False)
        self.seen.add(path)
        mode, oid = self._base.files.get(path, (0, ""))
        mtime = int(status.st_mtime)
        if stat.S_ISLNK(status.st_mode):
            target = os.readlink(one.name, dir_fd=parent)
            if mode != LINK or self._hash([os.fsencode(target)], len(os.fsencode(target))) != oid:
                self.entries.append(Entry(path, "symlink", 0o777, 0, mtime, target))
        elif stat.S_ISREG(status.st_mode):
            fd = os.open(one.name, _OPEN, dir_fd=parent)
            try:
                same_mode = mode != LINK and bool(mode & 0o111) == bool(status.st_mode & 0o100)
                if not oid or not same_mode or self._hash_file(fd) != oid:
                    self.entries.append(Entry(path, "file", status.st_mode & 0o777, status.st_size, mtime))
            finally:
                os.close(fd)

    def _hash_file(self, fd: int) -> str:
        size = os.fstat(fd).st_size
        return self._hash(iter(lambda: os.read(fd, _PIECE), b""), size)

    def _hash(self, pieces: Iterable[bytes], size: int) -> str:
        digest = hashlib.new(self._base.algorithm, b"blob %d\0" % size, usedforsecurity=False)
        for piece in pieces:
            digest.update(piece)
        return digest.hexdigest()
