//! The worker's schedule: which task runs how often. The tasks are in other modules. They take no input, and any number
//! of workers can run them at once.

use std::sync::Arc;
use std::time::Duration;

use service_kit::amqp::Broker;
use service_kit::http::error::Result;
use service_kit::process::lifecycle::Lifecycle;
use service_kit::process::ticks;
use tokio_util::sync::CancellationToken;

use crate::audit::{self, AuditWindow, Report};
use crate::idempotency;
use crate::state::App;
use crate::workflows::end;
use crate::workflows::reconcile::{self, Sweep};

/// The time limit of one task: a database host that stops answering must not stop the worker for ever. A cancelled task
/// is rolled back, or is as harmless as a crash at that place.
const WORK_TIME_MAX: Duration = Duration::from_secs(60);

/// How often the worker audits, and where an audit counts dead letters.
#[derive(Debug, Clone)]
pub struct Audits {
    /// The time between two audits.
    pub interval: Duration,
    /// The times that each audit allows.
    pub window: AuditWindow,
    /// The broker whose dead letters an audit counts.
    pub broker: Broker,
    /// The Event Service's queue at that broker; an audit counts its dead letters.
    pub queue: String,
}

/// The same as the defaults of `booking-service audit`.
pub const AUDIT_WINDOW: AuditWindow = AuditWindow { settle: Duration::from_secs(10), late: Duration::from_secs(60) };

/// The intervals of the two tasks, and how many reservations one transaction ends.
#[derive(Debug, Clone, Copy)]
pub struct Schedule {
    /// The time between checks for due reservations.
    pub expiry: Duration,
    /// The most reservations that one transaction ends.
    pub expiry_batch_size: u32,
    /// The time between rounds of reconciliation.
    pub reconcile: Duration,
}

/// Starts the worker's loops.
///
/// # Errors
/// The scheduler can't be started.
pub async fn start(app: &App, schedule: Schedule, lifecycle: &Lifecycle) -> anyhow::Result<()> {
    let [mut expiry, mut reconcile] = ticks::start([schedule.expiry, schedule.reconcile]).await?;
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
        Ok(())
    });
    tracing::info!(
        expiry_ms = schedule.expiry.as_millis(),
        reconcile_ms = schedule.reconcile.as_millis(),
        "Worker started"
    );
    Ok(())
}

async fn bounded(app: &App, work: &'static str, stopping: &CancellationToken, doing: impl Future<Output = ()>) {
    if let Some(Err(_)) = stopping.run_until_cancelled(tokio::time::timeout(WORK_TIME_MAX, doing)).await {
        app.metrics.ran(work, false);
        tracing::error!(work, seconds = WORK_TIME_MAX.as_secs(), "The work timed out; the next tick continues it");
    }
}

/// Ends all due reservations, in batches. Full batches follow each other at once.
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

/// Runs one part of a round. If it fails or takes too long, the other parts still run.
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

/// Audits until `stopping` is cancelled. The findings are in the metrics and the log.
///
/// # Errors
/// None. The next audit makes up for one that failed.
pub async fn audit_again_and_again(app: &App, plan: &Audits, stopping: &CancellationToken) -> anyhow::Result<()> {
    while stopping.run_until_cancelled(tokio::time::sleep(plan.interval)).await.is_some() {
        let audit = audit::audit(app, &plan.broker, &plan.queue, plan.window);
        let Some(report) = stopping.run_until_cancelled(audit).await else {
            break;
        };
        match &report {
            Ok(report) if report.is_clean() => tracing::info!("Audit: all promises are kept"),
            Ok(report) => tracing::error!(report = %report, "Audit: a promise is broken; an operator must act"),
            Err(error) => tracing::warn!(error = format!("{error:#}"), "The audit could not check everything"),
        }
        app.metrics.audited(report.as_ref().ok().map(Report::violations));
        app.metrics.ran("audit", report.is_ok());
    }
    Ok(())
}
