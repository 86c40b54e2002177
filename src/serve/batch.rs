//! Batches requests that come at the same time: one statement instead of many, one wait for the
//! disk.
//!
//! While one group is being answered the next one gathers. So a group grows with the number of
//! clients, and a single client does not wait.

use std::future::Future;
use std::sync::Arc;

use tokio::sync::{Mutex, mpsc, oneshot};

type Question<Q, A> = (Q, oneshot::Sender<A>);

/// A queue of questions. Clones share the queue.
pub(crate) struct Batcher<Q, A> {
    asked: mpsc::UnboundedSender<Question<Q, A>>,
}

impl<Q: Send + 'static, A: Send + 'static> Batcher<Q, A> {
    /// A queue that passes up to `at_most` questions at once to `answer`, which returns their
    /// answers in the same order. Up to `groups` groups are answered at a time.
    pub(crate) fn new<F, R>(at_most: usize, groups: usize, answer: F) -> Self
    where
        F: Fn(Vec<Q>) -> R + Clone + Send + 'static,
        R: Future<Output = Vec<A>> + Send + 'static,
    {
        // Each question is that of a request which waits for it, so there are no more than requests.
        let (asked, waiting) = mpsc::unbounded_channel();
        let waiting = Arc::new(Mutex::new(waiting));
        for _ in 0..groups {
            tokio::spawn(answer_all(waiting.clone(), at_most, answer.clone()));
        }
        Self { asked }
    }

    /// The answer to `question`; `None` if the queue is closed.
    pub(crate) async fn ask(&self, question: Q) -> Option<A> {
        let (told, answer) = oneshot::channel();
        self.asked.send((question, told)).ok()?;
        answer.await.ok()
    }
}

/// Answers until all clones of the queue are dropped.
async fn answer_all<Q, A, F, R>(
    waiting: Arc<Mutex<mpsc::UnboundedReceiver<Question<Q, A>>>>,
    at_most: usize,
    answer: F,
) where
    F: Fn(Vec<Q>) -> R,
    R: Future<Output = Vec<A>>,
{
    loop {
        let mut group = Vec::new();
        if waiting.lock().await.recv_many(&mut group, at_most).await == 0 {
            return;
        }
        let (questions, told): (Vec<Q>, Vec<_>) = group.into_iter().unzip();
        for (told, answer) in told.into_iter().zip(answer(questions).await) {
            // The client may be gone.
            let _ = told.send(answer);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex as Locked;

    use futures_util::future::join_all;
    use tokio::sync::Semaphore;

    use super::*;

    #[tokio::test]
    async fn who_asks_while_a_group_is_answered_is_in_the_next_one_and_each_gets_his_own_answer() {
        let groups: Arc<Locked<Vec<usize>>> = Arc::default();
        let may_answer = Arc::new(Semaphore::new(0));
        let place = Batcher::new(64, 1, {
            let (groups, may_answer) = (groups.clone(), may_answer.clone());
            move |questions: Vec<u32>| {
                groups.lock().unwrap().push(questions.len());
                let may_answer = may_answer.clone();
                async move {
                    may_answer.acquire().await.unwrap().forget();
                    questions.iter().map(|question| question * 2).collect()
                }
            }
        });
        let first = place.ask(1);
        let rest = async {
            while groups.lock().unwrap().is_empty() {
                tokio::task::yield_now().await;
            }
            let rest = join_all((2..102).map(|question| place.ask(question)));
            may_answer.add_permits(3);
            rest.await
        };
        let (first, rest) = tokio::join!(first, rest);
        assert_eq!(first, Some(2));
        assert!(
            rest.into_iter()
                .eq((2..102).map(|question| Some(question * 2)))
        );
        assert_eq!(*groups.lock().unwrap(), [1, 64, 36]);
    }

    #[tokio::test]
    async fn nobody_is_answered_before_the_group_has_ended() {
        let ended: Arc<Locked<bool>> = Arc::default();
        let place = Batcher::new(8, 1, {
            let ended = ended.clone();
            move |questions: Vec<()>| {
                let ended = ended.clone();
                async move {
                    tokio::task::yield_now().await;
                    *ended.lock().unwrap() = true;
                    questions
                }
            }
        });
        let asked = (0..8).map(|_| async {
            place.ask(()).await.unwrap();
            assert!(*ended.lock().unwrap());
        });
        join_all(asked).await;
    }
}
