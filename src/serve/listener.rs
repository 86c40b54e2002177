//! Closes connections that are idle for too long: a machine that vanished does not close its
//! connections, and each open one takes a place from others. It also limits the connections of each
//! address.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::extract::connect_info::Connected;
use axum::serve::{IncomingStream, Listener};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, Sleep};
use tracing::warn;

use crate::cache_protocol::Peer;
use crate::cache_protocol::turns::origin;

/// How often the warning that an address has too many connections is repeated.
const SAID_EVERY: Duration = Duration::from_secs(60);

/// A listener that closes connections which are idle for too long.
#[derive(Debug)]
pub(crate) struct TimedListener {
    listener: TcpListener,
    silence: Duration,
    open: ConnectionLimit,
    warned: Option<Instant>,
}

impl TimedListener {
    /// A listener that takes up to `most` connections of an address at once.
    pub(crate) fn new(listener: TcpListener, silence: Duration, most: Option<usize>) -> Self {
        Self {
            listener,
            silence,
            open: ConnectionLimit {
                most: most.unwrap_or(usize::MAX),
                counts: Arc::default(),
            },
            warned: None,
        }
    }
}

impl Listener for TimedListener {
    type Io = TimedStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            let (stream, address) = Listener::accept(&mut self.listener).await;
            let from = origin(address.ip());
            if let Some(counted) = self.open.count(from) {
                return (TimedStream::new(stream, self.silence, counted), address);
            }
            // It is closed at once, and its client gets no message.
            if self
                .warned
                .is_none_or(|warned| warned.elapsed() > SAID_EVERY)
            {
                self.warned = Some(Instant::now());
                let most = self.open.most;
                warn!(%from, most, "an address has reached its limit of connections; more are \
                                    closed");
            }
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

impl Connected<IncomingStream<'_, TimedListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, TimedListener>) -> Self {
        Self(Some(*stream.remote_addr()))
    }
}

/// How many connections each address has.
#[derive(Clone, Debug)]
struct ConnectionLimit {
    most: usize,
    counts: Arc<Mutex<HashMap<IpAddr, usize>>>,
}

/// A connection that is counted until this is dropped.
#[derive(Debug)]
struct ConnectionPermit {
    open: ConnectionLimit,
    from: IpAddr,
}

impl ConnectionLimit {
    fn lock(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts one more, unless there are as many as there may be.
    fn count(&self, from: IpAddr) -> Option<ConnectionPermit> {
        let mut counts = self.lock();
        let count = counts.entry(from).or_default();
        if *count >= self.most {
            return None;
        }
        *count += 1;
        Some(ConnectionPermit {
            open: self.clone(),
            from,
        })
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        let mut counts = self.open.lock();
        if let Some(count) = counts.get_mut(&self.from) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.from);
            }
        }
    }
}

/// A stream that fails once nothing was read or written for so long.
#[derive(Debug)]
pub(crate) struct TimedStream<S> {
    stream: S,
    silence: Duration,
    moved: Instant,
    wake: Pin<Box<Sleep>>,
    _counted: ConnectionPermit,
}

impl<S> TimedStream<S> {
    fn new(stream: S, silence: Duration, counted: ConnectionPermit) -> Self {
        Self {
            stream,
            silence,
            moved: Instant::now(),
            wake: Box::pin(tokio::time::sleep(silence)),
            _counted: counted,
        }
    }

    /// Passes on `polled`; an error if it is still pending and has been for too long.
    fn limited<T>(
        &mut self,
        context: &mut Context<'_>,
        polled: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if polled.is_ready() {
            self.moved = Instant::now();
            return polled;
        }
        while self.wake.as_mut().poll(context).is_ready() {
            let until = self.moved + self.silence;
            if until <= Instant::now() {
                let silent = io::Error::new(io::ErrorKind::TimedOut, "the client is silent");
                return Poll::Ready(Err(silent));
            }
            // Something moved since that was set.
            self.wake.as_mut().reset(until);
        }
        Poll::Pending
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for TimedStream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.stream).poll_read(context, buffer);
        self.limited(context, polled)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for TimedStream<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.limited(context, polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.limited(context, polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        // A socket is ready to flush at once, so this says nothing of the client.
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn open(most: usize) -> ConnectionLimit {
        ConnectionLimit {
            most,
            counts: Arc::default(),
        }
    }

    #[test]
    fn an_address_has_as_many_connections_as_it_may_and_others_have_their_own() {
        let open = open(2);
        let (one, other) = ([10, 0, 0, 1].into(), [10, 0, 0, 2].into());
        let counted: Vec<ConnectionPermit> = (0..2).map(|_| open.count(one).unwrap()).collect();
        assert!(open.count(one).is_none());
        let another = open.count(other);
        assert!(another.is_some());
        drop(counted);
        assert!(open.count(one).is_some());
        drop(another);
        assert!(open.lock().is_empty());
    }

    #[tokio::test]
    async fn neither_who_sends_nothing_nor_who_reads_nothing_is_waited_for_without_end() {
        let (near, mut far) = tokio::io::duplex(8);
        let open = open(1);
        let counted = open.count([127, 0, 0, 1].into()).unwrap();
        let mut timed = TimedStream::new(near, Duration::from_millis(20), counted);
        let error = timed.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let error = timed.write_all(&[1; 9]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        // An active connection is never ended.
        far.write_all(&[2; 8]).await.unwrap();
        timed.read_exact(&mut [0; 8]).await.unwrap();
        far.read_exact(&mut [0; 8]).await.unwrap();
        timed.write_all(&[3; 8]).await.unwrap();
    }
}
