//! What was asked of a cache service.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter as Total;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use serde::Serialize;

use crate::service::catalog::Totals;

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
            /// What was counted since `earlier`.
            #[must_use]
            pub fn since(&self, earlier: &Self) -> Self {
                Self { $($name: self.$name.saturating_sub(earlier.$name),)* }
            }
        }

        impl Counters {
            /// The counters now. Each is exact; they need not be of the same instant.
            pub fn snapshot(&self) -> Snapshot {
                Snapshot { $($name: self.$name.0.get(),)* }
            }

            fn register(&self, registry: &mut Registry) {
                $(registry.register(
                    stringify!($name),
                    $doc.trim().trim_end_matches('.'),
                    self.$name.0.clone(),
                );)*
            }
        }
    };
}

counters! {
    /// Look-ups.
    lookups,
    /// Look-ups that found an entry.
    hits,
    /// Reservations asked for.
    reservations,
    /// Reservations refused because the name was taken.
    conflicts,
    /// Uploads made entries.
    commits,
    /// Requests with content to keep.
    uploads,
    /// Requests for content.
    downloads,
    /// Requests refused for want of a token or a good signature.
    refused,
    /// Requests of version 1 of the protocol, whatever they are counted as besides.
    version_1,
    /// Bytes of content received.
    bytes_in,
    /// Bytes of content promised in answers.
    bytes_out,
}

#[derive(Debug, Default)]
pub(crate) struct Counter(Total);

impl Counter {
    pub(crate) fn one(&self) {
        self.add(1);
    }

    pub(crate) fn add(&self, amount: u64) {
        self.0.inc_by(amount);
    }
}

/// What a request asked for, and how it was answered.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Asked {
    pub(crate) request: &'static str,
    pub(crate) status: u16,
}

/// From 100 microseconds to 100 seconds.
fn histogram() -> Histogram {
    Histogram::new([
        0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0,
    ])
}

/// The text of `GET /metrics`.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    durations: Family<Asked, Histogram, fn() -> Histogram>,
    entries: Gauge,
    bytes: Gauge,
    uploads: Gauge,
    upload_bytes: Gauge,
}

impl Metrics {
    /// Metrics that show `counters`.
    pub(crate) fn of(counters: &Counters) -> Self {
        let mut registry = Registry::with_prefix("sccache_action_cache");
        counters.register(&mut registry);
        let durations: Family<Asked, Histogram, fn() -> Histogram> =
            Family::new_with_constructor(histogram);
        registry.register_with_unit(
            "request",
            "Time until the head of an answer, by what was asked for",
            Unit::Seconds,
            durations.clone(),
        );
        let [entries, bytes, uploads, upload_bytes] = std::array::from_fn(|_| Gauge::default());
        for (name, help, gauge) in [
            ("entries", "Committed entries", &entries),
            ("entry_size_bytes", "Their size in bytes", &bytes),
            ("open_uploads", "Uploads that were reserved", &uploads),
            (
                "upload_size_bytes",
                "What was received for them",
                &upload_bytes,
            ),
        ] {
            registry.register(name, help, gauge.clone());
        }
        Self {
            registry,
            durations,
            entries,
            bytes,
            uploads,
            upload_bytes,
        }
    }

    pub(crate) fn answered(&self, asked: Asked, seconds: f64) {
        self.durations.get_or_create(&asked).observe(seconds);
    }

    /// The metrics in the text form of OpenMetrics.
    pub(crate) fn text(&self, totals: Totals) -> Result<String, std::fmt::Error> {
        let as_gauge = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        self.entries.set(as_gauge(totals.entries));
        self.bytes.set(as_gauge(totals.bytes));
        self.uploads.set(as_gauge(totals.uploads));
        self.upload_bytes.set(as_gauge(totals.upload_bytes));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}
