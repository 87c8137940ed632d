"""Mounts that guard a project, made in the root mount namespace: from there they reach every SSH unit's own namespace.

Without the care here the worker could turn the tool against itself: root walks through folders that the worker owns, so
no name is followed through a link, and every mount is made from descriptors, with its flags set before it is attached
(open_tree(2), mount_setattr(2), move_mount(2)): there is no moment in which a read-only folder could be written.
"""

import ctypes
import os
import stat
import struct

LIBC = ctypes.CDLL(None, use_errno=True)
OPEN_TREE, MOVE_MOUNT, MOUNT_SETATTR = 428, 429, 442  # the same on every architecture
OPEN_TREE_CLONE, AT_EMPTY_PATH = 1, 0x1000
MOVE_FROM_FD, MOVE_TO_FD = 0x4, 0x40
MOUNT_ATTR_RDONLY, MS_PRIVATE = 1, 1 << 18
MNT_DETACH = 2
WORKER = 1000  # its uid
PROJECTS = "/home/claude-worker/projects"
INACCESSIBLE = "/run/systemd/inaccessible/dir"  # mode 0000, root's
PLACE = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC

mounted = []  # paths, in the order in which they were mounted


def call(number, *arguments):
    result = LIBC.syscall(number, *arguments)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def place(path):
    """A descriptor of what is at this absolute path now, no part of it a link."""
    fd = os.open("/", PLACE)
    for name in path.strip("/").split("/"):
        try:
            if name in ("", ".", ".."):
                raise ValueError("not a path that may be mounted on: " + path)
            below = os.open(name, PLACE, dir_fd=fd)
        finally:
            os.close(fd)
        fd = below
        if stat.S_ISLNK(os.fstat(fd).st_mode):
            os.close(fd)
            raise ValueError("a symbolic link is in the way: %s in %s" % (name, path))
    return fd


def bind(target, source=None, read_only=None):
    """Mount `source` (the folder or file itself, without what is mounted in it) on `target`, or `target` on itself.

    read_only: True or False sets it; None keeps what the source's mount has.
    """
    at = place(target)
    try:
        of = place(source) if source else os.dup(at)
        try:
            tree = call(OPEN_TREE, of, b"", OPEN_TREE_CLONE | AT_EMPTY_PATH | os.O_CLOEXEC)
        finally:
            os.close(of)
        try:
            on, off = (MOUNT_ATTR_RDONLY * (read_only is True), MOUNT_ATTR_RDONLY * (read_only is False))
            # Private: as a peer of what it is a copy of, it would be given every mount made in it twice.
            attributes = struct.pack("QQQQ", on, off, MS_PRIVATE, 0)
            call(MOUNT_SETATTR, tree, b"", AT_EMPTY_PATH, attributes, len(attributes))
            call(MOVE_MOUNT, tree, b"", at, b"", MOVE_FROM_FD | MOVE_TO_FD)
        finally:
            os.close(tree)
    finally:
        os.close(at)
    mounted.append(target)


def undo():
    """Take away all that was mounted here, the last first."""
    while mounted:
        fd = place(mounted[-1])
        try:
            if LIBC.umount2(b"/proc/self/fd/%d" % fd, MNT_DETACH):
                error = ctypes.get_errno()
                raise OSError(error, "%s: %s" % (mounted[-1], os.strerror(error)))
        finally:
            os.close(fd)
        mounted.pop()


def make(path, below, owner):
    """Make a missing folder below `below`: root's only where its parent is there (else False), the worker's with it."""
    parent, name = os.path.split(path)
    try:
        fd = place(parent)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        if owner == 0 or not parent.startswith(below + "/"):
            return False
        make(parent, below, owner)
        fd = place(parent)
    try:
        if name not in os.listdir("/proc/self/fd/%d" % fd):
            os.mkdir(name, 0o755 if owner else 0o700, dir_fd=fd)
            made = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            os.fchown(made, owner, owner)
            os.close(made)
    except NotADirectoryError:
        return False
    finally:
        os.close(fd)
    return True


def project(request):
    """{"state": "open"}: the worker may write its projects, for a push. {"state": "guarded", "path", "writable",
    "denied"}: only `writable` of the project at `path` may be written (null: all), and `denied` cannot be entered.

    A guarded project cannot be renamed, nor can any folder on the way to what is denied.
    """
    undo()
    if request["state"] == "open":
        bind(PROJECTS, read_only=False)  # a unit that sees all else read-only is given this as it is
        return {"mounted": len(mounted)}
    path, writable = request.get("path"), request["writable"]
    if path is None:
        bind(PROJECTS, read_only=writable is not None)
        return {"mounted": len(mounted)}
    if not path.startswith(PROJECTS + "/"):
        raise ValueError("not a project's path: " + path)
    for name in writable or ():
        make(path + "/" + name, path, WORKER)
    denied = [name for name in request["denied"] if make(path + "/" + name, path, 0)]
    bind(PROJECTS, read_only=writable is not None)
    bind(path, read_only=writable is not None)
    for name in writable or ():
        bind(path + "/" + name, read_only=False)
    for name in denied:
        parts = name.split("/")
        for depth in range(1, len(parts)):
            above = path + "/" + "/".join(parts[:depth])
            if above not in mounted:
                bind(above)
        bind(path + "/" + name, INACCESSIBLE)
    return {"mounted": len(mounted)}
