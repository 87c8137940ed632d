"""The values that the policy, the broker and the session hand to each other about what leaves a guest.

Standard library alone: the broker runs in an environment of its own, and every command imports this.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

WEB_PORTS = (80, 443)


class Destination(NamedTuple):
    """Where a request goes, in the one canonical form (`vmsandbox.egress.hosts.parse_destination` alone makes it).

    host: a name in lower-case A-labels without a trailing dot, or an address as `ipaddress` writes it. port: 1-65535.
    """

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Tls(StrEnum):
    """What is done with TLS to a host. auto: inspected, as long as no rule for the same host passes it through."""

    AUTO = "auto"
    INSPECT = "inspect"
    PASSTHROUGH = "passthrough"


@dataclass(frozen=True)
class HostRule:
    """One line of the allow or the deny list.

    pattern     canonical: `example.org`, `*.example.org` (its subdomains, not itself), `*`, or an address
    ports       what it is for
    methods     upper case; empty: any
    paths       globs on the path, `*` matches any characters, `/` too; empty: any
    addresses   dialled instead of asking DNS; the only way to a private, loopback or host address
    source      where it stands, for messages: `network.allowed_hosts[2]`, `network.rules[0]`, `@pypi`
    """

    pattern: str
    ports: tuple[int, ...] = WEB_PORTS
    methods: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()
    tls: Tls = Tls.AUTO
    source: str = ""


@dataclass(frozen=True)
class SecretUse:
    """A secret that the guest only has a placeholder for. Its value is never in here (see `BrokerConfig.secrets`).

    name: of the variable in the guest. header: lower case; `prefix` precedes the value in it (`Bearer `).
    hosts: patterns as in HostRule. methods: empty: any.
    """

    name: str
    placeholder: str
    hosts: tuple[str, ...]
    header: str = "authorization"
    prefix: str = ""
    methods: tuple[str, ...] = ()


@dataclass(frozen=True)
class PackageRules:
    """Which packages may be fetched. Globs `name` or `ecosystem:name` (pypi, npm, debian, crates); deny wins.

    allow: None for any. minimum_age_days: by the index's own metadata, where it has the time of upload.
    """

    allow: tuple[str, ...] | None = None
    deny: tuple[str, ...] = ()
    minimum_age_days: float = 0


@dataclass(frozen=True)
class Dlp:
    """What is looked for in outgoing requests. freeze: a hit also freezes the guest."""

    secrets: bool = True
    canaries: bool = True
    freeze: bool = False


@dataclass(frozen=True)
class EgressLimits:
    """Bounds of one session's broker. Rates and sizes in bytes, times in seconds."""

    connections: int = 128
    header_bytes: int = 64 << 10
    request_bytes: int = 256 << 20
    response_bytes: int = 4 << 30
    bytes_per_second: int = 0  # 0: not limited
    connect_seconds: float = 15
    idle_seconds: float = 600


@dataclass(frozen=True)
class EgressPolicy:
    """All that the broker decides by. `EgressPolicy()` denies everything.

    resolver: DNS servers (`address` or `address:port`) asked instead of the host's own.
    learn: what would be refused for its host alone is let through and recorded.
    within: wider policies, each of which has to allow a request too; the nearest first. Of them only `allow` and `deny`
    count.
    """

    allow: tuple[HostRule, ...] = ()
    deny: tuple[HostRule, ...] = ()
    secrets: tuple[SecretUse, ...] = ()
    packages: PackageRules = field(default_factory=PackageRules)
    dlp: Dlp = field(default_factory=Dlp)
    limits: EgressLimits = field(default_factory=EgressLimits)
    resolver: tuple[str, ...] = ()
    learn: bool = False
    within: tuple[EgressPolicy, ...] = ()


@dataclass(frozen=True)
class Decision:
    """Whether something may happen.

    rule: what decided (`HostRule.source`, or a built-in rule's name such as `default-deny`, `private-address`,
    `sni-mismatch`, `secret-outside`, `dlp`). reason: one sentence. remedy: what to add to the policy to allow it; empty
    where nothing does. matched: the rule that allowed it.
    """

    allowed: bool
    rule: str
    reason: str
    remedy: str = ""
    matched: HostRule | None = None


@dataclass(frozen=True)
class BrokerConfig:
    """What one broker is started with, as JSON on its standard input (`vmsandbox.egress.wire`).

    secrets: name → value, which nobody but the broker holds. canaries: tokens planted in the guest's copy.
    ca_certificate, ca_key: PEM of the session's own authority. own_addresses: of the host, never dialled.
    """

    session: str
    policy: EgressPolicy
    secrets: dict[str, str] = field(repr=False)
    canaries: tuple[str, ...]
    ca_certificate: str
    ca_key: str = field(repr=False)
    own_addresses: tuple[str, ...] = ()


class EgressKind(StrEnum):
    """What a line of `egress.jsonl` is about."""

    READY = "ready"  # the broker answers
    ALLOWED = "allowed"  # a request was let through (written when its answer has begun)
    REFUSED = "refused"
    LEARNED = "learned"  # let through by --learn alone
    CLOSED = "closed"  # a request or tunnel ended: bytes each way
    PACKAGE = "package"  # something was fetched from an index
    ALERT = "alert"  # DLP, a canary, a placeholder at the wrong host
    LIMIT = "limit"
    FAILED = "failed"  # the upstream could not be reached, or its certificate is wrong


@dataclass(frozen=True)
class EgressEvent:
    """One thing that the broker did. Everything of it but `rule` may have been chosen by the guest.

    time: seconds since the epoch. via: `proxy`, `transparent`, `dns`. address: what was dialled.
    sent, received: bytes from and to the guest. more: what else there is to say, by kind (PACKAGE: ecosystem, name,
    version, digest, index; ALERT: what, where).
    """

    kind: EgressKind
    time: float
    via: str = ""
    host: str = ""
    port: int = 0
    method: str = ""
    path: str = ""
    status: int = 0
    rule: str = ""
    reason: str = ""
    remedy: str = ""
    address: str = ""
    sent: int = 0
    received: int = 0
    seconds: float = 0
    more: dict[str, str] = field(default_factory=dict)
