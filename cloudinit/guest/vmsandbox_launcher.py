"""Puts a seccomp filter in front of a program: every execve and execveat of it and its children is the supervisor's
to answer.

    vmsandbox-launcher PROGRAM [ARGUMENT…]     as root, before anything of the session runs

The filter cannot be taken off and is inherited by every child; a second one that the worker puts on top can only
forbid more, and the kernel allows no second listener. Without the supervisor this does not start anything.
"""

import _socket as socket  # not socket, whose imports take longer than all of this: it runs before every connection
import ctypes
import errno
import os
import struct
import sys
import time

SOCKET = "/run/vmsandbox/commands.sock"
PATIENCE = 15  # seconds for the supervisor to come up
SECCOMP, SET_MODE_FILTER = 317, 1
NEW_LISTENER, WAIT_KILLABLE_RECV = 1 << 3, 1 << 5
PR_SET_NO_NEW_PRIVS = 38
ALLOW, USER_NOTIF, KILL_PROCESS = 0x7FFF0000, 0x7FC00000, 0x80000000
LOAD, JUMP_EQUAL, JUMP_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, JGE, BPF_RET|K
ARCH_X86_64, X32, EXECVE, EXECVEAT = 0xC000003E, 0x40000000, 59, 322

# struct seccomp_data: nr at 0, arch at 4. A call of another architecture has other numbers: such a process ends.
PROGRAM = (
    (LOAD, 0, 0, 4),
    (JUMP_EQUAL, 0, 5, ARCH_X86_64),
    (LOAD, 0, 0, 0),
    (JUMP_AT_LEAST, 3, 0, X32),
    (JUMP_EQUAL, 3, 0, EXECVE),
    (JUMP_EQUAL, 2, 0, EXECVEAT),
    (RETURN, 0, 0, ALLOW),
    (RETURN, 0, 0, KILL_PROCESS),
    (RETURN, 0, 0, USER_NOTIF),
)
LIBC = ctypes.CDLL(None, use_errno=True)


def install():
    """Install the filter; returns the listener's descriptor. Raises OSError."""
    code = b"".join(struct.pack("=HBBI", *one) for one in PROGRAM)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(PROGRAM), ctypes.addressof(buffer))
    for flags in (NEW_LISTENER | WAIT_KILLABLE_RECV, NEW_LISTENER):  # WAIT_KILLABLE_RECV: since Linux 5.19
        for alone in (True, False):
            fd = LIBC.syscall(SECCOMP, SET_MODE_FILTER, ctypes.c_uint(flags), program)
            if fd >= 0:
                return fd
            if ctypes.get_errno() == errno.EACCES and alone:  # no CAP_SYS_ADMIN: the kernel wants this instead
                LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
                continue
            break
        if ctypes.get_errno() != errno.EINVAL:
            break
    raise OSError(ctypes.get_errno(), "seccomp")


def hand_over(path, patience=PATIENCE):
    """Install the filter and give its listener to the supervisor at the socket `path`; it has it when this returns."""
    until = time.monotonic() + patience
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    while True:
        try:
            peer.connect(path)
            break
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
    peer.settimeout(patience)
    listener = install()
    peer.sendmsg([b"listener"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("=i", listener))])
    os.close(listener)
    if peer.recv(16) != b"ok":
        raise OSError(errno.ECONNREFUSED, "the supervisor did not take it")
    peer.close()


def main():
    path, program = SOCKET, sys.argv[1:]
    if program[:1] == ["--socket"]:
        path, program = program[1], program[2:]
    hand_over(path)
    os.execv(program[0], program)
