"""What a policy asks of the guest, set up once in the policy's template: files, folders, mounts, kernel settings, units.

Everything is root's when it is done; a fork of the template finds it in force before its first process runs.
"""

import base64
import os
import subprocess
import zlib

import vmsandbox_mounts
from vmsandbox_files import make_folder, refuse_links_of_others, write

WORKER = "claude-worker"


def run(*argv):
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        words = (done.stdout + done.stderr)[-600:]
        raise RuntimeError("%s ended with status %d: %s" % (" ".join(argv)[-200:], done.returncode, words))


def policy(request):
    """files: [[path, mode, text] or [path, mode, base64 of deflated bytes, "deflate"]]; folders: [[path, mode, owner]];
    mounts: [[target, type, options]]; sysctls: {name: value}; shell: the worker's; restart: units.
    """
    for path, kind, options in request.get("mounts", ()):
        refuse_links_of_others(path)
        make_folder(path, 0)
        run("mount", "-t", kind, "-o", options, "vmsandbox", path)
    for path, mode, owner in request.get("folders", ()):
        folder(path, mode, owner)
    for path, mode, text, *form in request.get("files", ()):
        make_folder(os.path.dirname(path), 0)
        write(path, zlib.decompress(base64.b64decode(text)) if form == ["deflate"] else text, mode)
    for name, value in request.get("sysctls", {}).items():
        with open("/proc/sys/" + name.replace(".", "/"), "w") as file:
            file.write(str(value))
    if request.get("shell"):
        set_shell(request["shell"])
    if request.get("restart"):
        vmsandbox_mounts.project({"state": "open"})
        run("systemctl", "daemon-reload")
        # They wait at their gates again, now under the policy's properties.
        run("systemctl", "restart", "vmsandbox-ssh@*.service")
    return {}


def folder(path, mode, owner):
    """One that is there keeps its owner and mode."""
    refuse_links_of_others(path)
    if not os.path.isdir(path):
        os.mkdir(path, mode)
        os.chown(path, owner, owner)
        os.chmod(path, mode)


def set_shell(shell):
    """In place, because the file may be mounted elsewhere already."""
    with open("/etc/passwd") as file:
        lines = [line.split(":") for line in file.read().splitlines()]
    for fields in lines:
        if fields[0] == WORKER:
            fields[-1] = shell
    write("/etc/passwd", "".join(":".join(fields) + "\n" for fields in lines), 0o644)
