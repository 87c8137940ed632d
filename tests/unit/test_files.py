"""Sparse copies hold the same bytes and the same holes; a changed file does not keep its stamp."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmsandbox.hypervisor.files import data_extents, dig_holes, fill_sparse, new_sparse, sha256_of, stamp_of

PAGE = 4096


def sparse_file(path: Path, pages: list[int], size: int) -> Path:
    """A file of holes with data in some pages."""
    new_sparse(path, size)
    with path.open("r+b") as file:
        for page in pages:
            file.seek(page * PAGE)
            file.write(bytes([page % 255 + 1]) * min(PAGE, size - page * PAGE))
    return path


@given(st.sets(st.integers(0, 63)), st.integers(0, PAGE - 1))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_copy_has_the_same_bytes_and_no_more_blocks(tmp_path: Path, pages: set[int], odd: int) -> None:
    for name in ("source", "target"):
        (tmp_path / name).unlink(missing_ok=True)
    size = 64 * PAGE + odd
    source = sparse_file(tmp_path / "source", sorted(pages), size)
    target = tmp_path / "target"
    new_sparse(target, size)
    fill_sparse(source, target)
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_blocks <= len(pages) * PAGE // 512 + 64
    assert target.stat().st_mode & 0o777 == 0o600


def test_a_copy_into_memory_has_the_same_bytes_and_its_holes(tmp_path: Path) -> None:
    source = sparse_file(tmp_path / "source", [0, 1, 7, 40, 63], 64 * PAGE)
    with open(os.memfd_create("target"), "r+b") as target:
        target.truncate(64 * PAGE)
        fill_sparse(source, Path(f"/proc/self/fd/{target.fileno()}"), follow=True)
        assert target.read() == source.read_bytes()
        assert os.fstat(target.fileno()).st_blocks <= 8 * PAGE // 512


def test_a_new_file_never_overwrites(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("there", "link"):
        with pytest.raises(FileExistsError):
            new_sparse(tmp_path / name, 10)
    assert not (tmp_path / "elsewhere").exists()


def test_links_are_not_followed(tmp_path: Path) -> None:
    source = sparse_file(tmp_path / "source", [0], PAGE)
    precious = sparse_file(tmp_path / "precious", [], PAGE)
    (tmp_path / "link").symlink_to(precious)
    with pytest.raises(OSError):
        fill_sparse(source, tmp_path / "link")
    with pytest.raises(OSError):
        fill_sparse(tmp_path / "link", source)
    assert precious.read_bytes() == bytes(PAGE)


def test_zeros_become_holes_and_nothing_else_changes(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    content = bytearray(os.urandom(PAGE) + bytes(40 * PAGE) + os.urandom(PAGE) + bytes(10 * PAGE) + b"tail")
    content[5 * PAGE + 17] = 1  # a page that is nearly empty stays
    path.write_bytes(content)
    blocks = path.stat().st_blocks
    dig_holes(path)
    assert path.read_bytes() == content
    if path.stat().st_blocks == blocks:
        pytest.skip("this file system has no holes")
    fd = os.open(path, os.O_RDONLY)
    try:
        assert sum(end - start for start, end in data_extents(fd, len(content))) <= 5 * PAGE
    finally:
        os.close(fd)


def test_a_source_that_shrinks_is_an_error_and_no_endless_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = sparse_file(tmp_path / "source", [0, 1], 2 * PAGE)
    new_sparse(tmp_path / "target", 2 * PAGE)
    monkeypatch.setattr("vmsandbox.hypervisor.files.data_extents", lambda _fd, _size: [(0, 4 * PAGE)])
    with pytest.raises(OSError, match="shorter"):
        fill_sparse(source, tmp_path / "target")


def test_a_written_file_has_another_stamp_even_with_its_time_put_back(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"a" * PAGE)
    info, stamp, digest = path.stat(), stamp_of(path), sha256_of(path)
    with path.open("r+b") as file:
        file.write(b"b")
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert stamp_of(path) != stamp
    assert sha256_of(path) != digest
