//! The command line: which part of the library this process is.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use sccache_action::wrapper;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os();
    let argv0 = arguments.next().unwrap_or_default();
    if wrapper::is_wrapper(&argv0) {
        let arguments: Vec<OsString> = arguments.collect();
        let program = std::env::current_exe().unwrap_or_else(|_| PathBuf::from(argv0));
        return wrapper::run(&program, &arguments);
    }
    ExitCode::SUCCESS
}
