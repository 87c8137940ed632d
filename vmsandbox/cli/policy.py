"""policy check, show, diff, schema, propose: what a policy says, before a guest is started with it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vmsandbox.cli.importing import import_files
from vmsandbox.cli.options import JsonOption
from vmsandbox.cli.output import print_json, print_table
from vmsandbox.errors import UserInputError

if TYPE_CHECKING:
    from vmsandbox.egress.diff import Wider
    from vmsandbox.egress.values import EgressEvent, HostRule
    from vmsandbox.policy.values import Policy

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.command("import")(import_files)
FileArgument = Annotated[
    Path | None,
    typer.Argument(metavar="[FILE]", help="The policy.", show_default=".claude/sandbox.yaml or .vmsandbox.yaml here"),
]


@app.command()
def check(file: FileArgument = None, json: JsonOption = False) -> int:
    """Read a policy strictly, and say what in it has no effect or allows more than it looks like."""
    from vmsandbox.egress.lint import lint
    from vmsandbox.policy.values import unenforced

    policy = _load(file)
    findings = lint(policy.network)
    notes = unenforced(policy)
    if json:
        told = [{"where": f"sandbox.{one.where}", "text": one.text, "warning": one.warning} for one in findings]
        print_json({"file": str(policy.source), "valid": True, "findings": told, "unenforced": notes})
        return 0
    for one in findings:
        print(f"{'WARNING' if one.warning else 'note'}: sandbox.{one.where} {one.text}")
    for note in notes:
        print(f"note: {note}")
    print(f"{policy.source} is valid")
    return 0


@app.command()
def show(file: FileArgument = None, json: JsonOption = False) -> int:
    """Show what a policy allows the guest's network, with bundles and defaults written out."""
    from vmsandbox.egress.compile import compile_policy
    from vmsandbox.egress.wire import policy_to_json

    policy = _load(file)
    network = policy.network
    rules = compile_policy(network, placeholders={one.name: "-" for one in network.secrets})
    if json:
        plain = policy_to_json(rules)
        for one in plain["secrets"]:
            del one["placeholder"]
        print_json({"file": str(policy.source), "mode": network.mode, **plain})
        return 0
    print(f"mode: {network.mode or 'none (the file does not say)'}")
    rows = [_row("allow", one) for one in rules.allow] + [_row("deny", one) for one in rules.deny]
    print_table(["", "HOST", "PORTS", "METHODS", "PATHS", "BY"], [*rows, ["deny", "everything else", "", "", "", ""]])
    for rule in rules.allow:
        for address in rule.addresses:
            print(f"{rule.pattern} is dialled at {address} ({rule.source})")
        if rule.tls != "auto":
            print(f"TLS to {rule.pattern}: {rule.tls} ({rule.source})")
    for secret in rules.secrets:
        print(f"secret {secret.name}: header {secret.header} to {', '.join(secret.hosts)}")
    return 0


@app.command()
def diff(
    before: Annotated[Path, typer.Argument(metavar="A", help="The policy of before.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="The policy that is to be.")],
    json: JsonOption = False,
) -> int:
    """Say what policy B allows that A does not, as sets of requests. Exit status 1 if B allows anything more, else 0.

    Both directions are shown; what A alone allows does not change the status.
    """
    from vmsandbox.egress.diff import diff_networks

    old, new = _load(before).network, _load(after).network
    more, less = diff_networks(old, new), diff_networks(new, old)
    if json:
        print_json(
            {
                "widens": bool(more),
                "allows": [_plain(one) for one in more.wider],
                "looser": list(more.looser),
                "no_longer_allows": [_plain(one) for one in less.wider],
                "stricter": list(less.looser),
            }
        )
        return int(bool(more))
    for sign, found in (("+", more), ("-", less)):
        for one in found.wider:
            print(f"{sign} {_line(one)}")
    for text in more.looser:
        print(f"+ {text}")
    for text in less.looser:
        print(f"- without it: {text}")
    if not more:
        print("B allows nothing that A does not")
    return int(bool(more))


@app.command()
def schema() -> int:
    """Print the JSON Schema of policy files, for editors."""
    from vmsandbox.policy.model import PolicyFile

    print_json(PolicyFile.model_json_schema(by_alias=True))
    return 0


@app.command()
def propose(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A session, its id, or an egress.jsonl file.")],
    json: JsonOption = False,
) -> int:
    """Print the smallest policy for what a session asked for and no rule allowed (see --learn)."""
    from vmsandbox.egress.learn import propose as propose_policy

    found = propose_policy(_events(name))
    if json:
        print_json({"policy": found.text, "hosts": found.hosts, "skipped": found.skipped, "truncated": found.truncated})
        return 0
    print(found.text, end="")
    if not found.text:
        print("nothing was refused for want of a rule", file=sys.stderr)
    if found.skipped:
        print(f"{found.skipped} events name no host that a policy could allow", file=sys.stderr)
    if found.truncated:
        print(f"there were more than {found.hosts} hosts; the rest is left out", file=sys.stderr)
    return 0


def _events(name: str) -> Iterator[EgressEvent]:
    from vmsandbox.session.egress_log import FILE, events_in

    path = Path(name)
    if not (path.suffix == ".jsonl" and path.is_file()):
        from vmsandbox.paths import Layout
        from vmsandbox.session.record import find_record

        path = find_record(Layout.from_environment(), name).folder / FILE
    try:
        yield from events_in(path)
    except OSError as error:
        raise UserInputError(
            f"nothing is recorded of this session's network: {path}",
            details=str(error),
            resolution="`vmsandbox session --net proxy --learn` records what would be refused",
        ) from error


def _load(file: Path | None) -> Policy:
    from vmsandbox.policy.load import find_policy, load_policy

    path = file or find_policy(Path())
    if path is None:
        raise UserInputError("there is no policy here", resolution="name a file, or make .claude/sandbox.yaml")
    return load_policy(path)


def _row(what: str, rule: HostRule) -> list[str]:
    ports = ", ".join(map(str, rule.ports)) or "any"
    if what == "deny":
        return [what, rule.pattern, ports, "", "", rule.source]
    return [what, rule.pattern, ports, ", ".join(rule.methods) or "any", " ".join(rule.paths) or "any", rule.source]


def _plain(one: Wider) -> dict[str, object]:
    to, method, path = one.example
    return {
        "host": one.host,
        "ports": list(one.ports),
        "methods": list(one.methods),
        "paths": list(one.paths),
        "example": {"host": to.host, "port": to.port, "method": method, "path": path},
        "exact": one.exact,
    }


def _line(one: Wider) -> str:
    methods = "any method" if one.methods == ("*",) else ", ".join("others" if m == "*" else m for m in one.methods)
    paths = " ".join(one.paths) if one.paths else "any path"
    doubt = "" if one.exact else "  (perhaps: this could not be compared exactly)"
    return f"{one.host}  port {', '.join(map(str, one.ports))}  {methods}  {paths}{doubt}"
