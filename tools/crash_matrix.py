"""Whatever happens at whichever step: afterwards `gc` leaves nothing, the project is whole, and the next session works.

    python tools/crash_matrix.py --home HOME [--private] [--scenarios session,stop,…] [--steps fork,push.sent,…]
                                 [--faults kill,int,…] [--json FILE]

Each step is a failpoint of the program (`vmsandbox/failpoints.py`), found by running each scenario without a fault.
There the program waits, the fault is made from outside, and it goes on. What is counted afterwards is everything of the
home's: guests, processes, files, sockets, interfaces, firewall tables, rows of the ledger.

--private: in a mount and network namespace of its own, with a libvirtd of its own and the home on a small memory file
system: only so can a libvirtd be killed, a disk be filled or a state folder be read-only. HOME is copied from.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests" / "guest")]

from harness import PROGRAM, Cli, leftovers, wait_for  # noqa: E402

from vmsandbox.ledger.book import Ledger  # noqa: E402
from vmsandbox.render.network import CardPlan, bridge_of, name_prefix, table_of, tap_of  # noqa: E402
from vmsandbox.session.orphans import processes_of  # noqa: E402

FAULTS = ("kill", "int", "term", "hup", "terminal", "enospc", "qemu", "suspend")
PRIVATE_FAULTS = ("libvirtd", "full", "readonly", "restart")
DEADLINE = 240.0  # seconds for one command, on a busy machine
PATIENCE = 20.0  # seconds for libvirt and PID 1 to notice an end
_SIGNALS = {"kill": signal.SIGKILL, "int": signal.SIGINT, "term": signal.SIGTERM, "hup": signal.SIGHUP}
POLICY = "sandbox: {{filesystem: {{tmpfs: [{{path: /mnt/{}, size: 1M}}]}}}}\n"


@dataclass
class Outcome:
    """What became of one step with one fault."""

    scenario: str
    step: str
    fault: str
    status: int | None = None
    project: str = "-"
    left: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        return not self.left and not self.problems


class Home:
    """A home, what is in it, and the faults that can be made to it."""

    def __init__(self, home: Path, private: bool, log: Path) -> None:
        self.cli = Cli(home)
        self.private = private
        self.log = log
        self.layout = self.cli.layout
        self.libvirtd: subprocess.Popen[bytes] | None = None

    def everything(self) -> set[str]:
        """Each thing of this home that is there, as "what: which"."""
        found = {_sorted_word(word) for word in leftovers(self.cli.home)}
        for folder in (self.layout.live, self.layout.run, self.layout.templates, self.layout.images):
            for path in folder.rglob("*"):
                word = "sockets" if folder == self.layout.run else "files"
                if path.suffix not in (".lock", ".memory") and path.name != ".lock":
                    found.add(f"{word}: {path.relative_to(self.cli.home)}")
        # A record stays; what a killed process left halfway in it does not.
        for pattern in (".backup", "history-*", "commits-*", "quarantine.*"):
            found |= {f"files: {path.relative_to(self.cli.home)}" for path in self.layout.records.glob(f"*/{pattern}")}
        for record in self.layout.records.iterdir():
            name = CardPlan(record.name, self.layout.live, "", "").name
            for interface in (bridge_of(name), tap_of(name)):
                if Path("/sys/class/net", interface).exists():
                    found.add(f"taps: {interface}")
        prefix = name_prefix(self.layout.live)
        tables = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True)
        found |= {f"rules: {line}" for line in tables.stdout.splitlines() if table_of(prefix) in line}
        with Ledger.of(self.layout).transaction(write=False) as connection:
            for table in ("resources", "reservations", "queue"):
                found |= {f"ledger: {table} {row}" for row in connection.execute(f"SELECT * FROM {table}")}
        return found

    def guests(self) -> list[int]:
        """The QEMU processes of this home."""
        rows = Ledger.of(self.layout).rows()
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

    def remount(self, how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(self.cli.home)], check=True)


@dataclass
class Scenario:
    """Command lines that pass the steps: `prepare` without a fault, then `run` with it."""

    name: str
    words: Callable[[Path, int], list[str]]
    prepare: Callable[[Home, Path], None] = lambda _home, _project: None
    clean: Callable[[Home, Path], None] = lambda _home, _project: None


def _kept(home: Home, project: Path) -> None:
    home.cli("start", project, "--name", "cm-kept", timeout=DEADLINE)


def _killed(home: Home, project: Path) -> None:
    """Leave something for `gc`: a session whose process and a guest's folder are gone."""
    with tempfile.TemporaryDirectory() as folder:
        flag = Path(folder) / "flag"
        process = _started(
            home, ["session", str(project), "--name", "cm-dead", "--", "true"], f"fork.loaded=tell:{flag}"
        )
        _wait_for_flag(process, flag)
        process.kill()
        process.communicate()


def _stop(home: Home, _project: Path) -> None:
    home.cli("stop", "cm-kept", status=None)


def _tailored(project: Path, number: int) -> list[str]:
    (project / ".claude").mkdir(exist_ok=True)
    (project / ".claude/sandbox.yaml").write_text(POLICY.format(f"{os.getpid()}-{number}"))
    return ["session", str(project), "--name", "cm", "--", "true"]


WORK = "echo new >> file0; rm file1; echo made > made"
SCENARIOS = (
    Scenario(
        "session",
        lambda project, _: ["session", str(project), "--name", "cm", "--accept", "all", "--", "sh", "-c", WORK],
    ),
    Scenario("stop", lambda _project, _: ["stop", "cm-kept"], _kept, _stop),
    Scenario("gc", lambda _project, _: ["gc"], _killed),
    Scenario("tailor", _tailored),
    Scenario("template", lambda _project, number: ["session", "--empty", "--memory", str(304 + number), "--", "true"]),
    Scenario("filtered", lambda _project, _: ["session", "--empty", "--net", "filtered", "--", "true"]),
    Scenario("build", lambda _project, _: ["image", "build", "base"]),
)
DEFAULT_SCENARIOS = ("session", "stop", "gc")


def _started(home: Home, words: list[str], failpoint: str, **options: object) -> subprocess.Popen[bytes]:
    cli = Cli(home.cli.home, {**home.cli.env, "VMSANDBOX_FAILPOINT": failpoint})
    return cli.start(*words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)


def _wait_for_flag(process: subprocess.Popen[bytes], flag: Path) -> bool:
    """True when the program waits at its step; False if it ended before."""
    until = time.monotonic() + DEADLINE
    while not flag.exists():
        if process.poll() is not None or time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def new_project(folder: Path) -> Path:
    """A small project with a repository: what apply and the return work on."""
    project = folder / "project"
    shutil.rmtree(project, ignore_errors=True)
    project.mkdir(parents=True)
    for number in range(4):
        (project / f"file{number}").write_text(f"old {number}\n" * 50)
    return project


def steps_of(home: Home, scenario: Scenario, folder: Path) -> list[str]:
    """The failpoints that a scenario passes, in order, as NAME#K."""
    project, notes = new_project(folder), folder / "notes"
    notes.unlink(missing_ok=True)
    scenario.prepare(home, project)
    process = _started(home, scenario.words(project, 0), f"*=note:{notes}")
    out, _ = process.communicate(timeout=600)
    scenario.clean(home, project)
    assert process.returncode == 0, out.decode(errors="replace")
    counts: Counter[str] = Counter()
    steps = []
    for name in notes.read_text().split():
        counts[name] += 1
        # An apply has hundreds of steps: tests/unit/test_apply_faults.py tries each of them, without a guest.
        if counts[name] == 1 or not name.startswith("apply."):
            steps.append(f"{name}#{counts[name]}")
    return steps


def run_case(home: Home, scenario: Scenario, step: str, fault: str, folder: Path, number: int, after: bool) -> Outcome:
    """One step, one fault: what became of it. after: whether a session is run afterwards."""
    began = time.monotonic()
    outcome = Outcome(scenario.name, step, fault)
    project, flag = new_project(folder), folder / "flag"
    before = home.everything()
    scenario.prepare(home, project)
    try:
        outcome.status, said = _run(home, scenario.words(project, number), step, fault, flag)
        if outcome.status is None:
            outcome.problems.append("the step was not reached")
        if "Traceback" in said and fault not in ("int", "kill"):
            outcome.problems.append(said[said.index("Traceback") :][-300:])
    finally:
        scenario.clean(home, project)
    _check_cleaned(home, outcome, before)
    outcome.project = project_state(project)
    if outcome.project == "mixed":
        outcome.problems.append("the project is neither old nor new")
    if after:
        done = home.cli("session", "--empty", "--", "true", status=None, timeout=DEADLINE)
        if done.returncode:
            outcome.problems.append(f"the next session: {done.stderr.decode(errors='replace')[-300:]}")
    outcome.seconds = round(time.monotonic() - began, 1)
    return outcome


def _check_cleaned(home: Home, outcome: Outcome, before: set[str]) -> None:
    for attempt in ("gc", "gc once more"):
        done = home.cli("gc", "--json", status=None, timeout=DEADLINE)
        with suppress(ValueError):
            found = json.loads(done.stdout)
            outcome.problems += [f"{attempt}: {one['what']}: {one['problem']}" for one in found if one["problem"]]
            if attempt != "gc":
                outcome.problems += [f"{attempt} removed {one['kind']} {one['what']}" for one in found]
            continue
        outcome.problems.append(f"{attempt}: {done.stderr.decode(errors='replace')[-300:]}")
    until = time.monotonic() + PATIENCE
    while (left := home.everything() - before) and time.monotonic() < until:
        time.sleep(0.3)
    # A template that was finished before its maker was killed is a good one.
    left = {one for one in left if not re.match(r"files: templates/[0-9a-f]{32}(/|$)", one)}
    outcome.left = dict(Counter(word.partition(":")[0] for word in left))
    outcome.problems += sorted(left)[:5]


def _run(home: Home, words: list[str], step: str, fault: str, flag: Path) -> tuple[int | None, str]:
    """(exit status, what it said); the status is None if the step was not reached."""
    flag.unlink(missing_ok=True)
    if fault == "enospc":
        process = _started(home, words, f"{step}=enospc")
        out, _ = process.communicate(timeout=DEADLINE)
        return process.returncode, out.decode(errors="replace")
    if fault == "terminal":
        return _run_on_terminal(home, words, step, flag)
    process = _started(home, words, f"{step}=tell:{flag}")
    if not _wait_for_flag(process, flag):
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
        subprocess.run(["mount", "-o", "remount,ro,bind", str(home.cli.home)], check=True)
        yield
        subprocess.run(["umount", "-l", str(home.cli.home)], check=True)
    elif fault == "restart":
        for pid in [process.pid, *home.guests(), *_helpers(home)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        home.end_libvirtd()
        shutil.rmtree(home.layout.run, ignore_errors=True)
        shutil.rmtree("/run/libvirt/qemu", ignore_errors=True)
        yield
        home.start_libvirtd()
    else:
        raise ValueError(f"unknown fault {fault!r}")


def _helpers(home: Home) -> list[int]:
    words = (leftover.split() for leftover in leftovers(home.cli.home))
    return [int(word[-1]) for word in words if word[-1].isdigit() and word[0] in ("session's", "keeper")]


def project_state(project: Path) -> str:
    """`old` or `new`, or `mixed`, which must not be."""
    names = {path.name for path in project.iterdir()} - {".claude"}
    first = (project / "file0").read_text() if "file0" in names else ""
    if names == {f"file{number}" for number in range(4)} and first == "old 0\n" * 50:
        return "old"
    if names == {"file0", "file2", "file3", "made"} and first == "old 0\n" * 50 + "new\n":
        return "new"
    return "mixed"


def _sorted_word(word: str) -> str:
    if word.startswith(("QEMU", "keeper")) or "process" in word:
        return f"processes: {word}"
    return f"domains: {word}" if word.startswith("domain") else f"files: {word}"


def print_table(outcomes: list[Outcome]) -> None:
    """step × fault → outcome: the exit status, `ok`, or what was left."""
    faults = list(dict.fromkeys(one.fault for one in outcomes))
    cells = {(one.scenario, one.step, one.fault): one for one in outcomes}
    rows = list(dict.fromkeys((one.scenario, one.step) for one in outcomes))
    width = max(len(f"{scenario} {step}") for scenario, step in rows)
    print(f"{'step':<{width}}  " + "  ".join(f"{fault:<9}" for fault in faults))
    for scenario, step in rows:
        found = [cells.get((scenario, step, fault)) for fault in faults]
        words = ["-" if one is None else f"{'ok' if one.good else 'FAIL'} {one.status}" for one in found]
        print(f"{scenario + ' ' + step:<{width}}  " + "  ".join(f"{word:<9}" for word in words).rstrip())
    kinds = ("domains", "processes", "files", "sockets", "taps", "rules", "ledger")
    total = Counter(dict.fromkeys(kinds, 0))
    for one in outcomes:
        total.update(one.left)
    print(f"\n{len(outcomes)} cases, {sum(not one.good for one in outcomes)} bad; left behind: "
          + ", ".join(f"{total[kind]} {kind}" for kind in kinds))  # fmt: skip
    for one in outcomes:
        for problem in one.problems:
            print(f"  {one.scenario} {one.step} {one.fault}: {problem}")


@contextmanager
def private_home(source: Path, size: str, log: Path) -> Iterator[Home]:
    """In namespaces of our own (`--private` has started us there): a libvirtd, and a small home in memory."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    for folder in ("/run/libvirt", "/var/lib/libvirt"):
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "none", folder], check=True)
    place = Path("/mnt/cm")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=711", "none", "/mnt"], check=True)
    place.mkdir(mode=0o711)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"mode=711,size={size}", "none", str(place)], check=True)
    for name in ("images", "templates", "cache"):
        if (source / name).is_dir():
            subprocess.run(["cp", "-a", "--sparse=always", str(source / name), str(place)], check=True)
    with log.open("ab") as file:
        own = ["virtlogd", "-p", "/run/libvirt/virtlogd-own.pid"]
        virtlogd = subprocess.Popen(own, stdout=file, stderr=file, stdin=subprocess.DEVNULL)
    home = Home(place, True, log)
    home.start_libvirtd()
    try:
        yield home
    finally:
        with suppress(Exception):
            home.cli("stop", "--all", status=None)
        home.end_libvirtd()
        virtlogd.kill()
        virtlogd.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--size", default="4g", help="of the private home")
    parser.add_argument("--scenarios", default=",".join(DEFAULT_SCENARIOS))
    parser.add_argument("--steps", default="", help="beginnings of steps (default: all)")
    parser.add_argument("--faults", default="", help="default: all that can be made here")
    parser.add_argument("--next-every", type=int, default=5, help="a whole session after every n-th case")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.private and os.environ.get("CRASH_MATRIX_INSIDE") != "1":
        os.environ["CRASH_MATRIX_INSIDE"] = "1"
        os.execvp("unshare", ["unshare", "-m", "-n", "--propagation", "private", sys.executable, *sys.argv])
    faults = (
        arguments.faults.split(",") if arguments.faults else [*FAULTS, *(PRIVATE_FAULTS if arguments.private else ())]
    )
    with tempfile.TemporaryDirectory(prefix="crash-", dir="/var/tmp") as temporary:
        folder = Path(temporary)
        folder.chmod(0o711)
        log = folder / "daemons.log"
        if not arguments.private:
            return _matrix(Home(arguments.home.absolute(), False, log), arguments, faults, folder)
        with private_home(arguments.home.absolute(), arguments.size, log) as home:
            return _matrix(home, arguments, faults, folder)


def _matrix(home: Home, arguments: argparse.Namespace, faults: list[str], folder: Path) -> int:
    outcomes: list[Outcome] = []
    wanted = tuple(filter(None, arguments.steps.split(",")))
    home.cli("session", "--empty", "--", "true", timeout=600)
    for name in arguments.scenarios.split(","):
        scenario = next(one for one in SCENARIOS if one.name == name)
        steps = [step for step in steps_of(home, scenario, folder) if not wanted or step.startswith(wanted)]
        for step in steps:
            for fault in faults:
                number = len(outcomes) + 1
                outcome = run_case(home, scenario, step, fault, folder, number, number % arguments.next_every == 0)
                outcomes.append(outcome)
                mark = "ok" if outcome.good else f"FAIL {outcome.problems}"
                print(f"{name} {step} {fault}: status {outcome.status}, {outcome.project}, {outcome.seconds} s: {mark}",
                      file=sys.stderr, flush=True)  # fmt: skip
    print_table(outcomes)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(one) for one in outcomes], indent=1))
    return 0 if outcomes and all(one.good for one in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
