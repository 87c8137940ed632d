"""The one gateway to outside programs.

Every program runs without a shell, with an argument list, an environment made from nothing but what is named
here, a deadline, and its last words kept for the error. A test replaces `Programs` with a subclass.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from vmsandbox.errors import HostError

# What a program of the host may inherit. Nothing else passes: no LD_*, no GIT_*, no PYTHON*, no secrets.
_INHERITED = (
    "PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TMPDIR", "XDG_RUNTIME_DIR", "XDG_CACHE_HOME",
    "XDG_CONFIG_HOME", "http_proxy", "https_proxy", "no_proxy",
)  # fmt: skip
_LAST_WORDS = 4000  # characters of output kept in an error


@dataclass(frozen=True)
class Finished:
    """A program that has ended: its exit status (negative: killed by that signal) and its output."""

    argv: tuple[str, ...]
    status: int
    stdout: bytes
    stderr: bytes

    @property
    def text(self) -> str:
        """stdout as text."""
        return self.stdout.decode("utf-8", "replace")

    @property
    def last_words(self) -> str:
        """The end of what it said, stderr first, for an error's details."""
        said = (self.stderr or self.stdout).decode("utf-8", "replace").strip()
        return said[-_LAST_WORDS:]


@dataclass(frozen=True)
class Piped:
    """A program that runs, joined to this process by pipes (unbuffered on this side)."""

    pid: int
    stdin: IO[bytes]
    stdout: IO[bytes]
    stderr: IO[bytes]
    wait: Callable[[float], int]


class Programs:
    """Runs outside programs on the host."""

    def find(self, name: str) -> str | None:
        """The program's path, or None. Looks in the sbin folders too, which a user's PATH may lack."""
        path = os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin"
        return shutil.which(name, path=path)

    def run(
        self,
        argv: Sequence[str | Path],
        *,
        timeout: float = 60,
        check: bool = True,
        stdin: bytes | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        on_line: Callable[[str], None] | None = None,
    ) -> Finished:
        """Run one program to its end.

        Args:
            argv: the program and its arguments; never a shell line.
            timeout: seconds until it is killed.
            check: a non-zero status is an error.
            stdin: what it reads; empty by default.
            env: variables added to the inherited few.
            cwd: its working directory.
            on_line: called with each line of its stderr as it comes (progress of long programs).

        Raises:
            HostError: it is not installed, ran longer than `timeout`, or (with `check`) failed.
        """
        words = [os.fspath(word) for word in argv]
        program = self.find(words[0])
        if program is None:
            raise HostError(
                f"{words[0]} is not installed",
                resolution="run `vmsandbox doctor --fix` to see and install what is missing",
            )
        try:
            child = subprocess.Popen(
                [program, *words[1:]],
                stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=_environment(env),
                cwd=cwd,
                process_group=0,
            )
        except OSError as error:
            raise HostError(f"{words[0]} could not be started", details=str(error)) from error
        try:
            if on_line is None:
                stdout, stderr = child.communicate(stdin, timeout=timeout)
            else:
                stdout, stderr = _follow(child, timeout, on_line)
        except subprocess.TimeoutExpired:
            _end(child)
            raise HostError(f"{words[0]} did not end within {timeout:g} seconds", details=shlex.join(words)) from None
        except BaseException:
            _end(child)  # Ctrl-C must not leave a build running
            raise
        finished = Finished(tuple(words), child.returncode, stdout, stderr)
        if check and finished.status != 0:
            raise HostError(
                f"{words[0]} failed with status {finished.status}",
                details=f"$ {shlex.join(words)}\n{finished.last_words}",
            )
        return finished

    @contextmanager
    def piped(self, argv: Sequence[str | Path], *, pass_fds: Sequence[int] = ()) -> Iterator[Piped]:
        """A program that runs beside this one, with pipes to and from it and an empty environment.

        Args:
            argv: the program's absolute path and its arguments.
            pass_fds: descriptors that it inherits under the same numbers; no other one.

        It is killed, with all that it started, at the end of the context.
        """
        words = [os.fspath(word) for word in argv]
        try:
            child = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                env={"LC_ALL": "C.UTF-8"},
                cwd="/",
                pass_fds=tuple(pass_fds),
                process_group=0,
            )
        except OSError as error:
            raise HostError(f"{words[0]} could not be started", details=str(error)) from error
        assert child.stdin is not None and child.stdout is not None and child.stderr is not None

        def wait(seconds: float) -> int:
            try:
                return child.wait(seconds)
            except subprocess.TimeoutExpired:
                raise HostError(f"{words[0]} did not end within {seconds:g} seconds") from None

        try:
            yield Piped(child.pid, child.stdin, child.stdout, child.stderr, wait)
        finally:
            if child.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, 9)
                child.wait()
            for pipe in (child.stdin, child.stdout, child.stderr):
                with suppress(OSError):
                    pipe.close()

    def detached(
        self, argv: Sequence[str | Path], *, log: Path, env: Mapping[str, str] | None = None
    ) -> tuple[int, IO[bytes], IO[bytes]]:
        """Start a program that outlives this process and its terminal: its pid, pipes to its stdin and from its stdout.

        Args:
            argv: the program's absolute path and its arguments.
            log: file that its stderr is appended to (made with mode 0600).
            env: variables added to the inherited few.

        Raises:
            HostError: it could not be started.
        """
        words = [os.fspath(word) for word in argv]
        try:
            fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                child = subprocess.Popen(
                    words,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=fd,
                    bufsize=0,
                    env=_environment(env),
                    cwd="/",
                    start_new_session=True,
                )
            finally:
                os.close(fd)
        except OSError as error:
            raise HostError(f"{words[0]} could not be started", details=str(error)) from error
        assert child.stdin is not None and child.stdout is not None
        child.returncode = 0  # it is nobody's to wait for: without this, Python complains of a child left running
        return child.pid, child.stdin, child.stdout

    @contextmanager
    def holding(self, fd: int, user: tuple[int, int]) -> Iterator[int]:
        """A process of another user that does nothing but hold a descriptor open, under the same number.

        Yields its pid. A process may look into /proc/PID/fd only of its own user's processes.
        """
        try:
            child = subprocess.Popen(
                ["/bin/cat"],  # not the one on PATH, which may lie where this user cannot look
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                env={},
                pass_fds=(fd,),
                user=user[0],
                group=user[1],
                extra_groups=(),
            )
        except OSError as error:
            raise HostError("/bin/cat could not be started", details=str(error)) from error
        try:
            yield child.pid
        finally:
            assert child.stdin is not None
            child.stdin.close()  # it reads the end of its input and goes
            child.wait()


def _environment(extra: Mapping[str, str] | None) -> dict[str, str]:
    env = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    env["PATH"] = env.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin"
    env["LC_ALL"] = "C.UTF-8"
    env.update(extra or {})
    return env


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill a child with all that it started (it leads a process group of its own) and reap it."""
    for ask in (15, 9):
        try:
            os.killpg(child.pid, ask)
        except ProcessLookupError:
            break
        try:
            child.wait(timeout=5)
            break
        except subprocess.TimeoutExpired:
            continue
    child.wait()
    for pipe in (child.stdin, child.stdout, child.stderr):
        if pipe is not None:
            pipe.close()


def _follow(child: subprocess.Popen[bytes], timeout: float, on_line: Callable[[str], None]) -> tuple[bytes, bytes]:
    """Pass stderr on line by line; stdout is drained by a thread so that neither pipe can block the child."""
    import threading

    out: list[bytes] = []
    err: list[bytes] = []

    def drain(pipe: IO[bytes]) -> None:
        out.append(pipe.read())

    assert child.stdout is not None and child.stderr is not None
    reader = threading.Thread(target=drain, args=(child.stdout,), daemon=True)
    reader.start()
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        os.killpg(child.pid, 9)

    alarm = threading.Timer(timeout, expire)
    alarm.start()
    try:
        for line in child.stderr:
            err.append(line)
            on_line(line.decode("utf-8", "replace").rstrip())
        child.wait()
    finally:
        alarm.cancel()
    reader.join()
    if expired.is_set():
        raise subprocess.TimeoutExpired(child.args, timeout)
    return b"".join(out), b"".join(err)
