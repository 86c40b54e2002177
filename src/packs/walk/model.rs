//! A model of the chain that a checker exhausts: jobs that take each step of [`Walk`] at any moment, beside
//! a cache service that evicts, lags behind and grants a number twice.

use std::collections::{BTreeMap, BTreeSet};

use stateright::{Checker, HasDiscoveries, Model, Property};

use super::*;

/// No time passes here.
const NOW: Timestamp = Timestamp::UNIX_EPOCH;

/// A writer, by its position among the writers.
type Writer = u8;

/// The packs of an index: the writer of each number.
type Packs = BTreeMap<u64, Writer>;

/// The bounds of a model, and the behaviour of its service.
#[derive(Clone, Debug, Default)]
struct ChainModel {
    writers: u8,
    readers: u8,
    /// Entries that the service may evict.
    evictions: u8,
    /// Whether look-ups may lag behind commits.
    lags: bool,
    /// How often the service may grant a number that it has granted already.
    doubles: u8,
    /// A mistake of the writers, to show that the checker would find it.
    mistake: Option<Mistake>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mistake {
    /// They do not name what they have not read.
    NamesNothing,
    /// They leave out the number after a refused one.
    LeavesOutNumbers,
    /// They read nothing in place of a full index that is gone.
    ForgetsBase,
}

/// The state of a number at the service.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Slot {
    Reserved,
    Entry(ModelEntry),
    Evicted,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct ModelEntry {
    by: Writer,
    /// How many entries were made before it.
    age: u8,
    /// Whether look-ups see it.
    visible: bool,
    /// The packs that it lists itself.
    packs: Packs,
    /// The entry with the full index that it is the difference to, and the packs that are as there.
    base: Option<(u64, BTreeSet<u64>)>,
    unmerged: BTreeMap<u64, Timestamp>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Phase {
    Waiting,
    Reading,
    Uploading(u64),
    Saved(u64),
    Read,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct ModelJob {
    phase: Phase,
    walk: Walk,
    packs: Packs,
    /// The entry that a look-up found and that is not read yet.
    found: Option<u64>,
    /// The full index that it writes the difference to.
    base: Option<(u64, Packs)>,
    /// The packs that finished jobs had saved, and look-ups showed, when this one began.
    owed: Packs,
}

impl ModelJob {
    fn new() -> Self {
        Self {
            phase: Phase::Waiting,
            walk: Walk::default(),
            packs: Packs::new(),
            found: None,
            base: None,
            owed: Packs::new(),
        }
    }

    fn prefer_base(&mut self, key: u64, index: Packs) {
        if self.base.as_ref().is_none_or(|(mine, _)| *mine < key) {
            self.base = Some((key, index));
        }
    }

    /// The full index of an entry: as this job read it before, or as the service has it.
    fn full_index(&self, state: &ModelState, key: u64) -> Option<Packs> {
        if let Some((mine, index)) = &self.base
            && *mine == key
        {
            return Some(index.clone());
        }
        let entry = state.entry(key).filter(|entry| entry.visible)?;
        Some(entry.packs.clone()).filter(|_| entry.base.is_none())
    }

    fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Saved(_) | Phase::Read)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct ModelState {
    slots: BTreeMap<u64, Slot>,
    /// The writers, then the readers.
    jobs: Vec<ModelJob>,
    made: u8,
    evictions: u8,
    /// Whether a job's reading ended without a pack that it was owed.
    fails: bool,
    /// Numbers that were granted more than once.
    doubled: BTreeSet<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Action {
    Begin(usize),
    LookUp(usize),
    ReadEntry(usize),
    Reserve(usize),
    /// The service grants the number though it is taken.
    ReserveDouble(usize),
    EndReading(usize),
    /// The entry has the difference to a full index, if the writer knows one.
    Commit(usize),
    CommitFull(usize),
    Show(u64),
    Evict(u64),
}

impl ModelState {
    fn entry(&self, number: u64) -> Option<&ModelEntry> {
        match self.slots.get(&number)? {
            Slot::Entry(entry) => Some(entry),
            Slot::Reserved | Slot::Evicted => None,
        }
    }

    fn visible(&self) -> impl Iterator<Item = (u64, &ModelEntry)> {
        let entries = self
            .slots
            .keys()
            .filter_map(|number| Some((*number, self.entry(*number)?)));
        entries.filter(|(_, entry)| entry.visible)
    }

    fn look_up(&self, lookup: &Lookup) -> Option<u64> {
        match lookup {
            Lookup::Newest => {
                let newest = self.visible().max_by_key(|(_, entry)| entry.age);
                newest.map(|(number, _)| number)
            }
            Lookup::FirstOf(numbers) => {
                let seen = |number: &&u64| self.entry(**number).is_some_and(|entry| entry.visible);
                numbers.iter().find(seen).copied()
            }
        }
    }

    /// The packs that a job must find if it begins now, as long as the service keeps them.
    fn saved(&self) -> Packs {
        let saved = |entry: &ModelEntry, number| {
            let job = self.jobs.get(usize::from(entry.by));
            job.is_some_and(|job| job.phase == Phase::Saved(number))
        };
        let entries = self
            .visible()
            .filter(|(number, entry)| saved(entry, *number));
        entries.map(|(number, entry)| (number, entry.by)).collect()
    }

    /// Whether a job whose reading is over has all that it was owed and the service still keeps.
    fn has_what_it_is_owed(&self, job: &ModelJob) -> bool {
        job.owed.iter().all(|(number, writer)| {
            let kept = self.entry(*number).is_some_and(|entry| entry.by == *writer);
            // If two writers were granted a number, only one's content is there, and an index may be of the
            // other.
            !kept || self.doubled.contains(number) || job.packs.get(number) == Some(writer)
        })
    }
}

impl ChainModel {
    fn number_for(&self, job: &ModelJob) -> Option<u64> {
        let number = job.walk.next_number()?;
        match self.mistake {
            Some(Mistake::LeavesOutNumbers) if !job.walk.unmerged().is_empty() => Some(number + 1),
            _ => Some(number),
        }
    }

    fn actions_of(
        &self,
        state: &ModelState,
        number: usize,
        job: &ModelJob,
        actions: &mut Vec<Action>,
    ) {
        let writes = number < usize::from(self.writers);
        match job.phase {
            // Writers are alike, so any order stands for all.
            Phase::Waiting => {
                let earlier = number
                    .checked_sub(1)
                    .and_then(|number| state.jobs.get(number));
                let waits = earlier.is_some_and(|job| job.phase == Phase::Waiting);
                if !waits || number == usize::from(self.writers) {
                    actions.push(Action::Begin(number));
                }
            }
            Phase::Reading if job.found.is_some() => actions.push(Action::ReadEntry(number)),
            Phase::Reading if job.walk.next_lookup().is_some() => {
                actions.push(Action::LookUp(number))
            }
            Phase::Reading if writes => {
                actions.push(Action::Reserve(number));
                let taken = self.number_for(job).and_then(|next| state.slots.get(&next));
                let once = state.doubled.len() < usize::from(self.doubles);
                if once && matches!(taken, Some(Slot::Reserved | Slot::Entry(_))) {
                    actions.push(Action::ReserveDouble(number));
                }
            }
            Phase::Reading => actions.push(Action::EndReading(number)),
            // A writer that dies is one that never does: no other job waits for it.
            Phase::Uploading(_) => {
                actions.push(Action::Commit(number));
                if job.base.is_some() {
                    actions.push(Action::CommitFull(number));
                }
            }
            Phase::Saved(_) | Phase::Read => {}
        }
    }

    fn reserve(&self, state: &mut ModelState, number: usize, double: bool) -> Option<()> {
        let job = state.jobs.get_mut(number)?;
        let next = self.number_for(job)?;
        let taken = state.slots.contains_key(&next);
        if taken && !double {
            job.walk.mark_refused(next, NOW);
            return Some(());
        }
        if double {
            state.doubled.insert(next);
        } else {
            state.slots.insert(next, Slot::Reserved);
        }
        job.walk.mark_granted(next);
        job.phase = Phase::Uploading(next);
        self.end_reading(state, number)
    }

    /// Notes whether the job has all that it was owed, which nothing later changes.
    fn end_reading(&self, state: &mut ModelState, number: usize) -> Option<()> {
        let has = state.has_what_it_is_owed(state.jobs.get(number)?);
        state.fails |= !has;
        let job = state.jobs.get_mut(number)?;
        job.owed.clear();
        Some(())
    }

    fn commit(&self, state: &mut ModelState, number: usize) -> Option<()> {
        let by = u8::try_from(number).ok()?;
        let job = state.jobs.get_mut(number)?;
        let Phase::Uploading(key) = job.phase else {
            return None;
        };
        job.packs.insert(key, by);
        let base = job.base.take().map(|(base, index)| {
            let is_there = |(number, writer): (&u64, &Writer)| {
                (job.packs.get(number) == Some(writer)).then_some(*number)
            };
            let same: BTreeSet<u64> = index.iter().filter_map(is_there).collect();
            job.packs.retain(|number, _| !same.contains(number));
            (base, same)
        });
        let named = self.mistake != Some(Mistake::NamesNothing);
        let entry = ModelEntry {
            by,
            age: state.made,
            visible: !self.lags,
            packs: job.packs.clone(),
            base,
            unmerged: if named {
                job.walk.unmerged().clone()
            } else {
                BTreeMap::new()
            },
        };
        *job = ModelJob {
            phase: Phase::Saved(key),
            ..ModelJob::new()
        };
        state.made += 1;
        state.slots.insert(key, Slot::Entry(entry));
        Some(())
    }

    /// Has a job add the index of an entry, as `ChainState::add_index` does.
    fn add(&self, state: &ModelState, job: &mut ModelJob, key: u64, entry: ModelEntry) {
        job.walk.mark_read(key, entry.unmerged);
        match entry.base {
            None => job.prefer_base(key, entry.packs.clone()),
            Some((base, same)) => match job.full_index(state, base) {
                Some(full) => {
                    let listed = full.iter().filter(|(number, _)| same.contains(number));
                    job.packs.extend(listed);
                    job.prefer_base(base, full);
                }
                None if self.mistake == Some(Mistake::ForgetsBase) => {}
                None => job.walk.mark_base_lost(key, same, NOW),
            },
        }
        job.packs.extend(entry.packs);
    }

    fn change(&self, state: &mut ModelState, action: Action) -> Option<()> {
        match action {
            Action::Begin(number) => {
                let owed = state.saved();
                let job = state.jobs.get_mut(number)?;
                job.owed = owed;
                job.walk.start();
                job.phase = Phase::Reading;
            }
            Action::LookUp(number) => {
                let lookup = state.jobs.get(number)?.walk.next_lookup()?;
                let found = state.look_up(&lookup);
                let job = state.jobs.get_mut(number)?;
                job.found = job.walk.record_answer(&lookup, found, NOW);
            }
            Action::ReadEntry(number) => {
                let key = state.jobs.get_mut(number)?.found.take()?;
                let entry = state.entry(key).cloned();
                let mut job = state.jobs.get(number)?.clone();
                match entry {
                    Some(entry) => self.add(state, &mut job, key, entry),
                    None => job.walk.mark_unreadable(key, NOW),
                }
                *state.jobs.get_mut(number)? = job;
            }
            Action::Reserve(number) => self.reserve(state, number, false)?,
            Action::ReserveDouble(number) => self.reserve(state, number, true)?,
            Action::EndReading(number) => {
                self.end_reading(state, number)?;
                let job = state.jobs.get_mut(number)?;
                *job = ModelJob {
                    phase: Phase::Read,
                    ..ModelJob::new()
                };
            }
            Action::Commit(number) => self.commit(state, number)?,
            Action::CommitFull(number) => {
                state.jobs.get_mut(number)?.base = None;
                self.commit(state, number)?;
            }
            Action::Show(key) => {
                if let Some(Slot::Entry(entry)) = state.slots.get_mut(&key) {
                    entry.visible = true;
                }
            }
            Action::Evict(key) => {
                state.slots.insert(key, Slot::Evicted);
                state.evictions += 1;
            }
        }
        Some(())
    }
}

impl Model for ChainModel {
    type State = ModelState;
    type Action = Action;

    fn init_states(&self) -> Vec<ModelState> {
        vec![ModelState {
            slots: BTreeMap::new(),
            jobs: vec![ModelJob::new(); usize::from(self.writers + self.readers)],
            made: 0,
            evictions: 0,
            fails: false,
            doubled: BTreeSet::new(),
        }]
    }

    fn actions(&self, state: &ModelState, actions: &mut Vec<Action>) {
        for (number, job) in state.jobs.iter().enumerate() {
            self.actions_of(state, number, job, actions);
        }
        for key in state.slots.keys() {
            let Some(entry) = state.entry(*key) else {
                continue;
            };
            if !entry.visible {
                actions.push(Action::Show(*key));
            }
            if state.evictions < self.evictions {
                actions.push(Action::Evict(*key));
            }
        }
    }

    fn next_state(&self, state: &ModelState, action: Action) -> Option<ModelState> {
        let mut next = state.clone();
        self.change(&mut next, action)?;
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(SAFE, |_, state: &ModelState| !state.fails),
            Property::always(ENDS, |model: &Self, state: &ModelState| {
                let mut jobs = state.jobs.iter().enumerate();
                jobs.all(|(number, job)| {
                    let mut actions = Vec::new();
                    model.actions_of(state, number, job, &mut actions);
                    let waits = job.phase == Phase::Waiting;
                    waits || job.is_over() || !actions.is_empty()
                })
            }),
            Property::sometimes("all writers save", |_, state: &ModelState| {
                state.jobs.iter().all(ModelJob::is_over)
            }),
        ]
    }
}

const SAFE: &str = "a later job finds what a finished one saved";

/// No job waits for another, and none goes on for ever: every path through the states ends, since each
/// step of a walk is counted.
const ENDS: &str = "every job ends";

/// Visits every state and says how many there are.
#[track_caller]
fn exhaust(what: &str, chain: ChainModel) {
    let checker = chain.checker().threads(2).spawn_bfs().join();
    checker.assert_properties();
    println!("{what}: {} states", checker.unique_state_count());
}

/// Asserts that the checker finds a way to lose an object.
#[track_caller]
fn assert_loses(chain: ChainModel) {
    let lost = HasDiscoveries::AnyFailures;
    let checker = chain
        .checker()
        .threads(2)
        .finish_when(lost)
        .spawn_bfs()
        .join();
    checker.assert_any_discovery(SAFE);
}

const THREE: ChainModel = ChainModel {
    writers: 3,
    readers: 0,
    evictions: 1,
    lags: false,
    doubles: 0,
    mistake: None,
};

/// Whether the models that take minutes are to be exhausted.
fn in_full() -> bool {
    std::env::var_os("SCCACHE_ACTION_TEST_MODEL").is_some_and(|value| value == "full")
}

// A reader changes nothing that another job sees, so one stands for any number; and a writer reads
// before it writes, so it is one as well.
#[test]
fn in_every_order_of_three_writers_a_later_job_finds_what_a_finished_one_saved() {
    exhaust("three writers", THREE);
    exhaust(
        "two writers and two readers",
        ChainModel {
            writers: 2,
            readers: 2,
            ..THREE
        },
    );
    if in_full() {
        exhaust(
            "three writers and a reader",
            ChainModel {
                readers: 1,
                ..THREE
            },
        );
        exhaust(
            "three writers and two readers",
            ChainModel {
                readers: 2,
                evictions: 0,
                ..THREE
            },
        );
    }
}

#[test]
fn look_ups_that_lag_behind_lose_nothing_that_they_showed_once() {
    exhaust(
        "three writers whose look-ups lag",
        ChainModel {
            lags: true,
            ..THREE
        },
    );
    if in_full() {
        let readers = ChainModel {
            lags: true,
            readers: 1,
            evictions: 0,
            ..THREE
        };
        exhaust("three writers and a reader whose look-ups lag", readers);
    }
}

#[test]
fn a_service_that_grants_a_number_twice_loses_nothing_under_other_numbers() {
    exhaust(
        "three writers, a number granted twice",
        ChainModel {
            doubles: 1,
            ..THREE
        },
    );
}

#[test]
fn a_writer_that_named_nothing_or_left_out_numbers_would_lose_objects() {
    for mistake in [
        Mistake::NamesNothing,
        Mistake::LeavesOutNumbers,
        Mistake::ForgetsBase,
    ] {
        assert_loses(ChainModel {
            mistake: Some(mistake),
            readers: 1,
            ..THREE
        });
    }
}
