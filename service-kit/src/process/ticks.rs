//! Periodic work. tokio-cron-scheduler gives the ticks, and this file knows its traps:
//!
//! - It cuts a period to whole seconds: 1.5 s would tick each second, and 0.5 s would stop it. Such periods are timed
//!   here, without it.
//! - After it was stopped for longer than a period (a paused machine does that), it never ticks again. A tick that is
//!   late is made up for here.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio_cron_scheduler::{Job, JobScheduler};
use tokio_util::sync::CancellationToken;

/// How late a tick of the scheduler may be, before the work is done without it.
const LATE_MAX: Duration = Duration::from_millis(250);

/// The ticks of one period. They go on for as long as this exists.
pub struct Ticks {
    ticked: Arc<Notify>,
    period: Duration,
    missed: bool,
    /// The scheduler of this period; none for a period that it can't count.
    scheduler: Option<JobScheduler>,
}

/// Starts the ticks of each period.
///
/// # Errors
/// The scheduler can't be started.
pub async fn start<const N: usize>(periods: [Duration; N]) -> anyhow::Result<[Ticks; N]> {
    let scheduler = JobScheduler::new().await?;
    let ticks = periods.map(|period| Ticks {
        ticked: Arc::default(),
        period,
        missed: false,
        scheduler: (period.subsec_nanos() == 0 && !period.is_zero()).then(|| scheduler.clone()),
    });
    for Ticks { ticked, period, .. } in ticks.iter().filter(|ticks| ticks.scheduler.is_some()) {
        let ticked = Arc::clone(ticked);
        let job = Job::new_repeated_async(*period, move |_, _| {
            ticked.notify_one();
            Box::pin(std::future::ready(()))
        })?;
        scheduler.add(job).await?;
    }
    scheduler.start().await?;
    Ok(ticks)
}

impl Ticks {
    /// Waits for the next tick. Returns false when the process is to stop.
    pub async fn next(&mut self, stopping: &CancellationToken) -> bool {
        let is_scheduled = self.scheduler.is_some();
        let wait_max = if is_scheduled { self.period + LATE_MAX } else { self.period };
        tokio::select! {
            () = stopping.cancelled() => return false,
            () = self.ticked.notified() => self.missed = false,
            () = tokio::time::sleep(wait_max) => {
                if is_scheduled && !self.missed {
                    tracing::warn!(period_ms = self.period.as_millis(), "The scheduler gives no tick; the work is done without it");
                }
                self.missed = true;
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[tokio::test]
    async fn a_period_that_is_no_whole_number_of_seconds_is_kept() {
        let stopping = CancellationToken::new();
        let [mut short, mut long] = start([Duration::from_millis(300), Duration::from_millis(1500)]).await.unwrap();
        let measure = async |ticks: &mut Ticks, count: u32| {
            let begun = Instant::now();
            for _ in 0..count {
                assert!(ticks.next(&stopping).await);
            }
            begun.elapsed()
        };
        let (short, long) = tokio::join!(measure(&mut short, 10), measure(&mut long, 2));
        // Other load on the machine only makes a tick late.
        assert!(short >= Duration::from_millis(3000) && short < Duration::from_secs(20), "{short:?}");
        assert!(long >= Duration::from_millis(3000) && long < Duration::from_secs(20), "{long:?}");
    }

    #[tokio::test]
    async fn whole_seconds_come_from_the_scheduler_until_the_process_stops() {
        let stopping = CancellationToken::new();
        let [mut ticks] = start([Duration::from_secs(1)]).await.unwrap();
        assert!(ticks.scheduler.is_some());
        assert!(ticks.next(&stopping).await);
        stopping.cancel();
        assert!(!ticks.next(&stopping).await);
    }
}
