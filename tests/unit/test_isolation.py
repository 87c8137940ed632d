"""The isolation grade: a table of evidence, and the evidence of a real QEMU process."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from vmsandbox.errors import HostError
from vmsandbox.hypervisor.isolation import (
    ProcessFacts,
    assess,
    judge,
    pid_file,
    read_pid_file,
    read_process,
)
from vmsandbox.hypervisor.kvm import KvmProof
from vmsandbox.spec import Grade

UUID = "4d1f6f0e-5d0c-4f6b-9a7e-3c1f7f1b2a11"
PROVEN = KvmProof(True, "the test guest ran", 0.2, False)
NOT_PROVEN = KvmProof(False, "/dev/kvm does not exist", 0.0, False)
XML = f"<domain type='kvm'><uuid>{UUID}</uuid><os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os></domain>"
CMDLINE = (
    "/usr/bin/qemu-system-x86_64", "-name", "guest=x,debug-threads=on", "-machine", "pc-q35-7.2,usb=off",
    "-accel", "kvm", "-uuid", UUID, "-machine", "memory-backend=vmram",
)  # fmt: skip
STATUS = {
    "Uid": "64055\t64055\t64055\t64055",
    "CapEff": "0000000000000000",
    "CapPrm": "0000000000000000",
    "NoNewPrivs": "1",
    "Seccomp": "2",
}
BEST = ProcessFacts(7, CMDLINE, (STATUS, STATUS), f"libvirt-{UUID} (enforce)")
SELINUX = "system_u:system_r:svirt_t:s0:c12,c700"


def grade(
    *, xml: str = XML, process: ProcessFacts = BEST, uri: str = "qemu:///system", kvm: KvmProof = PROVEN
) -> tuple[Grade, list[str]]:
    """The grade, and the names of the checks that are not ok."""
    isolation = judge(xml, process, uri, kvm)
    assert len(isolation.missing) == sum(not check.ok for check in isolation.checks.values())
    return isolation.grade, [name for name, check in isolation.checks.items() if not check.ok]


def with_status(**changes: str | None) -> ProcessFacts:
    """The best process, but with one thread whose status differs (None: the line is not there)."""
    status = {key: value for key, value in {**STATUS, **changes}.items() if value is not None}
    return replace(BEST, threads=(STATUS, status))


def with_option(option: str, *values: str) -> ProcessFacts:
    """The best process, but with other values for an option."""
    words = [*CMDLINE]
    while option in words:
        at = words.index(option)
        del words[at : at + 2]
    for value in values:
        words += [option, value]
    return replace(BEST, cmdline=tuple(words))


def test_all_evidence_gives_the_best_grade() -> None:
    assert grade() == (Grade.ISOLATED, [])


def test_selinux_confines_as_well_but_only_when_it_enforces() -> None:
    assert grade(process=replace(BEST, label=SELINUX, selinux_enforcing=True)) == (Grade.ISOLATED, [])
    assert grade(process=replace(BEST, label=SELINUX)) == (Grade.SEPARATED, ["confined"])


@pytest.mark.parametrize(
    ("process", "failed"),
    [
        (with_status(Uid="0\t0\t0\t0"), "not_root"),
        (with_status(Uid="64055\t64055\t0\t64055"), "not_root"),
        (with_status(Uid="64055"), "not_root"),
        (with_status(Uid=None), "not_root"),
        (with_status(CapEff="0000000000000001"), "no_capabilities"),
        (with_status(CapPrm="00000000a80425fb"), "no_capabilities"),
        (with_status(CapEff=None), "no_capabilities"),
        (with_status(Seccomp="0"), "seccomp"),
        (with_status(Seccomp="1"), "seccomp"),
        (with_status(Seccomp=None), "seccomp"),
        (with_status(NoNewPrivs="0"), "no_new_privileges"),
        (replace(BEST, label=None), "confined"),
        (replace(BEST, label="unconfined"), "confined"),
        (replace(BEST, label=f"libvirt-{UUID} (complain)"), "confined"),
        (replace(BEST, label="libvirtd (enforce)"), "confined"),
        (replace(BEST, label="libvirt-00000000-0000-0000-0000-000000000000 (enforce)"), "confined"),
        (replace(BEST, label="u:r:unconfined_t:s0", selinux_enforcing=True), "confined"),
        (with_option("-machine", "pc-i440fx-7.2"), "machine"),
    ],
)
def test_one_missing_piece_makes_it_separated(process: ProcessFacts, failed: str) -> None:
    assert grade(process=process) == (Grade.SEPARATED, [failed])


def test_the_users_own_libvirt_is_at_most_separated() -> None:
    assert grade(uri="qemu:///session") == (Grade.SEPARATED, ["system_libvirt"])
    assert grade(uri="qemu+ssh://elsewhere/system")[0] is Grade.SEPARATED


@pytest.mark.parametrize("machine", ["pc-i440fx-7.2", "microvm", "q35", ""])
def test_other_machines_are_not_covered(machine: str) -> None:
    xml = XML.replace("pc-q35-7.2", machine)
    assert grade(xml=xml, process=with_option("-machine", machine)) == (Grade.SEPARATED, ["machine"])


@pytest.mark.parametrize(
    "process",
    [
        with_option("-accel", "tcg"),
        with_option("-accel", "kvm", "tcg"),
        with_option("-accel"),
    ],
)
def test_qemu_that_does_not_use_kvm_is_emulated(process: ProcessFacts) -> None:
    assert grade(process=process) == (Grade.EMULATED, ["kvm_used"])


def test_a_domain_of_type_qemu_is_emulated() -> None:
    assert grade(xml=XML.replace("'kvm'", "'qemu'")) == (Grade.EMULATED, ["kvm_used"])


def test_kvm_that_is_not_proven_is_emulated_whatever_the_domain_says() -> None:
    assert grade(kvm=NOT_PROVEN) == (Grade.EMULATED, ["kvm_proven"])


@pytest.mark.parametrize("process", [ProcessFacts(7), with_option("-uuid", "00000000-0000-0000-0000-000000000000")])
def test_another_or_an_unreadable_process_proves_nothing(process: ProcessFacts) -> None:
    result, failed = grade(process=process)
    assert result is Grade.EMULATED
    assert {"process", "not_root", "no_capabilities", "seccomp", "no_new_privileges", "confined"} <= set(failed)


def test_status_that_cannot_be_read_is_not_taken_for_good() -> None:
    result, failed = grade(process=replace(BEST, threads=None))
    assert result is Grade.SEPARATED
    assert failed == ["not_root", "no_capabilities", "seccomp", "no_new_privileges"]


@pytest.fixture
def qemu() -> Iterator[subprocess.Popen[bytes]]:
    program = shutil.which("qemu-system-x86_64")
    if program is None:
        pytest.skip("QEMU is not installed")
    process = subprocess.Popen(
        [
            program, "-machine", "q35", "-accel", "tcg", "-m", "16", "-S", "-nodefaults", "-no-user-config",
            "-display", "none", "-uuid", UUID, "-sandbox", "on",
        ],
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_evidence_of_a_real_process(qemu: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 10
    while True:
        isolation = assess(XML, qemu.pid, uri="qemu:///system", kvm=NOT_PROVEN)
        if isolation.checks["seccomp"].ok or time.monotonic() > until:
            break
        time.sleep(0.05)  # the sandbox is set up a moment after the start
    checks = isolation.checks
    assert isolation.grade is Grade.EMULATED
    assert checks["process"].ok, checks
    assert checks["seccomp"].evidence == "Seccomp 2"
    assert checks["no_new_privileges"].ok
    assert not checks["kvm_used"].ok and "tcg" in checks["kvm_used"].evidence
    assert not checks["confined"].ok
    assert checks["not_root"].ok == (os.getuid() != 0)
    assert str(os.getuid()) in checks["not_root"].evidence


def test_a_process_that_is_gone_gives_no_evidence(qemu: subprocess.Popen[bytes]) -> None:
    qemu.kill()
    qemu.wait()
    assert read_process(qemu.pid) == ProcessFacts(qemu.pid)


def test_pid_files(tmp_path: Path) -> None:
    assert pid_file("qemu:///system", "x") == Path("/run/libvirt/qemu/x.pid")
    session = pid_file("qemu:///session", "x", {"XDG_RUNTIME_DIR": "/run/user/7"})
    assert session == Path("/run/user/7/libvirt/qemu/run/x.pid")
    file = tmp_path / "x.pid"
    for bad in ("", "none", "-1", "0", "1"):
        file.write_text(bad)
        with pytest.raises(HostError):
            read_pid_file(file)
    file.write_text("4242\n")
    assert read_pid_file(file) == 4242
