"""Folders and files are swapped for links, or moved away, while changes are applied: nothing is written elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import suppress
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
    make,
    moments,
    places,
    remove,
    seen,
)

from vmsandbox import failpoints
from vmsandbox.apply import kernel
from vmsandbox.apply.plan import ConflictError
from vmsandbox.apply.recovery import UnfinishedError, pending, recover
from vmsandbox.apply.transaction import apply
from vmsandbox.errors import VmsandboxError


@pytest.fixture
def folder() -> Iterator[Path]:
    with folder_in_memory() as place:
        yield place


@pytest.fixture(params=[True, False], ids=["exchange", "no rename flags"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With renameat2's flags, and for file systems that have none."""
    monkeypatch.setattr(kernel, "rename_flags", request.param)
    return bool(request.param)


def outside_of(folder: Path) -> tuple[Path, Tree]:
    """What must stay as it is: the same names as in the project lie there."""
    outside = make(folder / "outside", {"a.py": (0o644, b"a = 1\n"), "deep": 0o755, "deep/file": (0o600, b"x")})
    return outside, seen(outside)


@pytest.mark.parametrize("name", ["src", "gone", "open", "becomes-file", "lib"])
def test_a_folder_swapped_for_a_link_leads_nowhere(folder: Path, way: bool, name: str) -> None:
    numbers = moments(places(folder / "count"))
    outside, untouched = outside_of(folder)
    for number in numbers:
        root = make(folder / f"p{number}", OLD)

        def swap(root: Path = root) -> None:
            with suppress(OSError):
                (root / name).rename(root / "aside")
            with suppress(OSError):
                (root / name).symlink_to(outside)

        done = False
        with suppress(VmsandboxError), failpoints.switched_on(at(number, swap)):
            apply(root, CHANGES, Bytes(NEW), label="t")
            done = True
        assert seen(outside) == untouched, number
        if (root / name).is_symlink() and (root / name).readlink() == outside:
            (root / name).unlink()
            if (root / "aside").exists():
                (root / "aside").rename(root / name)
        recover(root)
        # The link that was in the way when the old thing came back lies beside it.
        now = {one: value for one, value in seen(root).items() if value != str(outside)}
        if name == "lib" and now.get("lib") == 0o700:
            del now["lib"]  # new and moved away: it was emptied, but who moved it has to remove it
        if name in now or not done:
            assert now in (OLD, NEW), (number, done, set(now.items()) ^ set(OLD.items()))
        assert seen(outside) == untouched, number
        remove(root)


@pytest.mark.parametrize("name", ["src", "gone", "open"])
def test_a_folder_swapped_for_a_link_after_a_crash_leads_nowhere(folder: Path, way: bool, name: str) -> None:
    numbers = moments(places(folder / "count"))
    outside, untouched = outside_of(folder)
    refused = 0
    for number in numbers[::2]:
        root = make(folder / f"p{number}", OLD)

        def child(root: Path = root, number: int = number) -> None:
            with failpoints.switched_on(at(number, lambda: failpoints.act("kill"))):
                apply(root, CHANGES, Bytes(NEW), label="t")

        assert in_child(child) == -9
        if not (root / name).exists():
            continue
        (root / name).rename(root / "aside")
        (root / name).symlink_to(outside)
        try:
            recover(root)
        except UnfinishedError as error:
            refused += 1
            assert name in error.details
            with pytest.raises(UnfinishedError):  # and nothing new is begun before it is whole
                apply(root, CHANGES, Bytes(NEW), label="t")
        assert seen(outside) == untouched
        (root / name).unlink()
        (root / "aside").rename(root / name)
        recover(root)
        assert seen(root) in (OLD, NEW), (number, set(seen(root).items()) ^ set(OLD.items()))
    assert refused


@pytest.mark.parametrize("planted", ["README", "src", "src/a.py", "gone/deep", "becomes-file"])
def test_a_link_that_was_planted_before_is_a_conflict(folder: Path, planted: str) -> None:
    root = make(folder / "p", OLD)
    outside, untouched = outside_of(folder)
    place = root / planted
    if place.is_dir():
        shutil.rmtree(place)
        place.symlink_to(outside)
    else:
        place.unlink()
        place.symlink_to(outside / "a.py")
    before = seen(root)
    with pytest.raises(ConflictError) as caught:
        apply(root, CHANGES, Bytes(NEW), label="t")
    assert any(planted in f"{one.path} {one.text}" for one in caught.value.conflicts)
    assert seen(root) == before
    assert seen(outside) == untouched


@pytest.mark.parametrize("made_anew", [False, True])
def test_a_folder_moved_out_of_the_project_meanwhile_takes_nothing_along(folder: Path, made_anew: bool) -> None:
    """Our descriptor still reaches it: what was done in it is undone in it, as long as not all was verified."""
    names = places(folder / "count")
    src = {path.partition("/")[2]: value for path, value in OLD.items() if path.startswith("src/")}
    for number in moments(names[: names.index("apply.verified")]):
        root = make(folder / f"p{number}", OLD)
        aside = folder / f"src{number}"

        def move(root: Path = root, aside: Path = aside) -> None:
            (root / "src").rename(aside)
            if made_anew:
                (root / "src").mkdir()

        with pytest.raises(ConflictError), failpoints.switched_on(at(number, move)):
            apply(root, CHANGES, Bytes(NEW), label="t")
        assert seen(aside) == src
        if made_anew:
            (root / "src").rmdir()
        aside.rename(root / "src")
        assert seen(root) == OLD


@pytest.mark.parametrize("path", ["run.sh", "README", "gone/deep/file"])
def test_a_file_swapped_for_a_link_leads_nowhere(folder: Path, way: bool, path: str) -> None:
    numbers = moments(places(folder / "count"))
    outside, untouched = outside_of(folder)
    for number in numbers:
        root = make(folder / f"p{number}", OLD)

        def swap(root: Path = root) -> None:
            with suppress(OSError):
                (root / path).unlink()
                (root / path).symlink_to(outside / "a.py")

        with suppress(VmsandboxError), failpoints.switched_on(at(number, swap)):
            apply(root, CHANGES, Bytes(NEW), label="t")
        assert seen(outside) == untouched, number
        assert pending(root) == []
        remove(root)
