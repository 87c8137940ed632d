"""The promise ledger: SECURITY.md numbers what vmsandbox guarantees, and each names its code and its test.

Without it a promise would outlive the code behind it. A guarantee that does not hold yet has to say so, and
the command line has to say so as well to a person who asks for it.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
LEDGER = REPOSITORY / "SECURITY.md"
STATUSES = ("holds", "partly", "not yet")
_HEADING = re.compile(r"### G(\d+)\. \S.*")
_ROW = re.compile(r"\| (Status|Code|Test|Says so) \| (.*) \|")


@dataclass
class Guarantee:
    """One section "### G<number>. …" with its table: rows `Status`, `Code`, `Test`, `Says so`."""

    number: int
    rows: dict[str, str] = field(default_factory=dict)

    def references(self, row: str) -> list[str]:
        """What stands between backticks in a row."""
        return re.findall(r"`([^`]+)`", self.rows.get(row, ""))

    @property
    def status(self) -> str:
        return self.rows.get("Status", "").partition(":")[0].strip()


def read_ledger(text: str) -> list[Guarantee]:
    """All guarantees of a ledger, in order. A table row counts for the heading above it."""
    found: list[Guarantee] = []
    inside = False
    for line in text.splitlines():
        if line.startswith("#"):
            heading = _HEADING.fullmatch(line)
            inside = heading is not None
            if heading:
                found.append(Guarantee(int(heading[1])))
        elif inside and (row := _ROW.fullmatch(line.strip())):
            assert row[1] not in found[-1].rows, f"G{found[-1].number} has two rows {row[1]!r}"
            found[-1].rows[row[1]] = row[2]
    return found


@cache
def _definitions(path: Path) -> dict[str, ast.AST]:
    """Functions, classes and assigned names of a Python file; what is in a class as "Class.name" too."""
    found: dict[str, ast.AST] = {}

    def add(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                found[prefix + node.name] = node
                if isinstance(node, ast.ClassDef):
                    add(node.body, f"{node.name}.")
            elif isinstance(node, ast.Assign):
                found.update({prefix + name.id: node for name in node.targets if isinstance(name, ast.Name)})

    add(ast.parse(path.read_text()).body, "")
    return found


def problem_with(reference: str) -> str | None:
    """Why `path` or `path::name` is nothing in this repository, or None."""
    name, _, symbol = reference.partition("::")
    path = REPOSITORY / name
    if not path.is_file():
        return f"{reference}: there is no such file"
    if symbol and symbol not in _definitions(path):
        return f"{reference}: {name} has no {symbol}"
    return None


def problem_with_test(reference: str) -> str | None:
    """Why a reference is not a test that can fail, or None."""
    name, _, symbol = reference.partition("::")
    if problem := problem_with(reference):
        return problem
    if not name.startswith("tests/") or not symbol.rpartition(".")[2].startswith("test_"):
        return f"{reference} is no test"
    node = _definitions(REPOSITORY / name)[symbol]
    assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    if any(re.search(r"\b(skip|xfail)\b", ast.unparse(one)) for one in node.decorator_list):
        return f"{reference} is skipped or expected to fail"
    return None


def problems_of(one: Guarantee) -> list[str]:
    """What is wrong with one guarantee's rows."""
    name = f"G{one.number}"
    if one.status not in STATUSES:
        return [f"{name}: status {one.status!r} is none of {STATUSES}"]
    found = [problem for ref in one.references("Code") if (problem := problem_with(ref))]
    found += [problem for ref in one.references("Test") if (problem := problem_with_test(ref))]
    if one.status == "not yet":
        if not one.references("Says so"):
            found.append(f"{name} does not hold yet, and no command is named that says so")
    else:
        found += [f"{name} names no {row.lower()}" for row in ("Code", "Test") if not one.references(row)]
    return [problem if problem.startswith(name) else f"{name}: {problem}" for problem in found]


GUARANTEES = read_ledger(LEDGER.read_text())
NOT_YET = [(one.number, line) for one in GUARANTEES for line in one.references("Says so")]


def test_the_guarantees_are_numbered_without_a_gap() -> None:
    assert [one.number for one in GUARANTEES] == list(range(1, len(GUARANTEES) + 1))
    assert len(GUARANTEES) >= 10


@pytest.mark.parametrize("one", GUARANTEES, ids=lambda one: f"G{one.number}")
def test_each_guarantee_names_code_and_tests_that_exist(one: Guarantee) -> None:
    assert problems_of(one) == []


def test_the_command_line_says_what_does_not_hold_yet(tmp_path: Path) -> None:
    """Before it makes anything, and with the status of vmsandbox's own failures. (Nothing to do where all holds.)"""
    for number, line in NOT_YET:
        program, *words = shlex.split(line)
        assert program == "vmsandbox"
        home = tmp_path / f"home{number}"
        done = subprocess.run(
            [sys.executable, "-m", "vmsandbox", *words],
            env={"PATH": os.environ["PATH"], "VMSANDBOX_HOME": str(home), "PYTHONPATH": str(REPOSITORY)},
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 125, done.stderr
        assert re.search(r"not available in this version|No such command", done.stderr), done.stderr
        assert not home.exists()
