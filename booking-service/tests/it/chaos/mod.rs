//! Chaos: buyers buy while everything beneath them is killed, frozen, cut and confused. Then it is healed, and every promise is looked at.
//!
//! `./test.sh --chaos 10m` makes a long run of it; `CHAOS_SECONDS` and `CHAOS_SEED` say the same to a single test. The seed decides which
//! faults come in which order and what buyers wish for; the threads of eight processes do as they like, so a seed makes a run
//! alike, not the same.

use std::path::Path;
use std::time::{Duration, Instant};

use booking_service::app::{self, App};
use booking_service::replay::{ReplayRequest, replay};
use booking_service::settings::Settings;
use futures::future::join_all;
use rand::SeedableRng;
use rand::rngs::StdRng;
use service_kit::amqp::Broker;
use service_kit::dead_letters::{self, Which};
use service_kit::settings::Secret;
use service_kit::testing::{scale, server, wait_until};
use uuid::Uuid;

use crate::reconcile::orphan;
use crate::support::System;
use buyers::Market;
use faults::Sabotage;
use fleet::{BOOKINGS, Fleet};

mod buyers;
mod costs;
mod faults;
mod fleet;

/// Where the wires of a [`Fleet`] stand in its list.
mod wires {
    pub(super) const EVENT_SERVICE: usize = 0;
    pub(super) const REDIS: usize = 1;
    pub(super) const BROKER_OF_BOOKING: usize = 2;
}

const USUAL_SECONDS: usize = 25;
const USUAL_SEED: usize = 20_261_126;
const BUYERS: u64 = 24;
/// Short, so that many holds run out.
const HOLD_TIME: Duration = Duration::from_secs(6);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_buyers_were_told_is_true_whatever_breaks() {
    let (seconds, seed) = (scale("CHAOS_SECONDS", USUAL_SECONDS), scale("CHAOS_SEED", USUAL_SEED) as u64);
    println!("chaos for {seconds} s with seed {seed}");
    let system = System::start_with(HOLD_TIME).await;
    // Some seats are sold for good, so a longer run needs more of them.
    let sale = system.sale(500 + 2 * seconds as u32).await;
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("chaos-{seed}"));
    let fleet = Fleet::prepare(&system, &folder).await;
    let desk = desk(&system);
    let bookings = fleet.members[BOOKINGS].iter().map(|member| member.base.clone()).collect();
    let market = Market::open(sale, bookings, fleet.wires[wires::EVENT_SERVICE].1.url());
    let mut sabotage = Sabotage::new(&system, &fleet, &desk, seed);
    let run = async {
        fleet.is_whole().await;
        let buyers = join_all((0..BUYERS).map(|buyer| market.serve_buyers(seed.wrapping_mul(BUYERS) + buyer)));
        let faults = async {
            sabotage.go_on_until(Instant::now() + Duration::from_secs(seconds as u64)).await;
            fleet.heal();
            market.close();
        };
        tokio::join!(buyers, faults);
        println!("{}{}", market.summary(), sabotage.summary());
        heal(&system, &fleet, &market, &desk, &sabotage.poison).await
    };
    let healed = tokio::select! {
        healed = run => healed,
        () = fleet.keep_running() => unreachable!("processes are kept running for as long as it takes"),
    };

    println!("at rest {healed:.1?} after the last fault\n");
    let rare = rare_events(&system, &fleet, &market, &sabotage).await;
    let mut broken = market.broken_promises(&system.app.db).await;
    broken.append(&mut market.complaints.lock().unwrap());
    broken.append(&mut fleet.complaints.lock().unwrap());
    let logs = folder.display();
    assert!(broken.is_empty(), "{} promises are broken (logs in {logs}):\n{}", broken.len(), broken.join("\n"));
    for (what, count) in rare {
        println!("  {count:>7}  {what}");
    }
    for (what, count) in rare {
        assert!(count > 0, "nothing was seen of: {what}; this run has tested too little (logs in {logs})");
    }
    println!("{} requests, {} faults, seed {seed}", market.operations(), sabotage.count());
    system.finish().await;
}

/// The hands of an operator: past every wire that can break.
fn desk(system: &System) -> (App, Broker) {
    let broker = Broker { url: Secret::from(server("TEST_RABBITMQ_URL").as_str()), ..system.settings.broker.clone() };
    let settings =
        Settings { broker: broker.clone(), event_service_url: system.event_base.clone(), ..system.settings.clone() };
    (app::for_command(&settings, "desk").unwrap(), broker)
}

/// Waits until the system has put itself right; what was lost with a queue is replayed, and what was set aside is sent again.
async fn heal(
    system: &System,
    fleet: &Fleet,
    market: &Market,
    (app, broker): &(App, Broker),
    poison: &[Uuid],
) -> Duration {
    let begun = Instant::now();
    fleet.is_whole().await;
    println!("every process is well {:.1?} after the last fault", begun.elapsed());
    let mut rng = StdRng::seed_from_u64(0);
    let awaited = std::mem::take(&mut *market.awaited.lock().unwrap());
    for charge in awaited {
        assert!(market.notice(&mut rng, charge).await, "a notice is not taken although all is well");
    }
    // Half a minute would go by until the leases run out of payments that nobody heard the end of.
    let past = "update reservations set confirming_until = now() where status = 'confirming'";
    sqlx::query(past).execute(&system.app.db).await.unwrap();
    let open = "select (select count(*) from reservations where status in ('active', 'confirming'))
                + (select count(*) from outbox where published_at is null) + (select count(*) from refunds where status = 'pending')";
    wait_until("all reservations have ended", Duration::from_secs(60), async || system.count(open).await == 0).await;

    println!("all reservations have ended {:.1?} after the last fault", begun.elapsed());
    // The chaos leaves some of its own, but a buyer who comes for the seat may put that right before the reconciliation does.
    let free = "select session_seat_id::text from session_seats where status = 'available' limit 1";
    let seat: String = sqlx::query_scalar(free).fetch_one(&system.event_db).await.unwrap();
    orphan(system, &market.sale.session, &seat, "2 hours").await;
    let mut all = ReplayRequest { from: Some(chrono::DateTime::UNIX_EPOCH), ..ReplayRequest::default() };
    loop {
        all.cursor = replay(app, &all).await.unwrap().next_cursor;
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
    // What nobody can apply is set aside again, and nothing else is.
    wait_until("the queue is empty", Duration::from_secs(30), async || broker.messages_in(queue).await.unwrap() == 0)
        .await;
    for letter in dead_letters::drop(broker, queue, &Which::All).await.unwrap() {
        assert!(letter.message_id.is_some_and(|id| poison.contains(&id)), "set aside without need: {letter:?}");
    }
    healed
}

/// What must have happened in a run that tested anything.
async fn rare_events(
    system: &System,
    fleet: &Fleet,
    market: &Market,
    sabotage: &Sabotage<'_>,
) -> [(&'static str, usize); 12] {
    let ended = async |sql| system.count(sql).await as usize;
    [
        ("contention: a seat was another's", market.refusals("reserve: 409 seat_unavailable")),
        ("a reservation expired", ended("select count(*) from reservations where status = 'expired'").await),
        (
            "a reservation was paid",
            ended("select count(*) from reservations where status in ('confirmed', 'refunded')").await,
        ),
        ("the circuit opened", fleet.lines_with(faults::CIRCUIT_OPEN)),
        ("the circuit closed again", fleet.lines_with(faults::CIRCUIT_CLOSED)),
        ("Redis was done without", fleet.lines_with("bookings go on without seat locks")),
        ("a message was set aside", fleet.lines_with("Message set aside in the dead letter queue")),
        ("a message came twice", fleet.lines_with("Message known already")),
        ("reconciliation put seats right", fleet.lines_with("Reconciliation put seats right")),
        ("a payment of unknown fate was settled", fleet.lines_with("Settled a payment of unknown fate")),
        ("events waited in the outbox", fleet.lines_with("they wait in the outbox")),
        ("a crash point was reached", sabotage.crashes()),
    ]
}
