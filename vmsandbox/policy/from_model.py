"""From the checked model of a policy file to the values that the rest of the program sees.

Without the copy, everything that asks a policy something would import pydantic.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vmsandbox.policy.values import (
    CommandsPolicy,
    FilesystemPolicy,
    Healthcheck,
    KernelPolicy,
    NetworkPolicy,
    NetworkRule,
    Policy,
    PushPolicy,
    ResourcesPolicy,
    ReturnPolicy,
    SeccompProfile,
    SecretSource,
    SessionPolicy,
    Tmpfs,
)

if TYPE_CHECKING:
    from vmsandbox.policy.format.model import Sandbox
    from vmsandbox.policy.format.model_guest import Commands, Filesystem
    from vmsandbox.policy.format.model_network import Network, Rule, Secret
    from vmsandbox.policy.format.model_session import Return, Session


def policy_of(sandbox: Sandbox, source: Path, profiles: tuple[SeccompProfile, ...]) -> Policy:
    """The policy that a checked file says.

    Args:
        source: the file.
        profiles: what `kernel.seccomp` names, read.
    """
    kernel, push = sandbox.kernel, sandbox.push
    return Policy(
        image=sandbox.image,
        isolation=sandbox.isolation,
        filesystem=_filesystem(sandbox.filesystem),
        network=_network(sandbox.network),
        commands=_commands(sandbox.commands),
        kernel=KernelPolicy(profiles, _once(kernel.capabilities), kernel.new_privileges, kernel.user_namespaces),
        resources=ResourcesPolicy(**sandbox.resources.model_dump()),
        session=_session(sandbox.session),
        push=PushPolicy(push.secrets, push.instructions, push.agent_configuration),
        returns=_returns(sandbox.return_),
        source=source,
    )


def _filesystem(section: Filesystem) -> FilesystemPolicy:
    return FilesystemPolicy(
        allowed_paths=_once(section.allowed_paths),
        denied_paths=_once(section.denied_paths),
        read_only=section.project == "read-only",
        output=section.output,
        tmpfs=tuple(Tmpfs(one.path, one.size, one.exec) for one in section.tmpfs),
    )


def _commands(section: Commands) -> CommandsPolicy:
    return CommandsPolicy(
        allowed=_once(section.allowed),
        denied=_once(section.denied),
        require_confirmation=_once(section.require_confirmation),
        confirm_seconds=section.confirm_seconds,
    )


def _session(section: Session) -> SessionPolicy:
    health = section.healthcheck
    return SessionPolicy(
        time=section.time,
        idle=section.idle,
        environment=_once(section.environment),
        variables=tuple(section.variables.items()),
        post_create=tuple(section.post_create or ()),
        post_create_files=_once(section.post_create_files),
        healthcheck=None
        if health is None
        else Healthcheck(tuple(health.test), health.interval, health.timeout, health.retries),
        schedule=section.schedule,
    )


def _returns(section: Return) -> ReturnPolicy:
    return ReturnPolicy(
        accept=section.accept,
        denied_paths=_once(section.denied_paths),
        files=section.files,
        bytes=section.bytes,
        deletions=section.deletions,
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
        methods=_once(rule.methods),
        paths=_once(rule.paths),
        addresses=_once(rule.addresses),
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
        methods=_once(secret.methods),
    )


def _once(words: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(words))
