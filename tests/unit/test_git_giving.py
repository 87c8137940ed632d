"""The repository that a guest gets: whole for plain git, and with nothing in it that was not to be given."""

from __future__ import annotations

import os
import random
import zlib
from pathlib import Path

import pytest
from git_repositories import commit, git, make_repository, manifest_of, text, unpack

from vmsandbox.errors import RefusedError, UserInputError
from vmsandbox.git import objects
from vmsandbox.git.giving import GuestRepository, history, snapshot
from vmsandbox.git.objects import PackWriter
from vmsandbox.policy.tree.denied import DeniedPaths
from vmsandbox.policy.tree.gitrepo import find_repository
from vmsandbox.policy.tree.gitrun import HostGit
from vmsandbox.process import Programs
from vmsandbox.review.manifest import Manifest


def give(root: Path, folder: Path, *, shallow: bool = False, denied: tuple[str, ...] = (),
         pushed: Manifest | None = None, own_shallow: frozenset[str] = frozenset()) -> GuestRepository:  # fmt: skip
    folder.mkdir()
    made = history(
        HostGit(Programs(), root / ".git"), root, pushed or manifest_of(root), DeniedPaths(denied, root), folder,
        shallow=shallow, own_shallow=own_shallow,
    )  # fmt: skip
    assert made is not None
    return made


def copy_of(root: Path, target: Path) -> Path:
    """The pushed files, with the times that a push keeps."""
    import shutil

    shutil.copytree(root, target, symlinks=True, ignore=shutil.ignore_patterns(".git"))
    for path in target.rglob("*"):
        if not path.is_symlink():
            status = path.stat()
            os.utime(path, (int(status.st_mtime), int(status.st_mtime)))
    return target


@pytest.mark.parametrize("algorithm", ["sha1", "sha256"])
def test_a_snapshot_is_one_commit_of_what_was_pushed(tmp_path: Path, algorithm: str) -> None:
    root = tmp_path / "p"
    (root / "a/b c").mkdir(parents=True)
    (root / "a.b").write_text("sorts before a/")
    (root / "a/b c/ü").write_text("x" * 70_000)
    (root / "a/same").write_text("sorts before a/")
    (root / "run").write_text("#!/bin/sh\n")
    (root / "run").chmod(0o755)
    (root / "link").symlink_to("a/same")
    (root / "a/.GIT").mkdir()
    (root / "a/.GIT/config").write_text("never committed")
    os.utime(root / "run", (1_500_000_000, 1_500_000_000))
    (tmp_path / "w").mkdir()
    made = snapshot(root, manifest_of(root), algorithm, tmp_path / "w")
    guest = unpack(made, copy_of(root, tmp_path / "guest"))
    git(guest, "fsck", "--strict")
    assert text(guest, "status", "--short") == "?? a/.GIT/"
    assert text(guest, "log", "--format=%H %an") == f"{made.base} vmsandbox guest"
    assert len(made.base) == {"sha1": 40, "sha256": 64}[algorithm]
    assert "100755" in text(guest, "ls-tree", "HEAD", "run")
    (guest / "run").write_text("changed!!\n")
    assert "M run" in text(guest, "status", "--short"), "same size, another time"
    git(guest, "commit", "-q", "-am", "works")
    again = tmp_path / "w2"
    again.mkdir()
    assert snapshot(root, manifest_of(root), algorithm, again).base == made.base


@pytest.mark.parametrize("near", [1 << 31, 1000], ids=["offsets of four bytes", "of eight"])
def test_the_index_of_a_pack_is_what_git_would_write(
    tmp_path: Path, near: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "_NEAR_OFFSETS", near)
    pack = tmp_path / "pack-x.pack"
    contents = [b"", b"text " * 1000, *(random.Random(number).randbytes(9000) for number in range(40))]
    with pack.open("w+b") as file:
        writer = PackWriter(file, "sha1")
        for content in (*contents, *contents):
            writer.add("blob", content)
        writer.finish()
    assert pack.stat().st_size < 40 * 9000 + 3000, "each once, and what shrinks is compressed"
    version = f"--index-version=2,{near}" if near < 1 << 31 else "--index-version=2"
    git(tmp_path, "index-pack", version, "-o", "git.idx", pack.name)
    assert writer.index() == (tmp_path / "git.idx").read_bytes()


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 65534, 65535, 65536, 131070, 131071, 200_000])
def test_git_reads_what_does_not_shrink_and_what_does(tmp_path: Path, size: int) -> None:
    contents = [random.Random(size).randbytes(size), b"a line of text\n" * (size // 15)]
    with (tmp_path / "made.pack").open("w+b") as file:
        writer = PackWriter(file, "sha1")
        for content in contents:
            assert zlib.decompress(objects._deflated(content)) == content
            writer.add("blob", content)
        writer.finish()
    git(tmp_path, "index-pack", "--strict", "made.pack")


def test_a_file_that_changed_since_the_push_is_not_put_under_another_content(tmp_path: Path) -> None:
    root = tmp_path / "p"
    root.mkdir()
    (root / "f").write_text("sent")
    pushed = manifest_of(root)
    outside = tmp_path / "outside"
    outside.write_text("SECRET")
    (root / "f").unlink()
    (root / "f").symlink_to(outside)
    for attempt in ("link", "file"):
        (tmp_path / attempt).mkdir()
        with pytest.raises(UserInputError, match="changed since it was sent"):
            snapshot(root, pushed, "sha1", tmp_path / attempt)
        (root / "f").unlink()
        (root / "f").write_text("SECR")


def test_full_history_is_the_current_branch_and_nothing_else(tmp_path: Path) -> None:
    root = make_repository(tmp_path / "p", {"a": "1", "d/b": "2"})
    commit(root, {"a": "11"}, "second")
    git(root, "tag", "v1")
    git(root, "branch", "other")
    git(root, "checkout", "-q", "other")
    commit(root, {"only-there": "secret of another branch"}, "other")
    other = text(root, "rev-parse", "HEAD")
    git(root, "checkout", "-q", "main")
    git(root, "config", "remote.origin.url", "https://user:password@example.invalid/x")
    (root / "a").write_text("not committed")
    made = give(root, tmp_path / "w")
    guest = unpack(made, copy_of(root, tmp_path / "guest"))
    git(guest, "fsck", "--strict")
    assert text(guest, "log", "--format=%s") == "second\nc"
    assert "size: 1\t" in text(guest, "ls-files", "--debug", "d/b"), "git would look into every file"
    assert "size: 0\t" in text(guest, "ls-files", "--debug", "a")
    assert text(guest, "status", "--short") == "M a"
    assert text(guest, "for-each-ref", "--format=%(refname)") == "refs/heads/main"
    assert text(guest, "cat-file", "-t", other, check=False) == ""
    assert not (guest / ".git/logs").exists() and not (guest / ".git/hooks").exists()
    assert b"password" not in b"".join(made.small.values())


def test_shallow_history_ends_where_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_repository(tmp_path / "p", {"a": "0"})
    for number in range(1, 6):
        commit(root, {"a": str(number), f"f{number}": "x"}, f"n{number}")
    monkeypatch.setattr("vmsandbox.git.giving.SHALLOW_COMMITS", 3)
    made = give(root, tmp_path / "w", shallow=True)
    guest = unpack(made, copy_of(root, tmp_path / "guest"))
    git(guest, "fsck", "--strict")
    assert text(guest, "log", "--format=%s") == "n5\nn4\nn3"
    assert text(guest, "status", "--short") == ""

    # and of a clone that is shallow itself, all that it has
    clone = tmp_path / "clone"
    git(tmp_path, "-c", "protocol.file.allow=always", "clone", "-q", "--depth=2", f"file://{root}", clone)
    shallow = frozenset((clone / ".git/shallow").read_text().split())
    again = unpack(give(clone, tmp_path / "w2", own_shallow=shallow), copy_of(clone, tmp_path / "guest2"))
    git(again, "fsck", "--strict")
    assert text(again, "log", "--format=%s") == "n5\nn4"


@pytest.mark.parametrize(
    ("files", "denied", "named"),
    [
        ({"deep/.env": "PASSWORD=1"}, (), "deep/.env"),
        ({".ssh/config": "x"}, (), ".ssh"),
        ({"private/plan": "x"}, ("private/",), "private"),
        ({"line\nid_rsa": "x"}, ("line*",), "line\\x0aid_rsa"),
        ({"a\n/id_rsa": "x"}, (), "a\\x0a/id_rsa"),
    ],
)
def test_a_secret_anywhere_in_the_history_is_refused(
    tmp_path: Path, files: dict[str, str], denied: tuple[str, ...], named: str
) -> None:
    root = make_repository(tmp_path / "p", {"a": "1"})
    commit(root, {**files, "copy-of-it": next(iter(files.values()))}, "by mistake")
    for name in files:
        git(root, "rm", "-q", "-r", "--", name)
    commit(root, {"a": "2"}, "removed again")
    with pytest.raises(RefusedError) as caught:
        give(root, tmp_path / "w", denied=denied)
    assert named in caught.value.details and "--history none" in caught.value.resolution


def test_a_secret_that_only_merges_saw_is_refused(tmp_path: Path) -> None:
    """One merge adds it, the next one takes it away: no ordinary commit ever changed it."""
    root = make_repository(tmp_path / "p", {"a": "1"})
    for number in (1, 2):
        git(root, "checkout", "-q", "-b", f"side{number}")
        commit(root, {f"b{number}": "1"}, "side")
        git(root, "checkout", "-q", "main")
        commit(root, {"a": f"2{number}"}, "main")
        git(root, "merge", "-q", "--no-commit", f"side{number}")
        if number == 1:
            commit(root, {"key.pem": "only in a merge"}, "evil merge")
        else:
            (root / "key.pem").unlink()
            commit(root, {}, "evil merge")
    assert "key.pem" not in text(root, "log", "--name-only", "--no-merges")
    with pytest.raises(RefusedError, match=r"key\.pem"):
        give(root, tmp_path / "w")


def test_what_stayed_on_the_host_is_not_missed_in_the_guest(tmp_path: Path) -> None:
    root = make_repository(tmp_path / "p", {"a": "1"})
    (root / "out").symlink_to("/etc/passwd")
    git(root, "add", "out")
    git(root, "commit", "-q", "-m", "link")
    pushed = manifest_of(root)
    made = give(root, tmp_path / "w", pushed=Manifest({"a": pushed.items["a"]}))
    guest = unpack(made, copy_of(root, tmp_path / "guest"))
    (guest / "out").unlink()
    assert text(guest, "status", "--short") == ""
    git(guest, "commit", "-q", "--allow-empty", "-a", "-m", "c")
    assert "out" in text(guest, "ls-tree", "HEAD", "out")


def test_a_git_folder_that_points_elsewhere_is_no_source(tmp_path: Path) -> None:
    private = make_repository(tmp_path / "private", {"diary": "x"})

    def parts(root: Path) -> str:
        found = find_repository(root, Programs())
        assert found is not None
        return " ".join(found.foreign_parts() + found.borrowed_objects())

    assert parts(private) == ""
    pointed = tmp_path / "pointed"
    pointed.mkdir()
    (pointed / ".git").write_text(f"gitdir: {private}/.git\n")
    assert "does not point back" in parts(pointed)
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / ".git").symlink_to(private / ".git")
    assert "is a link" in parts(linked)
    shared = make_repository(tmp_path / "shared", {"a": "1"})
    (shared / ".git/objects/info/alternates").write_text(f"{private}/.git/objects\n")
    assert "alternates" in parts(shared)
    common = make_repository(tmp_path / "common", {"a": "1"})
    (common / ".git/commondir").write_text(f"{private}/.git\n")
    assert "commondir points to" in parts(common)
    objects = make_repository(tmp_path / "objects", {"a": "1"})
    (objects / ".git/objects").rename(tmp_path / "moved")
    (objects / ".git/objects").symlink_to(tmp_path / "moved")
    assert "objects lies in" in parts(objects)

    # What git itself makes is not taken for that: a worktree, a submodule.
    git(private, "worktree", "add", "-q", tmp_path / "tree")
    assert parts(tmp_path / "tree") == ""
    git(shared, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", private, "sub")
    assert parts(shared / "sub") == ""
