"""The one way in which vmsandbox runs git on the host, with all switched off that a repository could make it run.

A repository's own configuration may name programs: hooks, a file system monitor, filters, an ssh command, helpers
for credentials. A project that came as an archive brings such a configuration along, and plain `git status` in it
runs what it says. Three things keep that from happening here:

1. an environment made from nothing: no GIT_* of the person's, no configuration but the repository's;
2. `-c` for each key that names a program or reaches further: the command line wins over every file (git-config(1));
3. a short list of subcommands, none of which converts files, compares with a work tree or pages. Keys with a name of
   their own (`filter.X.clean`, `diff.X.textconv`, `merge.X.driver`) cannot be overridden without knowing the name, so
   what reads them is not run at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vmsandbox.errors import HostError
from vmsandbox.process import Finished, Programs


class Setting(NamedTuple):
    """One thing that is fixed, and why."""

    name: str
    value: str
    reason: str


_NOWHERE = "/nonexistent"

ENVIRONMENT = (
    Setting("HOME", _NOWHERE, "~/.gitconfig, ~/.ssh, ~/.netrc, `~` in the repository's own paths"),
    Setting("XDG_CONFIG_HOME", _NOWHERE, "$XDG_CONFIG_HOME/git/{config,attributes,ignore}"),
    Setting("XDG_CACHE_HOME", _NOWHERE, "the credential cache's socket"),
    Setting("GIT_CONFIG_NOSYSTEM", "1", "/etc/gitconfig"),
    Setting("GIT_CONFIG_GLOBAL", "/dev/null", "the person's configuration, wherever it is"),
    Setting("GIT_CONFIG_SYSTEM", "/dev/null", "the same for the system's"),
    Setting("GIT_ATTR_NOSYSTEM", "1", "/etc/gitattributes names filters"),
    Setting("GIT_TERMINAL_PROMPT", "0", "never ask a person"),
    Setting("GIT_ASKPASS", "/bin/false", "comes before core.askPass"),
    Setting("SSH_ASKPASS", "/bin/false", "the next one that would be asked"),
    Setting("GIT_SSH_COMMAND", "/bin/false", "comes before core.sshCommand"),
    Setting("GIT_OPTIONAL_LOCKS", "0", "looking must not write the index"),
    Setting("GIT_NO_REPLACE_OBJECTS", "1", "refs/replace would show other objects than those that are named"),
    Setting("GIT_GRAFT_FILE", _NOWHERE, "info/grafts would show other parents"),
    Setting("GIT_NO_LAZY_FETCH", "1", "a partial clone fetches what it lacks, from what remote.X.url says (git 2.44)"),
    Setting("GIT_ALLOW_PROTOCOL", "none", "the same for older git: no transport at all, above protocol.X.allow"),
    Setting("GIT_PROTOCOL_FROM_USER", "0", "and none that only a person may ask for"),
    Setting("GIT_DISCOVERY_ACROSS_FILESYSTEM", "0", "a repository is not looked for on another file system"),
    Setting("GIT_ADVICE", "0", "no hints among the last words"),
    Setting("GIT_PAGER", "cat", "comes before core.pager"),
    Setting("GIT_EDITOR", "false", "comes before core.editor"),
    Setting("LC_ALL", "C", "messages in one language"),
    Setting("http_proxy", "", "nothing is fetched"),
    Setting("https_proxy", "", "nothing is fetched"),
)

OVERRIDES = (
    Setting("core.hooksPath", "/dev/null", "update-ref runs reference-transaction; nothing lies below /dev/null"),
    Setting("core.fsmonitor", "false", "a program that is run when the index is read"),
    Setting("core.untrackedCache", "false", "looking must not write"),
    Setting("core.pager", "cat", "a program"),
    Setting("core.editor", "false", "a program"),
    Setting("sequence.editor", "false", "a program"),
    Setting("core.askPass", "/bin/false", "a program"),
    Setting("core.sshCommand", "/bin/false", "a program"),
    Setting("core.gitProxy", "none", "a program"),
    Setting("core.alternateRefsCommand", "false", "a program, run with the paths of alternates"),
    Setting("core.attributesFile", "/dev/null", "names filters and text conversions"),
    Setting("core.excludesFile", "/dev/null", "ignore rules are our own business"),
    Setting("core.logAllRefUpdates", "false", "no reflog beside the refs that are made"),
    Setting("core.useReplaceRefs", "false", "see GIT_NO_REPLACE_OBJECTS"),
    Setting("core.commitGraph", "false", "a file that says what parents a commit has: the objects are asked"),
    Setting("core.multiPackIndex", "false", "a file that says where objects are: the packs are asked"),
    Setting("credential.helper", "", "an empty value empties the list of programs"),
    Setting("diff.external", "false", "a program"),
    Setting("diff.orderFile", "/dev/null", "a path that is read"),
    Setting("diff.ignoreSubmodules", "all", "no look into submodules"),
    Setting("diff.trustExitCode", "false", "belongs to diff.external"),
    Setting("interactive.diffFilter", "false", "a program"),
    Setting("gpg.program", "/bin/false", "a program"),
    Setting("gpg.openpgp.program", "/bin/false", "a program"),
    Setting("gpg.x509.program", "/bin/false", "a program"),
    Setting("gpg.ssh.program", "/bin/false", "a program"),
    Setting("gpg.ssh.defaultKeyCommand", "false", "a program"),
    Setting("commit.gpgSign", "false", "would run gpg.program"),
    Setting("log.showSignature", "false", "would run gpg.program"),
    Setting("protocol.allow", "never", "no transport"),
    Setting("protocol.ext.allow", "never", "a transport that is a command line"),
    Setting("protocol.file.allow", "never", "runs upload-pack in another repository"),
    Setting("submodule.recurse", "false", "submodules have configurations of their own"),
    Setting("fetch.recurseSubmodules", "false", "the same"),
    Setting("status.submoduleSummary", "false", "the same"),
    Setting("gc.auto", "0", "nothing in the background that rewrites the repository"),
    Setting("maintenance.auto", "false", "the same"),
    Setting("gc.autoDetach", "false", "the same"),
    Setting("pack.useBitmaps", "false", "a file that says what is reachable: the objects are asked"),
    Setting("pack.packSizeLimit", "0", "one pack, not many"),
    Setting("safe.directory", "*", "a project may be someone else's: what that check protects from is off anyway"),
    Setting("safe.bareRepository", "explicit", "a folder that merely looks like a repository is none (CVE-2022-24765)"),
)

# Each with what it is used for. None runs a filter, a text conversion, a merge driver, a pager or a transport.
SUBCOMMANDS = {
    "bundle": "the backup",
    "cat-file": "bytes of objects as they are stored (never --textconv or --filters)",
    "config": "a blob's .gitmodules (never a file's)",
    "diff-tree": "names of what a commit changed",
    "for-each-ref": "refs",
    "index-pack": "checking a pack",
    "ls-files": "names in the index",
    "ls-tree": "names in a commit",
    "pack-objects": "a pack for the guest, or of what it sent",
    "read-tree": "the index of a restored tree (without -u: writes no file)",
    "rev-list": "history, connectivity",
    "rev-parse": "where things are",
    "show-index": "what a pack has",
    "symbolic-ref": "the branch's name",
    "update-ref": "refs/vmsandbox/…",
}
_FORBIDDEN = ("--textconv", "--filters", "--ext-diff", "-u", "--upload-pack", "--exec", "--includes")


@dataclass(frozen=True)
class GitLimits:
    """What one git process may use. cpu: seconds. memory: bytes of address space. file: bytes of one file."""

    cpu: int = 300
    memory: int = 4 << 30
    file: int = 4 << 30


@dataclass(frozen=True)
class HostGit:
    """git on the host. With `git_dir` it works on that repository and looks for no other; without, on none (or, with
    `folder`, on the one that this folder lies in).
    """

    programs: Programs
    git_dir: Path | None = None
    folder: Path | None = None
    limits: GitLimits | None = None

    def run(
        self,
        subcommand: str,
        *arguments: str | Path,
        stdin: bytes | None = None,
        timeout: float = 120,
        check: bool = True,
        options: Sequence[str] = (),
        config: Iterable[tuple[str, str]] = (),
    ) -> Finished:
        """Run one command of `SUBCOMMANDS`.

        Args:
            options: of git itself, before the subcommand.
            config: more overrides, such as `("pack.window", "0")`.

        Raises:
            HostError: git is missing, was too slow, or (with `check`) failed.
        """
        words = (*options, *map(str, arguments))
        if subcommand not in SUBCOMMANDS or any(word.split("=")[0] in _FORBIDDEN for word in words):
            raise HostError(f"git {subcommand} is not run on the host", details=" ".join(words)[:500])
        finished = self.programs.run(
            [*self._prefix(), *options, *_overrides(config), subcommand, *arguments],
            stdin=stdin,
            timeout=timeout,
            check=False,
            env={one.name: one.value for one in ENVIRONMENT},
        )
        if check and finished.status != 0:  # without the command line: two pages of overrides
            raise HostError(f"git {subcommand} failed with status {finished.status}", details=finished.last_words)
        return finished

    def text(self, subcommand: str, *arguments: str | Path, timeout: float = 120) -> str:
        """stdout without its last newline; bytes that are not UTF-8 as surrogate escapes."""
        out = self.run(subcommand, *arguments, timeout=timeout).stdout
        return out.removesuffix(b"\n").decode("utf-8", "surrogateescape")

    def _prefix(self) -> list[str | Path]:
        limits: list[str | Path] = []
        if self.limits is not None:
            limits = ["prlimit", f"--cpu={self.limits.cpu}", f"--as={self.limits.memory}",
                      f"--fsize={self.limits.file}", "--core=0", "--"]  # fmt: skip
        where: list[str | Path] = []
        if self.git_dir is not None:
            where = [f"--git-dir={self.git_dir}"]
        elif self.folder is not None:
            where = ["-C", self.folder]
        return [*limits, "git", "--no-pager", "--no-replace-objects", "--literal-pathspecs", *where]


def _overrides(more: Iterable[tuple[str, str]]) -> list[str]:
    pairs = [*((one.name, one.value) for one in OVERRIDES), *more]
    return [word for key, value in pairs for word in ("-c", f"{key}={value}")]
