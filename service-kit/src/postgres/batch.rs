//! Group commit: calls that come at the same time share one statement and one commit.
//!
//! - A call joins the queue. A free worker takes what is queued, up to `batch_max` calls, and does it as one batch.
//! - While a batch runs, later calls queue for the next one. So a quiet service answers at once, and a busy one does
//!   less work for each call the more calls there are.
//! - With `linger`, a batch that is not full waits that long for more calls before it starts. That is for a path of
//!   many steps, such as a payment's. Its calls spread out, so that batches would stay small.
//! - A second worker starts a batch beside the first only when the first has taken longer than `overlap_after`. That
//!   happens on a slow disk, or while it waits for a lock.
//!
//! These invariants hold:
//!
//! - Each call gets exactly one answer, its own, or an error.
//! - A call whose caller has gone before its batch starts is not done.
//! - A batch that panics or takes longer than `timeout` costs its own calls an error, and the worker goes on.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use anyhow::anyhow;
use futures::FutureExt;
use futures::future::join_all;
use tokio::sync::{Mutex, mpsc, oneshot};

use crate::http::error::{Error, Result};
use crate::process::lifecycle::Lifecycle;

/// A queued call, and the sender of its answer.
type Waiting<T, R> = (T, oneshot::Sender<Result<R>>);

/// Does calls of `T` in batches; each call gets its own `R`.
#[derive(Debug)]
pub struct Batcher<T, R> {
    line: mpsc::Sender<Waiting<T, R>>,
}

/// The sizes and time limits of a [`Batcher`].
#[derive(Debug, Clone, Copy)]
pub struct BatchConfig {
    /// The most batches that run at a time.
    pub workers: usize,
    /// How long a batch that is not full waits for more calls before it starts.
    pub linger: Duration,
    /// How long a batch waits for the previous one. After that, both run at the same time.
    pub overlap_after: Duration,
    /// The most calls that share a batch.
    pub batch_max: usize,
    /// Calls that can queue; further callers wait until there is room.
    pub queue_capacity: usize,
    /// The time limit of a batch: work that never answers costs a worker no more than this.
    pub timeout: Duration,
}

/// Waits until the next tick of the runtime's timer, which ticks once a millisecond. No shorter wait exists.
const LINGER_MIN: Duration = Duration::from_nanos(1);

impl BatchConfig {
    /// The usual configuration, with this time limit for a batch.
    ///
    /// Two workers: more would shrink batches and raise total work. A second worker that starts at once costs 20 %
    /// (measured). A commit to a slow disk takes less than `overlap_after`, so a worker does at least 64 calls every 20
    /// ms. A batch of 64 saves most of what there is to save. The limit on requests in flight sheds a longer queue.
    #[must_use]
    pub const fn with_timeout(timeout: Duration) -> Self {
        Self {
            workers: 2,
            linger: Duration::ZERO,
            overlap_after: Duration::from_millis(20),
            batch_max: 64,
            queue_capacity: 1024,
            timeout,
        }
    }

    /// The same, but each batch waits for the next tick of the timer: half a millisecond on average, and one at most.
    ///
    /// Not for holds and reads of availability: with it everywhere, a reservation at half of the highest rate took 8 ms
    /// instead of 4.5 (measured).
    #[must_use]
    pub const fn with_linger(self) -> Self {
        Self { linger: LINGER_MIN, ..self }
    }
}

impl<T: Send + 'static, R: Send + 'static> Batcher<T, R> {
    /// Starts the workers; they end when the batcher is dropped. `work` returns one answer for each call, in their
    /// order.
    pub fn start<F: Future<Output = Vec<Result<R>>> + Send>(
        lifecycle: &Lifecycle,
        config: BatchConfig,
        work: impl Fn(Vec<T>) -> F + Send + Sync + 'static,
    ) -> Self {
        let (sender, line) = mpsc::channel(config.queue_capacity);
        let (line, turn, work) = (Arc::new(Mutex::new(line)), Arc::new(Mutex::new(())), Arc::new(work));
        for _ in 0..config.workers {
            let (line, turn, work) = (Arc::clone(&line), Arc::clone(&turn), Arc::clone(&work));
            drop(lifecycle.spawn_work(async move {
                loop {
                    let mut batch: Vec<Waiting<T, R>> = Vec::new();
                    let mut next = line.lock().await;
                    if next.recv_many(&mut batch, config.batch_max).await == 0 {
                        return;
                    }
                    let _turn = tokio::time::timeout(config.overlap_after, turn.lock()).await;
                    if batch.len() < config.batch_max && !config.linger.is_zero() {
                        tokio::time::sleep(config.linger).await;
                    }
                    while batch.len() < config.batch_max
                        && let Ok(waiting) = next.try_recv()
                    {
                        batch.push(waiting);
                    }
                    drop(next);
                    // A call whose caller no longer waits need not be done.
                    batch.retain(|(_, caller)| !caller.is_closed());
                    if batch.is_empty() {
                        continue;
                    }
                    let (calls, callers): (Vec<T>, Vec<_>) = batch.into_iter().unzip();
                    let done = tokio::time::timeout(config.timeout, AssertUnwindSafe(work(calls)).catch_unwind());
                    match done.await {
                        Ok(Ok(answers)) => {
                            callers.into_iter().zip(answers).for_each(|(caller, answer)| drop(caller.send(answer)))
                        }
                        // The senders are dropped, so each caller gets `no_answer`.
                        Ok(Err(_)) => tracing::error!(calls = callers.len(), "A batch panicked; its calls fail"),
                        Err(_) => tracing::warn!(calls = callers.len(), "A batch timed out; its calls fail"),
                    }
                }
            }));
        }
        Self { line: sender }
    }

    /// Does a call in the next batch.
    ///
    /// # Errors
    /// The error of this call. If its batch panicked or timed out, or the process stops, that is
    /// [`Error::OutcomeUnknown`]: the call may or may not have had its effect.
    pub async fn call(&self, call: T) -> Result<R> {
        let (sender, answer) = oneshot::channel();
        self.line.send((call, sender)).await.map_err(|_| no_answer())?;
        answer.await.unwrap_or_else(|_| Err(no_answer()))
    }
}

/// The error of a call whose batch panicked or timed out.
#[must_use]
pub fn no_answer() -> Error {
    Error::OutcomeUnknown(anyhow!("the batch of this call panicked or timed out, or the process stops"))
}

/// Gives each call its own part of a result that was read for all of them, or gives each the error.
pub fn split_result<T, S, R>(calls: &[T], looked: Result<S>, own: impl Fn(&S, &T) -> R) -> Vec<Result<R>> {
    match looked {
        Ok(looked) => calls.iter().map(|call| Ok(own(&looked, call))).collect(),
        Err(mut error) => calls.iter().map(|_| Err(error.for_another())).collect(),
    }
}

/// Does `calls` as one batch. `work` returns one answer for each call, in their order, or `None` if it can't do them
/// together. In that case, or if the database refuses one of them, each call is done alone. The batch had no effect
/// then, and no call may fail the others. After any other error, nobody knows whether the calls had their effects, and
/// each of them gets that error.
pub async fn batch_or_each<T: Clone, R, F: Future<Output = Result<Option<Vec<Result<R>>>>>>(
    calls: Vec<T>,
    work: impl Fn(Arc<[T]>) -> F,
) -> Vec<Result<R>> {
    let calls: Arc<[T]> = calls.into();
    match work(Arc::clone(&calls)).await {
        Ok(Some(answers)) => answers,
        Err(error) if calls.len() == 1 => vec![Err(error)],
        Ok(None) | Err(Error::Refused(_) | Error::Database(sqlx::Error::Database(_))) => {
            let alone = calls.iter().map(|call| work(Arc::new([call.clone()])));
            let answer = |answers: Option<Vec<_>>| answers.and_then(|mut answers| answers.pop());
            join_all(alone).await.into_iter().map(|done| answer(done?).unwrap_or_else(|| Err(no_answer()))).collect()
        }
        Err(mut error) => {
            tracing::warn!(%error, calls = calls.len(), "The outcome of a batch is unknown; all its calls fail");
            calls.iter().map(|_| Err(error.for_another())).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures::future::join_all;
    use tokio::sync::Notify;
    use tokio::time::Instant;

    use super::*;

    const CONFIG: BatchConfig = BatchConfig {
        workers: 1,
        linger: Duration::ZERO,
        overlap_after: Duration::from_secs(60),
        batch_max: 8,
        queue_capacity: 64,
        timeout: Duration::from_secs(5),
    };

    /// Doubles numbers, and counts its batches. A batch with a 0 waits for `gate`, and one with a 13 panics.
    fn doubling(config: BatchConfig) -> (Batcher<u32, u32>, Arc<Notify>, Arc<AtomicUsize>) {
        let (gate, batches) = (Arc::new(Notify::new()), Arc::new(AtomicUsize::new(0)));
        let (opened, counted) = (Arc::clone(&gate), Arc::clone(&batches));
        let doubling = Batcher::start(&Lifecycle::new(), config, move |calls: Vec<u32>| {
            let (opened, counted) = (Arc::clone(&opened), Arc::clone(&counted));
            async move {
                counted.fetch_add(1, Ordering::Relaxed);
                if calls.contains(&0) {
                    opened.notified().await;
                }
                assert!(!calls.contains(&13), "unlucky");
                calls.into_iter().map(|call| Ok(call * 2)).collect()
            }
        });
        (doubling, gate, batches)
    }

    #[tokio::test]
    async fn what_gathers_while_a_batch_is_at_work_is_done_together_and_each_gets_its_own_answer() {
        let (doubling, gate, batches) = doubling(CONFIG);
        let calls = join_all((0..=8).map(|call| doubling.call(call)));
        let open = async {
            // Every call was polled once before this: the first one is being done, and the others are queued.
            tokio::task::yield_now().await;
            gate.notify_one();
        };
        let (answers, ()) = tokio::join!(calls, open);
        let answers: Vec<u32> = answers.into_iter().map(Result::unwrap).collect();
        assert_eq!(answers, (0..=8).map(|call| call * 2).collect::<Vec<_>>());
        assert!(batches.load(Ordering::Relaxed) <= 3, "{batches:?} batches for nine calls");
    }

    #[tokio::test]
    async fn a_free_lane_waits_for_the_batch_at_work_and_overtakes_one_that_hangs() {
        for (patience, batches_max) in [(Duration::from_secs(60), 2), (Duration::from_millis(20), 3)] {
            let (doubling, gate, batches) = doubling(BatchConfig { workers: 2, overlap_after: patience, ..CONFIG });
            let is_at_work = async || {
                while batches.load(Ordering::Relaxed) == 0 {
                    tokio::task::yield_now().await;
                }
            };
            let later = async |call| {
                is_at_work().await;
                doubling.call(call).await
            };
            let calls = async {
                let mut later = join_all((1..=4).map(later)).boxed();
                if batches_max == 2 {
                    // The later calls are queued now, so the first may end.
                    assert!(tokio::time::timeout(Duration::from_millis(50), &mut later).await.is_err());
                    gate.notify_one();
                }
                let answers = later.await;
                gate.notify_one();
                answers
            };
            let (first, later) = tokio::join!(doubling.call(0), calls);
            assert!(first.is_ok() && later.into_iter().all(|answer| answer.is_ok()));
            assert!(batches.load(Ordering::Relaxed) <= batches_max, "{batches:?} batches");
        }
    }

    #[tokio::test]
    async fn who_is_to_wait_for_company_leaves_with_those_who_come_meanwhile_and_at_once_when_there_are_enough() {
        const GATHER: Duration = Duration::from_secs(1);
        let (doubling, _, batches) = doubling(BatchConfig { linger: GATHER, ..CONFIG });
        let begun = Instant::now();
        let enough = join_all((1..=8).map(|call| doubling.call(call))).await;
        assert!(enough.iter().all(Result::is_ok) && begun.elapsed() < GATHER);
        let later = async |call| {
            tokio::time::sleep(GATHER / 20).await;
            doubling.call(call).await
        };
        let (first, second) = tokio::join!(doubling.call(1), later(2));
        assert!(first.is_ok() && second.is_ok());
        assert_eq!(batches.load(Ordering::Relaxed), 2, "one of eight, and one of the two others");
    }

    #[tokio::test]
    async fn a_batch_that_panics_is_given_up_and_the_lane_goes_on() {
        let (doubling, ..) = doubling(CONFIG);
        assert!(doubling.call(13).await.is_err());
        assert_eq!(doubling.call(4).await.unwrap(), 8);
    }

    #[tokio::test]
    async fn what_never_answers_costs_a_lane_no_more_than_its_time() {
        let (doubling, ..) = doubling(BatchConfig { timeout: Duration::from_millis(50), ..CONFIG });
        assert!(doubling.call(0).await.is_err());
        assert_eq!(doubling.call(4).await.unwrap(), 8);
    }

    #[tokio::test]
    async fn what_nobody_waits_for_any_more_is_not_done() {
        let (doubling, gate, batches) = doubling(CONFIG);
        let hurried = async {
            while batches.load(Ordering::Relaxed) == 0 {
                tokio::task::yield_now().await;
            }
            let gone = tokio::time::timeout(Duration::from_millis(20), doubling.call(13)).await;
            gate.notify_one();
            gone
        };
        let (first, hurried) = tokio::join!(doubling.call(0), hurried);
        assert!(first.is_ok() && hurried.is_err());
        assert_eq!(doubling.call(4).await.unwrap(), 8);
        assert!(batches.load(Ordering::Relaxed) <= 2, "the one that had gone was done, too");
    }

    #[tokio::test]
    async fn what_can_not_be_done_together_is_done_by_itself_and_an_unknown_outcome_is_everybodys() {
        let refused = || Err(sqlx::Error::Database(Box::new(Refusal)).into());
        let work = async |calls: Arc<[u32]>| match calls[..] {
            _ if calls.contains(&99) => Err(no_answer()),
            _ if calls.contains(&13) => refused(),
            [_, ..] if calls.len() > 1 && calls.contains(&7) => Ok(None),
            _ => Ok(Some(calls.iter().map(|call| Ok(call * 2)).collect())),
        };
        let answers = async |calls: &[u32]| -> Vec<Option<u32>> {
            batch_or_each(calls.to_vec(), work).await.into_iter().map(Result::ok).collect()
        };
        assert_eq!(answers(&[1, 2]).await, [Some(2), Some(4)]);
        assert_eq!(answers(&[1, 13, 2]).await, [Some(2), None, Some(4)]);
        assert_eq!(answers(&[7, 1]).await, [Some(14), Some(2)]);
        assert_eq!(answers(&[1, 99]).await, [None, None]);
    }

    /// A database error, as of a broken constraint.
    #[derive(Debug)]
    struct Refusal;

    impl std::fmt::Display for Refusal {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("no")
        }
    }

    impl std::error::Error for Refusal {}

    impl sqlx::error::DatabaseError for Refusal {
        fn message(&self) -> &str {
            "no"
        }

        fn as_error(&self) -> &(dyn std::error::Error + Send + Sync + 'static) {
            self
        }

        fn as_error_mut(&mut self) -> &mut (dyn std::error::Error + Send + Sync + 'static) {
            self
        }

        fn into_error(self: Box<Self>) -> Box<dyn std::error::Error + Send + Sync + 'static> {
            self
        }

        fn kind(&self) -> sqlx::error::ErrorKind {
            sqlx::error::ErrorKind::Other
        }
    }
}
