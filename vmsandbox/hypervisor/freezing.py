"""Freezes a guest that has been made ready, and publishes what is left of it as a template, in one rename."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vmsandbox.errors import HostError
from vmsandbox.failpoints import failpoint
from vmsandbox.hypervisor.connection import Host
from vmsandbox.hypervisor.files import dig_holes, sha256_of, stamp_of
from vmsandbox.hypervisor.template import DISK, INITRD, RAM, STATE, Template, TemplateStore


def freeze(host: Host, uuid: str, state: Path) -> None:
    """Save the device state; the memory is already in its file."""
    host.qmp(
        uuid,
        "migrate-set-capabilities",
        {"capabilities": [{"capability": "x-ignore-shared", "state": True}]},
    )
    ours, qemus = socket.socketpair()
    chunks: list[bytes] = []

    def drain() -> None:
        while chunk := ours.recv(1 << 20):
            chunks.append(chunk)

    with ours:
        with qemus:
            host.qmp(uuid, "getfd", {"fdname": "freeze"}, fd=qemus.fileno())
        reader = threading.Thread(target=drain, daemon=True)
        reader.start()
        host.qmp(uuid, "migrate", {"uri": "fd:freeze"})
        host.migration_finished(uuid, deadline=60)
        reader.join(timeout=30)
        if reader.is_alive():
            raise HostError("QEMU did not finish writing the template's state")
    state.write_bytes(b"".join(chunks))
    failpoint("freeze.saved")


def publish(
    store: TemplateStore, making: Path, key: str, facts: Mapping[str, Any], seconds: float, base: Template | None = None
) -> Template:
    """Make the folder of a frozen guest the template of this key. facts: more for its manifest."""
    dig_holes(making / RAM)
    failpoint("publish.dug")
    digests = {name: sha256_of(making / name) for name in (DISK, RAM, STATE, INITRD)}
    for name in digests:
        os.chown(making / name, os.geteuid(), os.getegid())
        (making / name).chmod(0o444)
    manifest = {
        **facts,
        "key": key,
        "base": base.key if base else None,
        "digests": digests,
        "stamps": {name: stamp_of(making / name) for name in digests},
        "seconds": round(seconds, 2),
    }
    (making / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True))
    os.chown(making, os.geteuid(), os.getegid())
    making.chmod(0o755)
    failpoint("publish.written")
    if (store.folder / key).exists():  # one whose manifest cannot be read: it was looked for under the key's lock
        store.remove(key)
    making.rename(store.folder / key)
    failpoint("publish.renamed")
    return Template(key, store.folder / key, digests, seconds, base)
