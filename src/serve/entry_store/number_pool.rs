//! Takes numbers from the database in large ranges, so that no request waits for its own.

use std::ops::Range;
use std::sync::Mutex;

use crate::cache_protocol::ids::{BlobId, UploadId};
use crate::cache_protocol::store::StoreError;
use crate::serve::catalog::Catalog;
use crate::serve::entry_store::lock;

/// How many numbers of uploads and of blobs are taken from the database at once.
const NUMBERS_PER_CLAIM: u64 = 1 << 20;

/// Numbers of uploads and of blobs that the database assigns to no other service.
#[derive(Default)]
pub(super) struct NumberPool {
    left: Mutex<NumberRanges>,
    taking: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct NumberRanges {
    uploads: Range<u64>,
    blobs: Range<u64>,
}

impl NumberPool {
    /// A number for an upload.
    pub(super) async fn upload(&self, catalog: &Catalog) -> Result<UploadId, StoreError> {
        let number = self.take(catalog, |left| &mut left.uploads).await?;
        Ok(UploadId(number))
    }

    /// A number for a blob.
    pub(super) async fn blob(&self, catalog: &Catalog) -> Result<BlobId, StoreError> {
        let number = self.take(catalog, |left| &mut left.blobs).await?;
        Ok(BlobId(number))
    }

    async fn take(
        &self,
        catalog: &Catalog,
        kind: impl Fn(&mut NumberRanges) -> &mut Range<u64>,
    ) -> Result<u64, StoreError> {
        loop {
            if let Some(number) = kind(&mut lock(&self.left)).next() {
                return Ok(number);
            }
            let _taking = self.taking.lock().await;
            if kind(&mut lock(&self.left)).is_empty() {
                let (UploadId(uploads), BlobId(blobs)) =
                    catalog.take_numbers(NUMBERS_PER_CLAIM).await?;
                *lock(&self.left) = NumberRanges {
                    uploads: uploads..uploads + NUMBERS_PER_CLAIM,
                    blobs: blobs..blobs + NUMBERS_PER_CLAIM,
                };
            }
        }
    }
}
