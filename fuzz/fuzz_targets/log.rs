//! Text from elsewhere in what the action prints: it must give the runner no commands.

#![no_main]

use libfuzzer_sys::fuzz_target;
use sccache_action::runner::log::{Log, json_without_commands, without_commands};

/// Pieces that commands are made of, so that they meet.
const PIECES: [&str; 12] = [
    "##[",
    "::",
    "#",
    "[",
    "]",
    "\n",
    "\r",
    "hunter22",
    "set-output name=x",
    " ",
    "\u{feff}",
    "%0A",
];

/// The commands that the runner takes lines for (`TryParseV2` and `TryParse` of `ActionCommand.cs` in
/// actions/runner).
fn commands(text: &str) -> Vec<&str> {
    let command = |line: &'_ str| {
        let second = line
            .trim_start()
            .strip_prefix("::")
            .is_some_and(|rest| rest.contains("::"));
        let first = line
            .split_once("##[")
            .is_some_and(|(_, rest)| rest.contains(']'));
        second || first
    };
    text.split(['\n', '\r'])
        .filter(|line| command(line))
        .collect()
}

fuzz_target!(|pieces: Vec<(u8, String)>| {
    let pieces = pieces.iter().map(|(choice, other)| {
        let known = PIECES.get(usize::from(*choice) % (PIECES.len() + 4));
        known.map_or(other.as_str(), |known| known)
    });
    let foreign: String = pieces.collect();
    assert!(
        commands(&without_commands(&foreign)).is_empty(),
        "{foreign:?}"
    );
    let json = format!(
        "{:#}",
        serde_json::json!({ foreign.as_str(): [foreign.as_str()] })
    );
    assert!(
        commands(&json_without_commands(&json)).is_empty(),
        "{foreign:?}"
    );
    let (log, lines) = Log::in_memory();
    log.mask("hunter22");
    log.info(&foreign);
    let shown = lines.text();
    // The one that asks for the mask.
    assert_eq!(commands(&shown).len(), 1, "{shown:?}");
    let (log, lines) = Log::in_memory();
    log.mask("hunter22");
    log.warning(&foreign, &foreign);
    log.group(&foreign, &foreign);
    log.debug(&foreign);
    let shown = lines.text();
    let commands = commands(&shown);
    assert_eq!(commands.len(), 5, "{shown:?}");
    assert!(
        commands.iter().all(|line| line.starts_with("::")),
        "{shown:?}"
    );
});
