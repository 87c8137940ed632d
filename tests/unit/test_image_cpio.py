"""The cpio writer: read back by an independent reader (cpio(1)), and the form the kernel asks for."""

from __future__ import annotations

import lzma
import os
import stat
import subprocess
from pathlib import Path

import pytest

from vmsandbox.errors import ImageError
from vmsandbox.image.cpio import CpioEntry, cpio_archive
from vmsandbox.image.initramfs import small_initramfs

ENTRIES = [
    CpioEntry.folder("seed", 0o700),
    CpioEntry.file("seed/user-data", b"#cloud-config\n", 0o600),
    CpioEntry.file("seed/empty", b""),
    CpioEntry.file("seed/ü" + "n" * 200, bytes(range(256)) * 5),
    CpioEntry("seed/link", stat.S_IFLNK | 0o777, b"user-data"),
]


def extract(archive: bytes, into: Path) -> None:
    into.mkdir()
    subprocess.run(["cpio", "-idm", "--quiet", "--no-absolute-filenames"], input=archive, cwd=into, check=True)


def test_cpio_reads_back_what_was_written(tmp_path: Path) -> None:
    extract(cpio_archive(ENTRIES), tmp_path / "x")
    for entry in ENTRIES:
        path = tmp_path / "x" / entry.path
        status = path.lstat()
        assert status.st_mode == entry.mode
        if path.is_symlink():
            assert os.fsencode(path.readlink()) == entry.content
        elif path.is_file():
            assert path.read_bytes() == entry.content


def test_form() -> None:
    archive = cpio_archive(ENTRIES)
    assert archive == cpio_archive(ENTRIES)
    assert len(archive) % 512 == 0  # so that another archive may follow
    assert archive.startswith(b"070701")
    assert archive.count(b"TRAILER!!!") == 1


@pytest.mark.parametrize("path", ["", "/etc/passwd", "a//b", "../x", "a/../b", "a/", "a\0b"])
def test_bad_paths(path: str) -> None:
    with pytest.raises(ValueError, match="not a path"):
        cpio_archive([CpioEntry.file(path, b"")])


def test_small_initramfs(tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "busybox").write_bytes(b"BUSYBOX")
    (parts / "virtio_blk.ko.xz").write_bytes(lzma.compress(b"MODULE"))
    archive = small_initramfs(parts, b"#!/bin/busybox sh\n")
    listed = subprocess.run(["cpio", "-itv", "--quiet"], input=archive, capture_output=True, check=True).stdout
    lines = {line.split()[-1]: line.split()[0] for line in listed.decode().splitlines()}
    assert lines["init"] == "-rwxr-xr-x" and lines["bin/busybox"] == "-rwxr-xr-x"
    assert lines["dev/console"] == "crw-------"
    assert b"MODULE" in archive  # unpacked: busybox's insmod cannot

    (parts / "virtio_blk.ko.xz").rename(parts / "virtio_blk.ko.zst")
    with pytest.raises(ImageError, match=r"virtio_blk\.ko\.zst"):
        small_initramfs(parts, b"")
    (parts / "virtio_blk.ko.zst").unlink()  # built into the kernel
    assert b"virtio_blk" not in small_initramfs(parts, b"")
