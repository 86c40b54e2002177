//! Why cargo compiled dependencies that the cargo cache covers.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::cargo_cache::manifest::{CachePart, Package};
use crate::relay::Relay;
use crate::relay::cargo::CargoJob;
use crate::sccache::state_dir::StateDir;

/// The reason why cargo compiled a dependency that the cargo cache covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum CompileReason {
    /// No earlier job has left anything.
    FirstRun,
    /// Earlier jobs compiled for another compiler, another system or with other variables.
    OtherBuildKey,
    /// No earlier job had this version of it, or of a unit that it is compiled from.
    New,
    /// It, or a unit that it is compiled from, holds the path of a checkout or a build directory elsewhere.
    Path,
    /// The units of earlier jobs were unavailable.
    Missed,
    /// It was restored, and cargo wanted it otherwise: with other features or flags, or in another profile.
    Changed,
}

impl Relay {
    /// Why cargo compiled dependencies without sccache, with how many.
    pub(super) fn why_compiled(&self, job: &CargoJob) -> Vec<(CompileReason, u64)> {
        let state = StateDir::at(job.request.state.clone());
        let packages: BTreeSet<String> = state.compiled_dependencies().into_iter().collect();
        let missed = self
            .activity
            .snapshot()
            .cargo
            .as_ref()
            .map_or(0, |cargo| cargo.missed);
        let mut counts: BTreeMap<CompileReason, u64> = BTreeMap::new();
        for package in packages {
            *counts
                .entry(job.why_compiled(&package, missed > 0))
                .or_default() += 1;
        }
        counts.into_iter().collect()
    }
}

impl CargoJob {
    /// Why cargo compiled this package, given whether any wanted part was unavailable.
    fn why_compiled(&self, package: &str, has_missed: bool) -> CompileReason {
        let is_its = |part: &CachePart| match &part.package {
            Package::Crate(name) => name == package,
            Package::Commit(commit) => package.starts_with(commit.as_str()),
            Package::Several => false,
        };
        let its: Vec<usize> = self
            .before
            .parts
            .iter()
            .enumerate()
            .filter(|(_, part)| part.is_unit() && is_its(part))
            .map(|(number, _)| number)
            .collect();
        if self.key.is_none() && has_missed {
            // The manifests of earlier jobs did not arrive in time.
            CompileReason::Missed
        } else if self.key.is_none() {
            CompileReason::FirstRun
        } else if !self.same_build_key {
            CompileReason::OtherBuildKey
        } else if its.is_empty() || its.iter().any(|number| !self.asked.contains(number)) {
            CompileReason::New
        } else if its.iter().any(|number| !self.wanted.contains(number)) {
            CompileReason::Path
        } else if has_missed {
            CompileReason::Missed
        } else {
            CompileReason::Changed
        }
    }
}
