"""A part of `tools/crash_matrix.py` that CI has the time for: one step of each kind, one fault of each kind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from harness import Cli, Guest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import crash_matrix

CASES = [
    ("session", "session.reserved#1", "int"),
    ("session", "claim.written#1", "kill"),
    ("session", "fork.disk#1", "enospc"),
    ("session", "fork.guest#1", "kill"),
    ("session", "fork.loaded#1", "qemu"),
    ("session", "session.keys#1", "terminal"),
    ("session", "push.sent#1", "term"),
    ("session", "return.published#1", "kill"),
    ("session", "apply.begun#1", "kill"),
    ("session", "destroy.guest#1", "kill"),
    ("stop", "destroy.name-given-back#1", "kill"),
    ("rollback", "rollback.started#1", "kill"),
    ("rollback", "rollback.committed#1", "kill"),
    ("gc", "destroy.guest#1", "kill"),
]


@pytest.fixture(scope="module")
def matrix(cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> crash_matrix.Home:
    return crash_matrix.Home(cli.home, tmp_path_factory.mktemp("matrix") / "log")


@pytest.mark.parametrize(("name", "step", "fault"), CASES)
def test_nothing_is_left_and_the_project_is_whole(
    matrix: crash_matrix.Home, guest: Guest, tmp_path: Path, name: str, step: str, fault: str
) -> None:
    (scenario,) = [one for one in crash_matrix.SCENARIOS if one.name == name]
    outcome = crash_matrix.run_case(matrix, scenario, step, fault, tmp_path, 0, after=(step, fault) == CASES[-1][1:])
    assert outcome.good, outcome
    if fault in ("int", "term", "kill"):
        assert outcome.status == {"int": 130, "term": 143, "kill": -9}[fault]
    assert guest.exec("echo", "alive").stdout == b"alive\n", "another session goes on beside it"
