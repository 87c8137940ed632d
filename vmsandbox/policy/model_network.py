"""The shape of `sandbox.network`, with every host, address, path and name checked. Imports pydantic: see `model.py`.

Without these checks a host with a slip in it (`*pypi.org`, `https://pypi.org`) would be a rule that never matches, and
nobody would know which.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from vmsandbox.policy import network_words as words
from vmsandbox.policy.model_base import Strict, Text, blank_is_default, blank_is_empty

MAX_ENTRIES = 2000

Port = Annotated[int, Field(ge=1, le=65535)]
Entry = Annotated[Text, AfterValidator(words.entry)]
Pattern = Annotated[Text, AfterValidator(words.pattern)]
Entries = Annotated[list[Entry], BeforeValidator(blank_is_empty), Field(max_length=MAX_ENTRIES)]
Method = Annotated[Text, AfterValidator(words.method)]
PathGlob = Annotated[Text, AfterValidator(words.path)]
Address = Annotated[Text, AfterValidator(words.address)]
Resolver = Annotated[Text, AfterValidator(words.resolver)]
Package = Annotated[Text, AfterValidator(words.package)]
SecretHost = Annotated[Text, AfterValidator(words.secret_host)]
Header = Annotated[Text, AfterValidator(words.header)]
Methods = Annotated[list[Method], Field(min_length=1, max_length=32)]
Variable = Annotated[Text, AfterValidator(words.variable)]
Count = Annotated[int, Field(ge=1, le=1 << 50)]
Seconds = Annotated[float, Field(gt=0, le=86400)]


class Rule(Strict):
    """Allows a host, narrowed to ports, methods and paths."""

    host: Pattern
    # On purpose: what is named may not be empty, or a blank `methods:` would allow any.
    ports: Annotated[list[Port], Field(min_length=1, max_length=64)] = Field(default_factory=list)
    methods: Methods = Field(default_factory=list)
    paths: Annotated[list[PathGlob], Field(min_length=1, max_length=256)] = Field(default_factory=list)
    addresses: Annotated[list[Address], Field(min_length=1, max_length=64)] = Field(default_factory=list)
    tls: Annotated[Text, AfterValidator(words.tls), Field(json_schema_extra={"enum": list(words.TLS)})] = "auto"

    @model_validator(mode="after")
    def _can_be_kept(self) -> Rule:
        if self.tls == "passthrough" and (self.methods or self.paths or self.host.startswith("@")):
            raise ValueError("what is passed through is not seen: no methods, paths or bundle with tls: passthrough")
        if self.host.startswith("@") and self.paths:
            raise ValueError("a bundle has paths of its own: name the hosts instead")
        if self.host.startswith("@"):
            words.check_narrowed(self.host, self.ports, self.methods)
        return self


class Source(Strict):
    """Where a secret comes from on the host: exactly one of them."""

    env: Variable | None = None
    file: Text | None = None
    command: Annotated[list[Text], Field(min_length=1, max_length=64)] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Source:
        if [self.env, self.file, self.command].count(None) != 2:
            raise ValueError("exactly one of env, file and command says where the secret comes from")
        return self


class Secret(Strict):
    """A secret that the guest has a placeholder for."""

    name: Variable
    from_: Annotated[Source, BeforeValidator(words.not_the_secret_itself), Field(alias="from")]
    hosts: Annotated[list[SecretHost], Field(min_length=1, max_length=64)]
    header: Header = "authorization"
    prefix: Annotated[str, AfterValidator(words.prefix)] = ""
    methods: Methods = Field(default_factory=list)


class Packages(Strict):
    """Which packages may be fetched."""

    # On purpose: `allow:` with nothing behind it allows none, as with hosts; without the key any is.
    allow: Annotated[list[Package] | None, BeforeValidator(blank_is_empty)] = None
    deny: Annotated[list[Package], BeforeValidator(blank_is_empty)] = Field(default_factory=list)
    minimum_age_days: Annotated[float, Field(ge=0, le=36500)] = 0


class DlpSection(Strict):
    """What is looked for in what goes out."""

    secrets: bool = True
    canaries: bool = True
    freeze: bool = False


class Limits(Strict):
    """Bounds; those that are not named are built in."""

    connections: Annotated[int, Field(ge=1, le=10000)] | None = None
    header_bytes: Annotated[int, Field(ge=1024, le=1 << 20)] | None = None
    request_bytes: Count | None = None
    response_bytes: Count | None = None
    bytes_per_second: Annotated[int, Field(ge=0, le=1 << 50)] | None = None
    connect_seconds: Seconds | None = None
    idle_seconds: Seconds | None = None


RuleList = Annotated[list[Rule], BeforeValidator(blank_is_empty), Field(max_length=MAX_ENTRIES)]
SecretList = Annotated[list[Secret], BeforeValidator(blank_is_empty), Field(max_length=64)]
ResolverList = Annotated[list[Resolver], BeforeValidator(blank_is_empty), Field(max_length=8)]


class Network(Strict):
    """What the guest may reach."""

    mode: Literal["none", "restricted", "proxy", "filtered"] | None = None
    allowed_hosts: Entries = Field(default_factory=list)
    denied_hosts: Entries = Field(default_factory=list)
    rules: Annotated[list[Rule], BeforeValidator(blank_is_empty), Field(max_length=MAX_ENTRIES)] = Field(
        default_factory=list
    )
    secrets: Annotated[list[Secret], BeforeValidator(blank_is_empty), Field(max_length=64)] = Field(
        default_factory=list
    )
    packages: Annotated[Packages, BeforeValidator(blank_is_default)] = Field(default_factory=Packages)
    dlp: Annotated[DlpSection, BeforeValidator(blank_is_default)] = Field(default_factory=DlpSection)
    limits: Annotated[Limits, BeforeValidator(blank_is_default)] = Field(default_factory=Limits)
    resolver: Annotated[list[Resolver], BeforeValidator(blank_is_empty), Field(max_length=8)] = Field(
        default_factory=list
    )

    @model_validator(mode="after")
    def _one_of_each(self) -> Network:
        names = [one.name.upper() for one in self.secrets]
        if twice := next((one for one in names if names.count(one) > 1), None):
            raise ValueError(f"the secret {twice} is there twice")
        return self
