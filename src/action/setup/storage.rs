//! Reports that objects are kept in another storage than the requested one, or are only read or
//! only written.

use crate::action::inputs::{Inputs, OnFailure};
use crate::action::mode::{self, CHAIN, CONFIGURATION_FILE, FallbackReason, Mode, READ_ONLY_SINCE};
use crate::action::setup::{SetupError, TITLE};
use crate::action::start_relay;
use crate::install::Installed;
use crate::runner::environment::Environment;
use crate::runner::files::Variable;
use crate::runner::log::Log;
use crate::runner::scopes::Permission;

/// Reports why objects are kept on the disk only, or fails if the user accepts no fallback.
pub(super) fn fall_back_to_local(
    inputs: &Inputs,
    fallback: FallbackReason,
    log: &Log,
) -> Result<(), SetupError> {
    let (FallbackReason::Forbidden(why) | FallbackReason::Unavailable(why)) = &fallback;
    if inputs.on_failure == OnFailure::Fail {
        return Err(SetupError::Mode(why.clone()));
    }
    let text = format!("Objects are kept on this machine's disk only, because {why}");
    match fallback {
        FallbackReason::Forbidden(_) => log.notice(TITLE, text),
        FallbackReason::Unavailable(_) => log.warning(TITLE, text),
    }
    Ok(())
}

/// Reports that GitHub's cache is removed from the user's own chain of storages, or fails if the
/// user accepts no fallback.
pub(super) fn drop_github_from_chain(inputs: &Inputs, log: &Log) -> Result<(), SetupError> {
    let text = format!("`gha` is removed from {CHAIN}, because {}", mode::FORBIDDEN);
    if inputs.on_failure == OnFailure::Fail {
        return Err(SetupError::Mode(text));
    }
    log.notice(TITLE, text);
    Ok(())
}

pub(super) fn read_only(
    environment: &Environment,
    inputs: &Inputs,
    installed: &Installed,
    mode: Mode,
    log: &Log,
) -> bool {
    if mode == Mode::Packed {
        // The relay's to see to.
        return false;
    }
    let read_only = match mode {
        Mode::Direct => !Permission::of(environment, inputs.read_only).write,
        _ => inputs.read_only == Some(true),
    };
    if read_only && installed.version < READ_ONLY_SINCE {
        let version = &installed.version;
        if inputs.read_only == Some(true) {
            log.warning(
                TITLE,
                format!(
                    "sccache {version} cannot be read-only; `read-only` needs {READ_ONLY_SINCE} \
                     or newer."
                ),
            );
        }
        return false;
    }
    if read_only && inputs.read_only.is_none() {
        log.info(start_relay::READ_ONLY_TOKEN);
    }
    if recache_variable(environment, inputs, mode).is_some() {
        log.info(start_relay::WRITE_ONLY);
    }
    if read_only && mode == Mode::External && environment.has(CONFIGURATION_FILE) {
        log.warning(
            TITLE,
            format!(
                "`read-only` does not affect the storages in the file that {CONFIGURATION_FILE} \
                 names. Set `rw_mode = \"READ_ONLY\"` for each of them there."
            ),
        );
    }
    read_only
}

/// The variable that keeps sccache from reading GitHub's cache, if the job may only write there.
/// Each compile requests it (`src/server.rs` of sccache reads `SCCACHE_RECACHE` from its client's
/// environment).
pub(super) fn recache_variable(
    environment: &Environment,
    inputs: &Inputs,
    mode: Mode,
) -> Option<Variable> {
    let may_read = Permission::of(environment, inputs.read_only).read;
    (mode == Mode::Direct && !may_read).then(|| ("SCCACHE_RECACHE".to_owned(), "1".to_owned()))
}
