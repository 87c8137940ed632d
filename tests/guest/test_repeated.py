"""The timer that repeats a session, in a systemd that runs: a guest's."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from harness import Cli, make_tree, wait_for
from rooted import RootedGuest

from vmsandbox.render.timer import render_units
from vmsandbox.session.timers import timer_for

AWKWARD = "a  b'\\%h$HOME; \"\n"
COMMAND = ["sh", "-c", 'printf %s "$1" > made', "sh", AWKWARD]
RECORDER = "#!/usr/bin/python3\nimport json, os, sys\njson.dump([sys.argv, dict(os.environ)], open('/run/ran', 'w'))\n"


@pytest.fixture(scope="module")
def rooted(make_rooted: Callable[[], RootedGuest]) -> RootedGuest:
    return make_rooted()


def test_systemd_starts_the_session_with_the_very_words(rooted: RootedGuest, cli: Cli, tmp_path: Path) -> None:
    """The timer fires in the guest, where a recorder stands for Python; what it was called with is run here."""
    project = make_tree(tmp_path / "ni$ht %n", {"README.md": "# nightly\n"})
    home = {"VMSANDBOX_HOME": str(cli.home), "XDG_CACHE_HOME": "/a b/$c %d"}
    plan = timer_for(project, "*-*-* *:*:0/2", COMMAND, allow_emulation=True, environment=home)
    python, *words = plan.command
    script = [f"cat > /usr/local/bin/recorder <<'EOF'\n{RECORDER}EOF", "chmod 755 /usr/local/bin/recorder"]
    for name, text in render_units(replace(plan, command=["/usr/local/bin/recorder", *words])).items():
        script.append(f"cat > /etc/systemd/system/{name} <<'EOF'\n{text}EOF")
    script += ["systemctl daemon-reload", f"systemctl enable --now {plan.name}.timer"]
    script.append(f"systemd-analyze verify /etc/systemd/system/{plan.name}.timer")
    rooted.root(" && ".join(part if "EOF" not in part else f"{{ {part}\n}}" for part in script))
    wait_for(lambda: rooted.root("test -s /run/ran && echo there; true").strip() == "there", timeout=60, every=0.5)
    untrusted_words, untrusted_environment = json.loads(rooted.root("cat /run/ran"))
    assert untrusted_words[1:] == words, shlex.join(untrusted_words)
    assert {name: untrusted_environment.get(name) for name in home} == home

    environment = {"PATH": os.defpath, "HOME": str(tmp_path), "PYTHONPATH": cli.environment["PYTHONPATH"], **home}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    argv = [python, *untrusted_words[1:]]
    argv[argv.index("--accept") + 1] = "all"
    done = subprocess.run(argv, capture_output=True, timeout=120, env=environment, cwd="/")
    assert done.returncode == 0, done.stderr.decode()
    assert (project / "made").read_text() == AWKWARD
    assert json.loads(done.stdout)["status"] == 0
