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
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from crash_faults import (
    DEADLINE,
    FAULTS,
    PRIVATE_FAULTS,
    Home,
    hear_signals,
    private_home,
    run,
    started,
    wait_for_flag,
)

PATIENCE = 20.0  # seconds for libvirt and PID 1 to notice an end
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


@dataclass
class Scenario:
    """Command lines that pass the steps: `prepare` without a fault, then `run` with it."""

    name: str
    words: Callable[[Path, int], list[str]]
    prepare: Callable[[Home, Path], None] = lambda _home, _project: None
    clean: Callable[[Home, Path], None] = lambda _home, _project: None
    goes_on: bool = False  # the kept guest has to be there afterwards
    begins: bool = False  # a guest stays only where it succeeds: else there is nothing to clean


def _start(project: Path, _number: int) -> list[str]:
    return ["start", str(project), "--name", "cm-kept"]


def _kept(home: Home, project: Path) -> None:
    home.cli("start", project, "--name", "cm-kept", timeout=DEADLINE)


def _kept_with_card(home: Home, project: Path) -> None:
    home.cli("start", project, "--name", "cm-kept", "--net", "filtered", timeout=DEADLINE)


def _killed(home: Home, project: Path) -> None:
    """Leave something for `gc`: a session whose process and a guest's folder are gone."""
    with tempfile.TemporaryDirectory() as folder:
        flag = Path(folder) / "flag"
        process = started(
            home, ["session", str(project), "--name", "cm-dead", "--", "true"], f"fork.loaded=tell:{flag}"
        )
        wait_for_flag(process, flag)
        process.kill()
        process.communicate()


def _stop(home: Home, _project: Path) -> None:
    home.cli("stop", "cm-kept", status=None)


def _tailored(project: Path, number: int) -> list[str]:
    (project / ".claude").mkdir(exist_ok=True)
    (project / ".claude/sandbox.yaml").write_text(POLICY.format(f"{os.getpid()}-{number}"))
    return ["session", str(project), "--name", "cm", "--", "true"]


EMPTY = ("session", "--empty", "--name", "cm")
WORK = "echo new >> file0; rm file1; echo made > made"
SCENARIOS = (
    Scenario(
        "session",
        lambda project, _: ["session", str(project), "--name", "cm", "--accept", "all", "--", "sh", "-c", WORK],
    ),
    Scenario("start", _start, clean=_stop, begins=True),
    Scenario("stop", lambda _project, _: ["stop", "cm-kept"], _kept, _stop),
    Scenario("snapshot", lambda _project, _: ["snapshot", "cm-kept", "tag"], _kept, _stop, goes_on=True),
    Scenario("rollback", lambda _project, _: ["rollback", "cm-kept"], _kept, _stop, goes_on=True),
    Scenario("gc", lambda _project, _: ["gc"], _killed),
    Scenario("tailor", _tailored),
    Scenario("template", lambda _project, number: [*EMPTY, "--memory", str(304 + number), "--", "true"]),
    Scenario("filtered", lambda _project, _: [*EMPTY, "--net", "filtered", "--", "true"]),
    Scenario(
        "filtered-snapshot", lambda _project, _: ["snapshot", "cm-kept", "tag"], _kept_with_card, _stop, goes_on=True
    ),
    Scenario("filtered-rollback", lambda _project, _: ["rollback", "cm-kept"], _kept_with_card, _stop, goes_on=True),
    Scenario("build", lambda _project, _: ["image", "build", "base"]),
)
DEFAULT_SCENARIOS = ("session", "start", "stop", "snapshot", "rollback", "gc")


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
    process = started(home, scenario.words(project, 0), f"*=note:{notes}")
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
        outcome.status, said = run(home, scenario.words(project, number), step, fault, flag)
        if outcome.status is None:
            outcome.problems.append("the step was not reached")
        if "Traceback" in said and fault not in ("int", "kill"):
            outcome.problems.append(said[said.index("Traceback") :][-300:])
        if scenario.goes_on and fault not in ("qemu", "restart"):
            home.cli("gc", status=None, timeout=DEADLINE)
            done = home.cli("exec", "cm-kept", "--", "test", "-e", "file0", status=None, timeout=DEADLINE)
            if done.returncode:
                outcome.problems.append(f"the guest does not go on: {done.stderr.decode(errors='replace')[-300:]}")
    finally:
        if not scenario.begins or outcome.status == 0:
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
    # A template that was finished before its maker was killed is a good one; but the next cases need the room.
    finished = {one: found[1] for one in left if (found := re.match(r"files: templates/([0-9a-f]{32})(/|$)", one))}
    for name in set(finished.values()):
        shutil.rmtree(home.layout.templates / name)
    left -= set(finished)
    outcome.left = dict(Counter(word.partition(":")[0] for word in left))
    outcome.problems += sorted(left)[:5]


def project_state(project: Path) -> str:
    """`old` or `new`, or `mixed`, which must not be."""
    names = {path.name for path in project.iterdir()} - {".claude"}
    first = (project / "file0").read_text() if "file0" in names else ""
    if names == {f"file{number}" for number in range(4)} and first == "old 0\n" * 50:
        return "old"
    if names == {"file0", "file2", "file3", "made"} and first == "old 0\n" * 50 + "new\n":
        return "new"
    return "mixed"


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
    kinds = ("domains", "processes", "files", "sockets", "groups", "taps", "rules", "ledger")
    total = Counter(dict.fromkeys(kinds, 0))
    for one in outcomes:
        total.update(one.left)
    print(f"\n{len(outcomes)} cases, {sum(not one.good for one in outcomes)} bad; left behind: "
          + ", ".join(f"{total[kind]} {kind}" for kind in kinds))  # fmt: skip
    for one in outcomes:
        for problem in one.problems:
            print(f"  {one.scenario} {one.step} {one.fault}: {problem}")


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
    hear_signals()
    faults = (
        arguments.faults.split(",") if arguments.faults else [*FAULTS, *(PRIVATE_FAULTS if arguments.private else ())]
    )
    with tempfile.TemporaryDirectory(prefix="crash-", dir="/var/tmp") as temporary:
        folder = Path(temporary)
        folder.chmod(0o711)
        log = folder / "daemons.log"
        if not arguments.private:
            return _matrix(Home(arguments.home.absolute(), log), arguments, faults, folder)
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
