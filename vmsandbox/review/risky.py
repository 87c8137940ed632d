"""Which paths are run or obeyed by something that nobody asks: CI, hooks, editors, build tools, package managers.

Without it a new `.envrc` would look as harmless as a new README. The list is data (`risky_paths.yaml`).

A name is compared as the most forgiving file system would: case, Unicode's forms and what looks like nothing do not
count, because there `.GitHub` is `.github` and `Makefile.` is `Makefile`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from vmsandbox.review.linear import LinePattern
from vmsandbox.review.rules import RiskyPath

_LIST = Path(__file__).with_name("risky_paths.yaml")
# What HFS+ leaves out when it compares names: git's utf8.c, next_hfs_char (CVE-2014-9390).
_IGNORED = dict.fromkeys((*range(0x200C, 0x2010), *range(0x202A, 0x202F), *range(0x206A, 0x2070), 0xFEFF))
_BRACES = re.compile(r"\{([^{}]*)\}")


def folded(path: str) -> str:
    """The path as the most forgiving file system compares it."""
    if not path.isascii():
        path = path.translate(_IGNORED)
        # Twice: folding case can leave a form that is not normalised (Unicode 3.13, D145).
        path = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", path).casefold())
    else:
        path = path.lower()
    if "." in path or " " in path or ":" in path:
        # Windows drops dots and spaces at a name's end, and takes `name:stream` for a part of `name`.
        path = "/".join(_without_tail(name) for name in path.split("/"))
    return path


def _without_tail(name: str) -> str:
    if name in (".", ".."):
        return name
    return name.partition(":")[0].rstrip(". ") or name


def is_git_folder(name: str) -> bool:
    """Whether some file system takes this name for `.git` (git's own checks, read-cache.c verify_path)."""
    return folded(name) in (".git", "git~1")


class PathList:
    """Some patterns, ready to be asked. One automaton answers no, as it is for nearly all paths; then one a reason."""

    def __init__(self, paths: Sequence[RiskyPath]) -> None:
        by_reason: dict[str, list[str]] = {}
        for one in paths:
            by_reason.setdefault(one.reason, []).append(f"(?:{_translated(one.pattern)})")
        sources = {reason: "|".join(patterns) for reason, patterns in by_reason.items()}
        self._any = LinePattern("|".join(sources.values()))
        self._sources = sources
        self._compiled: dict[str, LinePattern] = {}

    def reason(self, path: str) -> str | None:
        """The first reason for this path."""
        return self.reason_for(searchable(path))

    def reason_for(self, data: bytes) -> str | None:
        """The first reason for this path, as `searchable` makes it."""
        return next(self.reasons_for(data), None)

    def reasons_for(self, data: bytes) -> Iterator[str]:
        """All of them."""
        if self._any.matches(data):
            for reason, source in self._sources.items():
                if reason not in self._compiled:
                    self._compiled[reason] = LinePattern(source)
                if self._compiled[reason].matches(data):
                    yield reason


class RiskyPaths:
    """The built-in patterns and a person's own, ready to be asked."""

    def __init__(self, extra: Sequence[RiskyPath] = ()) -> None:
        self._lists = [PathList(extra), _built_in_list()] if extra else [_built_in_list()]

    def reason(self, path: str) -> str | None:
        """Why this file matters, or None. A person's own reason goes before a built-in one."""
        data = searchable(path)
        return next((reason for one in self._lists if (reason := one.reason_for(data)) is not None), None)


def searchable(path: str) -> bytes:
    """The folded path as bytes that a `PathList` is asked with."""
    name = folded(path).replace("\n", "?").encode("utf-8", "surrogateescape")
    # Latin-1, so that RE2 sees text also where the name is none.
    return name if name.isascii() else name.decode("latin-1").encode()


@cache
def built_in() -> tuple[RiskyPath, ...]:
    """The list that is shipped with vmsandbox."""
    import yaml

    data = yaml.load(_LIST.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506
    return tuple(RiskyPath(path, group["reason"]) for group in data["risky_paths"] for path in group["paths"])


@cache
def _built_in_list() -> PathList:
    return PathList(built_in())


def _translated(pattern: str) -> str:
    """The pattern as an expression over a folded path (see risky_paths.yaml for what it means)."""
    anchored = pattern.startswith("/")
    body = pattern.strip("/")
    below = pattern.endswith("/") and body != ""
    while body.startswith("**/"):
        body, anchored = body[3:], False
    out = _expression(_folded_pattern(body))
    return ("^" if anchored else "(?:^|/)") + out + ("/" if below else "$")


def _folded_pattern(body: str) -> str:
    text = body.lower() if body.isascii() else unicodedata.normalize("NFKD", body.casefold())
    return text.encode("utf-8", "surrogateescape").decode("latin-1")


def _expression(glob: str) -> str:
    out = []
    at = 0
    while at < len(glob):
        if glob.startswith("**/", at):
            out.append("(?:.*/)?")
            at += 3
        elif glob.startswith("**", at):
            out.append(".*")
            at += 2
        elif glob[at] == "*":
            out.append("[^/]*")
            at += 1
        elif glob[at] == "?":
            out.append("[^/]")
            at += 1
        elif glob[at] == "[" and (end := glob.find("]", at + 2)) > 0:
            inside = glob[at + 1 : end].replace("\\", "\\\\").replace("[", "\\[")
            negated = inside[0] in "!^" and len(inside) > 1
            out.append(f"[^/{inside[1:]}]" if negated else f"[{inside.replace('^', chr(92) + '^')}]")
            at = end + 1
        elif found := _BRACES.match(glob, at):
            out.append("(?:" + "|".join(_expression(one) for one in found[1].split(",")) + ")")
            at = found.end()
        else:
            out.append(re.escape(glob[at]))
            at += 1
    return "".join(out)
