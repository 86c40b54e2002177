//! The table of calls for which sccache's key is wrong (`src/wrapper/wrong_keys.rs`), with the real
//! sccache in all versions that `tests/tools.sh` fetches: after one call, another that sccache
//! itself would answer with the first one's results, or without a file that the compiler writes.

use std::fs;
use std::path::Path;

use crate::support::outcome::{Outcome, outcome, shown};
use crate::support::runner::Job;
use crate::support::tools;

/// Two calls, one after the other, each in a folder of the same path that is made again; `$W` is nothing or `sccache`.
struct Pair {
    name: &'static str,
    first: &'static str,
    second: &'static str,
}

const fn pair(name: &'static str, first: &'static str, second: &'static str) -> Pair {
    Pair {
        name,
        first,
        second,
    }
}

/// The same call twice: what the first wrote, the second writes too.
const fn again(name: &'static str, call: &'static str) -> Pair {
    pair(name, call, call)
}

const PAIRS: &[Pair] = &[
    pair(
        "a precompiled header whose own header changed",
        "echo '#define X 1' > x.h; $W gcc -x c-header p.h -o p.h.gch && gcc -include p.h -c use.c -o u.o; rm p.h.gch",
        "echo '#define X 2' > x.h; $W gcc -x c-header p.h -o p.h.gch && gcc -include p.h -c use.c -o u.o; rm p.h.gch",
    ),
    again(
        "DEPENDENCIES_OUTPUT",
        "DEPENDENCIES_OUTPUT=d.d $W gcc -c a.c -o a.o",
    ),
    again(
        "SUNPRO_DEPENDENCIES",
        "SUNPRO_DEPENDENCIES=d.d $W gcc -c a.c -o a.o",
    ),
    pair(
        ".incbin in assembler",
        "echo 1 > d.bin; $W gcc -c incbin.S -o i.o",
        "echo 2 > d.bin; $W gcc -c incbin.S -o i.o",
    ),
    pair(
        ".include in assembler",
        "echo .byte 1 > d.inc; $W gcc -c include.S -o i.o",
        "echo .byte 2 > d.inc; $W gcc -c include.S -o i.o",
    ),
    pair(
        ".incbin in C",
        "echo 1 > d.bin; $W clang -c incbin.c -o i.o",
        "echo 2 > d.bin; $W clang -c incbin.c -o i.o",
    ),
    again("a dependency file", "$W gcc -MD -MF x.d -c a.c -o a.o"),
    again("-MD without a name", "mkdir o; $W gcc -MD -c a.c -o o/a.o"),
    again(
        "-MMD without a name",
        "mkdir o; $W clang -MMD -MP -c a.c -o o/a.o",
    ),
    pair(
        "coverage of two outputs",
        "$W gcc --coverage -frandom-seed=1 -c a.c -o 1.o",
        "$W gcc --coverage -frandom-seed=1 -c a.c -o 2.o",
    ),
    pair(
        "instrumented for two outputs",
        "$W gcc -fprofile-generate -frandom-seed=1 -c a.c -o 1.o",
        "$W gcc -fprofile-generate -frandom-seed=1 -c a.c -o 2.o",
    ),
    pair(
        "a dependency file of two outputs",
        "$W gcc -MD -MF x.d -c a.c -o 1.o",
        "$W gcc -MD -MF x.d -c a.c -o 2.o",
    ),
    pair(
        "-MMD after -MD",
        "$W gcc -MD -MF x.d -c a.c -o a.o",
        "$W gcc -MMD -MF x.d -c a.c -o a.o",
    ),
    pair(
        "-MP after none",
        "$W gcc -MD -MF x.d -c a.c -o a.o",
        "$W gcc -MD -MP -MF x.d -c a.c -o a.o",
    ),
    pair(
        "another target",
        "$W gcc -MD -MT x -MF x.d -c a.c -o a.o",
        "$W gcc -MD -MT y -MF x.d -c a.c -o a.o",
    ),
    pair(
        "another quoted target",
        "$W clang -MD -MQ 'x$' -MF x.d -c a.c -o a.o",
        "$W clang -MD -MQ 'y$' -MF x.d -c a.c -o a.o",
    ),
    again(
        "several targets",
        "$W gcc -MD -MT x -MT y -MF x.d -c a.c -o a.o",
    ),
    again(
        "several targets, quoted and not",
        "$W gcc -MD -MQ x -MT y -MF x.d -c a.c -o a.o",
    ),
    again("a joined target", "$W gcc -MD -MTx -MF x.d -c a.c -o a.o"),
    pair(
        "debug information of two folders, gcc",
        "mkdir 1 2; cd 1; $W gcc -g -c ../a.c -o ../a.o",
        "mkdir 1 2; cd 2; $W gcc -g -c ../a.c -o ../a.o",
    ),
    pair(
        "debug information of two folders, clang",
        "mkdir 1 2; cd 1; $W clang -g -c ../a.c -o ../a.o",
        "mkdir 1 2; cd 2; $W clang -g -c ../a.c -o ../a.o",
    ),
    pair(
        "debug information of the assembler",
        "mkdir 1 2; cd 1; $W gcc -Wa,-g -c ../s.S -o ../s.o",
        "mkdir 1 2; cd 2; $W gcc -Wa,-g -c ../s.S -o ../s.o",
    ),
    pair(
        "a coverage mapping of two folders",
        "mkdir 1 2; cd 1; $W clang -fprofile-instr-generate -fcoverage-mapping -c ../a.c -o ../a.o",
        "mkdir 1 2; cd 2; $W clang -fprofile-instr-generate -fcoverage-mapping -c ../a.c -o ../a.o",
    ),
    pair(
        "split debug information of two outputs",
        "$W gcc -g -gsplit-dwarf -c a.c -o 1.o",
        "$W gcc -g -gsplit-dwarf -c a.c -o 2.o",
    ),
    pair(
        "a warning on another line",
        "$W gcc -Wall -c warn.c -o w.o",
        "sed -i '1i\\\\' warn.c; $W gcc -Wall -c warn.c -o w.o",
    ),
    pair(
        "debug information of another line",
        "$W clang -g -c warn.c -o w.o",
        "sed -i '1i\\\\' warn.c; $W clang -g -c warn.c -o w.o",
    ),
    pair(
        "a header of another name with the same text",
        "cp h.h i.h; $W gcc -MD -MF x.d -c a.c -o a.o",
        "cp h.h i.h; sed -i s/h.h/i.h/ a.c; $W gcc -MD -MF x.d -c a.c -o a.o",
    ),
    pair(
        "-I. and the absolute path of one source",
        "P=$PWD; mkdir 1 2; echo '#define X 1' > 1/x.h; cd 1; $W gcc -I. -c $P/use.c -o ../u.o",
        "P=$PWD; mkdir 1 2; echo '#define X 2' > 2/x.h; cd 2; $W gcc -I. -c $P/use.c -o ../u.o",
    ),
    pair(
        "__FILE__ by another path",
        "$W gcc -c file.c -o f.o",
        "$W gcc -c ./file.c -o f.o",
    ),
    pair(
        "__FILE__ by an absolute path",
        "$W clang -c file.c -o f.o",
        "$W clang -c $PWD/file.c -o f.o",
    ),
    pair(
        "a recorded command",
        "$W gcc -frecord-gcc-switches -DU=1 -c a.c -o a.o",
        "$W gcc -frecord-gcc-switches -DU=2 -c a.c -o a.o",
    ),
    pair(
        "a recorded command in debug information",
        "$W gcc -g -grecord-gcc-switches -fno-pic -c a.c -o a.o",
        "$W gcc -g -grecord-gcc-switches -fno-pic -DU -c a.c -o a.o",
    ),
    again(
        "a command that clang records",
        "$W clang -frecord-command-line -c a.c -o a.o",
    ),
    again(
        "a command that clang records in debug information",
        "$W clang -g -grecord-command-line -c a.c -o a.o",
    ),
    pair(
        "the assembler of another folder",
        "$W gcc -c a.c -o a.o",
        "mkdir b; printf '#!/bin/sh\\nexec as --defsym other=1 \"$@\"\\n' > b/as; chmod +x b/as; \
         COMPILER_PATH=$PWD/b $W gcc -c a.c -o a.o; rm -r b",
    ),
    pair(
        "another date",
        "SOURCE_DATE_EPOCH=0 $W gcc -c date.c -o d.o",
        "SOURCE_DATE_EPOCH=864000000 $W gcc -c date.c -o d.o",
    ),
    again(
        "--serialize-diagnostics",
        "$W clang --serialize-diagnostics x.dia -c warn.c -o w.o",
    ),
    again(
        "--write-dependencies",
        "$W clang --write-dependencies -c a.c -o a.o",
    ),
    again(
        "--write-user-dependencies",
        "$W clang --write-user-dependencies -c a.c -o a.o",
    ),
    again("-Wp,-MD", "$W gcc -Wp,-MD,x.d -c a.c -o a.o"),
    again("-aux-info", "$W gcc -aux-info x.X -c a.c -o a.o"),
    again(
        "-fdump-tree-original",
        "$W gcc -fdump-tree-original -c a.c -o a.o",
    ),
    again("-MJ", "$W clang -MJ x.json -c a.c -o a.o"),
    again("-fcallgraph-info", "$W gcc -fcallgraph-info -c a.c -o a.o"),
    again(
        "-foptimization-record-file",
        "$W clang -O2 -fsave-optimization-record -foptimization-record-file=x.yaml -c a.c -o a.o",
    ),
    again(
        "-fsave-optimization-record",
        "$W clang -O2 -fsave-optimization-record -c a.c -o a.o",
    ),
    again("-fstack-usage", "$W gcc -fstack-usage -c a.c -o a.o"),
    again(
        "-fthin-link-bitcode",
        "$W clang -flto=thin -Xclang -fthin-link-bitcode=x.bc -c a.c -o a.o",
    ),
    again("-save-temps", "$W gcc -save-temps -c a.c -o a.o"),
    again("a listing", "$W gcc -Wa,-adhln=x.lst -c a.c -o a.o"),
    again(
        "a dependency file of the assembler's",
        "$W gcc -Wa,--MD,x.d -c t.s -o s.o",
    ),
    again(
        "-fopt-info",
        "$W gcc -O3 -fopt-info-vec=x.txt -c a.c -o a.o",
    ),
    pair(
        "another list for the sanitizer's coverage",
        "echo 'fun:*' > l; $W clang -fsanitize-coverage=trace-pc -fsanitize-coverage-ignorelist=l -c a.c -o a.o",
        "echo 'fun:x' > l; $W clang -fsanitize-coverage=trace-pc -fsanitize-coverage-ignorelist=l -c a.c -o a.o",
    ),
    pair(
        "another list for the sanitizer",
        "echo 'fun:*' > l; $W clang -fsanitize=address -fsanitize-ignorelist=l -c a.c -o a.o",
        "echo 'fun:x' > l; $W clang -fsanitize=address -fsanitize-ignorelist=l -c a.c -o a.o",
    ),
    pair(
        "another list for XRay",
        "echo 'fun:a' > l; $W clang -fxray-instrument -fxray-always-instrument=l -c a.c -o a.o",
        "echo 'fun:x' > l; $W clang -fxray-instrument -fxray-always-instrument=l -c a.c -o a.o",
    ),
    pair(
        "another configuration file",
        "echo -DU=1 > c.cfg; $W clang --config $PWD/c.cfg -c u.c -o u.o",
        "echo -DU=2 > c.cfg; $W clang --config $PWD/c.cfg -c u.c -o u.o",
    ),
    pair(
        "another specs file",
        "printf '*cpp:\\n-DU=1\\n' > own.specs; $W gcc -specs=./own.specs -c u.c -o u.o",
        "printf '*cpp:\\n-DU=2\\n' > own.specs; $W gcc -specs=./own.specs -c u.c -o u.o",
    ),
    pair(
        "another profile",
        "printf 'a:100:10\\n 0: 10\\n' > p; $W clang -O2 -g -fprofile-sample-use=p -c a.c -o a.o",
        "printf 'a:900:90\\n 0: 90\\n' > p; $W clang -O2 -g -fprofile-sample-use=p -c a.c -o a.o",
    ),
];

fn write_sources(folder: &Path) {
    for (file, text) in [
        ("h.h", "#define H 7\n"),
        (
            "a.c",
            "#include \"h.h\"\n#include <stddef.h>\nsize_t a(int x) { return x > 1 ? sizeof(int) : H; }\n",
        ),
        ("p.h", "#include \"x.h\"\n"),
        ("use.c", "#include \"x.h\"\nint use(void) { return X; }\n"),
        ("u.c", "int u = U;\n"),
        ("warn.c", "int w(void) { int unused; return 1; }\n"),
        ("file.c", "const char *f = __FILE__;\n"),
        ("date.c", "const char *d = __DATE__;\n"),
        ("s.S", ".text\n.globl s\ns: nop\n"),
        ("t.s", ".text\n.globl t\nt: nop\n"),
        ("incbin.S", ".data\n.incbin \"d.bin\"\n"),
        ("include.S", ".data\n.include \"d.inc\"\n"),
        (
            "incbin.c",
            "asm(\".data\\n.incbin \\\"d.bin\\\"\\n.text\");\n",
        ),
    ] {
        fs::write(folder.join(file), text).unwrap();
    }
}

/// A job that keeps objects on this machine's disk, for which all versions have their preprocessor
/// cache.
fn job(version: &str) -> Job {
    let mut job = Job::with_sccache(&tools::sccache(version));
    job.set("INPUT_MODE", "local");
    job.setup().green();
    job
}

/// The cases in which the second call of a pair gave another result than the bare compiler.
fn faults(job: &Job, version: &str, place: &Path, bare: &[Outcome]) -> Vec<String> {
    let mut faults = Vec::new();
    for (number, (pair, bare)) in PAIRS.iter().zip(bare).enumerate() {
        let folder = place.join(number.to_string());
        let run =
            |calls: &str| outcome(job, &folder, write_sources, &format!("W=sccache\n{calls}"));
        run(pair.first);
        let wrapped = run(pair.second);
        let names = bare.keys().chain(wrapped.keys());
        let names: std::collections::BTreeSet<&String> = names.collect();
        for name in names {
            if bare.get(name) != wrapped.get(name) {
                let (bare, wrapped) = (shown(bare.get(name)), shown(wrapped.get(name)));
                faults.push(format!(
                    "{version}, {}, {name}:\n  bare    {bare}\n  wrapped {wrapped}",
                    pair.name
                ));
            }
        }
    }
    faults
}

#[test]
fn what_one_call_left_in_the_cache_is_never_given_to_another_by_any_version_of_sccache() {
    let place = tempfile::tempdir().unwrap();
    let plain = Job::new();
    let bare: Vec<Outcome> = PAIRS
        .iter()
        .enumerate()
        .map(|(number, pair)| {
            let folder = place.path().join(number.to_string());
            outcome(
                &plain,
                &folder,
                write_sources,
                &format!("W=\n{}", pair.second),
            )
        })
        .collect();
    for (pair, outcome) in PAIRS.iter().zip(&bare) {
        // A row whose calls do not compile would show nothing.
        let status = outcome
            .get("status")
            .map(|status| String::from_utf8_lossy(status));
        assert_eq!(
            status.as_deref(),
            Some("Some(0)"),
            "{}: {}",
            pair.name,
            shown(outcome.get("stderr"))
        );
    }
    let faults: Vec<String> = tools::SCCACHE_VERSIONS
        .iter()
        .flat_map(|version| faults(&job(version), version, place.path(), &bare))
        .collect();
    assert!(
        faults.is_empty(),
        "{} differ\n{}",
        faults.len(),
        faults.join("\n")
    );
}
