"""What a session shares with others and what of the host is its own: taken before it, and proven to be so again after.

Without the proof "nothing of it is left" would be the word of the same code that removes, and a template that a hostile
guest had found a way to write to would be noticed by the next session, if at all.

Only what this session uses is looked at: others may start and end beside it. A file counts as unchanged if its inode,
size and both times are as when it was last hashed (no program sets ctime back); else it is hashed, and `verify` hashes
all of them.
"""

from __future__ import annotations

import hashlib
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vmsandbox.errors import VmsandboxError
from vmsandbox.hypervisor.connection import Host
from vmsandbox.hypervisor.files import sha256_of, stamp_of
from vmsandbox.hypervisor.lost import groups_of
from vmsandbox.image.manifest import MANIFEST, SHORT
from vmsandbox.ledger.processes import processes_of
from vmsandbox.paths import Layout
from vmsandbox.render.domain import METADATA_NS
from vmsandbox.session.state.background import background_is_alive
from vmsandbox.session.state.folder import SessionFolder
from vmsandbox.session.state.info import SessionInfo

RECORD = "shared.json"
MISSING = "missing"


@dataclass(frozen=True)
class Baseline:
    """shared: SHA-256 of each file of the image and the template (or `missing`), by a name for people.

    own: what the host has of this session, by a name for people that stays the same when a guest is replaced by another
    one of the same session; what can be told apart further has a digest (the domain's XML), else "there".
    """

    shared: Mapping[str, str]
    own: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 of all of it, canonical JSON."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def baseline_of(layout: Layout, host: Host | None, info: SessionInfo, *, verify: bool = False) -> Baseline:
    """What is so now.

    Args:
        host: asked for guests and networks; None where libvirt may still be noticing an end: processes, sockets,
            interfaces and files are looked at all the same.
        verify: hash every file.

    Raises:
        HostError: libvirt does not answer.
    """
    shared = _image_files(layout, info, verify)
    key: str | None = info.template
    level = "template"
    while key:
        found, key = _template_files(layout.templates / key, level, verify)
        shared |= found
        level += "'s base"
    return Baseline(shared, _own(layout, host, info))


def differences(before: Baseline, after: Baseline) -> list[str]:
    """What is not as it was, in words for people; empty: it is proven."""
    found = []
    for name, digest in before.shared.items():
        now = after.shared.get(name, MISSING)
        if now == MISSING != digest:
            found.append(f"{name} is missing")
        elif now != digest:
            found.append(f"{name} has changed: SHA-256 was {digest[:16]}…, is {now[:16]}…")
    found += [f"{name} was not there before" for name in after.shared if name not in before.shared]
    for name, value in before.own.items():
        if name not in after.own:
            found.append(f"{name} is gone")
        elif after.own[name] != value:
            found.append(f"{name} is another one")
    found += [f"{name} is left" for name in after.own if name not in before.own]
    return found


def keep_baseline(folder: SessionFolder, info: SessionInfo) -> None:
    """Write down what the session shares, before anything of it is made. Raises OSError."""
    shared = Baseline(baseline_of(folder.layout, None, info).shared)
    (folder.path / RECORD).write_text(json.dumps(asdict(shared), indent=1))


def kept_baseline(folder: SessionFolder) -> Baseline | None:
    """What was written down; None for a session that never came so far, or is gone."""
    with suppress(OSError, ValueError, TypeError):
        return Baseline(**json.loads((folder.path / RECORD).read_text()))
    return None


def domain_facts(live_xml: str, info: SessionInfo) -> str:
    """SHA-256 of what a domain's live XML says of its machine, without what tells one guest from the next.

    Left out: its UUID, number, name, generation id, user, processor's features, where its sockets, its disk and its
    memory lie, and which ports are open.
    """
    tree = ET.fromstring(live_xml)  # noqa: S314 - from the trusted daemon
    tree.attrib.pop("id", None)
    # cpu: libvirt fills the features in at some time after a start; a fork's are its template's, or it would not run.
    for tag in ("name", "uuid", "genid", "seclabel", "cpu"):
        for element in tree.findall(tag):
            tree.remove(element)
    for target in tree.iterfind("devices/channel/target"):
        target.attrib.pop("state", None)  # whether the guest has just opened the port
    # rewrite_prefixes: what a process has rendered before decides how ElementTree abbreviates namespaces.
    plain = ET.canonicalize(ET.tostring(tree, encoding="unicode"), strip_text=True, rewrite_prefixes=True)
    text = plain.replace(info.uuid, "")
    text = re.sub(r"[^\"=,]*/(?:run|live)/[^\"=,]*/([^/\"=,]+)", r"\1", text)
    text = re.sub(r"/proc/[0-9]+/fd/[0-9]+", "memory", text)
    return hashlib.sha256(text.encode()).hexdigest()


def _image_files(layout: Layout, info: SessionInfo, verify: bool) -> dict[str, str]:
    folder = layout.images / info.image / info.image_digest[:SHORT]
    found = {f"image {info.image}: {MANIFEST}": _digest(folder / MANIFEST)}
    expected: dict[str, str] = {}
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        manifest = json.loads((folder / MANIFEST).read_text())
        expected = {name: str(facts["sha256"]) for name, facts in manifest["files"].items()}
    stamps: list[list[int]] = []
    with suppress(OSError, ValueError, TypeError, IndexError):
        digest, seen = json.loads(
            (layout.cache / "verified" / f"{info.image}-{info.image_digest[:SHORT]}.json").read_text()
        )
        stamps = seen if digest == info.image_digest else []
    for name, sha256 in expected.items():
        known = not verify and _stamp(folder / name) in stamps
        found[f"image {info.image}: {name}"] = sha256 if known else _digest(folder / name)
    return found


def _template_files(folder: Path, level: str, verify: bool) -> tuple[dict[str, str], str | None]:
    """A template's files, and the key of the one that it stands on."""
    label = f"{level} {folder.name[:12]}"
    found = {f"{label}: manifest.json": _digest(folder / "manifest.json")}
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, sha256 in manifest["digests"].items():
            known = not verify and _stamp(folder / name) == manifest["stamps"][name]
            found[f"{label}: {name}"] = sha256 if known else _digest(folder / name)
        base = manifest.get("base")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return found, None
    return found, base if isinstance(base, str) else None


def _own(layout: Layout, host: Host | None, info: SessionInfo) -> dict[str, str]:
    folder = SessionFolder(layout, info.name)
    found = {"process: QEMU": "there"} if processes_of(info.uuid) else {}
    if groups_of(info.uuid) and "process: QEMU" not in found:
        found["control groups"] = "there"
    sockets = folder.sockets(info)
    if sockets.is_dir():
        found["folder of sockets"] = "there"
        found |= {f"socket: {path.name}": "there" for path in sockets.iterdir()}
    if folder.path.is_dir() and info.is_recorded_in(folder.path):
        found["session folder"] = "there"
        for kind in ("keeper", "watcher"):
            if background_is_alive(folder, kind):
                found[f"process: {kind}"] = "there"
    found |= _network(layout, host, info)
    if host is not None:
        for domain in host.list_sessions(METADATA_NS):
            if domain.session_id == info.id and domain.home == str(layout.live):
                own = domain.uuid == info.uuid
                found["guest" if own else f"guest {domain.uuid}"] = domain_facts(host.live_xml(domain.uuid), info)
    return found


def _network(layout: Layout, host: Host | None, info: SessionInfo) -> dict[str, str]:
    if info.network != "filtered":
        return {}
    from vmsandbox.hypervisor.network import stray_names
    from vmsandbox.process import Programs
    from vmsandbox.render.network import CardPlan, bridge_of, tap_of

    name = CardPlan(info.id, layout.live, "", "").name
    interfaces = {"bridge": bridge_of(name), "tap": tap_of(name)}
    found = {word: "there" for word, one in interfaces.items() if Path("/sys/class/net", one).exists()}
    with suppress(VmsandboxError):
        if host is not None and name in stray_names(host, layout.live, Programs()):
            found["network, filter or rules"] = "there"
    return found


def _stamp(path: Path) -> list[int] | None:
    with suppress(OSError):
        return list(stamp_of(path))
    return None


def _digest(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError:
        return MISSING
