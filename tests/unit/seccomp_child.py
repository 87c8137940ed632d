"""Runs in a process of its own: puts a filter on itself, makes one system call, prints its result as JSON.

`python seccomp_child.py PROGRAM NUMBER ARGUMENT…`: [result, errno]. Number "32:N": by `int 0x80`, as 32-bit programs
do. Several programs: joined by commas, each a filter of its own.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def load(program: bytes) -> None:
    """seccomp(2) by prctl(2), as setpriv does it."""
    libc = ctypes.CDLL(None, use_errno=True)
    code = _Program(len(program) // 8, program)
    zero = ctypes.c_ulong(0)
    assert libc.prctl(38, ctypes.c_ulong(1), zero, zero, zero) == 0, "PR_SET_NO_NEW_PRIVS"
    assert libc.prctl(22, ctypes.c_ulong(2), ctypes.byref(code)) == 0, os.strerror(ctypes.get_errno())


def old_call(number: int, *arguments: int) -> int:
    """One call by `int 0x80` on x86_64: eax, ebx, ecx, edx."""
    ebx, ecx, edx = (*arguments, 0, 0, 0)[:3]
    words = [b"\xb8" + number.to_bytes(4, "little"), b"\xbb" + ebx.to_bytes(4, "little")]
    words += [b"\xb9" + ecx.to_bytes(4, "little"), b"\xba" + edx.to_bytes(4, "little")]
    # push rbx; mov …; int 0x80; cdqe; pop rbx; ret
    code = b"\x53" + b"".join(words) + b"\xcd\x80\x48\x98\x5b\xc3"
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    return int(ctypes.CFUNCTYPE(ctypes.c_long)(address)())


def main() -> None:
    programs, number, *rest = sys.argv[1:]
    arguments = [int(one, 0) for one in rest]
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    words = [ctypes.c_ulong(one) for one in arguments]
    for one in programs.split(","):
        load(bytes.fromhex(one))
    if number.startswith("32:"):
        result = old_call(int(number[3:]), *arguments)
        found = [-1, -result] if -4096 < result < 0 else [result, 0]
    else:
        ctypes.set_errno(0)
        result = libc.syscall(ctypes.c_long(int(number)), *words)
        found = [result, ctypes.get_errno()]
    os.write(1, json.dumps(found).encode())
    os._exit(0)


main()
