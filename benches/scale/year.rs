//! A year of a repository's jobs, as far as indexes are concerned: no bytes of objects are made,
//! and no process runs. It writes the same as the relay, by the same functions.

use std::collections::BTreeSet;

use sccache_action::clock::Timestamp;
use sccache_action::digest::Digest;
use sccache_action::packs::index::{
    Index, Lane, Object, ObjectKey, ObjectMap, Pack, RunStats, hours,
};
use sccache_action::packs::pack::{self, Base, OWN};

/// Jobs a day: merges to the default branch, and runs of pull requests, five for each.
const MERGES: u64 = 20;
const PULL_REQUESTS: u64 = 36;
const RUNS: u64 = 5;

/// The objects of a build, those that a job compiles again, and their size in bytes.
const BUILD: u64 = 5000;
const NEW: u64 = 60;
const BYTES: u64 = 46_000;

/// How many bytes the packs of a scope may have.
const LIMIT: u64 = 10 << 30;

/// When the year begins, in seconds since 1970.
const BEGIN: u64 = 1_800_000_000;
const DAY: u64 = 24 * 60 * 60;

/// A chain as the jobs of one scope leave it.
struct Chain {
    scope: String,
    number: u64,
    index: Index,
    base: Option<(Base, Index)>,
}

/// The bytes written.
#[derive(Clone, Copy, Debug, Default)]
pub struct Written {
    /// Bytes of objects.
    pub objects: u64,
    /// Bytes of indexes as they are.
    pub indexes: u64,
    /// Bytes of indexes, had each been full.
    pub full: u64,
    /// Objects that the newest entry of the default branch knows.
    pub known: u64,
    /// The longest index of a day, in bytes.
    pub longest: u64,
}

impl Chain {
    fn new(scope: &str) -> Self {
        Self {
            scope: scope.to_owned(),
            number: 0,
            index: Index::default(),
            base: None,
        }
    }

    /// Writes a pack with these objects, as `Relay::write_pack` does.
    fn write(
        &mut self,
        time: Timestamp,
        new: &[ObjectKey],
        used: &[ObjectKey],
        written: &mut Written,
    ) {
        let hour = hours(time);
        let used: BTreeSet<&ObjectKey> = used.iter().collect();
        for pack in self.index.packs.values_mut() {
            let old = pack
                .objects
                .iter()
                .filter(|(key, object)| object.used + 24 <= hour && used.contains(key));
            let old: Vec<ObjectKey> = old.map(|(key, _)| *key).collect();
            for key in old {
                if let Some(object) = pack.objects.get_mut(&key) {
                    object.used = hour;
                }
            }
        }
        self.index.retain(time, LIMIT);
        let moved = self.index.repack_candidates(4, |_| true);
        let mut objects: Vec<(ObjectKey, Object)> = Vec::new();
        let mut length = 0;
        let mut add = |key: ObjectKey, used: u32| {
            let object = Object {
                offset: length,
                length: BYTES,
                digest: Digest::of(&key.0),
                used,
            };
            length += BYTES;
            objects.push((key, object));
        };
        new.iter().for_each(|key| add(*key, hour));
        for (key, name, object) in self.index.objects() {
            if moved.contains(name) {
                add(*key, object.used);
            }
        }
        self.number += 1;
        let name = format!(
            "sccache-packs/default/linux-x64/{}#{:08}",
            self.scope, self.number
        );
        let mut pack = Pack {
            created: time,
            data_start: 0,
            data_length: length,
            bundle: None,
            objects: ObjectMap::from(objects),
        };
        let mut index = self.index.clone();
        index.packs.retain(|name, _| !moved.contains(name));
        let before = index.lanes.get(&1);
        let before = before
            .into_iter()
            .flat_map(|lane| lane.runs.iter().copied());
        let ran = RunStats {
            ended: time,
            hits: used.len() as u64,
            lookups: (used.len() + new.len()) as u64,
            saved: Some(600),
        };
        let lane = Lane {
            run: time,
            packs: index.packs.keys().cloned().collect(),
            runs: before.chain([ran]).collect(),
        };
        index.lanes.insert(1, lane);
        index.packs.insert(OWN.to_owned(), pack.clone());
        let base = self.base.as_ref().map(|(base, index)| (base, index));
        let head = pack::encode_head(&index, base).unwrap();
        let bytes = head.bytes.len() as u64;
        written.objects += length;
        written.indexes += bytes;
        written.full += pack::encode_head(&index, None).unwrap().bytes.len() as u64;
        written.longest = written.longest.max(bytes);
        pack.data_start = bytes;
        index.packs.remove(OWN);
        index.packs.insert(name.clone(), pack);
        if head.is_full {
            self.base = Some((Base::full(&name), index.clone()));
        } else if let Some((base, _)) = &mut self.base {
            base.before += bytes;
        }
        self.index = index;
    }
}

fn key(number: u64) -> ObjectKey {
    ObjectKey(*blake3::hash(&number.to_le_bytes()).as_bytes())
}

/// Lives through a year, and reports the writes of each day.
pub fn live(days: u64, mut tell: impl FnMut(u64, Written)) {
    let mut main = Chain::new("refs/heads/main");
    let mut next = BUILD;
    let mut build: Vec<ObjectKey> = (0..BUILD).map(key).collect();
    let mut first = Written::default();
    main.write(Timestamp::from_seconds(BEGIN), &build, &[], &mut first);
    for day in 0..days {
        let mut written = Written::default();
        for merge in 0..MERGES {
            let time = Timestamp::from_seconds(BEGIN + day * DAY + merge * DAY / MERGES);
            let fresh: Vec<ObjectKey> = (next..next + NEW).map(key).collect();
            next += NEW;
            // The oldest sources change as often as any.
            for (place, fresh) in fresh.iter().enumerate() {
                let at = (next.wrapping_mul(0x9e37_79b9) + place as u64 * 7919) % BUILD;
                build[at as usize] = *fresh;
            }
            main.write(time, &fresh, &build, &mut written);
        }
        for request in 0..PULL_REQUESTS {
            let mut own = Chain::new(&format!("refs/pull/{request}/merge"));
            let mut compiled = Vec::new();
            for run in 0..RUNS {
                let time = Timestamp::from_seconds(BEGIN + day * DAY + run * 3600);
                let fresh: Vec<ObjectKey> = (next..next + NEW).map(key).collect();
                next += NEW;
                compiled.extend_from_slice(&fresh);
                own.write(time, &fresh, &compiled, &mut written);
            }
        }
        written.known = main
            .index
            .packs
            .values()
            .map(|pack| pack.objects.len() as u64)
            .sum();
        tell(day, written);
    }
}
