//! Calls that come at the same time, done together: one statement and one commit for many.
//!
//! A lane that is free takes what is there, be it one call; while it works, the next ones gather. So a quiet service answers as fast as
//! ever, and a busy one does the less for each call the more of them there are. Where there are many steps one after the other, as on the way
//! of a payment, the calls spread over them and batches stay small: there a batch waits a moment for company before it begins.
//! A second lane is for batches that take long: for the wait for a slow disk, or for somebody's lock, there is another beside it.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use anyhow::anyhow;
use futures::FutureExt;
use futures::future::join_all;
use tokio::sync::{Mutex, mpsc, oneshot};

use crate::http::error::{Error, Result};
use crate::process::lifecycle::Lifecycle;

/// A call on its way, and who waits for its answer.
type Waiting<T, R> = (T, oneshot::Sender<Result<R>>);

/// The way to lanes that do calls of `T` together; each call gets its own `R`.
#[derive(Debug)]
pub struct Coalescer<T, R> {
    line: mpsc::Sender<Waiting<T, R>>,
}

/// How calls are done together.
#[derive(Debug, Clone, Copy)]
pub struct Lanes {
    /// Batches under way at a time.
    pub count: usize,
    /// How long a batch waits for more calls, unless it has enough, when it is its turn.
    pub gather: Duration,
    /// How long a batch waits for the one before it before it is begun beside it.
    pub patience: Duration,
    /// Calls of a batch.
    pub batch_max: usize,
    /// Calls that wait for a lane; those beyond them wait to get in line.
    pub waiting_max: usize,
    /// The longest a batch may take, so that what never answers costs a lane no more than this.
    pub time_max: Duration,
}

/// Until the next tick of the runtime's timer, which has one a millisecond: the shortest wait that is one.
const MOMENT: Duration = Duration::from_nanos(1);

impl Lanes {
    /// Two: more would make the batches smaller and the work more, and so would a second one that did not wait its turn (measured: a
    /// fifth). A commit to a slow disk takes less than the patience, so 64 calls every 20 ms is the least that a lane does. A batch of
    /// 64 has most of what there is to save; a longer line than this is shed by the limit on requests in flight.
    #[must_use]
    pub const fn usual(time_max: Duration) -> Self {
        Self {
            count: 2,
            gather: Duration::ZERO,
            patience: Duration::from_millis(20),
            batch_max: 64,
            waiting_max: 1024,
            time_max,
        }
    }

    /// These, but each batch waits a moment for company: half a millisecond on average, and one at most. Not where seats are held or looked at: with it
    /// everywhere, a reservation at half of the highest rate took 8 ms instead of 4.5, measured.
    #[must_use]
    pub const fn with_company(self) -> Self {
        Self { gather: MOMENT, ..self }
    }
}

impl<T: Send + 'static, R: Send + 'static> Coalescer<T, R> {
    /// Starts the lanes; they end when nobody can call any more. `work` gives one answer a call, in their order.
    pub fn start<F: Future<Output = Vec<Result<R>>> + Send>(
        lifecycle: &Lifecycle,
        lanes: Lanes,
        work: impl Fn(Vec<T>) -> F + Send + Sync + 'static,
    ) -> Self {
        let (sender, line) = mpsc::channel(lanes.waiting_max);
        let (line, turn, work) = (Arc::new(Mutex::new(line)), Arc::new(Mutex::new(())), Arc::new(work));
        for _ in 0..lanes.count {
            let (line, turn, work) = (Arc::clone(&line), Arc::clone(&turn), Arc::clone(&work));
            drop(lifecycle.spawn_work(async move {
                loop {
                    let mut batch: Vec<Waiting<T, R>> = Vec::new();
                    let mut next = line.lock().await;
                    if next.recv_many(&mut batch, lanes.batch_max).await == 0 {
                        return;
                    }
                    let _turn = tokio::time::timeout(lanes.patience, turn.lock()).await;
                    if batch.len() < lanes.batch_max && !lanes.gather.is_zero() {
                        tokio::time::sleep(lanes.gather).await;
                    }
                    while batch.len() < lanes.batch_max
                        && let Ok(waiting) = next.try_recv()
                    {
                        batch.push(waiting);
                    }
                    drop(next);
                    // What nobody waits for any more need not be done.
                    batch.retain(|(_, caller)| !caller.is_closed());
                    if batch.is_empty() {
                        continue;
                    }
                    let (calls, callers): (Vec<T>, Vec<_>) = batch.into_iter().unzip();
                    let done = tokio::time::timeout(lanes.time_max, AssertUnwindSafe(work(calls)).catch_unwind());
                    match done.await {
                        Ok(Ok(answers)) => {
                            callers.into_iter().zip(answers).for_each(|(caller, answer)| drop(caller.send(answer)))
                        }
                        // The callers hear of it as their senders are dropped.
                        Ok(Err(_)) => tracing::error!(calls = callers.len(), "A batch panicked and is given up"),
                        Err(_) => tracing::warn!(calls = callers.len(), "A batch took too long and is given up"),
                    }
                }
            }));
        }
        Self { line: sender }
    }

    /// Does a call together with those that wait.
    ///
    /// # Errors
    /// What became of this call. When its batch was given up, or the process stops, that is a database that does not answer: the call
    /// may or may not have had its effect.
    pub async fn call(&self, call: T) -> Result<R> {
        let (sender, answer) = oneshot::channel();
        self.line.send((call, sender)).await.map_err(|_| no_answer())?;
        answer.await.unwrap_or_else(|_| Err(no_answer()))
    }
}

/// What a call hears whose batch was given up.
#[must_use]
pub fn no_answer() -> Error {
    Error::OutcomeUnknown(anyhow!("the batch of this call was given up, or the process stops"))
}

/// Each call's own part of what was looked up for all of them, or the error for each.
pub fn own_parts<T, S, R>(calls: &[T], looked: Result<S>, own: impl Fn(&S, &T) -> R) -> Vec<Result<R>> {
    match looked {
        Ok(looked) => calls.iter().map(|call| Ok(own(&looked, call))).collect(),
        Err(mut error) => calls.iter().map(|_| Err(error.for_another())).collect(),
    }
}

/// Does calls together by `work`, which gives one answer a call in their order, or `None` if they can't be done together. Then, or when
/// the database refuses one of them, each is done by itself: nothing of the batch has had an effect, and none may spoil it for the others.
/// After any other error nobody knows whether they had their effects, and all hear of it.
pub async fn together_or_alone<T: Clone, R, F: Future<Output = Result<Option<Vec<Result<R>>>>>>(
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
            tracing::warn!(%error, calls = calls.len(), "A batch has no known outcome; each of it is asked for again");
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

    const LANES: Lanes = Lanes {
        count: 1,
        gather: Duration::ZERO,
        patience: Duration::from_secs(60),
        batch_max: 8,
        waiting_max: 64,
        time_max: Duration::from_secs(5),
    };

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
                calls.into_iter().map(|call| Ok(call * 2)).collect()
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
    async fn a_free_lane_waits_for_the_batch_at_work_and_overtakes_one_that_hangs() {
        for (patience, batches_max) in [(Duration::from_secs(60), 2), (Duration::from_millis(20), 3)] {
            let (doubling, gate, batches) = doubling(Lanes { count: 2, patience, ..LANES });
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
                    // Once they are in line the first may end.
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
        let (doubling, _, batches) = doubling(Lanes { gather: GATHER, ..LANES });
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
            together_or_alone(calls.to_vec(), work).await.into_iter().map(Result::ok).collect()
        };
        assert_eq!(answers(&[1, 2]).await, [Some(2), Some(4)]);
        assert_eq!(answers(&[1, 13, 2]).await, [Some(2), None, Some(4)]);
        assert_eq!(answers(&[7, 1]).await, [Some(14), Some(2)]);
        assert_eq!(answers(&[1, 99]).await, [None, None]);
    }

    /// A database that says no.
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
