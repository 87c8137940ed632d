"""Which command lines a policy lets run: the patterns of commands.allowed, denied and require_confirmation.

Without one exact meaning, `pip install *` would ask for `pip install x` and let `python3 -m pip -q install x` through.
Pure: no files, no processes. The guest's supervisor and the host's lint and tests load this same file; docs/commands.md
tells a person the same. Text is str with surrogate escapes, as os.fsdecode gives it.

Denied and require_confirmation are read widely (any name of the program, options in any order and grouping, options
that the pattern does not name skipped), allowed is read narrowly (names that only root can give, word by word).
"""

import fnmatch
import os.path
import re
import shlex
import sys

if os.path.dirname(os.path.abspath(__file__)) not in sys.path:  # the host loads this file by its path
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))
from vmsandbox_interpreters import Command, Program, bare, equivalents, is_option, versions

__all__ = ["ALLOW", "ASK", "DENY", "Command", "Pattern", "Program", "Rules", "bare", "pattern_problem"]

ALLOW, ASK, DENY = 0, 1, 2

_GLOB = re.compile(r"[*?\[]")

# A program that belongs to another: allowed with it.
LIBEXEC = (
    ("/usr/lib/git-core/", "git"),
    ("/usr/libexec/git-core/", "git"),
    ("/usr/libexec/gcc/", "gcc"),
    ("/usr/lib/gcc/", "gcc"),
)
# What the system's own start-up files of a login shell run, and the host's own file copy: no allow-list need name them.
LOGIN_HELPERS = frozenset(("id", "dircolors", "run-parts", "sftp-server"))

# Other words for the same thing: options of a program (long for short), and subcommands.
_RECURSIVE = {"--recursive": "r", "--force": "f", "-R": "r"}
_OPTION_NAMES = {"rm": _RECURSIVE, "chmod": _RECURSIVE, "chown": _RECURSIVE, "cp": _RECURSIVE}
_SUBCOMMANDS = {"npm": {"i": "install", "in": "install", "ins": "install", "inst": "install", "add": "install"}}


class Pattern:
    """One entry of a list. Raises ValueError with what is wrong with it."""

    __slots__ = ("first", "options", "rest", "text", "words")

    def __init__(self, text):
        self.text = text
        if "\0" in text:
            raise ValueError("a NUL is in it")
        words = shlex.split(text)
        if not words or not words[0]:
            raise ValueError("it names no program")
        self.first, self.rest = words[0], tuple(words[1:])
        self.options = tuple(word for word in self.rest if is_option(word))
        self.words = tuple(word for word in self.rest if not is_option(word) and word != "--")

    def names_program(self, names, paths):
        if "/" in self.first:
            return any(fnmatch.fnmatchcase(path, one) for one in _places(self.first) for path in paths)
        return any(same_name(self.first, name) for name in names)

    def narrow(self, command):
        """Whether it allows this: word by word, under names that are the program's own."""
        program = command.program
        if not self.names_program(program.own, program.own_paths):
            return False
        return not self.rest or (not command.cut and _words_match(self.rest, command.args))

    def wide(self, command):
        """Whether this is what it means, however it is written."""
        program = command.program
        if not self.names_program(program.names, program.paths):
            return False
        if not self.rest:
            return True
        table = _OPTION_NAMES.get(bare(self.first.rpartition("/")[2]), {})
        given = _given_options(command.args, table)
        if not command.cut and not all(_has_option(option, given, table) for option in self.options):
            return False
        aliases = _SUBCOMMANDS.get(bare(self.first.rpartition("/")[2]), {})
        return _operands_match(self.words, command, aliases)


class Rules:
    """The layers of a policy, each of which has to allow a command.

    layers: [{"allowed": [text…], "denied": […], "require_confirmation": […]}, …]. Raises ValueError.
    """

    def __init__(self, layers):
        self.layers = [
            {name: [Pattern(text) for text in layer.get(name, ())]
             for name in ("allowed", "denied", "require_confirmation")}
            for layer in layers
        ]  # fmt: skip

    def judge(self, command):
        """(ALLOW, ASK or DENY, why): the strictest of the layers."""
        return max((_judge(layer, command, 0) for layer in self.layers), key=lambda one: one[0], default=(ALLOW, ""))


def pattern_problem(text):
    """What is wrong with a pattern, in words; None if nothing is."""
    try:
        Pattern(text)
    except ValueError as error:
        return str(error)
    return None


def same_name(pattern, name):
    """Whether a program's name is the pattern's: globs, and a version at the end of either does not count."""
    if _GLOB.search(pattern):
        return any(fnmatch.fnmatchcase(one, pattern) for one in versions(name))
    return pattern in versions(name) or name in versions(pattern)


def _judge(layer, command, depth):
    lines = equivalents(command)
    asks = None
    for one in lines:
        for pattern in layer["denied"]:
            if pattern.wide(one):
                return DENY, "commands.denied: " + pattern.text
        for pattern in layer["require_confirmation"]:
            if asks is None and pattern.wide(one):
                asks = pattern
    inner = (ALLOW, "")
    if command.program.script is not None:
        if depth >= 4:
            return DENY, "scripts that are interpreted by scripts"
        interpreter, before = command.program.script
        args = (*before, command.program.path, *command.args)
        deeper = Command(interpreter, args, interpreter.path, command.cwd, command.cut, command.look)
        inner = _judge(layer, deeper, depth + 1)
        if inner[0] == DENY:
            return inner
    if asks is not None:
        return ASK, "commands.require_confirmation: " + asks.text
    if inner[0] == ASK or not layer["allowed"] or _is_allowed(layer["allowed"], command, depth):
        return inner
    return DENY, "not in commands.allowed"


def _is_allowed(patterns, command, depth):
    program = command.program
    if program.script is not None:
        return True  # its interpreter is, which would run it under its own name just the same
    if depth and "env" in program.own:
        return True  # `#!/usr/bin/env X`: the execve of X is judged
    if program.own & LOGIN_HELPERS or any(pattern.narrow(command) for pattern in patterns):
        return True
    owners = {owner for folder, owner in LIBEXEC for path in program.own_paths if path.startswith(folder)}
    return any(pattern.names_program(owners, ()) for pattern in patterns)


def _places(first):
    """The paths that a pattern's first word with a slash in it stands for, as globs."""
    if first.startswith("/"):
        return (os.path.normpath(first),)
    if first.startswith("~/"):
        return ("/home/claude-worker/" + os.path.normpath(first[2:]),)
    return ("/home/claude-worker/projects/*/" + os.path.normpath(first),)


def _words_match(pattern, words):
    """Word by word; a lone * stands for any number of words, none included. All of the words have to match."""
    at = word = 0
    star, resume = -1, 0
    while word < len(words):
        if at < len(pattern) and pattern[at] == "*":
            star, resume = at, word
            at += 1
        elif at < len(pattern) and fnmatch.fnmatchcase(words[word], pattern[at]):
            at, word = at + 1, word + 1
        elif star >= 0:
            resume += 1
            at, word = star + 1, resume
        else:
            return False
    return all(one == "*" for one in pattern[at:])


def _given_options(args, table):
    """(letters of short options, long options) of a command line."""
    letters, long = set(), []
    for arg in args:
        if arg.startswith("--"):
            long.append(arg)
            # getopt takes an abbreviation
            name = arg.partition("=")[0]
            letters |= {short for known, short in table.items() if len(name) > 3 and known.startswith(name)}
        elif is_option(arg):
            letters |= set(arg[1:]) | {table["-" + letter] for letter in arg[1:] if "-" + letter in table}
    return letters, long


def _has_option(option, given, table):
    letters, long = given
    if option in table:
        return table[option] in letters
    if option.startswith("--"):
        return any(fnmatch.fnmatchcase(one, option) or fnmatch.fnmatchcase(one.partition("=")[0], option)
                   or (len(one) > 3 and option.startswith(one)) for one in long)  # fmt: skip
    return _GLOB.search(option) is not None or set(option[1:]) <= letters


def _operands_match(words, command, aliases):
    """The words that are no options, in order; the one after an option may be that option's value."""
    anywhere = bool(words) and all(word.startswith("/") for word in words)
    states, after_option = _closed({0}, words), False
    for arg in command.args:
        if is_option(arg) or arg == "--":
            after_option = arg != "--" and "=" not in arg
            continue
        reached = set(states) if after_option or anywhere else {at for at in states if words[at : at + 1] == ("*",)}
        for at in states:
            if at < len(words) and words[at] != "*" and _operand(words[at], arg, command.cwd, aliases):
                reached.add(at + 1)
        states, after_option = _closed(reached, words), False
        if not states:
            return False
    return command.cut or len(words) in states


def _operand(word, arg, cwd, aliases):
    if word.startswith("/"):
        path = arg if arg.startswith("/") else os.path.join(cwd() or "", arg)
        # // at the start is one of normpath's own (POSIX): the kernel takes it for /
        if fnmatch.fnmatchcase(re.sub("^/+", "/", os.path.normpath(path)), word):
            return True
    return fnmatch.fnmatchcase(arg, word) or aliases.get(arg) == word


def _closed(states, words):
    for at in sorted(states):
        while at < len(words) and words[at] == "*":
            at += 1
            states.add(at)
    return states
