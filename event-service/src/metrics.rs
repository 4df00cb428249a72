//! All metrics of this service, on one screen.

use std::time::SystemTime;

use chrono::{DateTime, Utc};
use service_kit::amqp::ConsumerMetrics;
use service_kit::http::error::{Error, Result};
use service_kit::observe::metrics::{GaugeVec, HistogramVec, IntCounterVec, Metrics};
use service_kit::postgres::database::BatchPool;
use shared_contracts::ids::SessionId;
use sqlx::PgPool;

/// Sessions whose seats the metrics show: those whose sale opened last.
const SESSIONS_SHOWN: i64 = 10;
/// Sessions considered for that: some of the last ones to open have closed again.
const CANDIDATE_SESSIONS: i64 = 200;
/// Counting stops at this number of overdue holds, so that a worker that is down for a day does not make counting
/// expensive too.
const OVERDUE_COUNTED_MAX: i64 = 10_000;

/// This service's metrics.
#[derive(Clone)]
pub struct EventMetrics {
    /// The metrics that every process has.
    pub common: Metrics,
    /// Metrics of the messages from the Booking Service.
    pub consumer: ConsumerMetrics,
    lag: HistogramVec,
    holds: IntCounterVec,
    seats: GaugeVec,
    overdue: GaugeVec,
}

impl EventMetrics {
    /// Registers all metrics; one set per process.
    ///
    /// # Errors
    /// Two metrics have the same name, which no environment can cause.
    pub fn new() -> anyhow::Result<Self> {
        let common = Metrics::new("event-service", env!("CARGO_PKG_VERSION"))?;
        let metrics = Self {
            consumer: ConsumerMetrics::register(&common, "event_consumer")?,
            lag: common.durations(
                "event_consumer_lag_seconds",
                "Time from a change in the Booking Service to its effect here, by the clocks of both machines; without expired reservations.",
                &[],
            )?,
            holds: common.counters("event_holds_total", "Calls to hold seats, by outcome.", &["outcome"])?,
            seats: common.gauges(
                "event_session_seats",
                "Seats by status, of the ten open sessions whose sale opened last.",
                &["session_id", "event", "status"],
            )?,
            overdue: common.gauges(
                "event_overdue_holds",
                "Seats held past their deadline that the worker has not settled yet; counting stops at 10,000.",
                &[],
            )?,
            common,
        };
        // Created at 0, because a counter that appears with its first event shows no increase.
        for result in ["applied", "duplicate", "stale", "retried", "dead_lettered"] {
            metrics.consumer.messages.with_label_values(&[result]);
        }
        for outcome in ["held", "refused", "failed"] {
            metrics.holds.with_label_values(&[outcome]);
        }
        Ok(metrics)
    }

    /// Registers the queries for the metrics that only the database knows.
    ///
    /// # Errors
    /// It was called before in this process.
    pub fn watch(&self, db: &PgPool, batch_db: &BatchPool) -> anyhow::Result<()> {
        self.common.watch_pools(db, batch_db)?;
        let (own_db, seats) = (db.clone(), self.seats.clone());
        self.common.ask("seats", &[&self.seats], move || {
            let (db, seats) = (own_db.clone(), seats.clone());
            async move {
                let counts = seats_on_sale(&db).await?;
                seats.reset();
                for SeatCount { session_id, title, status, count } in counts {
                    let session_id = session_id.to_string();
                    seats.with_label_values(&[&session_id, &title, &status]).set(count as f64);
                }
                Ok(())
            }
        });
        let (own_db, overdue) = (db.clone(), self.overdue.clone());
        self.common.ask("overdue_holds", &[&self.overdue], move || {
            let (db, overdue) = (own_db.clone(), overdue.clone());
            async move {
                let count = overdue_holds(&db).await?;
                overdue.with_label_values::<&str>(&[]).set(count as f64);
                Ok(())
            }
        });
        Ok(())
    }

    /// Counts the answer to a call to hold seats.
    pub(crate) fn count_hold<T>(&self, answer: &Result<T>) {
        let outcome = match answer {
            Ok(_) => "held",
            Err(Error::Refused(problem)) if problem.status < 500 => "refused",
            Err(_) => "failed",
        };
        self.holds.with_label_values(&[outcome]).inc();
    }

    /// Counts a message that has had its effect, now or before. `waited_since` is when the change happened, if seats
    /// waited for it.
    pub(crate) fn count_message(&self, result: &str, waited_since: Option<DateTime<Utc>>) {
        self.consumer.messages.with_label_values(&[result]).inc();
        if let Some(occurred_at) = waited_since.filter(|_| result == "applied") {
            let now = DateTime::<Utc>::from(SystemTime::now());
            let lag = (now - occurred_at).as_seconds_f64().max(0.0);
            self.lag.with_label_values::<&str>(&[]).observe(lag);
        }
    }
}

#[derive(Debug)]
struct SeatCount {
    session_id: SessionId,
    title: String,
    status: String,
    count: i64,
}

/// The seats by status of the sessions whose sale opened last and is still on, each with its event's title.
async fn seats_on_sale(db: &PgPool) -> sqlx::Result<Vec<SeatCount>> {
    sqlx::query_as!(
        SeatCount,
        r#"with latest as materialized (
               select session_id, event_id, coalesce(sales_start, created_at) as opened, session_sales_close(start_time, end_time, sales_end) as closes
               from sessions where status = 'scheduled' and coalesce(sales_start, created_at) <= now()
               order by coalesce(sales_start, created_at) desc limit $1
           ),
           shown as materialized (select session_id, event_id from latest where closes > now() order by opened desc limit $2)
           select shown.session_id, title, seats.status as "status: String", seats.count as "count!"
           from shown join events using (event_id)
           cross join lateral (
               select status, count(*) as count from session_seats where session_id = shown.session_id group by status
           ) seats"#,
        CANDIDATE_SESSIONS,
        SESSIONS_SHOWN,
    )
    .fetch_all(db)
    .await
}

async fn overdue_holds(db: &PgPool) -> sqlx::Result<i64> {
    sqlx::query_scalar!(
        r#"select count(*) as "count!" from (
               select from session_seats where status = 'reserved' and reserved_until < now() order by reserved_until limit $1
           ) overdue"#,
        OVERDUE_COUNTED_MAX,
    )
    .fetch_one(db)
    .await
}
