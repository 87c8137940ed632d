"""Requests that carry something, in each of the usual encodings."""

from __future__ import annotations

import base64
import gzip
import json
import zlib
from collections.abc import Callable
from urllib.parse import quote, quote_plus

import brotli
import zstandard

from vmsandbox.egress.content import Content, Outgoing
from vmsandbox.egress.values import BrokerConfig, Destination, Dlp, EgressPolicy

TO = Destination("api.example.org", 443)
VALUE = "Zx7-qP/2+mK9=wv4"
GITHUB = "ghp_" + "a8F3kd93JdkfQ02mXn4Vb7Zs1Lq9Wt6Yp0Rc"


def content_for(value: str = VALUE, canaries: tuple[str, ...] = (), dlp: Dlp | None = None) -> Content:
    return Content(BrokerConfig("s", EgressPolicy(dlp=dlp or Dlp()), {"KEY": value}, canaries, "", ""))


def post(content: Content, body: bytes, encoding: str = "", path: str = "/v1") -> Outgoing:
    headers = [("content-type", "application/octet-stream")]
    if encoding:
        headers.append(("content-encoding", encoding))
    return content.outgoing(TO, "POST", path, headers, body)


def utf16(value: bytes) -> bytes:
    return value.decode().encode("utf-16-le")


def wrapped(value: bytes) -> bytes:
    return base64.encodebytes(b"x" * 50 + value)


def multipart(value: bytes) -> bytes:
    head = b'--b\r\nContent-Disposition: form-data; name="a"\r\nContent-Encoding: gzip\r\n\r\n'
    return head + gzip.compress(value) + b"\r\n--b--\r\n"


def json_in_json(value: bytes) -> bytes:
    return json.dumps({"a": json.dumps({"b": value.decode()})}).encode()


def all_escaped(value: bytes) -> bytes:
    return b'"' + b"".join(b"\\u%04x" % code for code in value) + b'"'


ENCODINGS: dict[str, Callable[[bytes], bytes]] = {
    "as it is": bytes,
    "base64": base64.b64encode,
    "base64 one on": lambda value: base64.b64encode(b"x" + value + b"yz"),
    "base64 two on": lambda value: base64.b64encode(b"xy" + value + b"z"),
    "base64 for addresses": lambda value: base64.urlsafe_b64encode(b"x" + value),
    "base64 in lines": wrapped,
    "base64 in lines in JSON": lambda value: json.dumps(wrapped(value).decode()).encode(),
    "base64 twice": lambda value: base64.b64encode(b"user:" + base64.b64encode(value)),
    "base64 of hex": lambda value: base64.b64encode(value.hex().encode()),
    "base64 of JSON": lambda value: base64.b64encode(json_in_json(value)),
    "base64 of gzip": lambda value: base64.b64encode(gzip.compress(value)),
    "base64 of zlib": lambda value: base64.b64encode(zlib.compress(b"a text: " + value)),
    "base64 of UTF-16": lambda value: base64.b64encode(utf16(value * 2)),
    "percent where needed": lambda value: quote(value).encode(),
    "percent of all": lambda value: b"".join(b"%%%02x" % code for code in value),
    "percent twice": lambda value: quote(quote(value, safe=""), safe="").encode(),
    "form": lambda value: b"a=" + quote_plus(value).encode() + b"&b=",
    "form of base64": lambda value: b"a=" + quote_plus(base64.b64encode(value)).encode() + b"&b=",
    "hex": lambda value: value.hex().encode(),
    "upper hex": lambda value: value.hex().upper().encode(),
    "hex escapes": lambda value: b"'" + b"".join(b"\\x%02x" % code for code in value) + b"'",
    "JSON": lambda value: json.dumps(value.decode()).encode(),
    "JSON in JSON": json_in_json,
    "JSON, all escaped": all_escaped,
    "JSON with escaped slashes": lambda value: json.dumps(value.decode()).replace("/", "\\/").encode(),
    "gzip": gzip.compress,
    "gzip in gzip": lambda value: gzip.compress(gzip.compress(value)),
    "zstd": zstandard.compress,
    "part of multipart": multipart,
}
HEADS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "br": brotli.compress,
    "zstd": zstandard.compress,
    "gzip, br": lambda value: brotli.compress(gzip.compress(value)),
    "deflate, identity": lambda value: zlib.compress(value, wbits=-15),
}
