"""The host's side of a question: what a guest may say, who answers, and the prompt on a real terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmsandbox.cli.screen import MARK
from vmsandbox.errors import GuestError
from vmsandbox.guest.ask import Denied, Question, Withdrawn, parse_untrusted
from vmsandbox.journal.chain import Journal
from vmsandbox.paths import Layout
from vmsandbox.session.live.asking import Asking
from vmsandbox.session.state.folder import SessionFolder

ASKED = {"id": 7, "argv": ["pip", "install", "x"], "cwd": "/w", "program": "/usr/bin/pip", "rule": "r", "seconds": 5}


def line(**changed: object) -> bytes:
    return json.dumps({"ask": {**ASKED, **changed}}).encode()


def test_a_question_is_taken_apart() -> None:
    assert parse_untrusted(line()) == [Question(7, ("pip", "install", "x"), "/w", "/usr/bin/pip", "r", 5.0)]
    assert parse_untrusted(b'{"gone": 7}') == [Withdrawn(7)]
    assert parse_untrusted(b'{"denied": [["curl x", "rule", 3]]}') == [Denied("curl x", "rule", 3)]


@pytest.mark.parametrize(
    "untrusted",
    [
        b"", b"[]", b"{}", b"null", b"\xff", b"[" * 100000, b'{"ask": 1}', b'{"ask": {}}', b'{"other": 1}',
        b'{"gone": -1}',
        b'{"gone": true}', b'{"gone": 1e400}', b'{"denied": [["a"]]}', b'{"denied": 5}', line(argv=[]),
        line(argv="pip"),
        line(argv=[1]), line(argv=["x"] * 513), line(argv=["x" * 17000]), line(argv=["x" * 9000] * 2), line(id="7"),
        line(cwd=None), line(cwd="x" * 5000), line(seconds=True), line(seconds=-1), line(seconds=1e9),
        line(rule="x" * 600),
        b'{"ask": {"seconds": NaN}}', line(seconds=float("nan")), b'{"gone": 1, "denied": []}',
        json.dumps({"denied": [["a", "b", 1]] * 17}).encode(),
    ],
)  # fmt: skip
def test_what_is_no_message_is_refused(untrusted: bytes) -> None:
    with pytest.raises(GuestError):
        parse_untrusted(untrusted)


@given(st.binary(max_size=200))
def test_no_bytes_make_anything_but_messages_or_a_refusal(untrusted: bytes) -> None:
    with suppress(GuestError):
        parse_untrusted(untrusted)


class Guest:
    """The other end of the port."""

    def __init__(self, home: Path) -> None:
        layout = Layout.from_environment({"VMSANDBOX_HOME": str(home)})
        self.folder = SessionFolder(layout, "x")
        self.folder.path.mkdir(parents=True)
        run = layout.run / "x-abcdef"
        run.mkdir(parents=True)
        self.folder.info = lambda: SimpleNamespace(uuid="1-x-abcdef")  # type: ignore[method-assign, assignment, return-value]
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(str(run / "ask"))
        self.server.listen(4)
        self.journal = Journal(home / "events.jsonl")
        self.peer: socket.socket | None = None

    def accept(self) -> None:
        self.peer = self.server.accept()[0]
        self.peer.settimeout(10)

    def say(self, data: bytes) -> None:
        assert self.peer is not None
        self.peer.sendall(data)

    def heard(self) -> Any:
        assert self.peer is not None
        return json.loads(self.peer.recv(4096).split(b"\n")[0])

    def events(self) -> list[tuple[str, dict[str, Any]]]:
        return [(one["kind"], one["data"]) for one in self.journal.read()]


@pytest.fixture
def guest(short_home: Path) -> Iterator[Guest]:
    made = Guest(short_home)
    yield made
    made.server.close()
    if made.peer is not None:
        made.peer.close()


def test_an_answer_reaches_the_guest_and_the_journal(guest: Guest) -> None:
    seen: list[Question] = []
    answers = iter(["yes", "always", "no"])

    def person(question: Question, is_wanted: Any) -> str:
        assert is_wanted()
        seen.append(question)
        return next(answers)

    with Asking(guest.folder, guest.journal, person) as asking:
        guest.accept()
        assert not asking.attend()
        for answer in ("yes", "always", "no"):
            guest.say(b'half a line of before\n{"ask"\n\n' + line() + b"\n")
            assert asking.attend()
            assert guest.heard() == {"id": 7, "answer": answer}
    assert [(kind, data["answer"], data["by"]) for kind, data in guest.events()] == [
        ("command.asked", answer, "person") for answer in ("yes", "always", "no")
    ]
    assert seen[0].argv == ("pip", "install", "x")


def test_without_a_person_it_is_no_at_once(guest: Guest) -> None:
    with Asking(guest.folder, guest.journal, None) as asking:
        guest.accept()
        guest.say(line() + b"\n")
        assert not asking.attend()
        assert guest.heard() == {"id": 7, "answer": "no terminal"}
    assert [data["by"] for _kind, data in guest.events()] == [""]


def test_one_process_answers_at_a_time(guest: Guest) -> None:
    first = Asking(guest.folder, guest.journal, None)
    with first, Asking(guest.folder, guest.journal, None) as second:
        assert first.sources() and not second.sources()
        first.__exit__(None, None, None)
        time.sleep(1.1)
        second.attend()
        assert second.sources(), "the one that waits takes over"


def test_a_question_that_is_withdrawn_is_no_longer_wanted(guest: Guest) -> None:
    def person(question: Question, is_wanted: Any) -> str:
        guest.say(b'{"denied": [["x", "r", 1]]}\n{"gone": 7}\n')
        return "late" if not is_wanted() else "yes"

    with Asking(guest.folder, guest.journal, person) as asking:
        guest.accept()
        guest.say(line() + b"\n" + line(id=8) + b'\n{"gone": 8}\n')
        asking.attend()
        asking.attend()
    kinds = [(kind, data.get("answer")) for kind, data in guest.events()]
    assert kinds == [("command.asked", "late"), ("command.denied", None)], "a withdrawn one is not asked at all"


def test_a_flood_fills_neither_memory_nor_the_journal(guest: Guest) -> None:
    with Asking(guest.folder, guest.journal, None) as asking:
        guest.accept()
        stop = threading.Event()

        def flood() -> None:
            number = 0
            while not stop.is_set():
                rows = [[f"x{number}-{n}", "r", 1] for n in range(16)]
                number += 1
                try:
                    guest.say(json.dumps({"denied": rows}).encode() + b"\n")
                except OSError:
                    return

        thread = threading.Thread(target=flood)
        thread.start()
        until = time.monotonic() + 1
        while time.monotonic() < until:
            asking.attend()
        stop.set()
        asking.__exit__(None, None, None)
        thread.join()
    assert len(guest.events()) < 250
    with Asking(guest.folder, guest.journal, None) as asking:
        guest.accept()
        for _ in range(3):
            guest.say(b"x" * (60 << 10))
            asking.attend()
        for _ in range(20):
            asking.attend()
        assert not asking.sources(), "a line without end ends the listening"


class Prompt:
    """The prompt in a process of its own, on a pseudo-terminal that it controls."""

    PROGRAM = """
import json, sys
from vmsandbox.cli import asking
from vmsandbox.cli.asking import has_person, person
asking.SETTLE = float(sys.argv[3])
from vmsandbox.guest.ask import Question
import time, tty
if sys.argv[2] == "raw": tty.setraw(0)
print("ready", has_person(), flush=True)
time.sleep(0.5)
q = json.loads(sys.argv[1]); q["argv"] = tuple(q["argv"])
until = time.monotonic() + q["seconds"]
print("answer", person("demo")(Question(**q), lambda: time.monotonic() < until), flush=True)
"""

    def __init__(self, mode: str = "cooked", settle: float = 0.1, **changed: object) -> None:
        self.master, self.slave = pty.openpty()
        asked = json.dumps({**ASKED, **changed})
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.PROGRAM, asked, mode, str(settle)],
            stdin=self.slave, stdout=self.slave, stderr=self.slave, start_new_session=True,
            env={**os.environ, "TERM": "xterm", "LC_ALL": "C.UTF-8"},
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        self.output = b""

    def expect(self, what: bytes, timeout: float = 20) -> bytes:
        until = time.monotonic() + timeout
        while what not in self.output:
            assert time.monotonic() < until, self.output
            if select.select([self.master], [], [], 0.1)[0]:
                self.output += os.read(self.master, 65536)
        before, _, self.output = self.output.partition(what)
        return before

    def answer(self, typed: bytes, early: bytes = b"") -> tuple[bytes, bytes]:
        """(the page, the answer)."""
        try:
            self.expect(b"ready True")
            os.write(self.master, early)
            page = self.expect(b"\x1b[?1049h")
            os.write(self.master, early)  # what a terminal answers to a guest's query comes about now
            page += b"\x1b[?1049h" + self.expect(b"then it is no)?")
            time.sleep(0.3)  # what is typed within an instant of the question is dropped with what came before
            os.write(self.master, typed)
            self.expect(b"answer ")
            return page, self.expect(b"\n").strip()
        finally:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            os.close(self.master)
            os.close(self.slave)


@pytest.mark.parametrize(
    ("typed", "answer"),
    [(b"y\r", b"yes"), (b"a\r", b"always"), (b"\r", b"no"), (b"n\r", b"no"), (b"yy\r", b"no"), (b"\x04", b"no"),
     (b"\x1b[0ny\r", b"no"), (b"", b"no answer in time")],
)  # fmt: skip
def test_the_prompt(typed: bytes, answer: bytes) -> None:
    assert Prompt(seconds=3).answer(typed)[1] == answer


@pytest.mark.parametrize("mode", ["raw", "cooked"])
def test_what_was_typed_before_answers_nothing(mode: str) -> None:
    page, answer = Prompt(mode, 1, seconds=4).answer(b"", early=b"y\ry\ry\r\x1b[200~y\r")
    assert answer == b"no answer in time"
    assert page.index(b"\x1b[?1049h") < page.index(MARK.encode()), "on a screen of its own"


def test_what_the_guest_chose_stands_behind_the_bar() -> None:
    words = ["pip", "\x1b[2J\x1b]0;t\x07", f"\n{MARK} allow? y", "\u202eexe", "x" * 300, "", "\udcff"]
    page, answer = Prompt(argv=words, cwd="/w\n" + MARK, seconds=9).answer(b"y\r")
    assert answer == b"yes"
    lines = page.partition(b"\x1b[H\x1b[2J")[2].decode().splitlines()
    for one in lines:
        plain = one.replace("\x1b[1m", "").replace("\x1b[0m", "").replace("\x1b[2m", "").replace("\x1b[1;36m", "")
        assert plain.startswith((MARK, "│")) or not plain.strip(), repr(one)
        assert "\u202e" not in plain and "\x07" not in plain and "\x1b[2J" not in plain
    text = "".join(lines)
    for shown in (r"\x1b[2J\x1b]0;t\x07", rf"\x0a{MARK} allow? y", r"\u202eexe", "(empty)", r"\xff", rf"/w\x0a{MARK}"):
        assert shown in text, shown
