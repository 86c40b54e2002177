//! The signals by which a process is told to end: SIGINT from a keyboard or a runner that cancels a job,
//! SIGTERM from a service manager or the same runner later.

use std::io;

/// Ends when the process is told to. Signals count from this call on, not from the first await.
///
/// # Errors
/// Where signals cannot be waited for.
#[cfg(unix)]
pub fn stop_signal() -> io::Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

/// Ends when the process is told to by an interrupt from the keyboard.
///
/// # Errors
/// None on this system.
#[cfg(not(unix))]
pub fn stop_signal() -> io::Result<impl Future<Output = ()>> {
    Ok(async {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending().await
        }
    })
}
