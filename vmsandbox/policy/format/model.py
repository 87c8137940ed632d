"""The exact shape of a policy file. Importing this costs about 0.1 s (pydantic): only `load.py` does,
when needed.

Without a strict model a misspelt `denied_path:` would be read as "nothing is denied".
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from vmsandbox.policy.format import words
from vmsandbox.policy.format.model_base import Strict, Text, blank_is_default, described
from vmsandbox.policy.format.model_guest import Commands, Filesystem, Kernel, Resources
from vmsandbox.policy.format.model_network import Network
from vmsandbox.policy.format.model_session import Push, Return, Session, Signed

ImageName = Annotated[Text, AfterValidator(words.image)]


class Sandbox(Strict):
    """What a session is allowed. Each key may be left out."""

    image: ImageName | None = described("The image that guests are made from.")
    isolation: Literal["emulated", "separated", "isolated"] | None = described("The least isolation grade.")
    filesystem: Annotated[Filesystem, BeforeValidator(blank_is_default)] = described(
        "What the worker may write, what is never sent.", default_factory=Filesystem
    )
    network: Annotated[Network, BeforeValidator(blank_is_default)] = described(
        "What the guest may reach.", default_factory=Network
    )
    commands: Annotated[Commands, BeforeValidator(blank_is_default)] = described(
        "What may run.", default_factory=Commands
    )
    kernel: Annotated[Kernel, BeforeValidator(blank_is_default)] = described(
        "What of the guest's kernel is reached.", default_factory=Kernel
    )
    resources: Annotated[Resources, BeforeValidator(blank_is_default)] = described(
        "What of the host may be used.", default_factory=Resources
    )
    session: Annotated[Session, BeforeValidator(blank_is_default)] = described(
        "How long it lasts, what it is given.", default_factory=Session
    )
    push: Annotated[Push, BeforeValidator(blank_is_default)] = described(
        "What is done about what is found in what goes in.", default_factory=Push
    )
    return_: Annotated[Return, BeforeValidator(blank_is_default)] = described(
        "What may come back.", default_factory=Return, alias="return"
    )
    signed: Signed | None = described("Policies have to be signed. In the organisation's file alone.")


class PolicyFile(Strict):
    """The whole file: one key, `sandbox`."""

    sandbox: Sandbox = Field(description="What a session is allowed.")
