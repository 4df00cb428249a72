//! What one customer may have and ask for, and that a crowd of readers and bookers does not delay those who buy.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use booking_service::reservations::finish::expire_due;
use futures::future::join_all;
use reqwest::{Client, StatusCode};
use serde_json::{Value, json};
use service_kit::limits::{Rate, Rates};
use service_kit::testing::{scale, wait_until};
use uuid::Uuid;

use crate::processes::{self, free_port};
use crate::support::{Sale, System, answer, text_of};

/// Fifty reservations of one user at once, in as many batches as come of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_fifty_reservations_at_once_as_many_are_made_as_one_may_have() {
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
    assert_eq!(held, 4, "what was refused holds nothing");

    // Others are not concerned, and what has ended leaves room: paid, given up, or past its time before anyone has ended it.
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

/// The one way in which two could both find room: the second looks before the first has committed. It waits instead, and then sees it.
#[tokio::test]
async fn the_second_reservation_of_a_user_waits_for_the_first_and_counts_it() {
    let system = System::start().await;
    let (user, session) = (Uuid::now_v7(), Uuid::now_v7());
    let refusal = "select refusal from reservation_refusals(array[$1], array[$2], '{7}', '{}', '{0}', '{100}')";
    let look = |user: Uuid| sqlx::query_scalar::<_, Option<String>>(refusal).bind(user).bind(session);
    let mut first = service_kit::database::begin(&system.app.db).await.unwrap();
    assert_eq!(look(user).fetch_one(&mut *first).await.unwrap(), None);
    let insert = "insert into reservations (id, user_id, session_id, status, booking_time, expiry_time, seats_count, total_amount, currency)
                  values ($1, $2, $3, 'active', now() - interval '1 minute', now() + interval '1 minute', 1, 1, 'USD')";
    sqlx::query(insert).bind(Uuid::now_v7()).bind(user).bind(session).execute(&mut *first).await.unwrap();
    let (db, second) = (system.app.db.clone(), look(user));
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
    // Another user has other reservations, if the same lock.
    assert_eq!(look(Uuid::now_v7()).fetch_one(&system.app.db).await.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn seats_of_a_session_are_counted_held_and_bought_until_they_are_given_back() {
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

/// The same key after a refusal that has passed by.
#[tokio::test]
async fn a_refusal_that_passes_by_is_not_kept_under_its_key() {
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
/// What one user may read and hold.
const READS: Rate = Rate { per_second: 20.0, burst: 100 };
const HOLDS: Rate = Rate { per_second: 2.0, burst: 20 };
/// What else goes on on the machine only ever makes it worse, so the best of some measurements counts.
const MEASURED_MAX: usize = 3;
/// How long they may take until all of them have come.
const CROWD_COMES: Duration = Duration::from_secs(30);
/// What the shared cores of this machine may cost beside that, as the crowd's own work is done by them, too.
const NOTICED: Duration = Duration::from_millis(25);

/// Where buyers and the flood go.
#[derive(Clone)]
struct Doors {
    event: String,
    booking: String,
    sale: Arc<Sale>,
    next_seat: Arc<AtomicUsize>,
}

impl Doors {
    /// Seat map, reservation, payment, ticket: by a new customer, for a seat that nobody else wants.
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

    /// The times of so many journeys, one after the other, in order of length.
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

    /// Reads maps and tries to reserve, as fast as it can, until it is told to stop. Counts what it is answered.
    async fn flood(&self, http: &Client, user: Uuid, stop: &AtomicBool, answers: &[AtomicUsize; 2]) {
        let map = format!("{}/api/v1/sessions/{}/seat-map", self.event, self.sale.session);
        // Seats at the far end of the hall.
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

fn alone<T: Send + 'static>(
    work: impl FnOnce(tokio::runtime::Runtime) -> T + Send + 'static,
) -> std::thread::JoinHandle<T> {
    std::thread::spawn(|| work(tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()))
}

/// Journeys by themselves and beside the crowd, and what became of the crowd's calls.
struct Measured {
    quiet: Vec<Duration>,
    flooded: Vec<Duration>,
    passed: usize,
    /// While the buyer bought.
    refused: usize,
    took: Duration,
}

impl Measured {
    /// Looks whether there was a crowd and it was held back; the p99 of a journey without it and beside it.
    fn check(&self) -> (Duration, Duration) {
        let Self { quiet, flooded, passed, refused, took } = self;
        println!("quiet:   p50 {:.1?}, p99 {:.1?}", at(quiet, 0.5), at(quiet, 0.99));
        println!("flooded: p50 {:.1?}, p99 {:.1?}", at(flooded, 0.5), at(flooded, 0.99));
        println!("the crowd: {passed} calls passed in {took:.1?}, {refused} were refused while the buyer bought");
        assert!(*refused > FLOODING_CLIENTS, "there was no crowd");
        let may_pass: f64 = [READS, HOLDS]
            .iter()
            .map(|rate| f64::from(rate.burst) + (rate.per_second * took.as_secs_f64()).ceil())
            .sum();
        assert!(*passed as f64 <= may_pass, "{passed} calls of the crowd passed, and {may_pass} may");
        (at(quiet, 0.99), at(flooded, 0.99))
    }
}

fn measure(doors: &Doors, count: usize) -> Measured {
    let journeys = |count: usize| {
        let doors = doors.clone();
        alone(move |runtime| runtime.block_on(doors.journeys(count))).join().unwrap()
    };
    // Statements are planned, and connections opened, when they are first needed.
    journeys(20);
    let quiet = journeys(count);
    let (stop, answers) = (Arc::new(AtomicBool::new(false)), Arc::new([AtomicUsize::new(0), AtomicUsize::new(0)]));
    let (crowd, told, counted) = (doors.clone(), Arc::clone(&stop), Arc::clone(&answers));
    let begun = Instant::now();
    let flood = alone(move |runtime| {
        let (http, user) = (Client::builder().build().unwrap(), Uuid::now_v7());
        let clients = (0..FLOODING_CLIENTS).map(|_| crowd.flood(&http, user, &told, &counted));
        runtime.block_on(join_all(clients));
    });
    let [passed, refused] = [0, 1].map(|kind| {
        let answers = Arc::clone(&answers);
        move || answers[kind].load(Ordering::Relaxed)
    });
    tokio::runtime::Handle::current()
        .block_on(wait_until("the crowd is there", CROWD_COMES, async || refused() > 10 * FLOODING_CLIENTS));
    let refused_before = refused();
    let flooded = journeys(count);
    let refused = refused() - refused_before;
    stop.store(true, Ordering::Relaxed);
    flood.join().unwrap();
    Measured { quiet, flooded, passed: passed(), refused, took: begun.elapsed() }
}

/// Both services are processes with the limits of real life; the crowd and the buyer have a thread each.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_clients_of_one_user_do_not_delay_another() {
    let journeys = scale("FLOOD_JOURNEYS", 150);
    let system = System::start().await;
    let sale = system.sale(2000).await;
    // The processes publish and consume.
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
        url: service_kit::settings::Secret::from(service_kit::testing::server("TEST_RABBITMQ_URL").as_str()),
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
    let doors = Doors {
        event: event.base.clone(),
        booking: booking.base.clone(),
        sale: Arc::new(sale),
        next_seat: Arc::new(AtomicUsize::new(0)),
    };

    let mut last = None;
    for _ in 0..MEASURED_MAX {
        let doors = doors.clone();
        let measured = tokio::task::spawn_blocking(move || measure(&doors, journeys)).await.unwrap();
        let (quiet, flooded) = measured.check();
        last = Some((flooded, (quiet * 3 / 2).max(quiet + NOTICED)));
        if last.is_some_and(|(flooded, most)| flooded <= most) {
            break;
        }
    }
    let (flooded, most) = last.unwrap();
    assert!(flooded <= most, "a buyer's p99 is {flooded:?}, and may be {most:?}");
    drop((event, booking));
    system.to_broker.heal();
    system.finish().await;
}

/// The limits' answer is a problem like any other.
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
