"""The supervisor's line to a person: one question at a time over a port to the host, and what was refused.

Nobody attached means no, at once. The host's answers are the only bytes that are believed here; a question is sent
whole or not at all, because a person has to see every argument of what is asked.
"""

import errno
import json
import os
import select
import time

import vmsandbox_calls as calls

MOST_WAITING = 8
MOST_QUESTION = 16 << 10  # bytes
MOST_LINE = 4096
MOST_KINDS = 64
REPORT_EVERY = 1.0  # seconds
TICK = 0.5
NO_HOLDS = 5.0  # seconds, for the same process and the same arguments


class Asking:
    """port: path of the virtio-serial port. seconds: how long a person is waited for."""

    def __init__(self, port, seconds):
        self._port, self._seconds = port, seconds
        self._fd = -1
        self._pending = b""
        self._waiting = []  # [(call, judged)], the first of which the person sees
        self._until = 0.0
        self._number = 0
        self._always, self._noes = set(), {}
        self._denied, self._reported = {}, 0.0

    def patience(self):
        """Milliseconds that a poll may wait: under emulation a port's wake-up may be lost, so it is looked at."""
        if self._waiting:
            return TICK * 1000
        return REPORT_EVERY * 1000 if self._denied else None

    def port_to_watch(self):
        """The port's descriptor while an answer is waited for, else -1."""
        return self._fd if self._waiting else -1

    def is_always(self, judged):
        return _exactly(judged) in self._always

    def ask(self, call, judged):
        """Let it wait for a person. Returns why not, or None."""
        if self._noes.get(_by_whom(call, judged), 0) > time.monotonic():
            return "no"  # a shell goes through PATH, where /bin is /usr/bin: the same again
        if judged.cut or len(json.dumps(judged.argv)) > MOST_QUESTION:
            return "too long to be shown"
        if len(self._waiting) >= MOST_WAITING:
            return "too many questions wait"
        if not self._attached():
            return "nobody is there to be asked"
        self._waiting.append((call, judged))
        if len(self._waiting) == 1 and not self._send_first():
            self._waiting.pop()
            return "nobody is there to be asked"
        return None

    def denied(self, judged, why):
        """Count it, for the host's journal."""
        key = (shown_line(judged.argv, 120), why)
        if key not in self._denied and len(self._denied) >= MOST_KINDS:
            key = ("…", "")
        self._denied[key] = self._denied.get(key, 0) + 1

    def answers(self):
        """[((call, judged), None for yes or why not)], as far as there are any now."""
        found = []
        if self._waiting:
            self._drop_the_dead()
        if self._waiting:
            word = self._read_answer()
            if word is None and not self._attached():
                word = "nobody is there to be asked any more"
            if word is None and time.monotonic() > self._until:
                self._send({"gone": self._number})
                word = f"no answer in {self._seconds:g} seconds"
            if word is not None:
                question = self._waiting.pop(0)
                if word == "always":
                    self._always.add(_exactly(question[1]))
                elif word != "yes":
                    now = time.monotonic()
                    self._noes = {key: until for key, until in self._noes.items() if until > now}
                    self._noes[_by_whom(*question)] = now + NO_HOLDS
                found.append((question, None if word in ("yes", "always") else word))
                while self._waiting and not self._send_first():
                    found.append((self._waiting.pop(0), "nobody is there to be asked any more"))
        if self._denied and time.monotonic() - self._reported >= REPORT_EVERY and self._attached():
            self._report()
        return found

    def _drop_the_dead(self):
        first = self._waiting[0]
        alive = []
        for call, judged in self._waiting:
            try:
                call.check()
                alive.append((call, judged))
            except calls.Gone:
                pass
        self._waiting = alive
        if not alive or alive[0][0] is not first[0]:
            self._send({"gone": self._number})
            if alive:
                self._send_first()

    def _send_first(self):
        judged = self._waiting[0][1]
        self._number += 1
        self._until = time.monotonic() + self._seconds
        return self._send({"ask": {
            "id": self._number, "argv": judged.argv, "cwd": judged.folder, "program": judged.real, "rule": judged.why,
            "seconds": self._seconds,
        }})  # fmt: skip

    def _report(self):
        self._reported = time.monotonic()
        rows = [[line, why, times] for (line, why), times in self._denied.items()]
        if self._send({"denied": rows[:16]}, 0):
            for line, why, _times in rows[:16]:
                del self._denied[line, why]

    def _attached(self):
        """Whether a process of the host's holds the other end."""
        if self._fd < 0:
            try:
                self._fd = os.open(self._port, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError:
                return False
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return not any(events & (select.POLLHUP | select.POLLERR) for _fd, events in poll.poll(0))

    def _send(self, message, patience=1.0):
        """One line, after an empty one: what a connection before may have left half said ends there."""
        rest = b"\n" + json.dumps(message).encode() + b"\n"
        until = time.monotonic() + patience
        while rest:
            try:
                rest = rest[os.write(self._fd, rest) :]
            except OSError as error:
                if error.errno != errno.EAGAIN or time.monotonic() >= until or not self._attached():
                    return False
                time.sleep(0.01)
        return True

    def _read_answer(self):
        """yes, no or always to the question that is asked now; None if there is no such line."""
        try:
            data = os.read(self._fd, MOST_LINE)
        except OSError:
            return None
        self._pending += data
        *lines, self._pending = self._pending.split(b"\n")
        if len(self._pending) > MOST_LINE:
            self._pending = b""
        for line in lines:
            try:
                answer = json.loads(line)
                if answer["id"] == self._number:
                    return answer["answer"] if answer["answer"] in ("yes", "always") else str(answer["answer"])[:100]
            except (ValueError, KeyError, TypeError):
                continue
        return None


def _exactly(judged):
    return (tuple(judged.argv), judged.real, judged.folder, judged.identity)


def _by_whom(call, judged):
    return (call.pid, _exactly(judged))


def shown_line(argv, limit):
    """An argument list on one line of printable ASCII, quoted enough to tell the words apart."""
    return " ".join(ascii(word) if not word.isascii() or not word.isprintable() or not word or " " in word else word
                    for word in argv[:64])[:limit]  # fmt: skip
