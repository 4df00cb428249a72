//! The seat locks in Redis: they turn away most of a rush for the same seats, in microseconds. They never decide who
//! gets a seat.
//!
//! Without Redis, bookings go on without locks. The Event Service's database then decides alone, more slowly but just
//! as correctly. A lock's value is the reservation's id, so a release never removes the lock of another reservation.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use redis::{FromRedisValue, Script, ScriptInvocation};
use service_kit::http::tls::Trust;
use service_kit::process::settings::Secret;
use shared_contracts::ids::{ReservationId, SessionId, SessionSeatId};
use shared_contracts::seat_api::Hold;
use tokio_util::sync::CancellationToken;

/// The time limit of a command. After one that Redis does not answer, bookings skip Redis until it answers a probe.
const ANSWER_TIME_MAX: Duration = Duration::from_millis(150);
/// The time between probes of a Redis that did not answer.
const PROBE_INTERVAL: Duration = Duration::from_millis(500);

/// The most locks removed by one script. Redis serves no other command meanwhile, about a millisecond.
const RELEASED_PER_CALL: usize = 1000;

/// Takes all locks or none. Returns `index:owner` for each seat that another reservation has locked.
const ACQUIRE: &str = r"
local busy = {}
for i, key in ipairs(KEYS) do
    local owner = redis.call('get', key)
    if owner and owner ~= ARGV[1] then busy[#busy + 1] = i .. ':' .. owner end
end
if #busy == 0 then
    for _, key in ipairs(KEYS) do redis.call('set', key, ARGV[1], 'px', ARGV[2]) end
end
return busy
";
/// Removes each lock whose value is the given owner.
const RELEASE: &str = r"
for i, key in ipairs(KEYS) do
    if redis.call('get', key) == ARGV[i] then redis.call('del', key) end
end
";

/// The outcome of an attempt to lock the seats of a booking.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LockOutcome {
    /// All seats are locked.
    Acquired,
    /// Other reservations have locked these seats; nothing was locked.
    Busy(Vec<Hold>),
    /// Redis is away; the booking goes on without locks.
    Bypassed,
}

/// The client of the seat locks. They keep a rush of bookings from the Event Service, but decide nothing.
pub struct SeatLocks {
    redis: ConnectionManager,
    away: AtomicBool,
    acquire: Script,
    release: Script,
}

impl SeatLocks {
    /// Uses the Redis at `url`; the connection opens on first use.
    ///
    /// # Errors
    /// `url` is not a valid Redis URL.
    pub fn new(url: &Secret, trust: &Trust) -> anyhow::Result<Self> {
        let client = trust.redis_client(url)?;
        // One quick try per command, whose error names the cause. The library's own retries would delay every command
        // by seconds.
        let config = ConnectionManagerConfig::new()
            .set_number_of_retries(0)
            .set_connection_timeout(Some(ANSWER_TIME_MAX))
            .set_response_timeout(Some(ANSWER_TIME_MAX));
        let redis = ConnectionManager::new_lazy_with_config(client, config)?;
        Ok(Self { redis, away: AtomicBool::new(false), acquire: Script::new(ACQUIRE), release: Script::new(RELEASE) })
    }

    /// Locks all of `seats` for the reservation, or none, for as long as its hold may last. If the process dies before
    /// it has the hold, `reservations/ended.rs` finds the leftover locks.
    pub async fn acquire(
        &self,
        session: SessionId,
        seats: &[SessionSeatId],
        owner: ReservationId,
        hold_time: Duration,
    ) -> LockOutcome {
        let mut call = self.acquire.prepare_invoke();
        for seat in seats {
            call.key(key_of(session, *seat));
        }
        call.arg(owner.to_string());
        call.arg(u64::try_from(hold_time.as_millis()).unwrap_or(u64::MAX));
        match self.run::<Vec<String>>(&call).await {
            Some(busy) if busy.is_empty() => LockOutcome::Acquired,
            Some(busy) => LockOutcome::Busy(busy.iter().filter_map(|entry| parse_busy(entry, seats)).collect()),
            None => LockOutcome::Bypassed,
        }
    }

    /// Removes the locks of these reservations on these seats of a session; locks of other reservations stay. If Redis
    /// does not answer, the locks expire at their time limit.
    pub async fn release(&self, session: SessionId, held: &[Hold]) {
        for held in held.chunks(RELEASED_PER_CALL) {
            let mut call = self.release.prepare_invoke();
            for hold in held {
                call.key(key_of(session, hold.session_seat_id));
                call.arg(hold.reservation_id.to_string());
            }
            self.run::<()>(&call).await;
        }
    }

    /// Checks that Redis answers within 150 ms.
    ///
    /// # Errors
    /// Redis does not answer in time.
    pub async fn ping(&self) -> anyhow::Result<()> {
        let mut redis = self.redis.clone();
        tokio::time::timeout(ANSWER_TIME_MAX, redis::cmd("PING").query_async::<()>(&mut redis)).await??;
        Ok(())
    }

    /// Probes a Redis that did not answer, until it does. Ends when `stopping` is cancelled.
    ///
    /// # Errors
    /// None. The result fits the signature of a task of the process.
    pub async fn watch(&self, stopping: CancellationToken) -> anyhow::Result<()> {
        while stopping.run_until_cancelled(tokio::time::sleep(PROBE_INTERVAL)).await.is_some() {
            if self.away.load(Ordering::Relaxed) && self.ping().await.is_ok() {
                self.away.store(false, Ordering::Relaxed);
                tracing::info!("Redis is back; seats are locked again");
            }
        }
        Ok(())
    }

    /// Runs a script unless Redis is known to be away; `None` when there is no answer.
    async fn run<T: FromRedisValue>(&self, call: &ScriptInvocation<'_>) -> Option<T> {
        if self.away.load(Ordering::Relaxed) {
            return None;
        }
        let mut redis = self.redis.clone();
        let error = match tokio::time::timeout(ANSWER_TIME_MAX, call.invoke_async(&mut redis)).await {
            Ok(Ok(answer)) => return Some(answer),
            Ok(Err(error)) => anyhow::Error::from(error),
            Err(error) => error.into(),
        };
        if !self.away.swap(true, Ordering::Relaxed) {
            tracing::warn!(error = format!("{error:#}"), "Redis is away; bookings go on without seat locks");
        }
        None
    }
}

/// One hold per seat, each with this reservation's id.
#[must_use]
pub fn holds_of(reservation_id: ReservationId, seats: &[SessionSeatId]) -> Vec<Hold> {
    seats.iter().map(|seat| Hold { reservation_id, session_seat_id: *seat }).collect()
}

/// The braces are a hash tag: in a Redis cluster, all locks of a session share a slot, as a script requires.
fn key_of(session: SessionId, seat: SessionSeatId) -> String {
    format!("booking:lock:{{{session}}}:{seat}")
}

fn parse_busy(entry: &str, seats: &[SessionSeatId]) -> Option<Hold> {
    let (index, owner) = entry.split_once(':')?;
    let index: usize = index.parse().ok()?;
    Some(Hold { reservation_id: owner.parse().ok()?, session_seat_id: *seats.get(index.checked_sub(1)?)? })
}
