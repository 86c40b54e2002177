//! The packages that a `Cargo.lock` asks for.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

/// A lockfile that cannot be parsed.
#[derive(Debug, thiserror::Error)]
#[error("cannot read the lockfile: {0}")]
pub struct LockfileError(#[from] toml::de::Error);

/// The packages of one or several lockfiles, without the workspace's own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lockfile {
    /// Packages of registries as `name-version`, as cargo names their files, each with the sha256 digests
    /// that its archive may have.
    crates: BTreeMap<String, BTreeSet<[u8; 32]>>,
    /// The names of these packages, in lower case.
    names: BTreeSet<String>,
    /// The commits of git dependencies.
    commits: BTreeSet<String>,
    /// The packages that depend on sources of the workspace, directly or indirectly: packages of registries
    /// as in `crates`, and commits.
    workspace_dependent: BTreeSet<String>,
    /// Whether it asks for everything else as well.
    open: bool,
}

#[derive(Deserialize)]
struct Document {
    #[serde(default)]
    package: Vec<LockedPackage>,
}

#[derive(Deserialize)]
struct LockedPackage {
    name: String,
    version: String,
    source: Option<String>,
    checksum: Option<String>,
    #[serde(default)]
    dependencies: Vec<String>,
}

impl LockedPackage {
    /// Its name in cargo's folders: `name-version`, or its commit. `None` for a package of the workspace,
    /// or a path dependency.
    fn id(&self) -> Option<String> {
        match self.source.as_deref()?.strip_prefix("git+") {
            Some(git) => git.rsplit_once('#').map(|(_, commit)| commit.to_owned()),
            None => Some(format!("{}-{}", self.name, self.version)),
        }
    }

    /// Whether a dependency means this package. A dependency names it as far as needed: `name`, `name
    /// version` or `name version (source)`.
    fn is_meant_by(&self, dependency: &str) -> bool {
        let mut words = dependency.split_whitespace();
        words.next() == Some(self.name.as_str())
            && words.next().is_none_or(|version| version == self.version)
    }
}

/// The packages that depend on one without a source, directly or indirectly.
fn workspace_dependent(packages: &[LockedPackage]) -> BTreeSet<String> {
    let mut workspace_dependent: Vec<bool> = packages.iter().map(|p| p.source.is_none()).collect();
    let mut by_name: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (number, package) in packages.iter().enumerate() {
        by_name.entry(&package.name).or_default().push(number);
    }
    let mut settled = false;
    while !settled {
        settled = true;
        for (number, package) in packages.iter().enumerate() {
            let is_workspace_dependent = |dependency: &String| {
                let name = dependency.split_whitespace().next().unwrap_or_default();
                let named = by_name.get(name).into_iter().flatten();
                named.into_iter().any(|number| {
                    let meant = packages.get(*number);
                    workspace_dependent.get(*number) == Some(&true)
                        && meant.is_some_and(|meant| meant.is_meant_by(dependency))
                })
            };
            if workspace_dependent.get(number) == Some(&false)
                && package.dependencies.iter().any(is_workspace_dependent)
            {
                settled = false;
                if let Some(workspace_dependent) = workspace_dependent.get_mut(number) {
                    *workspace_dependent = true;
                }
            }
        }
    }
    let workspace_dependent = packages
        .iter()
        .zip(workspace_dependent)
        .filter(|(_, workspace_dependent)| *workspace_dependent);
    workspace_dependent
        .filter_map(|(package, _)| package.id())
        .collect()
}

impl Lockfile {
    /// Reads a lockfile.
    ///
    /// # Errors
    /// [`LockfileError`] if it is no lockfile.
    pub fn parse(text: &str) -> Result<Self, LockfileError> {
        let document: Document = toml::from_str(text)?;
        let mut lockfile = Self {
            workspace_dependent: workspace_dependent(&document.package),
            ..Self::default()
        };
        for package in document.package {
            let Some(id) = package.id() else {
                continue;
            };
            if package
                .source
                .is_some_and(|source| source.starts_with("git+"))
            {
                lockfile.commits.insert(id);
                continue;
            }
            let digests = lockfile.crates.entry(id).or_default();
            let mut digest = [0; 32];
            if let Some(checksum) = package.checksum
                && hex::decode_to_slice(checksum, &mut digest).is_ok()
            {
                digests.insert(digest);
            }
            lockfile.names.insert(package.name.to_ascii_lowercase());
        }
        Ok(lockfile)
    }

    /// The request of a workspace without a lockfile: cargo may resolve any package, so it asks for
    /// everything of an earlier run.
    pub fn open() -> Self {
        Self {
            open: true,
            ..Self::default()
        }
    }

    /// Adds the packages of another lockfile.
    pub fn add(&mut self, other: Self) {
        self.open |= other.open;
        for (name, digests) in other.crates {
            self.crates.entry(name).or_default().extend(digests);
        }
        self.names.extend(other.names);
        self.commits.extend(other.commits);
        self.workspace_dependent.extend(other.workspace_dependent);
    }

    /// Whether it asks for a package of a registry, given as `name-version`.
    pub fn has_crate(&self, name: &str) -> bool {
        self.open || self.crates.contains_key(name)
    }

    /// Whether an archive of this package may have this sha256 digest. A lockfile of an old format has no
    /// digests and accepts any, as does a missing one.
    pub fn accepts(&self, name: &str, digest: &[u8; 32]) -> bool {
        match self.crates.get(name) {
            Some(digests) => digests.is_empty() || digests.contains(digest),
            None => self.open,
        }
    }

    /// Whether it asks for a package of a registry with this name, of any version and in any case: a
    /// registry's index has names in lower case only.
    pub fn has_name(&self, name: &str) -> bool {
        self.open || self.names.contains(&name.to_ascii_lowercase())
    }

    /// Whether it asks for a commit that begins with `prefix`.
    pub fn has_commit(&self, prefix: &str) -> bool {
        let from = self.commits.range(prefix.to_owned()..).next();
        let is_named = from.is_some_and(|commit| commit.starts_with(prefix));
        !prefix.is_empty() && (self.open || is_named)
    }

    /// The packages, as `name-version` or by their commits, whose compiled units depend on no source of the
    /// workspace, so that the cargo cache can keep them.
    pub fn cacheable(&self) -> BTreeSet<String> {
        let all = self.crates.keys().chain(&self.commits);
        let cacheable = all.filter(|id| !self.workspace_dependent.contains(*id));
        cacheable.cloned().collect()
    }

    /// Whether it asks for anything at all.
    pub fn is_empty(&self) -> bool {
        !self.open && self.crates.is_empty() && self.commits.is_empty()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A lockfile that asks for these packages, given as `name` and `version`.
    pub(crate) fn asking_for(packages: &[(&str, &str)]) -> Lockfile {
        let text: String = packages
            .iter()
            .map(|(name, version)| {
                format!(
                    "[[package]]\nname = \"{name}\"\nversion = \"{version}\"\nsource = \
                     \"registry+https://registry.example/index\"\n"
                )
            })
            .collect();
        Lockfile::parse(&text).unwrap()
    }

    #[test]
    fn a_lockfile_asks_for_what_is_not_the_workspaces_own() {
        let digest = "ab".repeat(32);
        let text = format!(
            r#"
version = 4
[[package]]
name = "member"
version = "0.1.0"
dependencies = ["one", "two"]

[[package]]
name = "one"
version = "1.0.0+meta"
source = "registry+https://registry.example/index"
checksum = "{digest}"

[[package]]
name = "two"
version = "0.2.0"
source = "git+https://git.example/two?branch=main#0123456789abcdef0123456789abcdef01234567"
"#
        );
        let lockfile = Lockfile::parse(&text).unwrap();
        assert!(lockfile.has_crate("one-1.0.0+meta") && lockfile.has_name("one"));
        assert!(!lockfile.has_crate("member-0.1.0") && !lockfile.has_name("member"));
        assert!(!lockfile.has_crate("two-0.2.0"));
        assert!(lockfile.has_commit("0123456") && !lockfile.has_commit("0123457"));
        assert!(!lockfile.has_commit(""));
        assert!(lockfile.accepts("one-1.0.0+meta", &[0xab; 32]));
        assert!(!lockfile.accepts("one-1.0.0+meta", &[0xac; 32]));
        assert!(Lockfile::parse("package = 3").is_err());
        assert!(Lockfile::parse("").unwrap().is_empty());
    }

    #[test]
    fn what_is_compiled_from_the_workspaces_own_sources_is_not_keepable() {
        let source = "source = \"registry+https://registry.example/index\"";
        let text = format!(
            r#"
[[package]]
name = "patched"
version = "1.0.0"

[[package]]
name = "patched"
version = "2.0.0"
{source}

[[package]]
name = "near"
version = "1.0.0"
{source}
dependencies = ["patched 1.0.0"]

[[package]]
name = "far"
version = "1.0.0"
{source}
dependencies = ["near"]

[[package]]
name = "free"
version = "1.0.0"
{source}
dependencies = ["patched 2.0.0"]
"#
        );
        let cacheable: Vec<String> = Lockfile::parse(&text)
            .unwrap()
            .cacheable()
            .into_iter()
            .collect();
        assert_eq!(cacheable, ["free-1.0.0", "patched-2.0.0"]);
    }

    #[test]
    fn a_workspace_without_a_lockfile_asks_for_all_there_is_and_holds_others_to_their_digests() {
        let digest = "ab".repeat(32);
        let text = format!(
            "[[package]]\nname = \"one\"\nversion = \"1.0.0\"\nchecksum = \"{digest}\"\nsource = \
             \"registry+https://registry.example/index\"\n"
        );
        let mut lockfile = Lockfile::parse(&text).unwrap();
        assert!(!lockfile.has_crate("two-1.0.0"));
        lockfile.add(Lockfile::open());
        assert!(lockfile.has_crate("two-1.0.0") && lockfile.has_name("two"));
        assert!(lockfile.has_commit("0123456") && !lockfile.is_empty());
        assert!(lockfile.accepts("two-1.0.0", &[0; 32]));
        assert!(!lockfile.accepts("one-1.0.0", &[0; 32]));
        // The wrapper learns only of known packages.
        assert_eq!(lockfile.cacheable().len(), 1);
    }

    #[test]
    fn what_one_lockfile_or_the_other_asks_for_both_together_do() {
        let mut both = asking_for(&[("one", "1.0.0")]);
        both.add(asking_for(&[("one", "2.0.0")]));
        assert!(both.has_crate("one-1.0.0") && both.has_crate("one-2.0.0"));
        // No digest is named, so none is refused.
        assert!(both.accepts("one-1.0.0", &[0; 32]) && !both.accepts("one-3.0.0", &[0; 32]));
    }
}
