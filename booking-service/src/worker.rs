//! The worker's schedule: which tick, how often. What a tick does stands elsewhere, takes no input, and is harmless in
//! any number of copies.

use std::sync::Arc;
use std::time::Duration;

use service_kit::amqp::Broker;
use service_kit::http::error::Result;
use service_kit::process::lifecycle::Lifecycle;
use tokio::sync::Notify;
use tokio_cron_scheduler::{Job, JobScheduler};
use tokio_util::sync::CancellationToken;

use crate::audit::{self, AuditWindow, Report};
use crate::idempotency;
use crate::state::App;
use crate::workflows::end;
use crate::workflows::reconcile::{self, Sweep};

/// How much later than due a tick may come before the work is done without it. The scheduler counts whole seconds, and one that has
/// been stopped for longer than its interval (a paused machine will do) never ticks again.
const TICK_LATE_MAX: Duration = Duration::from_millis(250);
/// The shortest interval that the scheduler can count.
const TICK_MIN: Duration = Duration::from_secs(1);
/// The longest that one piece of work may take: a database host that vanished without a word must not stop the worker for ever.
/// What is cut off is rolled back, or as harmless as a crash at that place.
const WORK_TIME_MAX: Duration = Duration::from_secs(60);

/// When the worker audits, and where the dead letters are that an audit counts.
#[derive(Debug, Clone)]
pub struct Audits {
    /// Between two of them.
    pub interval: Duration,
    /// How patient each is.
    pub window: AuditWindow,
    /// The broker whose dead letters an audit counts.
    pub broker: Broker,
    /// The Event Service's queue there.
    pub queue: String,
}

/// As `booking-service audit` unless it is told otherwise.
pub const AUDIT_WINDOW: AuditWindow = AuditWindow { settle: Duration::from_secs(10), late: Duration::from_secs(60) };

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
    let mut expiry = tick_every(&scheduler, schedule.expiry).await?;
    let mut reconcile = tick_every(&scheduler, schedule.reconcile).await?;
    scheduler.start().await?;

    let (worker, stopping) = (Arc::clone(app), lifecycle.token().clone());
    lifecycle.spawn("expiry", async move {
        while expiry.next(&stopping).await {
            bounded(&worker, "expiry", &stopping, expire_all_due(&worker, schedule.expiry_batch_size)).await;
        }
        Ok(())
    });
    let (worker, stopping) = (Arc::clone(app), lifecycle.token().clone());
    lifecycle.spawn("reconciliation", async move {
        let mut sweep = Sweep::beside_expiry();
        while reconcile.next(&stopping).await {
            heal(&worker, &mut sweep, &stopping).await;
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

/// A tick of the scheduler, and the clock that is looked at when it fails to come.
struct Tick {
    ticked: Arc<Notify>,
    interval: Duration,
    missed: bool,
}

async fn tick_every(scheduler: &JobScheduler, interval: Duration) -> anyhow::Result<Tick> {
    let ticked = Arc::new(Notify::new());
    if interval >= TICK_MIN {
        let notify = Arc::clone(&ticked);
        let job = Job::new_repeated_async(interval, move |_, _| {
            notify.notify_one();
            Box::pin(std::future::ready(()))
        })?;
        scheduler.add(job).await?;
    }
    Ok(Tick { ticked, interval, missed: false })
}

impl Tick {
    /// Waits for the next time to work; false when the process is to stop.
    async fn next(&mut self, stopping: &CancellationToken) -> bool {
        let scheduled = self.interval >= TICK_MIN;
        let wait_max = if scheduled { self.interval + TICK_LATE_MAX } else { self.interval };
        tokio::select! {
            () = stopping.cancelled() => return false,
            () = self.ticked.notified() => self.missed = false,
            () = tokio::time::sleep(wait_max) => {
                if scheduled && !self.missed {
                    tracing::warn!(interval_ms = self.interval.as_millis(), "The scheduler gives no tick; the work is done without it");
                }
                self.missed = true;
            }
        }
        true
    }
}

async fn bounded(app: &App, work: &'static str, stopping: &CancellationToken, doing: impl Future<Output = ()>) {
    if let Some(Err(_)) = stopping.run_until_cancelled(tokio::time::timeout(WORK_TIME_MAX, doing)).await {
        app.metrics.ran(work, false);
        tracing::error!(work, seconds = WORK_TIME_MAX.as_secs(), "Cut off; it goes on at the next tick");
    }
}

/// Full batches follow each other at once.
async fn expire_all_due(app: &App, batch_size: u32) {
    loop {
        match end::expire_due(app, batch_size).await {
            Ok(0) => return app.metrics.ran("expiry", true),
            Ok(expired) => {
                tracing::info!(expired, "Expired reservations");
                if expired < batch_size as usize {
                    return app.metrics.ran("expiry", true);
                }
            }
            Err(error) => {
                app.metrics.ran("expiry", false);
                return tracing::warn!(
                    error = format!("{:#}", anyhow::Error::from(error)),
                    "Due reservations wait for the next tick"
                );
            }
        }
    }
}

async fn heal(app: &App, sweep: &mut Sweep, stopping: &CancellationToken) {
    part(app, "holds", stopping, reconcile::reconcile_once(app, sweep)).await;
    part(app, "cancelled sessions", stopping, reconcile::end_cancelled_sessions(app, sweep)).await;
    part(app, "payments", stopping, reconcile::settle_payments(app)).await;
    part(app, "payments by notice", stopping, reconcile::follow_up_payments(app)).await;
    part(app, "refunds", stopping, reconcile::settle_refunds(app)).await;
    part(app, "idempotency keys", stopping, idempotency::forget_old(&app.db)).await;
}

/// A part of a round. One that fails, or takes too long, keeps none of the others from its work.
async fn part<T>(app: &App, part: &'static str, stopping: &CancellationToken, doing: impl Future<Output = Result<T>>) {
    let doing = async {
        let outcome = doing.await;
        app.metrics.ran(part, outcome.is_ok());
        if let Err(error) = outcome {
            tracing::warn!(
                part,
                error = format!("{:#}", anyhow::Error::from(error)),
                "Reconciliation waits for the next tick"
            );
        }
    };
    bounded(app, part, stopping, doing).await;
}

/// Audits until `stopping`, for the metrics; its findings are in the log, too.
///
/// # Errors
/// None; an audit that could not look is made up for by the next.
pub async fn audit_again_and_again(app: &App, plan: &Audits, stopping: &CancellationToken) -> anyhow::Result<()> {
    while stopping.run_until_cancelled(tokio::time::sleep(plan.interval)).await.is_some() {
        let audit = audit::audit(app, &plan.broker, &plan.queue, plan.window);
        let Some(report) = stopping.run_until_cancelled(audit).await else {
            break;
        };
        match &report {
            Ok(report) if report.is_clean() => tracing::info!("Audit: all promises are kept"),
            Ok(report) => tracing::error!(report = %report, "Audit: a promise is broken; someone must look"),
            Err(error) => tracing::warn!(error = format!("{error:#}"), "The audit could not look at everything"),
        }
        app.metrics.audited(report.as_ref().ok().map(Report::violations));
        app.metrics.ran("audit", report.is_ok());
    }
    Ok(())
}
