"""A guest under a policy, driven over one SSH connection: what a worker may do there, asked many times."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from harness import make_tree

from vmsandbox.policy.values import (
    FilesystemPolicy,
    KernelPolicy,
    Policy,
    ResourcesPolicy,
    SeccompProfile,
    Tmpfs,
)
from vmsandbox.session.sandbox import Sandbox

PROCESSES = 90
TMP_BYTES = 16 << 20
PROFILE = {
    "defaultAction": "SCMP_ACT_ALLOW",
    "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
    "syscalls": [{"names": ["symlink", "symlinkat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}],
}
# User namespaces are on: with them the worker is root of its own, which is the stronger attack on mounts.
CONFINED = Policy(
    filesystem=FilesystemPolicy(
        allowed_paths=("./src", "./tests", "/tmp/claude-work"),
        denied_paths=("./secrets/", "./config/keys", "~/.ssh/", "~/.config/vault", "/etc/", "/opt/hidden"),
        tmpfs=(Tmpfs("/tmp", TMP_BYTES), Tmpfs("/srv/fast", 4 << 20, exec=True)),
    ),
    kernel=KernelPolicy(
        seccomp=(SeccompProfile(Path("profile.json"), json.dumps(PROFILE)),),
        capabilities=("net_raw",),
        user_namespaces=True,
    ),
    resources=ResourcesPolicy(processes=PROCESSES),
)


@dataclass
class Inside:
    """A worker's shell in a guest, and the guest as the host sees it."""

    sandbox: Sandbox

    def try_(self, script: str, timeout: float = 90) -> tuple[int, str, str]:
        """(status, stdout, stderr) of a shell script of the worker's, in the project."""
        folder = self.sandbox.info.guest_folder or "."
        status, out, err = self.sandbox.shell().run(
            ["sh", "-c", f'cd "$1" || exit 99\n{script}', "sh", folder], timeout=timeout
        )
        return status, out.decode(errors="replace").strip(), err.decode(errors="replace").strip()

    def sh(self, script: str, timeout: float = 90) -> str:
        """stdout of a script that must succeed."""
        status, out, err = self.try_(script, timeout)
        assert status == 0, f"{script}: status {status}\n{out}\n{err}"
        return out

    def python(self, program: str, timeout: float = 90) -> str:
        """stdout of a Python program."""
        status, out, err = self.sandbox.shell().run(["python3", "-c", program], timeout=timeout)
        assert status == 0, err.decode(errors="replace")
        return out.decode().strip()

    def refused(self, *attempts: str) -> None:
        """Each of these scripts must fail, in a shell of its own."""
        script = "\n".join(f"( {attempt} ) >/dev/null 2>&1 && echo {number}" for number, attempt in enumerate(attempts))
        worked = [attempts[int(number)] for number in self.sh(script + "\ntrue").split()]
        assert not worked, worked


def project_with_secrets(folder: Path) -> Path:
    """A project that has what the policy denies, and a link out of what may be written."""
    root = make_tree(
        folder / "guarded",
        {
            "README.md": "as it was\n", "src/app.py": "print('hello')\n", "config/app.yaml": "a: 1\n",
            "config/keys/one": "KEY", "secrets/token": "TOKEN",
        },
    )  # fmt: skip
    (root / "src/link").symlink_to("../README.md")
    return root
