//! The job's log: plain lines and the runner's workflow commands (`::warning::` and others).
//!
//! The escaping rules are those of `@actions/core` (`command.ts`): `%`, CR and LF in a message, and
//! also `:` and `,` in a property.

use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The output for the user. Cheap to clone; all clones write to the same place and know the same
/// secrets.
#[derive(Clone)]
pub struct Log {
    inner: Arc<Mutex<LogInner>>,
}

/// The reader of a log, which decides its format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogTarget {
    /// A runner, which acts on workflow commands.
    GitHubActions,
    /// A person at a terminal.
    Terminal,
}

struct LogInner {
    out: Box<dyn Write + Send>,
    target: LogTarget,
    secrets: Vec<String>,
    warnings: usize,
    debug: bool,
}

/// The shortest secret, in bytes, that is removed from texts: shorter ones occur in any text, and
/// removing them would garble it.
pub const SHORTEST_SECRET: usize = 4;

/// The replacement for a secret.
const REDACTED: &str = "***";

impl Log {
    /// A log that writes to `out`. Debug lines are dropped unless `debug` is set (the runner sets
    /// `RUNNER_DEBUG=1` when its user asks for them).
    pub fn new(out: impl Write + Send + 'static, target: LogTarget, debug: bool) -> Self {
        Self {
            inner: Arc::new(Mutex::new(LogInner {
                out: Box::new(out),
                target,
                secrets: Vec::new(),
                warnings: 0,
                debug,
            })),
        }
    }

    /// A log that keeps its lines, and a way to read them.
    pub fn in_memory() -> (Self, MemorySink) {
        let lines = MemorySink::default();
        (
            Self::new(lines.clone(), LogTarget::GitHubActions, true),
            lines,
        )
    }

    fn lock(&self) -> MutexGuard<'_, LogInner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn line(&self, prefix: &str, text: &str) {
        let mut inner = self.lock();
        let line = redact(&inner.secrets, &format!("{prefix}{text}"));
        let line = without_old_commands(line, inner.target);
        // If the log is not writable, the failure cannot be reported anywhere.
        let _ = writeln!(inner.out, "{line}");
        let _ = inner.out.flush();
    }

    /// A plain line.
    pub fn info(&self, text: impl AsRef<str>) {
        // A line of foreign text that starts like a workflow command must not become one.
        let text = text.as_ref();
        // The runner takes a lone CR for the end of a line as well.
        for line in text.replace("\r\n", "\n").split(['\n', '\r']) {
            let guard = if line.trim_start().starts_with("::") {
                "| "
            } else {
                ""
            };
            self.line(guard, line);
        }
    }

    /// A line shown only when the user asked the runner for debug output.
    pub fn debug(&self, text: impl AsRef<str>) {
        let (debug, target) = {
            let inner = self.lock();
            (inner.debug, inner.target)
        };
        match (debug, target) {
            (true, LogTarget::GitHubActions) => {
                self.line("::debug::", &escape_message(text.as_ref()))
            }
            (true, LogTarget::Terminal) => self.line("debug: ", text.as_ref()),
            (false, _) => {}
        }
    }

    /// A warning annotation.
    pub fn warning(&self, title: &str, text: impl AsRef<str>) {
        self.lock().warnings += 1;
        self.annotation("warning", title, text.as_ref());
    }

    /// A notice annotation.
    pub fn notice(&self, title: &str, text: impl AsRef<str>) {
        self.annotation("notice", title, text.as_ref());
    }

    /// An error annotation. It alone does not fail the step.
    pub fn error(&self, title: &str, text: impl AsRef<str>) {
        self.annotation("error", title, text.as_ref());
    }

    fn target(&self) -> LogTarget {
        self.lock().target
    }

    fn annotation(&self, command: &str, title: &str, text: &str) {
        if self.target() == LogTarget::Terminal {
            self.line(&format!("{command}: "), text);
            return;
        }
        self.line(
            &format!("::{command} title={}::", escape_property(title)),
            &escape_message(text),
        );
    }

    /// Asks the runner to mask `secret` from here on, and removes it from the lines of this log.
    /// Secrets shorter than [`SHORTEST_SECRET`] are ignored.
    pub fn mask(&self, secret: &str) {
        let mut inner = self.lock();
        if secret.len() < SHORTEST_SECRET || inner.secrets.iter().any(|known| known == secret) {
            return;
        }
        if inner.target == LogTarget::GitHubActions {
            let _ = writeln!(inner.out, "::add-mask::{}", escape_message(secret));
            let _ = inner.out.flush();
        }
        inner.secrets.push(secret.to_owned());
        // A secret that holds another must be replaced first.
        inner
            .secrets
            .sort_by_key(|secret| std::cmp::Reverse(secret.len()));
    }

    /// `text` with every masked secret replaced.
    pub fn redact(&self, text: &str) -> String {
        redact(&self.lock().secrets, text)
    }

    /// Writes `lines` as a group that the runner shows folded.
    pub fn group(&self, title: &str, lines: impl AsRef<str>) {
        match self.target() {
            LogTarget::GitHubActions => {
                self.line("::group::", &escape_message(title));
                self.info(lines);
                self.line("::endgroup::", "");
            }
            LogTarget::Terminal => {
                self.line("", title);
                self.info(lines);
            }
        }
    }

    /// How many warnings were written.
    pub fn warnings(&self) -> usize {
        self.lock().warnings
    }
}

/// Text of a command such as `doctor`, in which a runner finds no workflow commands.
pub fn without_commands(text: &str) -> String {
    // The runner takes a lone CR for the end of a line as well.
    let lines = text.split_inclusive(['\n', '\r']).map(|line| {
        let guard = if line.trim_start().starts_with("::") {
            "| "
        } else {
            ""
        };
        format!("{guard}{line}")
    });
    lines.collect::<String>().replace("##[", "## [")
}

/// The same for text in JSON, whose meaning stays.
pub fn json_without_commands(json: &str) -> String {
    // JSON has neither outside of strings, and its writer breaks lines outside of strings only.
    json.replace("##[", r"#\u0023[")
}

/// Breaks the runner's older form of a command, which it accepts anywhere in a line
/// (`ActionCommand.TryParse` of actions/runner looks for `##[`).
fn without_old_commands(line: String, target: LogTarget) -> String {
    match target {
        LogTarget::GitHubActions => line.replace("##[", "## ["),
        LogTarget::Terminal => line,
    }
}

fn redact(secrets: &[String], text: &str) -> String {
    secrets.iter().fold(text.to_owned(), |text, secret| {
        text.replace(secret.as_str(), REDACTED)
    })
}

fn escape_message(text: &str) -> String {
    text.replace('%', "%25")
        .replace('\r', "%0D")
        .replace('\n', "%0A")
}

fn escape_property(text: &str) -> String {
    escape_message(text).replace(':', "%3A").replace(',', "%2C")
}

/// The lines that a [`Log::in_memory`] holds.
#[derive(Clone, Default)]
pub struct MemorySink {
    bytes: Arc<Mutex<Vec<u8>>>,
}

impl MemorySink {
    /// All that was written so far.
    pub fn text(&self) -> String {
        let bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Write for MemorySink {
    fn write(&mut self, buffer: &[u8]) -> std::io::Result<usize> {
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        bytes.extend_from_slice(buffer);
        Ok(buffer.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_replaced_in_every_kind_of_line() {
        let (log, lines) = Log::in_memory();
        log.mask("hunter22");
        log.info("a hunter22 b");
        log.debug("hunter22");
        log.warning("hunter22", "hunter22");
        log.group("hunter22", "x hunter22");
        let shown = lines.text();
        let after_mask = shown.split_once('\n').map(|(_, rest)| rest);
        assert_eq!(shown.matches("hunter22").count(), 1, "{shown}");
        assert_eq!(after_mask.map(|rest| rest.matches("***").count()), Some(6));
    }

    #[test]
    fn a_person_reads_no_commands_and_no_secret() {
        let lines = MemorySink::default();
        let log = Log::new(lines.clone(), LogTarget::Terminal, false);
        log.mask("hunter22");
        log.warning("title", "a hunter22");
        log.group("title", "line");
        log.debug("unasked");
        assert_eq!(lines.text(), "warning: a ***\ntitle\nline\n");
    }

    #[test]
    fn a_message_of_many_lines_stays_one_command() {
        let (log, lines) = Log::in_memory();
        log.warning("a,b:c", "one\r\ntwo 100%");
        assert_eq!(
            lines.text(),
            "::warning title=a%2Cb%3Ac::one%0D%0Atwo 100%25\n"
        );
        assert_eq!(log.warnings(), 1);
    }

    /// Whether the runner takes a line for a command (`TryParseV2` and `TryParse` of
    /// `ActionCommand.cs` in actions/runner).
    fn is_command(line: &str) -> bool {
        let second = line.trim_start().strip_prefix("::");
        let first = line.split_once("##[").map(|(_, rest)| rest);
        second.is_some_and(|rest| rest.contains("::"))
            || first.is_some_and(|rest| rest.contains(']'))
    }

    #[test]
    fn foreign_text_cannot_speak_to_the_runner() {
        for foreign in [
            "::set-output name=x::y",
            "  ::add-mask::a",
            "##[error]no",
            "x = ##[set-output name=path]/tmp/evil",
            "###[save-state name=state-dir]/tmp/evil",
            "a\r::set-env name=x::y\rb",
            "a\r\n::set-env name=x::y\r\n",
        ] {
            let (log, lines) = Log::in_memory();
            log.info(foreign);
            log.info(format!("an error: {foreign}"));
            let shown = lines.text();
            let mut shown = shown.split(['\n', '\r']);
            assert!(!shown.any(is_command), "{foreign:?}");
            let (log, lines) = Log::in_memory();
            log.group(foreign, foreign);
            log.debug(foreign);
            log.warning(foreign, foreign);
            let shown = lines.text();
            let commands: Vec<&str> = shown
                .split(['\n', '\r'])
                .filter(|line| is_command(line))
                .collect();
            assert_eq!(commands.len(), 4, "{commands:?}");
            assert!(commands.iter().all(|line| !line.contains("##[")));
        }
    }

    #[test]
    fn what_a_command_prints_gives_the_runner_none_and_json_means_what_it_meant() {
        let foreign =
            "a ##[set-output name=x]y ###[error]no\n::set-output name=x::y\r  ::add-mask::a";
        let shown = without_commands(foreign);
        assert!(!shown.split(['\n', '\r']).any(is_command), "{shown}");
        assert_eq!(without_commands("plain\n  text\n"), "plain\n  text\n");
        let value = serde_json::json!({ foreign: [foreign, "::a::"] });
        let json = format!("{value:#}\n");
        let shown = json_without_commands(&json);
        assert!(json.split(['\n', '\r']).any(is_command));
        assert!(!shown.split(['\n', '\r']).any(is_command), "{shown}");
        assert_eq!(
            serde_json::from_str::<serde_json::Value>(&shown).unwrap(),
            value
        );
    }

    #[test]
    fn a_secret_that_is_replaced_leaves_no_command_behind() {
        let (log, lines) = Log::in_memory();
        log.mask("hunter22");
        log.info("#hunter22#[set-output name=x]y ##hunter22[error]no");
        let shown = lines.text();
        assert!(
            shown.lines().skip(1).all(|line| !is_command(line)),
            "{shown}"
        );
    }
}
