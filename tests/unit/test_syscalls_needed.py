"""Which programs a seccomp profile lets start, by what was recorded in a guest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from seccomp_profiles import argument_of, entry, profile_of
from test_cli_policy import run

from vmsandbox.policy.seccomp.native import syscall_number
from vmsandbox.policy.syscalls_needed import SETPRIV, missing_calls, recorded

SAMPLE = (Path(__file__).parent / "data/import/seccomp-claude.json").read_text()
PROGRAMS = {"bash", "bash (interactive)", "bash (runs a program)", "git status", "git commit", "python3", "pip"}
PROGRAMS |= {"login", "the host's read-back", SETPRIV}


def _permitting(*names: str, default: str = "SCMP_ACT_ERRNO", **more: object) -> str:
    return profile_of({"names": list(names), "action": "SCMP_ACT_ALLOW"}, default=default, **more)


def test_the_data_is_whole() -> None:
    assert set(recorded()) == PROGRAMS
    for program, calls in recorded().items():
        assert set(calls) == {"makes", "EPERM", "ENOSYS"}
        assert all(syscall_number(name) is not None for name in calls["makes"]), program
        for answer in ("EPERM", "ENOSYS"):
            assert set(calls[answer]) < set(calls["makes"]), (
                "what is needed is made, and not all that is made is needed"
            )
        assert {"execve", "exit_group", "read", "write", "mmap"} <= set(calls["makes"]), program
        assert "execve" in calls["EPERM"], "the filter is in force before the program is"


def test_the_profile_that_people_have_cannot_run_bash() -> None:
    missing = missing_calls(SAMPLE)
    assert set(missing) == PROGRAMS - {SETPRIV}
    assert {"brk", "rt_sigaction", "mprotect"} & set(missing["bash"]) or "newfstatat" in missing["bash"]
    assert "read" not in missing["bash"]


def test_a_profile_of_just_what_is_needed_lacks_nothing() -> None:
    for answer, more in (("EPERM", {}), ("ENOSYS", {"defaultErrnoRet": 38})):
        for program, calls in recorded().items():
            profile = _permitting(*calls[answer], **more)
            assert program not in missing_calls(profile, stacked=True), (program, answer)
            for name in calls[answer]:
                one_less = _permitting(*(set(calls[answer]) - {name}), **more)
                assert missing_calls(one_less, stacked=True)[program] == [name]


@pytest.mark.parametrize("action", ["SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_TRAP"])
def test_what_ends_the_process_may_not_even_be_tried(action: str) -> None:
    calls = recorded()["bash"]
    assert "bash" not in missing_calls(_permitting(*calls["makes"], default=action))
    only_needed = missing_calls(_permitting(*calls["EPERM"], default=action))["bash"]
    assert only_needed == sorted(set(calls["makes"]) - set(calls["EPERM"]))


def test_conditions_and_capabilities() -> None:
    some = profile_of(entry("execve", "SCMP_ACT_ERRNO", args=[argument_of(0, "SCMP_CMP_EQ", 1)]))
    assert missing_calls(some) == {}, "permitted with most arguments"
    none = profile_of(entry("execve", "SCMP_ACT_ERRNO", excludes={"caps": ["CAP_SYS_ADMIN"]}))
    assert set(missing_calls(none)) == PROGRAMS - {SETPRIV} and missing_calls(none, ["sys_admin"]) == {}
    assert missing_calls(profile_of()) == {}


def test_check_says_it_before_the_session_does(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(SAMPLE)
    (tmp_path / "unknown.json").write_text(_permitting("frobnicate", *recorded()["bash"]["makes"]))
    (tmp_path / "one.yaml").write_text("sandbox: {kernel: {seccomp: ./p.json}}")
    (tmp_path / "two.yaml").write_text("sandbox: {kernel: {seccomp: [./unknown.json, ./p.json]}}")
    said = run(tmp_path, "check", "one.yaml")
    assert said.returncode == 0
    assert "WARNING: sandbox.kernel.seccomp p.json does not let bash run: it lacks " in said.stdout
    findings = json.loads(run(tmp_path, "check", "two.yaml", "--json").stdout)["findings"]
    told = {(one["where"], one["warning"]) for one in findings}
    assert ("sandbox.kernel.seccomp[1]", True) in told and ("sandbox.kernel.seccomp[0]", False) in told
    assert any("does not let setpriv run" in one["text"] for one in findings), "it has to put the next profile on"
