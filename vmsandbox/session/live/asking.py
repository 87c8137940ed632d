"""Answers what a guest asks about commands, while this process is attached to it, and writes it down.

Without this a `require_confirmation` could only mean no. One process of a session answers at a time (a lock in the
session's folder); a guest that finds nobody at the port takes it for no, at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any

from vmsandbox.errors import GuestError, VmsandboxError
from vmsandbox.guest.ask import AskPort, Denied, Message, Question, Withdrawn
from vmsandbox.journal import events
from vmsandbox.journal.chain import Journal
from vmsandbox.review.text import shown
from vmsandbox.session.state.folder import SessionFolder

MERGE_SECONDS = 10.0  # a refusal of the same kind is written again at most this often
MOST_KINDS = 100  # of refusals, told apart; further ones are counted together
MOST_QUESTIONS = 500  # that are written down one by one
MOST_LATER = 1000
RETRY_SECONDS = 1.0
NO_TERMINAL = "no terminal"

# Asks a person: gets the question, and what tells whether it is still wanted; returns yes, no, always, or why not.
Person = Callable[[Question, Callable[[], bool]], str]


def answered_by(answer: Callable[[Question], bool] | None) -> Person | None:
    """A program in the place of a person."""
    return None if answer is None else lambda question, _is_wanted: "yes" if answer(question) else "no"


class Asking:
    """`guest.streams.Attention` for the guest's questions. Use as a context; the port is given back at its end.

    person: asks whoever sits there; None: nobody does, and all that is asked is refused.
    """

    def __init__(self, folder: SessionFolder, journal: Journal, person: Person | None) -> None:
        self.reading = threading.Lock()
        self._folder, self._journal, self._person = folder, journal, person
        self._port: AskPort | None = None
        self._held = ExitStack()
        self._next_try = 0.0
        self._nudge_at = 0.0
        self._questions = 0
        self._later: list[Message] = []  # what came while the person was asked
        self._refusals: dict[tuple[str, str], list[float]] = {}  # (command, rule): [last written, times since]

    def __enter__(self) -> Asking:
        self._listen()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()
        for (command, rule), (_written, waiting) in self._refusals.items():
            if waiting:
                self._write(events.CommandDenied(command, rule, int(waiting)))

    def sources(self) -> list[Any]:
        """The port, while we have it."""
        return [self._port] if self._port is not None else []

    def attend(self) -> bool:
        """Take what has arrived; ask the person. Returns whether the terminal was used."""
        if self._port is None and time.monotonic() >= self._next_try:
            self._listen()
        if self._port is None:
            return False
        used = False
        try:
            messages = self._later + self._port.messages()
            self._later = []
            if self._nudge_at and time.monotonic() >= self._nudge_at:
                self._nudge_at = 0.0
                self._port.nudge()
            for number, message in enumerate(messages):
                if isinstance(message, Denied):
                    self._refused(message.command, message.rule, message.times)
                elif isinstance(message, Question) and Withdrawn(message.id) not in messages[number:]:
                    used = self._asked(message) or used
        except GuestError:
            self._leave()
            self._next_try = float("inf")  # gone, or talking nonsense: from now on the answer is no
        return used

    def _listen(self) -> None:
        """Try to be the one who answers: whoever was may have left."""
        self._next_try = time.monotonic() + RETRY_SECONDS
        with suppress(VmsandboxError, OSError):
            self._port = self._held.enter_context(self._folder.ask_port())

    def _leave(self) -> None:
        self._port = None
        self._held.close()

    def _asked(self, question: Question) -> bool:
        began = time.monotonic()
        assert self._port is not None
        if self._person is None:
            answer = NO_TERMINAL
        else:
            with self.reading:
                answer = self._person(question, lambda: self._is_wanted(question, began))
        self._port.answer(question.id, answer)
        self._nudge_at = time.monotonic() + 0.5
        self._questions += 1
        if self._questions <= MOST_QUESTIONS:
            self._write(
                events.CommandAsked(
                    list(question.argv), question.cwd, question.program, question.rule, answer,
                    "person" if answer in ("yes", "no", "always") else "", round(time.monotonic() - began, 3),
                )
            )  # fmt: skip
        else:
            self._refused("…", "asked too often", 1)
        return self._person is not None

    def _is_wanted(self, question: Question, began: float) -> bool:
        """Whether the guest still waits for the answer."""
        if time.monotonic() - began > question.seconds:
            return False
        assert self._port is not None
        if len(self._later) < MOST_LATER:
            self._later += self._port.messages()
        return Withdrawn(question.id) not in self._later

    def _refused(self, command: str, rule: str, times: int) -> None:
        """The first of its kind at once; the next ones together, now and then."""
        key = (shown(command, 300), shown(rule, 300))
        if key not in self._refusals and len(self._refusals) >= MOST_KINDS:
            key = ("…", "")
        now = time.monotonic()
        written, waiting = self._refusals.get(key, [float("-inf"), 0])
        if now - written >= MERGE_SECONDS:
            self._refusals[key] = [now, 0]
            self._write(events.CommandDenied(*key, int(waiting) + times))
        else:
            self._refusals[key] = [written, waiting + times]

    def _write(self, event: events.Event) -> None:
        with suppress(VmsandboxError):
            self._journal.append(event)
