//! The places of a job's build directories, and of the same directories in another job.
//!
//! A build directory is named by its relation to the job: the one of a workspace, or a folder below the
//! checkout, cargo's home or the runner's temporary folder. So a job with its checkout elsewhere finds it
//! again, and a cache can put nothing anywhere else.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::cargo_cache::files::{is_inside, relative_name};

/// A workspace of a job, with absolute paths.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workspace {
    /// The folder with its `Cargo.toml` and `Cargo.lock`.
    pub folder: PathBuf,
    /// Its build directory, as cargo or the user says.
    pub build: PathBuf,
}

impl Workspace {
    /// The path of its lockfile, which may not exist yet.
    pub fn lockfile(&self) -> PathBuf {
        self.folder.join("Cargo.lock")
    }
}

/// The folders of a job that build directories are in.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Places {
    /// The folder of the checkout.
    pub checkout: PathBuf,
    /// Cargo's home.
    pub home: PathBuf,
    /// The runner's temporary folder.
    pub temporary: Option<PathBuf>,
    /// The workspaces that are known from the beginning.
    pub workspaces: Vec<Workspace>,
}

/// The place of a build directory, in a form that holds in other jobs as well. Each text is a relative path
/// with `/` between its names, and is empty for the folder itself.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Place {
    /// The build directory of the workspace in this folder of the checkout, wherever cargo keeps it.
    Workspace(String),
    /// Below the checkout.
    Checkout(String),
    /// Below cargo's home.
    Home(String),
    /// Below the runner's temporary folder.
    Temporary(String),
}

/// A digest of the absolute paths of a build directory and the checkout.
pub type PathsDigest = [u8; 8];

impl Places {
    /// The place of a build directory of this job. `None` if it has no name that other jobs share.
    pub fn place_of(&self, build: &Path) -> Option<Place> {
        let of_workspace = self.workspaces.iter().find(|its| its.build == build);
        if let Some(workspace) = of_workspace {
            return Some(Place::Workspace(below(&self.checkout, &workspace.folder)?));
        }
        let checkout = || below(&self.checkout, build).map(Place::Checkout);
        let home = || below(&self.home, build).map(Place::Home);
        let temporary = || below(self.temporary.as_ref()?, build).map(Place::Temporary);
        checkout().or_else(home).or_else(temporary)
    }

    /// The path of a build directory in this job. `None` if this job has no such place.
    pub fn path_of(&self, place: &Place) -> Option<PathBuf> {
        let within = |folder: &Path, path: &str| match path {
            "" => Some(folder.to_owned()),
            path => is_inside(path).then(|| folder.join(path)),
        };
        match place {
            Place::Workspace(path) => {
                let folder = within(&self.checkout, path)?;
                let workspace = self.workspaces.iter().find(|its| its.folder == folder)?;
                Some(workspace.build.clone())
            }
            Place::Checkout(path) => within(&self.checkout, path),
            Place::Home(path) => within(&self.home, path),
            Place::Temporary(path) => within(self.temporary.as_ref()?, path),
        }
    }

    /// Whether `output` is in a build directory that is known from the beginning.
    pub fn is_known(&self, output: &Path) -> bool {
        let mut builds = self.workspaces.iter().map(|workspace| &workspace.build);
        builds.any(|build| output.starts_with(build))
    }

    /// The digest that tells whether a unit with the path of its build directory, or of the checkout, is
    /// right in this job as well.
    pub fn digest(&self, build: &Path) -> PathsDigest {
        let mut hasher = blake3::Hasher::new();
        for path in [self.checkout.as_path(), build] {
            let bytes = path.as_os_str().as_encoded_bytes();
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        }
        let mut digest = [0; 8];
        let all = hasher.finalize();
        digest
            .iter_mut()
            .zip(all.as_bytes())
            .for_each(|(to, from)| *to = *from);
        digest
    }
}

/// The path of `path` from `folder`, with `/` between its names.
fn below(folder: &Path, path: &Path) -> Option<String> {
    relative_name(path.strip_prefix(folder).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(checkout: &str, build: &str) -> Places {
        Places {
            checkout: checkout.into(),
            home: "/home/cargo".into(),
            temporary: Some("/tmp/runner".into()),
            workspaces: vec![
                Workspace {
                    folder: checkout.into(),
                    build: build.into(),
                },
                Workspace {
                    folder: Path::new(checkout).join("fuzz"),
                    build: Path::new(checkout).join("fuzz/target"),
                },
            ],
        }
    }

    #[test]
    fn a_build_directory_is_found_again_in_a_job_that_has_its_folders_elsewhere() {
        let one = places("/w/1", "/home/cargo/build/12/3456");
        let other = places("/w/2", "/home/cargo/build/65/4321");
        for (here, there) in [
            ("/home/cargo/build/12/3456", "/home/cargo/build/65/4321"),
            ("/w/1/fuzz/target", "/w/2/fuzz/target"),
            ("/w/1/elsewhere", "/w/2/elsewhere"),
            ("/home/cargo/own", "/home/cargo/own"),
            ("/tmp/runner/target", "/tmp/runner/target"),
        ] {
            let place = one.place_of(Path::new(here)).unwrap();
            assert_eq!(other.path_of(&place), Some(there.into()), "{place:?}");
        }
        assert_eq!(one.place_of(Path::new("/mnt/target")), None);
        assert_eq!(one.place_of(Path::new("/w/10")), None);
    }

    #[test]
    fn no_place_leads_out_of_the_jobs_folders() {
        let places = places("/w/1", "/mnt/target");
        let named = Place::Workspace(String::new());
        assert_eq!(places.path_of(&named), Some("/mnt/target".into()));
        for path in ["..", "../x", "/etc", "a/../../b", "a//b", "."] {
            for place in [
                Place::Workspace,
                Place::Checkout,
                Place::Home,
                Place::Temporary,
            ] {
                assert_eq!(places.path_of(&place(path.to_owned())), None, "{path}");
            }
        }
        // A workspace that this job does not have.
        let other = Place::Workspace("other".to_owned());
        assert_eq!(places.path_of(&other), None);
    }

    #[test]
    fn the_digest_tells_one_pair_of_folders_from_all_others() {
        let one = places("/w/1", "/w/1/target");
        let digest = one.digest(Path::new("/w/1/target"));
        assert_eq!(digest, one.digest(Path::new("/w/1/target")));
        assert_ne!(digest, one.digest(Path::new("/w/1/other")));
        let moved = places("/w/2", "/w/1/target");
        assert_ne!(digest, moved.digest(Path::new("/w/1/target")));
    }
}
