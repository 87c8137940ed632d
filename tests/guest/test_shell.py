"""`shell` on a real terminal: sizes, Ctrl-C, UTF-8, exit status, and the terminal as it was afterwards."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator

import pytest
from harness import PROGRAM, Guest


class Terminal:
    """A pseudo-terminal with a `vmsandbox` command on it."""

    def __init__(self, guest: Guest, *words: str, rows: int = 30, columns: int = 100) -> None:
        self.master, self.slave = pty.openpty()
        self.resize(rows, columns)
        self.before = termios.tcgetattr(self.slave)
        self.output = b""
        self.process = subprocess.Popen(
            [*PROGRAM, *words],
            stdin=self.slave, stdout=self.slave, stderr=self.slave,
            env={**guest.cli.environment, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}, cwd="/",
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: str | bytes) -> None:
        os.write(self.master, text.encode() if isinstance(text, str) else text)

    def read(self, seconds: float) -> bytes:
        if select.select([self.master], [], [], seconds)[0]:
            self.output += os.read(self.master, 65536)
        return self.output

    def expect(self, pattern: str, timeout: float = 30) -> re.Match[bytes]:
        """Wait for output that matches; it and what came before is taken away."""
        until = time.monotonic() + timeout
        while not (found := re.search(pattern.encode(), self.output)):
            assert time.monotonic() < until, f"{pattern!r} did not come: {self.output!r}"
            self.read(0.2)
        self.output = self.output[found.end() :]
        return found

    def status(self, timeout: float = 30) -> int:
        """The exit status, with what is written meanwhile read."""
        until = time.monotonic() + timeout
        while self.process.poll() is None:
            assert time.monotonic() < until, self.output
            self.read(0.05)
        while select.select([self.master], [], [], 0.1)[0]:
            self.output += os.read(self.master, 65536)
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def terminal(guest: Guest) -> Iterator[Terminal]:
    opened = Terminal(guest, "shell", guest.name)
    yield opened
    opened.close()


def test_a_shell_is_a_real_terminal(terminal: Terminal, guest: Guest) -> None:
    terminal.expect(r"\$ ")
    terminal.type("tty; stty size; pwd; echo $TERM\r")
    terminal.expect(r"/dev/pts/\d+\r\n30 100\r\n/home/claude-worker/projects/demo\r\nxterm-256color")

    for columns in range(34, 134):  # as when a window is dragged: one change while another is being told
        terminal.resize(50, columns)
        os.killpg(terminal.process.pid, signal.SIGWINCH)
        terminal.read(0)
    time.sleep(0.5)
    terminal.type("stty size\r")
    terminal.expect(r"50 133")

    terminal.type("printf '%s|' 'ü€😀' | od -An -tx1; echo é'√'\r")
    terminal.expect(r"c3 bc e2 82 ac f0 9f 98 80 7c")
    terminal.expect("é√\r\n")

    terminal.type("sleep 100\r")
    terminal.expect("sleep 100")
    time.sleep(1)
    began = time.monotonic()
    terminal.type(b"\x03")
    terminal.expect(r"\^C")
    terminal.type("echo status $?\r")
    terminal.expect("status 130")
    assert time.monotonic() - began < 15
    assert terminal.process.poll() is None, "Ctrl-C ended the client"

    assert termios.tcgetattr(terminal.slave) != terminal.before, "not raw: keys would act on the host"
    terminal.type("exit 37\r")
    assert terminal.status() == 37
    assert termios.tcgetattr(terminal.slave) == terminal.before
    assert terminal.output.endswith(b"\x1b[?25h\x1b[0m"), "modes that a program left on"


def test_a_shell_that_is_cut_off_gives_the_terminal_back(terminal: Terminal) -> None:
    terminal.expect(r"\$ ")
    os.kill(terminal.process.pid, signal.SIGTERM)
    assert terminal.status() == 143
    assert termios.tcgetattr(terminal.slave) == terminal.before


def test_without_a_terminal_a_shell_reads_its_commands(guest: Guest) -> None:
    done = guest.cli("shell", guest.name, stdin=b"echo from $(whoami)\nexit 5\n", status=5)
    assert done.stdout == b"from claude-worker\n"


def test_a_commands_output_on_a_terminal_is_filtered(guest: Guest) -> None:
    """Outside a shell, what the guest writes must not drive the terminal (clipboard, title, queries)."""
    script = (
        r"printf 'A\033]52;c;aGk=\007B\033[6nC\033]0;t\007D\033[31mE\033[0m\n'; printf '\033P$qm\033\\F\033[2JG\n' >&2"
    )
    terminal = Terminal(guest, "exec", guest.name, "--", "bash", "-c", script)
    try:
        assert terminal.status() == 0
        assert b"ABCD\x1b[31mE\x1b[0m" in terminal.output and b"FG" in terminal.output
        assert re.sub(rb"\x1b\[\d+m", b"", terminal.output).count(b"\x1b") == 0
        # No answer of the terminal's was typed to us: nothing waits on the host's input.
        assert select.select([terminal.slave], [], [], 0)[0] == []
    finally:
        terminal.close()
    raw = guest.exec("bash", "-c", script)
    assert b"\x1b]52;c;aGk=\x07" in raw.stdout, "into a file it goes as it is"
