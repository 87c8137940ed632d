"""What a receiver that was taken over could still do: each layer alone, tried from inside."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ATTEMPTS = """
import ctypes, errno, json, os, socket, sys
sys.path.append(sys.argv[1])
from vmsandbox.receive import confine
folder, user, off = int(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4].split(",")
parent = os.getppid()
for name in off:
    setattr(confine, "_" + name, lambda *_: False)
known = os.open(sys.argv[5], os.O_RDONLY)
in_force = confine.confine(folder, user, 1 << 16)

def outcome(attempt):
    try:
        attempt()
    except BaseException as error:
        return type(error).__name__
    return "done"

def child():
    if os.fork() == 0:
        os._exit(0)

def write(name, size=1, dir_fd=folder):
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400, dir_fd=dir_fd)
    try:
        while size > 0:
            size -= os.write(fd, b"x" * 4096)
    finally:
        os.close(fd)

tried = {
    "blob": outcome(lambda: (write("incoming"), os.rename("incoming", "a", src_dir_fd=folder, dst_dir_fd=folder))),
    "large": outcome(lambda: write("large", 1 << 20)),
    "outside": outcome(lambda: write("../outside")),
    "absolute": outcome(lambda: write("/tmp/vmsandbox-test-outside")),
    "read": outcome(lambda: os.open("/etc/hostname", os.O_RDONLY)),
    "read back": outcome(lambda: os.open("a", os.O_RDONLY, dir_fd=folder)),
    "list": outcome(lambda: os.listdir(sys.argv[5])),
    "link": outcome(lambda: os.symlink("/etc", "link", dir_fd=folder)),
    "hard link": outcome(lambda: os.link("a", "hard", src_dir_fd=folder, dst_dir_fd=folder)),
    "folder": outcome(lambda: os.mkdir("folder", dir_fd=folder)),
    "fifo": outcome(lambda: os.mkfifo("fifo", dir_fd=folder)),
    "chmod": outcome(lambda: os.chmod("a", 0o4755, dir_fd=folder)),
    "socket": outcome(socket.socket),
    "fork": outcome(child),
    "kill": outcome(lambda: os.kill(parent, 0)),
    "root": outcome(lambda: os.setuid(0)),
}
if off != ["landlock", "seccomp"]:  # nothing else forbids it: it would succeed, and nobody would write the answer
    tried["exec"] = outcome(lambda: os.execv("/bin/true", ["true"]))
os.write(1, json.dumps([in_force, tried]).encode())
os._exit(0)
"""


LANDLOCK = ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1) >= 1  # landlock_create_ruleset(VERSION)
FILTER = os.uname().machine in ("x86_64", "aarch64") and "\nSeccomp:" in Path("/proc/self/status").read_text()


def attempts(tmp_path: Path, off: str = "") -> tuple[list[str], dict[str, str]]:
    """(what was in force, what became of each attempt) with some layers switched off."""
    place = tmp_path / "place"
    blobs = place / "blobs"
    blobs.mkdir(parents=True)
    user = None
    if os.geteuid() == 0:
        user = 0x70001234
        os.chown(blobs, user, user)
    fd = os.open(blobs, os.O_RDONLY | os.O_DIRECTORY)
    try:
        argv = [sys.executable, "-IS", "-c", ATTEMPTS, ROOT, str(fd), json.dumps(user), off, tmp_path]
        done = subprocess.run(argv, pass_fds=[fd], capture_output=True, check=True, timeout=60)
    finally:
        os.close(fd)
    assert {path.name for path in place.iterdir()} == {"blobs"}
    in_force, tried = json.loads(done.stdout)
    return in_force, tried


def test_all_layers(tmp_path: Path) -> None:
    in_force, tried = attempts(tmp_path)
    if os.geteuid() == 0:
        assert "user" in in_force
    assert tried.pop("blob") == "done"
    assert tried.pop("large") in ("OSError", "PermissionError"), "the limit on a file's size"
    assert ("landlock" in in_force) == LANDLOCK
    if not LANDLOCK:
        pytest.skip("this kernel has no Landlock")
    assert "done" not in tried.values(), tried
    assert sorted(path.name for path in (tmp_path / "place/blobs").iterdir()) == ["a", "large"]
    assert (tmp_path / "place/blobs/large").stat().st_size <= (1 << 16) + 4096


def test_landlock_alone(tmp_path: Path) -> None:
    in_force, tried = attempts(tmp_path, "seccomp")
    assert ("landlock" in in_force) == LANDLOCK
    if not LANDLOCK:
        pytest.skip("this kernel has no Landlock")
    assert tried["blob"] == "done"
    for what in ("outside", "absolute", "read", "read back", "link", "folder", "fifo", "list", "exec", "fork"):
        assert tried[what] != "done", what


def test_seccomp_alone(tmp_path: Path) -> None:
    in_force, tried = attempts(tmp_path, "landlock")
    assert ("seccomp" in in_force) == FILTER
    if not FILTER:
        pytest.skip("no filter for this processor or kernel")
    assert tried["blob"] == "done"
    for what in ("link", "hard link", "folder", "fifo", "chmod", "socket", "fork", "kill", "root", "exec", "list"):
        assert tried[what] == "PermissionError", what


def test_the_user_alone(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    in_force, tried = attempts(tmp_path, "landlock,seccomp")
    assert in_force == ["user"] and tried["blob"] == "done"
    for what in ("outside", "kill", "root", "fork"):
        assert tried[what] != "done", what
