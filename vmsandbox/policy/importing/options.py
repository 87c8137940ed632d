"""docker run's options (`runArgs` of a devcontainer) as the keys of a compose service that mean the same.

Without the translation each option would need a rule of its own beside the key's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Option:
    """key: of a service. form: text, list, flag; health: a part of healthcheck; mount; limit: a ulimit; rate; words."""

    key: str
    form: str = "text"


OPTIONS: dict[str, Option] = {
    "--security-opt": Option("security_opt", "list"),
    "--cap-drop": Option("cap_drop", "list"),
    "--cap-add": Option("cap_add", "list"),
    "--privileged": Option("privileged", "flag"),
    "--read-only": Option("read_only", "flag"),
    "--tmpfs": Option("tmpfs", "list"),
    "--shm-size": Option("shm_size"),
    "--volume": Option("volumes", "list"),
    "--mount": Option("volumes", "mount"),
    "--network": Option("network_mode"),
    "--dns": Option("dns", "list"),
    "--cpus": Option("cpus"),
    "--memory": Option("mem_limit"),
    "--memory-reservation": Option("mem_reservation"),
    "--pids-limit": Option("pids_limit"),
    "--ulimit": Option("ulimits", "limit"),
    "--storage-opt": Option("storage_opt", "words"),
    "--device-write-bps": Option("blkio_config.device_write_bps", "rate"),
    "--env": Option("environment", "list"),
    "--health-cmd": Option("healthcheck", "health test"),
    "--health-interval": Option("healthcheck", "health interval"),
    "--health-timeout": Option("healthcheck", "health timeout"),
    "--health-retries": Option("healthcheck", "health retries"),
    "--health-start-period": Option("healthcheck", "health start_period"),
    "--no-healthcheck": Option("healthcheck", "health disable"),
    "--workdir": Option("working_dir"),
    "--user": Option("user"),
    "--group-add": Option("group_add"),
    "--name": Option("container_name"),
    "--hostname": Option("hostname"),
    "--entrypoint": Option("entrypoint"),
    "--init": Option("init", "flag"),
    "--interactive": Option("stdin_open", "flag"),
    "--tty": Option("tty", "flag"),
    "--detach": Option("attach", "flag"),
    "--rm": Option("restart", "flag"),
    "--restart": Option("restart"),
    "--label": Option("labels"),
    "--log-driver": Option("logging"),
    "--log-opt": Option("logging"),
    "--publish": Option("ports"),
    "--publish-all": Option("ports", "flag"),
    "--expose": Option("expose"),
    "--env-file": Option("env_file"),
    "--volumes-from": Option("volumes_from"),
    "--add-host": Option("extra_hosts"),
    "--dns-search": Option("dns_search"),
    "--mac-address": Option("mac_address"),
    "--device": Option("devices"),
    "--gpus": Option("gpus"),
    "--runtime": Option("runtime"),
    "--ipc": Option("ipc"),
    "--pid": Option("pid"),
    "--uts": Option("uts"),
    "--userns": Option("userns_mode"),
    "--cgroupns": Option("cgroup"),
    "--cgroup-parent": Option("cgroup_parent"),
    "--sysctl": Option("sysctls"),
    "--cpu-shares": Option("cpu_shares"),
    "--cpu-period": Option("cpu_period"),
    "--cpu-quota": Option("cpu_quota"),
    "--cpuset-cpus": Option("cpuset"),
    "--memory-swap": Option("memswap_limit"),
    "--memory-swappiness": Option("mem_swappiness"),
    "--oom-kill-disable": Option("oom_kill_disable", "flag"),
    "--oom-score-adj": Option("oom_score_adj"),
    "--blkio-weight": Option("blkio_config.weight"),
    "--device-read-bps": Option("blkio_config.device_read_bps"),
    "--platform": Option("platform"),
    "--pull": Option("pull_policy"),
}
SHORT = {
    "-v": "--volume", "-m": "--memory", "-e": "--env", "-u": "--user", "-h": "--hostname", "-w": "--workdir",
    "-p": "--publish", "-P": "--publish-all", "-l": "--label", "-i": "--interactive", "-t": "--tty", "-d": "--detach",
    "-c": "--cpu-shares", "--net": "--network", "-it": "--interactive",
}  # fmt: skip


@dataclass(frozen=True)
class Given:
    """One option as it was given: its place, what it was, the service's key and value; key None: unknown."""

    at: str
    text: str
    key: str | None
    value: Any = None


def read_options(words: list[str], at: str) -> list[Given]:
    """Each option of a list of arguments."""
    found: list[Given] = []
    health: dict[str, Any] = {}
    health_at = ""
    position = 0
    while position < len(words):
        word, place = words[position], f"{at}[{position}]"
        position += 1
        name, sep, value = word.partition("=") if word.startswith("--") else (word[:2], word[2:], word[2:])
        name = SHORT.get(word, SHORT.get(name, name))
        option = OPTIONS.get(name)
        if option is None:
            found.append(Given(place, word, None))
            continue
        if not sep and option.form not in ("flag", "health disable"):
            if position == len(words):
                found.append(Given(place, word, None))
                break
            value, position = words[position], position + 1
        if option.form.startswith("health "):
            part = option.form.removeprefix("health ")
            health[part] = True if part == "disable" else value
            health_at = health_at or place
        else:
            found.append(Given(f"{place} {name}", word, option.key, _as_value(option.form, value)))
    if health:
        found.append(Given(f"{health_at} --health", "", "healthcheck", health))
    return found


def _as_value(form: str, text: str) -> Any:
    if form == "flag":
        return text or "true"
    if form == "list":
        return [text]
    if form == "mount":
        parts = dict((one.partition("=") if "=" in one else (one, "", "true"))[::2] for one in text.split(","))
        return [parts]
    if form == "limit":
        name, _, limit = text.partition("=")
        return {name: limit.split(":")[0]}
    if form == "words":
        return dict([text.partition("=")[::2]])
    if form == "rate":
        return [{"rate": text.rpartition(":")[2]}]
    return text
