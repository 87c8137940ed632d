#!/bin/sh
# The last customize hook of an image's build: finish.sh ROOT (called by mmdebstrap, as root or in its user namespace).
# It runs the recipe's own commands, takes out all that must not be shared between guests or differs between two
# builds, and makes the ext4 file system with the guest's own mke2fs (the host's may be too old to be reproducible).
#
# Reads   ROOT/.vmsandbox/: run/NNN, enable, disable, sources.list, pyc_trust.py
#         environment: SOURCE_DATE_EPOCH, VMSANDBOX_DISK, VMSANDBOX_UUID, VMSANDBOX_INITRAMFS, VMSANDBOX_OUT
# Leaves  root mode: the files in $VMSANDBOX_OUT; otherwise ROOT/.vmsandbox/out.tar (sparse)
set -eu
root=$1
work=$root/.vmsandbox
out=$work/out
mkdir "$out"

say() { echo "I: $*" >&2; }
die() { echo "E: $*" >&2; exit 1; }
inside() {
    chroot "$root" /usr/bin/env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root \
        LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive SOURCE_DATE_EPOCH="$SOURCE_DATE_EPOCH" "$@"
}

while read -r unit; do inside systemctl --quiet disable "$unit"; done < "$work/disable"
while read -r unit; do inside systemctl --quiet enable "$unit"; done < "$work/enable"
for command in "$work"/run/*; do
    [ -e "$command" ] || continue
    say "running the recipe's command ${command##*/}"
    inside sh -e "/.vmsandbox/run/${command##*/}"
done
[ ! -x "$root/usr/bin/python3" ] || inside python3 /.vmsandbox/pyc_trust.py

say "taking out keys, identities, logs and caches"
cd "$root"
rm -rf etc/ssh/ssh_host_* root/.ssh var/cache/apt var/lib/apt/lists var/cache/debconf/*-old var/lib/dpkg/*-old \
    var/cache/ldconfig/aux-cache var/lib/dbus/machine-id var/lib/systemd/random-seed \
    etc/passwd- etc/group- etc/shadow- etc/gshadow- etc/subuid- etc/subgid- vmlinuz* initrd.img* \
    usr/share/man/* usr/share/locale/* usr/share/info/*
find usr/share/doc ! -type d ! -name copyright -delete
find usr/share/doc -type d -empty -delete
mkdir -p var/cache/apt/archives/partial var/lib/apt/lists/partial
find var/log -type f -delete
: > etc/machine-id
: > etc/resolv.conf # the build host's
echo sandbox > etc/hostname
sed -i 's/^root::/root:*:/' etc/passwd
[ ! -e etc/shadow ] || sed -i 's/^root:[^:]*:/root:*:/' etc/shadow
rm -rf etc/apt/sources.list etc/apt/sources.list.d/*
cp "$work/sources.list" etc/apt/sources.list # the mirror of the build must not show in the digest

say "collecting kernel, initramfs parts and package list"
for kernel in boot/vmlinuz-*; do
    [ ! -e "$out/vmlinuz" ] || die "more than one kernel is installed"
    [ -e "$kernel" ] || die "no kernel is installed: add linux-image-cloud-amd64 to the recipe's packages"
    cp "$kernel" "$out/vmlinuz"
    version=${kernel#boot/vmlinuz-}
    printf '%s\n' "$version" > "$out/kernel-version"
done
if [ "$VMSANDBOX_INITRAMFS" = stock ]; then
    cp "boot/initrd.img-$version" "$out/initrd.stock"
else
    [ -x usr/bin/busybox ] || die "no busybox: add busybox-static to the recipe's packages"
    cp usr/bin/busybox "$out/busybox"
    for module in "usr/lib/modules/$version/kernel/drivers/block/virtio_blk.ko"*; do
        [ ! -e "$module" ] || cp "$module" "$out/${module##*/}"
    done
fi
inside dpkg-query -W -f '${Package}\t${Version}\t${Architecture}\t${source:Package}\t${source:Version}\n' > "$out/packages"

[ -e usr/lib/x86_64-linux-gnu/libarchive.so.13 ] || [ -e usr/lib/aarch64-linux-gnu/libarchive.so.13 ] \
    || die "no libarchive, which mke2fs needs: add libarchive13t64 to the recipe's packages"
# mmdebstrap keeps services from starting with a policy-rc.d and a false start-stop-daemon: neither is for the image
say "making the file system"
mkdir "$work/view"
mount --bind "$root" "$work/view" # without the mounts below it: /proc and /sys as the empty folders they are
{
    tar -C "$work/view" --one-file-system --sort=name --numeric-owner --clamp-mtime --mtime="@$SOURCE_DATE_EPOCH" \
        --format=posix --pax-option=delete=atime,delete=ctime --xattrs --xattrs-include=security.capability \
        --exclude='./.vmsandbox' --exclude='./boot/*' --exclude='./dev/*' --exclude='./proc/*' --exclude='./sys/*' \
        --exclude='./run/*' --exclude='./tmp/*' --exclude='./etc/apt/apt.conf.d/00mmdebstrap' \
        --exclude='./usr/sbin/policy-rc.d' --exclude='./usr/sbin/start-stop-daemon' \
        --transform='flags=r;s,^\./usr/sbin/start-stop-daemon\.REAL$,./usr/sbin/start-stop-daemon,' \
        -cf - . || echo $? > "$work/tar-failed"
} | inside mke2fs -q -t ext4 -m 0 -O ^has_journal -U "$VMSANDBOX_UUID" \
    -E "hash_seed=$VMSANDBOX_UUID,root_owner=0:0,assume_storage_prezeroed=1" -d - /.vmsandbox/out/root.ext4 "$VMSANDBOX_DISK"
umount "$work/view"
[ ! -e "$work/tar-failed" ] || die "the root file system could not be read whole"

if [ "$MMDEBSTRAP_MODE" = root ]; then
    mv "$out"/* "$VMSANDBOX_OUT"/ # the same file system: a rename
else
    say "packing"
    tar -S -C "$out" -cf "$work/out.tar" .
    rm -rf "$out"
fi
