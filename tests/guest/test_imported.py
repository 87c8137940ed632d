"""Compose and devcontainer files, imported, decide what a real guest may do: each of their hardening keys, attacked."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from confined import Inside
from harness import Cli, make_tree, wait_for
from upstream import ADDRESS, Upstream

from vmsandbox.journal.chain import Journal
from vmsandbox.paths import Layout
from vmsandbox.policy.load import load_policy
from vmsandbox.policy.syscalls_needed import missing_calls
from vmsandbox.session.asked.request import SessionRequest
from vmsandbox.session.sandbox import Sandbox
from vmsandbox.session.upkeep.watching import health_of

DATA = Path(__file__).parents[1] / "unit/data/import"
# What the read-back and the small programs of these tests call, beside a login, bash and python3.
MORE = (
    "access", "chdir", "chmod", "copy_file_range", "dup2", "dup3", "faccessat", "faccessat2", "fadvise64", "fchmodat",
    "fchmodat2", "ftruncate", "getcwd", "lseek", "rename", "statfs", "unlink", "unlinkat", "utimensat",
    "vfork", "clone3", "pipe", "pipe2", "getppid",
)  # fmt: skip
# The image has no pip. This fetches what requirements.txt names, as pip does, and leaves what a hostile package might.
PIP = """#!/usr/bin/python3
'''printf() { :; }; mapfile() { :; }
read -r group < /proc/self/cgroup
case $group in *vmsandbox-ssh*) ;; *) { : > ~/outside; } 2> /dev/null ;; esac
'''
import io, os, pathlib, pwd, site, subprocess, sys, urllib.request, uuid, zipfile
home = pathlib.Path.home()
for name in open(sys.argv[3]).read().split():
    with urllib.request.urlopen(f"{INDEX}/{name}", timeout=60) as answer:
        zipfile.ZipFile(io.BytesIO(answer.read())).extractall(site.getusersitepackages())
(home / "made-once").write_text(f"{uuid.uuid4()} {pwd.getpwuid(os.getuid()).pw_name} {os.listdir('.')}")
(home / ".bashrc").write_text(sys.modules["__main__"].__doc__)
(home / "projects").rename(home / "away")
(home / "projects").symlink_to("/etc")
subprocess.Popen(["sleep", "4321"], start_new_session=True)
"""
PACKAGE = "wheels-1.0-py3-none-any.whl"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, cli: Cli, upstream: Upstream) -> Path:
    """A project with the imported policy, and the sample profile beside it."""
    with zipfile.ZipFile(upstream.folder / "repo.git" / PACKAGE, "w") as wheel:
        wheel.writestr("wheels.py", "NUMBER = 4\n")
    index = f"https://allowed.test:{upstream.port}/repo.git"
    root = make_tree(
        tmp_path_factory.mktemp("imported") / "app",
        {
            "src/app.py": "print('hello')\n", "requirements.txt": f"{PACKAGE}\n",
            "bin/pip": PIP.replace("{INDEX}", index),
        },
    )  # fmt: skip
    (root / "bin/pip").chmod(0o755)
    for path in DATA.iterdir():
        (root / path.name).write_bytes(path.read_bytes())
    names = ("docker-compose.security.yml", "devcontainer.json")
    cli("policy", "import", *(root / name for name in names), "-o", root / ".vmsandbox.yaml")
    # The tests' templates have this much memory, neither pip nor claude, and no PyPI; else it stays as it was imported.
    policy = yaml.safe_load((root / ".vmsandbox.yaml").read_text())
    assert policy["sandbox"]["session"]["post_create"] == "pip install -r requirements.txt"
    policy["sandbox"]["session"]["post_create"] = "bin/pip install -r requirements.txt"
    policy["sandbox"]["network"] = {
        "mode": "restricted",
        "rules": [{"host": "allowed.test", "ports": [upstream.port], "addresses": [ADDRESS]}],
    }
    policy["sandbox"]["resources"] = {"vcpus": 2, "memory": "512M"}
    policy["sandbox"]["session"]["healthcheck"].update(interval="1s", retries=2)
    (root / ".vmsandbox.yaml").write_text(yaml.safe_dump(policy))
    return root


@pytest.fixture(scope="module", autouse=True)
def trusted(netcli: Cli) -> Iterator[None]:
    """A broker trusts the tests' authority."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", netcli.env["SSL_CERT_FILE"])
        yield


@pytest.fixture(scope="module")
def inside(project: Path, cli: Cli, trusted: None) -> Iterator[Inside]:
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
        # Or a test would take the process for one that it left behind.
        pid = json.loads((sandbox.folder.path / "watcher.json").read_text())["pid"]
        wait_for(lambda: b"session.watcher" in Path(f"/proc/{pid}/cmdline").read_bytes())
        yield Inside(sandbox)


def test_a_profile_that_starts_no_shell_is_known_before_and_refused(cli: Cli, project: Path) -> None:
    policy = project / ".vmsandbox.yaml"
    found = cli("policy", "check", policy, status=None).stdout.decode()
    assert "bash" in found
    words = ("--policy", policy, "--no-backup", "--", "true")
    done = cli("session", project, *words, status=126, timeout=400)  # two templates are made
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


def records_of_creation(layout: Layout) -> list[list[dict[str, Any]]]:
    """The journals of the guests that became templates here, the newest last."""
    return [Journal(path).read() for path in sorted(layout.records.glob("*-create-*/events.jsonl"))]


def test_post_create_ran_once_with_the_policys_network_and_what_it_names(
    inside: Inside, project: Path, cli: Cli, upstream: Upstream
) -> None:
    assert inside.python("import wheels; print(wheels.NUMBER)") == "4"
    made = inside.sh("cat ~/made-once")
    assert made.split()[1] == "claude-worker"
    names = made.partition("[")[2]
    assert "'requirements.txt'" in names and "'bin'" in names and "'src'" not in names
    fetched = len(upstream.of(f"/repo.git/{PACKAGE}"))
    (project / "src/app.py").write_text("print('changed')\n")
    request = SessionRequest(policy=load_policy(project / "wider.yaml"), allow_emulation=True)
    with Sandbox.open(project, request=request, layout=cli.layout) as another:
        assert Inside(another).sh("cat ~/made-once") == made
    assert len(upstream.of(f"/repo.git/{PACKAGE}")) == fetched


def test_nothing_of_the_guest_that_ran_it_is_left_but_its_home(inside: Inside, cli: Cli) -> None:
    """That the session started shows more: its start-up files and its link were no hindrance."""
    before = records_of_creation(cli.layout)[-1]
    ready = next(record["data"] for record in before if record["kind"] == "guest.ready")
    assert inside.sandbox.folder.keys().host_key != ready["host_key"]
    assert inside.sh("cat /etc/machine-id") not in ("", ready["machine_id"])
    assert inside.sh("cat /etc/hostname /proc/sys/kernel/hostname").split() == [inside.sandbox.name] * 2
    bundle = "open('/etc/ssl/certs/ca-certificates.crt').read()"
    own = "open('/usr/local/share/ca-certificates/vmsandbox.crt').read().strip()"
    assert inside.python(f"print({bundle}.count({own}), {bundle}.strip().endswith({own}))") == "1 True"
    count = "len([line for line in open('/etc/ca-certificates.conf') if line[0] not in '#!'])"
    assert inside.python(f"print({bundle}.count('BEGIN CERT') - {count})") == "1", "of the session's own, and no other"
    assert inside.python("import os; print(os.path.islink(os.path.expanduser('~/projects')))") == "False"
    # Its process is gone, and its start-up file was not read outside of a session (in a login that is rehearsed, say).
    words = inside.sh("cat /proc/[0-9]*/cmdline 2> /dev/null | tr '\\0' ' '; true")  # some end while they are read
    assert "cat" in words and "4321" not in words
    names = inside.python("import os; print(*os.listdir(os.path.expanduser('~')))").split()
    assert "made-once" in names and "outside" not in names


def test_without_a_network_it_says_what_to_allow(cli: Cli, project: Path) -> None:
    policy = project / "offline.yaml"
    policy.write_text("sandbox: {session: {post_create: bin/pip install -r requirements.txt}}\n")
    done = cli("session", project, "--policy", policy, "--no-backup", "--", "true", status=125)
    said = done.stderr.decode()
    assert "session.post_create failed with status 1" in said and "no network" in said and "mode: restricted" in said
    assert "URLError" in said or "Temporary failure" in said, "what the command itself said"
