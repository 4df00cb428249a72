//! No event is lost, and none that the broker did not take counts as published.

use std::sync::Arc;

use booking_service::outbox::{Relayed, relay_batch};
use futures::future::join_all;
use service_kit::amqp::{Broker, Publisher};
use service_kit::testing::unique;

use crate::support::System;

#[tokio::test]
async fn an_event_that_no_queue_takes_stays_in_the_outbox() {
    let system = System::start().await;
    let sale = system.sale(1).await;
    system.to_broker.cut(); // So that the service's own relay does not publish it first.
    let (id, user) = system.reserved(&sale, &[0]).await;
    system.confirm(&id, user, None, 200).await;
    let url = service_kit::settings::Secret::from(service_kit::testing::server("TEST_RABBITMQ_URL").as_str());
    let nowhere = Publisher::new(Broker { url, exchange: unique("nowhere") }, "test");
    assert_eq!(relay_batch(&system.app.db, &nowhere).await.unwrap(), Relayed { published: 0, left: 1 });
    assert_eq!(system.count("select count(*) from outbox where published_at is null").await, 1);
    system.to_broker.heal();
    system.seats_become(&sale, &["sold"]).await;
    system.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_relays_share_the_work_and_publish_everything() {
    let system = System::start().await;
    let sale = system.sale(30).await;
    for seat in 0..30 {
        let (id, user) = system.reserved(&sale, &[seat]).await;
        system.confirm(&id, user, None, 200).await;
    }
    sqlx::query("update outbox set published_at = null").execute(&system.app.db).await.unwrap();
    let relays = (0..3).map(|_| {
        let db = system.app.db.clone();
        let publisher = Arc::new(Publisher::new(system.settings.broker.clone(), "test"));
        async move { while relay_batch(&db, &publisher).await.unwrap() != Relayed::default() {} }
    });
    join_all(relays).await;
    // Everything was published twice; the inbox makes the second time harmless.
    system.finish().await;
}
