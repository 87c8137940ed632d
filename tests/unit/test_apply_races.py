"""Somebody else is at work in the project while changes are applied: nothing of theirs is lost, nothing leaves it.

What is done meanwhile is done at each failpoint, so no race is left to luck.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from apply_trees import (
    CHANGES,
    NEW,
    OLD,
    Bytes,
    Tree,
    at,
    folder_in_memory,
    in_child,
    item,
    make,
    moments,
    operations,
    places,
    remove,
    seen,
)

from vmsandbox import failpoints
from vmsandbox.apply import kernel
from vmsandbox.apply.plan import ConflictError
from vmsandbox.apply.recovery import pending, recover
from vmsandbox.apply.transaction import apply, check
from vmsandbox.errors import UserInputError
from vmsandbox.review.values import Operation

TOKEN = b"somebody's newer work\n"


@pytest.fixture
def folder() -> Iterator[Path]:
    with folder_in_memory() as place:
        yield place


@pytest.fixture(params=[True, False], ids=["exchange", "no rename flags"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With renameat2's flags, and for file systems that have none."""
    monkeypatch.setattr(kernel, "rename_flags", request.param)
    return bool(request.param)


def everything(root: Path) -> bytes:
    return b"".join(value[1] for value in seen(root).values() if isinstance(value, tuple))


def append(place: Path) -> None:
    with place.open("ab") as file:
        file.write(TOKEN)


def save_by_rename(place: Path) -> None:
    beside = place.with_name("editor.tmp")
    beside.write_bytes(TOKEN)
    try:
        beside.rename(place)
    except OSError:
        beside.unlink()
        raise


def put_a_folder_there(place: Path) -> None:
    place.unlink()
    place.mkdir()
    (place / "file").write_bytes(TOKEN)


def put_something_into(place: Path) -> None:
    (place / "new").write_bytes(TOKEN)


def remove_and_make_anew(place: Path) -> None:
    with suppress(FileNotFoundError):
        shutil.rmtree(place)
    place.mkdir()
    (place / "new").write_bytes(TOKEN)


MEANWHILE: list[tuple[str, Callable[[Path], None]]] = [
    ("README", append),
    ("README", save_by_rename),
    ("README", put_a_folder_there),
    ("run.sh", append),
    ("run.sh", save_by_rename),
    ("gone/deep/file", append),
    ("gone", put_something_into),
    ("gone", remove_and_make_anew),
    ("becomes-file", put_something_into),
    ("becomes-folder", append),
    ("becomes-folder", put_something_into),
    ("becomes-link", save_by_rename),
    ("link", save_by_rename),
    ("lib", put_something_into),
    ("lib", remove_and_make_anew),
    ("lib", save_by_rename),
    ("open/y", save_by_rename),
    ("src", put_something_into),
]


@pytest.mark.parametrize(
    ("path", "act"), MEANWHILE, ids=lambda value: value if isinstance(value, str) else value.__name__
)
def test_what_somebody_writes_meanwhile_is_never_lost(
    folder: Path, way: bool, path: str, act: Callable[[Path], None]
) -> None:
    numbers = moments(places(folder / "count"))
    wrote_at = []
    for number in numbers:
        root = make(folder / f"p{number}", OLD)
        wrote: list[bool] = []

        def meanwhile(root: Path = root, wrote: list[bool] = wrote) -> None:
            with suppress(OSError):  # there is no such file or folder at this moment
                act(root / path)
                wrote.append(True)

        try:
            with failpoints.switched_on(at(number, meanwhile)):
                apply(root, CHANGES, Bytes(NEW), label="t")
            expected = NEW
        except ConflictError:
            expected = OLD
        assert pending(root) == []
        if wrote:
            wrote_at.append(number)
            assert TOKEN in everything(root), (number, sorted(seen(root)))
        now = seen(root)
        elsewhere = {one for one in {*now, *expected} if not one.startswith((path, path.split("/")[0]))}
        assert {one: now.get(one) for one in elsewhere} == {one: expected.get(one) for one in elsewhere}, number
        remove(root)
    assert wrote_at


@pytest.mark.parametrize("path", ["README", "gone/deep/file", "becomes-folder", "becomes-link"])
def test_who_has_a_file_open_for_writing_may_go_on(folder: Path, way: bool, path: str) -> None:
    """Opened at any step before the end, written to after it: a conflict, or the bytes are there."""
    numbers = moments(places(folder / "count"))
    for number in numbers:
        root = make(folder / f"p{number}", OLD)
        files = []

        def meanwhile(root: Path = root, files: list[object] = files) -> None:
            with suppress(OSError):
                files.append((root / path).open("ab"))

        with suppress(ConflictError), failpoints.switched_on(at(number, meanwhile)):
            apply(root, CHANGES, Bytes(NEW), label="t")
        for file in files:
            file.write(TOKEN)
            file.close()
            assert TOKEN in everything(root), number
        remove(root)


def test_a_reader_disturbs_nobody(folder: Path) -> None:
    root = make(folder / "p", OLD)
    with ExitStack() as stack:
        for path, value in OLD.items():
            if isinstance(value, tuple):
                stack.enter_context((root / path).open("rb"))
        apply(root, CHANGES, Bytes(NEW), label="t")
    assert seen(root) == NEW


def test_what_changed_while_it_was_staged_stops_it_before_a_name_is_changed(folder: Path) -> None:
    root = make(folder / "p", OLD)
    reached: list[str] = []

    def meanwhile(name: str) -> None:
        reached.append(name)
        if name == "apply.staged-durable":
            append(root / "README")

    with pytest.raises(ConflictError), failpoints.switched_on(meanwhile):
        apply(root, CHANGES, Bytes(NEW), label="t")
    assert "apply.begun" not in reached
    assert seen(root) == {**OLD, "README": (0o644, b"read me\n" + TOKEN)}


def test_two_at_once_do_not_mix(folder: Path) -> None:
    """Two processes, the same files: one wins, the other meets a conflict or comes after it."""
    names = [f"f{number}" for number in range(30)]
    old: Tree = dict.fromkeys(names, (420, b"0"))
    ones: Tree = dict.fromkeys(names, (420, b"1"))
    twos: Tree = dict.fromkeys(names, (420, b"2"))
    for number in range(20):
        root = make(folder / f"p{number}", old)

        def competitor(root: Path = root) -> None:
            with suppress(ConflictError):
                apply(root, operations(old, twos), Bytes(twos), label="two")

        def parent(root: Path = root) -> None:
            with suppress(ConflictError):
                apply(root, operations(old, ones), Bytes(ones), label="one")

        pid = os.fork()
        if pid == 0:
            try:
                competitor()
            finally:
                os._exit(0)
        parent()
        os.waitpid(pid, 0)
        assert seen(root) in (ones, twos)


def test_an_apply_waits_for_another_and_says_so_when_it_takes_too_long(folder: Path) -> None:
    root = make(folder / "p", OLD)
    seen_by_child: list[str] = []

    def while_at_work() -> None:
        def child() -> None:
            with pytest.raises(UserInputError, match="another vmsandbox"):
                apply(root, CHANGES, Bytes(NEW), label="other", wait=0.1)
            with pytest.raises(UserInputError, match="another vmsandbox"):
                recover(root, wait=0.1)

        assert in_child(child) == 0
        seen_by_child.append("refused")

    with failpoints.switched_on(at(20, while_at_work)):
        apply(root, CHANGES, Bytes(NEW), label="t")
    assert seen_by_child == ["refused"]
    assert seen(root) == NEW


def test_a_process_that_saves_all_the_time_loses_nothing(folder: Path) -> None:
    """Unsteered, with real timing: an editor's save lands somewhere in an apply."""
    chance = random.Random(7)
    landed: set[str] = set()
    for number in range(60):
        root = make(folder / f"p{number}", {"f": (0o644, b"old\n"), "g": (0o644, b"old\n")})
        new: Tree = {"f": (0o644, b"new\n"), "g": (0o644, b"new\n")}
        changes = [Operation(name, item((0o644, b"old\n")), item(new[name])) for name in ("f", "g")]
        delay = chance.random() * 0.02
        act = chance.choice((append, save_by_rename))

        def child(root: Path = root, delay: float = delay, act: Callable[[Path], None] = act) -> None:
            time.sleep(delay)
            while True:
                with suppress(FileNotFoundError):
                    act(root / "f")
                    return

        pid = os.fork()
        if pid == 0:
            try:
                child()
            finally:
                os._exit(0)
        try:
            apply(root, changes, Bytes(new), label="t")
            other = b"new\n"
            landed.add("after")
        except ConflictError:
            other = b"old\n"
            landed.add("before")
        os.waitpid(pid, 0)
        assert TOKEN in everything(root), number
        assert (root / "g").read_bytes() == other
        assert pending(root) == []
    assert check(root, []) == []
    assert landed == {"before", "after"}


def test_asking_for_writers_neither_ends_us_nor_disturbs_them(folder: Path) -> None:
    """The kernel tells a lease's holder when somebody opens the file; by default with a signal that kills."""
    place = folder / "f"
    place.write_bytes(b"x")

    def ask() -> None:
        fd = os.open(place, os.O_RDONLY)
        assert not kernel.is_open_for_writing(fd)
        with place.open("ab"):
            assert kernel.is_open_for_writing(fd)
        end = time.monotonic() + 1
        while time.monotonic() < end:
            kernel.is_open_for_writing(fd)

    def open_all_the_time() -> None:
        while True:
            with place.open("ab"):
                pass

    pid = os.fork()
    if pid == 0:
        time.sleep(0.2)
        open_all_the_time()
    try:
        assert in_child(ask) == 0
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
