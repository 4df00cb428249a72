//! Tickets: made when a reservation is confirmed, ended by a refund. Only this file writes `tickets`.
//!
//! Requests for tickets that come at the same time share one statement ([`TicketLoader`]).

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use service_kit::http::error::{Error, Result};
use service_kit::postgres::batch::{BatchConfig, Batcher, split_result};
use service_kit::postgres::database::BatchPool;
use service_kit::process::lifecycle::Lifecycle;
use shared_contracts::ids::{ReservationId, ReservationItemId, SessionId, SessionSeatId, TicketId, UserId};
use shared_contracts::label::Label;
use shared_contracts::money::Money;
use shared_contracts::problem::Code;
use shared_contracts::seat_api::Hold;
use sqlx::{FromRow, PgConnection, PgPool};
use utoipa::ToSchema;
use uuid::Uuid;

use super::model::{Reservation, ReservationItem};

/// The most tickets in a customer's list, newest first. The list is a bare array; the others follow in pages.
pub(crate) const LIST_MAX: usize = 1000;

/// A ticket: the right to sit on one session seat.
#[derive(Debug, Clone, Serialize, Deserialize, FromRow, ToSchema)]
pub struct Ticket {
    /// Identifies the ticket. The content of its QR code is `TICKET:` and this id.
    pub id: TicketId,
    /// The reservation that it came from.
    pub reservation_id: ReservationId,
    /// The customer that paid for the ticket.
    pub user_id: UserId,
    /// The session that the ticket admits to.
    pub session_id: SessionId,
    /// The seat of the session that the ticket is for.
    pub session_seat_id: SessionSeatId,
    /// The seat's section; null if it has none.
    #[serde(default)]
    #[schema(max_length = 64)]
    pub section: Option<String>,
    /// The seat's row.
    pub row_number: Label,
    /// The seat's number.
    pub seat_number: Label,
    /// The price paid for the seat.
    pub price: Money,
    /// Whether the ticket admits its owner.
    pub status: TicketStatus,
    /// The QR code as a `data:image/png;base64,` URL. The answers to confirm and refund omit it, because drawing it
    /// would delay them.
    #[sqlx(skip)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qr_code: Option<String>,
    /// Whether the ticket has admitted its owner already.
    pub is_used: bool,
    /// When the ticket was issued.
    pub created_at: DateTime<Utc>,
}

/// Whether a ticket admits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, sqlx::Type, ToSchema)]
#[serde(rename_all = "snake_case")]
#[sqlx(type_name = "text", rename_all = "snake_case")]
pub enum TicketStatus {
    /// The ticket admits its owner.
    Active,
    /// The ticket has admitted its owner already.
    Used,
    /// The ticket was refunded.
    Refunded,
}

/// The columns of [`Ticket`], for `query_as`.
macro_rules! columns {
    () => {
        "id, reservation_id, user_id, session_id, session_seat_id, section, row_number, seat_number, price, status, status = 'used' as is_used, created_at"
    };
}

/// Loads tickets by their ids or by their owners; one per process. One statement reads all tickets that are requested
/// at the same time.
#[derive(Debug)]
pub(crate) struct TicketLoader {
    by_id: Batcher<TicketId, Option<Ticket>>,
    by_owner: Batcher<UserId, Vec<Ticket>>,
}

const BATCHES: BatchConfig = BatchConfig::with_timeout(Duration::from_secs(5));
/// 16 lists: as many as PostgreSQL can sort in memory, however long they are.
const OWNER_BATCHES: BatchConfig = BatchConfig { batch_max: 16, ..BATCHES.with_linger() };

impl TicketLoader {
    /// Starts the batch workers. They end when the last `TicketLoader` is dropped.
    pub(crate) fn open(db: BatchPool, lifecycle: &Lifecycle) -> Self {
        let own = db.clone();
        Self {
            by_id: Batcher::start(lifecycle, BATCHES, move |ids| look_for_all(own.clone(), ids)),
            by_owner: Batcher::start(lifecycle, OWNER_BATCHES, move |owners| look_for_owners(db.clone(), owners)),
        }
    }

    /// Reads the ticket if it is this owner's, or anyone's if `owner` is `None`.
    ///
    /// # Errors
    /// There is none, or the database failed.
    pub(crate) async fn find(&self, id: TicketId, owner: Option<UserId>) -> Result<Ticket> {
        let found = self.by_id.call(id).await?;
        found.filter(|ticket| owner.is_none_or(|owner| ticket.user_id == owner)).ok_or_else(|| not_found(id))
    }

    /// The latest [`LIST_MAX`] of this owner's, newest first, and one more if there is one.
    ///
    /// # Errors
    /// The database failed.
    pub(crate) async fn of_owner(&self, owner: UserId) -> Result<Vec<Ticket>> {
        self.by_owner.call(owner).await
    }
}

async fn look_for_all(db: BatchPool, asked: Vec<TicketId>) -> Vec<Result<Option<Ticket>>> {
    let looked = async {
        let mut connection = db.acquire().await?;
        let sql = concat!("select ", columns!(), " from tickets where id = any($1)");
        let found: Vec<Ticket> = sqlx::query_as(sql).bind(&asked).fetch_all(&mut *connection).await?;
        db.release(connection);
        Ok(found)
    };
    split_result(&asked, looked.await, |found, id| found.iter().find(|ticket| ticket.id == *id).cloned())
}

async fn look_for_owners(db: BatchPool, owners: Vec<UserId>) -> Vec<Result<Vec<Ticket>>> {
    let looked = async {
        let mut connection = db.acquire().await?;
        let sql = concat!(
            "select found.* from (select distinct owner from unnest($1::uuid[]) as asked (owner)) asked
             cross join lateral (select ",
            columns!(),
            " from tickets where user_id = owner order by id desc limit $2) found order by id desc"
        );
        let found: Vec<Ticket> =
            sqlx::query_as(sql).bind(&owners).bind(LIST_MAX as i64 + 1).fetch_all(&mut *connection).await?;
        db.release(connection);
        let mut of_owner: HashMap<UserId, Vec<Ticket>> = HashMap::new();
        for ticket in found {
            of_owner.entry(ticket.user_id).or_default().push(ticket);
        }
        Ok(of_owner)
    };
    split_result(&owners, looked.await, |found, owner| found.get(owner).cloned().unwrap_or_default())
}

/// Up to `limit` of this owner's tickets with ids below `before`, newest first.
///
/// # Errors
/// The database failed.
pub(crate) async fn list(db: &PgPool, owner: UserId, before: Uuid, limit: i64) -> Result<Vec<Ticket>> {
    let sql = concat!("select ", columns!(), " from tickets where user_id = $1 and id < $2 order by id desc limit $3");
    Ok(sqlx::query_as(sql).bind(owner).bind(before).bind(limit).fetch_all(db).await?)
}

/// Issues one ticket for each item of the reservations, in the transaction that confirms them and began at `now`.
pub(crate) async fn issue(
    tx: &mut PgConnection,
    reservations: &[&Reservation],
    now: DateTime<Utc>,
) -> std::result::Result<Vec<Ticket>, sqlx::Error> {
    let of_item = |(reservation, item): (&&Reservation, &ReservationItem)| {
        (
            item.id,
            Ticket {
                id: TicketId::new(),
                reservation_id: reservation.id,
                user_id: reservation.user_id,
                session_id: reservation.session_id,
                session_seat_id: item.session_seat_id,
                section: item.section.clone(),
                row_number: item.row_number.clone(),
                seat_number: item.seat_number.clone(),
                price: item.final_price,
                status: TicketStatus::Active,
                qr_code: None,
                is_used: false,
                created_at: now,
            },
        )
    };
    let items =
        reservations.iter().flat_map(|reservation| reservation.items.iter().map(move |item| (reservation, item)));
    let (items, tickets): (Vec<ReservationItemId>, Vec<Ticket>) = items.map(of_item).unzip();
    sqlx::query!(
        "insert into tickets (id, reservation_item_id, reservation_id, user_id, session_id, session_seat_id, row_number, seat_number, price, section, created_at, updated_at)
         select *, $10, $10 from unnest($1::uuid[], $2::uuid[], $3::uuid[], $4::uuid[], $5::uuid[], $6::uuid[], $7::text[], $8::text[], $9::numeric[], $11::text[])",
        tickets.iter().map(|ticket| ticket.id).collect::<Vec<_>>() as _,
        items as _,
        tickets.iter().map(|ticket| ticket.reservation_id).collect::<Vec<_>>() as _,
        tickets.iter().map(|ticket| ticket.user_id).collect::<Vec<_>>() as _,
        tickets.iter().map(|ticket| ticket.session_id).collect::<Vec<_>>() as _,
        tickets.iter().map(|ticket| ticket.session_seat_id).collect::<Vec<_>>() as _,
        tickets.iter().map(|ticket| ticket.row_number.as_str()).collect::<Vec<_>>() as _,
        tickets.iter().map(|ticket| ticket.seat_number.as_str()).collect::<Vec<_>>() as _,
        tickets.iter().map(|ticket| ticket.price).collect::<Vec<_>>() as _,
        now,
        tickets.iter().map(|ticket| ticket.section.as_deref()).collect::<Vec<_>>() as _,
    )
    .execute(tx)
    .await?;
    Ok(tickets)
}

/// `active → refunded` if the ticket is this owner's, or anyone's if `owner` is `None`. Returns `None` if nothing was
/// changed.
///
/// The first statement locks the reservation's row, so that refunds of its tickets wait for each other. The last refund
/// then sees that no other ticket is left.
pub(crate) async fn refund(tx: &mut PgConnection, id: TicketId, owner: Option<UserId>) -> Result<Option<Ticket>> {
    sqlx::query!(
        "select from reservations
         where id = (select reservation_id from tickets where id = $1 and ($2::uuid is null or user_id = $2)) for no key update",
        id as _,
        owner as _,
    )
    .execute(&mut *tx)
    .await?;
    let sql = concat!(
        "update tickets set status = 'refunded', updated_at = now()
         where id = $1 and ($2::uuid is null or user_id = $2) and status = 'active' returning ",
        columns!()
    );
    Ok(sqlx::query_as(sql).bind(id).bind(owner).fetch_optional(tx).await?)
}

/// `active → refunded` for all tickets of these reservations, whose rows the caller has locked.
pub(crate) async fn refund_all(tx: &mut PgConnection, reservations: &[ReservationId]) -> Result<Vec<Ticket>> {
    let sql = concat!(
        "update tickets set status = 'refunded', updated_at = now() where reservation_id = any($1) and status = 'active' returning ",
        columns!()
    );
    Ok(sqlx::query_as(sql).bind(reservations).fetch_all(tx).await?)
}

/// Reads the ticket if it is this owner's, or anyone's if `owner` is `None`.
pub(crate) async fn find(db: &PgPool, id: TicketId, owner: Option<UserId>) -> Result<Ticket> {
    let sql = concat!("select ", columns!(), " from tickets where id = $1 and ($2::uuid is null or user_id = $2)");
    let found = sqlx::query_as(sql).bind(id).bind(owner).fetch_optional(db).await?;
    found.ok_or_else(|| not_found(id))
}

fn not_found(id: TicketId) -> Error {
    Error::refused(Code::TicketNotFound, format!("You have no ticket with the id {id}."))
}

/// The seats of these reservations that have tickets which are not refunded.
pub(crate) async fn live_holds_of(db: &PgPool, reservations: &[ReservationId]) -> Result<HashSet<Hold>> {
    let holds = sqlx::query_as!(
        Hold,
        "select reservation_id, session_seat_id from tickets where reservation_id = any($1) and status <> 'refunded'",
        reservations as _,
    )
    .fetch_all(db)
    .await?;
    Ok(holds.into_iter().collect())
}

/// A reservation's tickets in the order of its items.
pub(crate) async fn of_reservation(db: &PgPool, id: ReservationId) -> Result<Vec<Ticket>> {
    let sql = concat!("select ", columns!(), " from tickets where reservation_id = $1 order by id");
    Ok(sqlx::query_as(sql).bind(id).fetch_all(db).await?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reservations::testing::reservation;
    use crate::schema::MIGRATIONS;

    /// Inserts a confirmed reservation with that many tickets.
    async fn bought(db: &BatchPool, user: UserId, seats: i32) {
        let id = ReservationId::new();
        reservation(db, id, user, "confirmed").await;
        sqlx::query(
            "insert into tickets (id, reservation_id, reservation_item_id, user_id, session_id, session_seat_id, row_number, seat_number, price)
             select gen_random_uuid(), $1, gen_random_uuid(), $2, gen_random_uuid(), gen_random_uuid(), '1', n::text, 100 from generate_series(1, $3) n",
        )
        .bind(id)
        .bind(user)
        .bind(seats)
        .execute(db.pool())
        .await
        .unwrap();
    }

    #[tokio::test]
    async fn owners_who_ask_together_get_their_own_newest_first_and_no_more_than_a_list_shows() {
        let url = service_kit::testing::database("booking", &MIGRATIONS).await;
        let db = BatchPool::new(&url, "test").unwrap();
        let [many, few, none] = [(); 3].map(|()| UserId::new());
        bought(&db, many, LIST_MAX as i32 + 2).await;
        bought(&db, few, 3).await;
        let asked = vec![few, many, none, few];
        let lists: Vec<Vec<Ticket>> =
            look_for_owners(db.clone(), asked.clone()).await.into_iter().map(Result::unwrap).collect();
        assert_eq!(lists.iter().map(Vec::len).collect::<Vec<_>>(), [3, LIST_MAX + 1, 0, 3]);
        for (owner, list) in asked.iter().zip(&lists) {
            assert!(list.iter().all(|ticket| ticket.user_id == *owner), "{list:?}");
            assert!(list.is_sorted_by(|newer, older| newer.id > older.id), "{list:?}");
        }
        let newest = "select id from tickets where user_id = $1 order by id desc limit 1";
        let newest: TicketId = sqlx::query_scalar(newest).bind(many).fetch_one(db.pool()).await.unwrap();
        assert_eq!(lists[1].first().map(|ticket| ticket.id), Some(newest));
    }
}
