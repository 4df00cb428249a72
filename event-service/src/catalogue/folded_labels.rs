//! The keys by which seats of a hall look the same, for seats from before there were keys.

use std::collections::HashSet;
use std::time::Duration;

use service_kit::http::error::{Error, Result};
use service_kit::postgres::database::{self, broken_constraint};
use shared_contracts::ids::{HallId, SeatId};
use shared_contracts::text;
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Rows that one transaction fills: some milliseconds of locks.
const BATCH: i64 = 2_000;
/// An older version of this service that still runs adds seats without a key. They are found after this time.
const PAUSE: Duration = Duration::from_secs(60);

/// A seat without a key.
#[derive(sqlx::FromRow)]
struct Unfolded {
    seat_id: SeatId,
    hall_id: HallId,
    section: Option<String>,
    row_number: String,
    seat_number: String,
}

/// Fills the missing keys in batches, until `stopping`. A seat that looks like an earlier one of its hall stays without
/// a key, and is logged.
///
/// A database that fails is asked again after the pause.
pub(crate) async fn fill(db: PgPool, stopping: CancellationToken) -> anyhow::Result<()> {
    let mut known_doubles = 0;
    loop {
        match fill_once(&db).await {
            Ok(doubles) if doubles != known_doubles => {
                tracing::warn!(
                    doubles,
                    "Some seats look like another one of their hall: those without folded_label in the table seats"
                );
                known_doubles = doubles;
            }
            Ok(_) => {}
            Err(error) => tracing::info!(%error, "The keys of seat labels are filled later"),
        }
        tokio::select! {
            () = stopping.cancelled() => return Ok(()),
            () = tokio::time::sleep(PAUSE) => {}
        }
    }
}

/// Walks all seats without a key once. Returns how many stay without one.
async fn fill_once(db: &PgPool) -> Result<usize> {
    let mut after = Uuid::nil();
    let mut doubles = 0;
    loop {
        match fill_batch(db, after).await {
            Ok(None) => return Ok(doubles),
            Ok(Some((last, left))) => {
                after = last;
                doubles += left;
            }
            // Somebody made a seat of the same key meanwhile. The next try sees it.
            Err(Error::Database(error)) if broken_constraint(&error) == Some("seats_looks_once") => {}
            Err(error) => return Err(error),
        }
    }
}

/// Fills the keys of the seats after `after`. Of seats with the same key, the first gets it. Returns the last seat, and
/// how many stay without a key; `None` after the last batch.
async fn fill_batch(db: &PgPool, after: Uuid) -> Result<Option<(Uuid, usize)>> {
    let mut tx = database::begin(db).await?;
    let seats: Vec<Unfolded> = sqlx::query_as(
        "select seat_id, hall_id, section, row_number, seat_number from seats
         where folded_label is null and seat_id > $1 order by seat_id limit $2 for no key update",
    )
    .bind(after)
    .bind(BATCH)
    .fetch_all(&mut *tx)
    .await?;
    let Some(last) = seats.last().map(|seat| seat.seat_id.as_uuid()) else { return Ok(None) };
    let mut taken = HashSet::new();
    let keyed: Vec<(SeatId, HallId, String)> = seats
        .iter()
        .map(|seat| {
            let key = text::folded_label(seat.section.as_deref(), &seat.row_number, &seat.seat_number);
            (seat.seat_id, seat.hall_id, key)
        })
        .filter(|(_, hall_id, key)| taken.insert((*hall_id, key.clone())))
        .collect();
    let filled = sqlx::query(
        "update seats set folded_label = new.folded_label
         from unnest($1::uuid[], $2::uuid[], $3::text[]) as new (seat_id, hall_id, folded_label)
         where seats.seat_id = new.seat_id
           and not exists (select from seats other where other.hall_id = new.hall_id and other.folded_label = new.folded_label)",
    )
    .bind(keyed.iter().map(|(seat_id, _, _)| *seat_id).collect::<Vec<_>>())
    .bind(keyed.iter().map(|(_, hall_id, _)| *hall_id).collect::<Vec<_>>())
    .bind(keyed.iter().map(|(_, _, key)| key.as_str()).collect::<Vec<_>>())
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(Some((last, seats.len() - filled.rows_affected() as usize)))
}
