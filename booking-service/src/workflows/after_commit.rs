//! What follows the commit that ended reservations: their events may leave, their seats are freed, their locks are
//! removed.
//!
//! All of it is only faster than the events themselves. What fails here, the events or the locks' time limit make up
//! for.

use std::collections::BTreeMap;

use shared_contracts::booking_event::BookingEvent;
use shared_contracts::ids::SessionId;
use shared_contracts::seat_api::Hold;

use crate::seat_locks::holds_of;
use crate::state::App;

/// Frees the seats of expired reservations. Their events do so in any case; this does it for many at a time, and while the broker is away.
pub(super) async fn free_now(app: &App, events: &[BookingEvent]) {
    let holds: Vec<Hold> =
        events.iter().flat_map(|event| holds_of(event.reservation_id, &event.session_seat_ids)).collect();
    if let Err(error) = app.event_service.release_all(&holds).await {
        tracing::info!(%error, seats = holds.len(), "These seats are freed by their events");
    }
}

/// After the commit: the events may leave, and the seats need no lock any more.
pub(super) async fn announce_end(app: &App, events: &[BookingEvent]) {
    for event in events {
        app.metrics.ended(event.event_type);
    }
    app.outbox_wakeup.notify_one();
    let mut held: BTreeMap<SessionId, Vec<Hold>> = BTreeMap::new();
    for event in events {
        held.entry(event.session_id).or_default().extend(holds_of(event.reservation_id, &event.session_seat_ids));
    }
    for (session, held) in held {
        app.locks.release(session, &held).await;
    }
}
