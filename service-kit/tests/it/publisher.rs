//! The publisher and a broker that has run out of memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use service_kit::amqp::{Broker, Outgoing, Publisher};
use service_kit::http::tls::Trust;
use service_kit::process::settings::Secret;
use service_kit::testing::{server, unique, wait_until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use uuid::Uuid;

fn message() -> Outgoing {
    Outgoing {
        message_id: Uuid::now_v7(),
        routing_key: "nobody.listens".into(),
        body: Vec::new(),
        timestamp: 0,
        traceparent: None,
    }
}

/// A broker with a memory alarm: at the first message it reports the alarm to the client, and reads no more until
/// `ends`.
#[expect(clippy::disallowed_methods, reason = "they end with the test")]
async fn alarmed(target: String, accepted: Arc<AtomicUsize>, ends: Arc<Notify>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            accepted.fetch_add(1, Ordering::Relaxed);
            let mut broker = TcpStream::connect(&target).await.unwrap();
            let ends = Arc::clone(&ends);
            tokio::spawn(async move {
                let (mut up, mut down) = (vec![0; 65536], vec![0; 65536]);
                let mut is_reading = true;
                loop {
                    tokio::select! {
                        read = client.read(&mut up), if is_reading => {
                            let Ok(1..) = read else { return };
                            let said = &up[..read.unwrap()];
                            // Class 60, method 40: basic.publish.
                            is_reading = !said.windows(4).any(|window| window == [0, 60, 0, 40]);
                            if is_reading {
                                broker.write_all(said).await.unwrap();
                            } else {
                                // Class 10, method 60: connection.blocked, with a reason.
                                let blocked = [1, 0, 0, 0, 0, 0, 8, 0, 10, 0, 60, 3, b'l', b'o', b'w', 0xCE];
                                client.write_all(&blocked).await.unwrap();
                            }
                        }
                        () = ends.notified(), if !is_reading => {
                            is_reading = true;
                            // Class 10, method 61: connection.unblocked.
                            client.write_all(&[1, 0, 0, 0, 0, 0, 4, 0, 10, 0, 61, 0xCE]).await.unwrap();
                        }
                        read = broker.read(&mut down) => {
                            let Ok(1..) = read else { return };
                            client.write_all(&down[..read.unwrap()]).await.unwrap();
                        }
                    }
                }
            });
        }
    });
    port
}

#[tokio::test]
async fn a_broker_that_takes_nothing_is_left_one_connection_and_not_a_new_one_for_each_try() {
    let url = server("TEST_RABBITMQ_URL");
    let (_, rest) = url.split_once('@').unwrap();
    let (target, _) = rest.split_once('/').unwrap();
    let (accepted, ends) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
    let port = alarmed(target.to_owned(), Arc::clone(&accepted), Arc::clone(&ends)).await;
    let url = Secret::from(url.replacen(target, &format!("127.0.0.1:{port}"), 1).as_str());
    let publisher = Publisher::new(Broker { url, exchange: unique("alarm"), trust: Trust::default() }, "test");
    for _ in 0..3 {
        if publisher.connect_if_needed().await.is_ok() {
            assert!(publisher.publish(&[message()]).await.is_err());
        }
    }
    assert_eq!(accepted.load(Ordering::Relaxed), 1);
    let error = publisher.connect_if_needed().await.unwrap_err();
    assert!(error.to_string().contains("short of memory or disk"), "{error:#}");
    ends.notify_one();
    let goes_on = async || publisher.connect_if_needed().await.is_ok();
    wait_until("the alarm is over", Duration::from_secs(10), goes_on).await;
    assert_eq!(accepted.load(Ordering::Relaxed), 2, "what was given up must not mix with what comes now");
}
