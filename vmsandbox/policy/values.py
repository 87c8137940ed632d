"""The policy as the rest of the program sees it: a frozen value with no validation library behind it.

Without this split every start would pay for importing pydantic, also when there is no policy file. A
user's file is checked in `load.py`, which is imported only when there is one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

NO_NETWORK = "none"


@dataclass(frozen=True)
class NetworkRule:
    """One of `network.rules`, canonical: allows a host, narrowed to what it names.

    host        a pattern (`example.org`, `*.example.org`, `*`, an address) or a bundle (`@pypi`)
    ports, methods, paths   empty: not narrowed (ports: those of the web, or the bundle's)
    addresses   dialled instead of asking DNS
    tls         auto, inspect, passthrough
    """

    host: str
    ports: tuple[int, ...] = ()
    methods: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()
    tls: str = "auto"


@dataclass(frozen=True)
class SecretSource:
    """One of `network.secrets`: where its value comes from on the host, never the value itself.

    name                 of the variable in the guest
    env, file, command   exactly one is given; file as written (`~/…` or relative to the project); command: argv
    hosts                patterns and bundles that it is for
    header, prefix       where it goes: header in lower case, prefix before the value
    methods              empty: any
    """

    name: str
    env: str | None = None
    file: str | None = None
    command: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    header: str = "authorization"
    prefix: str = ""
    methods: tuple[str, ...] = ()


@dataclass(frozen=True)
class NetworkPolicy:
    """`sandbox.network`, checked and canonical; `vmsandbox.egress.compile` makes the rules of it.

    mode                       none, restricted, proxy, filtered; None: the file does not say
    allowed_hosts, denied_hosts   `name`, `*.name`, `*`, each with or without `:port`, an address, `@bundle`
    packages_allow             None: any
    limits                     the limits that are named, by name
    resolver                   DNS servers, `address` or `address:port` (`[address]:port` for IPv6)
    within                     wider policies (an organisation's), each of which has to allow a request too
    """

    mode: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    denied_hosts: tuple[str, ...] = ()
    rules: tuple[NetworkRule, ...] = ()
    secrets: tuple[SecretSource, ...] = ()
    packages_allow: tuple[str, ...] | None = None
    packages_deny: tuple[str, ...] = ()
    packages_minimum_age_days: float = 0
    dlp_secrets: bool = True
    dlp_canaries: bool = True
    dlp_freeze: bool = False
    limits: tuple[tuple[str, float], ...] = ()
    resolver: tuple[str, ...] = ()
    within: tuple[NetworkPolicy, ...] = ()


@dataclass(frozen=True)
class Tmpfs:
    """A folder of the guest that is memory, nosuid and nodev. path: absolute in the guest. size: bytes."""

    path: str
    size: int
    exec: bool = False


@dataclass(frozen=True)
class FilesystemPolicy:
    """`sandbox.filesystem`. Paths: `./…` in the project, `~/…` or absolute; as written.

    allowed_paths   all that the worker may write (no globs); empty: the project, its home, /tmp
    denied_paths    paths and globs: never sent, and not to be entered in the guest
    read_only       the project may not be written at all, but for `output`
    output          a writable folder in a read-only project, relative to it
    """

    allowed_paths: tuple[str, ...] = ()
    denied_paths: tuple[str, ...] = ()
    read_only: bool = False
    output: str | None = None
    tmpfs: tuple[Tmpfs, ...] = ()


@dataclass(frozen=True)
class CommandsPolicy:
    """`sandbox.commands`: patterns of command lines, as written.

    allowed           empty: any
    confirm_seconds   how long a person is waited for
    within            wider policies (an organisation's), each of which has to allow a command too
    """

    allowed: tuple[str, ...] = ()
    denied: tuple[str, ...] = ()
    require_confirmation: tuple[str, ...] = ()
    confirm_seconds: float = 60
    within: tuple[CommandsPolicy, ...] = ()


@dataclass(frozen=True)
class SeccompProfile:
    """An OCI/Docker seccomp profile. source: the file. text: its content, checked, canonical JSON."""

    source: Path
    text: str


@dataclass(frozen=True)
class KernelPolicy:
    """`sandbox.kernel`: what of the guest's kernel the worker's processes reach.

    seccomp           profiles that hold all at once
    capabilities      lower case (`chown`), kept in the bounding set beyond what a login needs
    """

    seccomp: tuple[SeccompProfile, ...] = ()
    capabilities: tuple[str, ...] = ()
    new_privileges: bool = False
    user_namespaces: bool = False


@dataclass(frozen=True)
class ResourcesPolicy:
    """`sandbox.resources`; None: the default, or no limit. Sizes in bytes.

    memory_reserved   what the guest is sure to keep when the host takes memory back (ballooning); None: all
    disk              what the guest may write to its disk beyond its image
    write_rate        bytes a second
    processes         of the worker, threads included
    output            bytes of one command's stdout and stderr
    """

    vcpus: int | None = None
    memory: int | None = None
    memory_reserved: int | None = None
    disk: int | None = None
    write_rate: int | None = None
    processes: int | None = None
    output: int | None = None


@dataclass(frozen=True)
class Healthcheck:
    """A command in the guest, again and again. interval, timeout: seconds. retries: failures before it is unhealthy."""

    test: tuple[str, ...]
    interval: float = 30
    timeout: float = 10
    retries: int = 3


@dataclass(frozen=True)
class SessionPolicy:
    """`sandbox.session`.

    time, idle     seconds until the session ends; idle: without a command, or input or output of one
    environment    names of host variables that pass into the guest
    variables      name and value, set in the guest
    post_create    a command that runs once per template, in the guest
    post_create_files   paths and globs in the project: what it reads of it; empty: what the command names, and lists
                   of packages
    schedule       a systemd calendar expression, for the timer that `policy timer` makes
    """

    time: float | None = None
    idle: float | None = None
    environment: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()
    post_create: tuple[str, ...] = ()
    post_create_files: tuple[str, ...] = ()
    healthcheck: Healthcheck | None = None
    schedule: str | None = None


@dataclass(frozen=True)
class PushPolicy:
    """`sandbox.push`: what is done about a find in what goes in: `warn` or `refuse`.

    secrets               what looks like a key or a password
    instructions          invisible Unicode and terminal escapes in what an agent reads as instructions
    agent_configuration   an agent's own configuration that would run commands
    """

    secrets: str = "warn"
    instructions: str = "warn"
    agent_configuration: str = "warn"


@dataclass(frozen=True)
class ReturnPolicy:
    """`sandbox.return`: what may come back.

    accept         the most that may be taken without a person: none, safe, all; None: as asked for
    denied_paths   paths and globs, relative to the project, that are never taken
    files, bytes, deletions   the most of each in one return; None: no limit beyond the receiver's own
    """

    accept: str | None = None
    denied_paths: tuple[str, ...] = ()
    files: int | None = None
    bytes: int | None = None
    deletions: int | None = None


@dataclass(frozen=True)
class Policy:
    """What a person allows a session, in the words of `.claude/sandbox.yaml`. `Policy()` is the default.

    image       None: as asked for, else `base`
    isolation   the least isolation grade: emulated, separated, isolated; None: any
    source      the file that it was read from; None: the default
    outer       the organisation's and the user's files that narrow it, if there are any
    """

    image: str | None = None
    isolation: str | None = None
    filesystem: FilesystemPolicy = field(default_factory=FilesystemPolicy)
    network: NetworkPolicy = field(default_factory=NetworkPolicy)
    commands: CommandsPolicy = field(default_factory=CommandsPolicy)
    kernel: KernelPolicy = field(default_factory=KernelPolicy)
    resources: ResourcesPolicy = field(default_factory=ResourcesPolicy)
    session: SessionPolicy = field(default_factory=SessionPolicy)
    push: PushPolicy = field(default_factory=PushPolicy)
    returns: ReturnPolicy = field(default_factory=ReturnPolicy)
    source: Path | None = None
    outer: tuple[Path, ...] = ()
