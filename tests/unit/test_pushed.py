"""The old side of a review: only bytes that were really pushed, and never through a link."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from vmsandbox.review.manifest import Item, Manifest
from vmsandbox.session.records.pushed import PushedContents

CONTENT = b"as it was\n"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    (root / "d").mkdir(parents=True)
    (root / "d/a").write_bytes(CONTENT)
    (root / "b").write_bytes(CONTENT)
    return root


def contents(root: Path, *paths: str) -> PushedContents:
    items = {path: Item("file", 0o644, len(CONTENT), DIGEST) for path in paths}
    return PushedContents(root, Manifest({"d": Item("dir", 0o755), **items}))


def test_the_bytes_that_were_pushed(project: Path) -> None:
    stream = contents(project, "d/a").open(DIGEST)
    assert stream is not None and stream.read() == CONTENT


def test_another_file_with_the_same_bytes_will_do(project: Path) -> None:
    (project / "d/a").write_bytes(b"different")
    stream = contents(project, "d/a", "b").open(DIGEST)
    assert stream is not None and stream.read() == CONTENT


@pytest.mark.parametrize("new", [b"changed!!\n", b"as it was\n more", b""])
def test_what_changed_since_is_not_there(project: Path, new: bytes) -> None:
    (project / "d/a").write_bytes(new)
    assert contents(project, "d/a").open(DIGEST) is None


def test_links_and_fifos_are_not_followed(project: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a").write_bytes(CONTENT)
    (project / "d/a").unlink()
    (project / "d/a").symlink_to(outside / "a")
    assert contents(project, "d/a").open(DIGEST) is None
    (project / "d/a").unlink()
    os.mkfifo(project / "d/a")
    assert contents(project, "d/a").open(DIGEST) is None
    (project / "d/a").unlink()
    (project / "d").rmdir()
    (project / "d").symlink_to(outside)
    assert contents(project, "d/a").open(DIGEST) is None
