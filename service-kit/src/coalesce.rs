//! Calls that come at the same time, done together: one statement and one commit for many.
//!
//! Nobody waits for company. A lane that is free takes what is there, be it one call; while it works, the next ones gather. So a
//! quiet service answers as fast as ever, and a busy one does the less for each call the more of them there are.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use tokio::sync::{Mutex, mpsc, oneshot};

use crate::lifecycle::Lifecycle;

/// The way to lanes that do calls of `T` together; each call gets its own `R`.
#[derive(Debug)]
pub struct Coalescer<T, R> {
    waiting: mpsc::Sender<(T, oneshot::Sender<R>)>,
}

/// How calls are done together.
#[derive(Debug, Clone, Copy)]
pub struct Lanes {
    /// Batches under way at a time.
    pub count: usize,
    /// Calls of a batch.
    pub batch_max: usize,
    /// Calls that wait for a lane; those beyond them wait to get in line.
    pub waiting_max: usize,
    /// The longest a batch may take, so that what never answers costs a lane no more than this.
    pub time_max: Duration,
}

/// The lanes are gone: the process stops, or a batch panicked. The call may or may not have had its effect.
#[derive(Debug, thiserror::Error)]
#[error("the batch of this call was given up")]
pub struct GivenUp;

impl<T: Send + 'static, R: Send + 'static> Coalescer<T, R> {
    /// Starts the lanes; they end when nobody can call any more. `work` gives one answer a call, in their order.
    pub fn start<F: Future<Output = Vec<R>> + Send>(
        lifecycle: &Lifecycle,
        lanes: Lanes,
        work: impl Fn(Vec<T>) -> F + Send + Sync + 'static,
    ) -> Self {
        let (waiting, line) = mpsc::channel(lanes.waiting_max);
        let (line, work) = (Arc::new(Mutex::new(line)), Arc::new(work));
        for _ in 0..lanes.count {
            let (line, work) = (Arc::clone(&line), Arc::clone(&work));
            drop(lifecycle.spawn_work(async move {
                loop {
                    let mut batch = Vec::new();
                    if line.lock().await.recv_many(&mut batch, lanes.batch_max).await == 0 {
                        return;
                    }
                    // What nobody waits for any more need not be done.
                    batch.retain(|(_, caller): &(T, oneshot::Sender<R>)| !caller.is_closed());
                    if batch.is_empty() {
                        continue;
                    }
                    let (calls, callers): (Vec<T>, Vec<_>) = batch.into_iter().unzip();
                    // A batch that panics or takes too long is given up; its callers hear of it as their senders are dropped.
                    let done = tokio::time::timeout(lanes.time_max, AssertUnwindSafe(work(calls)).catch_unwind()).await;
                    for (caller, answer) in callers.into_iter().zip(done.into_iter().flatten().flatten()) {
                        drop(caller.send(answer));
                    }
                }
            }));
        }
        Self { waiting }
    }

    /// Does a call together with those that wait.
    ///
    /// # Errors
    /// [`GivenUp`].
    pub async fn call(&self, call: T) -> Result<R, GivenUp> {
        let (answer, answered) = oneshot::channel();
        self.waiting.send((call, answer)).await.map_err(|_| GivenUp)?;
        answered.await.map_err(|_| GivenUp)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures::future::join_all;
    use tokio::sync::Notify;

    use super::*;

    const LANES: Lanes = Lanes { count: 1, batch_max: 8, waiting_max: 64, time_max: Duration::from_secs(5) };

    /// Doubles numbers, once `gate` lets it; counts its batches.
    fn doubling(lanes: Lanes) -> (Coalescer<u32, u32>, Arc<Notify>, Arc<AtomicUsize>) {
        let (gate, batches) = (Arc::new(Notify::new()), Arc::new(AtomicUsize::new(0)));
        let (opened, counted) = (Arc::clone(&gate), Arc::clone(&batches));
        let doubling = Coalescer::start(&Lifecycle::new(), lanes, move |calls: Vec<u32>| {
            let (opened, counted) = (Arc::clone(&opened), Arc::clone(&counted));
            async move {
                counted.fetch_add(1, Ordering::Relaxed);
                if calls.contains(&0) {
                    opened.notified().await;
                }
                assert!(!calls.contains(&13), "unlucky");
                calls.into_iter().map(|call| call * 2).collect()
            }
        });
        (doubling, gate, batches)
    }

    #[tokio::test]
    async fn what_gathers_while_a_batch_is_at_work_is_done_together_and_each_gets_its_own_answer() {
        let (doubling, gate, batches) = doubling(LANES);
        let calls = join_all((0..=8).map(|call| doubling.call(call)));
        let open = async {
            // The first is at work, the others are in line, as every call is polled once before this.
            tokio::task::yield_now().await;
            gate.notify_one();
        };
        let (answers, ()) = tokio::join!(calls, open);
        let answers: Vec<u32> = answers.into_iter().map(Result::unwrap).collect();
        assert_eq!(answers, (0..=8).map(|call| call * 2).collect::<Vec<_>>());
        assert!(batches.load(Ordering::Relaxed) <= 3, "{batches:?} batches for nine calls");
    }

    #[tokio::test]
    async fn a_batch_that_panics_is_given_up_and_the_lane_goes_on() {
        let (doubling, ..) = doubling(LANES);
        assert!(doubling.call(13).await.is_err());
        assert_eq!(doubling.call(4).await.unwrap(), 8);
    }

    #[tokio::test]
    async fn what_never_answers_costs_a_lane_no_more_than_its_time() {
        let (doubling, ..) = doubling(Lanes { time_max: Duration::from_millis(50), ..LANES });
        assert!(doubling.call(0).await.is_err());
        assert_eq!(doubling.call(4).await.unwrap(), 8);
    }

    #[tokio::test]
    async fn what_nobody_waits_for_any_more_is_not_done() {
        let (doubling, gate, batches) = doubling(LANES);
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
}
