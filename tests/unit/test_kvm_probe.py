"""The KVM test guest: the checked-in bytes are its source's, and it runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from dataclasses import fields
from pathlib import Path

import pytest

from vmsandbox.hypervisor import kvm
from vmsandbox.hypervisor.kvm import EMULATOR, PROBE_CODE, KvmProof, probe_rom, prove_kvm, run_probe
from vmsandbox.paths import Layout
from vmsandbox.process import Programs
from vmsandbox.spec import Accelerator

SOURCE = PROBE_CODE.with_suffix(".S")
needs_qemu = pytest.mark.skipif(shutil.which(EMULATOR) is None, reason="QEMU is not installed")


class ScriptedQemu(Programs):
    """Programs whose QEMU is a shell script; every run of it leaves a line in `runs`."""

    def __init__(self, folder: Path, script: str) -> None:
        self.runs = folder / "runs"
        self.script = folder / "qemu"
        self.script.write_text(f"#!/bin/sh\necho $$ >>'{self.runs}'\n{script}\n")
        self.script.chmod(0o755)

    def find(self, name: str) -> str | None:
        return str(self.script) if name == EMULATOR else super().find(name)

    @property
    def pids(self) -> list[int]:
        return [int(line) for line in self.runs.read_text().split()] if self.runs.exists() else []


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(**{field.name: tmp_path / "home" / field.name for field in fields(Layout)})


@pytest.fixture
def device(tmp_path: Path) -> Path:
    path = tmp_path / "kvm"
    path.touch(mode=0o660)
    return path


@pytest.mark.skipif(shutil.which("objcopy") is None, reason="binutils are not installed")
def test_the_bytes_are_what_the_source_gives(tmp_path: Path) -> None:
    commands = re.findall(r"^# {3}((?:as|ld|objcopy) .*)$", SOURCE.read_text(), re.MULTILINE)
    assert len(commands) == 3
    shutil.copy(SOURCE, tmp_path)
    for command in commands:
        subprocess.run(command.split(), cwd=tmp_path, check=True)
    assert (tmp_path / PROBE_CODE.name).read_bytes() == PROBE_CODE.read_bytes()


def test_the_rom_starts_at_the_code() -> None:
    rom = probe_rom()
    assert len(rom) == 0x10000
    assert rom.startswith(PROBE_CODE.read_bytes())
    assert rom[0xFFF0] == 0xE9  # jmp rel16
    assert (0xFFF3 + int.from_bytes(rom[0xFFF1:0xFFF3], "little")) & 0xFFFF == 0


def test_the_expected_result_of_the_long_loop() -> None:
    text = SOURCE.read_text()
    rounds = int(re.findall(r"ROUNDS, (\d+)", text)[0])
    assert rounds >= 20_000_000
    factor, addend, power_factor, power_addend = 1, 0, 1103515245, 12345
    while rounds:  # the affine map to the power of `rounds`, by squaring
        if rounds & 1:
            factor, addend = factor * power_factor, addend * power_factor + power_addend
        power_factor, power_addend = power_factor**2, power_addend * (power_factor + 1)
        factor, addend, power_factor, power_addend = (
            value % 2**32 for value in (factor, addend, power_factor, power_addend)
        )
        rounds >>= 1
    assert f"ROUNDS_RESULT, {(factor + addend) % 2**32:#x} " in text


@needs_qemu
def test_the_guest_runs_under_emulation() -> None:
    proof = run_probe(Programs(), Accelerator.TCG)
    assert proof.works, proof.reason


@needs_qemu
@pytest.mark.parametrize("model", ["qemu64", "Nehalem"])
def test_the_guest_runs_without_avx_and_bmi2(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kvm._CPU, Accelerator.TCG, model)
    proof = run_probe(Programs(), Accelerator.TCG)
    assert proof.works, proof.reason


@needs_qemu
def test_a_wrong_result_in_the_guest_is_not_a_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = bytes.fromhex("01cbda68")  # ROUNDS_RESULT
    code = PROBE_CODE.read_bytes()
    assert code.count(expected) == 1
    wrong = tmp_path / "wrong.bin"
    wrong.write_bytes(code.replace(expected, bytes(4)))
    monkeypatch.setattr(kvm, "PROBE_CODE", wrong)
    proof = run_probe(Programs(), Accelerator.TCG)
    assert not proof.works
    assert "wrong result" in proof.reason


@needs_qemu
def test_this_hosts_kvm_gets_an_answer_in_time(layout: Layout) -> None:
    """Whatever the answer is: it comes, it has a reason, it is repeated, and no QEMU stays."""
    started = time.monotonic()
    first = prove_kvm(layout, Programs())
    assert time.monotonic() - started < kvm.PROBE_DEADLINE + 2
    assert first.reason
    again = prove_kvm(layout, Programs())
    assert (again.works, again.reason) == (first.works, first.reason)
    if first.seconds:
        assert again.cached
    assert not _children()


def test_kvms_internal_error_ends_it_at_once(tmp_path: Path) -> None:
    programs = ScriptedQemu(tmp_path, "echo 'KVM internal error. Suberror: 1' >&2; exec sleep 60")
    started = time.monotonic()
    proof = run_probe(programs, Accelerator.KVM)
    assert time.monotonic() - started < 2
    assert not proof.works
    assert "KVM internal error" in proof.reason
    assert not _is_there(programs.pids[0])


def test_a_guest_that_spins_is_killed_at_the_deadline(tmp_path: Path) -> None:
    programs = ScriptedQemu(tmp_path, "trap '' TERM; while :; do :; done")
    proof = run_probe(programs, Accelerator.KVM, deadline=0.5)
    assert not proof.works
    assert "0.5 seconds" in proof.reason
    assert proof.seconds < 5
    assert not _is_there(programs.pids[0])


@pytest.mark.parametrize("status", [0, 1, 84, 87, 89, 91])
def test_only_one_status_is_a_proof(tmp_path: Path, status: int) -> None:
    proof = run_probe(ScriptedQemu(tmp_path, f"echo why >&2; exit {status}"), Accelerator.KVM)
    assert not proof.works
    assert "why" in proof.reason


def test_the_answer_is_kept(tmp_path: Path, layout: Layout, device: Path) -> None:
    programs = ScriptedQemu(tmp_path, "exit 85")
    first = prove_kvm(layout, programs, device=device)
    assert first == KvmProof(True, "the test guest ran", first.seconds, cached=False)
    assert prove_kvm(layout, programs, device=device) == KvmProof(True, first.reason, first.seconds, True)
    assert len(programs.pids) == 1
    assert not prove_kvm(layout, programs, device=device, fresh=True).cached
    assert len(programs.pids) == 2


def test_the_answer_is_not_kept_when_something_changed(tmp_path: Path, layout: Layout, device: Path) -> None:
    programs = ScriptedQemu(tmp_path, "exit 85")
    prove_kvm(layout, programs, device=device)
    device.chmod(0o600)
    assert not prove_kvm(layout, programs, device=device).cached
    changed = ScriptedQemu(tmp_path, "exit 1  # another QEMU")
    assert not prove_kvm(layout, changed, device=device).works


def test_a_failure_is_kept_for_an_hour(
    tmp_path: Path, layout: Layout, device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = ScriptedQemu(tmp_path, "exit 1")
    prove_kvm(layout, programs, device=device)
    assert prove_kvm(layout, programs, device=device).cached
    later = time.time() + 3601
    monkeypatch.setattr(kvm.time, "time", lambda: later)
    assert not prove_kvm(layout, programs, device=device).cached


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"key": 1}', b"\xff\xfe"])
def test_a_damaged_answer_is_no_answer(tmp_path: Path, layout: Layout, device: Path, damage: bytes) -> None:
    programs = ScriptedQemu(tmp_path, "exit 85")
    prove_kvm(layout, programs, device=device)
    (layout.cache / "kvm-proof.json").write_bytes(damage)
    assert not prove_kvm(layout, programs, device=device).cached


def test_without_the_device_nothing_is_run(tmp_path: Path, layout: Layout) -> None:
    programs = ScriptedQemu(tmp_path, "exit 85")
    proof = prove_kvm(layout, programs, device=tmp_path / "none")
    assert not proof.works
    assert "does not exist" in proof.reason
    assert programs.pids == []


def test_without_qemu_there_is_an_answer(layout: Layout, device: Path) -> None:
    class NoQemu(Programs):
        def find(self, name: str) -> str | None:
            return None

    proof = prove_kvm(layout, NoQemu(), device=device)
    assert not proof.works
    assert "not installed" in proof.reason


def _is_there(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def _children() -> list[str]:
    """Processes that this test started and that are still there."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [pid for pid in children if "isa-debug-exit" in Path(f"/proc/{pid}/cmdline").read_text()]
