"""The command line's contract without a guest: what is data, which exit status, and errors that say what to do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vmsandbox.cli import app, output
from vmsandbox.errors import GuestError, HostError, RefusedError, UserInputError

COMMANDS = ("doctor", "image", "session", "start", "exec", "shell", "ls", "stop", "push", "changes", "logs", "gc",
            "ssh-config", "proxy")  # fmt: skip


def run(home: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "VMSANDBOX_HOME": str(home), "NO_COLOR": "1", **env}
    return subprocess.run(
        [sys.executable, "-m", "vmsandbox", *words], capture_output=True, text=True, env=environment, timeout=60
    )


@pytest.fixture
def home(short_home: Path) -> Path:
    return short_home


def test_every_command_of_the_contract_has_help(home: Path) -> None:
    overview = run(home, "--help").stdout
    for command in COMMANDS:
        assert f"\n  {command} " in overview, command


@pytest.mark.parametrize(
    ("argv", "own", "guests"),
    [
        (["session", "."], ["session", "."], None),
        (["session", ".", "--", "ls", "-l"], ["session", "."], ["ls", "-l"]),
        (["exec", "n", "--", "sh", "-c", "a -- b", "--", "x"], ["exec", "n"], ["sh", "-c", "a -- b", "--", "x"]),
        (["session", "--"], ["session"], None),
        (["--", "rm"], [], ["rm"]),
        (["start", "--wait"], ["start", "--wait=forever"], None),
        (["session", "--wait=9", "--", "x", "--wait"], ["session", "--wait=9"], ["x", "--wait"]),
        (["exec", "n", "x", "--wait"], ["exec", "n", "x", "--wait"], None),
    ],
)
def test_all_behind_the_first_two_dashes_is_the_guests(
    argv: list[str], own: list[str], guests: list[str] | None
) -> None:
    assert output.split_command(argv) == own
    assert output.guest_command() == guests


@pytest.mark.parametrize(
    "words",
    [
        ("--memory", "600"),
        ("--vcpus", "1"),
        ("--image", "base"),
        ("--ssh-ports", "2"),
        ("--history", "full"),
        ("--empty",),
    ],
)
def test_what_a_session_that_begins_as_a_snapshot_cannot_choose(home: Path, words: tuple[str, ...]) -> None:
    done = run(home, "start", "--from", "a:b", *words)
    assert done.returncode == 125 and f"{words[0]} cannot be chosen" in done.stderr


@pytest.mark.parametrize(
    "words",
    [("no-such-command",), ("session", "--no-such-option"), ("session", "--memory", "lots"),
     ("session", "--net", "wifi"), ("session", "--accept", "everything"), ("image", "nonsense")],
)  # fmt: skip
def test_wrong_usage_is_125_and_says_what(home: Path, words: tuple[str, ...]) -> None:
    done = run(home, *words)
    assert done.returncode == 125
    assert "Traceback" not in done.stderr and "Error" in done.stderr
    assert not home.exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("session", "/no/such/folder", "--", "true"), "not a folder"),
        (("session", "/etc/passwd", "--", "true"), "not a folder"),
        (("session", "--empty", "--memory", "1", "--", "true"), "--memory must be between"),
        (("session", "--empty", "--vcpus", "0", "--", "true"), "--vcpus must be between"),
        (("session", "--empty", "--ssh-ports", "99", "--", "true"), "--ssh-ports must be between"),
        (("session", "--empty", "--learn", "--", "true"), "--learn needs a network"),
        (("stop",), "which session"),
        (("stop", "nobody"), "no session named"),
        (("shell", "nobody"), "no session named"),
        (("changes", "nobody"), "no session was ever called"),
        (("accept", "nobody", "x"), "no session was ever called"),
        (("accept", "nobody", "--safe", "--all"), "exclude each other"),
        (("restore", "nobody"), "no session was ever called"),
        (("push", "nobody"), "no session named"),
        (("ssh-config", "nobody"), ""),
        (("proxy", "nobody"), "no session named"),
        (("logs", "nobody"), "no session was ever called"),
        (("logs", "../../../etc"), "no session was ever called"),
        (("image", "verify", "nothing"), "there is no image"),
        (("image", "verify", "../x"), "not an image name"),
        (("image", "rm", "nothing"), "no image"),
    ],
)  # fmt: skip
def test_bad_input_is_125_says_what_and_leaves_nothing(home: Path, words: tuple[str, ...], says: str) -> None:
    done = run(home, *words, VMSANDBOX_ALLOW_EMULATION="1")
    assert done.returncode == 125, done.stderr
    assert done.stderr.startswith("vmsandbox: ") and says in done.stderr
    assert "Traceback" not in done.stderr
    assert [path for path in home.rglob("*") if path.is_file()] == [] if home.exists() else True
    document = run(home, *words[:1], *words[1:], "--json", VMSANDBOX_ALLOW_EMULATION="1") if "--" not in words else None
    if document and document.stdout.startswith("{"):
        assert says in json.loads(document.stdout)["brief"]


def test_errors_are_json_where_json_was_asked_for(home: Path) -> None:
    done = run(home, "changes", "nobody", "--json")
    assert done.returncode == 125
    error = json.loads(done.stdout)
    assert error["error"] == "UserInputError"
    assert set(error) == {"error", "brief", "details", "resolution"}


def test_a_json_flag_of_the_guests_command_is_not_ours(home: Path) -> None:
    done = run(home, "exec", "nobody", "--", "tool", "--json")
    assert done.stdout == "" and "no session named" in done.stderr


def test_no_sessions_is_no_error(home: Path) -> None:
    assert json.loads(run(home, "ls", "--json").stdout) == []
    assert json.loads(run(home, "image", "ls", "--json").stdout) == []
    assert run(home, "stop", "--all").returncode == 0


@pytest.mark.parametrize(
    "policy", ["sandbox: [", "sandbox: {filesystem: {denied_path: [x]}}", "- a", "sandbox: 1", "\x00"]
)
def test_a_bad_policy_stops_before_anything_is_made(home: Path, tmp_path: Path, policy: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(policy)
    done = run(home, "session", str(tmp_path), "--policy", str(path), "--", "true")
    assert done.returncode == 125
    assert str(path) in done.stderr or "policy" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (home / "live").exists()


def test_a_policy_that_is_not_there(home: Path, tmp_path: Path) -> None:
    done = run(home, "session", str(tmp_path), "--policy", "/no/such.yaml", "--", "true")
    assert done.returncode == 125 and "/no/such.yaml" in done.stderr


def test_no_libvirt_says_how_to_start_it(home: Path) -> None:
    nowhere = "qemu+unix:///system?socket=/nonexistent/libvirt-sock"
    for words in (("session", "--empty", "--", "true"), ("gc",)):
        done = run(home, *words, VMSANDBOX_LIBVIRT_URI=nowhere, VMSANDBOX_ALLOW_EMULATION="1")
        assert done.returncode == 125
        assert "libvirt does not answer" in done.stderr and "doctor --fix" in done.stderr
        assert not (home / "live").exists()


def test_a_home_with_too_long_a_path_for_sockets(tmp_path: Path) -> None:
    done = run(tmp_path / ("x" * 90), "ls")
    assert done.returncode == 125 and "too long a path" in done.stderr


@pytest.mark.parametrize(
    ("error", "status"),
    [(UserInputError("x"), 125), (HostError("x"), 125), (GuestError("x"), 125), (RefusedError("x"), 126),
     (ZeroDivisionError(), 125), (KeyboardInterrupt(), 130),
     (app.Interrupted(signal.SIGTERM), 143), (app.Interrupted(signal.SIGHUP), 129)],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_each_end_has_its_status(monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int) -> None:
    def fail(*_words: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr("vmsandbox.cli.looking.live_sessions", fail)
    assert app._run(["ls"]) == status


def test_a_guests_words_are_made_visible(capsys: pytest.CaptureFixture[str]) -> None:
    """A name with an escape sequence, a newline and a right-to-left override, as a guest may report it."""
    from vmsandbox.cli.showing import print_review
    from vmsandbox.review.manifest import Item
    from vmsandbox.review.values import FileChange, Review

    item = Item("file", 0o644, 1, "0" * 64)
    evil = "a\x1b]52;c;eA==\x07\nM  fake\u202egpj.sh\udcff"
    changes = (FileChange(evil, "added", None, item), FileChange("b", "renamed", item, item, old_path=evil))
    print_review(Review("0" * 64, changes), sys.stdout)
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\u202e" not in shown and "\x07" not in shown
    assert len(shown.splitlines()) == 3, "a name must not begin a line of its own"
    assert "\\x1b" in shown and "\\u202e" in shown


def test_a_long_list_is_cut_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    from vmsandbox.cli.showing import MOST_LINES, print_review
    from vmsandbox.review.manifest import Item
    from vmsandbox.review.values import FileChange, Review

    many = tuple(FileChange(f"f{number:04}", "added", None, Item("dir", 0o755)) for number in range(1000))
    print_review(Review("0" * 64, many), sys.stdout)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == MOST_LINES + 2 and "940 more" in lines[-2] and "1000 added" in lines[-1]
