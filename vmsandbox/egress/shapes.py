"""Which keys of known shapes may not leave a guest.

Requests to a model carry source code, lock files and transcripts. If everything that a review marks in added lines were
refused here, no agent could work: a review's false alarm costs a glance, this one ends the conversation. So a shape
refuses only where its issuer's prefix and length say it, and only if it is not a sample. What is left out on purpose:

- guesses by entropy (`secret in an assignment`), and `password in a URL`: test set-ups are full of them;
- JSON web tokens: samples are everywhere, and registries hand them to anonymous clients;
- what is public by design: Google API keys of web pages, Twilio's SIDs, Stripe's test keys;
- hex strings that any hash looks like: Mailgun, Mailchimp; and `EAAA…` (Square), which is zeros in base64.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any, NamedTuple

from vmsandbox.review.linear import compiled, one_line_end
from vmsandbox.review.secret_shapes import shapes

REFUSED = frozenset({
    "AWS access key id", "AWS secret key", "GitHub token", "GitLab token", "Slack token", "Slack app token",
    "Slack webhook", "Discord webhook", "Stripe key", "Stripe webhook secret", "Google OAuth secret",
    "Google OAuth token", "age secret key", "npm token", "npm registry password", "PyPI token", "RubyGems key",
    "crates.io token", "Docker Hub token", "Anthropic key", "OpenAI key", "OpenRouter key", "Hugging Face token",
    "Groq key", "Azure storage key", "Azure client secret", "DigitalOcean token", "Heroku key",
    "HashiCorp Vault token", "Terraform Cloud token", "SendGrid key", "Telegram bot token", "Shopify token",
    "Databricks token", "Grafana token", "New Relic key", "Linear key", "Postman key", "Doppler token",
    "Supabase key", "Cloudflare key", "Sentry token",
})  # fmt: skip
_SAMPLES = (
    "example", "changeme", "placeholder", "your", "xxxx", "dummy", "redacted", "sample", "_test_", "fake", "00000000",
    "abcdefgh", "12345678", "01234567",
    "eby8vdm02xnocqflquwjplmetlcdxj1ouzft50usrz6ifsufq2uvercz4i6tq",  # Azurite's and the storage emulator's own
)  # fmt: skip
_SHOWN = 4  # characters of a secret
_DISTINCT = 8
_BASE64_RUN = 300  # letters: in so long a text, three or four of them are anything by chance
_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_GAP = rb"""[\s\\nrt"'`+,;()]{1,40}"""
# The marker alone is in every program that reads keys: the key's first line has to follow.
_MARKERS = (b"PRIVATE KEY", b"Private-Lines")
_PRIVATE_KEY = re.compile(
    rb"-----BEGIN (?:[A-Z0-9]{1,12} ){0,4}PRIVATE KEY(?: BLOCK)?-----" + _GAP + rb"([A-Za-z0-9+/]{48})"
    rb"|Private-Lines: [0-9]{1,3}" + _GAP + rb"([A-Za-z0-9+/]{48})"
)


class Shaped(NamedTuple):
    """Something of a known shape. begins: what may be shown of it."""

    name: str
    begins: str


def shaped_secret(data: bytes) -> Shaped | None:
    """The first key or token of a known shape, or None."""
    for match in _PRIVATE_KEY.finditer(data) if any(marker in data for marker in _MARKERS) else ():
        if _is_varied((match[1] or match[2]).decode()):
            return Shaped("private key", "-----BEGIN")
    lines = one_line_end(data)
    any_of_them, patterns = _refused()
    for name, pattern in patterns if any_of_them.search(lines) is not None else ():
        # Every match, not the first of a line: a body of JSON is one line, and may begin with a sample.
        for match in pattern.finditer(lines):
            start, end = match.span()
            text = lines[start:end].decode("utf-8", "replace")
            if _is_issued(text) and not _is_within_base64(lines, start, end):
                return Shaped(name, text[:_SHOWN])
    return None


@cache
def _refused() -> tuple[Any, list[tuple[str, Any]]]:
    """(one pattern for all of them, (name, pattern) of each)."""
    chosen = [(shape.name, shape.pattern.source) for shape in shapes() if shape.name in REFUSED]
    return compiled("|".join(source for _, source in chosen)), [(name, compiled(source)) for name, source in chosen]


def _is_issued(text: str) -> bool:
    """Whether it looks made by an issuer: not a sample, and not words (`sk-admin-panel-header-container`)."""
    low = text.lower()
    return not any(sample in low for sample in _SAMPLES) and _is_varied(text)


def _is_varied(text: str) -> bool:
    if len(set(text)) < _DISTINCT:
        return False
    digits = sum(map(str.isdigit, text))
    upper, lower = sum(map(str.isupper, text)), sum(map(str.islower, text))
    if digits >= 2 and upper >= 2 and lower >= 2:
        return True
    return any(map(_is_random_run, re.split(r"[^A-Za-z0-9]+", text)))


def _is_random_run(text: str) -> bool:
    """Letters and digits as no word has them: of hex, of base32 (which may have no digit), of letters in both cases."""
    if len(text) >= 16 and not text.isalpha() and not text.isdigit():
        return True
    if len(text) >= 20 and text.isupper():
        return True
    upper = sum(map(str.isupper, text))
    return len(text) >= 30 and 4 <= upper <= len(text) - 4


def _is_within_base64(data: bytes, start: int, end: int) -> bool:
    before, after = data[max(0, start - _BASE64_RUN) : start], data[end : end + _BASE64_RUN]
    around = len(before) - len(before.rstrip(_BASE64)) + len(after) - len(after.lstrip(_BASE64))
    return end - start + around > _BASE64_RUN and not data[start:end].strip(_BASE64)
