"""The exact shape of a policy file. Importing this costs about 0.1 s (pydantic): only `load.py` does,
when needed.

Without a strict model a misspelt `denied_path:` would be read as "nothing is denied".
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from vmsandbox.policy.model_base import Strict, Texts, blank_is_default
from vmsandbox.policy.model_network import Network


class Filesystem(Strict):
    """Paths and globs on the host."""

    allowed_paths: Texts = Field(default_factory=list)
    denied_paths: Texts = Field(default_factory=list)


class Commands(Strict):
    """Command lines and globs."""

    allowed: Texts = Field(default_factory=list)
    denied: Texts = Field(default_factory=list)
    require_confirmation: Texts = Field(default_factory=list)


class Sandbox(Strict):
    """The three sections; each may be left out."""

    filesystem: Annotated[Filesystem, BeforeValidator(blank_is_default)] = Field(default_factory=Filesystem)
    network: Annotated[Network, BeforeValidator(blank_is_default)] = Field(default_factory=Network)
    commands: Annotated[Commands, BeforeValidator(blank_is_default)] = Field(default_factory=Commands)


class PolicyFile(Strict):
    """The whole file: one key, `sandbox`."""

    sandbox: Sandbox
