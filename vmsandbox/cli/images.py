"""image build, ls, verify, rm."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from vmsandbox.cli.options import JsonOption
from vmsandbox.cli.output import make_monitor, print_json, print_table
from vmsandbox.image.manifest import Image
from vmsandbox.paths import Layout
from vmsandbox.process import Programs

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
ImageArgument = Annotated[str, typer.Argument(metavar="[NAME]", help="The image.")]


@app.command()
def build(
    recipe: Annotated[str, typer.Argument(metavar="[RECIPE]", help="Recipe's name, or a .yaml file.")] = "base",
    json: JsonOption = False,
) -> int:
    """Build an image from a recipe. The same recipe and package versions give the same digest."""
    from vmsandbox.image.build import build_image
    from vmsandbox.image.recipe import load_recipe

    layout = Layout.from_environment()
    image = build_image(load_recipe(recipe, layout), layout, Programs(), make_monitor())
    if json:
        print_json({"name": image.name, "digest": image.digest, "folder": str(image.folder)})
    else:
        print(f"{image.name} sha256:{image.digest}")
    return 0


@app.command("ls")
def list_(json: JsonOption = False) -> int:
    """List images."""
    from vmsandbox.image.store import ImageStore

    images = ImageStore(Layout.from_environment()).list()
    if json:
        print_json([_facts(one) for one in images])
    elif images:
        rows = [[one.name, one.digest[:16], one.facts.suite, one.facts.kernel_version, str(one.facts.package_count)]
                for one in images]  # fmt: skip
        print_table(["NAME", "DIGEST", "SUITE", "KERNEL", "PACKAGES"], rows)
    else:
        print("no images; `vmsandbox image build` makes one", file=sys.stderr)
    return 0


def _facts(image: Image) -> dict[str, object]:
    facts = image.facts
    return {
        "name": image.name,
        "digest": image.digest,
        "suite": facts.suite,
        "kernel": facts.kernel_version,
        "packages": facts.package_count,
    }


@app.command()
def verify(name: ImageArgument = "base", json: JsonOption = False) -> int:
    """Hash every file of an image and compare with its manifest."""
    from vmsandbox.image.store import ImageStore

    store = ImageStore(Layout.from_environment())
    image = store.find(name)
    with make_monitor().step(f"verifying image {name}"):
        store.verify(image, force=True)
    if json:
        print_json({"name": image.name, "digest": image.digest, "verified": True})
    else:
        print(f"{image.name} sha256:{image.digest} is what was built")
    return 0


@app.command()
def rm(name: Annotated[str, typer.Argument(metavar="NAME")], json: JsonOption = False) -> int:
    """Remove an image. Templates made of it go with the next `gc --templates`."""
    from vmsandbox.image.store import ImageStore

    removed = ImageStore(Layout.from_environment()).remove(name)
    if json:
        print_json({"name": name, "removed": removed})
    else:
        print(f"removed {name}: {', '.join(removed)}")
    return 0
