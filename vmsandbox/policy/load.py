"""Finds and reads a policy file, and says exactly where it is wrong.

Without the line, the key and a suggestion, a person whose policy is refused would delete the policy.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from vmsandbox.errors import UserInputError
from vmsandbox.policy.strictyaml import MAX_BYTES, StrictYaml
from vmsandbox.policy.values import CommandsPolicy, FilesystemPolicy, NetworkPolicy, NetworkRule, Policy, SecretSource

if TYPE_CHECKING:
    from vmsandbox.policy.model_network import Network, Rule, Secret

NAMES = (".claude/sandbox.yaml", ".vmsandbox.yaml")
_KEYS: dict[tuple[str, ...], tuple[str, ...]] = {
    (): ("sandbox",),
    ("sandbox",): ("filesystem", "network", "commands"),
    ("sandbox", "filesystem"): ("allowed_paths", "denied_paths"),
    ("sandbox", "network"): (
        "mode", "allowed_hosts", "denied_hosts", "rules", "secrets", "packages", "dlp", "limits", "resolver",
    ),
    ("sandbox", "network", "rules"): ("host", "ports", "methods", "paths", "addresses", "tls"),
    ("sandbox", "network", "secrets"): ("name", "from", "hosts", "header", "prefix", "methods"),
    ("sandbox", "network", "secrets", "from"): ("env", "file", "command"),
    ("sandbox", "network", "packages"): ("allow", "deny", "minimum_age_days"),
    ("sandbox", "network", "dlp"): ("secrets", "canaries", "freeze"),
    ("sandbox", "network", "limits"): (
        "connections", "header_bytes", "request_bytes", "response_bytes", "bytes_per_second", "connect_seconds",
        "idle_seconds",
    ),
    ("sandbox", "commands"): ("allowed", "denied", "require_confirmation"),
}  # fmt: skip
_EXAMPLE = "sandbox: {filesystem: {denied_paths: [./secrets/]}}"
_MODES = ("none", "restricted", "proxy", "filtered")


def find_policy(project: Path) -> Path | None:
    """The project's policy file: `.claude/sandbox.yaml`, else `.vmsandbox.yaml`, else None.

    Raises:
        UserInputError: whether there is one cannot be told (no permission). A policy is never skipped
            silently.
    """
    for name in NAMES:
        path = project / name
        try:
            path.lstat()  # a dangling link counts: reading it then says what is wrong
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise UserInputError(
                f"the policy cannot be looked for: {path}",
                details=str(error),
                resolution="make its folder readable, or name a policy with --policy",
            ) from error
        return path
    return None


def load_policy(path: Path) -> Policy:
    """Read and check one policy file (the format of `.claude/sandbox.yaml`, at most 256 KiB).

    Raises:
        UserInputError: it cannot be read, or is not a policy; names the file, the line and the key.
    """
    content = _read(path)
    from vmsandbox.policy.model import PolicyFile

    reader = StrictYaml(f"the policy {path}", _EXAMPLE, _KEYS, ("mode", _MODES))
    sandbox = reader.read(content, PolicyFile).sandbox
    return Policy(
        filesystem=FilesystemPolicy(
            allowed_paths=tuple(sandbox.filesystem.allowed_paths),
            denied_paths=tuple(sandbox.filesystem.denied_paths),
        ),
        network=_network(sandbox.network),
        commands=CommandsPolicy(
            allowed=tuple(sandbox.commands.allowed),
            denied=tuple(sandbox.commands.denied),
            require_confirmation=tuple(sandbox.commands.require_confirmation),
        ),
        source=path,
    )


def _network(section: Network) -> NetworkPolicy:
    packages = section.packages
    return NetworkPolicy(
        mode=section.mode,
        allowed_hosts=tuple(section.allowed_hosts),
        denied_hosts=tuple(section.denied_hosts),
        rules=tuple(_rule(one) for one in section.rules),
        secrets=tuple(_secret(one) for one in section.secrets),
        packages_allow=None if packages.allow is None else tuple(packages.allow),
        packages_deny=tuple(packages.deny),
        packages_minimum_age_days=packages.minimum_age_days,
        dlp_secrets=section.dlp.secrets,
        dlp_canaries=section.dlp.canaries,
        dlp_freeze=section.dlp.freeze,
        limits=tuple((name, value) for name, value in section.limits.model_dump().items() if value is not None),
        resolver=tuple(section.resolver),
    )


def _rule(rule: Rule) -> NetworkRule:
    return NetworkRule(
        rule.host,
        ports=tuple(dict.fromkeys(rule.ports)),
        methods=tuple(dict.fromkeys(rule.methods)),
        paths=tuple(dict.fromkeys(rule.paths)),
        addresses=tuple(dict.fromkeys(rule.addresses)),
        tls=rule.tls,
    )


def _secret(secret: Secret) -> SecretSource:
    return SecretSource(
        secret.name,
        env=secret.from_.env,
        file=secret.from_.file,
        command=tuple(secret.from_.command or ()),
        hosts=tuple(secret.hosts),
        header=secret.header,
        prefix=secret.prefix,
        methods=tuple(dict.fromkeys(secret.methods)),
    )


def _read(path: Path) -> bytes:
    # O_NONBLOCK: a FIFO in the file's place must not block.
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise UserInputError(f"the policy cannot be read: {path}", details=str(error)) from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise UserInputError(
                f"the policy is not a regular file: {path}", resolution="name a YAML file with --policy"
            )
        with os.fdopen(fd, "rb", closefd=False) as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserInputError(f"the policy cannot be read: {path}", details=str(error)) from error
    finally:
        os.close(fd)
    if len(content) > MAX_BYTES:
        raise UserInputError(
            f"the policy is too large: {path}",
            details=f"a policy may have {MAX_BYTES // 1024} KiB",
            resolution="is it the right file?",
        )
    return content
