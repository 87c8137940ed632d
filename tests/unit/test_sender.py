"""The program that runs in guests, joined to the real receiver: what is in a tree is what arrives, and no more travels
than has to."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from receiving import (
    SENDER,
    baseline_of,
    from_tree,
    listing,
    pushed_tree,
    record,
    returned,
    says,
    sha256,
    snapshot,
)  # fmt: skip

from vmsandbox.errors import GuestError
from vmsandbox.receive.protocol import HELLO, ReturnLimits
from vmsandbox.receive.store import Quarantine
from vmsandbox.review.changes import compare
from vmsandbox.review.manifest import Item, Manifest


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = tmp_path / "tree"
    tree.mkdir()
    return tree


@pytest.fixture
def place(tmp_path: Path) -> Path:
    place = tmp_path / "record"
    place.mkdir()
    return place


def settle() -> None:
    """Until the kernel's clock has ticked: what is written now is newer than what was."""
    time.sleep(0.03)


def test_all_sorts_of_entries_arrive(tree: Path, place: Path) -> None:
    contents = {
        "file": b"12345", "empty": b"", "large": os.urandom((2 << 20) + 3), "just": b"x" * (64 << 10),
        "more": b"y" * ((64 << 10) + 1), "chunk": os.urandom((64 + 256) << 10), "sub/dir/deep": b"deep",
        "new\nline \"'\\ \U0001f600": b"1", os.fsdecode(b"bytes\xff/\xfe"): b"2", "-rf": b"3", " ": b"4",
        "x" * 255: b"5", "other/.gitignore": b"6", ".github/x": b"7",
    }  # fmt: skip
    for name, content in contents.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(content)
    for name in (".git/hooks", "sub/.git", "nothing"):
        (tree / name).mkdir(parents=True)
    (tree / ".git/hooks/x").write_text("x")
    (tree / "other/.git").write_text("gitdir: x")
    (tree / "file").chmod(0o4751)
    (tree / "out").symlink_to("/etc")
    (tree / "bytes").symlink_to(os.fsdecode(b"\xfe"))
    os.mkfifo(tree / "sub/fifo")
    socket.socket(socket.AF_UNIX).bind(os.fspath(tree / "socket"))
    received = from_tree(place, tree)
    items = received.quarantine.manifest.items
    for name, content in contents.items():
        assert items[name].sha256 == sha256(content) and items[name].size == len(content)
        stream = received.quarantine.open(sha256(content))
        assert stream is not None and stream.read() == content
        stream.close()
    folders = {"sub", "sub/dir", "nothing", "other", ".github", os.fsdecode(b"bytes\xff")}
    assert set(items) == {*contents, *folders, "out", "bytes", "sub/fifo", "socket"}
    assert items["file"].mode == 0o751
    assert items["out"] == Item("symlink", 0, target="/etc") and items["bytes"].target == os.fsdecode(b"\xfe")
    assert items["sub/fifo"].kind == items["socket"].kind == "other"
    again = Quarantine.load(place / "quarantine", received.quarantine.digest)
    assert again == received.quarantine and again.digest == again.manifest.digest


def test_only_what_was_touched_travels(tree: Path, place: Path) -> None:
    for number in range(300):
        (tree / f"f{number}").write_bytes(b"%d" % number * 1000)
    (tree / "private").write_text("p")
    (tree / "private").chmod(0o600)
    settle()
    (tree / "last").write_text("the newest ctime of the push: always sent")
    settle()
    pushed, baseline = pushed_tree(tree), baseline_of(tree)
    received = from_tree(place, tree, pushed=pushed, baseline=baseline)
    assert received.quarantine.manifest == Manifest(pushed)
    assert received.transferred < 30_000 and received.files == 0

    settle()
    (tree / "f1").write_bytes(b"changed")
    status = (tree / "f2").stat()
    (tree / "f2").write_bytes(b"3" * status.st_size)
    os.utime(tree / "f2", ns=(status.st_atime_ns, status.st_mtime_ns))  # as a liar without root would
    (tree / "f3").unlink()
    (tree / "f4").rename(tree / "moved")
    (tree / "f5").chmod(0o755)
    os.utime(tree / "f6")
    (tree / "f7").unlink()
    (tree / "f7").symlink_to("f8")
    (tree / "new").write_text("new")
    (tree / "private").write_text("q")
    (place / "quarantine").rename(place / "first")
    received = from_tree(place, tree, pushed=pushed, baseline=baseline)
    changes = compare(Manifest(pushed), received.quarantine.manifest)
    assert changes.counts == {
        "added": 1, "modified": 3, "deleted": 1, "mode_changed": 1, "renamed": 1, "kind_changed": 1,
    }  # fmt: skip
    assert [one.path for one in changes.modified] == ["f1", "f2", "private"]
    assert received.quarantine.manifest.items["private"].mode == 0o600
    assert received.transferred < 60_000


def test_a_file_in_the_tick_of_the_baseline_is_not_believed(place: Path) -> None:
    """Its content may have changed without its ctime: the same record must not pass for unchanged."""
    pushed = {"a": Item("file", 0o644, 1, "aa" * 32), "b": Item("file", 0o644, 1, "bb" * 32)}
    old, new = record("a", ctime=1_000_000_000), record("b", ctime=1_030_000_000)
    stream = listing(old, new) + b"F\0\0\0\x01x"
    items = returned(place, says(stream), pushed, listing(old, new)).quarantine.manifest.items
    assert items["a"] == pushed["a"] and items["b"].sha256 == sha256(b"x")


def test_the_baseline_holds_for_what_was_unpacked_a_moment_before(tree: Path, place: Path) -> None:
    for number in range(300):
        (tree / f"f{number}").write_bytes(b"x" * 1000)
    pushed = pushed_tree(tree)
    times = {path: path.stat().st_mtime_ns for path in tree.iterdir()}
    baseline = baseline_of(tree)
    assert {path: path.stat().st_mtime_ns for path in tree.iterdir()} == times
    received = from_tree(place, tree, pushed=pushed, baseline=baseline)
    assert received.files == 0
    assert received.transferred < len(baseline) + 2000, "more than the one file whose times were set anew"


# For root every folder opens.
AS_NOBODY = """
import os, select, sys
sys.argv.pop(0)
sys.path.append(os.path.dirname(sys.argv[0]))
from vmsandbox_return import main
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
main()
"""


def test_what_cannot_be_read_is_told_and_not_taken_for_deleted(tree: Path, place: Path) -> None:
    (tree / "closed/in").mkdir(parents=True)
    (tree / "closed/in/file").write_text("x")
    (tree / "secret").write_text("y")
    pushed = pushed_tree(tree)
    (tree / "secret").chmod(0)
    (tree / "closed").chmod(0)
    if os.geteuid() == 0:  # the worker's own: what is root's alone was mounted there, and is passed over
        for path in (tree / "secret", tree / "closed"):
            os.chown(path, 65534, 65534)

    def guest(sock: socket.socket) -> None:
        subprocess.run(
            [sys.executable, "-IS", "-c", AS_NOBODY, SENDER, "."], stdin=sock, stdout=sock, cwd=tree, timeout=60
        )

    try:
        received = returned(place, guest, pushed)
    finally:
        (tree / "closed").chmod(0o755)
    items = received.quarantine.manifest.items
    assert received.held == ("closed",)
    assert items["closed/in/file"] == pushed["closed/in/file"]
    assert items["secret"].sha256 is None


def test_a_file_that_grows_while_it_is_copied(tree: Path, place: Path) -> None:
    log = tree / "log"
    log.write_bytes(b"")
    stop = threading.Event()

    def grow() -> None:
        with log.open("ab", buffering=0) as file:
            while not stop.is_set() and file.tell() < 200 << 20:
                file.write(os.urandom(1 << 16))

    writer = threading.Thread(target=grow)
    writer.start()
    try:
        received = from_tree(place, tree)
    finally:
        stop.set()
        writer.join()
    item = received.quarantine.manifest.items["log"]
    stream = received.quarantine.open(item.sha256 or "")
    assert stream is not None
    with stream:
        content = stream.read()
    assert sha256(content) == item.sha256 and len(content) == item.size
    assert log.read_bytes().startswith(content)


def test_depth_and_sparse_files(tree: Path, place: Path) -> None:
    with (tree / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    here = os.open(tree, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=here)
        further = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = further
    os.close(here)
    began = time.monotonic()
    try:
        received = from_tree(place, tree)
    finally:
        subprocess.run(["rm", "-rf", tree / "d"], check=True)
    items = received.quarantine.manifest.items
    assert items["sparse"].size == 1 << 40 and items["sparse"].sha256 is None
    assert max(path.count("/") for path in items) < 128 and len(received.held) == 1
    assert time.monotonic() - began < 20


def test_what_the_host_asks_for_is_no_way_to_block_it(tree: Path) -> None:
    """Asked for a FIFO, a folder, a link or nothing, the sender says that it cannot, and goes on."""
    os.mkfifo(tree / "fifo")
    (tree / "link").symlink_to("file")
    (tree / "file").write_text("x")
    argv = [sys.executable, "-IS", SENDER, tree]
    done = subprocess.run(
        argv, input=b"fifo\0link\0.\0\0none\0/dev/zero\0file\0", capture_output=True, check=True, timeout=20
    )
    assert done.stdout.startswith(HELLO)
    assert done.stdout.count(b"U\0\0\0\0") == 6 and b"F\0\0\0\x01x" in done.stdout


def test_the_sender_fails_loudly(tree: Path, place: Path) -> None:
    done = subprocess.run([sys.executable, "-IS", SENDER, tree / "none"], capture_output=True, check=False)
    assert done.returncode != 0 and b"none" in done.stderr and done.stdout == b""
    argv = [sys.executable, "-IS", SENDER, "--baseline", tree]
    assert subprocess.run(argv, input=b"", capture_output=True, check=False).returncode != 0, "tar had failed"
    with pytest.raises(GuestError, match="sent nothing"):
        from_tree(place, tree / "none")


def test_many_requests_do_not_block_either_side(tree: Path, place: Path) -> None:
    """More than any pipe holds, in both directions at once."""
    folder = tree / "/".join(["n" * 250] * 5)
    folder.mkdir(parents=True)
    for number in range(4000):
        (folder / f"{number:04}{'x' * 240}").write_bytes(b"%d" % number * 50)
    received = from_tree(place, tree, limits=ReturnLimits(stall_seconds=20))
    assert received.files == 4000


def test_the_quarantine_takes_what_the_host_makes(tree: Path, place: Path) -> None:
    (tree / "a").write_text("a")
    quarantine = from_tree(place, tree).quarantine
    digest = quarantine.put(b"half of a hunk")
    assert quarantine.put(b"half of a hunk") == digest == sha256(b"half of a hunk")
    stream = quarantine.open(digest)
    assert stream is not None and stream.read() == b"half of a hunk"
    stream.close()
    for name in ("../manifest.jsonl", "", "a", digest.upper(), digest + "\n"):
        assert quarantine.open(name) is None
    assert all(mode & 0o222 == 0 for mode, _ in snapshot(quarantine.blobs).values())
    (quarantine.blobs / ("0" * 64)).symlink_to("/etc/passwd")
    assert quarantine.open("0" * 64) is None
