"""An image as a value, and the digest that identifies it.

On the path of every session: standard library only. The digest covers what a guest can see (its files and how
they are booted), not when, where or from which mirror it was built.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

from vmsandbox.errors import ImageError

ROOT, KERNEL, INITRD, SBOM, MANIFEST = "root.ext4", "vmlinuz", "initrd", "sbom.cdx.json", "manifest.json"
FILES = (ROOT, KERNEL, INITRD, SBOM)
SHORT = 16  # characters of the digest in a folder's name
_FORMAT = 1
_CHUNK = 1 << 20
_ZEROS = bytes(_CHUNK)


@dataclass(frozen=True)
class FileFacts:
    """A file's SHA-256 (hex) and size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class ImageFacts:
    """What a manifest says of an image.

    recipe: hash of the inputs. package_count: installed packages. built_at: ISO 8601, UTC, not in the digest.
    """

    name: str
    recipe: str
    suite: str
    architecture: str
    initramfs: str
    kernel_version: str
    package_count: int
    built_at: str
    files: Mapping[str, FileFacts]

    @property
    def digest(self) -> str:
        """The image's identity: SHA-256 (hex) over canonical JSON of its files and how they are booted."""
        seen_by_the_guest = {
            "format": _FORMAT,
            "architecture": self.architecture,
            "initramfs": self.initramfs,
            "kernel_version": self.kernel_version,
            "files": {name: [facts.sha256, facts.size] for name, facts in self.files.items()},
        }
        canonical = json.dumps(seen_by_the_guest, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def as_manifest(self) -> bytes:
        """The bytes of manifest.json."""
        told = {"format": _FORMAT, "digest": self.digest} | asdict_of(self)
        return json.dumps(told, indent=1, sort_keys=True).encode() + b"\n"


@dataclass(frozen=True)
class Image:
    """A published image: its facts and the folder (absolute, read-only by convention) with its files."""

    name: str
    digest: str
    folder: Path
    facts: ImageFacts

    @property
    def root(self) -> Path:
        """The root file system: raw ext4, sparse, attached as /dev/vda."""
        return self.folder / ROOT

    @property
    def kernel(self) -> Path:
        """The kernel for direct boot."""
        return self.folder / KERNEL

    @property
    def initrd(self) -> Path:
        """The initramfs; further cpio archives may be appended to a copy."""
        return self.folder / INITRD

    @property
    def sbom(self) -> Path:
        """The package list, CycloneDX JSON."""
        return self.folder / SBOM


def asdict_of(facts: ImageFacts) -> dict[str, object]:
    """The facts as plain JSON values."""
    told: dict[str, object] = {key: value for key, value in vars(facts).items() if key != "files"}
    return told | {"files": {name: asdict(each) for name, each in facts.files.items()}}


def read_image(folder: Path) -> Image:
    """Read an image's manifest, and check that it belongs to this folder and is whole in itself.

    Raises:
        ImageError: no manifest, one of another format, or one that does not fit its own digest or folder.
    """
    try:
        told = json.loads((folder / MANIFEST).read_bytes())
        if told.pop("format") != _FORMAT:
            raise ValueError("it has another format")
        digest = told.pop("digest")
        files = {name: FileFacts(**told["files"].pop(name)) for name in FILES}
        if told.pop("files"):
            raise ValueError("it names files that an image does not have")
        facts = ImageFacts(**told, files=MappingProxyType(files))
        if facts.digest != digest or digest[:SHORT] != folder.name or facts.name != folder.parent.name:
            raise ValueError("it does not fit its own digest or its folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ImageError(
            f"the image in {folder} is damaged",
            details=f"{MANIFEST}: {error}",
            resolution=f"remove it with `vmsandbox image rm {folder.parent.name}` and build it again",
        ) from error
    return Image(facts.name, digest, folder, facts)


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file, what sha256sum(1) prints, without reading the holes of a sparse one."""
    hasher = hashlib.sha256()
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        size, at = os.fstat(descriptor).st_size, 0
        while at < size:
            data = _next_data(descriptor, at, size)
            while at < data:
                zeros = min(_CHUNK, data - at)
                hasher.update(memoryview(_ZEROS)[:zeros])
                at += zeros
            end = os.lseek(descriptor, at, os.SEEK_HOLE) if at < size else size
            while at < end:
                chunk = os.pread(descriptor, min(_CHUNK, end - at), at)
                if not chunk:
                    raise ImageError(f"{path} was cut off while it was read")
                hasher.update(chunk)
                at += len(chunk)
    finally:
        os.close(descriptor)
    return hasher.hexdigest()


def _next_data(descriptor: int, at: int, size: int) -> int:
    """Where the next byte that is no hole stands (lseek(2), SEEK_DATA); `size` if only holes follow."""
    try:
        return os.lseek(descriptor, at, os.SEEK_DATA)
    except OSError:  # ENXIO: no more data
        return size
