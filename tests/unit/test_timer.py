"""The timer that repeats a session: its units, and what is refused. That systemd reads them so: tests/guest."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vmsandbox.cli import app
from vmsandbox.errors import HostError, UserInputError
from vmsandbox.process import Programs
from vmsandbox.render.timer import TimerPlan, render_units
from vmsandbox.session import timers
from vmsandbox.session.timers import check_schedule, install_timer, name_of, remove_timer, timer_for
from vmsandbox.spec import Accept

SCHEDULE = "*-*-* 02:00:00"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / ".claude").mkdir()
    (tmp_path / ".claude/sandbox.yaml").write_text(f'sandbox: {{session: {{schedule: "{SCHEDULE}"}}}}\n')
    return tmp_path


def test_the_units_are_the_ones_that_were_reviewed(golden: Callable[[str, str], None]) -> None:
    plan = TimerPlan(
        "vmsandbox-demo-0123abcd",
        "vmsandbox session of /home/ann/100% demo",
        SCHEDULE,
        ["/usr/bin/vmsandbox", "session", "/home/ann/100% demo", "--", "sh", "-c", 'echo "$HOME" \\ \n;'],
        {"VMSANDBOX_HOME": "/srv/a b", "XDG_CACHE_HOME": "/$x"},
        "ann",
    )
    golden("timer.txt", "".join(f"== {name}\n{text}" for name, text in render_units(plan).items()))


def run(*words: str) -> None:
    assert app._run(list(words)) == 0


def test_what_is_repeated_is_a_session_with_the_policys_schedule(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMSANDBOX_HOME", str(project / "home"))
    run("policy", "timer", str(project), "--accept", "safe", "--json", "--", "make", "check")
    told = json.loads(capsys.readouterr().out)
    service, timer = told["units"][f"{name_of(project)}.service"], told["units"][f"{name_of(project)}.timer"]
    words = f"{sys.executable} -m vmsandbox session {project} --accept safe --json -- make check"
    assert f"ExecStart={words}\n" in service and f"Environment=VMSANDBOX_HOME={project / 'home'}\n" in service
    assert f"OnCalendar={SCHEDULE}\n" in timer
    link = project.with_name("link")
    link.symlink_to(project)
    run("policy", "timer", str(link), "--accept", "safe", "--json", "--", "make", "check")
    assert json.loads(capsys.readouterr().out) == told, "one timer, however the project is written"
    run("policy", "check", str(project / ".claude/sandbox.yaml"))
    assert "policy timer --install" in capsys.readouterr().out


def test_a_file_of_the_projects_is_not_taken_for_a_ready_made_policy(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "offline").write_text((project / ".claude/sandbox.yaml").read_text())
    monkeypatch.chdir(project)
    assert app._run(["policy", "timer", "--policy", "offline", "--", "true"]) == 125
    assert "no session.schedule" in capsys.readouterr().err
    run("policy", "timer", "--policy", str(project / "offline"), "--", "true")
    assert f"--policy {project}/offline" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("schedule", "command", "where", "why"),
    [
        (None, ["true"], ".", "no session.schedule"),
        (SCHEDULE, [], ".", "name the command"),
        (SCHEDULE, ["true"], "missing", "not a folder"),
    ],
)
def test_what_cannot_be_repeated(
    tmp_path: Path, schedule: str | None, command: list[str], where: str, why: str
) -> None:
    with pytest.raises(UserInputError, match=why):
        timer_for(tmp_path / where, schedule, command)


def test_a_schedule_that_systemd_does_not_know_is_refused() -> None:
    if Programs().find("systemd-analyze") is None:
        pytest.skip("no systemd-analyze here")
    check_schedule(SCHEDULE, Programs())
    with pytest.raises(UserInputError, match="systemd does not know 'every second day'"):
        check_schedule("every second day", Programs())


def test_where_systemd_does_not_run_nothing_is_written(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timers, "_RUNNING", tmp_path / "none")
    monkeypatch.setattr(timers, "unit_folder", lambda: tmp_path / "units")
    plan = timer_for(project, SCHEDULE, ["true"], accept=Accept.NONE)
    for call in (lambda: install_timer(plan, Programs()), lambda: remove_timer(project, Programs())):
        with pytest.raises(HostError, match="systemd does not run here"):
            call()
    assert not (tmp_path / "units").exists()


class Systemctl(Programs):
    def __init__(self) -> None:
        self.ran: list[list[str]] = []

    def find(self, name: str) -> None:
        return None

    def run(self, argv: list[str], check: bool = True, **_: object) -> None:  # type: ignore[override]
        self.ran.append(list(argv))
        if check and "disable" in argv:
            raise HostError("no such unit")


def test_install_and_remove(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timers, "_RUNNING", tmp_path)
    monkeypatch.setattr(timers, "unit_folder", lambda: tmp_path / "units")
    plan, systemctl = timer_for(project, SCHEDULE, ["true"]), Systemctl()
    files = install_timer(plan, systemctl)
    assert {file.name: file.read_text() for file in files} == render_units(plan)
    assert [words[-1] for words in systemctl.ran] == ["daemon-reload", f"{plan.name}.timer"]
    assert {file.name for file in remove_timer(project, systemctl)} == set(render_units(plan))
    assert list((tmp_path / "units").iterdir()) == []
    assert systemctl.ran[2][-3:] == ["disable", "--now", f"{plan.name}.timer"]
    assert remove_timer(project, systemctl) == []
