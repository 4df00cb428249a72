//! Limits for one customer: reservations, seats and requests. A flood of requests from one user must not delay other
//! buyers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use booking_service::workflows::end::expire_due;
use futures::future::join_all;
use reqwest::{Client, StatusCode};
use serde_json::{Value, json};
use service_kit::admit::limits::{Rate, Rates};
use service_kit::testing::{scale, wait_until};
use uuid::Uuid;

use crate::processes::{self, free_port};
use crate::support::{Sale, System, answer, text_of};

/// One user sends fifty reservations at once, which are written in any number of batches.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_fifty_reservations_at_once_only_as_many_as_allowed_are_made() {
    let system = System::start_limited(|_, rules| rules.open_reservations_max = 4).await;
    let sale = system.sale(60).await;
    let user = Uuid::now_v7();
    let seats: Vec<[usize; 1]> = (0..50).map(|seat| [seat]).collect();
    let tries = join_all(seats.iter().map(|seat| system.try_reserve(&sale, user, seat))).await;
    let mut made = Vec::new();
    for tried in tries {
        match tried.status() {
            StatusCode::CREATED => made.push(text_of(&answer(tried, 201).await, "id")),
            _ => assert_eq!(answer(tried, 409).await["code"], "too_many_reservations"),
        }
    }
    assert_eq!(made.len(), 4);
    let held = system.statuses(&sale.session).await.iter().filter(|status| *status == "reserved").count();
    assert_eq!(held, 4, "a refused reservation holds a seat");

    // Other users are not limited. An ended reservation makes room: a paid one, a cancelled one, and one past its
    // expiry time.
    system.reserve(&sale, Uuid::now_v7(), &[50], 201).await;
    system.reserve(&sale, user, &[51], 409).await;
    system.confirm(&made[0], user, None, 200).await;
    system.reserve(&sale, user, &[51], 201).await;
    system.cancel(&made[1], user, 200).await;
    system.reserve(&sale, user, &[52], 201).await;
    assert_eq!(system.reserve(&sale, user, &[53], 409).await["code"], "too_many_reservations");
    system.let_reservations_run_out().await;
    system.reserve(&sale, user, &[53], 201).await;
    while expire_due(&system.app, 100).await.unwrap() > 0 {}
    system.finish().await;
}

/// Both could pass the limit if the second query ran before the first transaction committed. The second waits instead,
/// and then counts the first.
#[tokio::test]
async fn the_second_reservation_of_a_user_waits_for_the_first_and_counts_it() {
    let system = System::start().await;
    let (user, session) = (Uuid::now_v7(), Uuid::now_v7());
    let refusal = "select refusal from reservation_refusals(array[$1], array[$2], '{7}', '{}', '{0}', '{100}')";
    let refusal_of = |user: Uuid| sqlx::query_scalar::<_, Option<String>>(refusal).bind(user).bind(session);
    let mut first = service_kit::postgres::database::begin(&system.app.db).await.unwrap();
    assert_eq!(refusal_of(user).fetch_one(&mut *first).await.unwrap(), None);
    let insert = "insert into reservations (id, user_id, session_id, status, booking_time, expiry_time, seats_count, total_amount, currency)
                  values ($1, $2, $3, 'active', now() - interval '1 minute', now() + interval '1 minute', 1, 1, 'USD')";
    sqlx::query(insert).bind(Uuid::now_v7()).bind(user).bind(session).execute(&mut *first).await.unwrap();
    let (db, second) = (system.app.db.clone(), refusal_of(user));
    let second = system.lifecycle.spawn_work(async move { second.fetch_one(&db).await });
    wait_until("the second waits", Duration::from_secs(5), async || {
        let waiting = "select count(*) from pg_locks where locktype = 'advisory' and not granted
                       and database = (select oid from pg_database where datname = current_database())";
        second.is_finished() || system.count(waiting).await == 1
    })
    .await;
    assert!(!second.is_finished(), "the second did not wait");
    first.commit().await.unwrap();
    assert_eq!(second.await.unwrap().unwrap().as_deref(), Some("too_many_reservations"));
    // The limit is per user: another user has no open reservation, even if both use the same lock.
    assert_eq!(refusal_of(Uuid::now_v7()).fetch_one(&system.app.db).await.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn held_and_sold_seats_of_a_session_count_until_they_are_refunded() {
    let system = System::start_limited(|_, rules| rules.seats_per_session_max = 5).await;
    let (sale, other_sale) = (system.sale(40).await, system.sale(10).await);
    let user = Uuid::now_v7();
    let pairs: Vec<[usize; 2]> = (0..15).map(|pair| [2 * pair, 2 * pair + 1]).collect();
    let tries = join_all(pairs.iter().map(|pair| system.try_reserve(&sale, user, pair))).await;
    let mut made = Vec::new();
    for tried in tries {
        match tried.status() {
            StatusCode::CREATED => made.push(answer(tried, 201).await),
            _ => assert_eq!(answer(tried, 409).await["code"], "too_many_seats"),
        }
    }
    assert_eq!(made.len(), 2, "two pairs are four seats, three would be six");
    system.reserve(&other_sale, user, &[0, 1, 2, 3, 4], 201).await;
    let paid = system.confirm(&text_of(&made[0], "id"), user, None, 200).await;
    assert_eq!(system.reserve(&sale, user, &[30, 31], 409).await["code"], "too_many_seats");
    system.refund(&text_of(&paid["tickets"][0], "id"), user, 200).await;
    system.reserve(&sale, user, &[30, 31], 201).await;
    system.reserve(&sale, user, &[32], 409).await;
    system.finish().await;
}

/// The refusal is temporary, so the same key succeeds once the user is below the limit.
#[tokio::test]
async fn a_temporary_refusal_is_not_stored_under_its_key() {
    let system = System::start_limited(|_, rules| rules.open_reservations_max = 1).await;
    let sale = system.sale(2).await;
    let user = Uuid::now_v7();
    let first = text_of(&system.reserve(&sale, user, &[0], 201).await, "id");
    let with_key = async |expected: u16| {
        let request = system.http.post(format!("{}/api/v1/reservations", system.booking_base));
        let request = request.header("x-user-id", user.to_string()).header("idempotency-key", "mine");
        answer(request.json(&sale.order(&[1])).send().await.unwrap(), expected).await
    };
    assert_eq!(with_key(409).await["code"], "too_many_reservations");
    system.cancel(&first, user, 200).await;
    with_key(201).await;
    system.finish().await;
}

const FLOODING_CLIENTS: usize = 100;
/// One user's rates for reads and for holds.
const READS: Rate = Rate { per_second: 20.0, burst: 100 };
const HOLDS: Rate = Rate { per_second: 2.0, burst: 20 };
/// How often to measure at most. One good measurement is enough, because other load on the machine only slows it down.
const MEASURED_MAX: usize = 3;
/// How long it may take until all flooding clients send requests.
const FLOOD_START_TIMEOUT: Duration = Duration::from_secs(30);
/// What a buyer's p99 may be beside the flood, in parts of their p99 without it, and beyond that. The flooding clients use
/// the same cores as the services, and on a slow machine everything takes longer.
const SLOWER_ALLOWED: u32 = 2;
const DELAY_ALLOWED: Duration = Duration::from_millis(25);

/// The services that buyers and the flood call, and the seats on sale.
#[derive(Clone)]
struct Targets {
    event: String,
    booking: String,
    sale: Arc<Sale>,
    next_seat: Arc<AtomicUsize>,
}

impl Targets {
    /// A new customer's seat map, reservation, payment and ticket, for a seat that nobody else wants.
    async fn journey(&self, http: &Client) {
        let user = Uuid::now_v7();
        let seat = self.next_seat.fetch_add(1, Ordering::Relaxed);
        let map = format!("{}/api/v1/sessions/{}/seat-map", self.event, self.sale.session);
        http.get(map).header("accept-encoding", "gzip").send().await.unwrap().error_for_status().unwrap();
        let booking = &self.booking;
        let as_user = |request: reqwest::RequestBuilder| request.header("x-user-id", user.to_string()).send();
        let reserve = http.post(format!("{booking}/api/v1/reservations")).json(&self.sale.order(&[seat]));
        let id = text_of(&answer(as_user(reserve).await.unwrap(), 201).await, "id");
        let confirm = http.post(format!("{booking}/api/v1/reservations/{id}/confirm"));
        answer(as_user(confirm).await.unwrap(), 200).await;
        answer(as_user(http.get(format!("{booking}/api/v1/tickets/user/{user}"))).await.unwrap(), 200).await;
    }

    /// Makes `count` journeys, one after the other. Returns their durations, sorted.
    async fn journeys(&self, count: usize) -> Vec<Duration> {
        let http = Client::builder().build().unwrap();
        let mut times = Vec::with_capacity(count);
        for _ in 0..count {
            let begun = Instant::now();
            self.journey(&http).await;
            times.push(begun.elapsed());
        }
        times.sort_unstable();
        times
    }

    /// Reads seat maps and tries to reserve, as fast as it can, until `stop` is set. Counts the answers: passed and
    /// refused.
    async fn flood(&self, http: &Client, user: Uuid, stop: &AtomicBool, answers: &[AtomicUsize; 2]) {
        let map = format!("{}/api/v1/sessions/{}/seat-map", self.event, self.sale.session);
        // The last seat of the hall, which no buyer reaches.
        let order = self.sale.order(&[self.sale.seats.len() - 1]);
        while !stop.load(Ordering::Relaxed) {
            let hold = http.post(format!("{}/api/v1/reservations", self.booking)).json(&order);
            for call in [http.get(&map).header("accept-encoding", "gzip"), hold] {
                if let Ok(answer) = call.header("x-user-id", user.to_string()).send().await {
                    answers[usize::from(answer.status() == 429)].fetch_add(1, Ordering::Relaxed);
                    let _ = answer.bytes().await;
                }
            }
        }
    }
}

fn at(times: &[Duration], share: f64) -> Duration {
    times[((times.len() - 1) as f64 * share) as usize]
}

/// Runs `work` on a thread and a runtime of its own.
fn on_own_thread<T: Send + 'static>(
    work: impl FnOnce(tokio::runtime::Runtime) -> T + Send + 'static,
) -> std::thread::JoinHandle<T> {
    std::thread::spawn(|| work(tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()))
}

/// The durations of journeys without and with the flood, and the counts of the flood's answers.
struct Measured {
    quiet: Vec<Duration>,
    flooded: Vec<Duration>,
    passed: usize,
    /// Only those refused while the buyer made the flooded journeys.
    refused: usize,
    took: Duration,
}

impl Measured {
    /// Checks that there was a flood and that it was limited. Returns the p99 of a journey without it and with it.
    fn check(&self) -> (Duration, Duration) {
        let Self { quiet, flooded, passed, refused, took } = self;
        println!("quiet:   p50 {:.1?}, p99 {:.1?}", at(quiet, 0.5), at(quiet, 0.99));
        println!("flooded: p50 {:.1?}, p99 {:.1?}", at(flooded, 0.5), at(flooded, 0.99));
        println!("the flood: {passed} calls passed in {took:.1?}, {refused} were refused while the buyer bought");
        assert!(*refused > FLOODING_CLIENTS, "there was no flood");
        let may_pass: f64 = [READS, HOLDS]
            .iter()
            .map(|rate| f64::from(rate.burst) + (rate.per_second * took.as_secs_f64()).ceil())
            .sum();
        assert!(*passed as f64 <= may_pass, "{passed} calls of the flood passed, and only {may_pass} may pass");
        (at(quiet, 0.99), at(flooded, 0.99))
    }
}

fn measure(targets: &Targets, count: usize) -> Measured {
    let journeys = |count: usize| {
        let targets = targets.clone();
        on_own_thread(move |runtime| runtime.block_on(targets.journeys(count))).join().unwrap()
    };
    // The first journeys plan the statements and open the connections.
    journeys(20);
    let quiet = journeys(count);
    let (stop, answers) = (Arc::new(AtomicBool::new(false)), Arc::new([AtomicUsize::new(0), AtomicUsize::new(0)]));
    let (flooded_targets, told, counted) = (targets.clone(), Arc::clone(&stop), Arc::clone(&answers));
    let begun = Instant::now();
    let flood = on_own_thread(move |runtime| {
        let (http, user) = (Client::builder().build().unwrap(), Uuid::now_v7());
        let clients = (0..FLOODING_CLIENTS).map(|_| flooded_targets.flood(&http, user, &told, &counted));
        runtime.block_on(join_all(clients));
    });
    let [passed, refused] = [0, 1].map(|kind| {
        let answers = Arc::clone(&answers);
        move || answers[kind].load(Ordering::Relaxed)
    });
    tokio::runtime::Handle::current()
        .block_on(wait_until("the flood has started", FLOOD_START_TIMEOUT, async || refused() > 10 * FLOODING_CLIENTS));
    let refused_before = refused();
    let flooded = journeys(count);
    let refused = refused() - refused_before;
    stop.store(true, Ordering::Relaxed);
    flood.join().unwrap();
    Measured { quiet, flooded, passed: passed(), refused, took: begun.elapsed() }
}

/// Both services run as processes with realistic limits. The flood and the buyer have a thread each.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_clients_of_one_user_do_not_delay_another() {
    let journeys = scale("FLOOD_JOURNEYS", 150);
    let system = System::start().await;
    let sale = system.sale(2000).await;
    // Only the processes may publish and consume.
    system.to_broker.cut();
    let limited = |mut command: tokio::process::Command| {
        command
            .env("RATE_LIMIT_ENABLED", "true")
            .env("RATE_LIMIT_READ", READS.to_string())
            .env("RATE_LIMIT_HOLD", HOLDS.to_string());
        command
    };
    let (event_port, booking_port) = (free_port().await, free_port().await);
    let broker = service_kit::amqp::Broker {
        url: service_kit::process::settings::Secret::from(service_kit::testing::server("TEST_RABBITMQ_URL").as_str()),
        ..system.settings.broker.clone()
    };
    let settings = booking_service::settings::Settings {
        broker,
        event_service_url: format!("http://127.0.0.1:{event_port}"),
        ..system.settings.clone()
    };
    let event = limited(processes::event(&settings, system.event_database_url.reveal(), event_port));
    let event = processes::start(event).await;
    let booking = processes::start(limited(processes::booking(&settings, "serve", booking_port))).await;
    let targets = Targets {
        event: event.base.clone(),
        booking: booking.base.clone(),
        sale: Arc::new(sale),
        next_seat: Arc::new(AtomicUsize::new(0)),
    };

    let mut last = None;
    for _ in 0..MEASURED_MAX {
        let targets = targets.clone();
        let measured = tokio::task::spawn_blocking(move || measure(&targets, journeys)).await.unwrap();
        let (quiet, flooded) = measured.check();
        last = Some((flooded, quiet * SLOWER_ALLOWED + DELAY_ALLOWED));
        if last.is_some_and(|(flooded, most)| flooded <= most) {
            break;
        }
    }
    let (flooded, most) = last.unwrap();
    assert!(flooded <= most, "a buyer's p99 is {flooded:?}, and at most {most:?} is allowed");
    drop((event, booking));
    system.to_broker.heal();
    system.finish().await;
}

/// A rate-limited request gets a problem document like any other error.
#[tokio::test]
async fn one_user_gets_a_burst_of_reservations_and_then_waits() {
    let rate = |burst| Rate { per_second: 0.01, burst };
    let system = System::start_limited(|limits, _| {
        limits.rates =
            Some(Rates { read: rate(100), hold: rate(3), confirm: rate(100), admin: rate(100), address_factor: 100 });
    })
    .await;
    let sale = system.sale(10).await;
    let (user, other) = (Uuid::now_v7(), Uuid::now_v7());
    let mut first = Value::Null;
    for seat in 0..3 {
        first = system.reserve(&sale, user, &[seat], 201).await;
    }
    let refused = system.try_reserve(&sale, user, &[3]).await;
    assert_eq!(refused.headers()["ratelimit-policy"], "\"hold\";q=3;w=300");
    assert!(refused.headers().contains_key("retry-after"));
    assert_eq!(answer(refused, 429).await["code"], "rate_limited");
    system.confirm(&text_of(&first, "id"), user, Some(json!({})), 200).await;
    system.reserve(&sale, other, &[3], 201).await;
    system.finish().await;
}
