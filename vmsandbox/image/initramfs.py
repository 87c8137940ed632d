"""The small initramfs: busybox, one module and our /init, made from the guest's own files.

Without it every cold boot would unpack Debian's 17 MB initramfs and run its udev: about five seconds under
emulation. It is not compressed on purpose: the bytes must not depend on the host's zlib, and unpacking costs
an emulated guest more than loading 1 MB more.
"""

from __future__ import annotations

import lzma
from pathlib import Path

from vmsandbox.errors import ImageError
from vmsandbox.image.cpio import CpioEntry, cpio_archive

_MODULE = "virtio_blk.ko"


def small_initramfs(parts: Path, init: bytes) -> bytes:
    """Build the archive from a folder with `busybox` and perhaps `virtio_blk.ko[.xz]` (else: built in).

    Raises:
        ImageError: the module is packed in a way that is not known here.
    """
    entries = [CpioEntry.folder(name) for name in ("bin", "dev", "proc", "sys", "root")]
    entries.append(CpioEntry.console())
    entries.append(CpioEntry.file("bin/busybox", (parts / "busybox").read_bytes(), 0o755))
    entries.append(CpioEntry.file("init", init, 0o755))
    if module := _plain_module(parts):
        entries.append(CpioEntry.file(_MODULE, module))
    return cpio_archive(entries)


def _plain_module(parts: Path) -> bytes:
    """The module unpacked, because busybox's insmod does not unpack; empty if the kernel has it built in."""
    found = sorted(parts.glob(f"{_MODULE}*"))
    if not found:
        return b""
    content = found[0].read_bytes()
    if found[0].suffix == ".xz":
        return lzma.decompress(content)
    if found[0].suffix == ".ko":
        return content
    raise ImageError(
        f"the kernel's module is packed in an unknown way: {found[0].name}",
        resolution="use a kernel of Debian 12 or 13, or `initramfs: stock` in the recipe",
    )
