//! The price tiers in use and the database's clock, cached for one second.
//!
//! Every booking needs both. Each replica reads them about once a second, so their cost does not grow with the number
//! of bookings.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use chrono::{DateTime, SubsecRound, Utc};
use service_kit::http::error::Result;
use shared_contracts::ids::{PriceTierId, SessionId};
use shared_contracts::money::Multiplier;
use sqlx::PgPool;

/// How long the tiers and the database's clock are used after they were read.
const FRESH_FOR: Duration = Duration::from_secs(1);

/// Caches the tiers that are in use, so that not every booking reads them again.
#[derive(Debug, Default)]
pub struct PriceTierCache {
    state: Mutex<CacheState>,
}

#[derive(Debug, Default)]
struct CacheState {
    known: Option<Snapshot>,
    /// The number of changes by this process. A snapshot that was read before a change is not kept after it.
    changes: u64,
}

#[derive(Debug)]
struct Snapshot {
    read_at: Instant,
    /// The database's clock at that moment, or just before.
    clock: DateTime<Utc>,
    tiers: HashMap<PriceTierId, (Option<SessionId>, Multiplier)>,
}

impl Snapshot {
    fn is_fresh(&self) -> bool {
        self.read_at.elapsed() < FRESH_FOR
    }

    /// The database's time and the multipliers of those of `ids` that the session may use.
    fn answer(&self, session_id: SessionId, ids: &[PriceTierId]) -> (DateTime<Utc>, HashMap<PriceTierId, Multiplier>) {
        let usable = |id: &PriceTierId| {
            let (only_for, multiplier) = self.tiers.get(id)?;
            only_for.is_none_or(|session| session == session_id).then_some((*id, *multiplier))
        };
        // Truncated to microseconds, as the database stores it, so that the answer and the row agree.
        let now = (self.clock + self.read_at.elapsed()).trunc_subsecs(6);
        (now, ids.iter().filter_map(usable).collect())
    }
}

impl PriceTierCache {
    /// The database's time, never ahead of it, and from `price_tiers` the multipliers of those of `ids` that the session may use. Both may
    /// have been read up to [`FRESH_FOR`] ago; the time includes its age since then. The database decides every
    /// deadline that is computed from it.
    ///
    /// # Errors
    /// The database failed.
    pub async fn tiers_and_clock(
        &self,
        db: &PgPool,
        session_id: SessionId,
        ids: &[PriceTierId],
    ) -> Result<(DateTime<Utc>, HashMap<PriceTierId, Multiplier>)> {
        let changes = {
            let state = self.state();
            if let Some(known) = state.known.as_ref().filter(|known| known.is_fresh())
                && ids.iter().all(|id| known.tiers.contains_key(id))
            {
                return Ok(known.answer(session_id, ids));
            }
            state.changes
        };
        let read = sqlx::query!(
            r#"select clock_timestamp() as "clock!", id, session_id, base_multiplier from price_tiers where id = any($1)"#,
            ids as _,
        )
        .fetch_all(db)
        .await?;
        let Some(clock) = read.first().map(|tier| tier.clock) else {
            return Ok((DateTime::UNIX_EPOCH, HashMap::new()));
        };
        let tiers = read.into_iter().map(|tier| (tier.id, (tier.session_id, tier.base_multiplier))).collect();
        let read = Snapshot { read_at: Instant::now(), clock, tiers };
        let answer = read.answer(session_id, ids);
        self.keep(read, changes);
        Ok(answer)
    }

    /// Keeps a snapshot that was read when there had been `changes` changes, unless there is another since.
    fn keep(&self, read: Snapshot, changes: u64) {
        let mut state = self.state();
        if state.changes != changes {
            return;
        }
        match state.known.as_mut().filter(|known| known.is_fresh()) {
            Some(known) => known.tiers.extend(read.tiers),
            None => state.known = Some(read),
        }
    }

    /// Drops the cached tiers after a change by this process.
    pub(crate) fn forget(&self) {
        let mut state = self.state();
        state.known = None;
        state.changes += 1;
    }

    fn state(&self) -> MutexGuard<'_, CacheState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_read_before_a_change_is_not_kept_after_it() {
        let cache = PriceTierCache::default();
        let read = || Snapshot { read_at: Instant::now(), clock: DateTime::UNIX_EPOCH, tiers: HashMap::new() };
        cache.keep(read(), 0);
        assert!(cache.state().known.is_some());
        cache.forget();
        cache.keep(read(), 0);
        assert!(cache.state().known.is_none(), "the old price would be used for another second");
        cache.keep(read(), 1);
        assert!(cache.state().known.is_some());
    }
}
