"""The policies that are shipped, each as a session: what it promises is in force, and attacks on it are stopped.

Their sizes are cut down to the tests' template, and python-dev has the image that is there; the rest is as shipped.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from harness import TIMEOUT, Cli, make_tree

from vmsandbox.broker.environment import make_environment
from vmsandbox.monitor import Monitor
from vmsandbox.paths import resource_folder
from vmsandbox.process import Programs

FILES = {
    "README.md": "# demo\n", "src/app.py": "print('hello')\n", "secrets/token": "TOKEN\n", "infra/a.tfstate": "{}\n",
}  # fmt: skip
# Each line of the report is what an attempt came to.
SCRIPT = """
mkdir -p output && exec > output/report 2> /dev/null
try() { name=$1; shift; if ( "$@" ) > /dev/null 2>&1; then echo "$name: done"; else echo "$name: refused"; fi; }
try secrets ls secrets
try state test -e infra/a.tfstate
try project sh -c 'echo x >> src/app.py'
try made sh -c 'mkdir -p .github/workflows && echo "on: push" > .github/workflows/ci.yml'
try program sh -c 'cp /bin/true /tmp/t && /tmp/t'
try home sh -c 'cp /bin/true ~/t && ~/t'
try root su -c true root
echo "network: $(ls /sys/class/net | tr '\\n' ' ')$(python3 -c "$FETCH" 2>&1 | tail -1)"
read -r group < /proc/self/cgroup
echo "processes: $(cat /sys/fs/cgroup${group#0::}/pids.max)"
"""
FETCH = "import urllib.request as u; u.urlopen('https://pypi.org.refused.test/', timeout=30)"
TEMPLATE = 120.0  # seconds more: each of them has one
WRITABLE = {"project: done", "made: done", "program: done", "home: done"}
READ_ONLY = {"project: refused", "made: refused", "program: refused", "home: done"}
OFFLINE, REFUSED = (
    r"network: lo .*(unreachable|resolution)",
    r"network: lo .*403 Forbidden by vmsandbox: no rule allows",
)


@pytest.mark.parametrize(
    ("name", "attempts", "network", "processes"),
    [
        ("offline", WRITABLE, OFFLINE, 1024),
        ("review-only", READ_ONLY, OFFLINE, 512),
        ("agent", WRITABLE, REFUSED, 2048),
        ("python-dev", WRITABLE, REFUSED, 1024),
    ],
)
def test_what_it_promises_is_in_force(
    cli: Cli, tmp_path: Path, name: str, attempts: set[str], network: str, processes: int
) -> None:
    make_environment(cli.layout, Programs(), Monitor())
    project = make_tree(tmp_path / "demo", FILES)
    policy: str | Path = name
    if name == "python-dev":
        policy = tmp_path / "policy.yaml"
        shipped = (resource_folder("policies") / "python-dev.yaml").read_text()
        policy.write_text(shipped.replace("image: python-dev", "image: base"))
    words = ("--policy", policy, "--memory", "512", "--no-backup", "--accept", "safe")
    script = f'FETCH="{FETCH}"\n{SCRIPT}'
    report = cli.json("session", project, *words, "--", "sh", "-c", script, timeout=TEMPLATE + TIMEOUT)
    assert report["status"] == 0 and report["leftovers"] == []

    said = (project / "output/report").read_text().splitlines()
    assert attempts <= set(said) and {"secrets: refused", "state: refused", "root: refused"} <= set(said)
    assert [line for line in said if re.match(network, line)], said
    assert f"processes: {processes}" in said

    # Of what the guest wrote, what the policy lets be taken without a person: nothing that would run on the host.
    applied = {"output", "output/report"} | ({"src/app.py"} if attempts == WRITABLE else set())
    assert set(report["applied"]) - {".github", ".github/workflows"} == applied
    assert not (project / ".github/workflows/ci.yml").exists()
    if name in ("agent", "python-dev"):
        assert not (project / ".github").exists(), "return.denied_paths"
    assert (project / "src/app.py").read_text() == FILES["src/app.py"] + ("x\n" if attempts == WRITABLE else "")
