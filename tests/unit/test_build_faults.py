"""Whatever stops the build of an image, at whichever of our steps: the one before it stays, and nothing else is left.

mmdebstrap itself is tried in tests/guest/test_image_build.py; here what it would have made lies there at once.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from apply_trees import in_child

from vmsandbox import failpoints
from vmsandbox.image import build
from vmsandbox.image.debian import BuildPlaces
from vmsandbox.image.manifest import Image
from vmsandbox.image.recipe import Recipe
from vmsandbox.image.store import ImageStore
from vmsandbox.ledger.book import Kind, Ledger
from vmsandbox.monitor import Monitor
from vmsandbox.paths import Layout
from vmsandbox.process import Programs

RECIPE = Recipe(name="tiny", packages=["dpkg"], initramfs="stock")


class WithMmdebstrap(Programs):
    """All programs of this host, and mmdebstrap."""

    def find(self, name: str) -> Path | None:  # type: ignore[override]
        return Path("/bin/true") if name == "mmdebstrap" else super().find(name)  # type: ignore[return-value]


@pytest.fixture(autouse=True)
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    def make_parts(_recipe: Recipe, _mirrors: object, places: BuildPlaces, *_: object) -> None:
        ext4 = bytes(0x438) + b"\x53\xef" + os.urandom(4096)
        for name, content in (("root.ext4", ext4), ("vmlinuz", os.urandom(100)), ("initrd.stock", os.urandom(100))):
            (places.out / name).write_bytes(content)
        (places.out / "packages").write_text("dpkg\t1\tamd64\tdpkg\t1\n")
        (places.out / "kernel-version").write_text("6.12\n")

    monkeypatch.setattr(build, "make_parts", make_parts)


@pytest.fixture
def layout(short_home: Path) -> Layout:
    return Layout.from_environment({"VMSANDBOX_HOME": str(short_home)})


def made(layout: Layout) -> Image:
    return build.build_image(RECIPE, layout, WithMmdebstrap(), Monitor())


def steps(layout: Layout) -> list[str]:
    names: list[str] = []
    with failpoints.switched_on(names.append):
        made(layout)
    return names


def published(layout: Layout) -> set[str]:
    return {path.name for path in (layout.images / "tiny").iterdir()} - {".lock"}


def test_every_step_and_every_fault(layout: Layout) -> None:
    names = steps(layout)
    assert {"ledger.planned", "build.folder", "build.parts", "build.assembled", "build.renamed"} <= set(names)
    for number in range(len(names)):
        for fault in ("kill", "interrupt", "enospc"):
            _one(layout, number, fault, names[number])


def _one(layout: Layout, number: int, fault: str, name: str) -> None:
    before = ImageStore(layout).find("tiny").digest
    # What cannot be taken out of the ledger is no reason to fail: `gc` does it.
    failed = 0 if (name, fault) == ("ledger.gone", "enospc") else 70
    assert in_child(lambda: _build_with(layout, number, fault)) == (-9 if fault == "kill" else failed), name
    store = ImageStore(layout)
    now = store.find("tiny")
    store.verify(now, force=True)  # whole, whichever it is
    if name in ("ledger.planned", "build.folder", "build.parts", "build.packages", "build.assembled", "build.durable"):
        assert now.digest == before
    if fault != "kill":
        assert not [entry for entry in published(layout) if entry.startswith(".building")], (name, fault)
    store.prune_building()
    folders = {image.folder.name for image in store.versions("tiny")}
    assert published(layout) <= folders | {"current"}, (name, fault)
    if fault != "kill" and name != "ledger.gone":
        assert Ledger.of(layout).rows() == [], (name, fault)
    after = made(layout)
    assert store.find("tiny").digest == after.digest, "the next build works"
    for row in Ledger.of(layout).rows():
        assert row.kind == Kind.IMAGE and not (layout.images / row.identity).exists() and not row.maker_is_alive
        Ledger.of(layout).forget(row.session)


def _build_with(layout: Layout, number: int, fault: str) -> None:
    count = 0

    def reached(_name: str) -> None:
        nonlocal count
        count += 1
        if count == number + 1:
            failpoints.act(fault)

    with failpoints.switched_on(reached):
        made(layout)
