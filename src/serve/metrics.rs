//! The metrics of the standalone service, in the form of OpenMetrics.

use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use crate::cache_protocol::AppState;
use crate::cache_protocol::store::Store;
use crate::serve::catalog::Totals;

/// The labels of a request in the metrics: its kind, and the status of its answer.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct RequestLabels {
    pub(crate) request: &'static str,
    pub(crate) status: u16,
}

/// From 100 microseconds to 100 seconds.
fn histogram() -> Histogram {
    Histogram::new([
        0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0,
    ])
}

/// The counters of a service.
#[derive(Debug)]
struct CounterCollector<S>(Arc<AppState<S>>);

impl<S: Store + std::fmt::Debug> Collector for CounterCollector<S> {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        for (name, help, count) in self.0.counters().each() {
            let counter = ConstCounter::new(count);
            let metric = encoder.encode_descriptor(name, help, None, counter.metric_type())?;
            counter.encode(metric)?;
        }
        Ok(())
    }
}

/// The text of `GET /metrics`.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    durations: Family<RequestLabels, Histogram, fn() -> Histogram>,
    entries: Gauge,
    bytes: Gauge,
    uploads: Gauge,
    upload_bytes: Gauge,
}

impl Metrics {
    /// Metrics that show the counters of a service.
    pub(crate) fn of<S: Store + std::fmt::Debug>(shared: Arc<AppState<S>>) -> Self {
        let mut registry = Registry::with_prefix("sccache_action_cache");
        registry.register_collector(Box::new(CounterCollector(shared)));
        let durations: Family<RequestLabels, Histogram, fn() -> Histogram> =
            Family::new_with_constructor(histogram);
        registry.register_with_unit(
            "request",
            "Time until the head of an answer, by kind of request",
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

    pub(crate) fn answered(&self, asked: RequestLabels, seconds: f64) {
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
