//! No event is lost, and no event that the broker did not accept counts as published.

use std::sync::Arc;
use std::time::Duration;

use booking_service::outbox::{Relayed, Wanted, relay_batch};
use booking_service::workflows::end::expire_due;
use futures::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};
use service_kit::amqp::{Broker, Publisher};
use service_kit::http::tls::Trust;
use service_kit::process::settings::Secret;
use service_kit::testing::{server, unique, wait_until};
use tokio::process::Command;
use uuid::Uuid;

use crate::support::{System, answer};

#[tokio::test]
async fn an_event_that_reaches_no_queue_stays_in_the_outbox() {
    let system = System::start().await;
    let sale = system.sale(1).await;
    system.to_broker.cut(); // So that the service's own relay does not publish it first.
    let (id, user) = system.reserved(&sale, &[0]).await;
    system.confirm(&id, user, None, 200).await;
    let url = Secret::from(server("TEST_RABBITMQ_URL").as_str());
    let nowhere = Publisher::new(Broker { url, exchange: unique("nowhere"), trust: Trust::default() }, "test");
    assert_eq!(
        relay_batch(&system.app.batch_db, &nowhere, Wanted::Urgent).await.unwrap(),
        Relayed { published: 0, left: 1 }
    );
    assert_eq!(system.count("select count(*) from outbox where published_at is null").await, 1);
    system.to_broker.heal();
    system.seats_become(&sale, &["sold"]).await;
    system.finish().await;
}

/// All holds of a hall expire at once, and then a customer pays.
#[tokio::test]
async fn an_urgent_event_does_not_wait_behind_expired_reservations() {
    let system = System::start().await;
    let sale = system.sale(4).await;
    system.to_broker.cut(); // So that the service's own relay does not publish them first.
    for seat in 0..3 {
        system.reserved(&sale, &[seat]).await;
    }
    system.let_reservations_run_out().await;
    assert_eq!(expire_due(&system.app, 100).await.unwrap(), 3);
    let (id, user) = system.reserved(&sale, &[3]).await;
    system.confirm(&id, user, None, 200).await;
    let waiting = async || system.count("select count(*) from outbox where published_at is null").await;
    let url = Secret::from(server("TEST_RABBITMQ_URL").as_str());
    let publisher = Publisher::new(Broker { url, ..system.settings.broker.clone() }, "test");
    assert_eq!(relay_batch(&system.app.batch_db, &publisher, Wanted::Urgent).await.unwrap().published, 1);
    assert_eq!(waiting().await, 3);
    assert_eq!(relay_batch(&system.app.batch_db, &publisher, Wanted::Urgent).await.unwrap(), Relayed::default());
    assert_eq!(relay_batch(&system.app.batch_db, &publisher, Wanted::Expired).await.unwrap().published, 3);
    system.to_broker.heal();
    system.seats_become(&sale, &["available", "available", "available", "sold"]).await;
    system.finish().await;
}

/// More than one batch of undeliverable events, and behind them one deliverable event of each kind.
#[tokio::test]
async fn undeliverable_events_do_not_hold_up_others() {
    let system = System::start().await;
    let sale = system.sale(2).await;
    let stuck = "insert into outbox (id, event_type, reservation_id, sequence, payload, created_at)
                 select gen_random_uuid(), 'nobody.listens', gen_random_uuid(), 1, '{}', now() - interval '1 minute' from generate_series(1, 150)";
    sqlx::query(stuck).execute(&system.app.db).await.unwrap();
    let (id, user) = system.reserved(&sale, &[0]).await;
    system.confirm(&id, user, None, 200).await;
    system.reserved(&sale, &[1]).await;
    system.let_reservations_run_out().await;
    assert_eq!(expire_due(&system.app, 100).await.unwrap(), 1);
    wait_until("both events are published", Duration::from_secs(20), async || {
        let waiting = "select count(*) from outbox where published_at is null and event_type <> 'nobody.listens'";
        system.count(waiting).await == 0
    })
    .await;
    sqlx::query("delete from outbox where event_type = 'nobody.listens'").execute(&system.app.db).await.unwrap();
    system.seats_become(&sale, &["sold", "available"]).await;
    system.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_relays_share_the_work_and_publish_everything() {
    let system = System::start().await;
    let sale = system.sale(30).await;
    for seat in 0..30 {
        let (id, user) = system.reserved(&sale, &[seat]).await;
        system.confirm(&id, user, None, 200).await;
    }
    sqlx::query("update outbox set published_at = null").execute(&system.app.db).await.unwrap();
    let relays = (0..3).map(|_| {
        let db = system.app.batch_db.clone();
        let publisher = Arc::new(Publisher::new(system.settings.broker.clone(), "test"));
        async move { while relay_batch(&db, &publisher, Wanted::Urgent).await.unwrap() != Relayed::default() {} }
    });
    join_all(relays).await;
    // Every event was published twice. The inbox makes the second time harmless.
    system.finish().await;
}

/// The Event Service has lost its inbox and the effects of its messages. One replay applies them all again, and a
/// second replay changes nothing.
#[tokio::test]
async fn a_replay_restores_what_the_receiver_lost_and_changes_nothing_else() {
    let system = System::start().await;
    let sale = system.sale(3).await;
    let admin = Uuid::now_v7();
    let replay = async |body: Value, expected: u16| {
        let response = system.call(Method::POST, "/api/v1/admin/events/replay", admin, Some(&body)).await;
        answer(response, expected).await
    };
    let (first, user) = system.reserved(&sale, &[0]).await;
    system.confirm(&first, user, None, 200).await;
    let (second, user) = system.reserved(&sale, &[1]).await;
    system.confirm(&second, user, None, 200).await;
    system.seats_become(&sale, &["sold", "sold", "available"]).await;
    let lose = "with lost as (delete from inbox)
                update session_seats set status = 'reserved', reserved_until = now() + interval '1 hour', change_xid = pg_current_xact_id()
                where status = 'sold'";
    sqlx::query(lose).execute(&system.event_db).await.unwrap();

    assert_eq!(replay(json!({ "reservation_id": first }), 200).await, json!({ "published": 1, "next_cursor": null }));
    system.seats_become(&sale, &["sold", "reserved", "available"]).await;
    let since = "2020-01-01T00:00:00Z";
    let none = replay(json!({ "from": since, "to": "2020-01-02T00:00:00Z" }), 200).await;
    assert_eq!(none["published"], 0);
    assert_eq!(replay(json!({ "from": since, "event_type": "ticket.refunded" }), 200).await["published"], 0);
    let page = replay(json!({ "from": since, "limit": 1 }), 200).await;
    let rest = replay(json!({ "from": since, "limit": 1, "cursor": page["next_cursor"] }), 200).await;
    let end = replay(json!({ "from": since, "limit": 1, "cursor": rest["next_cursor"] }), 200).await;
    assert_eq!((&page["published"], &rest["published"], &end["published"]), (&json!(1), &json!(1), &json!(0)));
    system.seats_become(&sale, &["sold", "sold", "available"]).await;
    assert_eq!(replay(json!({}), 422).await["errors"][0]["pointer"], "/from");

    let settings = &system.settings;
    let output = Command::new(env!("CARGO_BIN_EXE_booking-service"))
        .args(["replay", "--from", since, "--event-type", "reservation.confirmed"])
        .env("DATABASE_URL", settings.database_url.reveal())
        .env("RABBITMQ_URL", server("TEST_RABBITMQ_URL"))
        .env("RABBITMQ_EXCHANGE", &settings.broker.exchange)
        .output()
        .await
        .unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap().lines().last(), Some("2 events published again"));
    system.to_broker.cut();
    assert_eq!(replay(json!({ "from": since }), 503).await["code"], "broker_unavailable");
    system.to_broker.heal();
    system.finish().await;
}
