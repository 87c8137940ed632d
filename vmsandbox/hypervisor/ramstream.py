"""Takes a guest's migration stream apart: memory into a file, the rest into a small stream.

A template's memory is a file from the start; a session's is private to its QEMU process. Kept whole, its stream would
have to be loaded page by page for each fork; taken apart it is what a template is: a memory file that forks map, and a
device state of half a megabyte.

The format is QEMU's own (docs/devel/migration, migration/savevm.c, migration/ram.c; the same since version 2.x). QEMU
is trusted to write it; the guest chose the pages' content, and nothing here looks into that.
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

from vmsandbox.errors import HostError

PAGE = 4096
_MAGIC = b"QEVM" + (3).to_bytes(4)
_EOF, _START, _PART, _END, _FULL, _SUBSECTION, _CONFIGURATION, _FOOTER = 0x00, 0x01, 0x02, 0x03, 0x04, 0x05, 0x07, 0x7E
_ZERO, _SIZES, _PLAIN, _EOS, _CONTINUE = 0x02, 0x04, 0x08, 0x10, 0x20
_RECORD = 8 + 256 + PAGE  # the longest record of a page: its word, its block's name, its bytes
_BUFFER = 4 << 20
_AT_ONCE = 256  # pages in one write
_WORD = struct.Struct(">Q")


ReadInto = Callable[[memoryview], int]


def take_apart(read_into: ReadInto, ram: int) -> bytes:
    """Read a whole stream (capability `x-ignore-shared`, a guest whose memory is not shared).

    Args:
        read_into: as `socket.recv_into`.
        ram: descriptor of an empty file of the memory's size, which tells the memory from other blocks.

    Returns:
        The stream without the memory's pages: what a QEMU that maps `ram` loads.

    Raises:
        HostError: the stream ended early, or has a part that is not known here.
        OSError: the file's disk is full.
    """
    return b"".join(_Stream(read_into, ram).run())


def with_devices(state: Path, memory_bytes: int, devices: bytes) -> bytes:
    """A state like this one, of a template, with other devices.

    Args:
        devices: what QEMU's `xen-save-devices-state` writes: a stream without configuration and memory.

    Raises:
        HostError: one of them has a part that is not known here.
    """
    if not devices.startswith(_MAGIC + bytes((_FULL,))):
        raise HostError("QEMU's device state has an unknown beginning", details=devices[:16].hex())
    with state.open("rb", buffering=0) as file, tempfile.TemporaryFile() as nothing:
        nothing.truncate(memory_bytes)
        before, _ = _Stream(file.readinto, nothing.fileno()).run()
    return before + devices[len(_MAGIC) :]


class _Stream:
    def __init__(self, read_into: ReadInto, ram: int) -> None:
        self._read_into = read_into
        self._buffer = bytearray(_BUFFER)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self._ended = False
        self._ram, self._size = ram, os.fstat(ram).st_size
        self._memory = b""  # the name of the block that is the memory
        self._written = bytearray(self._size // PAGE)
        self._run: list[memoryview] = []  # pages that follow each other and are not written yet
        self._run_at = 0
        self._others: dict[tuple[bytes, int], bytes] = {}  # pages of firmware and tables
        self._block = b""
        self._out = bytearray()

    def run(self) -> tuple[bytes, bytes]:
        """The stream up to the end of the memory, and what follows."""
        head = self._take(8)
        if head != _MAGIC:
            raise HostError("QEMU's migration stream has an unknown beginning", details=head.hex())
        self._out += head
        self._configuration()
        section = b""
        while True:
            kind = self._take(1)[0]
            if kind == _START:
                section = self._start_of_ram()
            elif kind in (_PART, _END):
                if self._take(4) != section:
                    raise HostError("QEMU's migration stream has a section besides the memory")
                self._pages()
                self._footer(section)
                if kind == _END:
                    self._out += bytes((_END,)) + section + self._kept_pages() + bytes((_FOOTER,)) + section
            elif kind in (_FULL, _EOF):  # devices, which come after the memory, and no more of it
                return bytes(self._out), bytes((kind,)) + self._rest()
            else:
                raise HostError(f"QEMU's migration stream has an unknown part: {kind:#x}")

    # -- parts ---------------------------------------------------------------------------------------------

    def _configuration(self) -> None:
        """The machine's name, and which capabilities have to be the same on both sides."""
        self._fill(1 << 10)
        if self._view[self._start] != _CONFIGURATION:
            raise HostError("QEMU's migration stream has no configuration")
        self._pass(1)
        self._pass(int.from_bytes(self._pass(4)))
        while self._view[self._start] == _SUBSECTION:
            self._pass(1)
            name = self._pass(self._pass(1)[0])
            self._pass(4)
            if name == b"configuration/capabilities":
                for _ in range(int.from_bytes(self._pass(4))):
                    self._pass(self._pass(1)[0])
            elif name == b"configuration/target-page-bits":
                self._pass(4)
            else:
                raise HostError(
                    f"QEMU's migration stream has an unknown configuration: {name.decode('ascii', 'replace')}"
                )

    def _start_of_ram(self) -> bytes:
        """The section's header and the list of blocks; returns the section's number."""
        section = self._take(4)
        name = self._take(self._take(1)[0])
        if name != b"ram":
            raise HostError(f"QEMU would move more than memory: {name.decode('ascii', 'replace')}")
        self._out += bytes((_START,)) + section + bytes((len(name),)) + name + self._take(8)
        word = self._pass(8)
        left = _WORD.unpack(word)[0]
        if not left & _SIZES:
            raise HostError("QEMU's migration stream does not begin with its blocks")
        left &= ~(PAGE - 1)
        while left > 0:
            block = self._pass(self._pass(1)[0])
            size = int.from_bytes(self._pass(8))
            self._pass(8)  # where the guest sees it (x-ignore-shared)
            left -= size
            if size == self._size:
                self._memory = block
        self._pages()
        self._out += _WORD.pack(_EOS)
        self._footer(section)
        self._out += bytes((_FOOTER,)) + section
        if not self._memory:
            raise HostError(f"QEMU's migration stream has no memory of {self._size} bytes")
        return section

    def _footer(self, section: bytes) -> None:
        if self._take(5) != bytes((_FOOTER,)) + section:
            raise HostError("QEMU's migration stream is damaged: a section does not end where it should")

    def _pages(self) -> None:
        """Records of pages until the section's end."""
        view, unpack = self._view, _WORD.unpack_from
        while True:
            if self._end - self._start < _RECORD:
                self._write_run()  # it points into the buffer
                self._fill(_RECORD)
                if self._end < 8:
                    raise HostError("QEMU's migration stream ended early")
            word = unpack(view, self._start)[0]
            self._start += 8
            if word & _EOS:
                self._write_run()
                return
            if not word & _CONTINUE:
                length = view[self._start]
                self._block = bytes(view[self._start + 1 : self._start + 1 + length])
                self._start += 1 + length
            at = word & ~(PAGE - 1)
            if self._block == self._memory and at >= self._size:
                raise HostError("QEMU's migration stream is damaged: a page outside of the memory")
            if word & _PLAIN:
                page = view[self._start : self._start + PAGE]
                self._start += PAGE
                if self._block == self._memory:
                    self._memory_page(at, page)
                else:
                    self._others[self._block, at] = bytes(page)
            elif word & _ZERO:
                self._start += 1
                if self._block != self._memory:
                    self._others[self._block, at] = b""
                elif self._written[at // PAGE]:
                    self._write_run()
                    os.pwrite(self._ram, bytes(PAGE), at)
            else:
                raise HostError(f"QEMU's migration stream has an unknown record: {word & (PAGE - 1):#x}")
            if self._start > self._end:
                raise HostError("QEMU's migration stream ended early")

    def _memory_page(self, at: int, page: memoryview) -> None:
        if at != self._run_at + len(self._run) * PAGE or len(self._run) == _AT_ONCE:
            self._write_run()
            self._run_at = at
        self._run.append(page)
        self._written[at // PAGE] = 1

    def _write_run(self) -> None:
        if not self._run:
            return
        at, pages = self._run_at, self._run
        written = os.pwritev(self._ram, pages, at)
        if written != len(pages) * PAGE:
            whole = b"".join(pages)
            while written < len(whole):
                written += os.pwrite(self._ram, whole[written:], at + written)
        self._run = []

    def _kept_pages(self) -> bytes:
        """The pages of other blocks as they were last, and the end of records."""
        out = bytearray()
        for (block, at), page in self._others.items():
            name = bytes((len(block),)) + block
            out += _WORD.pack(at | (_PLAIN if page else _ZERO)) + name + (page or b"\0")
        return bytes(out + _WORD.pack(_EOS))

    # -- bytes ---------------------------------------------------------------------------------------------

    def _fill(self, count: int) -> None:
        """Have `count` bytes in the buffer, or all that is left. Nothing may point into it."""
        if self._start:
            self._view[: self._end - self._start] = self._view[self._start : self._end]
            self._start, self._end = 0, self._end - self._start
        while self._end < count and not self._ended:
            got = self._read_into(self._view[self._end :])
            self._ended = got == 0
            self._end += got

    def _take(self, count: int) -> bytes:
        if self._end - self._start < count:
            self._fill(count)
        if self._end - self._start < count:
            raise HostError("QEMU's migration stream ended early")
        self._start += count
        return bytes(self._view[self._start - count : self._start])

    def _pass(self, count: int) -> bytes:
        """Take bytes that are passed on as they are."""
        taken = self._take(count)
        self._out += taken
        return taken

    def _rest(self) -> bytes:
        out = bytearray(self._view[self._start : self._end])
        while got := self._read_into(self._view):
            out += self._view[:got]
        return bytes(out)
