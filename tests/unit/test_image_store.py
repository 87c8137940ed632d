"""Store and publishing, with a program that makes small parts in place of mmdebstrap; the rest is real."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from vmsandbox.errors import HostError, ImageError, UserInputError
from vmsandbox.image import build as build_module
from vmsandbox.image.build import build_image
from vmsandbox.image.manifest import FILES, Image, file_digest
from vmsandbox.image.recipe import Recipe
from vmsandbox.image.store import ImageStore, check_raw_ext4
from vmsandbox.monitor import Monitor
from vmsandbox.paths import Layout
from vmsandbox.process import Finished, Programs

RECIPE = Recipe(name="tiny", packages=["dpkg"])
SIZE = 3 << 20


class QuickPrograms(Programs):
    """Makes the parts at once. `before_end` runs in the middle of the "build"."""

    def __init__(self, before_end: Callable[[Path], None] = lambda out: None, kernel: bytes = b"kernel") -> None:
        self.before_end = before_end
        self.kernel = kernel
        self.builds = 0

    def find(self, name: str) -> str | None:
        return f"/usr/bin/{name}"

    def run(self, argv: Sequence[str | Path], **options: Any) -> Finished:
        assert "mmdebstrap" in argv
        self.builds += 1
        out = Path(options["env"]["VMSANDBOX_OUT"])
        with (out / "root.ext4").open("wb") as root:
            root.truncate(SIZE)
            root.seek(0x438)
            root.write(b"\x53\xef")
        (out / "vmlinuz").write_bytes(self.kernel)
        (out / "kernel-version").write_text("6.12-cloud\n")
        (out / "busybox").write_bytes(b"busybox")
        (out / "packages").write_text("dpkg\t1.22:a+b~c\tamd64\tdpkg\t1.22\napt\t3\tamd64\tapt\t3\n")
        options["on_line"]("I: half way...")
        self.before_end(out)
        return Finished(tuple(map(str, argv)), 0, b"", b"")


@pytest.fixture(autouse=True)
def as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick parts appear where the privileged build leaves them."""
    monkeypatch.setattr(build_module.os, "geteuid", lambda: 0)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(**{folder.name: tmp_path / folder.name for folder in fields(Layout)})


@pytest.fixture
def image(layout: Layout) -> Image:
    return build_image(RECIPE, layout, QuickPrograms(), Monitor())


def names_in(layout: Layout) -> set[str]:
    return {entry.name for entry in (layout.images / "tiny").iterdir()}


def overwrite(path: Path, content: bytes, at: int = 0) -> None:
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)
    path.chmod(0o444)


def test_a_build_publishes_a_whole_image(layout: Layout, image: Image) -> None:
    assert names_in(layout) == {".lock", "current", image.digest[:16]}
    assert {entry.name for entry in image.folder.iterdir()} == {*FILES, "manifest.json"}
    assert image.folder.stat().st_mode & 0o777 == 0o755
    for entry in image.folder.iterdir():
        assert entry.stat().st_mode & 0o777 == 0o444
    for name, facts in image.facts.files.items():
        assert facts.sha256 == hashlib.sha256((image.folder / name).read_bytes()).hexdigest()
    store = ImageStore(layout)
    assert store.find("tiny") == image and store.list() == [image] == store.versions("tiny")
    assert (image.facts.kernel_version, image.facts.package_count) == ("6.12-cloud", 2)


def test_same_inputs_same_digest(layout: Layout, image: Image) -> None:
    again = build_image(RECIPE, layout, QuickPrograms(), Monitor())
    assert again.digest == image.digest
    assert again.root.stat().st_ino == image.root.stat().st_ino  # kept: templates may stand on it
    other = build_image(RECIPE, layout, QuickPrograms(kernel=b"newer"), Monitor())
    assert other.digest != image.digest
    store = ImageStore(layout)
    assert store.find("tiny") == other
    assert {each.digest for each in store.versions("tiny")} == {image.digest, other.digest}


def test_package_list(image: Image) -> None:
    document = json.loads(image.sbom.read_bytes())
    assert document["bomFormat"] == "CycloneDX" and document["specVersion"] == "1.5"
    assert [component["name"] for component in document["components"]] == ["apt", "dpkg"]
    assert document["components"][1]["purl"] == "pkg:deb/debian/dpkg@1.22%3Aa%2Bb~c?arch=amd64"


@pytest.mark.parametrize("name", FILES)
def test_one_byte_changed_is_refused(layout: Layout, image: Image, name: str) -> None:
    store = ImageStore(layout)
    store.verify(image)
    target = image.folder / name
    size = target.stat().st_size
    byte = target.read_bytes()[size - 1]
    overwrite(target, bytes([byte ^ 1]), size - 1)
    with pytest.raises(ImageError) as caught:
        store.verify(image)
    assert name in caught.value.details and "vmsandbox image" in caught.value.resolution
    with pytest.raises(ImageError):  # and it stays refused
        store.verify(image)


def test_change_with_the_times_set_back_is_refused(layout: Layout, image: Image) -> None:
    before = image.kernel.stat()
    overwrite(image.kernel, b"K")
    os.utime(image.kernel, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ImageError, match="damaged"):
        ImageStore(layout).verify(image)


def test_unchanged_files_are_not_hashed_again(layout: Layout, image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []

    def spy(path: Path) -> str:
        hashed.append(path)
        return file_digest(path)

    monkeypatch.setattr("vmsandbox.image.store.file_digest", spy)
    store = ImageStore(layout)
    store.verify(image)
    assert hashed == []
    store.verify(image, force=True)
    assert len(hashed) == len(FILES)
    os.utime(image.root)
    store.verify(image)
    assert len(hashed) == 2 * len(FILES)


@pytest.mark.parametrize("stamp", [b"", b"[]", b"{", b'["x", [[1]]]'])
def test_a_bad_stamp_only_costs_time(layout: Layout, image: Image, stamp: bytes) -> None:
    next((layout.cache / "verified").glob("*.json")).write_bytes(stamp)
    ImageStore(layout).verify(image)


@pytest.mark.parametrize("kind", ["symlink", "fifo", "missing", "folder"])
def test_files_of_another_kind_are_refused(layout: Layout, image: Image, kind: str) -> None:
    image.root.unlink()
    if kind == "symlink":
        image.root.symlink_to("/etc/shadow")
    elif kind == "fifo":
        os.mkfifo(image.root)
    elif kind == "folder":
        image.root.mkdir()
    with pytest.raises(ImageError, match="damaged"):
        ImageStore(layout).find("tiny")
    assert ImageStore(layout).list() == []


@pytest.mark.parametrize("key", ["kernel_version", "files", "digest", "name", "unknown"])
def test_a_changed_manifest_is_refused(layout: Layout, image: Image, key: str) -> None:
    manifest = image.folder / "manifest.json"
    told = json.loads(manifest.read_bytes())
    if key == "files":
        told["files"]["vmlinuz"]["sha256"] = "0" * 64
    else:
        told[key] = "f" * 64
    manifest.chmod(0o644)
    manifest.write_text(json.dumps(told))
    with pytest.raises(ImageError, match="damaged"):
        ImageStore(layout).find("tiny")


@pytest.mark.parametrize("target", ["../other/0123456789abcdef", "x", ".."])
def test_current_that_leads_elsewhere_is_refused(layout: Layout, image: Image, target: str) -> None:
    current = layout.images / "tiny" / "current"
    current.unlink()
    current.symlink_to(target)
    with pytest.raises(ImageError, match="damaged"):
        ImageStore(layout).find("tiny")


def test_a_disk_image_format_is_refused(tmp_path: Path) -> None:
    disk = tmp_path / "root.ext4"
    for head in (b"QFI\xfb", b"QED\0", b"KDMV"):
        content = bytearray(4096)
        content[: len(head)] = head
        content[0x438:0x43A] = b"\x53\xef"  # both magics at once
        disk.write_bytes(content)
        with pytest.raises(ImageError, match="format of its own"):
            check_raw_ext4(disk)
    disk.write_bytes(bytes(4096))
    with pytest.raises(ImageError, match="not a raw ext4"):
        check_raw_ext4(disk)


def test_a_build_that_makes_a_qcow2_is_not_published(layout: Layout) -> None:
    programs = QuickPrograms(lambda out: overwrite(out / "root.ext4", b"QFI\xfb"))
    with pytest.raises(ImageError, match="format of its own"):
        build_image(RECIPE, layout, programs, Monitor())
    assert names_in(layout) == {".lock"}


@pytest.mark.parametrize("blow", [KeyboardInterrupt(), HostError("mmdebstrap failed"), OSError(28, "full")])
def test_an_interrupted_build_leaves_nothing(layout: Layout, image: Image, blow: BaseException) -> None:
    before = names_in(layout)

    def interrupt(out: Path) -> None:
        raise blow

    with pytest.raises((KeyboardInterrupt, ImageError, OSError)):
        build_image(RECIPE, layout, QuickPrograms(interrupt, b"new"), Monitor())
    assert names_in(layout) == before
    assert ImageStore(layout).find("tiny") == image


def test_a_damaged_image_is_replaced_by_a_build(layout: Layout, image: Image) -> None:
    overwrite(image.kernel, b"K")
    again = build_image(RECIPE, layout, QuickPrograms(), Monitor())
    assert again.digest == image.digest and again.kernel.read_bytes() == b"kernel"
    assert names_in(layout) == {".lock", "current", image.digest[:16]}


def test_what_a_killed_builder_left_is_removed(layout: Layout, image: Image) -> None:
    stale = layout.images / "tiny" / ".building-dead"
    (stale / "scratch" / "deep").mkdir(parents=True)
    store = ImageStore(layout)
    with store.locked("tiny"):  # a builder that lives
        assert store.prune_building() == [] and stale.exists()
    assert store.prune_building() == [stale] and not stale.exists()


def test_concurrent_builders_wait_and_use_the_result(layout: Layout) -> None:
    started, go_on = threading.Event(), threading.Event()

    def pause(out: Path) -> None:
        started.set()
        assert go_on.wait(20)

    class Listening(Monitor):
        def __init__(self) -> None:
            self.notices: list[str] = []

        def notice(self, text: str) -> None:
            self.notices.append(text)
            go_on.set()

    slow, second, results = QuickPrograms(pause), QuickPrograms(), []
    first = threading.Thread(target=lambda: results.append(build_image(RECIPE, layout, slow, Monitor())))
    first.start()
    assert started.wait(20)
    monitor = Listening()
    got = build_image(RECIPE, layout, second, monitor)
    first.join(20)
    assert results == [got]
    assert (slow.builds, second.builds) == (1, 0)
    assert "waiting" in monitor.notices[0]


def test_a_waiting_builder_of_another_recipe_builds_its_own(layout: Layout) -> None:
    other = RECIPE.model_copy(update={"description": "other inputs"})
    second = QuickPrograms(kernel=b"other")
    lock = layout.images / "tiny" / ".lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        results: list[Image] = []
        waiting = threading.Thread(target=lambda: results.append(build_image(other, layout, second, Monitor())))
        waiting.start()
        time.sleep(0.1)
        assert second.builds == 0
    waiting.join(20)
    assert second.builds == 1 and results[0].facts.recipe == other.digest()


def test_remove(layout: Layout, image: Image) -> None:
    newer = build_image(RECIPE, layout, QuickPrograms(kernel=b"newer"), Monitor())
    store = ImageStore(layout)
    assert store.remove("tiny", image.digest) == [image.digest[:16]]
    assert store.find("tiny") == newer
    assert store.remove("tiny") == [newer.digest[:16]]
    assert list((layout.cache / "verified").iterdir()) == []
    with pytest.raises(ImageError, match="no image"):
        store.find("tiny")
    with pytest.raises(ImageError, match="no image"):
        store.remove("tiny")
    with pytest.raises(ImageError, match="no image"):
        store.remove("never")


def test_missing_image_says_how_to_build_it(layout: Layout) -> None:
    with pytest.raises(ImageError) as caught:
        ImageStore(layout).find("base")
    assert caught.value.resolution == "run `vmsandbox image build base`"
    with pytest.raises(UserInputError):
        ImageStore(layout).find("../base")
    assert ImageStore(layout).list() == []


def test_missing_mmdebstrap(layout: Layout) -> None:
    class Without(Programs):
        def find(self, name: str) -> str | None:
            return None

    with pytest.raises(HostError, match="mmdebstrap is not installed"):
        build_image(RECIPE, layout, Without(), Monitor())


def test_too_little_space(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "_SPACE_NEEDED", 1 << 60)
    programs = QuickPrograms()
    with pytest.raises(HostError, match="too little disk space"):
        build_image(RECIPE, layout, programs, Monitor())
    assert programs.builds == 0 and names_in(layout) == {".lock"}


@pytest.mark.parametrize("data", [[], [(0, 1)], [(5 << 20, 100)], [((8 << 20) - 1, 1)], [(1, 2 << 20), (7 << 20, 9)]])
def test_digest_of_a_sparse_file(tmp_path: Path, data: list[tuple[int, int]]) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(8 << 20)
        for at, length in data:
            file.seek(at)
            file.write(b"x" * length)
    assert file_digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_using_an_image_needs_neither_pydantic_nor_yaml() -> None:
    code = "import sys, vmsandbox.image.store; print({'pydantic', 'yaml', 'subprocess'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
