"""The project as it was copied in: the old side of a comparison, read from the host's own tree.

The host's tree may have changed since. Bytes are handed out only if they are those that were pushed, by digest, so
that a review never shows a difference against something that the guest has not had.
"""

from __future__ import annotations

import hashlib
import os
import stat
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import BinaryIO, cast

from vmsandbox.review.manifest import Manifest

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # O_NONBLOCK: a FIFO there must not block
_IN_MEMORY = 8 << 20
_PIECE = 1 << 20


class PushedContents:
    """`Contents` of what was pushed from a project folder.

    Args:
        root: the project on the host.
        pushed: what was copied in.
    """

    def __init__(self, root: Path, pushed: Manifest) -> None:
        self._root = root
        self._pushed = pushed

    def open(self, sha256: str) -> BinaryIO | None:
        """A copy of the bytes with this digest, or None if no file of the project has them any more."""
        for path in self._paths.get(sha256, ()):
            with suppress(OSError):
                copy = self._copy(path, sha256)
                if copy is not None:
                    return copy
        return None

    @cached_property
    def _paths(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for path, item in self._pushed.items.items():
            if item.sha256 is not None:
                found.setdefault(item.sha256, []).append(path)
        return found

    def _copy(self, path: str, sha256: str) -> BinaryIO | None:
        size = self._pushed.items[path].size
        fd = open_below(self._root, path)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_size != size:
                return None
            copy = cast(BinaryIO, SpooledTemporaryFile(max_size=_IN_MEMORY))  # noqa: SIM115 - handed out
            sha = hashlib.sha256()
            while piece := os.read(fd, _PIECE):
                sha.update(piece)
                copy.write(piece)
        finally:
            os.close(fd)
        if sha.hexdigest() != sha256:
            copy.close()
            return None
        copy.seek(0)
        return copy


def open_below(root: Path, path: str) -> int:
    """Open a file for reading, no component of it through a link. Raises OSError."""
    *folders, name = path.split("/")
    parent = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for folder in folders:
            child = os.open(folder, _FOLDER, dir_fd=parent)
            os.close(parent)
            parent = child
        return os.open(name, _FILE, dir_fd=parent)
    finally:
        os.close(parent)
