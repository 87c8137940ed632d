"""A policy's file system, kernel surface and limits hold in a real guest against a worker that attacks them.

One guest with one policy for nearly all; each test says which key it is about.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from confined import CONFINED, PROCESSES, TMP_BYTES, Inside, project_with_secrets
from harness import Cli

from vmsandbox.errors import GuestError, RefusedError
from vmsandbox.guest.control import ControlPort
from vmsandbox.policy.values import FilesystemPolicy, Policy, ResourcesPolicy
from vmsandbox.render.guest_paths import ETC_NEEDED
from vmsandbox.session.asked.request import SessionRequest
from vmsandbox.session.sandbox import Sandbox

USERNS = "unshare --user --map-root-user --mount"
# io_uring_setup, perf_event_open, bpf, userfaultfd
CLOSED = """
import ctypes, struct
libc, room, array = ctypes.CDLL(None, use_errno=True), bytes(120), struct.pack("5I", 2, 4, 4, 1, 0)
for call in ((425, 8, room), (298, room, 0, -1, -1, 0), (321, 0, array, 20), (323, 0)):
    print(libc.syscall(*call), ctypes.get_errno())
"""


@pytest.fixture(scope="module")
def guarded_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return project_with_secrets(tmp_path_factory.mktemp("confined"))


@pytest.fixture(scope="module")
def inside(cli: Cli, guarded_project: Path) -> Iterator[Inside]:
    request = SessionRequest(name="confined", policy=CONFINED, allow_emulation=True)
    with Sandbox.open(guarded_project, request=request, layout=cli.layout) as sandbox:
        yield Inside(sandbox)


# -- filesystem.project, output; a guest that is not as a policy says ----------------------------------------------


def test_a_read_only_project_and_a_policy_that_the_guest_was_not_made_for(cli: Cli, guarded_project: Path) -> None:
    """Neither needs a template of its own, nor a guest of the module's."""
    files = FilesystemPolicy(read_only=True, output="./output", denied_paths=("./secrets",))
    with Sandbox.open(request=SessionRequest(allow_emulation=True), layout=cli.layout) as sandbox:
        inside = Inside(sandbox)
        sandbox.push(guarded_project, Policy(filesystem=files))
        inside.sh("touch output/x ~/x")
        inside.refused(
            "touch src/app.py", "echo x > README.md", "git commit --allow-empty -m x", "rm -r .git", "ls secrets",
            "mv output o", "mv ../guarded ../g", "mv ~/projects ~/p", "chmod 700 .", "unshare -Ur true",
        )  # fmt: skip
        assert {"output", "output/x"} <= set(sandbox.collect().returned.items)
        with pytest.raises(RefusedError, match="not confined") as caught:
            sandbox.push(guarded_project, Policy(filesystem=files, resources=ResourcesPolicy(processes=50)))
        assert "unit.pids is" in caught.value.details and "slice.pids is" in caught.value.details
        inside.refused("touch README.md")  # guarded again although it was refused


def test_it_was_read_back_before_anything_ran(inside: Inside) -> None:
    kinds = [record["kind"] for record in inside.sandbox.journal.read()]
    assert "policy.enforced" in kinds
    assert "command.started" not in kinds[: kinds.index("policy.enforced")]


# -- filesystem.allowed_paths --------------------------------------------------------------------------------------


def test_nothing_but_what_is_allowed_can_be_written(inside: Inside) -> None:
    inside.sh("touch src/new tests/new /tmp/claude-work/new .git/new && rm src/new tests/new .git/new")
    assert inside.sh("mktemp").startswith("/tmp/claude-work/"), "TMPDIR"
    found = inside.sh(
        "for m in $(cut -d' ' -f5 /proc/self/mountinfo | sort -u); do case $m in /proc*|/sys*|/dev*) continue;; esac;"
        "find $m -xdev -writable \\( -type d -o -type f \\) -prune; done 2>/dev/null | sort -u; true"
    ).split()
    folder = inside.sandbox.info.guest_folder
    allowed = (f"{folder}/src", f"{folder}/tests", f"{folder}/.git", "/tmp/claude-work", "/srv/fast")
    assert [path for path in found if not path.startswith(allowed)] == []
    inside.refused(
        "touch /dev/shm/x", "touch ~/x", "touch /tmp/x", "touch /var/tmp/x", "touch /run/lock/x", "mkdir ~/projects/y"
    )


def test_the_rest_of_the_project_is_as_it_was_pushed(inside: Inside) -> None:
    before = inside.sh("find . -path ./.git -prune -o -printf '%p %m %s %T@ %i\\n' | sort; sha256sum README.md")
    inside.refused(
        "echo x > README.md",
        "echo x >> README.md",
        "echo x > src/link",
        "chmod 777 README.md",
        "touch README.md",
        "touch -d yesterday README.md",
        "mv README.md R",
        "mv src src2",
        "rm README.md",
        "ln README.md src/hard",
        "cp --remove-destination /bin/true README.md",
        "truncate -s 0 README.md",
        "mkdir new",
        "mv ../guarded ../other",
        "mv ../../projects ../../p",
        "python3 -c 'import os; os.truncate(\"/proc/self/cwd/README.md\", 0)'",
        "cd /proc/self/root$PWD && echo x > README.md",
        "setfattr -n user.a -v 1 README.md",
        "python3 -c 'import os; os.setxattr(\"README.md\", \"user.a\", b\"1\")'",
        "mount -o remount,rw .",
        "umount .",
        f"{USERNS} mount -o remount,bind,rw .",
        f"{USERNS} sh -c 'mount -o remount,bind,rw $PWD && echo x > README.md'",
        f"{USERNS} umount .",
        f"{USERNS} sh -c 'mkdir -p /tmp/claude-work/m && mount --rbind $PWD /tmp/claude-work/m "
        "&& mount -o remount,bind,rw /tmp/claude-work/m && echo x > /tmp/claude-work/m/README.md'",
    )  # fmt: skip
    after = inside.sh("find . -path ./.git -prune -o -printf '%p %m %s %T@ %i\\n' | sort; sha256sum README.md")
    assert after == before


# -- filesystem.denied_paths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["secrets", "config/keys", "~/.ssh", "~/.config/vault"])
def test_what_is_denied_cannot_be_entered_nor_made(inside: Inside, path: str) -> None:
    assert inside.sh(f"stat -c '%a %u' {path}") == "0 0"
    inside.refused(
        f"ls {path}", f"cd {path}", f"mkdir {path}/x", f"touch {path}/x", f"rmdir {path}", f"mv {path} {path}2",
        f"chmod 700 {path}", f"cat {path}/token", f"ls /proc/self/root/$(realpath {path})",
        f"mv $(dirname $(realpath {path})) /tmp/claude-work/away", f"mount -t tmpfs x {path}", f"umount {path}",
        f"{USERNS} umount {path}", f"{USERNS} sh -c 'umount -l {path}; ls {path}'",
        f"{USERNS} ls {path}",
    )  # fmt: skip


def test_of_etc_only_what_every_program_needs_is_there(inside: Inside) -> None:
    names = set(inside.sh("ls -A /etc").split())
    assert names <= {name.split("/")[0] for name in ETC_NEEDED}
    assert inside.sh("ls -A /etc/ssh") == "ssh_config"
    inside.refused(
        "cat /etc/shadow",
        "ls /etc/systemd",
        "touch /etc/x",
        "echo >> /etc/passwd",
        "umount /etc",
        f"{USERNS} umount /etc",
    )
    assert inside.sh("id -un") == "claude-worker" and inside.sh("getent hosts localhost") and inside.sh("git --version")
    assert inside.python("import ssl, pwd; ssl.create_default_context(); print(pwd.getpwuid(1000).pw_dir)")
    assert inside.sh("cat /etc/machine-id") and inside.sh("cat /proc/sys/kernel/random/boot_id")


def test_what_is_denied_does_not_come_back_nor_stand_in_the_way(inside: Inside) -> None:
    inside.sh(
        "git status --porcelain && echo y > src/made && git add -A src && git commit -qm x --author 'a <a@b>' || true"
    )
    collected = inside.sandbox.collect()
    assert not collected.refused
    names = set(collected.returned.items)
    assert "src/made" in names and not {name for name in names if name.startswith(("secrets", "config/keys"))}


# -- filesystem.tmpfs ----------------------------------------------------------------------------------------------


def test_memory_is_limited_and_runs_nothing(inside: Inside) -> None:
    options = inside.sh("findmnt -no OPTIONS /tmp | tail -1 || grep ' /tmp ' /proc/self/mountinfo").split(",")
    assert {"nosuid", "nodev", "noexec"} <= set(options)
    inside.sh("cp /bin/true /tmp/claude-work/t && cp /bin/true /srv/fast/t && /srv/fast/t")
    inside.refused(
        "/tmp/claude-work/t",
        "/lib64/ld-linux-x86-64.so.2 /tmp/claude-work/t",
        f"{USERNS} sh -c 'mount -o remount,bind,exec /tmp; /tmp/claude-work/t'",
        f"head -c {TMP_BYTES + 4096} /dev/zero > /tmp/claude-work/fill",
        f"head -c {5 << 20} /dev/zero > /srv/fast/fill",
    )
    assert (
        int(inside.sh("du -sb /tmp/claude-work | cut -f1; rm -f /tmp/claude-work/fill /srv/fast/fill"))
        <= TMP_BYTES + 4096
    )
    with closing(Other(inside)) as other:
        assert other.sh("ls /tmp/claude-work/t") == "/tmp/claude-work/t", "all connections share it"


# -- kernel --------------------------------------------------------------------------------------------------------


def test_no_program_gives_rights(inside: Inside) -> None:
    status = dict(line.split(":\t") for line in inside.sh("cat /proc/self/status").splitlines() if ":\t" in line)
    assert status["NoNewPrivs"] == "1"
    assert all(int(status[f"Cap{name}"], 16) == 0 for name in ("Inh", "Prm", "Eff", "Amb"))
    assert int(status["CapBnd"], 16) == 0x400E9 | 1 << 13, "what a login needs, and net_raw"
    setuid = inside.sh("find / -xdev -perm /6000 -type f 2>/dev/null; true").split()
    assert setuid, "or the test shows nothing"
    inside.sh('cp /usr/bin/id /srv/fast/id && chmod 6755 /srv/fast/id && [ "$(/srv/fast/id -u)" = 1000 ]')
    inside.refused("su -c true", "mount -t tmpfs x /mnt", "newgrp root -c true", "python3 -c 'import os; os.setuid(0)'")


def test_the_kernels_doors_are_closed(inside: Inside) -> None:
    tracer = "import ctypes,sys;sys.exit(ctypes.CDLL(None).ptrace(16,int(sys.argv[1]),0,0)!=0)"
    inside.refused(
        f'python3 -c "{tracer}" $(awk "/PPid/{{print \\$2}}" /proc/$$/status)',
        f'python3 -c "{tracer}" 1',
        "cat /dev/fuse", "cat /dev/vsock", "cat /dev/kmsg", "dmesg", "cat /proc/1/environ", "ls /proc/1/root/",
        "python3 -c 'import socket; socket.socket(socket.AF_UNIX).connect(\"/run/ssh-unix-local/socket\")'",
        "echo 0 > /proc/sys/kernel/yama/ptrace_scope", "kill -9 $(pgrep -u 0 -f vmsandbox-control)",
        "echo max > /sys/fs/cgroup/vmsandbox.slice/vmsandbox-worker.slice/pids.max",
    )  # fmt: skip
    said = inside.python(CLOSED).split("\n")
    assert all(line in ("-1 1", "-1 13") for line in said), f"EPERM or EACCES, not {said}"
    assert inside.sh("head -1 /proc/kallsyms | cut -c1-16") == "0" * 16


def test_the_system_call_filter_is_loaded_for_all_but_the_hosts_own(inside: Inside) -> None:
    """The pushed project has a link, which tar could not have made under the filter."""
    assert inside.sh("readlink src/link") == "../README.md"
    for attempt in (
        "ln -s a src/l",
        'python3 -c \'import os; os.symlink("a", "src/l")\'',
        "env -i VMSANDBOX_PLUMBING=1 bash -lc 'ln -s a src/l'",
    ):
        status, _out, err = inside.try_(attempt)
        assert status != 0 and ("not supported" in err), err
    inside.refused(f"{USERNS} ln -s a src/l")


# -- resources.processes, and memory -------------------------------------------------------------------------------


class Other:
    """A second connection to the guest."""

    def __init__(self, inside: Inside) -> None:
        self.sandbox = Sandbox.attach(inside.sandbox.name, layout=inside.sandbox.layout)
        self.inside = Inside(self.sandbox)

    def sh(self, script: str) -> str:
        return self.inside.sh(script)

    def close(self) -> None:
        self.sandbox.disconnect()


def control_answers(inside: Inside) -> bool:
    with closing(ControlPort(inside.sandbox.folder.run / "control")) as control:
        try:
            control.request("no such operation", deadline=60)
        except GuestError as error:
            return "could not do" in error.brief
    return False


def test_a_fork_bomb_ends_at_the_limit_and_all_else_answers(inside: Inside) -> None:
    bomb = """
import os, time
made = 0
try:
    while True:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        made += 1
except OSError as error:
    print(made, error.errno, flush=True)
time.sleep(60)"""
    channel = inside.sandbox.shell().start(["python3", "-c", bomb])
    try:
        channel.settimeout(60)
        made, error = channel.recv(100).decode().split()
        assert int(made) <= PROCESSES and int(error) == 11, "EAGAIN"
        with closing(Other(inside)) as other:
            assert other.sh("echo alive") == "alive"
            assert control_answers(inside)
            left = "pgrep -u claude-worker python3 >/dev/null"
            other.sh(f"pkill -9 python3; for n in $(seq 200); do {left} || break; sleep 0.1; done")
    finally:
        channel.close()


def test_a_memory_bomb_is_killed_and_all_else_answers(inside: Inside) -> None:
    bomb = "x = []\nwhile True: x.append(b'x' * (1 << 22))"
    began = time.monotonic()
    status, _out, _err = inside.try_(f'exec python3 -c "{bomb}"', timeout=120)
    assert status != 0 and time.monotonic() - began < 120
    assert inside.sh("echo alive") == "alive", "the connection it ran on goes on"
    with closing(Other(inside)) as other:
        assert other.sh("echo alive") == "alive"
    assert control_answers(inside)
    assert "oom_kill 0" not in inside.sh("cat /sys/fs/cgroup/vmsandbox.slice/vmsandbox-worker.slice/memory.events")


# -- again ---------------------------------------------------------------------------------------------------------


def test_a_later_push_and_a_later_connection_are_held_too(inside: Inside, guarded_project: Path) -> None:
    inside.sandbox.disconnect()  # its unit starts anew, where the project is guarded already
    inside.refused("touch README.md", "ls secrets")
    inside.sandbox.push(guarded_project, CONFINED)
    inside.refused("touch README.md", "ls secrets", "mkdir ~/projects/y")
    inside.sh("touch src/new")
    inside.sandbox.disconnect()
    inside.refused("touch README.md", "ls secrets")
    inside.sh("touch src/new")
    kinds = [record["kind"] for record in inside.sandbox.journal.read()]
    assert kinds.count("policy.enforced") == 2
