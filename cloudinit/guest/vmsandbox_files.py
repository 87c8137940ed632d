"""Writing files as root, for the control program and its modules."""

import os
import stat


def write(path, text, mode=0o600):
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        os.fchmod(fd, mode)
        left = memoryview(text.encode() if isinstance(text, str) else text)
        while left:
            left = left[os.write(fd, left) :]
    finally:
        os.close(fd)


def refuse_links_of_others(path):
    """Raise ValueError if a part of this absolute path is a link that is not root's: root would be led by it.

    Good only while nothing of the worker's runs.
    """
    at = ""
    for name in path.strip("/").split("/"):
        at += "/" + name
        try:
            info = os.lstat(at)
        except (FileNotFoundError, NotADirectoryError):
            return
        if stat.S_ISLNK(info.st_mode) and info.st_uid != 0:
            raise ValueError("a symbolic link of the worker's is in the way: " + at)


def make_folder(path, owner):
    if not os.path.isdir(path):
        make_folder(os.path.dirname(path), owner)
        os.mkdir(path, 0o755)
        os.chown(path, owner, owner)
