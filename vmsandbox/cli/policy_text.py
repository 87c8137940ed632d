"""What `vmsandbox policy` prints: a policy with where each value comes from, and what one allows more than another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vmsandbox.cli.output import print_table

if TYPE_CHECKING:
    from vmsandbox.egress.diff import Wider
    from vmsandbox.egress.values import EgressPolicy, HostRule
    from vmsandbox.policy.format.strictyaml import KeyPath
    from vmsandbox.policy.merging.effective import Effective

_WIDEST = 60  # where the comments begin at the latest


def policy_lines(plain: Mapping[str, Any], origins: Mapping[KeyPath, tuple[str, ...]]) -> list[str]:
    """A policy as YAML, each line with where it comes from; what has no value is a comment."""
    rows = [("sandbox:", ""), *_section(plain, (), origins, "  ")]
    width = min(max(len(text) for text, _ in rows), _WIDEST)
    return [f"{text.ljust(width)}  # {origin}" if origin else text for text, origin in rows]


def _section(
    plain: Mapping[str, Any], where: KeyPath, origins: Mapping[KeyPath, tuple[str, ...]], indent: str
) -> Iterator[tuple[str, str]]:
    for name, value in plain.items():
        here = (*where, name)
        origin = "; ".join(origins.get(here, ()))
        if isinstance(value, dict) and value:
            yield f"{indent}{name}:", ""
            yield from _section(value, here, origins, indent + "  ")
        elif value is None or value in ([], {}):
            # On purpose not `name: []`: in some keys that is something else than no key at all.
            stated = value == [] and origin != "default"
            yield (f"{indent}{name}: []", origin) if stated else (f"{indent}# {name}: not set", origin)
        elif isinstance(value, list) and (*here, 0) in origins:
            yield f"{indent}{name}:", ""
            for number, item in enumerate(value):
                yield f"{indent}- {_inline(item)}", "; ".join(origins[*here, number])
        else:
            yield f"{indent}{name}: {_inline(value)}", origin


def _inline(value: object) -> str:
    import yaml

    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, sort_keys=False, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def wider_lines(effective: Effective) -> Iterator[str]:
    """The files whose own rules about requests and commands have to allow, too."""
    from vmsandbox.policy.merging.merge import says_commands
    from vmsandbox.policy.merging.merge_network import says_hosts

    for what, says, inner in (
        ("request", says_hosts, effective.policy.network.within),
        ("command", says_commands, effective.policy.commands.within),
    ):
        files = [str(layer.source) for layer in effective.layers if says(layer)][:-1]
        if inner:
            yield f"each {what} has to be allowed by {', '.join(files)} too"


def print_network(rules: EgressPolicy) -> None:
    """Hosts, with bundles and defaults written out."""
    for policy, title in ((rules, ""), *((one, "within:") for one in rules.within)):
        if title:
            print(title)
        rows = [_row("allow", one) for one in policy.allow] + [_row("deny", one) for one in policy.deny]
        rows.append(["deny", "everything else", "", "", "", ""])
        print_table(["", "HOST", "PORTS", "METHODS", "PATHS", "BY"], rows)
        for rule in policy.allow:
            for address in rule.addresses:
                print(f"{rule.pattern} is dialled at {address} ({rule.source})")
            if rule.tls != "auto":
                print(f"TLS to {rule.pattern}: {rule.tls} ({rule.source})")
    for secret in rules.secrets:
        print(f"secret {secret.name}: header {secret.header} to {', '.join(secret.hosts)}")


def _row(what: str, rule: HostRule) -> list[str]:
    ports = ", ".join(map(str, rule.ports)) or "any"
    if what == "deny":
        return [what, rule.pattern, ports, "", "", rule.source]
    return [what, rule.pattern, ports, ", ".join(rule.methods) or "any", " ".join(rule.paths) or "any", rule.source]


def plain_wider(one: Wider) -> dict[str, object]:
    """One newly allowed set of requests, for `--json`."""
    to, method, path = one.example
    return {
        "host": one.host,
        "ports": list(one.ports),
        "methods": list(one.methods),
        "paths": list(one.paths),
        "example": {"host": to.host, "port": to.port, "method": method, "path": path},
        "exact": one.exact,
    }


def wider_line(one: Wider) -> str:
    """The same for people."""
    methods = "any method" if one.methods == ("*",) else ", ".join("others" if m == "*" else m for m in one.methods)
    paths = " ".join(one.paths) if one.paths else "any path"
    doubt = "" if one.exact else "  (perhaps: this could not be compared exactly)"
    return f"{one.host}  port {', '.join(map(str, one.ports))}  {methods}  {paths}{doubt}"


def print_differences(wider: Mapping[str, Sequence[Wider]], looser: Mapping[str, Sequence[str]]) -> None:
    """What B allows more ("+") and what it no longer does ("-")."""
    for sign in ("+", "-"):
        for one in wider[sign]:
            print(f"{sign} {wider_line(one)}")
    for text in looser["+"]:
        print(f"+ {text}")
    for text in looser["-"]:
        print(f"- without it: {text}")
    if not wider["+"] and not looser["+"]:
        print("B allows nothing that A does not")
