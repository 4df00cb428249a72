//! A circuit breaker and a retry budget. They keep callers from flooding a part that is down.
//!
//! ```text
//!          FAILURES_MAX in a row                OPEN_TIME is over
//!  closed ───────────────────────▶ open ───────────────────────▶ one probe ──▶ closed
//!                                   ▲                                │
//!                                   └──────────── it fails ──────────┘
//! ```

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use backon::{BackoffBuilder, ExponentialBuilder};
use tokio::sync::Notify;

/// Failed tries in a row that open the circuit. One unlucky call has fewer. The number is small enough that a stampede
/// is turned away at once.
const FAILURES_MAX: u32 = 10;
/// How long an open circuit lets no call through. After that it admits one probe.
const OPEN_TIME: Duration = Duration::from_secs(1);
/// Retries that may be saved up, for a short outage.
const RETRIES_SAVED_MAX: f64 = 20.0;
/// Retries that a call earns. So a part that fails often gets a tenth more calls, not three times as many.
const RETRIES_PER_CALL: f64 = 0.1;

/// The circuit to one other part, shared by all calls to it.
#[derive(Debug)]
pub struct Circuit {
    name: &'static str,
    state: Mutex<State>,
    opened: Notify,
}

#[derive(Debug)]
struct State {
    failures: u32,
    open_until: Option<Instant>,
    probing: bool,
    retries: f64,
}

/// An admitted try. One that is dropped before it is settled counts as failed.
struct Try<'a> {
    circuit: &'a Circuit,
    settled: bool,
}

impl Circuit {
    /// A closed circuit to the part of this name.
    #[must_use]
    pub fn new(name: &'static str) -> Self {
        let state = State { failures: 0, open_until: None, probing: false, retries: RETRIES_SAVED_MAX };
        Self { name, state: Mutex::new(state), opened: Notify::new() }
    }

    /// Whether calls are let through.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.state().open_until.is_none()
    }

    /// Makes a call that is harmless when repeated: at most `tries` times, while the circuit is closed and the budget
    /// lasts. The jittered pauses grow from 20 to 100 ms. An error of `make` is a failure of the part; a refusal by the
    /// part is an answer.
    ///
    /// # Errors
    /// The error of the last try, or that the circuit is open.
    pub async fn call<T, F: Future<Output = anyhow::Result<T>>>(
        &self,
        tries: usize,
        make: impl Fn() -> F,
    ) -> anyhow::Result<T> {
        let mut pauses = ExponentialBuilder::default()
            .with_min_delay(Duration::from_millis(20))
            .with_max_delay(Duration::from_millis(100))
            .with_jitter()
            .with_max_times(tries.saturating_sub(1))
            .build();
        self.earn();
        loop {
            let attempt = self.admit()?;
            let error = match make().await {
                Ok(answer) => {
                    attempt.settle(true);
                    return Ok(answer);
                }
                Err(error) => error,
            };
            attempt.settle(false);
            let Some(pause) = pauses.next().filter(|_| self.spend()) else {
                return Err(error);
            };
            tracing::debug!(error = format!("{error:#}"), part = self.name, "Retrying");
            tokio::time::sleep(pause).await;
        }
    }

    /// Whenever the circuit is open, calls `make` as the probe until it is closed. Callers may stay away because the
    /// circuit is open, and then no call would show that the part works again. Never returns.
    pub async fn keep_probing<T, F: Future<Output = anyhow::Result<T>>>(&self, make: impl Fn() -> F) {
        loop {
            self.opened.notified().await;
            while !self.is_closed() {
                tokio::time::sleep(OPEN_TIME).await;
                drop(self.call(1, &make).await);
            }
        }
    }

    fn admit(&self) -> anyhow::Result<Try<'_>> {
        let mut state = self.state();
        if let Some(until) = state.open_until {
            if state.probing || Instant::now() < until {
                anyhow::bail!("{} has failed {FAILURES_MAX} times in a row; its circuit is open", self.name);
            }
            state.probing = true;
        }
        Ok(Try { circuit: self, settled: false })
    }

    fn earn(&self) {
        let mut state = self.state();
        state.retries = (state.retries + RETRIES_PER_CALL).min(RETRIES_SAVED_MAX);
    }

    fn spend(&self) -> bool {
        let mut state = self.state();
        let enough = state.retries >= 1.0;
        if enough {
            state.retries -= 1.0;
        }
        enough
    }

    fn done(&self, succeeded: bool) {
        let mut state = self.state();
        let was_open = state.open_until.is_some();
        if succeeded {
            (state.failures, state.open_until, state.probing) = (0, None, false);
            if was_open {
                tracing::info!(part = self.name, "It answers again; the circuit is closed");
            }
            return;
        }
        state.failures = state.failures.saturating_add(1);
        // Tries that were in progress when the circuit opened change nothing; the probe decides.
        if state.failures >= FAILURES_MAX && (!was_open || state.probing) {
            state.open_until = Some(Instant::now() + OPEN_TIME);
            state.probing = false;
            if !was_open {
                self.opened.notify_one();
                tracing::warn!(part = self.name, "It does not answer; the circuit is open");
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Try<'_> {
    fn settle(mut self, succeeded: bool) {
        self.settled = true;
        self.circuit.done(succeeded);
    }
}

impl Drop for Try<'_> {
    fn drop(&mut self) {
        if !self.settled {
            self.circuit.done(false);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use anyhow::anyhow;

    use super::*;

    async fn fail(circuit: &Circuit, tries: usize, asked: &AtomicU32) {
        let failed = circuit.call(tries, async || -> anyhow::Result<()> {
            asked.fetch_add(1, Ordering::Relaxed);
            Err(anyhow!("down"))
        });
        assert!(failed.await.is_err());
    }

    #[tokio::test]
    async fn it_opens_after_failures_in_a_row_and_one_probe_closes_it() {
        let (circuit, asked) = (Circuit::new("part"), AtomicU32::new(0));
        for _ in 0..FAILURES_MAX - 1 {
            fail(&circuit, 1, &asked).await;
        }
        circuit.call(1, async || Ok(())).await.unwrap();
        for _ in 0..FAILURES_MAX + 5 {
            fail(&circuit, 1, &asked).await;
        }
        // A success in between resets the count. An open circuit lets no call through.
        assert_eq!(asked.load(Ordering::Relaxed), FAILURES_MAX - 1 + FAILURES_MAX);
        assert!(!circuit.is_closed());

        circuit.state().open_until = Some(Instant::now());
        fail(&circuit, 3, &asked).await;
        assert_eq!(asked.load(Ordering::Relaxed), 2 * FAILURES_MAX, "one probe, without a retry");
        circuit.state().open_until = Some(Instant::now());
        circuit.call(1, async || Ok(())).await.unwrap();
        assert!(circuit.is_closed());
    }

    #[tokio::test]
    async fn a_probe_that_is_dropped_is_followed_by_another() {
        let circuit = Circuit::new("part");
        circuit.state().failures = FAILURES_MAX;
        circuit.state().open_until = Some(Instant::now());
        let never = circuit.call(1, std::future::pending::<anyhow::Result<()>>);
        assert!(tokio::time::timeout(Duration::from_millis(20), never).await.is_err());
        circuit.state().open_until = Some(Instant::now());
        circuit.call(1, async || Ok(())).await.unwrap();
        assert!(circuit.is_closed());
    }

    #[tokio::test]
    async fn second_tries_have_a_budget() {
        let (circuit, asked) = (Circuit::new("part"), AtomicU32::new(0));
        // Every second call fails all its three tries. The circuit never opens, and the saved retries are used up.
        for _ in 0..200 {
            fail(&circuit, 3, &asked).await;
            circuit.call(1, async || Ok(())).await.unwrap();
        }
        let second_tries = asked.load(Ordering::Relaxed) - 200;
        assert!((20..=61).contains(&second_tries), "{second_tries} retries for 400 calls");
    }
}
