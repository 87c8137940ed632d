"""One ignore file (`.gitignore`, `.git/info/exclude`) with git's own semantics, through `pathspec`'s
patterns.

`pathspec` answers for a whole path, so that a pattern that matched a folder speaks for everything below
it. A walk asks folder by folder, and across several files that differs from git: with `*.log` in the root
and `!cache/` in `sub/.gitignore`, `sub/cache/x.log` stays ignored. So each entry is matched itself, never
through its folders.

Source: gitignore(5); git's dir.c, last_matching_pattern_from_list.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vmsandbox.errors import UserInputError

if TYPE_CHECKING:
    from pathspec.pattern import RegexPattern

    from vmsandbox.policy.tree.gitrepo import Repository

MAX_BYTES = 4 << 20
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_ANY_FOLDER_PREFIX = "^(?:.+/)?"


class _Rule(NamedTuple):
    regex: re.Pattern[str]
    ignores: bool  # False: a `!` pattern
    by_name: bool  # no slash inside: git matches it against the name alone
    only_below: bool  # `x/**`: everything below x, not x


class IgnoreFile:
    """The rules of one ignore file. They are compiled when first asked for (pathspec takes 40 ms to
    import).
    """

    def __init__(self, content: bytes, base: str) -> None:
        """`content`: the file's bytes. `base`: its folder relative to the project, "" or "a/b/"; for one
        above the project "/" and the way from its folder down to the project: "/", "/a/b/".
        """
        self.base = base
        self._content = content

    def decide(self, path: str, is_folder: bool) -> bool | None:
        """Whether the last matching rule ignores (True) or keeps (False) this entry; None: no rule
        matches it.

        `path` is relative to this file's folder. Whether a folder above it is ignored is the caller's
        business.
        """
        name = path.rpartition("/")[2]
        marked_name, marked_path = (name + "/", path + "/") if is_folder else (name, path)
        rules, any_name, any_path = self._compiled
        if any_name.match(marked_name) is None and any_path.match(marked_path) is None:
            return None
        for rule in rules:
            marked = marked_name if rule.by_name else marked_path
            subject = path if rule.only_below else marked
            if _matches_itself(rule.regex, subject):
                return rule.ignores
        return None

    @cached_property
    def _compiled(self) -> tuple[list[_Rule], re.Pattern[str], re.Pattern[str]]:
        """The rules, last one first, and two expressions that tell quickly that no rule matches."""
        rules = [rule for line in _lines(self._content) if (rule := _compile(line)) is not None]
        names = [rule.regex.pattern for rule in rules if rule.by_name]
        paths = [rule.regex.pattern for rule in rules if not rule.by_name]
        return rules[::-1], _quick(names, by_name=True), _quick(paths, by_name=False)


def _lines(content: bytes) -> list[str]:
    text = content.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return [line for line in lines if line.strip() and not line.startswith("#")]


def _compile(line: str) -> _Rule | None:
    from pathspec import GitIgnoreSpec

    if line.rstrip().endswith("/**/"):
        line = line.rstrip() + "*/"  # for git the folders below, for pathspec the one above them too
    try:
        patterns = GitIgnoreSpec.from_lines([line]).patterns
    except ValueError:  # git, too, lets a malformed pattern match nothing
        return None
    pattern: RegexPattern = next(iter(patterns))
    if pattern.regex is None or pattern.include is None:
        return None
    body = line.rstrip().removeprefix("!")
    bare = body.rstrip("/")
    while bare.startswith("**/"):
        bare = bare[3:]
    by_name = "/" not in bare
    return _Rule(
        # On purpose compiled anew with DOTALL: a folder's name may have a newline.
        regex=re.compile(str(pattern.regex.pattern), re.DOTALL),
        ignores=pattern.include,
        by_name=by_name,
        only_below=not by_name and body.endswith("/**"),
    )


def _matches_itself(regex: re.Pattern[str], subject: str) -> bool:
    """Whether the pattern matches this entry, and not merely a folder above it.

    pathspec marks the slash behind a matched folder with a group: it must be the slash at the end.
    """
    return any(not regex.groupindex or found.end(1) in (-1, len(subject)) for found in regex.finditer(subject))


def _quick(patterns: Iterable[str], by_name: bool) -> re.Pattern[str]:
    """One expression that matches whatever any of the patterns might match."""
    forms = set()
    for pattern in patterns:
        form = pattern.replace("(?P<ps_d>", "(?:")
        if not form.startswith("^"):
            form = ".*?" + form
        elif by_name:
            form = form.removeprefix(_ANY_FOLDER_PREFIX)
        forms.add(form)
    try:
        return re.compile("|".join(f"(?:{form})" for form in sorted(forms)) or r"(?!)", re.DOTALL)
    except re.error:  # another release of pathspec with groups that cannot be joined: slower, not wrong
        return re.compile("")


def is_ignored(path: str, is_folder: bool, files: list[IgnoreFile]) -> bool:
    """Whether this entry itself is ignored. `files`: the weakest first; the last one with a matching rule
    decides.
    """
    for file in reversed(files):
        relative = file.base[1:] + path if file.base.startswith("/") else path[len(file.base) :]
        verdict = file.decide(relative, is_folder)
        if verdict is not None:
            return verdict
    return False


def rules_above(project: Path, repository: Repository) -> list[IgnoreFile]:
    """The rules that hold in the project although they stand outside it, the weakest first.

    A project may be a folder inside a repository: the ignore files above it count, as for git.
    """
    above = project.relative_to(repository.top).parts
    places = [(repository.top.joinpath(*above[:depth], ".gitignore"), above[depth:]) for depth in range(len(above))]
    if repository.exclude_file is not None:
        places.insert(0, (repository.exclude_file, above))
    files = []
    for path, way in places:
        if content := read_ignore_file(os.fspath(path), None, os.fspath(path)):
            files.append(IgnoreFile(content, "/" + "".join(part + "/" for part in way)))
    return files


def read_ignore_file(name: str, parent: int | None, place: str) -> bytes:
    """The content of an ignore file; b"" if it is missing, a link (git does not follow one) or no file at
    all.

    `name` is opened relative to the open folder `parent` (None: the working directory); errors say `place`.

    Raises:
        UserInputError: it cannot be read, or has more than 4 MiB: what it would ignore might be sent.
    """
    try:
        fd = os.open(name, _OPEN, dir_fd=parent)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
            return b""
        raise UserInputError(
            f"cannot be read: {ascii(place)[1:-1]}",
            details=os.strerror(error.errno or 0),
            resolution="make it readable: without it, what it keeps out would be sent",
        ) from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return b""
        with os.fdopen(fd, "rb", closefd=False) as file:
            content = file.read(MAX_BYTES + 1)
    finally:
        os.close(fd)
    if len(content) > MAX_BYTES:
        raise UserInputError(
            f"too large for an ignore file: {ascii(place)[1:-1]}",
            details=f"at most {MAX_BYTES >> 20} MiB are read",
        )
    return content
