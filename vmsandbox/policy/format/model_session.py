"""The shape of the sections about a session's course: its limits, what goes in, what comes back, who signs. Imports
pydantic: see `model.py`.

Without them a time limit that is no time would be one that never ends a session.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from vmsandbox.policy.format import words
from vmsandbox.policy.format.model_base import (
    MAX_ENTRIES,
    Command,
    Duration,
    Size,
    Strict,
    Text,
    blank_is_default,
    blank_is_empty,
    described,
)

Variable = Annotated[Text, AfterValidator(words.variable)]
Returned = Annotated[Text, AfterValidator(words.returned_path)]
Read = Annotated[Text, AfterValidator(words.project_pattern)]
Schedule = Annotated[Text, AfterValidator(words.schedule)]
Reaction = Literal["warn", "refuse"]
Count = Annotated[int, Field(ge=0, le=1 << 40)]


class HealthcheckSection(Strict):
    """A command that tells, again and again, whether the guest is well."""

    test: Command = Field(description="The command: a list of words, or a text for a shell.")
    interval: Annotated[Duration, Field(ge=1)] = described("Between two of them.", default=30.0)
    timeout: Annotated[Duration, Field(ge=0.1)] = described("When it has failed.", default=10.0)
    retries: Annotated[int, Field(ge=1, le=1000)] = described("Failures until it is unhealthy.", default=3)


class Session(Strict):
    """How long it may last, what it is given."""

    time: Annotated[Duration, Field(ge=1)] | None = described("When the session ends.")
    idle: Annotated[Duration, Field(ge=1)] | None = described(
        "When a session ends in which no command is started, reads or writes."
    )
    environment: Annotated[list[Variable], BeforeValidator(blank_is_empty), Field(max_length=256)] = described(
        "Names of the host's variables that pass into the guest.", default_factory=list
    )
    variables: Annotated[dict[Variable, Text], BeforeValidator(blank_is_default), Field(max_length=256)] = described(
        "Variables of the guest and their values.", default_factory=dict
    )
    post_create: Command | None = described(
        "Runs once per template, in the guest, with the policy's network and what it reads of the project."
    )
    post_create_files: Annotated[list[Read], BeforeValidator(blank_is_empty), Field(max_length=MAX_ENTRIES)] = (
        described(
            "Paths and globs of what post_create reads of the project; it runs again when they change. Left out: what "
            "it names, and the project's lists of packages.",
            default_factory=list,
        )
    )
    healthcheck: HealthcheckSection | None = described("A command that is repeated; its failures are events.")
    schedule: Schedule | None = described("When `policy timer` repeats it: a calendar expression of systemd.")


class Push(Strict):
    """What is done about what is found in what goes in."""

    secrets: Reaction = described("Keys and passwords.", default="warn")
    instructions: Reaction = described(
        "Invisible characters and terminal escapes in what an agent reads as instructions.", default="warn"
    )
    agent_configuration: Reaction = described("An agent's configuration that would run commands.", default="warn")


class Return(Strict):
    """What may come back."""

    accept: Literal["none", "safe", "all"] | None = described("The most that is taken without a person.")
    denied_paths: Annotated[list[Returned], BeforeValidator(blank_is_empty), Field(max_length=MAX_ENTRIES)] = described(
        "Paths and globs in the project that are never taken.", default_factory=list
    )
    files: Count | None = described("The most files in one return.")
    bytes: Size | None = described("The most bytes in one return.")
    deletions: Count | None = described("The most deletions in one return.")


class Signed(Strict):
    """Policies on this host have to be signed. In the organisation's file alone."""

    allowed_signers: Annotated[Text, AfterValidator(words.file_path)] = Field(
        description="Who may sign: a file as ssh-keygen(1) describes under ALLOWED SIGNERS; absolute."
    )
    principals: Annotated[list[Text], Field(min_length=1, max_length=256)] | None = described(
        "Which of them. Left out: any."
    )
