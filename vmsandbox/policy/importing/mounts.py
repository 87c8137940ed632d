"""What volumes and mounts come to: which of them is the project, what of it may be written, what is memory.

Without it `./project:/workspace:ro` would be a path in a list, and the project would stay writable. Nothing of the host
is mounted into a guest: the project is copied in, and what changed is reviewed on its way back.
"""

from __future__ import annotations

import posixpath

from vmsandbox.policy.format.rendering import plain_size
from vmsandbox.policy.format.words import tmpfs_path
from vmsandbox.policy.importing.draft import Draft, Mount
from vmsandbox.policy.importing.texts import options, shown, size
from vmsandbox.spec import WORKER_HOME

TMPFS_SIZE = 256 << 20  # where a file says none: docker would take half of the host's memory
_WORKSPACES = ("/workspace", "/workspaces", "/work", "/app", "/src", "/code", "/project", "/repo")
_SOCKETS = ("docker.sock", "containerd.sock", "podman.sock", "crio.sock")


def take_tmpfs(draft: Draft, at: str, path: str, settings: dict[str, str]) -> None:
    """A tmpfs with docker's options."""
    where, moved = _in_the_guest(path)
    try:
        where = tmpfs_path(where)
    except ValueError as error:
        draft.leave(at, f"{shown(path)}: {error}")
        return
    given = size(settings["size"]) if "size" in settings else None
    how = [moved] if moved else []
    if given is None:
        how.append(f"no size in bytes is given: {plain_size(TMPFS_SIZE)}")
    for name in settings:
        if name in ("suid", "dev"):
            draft.leave(f"{at} {name}", "a tmpfs is always nosuid and nodev")
        elif name in ("mode", "uid", "gid", "nr_inodes", "ro"):
            draft.leave(f"{at} {shown(name)}", "a tmpfs belongs to the worker alone and can be written")
        elif name not in ("size", "exec", "noexec", "nosuid", "nodev", "rw"):
            draft.leave(f"{at} {shown(name)}", "there is no key for this option of a tmpfs")
    entry = {"path": where, "size": plain_size(given or TMPFS_SIZE), "exec": "exec" in settings}
    if any(one["path"] == where for one in draft.sandbox.get("filesystem", {}).get("tmpfs", ())):
        draft.leave(at, f"there is a tmpfs on {where} already")
        return
    draft.add(at, "filesystem.tmpfs", entry, "; ".join(how))


def take_volume(draft: Draft, at: str, text: str) -> None:
    """`SOURCE:TARGET[:OPTIONS]`, or `TARGET` alone."""
    parts = text.split(":")
    if len(parts) == 1:
        draft.leave(at, "a volume of docker's: nothing outlives a session")
        return
    settings = options(parts[2]) if len(parts) > 2 else {}
    take_mount(draft, at, parts[0], parts[1], "ro" in settings or "readonly" in settings)


def take_mount(draft: Draft, at: str, source: str, target: str, read_only: bool) -> None:
    """Note a bind mount: what becomes of it depends on the others."""
    if not target.startswith("/"):
        draft.leave(at, f"not an absolute path in the container: {shown(target)}")
    elif not source.startswith((".", "/", "~")):
        draft.leave(at, f"{shown(source)} is a volume of docker's: nothing outlives a session")
    elif posixpath.basename(source) in _SOCKETS:
        draft.leave(at, "who reaches this socket is root on the host: nothing of the host is mounted into a guest")
    else:
        draft.mounts.append(Mount(at, posixpath.normpath(source), posixpath.normpath(target), read_only))


def settle_mounts(draft: Draft) -> None:
    """Decide what all mounts and `read_only` together come to."""
    project = _project(draft)
    writable: list[str] = []
    for one in draft.mounts:
        if one is project:
            where = "./" if one.source == "." else f"./{one.source}"
            how = "" if one.source == "." else f"the project is the folder {where}: start the session on it"
            draft.set(one.at, "filesystem.project", "read-only" if one.read_only else "writable", how)
            writable += [] if one.read_only else ["./"]
        elif project is not None and one.target.startswith(project.target + "/"):
            _nested(draft, project, one)
        else:
            draft.leave(
                one.at,
                f"nothing of the host is mounted into a guest: what {shown(one.target)} needs goes into the project, "
                "an image recipe or session.post_create",
            )
    if draft.read_only is not None:
        writable += [one["path"] for one in draft.sandbox.get("filesystem", {}).get("tmpfs", ())]
        if not writable:
            writable.append("/tmp")  # noqa: S108 - a path of the guest
        for path in writable:
            draft.add(draft.read_only, "filesystem.allowed_paths", path, f"{path} alone may be written")


def _nested(draft: Draft, project: Mount, one: Mount) -> None:
    """A mount below the project's."""
    below = "./" + posixpath.relpath(one.target, project.target)
    if one.read_only == project.read_only:
        draft.always(one.at, f"{below} is a part of the project")
    elif one.read_only:
        draft.leave(one.at, f"{below} alone cannot be read-only: name what may be written in filesystem.allowed_paths")
    elif draft.sandbox.get("filesystem", {}).get("output", below) != below:
        draft.leave(one.at, "a read-only project has one output folder, and there is one already")
    else:
        draft.set(
            one.at, "filesystem.output", below, f"comes back as the project's {below}, not into {shown(one.source)}"
        )


def _project(draft: Draft) -> Mount | None:
    """The mount that is the project: where the work is done, else what contains others, else a usual place."""
    inside = [one for one in draft.mounts if one.source == "." or not one.source.startswith(("..", "/", "~"))]
    for fits in (
        lambda one: one.target == draft.working_dir,
        lambda one: one.source == ".",
        lambda one: any(other.target.startswith(one.target + "/") for other in inside),
        lambda one: one.target in _WORKSPACES or posixpath.dirname(one.target) in _WORKSPACES,
    ):
        found = [one for one in inside if fits(one)]
        if found:
            return found[0]
    return None


def _in_the_guest(path: str) -> tuple[str, str]:
    """A path of the container's user as the worker's, and what to say about it."""
    parts = path.split("/")
    if path.startswith("/home/") and len(parts) > 3 and not path.startswith(f"{WORKER_HOME}/"):
        return posixpath.join(WORKER_HOME, *parts[3:]), f"the home of the guest is {WORKER_HOME}"
    return path, ""
