"""The table of what is imported, as a page of the documentation (docs/policy-mapping.md).

Without it the page would be written by hand, and say what the code did a year ago.
"""

from __future__ import annotations

from collections.abc import Mapping

from vmsandbox.policy.importing.devcontainer import DEVCONTAINER
from vmsandbox.policy.importing.options import OPTIONS
from vmsandbox.policy.importing.table import FILE, NETWORK, SERVICE, Key

_NOT = "not mapped"
_HEAD = """# What `vmsandbox policy import` makes of other files

Made from `vmsandbox/policy/importing/`; a test compares. `vmsandbox policy import FILE…` prints the policy, and lists
on stderr every key that became nothing, with the reason; unknown keys too. Where two keys or files say something about
the same, the stricter one counts. Values with a variable of the host (`${NAME}`) are not filled in, but listed.
"""


def mapping_page() -> str:
    """The page as Markdown."""
    parts = [
        _HEAD,
        "## Compose file: a service\n",
        _table(SERVICE),
        "\n## Compose file: the rest\n",
        _table(FILE),
        "\n## Compose file: a network\n",
        _table(NETWORK),
        "\n## devcontainer.json\n",
        _table(DEVCONTAINER),
        "\n## Options of `docker run` (`runArgs`)\n",
        "As the key of a service that means the same; an option that is not here is listed as unknown.\n",
        _rows(("Option", "Key"), [(f"`{name}`", f"`{one.key}`") for name, one in OPTIONS.items()]),
    ]
    return "\n".join(parts) + "\n"


def _table(keys: Mapping[str, Key]) -> str:
    rows: list[tuple[str, ...]] = []
    for name, one in keys.items():
        words = one.ours.split(", ") if one.ours else ["(always)" if "holds always" in one.text else _NOT]
        rows.append((f"`{name}`", ", ".join(f"`{word}`" if "." in word else word for word in words), one.text))
    rows.sort(key=lambda row: row[1] == _NOT)
    return _rows(("Key", "Becomes", "How, or why not"), rows)


def _rows(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
