//! All metrics of this service, on one screen.

use std::time::{Instant, SystemTime};

use service_kit::http::error::{Error, Result};
use service_kit::observe::metrics::{GaugeVec, HistogramVec, IntCounter, IntCounterVec, IntGauge, Metrics};
use service_kit::observe::traces;
use shared_contracts::booking_event::BookingEventType;
use sqlx::PgPool;

use crate::outbox::{self, Relayed};
use crate::payments::provider::ChargeOutcome;
use crate::seat_locks::LockOutcome;

/// A step of a booking or a payment: a span of its trace, and a `step` label of `booking_step_duration_seconds`.
#[derive(Debug, Clone, Copy)]
pub(crate) enum MeasuredStep {
    /// Read the price tiers and the database's clock.
    Tiers,
    /// Lock the seats in Redis.
    Lock,
    /// Check availability, read prices and hold the seats, by the Event Service.
    Reserve,
    /// Insert the reservation's row.
    Write,
    /// Take the lease, before the charge.
    Lease,
    /// Charge at the payment provider.
    Charge,
    /// Write tickets, payment and event.
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

/// The metrics of the Booking Service and of its worker.
pub struct BookingMetrics {
    /// The metrics that every process has.
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

/// The metrics of what a process does beside its requests.
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
            runs: common.counters("booking_worker_runs_total", "Runs of the worker's tasks.", &["task", "outcome"])?,
            last_success: common.gauges(
                "booking_worker_last_success_timestamp_seconds",
                "When each of the worker's tasks last succeeded.",
                &["task"],
            )?,
            circuit_open: common.gauge(
                "booking_event_service_circuit_open",
                "1 while calls to the Event Service fail at once because it failed too often.",
            )?,
            outbox_pending: common.gauges(
                "booking_outbox_pending",
                "Events that wait for the broker; counting stops at 10,000.",
                &[],
            )?,
            outbox_age: common.gauges(
                "booking_outbox_oldest_age_seconds",
                "How long the oldest of those events has waited, without those of expired reservations; 0 when none waits.",
                &[],
            )?,
            audit_violations: common.gauges(
                "booking_audit_violations",
                "Violations found by the worker's last audit, by promise; absent unless AUDIT_INTERVAL_MINUTES is set.",
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
    /// Registers all metrics of the process called `service`.
    ///
    /// # Errors
    /// Two metrics have the same name, which no environment can cause.
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
                "Reservations by outcome: created, refused or failed with the problem's code; later confirmed, expired or cancelled; and refunds of tickets.",
                &["outcome", "reason"],
            )?,
            confirmations: counters(
                "booking_confirmations_total",
                "Answers to confirm requests: paid, processing, refused or failed with the problem's code.",
                &["outcome", "reason"],
            )?,
            charges: counters("booking_charges_total", "Charges by the payment provider's answer.", &["outcome"])?,
            locks: counters(
                "booking_seat_locks_total",
                "Attempts to lock the seats of a booking; bypassed: Redis was away, and the booking went on without locks.",
                &["outcome"],
            )?,
            published: common.counter("booking_outbox_published_total", "Events that the broker has confirmed.")?,
            not_taken: common.counter(
                "booking_outbox_not_taken_total",
                "Events that the broker refused or had no queue for; they stay in the outbox and are tried again.",
            )?,
            reconciled: counters(
                "booking_reconciled_seats_total",
                "Seats that reconciliation corrected after a crash or a lost message.",
                &["change"],
            )?,
            background: Background::new(&common)?,
            common,
        };
        metrics.begin_at_zero();
        Ok(metrics)
    }

    /// Creates counters at 0. A counter that appears with its first event shows no increase, so the first bypass or
    /// refusal would go unseen.
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

    /// Counts the outbox by `db` whenever metrics are collected.
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

    /// Runs `work` as a step, which it measures and shows as a span of the request's trace.
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

    /// Counts what happened to a reservation later, by the event that was committed with it.
    pub(crate) fn count_settled(&self, event: BookingEventType) {
        let outcome = match event {
            BookingEventType::Confirmed => "confirmed",
            BookingEventType::Expired => "expired",
            BookingEventType::Cancelled => "cancelled",
            BookingEventType::TicketRefunded => "ticket_refunded",
        };
        self.reservations.with_label_values(&[outcome, ""]).inc();
    }

    /// Counts an answer to a confirm request. `processing` tells whether a success is still undecided.
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

    /// Counts the seats that one round of reconciliation has freed and sold.
    pub(crate) fn healed(&self, released: usize, confirmed: usize) {
        self.reconciled.with_label_values(&["released"]).inc_by(released as u64);
        self.reconciled.with_label_values(&["confirmed"]).inc_by(confirmed as u64);
    }

    /// Counts a run of one of the worker's tasks.
    pub(crate) fn ran(&self, task: &str, succeeded: bool) {
        // Both exist from the first run on: a series that begins with its first failure shows no increase.
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

    /// Sets the violations of each promise that an audit has found. `None`: the audit failed, and the gauges are
    /// removed.
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

/// The seconds since 1970, by the system clock.
fn now() -> f64 {
    SystemTime::UNIX_EPOCH.elapsed().map_or(0.0, |since| since.as_secs_f64())
}
