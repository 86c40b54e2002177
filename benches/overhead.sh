#!/bin/bash
# What the action costs a job: size and start of the binary, the set-up, and the wrapper around
# sccache, next to what they are added to.
#
# usage: benches/overhead.sh      (needs tests/tools.sh to have run, and dist/ to be built)
set -euo pipefail
cd "$(dirname "$0")/.."

RUNS=15
FILES=200
binary=$PWD/dist/sccache-action-linux-x64
sccache=${SCCACHE_ACTION_TEST_TOOLS:-$PWD/target/test-tools}/sccache-0.16.0/bin/sccache
work=$(mktemp -d)
trap 'for s in "$work"/job/stop "$work"/stop; do [ -x "$s" ] && "$s"; done > /dev/null 2>&1; rm -rf "$work"' EXIT

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
}

printf '%-46s %9s bytes\n' 'binary, static' "$(stat -c %s "$binary")"
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
        INPUT_WRAP="$1" INPUT_INSTALL-FROM=pip node dist/main.js
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
awk "BEGIN { printf \"%-46s %9.2f ms a compile, ratio %.2f\n\", \"wrapper less sccache\'s client\", \
    ($micros - $alone) / 1000 / $FILES, $micros / $alone }"

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
}
costs 'a warm compile through sccache' "$sccache" gcc -c "$work/1.c" -o "$work/1.o"
costs 'a warm compile through the wrapper' "$wrapper" gcc -c "$work/1.c" -o "$work/1.o"
