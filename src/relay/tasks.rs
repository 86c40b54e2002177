//! The relay's own tasks, which end with it.

use std::future::Future;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// The tasks of a relay. Clones share them.
#[derive(Clone, Debug, Default)]
pub(super) struct RelayTasks {
    tracker: TaskTracker,
    ended: CancellationToken,
}

impl RelayTasks {
    /// Starts a task, which [`RelayTasks::end`] stops at its next wait.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let ended = self.ended.clone();
        self.tracker
            .spawn(async move { ended.run_until_cancelled_owned(task).await });
    }

    /// Stops all tasks, and returns once none runs. A later task ends before it begins.
    pub(super) async fn end(&self) {
        self.ended.cancel();
        self.tracker.close();
        self.tracker.wait().await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[tokio::test]
    async fn no_task_runs_once_all_have_been_ended() {
        let tasks = RelayTasks::default();
        let shared = Arc::new(());
        for _ in 0..3 {
            let held = shared.clone();
            tasks.spawn(async move {
                std::future::pending::<()>().await;
                drop(held);
            });
        }
        assert_eq!(Arc::strong_count(&shared), 4);
        tasks.end().await;
        assert_eq!(Arc::strong_count(&shared), 1);
        let ran = Arc::new(AtomicBool::new(false));
        let late = ran.clone();
        tasks.spawn(async move { late.store(true, Ordering::Relaxed) });
        tasks.end().await;
        assert!(!ran.load(Ordering::Relaxed));
    }
}
