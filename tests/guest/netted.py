"""What the tests of guests with a network share: programs for the guest, and how to look at the host's side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rooted import RootedGuest

from vmsandbox.policy.values import ResourcesPolicy

# One shape, and so one cold boot, for the guests that have a card and the one that has a balloon.
BALLOONED = ResourcesPolicy(memory=512 << 20, memory_reserved=320 << 20)
SECRET = "sk-test-7f3a91c04be2d865fe01"

# In the guest: FETCH prints the status and the body, ASK what a proxy answers to a request of any shape.
FETCH = """
import sys, urllib.request, urllib.error
headers = dict(word.split("=", 1) for word in sys.argv[2:])
data = headers.pop("BODY", "").encode() or None
try:
    with urllib.request.urlopen(urllib.request.Request(sys.argv[1], data, headers), timeout=40) as answer:
        print(answer.status, answer.read().decode())
except urllib.error.HTTPError as error:
    print(error.code, error.read().decode())
except OSError as error:
    print("failed", error)
"""
ASK = """
import json, socket, ssl, sys
answers = []
for first, server_name, then in json.loads(sys.argv[1]):
    try:
        with socket.create_connection(("127.0.0.1", 3128), timeout=40) as sock:
            sock.sendall(first.encode("latin-1"))
            answer = sock.recv(4096)
            while answer.startswith(b"HTTP/1.1 4") and not answer.endswith(b"}\\n") and (more := sock.recv(4096)):
                answer += more
            if server_name is not None and b" 200 " in answer.split(b"\\r\\n")[0]:
                context = ssl._create_unverified_context()
                with context.wrap_socket(sock, server_hostname=server_name or None) as tls:
                    tls.sendall(then.encode("latin-1"))
                    answer = b""
                    while more := tls.recv(4096):
                        answer += more
    except OSError as error:
        answer = repr(error).encode()
    answers.append(answer.decode("latin-1"))
print(json.dumps(answers))
"""
LISTEN = """
import sys, time, urllib.request
began = time.monotonic()
with urllib.request.urlopen(sys.argv[1], timeout=40) as answer:
    for line in answer:
        if line.startswith(b"data"):
            print(f"{time.monotonic() - began:.3f}", flush=True)
"""


def reaching(*targets: str) -> str:
    """A script for a guest that says which of these (`ADDRESS/PORT`) it connects to; all at once, in three seconds."""
    tries = (f"(timeout 3 bash -c 'echo > /dev/tcp/{target}' 2>/dev/null && echo {target}) &" for target in targets)
    return "\n".join((*tries, "wait"))


def named(project: Path) -> tuple[Path, str, Path]:
    """The project, and its policy named by a person: unnamed it would get nothing of the host."""
    return project, "--policy", project / ".claude/sandbox.yaml"


def fetch(guest: RootedGuest, url: str, *headers: str) -> tuple[str, str]:
    """(status or "failed", body) of a request by the worker."""
    done = guest.run("python3", "-c", FETCH, url, *headers)
    status, _, body = done.stdout.decode().strip().partition(" ")
    return status, body


def ask(guest: RootedGuest, *questions: tuple[str, str | None, str]) -> list[str]:
    """What the guest's root hears from the proxy: (first bytes, server name of TLS then or None, bytes in it)."""
    script = f"cat > /tmp/ask.py <<'EOF'\n{ASK}\nEOF\ncat > /tmp/ask.json <<'EOF'\n{json.dumps(questions)}\nEOF\n"
    answers: list[str] = json.loads(guest.root(script + 'python3 /tmp/ask.py "$(cat /tmp/ask.json)"'))
    return answers


def lines(guest: RootedGuest) -> list[dict[str, Any]]:
    path = guest.folder.record_folder(guest.info.id) / "egress.jsonl"
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def row(guest: RootedGuest) -> dict[str, Any]:
    """What `ls` says of a guest."""
    return next(one for one in guest.cli.json("ls") if one["name"] == guest.name)


def children(pid: int) -> dict[int, str]:
    """Command lines of a process's children."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if int((process / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found[int(process.name)] = (process / "cmdline").read_bytes().decode()
        except OSError:
            continue
    return found


def broker_of(pid: int) -> int:
    return next(child for child, words in children(pid).items() if "broker.child" in words)


def keeper_of(guest: RootedGuest) -> int:
    return int(json.loads((guest.folder.path / "keeper.json").read_text())["pid"])
