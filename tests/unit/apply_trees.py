"""Trees as values, for the tests of apply: made, looked at, compared, and turned into operations."""

from __future__ import annotations

import ctypes
import hashlib
import io
import os
import shutil
import stat
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from vmsandbox import failpoints
from vmsandbox.apply.transaction import apply
from vmsandbox.review.manifest import Item
from vmsandbox.review.values import Operation

# path: (mode, bytes) for a file, mode for a folder, target for a link
Tree = Mapping[str, "tuple[int, bytes] | int | str"]

OLD: Tree = {
    "README": (0o644, b"read me\n"),
    "run.sh": (0o644, b"#!/bin/sh\n"),
    "empty": (0o644, b""),
    "big": (0o644, b"old" * 100_000),
    "src": 0o755,
    "src/a.py": (0o644, b"a = 1\n"),
    "src/b.py": (0o755, b"b = 1\n"),
    "src/moved.py": (0o644, b"the same bytes\n"),
    "gone": 0o755,
    "gone/deep": 0o700,
    "gone/deep/file": (0o600, b"x"),
    "gone/link": "../README",
    "becomes-folder": (0o644, b"was a file\n"),
    "becomes-file": 0o755,
    "becomes-file/inside": (0o644, b"i"),
    "becomes-link": (0o644, b"was a file too\n"),
    "link": "README",
    "link-to-file": "src/a.py",
    "open": 0o755,
    "open/x": (0o644, b"x"),
    "same": 0o755,
    "same/untouched": (0o640, b"never\n"),
}
NEW: Tree = {
    "README": (0o644, b"read me again\n"),
    "run.sh": (0o755, b"#!/bin/sh\n"),
    "empty": (0o644, b"no longer\n"),
    "big": (0o600, b"new" * 150_000),
    "src": 0o755,
    "src/a.py": (0o644, b"a = 2\n"),
    "src/b.py": (0o755, b"b = 1\n"),
    "lib": 0o755,
    "lib/sub": 0o555,
    "lib/sub/moved.py": (0o644, b"the same bytes\n"),
    "lib/sub/\udcff\n": (0o444, b"odd name"),
    "becomes-folder": 0o755,
    "becomes-folder/inside": (0o644, b"in\n"),
    "becomes-file": (0o644, b"now a file\n"),
    "becomes-link": "same",
    "link": "src/a.py",
    "link-to-file": (0o644, b"now a file\n"),
    "open": 0o500,
    "open/x": (0o644, b"x"),
    "open/y": (0o644, b"y"),
    "same": 0o755,
    "same/untouched": (0o640, b"never\n"),
}


class Bytes:
    """Contents from memory."""

    def __init__(self, *trees: Tree) -> None:
        self.blobs = {
            hashlib.sha256(value[1]).hexdigest(): value[1]
            for tree in trees
            for value in tree.values()
            if isinstance(value, tuple)
        }

    def open(self, sha256: str) -> BinaryIO | None:
        return io.BytesIO(self.blobs[sha256]) if sha256 in self.blobs else None


def item(value: tuple[int, bytes] | int | str) -> Item:
    if isinstance(value, str):
        return Item("symlink", 0, target=value)
    if isinstance(value, int):
        return Item("dir", value)
    return Item("file", value[0], len(value[1]), hashlib.sha256(value[1]).hexdigest())


def make(root: Path, tree: Tree) -> Path:
    """Make a tree in a folder that is made too."""
    root.mkdir(exist_ok=True)
    folders = []
    for path in sorted(tree, key=lambda one: one.split("/")):
        value = tree[path]
        place = root / path
        if isinstance(value, str):
            place.symlink_to(value)
        elif isinstance(value, int):
            place.mkdir()
            folders.append((place, value))
        else:
            place.write_bytes(value[1])
            place.chmod(value[0])
    for place, mode in reversed(folders):
        place.chmod(mode)
    return root


@contextmanager
def folder_in_memory() -> Iterator[Path]:
    """A folder of one's own, on a file system where fsync costs nothing if there is one: thousands of them."""
    place = Path(tempfile.mkdtemp(prefix="vmsb-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    try:
        yield place
    finally:
        remove(place)


def remove(root: Path) -> None:
    """Remove a tree with whatever modes."""
    for folder, _, _ in os.walk(root):
        os.chmod(folder, 0o700)
        for name in os.listdir(folder):
            if not os.path.islink(os.path.join(folder, name)):
                os.chmod(os.path.join(folder, name), 0o700)
    shutil.rmtree(root)


def seen(root: Path) -> dict[str, tuple[int, bytes] | int | str]:
    """All that is in a folder, as a tree; modes with all twelve bits."""
    found: dict[str, tuple[int, bytes] | int | str] = {}
    for folder, folders, files in os.walk(root):
        for name in folders + files:
            place = os.path.join(folder, name)
            status = os.lstat(place)
            mode = stat.S_IMODE(status.st_mode)
            path = os.path.relpath(place, root)
            if stat.S_ISLNK(status.st_mode):
                found[path] = os.readlink(place)
            elif stat.S_ISDIR(status.st_mode):
                found[path] = mode
            else:
                found[path] = (mode, Path(place).read_bytes())
    return found


def operations(old: Tree, new: Tree) -> list[Operation]:
    """What makes the one tree of the other."""
    rows = []
    for path in sorted({*old, *new}):
        before = item(old[path]) if path in old else None
        after = item(new[path]) if path in new else None
        if before != after:
            rows.append(Operation(path, before, after))
    return rows


CHANGES = operations(OLD, NEW)


def in_child(function: Callable[[], object]) -> int:
    """Run it in a process of its own (a fork); its exit status, negative for a signal. An exception is status 70."""
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def places(root: Path, changes: list[Operation] = CHANGES, old: Tree = OLD, new: Tree = NEW) -> list[str]:
    """All failpoints that one undisturbed apply reaches, in order. `root` is made and removed."""
    hits: list[str] = []
    make(root, old)
    with failpoints.switched_on(hits.append):
        apply(root, changes, Bytes(new), label="t")
    assert seen(root) == new
    remove(root)
    return hits


def moments(names: list[str]) -> list[int]:
    """Which of these places differ from those around them: of a run of copies or removals the first and last."""
    alike = ("apply.staged-one", "apply.removing")
    return [
        number
        for number, name in enumerate(names)
        if not (name in alike and names[number - 1 : number + 2] == [name] * 3)
    ]


def at(number: int, action: Callable[[], object], *, forever: bool = False) -> Callable[[str], None]:
    """Do it at the number-th place that is reached (from 0), or from then on."""
    count = iter(range(10**9))

    def reached(_name: str) -> None:
        now = next(count)
        if now == number or (forever and now > number):
            action()

    return reached


_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_MS_REC, _MS_PRIVATE = 0x4000, 1 << 18


def enter_mount_namespace() -> bool:
    """Let this process (a child!) mount what only it sees; also for ordinary users where the kernel allows it."""
    libc = ctypes.CDLL(None, use_errno=True)
    uid, gid = os.geteuid(), os.getegid()
    if libc.unshare(_CLONE_NEWNS | (0 if uid == 0 else _CLONE_NEWUSER)) != 0:
        return False
    if uid != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    return libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None) == 0


def mount_small(place: Path, size: str) -> bool:
    """A tmpfs of this size there, for `enter_mount_namespace`'s process."""
    libc = ctypes.CDLL(None, use_errno=True)
    place.mkdir(exist_ok=True)
    return libc.mount(b"none", os.fsencode(place), b"tmpfs", 0, f"size={size},mode=755".encode()) == 0


def small_disk(place: Path, kind: str) -> bool:
    """A file system of its own, of a few MiB, for this process (a child!) alone. False: not possible here."""
    if not enter_mount_namespace():
        return False
    if kind == "tmpfs":
        return mount_small(place, "4m")
    place.mkdir()
    image = place.parent / "image"
    image.write_bytes(b"")
    os.truncate(image, 8 << 20)
    return os.system(f"mkfs.ext4 -q -m 0 {image} && mount -o loop {image} {place} 2>/dev/null") == 0
