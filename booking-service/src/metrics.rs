//! What this service counts and measures: all of its metrics, on one screen.

use std::time::{Instant, SystemTime};

use service_kit::http::error::{Error, Result};
use service_kit::observe::metrics::{GaugeVec, HistogramVec, IntCounter, IntCounterVec, IntGauge, Metrics};
use service_kit::observe::traces;
use shared_contracts::booking_event::BookingEventType;
use sqlx::PgPool;

use crate::outbox::{self, Relayed};
use crate::payments::ChargeOutcome;
use crate::seat_locks::LockOutcome;

/// A step of a booking or of a payment: a span of its trace, and a histogram of its own.
#[derive(Debug, Clone, Copy)]
pub(crate) enum MeasuredStep {
    /// Price tiers and the clock.
    Tiers,
    /// The gate in Redis.
    Lock,
    /// Availability, prices and the hold, by the Event Service.
    Reserve,
    /// The reservation's row.
    Write,
    /// The lease before the provider is asked.
    Lease,
    /// The payment provider.
    Charge,
    /// Tickets, payment and event.
    Complete,
}

impl MeasuredStep {
    const fn name(self) -> &'static str {
        match self {
            Self::Tiers => "reservation.tiers",
            Self::Lock => "reservation.lock",
            Self::Reserve => "reservation.reserve",
            Self::Write => "reservation.write",
            Self::Lease => "payment.lease",
            Self::Charge => "payment.charge",
            Self::Complete => "payment.complete",
        }
    }
}

/// This service's metrics.
pub struct BookingMetrics {
    /// Those that every process has.
    pub common: Metrics,
    steps: HistogramVec,
    reservations: IntCounterVec,
    confirmations: IntCounterVec,
    charges: IntCounterVec,
    locks: IntCounterVec,
    published: IntCounter,
    not_taken: IntCounter,
    reconciled: IntCounterVec,
    background: Background,
}

/// What a process does beside its requests.
struct Background {
    runs: IntCounterVec,
    last_success: GaugeVec,
    circuit_open: IntGauge,
    outbox_pending: GaugeVec,
    outbox_age: GaugeVec,
    audit_violations: GaugeVec,
    audit_time: GaugeVec,
}

impl Background {
    fn new(common: &Metrics) -> anyhow::Result<Self> {
        Ok(Self {
            runs: common.counters("booking_worker_runs_total", "Rounds of the worker's tasks.", &["task", "outcome"])?,
            last_success: common.gauges(
                "booking_worker_last_success_timestamp_seconds",
                "When each of the worker's tasks last went through.",
                &["task"],
            )?,
            circuit_open: common.gauge(
                "booking_event_service_circuit_open",
                "1 while the Event Service has failed so often that it is left alone.",
            )?,
            outbox_pending: common.gauges(
                "booking_outbox_pending",
                "Events that wait for the broker; counted to 10,000.",
                &[],
            )?,
            outbox_age: common.gauges(
                "booking_outbox_oldest_age_seconds",
                "How long the oldest of those events has waited, those of expired reservations aside; 0 when none does.",
                &[],
            )?,
            audit_violations: common.gauges(
                "booking_audit_violations",
                "What the worker's last audit found, by promise; absent where AUDIT_INTERVAL_MINUTES is not set.",
                &["promise"],
            )?,
            audit_time: common.gauges(
                "booking_audit_last_run_timestamp_seconds",
                "When the worker's last audit ended.",
                &[],
            )?,
        })
    }
}

impl BookingMetrics {
    /// Those of a process of this name.
    ///
    /// # Errors
    /// None that depends on the environment.
    pub fn new(service: &str) -> anyhow::Result<Self> {
        let common = Metrics::new(service, env!("CARGO_PKG_VERSION"))?;
        let counters = |name, help, labels| common.counters(name, help, labels);
        let metrics = Self {
            steps: common.durations(
                "booking_step_duration_seconds",
                "How long the steps of bookings and payments take, refused ones included.",
                &["step"],
            )?,
            reservations: counters(
                "booking_reservations_total",
                "What became of reservations: created, refused or failed with the problem's code; later confirmed, expired, cancelled; and refunds of tickets.",
                &["outcome", "reason"],
            )?,
            confirmations: counters(
                "booking_confirmations_total",
                "What requests to confirm were answered: paid, processing, refused or failed with the problem's code.",
                &["outcome", "reason"],
            )?,
            charges: counters("booking_charges_total", "What the payment provider said to charges.", &["outcome"])?,
            locks: counters(
                "booking_seat_locks_total",
                "Attempts to lock the seats of a booking; bypassed: Redis was away, and the booking went on without.",
                &["outcome"],
            )?,
            published: common.counter("booking_outbox_published_total", "Events that the broker has confirmed.")?,
            not_taken: common.counter(
                "booking_outbox_not_taken_total",
                "Events that the broker refused or had no queue for; they stay in the outbox and are tried again.",
            )?,
            reconciled: counters(
                "booking_reconciled_seats_total",
                "Seats that reconciliation put right after a crash or a lost message.",
                &["change"],
            )?,
            background: Background::new(&common)?,
            common,
        };
        metrics.begin_at_zero();
        Ok(metrics)
    }

    /// A counter that appears with its first event shows no increase then: the first bypass or the first violation would go unseen.
    fn begin_at_zero(&self) {
        for outcome in ["acquired", "busy", "bypassed"] {
            self.locks.with_label_values(&[outcome]);
        }
        for outcome in ["captured", "declined", "processing", "unknown"] {
            self.charges.with_label_values(&[outcome]);
        }
        for outcome in ["created", "confirmed", "expired", "cancelled", "ticket_refunded"] {
            self.reservations.with_label_values(&[outcome, ""]);
        }
        for (outcome, reason) in [("refused", "seat_unavailable"), ("failed", "internal_error")] {
            self.reservations.with_label_values(&[outcome, reason]);
            self.confirmations.with_label_values(&[outcome, reason]);
        }
        self.confirmations.with_label_values(&["paid", ""]);
        for change in ["released", "confirmed"] {
            self.reconciled.with_label_values(&[change]);
        }
    }

    /// Sets whether the circuit to the Event Service is open.
    pub(crate) fn circuit_is_open(&self, is_open: bool) {
        self.background.circuit_open.set(is_open.into());
    }

    /// Has the outbox counted by `db` whenever metrics are collected.
    pub(crate) fn watch_outbox(&self, db: &PgPool) {
        let (db, pending, age) =
            (db.clone(), self.background.outbox_pending.clone(), self.background.outbox_age.clone());
        self.common.ask("outbox", &[&self.background.outbox_pending, &self.background.outbox_age], move || {
            let (db, pending, age) = (db.clone(), pending.clone(), age.clone());
            async move {
                let backlog = outbox::backlog(&db).await?;
                pending.with_label_values::<&str>(&[]).set(backlog.pending as f64);
                age.with_label_values::<&str>(&[]).set(backlog.oldest_age_seconds);
                Ok(())
            }
        });
    }

    /// Does a step: measured, and a span of the request's trace.
    ///
    /// # Errors
    /// Those of `work`.
    pub(crate) async fn step<T>(&self, step: MeasuredStep, work: impl Future<Output = Result<T>>) -> Result<T> {
        let begun = Instant::now();
        let outcome = traces::step(step.name(), work).await;
        self.steps.with_label_values(&[step.name()]).observe(begun.elapsed().as_secs_f64());
        outcome
    }

    pub(crate) fn booked<T>(&self, booked: &Result<T>) {
        let (outcome, reason) = booked.as_ref().map_or_else(refusal, |_| ("created", ""));
        self.reservations.with_label_values(&[outcome, reason]).inc();
    }

    /// What happened to a reservation after that, by the event that was committed with it.
    pub(crate) fn ended(&self, event: BookingEventType) {
        let outcome = match event {
            BookingEventType::Confirmed => "confirmed",
            BookingEventType::Expired => "expired",
            BookingEventType::Cancelled => "cancelled",
            BookingEventType::TicketRefunded => "ticket_refunded",
        };
        self.reservations.with_label_values(&[outcome, ""]).inc();
    }

    /// `processing` is looked at where there is an answer.
    pub(crate) fn confirmed<T>(&self, answer: &Result<T>, processing: impl Fn(&T) -> bool) {
        let taken = |answer: &T| (if processing(answer) { "processing" } else { "paid" }, "");
        let (outcome, reason) = answer.as_ref().map_or_else(refusal, taken);
        self.confirmations.with_label_values(&[outcome, reason]).inc();
    }

    pub(crate) fn charged(&self, outcome: ChargeOutcome) {
        let outcome = match outcome {
            ChargeOutcome::Captured => "captured",
            ChargeOutcome::Declined => "declined",
            ChargeOutcome::Processing => "processing",
            ChargeOutcome::Unknown => "unknown",
        };
        self.charges.with_label_values(&[outcome]).inc();
    }

    pub(crate) fn locked(&self, outcome: &LockOutcome) {
        let outcome = match outcome {
            LockOutcome::Acquired => "acquired",
            LockOutcome::Busy(_) => "busy",
            LockOutcome::Bypassed => "bypassed",
        };
        self.locks.with_label_values(&[outcome]).inc();
    }

    pub(crate) fn relayed(&self, relayed: Relayed) {
        self.published.inc_by(relayed.published as u64);
        self.not_taken.inc_by(relayed.left as u64);
    }

    /// Seats that one round of reconciliation has freed and sold.
    pub(crate) fn healed(&self, released: usize, confirmed: usize) {
        self.reconciled.with_label_values(&["released"]).inc_by(released as u64);
        self.reconciled.with_label_values(&["confirmed"]).inc_by(confirmed as u64);
    }

    /// A round of one of the worker's tasks.
    pub(crate) fn ran(&self, task: &str, succeeded: bool) {
        // Both are there from the first round on: a series that begins with its first failure shows no rise.
        let [done, failed] = ["done", "failed"].map(|outcome| self.background.runs.with_label_values(&[task, outcome]));
        if succeeded {
            done.inc()
        } else {
            failed.inc()
        }
        if succeeded {
            self.background.last_success.with_label_values(&[task]).set(now());
        }
    }

    /// The violations of each promise that an audit has found; `None` when the audit failed.
    pub(crate) fn audited(&self, violations: Option<impl Iterator<Item = (&'static str, usize)>>) {
        let Some(violations) = violations else {
            return self.background.audit_violations.reset();
        };
        for (promise, violations) in violations {
            self.background.audit_violations.with_label_values(&[promise]).set(violations as f64);
        }
        self.background.audit_time.with_label_values::<&str>(&[]).set(now());
    }
}

fn refusal(error: &Error) -> (&'static str, &'static str) {
    let code = error.code();
    (if code.status() < 500 { "refused" } else { "failed" }, code.as_str())
}

/// Since 1970, by the clock that whoever reads it goes by, too.
fn now() -> f64 {
    SystemTime::UNIX_EPOCH.elapsed().map_or(0.0, |since| since.as_secs_f64())
}
