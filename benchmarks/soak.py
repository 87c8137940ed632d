#!/usr/bin/env python3
"""Many sessions, in a row and at once, some of them hit by a fault at a random step; the host must be flat at the end.

    python benchmarks/soak.py --home HOME [--rounds 200] [--at-once 20] [--waves 3] [--seed N] [--fault-share 0.3]

In a row: `session PROJECT -- …` with `--accept all`; a share of them is killed, interrupted, loses its QEMU or meets a
full disk at a step drawn from those that such a session passes; `gc` runs after each of these. At once: waves of
`start`, each guest used, some killed, then `stop` and `gc`. All is drawn from the seed that is printed first.

Sampled at rest: memory that the host has available, the home's files and bytes (records apart: they are meant to stay),
libvirtd's descriptors and memory, guests and processes of the home, rows of the ledger. The first sample is taken after
two warm-up sessions. Exit status 1 if a session failed without a fault, or something grew.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests" / "guest"), str(REPOSITORY / "tools")]

import crash_matrix  # noqa: E402
from harness import ended  # noqa: E402

from vmsandbox.ledger.book import Ledger  # noqa: E402

FAULTS = ("kill", "int", "term", "qemu", "enospc")
DEADLINE = 900.0  # seconds for one command of a wave, where twenty share the processors
# What may be more at the end than at the beginning, in total.
GROWTH = {"memory_used_mib": 256, "home_mib": 64, "home_files": 5, "libvirtd_fds": 10, "libvirtd_mib": 128,
          "processes": 0, "rows": 0}  # fmt: skip


@dataclass
class Result:
    """What a run came to."""

    seed: int
    samples: list[dict[str, float]] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def grown(self) -> dict[str, float]:
        """What is more at the end than it may be."""
        first, last = self.samples[0], self.samples[-1]
        return {key: round(last[key] - first[key], 1) for key, most in GROWTH.items() if last[key] - first[key] > most}


class Soak:
    """One run."""

    def __init__(self, home: crash_matrix.Home, seed: int, folder: Path, share: float) -> None:
        self.home = home
        self.dice = random.Random(seed)
        self.folder = folder
        self.share = share
        self.result = Result(seed)
        (self.scenario,) = [one for one in crash_matrix.SCENARIOS if one.name == "session"]

    def run(self, rounds: int, at_once: int, waves: int) -> Result:
        """All of it."""
        steps = crash_matrix.steps_of(self.home, self.scenario, self.folder)
        self._plain("warm-up")
        self.sample("begin")
        for number in range(rounds):
            if self.dice.random() < self.share:
                self._hit(self.dice.choice(steps), self.dice.choice(FAULTS), number)
            else:
                self._plain(f"round {number}")
            if number % 20 == 19:
                self.sample(f"{number + 1} in a row")
        for wave in range(waves if at_once else 0):
            self._wave(wave, at_once)
            self.sample(f"wave {wave + 1} of {at_once}")
        return self.result

    def sample(self, when: str) -> None:
        """Look at the host, when what has ended is forgotten by libvirt and PID 1."""
        self.home.cli("gc", timeout=DEADLINE)
        time.sleep(3)
        values = {"when": when, **_look(self.home)}
        self.result.samples.append(values)  # type: ignore[arg-type]
        print(json.dumps(values), flush=True)

    def _plain(self, what: str) -> None:
        project = crash_matrix.new_project(self.folder)
        began = time.monotonic()
        done = self.home.cli(*self.scenario.words(project, 0), status=None, timeout=DEADLINE)
        self.result.seconds.append(round(time.monotonic() - began, 2))
        state = crash_matrix.project_state(project)
        self.result.outcomes[f"ended {done.returncode} {state}"] += 1
        if done.returncode != 0 or state != "new":
            self.result.problems.append(f"{what}: {done.returncode} {state}: {done.stderr[-400:]!r}")

    def _hit(self, step: str, fault: str, number: int) -> None:
        outcome = crash_matrix.run_case(self.home, self.scenario, step, fault, self.folder, number, after=False)
        self.result.outcomes[f"{fault} {outcome.status} {outcome.project}"] += 1
        self.result.problems += [f"round {number}, {step} {fault}: {problem}" for problem in outcome.problems]

    def _wave(self, wave: int, at_once: int) -> None:
        names = [f"soak-{wave}-{number}" for number in range(at_once)]
        began = time.monotonic()
        started = [self.home.cli.start("start", "--empty", "--wait", "--name", name) for name in names]
        unlucky = {name for name in names if self.dice.random() < self.share}
        for name, process in zip(names, started, strict=True):
            if name in unlucky:
                time.sleep(self.dice.random())
                os.kill(process.pid, self.dice.choice((signal.SIGKILL, signal.SIGINT, signal.SIGTERM)))
        ends = {name: ended(process, DEADLINE) for name, process in zip(names, started, strict=True)}
        print(f"wave {wave + 1}: all {at_once} answered after {time.monotonic() - began:.1f} s", flush=True)
        running = [name for name in names if ends[name][0] == 0]
        for name in names:
            status, _, stderr = ends[name]
            self.result.outcomes[f"start {status}{' (hit)' if name in unlucky else ''}"] += 1
            if status and name not in unlucky:
                self.result.problems.append(f"{name}: {status}: {stderr[-400:]!r}")
        for name in running:
            if self.home.cli("exec", name, "--", "true", status=None, timeout=DEADLINE).returncode:
                self.result.problems.append(f"{name}: no command runs")
        dead = [name for name in running if self.dice.random() < self.share / 2]
        for name in dead:
            os.kill(self.home.cli.guest(name).qemu, signal.SIGKILL)
        self.home.cli("gc", timeout=DEADLINE)
        stopped = self.home.cli("stop", *running, status=None, timeout=DEADLINE)
        # gc has removed those whose guest was dead: `stop` says so, and stops the others.
        if stopped.returncode != (125 if dead else 0):
            self.result.problems.append(f"stop: {stopped.returncode}: {stopped.stderr[-400:]!r}")


def _look(home: crash_matrix.Home) -> dict[str, float]:
    files, size = 0, 0
    for folder in (home.layout.live, home.layout.run, home.layout.templates, home.layout.images):
        for path in folder.rglob("*"):
            if path.is_file():
                files, size = files + 1, size + path.stat().st_blocks * 512
    there = home.everything()
    daemon = subprocess.run(["pidof", "-s", "libvirtd"], capture_output=True, text=True).stdout.strip()
    own = str(home.libvirtd.pid) if home.libvirtd is not None else daemon
    fds = len(list(Path(f"/proc/{own}/fd").iterdir())) if own else 0
    rss = _field(Path(f"/proc/{own}/status"), "VmRSS:") if own else 0
    memory = Path("/proc/meminfo")
    return {
        "memory_used_mib": (_field(memory, "MemTotal:") - _field(memory, "MemAvailable:")) // 1024,
        "home_mib": size >> 20,
        "home_files": files,
        "libvirtd_fds": fds,
        "libvirtd_mib": rss // 1024,
        "processes": sum(word.startswith(("processes", "domains")) for word in there),
        "rows": len(Ledger.of(home.layout).rows()),
    }


def _field(path: Path, key: str) -> int:
    return next((int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(key)), 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, required=True, help="with an image and a template in it already")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=20)
    parser.add_argument("--waves", type=int, default=3)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "big"))
    parser.add_argument("--fault-share", type=float, default=0.3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="soak-", dir="/var/tmp") as temporary:
        folder = Path(temporary)
        folder.chmod(0o711)
        home = crash_matrix.Home(arguments.home.absolute(), folder / "log")
        soak = Soak(home, arguments.seed, folder, arguments.fault_share)
        result = soak.run(arguments.rounds, arguments.at_once, arguments.waves)
    grown = result.grown()
    print(f"\nseed {result.seed}; outcomes: {dict(result.outcomes.most_common())}")
    if result.seconds:
        ordered = sorted(result.seconds)
        print(f"seconds of a session: median {ordered[len(ordered) // 2]}, most {ordered[-1]}")
    print(f"grown: {grown or 'nothing'}; problems: {len(result.problems)}")
    for problem in result.problems:
        print(f"  {problem}")
    if arguments.json:
        arguments.json.write_text(json.dumps({**vars(result), "grown": grown}, indent=1))
    return 1 if grown or result.problems else 0


if __name__ == "__main__":
    sys.exit(main())
