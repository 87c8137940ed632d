"""Recipes: what goes into an image, read from `images/<name>.yaml` and checked strictly.

A typing mistake in a key must not silently build another image, so unknown keys, wrong types and doubled keys
are errors that name the file and the place. Only builders import this module: pydantic and yaml cost 0.1 s.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from vmsandbox.errors import UserInputError
from vmsandbox.paths import IMAGE_NAME, Layout, resource_folder

_DEBIAN = "http://deb.debian.org/debian"
_SECURITY = "http://deb.debian.org/debian-security"
_UNIT_TYPES = "service|socket|timer|mount|target|path|slice|automount|swap"
# Places that are not in the image: mount points, and the build's own folder.
_NOT_IN_IMAGE = frozenset({"dev", "proc", "sys", "run", "tmp", "boot", ".vmsandbox"})


def _inside_image(path: str) -> str:
    parts = path.split("/")[1:]
    if not path.startswith("/") or not path.isprintable() or any(part in {"", ".", ".."} for part in parts):
        raise ValueError("a path is absolute, without '.', '..', '//' or a '/' at its end")
    if parts[0] in _NOT_IN_IMAGE:
        raise ValueError(f"/{parts[0]} is not part of an image")
    return path


Package = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9+.-]+(=[A-Za-z0-9.+:~-]+)?$")]
Unit = Annotated[str, Field(pattern=rf"^[A-Za-z0-9:_.\\@-]+\.({_UNIT_TYPES})$")]
Mirror = Annotated[str, Field(pattern=r"^https?://[^\s\[\]]+$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Units(_Strict):
    """systemd units to change: `mask` them (never started), `disable` or `enable` them."""

    mask: list[Unit] = []
    disable: list[Unit] = []
    enable: list[Unit] = []


class File(_Strict):
    """A file put into the image, owned by root. `mode` is octal in quotes: "0644"."""

    path: Annotated[str, AfterValidator(_inside_image)]
    mode: Annotated[str, Field(pattern=r"^0[0-7]{3}$")] = "0644"
    content: str


class Recipe(_Strict):
    """All that goes into an image, with what it extends already merged in.

    disk: size of the root file system ("4G"); the file is sparse. epoch: the latest date of the image's
    files, seconds since 1970; newer ones are set back to it (reproducible-builds.org, SOURCE_DATE_EPOCH).
    security_mirror: "" for none. run: shell commands, run in the image at the end.
    """

    name: Annotated[str, Field(pattern=rf"^{IMAGE_NAME.pattern}$")]
    description: str = ""
    suite: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")] = "trixie"
    mirror: Mirror = _DEBIAN
    security_mirror: Mirror | Literal[""] = _SECURITY
    variant: Literal["essential", "apt", "required", "important", "standard"] = "essential"
    packages: list[Package]
    disk: Annotated[str, Field(pattern=r"^[1-9][0-9]{0,4}[MG]$")] = "4G"
    initramfs: Literal["small", "stock"] = "small"
    epoch: Annotated[int, Field(ge=0, lt=2**32)] = 1760000000
    units: Units = Units()
    files: list[File] = []
    run: list[str] = []

    def digest(self) -> str:
        """SHA-256 (hex) over the recipe and the scripts that make an image of it: equal if the inputs are."""
        told = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        scripts = [hashlib.sha256(build_script(name)).hexdigest() for name in BUILD_SCRIPTS]
        return hashlib.sha256("\n".join([told, *scripts]).encode()).hexdigest()


BUILD_SCRIPTS = ("finish.sh", "init", "pyc_trust.py")


def build_script(name: str) -> bytes:
    """One of the scripts that are shipped beside the recipes."""
    return (resource_folder("images") / name).read_bytes()


def recipe_names(layout: Layout) -> list[str]:
    """The names of all recipes: the person's own and the shipped ones."""
    return sorted({file.stem for folder in _folders(layout) for file in folder.glob("*.yaml")})


def load_recipe(wanted: str, layout: Layout) -> Recipe:
    """Read a recipe by name, or by the path of a .yaml file, and merge in what it extends.

    Raises:
        UserInputError: there is none, it is not valid, or recipes extend each other in a circle.
    """
    file = Path(wanted) if "/" in wanted or wanted.endswith(".yaml") else _named(wanted, layout)
    chain: list[Path] = []
    merged: dict[str, Any] = {}
    while True:
        if file in chain:
            circle = " → ".join(each.stem for each in [*chain[chain.index(file) :], file])
            raise UserInputError(f"recipes extend each other in a circle: {circle}", details=str(chain[0]))
        chain.append(file)
        told = _read(file)
        parent = told.pop("extends", None)
        _check(file, told, whole=parent is None)
        merged = _merge(told, merged)
        if parent is None:
            break
        if not isinstance(parent, str):
            raise UserInputError(f"{file}: `extends` takes the name of one recipe, not {parent!r}")
        file = _named(parent, layout, said_by=file)
    return _check(chain[0], merged, whole=True)


def _folders(layout: Layout) -> tuple[Path, Path]:
    return (layout.config / "images", resource_folder("images"))


def _named(name: str, layout: Layout, said_by: Path | None = None) -> Path:
    if IMAGE_NAME.fullmatch(name):
        for folder in _folders(layout):
            if (file := folder / f"{name}.yaml").is_file():
                return file
    known = recipe_names(layout)
    said = f"{said_by}: `extends` names " if said_by else ""
    raise UserInputError(
        f"{said}no recipe {name!r}" if said else f"there is no recipe {name!r}",
        details=f"looked in {' and '.join(map(str, _folders(layout)))}",
        resolution=_suggestion(name, known) or f"recipes there are: {', '.join(known)}",
    )


class _Loader(yaml.SafeLoader):
    """YAML as data, but a key that stands twice is an error: PyYAML would drop the first one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.MarkedYAMLError(None, None, f"the key {name!r} stands twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def _read(file: Path) -> dict[str, Any]:
    try:
        told = yaml.load(file.read_text("utf-8"), Loader=_Loader)  # noqa: S506 (it is a SafeLoader)
    except OSError as error:
        raise UserInputError(f"the recipe {file} cannot be read", details=str(error)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserInputError(f"the recipe {file} is not valid YAML", details=str(error)) from error
    if not isinstance(told, dict):
        raise UserInputError(f"the recipe {file} is not a mapping of keys to values")
    return told


def _merge(child: Any, under: Any) -> Any:
    """`under` is what recipes nearer to the wanted one said: its scalars win, its lists come last.

    The parent is read after the child, so the first argument is always the parent's here.
    """
    if isinstance(child, dict) and isinstance(under, dict):
        keys = [*child, *(key for key in under if key not in child)]
        return {
            key: _merge(child[key], under[key]) if key in child and key in under else {**child, **under}[key]
            for key in keys
        }
    if isinstance(child, list) and isinstance(under, list):
        return child + [item for item in under if item not in child]
    return under


def _check(file: Path, told: dict[str, Any], *, whole: bool) -> Recipe:
    """Check one file's own keys, so that an error names the file it is in; `whole`: required keys too."""
    try:
        recipe = Recipe.model_validate(told if whole else {"packages": [], **told})
    except ValidationError as error:
        problems = [_problem(each["loc"], each["type"], each["msg"]) for each in error.errors()]
        raise UserInputError(
            f"the recipe {file} is not valid: {problems[0][0]}",
            details="\n".join(text for text, _ in problems),
            resolution=next((hint for _, hint in problems if hint), "see the recipe `base` for all keys"),
        ) from None
    if recipe.name != file.stem:
        raise UserInputError(
            f"the recipe {file} is not valid: name",
            details=f"it says {recipe.name!r}, the file's name says {file.stem!r}",
            resolution="give both the same name",
        )
    return recipe


def _problem(where: tuple[int | str, ...], kind: str, message: str) -> tuple[str, str]:
    """The place (`packages[3]`) with what is wrong there, and a suggestion if a known key is near."""
    # pydantic names the branch of a union in the location: not a place in the file
    place = re.sub(r"\.?(literal|function|constrained).*", "", "".join(
        f"[{step}]" if isinstance(step, int) else f".{step}" for step in where
    ).lstrip("."))  # fmt: skip
    if kind != "extra_forbidden":
        return f"{place}: {message}", ""
    part = {"units": list(Units.model_fields), "files": list(File.model_fields)}
    keys = [*Recipe.model_fields, "extends"] if len(where) == 1 else part.get(str(where[0]), [])
    return f"{place}: unknown key", _suggestion(str(where[-1]), keys)


def _suggestion(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else ""
