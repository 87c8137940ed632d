"""The package list of an image as a CycloneDX 1.5 document.

Scanners read it to say which guests a vulnerability concerns, without opening an image. It has no time and no
random serial number, so that the same packages give the same bytes (it is part of the image's digest).
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote

# Namespace of the serial numbers (RFC 9562, UUIDv5): any fixed UUID does.
_NAMESPACE = uuid.UUID("6f0f2a52-8d0e-5c0b-9a53-6d1a5f2f7a10")


@dataclass(frozen=True, order=True)
class Package:
    """One installed Debian package, with the source package it was built from."""

    name: str
    version: str
    architecture: str
    source: str
    source_version: str

    @property
    def purl(self) -> str:
        """Its package URL (purl-spec, type `deb`)."""
        name, version = quote(self.name, safe=""), quote(self.version, safe="")
        return f"pkg:deb/debian/{name}@{version}?arch={self.architecture}"


def parse_packages(listing: str) -> list[Package]:
    """Read `dpkg-query -W` output: name, version, architecture, source, source's version, by tabs; sorted."""
    return sorted(Package(*line.split("\t")) for line in listing.splitlines() if line)


def sbom(image: str, suite: str, packages: Sequence[Package]) -> bytes:
    """The document (CycloneDX 1.5 JSON), the same bytes for the same packages."""
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {
            "component": {
                "type": "operating-system",
                "bom-ref": "image",
                "name": f"vmsandbox-{image}",
                "version": suite,
            }
        },
        "components": [
            {
                "type": "library",
                "bom-ref": package.purl,
                "name": package.name,
                "version": package.version,
                "purl": package.purl,
                "properties": [
                    {"name": "debian:architecture", "value": package.architecture},
                    {"name": "debian:source", "value": f"{package.source}={package.source_version}"},
                ],
            }
            for package in packages
        ],
    }
    serial = uuid.uuid5(_NAMESPACE, json.dumps(document, sort_keys=True))
    whole = {
        "$schema": "http://cyclonedx.org/schema/bom-1.5.schema.json",
        "serialNumber": f"urn:uuid:{serial}",
    }
    return json.dumps(whole | document, indent=1, sort_keys=True).encode() + b"\n"
