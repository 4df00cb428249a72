//! Dead letters can be listed, requeued once their cause is fixed, or dropped.

use reqwest::Method;
use service_kit::amqp::dead_letters::{self, DeadLetter, Which};
use service_kit::amqp::dead_letters_of;
use service_kit::testing::wait_until;
use shared_contracts::booking_event::BookingEventType;
use shared_contracts::ids::ReservationId;
use tokio::process::Command;

use crate::booking_consumer::{SOON, consumer_is_up, event, message, message_of, publish, reserve};
use crate::support::TestApp;

async fn wait_for_dead_letters(app: &TestApp, count: u32) {
    wait_until(&format!("{count} messages are dead-lettered"), SOON, async || {
        app.broker.messages_in(&dead_letters_of(&app.queue)).await.unwrap() == count
    })
    .await;
}

#[tokio::test]
async fn a_requeued_dead_letter_is_applied_once_its_cause_is_fixed() {
    let app = TestApp::spawn().await;
    consumer_is_up(&app).await;
    let (session, seats) = app.session(1).await;
    let owner = ReservationId::new();
    // The reservation does not hold this seat, so the consumer dead-letters the message without a retry.
    let confirmed = message_of(&event(BookingEventType::Confirmed, owner, &seats, 1));
    let nonsense = message(b"nonsense".to_vec(), BookingEventType::Expired);
    publish(&app, &[confirmed.clone(), nonsense.clone()]).await;
    wait_for_dead_letters(&app, 2).await;

    let shown = async |series: &str| {
        let text = app.call(Method::GET, "/metrics", None).await.text().await.unwrap();
        text.lines().any(|line| line == series)
    };
    wait_until("the metrics count both messages", SOON, async || shown("event_consumer_dead_letters 2").await).await;
    assert!(shown(r#"event_consumer_messages_total{result="dead_lettered"} 2"#).await);

    let listed = dead_letters::list(&app.broker, &app.queue, 10).await.unwrap();
    let of = |letters: &[DeadLetter], id| letters.iter().find(|letter| letter.message_id == Some(id)).cloned().unwrap();
    let letter = of(&listed, confirmed.message_id);
    assert_eq!(letter.routing_key, "reservation.confirmed");
    assert!(letter.reason.contains("does not hold"), "{letter:?}");
    assert!(letter.body.contains(&owner.to_string()), "{letter:?}");
    assert_eq!(of(&listed, nonsense.message_id).body, "nonsense");
    wait_for_dead_letters(&app, 2).await; // Listing removes nothing.

    reserve(&app, &session, owner, &seats).await;
    let sent = dead_letters::requeue(&app.broker, &app.queue, &Which::These(vec![confirmed.message_id])).await.unwrap();
    assert_eq!(sent.len(), 1);
    wait_until("the seat is sold", SOON, async || app.statuses(&session).await == ["sold"]).await;
    wait_for_dead_letters(&app, 1).await;

    // A message that still can't be applied is dead-lettered again, with the same id and a reason.
    dead_letters::requeue(&app.broker, &app.queue, &Which::All).await.unwrap();
    wait_for_dead_letters(&app, 1).await;
    let again = of(&dead_letters::list(&app.broker, &app.queue, 10).await.unwrap(), nonsense.message_id);
    assert_eq!(
        (again.routing_key.as_str(), again.reason.contains("not a booking event")),
        ("reservation.expired", true)
    );
    assert_eq!(dead_letters::drop(&app.broker, &app.queue, &Which::All).await.unwrap().len(), 1);
    wait_for_dead_letters(&app, 0).await;
}

#[tokio::test]
async fn the_command_lists_and_drops_dead_letters() {
    let app = TestApp::spawn().await;
    consumer_is_up(&app).await;
    let messages: Vec<_> = (0..3).map(|_| message(b"nonsense".to_vec(), BookingEventType::Expired)).collect();
    publish(&app, &messages).await;
    wait_for_dead_letters(&app, 3).await;
    let run = async |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_event-service"));
        command.arg("dead-letters").args(arguments);
        command.env("RABBITMQ_URL", app.broker.url.reveal()).env("RABBITMQ_QUEUE", &app.queue);
        let output = command.output().await.unwrap();
        (output.status.success(), String::from_utf8(output.stdout).unwrap())
    };
    let (listed, text) = run(&["list", "--limit", "2"]).await;
    assert_eq!((listed, text.lines().count()), (true, 2), "{text}");
    let first = messages[0].message_id.to_string();
    let (dropped, text) = run(&["drop", &first]).await;
    assert!(dropped && text.contains(&first), "{text}");
    wait_for_dead_letters(&app, 2).await;
    assert!(!run(&["drop"]).await.0, "drop without ids or --all was accepted");
    let (dropped, text) = run(&["drop", "--all"]).await;
    assert_eq!((dropped, text.lines().count()), (true, 2), "{text}");
    wait_for_dead_letters(&app, 0).await;
}
