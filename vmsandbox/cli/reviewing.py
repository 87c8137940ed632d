"""The review in a terminal, like `git add -p`: by file and hunk, the risk first.

What is taken here goes into a person's project. So nothing is taken by default: an answer that is not understood is
asked for again, the end of the input takes nothing at all, every risk wants an answer of its own, and what something
would run by itself wants a word that nobody types by accident.
"""

from __future__ import annotations

import os
import sys
from typing import TextIO

from vmsandbox.cli.screen import Quit, Screen
from vmsandbox.review.describe import has_lines, label, said, sort_text, what_became, where_text
from vmsandbox.review.select import can_be_taken, holding_together, parents_of, why_not
from vmsandbox.review.text import shown
from vmsandbox.review.values import Choice, FileChange, Finding, Hunk, Review, Risk, Selection
from vmsandbox.review.visible import changed_within, line_counts, pieces_of, rows_of

_LINE = 2000  # characters of a line
_PATH = 1000
_UNSEEN = " (You have not seen all of it.)"
_LONG_ENOUGH = 4  # letters of a name that can stand for yes: `q` or `no` may be a file's name
_HELP = {
    "y": "take it",
    "n": "leave it",
    "a": "take it and all that follows in this file",
    "d": "leave it and all that follows in this file",
    "q": "stop here: leave this and all that follows, go to the summary",
    "?": "this help (Ctrl-C or Ctrl-D: stop and take nothing)",
}
_MEANINGS = {
    Risk.RULE: "It breaks a rule of this project",
    Risk.SECRET: "It seems to have a key or a password in it",
    Risk.AUTO_EXECUTED: "Programs run it without being asked",
    Risk.TERMINAL: "It has sequences that drive a terminal",
    Risk.UNICODE: "Its text may not be what it looks like",
    Risk.SYMLINK: "It is a link",
    Risk.NAME: "Its name may not be what it looks like",
    Risk.EXECUTABLE: "It can be run",
    Risk.DEPENDENCIES: "It decides which packages are installed",
    Risk.BINARY: "It cannot be read as text",
    Risk.MODE: "Its permissions change",
    Risk.DELETION: "It is deleted",
    Risk.UNREADABLE: "Nobody can look at it",
}


def review_in_terminal(review: Review, answers: int | None = None, out: TextIO | None = None) -> Selection:
    """Show the review and ask; returns what was accepted, in the review's order.

    answers: descriptor of the terminal that is read from; None: the one that the person sits at (/dev/tty). out:
    where the review is written; None: stderr. The end of the input or Ctrl-C at any question, or no `yes` at the
    last one, accepts nothing.

    Raises:
        UserInputError: `answers` is no terminal.
    """
    opened = None
    if answers is None:
        try:
            answers = opened = os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY)
        except OSError:
            answers = 0
    try:
        screen = Screen(answers, out or sys.stderr)
        try:
            choices = _Reviewing(review, screen).run()
        except (Quit, KeyboardInterrupt):
            screen.end_page()
            screen.host("stopped: nothing is taken", "bold yellow")
            choices = ()
    finally:
        if opened is not None:
            os.close(opened)
    return Selection(review.digest, choices)


class _Stop(Exception):
    """The person wants to see no more, and keep what was taken so far."""


class _Reviewing:
    def __init__(self, review: Review, screen: Screen) -> None:
        self.review = review
        self.screen = screen
        self.chosen: dict[str, Choice] = {}
        paths = [path for change in review.changes for path in (change.path, change.old_path) if path is not None]
        self.folders = {folder for path in paths for folder in parents_of(path)}  # something in them changed

    def run(self) -> tuple[Choice, ...]:
        self._overview()
        if not self.review.changes:
            return ()
        if any(finding.blocks for finding in self.review.findings):
            self.screen.host("nothing of this can be accepted, for the reason above", "bold red")
            return ()
        asked = [change for change in self.review.changes if not self._comes_with_others(change)]
        try:
            for number, change in enumerate(asked, 1):
                self._one(change, number, len(asked))
        except _Stop:
            pass
        return self._confirmed(self._fitting())

    def _overview(self) -> None:
        review, screen = self.review, self.screen
        blocked = sum(1 for change in review.changes if not can_be_taken(change))
        screen.begin_page()
        count = len(review.changes)
        screen.host(
            f"{count or 'no'} change{'' if count == 1 else 's'}" + (f", {blocked} cannot be taken" if blocked else "")
        )
        for finding in review.findings:
            self._finding(finding)
        for number, change in enumerate(review.changes, 1):
            plus, minus = line_counts(change)
            lines = " ".join(part for part in (f"+{plus}" if plus else "", f"-{minus}" if minus else "") if part)
            present = {finding.risk for finding in change.findings}
            risks = ", ".join(label(risk) for risk in Risk if risk in present)
            style = "red" if change.blocked else "yellow" if risks else ""
            lead = f"{number:>4}  {sort_text(change):<14}{lines:<12}"
            screen.said(_names(change) + (f"   [{risks}]" if risks else ""), style, lead)
        screen.end_page()

    def _comes_with_others(self, change: FileChange) -> bool:
        """A folder that comes or goes with what is in it needs no question of its own."""
        item = change.after or change.before
        if item is None or item.kind != "dir" or change.sort not in ("added", "deleted") or change.blocked:
            return False
        if change.sort == "added" and change.findings:
            return False
        inside = f"{change.path}/"
        return any(
            (one.old_path or "").startswith(inside) or one.path.startswith(inside) for one in self.review.changes
        )

    def _one(self, change: FileChange, number: int, count: int) -> None:
        screen = self.screen
        screen.host()
        screen.host(f"{number} of {count}: {sort_text(change)}")
        screen.said(_names(change), "bold")
        for finding in change.findings:
            self._finding(finding)
        for name, value in what_became(change):
            screen.said(f"{name}: {value}")
        if not can_be_taken(change):
            screen.said(f"cannot be taken: {why_not(change)}", "bold red")
            return
        if change.sort == "modified" and change.hunks:
            choice = self._hunks(change, change.hunks)
        else:
            unseen = "".join([self._hunk(change, hunk) for hunk in change.hunks or ()])[: len(_UNSEEN)]
            choice = Choice(change.path) if change.findings or self._yes(f"Take it?{unseen}") else None
        if choice is not None and self._risks_accepted(change):
            self.chosen[change.path] = choice

    def _hunks(self, change: FileChange, hunks: tuple[Hunk, ...]) -> Choice | None:
        taken: list[int] = []
        answer = ""
        for index, hunk in enumerate(hunks):
            if answer not in ("a", "d"):
                unseen = self._hunk(change, hunk)
                answer = self._letter(f"Take this hunk ({index + 1} of {len(hunks)})?{unseen}", "ynadq?")
            if answer in ("y", "a"):
                taken.append(index)
        before, after = change.before, change.after
        if not taken:
            return None
        if before and after and before.mode != after.mode:
            if len(taken) < len(hunks):
                self.screen.host("its mode stays: that comes only with all of its hunks")
            elif not self._yes(f"Take its mode {before.mode:04o} → {after.mode:04o} too?", flush=True):
                return Choice(change.path, tuple(taken))
        return Choice(change.path, None if len(taken) == len(hunks) else tuple(taken))

    def _risks_accepted(self, change: FileChange) -> bool:
        present = {finding.risk for finding in change.findings}
        for risk in Risk:
            if risk not in present:
                continue
            if risk is not Risk.AUTO_EXECUTED:
                if not self._yes(f"{_MEANINGS[risk]} ({label(risk)}). Take it all the same?", flush=True):
                    return False
                continue
            name = change.path.rpartition("/")[2]
            answer = self.screen.ask(
                f"{_MEANINGS[risk]}. To take it all the same, type yes in full, or its name without folders:",
                flush=True,
            )
            if answer == "q":
                raise _Stop
            if answer != "yes" and (answer not in (name, shown(name)) or len(name) < _LONG_ENOUGH):
                self.screen.host("not taken")
                return False
        return True

    def _hunk(self, change: FileChange, hunk: Hunk) -> str:
        """Show a hunk; returns what to add to the question if the person did not want to see all of it."""
        screen = self.screen
        screen.begin_page()
        screen.said(where_text(hunk, has_lines(change.before), has_lines(change.after)), "cyan")
        gone, come = [], []
        for row in (*rows_of(hunk), None):
            if row is not None and not row.same:
                marks = changed_within(row.old, row.new) if row.old is not None and row.new is not None else ([], [])
                if row.old is not None:
                    gone.append(pieces_of(row.old, _LINE, marks[0]))
                if row.new is not None:
                    come.append(pieces_of(row.new, _LINE, marks[1]))
                continue
            for pieces in gone:
                screen.guest(pieces, "red", "- ")
            for pieces in come:
                screen.guest(pieces, "green", "+ ")
            gone, come = [], []
            if row is not None and row.new is not None:
                screen.guest(pieces_of(row.new, _LINE), "", "  ")
        return _UNSEEN if screen.end_page() else ""

    def _finding(self, finding: Finding) -> None:
        line = f"line {finding.line}: " if finding.line else ""
        style = "bold red" if finding.blocks else "yellow"
        self.screen.said(f"{label(finding.risk)}: {line}{said(finding)}", style, "! ")

    def _fitting(self) -> list[Choice]:
        """What was chosen, with the folders that end with it, without what does not go without the rest."""
        folders = {
            change.path
            for change in self.review.changes
            if change.sort == "deleted" and can_be_taken(change) and self._comes_with_others(change)
        }
        kept = holding_together(self.review, {*self.chosen, *folders})
        for path in self.chosen:
            if path not in kept:
                self.screen.host("left out: it does not go without a change that was not taken", "bold yellow")
                self.screen.said(shown(path, _PATH))
        return [self.chosen.get(one.path, Choice(one.path)) for one in self.review.changes if one.path in kept]

    def _confirmed(self, choices: list[Choice]) -> tuple[Choice, ...]:
        screen = self.screen
        screen.host()
        if not choices:
            screen.host("nothing is taken", "bold yellow")
            return ()
        by_path = {change.path: change for change in self.review.changes}
        screen.begin_page()
        screen.host(f"to be written into the project: {len(choices)} of {len(self.review.changes)} changes")
        for path, hunks in choices:
            change = by_path[path]
            part = f"   ({len(hunks)} of {len(change.hunks or ())} hunks)" if hunks is not None else ""
            screen.said(_names(change) + part, "", f"{sort_text(change):<15}")
        screen.end_page()
        answer = screen.ask(f"Write this (of review {self.review.digest[:12]})? Type yes in full:", flush=True)
        if answer == "yes":
            return tuple(choices)
        screen.host("nothing is taken", "bold yellow")
        return ()

    def _yes(self, question: str, flush: bool = False) -> bool:
        return self._letter(question, "ynq?", flush) == "y"

    def _letter(self, question: str, letters: str, flush: bool = False) -> str:
        """One of the letters but `?` and `q`, which are dealt with here."""
        while True:
            answer = self.screen.ask(f"{question} [{','.join(letters)}]", flush).lower()
            if answer == "q":
                raise _Stop
            if answer and answer != "?" and answer in tuple(letters):
                return answer
            for letter in letters:
                self.screen.host(f"  {letter}  {_HELP[letter]}", "")


def _names(change: FileChange) -> str:
    return (f"{shown(change.old_path, _PATH)} → " if change.old_path else "") + shown(change.path, _PATH)
