//! The walk along the entries of a chain: which entry a job looks up next, as a function of what it has
//! found so far.
//!
//! Nothing here asks the service: [`Walk::next_lookup`] says what to look up next, and the caller looks it
//! up and reports what it found. `chain` does so with the client of the cache service, the tests with a
//! model of a service that a checker exhausts.
//!
//! A number is taken once it was reserved, whether its entry is ever committed or not. A job takes the next
//! number only after it found the ones before it taken, and its entry names those of them that it has not
//! read. So each entry has or names all before it.

use std::collections::{BTreeMap, BTreeSet};

use crate::clock::Timestamp;

/// How many numbers one look-up has: a key and nine restore keys, which is what GitHub takes.
pub const NUMBERS_AT_ONCE: u64 = 10;

/// How many entries are read in one walk. Each but the first is one that a job wrote at the same time
/// as another, and the next entry has them all.
const READS: usize = 24;

/// How many look-ups one walk has. Each finds an entry or rules out ten numbers.
pub const LOOKUPS: usize = 32;

/// How many times as long a walk may be if a full index is gone, and each of its packs has to be read for
/// its own objects: enough for 10 GB in packs of 64 MiB, and some more.
const WIDE_FACTOR: usize = 8;

/// How many look-ups search for entries before a newest one that cannot be read.
const SEARCHES_BACK: u8 = 2;

/// How many numbers in a row may turn out to be taken.
const REFUSALS: u32 = 32;

/// After how many such numbers the entries are read again.
const READ_EVERY: u32 = 8;

/// A look-up.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Lookup {
    /// The entry that was committed last.
    Newest,
    /// The first of these numbers that has an entry.
    FirstOf(Vec<u64>),
}

/// The purpose of the next look-ups.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
enum WalkStage {
    /// None: the walk is at its end.
    #[default]
    Done,
    /// The entry that was committed last.
    Newest,
    /// An entry before a newest one that could not be read.
    Back { below: u64, left: u8 },
    /// Entries after the greatest known number: look-ups lag behind commits, and the entry that was
    /// committed last may not be the last by number.
    Beyond,
    /// Entries that others name and had not read.
    Unmerged,
}

/// The state of a job's walk: what it knows of a chain's numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Walk {
    /// The greatest number that is known to be taken.
    newest: u64,
    /// The numbers whose entries were read.
    merged: BTreeSet<u64>,
    /// Numbers that are taken and whose entries were not read, with when that became known.
    unmerged: BTreeMap<u64, Timestamp>,
    stage: WalkStage,
    /// The greatest number that was known before the look-up that found the entry to be read.
    known_before: u64,
    /// The numbers that this walk looked up and did not find, or could not read.
    tried: BTreeSet<u64>,
    lookups: usize,
    reads: usize,
    /// Whether a full index is gone, so that its packs are read one by one.
    wide: bool,
    /// How many numbers in a row were refused.
    refused: u32,
}

impl Walk {
    /// The greatest number that is known to be taken.
    pub fn newest(&self) -> u64 {
        self.newest
    }

    /// The numbers that are taken and whose entries were not read, with when that became known, in
    /// seconds since 1970. An entry that is written now has to name them.
    pub fn unmerged(&self) -> &BTreeMap<u64, Timestamp> {
        &self.unmerged
    }

    /// Whether nothing was read so far.
    pub fn is_empty(&self) -> bool {
        self.merged.is_empty()
    }

    /// Starts a new walk, for what was written since.
    pub fn start(&mut self) {
        self.stage = WalkStage::Newest;
        self.tried.clear();
        self.lookups = 0;
        self.reads = 0;
        self.wide = false;
    }

    /// The next look-up; `None` if the walk is at its end.
    pub fn next_lookup(&self) -> Option<Lookup> {
        let times = if self.wide { WIDE_FACTOR } else { 1 };
        if self.lookups >= LOOKUPS * times || self.reads >= READS * times {
            return None;
        }
        // From the greatest down, since each has or names those before it.
        let below = |end: u64| -> Vec<u64> {
            let begin = end.saturating_sub(NUMBERS_AT_ONCE).max(1);
            (begin..end).rev().collect()
        };
        let numbers = match self.stage {
            WalkStage::Done => return None,
            WalkStage::Newest => return Some(Lookup::Newest),
            WalkStage::Back { below: end, .. } => below(end),
            WalkStage::Beyond => below(self.newest.saturating_add(NUMBERS_AT_ONCE + 1)),
            WalkStage::Unmerged => self.untried().collect(),
        };
        Some(Lookup::FirstOf(numbers)).filter(|lookup| *lookup != Lookup::FirstOf(Vec::new()))
    }

    fn untried(&self) -> impl Iterator<Item = u64> {
        let numbers = self.unmerged.keys().rev().copied();
        let untried = numbers.filter(|number| !self.tried.contains(number));
        untried.take(NUMBERS_AT_ONCE as usize)
    }

    /// Takes the answer to `lookup`, as [`Walk::next_lookup`] gave it: the number that was found. Returns
    /// the number whose entry is to be read now; [`Walk::mark_read`] or [`Walk::mark_unreadable`] must
    /// follow.
    pub fn record_answer(
        &mut self,
        lookup: &Lookup,
        found: Option<u64>,
        now: Timestamp,
    ) -> Option<u64> {
        self.lookups += 1;
        self.known_before = self.newest;
        let asked = match lookup {
            Lookup::Newest => &[][..],
            Lookup::FirstOf(numbers) => numbers,
        };
        let found = found.filter(|number| *lookup == Lookup::Newest || asked.contains(number));
        // The first that has an entry was found, so those before it have none that can be seen.
        let unseen: Vec<u64> = asked
            .iter()
            .take_while(|number| Some(**number) != found)
            .copied()
            .collect();
        match (self.stage, found) {
            (WalkStage::Newest, None) if self.newest == 0 => self.stage = WalkStage::Done,
            (WalkStage::Newest, _) => self.stage = WalkStage::Beyond,
            (WalkStage::Back { below, left }, found) => {
                for number in unseen {
                    self.mark_unmerged(number, now);
                }
                let next = found.unwrap_or(below.saturating_sub(NUMBERS_AT_ONCE));
                self.search_back(next, left);
            }
            (WalkStage::Beyond, None) => self.stage = WalkStage::Unmerged,
            (WalkStage::Beyond, Some(_)) => {}
            (WalkStage::Unmerged, _) => self.tried.extend(unseen),
            (WalkStage::Done, _) => {}
        }
        let found = found?;
        self.newest = self.newest.max(found);
        if self.merged.contains(&found) {
            self.end_search_back();
            return None;
        }
        Some(found)
    }

    fn search_back(&mut self, below: u64, left: u8) {
        self.stage = match left.checked_sub(1) {
            Some(left) if below > 1 => WalkStage::Back { below, left },
            _ => WalkStage::Beyond,
        };
    }

    /// Notes that the entry `number`, which was read just now, is the difference to a full index that is
    /// gone. It lists `packs` without their objects.
    pub fn mark_base_lost(
        &mut self,
        number: u64,
        packs: impl IntoIterator<Item = u64>,
        now: Timestamp,
    ) {
        // The later entry has or names all that an earlier one lists, but for what was dropped since.
        if self.merged.last() != Some(&number) {
            return;
        }
        for pack in packs {
            self.mark_unmerged(pack, now);
            self.wide |= self.unmerged.contains_key(&pack);
        }
    }

    fn end_search_back(&mut self) {
        if matches!(self.stage, WalkStage::Back { .. }) {
            self.stage = WalkStage::Beyond;
        }
    }

    /// Notes that the entry `number` was read. It names `others` that its writer had not read, with when
    /// they became known.
    pub fn mark_read(&mut self, number: u64, others: impl IntoIterator<Item = (u64, Timestamp)>) {
        self.reads += 1;
        self.mark_merged(number);
        for (other, since) in others {
            // Its writer can name only those before it.
            if other < number {
                self.mark_unmerged(other, since);
            }
        }
        self.end_search_back();
        self.known_before = 0;
    }

    /// Notes that the entry `number` was found and could not be read: it was evicted meanwhile, or is
    /// damaged.
    pub fn mark_unreadable(&mut self, number: u64, now: Timestamp) {
        self.reads += 1;
        self.tried.insert(number);
        self.mark_unmerged(number, now);
        // The numbers that it has or names are unknown, so this notes all that it may have named.
        let gap = std::mem::take(&mut self.known_before) + 1..number;
        if gap.end.saturating_sub(gap.start) < NUMBERS_AT_ONCE {
            for number in gap {
                self.mark_unmerged(number, now);
            }
        } else if !matches!(self.stage, WalkStage::Back { .. }) {
            self.search_back(number, SEARCHES_BACK);
        }
    }

    /// Notes a number as taken and not read, so that later ones still lead to it.
    fn mark_unmerged(&mut self, number: u64, since: Timestamp) {
        if !self.merged.contains(&number) {
            let noted = self.unmerged.entry(number).or_insert(since);
            *noted = since.min(*noted);
        }
    }

    fn mark_merged(&mut self, number: u64) {
        self.merged.insert(number);
        self.unmerged.remove(&number);
    }

    /// Forgets the numbers that became known before `oldest` and never had an entry to be read.
    pub fn drop_unmerged_before(&mut self, oldest: Timestamp) {
        self.unmerged.retain(|_, since| *since >= oldest);
    }

    /// The number to reserve next; `None` if too many in a row were refused.
    pub fn next_number(&self) -> Option<u64> {
        (self.refused < REFUSALS).then(|| self.newest.saturating_add(1))
    }

    /// Notes that the service granted `number` to this job.
    pub fn mark_granted(&mut self, number: u64) {
        self.newest = self.newest.max(number);
        self.refused = 0;
    }

    /// Notes that `number` is taken. At some of these refusals a new walk starts.
    pub fn mark_refused(&mut self, number: u64, now: Timestamp) {
        self.newest = self.newest.max(number);
        self.mark_unmerged(number, now);
        // At the first refusal, since there may be a whole chain to read; then seldom, since a job that
        // took the number a moment ago is still uploading, and the next job reads its entry.
        if self.refused.is_multiple_of(READ_EVERY) {
            self.start();
        }
        self.refused += 1;
    }

    /// Notes that no number was granted, so that the next attempt starts again.
    pub fn reset_refusals(&mut self) {
        self.refused = 0;
    }

    /// Notes that this job's entry `number` is committed, with all that the job knew.
    pub fn mark_committed(&mut self, number: u64) {
        self.mark_merged(number);
    }
}

#[cfg(test)]
mod model;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(seconds: u64) -> Timestamp {
        Timestamp::from_seconds(seconds)
    }

    /// Jobs that end in the same second. `steps` says whose turn it is; a job whose turn it is looks up,
    /// reserves, or commits. Returns the greatest number of look-ups and of refusals that a job had.
    fn together(jobs: usize, steps: &mut dyn FnMut(usize) -> usize) -> (usize, usize) {
        let mut walks = vec![Walk::default(); jobs];
        let mut lookups = vec![0; jobs];
        let mut refusals = vec![0; jobs];
        let mut reserved: Vec<usize> = Vec::new();
        let mut entries: BTreeMap<u64, Vec<(u64, Timestamp)>> = BTreeMap::new();
        let mut left: Vec<usize> = (0..jobs).collect();
        while !left.is_empty() {
            let turn = steps(left.len()) % left.len();
            let job = left[turn];
            let walk = &mut walks[job];
            if let Some(place) = reserved.iter().position(|by| *by == job) {
                let number = place as u64 + 1;
                let named = walk
                    .unmerged()
                    .iter()
                    .map(|(number, since)| (*number, *since));
                entries.insert(number, named.collect());
                left.remove(turn);
            } else if let Some(lookup) = walk.next_lookup() {
                lookups[job] += 1;
                let found = match &lookup {
                    Lookup::Newest => entries.keys().next_back().copied(),
                    Lookup::FirstOf(numbers) => {
                        numbers.iter().find(|n| entries.contains_key(n)).copied()
                    }
                };
                if let Some(number) = walk.record_answer(&lookup, found, at(0)) {
                    walk.mark_read(number, entries[&number].iter().copied());
                }
            } else {
                let number = walk.next_number().unwrap();
                if reserved.len() as u64 >= number {
                    refusals[job] += 1;
                    walk.mark_refused(number, at(0));
                } else {
                    walk.mark_granted(number);
                    reserved.push(job);
                }
            }
        }
        let worst = |counts: &[usize]| counts.iter().max().copied().unwrap_or(0);
        (worst(&lookups), worst(&refusals))
    }

    #[test]
    fn of_twenty_jobs_that_end_in_the_same_second_none_asks_more_than_a_few_times() {
        // In turn, so that all have looked up before any commits.
        let mut next = 0;
        let mut in_turn = |_: usize| {
            next += 1;
            next
        };
        let (lookups, refusals) = together(20, &mut in_turn);
        assert!(
            lookups <= TWENTY_LOOKUPS && refusals <= 19,
            "{lookups} {refusals}"
        );
    }

    /// The most look-ups that [`together`] finds for twenty jobs: each of the other entries is found once,
    /// and each of three walks has up to four look-ups that find nothing new.
    const TWENTY_LOOKUPS: usize = 19 + 3 * 4;

    proptest! {
        #[test]
        fn in_no_order_do_twenty_jobs_ask_more(turns in proptest::collection::vec(0..400usize, 1..2000)) {
            let mut turns = turns.into_iter().cycle();
            let (lookups, refusals) = together(20, &mut |_| turns.next().unwrap_or(0));
            prop_assert!(lookups <= TWENTY_LOOKUPS && refusals <= 19, "{lookups} {refusals}");
        }
    }

    #[test]
    fn a_newest_entry_that_cannot_be_read_leads_to_those_before_it() {
        let mut walk = Walk::default();
        walk.start();
        let newest = walk.next_lookup().unwrap();
        assert_eq!(newest, Lookup::Newest);
        assert_eq!(walk.record_answer(&newest, Some(200), at(5)), Some(200));
        walk.mark_unreadable(200, at(5));
        let before = walk.next_lookup().unwrap();
        assert_eq!(before, Lookup::FirstOf((190..200).rev().collect()));
        assert_eq!(walk.record_answer(&before, Some(198), at(5)), Some(198));
        walk.mark_read(198, [(196, at(3))]);
        // The numbers that an unreadable entry may have had are still named.
        let noted: Vec<_> = walk
            .unmerged()
            .iter()
            .map(|(n, since)| (*n, *since))
            .collect();
        assert_eq!(noted, [(196, at(3)), (199, at(5)), (200, at(5))]);
        let beyond = walk.next_lookup().unwrap();
        assert_eq!(beyond, Lookup::FirstOf((201..211).rev().collect()));
        assert_eq!(walk.record_answer(&beyond, None, at(5)), None);
        let named = walk.next_lookup().unwrap();
        assert_eq!(named, Lookup::FirstOf(vec![199, 196]));
        assert_eq!(walk.record_answer(&named, None, at(5)), None);
        assert_eq!(walk.next_lookup(), None);
        assert_eq!(walk.next_number(), Some(201));
        walk.drop_unmerged_before(at(5));
        assert!(!walk.unmerged().contains_key(&196));
    }

    proptest! {
        #[test]
        fn a_walk_ends_whatever_is_found(
            answers in proptest::collection::vec((0..12usize, any::<bool>(), 0..400u64), 1..40),
        ) {
            let mut walk = Walk::default();
            walk.start();
            let mut answers = answers.into_iter().cycle();
            let mut lookups = 0;
            while let Some(lookup) = walk.next_lookup() {
                lookups += 1;
                prop_assert!(lookups <= LOOKUPS);
                let (which, good, number) = answers.next().unwrap();
                let found = match &lookup {
                    Lookup::Newest => Some(number),
                    Lookup::FirstOf(numbers) => {
                        prop_assert!(numbers.len() as u64 <= NUMBERS_AT_ONCE);
                        numbers.get(which).copied()
                    }
                };
                match walk.record_answer(&lookup, found, at(9)) {
                    Some(number) if good => walk.mark_read(number, [(number / 2, at(1)), (number + 5, at(1))]),
                    Some(number) => walk.mark_unreadable(number, at(9)),
                    None => {}
                }
            }
            prop_assert!(walk.unmerged().keys().all(|number| *number <= walk.newest()));
        }
    }
}
