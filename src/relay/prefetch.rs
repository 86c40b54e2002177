//! The reads at a relay's start: the indexes of all scopes, and the packs that this lane used last.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::cargo_cache::manifest::is_cargo_key;
use crate::clock::Timestamp;
use crate::packs::chain::ChainState;
use crate::packs::index::{Pack, Runs};
use crate::relay::{Relay, delay_after};

/// How often, and for how long, the relay tries to read an index again.
const LOAD_ATTEMPTS: u32 = 3;
const LOAD_LIMIT: Duration = Duration::from_secs(60);

/// How many bytes of the newest packs a lane without a history prefetches at most.
const PREFETCH_LIMIT: u64 = 256 << 20;

/// How many bytes any lane prefetches at most: a runner's disk is for the build. The relay fetches the rest
/// on demand.
const LANE_PREFETCH_LIMIT: u64 = 2 << 30;

/// Says that the indexes are read when it is dropped, even if their reader panics: nothing should wait for
/// them then.
struct Loaded<'a>(&'a watch::Sender<bool>);

impl Drop for Loaded<'_> {
    fn drop(&mut self) {
        self.0.send_replace(true);
    }
}

impl Relay {
    /// Reads the indexes of all scopes, and starts to fetch the packs that this lane used last.
    pub(super) async fn load(self: Arc<Self>) {
        let _loaded = Loaded(&self.loaded);
        {
            let mut chains = self.writer.chains().lock().await;
            let reads = chains.iter_mut().map(|chain| self.load_scope(chain));
            join_all(reads).await;
            let mut objects = self.table.lock();
            // The job's own scope comes first and has the last word.
            for chain in chains.iter_mut().rev() {
                objects.add_index(chain);
            }
            let (packs, count) = (objects.packs.len(), objects.objects().count());
            let bytes = objects.packs.iter().map(|pack| pack.data_length).sum();
            self.activity.note(|activity| {
                activity.known_packs = packs as u64;
                activity.known_objects = count as u64;
                activity.known_bytes = bytes;
                activity.earlier_runs = earlier_runs(&chains, self.config.lane);
            });
            let wanted = wanted_packs(&chains, self.config.lane);
            for name in &wanted {
                if let Some(pack) = objects.pack_number(name) {
                    self.downloads.start(&mut objects, pack);
                }
            }
        }
    }

    async fn load_scope(&self, chain: &mut ChainState) {
        let begin = Instant::now();
        let mut attempt = 0;
        while let Err(error) = chain
            .refresh(&self.client, self.clock.time(&self.client))
            .await
        {
            attempt += 1;
            let delay = delay_after(&error, attempt)
                .filter(|delay| attempt < LOAD_ATTEMPTS && begin.elapsed() + *delay < LOAD_LIMIT);
            match delay {
                Some(delay) => {
                    self.activity.retry("cannot read the index", &error);
                    tokio::time::sleep(delay).await;
                }
                None => {
                    self.activity.error("cannot read the index", &error);
                    break;
                }
            }
        }
        if let Some(unreadable) = chain.unreadable.take() {
            self.activity.error("an index is damaged", &unreadable);
        }
    }
}

/// The packs to prefetch: those that the lane used last, or the newest if the lane has no history.
fn wanted_packs(chains: &[ChainState], lane: u64) -> BTreeSet<String> {
    let lanes = chains
        .iter()
        .filter_map(|chain| chain.index.lanes.get(&lane));
    let lane = lanes.max();
    let limit = match lane {
        Some(_) => LANE_PREFETCH_LIMIT,
        None => PREFETCH_LIMIT,
    };
    let mut packs: BTreeMap<(Timestamp, &str), u64> = BTreeMap::new();
    for (name, pack) in chains.iter().flat_map(|chain| &chain.index.packs) {
        if lane.is_none_or(|lane| lane.packs.contains(name)) && !is_cargo_pack(pack) {
            packs.insert((pack.created, name), pack.data_length);
        }
    }
    let mut bytes = 0u64;
    let newest = packs.into_iter().rev();
    newest
        .take_while(|(_, length)| {
            bytes = bytes.saturating_add(*length);
            bytes <= limit
        })
        .map(|((_, name), _)| name.to_owned())
        .collect()
}

/// The results of this lane's last runs: those of the job's own scope, before them those of its base, and
/// before these those of the default branch.
fn earlier_runs(chains: &[ChainState], lane: u64) -> Runs {
    let mut runs = Runs::default();
    let lanes = chains.iter().map(|chain| chain.index.lanes.get(&lane));
    for lane in lanes.flatten() {
        runs.extend_backwards(&lane.runs);
    }
    runs
}

/// Whether most of a pack belongs to the cargo cache, which fetches its packs once it knows which it wants.
fn is_cargo_pack(pack: &Pack) -> bool {
    let objects = pack.objects.iter();
    let cargos = objects.filter(|(key, _)| is_cargo_key(**key));
    let bytes = cargos.fold(0, |sum: u64, (_, object)| sum.saturating_add(object.length));
    pack.bundle.is_none() && bytes.saturating_mul(2) > pack.data_length
}
