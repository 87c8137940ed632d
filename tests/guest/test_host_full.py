"""Guarantee 10: a guest that fills the host's disk waits, is told of, and goes on when there is room."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Cli, ended, new_leftovers, wait_for

ROOM = 40 << 20  # bytes that are left when the guest begins to write

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")


@pytest.fixture
def small_home(cli: Cli) -> Iterator[Cli]:
    """A home whose running guests have a disk of their own, of a size that a test can fill."""
    folder = Path(tempfile.mkdtemp(prefix="o-", dir=cli.home.parent))
    folder.chmod(0o711)
    for name in ("images", "templates", "cache"):
        (folder / name).symlink_to(cli.home / name)
    (folder / "live").mkdir(mode=0o711)
    mount = ["mount", "-t", "tmpfs", "-o", "size=2200m,mode=0711", "none", folder / "live"]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    small = Cli(folder)
    yield small
    small("stop", "--all", status=None)
    subprocess.run(["umount", "-l", folder / "live"], check=True)
    left = new_leftovers(folder, set())  # libvirt may be seconds until it has noticed
    shutil.rmtree(folder)
    assert not left


def test_it_waits_is_told_of_and_goes_on(small_home: Cli) -> None:
    small_home("start", "--empty", "--name", "fills")
    guest = small_home.guest("fills")
    live = small_home.home / "live"
    disk = os.statvfs(live)
    filler = live / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, disk.f_bavail * disk.f_frsize - ROOM)
    script = (
        "cd ~; dd if=/dev/urandom of=fill bs=1M count=120 status=none && sync && sha256sum < ~/fill && wc -c < ~/fill"
    )
    writing = small_home.start("exec", "fills", "--", "sh", "-c", script)

    def kinds() -> list[str]:
        return [event["kind"] for event in guest.journal()]

    wait_for(lambda: "guest.paused" in kinds(), 90, 0.3)
    assert writing.poll() is None
    (event,) = [event for event in guest.journal() if event["kind"] == "guest.paused"]
    assert event["data"]["free"] < ROOM and "disk is full" in event["data"]["reason"]
    refused = small_home("session", "--empty", "--", "true", status=125)
    assert b"of disk are needed" in refused.stderr
    filler.unlink()
    wait_for(lambda: "guest.resumed" in kinds(), 60, 0.3)
    status, out, stderr = ended(writing, 120)
    assert status == 0, stderr
    digest, size = out.decode().split()[0], int(out.decode().split()[-1])
    assert size == 120 << 20 and b"is paused, and goes on" in stderr and b"goes on" in stderr
    assert guest.sh("sync; echo 3 > /dev/null; sha256sum < ~/fill").split()[0] == digest, "nothing was lost"


def test_one_that_nobody_watches_goes_on_after_gc(small_home: Cli) -> None:
    small_home("start", "--empty", "--name", "alone")
    guest = small_home.guest("alone")
    disk = os.statvfs(small_home.home / "live")
    filler = small_home.home / "live" / "filler"
    guest.sh("(sleep 2; cd ~; dd if=/dev/zero of=fill bs=1M count=90; sync; touch ~/done) > /dev/null 2>&1 &")
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, disk.f_bavail * disk.f_frsize - ROOM)
    virsh = ["virsh", "-q", "domstate", "--reason", guest.info.uuid]
    wait_for(lambda: b"I/O error" in subprocess.run(virsh, capture_output=True).stdout, 60, 0.5)
    filler.unlink()
    assert ("pause", "alone") in [(item["kind"], item["what"]) for item in small_home.json("gc")]
    wait_for(lambda: guest.exec("test", "-e", "/home/claude-worker/done", status=None).returncode == 0, 60, 1)
