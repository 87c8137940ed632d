"""Where symbolic links of the returned tree lead, worked out from the manifest alone.

Without it `docs/notes -> ../.git/hooks` would be a harmless link, and a build script could be changed under another
name that an old link already gives it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import NamedTuple

from vmsandbox.policy.tree import secrets
from vmsandbox.review.manifest import Item
from vmsandbox.review.risky import is_git_folder
from vmsandbox.review.text import shown
from vmsandbox.review.values import Finding, Risk

_MAX_LINKS = 40  # the kernel's own limit in one path resolution (path_resolution(7))
_MAX_STEPS = 4096  # components in one resolution
_ALL_STEPS = 5_000_000  # in all of a review; about five seconds
_MAX_ALIASES = 64
_ALL_BELOW = 200_000  # files below links' targets that are looked at in a review
_MAX_PATH = 4096
_SHOWN = 200


class Target(NamedTuple):
    """path: what the link leads to, relative to the project; None if `problem` says why that is not known."""

    path: str | None
    problem: str = ""


class Links:
    """The links of a returned tree."""

    def __init__(self, items: Mapping[str, Item], risky: Callable[[str], str | None]) -> None:
        self._items, self._risky = items, risky
        self._links = {path: item.target or "" for path, item in items.items() if item.kind == "symlink"}
        self._steps, self._below_left = _ALL_STEPS, _ALL_BELOW

    def findings(self, path: str, target: str, replaces_folder: bool) -> list[Finding]:
        """What there is to say about a link that is new or leads elsewhere now."""
        leads = f"symbolic link to {shown(target, _SHOWN)}"
        if replaces_folder:
            leads += ", in the place of a folder"
        where = self.resolve(path, target)
        if where.path is None:
            return [Finding(Risk.SYMLINK, f"{leads}: {where.problem}", blocks=True)]
        found: list[Finding] = []
        if reason := next((why for one in (where.path, *self.aliases(where.path)) if (why := self._risky(one))), None):
            leads += f", which matters by itself: {reason}"
        if where.path not in self._items and where.path != ".":
            leads += ", which did not come back: something else may be there on the host"
            if secrets.built_in().match(where.path, where.path.rpartition("/")[2], is_folder=False):
                leads += " (a secret, by its name)"
        elif inner := next((one for one in self._below(where.path) if self._risky(one)), None):
            leads += f", a folder with {shown(inner, _SHOWN)}: {self._risky(inner)}"
        for inner in self._below(where.path):
            alias = path + "/" + (inner if where.path == "." else inner[len(where.path) + 1 :])
            if len(alias) <= _MAX_PATH and (reason := self._risky(alias)):
                text = f"{reason}: the link makes {shown(inner, _SHOWN)} {shown(alias, _SHOWN)}"
                found.append(Finding(Risk.AUTO_EXECUTED, text))
                break
        return [Finding(Risk.SYMLINK, leads), *found]

    def aliases(self, path: str) -> Iterator[str]:
        """Other paths under which links of the tree give this one."""
        if not self._links:
            return
        seen = {path}
        waiting = [path]
        while waiting and len(seen) <= _MAX_ALIASES:
            one = waiting.pop()
            end = len(one)
            while end > 0:
                for link in self._by_target.get(one[:end], ())[:_MAX_ALIASES]:
                    alias = link + one[end:]
                    if alias not in seen and len(alias) <= _MAX_PATH:
                        seen.add(alias)
                        waiting.append(alias)
                        yield alias
                end = one.rfind("/", 0, end)

    def resolve(self, path: str, target: str) -> Target:
        """Follow a link through the tree as the kernel would, leaving it at no step."""
        at = path.split("/")[:-1]
        rest = target.split("/")[::-1]
        if target.startswith("/"):
            return Target(None, "it leads out of the project")
        links = 0
        for _ in range(_MAX_STEPS):
            self._steps -= 1
            if not rest or self._steps < 0:
                break
            part = rest.pop()
            if part in ("", "."):
                continue
            if part == "..":
                if not at:
                    return Target(None, "it leads out of the project")
                at.pop()
                continue
            if is_git_folder(part):
                return Target(None, "it leads into git's own folder")
            at.append(part)
            further = self._links.get("/".join(at))
            if further is None:
                continue
            at.pop()
            links += 1
            if further.startswith("/"):
                return Target(None, "it leads out of the project")
            if links > _MAX_LINKS:
                return Target(None, "it leads through too many links, or in circles")
            rest.extend(further.split("/")[::-1])
        if rest:
            return Target(None, "it is too long to follow")
        return Target("/".join(at) or ".")

    @cached_property
    def _by_target(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = defaultdict(list)
        for link in sorted(self._links):
            where = self.resolve(link, self._links[link])
            if where.path is not None:
                found[where.path].append(link)
        return found

    @cached_property
    def _sorted(self) -> list[str]:
        return sorted(self._items)

    def _below(self, folder: str) -> Iterator[str]:
        """The files below a folder of the tree, within what a review may spend on it."""
        prefix = "" if folder == "." else folder + "/"
        for place in range(bisect_left(self._sorted, prefix), len(self._sorted)):
            one = self._sorted[place]
            if not one.startswith(prefix) or self._below_left <= 0:
                return
            self._below_left -= 1
            if self._items[one].kind != "dir":
                yield one
