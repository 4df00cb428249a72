//! The metrics of a healthy sale, and of each kind of failure.

use std::time::Duration;

use booking_service::app;
use booking_service::audit::AuditWindow;
use booking_service::settings::Settings;
use booking_service::worker::{Audits, audit_again_and_again};
use reqwest::Method;
use serde_json::json;
use service_kit::testing::wait_until;
use uuid::Uuid;

use crate::support::{SOON, System, answer};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sale_can_be_followed_in_the_metrics() {
    let system = System::start().await;
    let sale = system.sale(3).await;
    let (id, user) = system.reserved(&sale, &[0]).await;
    system.reserve(&sale, Uuid::now_v7(), &[0], 409).await;
    system.confirm(&id, user, None, 200).await;
    let (other, other_user) = system.reserved(&sale, &[1]).await;
    system.cancel(&other, other_user, 200).await;
    system.seats_become(&sale, &["sold", "available", "available"]).await;
    for (series, value) in [
        (r#"booking_reservations_total{outcome="created",reason=""}"#, 2.0),
        (r#"booking_reservations_total{outcome="refused",reason="seat_unavailable"}"#, 1.0),
        (r#"booking_reservations_total{outcome="confirmed",reason=""}"#, 1.0),
        (r#"booking_reservations_total{outcome="cancelled",reason=""}"#, 1.0),
        (r#"booking_confirmations_total{outcome="paid",reason=""}"#, 1.0),
        (r#"booking_charges_total{outcome="captured"}"#, 1.0),
        (r#"booking_step_duration_seconds_count{step="reservation.lock"}"#, 3.0),
        (r#"booking_step_duration_seconds_count{step="reservation.write"}"#, 2.0),
        (r#"booking_step_duration_seconds_count{step="payment.complete"}"#, 1.0),
        (r#"booking_seat_locks_total{outcome="busy"}"#, 1.0),
        (r#"http_request_duration_seconds_count{method="POST",route="/api/v1/reservations",status="409"}"#, 1.0),
        (r#"db_pool_connections_max{pool="requests"}"#, 20.0),
        ("booking_event_service_circuit_open", 0.0),
    ] {
        assert_eq!(system.metric(&system.booking_base, series).await, Some(value), "{series}");
    }
    let left = format!(r#"event_session_seats{{event="Concert",session_id="{}",status="available"}}"#, sale.session);
    wait_until("the seats left are shown", SOON, async || system.metric(&system.event_base, &left).await == Some(2.0))
        .await;
    assert_eq!(system.metric(&system.event_base, r#"event_holds_total{outcome="held"}"#).await, Some(2.0));
    assert_eq!(system.metric(&system.event_base, "event_consumer_up").await, Some(1.0));
    wait_until("messages and their delay are counted", SOON, async || {
        let applied = system.metric(&system.event_base, r#"event_consumer_messages_total{result="applied"}"#).await;
        let measured = system.metric(&system.event_base, "event_consumer_lag_seconds_count").await;
        (applied, measured) == (Some(2.0), Some(2.0))
    })
    .await;
    system.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bypassed_lock_a_waiting_event_and_a_repeated_message_are_counted() {
    let system = System::start().await;
    let sale = system.sale(2).await;
    let bypassed = r#"booking_seat_locks_total{outcome="bypassed"}"#;
    assert_eq!(system.metric(&system.booking_base, bypassed).await, Some(0.0));
    system.to_redis.cut();
    let (id, user) = system.reserved(&sale, &[0]).await;
    assert_eq!(system.metric(&system.booking_base, bypassed).await, Some(1.0));
    system.to_redis.heal();

    system.to_broker.cut();
    wait_until("the consumer is shown as down", SOON, async || {
        system.metric(&system.event_base, "event_consumer_up").await == Some(0.0)
    })
    .await;
    system.confirm(&id, user, None, 200).await;
    wait_until("an event is shown as waiting", SOON, async || {
        system.metric(&system.booking_base, "booking_outbox_pending").await == Some(1.0)
            && system.metric(&system.booking_base, "booking_outbox_oldest_age_seconds").await > Some(0.0)
    })
    .await;
    system.to_broker.heal();
    wait_until("the event is published", Duration::from_secs(30), async || {
        system.metric(&system.booking_base, "booking_outbox_published_total").await == Some(1.0)
    })
    .await;
    system.seats_become(&sale, &["sold", "available"]).await;

    let again = json!({ "reservation_id": id });
    answer(system.call(Method::POST, "/api/v1/admin/events/replay", user, Some(&again)).await, 200).await;
    wait_until("the repeat is counted", SOON, async || {
        system.metric(&system.event_base, r#"event_consumer_messages_total{result="duplicate"}"#).await == Some(1.0)
    })
    .await;
    system.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_worker_reports_when_its_tasks_succeeded_and_what_its_audit_found() {
    let system = System::start().await;
    let sale = system.sale(1).await;
    let (id, user) = system.reserved(&sale, &[0]).await;
    system.confirm(&id, user, None, 200).await;
    system.seats_become(&sale, &["sold"]).await;
    // Without its ticket, a sold seat has no owner, which breaks the promise "paid means seated".
    sqlx::query("delete from tickets").execute(&system.app.db).await.unwrap();
    let settings = Settings { event_service_url: system.event_base.clone(), ..system.settings.clone() };
    let worker = app::start(&settings, "booking-worker", &system.lifecycle).await.unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base = format!("http://{}", listener.local_addr().unwrap());
    app::work(&worker, &settings, listener, &system.lifecycle).await.unwrap();
    let ran = async |task: &str| {
        let series = format!(r#"booking_worker_last_success_timestamp_seconds{{task="{task}"}}"#);
        system.metric(&base, &series).await.is_some_and(|when| when > 1.7e9)
    };
    wait_until("the tasks have succeeded", SOON, async || {
        ran("expiry").await && ran("holds").await && ran("refunds").await
    })
    .await;
    let violations = |promise: &str| format!(r#"booking_audit_violations{{promise="{promise}"}}"#);
    assert_eq!(
        system.metric(&base, &violations("paid means seated")).await,
        None,
        "a value is shown before the first audit"
    );
    let stopping = system.lifecycle.token();
    let plan = Audits {
        interval: Duration::from_millis(10),
        window: AuditWindow { settle: Duration::ZERO, late: Duration::from_secs(60) },
        broker: settings.broker.clone(),
        queue: settings.queue.clone(),
    };
    let auditing = audit_again_and_again(&worker, &plan, stopping);
    let seen = wait_until("the audit's findings are shown", Duration::from_secs(30), async || {
        system.metric(&base, &violations("paid means seated")).await >= Some(1.0)
    });
    tokio::select! {
        ended = auditing => panic!("it ended: {ended:?}"),
        _ = seen => {}
    }
    assert_eq!(system.metric(&base, &violations("no seat twice")).await, Some(0.0));
}
