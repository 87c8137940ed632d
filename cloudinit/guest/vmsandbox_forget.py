"""Takes a session's identity away again: a guest that has had one, and ran a policy's own command, becomes a template.

Without it the sessions made from that template would share its keys, or find a process of that command's running,
outside of everything that holds theirs. What stays is what the worker wrote into its home, outside of its projects.
"""

import ctypes
import os
import pwd
import select
import shutil
import socket
import stat
import subprocess
import time

from vmsandbox_files import write
from vmsandbox_policy import set_shell

HOME, RUN = "/home/claude-worker", "/run/vmsandbox"
# What is a session's own: the name of its file below RUN, and what that is mounted over.
OWN = {"hostname": "/etc/hostname", "machine_id": "/etc/machine-id", "boot_id": "/proc/sys/kernel/random/boot_id"}
# name below HOME: its mode, and whether what is in it goes
FOLDERS = {"projects": (0o700, True), ".claude": (0o500, False)}
SLICE = "/sys/fs/cgroup/vmsandbox.slice/vmsandbox-worker.slice"
SECONDS = 20.0
MNT_DETACH = 2

_before = {}  # path: (its mode, its bytes, or how many of them it had), None where there was none; in the order of writing


def remember(path, appended=False):
    """Called before a file is written whose content is this session's alone."""
    if path in _before:
        return
    try:
        mode = stat.S_IMODE(os.stat(path).st_mode)
        if appended:
            _before[path] = (mode, os.path.getsize(path))
            return
        with open(path, "rb") as file:
            _before[path] = (mode, file.read())
    except FileNotFoundError:
        _before[path] = None


def forget(gate, shell):
    """gate: the descriptor that port 0 waits for. shell: the worker's from now on, if it changes."""
    for path, was in _before.items():
        put_back(path, was)
    _before.clear()
    libc = ctypes.CDLL(None, use_errno=True)
    for name, path in OWN.items():
        if os.path.exists(RUN + "/" + name):
            if libc.umount2(path.encode(), MNT_DETACH):
                raise OSError(ctypes.get_errno(), "umount of " + path)
            os.unlink(RUN + "/" + name)
    with open("/etc/hostname") as file:
        socket.sethostname(file.read().strip())
    # The ports' units come back by themselves, and wait for an identity.
    end_worker()
    tidy_home(pwd.getpwnam("claude-worker"))
    if shell:
        set_shell(shell)
    while select.select([gate], [], [], 0)[0]:
        os.read(gate, 512)
    subprocess.run(["systemctl", "restart", "vmsandbox-ssh@*.service"], stdin=subprocess.DEVNULL, check=True)
    left = processes_of(pwd.getpwnam("claude-worker").pw_uid)
    if left:
        raise RuntimeError("the worker still has processes: %s" % left)
    return {}


def put_back(path, was):
    if was is None:
        if os.path.lexists(path):
            os.unlink(path)
    elif isinstance(was[1], int):
        os.truncate(path, was[1])
    else:
        write(path, was[1], was[0])


def end_worker():
    """All of its processes at once (cgroups: cgroup.kill), so that none can start another meanwhile."""
    uid = pwd.getpwnam("claude-worker").pw_uid
    until = time.monotonic() + SECONDS
    while True:
        with open(SLICE + "/cgroup.kill", "w") as file:
            file.write("1")
        if not processes_of(uid):
            return
        if time.monotonic() > until:
            raise RuntimeError("the worker's processes do not end: %s" % processes_of(uid))
        time.sleep(0.05)


def processes_of(uid):
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open("/proc/%s/status" % name) as file:
                fields = dict(line.split(":", 1) for line in file)
        except (FileNotFoundError, ProcessLookupError):
            continue
        if str(uid) in fields["Uid"].split() and not fields["State"].strip().startswith("Z"):
            found.append("%s %s" % (name, fields["Name"].strip()))
    return found


def tidy_home(worker):
    """The home and its folders as they were made: no process of the worker's runs that could exchange them meanwhile."""
    os.chmod(HOME, 0o700)
    for name, (mode, emptied) in FOLDERS.items():
        path = HOME + "/" + name
        if os.path.lexists(path) and (emptied or not stat.S_ISDIR(os.lstat(path).st_mode)):
            if stat.S_ISDIR(os.lstat(path).st_mode):
                shutil.rmtree(path)
            else:
                os.unlink(path)
        if not os.path.lexists(path):
            os.mkdir(path, mode)
            os.chown(path, worker.pw_uid, worker.pw_gid)
        os.chmod(path, mode)
