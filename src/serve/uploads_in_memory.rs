//! Keeps uploads in memory that the database does not have: most entries of a compiler cache are
//! reserved, sent and committed within milliseconds, and only the last of the three must be on the
//! disk.
//!
//! An upload that takes longer, is large or comes in several pieces is persisted in the database
//! and continues there. Only for a store that no other service has.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::cache_protocol::ids::UploadId;
use crate::cache_protocol::store::{EntryName, StoreError};
use crate::clock::Timestamp;
use crate::serve::catalog::{SmallPart, Unwritten};

/// The uploads that are held. Clones are the same.
#[derive(Clone, Debug, Default)]
pub(crate) struct HeldUploads {
    state: Arc<Mutex<HeldState>>,
}

/// The limit of the content of all uploads, in bytes. Beyond it, uploads move to the database at
/// once.
const ROOM: u64 = 64 << 20;

#[derive(Debug, Default)]
struct HeldState {
    uploads: HashMap<UploadId, HeldUpload>,
    names: HashMap<EntryName, UploadId>,
    /// The bytes of the content of all uploads.
    bytes: u64,
}

#[derive(Debug)]
struct HeldUpload {
    name: EntryName,
    used: Timestamp,
    /// Requests that are sending content.
    writing: usize,
    content: Option<SmallPart>,
    stage: UploadStage,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum UploadStage {
    /// It is not yet known whether the name is free.
    Reserving,
    Open,
    Committing,
    /// It is being persisted.
    Leaving,
    /// It is in the database; requests that began before are still bringing content.
    Left,
}

/// The location of an upload.
#[derive(Debug)]
pub(crate) enum UploadLocation<T> {
    /// Here.
    InMemory(T),
    /// It is moving into the database, or must be moved there.
    Leaving,
    /// In the database, if it is stored at all.
    NotInMemory,
}

/// A request that writes to an upload that was in memory when it began.
#[derive(Debug)]
pub(crate) struct HeldWrite {
    held: HeldUploads,
    upload: UploadId,
}

/// A name that is being reserved. The name is free again when this is dropped.
#[derive(Debug)]
pub(crate) struct HeldReservation {
    held: HeldUploads,
    upload: UploadId,
    kept: bool,
}

impl HeldUploads {
    fn lock(&self) -> MutexGuard<'_, HeldState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to reserve `name` as `upload`. An upload of the same name that was not used since
    /// `abandoned` is given up. Also returns the bytes of such an upload.
    ///
    /// # Errors
    /// [`StoreError::AlreadyExists`] if the name is taken here.
    pub(crate) fn reserve(
        &self,
        name: &EntryName,
        upload: UploadId,
        now: Timestamp,
        abandoned: Timestamp,
    ) -> Result<(HeldReservation, u64), StoreError> {
        let mut state = self.lock();
        let mut given_up = 0;
        if let Some(known) = state.names.get(name).copied() {
            let is_abandoned = state.uploads.get(&known).is_some_and(|known| {
                known.stage == UploadStage::Open && known.writing == 0 && known.used < abandoned
            });
            if !is_abandoned {
                return Err(StoreError::AlreadyExists);
            }
            given_up = state.remove(known).map_or(0, |known| known.bytes());
        }
        state.names.insert(name.clone(), upload);
        let begun = HeldUpload {
            name: name.clone(),
            used: now,
            writing: 0,
            content: None,
            stage: UploadStage::Reserving,
        };
        state.uploads.insert(upload, begun);
        let reserving = HeldReservation {
            held: self.clone(),
            upload,
            kept: false,
        };
        Ok((reserving, given_up))
    }

    /// The name of `upload`.
    pub(crate) fn name_of(&self, upload: UploadId) -> Option<EntryName> {
        let state = self.lock();
        let known = state.uploads.get(&upload)?;
        (known.stage != UploadStage::Left).then(|| known.name.clone())
    }

    /// The upload of this name.
    pub(crate) fn upload_of(&self, name: &EntryName) -> Option<UploadId> {
        self.lock().names.get(name).copied()
    }

    /// Begins to write content to `upload`.
    pub(crate) fn begin_write(
        &self,
        upload: UploadId,
        now: Timestamp,
    ) -> UploadLocation<HeldWrite> {
        let mut state = self.lock();
        let is_full = state.bytes > ROOM;
        match state.uploads.get_mut(&upload) {
            Some(known) if known.stage == UploadStage::Open && is_full => UploadLocation::Leaving,
            Some(known) if known.stage == UploadStage::Open => {
                known.writing += 1;
                known.used = now;
                UploadLocation::InMemory(HeldWrite {
                    held: self.clone(),
                    upload,
                })
            }
            Some(known) if known.stage == UploadStage::Leaving => UploadLocation::Leaving,
            _ => UploadLocation::NotInMemory,
        }
    }

    /// Begins to commit `upload`: returns its name, and its content if it has any.
    /// [`HeldUploads::end_commit`] must follow.
    ///
    /// # Errors
    /// [`StoreError::Busy`] if content is being written, even if the upload has moved to the
    /// database since; [`StoreError::SizeMismatch`].
    pub(crate) fn commit(
        &self,
        upload: UploadId,
        size: u64,
    ) -> Result<UploadLocation<(EntryName, Option<SmallPart>)>, StoreError> {
        let mut state = self.lock();
        let Some(known) = state.uploads.get_mut(&upload) else {
            return Ok(UploadLocation::NotInMemory);
        };
        match known.stage {
            UploadStage::Open | UploadStage::Left if known.writing > 0 => Err(StoreError::Busy),
            UploadStage::Open if known.bytes() != size => Err(StoreError::SizeMismatch {
                actual: known.bytes(),
                claimed: size,
            }),
            UploadStage::Open => {
                known.stage = UploadStage::Committing;
                // Empty content has no part.
                let content = known
                    .content
                    .clone()
                    .filter(|small| !small.bytes.is_empty());
                Ok(UploadLocation::InMemory((known.name.clone(), content)))
            }
            UploadStage::Leaving => Ok(UploadLocation::Leaving),
            // If two commits run at once, the second finds no upload.
            UploadStage::Reserving | UploadStage::Committing | UploadStage::Left => {
                Ok(UploadLocation::NotInMemory)
            }
        }
    }

    /// Ends a commit. Returns the bytes that this frees.
    pub(crate) fn end_commit(&self, upload: UploadId, done: bool) -> u64 {
        let mut state = self.lock();
        if done {
            return state.remove(upload).map_or(0, |known| known.bytes());
        }
        if let Some(known) = state.uploads.get_mut(&upload) {
            known.stage = UploadStage::Open;
        }
        0
    }

    /// Uploads to persist: all that were last used at `until` or before and that no request
    /// writes to, or that of this number. [`HeldUploads::end_move`] must follow.
    pub(crate) fn begin_move(&self, until: Timestamp, only: Option<UploadId>) -> Vec<Unwritten> {
        let mut state = self.lock();
        let chosen = |id: UploadId, known: &HeldUpload| match only {
            Some(only) => id == only,
            None => known.used <= until && known.writing == 0,
        };
        let mut leaving = Vec::new();
        for (id, known) in &mut state.uploads {
            if known.stage == UploadStage::Open && chosen(*id, known) {
                known.stage = UploadStage::Leaving;
                leaving.push(Unwritten {
                    upload: *id,
                    name: known.name.clone(),
                    used: known.used,
                    content: known.content.clone(),
                });
            }
        }
        leaving
    }

    /// Whether `uploads` are in the database now.
    pub(crate) fn end_move(&self, uploads: &[Unwritten], done: bool) {
        let mut state = self.lock();
        for Unwritten { upload, name, .. } in uploads {
            if done {
                state.names.remove(name);
            }
            let Some(known) = state.uploads.get_mut(upload) else {
                continue;
            };
            known.stage = if done {
                UploadStage::Left
            } else {
                UploadStage::Open
            };
            if done {
                let bytes = known.bytes();
                known.content = None;
                state.bytes -= bytes;
                state.forget_unless_used(*upload);
            }
        }
    }

    /// How many uploads are here, and their bytes.
    pub(crate) fn totals(&self) -> (u64, u64) {
        let state = self.lock();
        let own = state
            .uploads
            .values()
            .filter(|known| known.stage != UploadStage::Left)
            .count();
        (own as u64, state.bytes)
    }
}

impl HeldState {
    fn remove(&mut self, upload: UploadId) -> Option<HeldUpload> {
        let known = self.uploads.remove(&upload)?;
        self.names.remove(&known.name);
        self.bytes -= known.bytes();
        Some(known)
    }

    fn forget_unless_used(&mut self, upload: UploadId) {
        let unused = |known: &HeldUpload| known.stage == UploadStage::Left && known.writing == 0;
        if self.uploads.get(&upload).is_some_and(unused) {
            self.uploads.remove(&upload);
        }
    }
}

impl HeldUpload {
    fn bytes(&self) -> u64 {
        self.content
            .as_ref()
            .map_or(0, |small| small.bytes.len() as u64)
    }
}

impl HeldReservation {
    /// The name is free, and the upload's from now on.
    pub(crate) fn keep(mut self) {
        self.kept = true;
        if let Some(known) = self.held.lock().uploads.get_mut(&self.upload) {
            known.stage = UploadStage::Open;
        }
    }
}

impl Drop for HeldReservation {
    fn drop(&mut self) {
        if !self.kept {
            self.held.lock().remove(self.upload);
        }
    }
}

impl HeldWrite {
    /// The client is still there.
    pub(crate) fn heartbeat(&self, now: Timestamp) {
        if let Some(known) = self.held.lock().uploads.get_mut(&self.upload) {
            known.used = now;
        }
    }

    /// The content is complete and replaces the earlier one. Returns the bytes of the earlier one.
    ///
    /// # Errors
    /// The content, if the upload is no longer in memory.
    pub(crate) fn end(self, content: SmallPart, now: Timestamp) -> Result<u64, SmallPart> {
        let mut state = self.held.lock();
        let open = state.uploads.get_mut(&self.upload);
        let Some(known) = open.filter(|known| known.stage == UploadStage::Open) else {
            return Err(content);
        };
        let (before, after) = (known.bytes(), content.bytes.len() as u64);
        known.used = now;
        known.content = Some(content);
        state.bytes = state.bytes - before + after;
        Ok(before)
    }
}

impl Drop for HeldWrite {
    fn drop(&mut self) {
        let mut state = self.held.lock();
        if let Some(known) = state.uploads.get_mut(&self.upload) {
            known.writing -= 1;
        }
        state.forget_unless_used(self.upload);
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::cache_protocol::blob_digests::Digests;
    use crate::cache_protocol::ids::BlobId;

    fn at(milliseconds: u64) -> Timestamp {
        Timestamp::from_milliseconds(milliseconds)
    }

    fn name(key: &str) -> EntryName {
        EntryName {
            scope: "s".into(),
            version: "v".to_owned(),
            key: key.to_owned(),
        }
    }

    fn small(bytes: &'static str) -> SmallPart {
        SmallPart {
            blob: BlobId(1),
            bytes: Bytes::from_static(bytes.as_bytes()),
            digests: Digests::default(),
        }
    }

    fn reserve(held: &HeldUploads, key: &str, upload: u64, now: u64) {
        held.reserve(&name(key), UploadId(upload), at(now), at(0))
            .unwrap()
            .0
            .keep();
    }

    fn begin_write(held: &HeldUploads, upload: UploadId) -> HeldWrite {
        match held.begin_write(upload, at(5)) {
            UploadLocation::InMemory(bringing) => bringing,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_name_is_taken_while_it_is_reserved_and_free_when_that_is_given_up() {
        let held = HeldUploads::default();
        let (reserving, _) = held
            .reserve(&name("a"), UploadId(1), at(10), at(0))
            .unwrap();
        assert!(
            held.reserve(&name("a"), UploadId(2), at(10), at(0))
                .is_err()
        );
        assert!(matches!(
            held.begin_write(UploadId(1), at(10)),
            UploadLocation::NotInMemory
        ));
        drop(reserving);
        reserve(&held, "a", 3, 10);
        // An upload that was not used for long is given up, unless a request is sending content to
        // it.
        assert!(
            held.reserve(&name("a"), UploadId(4), at(20), at(10))
                .is_err()
        );
        let bringing = begin_write(&held, UploadId(3));
        assert!(
            held.reserve(&name("a"), UploadId(4), at(20), at(11))
                .is_err()
        );
        bringing.end(small("abc"), at(10)).unwrap();
        let (reserving, given_up) = held
            .reserve(&name("a"), UploadId(4), at(20), at(11))
            .unwrap();
        assert_eq!(given_up, 3);
        reserving.keep();
        assert_eq!(held.upload_of(&name("a")), Some(UploadId(4)));
        assert_eq!(held.name_of(UploadId(3)), None);
    }

    #[test]
    fn what_is_committed_is_no_longer_here_and_what_was_not_may_be_tried_again() {
        let held = HeldUploads::default();
        reserve(&held, "a", 1, 10);
        let bringing = begin_write(&held, UploadId(1));
        assert!(matches!(held.commit(UploadId(1), 0), Err(StoreError::Busy)));
        assert_eq!(bringing.end(small("abc"), at(10)).unwrap(), 0);
        assert_eq!(
            begin_write(&held, UploadId(1))
                .end(small("four"), at(10))
                .unwrap(),
            3
        );
        let wrong = held.commit(UploadId(1), 3);
        assert!(matches!(
            wrong,
            Err(StoreError::SizeMismatch { actual: 4, .. })
        ));
        for done in [false, true] {
            let Ok(UploadLocation::InMemory((own, content))) = held.commit(UploadId(1), 4) else {
                panic!("it is here");
            };
            assert_eq!((own, content), (name("a"), Some(small("four"))));
            assert!(matches!(
                held.commit(UploadId(1), 4),
                Ok(UploadLocation::NotInMemory)
            ));
            assert!(
                held.reserve(&name("a"), UploadId(2), at(10), at(0))
                    .is_err()
            );
            assert_eq!(held.end_commit(UploadId(1), done), if done { 4 } else { 0 });
        }
        assert_eq!(held.totals(), (0, 0));
        reserve(&held, "a", 2, 10);
    }

    #[test]
    fn what_leaves_is_busy_until_all_who_brought_something_are_done() {
        let held = HeldUploads::default();
        reserve(&held, "a", 1, 10);
        reserve(&held, "b", 2, 20);
        let (early, late) = (
            begin_write(&held, UploadId(1)),
            begin_write(&held, UploadId(1)),
        );
        early.end(small("abc"), at(10)).unwrap();
        assert_eq!(held.begin_move(at(10), None), []);
        reserve(&held, "c", 3, 10);
        let leaving = held.begin_move(at(10), None);
        assert_eq!(leaving.len(), 1);
        held.end_move(&leaving, true);
        let leaving = held.begin_move(at(10), Some(UploadId(1)));
        assert_eq!(leaving[0].content, Some(small("abc")));
        assert!(matches!(
            held.begin_write(UploadId(1), at(10)),
            UploadLocation::Leaving
        ));
        held.end_move(&leaving, false);
        let leaving = held.begin_move(at(0), Some(UploadId(1)));
        held.end_move(&leaving, true);
        assert!(matches!(
            held.begin_write(UploadId(1), at(10)),
            UploadLocation::NotInMemory
        ));
        assert!(matches!(held.commit(UploadId(1), 3), Err(StoreError::Busy)));
        assert_eq!(held.name_of(UploadId(1)), None);
        assert_eq!(late.end(small("abcd"), at(10)).unwrap_err(), small("abcd"));
        assert!(matches!(
            held.commit(UploadId(1), 3),
            Ok(UploadLocation::NotInMemory)
        ));
        assert_eq!(held.totals(), (1, 0));
    }

    #[test]
    fn what_is_held_takes_no_more_than_its_room() {
        let held = HeldUploads::default();
        reserve(&held, "a", 1, 10);
        reserve(&held, "b", 2, 10);
        let much = SmallPart {
            bytes: vec![0; usize::try_from(ROOM).unwrap() + 1].into(),
            ..small("")
        };
        begin_write(&held, UploadId(1)).end(much, at(10)).unwrap();
        assert!(matches!(
            held.begin_write(UploadId(2), at(10)),
            UploadLocation::Leaving
        ));
        let leaving = held.begin_move(at(10), Some(UploadId(1)));
        held.end_move(&leaving, true);
        drop(begin_write(&held, UploadId(2)));
        assert_eq!(held.totals(), (1, 0));
    }
}
