"""Which path of a policy lies in which, and which pattern covers which.

Without one answer, a merge and a comparison of policies would disagree on whether `~/x` is more than `/home`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from vmsandbox.policy.values import Tmpfs
from vmsandbox.spec import PROJECTS, WORKER_HOME

# A project has a name of its own below PROJECTS; no path that a person writes has this one.
_PROJECT = f"{PROJECTS}/\0"
# What the worker may write where a policy has no allowed_paths.
USUALLY_WRITABLE = ("./", "~/", "/tmp")  # noqa: S108


def inside(path: str, folder: str) -> bool:
    """Whether a path lies in a folder, or is it. Both canonical: `./…`, `~/…` or absolute."""
    inner, outer = _absolute(path), _absolute(folder)
    return inner == outer or inner.startswith(outer.rstrip("/") + "/")


def inside_any(path: str, folders: Iterable[str]) -> bool:
    """Whether a path lies in one of these folders."""
    return any(inside(path, one) for one in folders)


def common(ours: Iterable[str], theirs: Iterable[str]) -> tuple[str, ...]:
    """The paths that lie in one of ours and in one of theirs, as few as say it."""
    ours, theirs = tuple(ours), tuple(theirs)
    found = [path for path in ours if inside_any(path, theirs)]
    found += [path for path in theirs if inside_any(path, ours)]
    once = _one_name_each(found)
    return tuple(one for one in once if not any(other != one and inside(one, other) for other in once))


def _one_name_each(paths: Iterable[str]) -> list[str]:
    """Two names of one place count once."""
    return list({_absolute(path): path for path in reversed(list(paths))}.values())[::-1]


def mount_over(path: str, mounts: Iterable[Tmpfs]) -> Tmpfs | None:
    """The mount that a path lies in, the innermost one."""
    return max((one for one in mounts if inside(path, one.path)), key=lambda one: len(one.path), default=None)


def covers(wider: str, narrower: str) -> bool:
    """Whether all that one pattern matches is matched by another; `*` is any text, all else is itself.

    The star of the narrower one is read as a character: only a star can match it, which then matches what it does.
    """
    parts = (re.escape(part) for part in re.split(r"\*+", wider))
    return re.fullmatch(".*".join(parts), narrower, re.DOTALL) is not None


def _absolute(path: str) -> str:
    if path.startswith("./"):
        return f"{_PROJECT}/{path[2:]}".rstrip("/")
    if path.startswith("~/"):
        return f"{WORKER_HOME}/{path[2:]}".rstrip("/")
    return path.rstrip("/") or "/"
