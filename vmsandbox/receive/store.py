"""Where a returned tree lies until somebody accepts something of it: bytes by digest, names only in a manifest.

Names that a guest chose never become file names here, so nothing in this folder can be run, sourced or followed by
accident. The layout, in a session's record folder:

    quarantine/manifest.jsonl   the whole returned tree, review.manifest's canonical form
    quarantine/digest           SHA-256 of that file, what an approval names
    quarantine/blobs/<sha256>   the bytes of each file that is not as it was pushed (0400)
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from vmsandbox.errors import HostError, VmsandboxError
from vmsandbox.review.manifest import Manifest, ManifestLimits, parse_untrusted_manifest

SHA256 = re.compile(r"[0-9a-f]{64}")
# What was received was within limits already; here they only bound what a damaged file can do.
_LIMITS = ManifestLimits(bytes=1 << 30, entries=1_000_000)
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True)
class Quarantine:
    """A sealed return. folder: absolute. digest: of the manifest. It is a `review.values.Contents`."""

    folder: Path
    manifest: Manifest
    digest: str

    @classmethod
    def load(cls, folder: Path, digest: str | None = None) -> Quarantine:
        """A quarantine that was made before.

        Args:
            folder: it.
            digest: what the manifest's digest has to be (an approval's); None takes the one that was written down.

        Raises:
            HostError: it is not there, damaged, or another one.
        """
        try:
            text = (folder / "manifest.jsonl").read_bytes()
            kept = (folder / "digest").read_text().strip()
        except OSError as error:
            raise HostError(
                "nothing that came back is kept here", details=str(error), resolution="collect the changes again"
            ) from error
        found = hashlib.sha256(text).hexdigest()
        if found != kept or found != (digest or kept):
            raise HostError(
                "the quarantine is not the one that was reviewed",
                details=f"{folder}: its manifest has the digest {found}, not {digest or kept}",
                resolution="collect and review the changes again",
            )
        try:
            return cls(folder, parse_untrusted_manifest([text], _LIMITS), found)
        except VmsandboxError as error:
            raise HostError("the quarantine is damaged", details=error.brief) from error

    @property
    def blobs(self) -> Path:
        """The folder of bytes."""
        return self.folder / "blobs"

    def open(self, sha256: str) -> BinaryIO | None:
        """The bytes with this digest, or None. Who reads checks the digest."""
        if not SHA256.fullmatch(sha256):
            return None
        try:
            fd = os.open(self.blobs / sha256, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            return None
        return os.fdopen(fd, "rb")

    def put(self, content: bytes) -> str:
        """Add bytes that the host made (a file with some of its hunks); returns their SHA-256.

        Raises:
            HostError: they cannot be written.
        """
        digest = hashlib.sha256(content).hexdigest()
        path = self.blobs / digest
        fresh = self.blobs / f".{digest}.{secrets.token_hex(4)}"
        try:
            _write(fresh, content)
            fresh.rename(path)
        except OSError as error:
            fresh.unlink(missing_ok=True)
            raise HostError("the quarantine cannot be written", details=str(error)) from error
        return digest


def seal(folder: Path, manifest: Manifest) -> Quarantine:
    """Make a quarantine of a folder whose `blobs` are received and checked.

    The files are read-only since they were made, and belong to the receiver's user, who cannot reach them any more.
    The folders stay writable for their owner: `put` adds to them, and retention removes them. What holds the content
    together is the digests, not the modes.
    """
    blobs = folder / "blobs"
    os.chown(blobs, os.geteuid(), os.getegid())
    blobs.chmod(0o700)
    text = b"".join(manifest.lines())
    digest = hashlib.sha256(text).hexdigest()
    _write(folder / "manifest.jsonl", text)
    _write(folder / "digest", digest.encode() + b"\n")
    return Quarantine(folder, manifest, digest)


def _write(path: Path, content: bytes) -> None:
    fd = os.open(path, _NEW_FILE, 0o400)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
