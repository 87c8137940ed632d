"""Control groups that libvirt forgot of a guest, as it does without systemd when it is started again."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Guest, wait_for

from vmsandbox.hypervisor.lost import groups_of, remove_groups

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes control groups; an ordinary user's guests have none")
HIERARCHY = next(path for name in ("unified", "freezer", "") if (path := Path("/sys/fs/cgroup", name)).is_dir())


@pytest.fixture
def guest(fork: Callable[..., Guest]) -> Guest:
    return fork()


@pytest.fixture
def forgotten(guest: Guest) -> Path:
    """A group of the guest's beside those that libvirt knows of."""
    group = HIERARCHY / "machine" / f"qemu-99999-{guest.info.domain}.libvirt-qemu"
    try:
        (group / "vcpu0").mkdir(parents=True)
    except OSError:
        pytest.skip("making control groups is not allowed here")
    return group


def test_they_go_with_the_guest(guest: Guest, forgotten: Path) -> None:
    guest.cli("stop", guest.name)
    assert not forgotten.exists()


def test_they_go_with_a_guest_that_died(guest: Guest, forgotten: Path) -> None:
    uuid = guest.info.uuid
    os.kill(guest.qemu, signal.SIGKILL)
    guest.cli("gc")
    wait_for(lambda: groups_of(uuid) == [], timeout=20)
    assert not forgotten.exists()


def test_one_that_stays_is_told_of(guest: Guest, forgotten: Path) -> None:
    uuid = guest.info.uuid
    with subprocess.Popen(["sleep", "600"]) as process:
        (forgotten / "cgroup.procs").write_text(str(process.pid))
        done = guest.cli("stop", guest.name)
        process.kill()
    assert b"control groups" in done.stderr
    assert groups_of(uuid) == [forgotten]
    remove_groups(uuid)
    assert not forgotten.exists()
