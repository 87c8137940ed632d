"""Guarantees 3 and 7: nothing of the host is in the guest, and two sessions share no key, name or random byte."""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import time
from pathlib import Path

import pytest
from harness import Cli, Guest

from vmsandbox.errors import GuestError
from vmsandbox.guest.control import connect_ssh
from vmsandbox.guest.ssh import GuestShell
from vmsandbox.spec import WORKER

FACTS = """
head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \\n'; echo
cat /etc/machine-id /proc/sys/kernel/random/boot_id
hostname
cat /proc/sys/kernel/random/uuid
python3 -c 'import os, random; print(os.urandom(16).hex(), random.random())'
mktemp -u
"""


@pytest.fixture(scope="module")
def pair(cli: Cli) -> object:
    """Two guests, started one right after the other."""
    names = ("pair-a", "pair-b")
    for name in names:
        cli("start", "--empty", "--name", name)
    yield tuple(cli.guest(name) for name in names)
    cli("stop", *names)


Pair = tuple[Guest, Guest]


def test_every_identity_and_every_random_byte_differ(pair: Pair) -> None:
    first, second = ([guest.sh(FACTS), guest] for guest in pair)
    facts = [str(one[0]).splitlines() for one in (first, second)]
    assert len(facts[0]) == len(facts[1]) == 7
    same = set(facts[0]) & set(facts[1])
    assert not same, f"in both guests: {same}"
    assert [lines[3] for lines in facts] == [guest.name for guest in pair]


def test_keys_and_uuids_differ_and_none_is_the_templates(pair: Pair) -> None:
    keys = [guest.folder.keys() for guest in pair]
    assert len({key.host_key for key in keys}) == len({key.user_key for key in keys}) == 2
    infos = [guest.info for guest in pair]
    assert len({info.uuid for info in infos}) == len({info.id for info in infos}) == 2
    assert infos[0].template == infos[1].template
    for guest, key in zip(pair, keys, strict=True):
        served = guest.sh("ssh-keygen -y -f /run/vmsandbox/ssh_host_ed25519_key 2>&1", status=None)
        assert "ssh-ed25519" not in served, "the worker can read the host key"
        accepted = guest.sh("cat /run/vmsandbox/authorized_keys")
        assert len(accepted.splitlines()) == 1
        assert key.host_key not in accepted


def test_one_sessions_key_does_not_open_the_other(pair: Pair) -> None:
    first, second = pair
    ours, theirs = first.folder.keys(), second.folder.keys()
    for host_key, user_key, problem in (
        (theirs.host_key, ours.user_key, "did not let this session in"),
        (ours.host_key, theirs.user_key, "host key is not the one"),
    ):
        with second.folder.ssh_port(second.info.ssh_ports) as port, pytest.raises(GuestError) as refused:
            sock = connect_ssh(second.folder.ssh_socket(port), 20)
            GuestShell.connect(sock, user=WORKER, host_key=host_key, user_key=user_key, deadline=20)
        assert problem in refused.value.brief


def test_sockets_and_files_of_a_session_are_its_own_users(pair: Pair) -> None:
    users = [os.stat(f"/proc/{guest.qemu}").st_uid for guest in pair]
    assert 0 not in users
    if os.geteuid() == 0:  # qemu:///session runs every QEMU as the person: grade "separated" at most
        assert users[0] != users[1], "one user could reach the files of both"
    for guest, user in zip(pair, users, strict=True):
        for folder in (guest.folder.vm(guest.info), guest.folder.run):
            assert (folder.stat().st_uid, folder.stat().st_mode & 0o777) == (user, 0o700)
        assert guest.folder.identity_file.stat().st_mode & 0o777 == 0o600
        assert guest.folder.identity_file.stat().st_uid == os.geteuid()


def test_the_memory_that_forks_share_cannot_be_written(pair: Pair) -> None:
    """Tried as root on the descriptor that QEMU holds: what root cannot do, a taken-over QEMU cannot."""
    inodes = set()
    for guest in pair:
        record = guest.folder.path / "memory.json"
        if not record.exists():
            pytest.skip("this host's QEMU opens the template read-only, or has a copy")
        kept = json.loads(record.read_text())
        inodes.add(kept["inode"])
        found = [
            entry.path
            for entry in os.scandir(f"/proc/{guest.qemu}/fd")
            if os.stat(entry.path).st_ino == kept["inode"] and os.stat(entry.path).st_dev == kept["device"]
        ]
        assert found, "QEMU does not have it open"
        fd = os.open(found[0], os.O_RDWR)
        try:
            _assert_unwritable(fd)
        finally:
            os.close(fd)
    assert len(inodes) == 1, "two forks of one template, and memory twice"


def _assert_unwritable(fd: int) -> None:
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE
    size = os.fstat(fd).st_size
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 4096)
    with pytest.raises(PermissionError):
        mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, size // 2)
    with pytest.raises(OSError):
        os.posix_fallocate(fd, size, 4096)
    from vmsandbox.hypervisor.files import _punch

    with pytest.raises(PermissionError):
        _punch(fd, 0, 4096)


def test_nothing_of_the_host_is_mounted(guest: Guest) -> None:
    mounts = [line.split() for line in guest.sh("findmnt -rn -o FSTYPE,SOURCE,TARGET").splitlines()]
    known = {
        "ext4", "proc", "sysfs", "devtmpfs", "devpts", "tmpfs", "cgroup2", "securityfs", "debugfs", "tracefs", "bpf",
        "mqueue", "hugetlbfs", "fusectl", "configfs", "pstore", "autofs", "ramfs", "binfmt_misc", "rootfs", "efivarfs",
    }  # fmt: skip
    assert {mount[0] for mount in mounts} <= known
    # One block device, and it is the guest's own disk.
    assert {mount[1].split("[")[0] for mount in mounts if mount[0] == "ext4"} == {"/dev/vda"}
    assert guest.sh("ls /sys/block").split() == ["vda"]
    bound = guest.sh("find /sys/bus/virtio/drivers -type l -name 'virtio*' | cut -d/ -f6").split()
    assert sorted(set(bound)) == ["virtio_blk", "virtio_console"]


def test_the_hosts_environment_does_not_come_along(cli: Cli, guest: Guest) -> None:
    secret = Cli(cli.home, {"AWS_SECRET_ACCESS_KEY": "hunter2hunter2", "LC_SECRET": "hunter2hunter2"})
    environment = secret("exec", guest.name, "--", "env").stdout.decode()
    assert "hunter2" not in environment
    assert "VMSANDBOX" not in environment


def test_the_clock_is_the_hosts(guest: Guest) -> None:
    assert abs(int(guest.sh("date +%s")) - time.time()) < 30


def test_a_fork_leaves_its_template_and_image_as_they_were(cli: Cli, pair: Pair) -> None:
    guest = pair[0]
    info = guest.info
    template = cli.layout.templates / info.template
    digests = json.loads((template / "manifest.json").read_text())["digests"]
    guest.sh("dd if=/dev/urandom of=$HOME/junk bs=1M count=20 2>/dev/null; sync; rm $HOME/junk")
    from vmsandbox.hypervisor.files import sha256_of

    assert {name: sha256_of(template / name) for name in digests} == digests
    assert all(path.stat().st_mode & 0o222 == 0 for path in map(Path, template.glob("*")) if path.name in digests)
    cli("image", "verify", info.image)
