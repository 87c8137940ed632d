"""Whatever stops an apply, at whichever step: the project is all old or all new, and nothing else is left.

`pytest tests/unit/test_apply_faults.py -s` prints what became of it for each step and fault.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

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
    operations,
    places,
    remove,
    seen,
    small_disk,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from vmsandbox import failpoints
from vmsandbox.apply import kernel, staging
from vmsandbox.apply.plan import STAGING_PREFIX, ConflictError
from vmsandbox.apply.recovery import UnfinishedError, pending, recover
from vmsandbox.apply.transaction import apply
from vmsandbox.errors import HostError

Became = dict[str, dict[str, Counter[str]]]  # failpoint, fault, "old" or "new": how often


@pytest.fixture
def folder() -> Iterator[Path]:
    with folder_in_memory() as place:
        yield place


@pytest.fixture(params=["exchange", "syncfs", "no rename flags"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As for a few files; as for very many; and as on file systems without renameat2's flags."""
    monkeypatch.setattr(kernel, "rename_flags", request.param != "no rename flags")
    monkeypatch.setattr(staging, "_MANY", 0 if request.param == "syncfs" else 64)
    return str(request.param)


def fresh(root: Path, tree: Tree = OLD) -> Path:
    if root.exists():
        remove(root)
    return make(root, tree)


def whole(root: Path) -> str:
    """Whether it is the old tree or the new one; anything between fails."""
    assert pending(root) == []
    now = seen(root)
    if now == OLD:
        return "old"
    assert now == NEW, {path for path in {*now, *OLD, *NEW} if now.get(path) not in (OLD.get(path), NEW.get(path))}
    return "new"


def killed(root: Path, number: int) -> str:
    def child() -> None:
        with failpoints.switched_on(at(number, lambda: failpoints.act("kill"))):
            apply(root, CHANGES, Bytes(NEW), label="t")

    assert in_child(child) == -9
    outcomes = {one.outcome for one in recover(root)}
    became = whole(root)
    assert outcomes <= ({"finished"} if became == "new" else {"undone", "nothing"})
    return became


def raising(action: str, expected: type[BaseException], forever: bool = False) -> Callable[[Path, int], str]:
    def run(root: Path, number: int) -> str:
        try:
            with failpoints.switched_on(at(number, lambda: failpoints.act(action), forever=forever)):
                apply(root, CHANGES, Bytes(NEW), label="t")
        except expected:
            now = {path: value for path, value in seen(root).items() if not path.startswith(STAGING_PREFIX)}
            if not forever and now != NEW:
                assert whole(root) == "old"  # it needed no help from `recover`
        recover(root)
        return whole(root)

    return run


FAULTS: dict[str, Callable[[Path, int], str]] = {
    "kill -9": killed,
    "Ctrl-C": raising("interrupt", KeyboardInterrupt),
    "EIO": raising("eio", HostError),
    "ENOSPC": raising("enospc", HostError),
    "EIO for good": raising("eio", HostError, forever=True),
}


def test_every_step_and_every_fault(folder: Path, way: str) -> None:
    root = folder / "p"
    names = places(folder / "count")
    assert len(names) > 60
    became: Became = defaultdict(lambda: defaultdict(Counter))
    for number, name in enumerate(names):
        for fault, run in FAULTS.items():
            fresh(root)
            result = run(root, number)
            became[name][fault][result] += 1
            if result == "old":  # and nothing is lost: the same can be applied again
                apply(root, CHANGES, Bytes(NEW), label="t")
                assert seen(root) == NEW
    print(table(way, became))
    before = names.index("apply.marked-done")
    for fault in ("kill -9", "EIO"):
        assert all(set(became[name][fault]) == {"old"} for name in set(names[:before]))
    assert all(set(became[name]["kill -9"]) == {"new"} for name in set(names[before:]) - {"apply.removing-folder"})


def table(title: str, became: Became) -> str:
    """For people (`pytest -s`)."""
    lines = [f"\n{title}: what the project is after the fault and `recover`"]
    lines += [f"{'failpoint':26}" + "".join(f"{fault:>16}" for fault in next(iter(became.values())))]
    for name, row in became.items():
        cells = (" ".join(f"{count} {what}" for what, count in cell.items()) for cell in row.values())
        lines += [f"{name:26}" + "".join(f"{cell:>16}" for cell in cells)]
    return "\n".join(lines)


def test_recovery_may_be_killed_too_at_every_step(folder: Path, way: str) -> None:
    root = folder / "p"
    number = places(folder / "count").index("apply.verified")

    def half_done() -> None:
        fresh(root)
        assert in_child(lambda: apply_with(at(number, lambda: failpoints.act("kill")))) == -9

    def apply_with(reached: Callable[[str], None]) -> None:
        with failpoints.switched_on(reached):
            apply(root, CHANGES, Bytes(NEW), label="t")

    half_done()
    steps: list[str] = []
    with failpoints.switched_on(steps.append):
        recover(root)
    assert steps.count("undo.step") >= 26
    for stop in range(len(steps)):
        half_done()

        def child(stop: int = stop) -> None:
            with failpoints.switched_on(at(stop, lambda: failpoints.act("kill"))):
                recover(root)

        assert in_child(child) == -9
        recover(root)
        assert whole(root) == "old", steps[stop]


def fill(place: Path) -> None:
    """Use up all space and all names of a file system."""
    with open(place / "filler", "ab", buffering=0) as file:
        for size in (1 << 16, 1 << 10, 1, 1, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError as error:
                assert error.errno in (errno.ENOSPC, errno.EDQUOT)
            os.fsync(file.fileno())  # what was only reserved is allocated now, which may leave room again


@pytest.mark.parametrize("then_eio", [False, True], ids=["full", "full, then EIO"])
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_disk_that_is_full_from_any_step_on(folder: Path, kind: str, then_eio: bool) -> None:
    """A real one. It stays full while the failed apply undoes itself, and while `recover` looks.

    Once all is staged an apply needs no more room, so a full disk does not stop it; EIO does, and undoing must not
    need room either.
    """
    if kind == "ext4" and (os.geteuid() != 0 or not shutil.which("mkfs.ext4")):
        pytest.skip("an ext4 of its own needs root and mkfs.ext4")
    names = places(folder / "count")
    report = folder / "report"

    def child() -> None:
        disk = folder / "disk"
        if not small_disk(disk, kind):
            os._exit(77)
        root = disk / "p"
        became: Became = defaultdict(lambda: defaultdict(Counter))

        def fault() -> None:
            fill(disk)
            if then_eio:
                failpoints.act("eio")

        for number in range(0, len(names), 1 if kind == "tmpfs" else 2):
            fresh(root)
            try:
                with failpoints.switched_on(at(number, fault)):
                    apply(root, CHANGES, Bytes(NEW), label="t")
            except HostError as error:
                assert not isinstance(error, UnfinishedError), error.details
                assert seen(root) == OLD, names[number]
            recover(root)
            result = whole(root)
            became[names[number]][kind][result] += 1
            (disk / "filler").unlink()
            if result == "old":
                apply(root, CHANGES, Bytes(NEW), label="t")
                assert seen(root) == NEW
        assert set(became["apply.staging-made"][kind]) == {"old"}, "the disk was not full"
        assert set(became["apply.step"][kind]) == {"old" if then_eio else "new"}
        report.write_text(table(f"a disk that is full{', then EIO' if then_eio else ''}", became))

    status = in_child(child)
    if status == 77:
        pytest.skip("nothing can be mounted here")
    assert status == 0
    print(report.read_text())


# ---- random trees, random faults ----

NAMES = st.sampled_from(["a", "b", "c", "long-name", "\udcfe", "ä"])


@st.composite
def trees(draw: st.DrawFn, depth: int = 2, prefix: str = "") -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name in draw(st.sets(NAMES, max_size=4)):
        path = prefix + name
        kind = draw(st.sampled_from(["file", "dir", "link"] if depth else ["file", "link"]))
        if kind == "file":
            tree[path] = (
                draw(st.sampled_from([0o644, 0o755, 0o600])),
                draw(st.sampled_from([b"", b"1", b"22", b"23"])),
            )
        elif kind == "link":
            tree[path] = draw(st.sampled_from(["a", "../b", "/nowhere"]))
        else:
            tree[path] = draw(st.sampled_from([0o755, 0o700]))
            tree |= draw(trees(depth - 1, path + "/"))
    return tree


SETTINGS = settings(
    max_examples=int(os.environ.get("VMSANDBOX_TEST_EXAMPLES", "50")), deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


@SETTINGS
@given(old=trees(), new=trees())
def test_any_tree_becomes_any_other(folder: Path, old: Tree, new: Tree) -> None:
    root = fresh(folder / "p", old)
    apply(root, operations(old, new), Bytes(new), label="t")
    assert seen(root) == new


@SETTINGS
@given(old=trees(), new=trees(), where=st.floats(0, 1, exclude_max=True), action=st.sampled_from(["kill", "eio"]))
def test_any_tree_and_a_crash_anywhere(folder: Path, way: str, old: Tree, new: Tree, where: float, action: str) -> None:
    changes = operations(old, new)
    assume(changes)
    names = places(folder / "count", changes, old, new)
    root = fresh(folder / "p", old)

    def child() -> None:
        with suppress(HostError), failpoints.switched_on(at(int(where * len(names)), lambda: failpoints.act(action))):
            apply(root, changes, Bytes(new), label="t")

    assert in_child(child) == (-9 if action == "kill" else 0)
    recover(root)
    assert pending(root) == []
    assert seen(root) in (old, new)


@SETTINGS
@given(old=trees(), new=trees(), host=trees())
def test_what_is_on_the_host_and_was_not_pushed_is_never_lost(folder: Path, old: Tree, new: Tree, host: Tree) -> None:
    """The host has another tree than was pushed: a conflict and nothing changes, or only what was decided changes."""
    root = fresh(folder / "p", host)
    changes = operations(old, new)
    try:
        done = apply(root, changes, Bytes(new), label="t")
    except ConflictError:
        assert seen(root) == host
        return
    expected: dict[str, Any] = dict(host)
    for one in changes:
        if one.path in done.kept:
            continue
        now = item(host[one.path]) if one.path in host else None
        assert now in (one.before, one.after)
        expected.pop(one.path, None)
        if one.after is not None:
            expected[one.path] = new[one.path]
    assert seen(root) == expected
    assert pending(root) == []
