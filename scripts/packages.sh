#!/bin/sh
# Debian packages that vmsandbox needs before it can help itself (`vmsandbox doctor --fix` does the rest).
# As root: installs exactly those that are missing. As anyone else: prints the line that would, and fails.
# Quick when all is there: no apt. Arguments: further packages.
set -eu
python=${PYTHON:-python3}

# Looked for by what they do: a Python of one's own brings these along.
if ! command -v "$python" > /dev/null; then
    missing="python3 python3-venv python3-dev"
else
    missing=$("$python" - << 'PYTHON'
import importlib.util, os, sys, sysconfig
if sys.version_info < (3, 11):
    sys.exit(f"Python {sys.version.split()[0]} is too old: 3.11 or newer is needed (PYTHON=… chooses another)")
if importlib.util.find_spec("ensurepip") is None:
    print("python3-venv")
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    print("python3-dev")
PYTHON
    )
fi

if ! command -v dpkg-query > /dev/null; then
    echo "not a Debian: install QEMU, libvirt with its headers, mmdebstrap, a C compiler and pkg-config yourself" >&2
    exit 0
fi

# libvirt-dev, pkg-config, gcc: libvirt's Python bindings are compiled against the libvirt that is here.
# iptables, nftables, dnsmasq-base: the network card of `--net filtered`. uidmap: images built without root. gpg, debian-archive-keyring: mmdebstrap finds the keys for Debian with them.
wanted="qemu-system-x86 qemu-utils libvirt-daemon-system libvirt-clients mmdebstrap e2fsprogs uidmap
    gpg openssh-client rsync git iptables nftables dnsmasq-base iproute2 libvirt-dev pkg-config gcc libc6-dev ca-certificates debian-archive-keyring $*"
# shellcheck disable=SC2086 # words on purpose
installed=$(dpkg-query -W -f '${db:Status-Status} ${Package}\n' $wanted 2> /dev/null | sed -n 's/^installed //p')
for package in $wanted; do
    printf '%s\n' "$installed" | grep -qx -- "$package" || missing="$missing $package"
done
missing=$(echo $missing)
[ -n "$missing" ] || exit 0

if [ "$(id -u)" != 0 ]; then
    echo "packages are missing. As root:" >&2
    echo "  apt-get update && apt-get install --no-install-recommends $missing" >&2
    exit 1
fi
echo "== installing Debian packages: $missing"
export DEBIAN_FRONTEND=noninteractive
# A fresh machine has no package lists, an old one has outdated ones.
# shellcheck disable=SC2086 # words on purpose
apt-get install -y -q --no-install-recommends $missing || {
    apt-get update -q
    apt-get install -y -q --no-install-recommends $missing
}
