"""Copies what is new into the staging folder, with its digest verified, its owner and its mode.

All that can fail for want of space, quota or bytes fails here, while nothing of the project is changed.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Sequence
from contextlib import suppress

from vmsandbox.apply.folders import Folders, NotAFolderError
from vmsandbox.apply.plan import Step
from vmsandbox.apply.staging import Staging, is_many
from vmsandbox.errors import HostError
from vmsandbox.failpoints import failpoint
from vmsandbox.review.manifest import Item
from vmsandbox.review.text import shown
from vmsandbox.review.values import Contents

_CHUNK = 1 << 20


def stage(folders: Folders, staging: Staging, steps: Sequence[Step], contents: Contents) -> None:
    """Make `new/<number>` for each step that needs one. A few files are synced too (see `apply.staging`).

    Raises:
        HostError: bytes are missing or are not those of the digest.
        OSError: no space, quota, permission.
    """
    fresh = [step for step in steps if step.act in ("in", "swap")]
    space = os.fstatvfs(staging.root_fd)
    needed = sum(step.after.size for step in fresh if step.after)
    if needed > space.f_bavail * space.f_frsize:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    owners = _Owners(folders)
    sync = not is_many(len(steps))
    for step in fresh:
        assert step.after is not None
        name = str(step.number)
        if step.after.kind == "dir":
            os.mkdir(name, 0o700, dir_fd=staging.new)
        elif step.after.kind == "symlink":
            os.symlink(step.after.target or "", name, dir_fd=staging.new)
        else:
            _copy(staging.new, name, step.path, step.after, contents, sync=sync)
        owners.give(staging.new, name, step)
        failpoint("apply.staged-one")


def _copy(folder_fd: int, name: str, path: str, item: Item, contents: Contents, *, sync: bool) -> None:
    source = contents.open(item.sha256 or "")
    if source is None:
        raise HostError(
            f"the bytes of this file are not there (any more): {shown(path)}",
            details=f"sha256 {item.sha256}",
            resolution="nothing was changed; get the changes from the guest again",
        )
    with source:
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder_fd)
        with os.fdopen(fd, "wb", buffering=0) as target:
            sha = hashlib.sha256()
            left = item.size
            while left:
                piece = source.read(min(left, _CHUNK))
                if not piece:
                    break
                sha.update(piece)
                left -= len(piece)
                view = memoryview(piece)
                while view:
                    view = view[target.write(view) :]
            if left or source.read(1) or sha.hexdigest() != item.sha256:
                raise HostError(
                    f"the bytes of this file are not those that were reviewed: {shown(path)}",
                    details=f"expected {item.size} bytes with sha256 {item.sha256}",
                    resolution="nothing was changed; get the changes from the guest again",
                )
            os.fchmod(fd, item.mode)
            if sync:
                os.fsync(fd)


class _Owners:
    """Gives staged things the owner of what they replace or, to root's, that of the folder they come into."""

    def __init__(self, folders: Folders) -> None:
        self._folders = folders
        self._ours = (os.geteuid(), os.getegid())
        self._of_folder: dict[str, tuple[int, int]] = {}

    def give(self, folder_fd: int, name: str, step: Step) -> None:
        """Set owner and group where we may; where we may not they stay ours, as with any editor."""
        if step.before is not None:
            there = self._status(step.path)
            owner = (there.st_uid, there.st_gid) if there else self._ours
        else:
            owner = self._folder_owner(step.path.rpartition("/")[0])
        if owner == self._ours:
            return
        for uid, gid in (owner, (-1, owner[1])):
            with suppress(PermissionError):
                os.chown(name, uid, gid, dir_fd=folder_fd, follow_symlinks=False)
                return

    def _folder_owner(self, folder: str) -> tuple[int, int]:
        if folder not in self._of_folder:
            there = self._status(folder)
            if there is None:  # it is new as well
                self._of_folder[folder] = self._folder_owner(folder.rpartition("/")[0])
            elif self._ours[0] == 0:
                self._of_folder[folder] = (there.st_uid, there.st_gid)
            else:
                self._of_folder[folder] = (
                    self._ours[0],
                    there.st_gid if there.st_mode & stat.S_ISGID else self._ours[1],
                )
        return self._of_folder[folder]

    def _status(self, path: str) -> os.stat_result | None:
        if not path:
            return os.fstat(self._folders.root_fd)
        with suppress(NotAFolderError, FileNotFoundError):
            folder, name = self._folders.parent(path)
            return os.stat(name, dir_fd=folder, follow_symlinks=False)
        return None
