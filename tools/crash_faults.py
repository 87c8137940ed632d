"""A home that faults can be made to: a program that waits at a step of its own, and what happens to it there.

A private home is in a mount and network namespace of its own (see `crash_matrix`), with a libvirtd of its own.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests" / "guest")]

from harness import PROGRAM, Cli, leftovers, wait_for  # noqa: E402

from vmsandbox.ledger.book import Ledger  # noqa: E402
from vmsandbox.ledger.processes import processes_of  # noqa: E402
from vmsandbox.render.network import CardPlan, bridge_of, name_prefix, table_of, tap_of  # noqa: E402

FAULTS = ("kill", "int", "term", "hup", "terminal", "enospc", "qemu", "suspend")
PRIVATE_FAULTS = ("libvirtd", "full", "readonly", "restart")
DEADLINE = 240.0  # seconds for one command, on a busy machine
_SIGNALS = {"kill": signal.SIGKILL, "int": signal.SIGINT, "term": signal.SIGTERM, "hup": signal.SIGHUP}
_OURS = re.compile(r"-cm(?:-[a-z]+)?-[0-9a-f]{6}$|^template:")


class Home:
    """A home, what is in it, and the faults that can be made to it."""

    def __init__(self, home: Path, log: Path) -> None:
        self.cli = Cli(home)
        self.log = log
        self.layout = self.cli.layout
        self.libvirtd: subprocess.Popen[bytes] | None = None

    def everything(self) -> set[str]:
        """Each thing of this home that is there, as "what: which"."""
        found = {_sorted_word(word) for word in leftovers(self.cli.home)}
        for folder in (self.layout.live, self.layout.run, self.layout.templates, self.layout.images):
            # A link leads to what several homes share: others make templates there meanwhile. The ledger has ours.
            for path in [] if folder.is_symlink() else folder.rglob("*"):
                word = "sockets" if folder == self.layout.run else "files"
                if path.suffix not in (".lock", ".memory") and path.name != ".lock":
                    found.add(f"{word}: {path.relative_to(self.cli.home)}")
        # A record stays; what a killed process left halfway in it does not.
        for pattern in (".gone-*", "*/.gone-*", "*/.backup", "*/history-*", "*/commits-*", "*/quarantine.*"):
            found |= {f"files: {path.relative_to(self.cli.home)}" for path in self.layout.records.glob(pattern)}
        for record in self.layout.records.iterdir():
            name = CardPlan(record.name, self.layout.live, "", "").name
            for interface in (bridge_of(name), tap_of(name)):
                if Path("/sys/class/net", interface).exists():
                    found.add(f"taps: {interface}")
        for group in Path("/sys/fs/cgroup").glob("*/machine/qemu-*-vmsandbox-cm*"):
            with suppress(OSError):  # one in use is that of a guest, which is found, or of another matrix's
                if not any(path.read_text() for path in group.rglob("cgroup.procs")):
                    found.add(f"groups: {group.name}")
        prefix = name_prefix(self.layout.live)
        tables = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True)
        found |= {f"rules: {line}" for line in tables.stdout.splitlines() if table_of(prefix) in line}
        with Ledger.of(self.layout).transaction(write=False) as connection:
            for table in ("resources", "reservations", "queue"):
                found |= {f"ledger: {table} {row}" for row in connection.execute(f"SELECT * FROM {table}")}
        return found

    def guests(self) -> list[int]:
        """The QEMU processes of the session that is tried, or of the template that is made for it."""
        rows = [row for row in Ledger.of(self.layout).rows() if _OURS.search(row.session)]
        return [process.pid for row in rows if row.kind == "guest" for process in processes_of(row.identity)]

    # -- of a private home ---------------------------------------------------------------------------------

    def start_libvirtd(self) -> None:
        with self.log.open("ab") as log:
            self.libvirtd = subprocess.Popen(
                ["libvirtd", "-p", "/run/libvirt/libvirtd-own.pid"], stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        wait_for(lambda: subprocess.run(["virsh", "-q", "list"], capture_output=True).returncode == 0, 60, 0.2)

    def end_libvirtd(self) -> None:
        assert self.libvirtd is not None
        self.libvirtd.kill()
        self.libvirtd.wait()

    def fill(self) -> Path:
        filler = self.cli.home / "filler"
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(1 << 20))
        with filler.open("ab", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        return filler


def started(home: Home, words: list[str], failpoint: str, **options: object) -> subprocess.Popen[bytes]:
    cli = Cli(home.cli.home, {**home.cli.env, "VMSANDBOX_FAILPOINT": failpoint})
    return cli.start(*words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)


def wait_for_flag(process: subprocess.Popen[bytes], flag: Path) -> bool:
    """True when the program waits at its step; False if it ended before."""
    until = time.monotonic() + DEADLINE
    while not flag.exists():
        if process.poll() is not None or time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def run(home: Home, words: list[str], step: str, fault: str, flag: Path) -> tuple[int | None, str]:
    """(exit status, what it said); the status is None if the step was not reached."""
    flag.unlink(missing_ok=True)
    if fault == "enospc":
        process = started(home, words, f"{step}=enospc")
        out, _ = process.communicate(timeout=DEADLINE)
        return process.returncode, out.decode(errors="replace")
    if fault == "terminal":
        return _run_on_terminal(home, words, step, flag)
    process = started(home, words, f"{step}=tell:{flag}")
    if not wait_for_flag(process, flag):
        out, _ = process.communicate(timeout=DEADLINE)
        return None, out.decode(errors="replace")
    with _fault(home, fault, process):
        flag.unlink(missing_ok=True)
        try:
            out, _ = process.communicate(timeout=DEADLINE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out = process.communicate()[0] + b"\nTraceback: it did not end"
    return process.returncode, out.decode(errors="replace")


def _run_on_terminal(home: Home, words: list[str], step: str, flag: Path) -> tuple[int | None, str]:
    """In a terminal of its own, which is closed."""
    ours, its = pty.openpty()
    environment = {**home.cli.environment, "VMSANDBOX_FAILPOINT": f"{step}=tell:{flag}"}

    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        [*PROGRAM, *words], stdin=its, stdout=its, stderr=its, env=environment, cwd="/", preexec_fn=take_terminal
    )
    os.close(its)
    os.set_blocking(ours, False)
    until = time.monotonic() + DEADLINE
    while not flag.exists() and process.poll() is None and time.monotonic() < until:
        with suppress(OSError):
            os.read(ours, 65536)
        time.sleep(0.01)
    reached = flag.exists()
    os.close(ours)  # the hangup
    flag.unlink(missing_ok=True)
    try:
        process.wait(DEADLINE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return process.returncode, "Traceback: it did not end"
    return process.returncode if reached else None, ""


@contextmanager
def _fault(home: Home, fault: str, process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Make a fault happen to a program that waits at its step; what can be taken back is, afterwards."""
    if fault in _SIGNALS:
        os.kill(process.pid, _SIGNALS[fault])
        yield
    elif fault == "qemu":
        for pid in home.guests():
            os.kill(pid, signal.SIGKILL)
        yield
    elif fault == "suspend":
        group = [process.pid, *home.guests()]
        for pid in group:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(3)
        for pid in group:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        yield
    elif fault == "libvirtd":
        home.end_libvirtd()
        home.start_libvirtd()
        yield
    elif fault == "full":
        filler = home.fill()
        yield
        filler.unlink()
    elif fault == "readonly":
        # No writer may have a file open, so it is a bind mount that becomes read-only, not the file system.
        subprocess.run(["mount", "--bind", str(home.cli.home), str(home.cli.home)], check=True)
        remount = ["mount", "-o", "remount,ro,bind", str(home.cli.home)]
        # busy while another thread of the program has a file open in it
        wait_for(lambda: subprocess.run(remount, stderr=subprocess.DEVNULL).returncode == 0, 20, 0.01)
        yield
        subprocess.run(["umount", "-l", str(home.cli.home)], check=True)
    elif fault == "restart":
        for pid in [process.pid, *home.guests(), *_helpers(home)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        home.end_libvirtd()
        shutil.rmtree(home.layout.run, ignore_errors=True)
        shutil.rmtree("/run/libvirt/qemu", ignore_errors=True)
        # libvirt forgets whom these belong to when the host has booted anew, which it has not here
        for path in Path("/var/lib/libvirt/qemu").glob("domain-*"):
            shutil.rmtree(path, ignore_errors=True)
        yield
        home.start_libvirtd()
    else:
        raise ValueError(f"unknown fault {fault!r}")


def _helpers(home: Home) -> list[int]:
    words = (leftover.split() for leftover in leftovers(home.cli.home))
    return [int(word[-1]) for word in words if word[-1].isdigit() and word[0] in ("session's", "keeper")]


def _sorted_word(word: str) -> str:
    if word.startswith(("QEMU", "keeper")) or "process" in word:
        return f"processes: {word}"
    return f"domains: {word}" if word.startswith("domain") else f"files: {word}"


def _mount_own_sysfs() -> None:
    """/sys shows the interfaces of the network namespace that it was mounted in; the control groups stay."""
    subprocess.run(["mount", "--rbind", "/sys/fs/cgroup", "/mnt"], check=True)
    subprocess.run(["mount", "-t", "sysfs", "none", "/sys"], check=True)
    subprocess.run(["mount", "--move", "/mnt", "/sys/fs/cgroup"], check=True)


def hear_signals() -> None:
    """Programs that we start hear what we send, also where we were started in the background of a script."""
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@contextmanager
def private_home(source: Path, size: str, log: Path) -> Iterator[Home]:
    """In namespaces of our own (`--private` has started us there): a libvirtd, and a small home in memory."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    _mount_own_sysfs()
    for folder in ("/run/libvirt", "/var/lib/libvirt"):
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "none", folder], check=True)
    place = Path(f"/mnt/cm{os.getpid()}")  # processes are told apart by it, and another matrix may run
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=711", "none", "/mnt"], check=True)
    place.mkdir(mode=0o711)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"mode=711,size={size}", "none", str(place)], check=True)
    for name in ("images", "templates", "cache"):
        if (source / name).is_dir():
            subprocess.run(["cp", "-a", "--sparse=always", str(source / name), str(place)], check=True)
    with log.open("ab") as file:
        own = ["virtlogd", "-p", "/run/libvirt/virtlogd-own.pid"]
        virtlogd = subprocess.Popen(own, stdout=file, stderr=file, stdin=subprocess.DEVNULL)
    home = Home(place, log)
    home.start_libvirtd()
    try:
        yield home
    finally:
        with suppress(Exception):
            home.cli("stop", "--all", status=None)
        home.end_libvirtd()
        virtlogd.kill()
        virtlogd.wait()
