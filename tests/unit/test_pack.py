"""What is sent: unpacked with the system's tar and looked at with the program that runs in the guest."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from receiving import from_tree

from vmsandbox.errors import UserInputError
from vmsandbox.guest.pack import RECORD, PushedManifest, pack, pack_files
from vmsandbox.guest.walk import Limits, Walk, walk_project
from vmsandbox.policy.values import Policy
from vmsandbox.review.changes import compare
from vmsandbox.review.manifest import Manifest


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    root.mkdir()
    return root


def packed(walk: Walk) -> tuple[bytes, PushedManifest]:
    out = io.BytesIO()
    pushed = pack(walk, out.write)
    return out.getvalue(), pushed


def unpacked(archive: bytes, folder: Path) -> Path:
    folder.mkdir()
    subprocess.run(
        ["tar", "--extract", "--preserve-permissions", "--no-same-owner"],
        cwd=folder, input=archive, check=True, preexec_fn=lambda: os.umask(0o077) and None,
    )  # fmt: skip
    return folder


def reported(folder: Path, pushed: Manifest) -> Manifest:
    """The tree as it comes back from a guest that was given `pushed`."""
    with tempfile.TemporaryDirectory() as place:
        return from_tree(Path(place), folder, pushed=dict(pushed.items)).quarantine.manifest


def test_what_arrives_is_what_was_there(project: Path, tmp_path: Path) -> None:
    (project / "dir/deeper/deepest").mkdir(parents=True)
    (project / "dir").chmod(0o550)
    contents = {
        "plain": b"text", "empty": b"",
        "dir/deeper/deepest/block": b"x" * 512, "dir/deeper/large": os.urandom(3_000_000),
        "x" * 255: b"long", "/".join(["folder" * 8] * 6) + "/long path": b"path",
        "new\nline": b"1", "\"quote'": b"2", "$(id)": b"3", "-oProxyCommand=x": b"4", "back\\slash": b"5",
        os.fsdecode(b"\xff\xfe\x80"): b"6", "\x1b[31m": b"7", "ü e\u0308": b"8", " ": b"9",
        "--checkpoint=1": b"10",
    }  # fmt: skip
    for path, content in contents.items():
        (project / path).parent.mkdir(parents=True, exist_ok=True)
        (project / path).write_bytes(content)
    (project / "plain").chmod(0o6751)
    (project / "empty").chmod(0o444)
    (project / "link").symlink_to("dir/deeper")
    (project / ("l" * 200)).symlink_to("folder/" * 30 + os.fsdecode(b"\xfd"))
    os.utime(project / "plain", (5, 1_234_567_890))
    os.utime(project / "dir/deeper", (5, 1_000_000_000))
    archive, pushed = packed(walk_project(project, Policy()))
    copy = unpacked(archive, tmp_path / "copy")
    for path, content in contents.items():
        assert (copy / path).read_bytes() == content
        assert pushed.manifest.items[path].sha256 == hashlib.sha256(content).hexdigest()
    assert (copy / "plain").stat().st_mode & 0o7777 == 0o751  # no setuid, no setgid
    assert (copy / "plain").stat().st_mtime == 1_234_567_890
    assert (copy / "dir/deeper").stat().st_mtime == 1_000_000_000
    assert (copy / "dir").stat().st_mode & 0o7777 == 0o550
    assert os.readlink(copy / "link") == "dir/deeper"
    # The guest's own program sees the same, to the last byte of the canonical form.
    assert compare(pushed.manifest, reported(copy, pushed.manifest)).is_empty
    assert pushed.manifest.digest == reported(copy, pushed.manifest).digest
    assert pushed.files == len(contents)
    assert pushed.content_bytes == sum(map(len, contents.values()))
    assert pushed.archive_bytes == len(archive)


def test_owners_are_not_told(project: Path) -> None:
    (project / "a").write_text("x")
    os.chown(project / "a", os.getuid(), os.getgid())
    archive, _ = packed(walk_project(project, Policy()))
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        assert {(one.uid, one.gid, one.uname, one.gname) for one in tar} == {(0, 0, "", "")}


def test_an_empty_project_is_an_empty_archive(project: Path, tmp_path: Path) -> None:
    archive, pushed = packed(walk_project(project, Policy()))
    assert list(unpacked(archive, tmp_path / "copy").iterdir()) == []
    assert pushed.manifest.items == {} and len(archive) == 1024


@pytest.mark.parametrize("size", [0, 1, RECORD - 1536, RECORD - 1024, RECORD - 512, RECORD])
def test_a_second_archive_follows_the_first_in_one_stream(project: Path, tmp_path: Path, size: int) -> None:
    (project / "a").write_bytes(b"a" * size)
    stream = io.BytesIO()
    pack(walk_project(project, Policy()), stream.write, record=RECORD)
    pack_files(iter([(".git/HEAD", 5, (b"ref: ",))]), stream.write)
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    untar = f"tar -x -b {RECORD // 512} -B -f -"
    script = f"cat | {{ {untar} -C {first} && {untar} -C {second}; wc -c; }}"  # a pipe, as the port is none to seek in
    left = subprocess.run(["sh", "-c", script], input=stream.getvalue(), check=True, capture_output=True).stdout
    assert left.strip() == b"0"
    assert (first / "a").read_bytes() == b"a" * size and not (first / ".git").exists()
    assert (second / ".git/HEAD").read_bytes() == b"ref: "


def test_writes_are_large_and_progress_ends_at_all(project: Path) -> None:
    for number in range(300):
        (project / f"f{number:03}").write_bytes(b"y" * 5000)
    sizes: list[int] = []
    told: list[tuple[int, int]] = []
    pack(
        walk_project(project, Policy()),
        lambda data: sizes.append(len(data)),
        lambda done, total: told.append((done, total)),
    )
    assert all(size >= 64 << 10 for size in sizes[:-1]) and len(sizes) < 15
    assert told == sorted(told) and told[-1] == (1_500_000, 1_500_000)


def to_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/hostname")


def to_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def to_folder_link(path: Path) -> None:
    path.parent.rename(path.parent.with_name("moved"))
    path.parent.symlink_to("/etc")


def enlarge(path: Path) -> None:
    os.truncate(path, 4 << 20)


@pytest.mark.parametrize("change", [to_link, to_fifo, to_folder_link, Path.unlink, enlarge])
def test_what_is_not_the_same_any_more_is_an_error(project: Path, change: Callable[[Path], None]) -> None:
    (project / "dir").mkdir()
    (project / "dir/hostname").write_text("mine")
    walk = walk_project(project, Policy(), limits=Limits(total_bytes=3 << 20))
    change(project / "dir/hostname")
    out = io.BytesIO()
    with pytest.raises(UserInputError, match="changed while it was being sent: dir"):
        pack(walk, out.write)
    host = Path("/etc/hostname")
    assert not host.exists() or host.read_bytes() not in out.getvalue() or not host.read_bytes()


def test_a_file_that_grows_is_sent_as_long_as_it_was(project: Path, tmp_path: Path) -> None:
    (project / "log").write_bytes(b"a" * 2_000_000)
    walk = walk_project(project, Policy())
    out = io.BytesIO()

    def write(data: bytes) -> None:
        with (project / "log").open("ab") as log:
            log.write(b"more" * 1000)
        out.write(data)

    pushed = pack(walk, write)
    copy = unpacked(out.getvalue(), tmp_path / "copy")
    assert (copy / "log").read_bytes() == b"a" * 2_000_000
    assert compare(pushed.manifest, reported(copy, pushed.manifest)).is_empty


def test_a_file_that_shrinks_is_an_error_that_names_it(project: Path) -> None:
    (project / "log").write_bytes(b"a" * 3_000_000)
    walk = walk_project(project, Policy())
    with pytest.raises(UserInputError, match="log") as caught:
        pack(walk, lambda data: os.truncate(project / "log", 100))
    assert "shorter" in caught.value.details


def test_no_descriptor_stays_open(project: Path) -> None:
    (project / "a/b/c").mkdir(parents=True)
    (project / "a/b/c/file").write_text("x")
    (project / "z").write_text("x")
    before = len(os.listdir("/proc/self/fd"))
    walk = walk_project(project, Policy())
    packed(walk)
    (project / "z").unlink()
    with pytest.raises(UserInputError):
        packed(walk)
    assert len(os.listdir("/proc/self/fd")) == before
