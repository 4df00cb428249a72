//! The events of reservations that were paid, refunded or ended. Each is written to the outbox in the transaction of the
//! change that it announces. A new reservation has no event.

use std::collections::HashMap;

use chrono::{DateTime, Utc};
use service_kit::http::error::Result;
use shared_contracts::booking_event::{BookingEvent, BookingEventType, SCHEMA_VERSION};
use shared_contracts::ids::{MessageId, ReservationId, SessionId, SessionSeatId, UserId};
use shared_contracts::money::{Currency, Money};
use shared_contracts::seat_api::Hold;
use sqlx::{FromRow, PgConnection};

use crate::outbox;

/// The columns that an update of a reservation returns. They suffice for its event.
#[derive(Debug, FromRow)]
pub(super) struct Changed {
    pub(super) id: ReservationId,
    pub(super) user_id: UserId,
    pub(super) session_id: SessionId,
    pub(super) sequence: i64,
    /// When the change's transaction began, by the database's clock.
    pub(super) changed_at: DateTime<Utc>,
    pub(super) total_amount: Money,
    pub(super) currency: Currency,
}

/// Writes the events of reservations that have ended with all their seats, in the transaction that ended them.
pub(super) async fn append_events(
    tx: &mut PgConnection,
    event_type: BookingEventType,
    ended: &[Changed],
) -> Result<Vec<BookingEvent>> {
    if ended.is_empty() {
        return Ok(Vec::new());
    }
    let ids: Vec<ReservationId> = ended.iter().map(|changed| changed.id).collect();
    let mut seats: HashMap<ReservationId, Vec<SessionSeatId>> = HashMap::new();
    let holds = sqlx::query_as!(
        Hold,
        "select reservation_id, session_seat_id from reservation_items where reservation_id = any($1) order by id",
        ids as _,
    )
    .fetch_all(&mut *tx)
    .await?;
    for Hold { reservation_id, session_seat_id } in holds {
        seats.entry(reservation_id).or_default().push(session_seat_id);
    }
    let events: Vec<BookingEvent> = ended
        .iter()
        .map(|changed| BookingEvent {
            session_seat_ids: seats.remove(&changed.id).unwrap_or_default(),
            ..changed.event(event_type)
        })
        .collect();
    outbox::append(tx, &events).await?;
    Ok(events)
}

impl Changed {
    /// The event of this change, without seats, tickets and money.
    pub(super) fn event(&self, event_type: BookingEventType) -> BookingEvent {
        BookingEvent {
            event_id: MessageId::new(),
            event_type,
            schema_version: SCHEMA_VERSION,
            occurred_at: self.changed_at,
            reservation_id: self.id,
            user_id: self.user_id,
            session_id: self.session_id,
            session_seat_ids: Vec::new(),
            sequence: self.sequence,
            ticket_ids: Vec::new(),
            amount: None,
            currency: None,
        }
    }
}
