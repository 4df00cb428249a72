//! Chaos: buyers buy while the servers and connections beneath them are killed, frozen, cut and slowed down. Then all
//! faults end, and every promise is checked.
//!
//! `./test.sh --chaos 10m` makes a long run. For a single test, `CHAOS_SECONDS` and `CHAOS_SEED` set the same. The seed
//! decides the order of the faults and the wishes of the buyers. The threads of eight processes run freely, so two runs
//! with one seed are alike, not the same.

use std::path::Path;
use std::time::{Duration, Instant};

use booking_service::app;
use booking_service::replay::{ReplayRequest, replay};
use booking_service::settings::Settings;
use booking_service::state::App;
use futures::future::join_all;
use rand::SeedableRng;
use rand::rngs::StdRng;
use service_kit::amqp::Broker;
use service_kit::amqp::dead_letters::{self, Which};
use service_kit::process::settings::Secret;
use service_kit::testing::{scale, server, wait_until};
use uuid::Uuid;

use crate::reconcile::orphan;
use crate::support::System;
use buyers::Market;
use faults::FaultInjector;
use fleet::{BOOKINGS, Fleet};

mod buyers;
mod costs;
mod faults;
mod fleet;

/// The indexes of some wires in [`Fleet::wires`].
mod wires {
    pub(super) const EVENT_SERVICE: usize = 0;
    pub(super) const REDIS: usize = 1;
    pub(super) const BROKER_OF_BOOKING: usize = 2;
}

const USUAL_SECONDS: usize = 25;
const USUAL_SEED: usize = 20_261_126;
const BUYERS: u64 = 24;
/// Short, so that many holds expire.
const HOLD_TIME: Duration = Duration::from_secs(6);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_buyers_were_told_is_true_whatever_fails() {
    let (seconds, seed) = (scale("CHAOS_SECONDS", USUAL_SECONDS), scale("CHAOS_SEED", USUAL_SEED) as u64);
    println!("chaos for {seconds} s with seed {seed}");
    let system = System::start_with(HOLD_TIME).await;
    // Some seats are sold for good, so a longer run needs more of them.
    let sale = system.sale(500 + 2 * seconds as u32).await;
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("chaos-{seed}"));
    let fleet = Fleet::prepare(&system, &folder).await;
    let operator = operator(&system);
    let bookings = fleet.members[BOOKINGS].iter().map(|member| member.base.clone()).collect();
    let market = Market::open(sale, bookings, fleet.wires[wires::EVENT_SERVICE].1.url());
    let mut injector = FaultInjector::new(&system, &fleet, &operator, seed);
    let run = async {
        fleet.wait_until_healthy().await;
        let buyers = join_all((0..BUYERS).map(|buyer| market.serve_buyers(seed.wrapping_mul(BUYERS) + buyer)));
        let faults = async {
            injector.run_until(Instant::now() + Duration::from_secs(seconds as u64)).await;
            fleet.heal();
            market.close();
        };
        tokio::join!(buyers, faults);
        println!("{}{}", market.summary(), injector.summary());
        heal(&system, &fleet, &market, &operator, &injector.poison).await
    };
    let healed = tokio::select! {
        healed = run => healed,
        () = fleet.keep_running() => unreachable!("`keep_running` never returns"),
    };

    println!("settled {healed:.1?} after the last fault\n");
    let rare = rare_events(&system, &fleet, &market, &injector).await;
    let mut broken = market.broken_promises(&system.app.db).await;
    broken.append(&mut market.complaints.lock().unwrap());
    broken.append(&mut fleet.complaints.lock().unwrap());
    let logs = folder.display();
    assert!(broken.is_empty(), "{} promises are broken (logs in {logs}):\n{}", broken.len(), broken.join("\n"));
    for (what, count) in rare {
        println!("  {count:>7}  {what}");
    }
    for (what, count) in rare {
        assert!(count > 0, "never seen: {what}; this run has tested too little (logs in {logs})");
    }
    println!("{} requests, {} faults, seed {seed}", market.operations(), injector.count());
    system.finish().await;
}

/// What an operator uses: connections that avoid every proxy which can fail.
fn operator(system: &System) -> (App, Broker) {
    let broker = Broker { url: Secret::from(server("TEST_RABBITMQ_URL").as_str()), ..system.settings.broker.clone() };
    let settings =
        Settings { broker: broker.clone(), event_service_url: system.event_base.clone(), ..system.settings.clone() };
    (app::for_command(&settings, "operator").unwrap(), broker)
}

/// Waits until the system has recovered. Replays what was lost with a queue, and sends dead letters again.
async fn heal(
    system: &System,
    fleet: &Fleet,
    market: &Market,
    (app, broker): &(App, Broker),
    poison: &[Uuid],
) -> Duration {
    let begun = Instant::now();
    fleet.wait_until_healthy().await;
    println!("every process is healthy {:.1?} after the last fault", begun.elapsed());
    let mut rng = StdRng::seed_from_u64(0);
    let awaited = std::mem::take(&mut *market.awaited.lock().unwrap());
    for charge in awaited {
        assert!(market.notice(&mut rng, charge).await, "a notice is refused although every process is healthy");
    }
    // Without this, payments whose outcome is unknown would wait half a minute for their leases to run out.
    let past = "update reservations set confirming_until = now() where status = 'confirming'";
    sqlx::query(past).execute(&system.app.db).await.unwrap();
    let open = "select (select count(*) from reservations where status in ('active', 'confirming'))
                + (select count(*) from outbox where published_at is null) + (select count(*) from refunds where status = 'pending')";
    wait_until("all reservations have ended", Duration::from_secs(60), async || system.count(open).await == 0).await;

    println!("all reservations have ended {:.1?} after the last fault", begun.elapsed());
    // The chaos leaves such holds, too, but a buyer may take them over before the reconciliation finds them.
    let free = "select session_seat_id::text from session_seats where status = 'available' limit 1";
    let seat: String = sqlx::query_scalar(free).fetch_one(&system.event_db).await.unwrap();
    orphan(system, &market.sale.session, &seat, "2 hours").await;
    let mut all = ReplayRequest { from: Some(chrono::DateTime::UNIX_EPOCH), ..ReplayRequest::default() };
    loop {
        all.cursor = replay(&app.db, &app.publisher, &all).await.unwrap().next_cursor;
        if all.cursor.is_none() {
            break;
        }
    }
    let queue = &system.settings.queue;
    dead_letters::requeue(broker, queue, &Which::All).await.unwrap();
    let events = system.count("select count(*) from outbox").await;
    wait_until("every event is applied, and no seat is held", Duration::from_secs(90), async || {
        let left: i64 = sqlx::query_scalar(
            "select $1 - (select count(*) from inbox) + (select count(*) from session_seats where status = 'reserved')",
        )
        .bind(events)
        .fetch_one(&system.event_db)
        .await
        .unwrap();
        left == 0
    })
    .await;
    let healed = begun.elapsed();
    // Messages that cannot be applied are dead-lettered again, and no others are.
    wait_until("the queue is empty", Duration::from_secs(30), async || broker.messages_in(queue).await.unwrap() == 0)
        .await;
    for letter in dead_letters::drop(broker, queue, &Which::All).await.unwrap() {
        assert!(letter.message_id.is_some_and(|id| poison.contains(&id)), "dead-lettered without need: {letter:?}");
    }
    healed
}

/// The events that must occur in a run that tests anything, and how often they did.
async fn rare_events(
    system: &System,
    fleet: &Fleet,
    market: &Market,
    injector: &FaultInjector<'_>,
) -> [(&'static str, usize); 12] {
    let ended = async |sql| system.count(sql).await as usize;
    [
        ("contention: another buyer had the seat", market.refusals("reserve: 409 seat_unavailable")),
        ("a reservation expired", ended("select count(*) from reservations where status = 'expired'").await),
        (
            "a reservation was paid",
            ended("select count(*) from reservations where status in ('confirmed', 'refunded')").await,
        ),
        ("the circuit opened", fleet.lines_with(faults::CIRCUIT_OPEN)),
        ("the circuit closed again", fleet.lines_with(faults::CIRCUIT_CLOSED)),
        ("Redis was done without", fleet.lines_with("bookings go on without seat locks")),
        ("a message was dead-lettered", fleet.lines_with("Message set aside in the dead letter queue")),
        ("a message was delivered twice", fleet.lines_with("Message known already")),
        ("reconciliation put seats right", fleet.lines_with("Reconciliation put seats right")),
        ("a payment of unknown fate was settled", fleet.lines_with("Settled a payment of unknown fate")),
        ("events waited in the outbox", fleet.lines_with("they wait in the outbox")),
        ("a crash point was reached", injector.crashes()),
    ]
}
