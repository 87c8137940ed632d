"""Where a policy's paths lie in the guest: what the worker may write there, and what it cannot enter.

Pure. The same words mean another place on the host (`policy.denied`), where they decide what is never sent.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from vmsandbox.errors import UserInputError
from vmsandbox.policy.tree.globs import is_glob
from vmsandbox.policy.values import FilesystemPolicy
from vmsandbox.spec import PROJECTS, WORKER_HOME

ETC = "/etc"
TMP = "/tmp"  # noqa: S108 - the guest's
# Hidden, these would leave no guest to log in to.
_NEEDED = (
    "/usr/bin", "/usr/sbin", "/usr/lib/vmsandbox", "/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib/openssh",
    "/bin", "/sbin", "/lib", "/lib64", "/dev", "/proc", "/sys", "/run/vmsandbox", "/run/sshd", "/run/systemd", PROJECTS,
)  # fmt: skip
# What every program asks of /etc, bound back where /etc is denied. Nothing of it is secret; shadow, sudoers, keys,
# units, cron and what else an administrator keeps there stays hidden.
ETC_NEEDED = (
    "passwd", "group", "nsswitch.conf", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "hosts", "host.conf", "hostname",
    "gai.conf", "networks", "protocols", "services", "resolv.conf", "machine-id", "localtime", "timezone", "os-release",
    "debian_version", "locale.conf", "locale.alias", "environment", "shells", "login.defs", "profile", "profile.d",
    "bash.bashrc", "inputrc", "terminfo", "mime.types", "alternatives", "ssl", "ca-certificates", "gitconfig",
    "pip.conf", "npmrc", "python3", "python3.13", "perl", "java-11-openjdk", "java-17-openjdk", "java-21-openjdk",
    "vmsandbox", "ssh/ssh_config", "xdg",
)  # fmt: skip
# Those that a session's identity writes: empty files until then, because what is not there cannot be bound.
ETC_WRITTEN = ("gitconfig", "npmrc", "pip.conf")


@dataclass(frozen=True)
class GuestPaths:
    """Absolute paths in the guest, and names relative to the project's folder.

    writable          all that the worker may write beside the project and what is memory; None: whatever it owns
    project_writable  of the project; None: all of it
    hidden            cannot be entered; /etc keeps ETC_NEEDED
    project_hidden    the same, of the project
    """

    writable: tuple[str, ...] | None
    project_writable: tuple[str, ...] | None
    hidden: tuple[str, ...]
    project_hidden: tuple[str, ...]

    @property
    def tmp_is_writable(self) -> bool:
        """Whether /tmp itself may be written."""
        return self.writable is None or any(is_within(TMP, path) for path in self.writable)

    @property
    def guards_project(self) -> bool:
        """Whether anything in the project has to be mounted over."""
        return self.project_writable is not None or bool(self.project_hidden)


def guest_paths(filesystem: FilesystemPolicy) -> GuestPaths:
    """What `sandbox.filesystem` means in a guest. Globs count on the host alone: what they match is not sent.

    Raises:
        UserInputError: a denied path without which no guest can run.
    """
    inside, outside = _places(filesystem.allowed_paths)
    hidden_inside, hidden = _places(path for path in filesystem.denied_paths if not is_glob(path))
    for path in hidden:
        _check_can_be_hidden(path)
    writable = None
    if filesystem.allowed_paths and "/" not in outside:
        writable = _sorted({*outside, *_writable_memory(filesystem, outside)})
    project_writable: tuple[str, ...] | None = None
    whole = "." in inside or any(is_within(PROJECTS, path) for path in outside)
    if filesystem.read_only:
        project_writable = (_plain(filesystem.output),) if filesystem.output else ()
    elif filesystem.allowed_paths and not whole:
        project_writable = _sorted({*inside, ".git"})
    return GuestPaths(writable, project_writable, _sorted(hidden), _sorted(hidden_inside - {"."}))


def is_within(path: str, folder: str) -> bool:
    """Whether an absolute path is a folder or below it."""
    return path == folder or folder == "/" or path.startswith(folder + "/")


def parents_below(path: str, roots: Iterable[str]) -> Iterator[str]:
    """The folders between one of the roots and a path, the outermost first; neither of the two themselves."""
    roots = tuple(roots)
    parts = path.split("/")
    for depth in range(2, len(parts)):
        parent = "/".join(parts[:depth])
        if any(parent != root and is_within(parent, root) for root in roots):
            yield parent


def _places(paths: Iterable[str]) -> tuple[set[str], set[str]]:
    """Split paths as written in a policy into those in the project (relative) and all others (absolute)."""
    inside, outside = set(), set()
    for path in paths:
        if path == "~" or path.startswith("~/"):
            outside.add(_plain(WORKER_HOME + path[1:]))
        elif path.startswith("~"):
            continue  # somebody's home on the host: no such account in the guest
        elif path.startswith("/"):
            outside.add("/" + _plain(path).lstrip("/"))
        else:
            inside.add(_plain(path))
    return inside, outside


def _plain(path: str) -> str:
    plain = posixpath.normpath(path)
    if plain == ".." or plain.startswith("../"):
        raise UserInputError(
            f"a path of the policy leads out of the project: {path!r}",
            resolution="write it relative to the project without `..`, or in full",
        )
    return plain


def _writable_memory(filesystem: FilesystemPolicy, allowed: Iterable[str]) -> set[str]:
    """A folder that was asked for as memory may be written, unless a path in it is what may be."""
    return {
        posixpath.normpath(one.path)
        for one in filesystem.tmpfs
        if not any(path != one.path and is_within(path, one.path) for path in allowed)
    }


def _check_can_be_hidden(path: str) -> None:
    needed = next((one for one in _NEEDED if is_within(one, path)), None)
    if needed is None and any(path == f"{ETC}/{one}" for one in ETC_NEEDED):
        needed = path
    if needed:
        raise UserInputError(
            f"{path} cannot be hidden in the guest: nothing runs there without {needed}",
            details=f"filesystem.denied_paths has {path!r}",
            resolution="deny what is in it that matters, by name; a guest's own system files are not your host's",
        )


def _sorted(paths: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(paths))
