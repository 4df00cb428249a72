//! Messages from the Booking Service are applied once and in any order. Those that can't be applied are dead-lettered.

use std::sync::Arc;
use std::time::Duration;

use event_service::booking_consumer::{Applied, apply};
use lapin::options::{BasicGetOptions, QueueDeleteOptions};
use lapin::{Channel, Connection, ConnectionProperties};
use serde_json::json;
use service_kit::amqp::{Outgoing, Published, Publisher};
use service_kit::postgres::database::begin;
use service_kit::testing::wait_until;
use shared_contracts::booking_event::{BookingEvent, BookingEventType, SCHEMA_VERSION};
use shared_contracts::ids::{MessageId, ReservationId, SessionSeatId, UserId};
use uuid::Uuid;

use crate::support::TestApp;

pub(crate) const SOON: Duration = Duration::from_secs(10);

pub(crate) fn event(
    event_type: BookingEventType,
    owner: ReservationId,
    seats: &[String],
    sequence: i64,
) -> BookingEvent {
    BookingEvent {
        event_id: MessageId::new(),
        event_type,
        schema_version: SCHEMA_VERSION,
        occurred_at: "2026-01-01T00:00:00Z".parse().unwrap(),
        reservation_id: owner,
        user_id: UserId::new(),
        session_id: Uuid::now_v7().into(),
        session_seat_ids: seats.iter().map(|id| id.parse::<SessionSeatId>().unwrap()).collect(),
        sequence,
        ticket_ids: Vec::new(),
        amount: None,
        currency: None,
    }
}

pub(crate) fn message(body: Vec<u8>, event_type: BookingEventType) -> Outgoing {
    Outgoing {
        message_id: Uuid::now_v7(),
        routing_key: event_type.routing_key().into(),
        body,
        timestamp: 0,
        traceparent: None,
    }
}

pub(crate) fn message_of(event: &BookingEvent) -> Outgoing {
    message(serde_json::to_vec(event).unwrap(), event.event_type)
}

pub(crate) async fn reserve(app: &TestApp, session: &str, owner: ReservationId, seats: &[String]) {
    let hold = json!({ "reservation_id": owner, "session_seat_ids": seats, "reserved_until": "2031-01-01T00:00:00Z" });
    app.post(&format!("/api/internal/sessions/{session}/seats/reserve"), &hold, 200).await;
}

pub(crate) async fn publish(app: &TestApp, messages: &[Outgoing]) {
    let publisher = Publisher::new(app.broker.clone(), "test");
    publisher.connect_if_needed().await.unwrap();
    let outcomes = publisher.publish(messages).await.unwrap();
    assert!(outcomes.iter().all(|outcome| *outcome == Published::Confirmed), "{outcomes:?}");
}

pub(crate) async fn consumer_is_up(app: &TestApp) {
    wait_until("the consumer is up", SOON, async || app.get("/health", 200).await["checks"]["rabbitmq"] == "up").await;
}

async fn channel(app: &TestApp) -> (Connection, Channel) {
    let connection = Connection::connect(app.broker.url.reveal(), ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    (connection, channel)
}

#[tokio::test]
async fn messages_change_seats_and_a_repeat_changes_nothing() {
    let app = TestApp::spawn().await;
    consumer_is_up(&app).await;
    let (session, seats) = app.session(2).await;
    let owner = ReservationId::new();
    reserve(&app, &session, owner, &seats).await;
    let confirmed = event(BookingEventType::Confirmed, owner, &seats, 1);
    publish(&app, &[message_of(&confirmed), message_of(&confirmed)]).await;
    wait_until("both seats are sold", SOON, async || app.statuses(&session).await == ["sold", "sold"]).await;
    publish(&app, &[message_of(&event(BookingEventType::TicketRefunded, owner, &seats[..1], 2))]).await;
    wait_until("one seat is free", SOON, async || app.statuses(&session).await == ["available", "sold"]).await;
    publish(&app, &[message_of(&confirmed)]).await;
    publish(&app, &[message_of(&event(BookingEventType::TicketRefunded, owner, &seats[1..], 3))]).await;
    wait_until("the repeat changed nothing", SOON, async || app.statuses(&session).await == ["available", "available"])
        .await;
}

/// One confirmation and the refunds of two tickets, in every order, with each message delivered twice.
#[tokio::test]
async fn the_order_of_messages_does_not_matter() {
    let app = TestApp::spawn().await;
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        let (session, seats) = app.session(3).await;
        let owner = ReservationId::new();
        reserve(&app, &session, owner, &seats).await;
        let events = [
            event(BookingEventType::Confirmed, owner, &seats, 1),
            event(BookingEventType::TicketRefunded, owner, &seats[..1], 2),
            event(BookingEventType::TicketRefunded, owner, &seats[2..], 3),
        ];
        for index in order {
            let applied = apply(&app.db, &events[index]).await.unwrap();
            assert!(matches!(applied, Applied::Changed | Applied::Stale), "{order:?}: {applied:?}");
            assert_eq!(apply(&app.db, &events[index]).await.unwrap(), Applied::Repeat);
        }
        assert_eq!(app.statuses(&session).await, ["available", "sold", "available"], "{order:?}");
    }
}

#[tokio::test]
async fn a_late_expiry_does_not_free_a_seat_with_a_new_owner() {
    let app = TestApp::spawn().await;
    let (session, seats) = app.session(1).await;
    let (old, new) = (ReservationId::new(), ReservationId::new());
    reserve(&app, &session, old, &seats).await;
    app.post(
        &format!("/api/internal/sessions/{session}/seats/release"),
        &json!({ "reservation_id": old, "session_seat_ids": seats }),
        200,
    )
    .await;
    reserve(&app, &session, new, &seats).await;
    apply(&app.db, &event(BookingEventType::Expired, old, &seats, 1)).await.unwrap();
    apply(&app.db, &event(BookingEventType::Cancelled, old, &seats, 1)).await.unwrap();
    assert_eq!(app.statuses(&session).await, ["reserved"]);
}

/// A batch confirms one seat and frees another. While another transaction has the first seat locked, the batch must not
/// lock the second: a booking locks both seats in order, so the two would deadlock.
#[tokio::test]
async fn a_batch_of_messages_locks_all_its_seats_before_it_changes_any() {
    let app = TestApp::spawn().await;
    consumer_is_up(&app).await;
    let (session, mut seats) = app.session(2).await;
    seats.sort();
    let (first, last) = seats.split_at(1);
    let (leaver, buyer) = (ReservationId::new(), ReservationId::new());
    reserve(&app, &session, leaver, first).await;
    reserve(&app, &session, buyer, last).await;
    let mut other = begin(&app.db).await.unwrap();
    let lock = "select 1 from session_seats where session_seat_id = $1::uuid for update nowait";
    sqlx::query(lock).bind(&first[0]).execute(&mut *other).await.unwrap();
    let cancelled = event(BookingEventType::Cancelled, leaver, first, 1);
    publish(&app, &[message_of(&event(BookingEventType::Confirmed, buyer, last, 1)), message_of(&cancelled)]).await;
    wait_until("the batch waits for a lock", SOON, async || app.waits_for_a_lock().await).await;
    sqlx::query(lock).bind(&last[0]).execute(&mut *other).await.expect("nobody has the last seat locked");
    other.commit().await.unwrap();
    wait_until("both are applied", SOON, async || {
        let mut statuses = app.statuses(&session).await;
        statuses.sort();
        statuses == ["available", "sold"]
    })
    .await;
}

#[tokio::test]
async fn a_bad_message_is_dead_lettered_with_its_reason_and_the_others_are_applied() {
    let app = TestApp::spawn().await;
    consumer_is_up(&app).await;
    let (session, seats) = app.session(1).await;
    let owner = ReservationId::new();
    reserve(&app, &session, owner, &seats).await;
    let newer =
        BookingEvent { schema_version: SCHEMA_VERSION + 1, ..event(BookingEventType::Confirmed, owner, &seats, 1) };
    let not_held = event(BookingEventType::Confirmed, ReservationId::new(), &seats, 1);
    publish(
        &app,
        &[
            message(b"not json".to_vec(), BookingEventType::Confirmed),
            message_of(&newer),
            message_of(&not_held),
            message_of(&event(BookingEventType::Confirmed, owner, &seats, 1)),
        ],
    )
    .await;
    wait_until("the good message is applied", SOON, async || app.statuses(&session).await == ["sold"]).await;

    let (_connection, channel) = channel(&app).await;
    let dead = format!("{}.dead", app.queue);
    let mut reasons = Vec::new();
    while reasons.len() < 3 {
        if let Some(message) = channel.basic_get(dead.as_str().into(), BasicGetOptions { no_ack: true }).await.unwrap()
        {
            let headers = message.properties.headers().clone().unwrap();
            reasons.push(headers.inner()["x-reason"].as_long_string().unwrap().to_string());
            assert_eq!(
                headers.inner()["x-original-routing-key"].as_long_string().unwrap().to_string(),
                "reservation.confirmed"
            );
        }
    }
    reasons.sort();
    assert!(reasons[0].contains("does not hold"), "{reasons:?}");
    assert!(reasons[1].contains("schema version 2"), "{reasons:?}");
    assert!(reasons[2].contains("not a booking event"), "{reasons:?}");
}

/// RabbitMQ ends the consumer without an error when its queue is deleted. A client that watches only for errors would
/// never consume again.
#[tokio::test]
async fn the_consumer_restarts_after_its_queue_is_deleted() {
    let app = TestApp::spawn().await;
    consumer_is_up(&app).await;
    let (_connection, channel) = channel(&app).await;
    channel.queue_delete(app.queue.as_str().into(), QueueDeleteOptions::default()).await.unwrap();
    let (session, seats) = app.session(1).await;
    let owner = ReservationId::new();
    reserve(&app, &session, owner, &seats).await;
    let confirmed = message_of(&event(BookingEventType::Confirmed, owner, &seats, 1));
    let publisher = Arc::new(Publisher::new(app.broker.clone(), "test"));
    // Until the queue exists again, the broker returns the message as unroutable.
    wait_until("the queue exists again", Duration::from_secs(30), async || {
        publisher.connect_if_needed().await.unwrap();
        publisher.publish(std::slice::from_ref(&confirmed)).await.unwrap() == [Published::Confirmed]
    })
    .await;
    wait_until("the seat is sold", SOON, async || app.statuses(&session).await == ["sold"]).await;
}
