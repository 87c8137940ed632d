"""Writing files as root, for the control program and its modules."""

import os


def write(path, text, mode=0o600):
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        os.fchmod(fd, mode)
        left = memoryview(text.encode() if isinstance(text, str) else text)
        while left:
            left = left[os.write(fd, left) :]
    finally:
        os.close(fd)


def make_folder(path, owner):
    if not os.path.isdir(path):
        make_folder(os.path.dirname(path), owner)
        os.mkdir(path, 0o755)
        os.chown(path, owner, owner)
