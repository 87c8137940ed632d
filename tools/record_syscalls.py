"""Runs in a guest: finds out which system calls a shell, git and Python make, and which of them they cannot do without.

    vmsandbox session --empty --image python-dev -- python3 -I -S - < tools/record_syscalls.py

What a program makes is watched with ptrace(2). What it needs is tried: with a seccomp filter that permits only what it
makes, less and less of it, as long as it still does its work; once with EPERM as the answer to the rest, once with
ENOSYS (glibc has a second way for some calls on ENOSYS alone). The filter is in force from the execve on, as in a login
of the worker: `setpriv --seccomp-filter … bash`. Prints a line of JSON for each program: {program: {"makes": […],
"EPERM": […], "ENOSYS": […]}}, numbers of x86_64. Arguments: the names of some programs alone; or `check` and such JSON:
tries whether that is still enough.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import pty
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time

SECONDS = 60.0  # for one try; a program that starts takes a fraction, also under emulation
ANSWERS = ("EPERM", "ENOSYS")
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": os.path.expanduser("~"), "LANG": "C.UTF-8", "TERM": "xterm",
    "GIT_AUTHOR_NAME": "r", "GIT_AUTHOR_EMAIL": "r@example.org", "GIT_COMMITTER_NAME": "r",
    "GIT_COMMITTER_EMAIL": "r@example.org",
}  # fmt: skip
# What the host's check before the first command does in a shell of the worker's (vmsandbox/render/readback.py).
READ_BACK = """
mapfile -t lines < /proc/self/status; read -r c < /proc/self/cgroup
for p in / /tmp /etc/passwd /nowhere; do [ -e $p ]; [ -O $p ]; [ -k $p ]; [ -e $p/. ]
  { [ -f $p ] || [ -d $p ]; } && { : < $p; } 2> /dev/null; done
[ -n "${lines[0]}" ] && [ -n "$c" ] && [ -d / ] && { : < /; } 2> /dev/null && printf 'w%s\\n' orked
"""
# name -> (arguments, what is typed on a terminal or None, what it has to say)
PROGRAMS = {
    "bash": (["bash", "-c", "echo w''orked"], None, b"worked"),
    "the host's read-back": (["bash", "--norc", "-c", READ_BACK], None, b"worked"),
    "bash (interactive)": (["bash", "-l"], b"echo w''orked\nexit 0\n", b"worked"),
    "bash (runs a program)": (["bash", "-c", "uname; echo w''orked"], None, b"Linux\nworked"),
    "git status": (["git", "status"], None, b"On branch"),
    "git commit": (["git", "commit", "-q", "--allow-empty", "-m", "r"], None, b""),
    "python3": (["python3", "-c", "print('w' + 'orked')"], None, b"worked"),
    "pip": (["pip", "--version"], None, b"pip "),
    # The worker's login: what setpriv itself does once the filter is on counts, too.
    "login": (
        ["setpriv", "--no-new-privs", "--seccomp-filter", "FILTER", "bash", "-c", "echo w''orked"],
        None,
        b"worked",
    ),
    # The same behind another profile: all that setpriv does counts.
    "setpriv": (
        ["setpriv", "--no-new-privs", "--seccomp-filter", "FILTER", "bash", "-c", "echo w''orked"],
        None,
        b"worked",
    ),
}
# A try of it takes long: what python3 can spare is tried all at once, what python3 needs is not tried.
BUILDS_ON = {"pip": "python3"}
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
libc.ptrace.restype = ctypes.c_long
TRACEME, SYSCALL, SETOPTIONS, GET_SYSCALL_INFO = 0, 24, 0x4200, 0x420E
# TRACESYSGOOD, FORK, VFORK, CLONE, EXEC; the children go when the tracer goes (EXITKILL).
OPTIONS = 1 | 2 | 4 | 8 | 16 | 0x100000
EXECVE, PRCTL, SET_SECCOMP = 59, 157, 22
ALLOW_ALL = struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000)


class Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def filter_of(permitted: set[int], answer: int) -> bytes:
    """Only these calls of x86_64; all others fail with the error `answer`."""
    code = [(0x20, 0, 0, 4), (0x15, 1, 0, 0xC000003E), (0x06, 0, 0, 0x80000000), (0x20, 0, 0, 0)]
    for number in sorted(permitted):
        code += [(0x15, 0, 1, number), (0x06, 0, 0, 0x7FFF0000)]
    return b"".join(struct.pack("=HBBI", *one) for one in [*code, (0x06, 0, 0, 0x50000 | answer)])


def fresh_repository() -> str:
    """A folder to work in: what a try that failed left behind (index.lock) must not decide the next."""
    folder = os.path.expanduser("~/recorded")
    if not os.path.isdir(folder):
        os.makedirs(f"{folder}/plain")
        init = ["git", "init", "-q", "-b", "main", "--template="]
        subprocess.run(init, cwd=f"{folder}/plain", env=ENVIRONMENT, check=True)
        commit = ["git", "commit", "-q", "--allow-empty", "-m", "first"]
        subprocess.run(commit, cwd=f"{folder}/plain", env=ENVIRONMENT, check=True)
    # Another name each time: something of the try before may still run in the background.
    for old in os.listdir(folder):
        if old != "plain":
            shutil.rmtree(f"{folder}/{old}", ignore_errors=True)
    used = f"{folder}/{time.monotonic_ns()}"
    shutil.copytree(f"{folder}/plain", used)
    return used


def start(argv: list[str], terminal: bool, program: bytes | None, given: bytes = ALLOW_ALL) -> tuple[int, int]:
    """Start a program behind a filter, or traced if there is none. Returns its pid and what it writes to.

    given: what is in the file that setpriv puts on.
    """
    folder = fresh_repository()
    if terminal:
        mine, its = pty.openpty()
    else:
        mine, its = os.pipe()
    with open(f"{folder}/filter", "wb") as file:
        file.write(given)
    argv = [f"{folder}/filter" if word == "FILTER" else word for word in argv]
    path = shutil.which(argv[0], path=ENVIRONMENT["PATH"])
    assert path is not None, argv[0]
    # All that is needed is made before: after the filter not even memory can be had.
    words = (ctypes.c_char_p * (len(argv) + 1))(*map(os.fsencode, argv), None)
    variables = [f"{name}={value}".encode() for name, value in ENVIRONMENT.items()]
    environment = (ctypes.c_char_p * (len(variables) + 1))(*variables, None)
    code = Program(len(program or b"") // 8, program)
    path_bytes, zero, one, two = os.fsencode(path), ctypes.c_ulong(0), ctypes.c_ulong(1), ctypes.c_ulong(2)
    execve, pointer = libc.execve, ctypes.byref(code)
    pid = os.fork()
    if pid:
        os.close(its)
        return pid, mine
    try:
        os.setsid()
        os.chdir(folder)
        if terminal:
            fcntl.ioctl(its, termios.TIOCSCTTY, 0)
        os.dup2(its if terminal else os.open("/dev/null", os.O_RDONLY), 0)
        os.dup2(its, 1)
        os.dup2(its, 2)
        os.closerange(3, 64)
        if program is None:
            libc.ptrace(TRACEME, 0, None, None)
            os.kill(os.getpid(), signal.SIGSTOP)
        elif libc.prctl(38, one, zero, zero, zero) or libc.prctl(22, two, pointer):
            os._exit(99)
        execve(path_bytes, words, environment)
    finally:
        os._exit(98)


def works(name: str, permitted: set[int], answer: int) -> bool:
    """Whether the program does its work with these calls."""
    argv, typed, said = PROGRAMS[name]
    tried = filter_of(permitted, answer)
    before, given = (ALLOW_ALL, tried) if name == "login" else (tried, ALLOW_ALL)
    pid, fd = start(argv, typed is not None, before, given)
    if typed is not None:
        os.write(fd, typed)
    heard, until, status = b"", time.monotonic() + SECONDS, None
    while time.monotonic() < until and len(heard) < 1 << 20:
        ready, _, _ = select.select([fd], [], [], 0.02)
        with contextlib.suppress(OSError):  # EIO: the other side of a terminal is closed
            if ready:
                heard += os.read(fd, 65536)
        done, found = os.waitpid(pid, os.WNOHANG)
        if done:
            status = found
            break
    if status is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)  # what it may have left behind
    with contextlib.suppress(OSError):
        while select.select([fd], [], [], 0)[0] and (more := os.read(fd, 65536)):
            heard += more
    os.close(fd)
    return status == 0 and said in heard.replace(b"\r\n", b"\n")


def made(name: str) -> set[int]:
    """The calls that the program and its children make, from its execve on."""
    argv, typed, said = PROGRAMS[name]
    root, fd = start(argv, typed is not None, None)
    info = ctypes.create_string_buffer(88)  # struct ptrace_syscall_info: op at 0, number at 24
    calls: set[int] = set()
    recording, heard = False, b""
    os.waitpid(root, 0)
    libc.ptrace(SETOPTIONS, root, None, OPTIONS)
    libc.ptrace(SYSCALL, root, None, None)
    if typed is not None:
        os.write(fd, typed)
    while True:
        try:
            pid, status = os.waitpid(-1, 0x40000000)  # __WALL
        except ChildProcessError:
            break  # also what went into the background (git's maintenance) has ended
        with contextlib.suppress(OSError):
            while select.select([fd], [], [], 0)[0] and (more := os.read(fd, 65536)):
                heard += more
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            continue
        stop, deliver = os.WSTOPSIG(status), 0
        if stop == signal.SIGTRAP | 0x80:
            libc.ptrace(GET_SYSCALL_INFO, pid, len(info), info)
            number, first = struct.unpack_from("=QQ", info, 24)
            if info[0] == b"\x01":  # PTRACE_SYSCALL_INFO_ENTRY
                if recording or (number == EXECVE and name != "login"):
                    recording = True
                    calls.add(number)
                recording = recording or (number == PRCTL and first == SET_SECCOMP)
        elif stop not in (signal.SIGTRAP, signal.SIGSTOP):
            deliver = stop
        libc.ptrace(SYSCALL, pid, None, deliver)
    os.close(fd)
    assert said in heard.replace(b"\r\n", b"\n"), (name, heard)
    return calls


def needed(name: str, makes: set[int], answer: int, known: tuple[set[int], set[int]]) -> set[int]:
    """The calls of `makes` that are left when no more can be taken away. known: what it builds on makes and needs."""
    left = set(makes)
    assert works(name, left, answer), f"{name} does not work with all that it makes"

    def without(group: list[int]) -> None:
        """Take a group away, or those of it that can be."""
        if works(name, left - set(group), answer):
            left.difference_update(group)
        elif len(group) > 1:
            without(group[: len(group) // 2])
            without(group[len(group) // 2 :])

    if spare := sorted(makes & (known[0] - known[1])):
        without(spare)
    for number in sorted(makes - known[0]):
        without([number])
    return left


def main() -> None:
    wanted = sys.argv[1:] if sys.argv[1:2] != ["check"] else json.loads(sys.argv[2])
    names = [name for name in wanted or PROGRAMS if shutil.which(PROGRAMS[name][0][0], path=ENVIRONMENT["PATH"])]
    done: dict[str, dict[str, list[int]]] = {}
    for name in names:
        if sys.argv[1:2] == ["check"]:
            expected = json.loads(sys.argv[2])[name]
            found = {"new": sorted(made(name) - set(expected["makes"]))}
            found |= {text: works(name, set(expected[text]), getattr(errno, text)) for text in ANSWERS}
        else:
            # Twice: what depends on timing is not made each time.
            makes = made(name) | made(name)
            found = {"makes": sorted(makes)}
            base = done.get(BUILDS_ON.get(name, ""), {})
            for text in ANSWERS:
                known = (set(base.get("makes", ())), set(base.get(text, ())))
                found[text] = sorted(needed(name, makes, getattr(errno, text), known))
            done[name] = found
        print(json.dumps({name: found}), flush=True)


main()
