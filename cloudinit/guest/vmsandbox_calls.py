"""The kernel's side of the supervisor: notifications of execve, the caller's memory, and a line for its stderr.

seccomp_unotify(2) has the protocol and its traps. All reading is bounded: an argument list may have two megabytes, and
the caller chooses every pointer.
"""

import ctypes
import fcntl
import os
import select
import signal
import socket
import stat
import struct

RECV, SEND, ID_VALID, SET_FLAGS = 0xC0502100, 0xC0182101, 0x40082102, 0x40082104
CONTINUE, SYNC_WAKE_UP = 1, 1
EXECVEAT, AT_FDCWD, AT_EMPTY_PATH = 322, -100, 0x1000
MOST_WORDS, MOST_BYTES, MOST_SPAN = 512, 1 << 16, 1 << 15
PIDFD_GETFD = 438
_NOTIFICATION = struct.Struct("=QIIiIQ6Q")  # struct seccomp_notif
_RESPONSE = struct.Struct("=QqiI")  # struct seccomp_notif_resp
_ID = struct.Struct("=Q")
_EMPTY = bytes(_NOTIFICATION.size)
_LIBC = ctypes.CDLL(None, use_errno=True)


class Gone(Exception):
    """The caller is no longer there, or has given up."""


class Call:
    """One execve that waits for an answer. pid: of its thread."""

    __slots__ = ("args", "descriptor", "id", "listener", "nr", "pid")

    def __init__(self, listener):
        buffer = bytearray(_EMPTY)
        try:
            fcntl.ioctl(listener, RECV, buffer)
        except OSError as error:
            raise Gone from error
        self.listener = listener
        self.id, self.pid, _flags, self.nr, _arch, _ip, *self.args = _NOTIFICATION.unpack(buffer)
        self.descriptor = None

    def check(self):
        """Raises Gone if the pid may be somebody else's by now."""
        try:
            fcntl.ioctl(self.listener, ID_VALID, _ID.pack(self.id))
        except OSError as error:
            raise Gone from error

    def go_on(self):
        self._answer(0, CONTINUE)

    def refuse(self, number):
        self._answer(-number, 0)

    def _answer(self, error, flags):
        try:
            fcntl.ioctl(self.listener, SEND, _RESPONSE.pack(self.id, 0, error, flags))
        except OSError:
            pass  # killed meanwhile

    def read(self):
        """(path, argv, cut) as the caller's memory has them now. path is None for a bare descriptor (`descriptor`).

        Raises OSError: EFAULT as the kernel would say.
        """
        path, argv = self.args[:2]
        if self.nr == EXECVEAT:
            folder = ctypes.c_int(self.args[0] & 0xFFFFFFFF).value
            path, argv = self.args[1:3]
        with open_memory(self.pid) as memory:
            text = os.fsdecode(memory.string(path, 4096)[0])
            words, cut = memory.words(argv)
        if self.nr == EXECVEAT and not text.startswith("/"):
            if not text and self.args[4] & AT_EMPTY_PATH:
                self.descriptor = folder
                return None, words, cut
            if text and folder != AT_FDCWD:
                text = os.readlink(f"/proc/{self.pid}/fd/{folder}") + "/" + text
        return text, words, cut

    def environment(self):
        """The variables that it asks for, as far as they can be read."""
        with open_memory(self.pid) as memory:
            return memory.words(self.args[3 if self.nr == EXECVEAT else 2])[0]


class open_memory:
    """The memory of a process, to be read with bounds."""

    def __init__(self, pid):
        self._fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        os.close(self._fd)

    def _bytes(self, address, size):
        try:
            return os.pread(self._fd, size, address)
        except (OSError, OverflowError):
            raise OSError(14, "EFAULT") from None

    def string(self, address, limit):
        """(bytes up to the NUL, whether there are more than `limit`)."""
        found = b""
        while len(found) < limit:
            # to the end of a page at most: the next one may not be there
            piece = self._bytes(address + len(found), min(4096 - (address + len(found)) % 4096, limit - len(found)))
            end = piece.find(b"\0")
            if end >= 0:
                return found + piece[:end], False
            if not piece:
                raise OSError(14, "EFAULT")
            found += piece
        return found, True

    def words(self, address):
        """([text…], whether there are more): an array of pointers that ends with a null pointer."""
        if not address:
            return [], False
        pointers = []
        while len(pointers) < MOST_WORDS:
            raw = self._bytes(address + 8 * len(pointers), 4096 - (address + 8 * len(pointers)) % 4096 or 4096)
            if len(raw) < 8:  # a pointer across two pages
                raw = self._bytes(address + 8 * len(pointers), 8)
                if len(raw) < 8:
                    raise OSError(14, "EFAULT")
            found = struct.unpack_from("=%dQ" % (len(raw) // 8), raw)
            if 0 in found:
                pointers += found[: found.index(0)]
                break
            pointers += found
        cut = len(pointers) > MOST_WORDS or (len(pointers) == MOST_WORDS and 0 not in found)
        return self._texts(pointers[:MOST_WORDS], cut)

    def _texts(self, pointers, cut):
        texts, room, near, start = [], MOST_BYTES, b"", 0
        if pointers and max(pointers) - min(pointers) <= MOST_SPAN:  # as a shell lays them out: one read for all
            start = min(pointers)
            near = self._bytes(start, max(pointers) - start + 256)
        for pointer in pointers:
            end = near.find(b"\0", pointer - start) if start <= pointer < start + len(near) else -1
            if end >= 0:
                text = near[pointer - start : end]
            else:
                text, more = self.string(pointer, max(room, 1))
                cut = cut or more
            room -= len(text) + 1
            if room < 0:
                return texts, True
            texts.append(os.fsdecode(text))
        return texts, cut


def answer_at_once(listener):
    """Wake the caller on this processor (Linux 6.6 and newer): the answer costs half as much."""
    try:
        fcntl.ioctl(listener, SET_FLAGS, SYNC_WAKE_UP)
    except OSError:
        pass


def tell(group, owner, text):
    """Write one line to descriptor 2 of a process (a thread group), if that can be done at once.

    By pidfd_getfd(2): opening /proc/PID/fd/2 anew would write, as root, to whatever file the worker has put there
    read-only. The description that it has itself lets through what it could write itself. owner: the worker's uid.
    """
    try:
        process = os.pidfd_open(group)
    except OSError:
        return
    try:
        fd = _LIBC.syscall(PIDFD_GETFD, process, 2, 0)
    finally:
        os.close(process)
    if fd < 0:
        return
    try:
        if _may_be_written(fd, owner) and select.select([], [fd], [], 0)[1]:
            _write_now(fd, text)
    except (OSError, ValueError):
        pass
    finally:
        os.close(fd)


def _may_be_written(fd, owner):
    """A pipe, a terminal, a file on a disk, or a socket that the worker made: nothing that takes a root's word."""
    info = os.fstat(fd)
    if stat.S_ISFIFO(info.st_mode):
        return True
    if stat.S_ISCHR(info.st_mode):
        return os.isatty(fd)
    if stat.S_ISREG(info.st_mode):
        return info.st_uid == owner and os.fstatvfs(fd).f_blocks > 0  # /proc, /sys and the like have none
    if stat.S_ISSOCK(info.st_mode):
        with socket.socket(fileno=os.dup(fd)) as peer:
            if peer.family != socket.AF_UNIX or peer.type != socket.SOCK_STREAM:
                return False
            credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            return struct.unpack("=3i", credentials)[1] == owner
    return False


def _write_now(fd, text):
    """Another writer may have filled the pipe, or ^S stopped the terminal: the alarm ends a write that waits."""
    signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
    try:
        _LIBC.write(fd, text, len(text))  # not os.write, which would go on waiting after a signal
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
