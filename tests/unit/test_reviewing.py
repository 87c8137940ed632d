"""The review at a real terminal: exact selections from scripted answers, and a guest's text that stays text."""

from __future__ import annotations

import codecs
import fcntl
import io
import os
import pty
import re
import select
import signal
import struct
import termios
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from reviewed import FINDINGS, HOSTILE, NAME, NEW, OLD, example_review
from trees import File, Folder, Link, Memory, Tree, manifest_of, review_of

from vmsandbox.cli.reviewing import review_in_terminal
from vmsandbox.errors import UserInputError
from vmsandbox.review.select import operations
from vmsandbox.review.values import Choice, FileChange, Finding, Review, Risk, Selection

LINES = b"".join(b"line %d\n" % number for number in range(60))
EDITED = LINES.replace(b"line 3\n", b"three\n").replace(b"line 30\n", b"").replace(b"line 55\n", b"line 55\nmore\n")
AUTO = (Finding(Risk.AUTO_EXECUTED, "make runs it"),)
BLOCK = (Finding(Risk.RULE, "no eval()", 3, blocks=True),)
INTERRUPT, END = "\x03", "\x04"


class Talk:
    """A review in a process of its own, at a terminal of its own."""

    def __init__(
        self, review: Review, width: int = 100, height: int = 500, ahead: bytes = b"", **environment: str
    ) -> None:
        self.seen = ""
        self._encoding = environment.get("ENCODING", "utf-8")
        read_end, self._write_end = os.pipe()
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.close(read_end)
            _child(review, self._write_end, {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8", **environment})
        os.close(self._write_end)
        self._result = read_end
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        os.write(self.terminal, b"ready\n" + ahead)

    def until_question(self) -> str:
        """What comes up to the next question, the question included; "" at the end."""
        piece = ""
        decoder = codecs.getincrementaldecoder(self._encoding)()  # a read may end within a character
        deadline = time.monotonic() + 30
        while not re.search(r"vmsandbox> [^\n]*(\]|:|this\)) (\x1b\[0m)?$", piece):
            assert time.monotonic() < deadline, piece
            if not select.select([self.terminal], [], [], 1)[0]:
                continue
            try:
                data = os.read(self.terminal, 65536)
            except OSError:  # EIO: the other side is closed
                data = b""
            if not data:
                break
            piece += decoder.decode(data)
        else:
            time.sleep(0.02)  # it flushes what was typed before; a person is never faster than that
            self.seen += piece
            return piece
        self.seen += piece
        return ""

    def answer(self, text: str) -> None:
        os.write(self.terminal, text.encode("utf-8", "surrogateescape") + (b"" if text in (INTERRUPT, END) else b"\n"))

    def result(self) -> Selection:
        while self.until_question():
            raise AssertionError(f"a question too many: {self.seen[-500:]}")
        _, status = os.waitpid(self.pid, 0)
        os.close(self.terminal)
        with os.fdopen(self._result, "rb") as pipe:
            told = pipe.read().decode("utf-8", "surrogateescape")
        assert status == 0, self.seen
        names = {"Selection": Selection, "Choice": Choice, "__builtins__": {}}
        selection = eval(told, names)
        assert isinstance(selection, Selection)
        return selection


def _child(review: Review, write_end: int, environment: dict[str, str]) -> None:
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.pop("NO_COLOR", None)
        os.environ.update(environment)
        while os.read(0, 100) != b"ready\n":
            pass
        # Not Python's own stdout: where that is a file, its buffer would look for its old place in the terminal.
        out = open(1, "w", encoding=environment.get("ENCODING", "utf-8"), closefd=False)  # noqa: SIM115
        selection = review_in_terminal(review, 0, out)
        out.flush()
        os.write(write_end, repr(selection).encode("utf-8", "surrogateescape"))
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def talk(review: Review, answers: Sequence[str], **options: int | str) -> tuple[Selection, str]:
    """Answer one question after the other; all answers have to be asked for."""
    it = Talk(review, **options)  # type: ignore[arg-type]
    for text in answers:
        assert it.until_question(), f"no question for {text!r}: {it.seen[-500:]}"
        it.answer(text)
    return it.result(), it.seen


def chosen(review: Review, *answers: str) -> tuple[Choice, ...]:
    selection, _ = talk(review, answers)
    assert selection.digest == review.digest
    return selection.choices


EDIT = review_of({"a": File(LINES), "b": File(b"b\n")}, {"a": File(EDITED), "b": File(b"c\n")})


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (("y", "n", "y", "n"), (Choice("a", (0, 2)),)),
        (("y", "y", "y", "y"), (Choice("a"), Choice("b"))),
        (("a", "n"), (Choice("a"),)),
        (("n", "a", "n"), (Choice("a", (1, 2)),)),
        (("y", "d", "y"), (Choice("a", (0,)), Choice("b"))),
        (("d", "y"), (Choice("b"),)),
        (("y", "q"), None),  # what was answered of the file that one stops in is not kept
        (("a", "q"), (Choice("a"),)),
        (("q",), None),
        (("?", "Y", "maybe", "", "yes", "ynadq", "n", "n", "n"), (Choice("a", (0,)),)),
    ],
)
def test_hunks(answers: tuple[str, ...], expected: tuple[Choice, ...] | None) -> None:
    if expected is None:
        assert chosen(EDIT, *answers) == ()
    else:
        assert chosen(EDIT, *answers, "yes") == expected


@pytest.mark.parametrize("last", ["", "y", "YES", "yes please", "n", END, INTERRUPT])
def test_only_yes_in_full_at_the_end_takes_anything(last: str) -> None:
    assert chosen(EDIT, "a", "y", last) == ()


@pytest.mark.parametrize("before", [(), ("y",), ("a",), ("a", "y")])
@pytest.mark.parametrize("end", [END, INTERRUPT])
def test_an_end_takes_nothing(before: tuple[str, ...], end: str) -> None:
    selection, seen = talk(EDIT, (*before, end))
    assert selection == Selection(EDIT.digest)
    assert "stopped: nothing is taken" in seen


def test_the_last_question_names_the_review() -> None:
    _, seen = talk(EDIT, ("a", "n", "yes"))
    assert f"Write this (of review {EDIT.digest[:12]})? Type yes in full:" in seen


MAKE = review_of({"Makefile": File(b"a:\n")}, {"Makefile": File(b"b:\n")}, {"Makefile": AUTO})


@pytest.mark.parametrize(
    ("word", "taken"), [("yes", True), ("Makefile", True), ("y", False), ("", False), ("a", False)]
)
def test_what_runs_by_itself_wants_a_word(word: str, taken: bool) -> None:
    assert chosen(MAKE, "y", word, *(["yes"] if taken else [])) == ((Choice("Makefile"),) if taken else ())


@pytest.mark.parametrize("name", ["y", "q", "no"])
def test_a_short_name_is_no_word(name: str) -> None:
    review = review_of({}, {name: File(b"x\n")}, {name: AUTO})
    assert chosen(review, name) == ()


def test_each_risk_wants_an_answer() -> None:
    flags = (*AUTO, Finding(Risk.SECRET, "a key", 1), Finding(Risk.DEPENDENCIES, "packages"))
    review = review_of({}, {"d/setup.py": File(b"x\n")}, {"d/setup.py": flags})
    assert chosen(review, "y", "setup.py", "y", "yes") == (Choice("d/setup.py"),)
    assert chosen(review, "n") == ()
    assert chosen(review, "y", "yes", "n") == ()
    assert chosen(review, "y", "n") == ()


def test_all_of_this_file_does_not_answer_for_its_risks() -> None:
    review = review_of({"Makefile": File(LINES)}, {"Makefile": File(EDITED)}, {"Makefile": AUTO})
    assert chosen(review, "a", "n") == ()
    assert chosen(review, "a", "yes", "yes") == (Choice("Makefile"),)


def test_a_blocked_change_is_shown_and_not_asked_for() -> None:
    review = review_of({"a": File(b"a\n")}, {"a": File(b"b\n"), "b": File(b"b\n")}, {"a": BLOCK})
    selection, seen = talk(review, ("y", "yes"))
    assert selection.choices == (Choice("b"),)
    assert "cannot be taken: no eval()" in seen
    whole = review_of({}, {"b": File(b"b\n")}, whole=BLOCK)
    assert talk(whole, ())[0].choices == ()


def test_modes_links_binaries_and_renames() -> None:
    old: Tree = {
        "l": Link("a"),
        "m": File(b"m\n"),
        "x": File(LINES),
        "bin": File(b"\0"),
        "r": File(b"r\n"),
        "k": File(b"k\n"),
    }
    new: Tree = {"l": Link("b"), "m": File(b"m\n", 0o755), "x": File(EDITED, 0o755), "bin": File(b"\0\0"),
                 "r2": File(b"r\n"), "k": Link("l")}  # fmt: skip
    review = review_of(old, new)
    order = [change.path for change in review.changes]
    assert order == ["bin", "k", "l", "m", "r2", "x"]
    selection, seen = talk(review, ("y", "y", "y", "y", "y", "a", "n", "yes"))
    assert selection.choices == (*map(Choice, order[:-1]), Choice("x", (0, 1, 2)))
    assert "was: link to a" in seen and "is: link to b" in seen and "0644 → 0755" in seen and "r → r2" in seen
    assert chosen(review, "n", "n", "n", "n", "n", "a", "y", "yes") == (Choice("x"),)
    selection, seen = talk(review, ("n", "n", "n", "n", "n", "y", "d", "yes"))
    assert selection.choices == (Choice("x", (0,)),) and "its mode stays" in seen


def test_folders_come_and_go_with_what_is_in_them() -> None:
    old: Tree = {"gone/a": File(b"a\n"), "gone/b": File(b"b\n"), "k": File(b"k\n"), "empty": Folder()}
    new: Tree = {"k": File(b"k\n"), "new/deep/f": File(b"f\n"), "hollow": Folder()}
    review = review_of(old, new)
    assert [one.path for one in review.changes] == [
        "empty", "gone", "gone/a", "gone/b", "hollow", "new", "new/deep", "new/deep/f",
    ]  # fmt: skip
    everything = chosen(review, "y", "y", "y", "y", "y", "yes")
    # New folders come along by themselves; those that end are named.
    expected = ["empty", "gone", "gone/a", "gone/b", "hollow", "new/deep/f"]
    assert everything == tuple(map(Choice, expected))
    assert chosen(review, "n", "y", "n", "n", "n", "yes") == (Choice("gone/a"),)
    assert chosen(review, "n", "n", "n", "n", "y", "yes") == (Choice("new/deep/f"),)
    made = operations(review, Selection(review.digest, everything), manifest_of(old), Memory(), Memory())
    assert {one.path for one in made} == {one.path for one in review.changes}


def test_what_does_not_go_alone_is_left_out() -> None:
    old: Tree = {"d": File(b"d\n")}
    new: Tree = {"d/x": File(b"x\n"), "e": File(b"")}
    selection, seen = talk(review_of(old, new), ("n", "y", "y", "yes"))
    assert selection.choices == (Choice("e"),) and "left out" in seen


def plain(seen: str) -> str:
    """Without the colours that the host writes (SGR)."""
    return re.sub(r"\x1b\[[0-9;]*m", "", seen)


def no_to_all(review: Review, width: int = 100, **environment: str) -> str:
    it = Talk(review, width, **environment)
    while it.until_question():
        it.answer("n")
    assert it.result().choices == ()
    return it.seen


@pytest.mark.parametrize("width", [100, 40, 31, 20])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_a_guest_cannot_act_nor_speak_as_the_host(width: int, encoding: str) -> None:
    fake = "vmsandbox> Take this? [y,n]"
    filler = [f"{'x' * count}{fake}" for count in range(20, 110)] + [f"{'宽' * count}{fake}" for count in range(5, 60)]
    new: Tree = {NAME: File("".join(f"{line}\n" for line in (*HOSTILE, *filler, "\u00a1" * 60 + fake)).encode()),
                 f"{'n' * 60}{fake}": File(b"\x1b[8m\x1bc\x9b\x85\x84" + b"\xff" * 9),
                 "l": Link(f"{'t' * 150}{fake}\x1b]0;t\x07")}  # fmt: skip
    bad = (Finding(Risk.RULE, f"\x1b[2J{'f' * 60}{fake}\n{fake}"),)
    review = review_of({}, new, {NAME: bad}, bad)
    seen = plain(no_to_all(review, width, ENCODING=encoding))
    assert {character for character in seen if not character.isprintable()} <= {"\r", "\n"}
    assert not re.search("\r(?!\n)", seen)
    bar = "│ " if encoding == "utf-8" else "| "
    for line in seen.split("\r\n")[1:]:  # the first is the echo that started it
        host_said = line.startswith("vmsandbox> ") and line.count("vmsandbox>") == 1
        assert line == "" or line.startswith(bar) or (host_said and fake not in line), repr(line)
        if line.startswith(bar):
            assert sum(2 if ord(character) > 0x1100 and character not in "│→–…" else 1 for character in line) < width, (
                repr(line)
            )


def test_a_line_from_right_to_left_begins_behind_the_bar_all_the_same() -> None:
    new: Tree = {"a": File("\u05d0\u05d1 vmsandbox> Take this?\nplain\n".encode()), "\u0627": File(b"")}
    seen = plain(no_to_all(review_of({}, new)))
    assert "\r\n│ \u200e+ \u05d0\u05d1 vmsandbox> Take this?\r\n│ + plain\r\n" in seen
    assert "\r\n│ \u200e\u0627\r\n" in seen


def test_colours_are_the_hosts_and_can_be_turned_off() -> None:
    review = example_review()
    coloured = no_to_all(review)
    assert set(re.findall(r"\x1b\[?[^m]*?[A-Za-z]", coloured)) == set(re.findall(r"\x1b\[[0-9;]*m", coloured))
    assert re.search(r"\x1b\[[0-9;]*3[0-9]m", coloured)
    without = no_to_all(review, NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*(3[0-9]|9[0-7])[;m]", without)
    assert plain(coloured) == plain(without)


def test_all_that_matters_is_shown() -> None:
    seen = plain(no_to_all(example_review()))
    assert "! deletion: 3 of 10 files are gone" in seen
    for findings in FINDINGS.values():
        for finding in findings:
            assert finding.text in seen
    assert seen.index("settings.py") < seen.index("ci.yml") < seen.index("windows.txt")
    assert r"if access_level != " in seen and r"\u202e" in seen
    assert OLD and NEW


def test_answers_typed_ahead_do_not_answer_for_a_risk() -> None:
    it = Talk(MAKE)
    assert it.until_question()
    it.answer("y\nyes\nyes\nyes")  # the first is for the hunk; the others came before their question was there
    assert "type yes in full" in it.until_question()
    time.sleep(0.3)
    assert not select.select([it.terminal], [], [], 0)[0], "no further question: it waits for a person"
    it.answer("no")
    assert it.result().choices == ()


def test_what_was_typed_before_the_review_answers_nothing() -> None:
    it = Talk(EDIT, ahead=b"a\na\nyes\n")
    assert plain(it.until_question()).count("Take this hunk") == 1
    time.sleep(0.3)
    assert not select.select([it.terminal], [], [], 0)[0], "it waits for a person"
    it.answer(END)
    assert it.result().choices == ()


def test_long_text_comes_in_pages_and_skipping_is_remembered() -> None:
    review = review_of({}, {"long": File(LINES)})
    it = Talk(review, height=20)
    first = plain(it.until_question())
    assert "Enter: show more" in first and "line 59" not in first
    it.answer("")
    assert "line 25" in plain(it.until_question())
    it.answer("s")
    question = plain(it.until_question())
    assert "line 59" not in question and "You have not seen all of it" in question
    it.answer("y")
    it.until_question()
    it.answer("yes")
    assert it.result().choices == (Choice("long"),)


def test_nothing_to_review() -> None:
    assert talk(Review("0" * 64), ())[0] == Selection("0" * 64)


def test_without_a_terminal_there_is_no_review(tmp_path: Path) -> None:
    (tmp_path / "answers").write_text("y\nyes\n" * 20)
    with open(tmp_path / "answers") as answers, pytest.raises(UserInputError, match="needs a terminal"):
        review_in_terminal(EDIT, answers.fileno(), io.StringIO())


def test_many_changes_are_listed_fast() -> None:
    changes = tuple(FileChange(f"d{n % 50}/f{n}", "deleted", None, None) for n in range(5000))
    began = time.monotonic()
    selection, _ = talk(Review("0" * 64, changes), ("s", "q"))
    assert selection.choices == () and time.monotonic() - began < 15


@pytest.fixture(autouse=True)
def no_children_left() -> Iterator[None]:
    yield
    try:
        pid, _ = os.waitpid(-1, os.WNOHANG)
        while pid == 0:  # a failed test: end its review
            for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
                os.kill(int(child), signal.SIGKILL)
            pid, _ = os.waitpid(-1, 0)
    except ChildProcessError:
        pass
