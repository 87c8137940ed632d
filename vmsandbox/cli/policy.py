"""policy check, show, diff, sign, schema, propose: what a policy says, before a guest is started with it.

`policy import` and `policy timer` are in modules of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vmsandbox.cli.importing import import_files
from vmsandbox.cli.options import JsonOption
from vmsandbox.cli.output import print_json
from vmsandbox.cli.timer import timer
from vmsandbox.errors import UserInputError

if TYPE_CHECKING:
    from vmsandbox.egress.values import EgressEvent
    from vmsandbox.policy.layer import Layer
    from vmsandbox.policy.lint import Finding
    from vmsandbox.policy.merging.effective import Effective

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.command("import")(import_files)
app.command("timer")(timer)
FileArgument = Annotated[
    Path | None,
    typer.Argument(metavar="[FILE]", help="The policy.", show_default=".claude/sandbox.yaml or .vmsandbox.yaml here"),
]


@app.command()
def check(file: FileArgument = None, json: JsonOption = False) -> int:
    """Read a policy strictly, and say what in it has no effect or allows more than it looks like."""
    from vmsandbox.policy.merging.consent import reaches_into_host

    effective = _effective(file)
    if effective.own is None:
        raise _no_policy()
    policy = effective.own.policy
    findings = _findings(effective, effective.own)
    asks = reaches_into_host(policy)
    if json:
        told = [{"where": f"sandbox.{one.where}", "text": one.text, "warning": one.warning} for one in findings]
        found = {"findings": told, "needs_naming": asks}
        print_json({"file": str(policy.source), "valid": True, **found})
        return 0
    for one in findings:
        print(f"{'WARNING' if one.warning else 'note'}: sandbox.{one.where} {one.text}")
    for text in asks:
        print(f"note: granted only to a policy that is named with --policy: sandbox.{text}")
    print(f"{policy.source} is valid")
    return 0


def _findings(effective: Effective, own: Layer) -> list[Finding]:
    from dataclasses import replace

    from vmsandbox.egress.lint import lint
    from vmsandbox.policy.lint import lint_policy, lint_within
    from vmsandbox.policy.merging.merge_network import says_hosts

    wider = [layer for layer in effective.layers if layer is not own]
    network = own.policy.network
    if says_hosts(own):
        network = replace(network, within=effective.policy.network.within)
    found = [*lint_policy(own.policy), *lint(network), *(lint_within(own, effective.policy, wider) if wider else ())]
    if own.policy.kernel.seccomp:
        from vmsandbox.policy.syscalls_needed import kernel_findings

        found += kernel_findings(own.policy.kernel)
    return found


@app.command()
def show(file: FileArgument = None, json: JsonOption = False) -> int:
    """Show the policy that holds here: the organisation's, yours and the project's at once, and what is from where."""
    from vmsandbox.cli.policy_text import policy_lines, print_network, wider_lines
    from vmsandbox.egress.compile import compile_policy
    from vmsandbox.egress.wire import policy_to_json
    from vmsandbox.policy.format.rendering import plain_policy
    from vmsandbox.policy.merging.provenance import dotted, origins

    effective = _effective(file)
    policy = effective.policy
    if not effective.layers:
        raise _no_policy()
    rules = compile_policy(policy.network, placeholders={one.name: "-" for one in policy.network.secrets})
    whole, places = plain_policy(policy, complete=True), origins(policy, effective.layers)
    if json:
        plain = policy_to_json(rules)
        for one in plain["secrets"]:
            del one["placeholder"]
        files = [str(layer.source) for layer in effective.layers]
        told = {"policy": whole, "origins": {dotted(where): list(found) for where, found in places.items()}}
        print_json({"file": str(policy.source), "files": files, "mode": policy.network.mode, **plain, **told})
        return 0
    print("\n".join(policy_lines(whole, places)))
    print()
    for line in wider_lines(effective):
        print(line)
    print(f"network mode: {policy.network.mode or 'none (no file says)'}")
    print_network(rules)
    return 0


@app.command()
def diff(
    before: Annotated[Path, typer.Argument(metavar="A", help="The policy of before.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="The policy that is to be.")],
    json: JsonOption = False,
) -> int:
    """Say what policy B allows that A does not, as sets. Exit status 1 if B allows anything more, else 0.

    Both directions are shown; what A alone allows does not change the status. The files are compared by themselves,
    without those of the organisation.
    """
    from vmsandbox.cli.policy_text import plain_wider, print_differences
    from vmsandbox.egress.diff import diff_networks
    from vmsandbox.policy.load import load_policy
    from vmsandbox.policy.looser import looser_policy

    old, new = load_policy(before), load_policy(after)
    more, less = diff_networks(old.network, new.network), diff_networks(new.network, old.network)
    looser = [*more.looser, *looser_policy(old, new)]
    stricter = [*less.looser, *looser_policy(new, old)]
    widens = bool(more.wider or looser)
    if json:
        print_json(
            {
                "widens": widens,
                "allows": [plain_wider(one) for one in more.wider],
                "looser": looser,
                "no_longer_allows": [plain_wider(one) for one in less.wider],
                "stricter": stricter,
            }
        )
        return int(widens)
    print_differences({"+": more.wider, "-": less.wider}, {"+": looser, "-": stricter})
    return int(widens)


@app.command()
def sign(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The policy.")],
    key: Annotated[Path, typer.Option("--key", metavar="KEY", help="A private SSH key, or the .pub of an agent's.")],
    json: JsonOption = False,
) -> int:
    """Sign a policy and the seccomp profiles that it names (FILE.sig), for hosts that demand it."""
    from vmsandbox.policy.merging.signing import sign as sign_policy
    from vmsandbox.process import Programs

    made = [str(one) for one in sign_policy(file, key, Programs())]
    if json:
        print_json({"signatures": made})
    else:
        print("\n".join(made))
    return 0


@app.command()
def schema() -> int:
    """Print the JSON Schema of policy files, for editors."""
    from vmsandbox.policy.format.model import PolicyFile

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
    from vmsandbox.session.network.egress_log import FILE, events_in

    path = Path(name)
    if not (path.suffix == ".jsonl" and path.is_file()):
        from vmsandbox.paths import Layout
        from vmsandbox.session.records.record import find_record

        path = find_record(Layout.from_environment(), name).folder / FILE
    try:
        yield from events_in(path)
    except OSError as error:
        raise UserInputError(
            f"nothing is recorded of this session's network: {path}",
            details=str(error),
            resolution="`vmsandbox session --net proxy --learn` records what would be refused",
        ) from error


def _effective(file: Path | None) -> Effective:
    from vmsandbox.policy.load import find_policy
    from vmsandbox.policy.merging.effective import effective_policy

    return effective_policy(file or find_policy(Path()))


def _no_policy() -> UserInputError:
    return UserInputError("there is no policy here", resolution="name a file, or make .claude/sandbox.yaml")
