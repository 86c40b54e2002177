#!/bin/sh
# Prints the path of an nginx that can store uploads (its module for WebDAV): the system's own, else
# Debian's, which is unpacked into target/test-tools and neither installed nor started.
#
# usage: benches/nginx.sh [FOLDER]     (default: $SCCACHE_ACTION_TEST_TOOLS, else target/test-tools)
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
tools=${1:-${SCCACHE_ACTION_TEST_TOOLS:-$root/target/test-tools}}

can_store() { "$1" -V 2>&1 | grep -q http_dav_module; }

for nginx in "$(command -v nginx || true)" "$tools/nginx/usr/sbin/nginx"; do
    if [ -x "$nginx" ] && can_store "$nginx"; then
        echo "$nginx"
        exit
    fi
done

mkdir -p "$tools"
# Made in a folder of its own and renamed into place, so that nothing is left half made.
staging=$(mktemp -d "$tools/.staging.XXXXXX")
trap 'rm -rf "$staging"' EXIT
trap 'exit 130' INT TERM
as_root=
[ "$(id -u)" -eq 0 ] || as_root=sudo
mkdir "$staging/package"
# apt's download user must be able to write here.
chmod 755 "$staging" "$staging/package"
cd "$staging/package"
apt-get download -qq nginx >&2 2>/dev/null || {
    $as_root apt-get update -qq >&2
    apt-get download -qq nginx >&2
}
dpkg-deb -x ./*.deb "$staging/nginx"
can_store "$staging/nginx/usr/sbin/nginx" || {
    echo "this nginx does not run here or has no ngx_http_dav_module" >&2
    exit 1
}
rm -rf "$tools/nginx"
mv "$staging/nginx" "$tools/nginx"
echo "$tools/nginx/usr/sbin/nginx"
