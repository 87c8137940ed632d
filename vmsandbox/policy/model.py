"""The exact shape of a policy file. Importing this costs about 0.1 s (pydantic): only `load.py` does,
when needed.

Without a strict model a misspelt `denied_path:` would be read as "nothing is denied".
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints


def _blank_is_empty(value: object) -> object:
    """`allowed_hosts:` with nothing behind it means an empty list: for an allow-list that denies all."""
    return [] if value is None else value


def _blank_is_default(value: object) -> object:
    return {} if value is None else value


# No control characters: no path, host or command here needs one, and they would reach terminals and logs.
Text = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[^\x00-\x1f\x7f]+$")]
Texts = Annotated[list[Text], BeforeValidator(_blank_is_empty)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Filesystem(_Strict):
    """Paths and globs on the host."""

    allowed_paths: Texts = []
    denied_paths: Texts = []


class Network(_Strict):
    """What the guest may reach."""

    mode: Literal["none", "restricted", "proxy", "filtered"] | None = None
    allowed_hosts: Texts = []
    denied_hosts: Texts = []


class Commands(_Strict):
    """Command lines and globs."""

    allowed: Texts = []
    denied: Texts = []
    require_confirmation: Texts = []


class Sandbox(_Strict):
    """The three sections; each may be left out."""

    filesystem: Annotated[Filesystem, BeforeValidator(_blank_is_default)] = Field(default_factory=Filesystem)
    network: Annotated[Network, BeforeValidator(_blank_is_default)] = Field(default_factory=Network)
    commands: Annotated[Commands, BeforeValidator(_blank_is_default)] = Field(default_factory=Commands)


class PolicyFile(_Strict):
    """The whole file: one key, `sandbox`."""

    sandbox: Sandbox
