"""The shape of the sections about what runs in the guest: file system, commands, kernel, resources. Imports pydantic:
see `model.py`.

Without the bounds here a policy with `processes: 1` would load, and no login would ever work.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from vmsandbox.policy.format import words
from vmsandbox.policy.format.model_base import (
    MAX_ENTRIES,
    DeniedPath,
    Duration,
    GuestPath,
    Size,
    Strict,
    Text,
    blank_is_empty,
    described,
    not_empty,
    one_or_more,
)

MIB = 1 << 20
Mount = Annotated[Text, AfterValidator(words.tmpfs_path)]
Output = Annotated[Text, AfterValidator(words.output_path)]
Capability = Annotated[Text, AfterValidator(words.capability)]
Pattern = Annotated[Text, AfterValidator(words.command_pattern)]
Patterns = Annotated[list[Pattern], BeforeValidator(blank_is_empty), Field(max_length=MAX_ENTRIES)]
File = Annotated[Text, AfterValidator(words.file_path)]


class TmpfsMount(Strict):
    """A folder of the guest that is memory: nosuid, nodev, and noexec unless `exec` says otherwise."""

    path: Mount = Field(description="Where: absolute, or ~/… in the worker's home.")
    size: Annotated[Size, Field(ge=4096)] = Field(description="The most that fits into it: bytes, or 100m.")
    exec: bool = described("Whether programs in it may run.", default=False)


class Filesystem(Strict):
    """What the worker may write, what is never sent."""

    allowed_paths: Annotated[list[GuestPath], BeforeValidator(not_empty), Field(max_length=MAX_ENTRIES)] = described(
        "All that the worker may write: ./ in the project, ~/ in its home, or absolute; no globs. "
        "Left out: the project, its home and /tmp.",
        default_factory=list,
    )
    denied_paths: Annotated[list[DeniedPath], BeforeValidator(blank_is_empty), Field(max_length=MAX_ENTRIES)] = (
        described("Paths and globs that never leave the host, and that are closed in the guest.", default_factory=list)
    )
    project: Literal["writable", "read-only"] = described("Whether the project may be written.", default="writable")
    output: Output | None = described("The folder of a read-only project that may be written.")
    tmpfs: Annotated[list[TmpfsMount], BeforeValidator(blank_is_empty), Field(max_length=64)] = described(
        "Folders of the guest that are memory, limited in size.", default_factory=list
    )

    @model_validator(mode="after")
    def _can_be_kept(self) -> Filesystem:
        if self.output is not None and self.project != "read-only":
            raise ValueError("`output` has no meaning without `project: read-only`")
        paths = [one.path for one in self.tmpfs]
        if twice := next((one for one in paths if paths.count(one) > 1), None):
            raise ValueError(f"there are two tmpfs on {twice}")
        return self


class Commands(Strict):
    """Patterns of command lines: the program, then its arguments; `*` is any text."""

    allowed: Annotated[list[Pattern], BeforeValidator(not_empty), Field(max_length=MAX_ENTRIES)] = described(
        "What may run. Left out: anything that is not denied.", default_factory=list
    )
    denied: Patterns = described("What may not run.", default_factory=list)
    require_confirmation: Patterns = described(
        "What runs only when the person on the host says yes.", default_factory=list
    )
    confirm_seconds: Annotated[Duration, Field(ge=1, le=3600)] = described(
        "How long the person is waited for; then it is no.", default=60.0
    )


class Kernel(Strict):
    """What of the guest's kernel the worker's processes reach."""

    seccomp: Annotated[
        list[File],
        BeforeValidator(one_or_more),
        Field(min_length=1, max_length=16),
        WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
    ] = described(
        "An OCI (Docker) seccomp profile, or several that hold at once; relative to the policy file's folder.",
        default_factory=list,
    )
    capabilities: Annotated[list[Capability], BeforeValidator(blank_is_empty), Field(max_length=64)] = described(
        "Capabilities that stay in the bounding set, such as chown.", default_factory=list
    )
    new_privileges: bool = described("Whether set-user-ID programs may gain privileges.", default=False)
    user_namespaces: bool = described("Whether the worker may make user namespaces.", default=False)


class Resources(Strict):
    """What a guest may use of the host."""

    vcpus: Annotated[int, Field(ge=1, le=64)] | None = described("Virtual processors.")
    memory: Annotated[Size, Field(ge=256 * MIB, le=1 << 40)] | None = described("Of the whole guest.")
    memory_reserved: Annotated[Size, Field(ge=128 * MIB, le=1 << 40)] | None = described(
        "What the guest keeps when the host takes memory back. Left out: all of it."
    )
    disk: Annotated[Size, Field(ge=64 * MIB)] | None = described("What the guest may write beyond its image.")
    write_rate: Annotated[Size, Field(ge=64 << 10)] | None = described("Bytes a second written to its disk.")
    processes: Annotated[int, Field(ge=16, le=4_000_000)] | None = described("The worker's, threads included.")
    output: Annotated[Size, Field(ge=1024)] | None = described("Bytes of one command's stdout and stderr.")

    @model_validator(mode="after")
    def _fits(self) -> Resources:
        if self.memory is not None and self.memory_reserved is not None and self.memory_reserved > self.memory:
            raise ValueError("memory_reserved is more than memory")
        return self
