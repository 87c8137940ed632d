"""Compose and devcontainer files, imported, decide what a real guest may do: each of their hardening keys, attacked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from confined import Inside
from harness import Cli, make_tree, wait_for

from vmsandbox.policy.load import load_policy
from vmsandbox.policy.syscalls_needed import missing_calls
from vmsandbox.session.plan import SessionRequest
from vmsandbox.session.sandbox import Sandbox
from vmsandbox.session.watching import health_of

DATA = Path(__file__).parents[1] / "unit/data/import"
# What the read-back and the small programs of these tests call, beside a login, bash and python3.
MORE = (
    "access", "chdir", "chmod", "copy_file_range", "dup2", "dup3", "faccessat", "faccessat2", "fadvise64", "fchmodat",
    "fchmodat2", "ftruncate", "getcwd", "lseek", "rename", "statfs", "unlink", "unlinkat", "utimensat",
    "vfork", "clone3", "pipe", "pipe2", "getppid",
)  # fmt: skip
ONCE = "cat /proc/sys/kernel/random/uuid > ~/made-once; id -un >> ~/made-once"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, cli: Cli) -> Path:
    """A project with the imported policy, and the sample profile beside it."""
    root = make_tree(tmp_path_factory.mktemp("imported") / "app", {"src/app.py": "print('hello')\n"})
    for path in DATA.iterdir():
        (root / path.name).write_bytes(path.read_bytes())
    names = ("docker-compose.security.yml", "devcontainer.json")
    cli("policy", "import", *(root / name for name in names), "-o", root / ".vmsandbox.yaml")
    # The tests' templates have this much memory, and neither pip nor claude; else it stays as it was imported.
    policy = yaml.safe_load((root / ".vmsandbox.yaml").read_text())
    policy["sandbox"]["resources"] = {"vcpus": 2, "memory": "512M"}
    policy["sandbox"]["session"]["post_create"] = ONCE
    policy["sandbox"]["session"]["healthcheck"].update(interval="1s", retries=2)
    (root / ".vmsandbox.yaml").write_text(yaml.safe_dump(policy))
    return root


@pytest.fixture(scope="module")
def inside(project: Path, cli: Cli) -> Iterator[Inside]:
    """A guest under it, with a profile that lets a shell and Python start."""
    profile = json.loads((project / "seccomp-claude.json").read_text())
    lacking = missing_calls(json.dumps(profile))
    names = sorted({*MORE, *(call for program in ("login", "bash", "python3") for call in lacking[program])})
    profile["syscalls"].append({"names": names, "action": "SCMP_ACT_ALLOW"})
    (project / "seccomp-wider.json").write_text(json.dumps(profile))
    wider = (project / ".vmsandbox.yaml").read_text().replace("seccomp-claude", "seccomp-wider")
    (project / "wider.yaml").write_text(wider)
    request = SessionRequest(policy=load_policy(project / "wider.yaml"), allow_emulation=True)
    with Sandbox.open(project, request=request, layout=cli.layout) as sandbox:
        yield Inside(sandbox)


def test_a_profile_that_starts_no_shell_is_known_before_and_refused(cli: Cli, project: Path) -> None:
    found = cli("policy", "check", project / ".vmsandbox.yaml", status=None).stdout.decode()
    assert "bash" in found
    done = cli("session", project, "--no-backup", "--", "true", status=126)
    assert b"policy check" in done.stderr


def test_security_opt_and_cap(inside: Inside) -> None:
    status = dict(
        line.partition(":\t")[::2] for line in inside.python("print(open('/proc/self/status').read())").splitlines()
    )
    assert status["NoNewPrivs"] == "1" and status["Seccomp"] == "2"
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {"0" * 16}
    bounding = int(status["CapBnd"], 16)
    for number in (0, 6, 7):  # chown, setgid, setuid
        assert bounding >> number & 1
    for number in (1, 12, 13, 19, 21):  # dac_override, net_admin, net_raw, sys_ptrace, sys_admin
        assert not bounding >> number & 1
    for call in ("os.chroot('/')", "ctypes.CDLL(None).mount(b'', b'/', b'tmpfs', 0, None)"):
        code, _out, _err = inside.try_(f'python3 -c "import ctypes, os; {call}"')
        assert code == 128 + 31, "SCMP_ACT_KILL: SIGSYS"
    assert "PermissionError" in inside.try_("python3 -c 'import os; os.mkdir(\"output/x\")'")[2], "not in the profile"


def test_read_only_tmpfs_and_volumes(inside: Inside) -> None:
    inside.refused("echo > src/app.py", "echo > new", "echo > ~/x", "echo > /var/tmp/x", "echo > /etc/x")
    for path, size in (("/tmp", 100 << 20), ("/home/claude-worker/.cache", 50 << 20)):
        line = inside.sh(f"while read -r line; do case $line in *' {path} '*) echo \"$line\";; esac; done "
                         "< /proc/self/mountinfo").splitlines()[-1]  # fmt: skip
        assert {"nosuid", "nodev", "noexec"} <= set(line.split()[5].split(",")), line
        assert f"size={size >> 10}k" in line
        program = (
            f"open('{path}/x', 'wb').write(open('/bin/true', 'rb').read()); import os; os.chmod('{path}/x', 0o755)"
        )
        inside.try_(f'python3 -c "{program}"')
        inside.refused(f"{path}/x")
        filled = inside.try_(f"python3 -c \"open('{path}/y', 'wb').write(bytes({size}))\"")
        assert "No space left" in filled[2]
        inside.sh(f"rm -f {path}/x {path}/y")
    inside.sh("echo done > output/report")
    assert "output/report" in inside.sandbox.collect().returned.items


def test_networks_and_limits(inside: Inside) -> None:
    assert inside.python("import os; print(os.listdir('/sys/class/net'), os.cpu_count())") == "['lo'] 2"
    assert inside.sandbox.info.memory_mib == 512


def test_the_healthcheck_runs_and_fails_where_there_is_no_claude(inside: Inside) -> None:
    wait_for(lambda: health_of(inside.sandbox.folder) == "unhealthy", 60, 0.5)
    assert "health.failed" in {record["kind"] for record in inside.sandbox.journal.read()}


def test_the_post_create_command_ran_once_as_the_worker(inside: Inside, project: Path, cli: Cli) -> None:
    made = inside.sh("cat ~/made-once")
    assert made.endswith("\nclaude-worker")
    request = SessionRequest(policy=load_policy(project / "wider.yaml"), allow_emulation=True)
    with Sandbox.open(project, request=request, layout=cli.layout) as another:
        assert Inside(another).sh("cat ~/made-once") == made
