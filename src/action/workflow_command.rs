//! The job's log: plain lines and the runner's workflow commands (`::warning::` and its kin).
//!
//! The escaping rules are those of `@actions/core` (`command.ts`): `%`, CR and LF in a message, and
//! `:` and `,` besides in a property.

use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Where lines for the user go. Cheap to clone; all clones write to the same place and know the
/// same secrets.
#[derive(Clone)]
pub struct Log {
    inner: Arc<Mutex<Inner>>,
}

/// Who reads a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reader {
    /// A runner, which acts on workflow commands.
    Runner,
    /// A person at a terminal.
    Person,
}

struct Inner {
    out: Box<dyn Write + Send>,
    reader: Reader,
    secrets: Vec<String>,
    warnings: usize,
    debug: bool,
}

/// What stands where a secret stood.
const REDACTED: &str = "***";

impl Log {
    /// A log that writes to `out`. Debug lines are dropped unless `debug` is set (the runner sets
    /// `RUNNER_DEBUG=1` when its user asks for them).
    pub fn new(out: impl Write + Send + 'static, reader: Reader, debug: bool) -> Self {
        Self {
            inner: Arc::new(Mutex::new(Inner {
                out: Box::new(out),
                reader,
                secrets: Vec::new(),
                warnings: 0,
                debug,
            })),
        }
    }

    /// A log that keeps its lines, and a way to read them.
    pub fn in_memory() -> (Self, LogLines) {
        let lines = LogLines::default();
        (Self::new(lines.clone(), Reader::Runner, true), lines)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn line(&self, prefix: &str, text: &str) {
        let mut inner = self.lock();
        let line = redact(&inner.secrets, &format!("{prefix}{text}"));
        let line = without_old_commands(line, inner.reader);
        // A log that cannot be written to has nobody left to tell.
        let _ = writeln!(inner.out, "{line}");
        let _ = inner.out.flush();
    }

    /// A plain line.
    pub fn info(&self, text: impl AsRef<str>) {
        // A line of foreign text that starts like a workflow command must not become one.
        let text = text.as_ref();
        // The runner takes a lone CR for the end of a line as well.
        for line in text.replace("\r\n", "\n").split(['\n', '\r']) {
            let guard = match line.trim_start().starts_with("::") {
                true => "| ",
                false => "",
            };
            self.line(guard, line);
        }
    }

    /// A line shown only when the user asked the runner for debug output.
    pub fn debug(&self, text: impl AsRef<str>) {
        let (debug, reader) = {
            let inner = self.lock();
            (inner.debug, inner.reader)
        };
        match (debug, reader) {
            (true, Reader::Runner) => self.line("::debug::", &escape_message(text.as_ref())),
            (true, Reader::Person) => self.line("debug: ", text.as_ref()),
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

    /// An error annotation. It does not by itself fail the step.
    pub fn error(&self, title: &str, text: impl AsRef<str>) {
        self.annotation("error", title, text.as_ref());
    }

    fn reader(&self) -> Reader {
        self.lock().reader
    }

    fn annotation(&self, command: &str, title: &str, text: &str) {
        if self.reader() == Reader::Person {
            self.line(&format!("{command}: "), text);
            return;
        }
        self.line(
            &format!("::{command} title={}::", escape_property(title)),
            &escape_message(text),
        );
    }

    /// Asks the runner to mask `secret` from here on, and keeps it out of what this log writes.
    /// Secrets of fewer than four characters are left alone: masking them would garble the log.
    pub fn mask(&self, secret: &str) {
        let mut inner = self.lock();
        if secret.len() < 4 || inner.secrets.iter().any(|known| known == secret) {
            return;
        }
        if inner.reader == Reader::Runner {
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
        match self.reader() {
            Reader::Runner => {
                self.line("::group::", &escape_message(title));
                self.info(lines);
                self.line("::endgroup::", "");
            }
            Reader::Person => {
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

/// Breaks the runner's older form of a command, which it takes wherever it stands in a line
/// (`ActionCommand.TryParse` of actions/runner looks for `##[`).
fn without_old_commands(line: String, reader: Reader) -> String {
    match reader {
        Reader::Runner => line.replace("##[", "## ["),
        Reader::Person => line,
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
pub struct LogLines {
    bytes: Arc<Mutex<Vec<u8>>>,
}

impl LogLines {
    /// All that was written so far.
    pub fn text(&self) -> String {
        let bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Write for LogLines {
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
        let lines = LogLines::default();
        let log = Log::new(lines.clone(), Reader::Person, false);
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
