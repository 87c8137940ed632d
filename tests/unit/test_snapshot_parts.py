"""What a snapshot is made of, tried on a real QEMU: its stream taken apart, its memory read, a state put together."""

from __future__ import annotations

import io
import os
from contextlib import closing
from pathlib import Path

import pytest
from bare_qemu import MEMORY, BareQemu

from vmsandbox.errors import HostError
from vmsandbox.hypervisor.files import new_sparse, sparse_sha256_of
from vmsandbox.hypervisor.guestmemory import GuestMemory
from vmsandbox.hypervisor.ramstream import take_apart, with_devices

LOADED = {0x100000: b"at 1 MiB", 0x101000: b"the next", 0xFFF000: b"the last"}


@pytest.fixture
def ram(tmp_path: Path) -> Path:
    """The file that a guest's memory starts from."""
    path = tmp_path / "ram"
    new_sparse(path, MEMORY)
    with path.open("r+b") as file:
        file.seek(0x200000)
        file.write(b"of the template")
    return path


def new_target(tmp_path: Path) -> int:
    new_sparse(tmp_path / "target", MEMORY)
    return os.open(tmp_path / "target", os.O_RDWR)


def taken_apart(qemu: BareQemu, tmp_path: Path) -> tuple[bytes, bytes]:
    """Its stream's (state, memory)."""
    target = new_target(tmp_path)
    try:
        with qemu.stream("migrate") as stream:
            state = take_apart(stream.recv_into, target)
        qemu.migrated()
        return state, os.pread(target, MEMORY, 0)
    finally:
        os.close(target)


def test_a_stream_taken_apart_is_a_guest_again(tmp_path: Path, ram: Path) -> None:
    with BareQemu(tmp_path, ram, loaded=LOADED) as qemu:
        before = qemu.memory(tmp_path)
        state, memory = taken_apart(qemu, tmp_path)
    for address, data in {**LOADED, 0x200000: b"of the template"}.items():
        assert memory[address : address + len(data)] == data
    # What a guest sees below 1 MiB is partly firmware, which is not in this file.
    assert memory[0x100000:] == before[0x100000:] and memory[:0xA0000] == before[:0xA0000]
    assert len(state) < 2 << 20
    copy = tmp_path / "copy"
    copy.write_bytes(memory)
    with BareQemu(tmp_path, copy, "-incoming", "defer") as again:
        with again.stream("migrate-incoming") as stream:
            stream.sendall(state)
            stream.shutdown(1)
            again.migrated()
        assert again.memory(tmp_path) == before


def test_a_state_with_a_guests_devices_is_loaded(tmp_path: Path, ram: Path) -> None:
    """As a snapshot's is put together: the firmware's pages of the template, the devices of the guest."""
    with BareQemu(tmp_path, ram) as template:
        (tmp_path / "state").write_bytes(taken_apart(template, tmp_path)[0])
    (tmp_path / "target").unlink()
    with BareQemu(tmp_path, ram, loaded=LOADED) as qemu:
        before = qemu.memory(tmp_path)
        qemu.qmp("xen-save-devices-state", filename=str(tmp_path / "devices"), live=False)
        target = new_target(tmp_path)
        with closing(GuestMemory(qemu.pid, MEMORY)) as memory:
            memory.copy_file(target)
            assert 0 < memory.copy_written(target) < 2 << 20, "only what differs from the file is copied"
        os.close(target)
    state = with_devices(tmp_path / "state", MEMORY, (tmp_path / "devices").read_bytes())
    with BareQemu(tmp_path, tmp_path / "target", "-incoming", "defer") as again:
        with again.stream("migrate-incoming") as stream:
            stream.sendall(state)
            stream.shutdown(1)
            again.migrated()
        assert again.memory(tmp_path) == before


def test_memory_that_may_not_be_read_says_so(tmp_path: Path, ram: Path) -> None:
    with BareQemu(tmp_path, ram) as qemu, pytest.raises(HostError, match="not where it is expected"):
        GuestMemory(qemu.pid, MEMORY * 2)


def test_a_stream_that_is_cut_or_changed_is_an_error_and_no_hang(tmp_path: Path, ram: Path) -> None:
    target = new_target(tmp_path)
    with BareQemu(tmp_path, ram, loaded=LOADED) as qemu, qemu.stream("migrate") as stream:
        pieces = bytearray()
        while piece := stream.recv(1 << 20):
            pieces += piece
    whole = bytes(pieces)
    devices = len(take_apart(io.BytesIO(whole).readinto, target))
    for length in [*range(0, 300, 7), *range(300, len(whole) - devices, 41_003)]:
        with pytest.raises(HostError, match=r"ended early|no configuration|unknown"):
            take_apart(io.BytesIO(whole[:length]).readinto, target)
    for at, byte in ((0, 0), (8, 0x33), (9, 0xFF)):
        changed = bytearray(whole)
        changed[at] ^= byte or 0xFF
        with pytest.raises(HostError):
            take_apart(io.BytesIO(bytes(changed)).readinto, target)
    with pytest.raises(HostError, match="unknown beginning"):
        with_devices(tmp_path / "none", MEMORY, whole)
    os.close(target)


def test_the_digest_of_a_sparse_file_does_not_see_its_holes(tmp_path: Path) -> None:
    for name, holes in (("holes", True), ("zeros", False)):
        path = tmp_path / name
        if holes:
            new_sparse(path, 1 << 20)
        else:
            path.write_bytes(bytes(1 << 20))
        with path.open("r+b") as file:
            file.seek(70_000)
            file.write(b"x")
    assert sparse_sha256_of(tmp_path / "holes") == sparse_sha256_of(tmp_path / "zeros")
    for at, byte in ((70_000, b"y"), (200_000, b"x")):
        with (tmp_path / "zeros").open("r+b") as file:
            file.seek(at)
            file.write(byte)
        assert sparse_sha256_of(tmp_path / "holes") != sparse_sha256_of(tmp_path / "zeros")
    os.truncate(tmp_path / "holes", (1 << 20) + 4096)
    new_sparse(tmp_path / "shorter", 1 << 20)
    new_sparse(tmp_path / "longer", (1 << 20) + 4096)
    assert sparse_sha256_of(tmp_path / "shorter") != sparse_sha256_of(tmp_path / "longer")
