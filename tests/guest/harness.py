"""How the guest tests drive the program: its command line as a process, guests they may break, and a look at
what is left on the host afterwards.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmsandbox.guest.ssh import GuestShell
from vmsandbox.hypervisor.connection import Host
from vmsandbox.paths import Layout
from vmsandbox.render.domain import METADATA_NS
from vmsandbox.session.sandbox import Sandbox
from vmsandbox.session.state.folder import SessionFolder
from vmsandbox.session.state.info import SessionInfo

PROGRAM = [sys.executable, "-m", "vmsandbox"]
REPOSITORY = Path(__file__).resolve().parents[2]
TIMEOUT = 120.0  # seconds for one command; a fork takes two or three under emulation


@dataclass
class Cli:
    """Runs `vmsandbox` with a home of the tests' own."""

    home: Path
    env: dict[str, str] = field(default_factory=dict)

    @property
    def layout(self) -> Layout:
        return Layout.from_environment({"VMSANDBOX_HOME": str(self.home)})

    @property
    def environment(self) -> dict[str, str]:
        own = {
            "VMSANDBOX_HOME": str(self.home),
            "VMSANDBOX_ALLOW_EMULATION": "1",
            "PYTHONPATH": str(REPOSITORY),
            "NO_COLOR": "1",
        }
        return {name: value for name, value in {**os.environ, **own, **self.env}.items() if value != ""}

    def __call__(
        self,
        *words: str | Path,
        stdin: bytes = b"",
        status: int | None = 0,
        timeout: float = TIMEOUT,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run one command line to its end; its status must be `status` (None: any)."""
        done = subprocess.run(
            [*PROGRAM, *map(str, words)],
            input=stdin,
            capture_output=True,
            timeout=timeout,
            env=self.environment,
            cwd=cwd or "/",
        )
        if status is not None:
            assert done.returncode == status, (
                f"{words}: status {done.returncode}\n{done.stdout[-2000:]!r}\n"
                f"{done.stderr.decode(errors='replace')[-4000:]}"
            )
        return done

    def json(self, *words: str | Path, **options: Any) -> Any:
        """The JSON document that a command prints."""
        at = words.index("--") if "--" in words else len(words)
        return json.loads(self(*words[:at], "--json", *words[at:], **options).stdout)

    def start(self, *words: str | Path, **options: Any) -> subprocess.Popen[bytes]:
        """Start one command line and go on; it leads a process group of its own, as from a shell."""
        return subprocess.Popen(
            [*PROGRAM, *map(str, words)],
            stdin=options.pop("stdin", subprocess.DEVNULL),
            stdout=options.pop("stdout", subprocess.PIPE),
            stderr=options.pop("stderr", subprocess.PIPE),
            env=self.environment,
            cwd="/",
            start_new_session=True,
            **options,
        )

    def guest(self, name: str) -> Guest:
        """A guest that runs already."""
        return Guest(self, name)


@dataclass
class Guest:
    """One running session."""

    cli: Cli
    name: str
    _sandbox: Sandbox | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def folder(self) -> SessionFolder:
        return SessionFolder(self.cli.layout, self.name)

    @property
    def info(self) -> SessionInfo:
        return self.folder.info()

    @property
    def qemu(self) -> int:
        """The process id of its QEMU."""
        return self.folder.qemu_pid(self.info)

    def exec(
        self, *words: str, stdin: bytes = b"", status: int | None = 0, timeout: float = TIMEOUT
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command through `vmsandbox exec`."""
        return self.cli("exec", self.name, "--", *words, stdin=stdin, status=status, timeout=timeout)

    def run(
        self, *words: str, stdin: bytes = b"", status: int | None = 0, timeout: float = TIMEOUT
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command over a connection that is kept: `exec` is a process and a login each time."""
        code, out, err = self.shell().run(words, stdin=stdin, timeout=timeout)
        assert status in (None, code), f"{words}: status {code}\n{out[-2000:]!r}\n{err[-2000:]!r}"
        return subprocess.CompletedProcess(words, code, out, err)

    def sh(self, script: str, *words: str, **options: Any) -> str:
        """stdout of a shell script in the project's folder, stripped (over the connection of `run`)."""
        folder = self.info.guest_folder or "."
        script_in_folder = ("sh", "-c", 'cd "$0" && exec sh -c "$@"', folder, script, "sh", *words)
        return self.run(*script_in_folder, **options).stdout.decode().strip()

    def journal(self) -> list[dict[str, Any]]:
        return self.folder.journal(self.info.id).read()

    def shell(self) -> GuestShell:
        """The connection of `run`."""
        if self._sandbox is None:
            self._sandbox = Sandbox.attach(self.name, layout=self.cli.layout)
        return self._sandbox.shell()

    def hang_up(self) -> None:
        """End the connection of `run`; the next use makes another one."""
        if self._sandbox is not None:
            self._sandbox.disconnect()
            self._sandbox = None

    def stop(self) -> None:
        self.hang_up()
        self.cli("stop", self.name, status=None)


def leftovers(home: Path) -> set[str]:
    """Everything of this installation that is alive or lies about, in words."""
    layout = Layout.from_environment({"VMSANDBOX_HOME": str(home)})
    found = {f"{folder.name}/{path.name}" for folder in (layout.live, layout.run) for path in folder.glob("*")}
    # Another worker's template in the making has a maker; one that this worker's made is seen by its guest, too.
    found |= {f"templates/{path.name}" for path in layout.templates.glob(".making-*") if not _is_held(path)}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = _command_of(process)
            if b"qemu-system" in command.split(b"\0")[0] and os.fsencode(home) + b"/" in command:
                found.add(f"QEMU {process.name}")
            elif os.fsencode(home) + b"/" in command and any(
                name in command for name in (b"egress_keeper", b"session.watcher", b"broker.child")
            ):
                found.add(f"session's process {process.name}")
            elif process.stat().st_uid >= 0x70000000 and command.startswith((b"cat\0", b"/bin/cat", b"/usr/bin/cat")):
                found.add(f"keeper {process.name}")
        except OSError:
            continue
    host = Host.open()
    try:
        for domain in host.list_sessions(METADATA_NS):
            if Path(domain.home).parent == home:
                found.add(f"domain {domain.name}")
    finally:
        host.close()
    return found


def _command_of(process: Path) -> bytes:
    """The words of a process in /proc. For an instant while it is started it has none; a zombie never has any again."""
    for _ in range(100):
        if (command := (process / "cmdline").read_bytes()) or not (process / "exe").exists():
            return command
        time.sleep(0.01)
    return b""


def _is_held(making: Path) -> bool:
    """Whether a process holds the lock of a template in the making (`making`: the folder or the lock)."""
    try:
        with (making if making.suffix == ".lock" else Path(f"{making}.lock")).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def new_leftovers(home: Path, before: set[str], patience: float = 15) -> set[str]:
    """What is there now and was not before; libvirt and PID 1 may take some seconds to notice an end."""
    until = time.monotonic() + patience
    while (left := leftovers(home) - before) and time.monotonic() < until:
        time.sleep(0.3)
    return left


def ended(process: subprocess.Popen[bytes], timeout: float = 60) -> tuple[int, bytes, bytes]:
    """(status, stdout, stderr) of a started command; killed with its group if it does not end."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return process.returncode, out or b"", err or b""


def kinds_of(left: set[str]) -> Counter[str]:
    """What there is, without what tells one guest of a session from the next."""
    return Counter(re.sub(r"[0-9a-f]{6}$|[0-9]+$", "", word) for word in left if not word.startswith("keeper"))


@contextmanager
def nothing_more(home: Path) -> Iterator[None]:
    """Nothing is left afterwards; but a session that was rolled back meanwhile has another guest: one, and no more."""
    before = kinds_of(leftovers(home))
    yield
    wait_for(lambda: kinds_of(leftovers(home)) <= before, timeout=20, every=0.3)


def wait_for(condition: Any, timeout: float = 60, every: float = 0.02) -> Any:
    """What `condition()` returns as soon as it is true; AssertionError after `timeout` seconds."""
    until = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < until, f"not within {timeout} seconds: {condition}"
        time.sleep(every)
    return value


def make_tree(root: Path, files: dict[str, bytes | str]) -> Path:
    """A folder with these files (path → content)."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def words_of(path: Path) -> Sequence[str]:
    """The NUL-separated words of a file in /proc."""
    return path.read_bytes().rstrip(b"\0").decode().split("\0")


def git(root: Path, *words: str) -> str:
    """Plain git with an identity; its stdout without the last newline."""
    identity = ["-c", "user.name=host", "-c", "user.email=host@example.org"]
    done = subprocess.run(["git", "-C", root, *identity, *words], check=True, capture_output=True, text=True)
    return done.stdout.rstrip("\n")


def tree_of(root: Path) -> dict[str, tuple[int, bytes]]:
    """Every path below a folder: its mode with the kind, and its bytes or where it leads."""
    found: dict[str, tuple[int, bytes]] = {}
    for path in sorted(root.rglob("*")):
        content = os.fsencode(os.readlink(path)) if path.is_symlink() else b"" if path.is_dir() else path.read_bytes()
        found[str(path.relative_to(root))] = (path.lstat().st_mode, content)
    return found
