"""What a policy's own command (`session.post_create`) may read of the project while its template is made.

All of the project would make a new template, and run the command again, after every change; nothing of it would leave
`pip install -r requirements.txt` without its file. So it is what the policy names; else what the command itself names,
and the lists of packages that its tools look for.
"""

from __future__ import annotations

import posixpath
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from vmsandbox.guest.walk import Walk
from vmsandbox.policy.tree.globs import translate
from vmsandbox.policy.values import SessionPolicy

# By their names, in any folder.
LISTS = (
    "requirements*.txt", "requirements*.in", "constraints*.txt", "pyproject.toml", "setup.py", "setup.cfg", "uv.lock",
    "poetry.lock", "poetry.toml", "pdm.lock", "Pipfile", "Pipfile.lock", "environment.y*ml", ".python-version",
    "package.json", "package-lock.json", "npm-shrinkwrap.json", "yarn.lock", "pnpm-lock.yaml", "pnpm-workspace.yaml",
    ".nvmrc", "Cargo.toml", "Cargo.lock", "rust-toolchain*", "go.mod", "go.sum", "Gemfile", "Gemfile.lock",
    ".ruby-version", "composer.json", "composer.lock",
)  # fmt: skip


def select_files(walk: Walk, session: SessionPolicy) -> Walk:
    """Of what would be copied in: what the command may read, with the folders above it."""
    wanted = _matcher(session)
    chosen = {entry.path for entry in walk.entries if wanted(entry.path)}
    folders = {above for path in chosen for above in _above(path)}
    entries = [entry for entry in walk.entries if entry.path in chosen or entry.path in folders]
    return replace(walk, entries=entries, withheld=[], total_bytes=sum(entry.size for entry in entries))


def _matcher(session: SessionPolicy) -> Callable[[str], bool]:
    if session.post_create_files:
        patterns = [_plain(one) for one in session.post_create_files]
        named: set[str] = set()
    else:
        patterns = [f"**/{one}" for one in LISTS]
        named = set(_named(session.post_create))
    if "." in {*patterns, *named}:
        return lambda path: True
    match = re.compile("|".join(translate(one) for one in patterns), re.DOTALL).fullmatch
    return lambda path: any(match(one) or one in named for one in (path, *_above(path)))


def _named(command: Iterable[str]) -> Iterator[str]:
    """All words that could be paths in the project; those that are none match nothing."""
    for argument in command:
        try:
            words = shlex.split(argument, comments=False)
        except ValueError:  # a quote that does not end
            words = argument.split()
        for word in (argument, *words):
            for part in re.split(r"[=;&|<>()\s]+", word):
                if part and not part.startswith(("/", "-", "~")):
                    yield _plain(part)


def _plain(path: str) -> str:
    return posixpath.normpath(path)


def _above(path: str) -> Iterator[str]:
    while path := path.rpartition("/")[0]:
        yield path
