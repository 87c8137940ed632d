"""A policy as the text of a policy file: what `load_policy` reads again as the same.

Without it `policy show` and `policy import` would each write the format in their own way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from vmsandbox.policy.values import (
    CommandsPolicy,
    FilesystemPolicy,
    Healthcheck,
    KernelPolicy,
    NetworkPolicy,
    NetworkRule,
    Policy,
    PushPolicy,
    SecretSource,
    SessionPolicy,
)

_SIZES = ("memory", "memory_reserved", "disk", "write_rate", "output")


def render_policy(policy: Policy, folder: Path | None = None) -> str:
    """YAML with what differs from `Policy()`.

    Args:
        policy: of one file; the wider policies that a merged one is `within` are no part of its text.
        folder: where the text will be: seccomp profiles below it are named relative to it. None: where it was read.
    """
    return to_yaml({"sandbox": plain_policy(policy, folder)})


def plain_policy(policy: Policy, folder: Path | None = None, *, complete: bool = False) -> dict[str, Any]:
    """What stands below `sandbox:`, as dicts, lists, texts and numbers.

    Args:
        folder: see `render_policy`.
        complete: with what is the default too; None where there is no value at all.
    """
    if folder is None and policy.source is not None:
        folder = policy.source.parent
    whole = _whole(policy, folder)
    return whole if complete else _differing(whole, _whole(Policy(), None))


def to_yaml(data: Mapping[str, Any]) -> str:
    """As YAML, in the order that it has."""
    import yaml

    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100, default_flow_style=False)


def plain_size(size: int | None) -> int | str | None:
    """Bytes as in a file: with the largest unit that leaves a whole number."""
    for unit, factor in (("T", 1 << 40), ("G", 1 << 30), ("M", 1 << 20), ("k", 1 << 10)):
        if size and size % factor == 0:
            return f"{size // factor}{unit}"
    return size


def plain_duration(seconds: float | None) -> float | int | str | None:
    """Seconds as in a file."""
    if seconds is None or seconds != int(seconds):
        return seconds
    for unit, factor in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds % factor == 0:
            return f"{int(seconds) // factor}{unit}"
    return f"{int(seconds)}s"


def _whole(policy: Policy, folder: Path | None) -> dict[str, Any]:
    resources = {
        one.name: plain_size(getattr(policy.resources, one.name))
        if one.name in _SIZES
        else getattr(policy.resources, one.name)
        for one in fields(policy.resources)
    }
    returns = policy.returns
    return {
        "image": policy.image,
        "isolation": policy.isolation,
        "filesystem": _filesystem(policy.filesystem),
        "network": _network(policy.network),
        "commands": _commands(policy.commands),
        "kernel": _kernel(policy.kernel, folder),
        "resources": resources,
        "session": _session(policy.session),
        "push": {one.name: getattr(policy.push, one.name) for one in fields(PushPolicy)},
        "return": {
            "accept": returns.accept,
            "denied_paths": list(returns.denied_paths),
            "files": returns.files,
            "bytes": plain_size(returns.bytes),
            "deletions": returns.deletions,
        },
    }


def _filesystem(section: FilesystemPolicy) -> dict[str, Any]:
    return {
        "allowed_paths": list(section.allowed_paths),
        "denied_paths": list(section.denied_paths),
        "project": "read-only" if section.read_only else "writable",
        "output": section.output,
        "tmpfs": [{"path": one.path, "size": plain_size(one.size), "exec": one.exec} for one in section.tmpfs],
    }


def _commands(section: CommandsPolicy) -> dict[str, Any]:
    return {
        "allowed": list(section.allowed),
        "denied": list(section.denied),
        "require_confirmation": list(section.require_confirmation),
        "confirm_seconds": plain_duration(section.confirm_seconds),
    }


def _kernel(section: KernelPolicy, folder: Path | None) -> dict[str, Any]:
    return {
        "seccomp": [_file(one.source, folder) for one in section.seccomp],
        "capabilities": list(section.capabilities),
        "new_privileges": section.new_privileges,
        "user_namespaces": section.user_namespaces,
    }


def _file(path: Path, folder: Path | None) -> str:
    if folder is not None and path.is_relative_to(folder):
        return f"./{path.relative_to(folder)}"
    return str(path.absolute())


def _session(section: SessionPolicy) -> dict[str, Any]:
    return {
        "time": plain_duration(section.time),
        "idle": plain_duration(section.idle),
        "environment": list(section.environment),
        "variables": dict(section.variables),
        "post_create": _command(section.post_create) or None,
        "post_create_files": list(section.post_create_files),
        "healthcheck": None if section.healthcheck is None else _healthcheck(section.healthcheck),
        "schedule": section.schedule,
    }


def _healthcheck(check: Healthcheck) -> dict[str, Any]:
    return {
        "test": _command(check.test),
        "interval": plain_duration(check.interval),
        "timeout": plain_duration(check.timeout),
        "retries": check.retries,
    }


def _command(argv: tuple[str, ...]) -> str | list[str]:
    return argv[2] if len(argv) == 3 and argv[:2] == ("sh", "-c") else list(argv)


def _network(section: NetworkPolicy) -> dict[str, Any]:
    return {
        "mode": section.mode,
        "allowed_hosts": list(section.allowed_hosts),
        "denied_hosts": list(section.denied_hosts),
        "rules": [_rule(one) for one in section.rules],
        "secrets": [_secret(one) for one in section.secrets],
        "packages": {
            "allow": None if section.packages_allow is None else list(section.packages_allow),
            "deny": list(section.packages_deny),
            "minimum_age_days": _number(section.packages_minimum_age_days),
        },
        "dlp": {"secrets": section.dlp_secrets, "canaries": section.dlp_canaries, "freeze": section.dlp_freeze},
        "limits": {name: _number(value) for name, value in section.limits},
        "resolver": list(section.resolver),
    }


def _rule(rule: NetworkRule) -> dict[str, Any]:
    found: dict[str, Any] = {"host": rule.host}
    for name in ("ports", "methods", "paths", "addresses"):
        if value := getattr(rule, name):
            found[name] = list(value)
    if rule.tls != "auto":
        found["tls"] = rule.tls
    return found


def _secret(secret: SecretSource) -> dict[str, Any]:
    source = {"env": secret.env, "file": secret.file, "command": list(secret.command) or None}
    found: dict[str, Any] = {
        "name": secret.name,
        "from": {name: value for name, value in source.items() if value is not None},
        "hosts": list(secret.hosts),
        "header": secret.header,
    }
    if secret.prefix:
        found["prefix"] = secret.prefix
    if secret.methods:
        found["methods"] = list(secret.methods)
    return found


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _differing(whole: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for name, value in whole.items():
        usual = default.get(name)
        if isinstance(value, dict) and isinstance(usual, dict):
            value = _differing(value, usual)
            if value:
                found[name] = value
        elif value != usual:
            found[name] = value
    return found
