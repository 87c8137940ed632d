"""The policy's command rules in a real guest: who may run what, the question to a person, and what it costs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest
from harness import wait_for
from rooted import RootedGuest
from test_shell import Terminal

from vmsandbox.cli.screen import MARK
from vmsandbox.policy.values import CommandsPolicy, Policy
from vmsandbox.render.commands import RULES, UNIT
from vmsandbox.session.sandbox import Sandbox

SAMPLE = CommandsPolicy(
    allowed=("python", "pytest", "black", "git"),
    denied=("rm -rf /", "curl *", "wget *"),
    require_confirmation=("pip install *", "npm install *", "docker *"),
    confirm_seconds=6,
)
# Programs that the image need not have: scripts of root's, and a binary.
PROGRAMS = """
printf '#!/usr/bin/python3\\nimport sys; print("pip ran", sys.argv[1:])\\n' > /usr/local/bin/pip
printf '#!/bin/sh\\necho black ran\\n' > /usr/local/bin/black
cp /usr/bin/tac /usr/local/bin/curl
chmod 755 /usr/local/bin/*
"""
REFUSED = 126


@pytest.fixture(scope="module")
def ruled(make_rooted: Callable[[Policy], RootedGuest]) -> RootedGuest:
    """A guest with the sample policy's rules."""
    guest = make_rooted(Policy(commands=SAMPLE))
    guest.root(PROGRAMS)
    return guest


def python(script: str) -> tuple[str, str, str]:
    return "python3", "-c", script


def test_the_sample_policy(ruled: RootedGuest) -> None:
    """One connection for many: a process that tries each, and says what the kernel answered."""
    tried = {
        "python3 --version": 0, "git --version": 0, "/usr/local/bin/black": 0, "/usr/lib/git-core/git-remote-https": 0,
        "ls": 13, "sh -c true": 13, "/usr/bin/env git --version": 13, "nice git --version": 13, "curl": 13,
        "/usr/local/bin/curl https://192.0.2.1/": 13, "rm -rf /": 13, "pip list": 13, "pip install x": 13,
        "python3 -m pip install x": 13, "python3 /usr/local/bin/pip install x": 13, "./copy": 13, "./link": 13,
        "./script": 13, "./changed": 13, "./tool.py": 0, "./python": 0, "/usr/lib/vmsandbox/vmsandbox-launcher": 13,
        "/lib64/ld-linux-x86-64.so.2 /usr/bin/ls": 13, "/proc/self/root/usr/bin/ls": 13, "nosuch": 2,
        "/usr/lib/openssh/sshd-session -i": 13,
    }  # fmt: skip
    script = """
import json, os, shutil, subprocess, sys
os.makedirs("w", exist_ok=True); os.chdir("w")
shutil.copy("/usr/bin/ls", "copy"); shutil.copy("/usr/bin/ls", "changed"); shutil.copy("/usr/bin/python3", "python")
open("changed", "ab").write(b"x")
for name, first in (("script", "#!/bin/sh"), ("tool.py", "#!/usr/bin/env python3")):
    open(name, "w").write(first + "\\n"); os.chmod(name, 0o755)
os.path.lexists("link") or os.symlink("/usr/bin/ls", "link")
found = {}
for line in json.loads(sys.argv[1]):
    try:
        subprocess.run(line.split(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=2)
        found[line] = 0
    except OSError as error:
        found[line] = error.errno
fd = os.memfd_create("python"); os.write(fd, open("/usr/bin/ls", "rb").read())
for one in (fd, os.open("/usr/bin/ls", os.O_RDONLY)):
    try: os.execve(one, ["python3"], {})
    except OSError as error: found.setdefault("descriptors", []).append(error.errno)
print(json.dumps(found))
"""
    before = len(ruled.journal())
    done = ruled.exec(*python(script), json.dumps(list(tried)))
    assert json.loads(done.stdout) == {**tried, "descriptors": [13, 13]}, done.stderr.decode()
    said = done.stderr.decode()
    assert "vmsandbox: not allowed (not in commands.allowed): ls\n" in said
    assert "vmsandbox: not allowed (commands.denied: rm -rf /): rm -rf /\n" in said
    assert "(commands.require_confirmation: pip install *: no terminal): pip install x\n" in said
    for entry in wait_for(lambda: [one for one in ruled.journal()[before:] if one["kind"] == "command.denied"]):
        assert set(entry["data"]) == {"command", "rule", "times"}
    asked = [one["data"] for one in ruled.journal()[before:] if one["kind"] == "command.asked"]
    assert {one["answer"] for one in asked} == {"no terminal"}
    assert ["pip", "install", "x"] in [one["argv"] for one in asked]


def test_calls_of_another_architecture_end_the_process(ruled: RootedGuest) -> None:
    script = """
import ctypes, mmap, subprocess, sys
if len(sys.argv) > 1:
    m = mmap.mmap(-1, 4096, prot=7); m.write(bytes.fromhex(sys.argv[1]))
    ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()
else:
    open("arch.py", "w").write(open("/proc/self/cmdline").read().split("\\0")[2])
    print([subprocess.call(["python3", "arch.py", one]) for one in ("b80b000000cd80c3", "b8080200400f05c3")])
"""
    assert ruled.exec(*python(script)).stdout.split() == [b"[-31,", b"-31]"]


def test_the_supervisor_is_out_of_reach_and_fails_closed(ruled: RootedGuest) -> None:
    pid = ruled.root(f"systemctl show -p MainPID --value {UNIT}")
    script = f"""
import os, socket, subprocess
for signal in (9, 19):
    try: os.kill({pid}, signal)
    except PermissionError: print("refused")
try: socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).connect("/run/vmsandbox/commands.sock")
except PermissionError: print("refused")
try: open("{RULES}", "w")
except PermissionError: print("refused")
"""
    assert ruled.exec(*python(script)).stdout.split() == [b"refused"] * 4

    # Killed: it comes back, and goes on with the listeners of what runs already.
    waits = """
import subprocess, sys
print("up", flush=True)
for line in sys.stdin:
    try: print(subprocess.run(line.split(), stdout=subprocess.DEVNULL).returncode, flush=True)
    except OSError as error: print(-error.errno, flush=True)
"""
    process = ruled.cli.start("exec", ruled.name, "--", *python(waits), stdin=-1)
    assert process.stdin is not None and process.stdout is not None

    def tried(line: str) -> int:
        process.stdin.write(line.encode() + b"\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
        return int(process.stdout.readline())  # type: ignore[union-attr]

    try:
        assert process.stdout.readline() == b"up\n"
        assert (tried("git --version"), tried("ls")) == (0, -13)
        ruled.root(f"kill -9 {pid}")
        assert (tried("git --version"), tried("ls")) == (0, -13)
        # Stopped: nothing runs, until there is one again, and new connections.
        ruled.root(f"systemd-run -q --on-active=8 systemctl start {UNIT}; systemctl stop {UNIT}")
        ruled.hang_up()
        assert (tried("git --version"), tried("ls")) == (-38, -38)
        wait_for(lambda: ruled.exec("git", "--version", status=None).returncode == 0, timeout=120)
        assert tried("git --version") == -38, "without a listener it never runs anything again"
    finally:
        process.kill()
        process.wait()
    assert ruled.exec("ls", status=None).returncode == REFUSED


def test_only_the_hosts_own_plumbing_is_let_through(ruled: RootedGuest) -> None:
    """The variable counts where sshd hands it to a session's first process, and nowhere else."""
    # sshd takes a variable only where its configuration says so; it is read when a port's service starts
    ruled.root("echo 'AcceptEnv VMSANDBOX_PLUMBING' > /etc/vmsandbox/sshd_network-test.conf")
    ports = " ".join(f"vmsandbox-ssh@{number}" for number in range(1, ruled.info.ssh_ports))
    ruled.root(f"systemctl restart --no-block {ports}")

    def status(name: str, command: str) -> int:
        sandbox = Sandbox.attach(ruled.name, layout=ruled.cli.layout)
        try:
            shell = sandbox.shell()
            channel = shell._transport.open_session(timeout=20)
            channel.set_environment_variable(name, "1")
            channel.exec_command(command)
            return int(channel.recv_exit_status())
        finally:
            sandbox.disconnect()

    # the port that was in use when the others were restarted has the new setting after one connection more
    wait_for(lambda: ruled.exec("git", "--version", status=None).returncode == 0, timeout=120)
    wait_for(lambda: ruled.exec("git", "--version", status=None).returncode == 0, timeout=120)
    assert status("VMSANDBOX_PLUMBING", "mkdir p && rm -r p && tar --version && sh -c 'sh -c true' && ! ls") == 0
    assert status("VMSANDBOX_OTHER", "mkdir p") == REFUSED
    assert status("VMSANDBOX_OTHER", "export VMSANDBOX_PLUMBING=1; mkdir p") == REFUSED
    forged = "import os; os.environ['VMSANDBOX_PLUMBING'] = '1'; os.execvp('bash', ['bash', '-c', 'mkdir p'])"
    assert ruled.exec(*python(forged), status=None).returncode != 0
    assert ruled.exec(*python("import os; print(os.path.exists('p'))")).stdout == b"False\n"


def test_a_person_is_asked_on_the_terminal(ruled: RootedGuest) -> None:
    hostile = "a;b \x1b[31m'\n" + MARK + " y"

    def asked(answer: str | None, *words: str) -> tuple[int, str]:
        terminal = Terminal(ruled, "exec", ruled.name, "--", "pip", "install", *words)
        try:
            terminal.type("y\r" * 3)  # too early: nothing that was typed before answers
            shown = terminal.expect(r"\[a\]lways[^?]*\?", 60)
            page = shown.string[: shown.end()].decode()
            assert "\x1b[?1049h" in page and "pip" in page and "/home/claude-worker" in page
            if words == (hostile,):
                assert r"a;b \x1b[31m'\x0a" + MARK + " y" in page.replace("\r\n", "")
            if answer is not None:
                time.sleep(0.5)  # what is typed within an instant of the question is dropped with what came before
                terminal.type(answer + "\r")
            return terminal.status(60), terminal.output.decode()
        finally:
            terminal.close()

    status, output = asked("y", hostile)
    assert status == 0 and "pip ran" in output
    assert asked("n", "x")[0] == REFUSED
    assert asked("what?", "x")[0] == REFUSED
    assert asked("a", "kept")[0] == 0
    assert ruled.exec("pip", "install", "kept").returncode == 0, "in this session, for exactly these words"
    assert ruled.exec("pip", "install", "kept", "x", status=REFUSED)
    status, output = asked(None, "late")
    assert status == REFUSED and "no answer in" in output
    answers = [one["data"]["answer"] for one in ruled.journal() if one["kind"] == "command.asked"]
    assert answers[-6:-1] == ["yes", "no", "no", "always", "no terminal"] and "no answer" in answers[-1]


def test_a_question_in_a_raw_shell(ruled: RootedGuest) -> None:
    """The shell itself is the host's and always allowed; what is typed before the question goes to the guest."""
    terminal = Terminal(ruled, "shell", ruled.name)
    try:
        terminal.expect(r"\$ ", 60)
        terminal.type("pip install shell\ry\ry\ry\r")
        shown = terminal.expect(r"\[a\]lways[^?]*\?", 60)
        assert b"shell" in shown.string
        time.sleep(0.5)
        assert b"pip ran" not in terminal.read(0.5)
        terminal.type("yes\r")
        terminal.expect(r"pip ran \['install', 'shell'\]", 60)
        terminal.type("ls\r")
        terminal.expect(r"not allowed \(not in commands.allowed\): ls", 60)
        terminal.type("exit 3\r")
        assert terminal.status(60) == 3
    finally:
        terminal.close()


@pytest.mark.alone
def test_what_an_allowed_execve_costs(ruled: RootedGuest, record_property: object) -> None:
    """fork, exec, exit, wait of a small program: at most three times as long as without the rules."""
    script = """
import os, time
def once():
    began = time.perf_counter()
    os.waitpid(os.posix_spawn("/usr/bin/git", ["git", "version"], {}, file_actions=[(os.POSIX_SPAWN_CLOSE, 1)]), 0)
    return time.perf_counter() - began
print(min(once() for _ in range(25)))
"""
    ruled.root(f"cat > /home/claude-worker/cost.py <<'X'\n{script}\nX")
    bare, judged = [], []
    for _round in range(2):
        bare.append(float(ruled.root("runuser -u claude-worker -- python3 /home/claude-worker/cost.py")))
        judged.append(float(ruled.exec("python3", "/home/claude-worker/cost.py").stdout))
    print(f"an execve: {min(bare) * 1000:.1f} ms without rules, {min(judged) * 1000:.1f} ms with them")
    assert min(judged) <= 3 * min(bare)
