//! The counters of a cache service.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

macro_rules! counters {
    ($(#[doc = $doc:literal] $name:ident),* $(,)?) => {
        /// The counters of a running service.
        #[derive(Debug, Default)]
        pub struct Counters {
            $(#[doc = $doc] pub(crate) $name: Counter,)*
        }

        /// The counters at one moment.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
        pub struct Snapshot {
            $(#[doc = $doc] pub $name: u64,)*
        }

        impl Snapshot {
            /// The counts since `earlier`.
            #[must_use]
            pub fn since(&self, earlier: &Self) -> Self {
                Self { $($name: self.$name.saturating_sub(earlier.$name),)* }
            }

            /// Each counter's name, description and count.
            pub fn each(&self) -> impl Iterator<Item = (&'static str, &'static str, u64)> {
                [$((stringify!($name), $doc.trim().trim_end_matches('.'), self.$name),)*].into_iter()
            }
        }

        impl Counters {
            /// The counters now. Each is exact; they need not be of the same instant.
            pub fn snapshot(&self) -> Snapshot {
                Snapshot { $($name: self.$name.0.load(Ordering::Relaxed),)* }
            }
        }
    };
}

counters! {
    /// Look-ups.
    lookups,
    /// Look-ups that found an entry.
    hits,
    /// Reservations requested.
    reservations,
    /// Reservations refused because the name was taken.
    conflicts,
    /// Uploads made entries.
    commits,
    /// Requests with content to keep.
    uploads,
    /// Requests for content.
    downloads,
    /// Requests refused because they have no valid token or signature.
    refused,
    /// Requests of version 1 of the protocol. They are counted above as well.
    version_1,
    /// Bytes of content received.
    bytes_in,
    /// Bytes of content promised in answers.
    bytes_out,
}

#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn inc(&self) {
        self.add(1);
    }

    pub(crate) fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }
}
