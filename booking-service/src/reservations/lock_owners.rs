//! What became of those whose seat locks buyers run into. In a stampede nearly everybody asks, so those who ask at the same time are
//! answered by one statement.

use std::collections::HashSet;
use std::time::Duration;

use service_kit::coalesce::{Coalescer, Lanes};
use service_kit::database::DeskPool;
use service_kit::error::{Error, Result};
use service_kit::lifecycle::Lifecycle;
use shared_contracts::ids::ReservationId;

const LANES: Lanes = Lanes::usual(Duration::from_secs(5));

/// Where it is asked; one a process.
#[derive(Debug)]
pub(crate) struct LockOwners {
    asked: Coalescer<Vec<ReservationId>, bool>,
}

impl LockOwners {
    /// Opens it. It closes when nobody can ask any more.
    pub(crate) fn open(db: DeskPool, lifecycle: &Lifecycle) -> Self {
        Self { asked: Coalescer::start(lifecycle, LANES, move |asked| look_for_all(db.clone(), asked)) }
    }

    /// Whether the reservations of all these owners have ended, so that their locks have outlived them. A booking that has not written
    /// its reservation yet has not.
    ///
    /// # Errors
    /// The database failed.
    pub(super) async fn have_all_ended(&self, owners: Vec<ReservationId>) -> Result<bool> {
        self.asked.call(owners).await
    }
}

async fn look_for_all(db: DeskPool, asked: Vec<Vec<ReservationId>>) -> Vec<Result<bool>> {
    let owners: HashSet<ReservationId> = asked.iter().flatten().copied().collect();
    match look(&db, owners.into_iter().collect()).await {
        Ok(ended) => asked.iter().map(|owners| Ok(owners.iter().all(|owner| ended.contains(owner)))).collect(),
        Err(error) => {
            let error = Error::from(error);
            asked.iter().map(|_| Err(error.for_another())).collect()
        }
    }
}

/// Those that have ended.
async fn look(db: &DeskPool, owners: Vec<ReservationId>) -> sqlx::Result<HashSet<ReservationId>> {
    let mut connection = db.take().await?;
    let ended: Vec<ReservationId> = sqlx::query_scalar(
        "select id from reservations
         where id = any($1) and status || '' <> 'confirming' and (status || '' <> 'active' or expiry_time <= now())",
    )
    .bind(owners)
    .fetch_all(&mut *connection)
    .await?;
    db.keep(connection);
    Ok(ended.into_iter().collect())
}
