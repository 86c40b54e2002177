#!/bin/bash
# What the action costs a job: size and start of the binary, the set-up, and the wrapper around
# sccache, next to what they are added to.
#
# usage: benches/overhead.sh [--json FILE]     (needs tests/tools.sh to have run, and dist/ to be built)
set -euo pipefail
json=
if [ "${1:-}" = --json ]; then
    json=$(realpath -m "$2")
fi
cd "$(dirname "$0")/.."

RUNS=15
FILES=200
binary=$PWD/dist/sccache-action-linux-x64
sccache=${SCCACHE_ACTION_TEST_TOOLS:-$PWD/target/test-tools}/sccache-0.16.0/bin/sccache
work=$(mktemp -d)
trap 'for s in "$work"/job/stop "$work"/stop; do [ -x "$s" ] && "$s"; done > /dev/null 2>&1; rm -rf "$work"' EXIT

# row NAME VALUE UNIT: a row for --json.
rows=()
row() { rows+=("    {\"name\":\"$1\",\"unit\":\"$3\",\"value\":$2}"); }

# median NAME COMMAND...: the median time of RUNS runs, in microseconds, printed in milliseconds.
median() {
    local name=$1 times=() begin
    shift
    for _ in $(seq $RUNS); do
        begin=$(date +%s%N)
        "$@" > /dev/null 2>&1 || true
        times+=($((($(date +%s%N) - begin) / 1000)))
    done
    micros=$(printf '%s\n' "${times[@]}" | sort -n | sed -n "$((RUNS / 2 + 1))p")
    printf '%-46s %9s ms\n' "$name" "$(awk "BEGIN { printf \"%.1f\", $micros / 1000 }")"
    row "$name" "$(awk "BEGIN { printf \"%.3f\", $micros / 1000 }")" ms
}

printf '%-46s %9s bytes\n' 'binary, static' "$(stat -c %s "$binary")"
row 'binary, static' "$(stat -c %s "$binary")" bytes
median 'start of a process (true)' /bin/true
median 'start of the binary (--version)' "$binary" --version
median 'start of node' node -e 0
median 'launcher and binary (setup refuses an input)' \
    env -i PATH="$PATH" INPUT_MODE=none node dist/main.js

# A set-up with sccache in the tool cache, in a new job each time.
job() {
    rm -rf "$work/job"
    mkdir -p "$work/job"
    env -i PATH="$PATH" HOME="$HOME" RUNNER_TOOL_CACHE="$work/tools" RUNNER_TEMP="$work/job" \
        GITHUB_ENV="$work/job/env" GITHUB_PATH="$work/job/path" GITHUB_STATE="$work/job/state" \
        GITHUB_OUTPUT="$work/job/output" SCCACHE_DIR="$work/disk" INPUT_MODE=local \
        INPUT_WRAP="$1" INPUT_VERSION=0.16.0 INPUT_INSTALL-FROM=pip node dist/main.js
    port=$(grep -A1 '^SCCACHE_SERVER_PORT<<' "$work/job/env" | tail -n 1)
}
stop() { SCCACHE_SERVER_PORT=$port "$sccache" --stop-server; }
setup() { job "$1" && stop; }
job none > /dev/null && stop > /dev/null 2>&1
plain_start() {
    export SCCACHE_SERVER_PORT=45871
    SCCACHE_DIR="$work/disk" "$sccache" --start-server && "$sccache" --stop-server
    unset SCCACHE_SERVER_PORT
}
median 'sccache alone: start and stop of its server' plain_start
median 'whole set-up without a probe, and stop' setup none
median 'whole set-up with a rustc probe, and stop' setup rust

# Compiles answered from a warm local cache.
job none > /dev/null
printf '#!/bin/sh\nSCCACHE_SERVER_PORT=%s %s --stop-server\n' "$port" "$sccache" > "$work/stop"
chmod +x "$work/stop"
export SCCACHE_SERVER_PORT=$port
wrapper=$(find "$work/job" -path '*/bin/sccache')
for i in $(seq $FILES); do echo "int f$i(void) { return $i; }" > "$work/$i.c"; done
compiles() { for i in $(seq $FILES); do "$@" gcc -c "$work/$i.c" -o "$work/$i.o"; done; }
compiles "$sccache"
RUNS=5
median "$FILES warm compiles through sccache" compiles "$sccache"
alone=$micros
median "$FILES warm compiles through the wrapper" compiles "$wrapper"
awk "BEGIN { printf \"%-46s %9.2f ms a compile, ratio %.2f\n\", \"wrapper less the client\", \
    ($micros - $alone) / 1000 / $FILES, $micros / $alone }"
row 'wrapper less the client' "$(awk "BEGIN { printf \"%.3f\", ($micros - $alone) / 1000 / $FILES }")" \
    'ms a compile'

# A configure script as autoconf writes them: programs that are there and not, each asked for by a compile.
# A third fails, and another is linked and so never in the cache.
configure() (
    rm -rf "$work/configure" && mkdir "$work/configure" && cd "$work/configure"
    "$@" gcc --version
    for header in stdio stdlib string unistd stdint inttypes sys/stat sys/types sys/time sys/socket netdb \
        pthread dlfcn locale poll termios none1 none2 none3 sys/none4 sys/none5 none6 none7 none8 none9; do
        printf '#include <%s.h>\nint main(void) { return 0; }\n' "$header" > conftest.c
        "$@" gcc -c -g -O2 conftest.c -o conftest.o || true
    done
    for function in strdup strnlen memmem mmap fork poll select getline dlopen setlocale fsync openat \
        strlcpyx memfrobx arc4x getx1 getx2 getx3; do
        printf 'char %s(void);\nint main(void) { return %s(); }\n' "$function" "$function" > conftest.c
        "$@" gcc -g -O2 -o conftest conftest.c || true
    done
    for type in int long size_t ssize_t off_t uint64_t none_t other_t; do
        printf '#include <stdint.h>\n#include <sys/types.h>\nint main(void) { return sizeof(%s); }\n' \
            "$type" > conftest.c
        "$@" gcc -c -g -O2 conftest.c -o conftest.o || true
    done
    for flag in -Wall -Wextra -fPIC -fno-common -fnone1 -fnone2; do
        echo 'int x;' > conftest.c
        "$@" gcc -c -g -O2 "$flag" conftest.c -o conftest.o || true
    done
)
against_bare() { awk "BEGIN { printf \"%-46s %9.2f\n\", \"$1\", $micros / $bare }"; }
median 'a configure of 58 probes, bare' configure env
bare=$micros
median 'the same through the wrapper' configure "$wrapper"
against_bare '  ratio'

# What one such compile costs the calling process, apart from time.
costs() {
    local name=$1 faults=- instructions=-
    shift
    if command -v perf > /dev/null; then
        faults=$(perf stat -x , -e page-faults "$@" 2>&1 > /dev/null | cut -d , -f 1)
    fi
    if command -v valgrind > /dev/null; then
        instructions=$(valgrind --tool=callgrind --callgrind-out-file=/dev/null "$@" 2>&1 > /dev/null |
            sed -n 's/.*Collected : //p')
    fi
    printf '%-46s %9s page faults, %s instructions\n' "$name" "$faults" "$instructions"
    row "$name" "$(or_null "$faults")" 'page faults'
    row "$name" "$(or_null "$instructions")" instructions
}
or_null() { case $1 in '' | *[!0-9]*) echo null ;; *) echo "$1" ;; esac; }
costs 'a warm compile through sccache' "$sccache" gcc -c "$work/1.c" -o "$work/1.o"
costs 'a warm compile through the wrapper' "$wrapper" gcc -c "$work/1.c" -o "$work/1.o"

if [ -n "$json" ]; then
    mkdir -p "$(dirname "$json")"
    {
        printf '{\n  "bench": "overhead",\n  "settings": {"files":%s},\n  "rows": [\n' "$FILES"
        (IFS=$'\n' && printf '%s\n' "${rows[*]}") | sed '$!s/$/,/'
        printf '  ]\n}\n'
    } > "$json"
fi
