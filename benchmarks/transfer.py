#!/usr/bin/env python3
"""How fast a project goes into a guest and comes back: ours beside stock `tar | ssh` and `rsync -e ssh`.

All three use an SSH connection of the same guest that is already open (of ours the session's own, of the others
a ControlMaster through `vmsandbox proxy`), and end with the tree lying on the other side:

push     10,000 files of 100 MB in all; one file of 200 MB
return   the same, changed throughout, so that all of it has to travel
ten      ten of the 10,000 files changed: ours and rsync know it, `tar | ssh` sends all

Ours does more in that time (digests, limits, a process of its own that receives); no allowance is made for it.
The order of the three changes from round to round. Ratios are ours to the better of the others: below 1 is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from vmsandbox.policy.values import Policy
from vmsandbox.process import Programs
from vmsandbox.session.asked.request import SessionRequest
from vmsandbox.session.sandbox import Sandbox
from vmsandbox.session.transfer.collect import collect

Samples = dict[str, dict[str, list[float]]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--files", type=int, default=10_000, help="small files, at least 1000")
    parser.add_argument("--megabytes", type=int, default=100, help="of the small files together; twice that of the big")
    parser.add_argument("--json", type=Path, help="write all samples to this file")
    options = parser.parse_args()
    bench = Bench(options.files, options.megabytes * 1_000_000)
    samples: Samples = {}
    try:
        for number in range(options.rounds):
            for tree in ("many", "big"):
                print(f"round {number + 1} of {options.rounds}: {tree}", file=sys.stderr)
                for case, ways in bench.round(tree).items():
                    for way in sorted(ways, key=lambda _way: random.random()):
                        seconds = ways[way]()
                        print(f"  {case:12} {way:6} {seconds:7.2f} s", file=sys.stderr)
                        samples.setdefault(case, {}).setdefault(way, []).append(seconds)
    except KeyboardInterrupt:
        print("interrupted: this is what was measured until then", file=sys.stderr)
    finally:
        bench.close()
    report(samples, options.json)
    return 0


class Bench:
    """One guest, the trees on the host, and a connection for the stock clients."""

    def __init__(self, files: int, total: int) -> None:
        self.work = Path(tempfile.mkdtemp(prefix="vmsandbox-bench-", dir="/var/tmp"))
        self.programs = Programs()
        self.trees = {"many": self.work / "many", "big": self.work / "big"}
        self._make_trees(files, total)
        self.ssh = ["ssh", "-F", f"{self.work}/ssh_config", "-o", f"ControlPath={self.work}/master",
                    "-o", "ControlMaster=auto", "-o", "ControlPersist=600"]  # fmt: skip
        self._open()

    def _open(self) -> None:
        self.sandbox = Sandbox.open(request=SessionRequest(name=f"bench-{time.monotonic_ns()}", keep=True))
        self.name = self.sandbox.folder.ssh_host
        written = self._run([sys.executable, "-m", "vmsandbox", "ssh-config", self.sandbox.name])
        (self.work / "ssh_config").write_bytes(written)
        self._run([*self.ssh, self.name, "true"])

    def _end(self) -> None:
        subprocess.run([*self.ssh, "-O", "exit", self.name], capture_output=True, check=False)
        self.sandbox.close()

    def close(self) -> None:
        self._end()
        shutil.rmtree(self.work, ignore_errors=True)

    def into_a_fresh_guest(self, push: Callable[[str], float], tree: str) -> float:
        """As a session does it. (After a tree was deleted, the next may take four times as long, whoever brings it.)"""
        self._end()
        self._open()
        return push(tree)

    def _make_trees(self, files: int, total: int) -> None:
        many, big = self.trees["many"], self.trees["big"]
        big.mkdir()
        (big / "file").write_bytes(os.urandom(2 * total))
        for number in range(files):
            folder = many / f"d{number // 100:03}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"f{number:05}").write_bytes(os.urandom(total // files))

    def round(self, tree: str) -> dict[str, dict[str, Callable[[], float]]]:
        cases = {
            f"push {tree}": {
                "ours": lambda: self.into_a_fresh_guest(self.push, tree),
                "tar": lambda: self.into_a_fresh_guest(self.tar_in, tree),
                "rsync": lambda: self.into_a_fresh_guest(self.rsync_in, tree),
            },
            f"return {tree}": {
                "ours": lambda: self.collect(tree, "for f in $(find . -type f); do printf x >> $f; done"),
                "tar": lambda: self.tar_out(tree),
                "rsync": lambda: self.rsync_out(tree, fresh=True),
            },
        }
        if tree == "many":
            few = "for n in 0 1 2 3 4 5 6 7 8 9; do printf x >> d00$n/f00${n}10; done"
            cases["ten"] = {
                "ours": lambda: self.collect(tree, few),
                "tar": lambda: self.tar_out(tree),
                "rsync": lambda: self.rsync_out(tree, fresh=False),
            }
        return cases

    # -- ours ----------------------------------------------------------------------------------------------

    def push(self, tree: str) -> float:
        self.sandbox.shell().run(["sh", "-c", "rm -rf ~/projects/*; sync"])
        return _timed(lambda: self.sandbox.push(self.trees[tree], Policy(), self.programs))

    def collect(self, tree: str, change: str) -> float:
        self.push(tree)
        time.sleep(1.1)
        folder = self.sandbox.info.guest_folder
        assert folder is not None
        status, _out, errors = self.sandbox.shell().run(["sh", "-c", f"cd {folder} && {change}; sync"])
        assert status == 0, errors
        return _timed(lambda: collect(self.sandbox))

    # -- the others ----------------------------------------------------------------------------------------

    def tar_in(self, tree: str) -> float:
        self._guest("rm -rf ~/projects/*; sync; mkdir -p ~/projects/tar")
        command = f"tar -c -C {self.trees[tree]} . | {self._words()} {self.name} 'tar -x -C projects/tar'"
        return _timed(lambda: self._run(["sh", "-c", command]))

    def rsync_in(self, tree: str) -> float:
        self._guest("rm -rf ~/projects/*; sync")
        argv = ["rsync", "-a", "-e", self._words(), f"{self.trees[tree]}/", f"{self.name}:projects/rsync"]
        return _timed(lambda: self._run(argv))

    def tar_out(self, tree: str) -> float:
        self._there(tree)
        target = self._empty("tar-out")
        command = f"{self._words()} {self.name} 'tar -c -C projects/{tree} .' | tar -x -C {target}"
        return _timed(lambda: self._run(["sh", "-c", command]))

    def rsync_out(self, tree: str, fresh: bool) -> float:
        """`fresh`: nothing is here yet, so that all travels; else the host's copy is what it is compared with."""
        self._there(tree)
        target = self._empty("rsync-out")
        if not fresh:
            self._run(["cp", "-a", f"{self.trees[tree]}/.", str(target)])
            self._guest(f"cd projects/{tree} && for n in 0 1 2 3 4 5 6 7 8 9; do printf x >> d00$n/f00${{n}}10; done")
        argv = ["rsync", "-a", "-e", self._words(), f"{self.name}:projects/{tree}/", str(target)]
        return _timed(lambda: self._run(argv))

    def _there(self, tree: str) -> None:
        """The tree lies in the guest, written and synced."""
        if self._guest(f"test -d projects/{tree} && echo yes || true") != b"yes\n":
            self.push(tree)
        self._guest("sync")

    def _empty(self, name: str) -> Path:
        target = self.work / name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        return target

    def _words(self) -> str:
        return " ".join(self.ssh)

    def _guest(self, script: str) -> bytes:
        return self._run([*self.ssh, self.name, script])

    def _run(self, argv: list[str]) -> bytes:
        return subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True, timeout=900).stdout


def _timed(action: Callable[[], object]) -> float:
    began = time.monotonic()
    action()
    return time.monotonic() - began


def report(samples: Samples, target: Path | None) -> None:
    print(f"{'':14} {'n':>2} {'ours':>8} {'tar':>8} {'rsync':>8}  ours / better  ours / tar")
    rows = {}
    for case, ways in samples.items():
        medians = {way: statistics.median(values) for way, values in ways.items()}
        if len(medians) < 3:
            continue
        better = medians["ours"] / min(medians["tar"], medians["rsync"])
        against_tar = medians["ours"] / medians["tar"]
        rows[case] = {**medians, "ours / better": better, "ours / tar": against_tar}
        count = min(len(values) for values in ways.values())
        print(
            f"{case:14} {count:2} {medians['ours']:8.2f} {medians['tar']:8.2f} {medians['rsync']:8.2f}"
            f"  {better:13.2f}  {against_tar:10.2f}"
        )
    if target:
        target.write_text(json.dumps({"samples": samples, "rows": rows}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
