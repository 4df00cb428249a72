//! Rate limits: how often a user may call, by user id, and how often one address may call. User ids can be made up, so
//! both have a limit.
//!
//! A limit is a rate and a burst. Each caller has one number (the generic cell rate algorithm): the time at which
//! everything spent is earned again. A call moves that time by what one call takes to earn. A call that would move it
//! further than a burst from now is refused, and moves nothing.
//!
//! Each process decides from its own memory, so no request waits for Redis. Once a caller has used a quarter of its
//! burst, the replica reports it to Redis within 100 ms, batched. It then reads what the caller used elsewhere. An
//! ordinary buyer never gets that far. So N replicas together grant a caller the rate in the long run. At first they
//! grant at most N bursts, which the caller must earn back. Without Redis each process counts for itself: N times the
//! limit.

use std::collections::hash_map::RandomState;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::http::{HeaderName, HeaderValue};
use axum::response::{IntoResponse, Response};
use moka::sync::Cache;
use redis::Script;
use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use shared_contracts::ids::UserId;
use shared_contracts::problem::{Code, Problem};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::admit::bulkheads::RequestClass;
use crate::admit::limits::{Rate, Rates};
use crate::http::error::Error;
use crate::http::tls::Trust;
use crate::process::settings::Secret;

/// The header with the policy that refused a call (draft-ietf-httpapi-ratelimit-headers).
pub const POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");
/// The header with what is left of the policy, and when there is more.
pub const LIMIT: HeaderName = HeaderName::from_static("ratelimit");

/// The callers that are remembered, users and addresses apart. Ids can be made up by the million, and must not evict
/// addresses. A caller takes some 200 bytes.
const USERS_MAX: u64 = 100_000;
const ADDRESSES_MAX: u64 = 50_000;
/// How long an idle caller is remembered beyond the time in which it earns a burst.
const IDLE_MARGIN: Duration = Duration::from_secs(60);

/// How long the replica collects callers before it reports them to Redis.
const GATHER_TIME: Duration = Duration::from_millis(100);
/// The longest that Redis may take to connect or answer. No request waits for it.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(50);
/// How long the replica waits after Redis did not answer, before it reports again.
const AWAY_TIME: Duration = Duration::from_secs(1);
/// The callers in one call of the script.
const CALLERS_AT_ONCE: usize = 500;
/// The callers that may wait to be reported. Any more are reported after a later call of theirs.
const WAITING_MAX: usize = 10_000;

/// Adds what was spent (in microseconds) to each key. Returns how far each key is ahead of now, by the one clock that
/// all replicas share.
const SPEND: &str = r"
local time = redis.call('time')
local now = time[1] * 1000000 + time[2]
local ahead = {}
for i, key in ipairs(KEYS) do
    local at = math.max(tonumber(redis.call('get', key) or 0), now) + ARGV[i]
    redis.call('set', key, string.format('%.0f', at), 'px', math.ceil((at - now) / 1000) + 1)
    ahead[i] = at - now
end
return ahead
";

/// The kinds of calls. Each has its own limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Kind {
    Read,
    Hold,
    Confirm,
    Admin,
}

/// The user or address whose calls share one limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Who {
    User(UserId),
    Address(IpAddr),
}

type LimitKey = (Kind, Who);

/// What a caller has spent. Times are nanoseconds since the process began.
#[derive(Debug, Default)]
struct Spent {
    /// When everything spent is earned again.
    earned_at: u64,
    /// Calls that have not been reported to Redis.
    untold: u32,
    /// Whether the caller waits to be reported.
    is_waiting: bool,
}

type Account = Arc<Mutex<Spent>>;

/// The rate limits of a process.
pub struct Limiter {
    rates: Rates,
    users: Cache<LimitKey, Account, RandomState>,
    addresses: Cache<LimitKey, Account, RandomState>,
    began: Instant,
    waiting: Mutex<Vec<(LimitKey, Account)>>,
    nudge: Notify,
    is_away: AtomicBool,
}

/// A call that was refused: by which limit, and when the caller may call again.
#[derive(Debug)]
pub struct RateLimited {
    caller: LimitKey,
    rate: Rate,
    again_in: Duration,
}

impl Limiter {
    /// A limiter with these rates, for which no caller has spent anything.
    #[must_use]
    pub fn new(rates: Rates) -> Self {
        let all = [rates.read, rates.hold, rates.confirm, rates.admin];
        let longest = all.iter().map(|rate| burst_time(*rate)).max().unwrap_or_default();
        let accounts = |callers_max| {
            Cache::builder().max_capacity(callers_max).time_to_idle(longest.saturating_add(IDLE_MARGIN)).build()
        };
        Self {
            rates,
            users: accounts(USERS_MAX),
            addresses: accounts(ADDRESSES_MAX),
            began: Instant::now(),
            waiting: Mutex::default(),
            nudge: Notify::new(),
            is_away: AtomicBool::new(false),
        }
    }

    /// Whether there is a limit on this class.
    pub fn limits(&self, class: RequestClass) -> bool {
        self.of_class(class).is_some()
    }

    fn of_class(&self, class: RequestClass) -> Option<(Kind, Rate)> {
        let (kind, rate) = match class {
            RequestClass::Map | RequestClass::Read => (Kind::Read, self.rates.read),
            RequestClass::Hold => (Kind::Hold, self.rates.hold),
            RequestClass::Confirm => (Kind::Confirm, self.rates.confirm),
            RequestClass::Admin => (Kind::Admin, self.rates.admin),
            RequestClass::Notice | RequestClass::Internal | RequestClass::Open => return None,
        };
        (rate.per_second > 0.0).then_some((kind, rate))
    }

    /// Counts a call against the limits of its user and its address, unless one refuses it.
    ///
    /// # Errors
    /// The call exceeds a limit.
    pub fn check(&self, class: RequestClass, user: Option<UserId>, address: IpAddr) -> Result<(), Box<RateLimited>> {
        let Some((kind, rate)) = self.of_class(class) else { return Ok(()) };
        // The user first: the refused calls of one user must not use up the limit of the others behind the same
        // address.
        if let Some(user) = user {
            self.spend((kind, Who::User(user)), rate)?;
        }
        self.spend((kind, Who::Address(address)), self.of_address(rate))
    }

    fn of_address(&self, rate: Rate) -> Rate {
        let factor = self.rates.address_factor;
        Rate { per_second: rate.per_second * f64::from(factor), burst: rate.burst.saturating_mul(factor) }
    }

    fn rate(&self, (kind, who): LimitKey) -> Rate {
        let rate = match kind {
            Kind::Read => self.rates.read,
            Kind::Hold => self.rates.hold,
            Kind::Confirm => self.rates.confirm,
            Kind::Admin => self.rates.admin,
        };
        if matches!(who, Who::User(_)) { rate } else { self.of_address(rate) }
    }

    fn spend(&self, caller: LimitKey, rate: Rate) -> Result<(), Box<RateLimited>> {
        let accounts = if matches!(caller.1, Who::User(_)) { &self.users } else { &self.addresses };
        let account = accounts.get(&caller).unwrap_or_else(|| accounts.get_with(caller, Account::default));
        let (one, burst, now) = (earning_time(rate), nanos(burst_time(rate)), self.now());
        let mut spent = account.lock().unwrap_or_else(PoisonError::into_inner);
        let earned_at = spent.earned_at.max(now).saturating_add(one);
        let too_much = (earned_at - now).saturating_sub(burst);
        if too_much > 0 {
            return Err(Box::new(RateLimited { caller, rate, again_in: Duration::from_nanos(too_much) }));
        }
        spent.earned_at = earned_at;
        spent.untold = spent.untold.saturating_add(1);
        if !spent.is_waiting && spent.untold >= rate.burst.div_ceil(4) {
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            if waiting.len() < WAITING_MAX {
                spent.is_waiting = true;
                waiting.push((caller, Arc::clone(&account)));
                drop(waiting);
                self.nudge.notify_one();
            }
        }
        Ok(())
    }

    fn now(&self) -> u64 {
        nanos(self.began.elapsed())
    }

    /// Reports the callers that spend much to Redis, and reads what they spend elsewhere, until `stopping`.
    ///
    /// # Errors
    /// The URL is not a Redis URL.
    pub async fn share(&self, redis_url: &Secret, trust: &Trust, stopping: CancellationToken) -> anyhow::Result<()> {
        let client = trust.redis_client(redis_url)?;
        let config = ConnectionManagerConfig::new()
            .set_number_of_retries(1)
            .set_max_delay(Duration::from_millis(200))
            .set_connection_timeout(Some(ANSWER_TIMEOUT))
            .set_response_timeout(Some(ANSWER_TIMEOUT));
        let redis = ConnectionManager::new_lazy_with_config(client, config)?;
        let script = Script::new(SPEND);
        let sharing = async {
            loop {
                self.nudge.notified().await;
                tokio::time::sleep(GATHER_TIME).await;
                let waiting = std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner));
                for callers in waiting.chunks(CALLERS_AT_ONCE) {
                    let told = self.tell(&script, &mut redis.clone(), callers).await;
                    self.note(&told);
                    if told.is_err() {
                        tokio::time::sleep(AWAY_TIME).await;
                    }
                }
            }
        };
        stopping.run_until_cancelled(sharing).await;
        Ok(())
    }

    async fn tell(
        &self,
        script: &Script,
        redis: &mut ConnectionManager,
        callers: &[(LimitKey, Account)],
    ) -> anyhow::Result<()> {
        let mut call = script.prepare_invoke();
        let mut told = Vec::with_capacity(callers.len());
        for (caller, account) in callers {
            let mut spent = account.lock().unwrap_or_else(PoisonError::into_inner);
            // Reset before the outcome is known, so that the caller's next call can request another report.
            spent.is_waiting = false;
            told.push(std::mem::take(&mut spent.untold));
            let micros = u64::from(*told.last().unwrap_or(&0)) * earning_time(self.rate(*caller)) / 1000;
            call.key(key(*caller)).arg(micros);
        }
        let asked_at = self.now();
        let answer = tokio::time::timeout(ANSWER_TIMEOUT, call.invoke_async::<Vec<u64>>(redis)).await;
        let answer = answer.map_err(anyhow::Error::from).and_then(|answer| answer.map_err(anyhow::Error::from));
        match answer {
            Ok(ahead) => {
                for ((caller, account), ahead) in callers.iter().zip(ahead) {
                    let mut spent = account.lock().unwrap_or_else(PoisonError::into_inner);
                    let meanwhile = u64::from(spent.untold) * earning_time(self.rate(*caller));
                    spent.earned_at = spent.earned_at.max(asked_at + ahead * 1000 + meanwhile);
                }
                Ok(())
            }
            Err(error) => {
                // Redis may have counted these calls all the same. The next report then charges the caller for them
                // twice.
                for ((caller, account), told) in callers.iter().zip(told) {
                    let mut spent = account.lock().unwrap_or_else(PoisonError::into_inner);
                    spent.untold = spent.untold.saturating_add(told).min(self.rate(*caller).burst);
                }
                Err(error)
            }
        }
    }

    fn note(&self, told: &anyhow::Result<()>) {
        let was_away = self.is_away.swap(told.is_err(), Ordering::Relaxed);
        match told {
            Err(error) if !was_away => {
                tracing::warn!(
                    error = format!("{error:#}"),
                    "Redis is away; each replica counts rate limits for itself"
                );
            }
            Ok(()) if was_away => tracing::info!("Redis is back; rate limits count over all replicas"),
            _ => {}
        }
    }
}

/// The Redis key of a limit. All keys are in one slot of a cluster, as the script needs.
fn key((kind, who): LimitKey) -> String {
    let kind = kind.name();
    match who {
        Who::User(user) => format!("{{rate-limit}}:{kind}:user:{user}"),
        Who::Address(address) => format!("{{rate-limit}}:{kind}:address:{address}"),
    }
}

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Hold => "hold",
            Self::Confirm => "confirm",
            Self::Admin => "admin",
        }
    }
}

/// How long it takes to earn one call, in nanoseconds.
fn earning_time(rate: Rate) -> u64 {
    (1e9 / rate.per_second) as u64
}

fn burst_time(rate: Rate) -> Duration {
    if rate.per_second > 0.0 {
        Duration::from_nanos(earning_time(rate).saturating_mul(rate.burst.into()))
    } else {
        Duration::ZERO
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// The time in whole seconds: rounded up, and at least 1.
fn seconds(time: Duration) -> u32 {
    u32::try_from(time.as_millis().div_ceil(1000)).unwrap_or(u32::MAX).max(1)
}

impl IntoResponse for RateLimited {
    fn into_response(self) -> Response {
        let (kind, who) = self.caller;
        let (of, name) = match who {
            Who::User(_) => ("from one user", kind.name().to_owned()),
            Who::Address(_) => ("from one address", format!("{}-address", kind.name())),
        };
        let (Rate { per_second, burst }, again_in) = (self.rate, seconds(self.again_in));
        let detail = format!(
            "Too many calls of this kind {of}: the limit is {burst} at once, and {per_second} a second. Nothing was \
             done; try again after Retry-After."
        );
        let problem = Problem::new(Code::RateLimited, detail).retry_after(again_in);
        let mut response = Error::from(problem).into_response();
        let window = seconds(burst_time(self.rate));
        let fields =
            [(POLICY, format!("\"{name}\";q={burst};w={window}")), (LIMIT, format!("\"{name}\";r=0;t={again_in}"))];
        for (field, value) in fields {
            if let Ok(value) = HeaderValue::from_str(&value) {
                response.headers_mut().insert(field, value);
            }
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn limiter(per_second: f64, burst: u32) -> Limiter {
        let rate = Rate { per_second, burst };
        Limiter::new(Rates { read: rate, hold: rate, confirm: rate, admin: rate, address_factor: 3 })
    }

    fn user() -> Option<UserId> {
        Some(Uuid::now_v7().to_string().parse().unwrap())
    }

    fn address(last: u8) -> IpAddr {
        [192, 0, 2, last].into()
    }

    fn passed(limiter: &Limiter, class: RequestClass, user: Option<UserId>, from: u8, calls: u32) -> usize {
        (0..calls).filter(|_| limiter.check(class, user, address(from)).is_ok()).count()
    }

    #[test]
    fn a_user_gets_a_burst_and_then_what_is_earned() {
        let limiter = limiter(20.0, 5);
        let (one, other) = (user(), user());
        assert_eq!(passed(&limiter, RequestClass::Hold, one, 1, 50), 5);
        let refused = limiter.check(RequestClass::Hold, one, address(1)).unwrap_err();
        assert!(refused.again_in <= Duration::from_millis(50), "{refused:?}");
        std::thread::sleep(refused.again_in);
        assert!(limiter.check(RequestClass::Hold, one, address(1)).is_ok(), "what is earned can be spent");
        assert_eq!(passed(&limiter, RequestClass::Hold, other, 1, 50), 5, "another user has their own");
        assert_eq!(passed(&limiter, RequestClass::Confirm, one, 1, 50), 5, "so has another kind of call");
    }

    #[test]
    fn made_up_users_share_what_their_address_gets() {
        let limiter = limiter(0.001, 5);
        let flood = (0..1000).filter(|_| limiter.check(RequestClass::Hold, user(), address(1)).is_ok()).count();
        assert_eq!(flood, 15);
        assert_eq!(passed(&limiter, RequestClass::Hold, None, 2, 50), 15, "another address has its own");
    }

    #[test]
    fn what_a_user_is_refused_is_not_paid_by_the_others_behind_their_address() {
        let limiter = limiter(0.001, 5);
        assert_eq!(passed(&limiter, RequestClass::Hold, user(), 1, 1000), 5);
        assert_eq!(passed(&limiter, RequestClass::Hold, user(), 1, 1000), 5);
    }

    #[test]
    fn other_services_the_provider_and_health_checks_are_not_limited() {
        let limiter = limiter(0.001, 1);
        for class in [RequestClass::Internal, RequestClass::Notice, RequestClass::Open] {
            assert_eq!(passed(&limiter, class, None, 1, 100), 100);
        }
    }

    #[test]
    fn a_million_made_up_callers_take_bounded_memory_and_free_nobody_of_a_limit() {
        let limiter = limiter(0.001, 5);
        let address_of = |n: u32| IpAddr::from(n.to_be_bytes());
        assert_eq!(passed(&limiter, RequestClass::Hold, None, 1, 100), 15);
        for n in 0..300_000 {
            let _ = limiter.check(RequestClass::Hold, user(), address_of(n));
            if n % 1000 == 0 {
                assert_eq!(
                    passed(&limiter, RequestClass::Hold, None, 1, 1),
                    0,
                    "the limit of a busy address was forgotten"
                );
            }
        }
        limiter.users.run_pending_tasks();
        limiter.addresses.run_pending_tasks();
        assert!(limiter.users.entry_count() <= USERS_MAX && limiter.addresses.entry_count() <= ADDRESSES_MAX);
        assert!(limiter.waiting.lock().unwrap().len() <= WAITING_MAX);
    }

    #[test]
    fn an_ordinary_buyer_is_not_told_of() {
        let limiter = limiter(2.0, 20);
        let buyer = user();
        assert_eq!(passed(&limiter, RequestClass::Hold, buyer, 1, 4), 4);
        assert_eq!(limiter.waiting.lock().unwrap().len(), 0);
        assert!(limiter.check(RequestClass::Hold, buyer, address(1)).is_ok());
        assert_eq!(limiter.waiting.lock().unwrap().len(), 1);
    }
}
