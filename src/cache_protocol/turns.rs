//! Fair queueing: it decides whose request is next. The service works on a limited number of
//! requests at once. If more come, clients take turns, so that one with a thousand requests delays
//! one with a single request only by those in work.
//!
//! A turn has its time: a request that takes longer waits for its client or for a disk, and while it waits
//! another may work.

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::net::{IpAddr, Ipv6Addr};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

use crate::cache_protocol::auth::Owner;

/// How many requests are worked on at once. Requests that commit share one transaction at best, so
/// more of them make that cheaper; fewer make others wait less.
const AT_ONCE: usize = 64;

/// How long a turn lasts.
const TURN: Duration = Duration::from_millis(100);

/// A client, whose requests share turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Client {
    /// All jobs of a repository.
    Repository(Owner),
    /// All requests from an address, if no token names a repository.
    Address(Option<IpAddr>),
}

/// The origin of a request: the address, or in IPv6 the network that one customer has.
pub(crate) fn origin(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let network = address.to_bits() >> 64 << 64;
            Ipv6Addr::from_bits(network).into()
        }
        address => address,
    }
}

/// The turns. Clones are the same.
#[derive(Clone, Debug)]
pub(crate) struct Turns {
    state: Arc<Mutex<TurnState>>,
}

#[derive(Debug)]
struct TurnState {
    /// It is 0 as long as a client waits.
    free: usize,
    /// The waiting clients, the next one first. Each is there once.
    order: VecDeque<Client>,
    waiting: HashMap<Client, VecDeque<oneshot::Sender<Turn>>>,
}

/// A turn. It passes to the next client when this is dropped.
#[derive(Debug)]
struct Turn {
    turns: Option<Turns>,
}

impl Default for Turns {
    fn default() -> Self {
        Self::of(AT_ONCE)
    }
}

impl Turns {
    fn of(free: usize) -> Self {
        let state = TurnState {
            free,
            order: VecDeque::new(),
            waiting: HashMap::new(),
        };
        Self {
            state: Arc::new(Mutex::new(state)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, TurnState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn turn(&self) -> Turn {
        Turn {
            turns: Some(self.clone()),
        }
    }

    async fn take(&self, client: Client) -> Turn {
        let next = {
            let mut state = self.lock();
            if state.free > 0 {
                state.free -= 1;
                return self.turn();
            }
            let (told, next) = oneshot::channel();
            let waiting = state.waiting.entry(client).or_default();
            waiting.push_back(told);
            if waiting.len() == 1 {
                state.order.push_back(client);
            }
            next
        };
        // The sender is dropped only if there are no turns any more, and a turn only ends by
        // passing to the next client.
        next.await.unwrap_or(Turn { turns: None })
    }

    /// Works on a request of `client` when it is its turn.
    pub(crate) async fn work<T>(&self, client: Client, request: impl Future<Output = T>) -> T {
        let turn = self.take(client).await;
        let mut request = pin!(request);
        if let Ok(done) = tokio::time::timeout(TURN, request.as_mut()).await {
            return done;
        }
        drop(turn);
        request.await
    }

    /// Gives a turn on.
    fn give_on(self) {
        loop {
            let told = {
                let mut state = self.lock();
                let Some(client) = state.order.pop_front() else {
                    state.free += 1;
                    return;
                };
                let Some(waiting) = state.waiting.get_mut(&client) else {
                    continue;
                };
                let told = waiting.pop_front();
                if waiting.is_empty() {
                    drop(state.waiting.remove(&client));
                } else {
                    state.order.push_back(client);
                }
                told
            };
            let Some(told) = told else { continue };
            match told.send(self.turn()) {
                Ok(()) => return,
                // That request is gone, so its turn passes to the next client.
                Err(mut turn) => turn.turns = None,
            }
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some(turns) = self.turns.take() {
            turns.give_on();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::task::Poll;

    use futures_util::FutureExt;
    use futures_util::poll;

    use super::*;

    fn client(number: u64) -> Client {
        Client::Repository(Owner(number))
    }

    #[tokio::test]
    async fn a_client_with_many_requests_delays_one_with_a_single_request_by_one_turn() {
        let turns = Turns::of(1);
        let first = turns.take(client(1)).await;
        let mut noisy: Vec<_> = (0..1000).map(|_| Box::pin(turns.take(client(1)))).collect();
        for waiting in &mut noisy {
            assert!(poll!(waiting.as_mut()).is_pending());
        }
        let mut quiet = Box::pin(turns.take(client(2)));
        assert!(poll!(quiet.as_mut()).is_pending());
        drop(first);
        // One of the noisy client's was there before.
        let Poll::Ready(turn) = poll!(noisy[0].as_mut()) else {
            panic!("the first in the line is the next");
        };
        assert!(poll!(quiet.as_mut()).is_pending());
        drop(turn);
        assert!(poll!(quiet.as_mut()).is_ready());
    }

    #[tokio::test]
    async fn a_request_that_goes_away_takes_no_turn_from_others() {
        let turns = Turns::of(1);
        let first = turns.take(client(1)).await;
        let mut waiting: Vec<_> = (0..10).map(|_| Box::pin(turns.take(client(1)))).collect();
        for waiting in &mut waiting {
            assert!(poll!(waiting.as_mut()).is_pending());
        }
        let mut last = waiting.pop().unwrap();
        drop(waiting.split_off(1));
        drop(first);
        // It got the turn, and disconnected before it noticed.
        drop(waiting);
        let Poll::Ready(turn) = poll!(last.as_mut()) else {
            panic!("the others are gone");
        };
        drop(turn);
        assert!(turns.take(client(2)).now_or_never().is_some());
        assert_eq!(turns.lock().free, 1);
        assert!(turns.lock().waiting.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_waits_for_its_client_keeps_others_waiting_for_a_moment_only() {
        let turns = Turns::of(1);
        let mut slow = Box::pin(turns.work(client(1), std::future::pending::<()>()));
        assert!(poll!(slow.as_mut()).is_pending());
        let begun = tokio::time::Instant::now();
        tokio::select! {
            () = slow => unreachable!("it never ends"),
            () = turns.work(client(1), async {}) => {}
        }
        assert_eq!(begun.elapsed(), TURN);
    }

    #[test]
    fn a_network_of_ipv6_is_one_client_and_an_address_of_ipv4_is_one_however_it_is_written() {
        let of = |text: &str| origin(text.parse().unwrap());
        assert_eq!(of("2001:db8:1:2:3:4:5:6"), of("2001:db8:1:2::9"));
        assert_ne!(of("2001:db8:1:2::1"), of("2001:db8:1:3::1"));
        assert_eq!(of("::ffff:10.0.0.1"), of("10.0.0.1"));
        assert_ne!(of("10.0.0.1"), of("10.0.0.2"));
    }
}
