//! The worker's schedule: which tick, how often. What a tick does stands elsewhere, takes no input, and is harmless in any number of copies.

use std::sync::Arc;
use std::time::Duration;

use service_kit::lifecycle::Lifecycle;
use tokio::sync::Notify;
use tokio_cron_scheduler::{Job, JobScheduler};
use tokio_util::sync::CancellationToken;

use crate::app::App;
use crate::idempotency;
use crate::reconcile::{self, Sweep};
use crate::reservations::finish;

/// Without a tick for this many intervals, and this long at least, the work is done all the same: the scheduler has been
/// seen to stop ticking under load, and holds must end.
const MISSED_TICKS_MAX: u32 = 3;
const MISSED_TIME_MIN: Duration = Duration::from_secs(2);

/// How often the two ticks come, and how much one transaction of the first ends.
#[derive(Debug, Clone, Copy)]
pub struct Schedule {
    /// Between looks for due reservations.
    pub expiry: Duration,
    /// Reservations ended in one transaction.
    pub expiry_batch_size: u32,
    /// Between rounds of reconciliation.
    pub reconcile: Duration,
}

/// Starts the worker's loops.
///
/// # Errors
/// The scheduler can't be started.
pub async fn start(app: &App, schedule: Schedule, lifecycle: &Lifecycle) -> anyhow::Result<()> {
    let scheduler = JobScheduler::new().await?;
    let expiry = tick_every(&scheduler, schedule.expiry).await?;
    let reconcile = tick_every(&scheduler, schedule.reconcile).await?;
    scheduler.start().await?;

    let (worker, stopping) = (Arc::clone(app), lifecycle.token().clone());
    lifecycle.spawn("expiry", async move {
        while next_tick(&expiry, schedule.expiry, &stopping).await {
            expire_all_due(&worker, schedule.expiry_batch_size, &stopping).await;
        }
        Ok(())
    });
    let (worker, stopping) = (Arc::clone(app), lifecycle.token().clone());
    lifecycle.spawn("reconciliation", async move {
        let mut sweep = Sweep::default();
        while next_tick(&reconcile, schedule.reconcile, &stopping).await {
            heal(&worker, &mut sweep).await;
        }
        drop(scheduler); // It ticks for as long as it is held.
        Ok(())
    });
    tracing::info!(
        expiry_ms = schedule.expiry.as_millis(),
        reconcile_ms = schedule.reconcile.as_millis(),
        "Worker started"
    );
    Ok(())
}

async fn tick_every(scheduler: &JobScheduler, interval: Duration) -> anyhow::Result<Arc<Notify>> {
    let tick = Arc::new(Notify::new());
    let ticked = Arc::clone(&tick);
    let job = Job::new_repeated_async(interval, move |_, _| {
        ticked.notify_one();
        Box::pin(std::future::ready(()))
    })?;
    scheduler.add(job).await?;
    Ok(tick)
}

/// Waits for the tick; false when the process is to stop.
async fn next_tick(tick: &Notify, interval: Duration, stopping: &CancellationToken) -> bool {
    let patience = (interval * MISSED_TICKS_MAX).max(MISSED_TIME_MIN);
    tokio::select! {
        () = stopping.cancelled() => return false,
        () = tick.notified() => {}
        () = tokio::time::sleep(patience) => tracing::warn!(interval_ms = interval.as_millis(), "The scheduler gives no tick; the work is done without it"),
    }
    true
}

/// Full batches follow each other at once.
async fn expire_all_due(app: &App, batch_size: u32, stopping: &CancellationToken) {
    while !stopping.is_cancelled() {
        match finish::expire_due(app, batch_size).await {
            Ok(0) => return,
            Ok(expired) => {
                tracing::info!(expired, "Expired reservations");
                if expired < batch_size as usize {
                    return;
                }
            }
            Err(error) => {
                return tracing::warn!(
                    error = format!("{:#}", anyhow::Error::from(error)),
                    "Due reservations wait for the next tick"
                );
            }
        }
    }
}

/// One part that fails keeps none of the others from its work.
async fn heal(app: &App, sweep: &mut Sweep) {
    let outcomes = [
        ("holds", reconcile::reconcile_once(app, sweep).await.map(drop)),
        ("payments", reconcile::settle_payments(app).await.map(drop)),
        ("refunds", reconcile::settle_refunds(app).await.map(drop)),
        (
            "idempotency keys",
            idempotency::forget_old(&app.db).await.map(drop),
        ),
    ];
    for (part, outcome) in outcomes {
        if let Err(error) = outcome {
            tracing::warn!(
                part,
                error = format!("{:#}", anyhow::Error::from(error)),
                "Reconciliation waits for the next tick"
            );
        }
    }
}
