"""Real builds with mmdebstrap: reproducible, and the same as root and as an ordinary user."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from vmsandbox.image import recipe
from vmsandbox.image.build import build_image
from vmsandbox.image.manifest import Image
from vmsandbox.image.recipe import Recipe
from vmsandbox.image.store import ImageStore
from vmsandbox.monitor import Monitor
from vmsandbox.paths import Layout, resource_folder
from vmsandbox.process import Programs

pytestmark = [
    pytest.mark.guest,
    pytest.mark.skipif(Programs().find("mmdebstrap") is None, reason="mmdebstrap is not installed"),
]

MINIMAL = Recipe(
    name="minimal",
    packages=["linux-image-cloud-amd64", "e2fsprogs", "libarchive13t64", "busybox-static"],
    disk="1G",
)
SOMEBODY = 4711  # a user id that nobody has
CLONE_NEWNS = 0x20000  # sched.h


def layout_in(home: Path) -> Layout:
    return Layout(**{folder.name: home / folder.name for folder in fields(Layout)})


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="vmsandbox-test-", dir="/var/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def image(home: Path) -> Image:
    return build_image(MINIMAL, layout_in(home), Programs(), Monitor())


def debugfs(image: Image, request: str) -> str:
    argv = [Programs().find("debugfs") or "debugfs", "-R", request, str(image.root)]
    return subprocess.run(argv, capture_output=True, check=True).stdout.decode("latin-1")


def test_two_builds_have_the_same_digest(home: Path, image: Image) -> None:
    again = build_image(MINIMAL, layout_in(home), Programs(), Monitor())
    assert again.facts.files == image.facts.files
    assert again.digest == image.digest
    ImageStore(layout_in(home)).verify(again, force=True)
    assert not list((home / "images" / "minimal").glob(".building-*"))


def test_nothing_of_the_build_is_in_the_image(image: Image) -> None:
    fsck = Programs().run(["e2fsck", "-fn", image.root], check=False)
    assert fsck.status == 0, fsck.last_words
    assert debugfs(image, "cat /etc/machine-id") == ""
    assert debugfs(image, "cat /etc/resolv.conf") == ""
    accounts = (debugfs(image, "cat /etc/passwd") + debugfs(image, "cat /etc/shadow")).splitlines()
    assert {line.split(":")[1] for line in accounts if line.startswith("root:")} <= {"*", "x"}
    listed = debugfs(image, "ls -p /") + debugfs(image, "ls -p /usr/sbin") + debugfs(image, "ls -p /var/log")
    for unwanted in (".vmsandbox", "policy-rc.d", "start-stop-daemon.REAL", "dpkg.log"):
        assert f"/{unwanted}/" not in listed
    assert "/start-stop-daemon/" in listed
    assert debugfs(image, "cat /usr/sbin/start-stop-daemon").startswith("\x7fELF")  # not mmdebstrap's false one


def _still_working_in(folder: Path) -> list[bytes]:
    lines = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            lines.append(process.read_bytes())  # a zombie's is empty
    return [line for line in lines if os.fsencode(folder) in line]


@pytest.mark.skipif(os.geteuid() != 0, reason="looks for the build of the privileged mode")
def test_a_killed_builder_leaves_nothing_that_prune_does_not_remove(home: Path, image: Image) -> None:
    layout = layout_in(home)
    build = multiprocessing.get_context("fork").Process(
        target=build_image, args=(MINIMAL, layout, Programs(), Monitor())
    )
    build.start()
    deadline = time.monotonic() + 60
    while not list((home / "images" / "minimal").glob(".building-*/scratch/mmdebstrap.*/usr")):
        assert time.monotonic() < deadline and build.is_alive()
        time.sleep(0.1)
    build.kill()
    build.join()
    time.sleep(1)
    assert _still_working_in(home) == []
    assert len(ImageStore(layout).prune_building()) == 1
    assert not list((home / "images" / "minimal").glob(".building-*"))
    assert ImageStore(layout).find("minimal") == image


def _build_as_somebody(folder: Path, ids: Path, scripts: Path) -> None:
    """In a child process: give the user sub-ids in a mount namespace of its own, become that user, build."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(CLONE_NEWNS) == 0
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    for name in ("passwd", "group", "subuid", "subgid"):
        subprocess.run(["mount", "--bind", ids / name, f"/etc/{name}"], check=True)
    os.setgroups([])
    os.setresgid(SOMEBODY, SOMEBODY, SOMEBODY)
    os.setresuid(SOMEBODY, SOMEBODY, SOMEBODY)
    os.environ.update(HOME=str(folder), USER="somebody", LOGNAME="somebody")
    recipe.resource_folder = lambda _name: scripts  # type: ignore[assignment]
    build_image(MINIMAL, layout_in(folder), Programs(), Monitor())


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
@pytest.mark.skipif(Programs().find("newuidmap") is None, reason="uidmap is not installed")
def test_an_ordinary_user_builds_the_same_image_in_a_private_home(home: Path, image: Image) -> None:
    ids, private = home / "ids", home / "private"
    ids.mkdir()
    for name in ("passwd", "group"):
        shutil.copy(f"/etc/{name}", ids)
    with (ids / "passwd").open("a") as passwd, (ids / "group").open("a") as group:
        passwd.write(f"somebody:x:{SOMEBODY}:{SOMEBODY}::{private}:/bin/sh\n")
        group.write(f"somebody:x:{SOMEBODY}:\n")
    for name in ("subuid", "subgid"):
        (ids / name).write_text("somebody:900000:65536\n")
    scripts = shutil.copytree(resource_folder("images"), home / "scripts")  # the checkout may be in /root
    private.mkdir(mode=0o700)
    shutil.copytree(home / "cache" / "packages", private / "cache" / "packages")
    for path in (private, *private.rglob("*")):
        os.chown(path, SOMEBODY, SOMEBODY)
    before = set(Path("/var/tmp").glob("vmsandbox-build-*"))

    child = multiprocessing.get_context("fork").Process(target=_build_as_somebody, args=(private, ids, scripts))
    child.start()
    child.join()
    assert child.exitcode == 0
    built = ImageStore(layout_in(private)).find("minimal")
    assert built.facts.files == image.facts.files
    assert built.root.stat().st_uid == SOMEBODY
    assert set(Path("/var/tmp").glob("vmsandbox-build-*")) == before
