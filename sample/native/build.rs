//! Compiles the C files. The `cc` crate takes `RUSTC_WRAPPER` for C compilers too where it is
//! called sccache.

fn main() {
    let files = [
        "adler32", "crc32", "djb2", "fletcher", "fnv1a", "jenkins", "pearson", "sdbm",
    ];
    println!("cargo::rerun-if-changed=c");
    cc::Build::new()
        .include("c")
        .files(files.map(|file| format!("c/{file}.c")))
        .warnings_into_errors(true)
        .compile("sample_native");
}
