"""The shape of `sandbox.network`, with every host, address, path and name checked. Imports pydantic: see `model.py`.

Without these checks a host with a slip in it (`*pypi.org`, `https://pypi.org`) would be a rule that never matches, and
nobody would know which.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from vmsandbox.policy.format import network_words as words
from vmsandbox.policy.format.model_base import MAX_ENTRIES, Strict, Text, blank_is_default, blank_is_empty, described

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

    host: Pattern = Field(description="A name, *.name, *, an address, or a bundle (@pypi).")
    # On purpose: what is named may not be empty, or a blank `methods:` would allow any.
    ports: Annotated[list[Port], Field(min_length=1, max_length=64)] = described(
        "Left out: 80 and 443, or the bundle's.", default_factory=list
    )
    methods: Methods = described("Left out: any.", default_factory=list)
    paths: Annotated[list[PathGlob], Field(min_length=1, max_length=256)] = described(
        "Globs; * is any text, slashes too. Left out: any.", default_factory=list
    )
    addresses: Annotated[list[Address], Field(min_length=1, max_length=64)] = described(
        "Dialled instead of asking DNS; the only way to a private address.", default_factory=list
    )
    tls: Annotated[Text, AfterValidator(words.tls), Field(json_schema_extra={"enum": list(words.TLS)})] = described(
        "Whether TLS is looked into.", default="auto"
    )

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

    env: Variable | None = described("A variable of the host.")
    file: Text | None = described("A file of the host: absolute, ~/…, or relative to the project.")
    command: Annotated[list[Text], Field(min_length=1, max_length=64)] | None = described(
        "A program of the host and its arguments: what it prints."
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> Source:
        if [self.env, self.file, self.command].count(None) != 2:
            raise ValueError("exactly one of env, file and command says where the secret comes from")
        return self


class Secret(Strict):
    """A secret that the guest has a placeholder for."""

    name: Variable = Field(description="Of the variable in the guest.")
    from_: Annotated[Source, BeforeValidator(words.not_the_secret_itself)] = Field(
        alias="from", description="Where its value is on the host."
    )
    hosts: Annotated[list[SecretHost], Field(min_length=1, max_length=64)] = Field(
        description="Which hosts it is sent to."
    )
    header: Header = described("Which header it is in.", default="authorization")
    prefix: Annotated[str, AfterValidator(words.prefix)] = described("What precedes it there.", default="")
    methods: Methods = described("Left out: any.", default_factory=list)


class Packages(Strict):
    """Which packages may be fetched."""

    # On purpose: `allow:` with nothing behind it allows none, as with hosts; without the key any is.
    allow: Annotated[list[Package] | None, BeforeValidator(blank_is_empty)] = described(
        "Globs, `name` or `ecosystem:name`. Left out: any."
    )
    deny: Annotated[list[Package], BeforeValidator(blank_is_empty)] = described(
        "Globs; they win.", default_factory=list
    )
    minimum_age_days: Annotated[float, Field(ge=0, le=36500)] = described("Since it was uploaded.", default=0)


class DlpSection(Strict):
    """What is looked for in what goes out."""

    secrets: bool = described("What looks like a key or a password.", default=True)
    canaries: bool = described("Tokens that were planted in the guest.", default=True)
    freeze: bool = described("Whether a hit freezes the guest.", default=False)


class Limits(Strict):
    """Bounds; those that are not named are built in."""

    connections: Annotated[int, Field(ge=1, le=10000)] | None = described("At once.")
    header_bytes: Annotated[int, Field(ge=1024, le=1 << 20)] | None = described("Of one request.")
    request_bytes: Count | None = described("Of one request's body.")
    response_bytes: Count | None = described("Of one answer's body.")
    bytes_per_second: Annotated[int, Field(ge=0, le=1 << 50)] | None = described("0: not limited.")
    connect_seconds: Seconds | None = described("Until a server answers.")
    idle_seconds: Seconds | None = described("Until a silent connection ends.")


RuleList = Annotated[list[Rule], BeforeValidator(blank_is_empty), Field(max_length=MAX_ENTRIES)]
SecretList = Annotated[list[Secret], BeforeValidator(blank_is_empty), Field(max_length=64)]
ResolverList = Annotated[list[Resolver], BeforeValidator(blank_is_empty), Field(max_length=8)]


class Network(Strict):
    """What the guest may reach."""

    mode: Literal["none", "restricted", "proxy", "filtered"] | None = described("How. Left out: there is no network.")
    allowed_hosts: Entries = described(
        "A name, *.name, *, an address, each with or without :port, or a bundle (@pypi).", default_factory=list
    )
    denied_hosts: Entries = described("The same; the more precise one wins, a deny where equal.", default_factory=list)
    rules: RuleList = described("Hosts, narrowed to ports, methods and paths.", default_factory=list)
    secrets: SecretList = described("What the guest has placeholders for.", default_factory=list)
    packages: Annotated[Packages, BeforeValidator(blank_is_default)] = described(
        "Which packages may be fetched.", default_factory=Packages
    )
    dlp: Annotated[DlpSection, BeforeValidator(blank_is_default)] = described(
        "What is looked for in what goes out.", default_factory=DlpSection
    )
    limits: Annotated[Limits, BeforeValidator(blank_is_default)] = described(
        "Bounds; those that are not named are built in.", default_factory=Limits
    )
    resolver: ResolverList = described("DNS servers, instead of the host's.", default_factory=list)

    @model_validator(mode="after")
    def _one_of_each(self) -> Network:
        names = [one.name.upper() for one in self.secrets]
        if twice := next((one for one in names if names.count(one) > 1), None):
            raise ValueError(f"the secret {twice} is there twice")
        return self
