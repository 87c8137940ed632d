"""Applying changes to a project: exactly those, with exactly these bytes and modes, and nothing that may not be."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from apply_trees import (
    CHANGES,
    NEW,
    OLD,
    Bytes,
    Tree,
    enter_mount_namespace,
    in_child,
    item,
    make,
    mount_small,
    operations,
    remove,
    seen,
)  # fmt: skip

from vmsandbox import failpoints
from vmsandbox.apply import plan, record, recovery
from vmsandbox.apply.plan import ConflictError, is_forbidden_name
from vmsandbox.apply.recovery import Recovered, pending, recover
from vmsandbox.apply.transaction import Applied, apply, check
from vmsandbox.errors import HostError, RefusedError
from vmsandbox.guest import walk
from vmsandbox.guest.walk import Reason, walk_project
from vmsandbox.policy.values import Policy
from vmsandbox.review.manifest import Item
from vmsandbox.review.values import Operation

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to other users, or mounts")
FILE = item((0o644, b"text"))


def test_a_tree_becomes_exactly_the_other_one_on_a_real_disk(tmp_path: Path) -> None:
    root = make(tmp_path / "p", OLD)
    assert check(root, CHANGES) == []
    umask = os.umask(0o077)
    try:
        done = apply(root, list(reversed(CHANGES)), Bytes(NEW), label="t")
    finally:
        os.umask(umask)
    assert seen(root) == NEW
    assert done == Applied(tuple(sorted(one.path for one in CHANGES)))
    again = apply(root, CHANGES, Bytes(), label="t")
    assert again == Applied(already=tuple(sorted(one.path for one in CHANGES)))
    remove(root)


def test_what_is_the_same_is_not_touched(tmp_path: Path) -> None:
    root = make(tmp_path / "p", OLD)
    (root / "src/b.py").chmod(0o4755)
    before = {path: (root / path).lstat() for path in ("src/b.py", "same", "same/untouched")}
    link = (root / "run.sh").stat()
    apply(root, CHANGES, Bytes(NEW), label="t")
    assert {path: (root / path).lstat() for path in before} == before
    assert (root / "run.sh").stat().st_ino == link.st_ino  # a mode alone is a chmod
    remove(root)


def test_a_hard_link_elsewhere_keeps_the_old_bytes(tmp_path: Path) -> None:
    root = make(tmp_path / "p", OLD)
    os.link(root / "README", tmp_path / "elsewhere")
    apply(root, CHANGES, Bytes(NEW), label="t")
    assert (tmp_path / "elsewhere").read_bytes() == b"read me\n"
    remove(root)


def test_all_conflicts_are_listed_and_nothing_is_written(tmp_path: Path) -> None:
    root = make(tmp_path / "p", OLD)
    (root / "README").write_bytes(b"read mE\n")
    (root / "run.sh").chmod(0o700)
    (root / "src/a.py").unlink()
    (root / "link").unlink()
    (root / "link").write_bytes(b"")
    (root / "link-to-file").unlink()
    (root / "link-to-file").symlink_to("elsewhere")
    (root / "lib").write_bytes(b"mine")
    (root / "becomes-file/ignored.o").write_bytes(b"")
    (root / "open").rename(root / "opened")
    before, folder = seen(root), root.stat()
    expected = {
        ("README", "modified"), ("run.sh", "mode changed"), ("src/a.py", "deleted"), ("link", "kind changed"),
        ("link-to-file", "modified"), ("lib", "appeared"), ("becomes-file", "not empty"), ("open", "deleted"),
        ("open/y", "no folder"),
    }  # fmt: skip
    found = {(one.path, one.sort) for one in check(root, CHANGES)}
    assert expected <= found
    assert found == expected
    with pytest.raises(ConflictError) as caught:
        apply(root, CHANGES, Bytes(NEW), label="t")
    assert {(one.path, one.sort) for one in caught.value.conflicts} == found
    for path, _ in expected:
        assert f"{path}: " in caught.value.details
    assert seen(root) == before
    assert root.stat().st_mtime_ns == folder.st_mtime_ns
    remove(root)


def test_a_deleted_folder_stays_if_it_holds_what_was_not_pushed(tmp_path: Path) -> None:
    pushed: Tree = {"a": 0o755, "a/b": 0o755, "a/b/f": (0o644, b""), "a/c": 0o755}
    root = make(tmp_path / "p", pushed)
    (root / "a/b/.env").write_bytes(b"secret")
    (root / "a/b/.env").chmod(0o644)
    done = apply(root, operations(pushed, {}), Bytes(), label="t")
    assert done.kept == ("a", "a/b")
    assert seen(root) == {"a": 0o755, "a/b": 0o755, "a/b/.env": (0o644, b"secret")}


FORBIDDEN_NAMES = [
    ".git", ".GIT", ".Git", "git~1", "GIT~1", ".git.", ".git ", ".git::$INDEX_ALLOCATION", ".g\u200cit", "\ufeff.git",
    ".vmsandbox-apply-0123456789abcdef", ".VMSANDBOX-apply-x",
]  # fmt: skip
FORBIDDEN_PATHS = [
    "",
    "/etc/passwd",
    "..",
    "../x",
    "a/../../x",
    ".",
    "a//b",
    "a/./b",
    "a/",
    "a\0b",
    "n" * 256,
    "a/" * 200,
]


@pytest.mark.parametrize(
    "path", [*FORBIDDEN_PATHS, *FORBIDDEN_NAMES, *(f"sub/{name}/hooks/x" for name in FORBIDDEN_NAMES)]
)
def test_some_names_are_never_written_to(tmp_path: Path, path: str) -> None:
    root = make(tmp_path / "p", {"sub": 0o755})
    for before, after in ((None, FILE), (FILE, None), (FILE, Item("dir", 0o755))):
        rows = [Operation("fine", None, FILE), Operation(path, before, after)]
        with pytest.raises(RefusedError):
            apply(root, rows, Bytes({"": (0, b"text")}), label="t")
        with pytest.raises(RefusedError):
            check(root, rows)
    assert seen(tmp_path) == {"p": 0o755, "p/sub": 0o755}


def test_ordinary_names_that_look_alike_may_be_written() -> None:
    for name in (".gitignore", ".github", "git", "x.git", ".git2", "..git", ".vmsandbox", "git~12"):
        assert not is_forbidden_name(name)


@pytest.mark.parametrize(
    "item_",
    [
        Item("file", 0o4755, 4, FILE.sha256), Item("dir", 0o1777), Item("file", 0o2644, 4, FILE.sha256),
        Item("file", 0o644, 4, None), Item("file", 0o644, 4, "../../x"), Item("other", 0o644),
        Item("symlink", 0, target=""), Item("symlink", 0, target="a\0b"), Item("symlink", 0, target=None),
    ],
)  # fmt: skip
def test_only_permission_bits_digests_and_three_kinds(tmp_path: Path, item_: Item) -> None:
    root = make(tmp_path / "p", {})
    with pytest.raises(RefusedError):
        apply(root, [Operation("x", None, item_)], Bytes({"": (0, b"text")}), label="t")
    assert seen(root) == {}


def test_operations_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    root = make(tmp_path / "p", OLD)
    for rows in (
        [Operation("README", item(OLD["README"]), None)] * 2,
        [Operation("src", item(OLD["src"]), None), Operation("src/new", None, FILE)],
        [Operation("src", item(OLD["src"]), FILE), Operation("src/deep/new", None, FILE)],
    ):
        with pytest.raises(RefusedError):
            apply(root, rows, Bytes(), label="t")
    assert seen(root) == OLD


@pytest.mark.parametrize("wrong", [None, b"", b"texT", b"tex", b"text and more"])
def test_bytes_that_are_not_those_that_were_reviewed(tmp_path: Path, wrong: bytes | None) -> None:
    root = make(tmp_path / "p", OLD)
    contents = Bytes(NEW)
    assert FILE.sha256
    if wrong is not None:
        contents.blobs[FILE.sha256] = wrong
    with pytest.raises(HostError, match="bytes"):
        apply(root, [*CHANGES, Operation("zzz", None, FILE)], contents, label="t")
    assert seen(root) == OLD


def test_more_than_fits_is_refused_before_a_byte_is_copied(tmp_path: Path) -> None:
    root = make(tmp_path / "p", {})
    huge = Item("file", 0o644, 1 << 60, "0" * 64)
    with pytest.raises(HostError, match="disk is full"):
        apply(root, [Operation("x", None, huge)], Bytes(), label="t")
    assert seen(root) == {}


@ROOT_ONLY
def test_owners(tmp_path: Path) -> None:
    root = make(tmp_path / "p", OLD)
    os.chown(root, 1001, 1002)
    os.chown(root / "README", 1003, 1004)
    os.chown(root / "becomes-link", 1003, 1004)
    os.chown(root / "src", 1005, 1006)
    changes = [*CHANGES, Operation("src/new", None, FILE)]
    apply(root, changes, Bytes(NEW, {"": (0, b"text")}), label="t")
    owners = {path: ((root / path).lstat().st_uid, (root / path).lstat().st_gid)
              for path in ("README", "becomes-link", "src/new", "lib/sub/moved.py", "same")}  # fmt: skip
    assert owners == {
        "README": (1003, 1004), "becomes-link": (1003, 1004), "src/new": (1005, 1006),
        "lib/sub/moved.py": (1001, 1002), "same": (0, 0),
    }  # fmt: skip


@ROOT_ONLY
def test_an_ordinary_user_and_folders_that_may_not_be_written(tmp_path: Path) -> None:
    """Root may do everything; the same as somebody who may not, with crashes."""
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:
        if parent.stat().st_uid == 0 and ("pytest" in parent.name or "pytest" in parent.parent.name):
            parent.chmod(0o755)
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, 65534, 65534)

    def child() -> None:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        root = make(home / "p", OLD)
        apply(root, CHANGES, Bytes(NEW), label="t")
        assert seen(root) == NEW
        remove(root)
        for stop in ("begun", "verified", "done"):
            root = make(home / stop, OLD)

            def killed(root: Path = root, stop: str = stop) -> None:
                name = f"apply.{stop}"
                with failpoints.switched_on(lambda now: failpoints.act("kill") if now == name else None):
                    apply(root, CHANGES, Bytes(NEW), label="t")

            assert in_child(killed) == -9
            recover(root)
            assert seen(root) == (NEW if stop == "done" else OLD)
            remove(root)
        root = make(home / "locked", OLD)
        (root / "src").chmod(0o555)
        with pytest.raises(HostError, match="may not be written"):
            apply(root, CHANGES, Bytes(NEW), label="t")
        assert seen(root) == {**OLD, "src": 0o555}

    assert in_child(child) == 0


def test_a_read_only_file_system_and_others_mounted_inside(tmp_path: Path) -> None:
    """A mount that only a child sees: read-only, of another device, of the same device (rename says EXDEV)."""

    def child() -> None:
        if not enter_mount_namespace() or not mount_small(tmp_path / "disk", "4m"):
            os._exit(77)
        root = make(tmp_path / "disk/p", OLD)
        subprocess.run(["mount", "-t", "tmpfs", "none", root / "same"], check=True)
        row = Operation("same/new", None, FILE)
        assert [(one.path, one.sort) for one in check(root, [row])] == [("same/new", "no folder")]
        with pytest.raises(ConflictError, match="1 path") as caught:
            apply(root, [*CHANGES, row], Bytes(NEW), label="t")
        assert "another file system" in caught.value.details
        subprocess.run(["umount", root / "same"], check=True)
        subprocess.run(["mount", "--bind", root / "same", root / "src"], check=True)
        row = Operation("src/new", None, FILE)
        with pytest.raises(HostError, match="mounted inside"):
            apply(root, [row, Operation("README", item(OLD["README"]), None)], Bytes({"": (0, b"text")}), label="t")
        subprocess.run(["umount", root / "src"], check=True)
        assert seen(root) == OLD
        subprocess.run(["mount", "-o", "remount,ro", tmp_path / "disk"], check=True)
        assert check(root, CHANGES) == []
        with pytest.raises(HostError, match="read-only"):
            apply(root, CHANGES, Bytes(NEW), label="t")
        assert seen(root) == OLD

    status = in_child(child)
    if status == 77:
        pytest.skip("nothing can be mounted here")
    assert status == 0


# ---- what a killed apply left behind ----


def killed_at(root: Path, name: str) -> Path:
    """An apply killed there; its staging folder."""

    def child() -> None:
        with failpoints.switched_on(lambda now: failpoints.act("kill") if now == name else None):
            apply(root, CHANGES, Bytes(NEW), label="session-1")

    assert in_child(child) == -9
    (name,) = pending(root)
    return root / name


def test_recovery_says_what_it_found_and_comes_before_the_next_apply(tmp_path: Path) -> None:
    paths = tuple(sorted(one.path for one in CHANGES))
    root = make(tmp_path / "p", OLD)
    assert recover(root) == ()
    killed_at(root, "apply.staged")
    assert recover(root) == (Recovered("", "nothing"),)
    killed_at(root, "apply.verified")
    assert seen(root) != OLD
    assert recover(root) == (Recovered("session-1", "undone", paths),)
    assert seen(root) == OLD
    killed_at(root, "apply.verified")
    done = apply(root, CHANGES, Bytes(NEW), label="session-2")
    assert [one.outcome for one in done.recovered] == ["undone"]
    assert seen(root) == NEW
    remove(root)
    root = make(tmp_path / "p", OLD)
    killed_at(root, "apply.done")
    assert recover(root) == (Recovered("session-1", "finished", paths),)
    assert seen(root) == NEW
    remove(root)


def test_work_done_after_the_crash_stays(tmp_path: Path) -> None:
    root = make(tmp_path / "p", OLD)
    killed_at(root, "apply.verified")
    (root / "README").write_bytes(b"newer than both")
    (root / "lib/mine").write_bytes(b"mine")
    (root / "open/y").write_bytes(b"newer than what was added")
    (root / "gone").write_bytes(b"a file in the place of the folder")
    (found,) = recover(root)
    kept = next(path for path in found.newer if path.startswith("README.vmsandbox-kept-"))
    aside = next(path for path in found.newer if path.startswith("gone.vmsandbox-kept-"))
    assert set(found.newer) == {kept, aside, "lib", "open/y"}
    now = seen(root)
    assert now.pop(kept) == (0o644, b"newer than both")
    assert now.pop(aside)[1] == b"a file in the place of the folder"  # type: ignore[index]
    assert now.pop("lib/mine")[1] == b"mine"  # type: ignore[index]
    assert now.pop("open/y")[1] == b"newer than what was added"  # type: ignore[index]
    now.pop("lib")
    assert now == OLD


def damage_byte(journal: Path) -> None:
    content = bytearray(journal.read_bytes())
    content[len(content) // 2] ^= 1
    journal.write_bytes(content)


def cut(journal: Path) -> None:
    journal.write_bytes(journal.read_bytes()[:-20])


def resigned(journal: Path, change: tuple[bytes, bytes]) -> None:
    """Changed, with a digest that fits."""
    body = b"".join(journal.read_bytes().splitlines(keepends=True)[:-1]).replace(*change)
    last = {"steps": body.count(b"\n") - 1, "sha256": hashlib.sha256(body).hexdigest()}
    journal.write_bytes(body + json.dumps(last, separators=(",", ":")).encode() + b"\n")


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda folder: damage_byte(folder / "journal"), "damaged"),
        (lambda folder: cut(folder / "journal"), ""),
        (lambda folder: (folder / "journal").write_bytes(b""), "damaged"),
        (lambda folder: resigned(folder / "journal", (b'"vmsandbox-apply":1', b'"vmsandbox-apply":2')), "version is 2"),
        (lambda folder: resigned(folder / "journal", (b'"path":"README"', b'"path":".GIT/config"')), "never written"),
        (lambda folder: resigned(folder / "journal", (b'"path":"README"', b'"path":"../README"')), "absolute"),
        (lambda folder: folder.chmod(0o755), "others may enter"),
        (lambda folder: (folder / "stranger").touch(), "does not put there"),
        (lambda folder: folder.rename(folder.with_name(".vmsandbox-apply-2-0123456789abcdef")), "newer version"),
    ],
)
def test_a_journal_that_is_not_ours_or_damaged_is_never_a_reason_to_remove_anything(
    tmp_path: Path, spoil: object, why: str
) -> None:
    root = make(tmp_path / "p", OLD)
    spoil(killed_at(root, "apply.verified"))  # type: ignore[operator]
    before = seen(root)
    for attempt in (lambda: recover(root), lambda: apply(root, CHANGES, Bytes(NEW), label="t")):
        with pytest.raises(HostError, match="cannot be read") as caught:
            attempt()
        assert why in caught.value.details
    assert seen(root) == before
    remove(root)


def test_a_planted_folder_leads_nowhere(tmp_path: Path) -> None:
    """A project may come with something of our name: a link, a file, a folder whose parts are links."""
    outside = make(tmp_path / "outside", {"f": (0o644, b"precious")})
    name = ".vmsandbox-apply-0123456789abcdef"
    root = make(tmp_path / "p", {name: "../outside"})
    with pytest.raises(HostError):
        recover(root)
    (root / name).unlink()
    make(root, {name: 0o700, f"{name}/new": "../../outside", f"{name}/old": "../../outside"})
    with pytest.raises(HostError):
        recover(root)
    assert seen(outside) == {"f": (0o644, b"precious")}


def test_the_journal_is_read_back_as_it_was_written() -> None:
    steps = plan.steps_for(plan.checked(CHANGES), plan.Look(modes={"open": 0o755, "run.sh": 0o644}))
    assert len(steps) > len(CHANGES)
    assert record.parsed(record.written("läbel\n", steps)) == ("läbel\n", steps)


def test_staging_folders_are_not_pushed(tmp_path: Path) -> None:
    assert walk.OURS == plan.STAGING_PREFIX
    root = make(tmp_path / "p", OLD)
    staging = killed_at(root, "apply.staged")
    found = walk_project(root, Policy())
    assert not [entry for entry in found.entries if entry.path.startswith(".vmsandbox-apply-")]
    assert [(row.path, row.reason) for row in found.withheld if row.reason is Reason.OURS] == [
        (staging.name, Reason.OURS)
    ]


def test_every_reason_has_an_advice() -> None:
    for brief, resolution in recovery._REASONS.values():
        assert brief and resolution


# ---- failpoints, switched on from outside ----


def test_a_failpoint_kills_a_program_from_its_environment(tmp_path: Path) -> None:
    root = make(tmp_path / "p", OLD)
    code = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from pathlib import Path\nfrom apply_trees import CHANGES, NEW, Bytes\n"
        "from vmsandbox.apply.transaction import apply\n"
        "apply(Path(sys.argv[1]), CHANGES, Bytes(NEW), label='t')"
    )
    here = Path(__file__).parent
    for text, status in (("apply.step#3=kill", -9), ("apply.step#3=enospc", 1), ("no equals sign", 1)):
        done = subprocess.run(
            [sys.executable, "-c", code, root, here, here.parent.parent],
            env={**os.environ, failpoints.VARIABLE: text}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        recover(root)
        assert seen(root) == OLD
    assert "not NAME[#K]=ACTION" in done.stderr


def test_more_new_folders_than_may_be_open_at_once(tmp_path: Path) -> None:
    tree: dict[str, tuple[int, bytes] | int | str] = {"a": 0o755}
    for number in range(600):
        tree[f"a/d{number:03}"] = 0o755
        if number % 2:
            tree[f"a/d{number:03}/f"] = (0o644, b"x")
    root = make(tmp_path / "p", {})
    apply(root, operations({}, tree), Bytes(tree), label="t")
    assert seen(root) == tree


# ---- what it costs ----


def test_ten_thousand_new_files(tmp_path: Path) -> None:
    tree: dict[str, tuple[int, bytes] | int | str] = {}
    for folder in range(100):
        tree[f"d{folder}"] = 0o755
        for number in range(100):
            tree[f"d{folder}/f{number}"] = (0o644, os.urandom(16) * 640)
    root = make(tmp_path / "p", {})
    rows, contents = operations({}, tree), Bytes(tree)
    start = time.monotonic()
    apply(root, rows, contents, label="t")
    took = time.monotonic() - start
    print(f"\n10,000 new files (100 MB) applied in {took:.2f} s")
    assert len(list(root.rglob("f*"))) == 10_000
    assert took < 60
