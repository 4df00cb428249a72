//! Which owners of seat locks have ended. In a stampede nearly every buyer asks, so questions of the same moment share
//! one statement.

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

/// Where it is asked; one a process.
#[derive(Debug)]
pub(crate) struct EndedReservations {
    asked: Batcher<Vec<ReservationId>, HashSet<ReservationId>>,
}

impl EndedReservations {
    /// Opens it. It closes when nobody can ask any more.
    pub(crate) fn open(db: BatchPool, lifecycle: &Lifecycle) -> Self {
        Self { asked: Batcher::start(lifecycle, BATCHES, move |asked| look_for_all(db.clone(), asked)) }
    }

    /// Those of these owners whose reservations have ended, so that their locks have outlived them. A booking that has not written
    /// its reservation yet has not, unless it is so old that it never will.
    ///
    /// # Errors
    /// The database failed.
    pub(crate) async fn ended(&self, owners: Vec<ReservationId>) -> Result<HashSet<ReservationId>> {
        self.asked.call(owners).await
    }
}

async fn look_for_all(db: BatchPool, asked: Vec<Vec<ReservationId>>) -> Vec<Result<HashSet<ReservationId>>> {
    let owners: HashSet<ReservationId> = asked.iter().flatten().copied().collect();
    let ended = look(&db, owners.into_iter().collect()).await;
    split_result(&asked, ended, |ended, owners| owners.iter().filter(|owner| ended.contains(owner)).copied().collect())
}

/// Those that have ended.
async fn look(db: &BatchPool, owners: Vec<ReservationId>) -> Result<HashSet<ReservationId>> {
    let mut connection = db.acquire().await?;
    // When each was made, by its id: a clock of ours, which need not be the database's. Should it be wrong, a lock is taken down too
    // early or too late; who gets the seat is decided elsewhere.
    let made_at: Vec<Option<DateTime<Utc>>> = owners.iter().map(made_at).collect();
    let ended: Vec<ReservationId> = sqlx::query_scalar(
        "select owner.id from unnest($1::uuid[], $2::timestamptz[]) as owner (id, made_at) left join reservations r using (id)
         where case when r.id is null then made_at < now() - $3
                    else status <> 'confirming' and (status <> 'active' or expiry_time <= now()) end",
    )
    .bind(owners)
    .bind(made_at)
    .bind(TimeDelta::from_std(2 * BOOKING_TIME_MAX).unwrap_or(TimeDelta::MAX))
    .fetch_all(&mut *connection)
    .await?;
    db.release(connection);
    Ok(ended.into_iter().collect())
}

/// None for an id that another made, of another kind.
fn made_at(owner: &ReservationId) -> Option<DateTime<Utc>> {
    let (seconds, nanos) = owner.as_uuid().get_timestamp()?.to_unix();
    DateTime::from_timestamp(i64::try_from(seconds).ok()?, nanos)
}
