//! Buyers that remember what they were told. Every request ends done, refused or unknown. What a buyer was told is done
//! must be so at the end.

use std::collections::{BTreeMap, HashMap};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use booking_service::workflows::payment_webhook::{SIGNATURE, sign};
use chrono::{DateTime, Utc};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use reqwest::{Client, RequestBuilder};
use serde_json::{Value, json};
use service_kit::process::settings::Secret;
use sqlx::PgPool;
use uuid::Uuid;

use crate::support::{Sale, WEBHOOK_SECRET, text_of};

/// After this time a buyer gives a request up, and does not know what became of it.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(4);
/// How often a buyer sends a request whose outcome is unknown, at any replica and under the same key.
const TRIES_MAX: u32 = 6;
/// Half of all orders are for these seats.
const HOT_SEATS: usize = 10;
/// The largest difference between the time in a row and a buyer's. Both use one clock, but the row's is cut to
/// microseconds.
const CLOCK_STEP: Duration = Duration::from_millis(5);

/// How a request ended.
enum Answer {
    Done(u16, Value),
    Refused(u16, Value),
    Unknown,
}

/// A reservation that a buyer was told of with `201`.
struct Promise {
    id: Uuid,
    user: Uuid,
    /// When the buyer first asked for it, and when the answer came.
    asked: SystemTime,
    told: SystemTime,
    /// Its seats, and until when each certainly belonged to it.
    seats: Vec<(usize, SystemTime)>,
    cancelled: bool,
    /// The tickets that the buyer was told of, and whether each was reported as refunded.
    tickets: HashMap<Uuid, bool>,
}

/// The sale and its buyers, with all that they were told.
pub(super) struct Market {
    pub(super) sale: Sale,
    bookings: Vec<String>,
    events: String,
    http: Client,
    closed: AtomicBool,
    promises: Mutex<Vec<Promise>>,
    /// Charges that the provider is processing, with their sums. Each must get its notice in the end.
    pub(super) awaited: Mutex<Vec<(Uuid, f64)>>,
    /// How many requests of each kind ended done, refused and unknown.
    tally: Mutex<BTreeMap<&'static str, [usize; 3]>>,
    codes: Mutex<BTreeMap<String, usize>>,
    /// Answers that nobody should ever get.
    pub(super) complaints: Mutex<Vec<String>>,
}

impl Market {
    /// Opens a sale at these Booking Services and this Event Service.
    pub(super) fn open(sale: Sale, bookings: Vec<String>, events: String) -> Self {
        Self {
            sale,
            bookings,
            events,
            http: Client::builder().timeout(REQUEST_TIMEOUT).build().unwrap(),
            closed: AtomicBool::new(false),
            promises: Mutex::default(),
            awaited: Mutex::default(),
            tally: Mutex::default(),
            codes: Mutex::default(),
            complaints: Mutex::default(),
        }
    }

    /// The buyers finish their current requests, and no more buyers come.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
    }

    /// One buyer follows the other, until the market closes.
    pub(super) async fn serve_buyers(&self, seed: u64) {
        let mut rng = StdRng::seed_from_u64(seed);
        while !self.closed.load(Ordering::Relaxed) {
            if rng.random_bool(0.2) {
                let path = format!("{}/api/v1/sessions/{}/seats", self.events, self.sale.session);
                let _ = self.ask("seats", self.http.get(path)).await;
            }
            self.serve_one(&mut rng).await;
            tokio::time::sleep(Duration::from_millis(rng.random_range(0..30))).await;
        }
    }

    async fn serve_one(&self, rng: &mut StdRng) {
        let Some(mut promise) = self.book(rng).await else { return };
        let path = format!("/api/v1/reservations/{}", promise.id);
        match self.ask("get", self.at_any(rng, reqwest::Method::GET, &path, promise.user)).await {
            Answer::Refused(404, body) => {
                self.complain(format!("reservation {} was told with 201 and is not found: {body}", promise.id))
            }
            _ => match rng.random_range(0..100) {
                0..50 => self.pay(rng, &mut promise).await,
                50..70 => self.cancel(rng, &mut promise).await,
                _ => {}
            },
        }
        self.promises.lock().unwrap().push(promise);
    }

    async fn book(&self, rng: &mut StdRng) -> Option<Promise> {
        let (user, count) = (Uuid::now_v7(), rng.random_range(1..=3));
        let among = if rng.random_bool(0.5) { HOT_SEATS } else { self.sale.seats.len() };
        let seats = rand::seq::index::sample(rng, among, count).into_vec();
        let order = self.sale.order(&seats);
        let asked = SystemTime::now();
        let answer = self.insist("reserve", rng, "/api/v1/reservations", user, &order).await;
        let Answer::Done(201, made) = answer else { return None };
        let expiry: DateTime<Utc> = text_of(&made, "expiry_time").parse().unwrap();
        let until = SystemTime::from(expiry) - CLOCK_STEP;
        Some(Promise {
            id: text_of(&made, "id").parse().unwrap(),
            user,
            asked,
            told: SystemTime::now(),
            seats: seats.into_iter().map(|seat| (seat, until)).collect(),
            cancelled: false,
            tickets: HashMap::new(),
        })
    }

    async fn pay(&self, rng: &mut StdRng, promise: &mut Promise) {
        let means = *[
            "pay_card",
            "pay_card",
            "pay_card",
            "pay_card",
            "pay_decline",
            "pay_timeout_charged",
            "pay_timeout_lost",
            "pay_async",
        ]
        .choose(rng)
        .unwrap();
        let (path, user) = (format!("/api/v1/reservations/{}/confirm", promise.id), promise.user);
        let answer = self.insist("confirm", rng, &path, user, &json!({ "payment_id": means })).await;
        match answer {
            Answer::Done(200, paid) => {
                for ticket in paid["tickets"].as_array().unwrap() {
                    promise.tickets.insert(text_of(ticket, "id").parse().unwrap(), false);
                }
                if promise.tickets.len() != promise.seats.len() {
                    self.complain(format!(
                        "reservation {} is paid, with {} tickets",
                        promise.id,
                        promise.tickets.len()
                    ));
                }
                // The seats belong to the buyer until the tickets are refunded.
                let years_on = SystemTime::now() + Duration::from_secs(1 << 30);
                promise.seats.iter_mut().for_each(|(_, until)| *until = years_on);
                self.refund_most(rng, promise).await;
            }
            Answer::Done(202, accepted) => {
                let charge =
                    (text_of(&accepted, "payment_id").parse().unwrap(), accepted["total_amount"].as_f64().unwrap());
                tokio::time::sleep(Duration::from_millis(rng.random_range(0..1000))).await;
                if !self.notice(rng, charge).await {
                    self.awaited.lock().unwrap().push(charge);
                }
            }
            _ => {}
        }
    }

    async fn cancel(&self, rng: &mut StdRng, promise: &mut Promise) {
        let now = SystemTime::now();
        promise.seats.iter_mut().for_each(|(_, until)| *until = now.min(*until));
        let request =
            self.at_any(rng, reqwest::Method::DELETE, &format!("/api/v1/reservations/{}", promise.id), promise.user);
        promise.cancelled = matches!(self.ask("cancel", request).await, Answer::Done(..));
    }

    /// Refunds most tickets. Otherwise the hall would soon be sold out.
    async fn refund_most(&self, rng: &mut StdRng, promise: &mut Promise) {
        let tickets: Vec<Uuid> = promise.tickets.keys().copied().collect();
        for ticket in tickets {
            if rng.random_bool(0.05) {
                continue;
            }
            let now = SystemTime::now();
            promise.seats.iter_mut().for_each(|(_, until)| *until = now.min(*until));
            let request =
                self.at_any(rng, reqwest::Method::POST, &format!("/api/v1/tickets/{ticket}/refund"), promise.user);
            let refunded = matches!(self.ask("refund", request).await, Answer::Done(..));
            promise.tickets.insert(ticket, refunded);
        }
    }

    /// Sends the provider's notice of how a charge ended, sometimes twice. Returns whether it was accepted.
    pub(super) async fn notice(&self, rng: &mut StdRng, (charge, amount): (Uuid, f64)) -> bool {
        let kind = if charge.as_u128() % 5 == 0 { "payment.declined" } else { "payment.captured" };
        let notice = json!({ "event_id": format!("evt_{charge}"), "event_type": kind, "payment_id": charge, "amount": amount, "currency": "USD" });
        let (body, mut heard) = (notice.to_string(), false);
        for _ in 0..rng.random_range(1..=2) {
            let now = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs() as i64;
            let signature = sign(&Secret::from(WEBHOOK_SECRET), now, body.as_bytes());
            let request = self.at_any(rng, reqwest::Method::POST, "/api/v1/payments/webhook", Uuid::nil());
            let request =
                request.header(SIGNATURE, signature).header("content-type", "application/json").body(body.clone());
            heard |= matches!(self.ask("notice", request).await, Answer::Done(..));
        }
        heard
    }

    fn at_any(&self, rng: &mut StdRng, method: reqwest::Method, path: &str, user: Uuid) -> RequestBuilder {
        let base = self.bookings.choose(rng).unwrap();
        self.http.request(method, format!("{base}{path}")).header("x-user-id", user.to_string())
    }

    /// Repeats the request under one key while its outcome is unknown, or while another try is still in progress.
    async fn insist(&self, kind: &'static str, rng: &mut StdRng, path: &str, user: Uuid, body: &Value) -> Answer {
        let key = Uuid::now_v7().to_string();
        for _ in 0..TRIES_MAX {
            let request = self.at_any(rng, reqwest::Method::POST, path, user).header("idempotency-key", &key);
            match self.ask(kind, request.json(body)).await {
                Answer::Refused(409, body) if body["code"] == "idempotency_key_in_flight" => {}
                Answer::Unknown => {}
                known => return known,
            }
            tokio::time::sleep(Duration::from_millis(rng.random_range(50..400))).await;
        }
        Answer::Unknown
    }

    async fn ask(&self, kind: &'static str, request: RequestBuilder) -> Answer {
        let answer = match request.send().await {
            Err(_) => Answer::Unknown,
            Ok(response) => {
                let status = response.status().as_u16();
                match response.json::<Value>().await {
                    Err(_) => Answer::Unknown,
                    Ok(body) if status < 400 => Answer::Done(status, body),
                    Ok(body) if status == 500 => {
                        self.complain(format!("{kind} was answered {status}: {body}"));
                        Answer::Unknown
                    }
                    Ok(body) => Answer::Refused(status, body),
                }
            }
        };
        let ended = match &answer {
            Answer::Done(..) => 0,
            Answer::Refused(status, body) => {
                let code = format!("{kind}: {status} {}", body["code"].as_str().unwrap_or("without a code"));
                *self.codes.lock().unwrap().entry(code).or_default() += 1;
                1
            }
            Answer::Unknown => 2,
        };
        self.tally.lock().unwrap().entry(kind).or_default()[ended] += 1;
        answer
    }

    fn complain(&self, complaint: String) {
        self.complaints.lock().unwrap().push(complaint);
    }

    /// Requests that have ended.
    pub(super) fn operations(&self) -> usize {
        self.tally.lock().unwrap().values().flatten().sum()
    }

    /// How often this refusal was answered.
    pub(super) fn refusals(&self, code: &str) -> usize {
        self.codes.lock().unwrap().get(code).copied().unwrap_or_default()
    }

    /// All counts, as text.
    pub(super) fn summary(&self) -> String {
        let mut text = String::from("requests: done, refused, unknown\n");
        for (kind, [done, refused, unknown]) in &*self.tally.lock().unwrap() {
            text += &format!("  {kind:<8} {done:>7} {refused:>7} {unknown:>7}\n");
        }
        text += "refusals\n";
        for (code, count) in &*self.codes.lock().unwrap() {
            text += &format!("  {count:>7}  {code}\n");
        }
        text
    }

    /// Compares what buyers were told with the database, and with what other buyers were told.
    pub(super) async fn broken_promises(&self, db: &PgPool) -> Vec<String> {
        let rows: Vec<(Uuid, Uuid, String, i32)> =
            sqlx::query_as("select id, user_id, status, seats_count from reservations").fetch_all(db).await.unwrap();
        let rows: HashMap<_, _> =
            rows.into_iter().map(|(id, user, status, seats)| (id, (user, status, seats))).collect();
        let tickets: Vec<(Uuid, Uuid, String)> =
            sqlx::query_as("select id, reservation_id, status from tickets").fetch_all(db).await.unwrap();
        let tickets: HashMap<_, _> = tickets.into_iter().map(|(id, owner, status)| (id, (owner, status))).collect();

        let mut broken = Vec::new();
        let promises = self.promises.lock().unwrap();
        for promise in &*promises {
            let id = promise.id;
            let Some((user, status, seats)) = rows.get(&id) else {
                broken.push(format!("reservation {id} was told with 201 and does not exist"));
                continue;
            };
            if *user != promise.user || *seats != promise.seats.len() as i32 {
                broken.push(format!("reservation {id} is not what was told"));
            }
            if promise.cancelled && status != "cancelled" {
                broken.push(format!("reservation {id} was told to be cancelled and is {status}"));
            }
            if !promise.tickets.is_empty() && !["confirmed", "refunded"].contains(&status.as_str()) {
                broken.push(format!("reservation {id} was told to be paid and is {status}"));
            }
            for (ticket, refunded) in &promise.tickets {
                match tickets.get(ticket) {
                    Some((owner, status)) if *owner == id && (!refunded || status == "refunded") => {}
                    other => broken.push(format!("ticket {ticket} of {id} (refunded: {refunded}) is {other:?}")),
                }
            }
        }
        broken.extend(seats_told_twice(&promises));
        broken
    }
}

/// Reservations that were requested and confirmed while another one certainly had the same seat.
fn seats_told_twice(promises: &[Promise]) -> Vec<String> {
    let mut by_seat: HashMap<usize, Vec<(&Promise, SystemTime)>> = HashMap::new();
    for promise in promises {
        for (seat, until) in &promise.seats {
            by_seat.entry(*seat).or_default().push((promise, *until));
        }
    }
    let mut twice = Vec::new();
    for (seat, owners) in by_seat {
        for (first, until) in &owners {
            let during = owners
                .iter()
                .filter(|(second, _)| first.told <= second.asked && second.told <= *until && first.id != second.id);
            twice.extend(
                during.map(|(second, _)| format!("seat {seat} was told to {} while {} had it", second.id, first.id)),
            );
        }
    }
    twice
}

#[test]
fn a_seat_given_to_two_buyers_is_noticed() {
    let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    let promise = |asked, told, until| Promise {
        id: Uuid::now_v7(),
        user: Uuid::nil(),
        asked: at(asked),
        told: at(told),
        seats: vec![(7, at(until))],
        cancelled: false,
        tickets: HashMap::new(),
    };
    assert_eq!(seats_told_twice(&[promise(0, 1, 10), promise(2, 3, 12)]).len(), 1);
    // The second was told when the first may have ended, or was requested before the first was told.
    assert_eq!(seats_told_twice(&[promise(0, 1, 10), promise(9, 11, 20)]).len(), 0);
    assert_eq!(seats_told_twice(&[promise(0, 4, 10), promise(2, 20, 30)]).len(), 0);
}
