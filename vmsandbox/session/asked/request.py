"""What a person asked for, and what is made of it before a guest is forked: plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from vmsandbox.errors import RefusedError, UserInputError
from vmsandbox.hypervisor.kvm import KvmProof
from vmsandbox.hypervisor.launch import Machine
from vmsandbox.hypervisor.template import ImageFiles, Template
from vmsandbox.policy.merging.return_rules import exceeds
from vmsandbox.policy.values import Policy
from vmsandbox.session.asked.sizes import Sizes, needs_watcher, sizes_of
from vmsandbox.spec import NO_LIMITS, Accept, GuestLimits, GuestShape, History, NetworkMode

# network.mode of a policy → what a guest gets, and what a command line may ask for. `restricted` says that a guest
# reaches what the rules allow, and leaves open how.
_MODES = {
    None: NetworkMode.NONE,
    "none": NetworkMode.NONE,
    "restricted": NetworkMode.PROXY,
    "proxy": NetworkMode.PROXY,
    "filtered": NetworkMode.FILTERED,
}
_ALLOWED = {
    None: tuple(NetworkMode),
    "none": (NetworkMode.NONE,),
    "restricted": tuple(NetworkMode),
    "proxy": (NetworkMode.NONE, NetworkMode.PROXY),
    "filtered": tuple(NetworkMode),
}


@dataclass(frozen=True)
class Origin:
    """The snapshot that a session begins as. tag: None for its session's start."""

    name: str
    tag: str | None


@dataclass(frozen=True)
class SessionRequest:
    """What a person asked for.

    project: folder on the host to copy in (None: an empty guest). name: None lets one be made up.
    image, network, memory_mib, vcpus: None leaves it to the policy, else to the default.
    learn: let through, and record, what no rule of the policy allows.
    history: of the guest's own repository. backup: keep the project's tree of before in the record.
    origin: a snapshot to begin with; the project is in it then, and `project` says only where it belongs to.
    accept: what shall be taken of the guest's work without a person; None: nothing has been said yet.
    keep: the guest outlives its process. snapshot: so does its start, to be rolled back to (with `keep`).
    wait: seconds to wait for room on the host; None: for ever.
    held: policy is what the organisation's, the person's and the project's files say together (see `holding`).
    """

    project: Path | None = None
    name: str | None = None
    policy: Policy = field(default_factory=Policy)
    image: str | None = None
    network: NetworkMode | None = None
    learn: bool = False
    history: History = History.NONE
    accept: Accept | None = None
    backup: bool = True
    allow_emulation: bool = False
    keep: bool = False
    snapshot: bool = False
    memory_mib: int | None = None
    vcpus: int | None = None
    ssh_ports: int = 6
    wait: float | None = 0
    origin: Origin | None = None
    held: bool = False

    @property
    def mode(self) -> NetworkMode:
        """What the guest gets: as asked for on the command line, else as the policy says, else nothing."""
        return self.network if self.network is not None else _MODES[self.policy.network.mode]

    @property
    def sizes(self) -> Sizes:
        """What the guest is made of. Raises UserInputError, or RefusedError where the policy allows less."""
        return sizes_of(self.policy, image=self.image, vcpus=self.vcpus, memory_mib=self.memory_mib)

    def check(self) -> None:
        """Refuse what cannot work, before anything is made. Raises UserInputError, or RefusedError by the policy."""
        self._check_network()
        self._check_accept()
        _ = self.sizes
        if not 1 <= self.ssh_ports <= 28:
            raise UserInputError(f"--ssh-ports must be between 1 and 28, not {self.ssh_ports}")
        if self.project is not None and not self.project.is_dir():
            raise UserInputError(
                f"not a folder: {self.project}", resolution="name the folder of the project to copy in"
            )

    def _check_accept(self) -> None:
        cap = self.policy.returns.accept
        if self.accept is not None and exceeds(self.accept, cap):
            where = f" ({self.policy.source})" if self.policy.source else ""
            raise RefusedError(
                f"the policy lets at most {cap!r} be taken without a person, not {self.accept.value!r}",
                details=f"sandbox.return.accept: {cap}{where}",
                resolution=f"--accept {cap}, or omit it to be asked in a terminal",
            )

    def _check_network(self) -> None:
        asked, allowed = self.mode, self.policy.network.mode
        if asked not in _ALLOWED[allowed]:
            where = f" ({self.policy.source})" if self.policy.source else ""
            raise RefusedError(
                f"the policy allows network mode {allowed!r}, not {asked.value!r}",
                details=f"sandbox.network.mode: {allowed}{where}",
                resolution=f"change the policy, or omit --net {asked.value}",
            )
        if self.learn and asked is NetworkMode.NONE:
            raise UserInputError("--learn needs a network", resolution="add --net proxy")
        if needs_watcher(self.policy.session) and self.ssh_ports < 2:
            raise UserInputError(
                "one SSH port is not enough for a session that has a time limit or a health check",
                resolution="its watcher needs one: --ssh-ports 2",
            )
        if asked is not NetworkMode.NONE and self.keep and self.ssh_ports < 2:
            raise UserInputError(
                "one SSH port is not enough for a guest with a network",
                resolution="its keeper needs one: --ssh-ports 2",
            )


@dataclass(frozen=True)
class Prepared:
    """All that a fork is made of. broker: its Python environment, if the guest has a network."""

    kvm: KvmProof
    shape: GuestShape
    image: ImageFiles
    machine: Machine
    template: Template
    broker: Path | None = None
    limits: GuestLimits = NO_LIMITS
