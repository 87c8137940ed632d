"""Reads back from the kernel what guards a card, and compares it with what was asked for.

Without it a filtered session would rest on the word of two programs that said they had loaded some rules. A firewall
that is reloaded (`nft flush ruleset`), another tool, or an `ebtables` that writes where nobody looks would leave a
guest with an open card, and the report would still say `filtered`.

Ours are compared rule by rule. Of libvirt's, whose exact rules are its own affair, the shape is checked: everything
that comes from and goes to the tap is sent to a chain that lets nothing through but by a match, and drops the rest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmsandbox.process import Programs
from vmsandbox.render.card_rules import rule_tables
from vmsandbox.render.network import CardPlan

# chain of the ebtables table "nat" → the side of a frame that names the tap there
_LIBVIRTS_HOOKS = {"PREROUTING": "iifname", "POSTROUTING": "oifname"}


@dataclass(frozen=True)
class InForce:
    """What the kernel says of one card.

    tables  "family name" → chain → [its base, rule, rule, …], without counters and handles; ours and libvirt's
    links   facts of the bridge and the tap, by name
    """

    tables: Mapping[str, Mapping[str, list[Any]]]
    links: Mapping[str, str]


def read_in_force(plan: CardPlan, programs: Programs, root: Path = Path("/")) -> InForce:
    """Ask the kernel. Raises HostError if nft does not answer."""
    listed = programs.run(["nft", "-j", "list", "ruleset"], timeout=5).text
    return InForce(ruleset_of(plan, json.loads(listed)["nftables"]), read_links(plan, root))


def ruleset_of(plan: CardPlan, listed: list[dict[str, Any]]) -> dict[str, dict[str, list[Any]]]:
    """What concerns one card of a whole ruleset, as `nft -j list ruleset` prints it."""
    wanted = {f"{family} {plan.table}" for family in ("bridge", "inet")}
    tables: dict[str, dict[str, list[Any]]] = {}
    for entry in listed:
        for kind, value in entry.items():
            place = f"{value.get('family')} {value.get('table', value.get('name'))}"
            if place in wanted:
                _add(tables.setdefault(place, {}), kind, value)
            elif place == "bridge nat" and kind in ("chain", "rule"):
                chain = str(value.get("name" if kind == "chain" else "chain"))
                if chain in _LIBVIRTS_HOOKS or chain.endswith(f"-{plan.tap}"):
                    _add(tables.setdefault(place, {}), kind, value)
    for chain in _LIBVIRTS_HOOKS:  # other guests' rules come and go there
        rules = tables.get("bridge nat", {}).get(chain, [])
        rules[:] = [rule for rule in rules if isinstance(rule, dict) or plan.tap in json.dumps(rule)]
    return tables


def problems(seen: InForce, plan: CardPlan) -> list[str]:
    """Everything in which the card is not guarded as it was asked for; empty: it is."""
    return [*own_problems(seen, plan), *_libvirts_rules(seen, plan)]


def own_problems(seen: InForce, plan: CardPlan) -> list[str]:
    """The same without libvirt's filter: our rules, the bridge and the tap, which guard the card by themselves."""
    return [*_our_rules(seen, plan), *_wrong_links(seen, plan)]


def problems_before_tap(seen: InForce, plan: CardPlan) -> list[str]:
    """Our rules and the bridge alone, before the guest has a tap: what has to be there by then."""
    of_tap = ("ports of the bridge", "bridge of the tap", "isolated")
    return [*_our_rules(seen, plan), *(one for one in _wrong_links(seen, plan) if not one.startswith(of_tap))]


def _our_rules(seen: InForce, plan: CardPlan) -> Iterator[str]:
    for family, chains in rule_tables(plan).items():
        place = f"{family} {plan.table}"
        found = seen.tables.get(place)
        if found is None:
            yield f"our table {place} is not there"
            continue
        wanted = {name: [_plain(base), *(_plain(rule) for rule in rules)] for name, (base, rules) in chains.items()}
        for name in sorted(wanted.keys() | found.keys()):
            if found.get(name) != wanted.get(name):
                yield f"chain {name} of our table {place} is not what was loaded"


def _libvirts_rules(seen: InForce, plan: CardPlan) -> Iterator[str]:
    table = seen.tables.get("bridge nat", {})
    for hook, side in _LIBVIRTS_HOOKS.items():
        tap = {"match": {"op": "==", "left": {"meta": {"key": side}}, "right": plan.tap}}
        base, *rules = table.get(hook) or [None]
        jumps = [rule for rule in rules if tap in rule]
        target = str(jumps[0][-1].get("jump", {}).get("target")) if len(jumps) == 1 and len(jumps[0]) == 3 else ""
        if base is None or base.get("hook") != hook.lower() or not target:
            yield f"libvirt's filter is not in force: no jump for {plan.tap} in {hook} of the kernel's bridge table nat"
            continue
        yield from _libvirts_chain(target, table.get(target, []), plan, spoof=hook == "PREROUTING")


def _libvirts_chain(name: str, entries: list[Any], plan: CardPlan, *, spoof: bool) -> Iterator[str]:
    """Up to its last drop every rule matches something; the first from the guest is the one on its address."""
    address = {"op": "!=", "left": {"payload": {"protocol": "ether", "field": "saddr"}}, "right": plan.mac}
    rules = [[part for part in rule if "counter" not in part] for rule in entries[1:]]
    if [{"drop": None}] not in rules:
        yield f"libvirt's chain {name} does not drop the rest"
        return
    before = rules[: rules.index([{"drop": None}])]
    if spoof and before[:1] != [[{"match": address}, {"drop": None}]]:
        yield f"libvirt's chain {name} does not begin with the guest's own address"
    accepts = [rule for rule in before if rule[-1] != {"drop": None}]
    # a match of ebtables' own on addresses and ports, which nft shows by its name alone
    if any(not any("xt" in part for part in rule) or rule[-1] != {"accept": None} for rule in accepts):
        yield f"libvirt's chain {name} lets through what nobody asked for"
    # TCP's ports and UDP's one, ARP's request and reply
    if len(accepts) != len(plan.tcp_ports) + 1 + 2:
        yield f"libvirt's chain {name} has {len(accepts)} rules that let something through"


def _wrong_links(seen: InForce, plan: CardPlan) -> Iterator[str]:
    wanted = {
        "ports of the bridge": plan.tap,
        "bridge of the tap": plan.bridge,
        "isolated": "1",
        "spanning tree": "0",
        "address of the bridge": plan.bridge_mac,
    }
    for name, value in wanted.items():
        if seen.links.get(name) != value:
            yield f"{name}: {seen.links.get(name)!r} instead of {value!r}"
    if seen.links.get("IPv6 off") == "0":
        yield f"IPv6 is on for {plan.bridge}"


def read_links(plan: CardPlan, root: Path = Path("/")) -> dict[str, str]:
    """The facts of bridge and tap, from /sys and /proc; "unknown" where there is none."""
    net = root / "sys/class/net"
    facts = {
        "isolated": net / plan.tap / "brport/isolated",
        "spanning tree": net / plan.bridge / "bridge/stp_state",
        "address of the bridge": net / plan.bridge / "address",
        "IPv6 off": root / "proc/sys/net/ipv6/conf" / plan.bridge / "disable_ipv6",
    }
    links = {}
    for name, path in facts.items():
        try:
            links[name] = path.read_text().strip()
        except OSError:
            links[name] = "unknown"
    try:
        links["ports of the bridge"] = " ".join(sorted(path.name for path in (net / plan.bridge / "brif").iterdir()))
        links["bridge of the tap"] = (net / plan.tap / "master").readlink().name
    except OSError:
        links.setdefault("ports of the bridge", "unknown")
        links["bridge of the tap"] = "unknown"
    return links


def _add(chains: dict[str, list[Any]], kind: str, value: dict[str, Any]) -> None:
    """A chain's first entry is what it hangs on, then come its rules, in order."""
    if kind == "chain":
        base = {key: value[key] for key in ("type", "hook", "prio", "policy") if key in value}
        chains.setdefault(str(value["name"]), [None])[0] = _plain(base)
    elif kind == "rule":
        chains.setdefault(str(value["chain"]), [None]).append(_plain(value["expr"]))
    elif kind != "table":
        chains[f"{kind} {value.get('name')}"] = [_plain(value)]  # a set, a map …: nothing of ours


def _plain(value: Any) -> Any:
    """One form of what different versions of nft print: no numbers in counters, sets in order."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if not isinstance(value, dict):
        return value
    if "counter" in value:
        return {"counter": None}
    if value.keys() == {"|"}:  # flags: 1.0 lists them, 1.1 says that they are joined
        return _plain(value["|"])
    plain = {key: _plain(each) for key, each in value.items()}
    if isinstance(plain.get("set"), list):
        plain["set"] = sorted(plain["set"], key=str)
    return plain
