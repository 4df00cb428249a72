//! The faults of a chaos run: first a fixed list that makes sure of the rare events, then random ones that the seed
//! decides.

use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::time::{Duration, Instant};

use booking_service::replay::{ReplayRequest, replay};
use booking_service::state::App;
use lapin::options::QueueDeleteOptions;
use lapin::{Connection, ConnectionProperties};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde_json::json;
use service_kit::amqp::{Broker, Outgoing, Publisher};
use service_kit::testing::wait_until;
use service_kit::testing::wires::Mode;
use shared_contracts::booking_event::{BookingEventType, SCHEMA_VERSION};
use shared_contracts::ids::ReservationId;
use sqlx::{Connection as _, PgConnection};
use uuid::Uuid;

use super::fleet::{BOOKINGS, Fleet, REDIS, ROLE};
use super::wires;
use crate::crash_points;
use crate::support::System;

/// How many reservations have their events published again by one fault, in random order.
const REPLAYED: i64 = 30;
/// How long a circuit may take to open or to close, and a process to reach a crash point: several times what it needs.
const RARE_TIME_MAX: Duration = Duration::from_secs(15);
/// Said in the log by a circuit that opens, and by one that closes.
pub(super) const CIRCUIT_OPEN: &str = "the circuit is open";
pub(super) const CIRCUIT_CLOSED: &str = "the circuit is closed";

#[derive(Debug, Clone)]
enum Fault {
    /// SIGKILL. The process is back after `down_for`, and then runs only to the crash point, if one is named.
    Kill { member: usize, down_for: Duration, crash_at: Option<String> },
    /// SIGSTOP, and SIGCONT after this time.
    Freeze { member: usize, time: Duration },
    /// SIGTERM. The process starts again at once.
    Stop { member: usize },
    /// A wire is in this mode for this time.
    Wire { wire: usize, mode: Mode, time: Duration },
    /// The Event Service answers nobody until a circuit has opened. No other fault follows until a circuit has closed,
    /// because a process that dies in between never closes its own.
    Hang,
    /// PostgreSQL ends every connection to a database.
    EndConnections { events: bool },
    /// Redis forgets all locks.
    FlushRedis,
    /// Redis answers nobody for this time.
    PauseRedis { time: Duration },
    /// The queue and what is in it are gone.
    DeleteQueue,
    /// Events that have been published are published again, in random order.
    Replay,
    /// A message that nobody can apply.
    Poison,
}

impl Fault {
    fn random(rng: &mut StdRng, fleet: &Fleet) -> Self {
        let time = Duration::from_millis(rng.random_range(300..4000));
        let member = rng.random_range(0..fleet.members.len());
        match rng.random_range(0..100) {
            0..25 => {
                let places = crash_points::all();
                let place = places.choose(rng).copied().unwrap_or_default();
                let crash_at = rng.random_bool(0.5).then(|| format!("{place}:{}", rng.random_range(1..20)));
                Self::Kill { member, down_for: time / 2, crash_at }
            }
            25..37 => Self::Freeze { member, time },
            37..43 => Self::Stop { member: member % REDIS },
            43..75 => {
                let mode = match rng.random_range(0..6) {
                    0 | 1 => Mode::Cut,
                    2 => Mode::Freeze,
                    3 => Mode::HalfOpen,
                    4 => Mode::Delay(Duration::from_millis(rng.random_range(20..400))),
                    _ => Mode::ResetAfter(rng.random_range(500..60_000)),
                };
                Self::Wire { wire: rng.random_range(0..fleet.wires.len()), mode, time }
            }
            75..81 => Self::EndConnections { events: rng.random_bool(0.5) },
            81..84 => Self::FlushRedis,
            84..87 => Self::PauseRedis { time },
            87..89 => Self::DeleteQueue,
            89..96 => Self::Replay,
            _ => Self::Poison,
        }
    }

    fn kind(&self) -> &'static str {
        match self {
            Self::Kill { .. } => "kill -9",
            Self::Freeze { .. } => "SIGSTOP",
            Self::Stop { .. } => "SIGTERM",
            Self::Wire { mode: Mode::Cut, .. } => "wire cut",
            Self::Wire { mode: Mode::Freeze, .. } => "wire frozen",
            Self::Wire { mode: Mode::HalfOpen, .. } => "wire half-open",
            Self::Wire { mode: Mode::Delay(_), .. } => "wire slow",
            Self::Wire { .. } => "wire reset in a message",
            Self::Hang => "the Event Service hangs",
            Self::EndConnections { .. } => "pg_terminate_backend",
            Self::FlushRedis => "FLUSHALL",
            Self::PauseRedis { .. } => "CLIENT PAUSE",
            Self::DeleteQueue => "queue deleted",
            Self::Replay => "messages twice and shuffled",
            Self::Poison => "poison",
        }
    }
}

/// A fault and its target, as text.
struct Shown<'a>(&'a Fault, &'a Fleet);

impl Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = self.0.kind();
        match self.0 {
            Fault::Kill { member, down_for, crash_at } => {
                write!(f, "{kind} {} for {down_for:?}", self.1.members[*member].name)?;
                crash_at.as_ref().map_or(Ok(()), |place| write!(f, ", then to die at {place}"))
            }
            Fault::Freeze { member, time } => write!(f, "{kind} {} for {time:?}", self.1.members[*member].name),
            Fault::Stop { member } => write!(f, "{kind} {}", self.1.members[*member].name),
            Fault::Wire { wire, time, .. } => write!(f, "{kind} to {} for {time:?}", self.1.wires[*wire].0),
            Fault::EndConnections { events } => write!(f, "{kind}, {}", if *events { "events" } else { "bookings" }),
            Fault::PauseRedis { time } => write!(f, "{kind} for {time:?}"),
            _ => f.write_str(kind),
        }
    }
}

/// Injects the faults and counts them.
pub(super) struct FaultInjector<'a> {
    system: &'a System,
    fleet: &'a Fleet,
    operator: &'a (App, Broker),
    rng: StdRng,
    begun: Instant,
    injected: BTreeMap<&'static str, usize>,
    /// The ids of the messages that must be dead-lettered.
    pub(super) poison: Vec<Uuid>,
}

impl<'a> FaultInjector<'a> {
    pub(super) fn new(system: &'a System, fleet: &'a Fleet, operator: &'a (App, Broker), seed: u64) -> Self {
        let (rng, begun) = (StdRng::seed_from_u64(seed), Instant::now());
        Self { system, fleet, operator, rng, begun, injected: BTreeMap::new(), poison: Vec::new() }
    }

    /// Injects faults until `end`. Returns when the last one is over.
    pub(super) async fn run_until(&mut self, end: Instant) {
        for fault in first_faults() {
            self.pause(100..400).await;
            self.inject_all(&[fault]).await;
        }
        // Another fault could end these processes before they get there.
        let crashes = "the processes reach their crash points";
        wait_until(crashes, RARE_TIME_MAX, async || self.crashes() >= 2).await;
        while Instant::now() < end {
            self.pause(100..1200).await;
            // Sometimes two at once.
            let count = if self.rng.random_bool(0.25) { 2 } else { 1 };
            let faults: Vec<Fault> = (0..count).map(|_| Fault::random(&mut self.rng, self.fleet)).collect();
            self.inject_all(&faults).await;
        }
    }

    async fn pause(&mut self, millis: std::ops::Range<u64>) {
        tokio::time::sleep(Duration::from_millis(self.rng.random_range(millis))).await;
    }

    async fn inject_all(&mut self, faults: &[Fault]) {
        for fault in faults {
            println!("{:>7.1} s  {}", self.begun.elapsed().as_secs_f64(), Shown(fault, self.fleet));
            *self.injected.entry(fault.kind()).or_default() += 1;
        }
        let poison = Uuid::now_v7();
        if faults.iter().any(|fault| matches!(fault, Fault::Poison)) {
            self.poison.push(poison);
        }
        let injected = futures::future::join_all(faults.iter().map(|fault| self.inject(fault, poison))).await;
        for outcome in injected {
            // For example a statement whose connection another fault has ended. That is harmless here.
            if let Err(error) = outcome {
                println!("           failed: {error:#}");
            }
        }
    }

    async fn inject(&self, fault: &Fault, poison: Uuid) -> anyhow::Result<()> {
        let member = |index: &usize| &self.fleet.members[*index];
        match fault {
            Fault::Kill { member: index, down_for, crash_at } => member(index).kill(*down_for, crash_at.clone()),
            Fault::Freeze { member: index, time } => {
                member(index).signal("STOP");
                tokio::time::sleep(*time).await;
                member(index).signal("CONT");
            }
            Fault::Stop { member: index } => member(index).stop(),
            Fault::Wire { wire, mode, time } => {
                let wire = &self.fleet.wires[*wire].1;
                wire.set(*mode);
                tokio::time::sleep(*time).await;
                wire.heal();
            }
            Fault::Hang => {
                let wire = &self.fleet.wires[wires::EVENT_SERVICE].1;
                let logged = async |words: &str| {
                    wait_until(words, RARE_TIME_MAX, async || self.fleet.lines_with(words) > 0).await;
                };
                wire.set(Mode::Freeze);
                logged(CIRCUIT_OPEN).await;
                wire.heal();
                logged(CIRCUIT_CLOSED).await;
            }
            Fault::EndConnections { events } => {
                let url = if *events { &self.system.event_database_url } else { &self.system.settings.database_url };
                let mut connection = PgConnection::connect(url.reveal()).await?;
                let all = "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() and usename = $1";
                sqlx::query(all).bind(ROLE).execute(&mut connection).await?;
                connection.close().await?;
            }
            Fault::FlushRedis => self.tell_redis(redis::cmd("FLUSHALL")).await?,
            Fault::PauseRedis { time } => {
                let mut pause = redis::cmd("CLIENT");
                pause.arg("PAUSE").arg(time.as_millis() as u64);
                self.tell_redis(pause).await?;
            }
            Fault::DeleteQueue => self.delete_queue().await?,
            Fault::Replay => self.replay_some().await?,
            Fault::Poison => self.publish_poison(poison).await?,
        }
        Ok(())
    }

    async fn tell_redis(&self, command: redis::Cmd) -> anyhow::Result<()> {
        let client = redis::Client::open(self.fleet.redis_url.as_str())?;
        let mut connection = client.get_multiplexed_async_connection().await?;
        Ok(command.query_async(&mut connection).await?)
    }

    async fn delete_queue(&self) -> anyhow::Result<()> {
        let connection = Connection::connect(self.operator.1.url.reveal(), ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        channel.queue_delete(self.system.settings.queue.as_str().into(), QueueDeleteOptions::default()).await?;
        connection.close(200, "done".into()).await?;
        Ok(())
    }

    async fn replay_some(&self) -> anyhow::Result<()> {
        let sql =
            "select reservation_id from outbox where published_at is not null group by 1 order by random() limit $1";
        let some: Vec<ReservationId> = sqlx::query_scalar(sql).bind(REPLAYED).fetch_all(&self.operator.0.db).await?;
        for id in some {
            let request = ReplayRequest { reservation_id: Some(id), ..ReplayRequest::default() };
            replay(&self.operator.0.db, &self.operator.0.publisher, &request).await.map_err(anyhow::Error::from)?;
        }
        Ok(())
    }

    /// Publishes a message that is not JSON, has a version from the future, or sells a seat that its reservation does
    /// not hold.
    async fn publish_poison(&self, id: Uuid) -> anyhow::Result<()> {
        let event = |version| {
            json!({ "event_id": id, "event_type": BookingEventType::Confirmed.routing_key(), "schema_version": version,
                "occurred_at": "2026-01-01T00:00:00Z", "reservation_id": id, "user_id": id, "session_id": id,
                "session_seat_ids": [id], "sequence": 1, "ticket_ids": [], "amount": null, "currency": null })
        };
        let body = match id.as_u128() % 3 {
            0 => b"no JSON".to_vec(),
            1 => event(SCHEMA_VERSION + 1).to_string().into_bytes(),
            _ => event(SCHEMA_VERSION).to_string().into_bytes(),
        };
        let routing_key = BookingEventType::Confirmed.routing_key().into();
        let publisher = Publisher::new(self.operator.1.clone(), "poisoner");
        publisher.connect_if_needed().await?;
        publisher.publish(&[Outgoing { message_id: id, routing_key, body, timestamp: 0, traceparent: None }]).await?;
        Ok(())
    }

    pub(super) fn count(&self) -> usize {
        self.injected.values().sum()
    }

    /// How many runs ended at a crash point.
    pub(super) fn crashes(&self) -> usize {
        self.fleet.lines_with("crash point")
    }

    pub(super) fn summary(&self) -> String {
        let lines = self.injected.iter().map(|(kind, count)| format!("  {count:>7}  {kind}\n"));
        format!("faults: {}\n{}", self.count(), lines.collect::<String>())
    }
}

/// The first faults of each run. Without them, a short run might see none of the rare events.
fn first_faults() -> [Fault; 7] {
    let second = Duration::from_secs(1);
    let (first, last) = (BOOKINGS.start, BOOKINGS.end - 1);
    [
        Fault::Wire { wire: wires::BROKER_OF_BOOKING, mode: Mode::Cut, time: 2 * second },
        Fault::Hang,
        Fault::Kill { member: first, down_for: second / 2, crash_at: Some("booking.reserved:2".into()) },
        Fault::Poison,
        Fault::Wire { wire: wires::REDIS, mode: Mode::Cut, time: second },
        Fault::Replay,
        Fault::Kill { member: last, down_for: second / 2, crash_at: Some("confirm.charged:2".into()) },
    ]
}
