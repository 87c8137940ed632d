"""What a session's guest was made of, kept so that another like it can be made: for a rollback, for `start --from`.

Worked out again from options and files, it could be another image, size or policy by then: the guest's frozen state
fits only the machine that it was frozen on.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from vmsandbox.errors import HostError, ImageError
from vmsandbox.hypervisor.kvm import prove_kvm
from vmsandbox.hypervisor.launch import Machine
from vmsandbox.hypervisor.template import ImageFiles, TemplateStore
from vmsandbox.image.manifest import read_image
from vmsandbox.image.store import ImageStore
from vmsandbox.policy.values import Policy
from vmsandbox.process import Programs
from vmsandbox.session.asked.request import Prepared
from vmsandbox.session.state.folder import SessionFolder
from vmsandbox.session.state.info import write_text
from vmsandbox.spec import Accelerator, GuestLimits, GuestShape

_FILE = "made.json"


def keep_made(folder: SessionFolder, prepared: Prepared, policy: Policy) -> None:
    """Write it down, for `made_of`. Raises OSError."""
    image = prepared.image
    made = {
        "image": {**asdict(image), "root": str(image.root), "kernel": str(image.kernel), "initrd": str(image.initrd)},
        "shape": asdict(prepared.shape),
        "machine": asdict(prepared.machine),
        "template": prepared.template.published_key,
        "limits": asdict(prepared.limits),
        "isolation": policy.isolation,
    }
    write_text(folder.path / _FILE, json.dumps(made, indent=1, sort_keys=True))


@dataclass(frozen=True)
class Made:
    """What a session's guest was made of; of its policy the least isolation grade."""

    prepared: Prepared
    policy: Policy


def made_of(folder: SessionFolder, programs: Programs, *, thoroughly: bool = False) -> Made:
    """What the session's guest was made of, looked at again.

    thoroughly: every byte of image and template, also where nothing was written to their files.

    Raises:
        ImageError: the image or the template is gone, or was changed.
        HostError: nothing was written down, or it cannot be read.
    """
    layout = folder.layout
    try:
        made = json.loads((folder.path / _FILE).read_text())
        image = made["image"]
        files = ImageFiles(
            image["name"], image["digest"], *(Path(image[name]) for name in ("root", "kernel", "initrd"))
        )
        shape = GuestShape(**{**made["shape"], "accelerator": Accelerator(made["shape"]["accelerator"])})
        machine = Machine(made["machine"]["emulator"], made["machine"]["type"], tuple(made["machine"]["qemu_version"]))
        limits = GuestLimits(**made["limits"])
        key, isolation = made["template"], made["isolation"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HostError(
            f"what session {folder.name!r} was made of cannot be read",
            details=str(error),
            resolution="it goes on, but cannot be rolled back or forked",
        ) from error
    ImageStore(layout).verify(read_image(files.root.parent), force=thoroughly)
    template = TemplateStore(layout).find(key, thoroughly=thoroughly)
    if template is None:
        raise ImageError(f"the template of session {folder.name!r} is gone", details=f"{layout.templates / key}")
    kvm = prove_kvm(layout, programs)
    return Made(Prepared(kvm, shape, files, machine, template, None, limits), Policy(isolation=isolation))


def is_emulated(folder: SessionFolder) -> bool:
    """Whether its guest runs without KVM. Raises OSError, ValueError or KeyError where that was not written down."""
    return bool(json.loads((folder.path / _FILE).read_text())["shape"]["accelerator"] == Accelerator.TCG.value)


def unlike(then: Prepared, now: Prepared) -> list[str]:
    """In what two guests differ: their image, machine, limits or policy; in words."""
    pairs = (
        ("image", then.image.digest, now.image.digest),
        ("shape", then.shape, now.shape),
        ("limits", then.limits, now.limits),
        ("policy", then.template.published_key, now.template.published_key),
    )
    return [f"{what}: {before!r} then, {after!r} now" for what, before, after in pairs if before != after]
