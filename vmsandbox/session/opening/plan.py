"""From what a person asked for to everything a fork needs: accelerator, image, template.

Each of these is made on first use, with progress: an image that was never built, a template for a new shape.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from vmsandbox.errors import HostError, ImageError, RefusedError, UserInputError
from vmsandbox.hypervisor.connection import Host
from vmsandbox.hypervisor.kvm import KvmProof, prove_kvm
from vmsandbox.hypervisor.launch import Machine
from vmsandbox.hypervisor.making import obtain_template
from vmsandbox.hypervisor.template import ImageFiles, Template, TemplatePlan, TemplateStore
from vmsandbox.image.cpio import CpioEntry, cpio_archive
from vmsandbox.image.manifest import Image
from vmsandbox.image.store import ImageStore
from vmsandbox.monitor import Monitor
from vmsandbox.paths import Layout, resource_folder
from vmsandbox.policy.values import Policy
from vmsandbox.process import Programs
from vmsandbox.render.confinement import confinement_of
from vmsandbox.render.seed import render_seed
from vmsandbox.session.asked.request import Prepared, SessionRequest
from vmsandbox.spec import Accelerator, GuestShape, NetworkMode

ALLOW_EMULATION = "VMSANDBOX_ALLOW_EMULATION"


def prepare(request: SessionRequest, layout: Layout, host: Host, programs: Programs, monitor: Monitor) -> Prepared:
    """Find or make the image and the template that a session needs.

    Raises:
        RefusedError: KVM does not work here and emulation was not allowed.
        ImageError, GuestError, HostError: see `build_image` and `obtain_template`.
    """
    kvm = prove_kvm(layout, programs)
    accelerator = choose_accelerator(kvm, request.allow_emulation)
    if accelerator is Accelerator.TCG:
        monitor.warning("no KVM here: this guest is emulated, which is NOT a security boundary (grade: emulated)")
    card = request.mode is NetworkMode.FILTERED
    if card:
        from vmsandbox.hypervisor.network import refuse_where_impossible

        refuse_where_impossible(host.uri)  # before minutes go into a template for it
    sizes = request.sizes
    balloon = sizes.limits.memory_reserved_mib is not None
    shape = GuestShape(accelerator, sizes.vcpus, sizes.memory_mib, request.ssh_ports, card=card, balloon=balloon)
    store = ImageStore(layout)
    image = find_or_build(sizes.image, layout, store, programs, monitor)
    store.verify(image)
    files = ImageFiles(image.name, image.digest, image.root, image.kernel, image.initrd)
    plan = _template_plan(files, shape, Machine.of(host, shape))
    templates = TemplateStore(layout)
    template = obtain_template(host, plan, templates, programs, monitor)
    broker = _broker_environment(request, layout, programs, monitor)
    prepared = Prepared(kvm, shape, files, plan.machine, template, broker, sizes.limits)
    if request.policy.session.post_create:
        from vmsandbox.session.opening.creating import created_template

        template = created_template(host, request, prepared, plan, layout, programs, monitor)
    return replace(prepared, template=_tailored(host, request.policy, template, plan, templates, programs, monitor))


def _broker_environment(request: SessionRequest, layout: Layout, programs: Programs, monitor: Monitor) -> Path | None:
    if request.mode is NetworkMode.NONE:
        return None
    from vmsandbox.broker.environment import make_environment

    return make_environment(layout, programs, monitor)


def choose_accelerator(kvm: KvmProof, allow_emulation: bool) -> Accelerator:
    """KVM where it is proven; emulation only where a person allowed it. Raises RefusedError."""
    if kvm.works:
        return Accelerator.KVM
    if allow_emulation or os.environ.get(ALLOW_EMULATION) == "1":
        return Accelerator.TCG
    raise RefusedError(
        "KVM does not run guests on this host, and pure emulation is not a security boundary",
        details=kvm.reason,
        resolution="`vmsandbox doctor` shows how to mend KVM; "
        f"to go on anyway: --allow-emulation or {ALLOW_EMULATION}=1",
    )


def find_or_build(name: str, layout: Layout, store: ImageStore, programs: Programs, monitor: Monitor) -> Image:
    """The newest image of this name, built now if there is none but a recipe."""
    try:
        return store.find(name)
    except ImageError as error:
        if (layout.images / name).is_dir() and list(store.versions(name)):
            raise
        from vmsandbox.image.build import build_image
        from vmsandbox.image.recipe import load_recipe

        try:
            recipe = load_recipe(name, layout)
        except UserInputError as no_recipe:
            raise no_recipe from error
        monitor.notice(f"there is no image {name!r} yet: building it, once")
        return build_image(recipe, layout, programs, monitor)


def _template_plan(image: ImageFiles, shape: GuestShape, machine: Machine) -> TemplatePlan:
    cloudinit = resource_folder("cloudinit")
    return TemplatePlan(image, shape, machine, cloudinit, lambda: _seed_archive(cloudinit, shape))


def _tailored(
    host: Host,
    policy: Policy,
    base: Template,
    plan: TemplatePlan,
    store: TemplateStore,
    programs: Programs,
    monitor: Monitor,
) -> Template:
    """The template of this policy, made now if there is none; the base itself where the policy asks nothing of it."""
    message = confinement_of(policy)
    if message is None:
        return base
    from vmsandbox.hypervisor.tailoring import TailorPlan, tailor_template

    return tailor_template(host, TailorPlan(base, plan, message), store, programs, monitor)


def _seed_archive(cloudinit: Path, shape: GuestShape) -> bytes:
    """The seed as a cpio archive for the initramfs: no seed disk, so a fork has no device more than it needs."""
    try:
        seed = render_seed(cloudinit, shape)
    except OSError as error:
        raise HostError(f"the cloud-init files in {cloudinit} cannot be read", details=str(error)) from error
    entries = [CpioEntry.folder("seed", 0o700)]
    entries += [CpioEntry.file(f"seed/{name}", content, 0o600) for name, content in seed.items()]
    return cpio_archive(entries)
