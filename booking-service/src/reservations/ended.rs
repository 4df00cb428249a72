//! Finds out which owners of seat locks have ended. When a sale opens, nearly every buyer asks, so simultaneous queries
//! share one statement.

use std::collections::HashSet;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use service_kit::http::error::Result;
use service_kit::postgres::batch::{BatchConfig, Batcher, split_result};
use service_kit::postgres::database::BatchPool;
use service_kit::process::lifecycle::Lifecycle;
use shared_contracts::ids::ReservationId;

use super::model::BOOKING_TIME_MAX;

const BATCHES: BatchConfig = BatchConfig::with_timeout(Duration::from_secs(5));

/// Batches the queries for ended reservations; one per process.
#[derive(Debug)]
pub(crate) struct EndedReservations {
    asked: Batcher<Vec<ReservationId>, HashSet<ReservationId>>,
}

impl EndedReservations {
    /// Starts the batch worker. It ends when the last `EndedReservations` is dropped.
    pub(crate) fn open(db: BatchPool, lifecycle: &Lifecycle) -> Self {
        Self { asked: Batcher::start(lifecycle, BATCHES, move |asked| look_for_all(db.clone(), asked)) }
    }

    /// Those of these owners whose reservations have ended, so that their locks have outlived them. A booking without a
    /// reservation has not ended, unless it is so old that it can't write one any more.
    ///
    /// # Errors
    /// The database failed.
    pub(crate) async fn ended(&self, owners: Vec<ReservationId>) -> Result<HashSet<ReservationId>> {
        self.asked.call(owners).await
    }
}

async fn look_for_all(db: BatchPool, asked: Vec<Vec<ReservationId>>) -> Vec<Result<HashSet<ReservationId>>> {
    let owners: HashSet<ReservationId> = asked.iter().flatten().copied().collect();
    let ended = find_ended(&db, owners.into_iter().collect()).await;
    split_result(&asked, ended, |ended, owners| owners.iter().filter(|owner| ended.contains(owner)).copied().collect())
}

/// Reads which of these owners have ended.
async fn find_ended(db: &BatchPool, owners: Vec<ReservationId>) -> Result<HashSet<ReservationId>> {
    let mut connection = db.acquire().await?;
    // The time in an id comes from a clock of this service, which may differ from the database's. If that clock is
    // wrong, a lock is removed too early or too late. The Event Service still decides who gets the seat.
    let made_at: Vec<Option<DateTime<Utc>>> = owners.iter().map(made_at).collect();
    let ended: Vec<ReservationId> = sqlx::query_scalar!(
        r#"select owner.id as "id!: _" from unnest($1::uuid[], $2::timestamptz[]) as owner (id, made_at) left join reservations r using (id)
         where case when r.id is null then made_at < now() - $3::interval
                    else status <> 'confirming' and (status <> 'active' or expiry_time <= now()) end"#,
        owners as _,
        made_at as _,
        TimeDelta::from_std(2 * BOOKING_TIME_MAX).unwrap_or(TimeDelta::MAX) as _,
    )
    .fetch_all(&mut *connection)
    .await?;
    db.release(connection);
    Ok(ended.into_iter().collect())
}

/// The time in the id; `None` for an id that has none, which this service does not make.
fn made_at(owner: &ReservationId) -> Option<DateTime<Utc>> {
    let (seconds, nanos) = owner.as_uuid().get_timestamp()?.to_unix();
    DateTime::from_timestamp(i64::try_from(seconds).ok()?, nanos)
}
