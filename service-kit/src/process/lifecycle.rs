//! The tasks of the process, its stop signal, and the time limit of a stop.
//!
//! One token ends every loop, and one tracker knows every task. A long-running task that ends before the stop counts as
//! a crash. The process then stops and exits with a failure, so that its supervisor restarts it.

use std::future::Future;
use std::num::NonZero;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context;
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::process::settings::SettingsReader;

/// How long a stop waits for the requests and messages in progress.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(20);

/// The exit code after a second stop signal: 130, which a shell reports for a process that SIGINT ended.
const EXIT_CODE_OF_SECOND_SIGNAL: i32 = 130;

/// Makes the kernel give ordinary pages only. The allocator asks for huge pages, and each one stays allocated while a
/// few of its bytes are in use. After a full load the Event Service kept 104 MB with huge pages and 70 MB without, at
/// the same speed (measured). If the call fails, the process only uses more memory.
pub fn avoid_huge_pages() {
    #[cfg(target_os = "linux")]
    let _ = nix::sys::prctl::set_thp_disable(true);
}

/// Runs the work of the process and returns its exit code. A fault that ends the work is printed in one line, with its
/// causes.
pub fn run(work: impl Future<Output = anyhow::Result<ExitCode>>) -> ExitCode {
    let outcome = runtime(SettingsReader::from_env()).and_then(|runtime| runtime.block_on(work));
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

/// Starts worker threads for half of the cores, because the database needs the others. A thread without a free core is
/// woken and then waits. With everything on two cores, one thread instead of two cut a booking's wait by a third at a
/// moderate rate (measured). Set `TOKIO_WORKER_THREADS` for a process on a dedicated machine.
fn runtime(mut settings: SettingsReader) -> anyhow::Result<Runtime> {
    let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
    let threads = settings.within("TOKIO_WORKER_THREADS", cores.div_ceil(2), 1, 1024);
    let threads = settings.finish(threads)?;
    Builder::new_multi_thread().worker_threads(threads).enable_all().build().context("the threads can't be started")
}

/// The handle on the tasks and the stop of the process. Clones share one state.
#[derive(Debug, Clone, Default)]
pub struct Lifecycle {
    token: CancellationToken,
    tracker: TaskTracker,
    crashed: Arc<AtomicBool>,
}

impl Lifecycle {
    /// Creates a handle without tasks; the process is not stopping yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Cancelled when the process must stop. Every loop waits on it beside its own work.
    #[must_use]
    pub fn token(&self) -> &CancellationToken {
        &self.token
    }

    /// Whether the process is stopping: the token is cancelled.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.token.is_cancelled()
    }

    /// Runs a task that must live until the process stops. If it ends earlier, fails or panics, the process stops with
    /// a failure.
    pub fn spawn(&self, name: &'static str, task: impl Future<Output = anyhow::Result<()>> + Send + 'static) {
        let lifecycle = self.clone();
        let inner = self.tracker.spawn(task);
        self.tracker.spawn(async move {
            let outcome = inner.await;
            if lifecycle.is_stopping() && matches!(outcome, Ok(Ok(()))) {
                return;
            }
            match outcome {
                Ok(Ok(())) => tracing::error!(task = name, "A task ended too early; the process stops"),
                Ok(Err(error)) => {
                    tracing::error!(task = name, error = format!("{error:#}"), "A task failed; the process stops")
                }
                Err(error) => tracing::error!(task = name, %error, "A task panicked; the process stops"),
            }
            lifecycle.crashed.store(true, Ordering::Relaxed);
            lifecycle.stop();
        });
    }

    /// Runs work to its end, even if its caller no longer waits for the answer. A stop waits for it.
    pub fn spawn_work<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
        self.tracker.spawn(work)
    }

    /// Cancels the token, so that every loop ends.
    pub fn stop(&self) {
        self.token.cancel();
    }

    /// Stops at the first SIGTERM or SIGINT, and ends the process at the second without waiting for anything.
    ///
    /// # Errors
    /// The signal handlers can't be installed.
    pub fn stop_on_signal(&self) -> anyhow::Result<()> {
        let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let lifecycle = self.clone();
        // Not tracked: it waits for a second signal while everything else ends.
        #[expect(clippy::disallowed_methods, reason = "it ends with the process, and a stop must not wait for it")]
        tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => tracing::info!("SIGTERM received; finishing the work in progress"),
                _ = interrupt.recv() => tracing::info!("SIGINT received; finishing the work in progress"),
                () = lifecycle.token.cancelled() => {}
            }
            lifecycle.stop();
            tokio::select! {
                _ = terminate.recv() => tracing::warn!("SIGTERM received again; ending at once"),
                _ = interrupt.recv() => tracing::warn!("SIGINT received again; ending at once"),
            }
            std::process::exit(EXIT_CODE_OF_SECOND_SIGNAL);
        });
        Ok(())
    }

    /// Waits for the stop, then for the tasks, at most [`DRAIN_TIMEOUT`]. Returns a failure if a task crashed or did
    /// not end in time.
    pub async fn finished(&self) -> ExitCode {
        self.token.cancelled().await;
        self.tracker.close();
        let drained = tokio::time::timeout(DRAIN_TIMEOUT, self.tracker.wait()).await.is_ok();
        if !drained {
            tracing::error!(tasks = self.tracker.len(), seconds = DRAIN_TIMEOUT.as_secs(), "Tasks did not end in time");
        }
        let clean = drained && !self.crashed.load(Ordering::Relaxed);
        tracing::info!(clean, "Stopped");
        if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_that_ends_early_stops_the_process_with_a_failure() {
        let lifecycle = Lifecycle::new();
        lifecycle.spawn("short", async { Ok(()) });
        assert_eq!(lifecycle.finished().await, ExitCode::FAILURE);
    }

    #[tokio::test]
    async fn a_stop_waits_for_the_work_in_hand() {
        let lifecycle = Lifecycle::new();
        let token = lifecycle.token().clone();
        let work = lifecycle.spawn_work(async move {
            token.cancelled().await;
            tokio::task::yield_now().await;
            7
        });
        lifecycle.stop();
        assert_eq!(lifecycle.finished().await, ExitCode::SUCCESS);
        assert!(work.is_finished());
        assert_eq!(work.await.unwrap(), 7);
    }

    #[test]
    fn a_process_gets_half_of_the_cores_unless_it_is_told_how_many() {
        let cores = std::thread::available_parallelism().unwrap().get();
        for (set, threads) in [
            (None, Some(cores.div_ceil(2))),
            (Some(""), Some(cores.div_ceil(2))),
            (Some("3"), Some(3)),
            (Some("0"), None),
        ] {
            let settings =
                SettingsReader::new(move |name| set.filter(|_| name == "TOKIO_WORKER_THREADS").map(str::to_owned));
            match (runtime(settings), threads) {
                (Ok(runtime), Some(threads)) => assert_eq!(runtime.metrics().num_workers(), threads),
                (Err(error), None) => assert!(error.to_string().contains("TOKIO_WORKER_THREADS=0"), "{error}"),
                (made, _) => panic!("{set:?}: {made:?}"),
            }
        }
    }
}
