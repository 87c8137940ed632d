"""Small files that are imported, and what became of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from vmsandbox.policy.importing.reading import Imported, import_files


def of_service(tmp_path: Path, service: Any, **top: Any) -> Imported:
    path = tmp_path / "compose.yml"
    path.write_text(yaml.safe_dump({"services": {"app": service}, **top}))
    return import_files([path])


def of_devcontainer(tmp_path: Path, text: str) -> Imported:
    path = tmp_path / "devcontainer.json"
    path.write_text(text)
    return import_files([path])


def sandbox_of(found: Imported) -> Any:
    return yaml.safe_load(found.text)["sandbox"]


def left_of(found: Imported) -> dict[str, str]:
    return {one.key.removeprefix("services.app."): one.why for one in found.left}
