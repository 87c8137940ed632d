"""What a command line amounts to: `python3 -m pip install x` is `pip install x`, and so is `python3 /usr/bin/pip install x`.

Without it a rule for `pip` would be one word away from being none. Only what runs without another execve is looked for
here: `env X`, `sh -c "X"`, `nice X` and the like need none of it, because the execve of X is judged by itself. Pure.
"""

import os.path
import re

_VERSION = re.compile(r"(?<=[A-Za-z_+])[-.]?\d+$|(?<=\d)\.\d+$")

# Programs that run what their arguments name without another execve. value: short options that take the next word;
# code: the program text follows; module: a module follows. long: long options that take the next word.
INTERPRETERS = {
    "python": {"value": "WX", "code": "c", "module": "m", "long": ("--check-hash-based-pycs",)},
    "sh": {"value": "oO", "code": "c", "module": "", "long": ("--rcfile", "--init-file")},
    "node": {"value": "rC", "code": "ep", "module": "", "long": ("--require", "--import", "--loader", "--conditions")},
    "perl": {"value": "I", "code": "eE", "module": "", "long": ()},
    "ruby": {"value": "ICr", "code": "e", "module": "", "long": ()},
    "ld.so": {"value": "", "code": "", "module": "", "long": (
        "--library-path", "--preload", "--audit", "--argv0", "--inhibit-rpath", "--glibc-hwcaps-prepend",
        "--glibc-hwcaps-mask")},
}  # fmt: skip
_SAME_INTERPRETER = {
    "bash": "sh", "dash": "sh", "zsh": "sh", "ksh": "sh", "rbash": "sh", "nodejs": "node", "pypy": "python",
    "ld-linux-x86-64.so": "ld.so", "ld-linux.so": "ld.so", "ld-x86-64.so": "ld.so", "ld-musl-x86_64.so": "ld.so",
}  # fmt: skip
_MOST_CANDIDATES = 3  # each of which may be an interpreter with candidates of its own
_MULTI_CALL = ("busybox", "toybox")
_SCRIPTS = {"npm-cli.js": "npm", "npx-cli.js": "npx", "yarn.js": "yarn", "pnpm.cjs": "pnpm"}


class Program:
    """What an execve would run.

    names   all that it may be called: as given, every link on the way, the file itself, what it is a copy of
    own     those of them that root alone can have given; paths, own_paths: the same, absolute
    script  for a `#!` file that the worker could have written: (its interpreter, the interpreter's arguments before
            the file's own); None otherwise
    """

    __slots__ = ("names", "own", "own_paths", "path", "paths", "script", "steady")

    def __init__(self, names, own=(), paths=(), own_paths=(), script=None, path="", steady=True):
        self.names, self.own = frozenset(names), frozenset(own)
        self.paths, self.own_paths = frozenset(paths), frozenset(own_paths)
        self.script, self.path, self.steady = script, path, steady


class Command:
    """A program with its arguments (without argv[0]).

    zero   argv[0]. cwd: gives the folder, absolute, or None if it is unknown. cut: there are more arguments than these.
    look   finds the Program that a file argument names, None if there is none
    """

    __slots__ = ("args", "cut", "cwd", "look", "program", "zero")

    def __init__(self, program, args=(), zero="", cwd=lambda: None, cut=False, look=lambda path: None):
        self.program, self.args, self.zero = program, tuple(args), zero
        self.cwd, self.cut, self.look = cwd, cut, look


def versions(name):
    """python3.13 → python3.13, python3, python."""
    found = [name]
    while (shorter := _VERSION.sub("", found[-1])) != found[-1]:
        found.append(shorter)
    return found


def bare(name):
    return versions(name)[-1]


def is_option(word):
    return len(word) > 1 and word[0] == "-" and word != "--"


def equivalents(command, depth=0):
    """The command, and what else it amounts to: `python -m pip install x` and `python /usr/bin/pip install x`, say."""
    found = [command]
    names = {bare(name) for name in command.program.names}
    inner = []
    if any(name in _MULTI_CALL for name in names):
        zero = os.path.basename(command.zero).lstrip("-")
        if zero and bare(zero) not in _MULTI_CALL:
            inner.append(({zero}, command.args))
        elif command.args:
            inner.append(({os.path.basename(command.args[0])}, command.args[1:]))
    for kind in {_SAME_INTERPRETER.get(name, name) for name in names} & INTERPRETERS.keys():
        inner += _interpreted(command, INTERPRETERS[kind])
    for program, args in inner:
        if not isinstance(program, Program):
            program = Program(program)
        one = Command(program, args, "", command.cwd, command.cut, command.look)
        found += equivalents(one, depth + 1) if depth < 3 else [one]
    return found


def _interpreted(command, kind):
    """What of its arguments an interpreter runs: [(names or Program, arguments of it)]."""
    args, position, doubtful = command.args, 0, False
    found = []
    while position < len(args) and len(found) < _MOST_CANDIDATES:
        word = args[position]
        position += 1
        if not is_option(word) and not (word[:1] == "+" and len(word) > 1):
            if word == "--" or word == "-":
                continue
            found.append((_named(command, word), args[position:]))
            if doubtful:  # it may have been the value of an option that we do not know
                doubtful = False
                continue
            break
        doubtful = False
        if word.startswith("--"):
            if word in kind["long"]:
                position += 1
            else:
                doubtful = "=" not in word
            continue
        for at, letter in enumerate(word[1:], start=2):
            if letter in kind["code"]:
                return found
            if letter in kind["module"]:
                module = word[at:] or (args[position] if position < len(args) else "")
                return [*found, ({module.partition(".")[0]}, args[position + (not word[at:]) :])]
            if letter in kind["value"]:
                position += not word[at:]
                break
    return found


def _named(command, word):
    """The program that a file argument is."""
    name = os.path.basename(word.rstrip("/"))
    names = {name, _SCRIPTS.get(name, name)}
    if name == "__main__.py":
        names.add(os.path.basename(os.path.dirname(word)))
    known = command.look(word)
    if known is None:
        return names
    names |= known.names | {_SCRIPTS[one] for one in known.names if one in _SCRIPTS}
    return Program(names, (), known.paths, (), None, known.path)
