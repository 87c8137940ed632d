"""Templates are made once whoever asks at the same time, keyed by all that goes into them, and refused if changed."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from vmsandbox.errors import ImageError
from vmsandbox.failpoints import switched_on
from vmsandbox.hypervisor import freezing, making
from vmsandbox.hypervisor import template as module
from vmsandbox.hypervisor.files import sha256_of, stamp_of
from vmsandbox.hypervisor.launch import Machine
from vmsandbox.hypervisor.making import obtain_template
from vmsandbox.hypervisor.tailoring import TailorPlan
from vmsandbox.hypervisor.template import ImageFiles, Template, TemplatePlan, TemplateStore
from vmsandbox.monitor import Monitor
from vmsandbox.paths import Layout, resource_folder
from vmsandbox.process import Programs
from vmsandbox.session.gc import unfinished_templates, unused_templates
from vmsandbox.session.state.folder import SessionFolder
from vmsandbox.session.state.info import SessionInfo
from vmsandbox.spec import Accelerator, GuestShape

IMAGE = ImageFiles("base", "a" * 64, Path("/i/root.ext4"), Path("/i/vmlinuz"), Path("/i/initrd"))
SHAPE = GuestShape(Accelerator.TCG)
MACHINE = Machine("/usr/bin/qemu-system-x86_64", "pc-q35-7.2", (7, 2, 22))


def plan_of(**fields: Any) -> TemplatePlan:
    plan = TemplatePlan(IMAGE, SHAPE, MACHINE, resource_folder("cloudinit"), lambda: b"")
    return dataclasses.replace(plan, **fields)


def publish(store: TemplateStore, key: str, base: str | None = None) -> Path:
    """What `_make` leaves behind, without a guest."""
    folder = store.folder / key
    folder.mkdir(parents=True)
    names = (module.DISK, module.RAM, module.STATE, module.INITRD)
    for name in names:
        (folder / name).write_bytes(name.encode() * 100)
    manifest = {
        "digests": {name: sha256_of(folder / name) for name in names},
        "stamps": {name: stamp_of(folder / name) for name in names},
        "seconds": 1.0,
        "base": base,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def layout(short_home: Path) -> Layout:
    return Layout.from_environment({"VMSANDBOX_HOME": str(short_home)})


class Told(Monitor):
    """Remembers what a person was told."""

    def __init__(self) -> None:
        self.notices: list[str] = []

    def notice(self, text: str) -> None:
        self.notices.append(text)


def _obtain(home: Path, start: Any, made: Any, waited: Any) -> None:
    layout = Layout.from_environment({"VMSANDBOX_HOME": str(home)})

    def slowly(_host: object, plan: TemplatePlan, store: TemplateStore, *_rest: object) -> Template:
        with made.get_lock():
            made.value += 1
        time.sleep(0.5)
        publish(store, plan.key)
        found = store.find(plan.key)
        assert found is not None
        return found

    making._make = slowly  # type: ignore[assignment] # this process only
    monitor = Told()
    start.wait()
    obtain_template(None, plan_of(), TemplateStore(layout), Programs(), monitor)  # type: ignore[arg-type]
    with waited.get_lock():
        waited.value += len(monitor.notices)


def test_of_many_at_once_one_makes_it_and_the_others_are_told_to_wait(short_home: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, made, waited = context.Barrier(5), context.Value("i", 0), context.Value("i", 0)
    asking = [context.Process(target=_obtain, args=(short_home, start, made, waited)) for _ in range(5)]
    for process in asking:
        process.start()
    for process in asking:
        process.join()
    assert [process.exitcode for process in asking] == [0] * 5
    assert made.value == 1
    assert waited.value == 4


def test_the_key_changes_with_each_input(tmp_path: Path) -> None:
    cloudinit = tmp_path / "cloudinit"
    (cloudinit / "guest").mkdir(parents=True)
    (cloudinit / "guest" / "file").write_text("x")
    changed = {
        "image": plan_of(image=dataclasses.replace(IMAGE, digest="b" * 64)),
        "memory": plan_of(shape=dataclasses.replace(SHAPE, memory_mib=1024)),
        "vcpus": plan_of(shape=dataclasses.replace(SHAPE, vcpus=1)),
        "ports": plan_of(shape=dataclasses.replace(SHAPE, ssh_ports=7)),
        "accelerator": plan_of(shape=dataclasses.replace(SHAPE, accelerator=Accelerator.KVM)),
        "machine": plan_of(machine=dataclasses.replace(MACHINE, type="pc-q35-8.0")),
        "qemu": plan_of(machine=dataclasses.replace(MACHINE, qemu_version=(7, 2, 23))),
        "seed": plan_of(cloudinit=cloudinit),
    }
    keys = {name: plan.key for name, plan in changed.items()}
    (cloudinit / "guest" / "file").write_text("y")
    keys["a byte of the seed"] = plan_of(cloudinit=cloudinit).key
    keys["nothing"] = plan_of().key
    assert len(set(keys.values())) == len(keys)
    assert plan_of(seed_archive=lambda: b"other").key == keys["nothing"], "rendered only when it has to be made"


@pytest.mark.parametrize("name", [module.DISK, module.RAM, module.STATE, module.INITRD])
def test_a_changed_file_is_refused(layout: Layout, name: str) -> None:
    store = TemplateStore(layout)
    folder = publish(store, "k")
    assert store.find("k") is not None
    content = bytearray((folder / name).read_bytes())
    content[50] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ImageError, match="was changed"):
        store.find("k")


@pytest.mark.parametrize("how", ["missing", "link"])
def test_a_file_that_is_gone_or_a_link_is_refused(layout: Layout, how: str) -> None:
    store = TemplateStore(layout)
    folder = publish(store, "k")
    (folder / module.RAM).rename(folder / "elsewhere")
    if how == "link":
        (folder / module.RAM).symlink_to(folder / "elsewhere")
    with pytest.raises(ImageError, match="was changed"):
        store.find("k")


def test_a_restored_copy_with_the_same_bytes_is_taken(layout: Layout) -> None:
    store = TemplateStore(layout)
    folder = publish(store, "k")
    ram = folder / module.RAM
    content = ram.read_bytes()
    ram.unlink()
    ram.write_bytes(content)
    assert store.find("k") is not None


def test_one_in_the_making_is_not_found(layout: Layout) -> None:
    store = TemplateStore(layout)
    publish(store, ".making-1")
    assert store.list() == [] and store.find("k") is None


def test_one_that_was_tailored_stands_on_its_base_and_changes_with_it(layout: Layout) -> None:
    store = TemplateStore(layout)
    base, tailored = publish(store, "base"), publish(store, "tailored", "base")
    found = store.find("tailored")
    assert found is not None and found.base is not None
    assert found.disks == (tailored / module.DISK, base / module.DISK)
    (base / module.DISK).write_bytes(b"another first boot")
    with pytest.raises(ImageError, match="was changed"):
        store.find("tailored")
    store.remove("base")
    assert store.find("tailored") is None


def test_the_key_of_one_that_was_tailored_changes_with_the_policy_and_the_base(layout: Layout) -> None:
    store = TemplateStore(layout)
    bases = []
    for key in ("one", "other"):
        publish(store, key)
        found = store.find(key)
        assert found is not None
        bases.append(found)
    plan = plan_of()
    keys = {TailorPlan(base, plan, message).key for base in bases for message in ({"a": 1}, {"a": 2})}
    assert len(keys) == 4
    assert TailorPlan(bases[0], plan, {"a": 1}).key == TailorPlan(bases[0], plan, {"a": 1}).key in keys


def test_a_base_is_removed_after_what_stands_on_it(layout: Layout) -> None:
    store = TemplateStore(layout)
    for key, base in (("a-base", None), ("b-tailored", "a-base"), ("c-other", None), ("d-tailored", "c-other")):
        publish(store, key, base)
    month = 31 * 86400
    for key in ("a-base", "c-other", "d-tailored"):
        os.utime(store.folder / key / "manifest.json", (time.time() - month,) * 2)
    assert [one.what for one in unused_templates(layout, False)] == ["d-tailored", "c-other"]
    assert [one.what for one in unused_templates(layout, True)] == ["b-tailored", "a-base"]


def test_one_whose_removal_is_killed_is_no_template_any_more_and_goes(layout: Layout) -> None:
    store = TemplateStore(layout)
    publish(store, "k")

    def die(name: str) -> None:
        if name == "template.gone":
            raise KeyboardInterrupt

    with switched_on(die), pytest.raises(KeyboardInterrupt):
        store.remove("k")
    assert store.find("k") is None and store.list() == []
    assert [one.why for one in unfinished_templates(layout)] == ["its removal was interrupted"]
    assert list(store.folder.iterdir()) == []


@pytest.mark.parametrize("manifest", [None, "", "{"])
def test_one_without_a_manifest_is_in_nobodys_way(layout: Layout, manifest: str | None) -> None:
    store = TemplateStore(layout)
    for key in ("k", "other"):
        folder = publish(store, key)
        (folder / "manifest.json").unlink()
        if manifest is not None:
            (folder / "manifest.json").write_text(manifest)
    assert store.find("k") is None
    new = store.folder / ".making-1"
    (store.folder / "other").rename(new)
    freezing.publish(store, new, "k", {}, 1.0)
    assert store.find("k") is not None
    (store.folder / "k/manifest.json").unlink()
    assert [one.what for one in unused_templates(layout, False)] == ["k"]


def test_a_whole_chain_is_removed_from_its_end_and_kept_for_a_session(layout: Layout) -> None:
    store = TemplateStore(layout)
    for key, base in (("b-base", None), ("a-created", "b-base"), ("c-tailored", "a-created")):
        publish(store, key, base)
    assert store.bases_of("c-tailored") == ("a-created", "b-base") and store.bases_of("b-base") == ()
    info = SessionInfo("20260101-000000-one-abcdef", "one", "u", "d", "", 0, 0, "i", "", "c-tailored", 1, 1, 1)
    SessionFolder(layout, "one").claim(info)
    assert list(unused_templates(layout, True)) == []
    shutil.rmtree(layout.live)
    assert [one.what for one in unused_templates(layout, True)] == ["c-tailored", "a-created", "b-base"]
