//! The process dies at each crash point, between two effects. Whatever it was doing, nothing is lost, doubled or left
//! half-done.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::Duration;

use booking_service::workflows::end::expire_due;
use booking_service::workflows::payment_webhook::{SIGNATURE, sign};
use booking_service::workflows::reconcile::{self, ABANDONED_AFTER, Sweep};
use futures::future::join_all;
use reqwest::{Method, RequestBuilder};
use serde_json::json;
use service_kit::process::settings::Secret;
use service_kit::testing::{server, wait_until};
use uuid::Uuid;

use crate::processes::{self, Process, free_port};
use crate::support::{SOON, Sale, System, WEBHOOK_SECRET, text_of};

/// SIGABRT: the signal that ends a process at a crash point.
const ABORTED: i32 = 6;

const BOOKING: [&str; 4] = ["booking.claimed", "booking.locked", "booking.reserved", "booking.written"];
const PAYMENT: [&str; 4] = ["confirm.leased", "confirm.charged", "confirm.completing", "confirm.completed"];
const OTHERS: [&str; 10] = [
    "cancel.committed",
    "expire.ending",
    "expire.committed",
    "refund.committed",
    "refund.given_back",
    "late_payment.booked_again",
    "relay.published",
    "seats.reserved",
    "consumer.applying",
    "consumer.applied",
];

#[test]
fn each_crash_point_has_a_test() {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut named = BTreeSet::new();
    let mut folders = vec![top.join("booking-service/src"), top.join("event-service/src")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text = fs::read_to_string(path).unwrap();
            named.extend(text.split("crash_point(\"").skip(1).map(|rest| rest.split('"').next().unwrap().to_owned()));
        }
    }
    assert_eq!(named, all().into_iter().map(str::to_owned).collect());
}

/// The names of all crash points.
pub(crate) fn all() -> Vec<&'static str> {
    BOOKING.iter().chain(&PAYMENT).chain(&OTHERS).copied().collect()
}

async fn start_with_crash(system: &System, subcommand: &str, point: &str) -> Process {
    let mut command = processes::booking(&system.settings, subcommand, free_port().await);
    command.env("CRASH_AT", point);
    processes::start(command).await
}

async fn assert_crashed_at(mut process: Process, point: &str) {
    let status = tokio::time::timeout(SOON, process.child.wait()).await;
    let status = status.unwrap_or_else(|_| panic!("{point} was not reached")).unwrap();
    assert_eq!(status.signal(), Some(ABORTED), "{point}: {status}");
}

fn call(system: &System, process: &Process, method: Method, path: &str, user: Uuid) -> RequestBuilder {
    system.http.request(method, format!("{}{path}", process.base)).header("x-user-id", user.to_string())
}

fn booking(system: &System, process: &Process, sale: &Sale, user: Uuid, seats: &[usize]) -> RequestBuilder {
    let request = call(system, process, Method::POST, "/api/v1/reservations", user);
    request.header("idempotency-key", "only").json(&sale.order(seats))
}

/// Does what time and the worker would do: leases, keys and holds run out, and every task of the worker runs.
async fn heal(system: &System) {
    for sql in [
        "update reservations set confirming_until = now() - interval '1 second' where status = 'confirming'",
        "update idempotency_keys set locked_until = now() where status is null",
        "update payments set rebooking_since = now() - interval '1 hour', updated_at = now() - interval '1 hour' where status = 'processing'",
        "update payment_notices set received_at = now() - interval '1 hour' where handled_at is null",
    ] {
        sqlx::query(sql).execute(&system.app.db).await.unwrap();
    }
    while expire_due(&system.app, 100).await.unwrap() > 0 {}
    reconcile::settle_payments(&system.app).await.unwrap();
    reconcile::follow_up_payments(&system.app).await.unwrap();
    reconcile::settle_refunds(&system.app).await.unwrap();
    reconcile::reconcile_once(&system.app, &mut Sweep::default()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_booking_that_crashes_at_any_point_leaves_its_seats_to_the_next_request() {
    let system = System::start().await;
    let sale = system.sale(2 * BOOKING.len() as u32).await;
    let user = Uuid::now_v7();
    let attempts = BOOKING.iter().enumerate().map(async |(index, point)| {
        let process = start_with_crash(&system, "serve", point).await;
        // All attempts use the same key, so each has its own user.
        let user = Uuid::from_u128(user.as_u128() + index as u128);
        let seats = [2 * index, 2 * index + 1];
        assert!(booking(&system, &process, &sale, user, &seats).send().await.is_err(), "{point} gave an answer");
        assert_crashed_at(process, point).await;
        (user, seats, *point)
    });
    let attempts = join_all(attempts).await;
    assert_eq!(
        system.count("select count(*) from reservations").await,
        1,
        "only the last crash point comes after the row"
    );
    tokio::time::sleep(ABANDONED_AFTER + Duration::from_millis(200)).await;
    heal(&system).await;
    assert_eq!(system.statuses(&sale.session).await.iter().filter(|status| *status == "available").count(), 6);
    // The same request under the same key succeeds now, or replays its earlier success.
    let alive = processes::start(processes::booking(&system.settings, "serve", free_port().await)).await;
    for (user, seats, point) in attempts {
        let response = booking(&system, &alive, &sale, user, &seats).send().await.unwrap();
        assert_eq!(response.status(), 201, "{point}: {}", response.text().await.unwrap());
    }
    assert_eq!(system.count("select count(*) from reservations where status = 'active'").await, 4);
    system.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_payment_that_crashes_at_any_point_is_charged_once_and_yields_tickets() {
    let system = System::start().await;
    let sale = system.sale(PAYMENT.len() as u32).await;
    let attempts = PAYMENT.iter().enumerate().map(async |(seat, point)| {
        let (id, user) = system.reserved(&sale, &[seat]).await;
        let process = start_with_crash(&system, "serve", point).await;
        let path = format!("/api/v1/reservations/{id}/confirm");
        let request = call(&system, &process, Method::POST, &path, user).header("idempotency-key", "only");
        assert!(request.send().await.is_err(), "{point} gave an answer");
        assert_crashed_at(process, point).await;
        (id, user)
    });
    let attempts = join_all(attempts).await;
    heal(&system).await;
    for (id, user) in attempts {
        let paid = system.confirm(&id, user, None, 200).await;
        assert_eq!(paid["tickets"].as_array().unwrap().len(), 1);
    }
    assert_eq!(system.count("select count(*) from mock_provider_charges where state = 'captured'").await, 4);
    system.seats_become(&sale, &["sold"; 4]).await;
    system.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancellation_refund_expiry_and_late_payment_survive_a_crash() {
    let system = System::start().await;
    let sale = system.sale(6).await;

    let (id, user) = system.reserved(&sale, &[0]).await;
    let process = start_with_crash(&system, "serve", "cancel.committed").await;
    assert!(call(&system, &process, Method::DELETE, &format!("/api/v1/reservations/{id}"), user).send().await.is_err());
    assert_crashed_at(process, "cancel.committed").await;

    for (seat, point) in [(1, "refund.committed"), (2, "refund.given_back")] {
        let (id, user) = system.reserved(&sale, &[seat]).await;
        let paid = system.confirm(&id, user, None, 200).await;
        let path = format!("/api/v1/tickets/{}/refund", text_of(&paid["tickets"][0], "id"));
        let process = start_with_crash(&system, "serve", point).await;
        assert!(call(&system, &process, Method::POST, &path, user).send().await.is_err(), "{point} gave an answer");
        assert_crashed_at(process, point).await;
        assert_eq!(system.call(Method::POST, &path, user, None).await.status(), 200, "repeated after {point}");
    }

    for (seat, point) in [(3, "expire.ending"), (4, "expire.committed")] {
        system.reserved(&sale, &[seat]).await;
        system.let_reservations_run_out().await;
        assert_crashed_at(start_with_crash(&system, "worker", point).await, point).await;
    }

    let (id, user) = system.reserved(&sale, &[5]).await;
    let accepted = system.confirm(&id, user, Some(json!({ "payment_id": "pay_async" })), 202).await;
    system.let_reservations_run_out().await;
    expire_due(&system.app, 100).await.unwrap();
    let process = start_with_crash(&system, "serve", "late_payment.booked_again").await;
    let notice = json!({ "event_id": "evt", "event_type": "payment.captured", "payment_id": accepted["payment_id"], "amount": 100.00, "currency": "USD" });
    let time = system.count("select extract(epoch from now())::int8").await;
    let signature = sign(&Secret::from(WEBHOOK_SECRET), time, notice.to_string().as_bytes());
    let told = call(&system, &process, Method::POST, "/api/v1/payments/webhook", user).header(SIGNATURE, signature);
    assert!(told.header("content-type", "application/json").body(notice.to_string()).send().await.is_err());
    assert_crashed_at(process, "late_payment.booked_again").await;

    heal(&system).await;
    assert_eq!(system.get(&format!("/api/v1/tickets/user/{user}"), user, 200).await.as_array().unwrap().len(), 1);
    assert_eq!(system.count("select count(*) from mock_provider_refunds").await, 2);
    system.seats_become(&sale, &["available", "available", "available", "available", "available", "sold"]).await;
    system.finish().await;
}

/// A relay that dies before it marks an event as published publishes it again. A consumer that dies before or after its
/// commit receives the message again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_survive_a_crash_on_either_side() {
    let system = System::start().await;
    let sale = system.sale(4).await;
    let mut settings = system.settings.clone();
    settings.broker.url = Secret::from(server("TEST_RABBITMQ_URL").as_str());
    let event_url = system.event_database_url.reveal().to_owned();

    // This process's relay cannot reach the broker, so the relay of the crashing process publishes.
    let (id, user) = system.reserved(&sale, &[0]).await;
    system.to_broker.cut();
    system.confirm(&id, user, None, 200).await;
    let mut command = processes::booking(&settings, "serve", free_port().await);
    command.env("CRASH_AT", "relay.published");
    let child = command.spawn().unwrap();
    assert_crashed_at(Process { child, base: String::new() }, "relay.published").await;
    assert_eq!(system.count("select count(*) from outbox where published_at is null").await, 1);
    system.to_broker.heal();
    system.seats_become(&sale, &["sold", "available", "available", "available"]).await;
    system.consumer_is_up().await;

    for (seat, point) in [(1, "consumer.applying"), (2, "consumer.applied")] {
        let (id, user) = system.reserved(&sale, &[seat]).await;
        // This process's consumer and relay are cut off. A separate, healthy process publishes.
        system.to_broker.cut();
        let mut command = processes::event(&settings, &event_url, free_port().await);
        command.env("CRASH_AT", point);
        let consumer = processes::start(command).await;
        let relay = processes::start(processes::booking(&settings, "serve", free_port().await)).await;
        system.confirm(&id, user, None, 200).await;
        assert_crashed_at(consumer, point).await;
        drop(relay);
        system.to_broker.heal();
        wait_until("the seat is sold", Duration::from_secs(30), async || {
            system.statuses(&sale.session).await[seat] == "sold"
        })
        .await;
        system.consumer_is_up().await;
    }

    // The Event Service dies after it has held the seats and before it answers, so no reservation has them.
    let mut command = processes::event(&settings, &event_url, free_port().await);
    command.env("CRASH_AT", "seats.reserved");
    let process = processes::start(command).await;
    let mut settings = system.settings.clone();
    settings.event_service_url = process.base.clone();
    let booking_process = processes::start(processes::booking(&settings, "serve", free_port().await)).await;
    let response = booking(&system, &booking_process, &sale, user, &[3]).send().await.unwrap();
    assert_eq!(response.status(), 503);
    assert_crashed_at(process, "seats.reserved").await;
    assert_eq!(system.statuses(&sale.session).await[3], "reserved", "the hold was freed too early");
    tokio::time::sleep(ABANDONED_AFTER + Duration::from_millis(200)).await;
    heal(&system).await;
    assert_eq!(system.statuses(&sale.session).await[3], "available");
    system.finish().await;
}
