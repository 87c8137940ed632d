"""vmsandbox-return [--baseline] DIR: tell the host what a folder contains, and send the files it asks for.

The protocol is described in docs/return-protocol.md; the host believes nothing of it. Links are not followed, nothing
named .git is reported or entered. Runs as the user whose files they are.

With --baseline it only tells, once standard input has said "unpacked" (it starts while tar is still at work).

On purpose with few imports: each costs more than looking at a hundred files, under emulation.
"""

import os
import select
import sys
import time

HELLO = b"vmsandbox-return 1\n"
MAX_DEPTH = 120
BATCH = 64 << 10  # bytes collected before one write
CHUNK = 256 << 10  # bytes of a file in one frame
SMALL = 64 << 10  # files below this cost one read and no fstat
TICK = 0.03  # seconds; more than a tick of the kernel's clock
LISTED = 500  # entries between two looks at what the host asks for
FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
DIRECTORY, REGULAR, LINK = 4, 8, 10  # st_mode >> 12, inode(7)


class Output:
    """Frames: one byte that says what it is, four bytes of length (the most significant first), that many bytes."""

    def __init__(self):
        self.parts = [HELLO]
        self.size = 0

    def frame(self, kind, data=b""):
        self.parts += (kind, len(data).to_bytes(4, "big"), data)
        self.size += len(data) + 5
        if self.size >= BATCH:
            self.flush()

    def flush(self):
        view = memoryview(b"".join(self.parts))
        while view:
            view = view[os.write(1, view) :]
        self.parts = []
        self.size = 0


class Sender:
    def __init__(self, interactive):
        self.out = Output()
        self.records = []
        self.interactive = interactive
        self.rest = b""

    def folder(self, prefix, depth):
        """Report all that is in a folder. `prefix`: its path and "/", or nothing."""
        try:
            if depth > MAX_DEPTH:
                raise PermissionError
            with os.scandir(prefix or b".") as listing:
                for one in listing:
                    if one.name != b".git":
                        self.entry(one, prefix + one.name, depth)
        except (FileNotFoundError, NotADirectoryError):
            pass  # deleted since it was reported
        except OSError:
            self.records.append(b"0 0 0 0 " + prefix[:-1])  # what is in it is not known

    def entry(self, one, path, depth):
        try:
            status = one.stat(follow_symlinks=False)
            if status.st_uid == 0 and status.st_mode & 0o777 == 0:
                return  # mounted over what the policy denies: nothing of the project's
            form = status.st_mode >> 12
            target = os.readlink(path) if form == LINK else None
        except FileNotFoundError:
            return  # deleted since the listing
        except OSError:
            # a path longer than the kernel takes: its folder cannot be told in full
            raise PermissionError from None
        self.records.append(
            b"%o %d %d %d %s" % (status.st_mode, status.st_size, status.st_ino, status.st_ctime_ns, path)
        )
        if target is not None:
            self.records.append(target)
        elif form == DIRECTORY:
            self.folder(path + b"/", depth + 1)
        if len(self.records) >= LISTED:
            self.tell()
            # Not by O_NONBLOCK: with sshd, standard input and output are one socket.
            if self.interactive and select.select([0], [], [], 0)[0]:
                self.answer()

    def tell(self):
        if self.records:
            self.records.append(b"")
            self.out.frame(b"L", b"\0".join(self.records))
            self.records = []

    def answer(self):
        """Send what the host has asked for; False when it will ask for nothing more."""
        asked = os.read(0, 64 << 10)
        *paths, self.rest = (self.rest + asked).split(b"\0")
        for path in paths:
            self.file(path)
        return asked != b""

    def file(self, path):
        try:
            fd = os.open(path, FILE)
        except OSError:
            self.out.frame(b"U")
            return
        try:
            data = os.read(fd, SMALL)
            if not data or len(data) == SMALL:
                status = os.fstat(fd)
                if status.st_mode >> 12 != REGULAR:
                    raise OSError  # an empty read may be a FIFO's
                # What is appended from now on is left out, or a log that grows would never end.
                left = status.st_size - len(data)
                while data and left > 0:
                    self.out.frame(b"D", data)
                    data = os.read(fd, min(left, CHUNK))
                    left -= len(data)
            self.out.frame(b"F", data)
        except OSError:
            self.out.frame(b"U")
        finally:
            os.close(fd)


def let_the_tick_end():
    """Make one entry newer than all the others: the host does not believe the newest ones, which may still change
    and keep their ctime."""
    time.sleep(TICK)
    with os.scandir(".") as listing:
        for one in listing:
            status = one.stat(follow_symlinks=False)
            os.utime(one.name, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)
            return


def main():
    words = sys.argv[1:]
    baseline = words[:1] == ["--baseline"]
    if len(words) != 1 + baseline:
        sys.exit("usage: vmsandbox-return [--baseline] DIR")
    if baseline and sys.stdin.buffer.read() != b"unpacked\n":
        sys.exit("vmsandbox-return: the project was not unpacked")
    try:
        os.chdir(words[-1])
    except OSError as error:
        sys.exit("vmsandbox-return: " + ascii(str(error)))
    if baseline:
        let_the_tick_end()
    sender = Sender(interactive=not baseline)
    sender.folder(b"", 0)
    sender.tell()
    sender.out.frame(b"E")
    sender.out.flush()
    if not baseline:
        while sender.answer():
            sender.out.flush()
