"""Keys of known shapes are refused; ordinary work, which is full of what looks like them, is let through."""

from __future__ import annotations

import base64
import io
import json
import random
import string
import zipfile
from pathlib import Path

import pytest
from leaking import ENCODINGS, GITHUB, content_for, post

from vmsandbox.egress.canaries import new_canaries
from vmsandbox.egress.shapes import REFUSED
from vmsandbox.egress.values import Dlp
from vmsandbox.review.secret_shapes import shapes

ROOT = Path(__file__).parents[2]

KEYS = {
    "GitHub token": GITHUB,
    "Anthropic key": "sk-ant" "-api03-Kd83jfLs02mXn4Vb7Zs1Lq9Wt6Yp0RcA8F3kd93Jdkf",
    "OpenAI key": "sk-proj" "-Kd83jfLs02mXn4Vb7Zs1Lq9Wt6Yp0RcA8F3kd93Jdkf",
    "AWS access key id": "AKIA" "Q3EGR7LMZ5KXTB2W",
    "AWS secret key": "aws_secret_access_key = Kd83jfLs02mXn4Vb7Zs1Lq9Wt6Yp0RcA8F3kd93J",
    "Slack token": "xoxb" "-204738291-0938475610-Kd83jfLs02mXn4Vb7Zs1Lq9W",
    "Stripe key": "sk_live" "_Kd83jfLs02mXn4Vb7Zs1Lq9W",
    "PyPI token": "pypi" "-AgEIcHlwaS5vcmcCJDk4NzY1NDMyLWFiY2QtNGVmNi04OTAxLTIzNDU2Nzg5YWJjZAACKlszLCJk",
    "npm token": "npm" "_Kd83jfLs02mXn4Vb7Zs1Lq9Wt6Yp0RcA8F3k",
    "Hugging Face token": "hf_KdjfLsmXnVbZsLqWtYpRcAFkdJdkfQmXnVb"[:37],
    "DigitalOcean token": "dop_v1_" + "3f9ab27c51d80e64" * 4,
    "private key": "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAEbm9uZQAAAAAAAA\n",
}  # fmt: skip


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize(
    "wrap", ["as it is", "JSON", "JSON in JSON", "base64", "base64 of JSON", "hex", "gzip", "percent of all"]
)
def test_keys_of_known_shapes_are_refused(name: str, wrap: str) -> None:
    found = post(content_for(), b'{"text": "' + ENCODINGS[wrap](KEYS[name].encode()) + b'"}')
    assert found.decision.rule == "dlp" and name in found.events[0].more["what"], found
    assert KEYS[name] not in str(found.events) + str(found.decision)
    assert json.loads(found.decision.remedy) == {"sandbox": {"network": {"dlp": {"secrets": False}}}}
    assert post(content_for(dlp=Dlp(secrets=False)), KEYS[name].encode()).decision.allowed


SAMPLES = [
    "AKIAIOSFODNN7EXAMPLE", "aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "ghp_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx", "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
    "sk-ant-api03-your-key-goes-here-0123456789", "sk-proj-xxxxxxxxxxxxxxxxxxxxxxxxxxx",
    "sk_test_4eC39HqLyjWDarjtT1zdp7dc",
    '"-----BEGIN PRIVATE KEY-----\\nMIIE..."', "-----BEGIN RSA PRIVATE KEY-----", "postgres://user:password@localhost/db",
    "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U",
    ".sk-admin-panel-header-container-wrapper-v2 {", "api_key = 'Kd83jfLs02mXn4Vb7Zs1Lq9Wt6Yp0RcA8F3k'",
    'password: "correct horse battery staple 1"', "glft-some-long-identifier-of-a-class",
    "AIzaSyD-9tSrke72PouQMnMX-a7eZSW0jkFMBWY",
    "hvs.some_function_of_a_module_with_a_name", "SK" + "0123456789abcdef" * 2, "key-" + "0123456789abcdef" * 2,
    'pattern: \'\\bsk-ant-[a-z0-9]{2,10}-[A-Za-z0-9_\\-]{20,}\'',
]  # fmt: skip


def test_a_sample_on_the_same_line_hides_no_key() -> None:
    for sample, key in ((SAMPLES[0], KEYS["AWS access key id"]), (SAMPLES[2], GITHUB)):
        assert post(content_for(), f"{sample} {sample}".encode()).decision.allowed
        assert not post(content_for(), f"{sample} {sample} {key}".encode()).decision.allowed


@pytest.mark.parametrize("text", SAMPLES)
def test_samples_and_what_only_looks_random_are_let_through(text: str) -> None:
    for body in (text.encode(), json.dumps({"content": text}).encode()):
        found = post(content_for(), body)
        assert found.decision.allowed, found.decision.reason


def test_ordinary_work_is_let_through() -> None:
    """Source code, tests, lock files and pictures, as a model's API gets them."""
    content = content_for(canaries=new_canaries(6))
    sources = [*ROOT.glob("vmsandbox/**/*.py"), *ROOT.glob("vmsandbox/**/*.yaml"), *ROOT.glob("*.md")]
    sources += [*Path(json.__file__).parent.parent.glob("*.py")]
    assert len(sources) > 200
    for path in sources:
        text = path.read_bytes().decode("utf-8", "replace")
        found = post(content, json.dumps({"messages": [{"content": json.dumps({"file": text})}]}).encode())
        assert found.decision.allowed, (path, found.decision.reason)


def test_lock_files_pictures_archives_and_minified_scripts_are_let_through() -> None:
    random.seed(1)
    noise = random.Random(2)
    lock = {
        f"node_modules/p{n}": {
            "resolved": f"https://registry.example.org/p{n}/-/p{n}-1.{n}.0.tgz",
            "integrity": "sha512-" + base64.b64encode(noise.randbytes(64)).decode(),
        }
        for n in range(3000)
    }
    hashes = "\n".join(f"six=={n} --hash=sha256:{noise.randbytes(32).hex()}" for n in range(3000))
    names = ["".join(noise.choices(string.ascii_letters + "_$", k=noise.randint(1, 12))) for _ in range(2000)]
    minified = "".join(
        f"function {noise.choice(names)}(){{return {noise.choice(names)}.{noise.choice(names)}-1}};"
        for _ in range(30_000)
    )
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("a.txt", minified)
    picture = {"image": "data:image/png;base64," + base64.b64encode(noise.randbytes(3 << 20)).decode()}
    content = content_for(canaries=new_canaries(6))
    for body in (json.dumps(lock), hashes, minified, json.dumps(picture), archive.getvalue(), noise.randbytes(3 << 20)):
        found = post(content, body if isinstance(body, bytes) else body.encode())
        assert found.decision.allowed, found.decision.reason


def test_a_key_by_chance_in_base64_is_none_but_beside_it_is_one() -> None:
    noise = base64.b64encode(random.Random(3).randbytes(3000)).decode().replace("=", "")
    by_chance = noise[:2000] + "/AKIAQ3EGR7LMZ5KXTB2W/" + noise[2000:]
    assert post(content_for(), by_chance.encode()).decision.allowed
    assert not post(content_for(), f"{noise}/{GITHUB}/{noise}".encode()).decision.allowed  # no letter of base64
    assert not post(content_for(), f"{noise} AKIAQ3EGR7LMZ5KXTB2W {noise}".encode()).decision.allowed


def test_every_shape_that_is_refused_is_on_the_list_of_shapes() -> None:
    assert {shape.name for shape in shapes()} >= REFUSED
    assert not any("assignment" in name or "URL" in name for name in REFUSED)
