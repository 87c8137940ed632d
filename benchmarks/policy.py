#!/usr/bin/env python3
"""What a policy costs: a session's start, and each program that the worker starts.

session   `vmsandbox session PROJECT -- true`, whole process: without a policy, with a full one without command rules,
          and with a full one (the bar: 1.15 times the first)
execve    in one kept guest each: fork, execve and wait of /bin/true, seen by a process that does it --calls times;
          without command rules and under the supervisor (the bar: 3 times)

Everything is interleaved, so that a slow minute hits all alike; ratios are of medians.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

CONFINED = """\
sandbox:
  filesystem:
    allowed_paths: [./src, ./tests, /tmp/claude-work]
    denied_paths: [./secrets/, ~/.ssh/, /etc/]
    tmpfs: [{path: /var/tmp, size: 50m}]
  network: {mode: none}
  resources: {processes: 256, memory: 512M, output: 64M, disk: 1G, write_rate: 200M}
  session: {time: 1h, idle: 30m}
"""
COMMANDS = """\
  commands:
    allowed: [python, pytest, black, git, sh, bash, "true"]
    denied: [rm -rf /, "curl *", "wget *"]
    require_confirmation: ["pip install *", "npm install *", "docker *"]
"""
POLICIES = {"none": "", "confined": CONFINED, "full": CONFINED + COMMANDS}
EXECVE = """
import os, sys, time
def once():
    begun = time.perf_counter()
    pid = os.posix_spawn("/bin/true", ["true"], {})
    assert os.waitpid(pid, 0)[1] == 0
    return time.perf_counter() - begun
for _ in range(5): once()
print(*(once() for _ in range(int(sys.argv[1]))))
"""
Samples = dict[str, list[float]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--calls", type=int, default=50, help="programs started in each round")
    parser.add_argument("--json", type=Path, help="write all samples to this file")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="vmsandbox-bench-", dir="/var/tmp"))
    samples: Samples = {}
    guests: dict[str, str] = {}
    try:
        projects = {name: project(work, name, text) for name, text in POLICIES.items()}
        for name, path in projects.items():
            session(path)  # makes the template
            if name != "confined":
                guests[name] = start(path)
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
            for name, path in projects.items():
                samples.setdefault(f"session {name}", []).append(session(path))
            for name, guest in guests.items():
                samples.setdefault(f"execve {name}", []).extend(execve(guest, options.calls))
    except KeyboardInterrupt:
        print("interrupted: this is what was measured until then", file=sys.stderr)
    finally:
        if guests:
            vmsandbox("stop", *guests.values())
        shutil.rmtree(work, ignore_errors=True)
    report(samples, options.json)
    return 0


def project(work: Path, name: str, policy: str) -> Path:
    """A small project with this policy in it."""
    folder = work / name
    for path, text in {"src/app.py": "print('hello')\\n", "tests/test_app.py": "", "secrets/key": "no\\n"}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    if policy:
        (folder / ".vmsandbox.yaml").write_text(policy)
    return folder


def vmsandbox(*words: str | Path, stdin: str = "") -> str:
    argv = [sys.executable, "-m", "vmsandbox", *map(str, words)]
    env = {**os.environ, "VMSANDBOX_ALLOW_EMULATION": "1"}
    done = subprocess.run(argv, check=True, capture_output=True, text=True, input=stdin, timeout=600, env=env)
    return done.stdout


def session(path: Path) -> float:
    begun = time.perf_counter()
    vmsandbox("session", path, "--no-backup", "--", "true")
    return time.perf_counter() - begun


def start(path: Path) -> str:
    return vmsandbox("start", path, "--name", f"bench-{uuid.uuid4().hex[:8]}", "--no-backup").strip()


def execve(guest: str, calls: int) -> list[float]:
    words = vmsandbox("exec", guest, "--", "python3", "-", str(calls), stdin=EXECVE).split()
    return [float(word) for word in words]


def report(samples: Samples, target: Path | None) -> None:
    print(f"{'':20} {'median':>9} {'lower':>9} {'upper':>9}   ratio")
    for name, values in samples.items():
        first = samples[f"{name.split()[0]} none"]
        lower, middle, upper = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        ratio = statistics.median(values) / statistics.median(first)
        print(f"{name:20} {middle:8.4f}s {lower:8.4f}s {upper:8.4f}s {ratio:7.2f}  (n={len(values)})")
    if target is not None:
        target.write_text(json.dumps(samples, indent=1))


if __name__ == "__main__":
    sys.exit(main())
