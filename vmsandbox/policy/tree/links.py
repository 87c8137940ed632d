"""Where a symbolic link leads, worked out from names alone.

A link that leads out of the project would tell the guest about the host, and on the way back could make a
copy land elsewhere. `os.path.realpath` cannot answer it: it forgets that a path went out and came in
again.
"""

from __future__ import annotations

import os

_MAX_LINKS = 40  # the kernel's own limit in one path resolution (path_resolution(7))


def stays_inside(root: str, path: str, target: str) -> bool:
    """Whether following this link stays in `root` at every single step, with links on the way resolved.

    Args:
        root: the folder, absolute and with no links in it.
        path: the link, relative to it.
        target: the link's text.

    Nothing is opened; only links are read. A link to nothing, or one that runs in circles, stays inside.
    """
    at = path.split("/")[:-1]
    rest = target.split("/")[::-1]
    if target.startswith("/"):
        return False
    links = 0
    while rest:
        part = rest.pop()
        if part in ("", "."):
            continue
        if part == "..":
            if not at:
                return False
            at.pop()
            continue
        try:
            further = os.readlink("/".join((root, *at, part)))  # noqa: PTH115 - surrogates and speed
        except OSError:  # no link, or nothing there
            at.append(part)
            continue
        links += 1
        if further.startswith("/"):
            return False
        if links > _MAX_LINKS:
            return True
        rest.extend(further.split("/")[::-1])
    return True
