"""Which keys of other programs' files there are, and what becomes of each; the documentation is made of it.

Without it a key that nobody thought of would be dropped in silence. Sources: the Compose Specification, docker run's
reference, the Dev Container metadata reference.
"""

from __future__ import annotations

from dataclasses import dataclass

from vmsandbox.policy.importing import takers, takers_session
from vmsandbox.policy.importing.takers import Taker

NO_IMAGE = "a container's image is no disk of a guest: choose one with `image:`, or write a recipe"
NO_PORTS = "nothing listens for the host: `vmsandbox ssh-config` reaches the guest"
NO_HOST_FILE = "nothing of the host is mounted or read: put it into the project"
OWN_KERNEL = "the guest has a kernel of its own, which no other guest shares"
ONE_GUEST = "a session is one guest, which ends with its command"
NO_DEVICE = "the guest reaches no device of the host"
NO_READ = "reading is not limited, write_rate is for bytes"
WORKER = "everything runs as claude-worker (uid 1000), who cannot become root"


@dataclass(frozen=True)
class Key:
    """One key. ours: the keys of a policy that it becomes; empty: none, and `text` says why. text: how, or why not."""

    ours: str
    text: str
    take: Taker | None = None


def none(text: str, names: str) -> dict[str, Key]:
    return {name: Key("", text) for name in names.split()}


_TEST = "session.healthcheck"
SERVICE: dict[str, Key] = {
    "security_opt": Key(
        "kernel.new_privileges, kernel.seccomp",
        "`no-new-privileges` and `seccomp=FILE`; `apparmor`, `label`, `mask`: the guest's kernel is its own",
        takers.security_opt,
    ),
    "cap_drop": Key("", "holds always: no capability is kept but what kernel.capabilities names", takers.cap_drop),
    "cap_add": Key("kernel.capabilities", "unless it is dropped too; `ALL` is not imported", takers.cap_add),
    "privileged": Key("", "`false` holds always; `true` is not imported", takers.privileged),
    "read_only": Key(
        "filesystem.allowed_paths", "what volumes (rw) and tmpfs leave writable, and nothing else", takers.read_only
    ),
    "tmpfs": Key("filesystem.tmpfs", "path, size, exec; nosuid and nodev; 256M if it says no size", takers.tmpfs),
    "shm_size": Key("filesystem.tmpfs", "a tmpfs on /dev/shm", takers.shm_size),
    "volumes": Key(
        "filesystem.project, filesystem.output, filesystem.tmpfs",
        "the one that is the workspace: project; a writable one below a read-only one: output; of type tmpfs: tmpfs; "
        "all others are not mounted: nothing of the host is",
        takers.volumes,
    ),
    "networks": Key("network.mode", "`none` if all of them are `internal`", takers.networks),
    "network_mode": Key("network.mode", "`none`", takers.network_mode),
    "dns": Key("network.resolver", "the broker's own", takers.dns),
    "deploy.resources.limits.cpus": Key("resources.vcpus", "rounded up", takers.cpus),
    "deploy.resources.limits.memory": Key("resources.memory", "of the whole guest", takers.memory),
    "deploy.resources.limits.pids": Key("resources.processes", "the worker's", takers.processes),
    "deploy.resources.reservations.memory": Key("resources.memory_reserved", "", takers.memory_reserved),
    "deploy.resources.reservations.cpus": Key("", "processors are shared, none is reserved"),
    "cpus": Key("resources.vcpus", "rounded up", takers.cpus),
    "cpu_count": Key("resources.vcpus", "", takers.cpus),
    "mem_limit": Key("resources.memory", "of the whole guest", takers.memory),
    "mem_reservation": Key("resources.memory_reserved", "", takers.memory_reserved),
    "pids_limit": Key("resources.processes", "the worker's", takers.processes),
    "ulimits": Key("resources.processes", "`nproc`; for the others there is no key", takers.ulimits),
    "storage_opt": Key("resources.disk", "`size`", takers.storage_opt),
    "blkio_config.device_write_bps": Key("resources.write_rate", "the lowest", takers.write_rates),
    "healthcheck": Key(
        _TEST, "test (CMD, CMD-SHELL, NONE), interval, timeout, retries; not start_period", takers_session.healthcheck
    ),
    "environment": Key(
        "session.variables, session.environment",
        "without a value, and what looks like a secret: by name, as the host has it; no secret's value is copied",
        takers_session.environment,
    ),
    "working_dir": Key("", "tells which volume is the project; that lies in ~/projects", takers.working_dir),
    **none(NO_IMAGE, "image build pull_policy platform extends"),
    **none("`--name` names a session", "container_name hostname domainname"),
    **none(WORKER, "user group_add"),
    **none("`vmsandbox session … -- COMMAND` says what runs", "command entrypoint stdin_open tty attach init"),
    **none(ONE_GUEST, "depends_on links external_links restart scale stop_grace_period stop_signal profiles"),
    **none(ONE_GUEST, "post_start pre_stop provider models develop deploy.mode deploy.replicas deploy.placement"),
    **none(ONE_GUEST, "deploy.restart_policy deploy.rollback_config deploy.update_config deploy.endpoint_mode"),
    **none("has no effect on what may be done", "labels label_file annotations logging deploy.labels"),
    **none(NO_PORTS, "ports expose"),
    **none(NO_HOST_FILE, "env_file configs volumes_from credential_spec"),
    **none("name it in network.secrets: the guest gets a stand-in for it", "secrets"),
    **none("name the host with its addresses in network.rules", "extra_hosts"),
    **none("the broker resolves names, the guest does not", "dns_search dns_opt mac_address"),
    **none(NO_DEVICE, "devices device_cgroup_rules gpus runtime deploy.resources.limits.devices"),
    **none(NO_DEVICE, "deploy.resources.reservations.devices deploy.resources.reservations.generic_resources"),
    **none(OWN_KERNEL, "ipc pid uts userns_mode cgroup cgroup_parent isolation sysctls use_api_socket"),
    **none("processors are shared alike", "cpu_percent cpu_shares cpu_period cpu_quota cpu_rt_runtime cpuset"),
    **none("processors are shared alike", "cpu_rt_period"),
    **none(
        "the guest swaps nowhere; its kernel decides", "memswap_limit mem_swappiness oom_kill_disable oom_score_adj"
    ),
    **none(NO_READ, "blkio_config.device_read_bps blkio_config.weight"),
    **none(NO_READ, "blkio_config.device_read_iops blkio_config.weight_device"),
    **none(NO_READ, "blkio_config.device_write_iops"),
}
FILE: dict[str, Key] = {
    "services": Key("", "one of them is imported: --service"),
    "networks": Key("network.mode", "see `networks` of a service"),
    **none("has no effect on what may be done", "version name"),
    **none("nothing outlives a session", "volumes"),
    **none("name them in network.secrets", "secrets"),
    **none(NO_HOST_FILE, "configs"),
    **none("import that file as well", "include"),
    **none(ONE_GUEST, "models"),
}
NETWORK: dict[str, Key] = {
    "internal": Key("network.mode", "`none` if all networks of the service are internal"),
    **none("a guest is on no network of docker's", "driver driver_opts ipam name external attachable labels"),
    **none("a guest is on no network of docker's", "enable_ipv4 enable_ipv6"),
}
