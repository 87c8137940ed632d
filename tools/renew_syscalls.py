"""Renews vmsandbox/policy/syscalls_needed.json from a guest: `python tools/renew_syscalls.py` (some minutes),
or with a file of what the recorder printed.

The image has to have all programs (python-dev: pip). After it: look at the difference, then commit.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from vmsandbox.policy.seccomp.native import syscall_names
from vmsandbox.policy.syscalls_needed import DATA

RECORDER = Path(__file__).with_name("record_syscalls.py")
IMAGE = "python-dev"


def write_data(lines: bytes) -> None:
    """What the recorder printed, numbers made names, into the file."""
    names = syscall_names()
    programs = {}
    for line in lines.splitlines():
        for program, kinds in json.loads(line).items():
            programs[program] = {kind: sorted(names[number] for number in found) for kind, found in kinds.items()}
    note = "Recorded in a guest by tools/record_syscalls.py; renew with tools/renew_syscalls.py."
    blocks = []
    for program, kinds in programs.items():
        lines = ",\n".join(f"   {json.dumps(kind)}: {json.dumps(found)}" for kind, found in kinds.items())
        blocks.append(f"  {json.dumps(program)}: {{\n{lines}\n  }}")
    whole = ",\n".join(blocks)
    DATA.write_text(
        f'{{\n "": {json.dumps(note)},\n "image": {json.dumps(IMAGE)},\n "programs": {{\n{whole}\n }}\n}}\n',
        encoding="utf-8",
    )


def main() -> None:
    if sys.argv[1:]:
        write_data(Path(sys.argv[1]).read_bytes())
        return
    argv = [sys.executable, "-m", "vmsandbox", "session", "--empty", "--image", IMAGE]
    argv += ["--", "python3", "-I", "-S", "-"]
    with RECORDER.open("rb") as recorder:
        done = subprocess.run(argv, stdin=recorder, stdout=subprocess.PIPE, check=True, timeout=7200)
    write_data(done.stdout)


main()
