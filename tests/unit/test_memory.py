"""The memory that forks share: complete, the same for all, and nobody can write it, not even with the descriptor."""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vmsandbox.errors import HostError
from vmsandbox.hypervisor import memory
from vmsandbox.hypervisor.files import _punch
from vmsandbox.hypervisor.launch import Machine
from vmsandbox.hypervisor.memory import ForkMemory, fork_memory
from vmsandbox.hypervisor.template import Template
from vmsandbox.process import Programs

SIZE = 8 << 20
OLD, NEW = (7, 2, 22), (8, 2, 0)


def host(confined: bool) -> Any:
    """All that is asked of a host here: whether a MAC profile confines QEMU."""
    return SimpleNamespace(confined_by_mac=confined)


@pytest.fixture
def template(tmp_path: Path) -> Template:
    folder = tmp_path / "templates" / "key"
    folder.mkdir(parents=True)
    with (folder / "ram").open("wb") as ram:
        ram.truncate(SIZE)
        ram.seek(4096)
        ram.write(os.urandom(10_000))
    return Template("key", folder, {}, 1.0)


def fork(
    stack: ExitStack, template: Template, tmp_path: Path, name: str, *, qemu: tuple[int, int, int] = OLD,
    confined: bool = False, user: tuple[int, int] | None = None,
) -> ForkMemory:  # fmt: skip
    folder = tmp_path / "live" / name / "vm"
    folder.mkdir(parents=True)
    machine = Machine("/usr/bin/qemu-system-x86_64", "pc-q35-7.2", qemu)
    return stack.enter_context(
        fork_memory(host(confined), machine, template, folder, tmp_path / "live", user, Programs())
    )


def test_a_new_qemu_gets_the_template_itself_read_only(template: Template, tmp_path: Path) -> None:
    with ExitStack() as stack:
        got = fork(stack, template, tmp_path, "a", qemu=NEW)
        assert got.path == template.ram and got.readonly


def test_under_a_mac_profile_each_session_has_a_copy(template: Template, tmp_path: Path) -> None:
    with ExitStack() as stack:
        got = fork(stack, template, tmp_path, "a", confined=True)
        got.wait()
        assert not got.readonly and got.path == tmp_path / "live/a/vm/ram"
        assert got.path.read_bytes() == template.ram.read_bytes()
        assert got.path.stat().st_ino != template.ram.stat().st_ino
        assert got.path.stat().st_blocks <= template.ram.stat().st_blocks + 16


def test_sealed_memory_is_whole_and_cannot_be_written(template: Template, tmp_path: Path) -> None:
    with ExitStack() as stack:
        got = fork(stack, template, tmp_path, "a")
        got.wait()
        assert got.path.read_bytes() == template.ram.read_bytes()
        fd = os.open(got.path, os.O_RDWR)  # QEMU 7.2 insists on opening it so
        stack.callback(os.close, fd)
        for attack in (
            lambda: os.pwrite(fd, b"x", 0),
            lambda: os.ftruncate(fd, SIZE // 2),
            lambda: os.ftruncate(fd, SIZE * 2),
            lambda: mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
            lambda: _punch(fd, 0, 4096),
            lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL),
        ):
            with pytest.raises(PermissionError):
                attack()
        # What a fork does: writes of its own, in a private mapping.
        with mmap.mmap(fd, SIZE, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as private:
            private[0:4] = b"mine"
        assert got.path.read_bytes() == template.ram.read_bytes()


def test_two_forks_share_one_memory(template: Template, tmp_path: Path) -> None:
    with ExitStack() as stack:
        first = fork(stack, template, tmp_path, "a")
        second = fork(stack, template, tmp_path, "b")
        first.wait()
        second.wait()
        assert os.stat(first.path).st_ino == os.stat(second.path).st_ino
        third = fork(stack, Template("other", template.folder, {}, 1.0), tmp_path, "c")
        third.wait()
        assert os.stat(third.path).st_ino != os.stat(first.path).st_ino, "another template's"


def test_a_file_that_a_record_lies_about_is_not_taken(template: Template, tmp_path: Path) -> None:
    """A QEMU that was taken over can hold any file under any number; only sealed memory is accepted."""
    decoy = os.memfd_create("vmsandbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(decoy, SIZE)
        info = os.fstat(decoy)
        liar = tmp_path / "live" / "liar"
        liar.mkdir(parents=True)
        record = {"template": "key", "pid": os.getpid(), "device": info.st_dev, "inode": info.st_ino}
        (liar / "memory.json").write_text(json.dumps(record))
        with ExitStack() as stack:
            got = fork(stack, template, tmp_path, "a")
            got.wait()
            assert os.stat(got.path).st_ino != info.st_ino
            assert got.path.read_bytes() == template.ram.read_bytes()
    finally:
        os.close(decoy)


@pytest.mark.parametrize(
    "record", ["", "{}", "[]", '{"template": "key"}', '{"template": "key", "pid": 0, "device": 0, "inode": 0}']
)
def test_a_damaged_record_is_passed_over(template: Template, tmp_path: Path, record: str) -> None:
    (tmp_path / "live" / "x").mkdir(parents=True)
    (tmp_path / "live" / "x" / "memory.json").write_text(record)
    with ExitStack() as stack:
        fork(stack, template, tmp_path, "a").wait()


@pytest.mark.parametrize("confined", [False, True])
def test_no_room_is_an_error_that_says_so(
    template: Template, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, confined: bool
) -> None:
    def full(*_words: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(memory, "fill_sparse", full)
    with ExitStack() as stack, pytest.raises(HostError, match="could not be copied") as error:
        fork(stack, template, tmp_path, "a", confined=confined).wait()
    assert "No space left" in error.value.details


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a process another user")
def test_the_holder_has_the_users_rights_and_goes(template: Template, tmp_path: Path) -> None:
    user = (0x70000123, 65534)
    with ExitStack() as stack:
        got = fork(stack, template, tmp_path, "a", user=user)
        got.wait()
        holder = Path(*got.path.parts[:3])
        status = (holder / "status").read_text()
        assert f"Uid:\t{user[0]}\t{user[0]}\t{user[0]}\t{user[0]}\n" in status
        assert "Groups:\t\n" in status or "Groups:\t \n" in status
        assert (holder / "environ").read_bytes() == b""
    assert not holder.exists()
