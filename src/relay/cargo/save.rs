//! The save: finds what the job used on the disk, stores it, and writes the manifest for the next job.

use std::collections::{HashMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use crate::cargo_cache::files::{self, ContentDigest, PART_LIMIT};
use crate::cargo_cache::home;
use crate::cargo_cache::included;
use crate::cargo_cache::lockfile::Lockfile;
use crate::cargo_cache::manifest::{
    BaseDir, BuildDirectory, CacheManifest, CachePart, chunk_key, is_cargo_key, manifest_key,
};
use crate::cargo_cache::units;
use crate::packs::index::{ObjectKey, hours};
use crate::relay::cargo::{
    CannotUseLockfile, CargoJob, CargoRequest, in_parallel, is_crate, milliseconds,
};
use crate::relay::{Relay, lock};
use crate::sccache::state_dir::StateDir;

/// A compressed part is in memory up to this size, in bytes, and in a file beyond it.
const PART_IN_MEMORY: usize = 8 << 20;

/// Why a job's cargo folders are not saved.
#[derive(Debug, thiserror::Error)]
enum CannotSave {
    #[error(transparent)]
    Lockfile(#[from] CannotUseLockfile),
    #[error(transparent)]
    Disk(#[from] io::Error),
    #[error("no time was left")]
    Late,
}

impl Relay {
    /// Saves the job's downloaded and compiled dependencies for the next job.
    pub(in crate::relay) fn save_cargo(&self, deadline: Instant) {
        let Some(job) = lock(&self.cargo).take() else {
            return;
        };
        let compiled = self.why_compiled(&job);
        self.activity
            .note(|activity| activity.cargo.get_or_insert_default().compiled = compiled);
        if !self.table.lock().is_writable() {
            return;
        }
        let begin = Instant::now();
        if let Err(error) = self.store_cargo(&job, deadline) {
            self.activity.error("the cargo cache was not saved", &error);
        }
        self.activity.note(|activity| {
            activity.cargo.get_or_insert_default().save_milliseconds = milliseconds(begin);
        });
    }

    fn store_cargo(&self, job: &CargoJob, deadline: Instant) -> Result<(), CannotSave> {
        let lockfile = job.request.lockfile_after()?;
        let builder = ManifestBuilder::of(&job.request, &lockfile)?;
        let ManifestBuilder {
            mut manifest,
            folders,
            used,
        } = builder;
        let wanted = manifest.wanted(&lockfile, |_| true);
        let has_units = wanted
            .iter()
            .any(|number| manifest.parts.get(*number).is_some_and(CachePart::is_unit));
        // A job that compiled nothing must not replace the units of one that did.
        if job.before.parts.iter().any(CachePart::is_unit) && !has_units {
            return Ok(());
        }
        let kept = self.store_parts(job, &manifest, &folders, &wanted, deadline)?;
        let moved = |part: &CachePart| job.has_moved(&manifest, part);
        let chunks: Vec<Option<ObjectKey>> = kept
            .iter()
            .zip(&manifest.parts)
            .map(|(kept, part)| {
                // If each job has its own paths, a part that holds this job's paths is of no use to any
                // other.
                let kept = kept
                    .as_ref()
                    .filter(|kept| !(kept.path_dependent && moved(part)));
                kept.map(|kept| kept.chunk)
            })
            .collect();
        for (part, kept) in manifest.parts.iter_mut().zip(&kept) {
            part.path_dependent = kept.as_ref().is_some_and(|kept| kept.path_dependent);
        }
        let used: HashSet<(BaseDir, String)> = manifest
            .parts
            .iter()
            .zip(used)
            .filter(|(_, used)| *used)
            .map(|(part, _)| (part.base, part.name.clone()))
            .collect();
        manifest.set_chunks(&chunks);
        let is_used = |part: &CachePart| used.contains(&(part.base, part.name.clone()));
        let changed =
            manifest.carry_over_usage(&job.before, hours(self.clock.time(&self.client)), is_used);
        let units = manifest.parts.iter().filter(|part| part.is_unit()).count();
        let crates = manifest.parts.iter().filter(|part| is_crate(part)).count();
        self.activity.note(|activity| {
            let cargo = activity.cargo.get_or_insert_default();
            cargo.kept_units = units as u64;
            cargo.kept_crates = crates as u64;
        });
        let key = manifest_key(job.request.build_key, self.config.lane);
        if manifest.parts.is_empty() || (!changed && job.key == Some(key)) {
            return Ok(());
        }
        let bytes = manifest.to_bytes()?;
        self.store_object(key, &mut io::Cursor::new(bytes))?;
        Ok(())
    }

    /// Stores the content of these parts, whose paths begin in `folders`. Returns for each part of the
    /// manifest what was stored of it.
    fn store_parts(
        &self,
        job: &CargoJob,
        manifest: &CacheManifest,
        folders: &[PathBuf],
        numbers: &[usize],
        deadline: Instant,
    ) -> Result<Vec<Option<StoredPart>>, CannotSave> {
        let before: HashMap<(BaseDir, &str), &CachePart> = job
            .before
            .parts
            .iter()
            .filter_map(|part| Some(((job.base_in(part, manifest)?, part.name.as_str()), part)))
            .collect();
        let others = self
            .table
            .lock()
            .objects()
            .any(|(key, _)| is_cargo_key(*key));
        let all_kept = Mutex::new(vec![None; manifest.parts.len()]);
        let late = AtomicBool::new(false);
        in_parallel(numbers, |number| {
            if Instant::now() > deadline {
                late.store(true, Ordering::Relaxed);
                return;
            }
            let (Some(part), Some(folder)) = (manifest.parts.get(*number), folders.get(*number))
            else {
                return;
            };
            let same = before
                .get(&part.id())
                .filter(|before| before.entries == part.entries && self.has(before.chunk))
                .map(|before| StoredPart {
                    chunk: before.chunk,
                    path_dependent: before.path_dependent,
                });
            let kept = match same {
                Some(same) => Ok(same),
                None => self.store_part(part, folder, &job.request.places.checkout, others),
            };
            match kept {
                Ok(kept) => {
                    if let Some(place) = lock(&all_kept).get_mut(*number) {
                        *place = Some(kept);
                    }
                }
                // A process that a step left behind may use it.
                Err(error) => self
                    .activity
                    .retry("a part of the cargo cache was not saved", &error),
            }
        });
        if late.into_inner() {
            Err(CannotSave::Late)
        } else {
            Ok(all_kept.into_inner().unwrap_or_default())
        }
    }

    /// Stores the content of a part, whose paths begin in `folder`. If there are chunks of `others`, it may
    /// be among them.
    fn store_part(
        &self,
        part: &CachePart,
        folder: &Path,
        checkout: &Path,
        others: bool,
    ) -> io::Result<StoredPart> {
        if part.length() > PART_LIMIT {
            return Err(io::Error::other("it is too large"));
        }
        let paths = [folder, checkout];
        let paths: &[&Path] = if part.is_unit() { &paths } else { &[] };
        let kept = |content: ContentDigest| -> io::Result<StoredPart> {
            let holds_code_of_paths = || {
                let none = included::holds_paths_of_no_code_only(folder, checkout, part);
                none.map(|none| !none)
            };
            Ok(StoredPart {
                chunk: chunk_key(content.digest),
                path_dependent: content.holds_paths && holds_code_of_paths()?,
            })
        };
        if others {
            let kept = kept(files::digest(folder, &part.entries, paths)?)?;
            if self.has(kept.chunk) {
                return Ok(kept);
            }
        }
        let mut content = tempfile::spooled_tempfile_in(PART_IN_MEMORY, &self.config.folder);
        let kept = kept(files::compress(folder, &part.entries, paths, &mut content)?)?;
        let (_, length) = self.store_object(kept.chunk, &mut content)?;
        self.activity.note(|activity| {
            let cargo = activity.cargo.get_or_insert_default();
            cargo.new_parts += 1;
            cargo.new_bytes += length;
        });
        Ok(kept)
    }

    /// Whether an object is available. If so, marks it as used by this job.
    fn has(&self, key: ObjectKey) -> bool {
        let mut objects = self.table.lock();
        let has = objects.has(key);
        if has {
            objects.mark_used(key);
        }
        has
    }
}

/// A part in the store.
#[derive(Clone, Copy, Debug)]
struct StoredPart {
    chunk: ObjectKey,
    path_dependent: bool,
}

impl CargoJob {
    /// The base directory in `manifest`, that of the job's end, of a part of the manifest that the job
    /// began with.
    fn base_in(&self, part: &CachePart, manifest: &CacheManifest) -> Option<BaseDir> {
        let BaseDir::Build(number) = part.base else {
            return Some(part.base);
        };
        // A part that holds other paths was not restored.
        if part.path_dependent && !self.build_of(part)?.is_unmoved {
            return None;
        }
        let place = &self.before.builds.get(number as usize)?.place;
        let number = manifest
            .builds
            .iter()
            .position(|build| build.place == *place)?;
        Some(BaseDir::Build(u32::try_from(number).ok()?))
    }

    /// Whether the build directory of a part of `manifest`, that of the job's end, was elsewhere in the job
    /// before.
    fn has_moved(&self, manifest: &CacheManifest, part: &CachePart) -> bool {
        let BaseDir::Build(number) = part.base else {
            return false;
        };
        let build = manifest.builds.get(number as usize);
        let mut before = self.before.builds.iter();
        before.any(|before| {
            build.is_some_and(|build| build.place == before.place && build.paths != before.paths)
        })
    }
}

/// Builds a manifest of the parts on the disk that a lockfile asks for.
struct ManifestBuilder {
    /// The parts, without their chunks.
    manifest: CacheManifest,
    /// The folder that each part's paths begin in.
    folders: Vec<PathBuf>,
    /// Whether the job used each part, as far as can be told.
    used: Vec<bool>,
}

impl ManifestBuilder {
    fn of(request: &CargoRequest, lockfile: &Lockfile) -> io::Result<Self> {
        let mut builder = Self {
            manifest: CacheManifest::default(),
            folders: Vec::new(),
            used: Vec::new(),
        };
        let places = &request.places;
        // Crates come first, so that they are in packs together: another toolchain wants only these.
        for item in home::find(&places.home, lockfile)? {
            let part = CachePart {
                base: item.base,
                name: item.name,
                commit_marker: item.commit_marker,
                package: item.package,
                entries: item.entries,
                chunk: NO_CHUNK,
                needs: Vec::new(),
                used: 0,
                path_dependent: false,
            };
            let folder = match item.base {
                BaseDir::Git => "git",
                BaseDir::Registry | BaseDir::Build(_) => "registry",
            };
            builder.add(part, places.home.join(folder), true);
        }
        for build in build_directories(request) {
            let Some(place) = places.place_of(&build) else {
                continue;
            };
            let found = units::find(&build, &places.home)?;
            if found.units.is_empty() {
                continue;
            }
            let base = BaseDir::Build(builder.manifest.builds.len() as u32);
            builder.manifest.builds.push(BuildDirectory {
                place,
                paths: places.digest(&build),
            });
            builder.add_units(base, &build, found);
        }
        Ok(builder)
    }

    fn add(&mut self, part: CachePart, folder: PathBuf, used: bool) {
        self.manifest.parts.push(part);
        self.folders.push(folder);
        self.used.push(used);
    }

    fn add_units(&mut self, base: BaseDir, build: &Path, found: units::UnitScan) {
        let first = self.manifest.parts.len() as u32;
        for unit in found.units {
            let number = |need: &u32| need.saturating_add(first);
            let part = CachePart {
                base,
                name: unit.commit_marker.clone(),
                commit_marker: Some(unit.commit_marker),
                package: unit.package,
                entries: unit.entries,
                chunk: NO_CHUNK,
                needs: unit.needs.iter().map(number).collect(),
                used: 0,
                path_dependent: false,
            };
            self.add(
                part,
                build.to_owned(),
                unit.used || !found.has_workspace_units,
            );
        }
    }
}

/// The chunk of a part that has none yet.
const NO_CHUNK: ObjectKey = ObjectKey([0; 32]);

/// The build directories that are known from the beginning, and then the others that the wrapper was called
/// for.
fn build_directories(request: &CargoRequest) -> Vec<PathBuf> {
    let known = request
        .places
        .workspaces
        .iter()
        .map(|its| its.build.clone());
    let profiles = StateDir::at(request.state.clone()).noted_profiles();
    let noted = profiles
        .iter()
        .filter(|profile| !request.places.is_known(profile))
        .filter_map(|profile| units::build_directory_of(profile));
    let mut directories: Vec<PathBuf> = Vec::new();
    for directory in known.chain(noted.map(Path::to_owned)) {
        if !directories.contains(&directory) {
            directories.push(directory);
        }
    }
    directories
}
