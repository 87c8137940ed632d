"""How a walk through a project says what went wrong: with names and sizes a person can tell what to keep out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from vmsandbox.errors import UserInputError
from vmsandbox.review.text import shown


def unreadable(paths: Sequence[str]) -> UserInputError:
    """Files and folders that should be sent and cannot be read."""
    names = [shown(path) for path in paths]
    more = f"\nand {len(names) - 10} more" if len(names) > 10 else ""
    return UserInputError(
        f"cannot be read: {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else ""),
        details="\n".join(names[:10]) + more,
        resolution="make it readable, or keep it out with .gitignore or filesystem.denied_paths",
    )


def too_large(what: str, entries: Iterable[tuple[str, bool, int]]) -> UserInputError:
    """A limit was passed, with what takes the most. entries: (path, whether it is a file, bytes) of all found."""
    files: list[tuple[int, str]] = []
    size: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for path, is_file, length in entries:
        top, slash, _ = path.partition("/")
        size[top + slash] += length
        count[top + slash] += 1
        if is_file:
            files.append((length, path))
    rows = [f"{mib(n):>12}  {shown(path, 120)}" for n, path in sorted(files, key=lambda one: -one[0])[:5]]
    rows += [f"{mib(n):>12}  {shown(top, 120)} (in all)" for top, n in size.most_common(5)]
    rows += [f"{n:>6} names  {shown(top, 120)}" for top, n in count.most_common(3)]
    return UserInputError(
        f"the project is too large to send: {what}",
        details="\n".join(rows),
        resolution="keep what is not needed out with .gitignore or filesystem.denied_paths, "
        "or choose a folder further in",
    )


def mib(size: int) -> str:
    """Bytes as MiB."""
    return f"{size / (1 << 20):.1f} MiB"


def changed(path: str, error: OSError) -> UserInputError:
    """Something is not what it was a moment ago."""
    return UserInputError(
        f"changed while it was being read: {shown(path)}",
        details=str(error),
        resolution="stop what writes to the project, and try again",
    )


@contextmanager
def os_errors(place: str) -> Iterator[None]:
    """An OSError within becomes a UserInputError about this place."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UserInputError(
            f"cannot be read: {shown(place)}", details=reason, resolution="name a folder that can be read"
        ) from error
