"""Makes the kernel's program of a seccomp profile with libseccomp, and proves what libseccomp leaves open.

Without libseccomp this project would keep tables of system calls and their multiplexers (socketcall, ipc) of its own.
Without the proof it would be trusted where it does not promise anything: of two entries for one call whose conditions
overlap, libseccomp 2.5 takes the more lenient as easily as the stricter one.

libseccomp: seccomp_rule_add(3), seccomp_export_bpf(3), seccomp_syscall_resolve_name(3). The library is on every host
with QEMU or systemd, which are linked with it.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from vmsandbox.errors import HostError, UserInputError
from vmsandbox.policy.seccomp.proof import JUMP, JUMP_IF_AT_LEAST, JUMP_IF_EQUAL, LOAD, RETURN, contradiction, prove
from vmsandbox.policy.seccomp.values import ARCHITECTURES, NATIVE, OPERATORS, Condition, Filter, Rule, rank

LIBRARY = "libseccomp.so.2"
MAX_INSTRUCTIONS = 4096  # BPF_MAXINSNS, linux/bpf_common.h
_UNKNOWN = -1  # __NR_SCMP_ERROR
_X32_BIT = 0x40000000  # __X32_SYSCALL_BIT
# struct seccomp_data, linux/seccomp.h.
_AT_NUMBER, _AT_ARCHITECTURE = 0, 4
_KILL_PROCESS = 0x80000000
_BAD_ARCHITECTURE, _OPTIMIZE = 2, 8  # enum scmp_filter_attr
_BINARY_TREE = 2
# Newer than the tables of libseccomp 2.5; from 424 on a call has the same number on all architectures
# (Documentation/process/adding-syscalls.rst; arch/x86/entry/syscalls/syscall_64.tbl).
_NEWER = {
    "process_mrelease": 448, "futex_waitv": 449, "set_mempolicy_home_node": 450, "cachestat": 451, "fchmodat2": 452,
    "map_shadow_stack": 453, "futex_wake": 454, "futex_wait": 455, "futex_requeue": 456, "statmount": 457,
    "listmount": 458, "lsm_get_self_attr": 459, "lsm_set_self_attr": 460, "lsm_list_modules": 461, "mseal": 462,
    "setxattrat": 463, "getxattrat": 464, "listxattrat": 465, "removexattrat": 466, "open_tree_attr": 467,
    "file_getattr": 468, "file_setattr": 469,
}  # fmt: skip


class _Argument(ctypes.Structure):
    """struct scmp_arg_cmp."""

    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("datum_a", ctypes.c_uint64),
        ("datum_b", ctypes.c_uint64),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise HostError(
            "a seccomp profile cannot be compiled here: libseccomp is missing",
            details=str(error),
            resolution="install it: apt install libseccomp2",
        ) from error
    pointer, word = ctypes.c_void_p, ctypes.c_uint32
    library.seccomp_init.restype = pointer
    library.seccomp_init.argtypes = (word,)
    library.seccomp_release.argtypes = (pointer,)
    library.seccomp_release.restype = None
    library.seccomp_attr_set.argtypes = (pointer, ctypes.c_int, word)
    library.seccomp_arch_add.argtypes = (pointer, word)
    library.seccomp_arch_remove.argtypes = (pointer, word)
    library.seccomp_export_bpf.argtypes = (pointer, ctypes.c_int)
    library.seccomp_rule_add_array.argtypes = (pointer, word, ctypes.c_int, ctypes.c_uint, ctypes.POINTER(_Argument))
    library.seccomp_syscall_resolve_name_arch.argtypes = (word, ctypes.c_char_p)
    library.seccomp_syscall_resolve_num_arch.argtypes = (word, ctypes.c_int)
    library.seccomp_syscall_resolve_num_arch.restype = pointer
    return library


@functools.cache
def syscall_number(name: str) -> int | None:
    """The number on x86_64; below -1: the call belongs to another architecture; None: nobody knows the name."""
    return _NEWER.get(name) if (number := _resolved(name)) == _UNKNOWN else number


def _resolved(name: str) -> int:
    return int(_library().seccomp_syscall_resolve_name_arch(ARCHITECTURES[NATIVE], name.encode()))


@functools.cache
def syscall_names() -> dict[int, str]:
    """The name of each x86_64 system call, by number."""
    library = _library()
    libc = ctypes.CDLL(None)
    libc.free.argtypes = (ctypes.c_void_p,)
    names = {number: name for name, number in _NEWER.items()}
    for number in range(512):
        found = library.seccomp_syscall_resolve_num_arch(ARCHITECTURES[NATIVE], number)
        if found:
            names[number] = ctypes.string_at(found).decode()
            libc.free(found)
    return names


def compile_filter(wanted: Filter, title: str) -> bytes:
    """The classic BPF program (struct sock_filter, 8 bytes each) of a filter.

    A process of an architecture that is not named is killed at its first call.

    Raises:
        UserInputError: entries contradict each other, or the program is longer than the kernel takes. title: of the
            profile, for it.
        HostError: there is no libseccomp.
    """
    groups: dict[str, list[Rule]] = {}
    for rule in wanted.rules:
        groups.setdefault(rule.name, []).append(rule)
    effective = {name: _effective(rules, title) for name, rules in groups.items()}
    newer = {name: rules for name, rules in effective.items() if _resolved(name) == _UNKNOWN}
    with _context(wanted) as context:
        for name, rules in effective.items():
            for rule in rules if name not in newer else ():
                _add(context, rule, wanted.default)
        program = _prologue(newer, wanted.architectures, title) + _exported(context)
    if len(program) // 8 > MAX_INSTRUCTIONS:
        raise UserInputError(
            f"the seccomp profile {title} is too long",
            details=f"it needs {len(program) // 8} instructions; the kernel takes {MAX_INSTRUCTIONS}",
            resolution="name fewer architectures, or fewer conditions",
        )
    for name, rules in effective.items():
        if len({rule.returns for rule in rules}) > 1:
            prove(program, syscall_number(name), rules, wanted.default, title)
    return program


def _effective(rules: list[Rule], title: str) -> list[Rule]:
    """One call's rules. libseccomp lets an unconditional one swallow all others: then it has to be the strictest."""
    always = [rule for rule in rules if not rule.conditions]
    if not always:
        first_with: dict[tuple[Condition, ...], Rule] = {}
        for rule in rules:
            first = first_with.setdefault(rule.conditions, rule)
            if first.returns != rule.returns:
                raise contradiction(title, rule, first, "they have the same conditions")
        return list(first_with.values())
    first = always[0]
    for rule in rules:
        if rank(rule.returns) < rank(first.returns) or (not rule.conditions and rule.returns != first.returns):
            raise contradiction(title, rule, first, "the other decides the call whatever its arguments are")
    return [first]


def _prologue(newer: dict[str, list[Rule]], others: tuple[str, ...], title: str) -> bytes:
    """Decides the calls that libseccomp does not know, and leads on to its program for all others."""
    body: list[tuple[int, int, int, int]] = []
    for name, rules in newer.items():
        if len(rules) > 1 or rules[0].conditions:
            raise UserInputError(
                f"the seccomp profile {title} cannot be compiled here: {rules[0].where}",
                details=f"this host's libseccomp is too old for conditions on {name}",
                resolution="leave them out, or take a newer libseccomp",
            )
        numbers = [_NEWER[name], *([_NEWER[name] | _X32_BIT] if "SCMP_ARCH_X32" in others else [])]
        for number in numbers:
            body += [(JUMP_IF_EQUAL, 0, 1, number), (RETURN, 0, 0, rules[0].returns)]
    if not body:
        return b""
    words = sorted({ARCHITECTURES[name] for name in (NATIVE, *others) if name != "SCMP_ARCH_X32"})
    head = [(LOAD, 0, 0, _AT_ARCHITECTURE)]
    # From the comparison to the body: over the ones behind it and the jump that leads past everything.
    head += [(JUMP_IF_EQUAL, len(words) - at, 0, word) for at, word in enumerate(words)]
    head += [(JUMP, 0, 0, len(body) + 3), (LOAD, 0, 0, _AT_NUMBER)]
    head += [(JUMP_IF_AT_LEAST, 1, 0, min(_NEWER.values())), (JUMP, 0, 0, len(body))]
    return b"".join(struct.pack("=HBBI", *one) for one in head + body)


@contextmanager
def _context(wanted: Filter) -> Iterator[ctypes.c_void_p]:
    library = _library()
    context = library.seccomp_init(wanted.default)
    if not context:
        raise HostError("libseccomp cannot make a filter", details=f"default action {wanted.default:#x}")
    try:
        _checked(library.seccomp_attr_set(context, _BAD_ARCHITECTURE, _KILL_PROCESS), "bad architecture")
        # Older than 2.5: a linear program then, which is right as well.
        library.seccomp_attr_set(context, _OPTIMIZE, _BINARY_TREE)
        # The host may be of another architecture than the guests.
        added = library.seccomp_arch_add(context, ARCHITECTURES[NATIVE])
        if added != -errno.EEXIST:
            _checked(added, NATIVE)
            _checked(library.seccomp_arch_remove(context, 0), "the host's architecture")
        for name in wanted.architectures:
            _checked(library.seccomp_arch_add(context, ARCHITECTURES[name]), name)
        yield context
    finally:
        library.seccomp_release(context)


def _checked(status: int, what: str) -> None:
    if status < 0:
        raise HostError(f"libseccomp refuses: {what}", details=os.strerror(-status))


def _add(context: ctypes.c_void_p, rule: Rule, default: int) -> None:
    number = syscall_number(rule.name)
    assert number is not None, "unknown names are left out by the reader"
    if rule.returns == default:
        return  # libseccomp takes no rule that says the default; the proof shows where one would have been needed
    conditions = [_Argument(one.index, OPERATORS[one.operator], one.value, one.two) for one in rule.conditions]
    array = (_Argument * len(conditions))(*conditions)
    status = _library().seccomp_rule_add_array(context, rule.returns, number, len(conditions), array)
    _checked(status, f"{rule.where}: {rule.name}")


def _exported(context: ctypes.c_void_p) -> bytes:
    fd = os.memfd_create("seccomp", os.MFD_CLOEXEC)
    with os.fdopen(fd, "w+b") as file:
        _checked(_library().seccomp_export_bpf(context, fd), "to write the program")
        file.seek(0)
        return file.read()
