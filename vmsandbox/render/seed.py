"""The NoCloud seed of a template, made from the files in `cloudinit/`.

Pure: the same files and shape give the same bytes, because the template's key is the hash of them.
"""

from __future__ import annotations

import json
from pathlib import Path

from vmsandbox.errors import HostError
from vmsandbox.spec import GuestShape

# Of a guest's memory, for its kernel and for what answers the host when the worker has used up the rest.
KEPT_MIB = 136


def render_seed(cloudinit: Path, shape: GuestShape) -> dict[str, bytes]:
    """The seed's files by name: `user-data`, `meta-data` (NoCloud, cloud-init's documentation).

    Raises:
        HostError: a file in `cloudinit/` is missing or is not YAML (a damaged installation).
    """
    import yaml

    try:
        user_data = yaml.safe_load((cloudinit / "user-data.yaml").read_text())
        listing = yaml.safe_load((cloudinit / "files.yaml").read_text())
        files = []
        for entry in listing:
            content = (cloudinit / "guest" / entry["source"]).read_text()
            if entry["source"] == "vmsandbox.target":
                content = _target(content, shape.ssh_ports)
            elif entry["source"] == "vmsandbox-worker.slice":
                content = content.replace("@MEMORY_MIB@", str(shape.memory_mib - KEPT_MIB))
            files.append({"path": entry["path"], "permissions": entry["mode"], "content": content})
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise HostError(
            f"the cloud-init files in {cloudinit} are damaged",
            details=str(error),
            resolution="install vmsandbox again",
        ) from error
    user_data["write_files"] = files + user_data.get("write_files", [])
    text = yaml.safe_dump(user_data, sort_keys=True, width=1000, allow_unicode=True)
    meta = {"instance-id": "vmsandbox-template", "local-hostname": "vmsandbox-template"}
    return {"user-data": b"#cloud-config\n" + text.encode(), "meta-data": json.dumps(meta).encode() + b"\n"}


def _target(content: str, ssh_ports: int) -> str:
    wants = "\n".join(f"Wants=vmsandbox-ssh@{number}.service" for number in range(ssh_ports))
    return f"{content.rstrip()}\n{wants}\n"
