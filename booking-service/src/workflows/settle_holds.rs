//! Decides what becomes of a hold at the Event Service by its reservation: freed, sold, or left alone.

use std::collections::BTreeMap;

use service_kit::http::error::Result;
use service_kit::postgres::database;
use shared_contracts::ids::{ReservationId, SessionId, SessionSeatId};
use shared_contracts::seat_api::Hold;

use super::after_commit::announce_settled;
use crate::event_client::SeatChange;
use crate::reservations::model::{self, SessionHold};
use crate::reservations::{endings, tickets};
use crate::state::App;

/// The result of one round, counted in seats.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Healed {
    /// Freed, because their reservation has ended or was never written.
    pub released: usize,
    /// Sold, because their reservation is paid.
    pub confirmed: usize,
    /// Left alone, because their reservation is active or being paid.
    pub left: usize,
}

impl Healed {
    pub(super) fn add(&mut self, other: Self) {
        self.released += other.released;
        self.confirmed += other.confirmed;
        self.left += other.left;
    }
}

/// Frees or sells these seats at the Event Service, as the states of their reservations require.
///
/// Pass only holds that are past their time or older than `reconcile::ABANDONED_AFTER`: this function abandons a
/// booking that has not written its reservation by then.
///
/// # Errors
/// The database or the Event Service does not answer.
pub async fn settle(app: &App, holds: &[SessionHold]) -> Result<Healed> {
    if holds.is_empty() {
        return Ok(Healed::default());
    }
    let mut owners: Vec<ReservationId> = holds.iter().map(|held| held.hold.reservation_id).collect();
    owners.sort_unstable();
    owners.dedup();
    expire_these(app, &owners).await?;
    endings::abandon_unwritten(&app.db, holds).await?;
    let states = model::states(&app.db, &owners).await?;
    let ticketed = tickets::live_holds_of(&app.db, &owners).await?;

    let mut healed = Healed::default();
    let mut free: BTreeMap<SessionId, Vec<Hold>> = BTreeMap::new();
    for owner in owners {
        let own = holds.iter().filter(|held| held.hold.reservation_id == owner);
        let (sold, others): (Vec<_>, Vec<_>) = own.partition(|held| ticketed.contains(&held.hold));
        healed.confirmed += sell(app, owner, &sold).await?;
        if states.get(&owner).is_some_and(|state| state.is_under_way()) {
            healed.left += others.len();
            continue;
        }
        healed.released += others.len();
        others.iter().for_each(|held| free.entry(held.session_id).or_default().push(held.hold));
    }
    app.event_service.release_all(&free.values().flatten().copied().collect::<Vec<_>>()).await?;
    for (session_id, held) in free {
        app.locks.release(session_id, &held).await;
    }
    Ok(healed)
}

/// Expires those of `ids` whose time is over, because the caller wants their seats now.
async fn expire_these(app: &App, ids: &[ReservationId]) -> Result<()> {
    let mut tx = database::begin(&app.db).await?;
    let events = endings::expire(&mut tx, ids).await?;
    tx.commit().await?;
    announce_settled(app, &events).await;
    Ok(())
}

async fn sell(app: &App, owner: ReservationId, holds: &[&SessionHold]) -> Result<usize> {
    let Some(session_id) = holds.first().map(|held| held.session_id) else {
        return Ok(0);
    };
    let seats: Vec<SessionSeatId> = holds.iter().map(|held| held.hold.session_seat_id).collect();
    if let SeatChange::Refused(conflicts) = app.event_service.confirm(session_id, owner, &seats).await? {
        tracing::error!(reservation_id = %owner, ?conflicts, "A paid reservation does not hold its seats; investigate");
        return Ok(0);
    }
    Ok(seats.len())
}
