"""Which file an execve would run, as the process that asks for it sees the file system, and what it may be called.

Without this a link, a path through /proc or a copy of a program would be judged by a name that its maker chose. Every
component is looked at, one after the other, below the caller's own root: os.path.realpath would follow absolute links
in this process's root, and /proc/self to this process.
"""

import errno
import os
import stat

from vmsandbox_commands import Program, bare

FOLDERS = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/usr/games", "/usr/lib/git-core")
_LINKS = 40  # as the kernel
_MOST_SCRIPT = 256  # bytes of a script's first line, as the kernel


class Caller:
    """The process: a pid to read /proc by (of a thread), or a root folder and a cwd for tests."""

    def __init__(self, pid=None, root=None, cwd=None):
        self.pid = pid
        self.root = f"/proc/{pid}/root" if root is None else root
        self._cwd = cwd
        self._group = None

    @property
    def cwd(self):
        if self._cwd is None:
            self._cwd = os.readlink(f"/proc/{self.pid}/cwd")
        return self._cwd

    @property
    def group(self):
        """Its thread group: what /proc/self is for it."""
        if self._group is None:
            self._group = status_of(self.pid)["Tgid"]
        return self._group


class Found:
    """A file. real: its path. info: os.stat_result. own: nobody but root can have put it there. links: [(path, own)].

    steady: os.stat of the same path finds the same file for every process.
    """

    __slots__ = ("info", "links", "open_as", "own", "real", "steady")

    def __init__(self, real, info, own, links, open_as, steady):
        self.real, self.info, self.own, self.links, self.open_as = real, info, own, links, open_as
        self.steady = steady


class Programs:
    """Finds programs. folders: where the system's own are."""

    def __init__(self, folders=FOLDERS):
        self._folders = folders
        self._stamp = None
        self._sizes, self._links, self._names = {}, {}, set()

    def program(self, caller, path, depth=0):
        """The Program that `path` is for this caller. Raises OSError with the errno of the execve."""
        return self.of(caller, find(caller, path), path, depth)

    def of(self, caller, found, path, depth=0):
        if not stat.S_ISREG(found.info.st_mode) or not found.info.st_mode & 0o111:
            raise OSError(errno.EACCES, "not a program")
        own = found.own and _is_ours(found.info) and self._is_the_systems(found)
        names, own_names = {os.path.basename(path), os.path.basename(found.real)}, set()
        paths, own_paths = {found.real}, set()
        for link, link_own in found.links:
            names.add(os.path.basename(link))
            paths.add(link)
            if own and link_own:
                own_names.add(os.path.basename(link))
                own_paths.add(link)
        names.discard("")
        if own:
            own_names.add(os.path.basename(found.real))
            own_paths.add(found.real)
            return Program(names, own_names, paths, own_paths, None, path, found.steady)
        own_paths.add(found.real)  # who names a worker's file by its path means it
        script = None
        with open(os.open(found.open_as, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as file:
            if file.read(2) == b"#!":
                script = self._script(caller, file.read(_MOST_SCRIPT - 2), depth)
            else:
                copied = self._copied(found, file)
                names |= copied
                own_names |= copied
        if script is None and not own_names and not self._is_a_systems_name(names):
            own_names.add(os.path.basename(found.real))
        return Program(names, own_names, paths, own_paths, script, path, steady=False)

    def _is_the_systems(self, found):
        """The caller may have a mount of its own over it."""
        try:
            here = os.stat(found.real)
        except OSError:
            return False
        return (here.st_dev, here.st_ino) == (found.info.st_dev, found.info.st_ino)

    def _script(self, caller, line, depth):
        if depth >= 4:
            raise OSError(errno.ELOOP, "scripts")
        words = line.partition(b"\n")[0].strip(b" \t").split(None, 1)
        if not words:
            raise OSError(errno.ENOEXEC, "no interpreter")
        interpreter, *before = (os.fsdecode(word.strip(b" \t")) for word in words)
        return self.program(caller, interpreter, depth + 1), tuple(before)

    def _is_a_systems_name(self, names):
        self._refresh()
        return any(bare(name) in self._names for name in names)

    def _copied(self, found, file):
        """The names of the system's program that this file is a copy of, byte for byte."""
        self._refresh()
        for path in self._sizes.get(found.info.st_size, ()):
            with open(path, "rb", buffering=0) as other:
                file.seek(0)
                while (piece := file.read(1 << 16)) == other.read(1 << 16):
                    if not piece:
                        return {os.path.basename(path)} | self._links.get(path, set())
        return set()

    def _refresh(self):
        stamp = [_changed(folder) for folder in self._folders]
        if stamp == self._stamp:
            return
        self._stamp, self._sizes, self._links, self._names = stamp, {}, {}, set()
        for folder in self._folders:
            try:
                entries = list(os.scandir(folder))
            except OSError:
                continue
            for entry in entries:
                self._names.add(bare(entry.name))
                try:
                    info = entry.stat()
                except OSError:
                    continue
                if not stat.S_ISREG(info.st_mode):
                    continue
                if entry.is_symlink():
                    self._links.setdefault(os.path.realpath(entry.path), set()).add(entry.name)
                elif info.st_size:
                    self._sizes.setdefault(info.st_size, []).append(entry.path)


def find(caller, path):
    """The file at the end of a path. Raises OSError with the errno of the execve."""
    if not path:
        raise OSError(errno.ENOENT, "no path")
    if len(os.fsencode(path)) >= 4096:
        raise OSError(errno.ENAMETOOLONG, "too long")
    start = path if path.startswith("/") else caller.cwd + "/" + path
    todo, at, safe, links = start.split("/")[::-1], [], [True], []
    info, seen = None, 0
    while todo:
        part = todo.pop()
        if part in ("", "."):
            continue
        if info is not None and not stat.S_ISDIR(info.st_mode):
            raise OSError(errno.ENOTDIR, "not a folder")
        if part == "..":
            del at[-1:], safe[max(len(safe) - 1, 1) :]
            continue
        if at == ["proc"] and part in ("self", "thread-self"):
            todo += [str(caller.group)] if part == "self" else [str(caller.pid), "task", str(caller.group)]
            continue
        here = "/" + "/".join([*at, part])
        info = os.lstat(caller.root + here)
        if not stat.S_ISLNK(info.st_mode):
            at.append(part)
            safe.append(safe[-1] and _is_ours(info))
            continue
        seen += 1
        if seen > _LINKS:
            raise OSError(errno.ELOOP, "too many links")
        target = os.readlink(caller.root + here)
        if at[:1] == ["proc"] and _is_magic(at, part):
            return _through_proc(caller, here, target, todo, links)
        links.append((here, safe[-1] and info.st_uid == 0))
        info = None
        if target.startswith("/"):
            at, safe = [], [True]
        todo += target.split("/")[::-1]
    if info is None or not at or path.endswith("/"):
        raise OSError(errno.EACCES, "a folder")
    real = "/" + "/".join(at)
    return Found(real, info, safe[-2], links, caller.root + real, True)


def find_descriptor(caller, number):
    """The file that a descriptor of the caller's is open on (execveat with AT_EMPTY_PATH)."""
    here = f"/proc/{caller.pid}/fd/{number}"
    return _opened(caller, here, os.readlink(here), [])


def _is_magic(at, part):
    return len(at) > 1 and at[1].isdigit() and (part in ("exe", "cwd", "root") or at[-1] in ("fd", "map_files"))


def _through_proc(caller, here, target, todo, links):
    """What a link of /proc leads to: not the text that it shows, but what is open there."""
    if not todo:
        return _opened(caller, caller.root + here, target, links)
    beyond = caller.root + target
    if not os.path.samestat(os.stat(caller.root + here), os.stat(beyond)):
        raise OSError(errno.EACCES, "a folder that has no path")
    return find(caller, "/".join([target, *todo[::-1]]))


def _opened(caller, here, target, links):
    info = os.stat(here)
    try:
        found = find(caller, target)
        if os.path.samestat(found.info, info):
            return Found(found.real, info, found.own, links + found.links, here, False)
    except OSError:
        pass
    return Found(target, info, False, links, here, False)


def _is_ours(info):
    return info.st_uid == 0 and not info.st_mode & 0o022


def _changed(folder):
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return None


def status_of(pid):
    """Tgid, PPid and Uid (a list: real, effective, saved, file system) from /proc/PID/status."""
    with open(f"/proc/{pid}/status", "rb") as file:
        fields = dict(line.split(b":", 1) for line in file.read(4096).splitlines() if b":" in line)
    return {
        "Tgid": int(fields[b"Tgid"]), "PPid": int(fields[b"PPid"]), "Uid": [int(one) for one in fields[b"Uid"].split()]
    }  # fmt: skip
