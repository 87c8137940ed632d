"""Recipes: what is merged, and that every mistake names its file and place."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from vmsandbox.errors import UserInputError
from vmsandbox.image.debian import Mirrors, _overlay
from vmsandbox.image.recipe import Recipe, load_recipe, recipe_names
from vmsandbox.paths import Layout


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(**{folder.name: tmp_path / folder.name for folder in fields(Layout)})


def write(layout: Layout, name: str, text: str) -> Path:
    file = layout.config / "images" / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


@pytest.mark.parametrize("name", ["base", "python-dev", "stock"])
def test_shipped_recipes_are_valid(layout: Layout, name: str) -> None:
    recipe = load_recipe(name, layout)
    assert {"linux-image-cloud-amd64", "cloud-init", "libarchive13t64"} <= set(recipe.packages)


def test_shipped_stock_is_debian_as_it_comes(layout: Layout) -> None:
    base, stock = load_recipe("base", layout), load_recipe("stock", layout)
    assert stock.initramfs == "stock" and not stock.files and not stock.units.mask
    assert stock.packages == base.packages  # else the benchmark compares different things


def test_extends_appends_lists_and_overrides_scalars(layout: Layout) -> None:
    write(
        layout,
        "under",
        "name: under\npackages: [aa, bb]\ndisk: 1G\nunits: {mask: [a.timer], enable: [e.service]}",
    )
    write(layout, "mine", "name: mine\nextends: under\npackages: [bb, cc]\ndisk: 2G\nunits: {mask: [b.timer]}")
    recipe = load_recipe("mine", layout)
    assert recipe.name == "mine"
    assert recipe.packages == ["aa", "bb", "cc"]
    assert recipe.disk == "2G"
    assert recipe.units.mask == ["a.timer", "b.timer"]
    assert recipe.units.enable == ["e.service"]


def test_three_generations(layout: Layout) -> None:
    write(layout, "g1", "name: g1\npackages: [aa]\ndisk: 1G\nrun: ['one']")
    write(layout, "g2", "name: g2\nextends: g1\npackages: [bb]\ndisk: 2G\nrun: ['two']")
    write(layout, "g3", "name: g3\nextends: g2\nrun: ['three']")
    recipe = load_recipe("g3", layout)
    assert (recipe.packages, recipe.disk, recipe.run) == (["aa", "bb"], "2G", ["one", "two", "three"])


def test_own_recipe_comes_before_the_shipped_one(layout: Layout) -> None:
    write(layout, "base", "name: base\npackages: [hello]")
    assert load_recipe("base", layout).packages == ["hello"]
    assert {"base", "python-dev", "stock"} <= set(recipe_names(layout))


def test_circle(layout: Layout) -> None:
    write(layout, "aa", "name: aa\nextends: bb\npackages: []")
    write(layout, "bb", "name: bb\nextends: aa\npackages: []")
    with pytest.raises(UserInputError, match="aa → bb → aa"):
        load_recipe("aa", layout)


@pytest.mark.parametrize(
    ("text", "place", "resolution"),
    [
        ("packagess: [aa]", "packagess: unknown key", "did you mean 'packages'?"),
        ("extend: base", "extend: unknown key", "did you mean 'extends'?"),
        ("packages: [aa, bb, cc, 4]", "packages[3]", ""),
        ("packages: [aa, 'b b']", "packages[1]", ""),
        ("packages: ['-oDir=/']", "packages[0]", ""),
        ("packages: aa", "packages", ""),
        ("packages: []\ndisk: 4", "disk", ""),
        ("packages: []\ndisk: 4T", "disk", ""),
        ("packages: []\ninitramfs: tiny", "initramfs", ""),
        ("packages: []\nunits: {masked: [a.timer]}", "units.masked: unknown key", "did you mean 'mask'?"),
        ("packages: []\nunits: {mask: ['../x.service']}", "units.mask[0]", ""),
        ("packages: []\nfiles: [{path: etc/x, content: ''}]", "files[0].path", ""),
        ("packages: []\nfiles: [{path: /etc/../x, content: ''}]", "files[0].path", ""),
        ("packages: []\nfiles: [{path: /dev/x, content: ''}]", "files[0].path", ""),
        ("packages: []\nfiles: [{path: /x, mode: '4755', content: ''}]", "files[0].mode", ""),
        ("packages: []\nfiles: [{path: /x, mode: 0644, content: ''}]", "files[0].mode", ""),
        (
            "packages: []\nfiles: [{path: /x, modes: '0644', content: ''}]",
            "files[0].modes: unknown key",
            "mode",
        ),
        ("packages: []\nmirror: 'http://x [trusted=yes]'", "mirror", ""),
        ("packages: []\nsecurity_mirror: ftp://x", "security_mirror", ""),
        ("packages: []\nepoch: '1'", "epoch", ""),
        ("disk: 1G", "packages", ""),
    ],
)
def test_mistakes_name_file_and_place(layout: Layout, text: str, place: str, resolution: str) -> None:
    file = write(layout, "bad", f"name: bad\n{text}\n")
    with pytest.raises(UserInputError) as caught:
        load_recipe("bad", layout)
    assert str(file) in caught.value.brief
    assert place in caught.value.brief + caught.value.details
    assert resolution in caught.value.resolution


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n", "not a mapping"),
        ("", "not a mapping"),
        ("name: [", "not valid YAML"),
        ("name: bad\npackages: [aa]\npackages: [bb]", "stands twice"),
        ("? [a]\n: b\n", "not valid"),
        ("name: other\npackages: []", "'other'"),
        ("name: !!python/object/apply:os.system [id]", "not valid YAML"),
        ("extends: [base]\nname: bad\npackages: []", "name of one recipe"),
        ("extends: basse\nname: bad\npackages: []", "did you mean 'base'?"),
        ("extends: ../base\nname: bad\npackages: []", "no recipe"),
    ],
)
def test_mistakes_of_form(layout: Layout, text: str, said: str) -> None:
    file = write(layout, "bad", text)
    with pytest.raises(UserInputError) as caught:
        load_recipe("bad", layout)
    assert str(file) in caught.value.brief
    assert said in "\n".join([caught.value.brief, caught.value.details, caught.value.resolution])


def test_a_mistake_in_the_parent_names_the_parent(layout: Layout) -> None:
    parent = write(layout, "under", "name: under\npackages: [aa]\ndisk: x")
    write(layout, "mine", "name: mine\nextends: under\ndisk: 2G")
    with pytest.raises(UserInputError) as caught:
        load_recipe("mine", layout)
    assert str(parent) in caught.value.brief


def test_unknown_name_suggests(layout: Layout) -> None:
    with pytest.raises(UserInputError) as caught:
        load_recipe("pyton-dev", layout)
    assert "python-dev" in caught.value.resolution


def test_path_of_a_file(layout: Layout, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nextends: base\n")
    assert load_recipe(str(file), layout).packages == load_recipe("base", layout).packages
    with pytest.raises(UserInputError, match="cannot be read"):
        load_recipe(str(tmp_path / "none.yaml"), layout)


def test_digest_follows_the_inputs() -> None:
    one = Recipe(name="a", packages=["x1"])
    assert one.digest() == Recipe(name="a", packages=["x1"]).digest()
    assert one.digest() != Recipe(name="a", packages=["x1", "x2"]).digest()


def test_mirrors_from_the_environment() -> None:
    recipe = Recipe(name="a", packages=[])
    assert Mirrors.of(recipe, {}).sources("trixie") == [
        "deb http://deb.debian.org/debian trixie main",
        "deb http://deb.debian.org/debian-security trixie-security main",
    ]
    own = Mirrors.of(recipe, {"VMSANDBOX_DEBIAN_MIRROR": "http://mirror/debian"})
    assert own.sources("trixie") == ["deb http://mirror/debian trixie main"]
    assert b"http://mirror" not in _overlay(recipe)  # the mirror must not show in the image's digest


def test_overlay_is_the_same_every_time_and_owned_by_root() -> None:
    import io
    import tarfile

    recipe = Recipe.model_validate(
        {
            "name": "a",
            "packages": [],
            "units": {"mask": ["x.timer"]},
            "files": [
                {"path": "/etc/a", "content": "1"},
                {"path": "/etc/a", "mode": "0600", "content": "$(id)"},
            ],
            "run": ["echo '$x' \"`id`\""],
        }
    )
    assert _overlay(recipe) == _overlay(recipe)
    with tarfile.open(fileobj=io.BytesIO(_overlay(recipe))) as archive:
        members = {member.name: member for member in archive}
        assert {(member.uid, member.gid, member.mtime) for member in members.values()} == {(0, 0, recipe.epoch)}
        assert members["etc/systemd/system/x.timer"].linkname == "/dev/null"
        file = archive.extractfile("etc/a")
        assert file is not None and file.read() == b"$(id)" and members["etc/a"].mode == 0o600
        command = archive.extractfile(".vmsandbox/run/000")
        assert command is not None and command.read() == b"echo '$x' \"`id`\"\n"
