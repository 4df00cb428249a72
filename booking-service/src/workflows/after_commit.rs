//! The work after the commit that paid or ended reservations: wakes the relay for their events and removes their seat
//! locks. Only [`free_now`] frees seats, of reservations that ended.
//!
//! This work only saves time. If a step fails, the events free or sell the seats all the same, and the locks end by
//! their time limit.

use std::collections::BTreeMap;

use shared_contracts::booking_event::BookingEvent;
use shared_contracts::ids::SessionId;
use shared_contracts::seat_api::Hold;

use crate::seat_locks::holds_of;
use crate::state::App;

/// Frees the seats of expired reservations. Their events free them in any case; this call frees many at a time, and
/// works while the broker is unavailable.
pub(super) async fn free_now(app: &App, events: &[BookingEvent]) {
    let holds: Vec<Hold> =
        events.iter().flat_map(|event| holds_of(event.reservation_id, &event.session_seat_ids)).collect();
    if let Err(error) = app.event_service.release_all(&holds).await {
        tracing::info!(%error, seats = holds.len(), "The events will free these seats");
    }
}

/// Counts the events, wakes the relay for them, and removes the seat locks. Call this after the commit.
pub(super) async fn announce_settled(app: &App, events: &[BookingEvent]) {
    for event in events {
        app.metrics.count_settled(event.event_type);
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
