//! The process is killed in the middle of its work.

use std::time::Duration;

use booking_service::settings::Settings;
use booking_service::workflows::reconcile::{ABANDONED_AFTER, Sweep, reconcile_once};
use futures::future::join_all;
use reqwest::Client;
use service_kit::testing::wait_until;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use uuid::Uuid;

use crate::processes::{self, Process, free_port};
use crate::support::System;

/// Starts `serve` or `worker` as a process. It reaches the Event Service directly, not through the test's proxy.
pub(crate) async fn spawn(system: &System, subcommand: &str) -> Process {
    let settings = Settings { event_service_url: system.event_base.clone(), ..system.settings.clone() };
    processes::start(processes::booking(&settings, subcommand, free_port().await)).await
}

/// The process dies during two hundred bookings of two seats each. Afterwards every hold has a reservation, every
/// reservation has all its seats, and every buyer that was told `201` has a reservation.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigkill_during_two_hundred_bookings_leaves_nothing_half_done() {
    let system = System::start().await;
    let sale = system.sale(400).await;
    let Process { child: mut process, base } = spawn(&system, "serve").await;
    let http = Client::builder().build().unwrap();
    let buyers = (0..200).map(|buyer| {
        let request = http.post(format!("{base}/api/v1/reservations")).header("x-user-id", Uuid::now_v7().to_string());
        let request = request.json(&sale.order(&[buyer * 2, buyer * 2 + 1]));
        async move { request.send().await.is_ok_and(|response| response.status() == 201) }
    });
    let killer = async {
        wait_until("some bookings are done and others are not", Duration::from_secs(20), async || {
            system.count("select count(*) from reservations").await >= 20
        })
        .await;
        process.kill().await.unwrap();
    };
    let (answers, ()) = tokio::join!(join_all(buyers), killer);
    let told = answers.into_iter().filter(|told| *told).count() as i64;
    let written = system.count("select count(*) from reservations").await;
    assert!(written >= told, "{told} were told 201, {written} reservations exist");
    assert!(written < 200, "the process died too late for this test to have tested anything");

    let _process = spawn(&system, "serve").await;
    // Once the unwritten bookings are too old to be written, one round of reconciliation frees what they held.
    tokio::time::sleep(ABANDONED_AFTER + Duration::from_millis(200)).await;
    let healed = reconcile_once(&system.app, &mut Sweep::default()).await.unwrap();
    println!("{told} told, {written} written, {healed:?}");
    system.finish().await;
}

/// A thousand requests share one Idempotency-Key. The process dies after it has held the seats and before it writes the
/// reservation. The next thousand requests, at another process, make one reservation with those seats.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigkill_during_a_thousand_requests_with_one_key_makes_one_reservation() {
    let system = System::start().await;
    let sale = system.sale(2).await;
    let (user, http) = (Uuid::now_v7(), Client::builder().build().unwrap());
    let thousand = async |base: &str| {
        let requests = (0..1000).map(|_| {
            let request = http.post(format!("{base}/api/v1/reservations")).header("x-user-id", user.to_string());
            let request = request.header("idempotency-key", "one").json(&sale.order(&[0, 1]));
            async move { request.send().await.map(|response| response.status().as_u16()).unwrap_or(0) }
        });
        join_all(requests).await
    };
    let Process { child: mut process, base } = spawn(&system, "serve").await;
    // The row cannot be written, so the request that claimed the key holds the seats and gets no further.
    let mut blocked = service_kit::postgres::database::begin(&system.app.db).await.unwrap();
    sqlx::query("lock table reservations in exclusive mode").execute(&mut *blocked).await.unwrap();
    let killer = async {
        wait_until("the seats are held", Duration::from_secs(20), async || {
            system.statuses(&sale.session).await == ["reserved", "reserved"]
        })
        .await;
        process.kill().await.unwrap();
    };
    let (answers, ()) = tokio::join!(thousand(&base), killer);
    assert!(!answers.contains(&201), "a buyer was told 201 for a reservation that could not be written");
    drop(blocked);
    assert_eq!(system.count("select count(*) from reservations").await, 0);

    let Process { child: _process, base } = spawn(&system, "serve").await;
    let answers = thousand(&base).await;
    // A slow machine turns some of a thousand away, by 503.
    assert!(answers.iter().all(|status| [409, 503].contains(status)), "{answers:?}");
    assert!(answers.contains(&409), "the dead attempt still has the key");
    sqlx::query("update idempotency_keys set locked_until = now()").execute(&system.app.db).await.unwrap();
    let answers = thousand(&base).await;
    assert!(answers.iter().all(|status| [201, 409, 503].contains(status)), "{answers:?}");
    // A request that was refused succeeds when it is repeated.
    let answers = thousand(&base).await;
    assert!(answers.iter().all(|status| [201, 503].contains(status)) && answers.contains(&201), "{answers:?}");
    assert_eq!(system.count("select count(*) from reservations where status = 'active'").await, 1);
    // The new attempt has taken over the dead attempt's hold of the same seats. Reconciliation would settle any other.
    reconcile_once(&system.app, &mut Sweep::default()).await.unwrap();
    system.finish().await;
}

#[tokio::test]
async fn a_process_that_is_told_to_stop_exits_cleanly() {
    let system = System::start().await;
    let mut process = spawn(&system, "serve").await.child;
    processes::signal(&process, "TERM").await;
    let status =
        tokio::time::timeout(Duration::from_secs(20), process.wait()).await.expect("it stops in time").unwrap();
    assert!(status.success(), "{status}");
    system.finish().await;
}

/// An operator who presses Ctrl-C twice does not wait for slow clients.
#[tokio::test]
async fn a_second_stop_signal_ends_a_process_at_once() {
    let system = System::start().await;
    let mut booking = spawn(&system, "serve").await;
    let address = booking.base.trim_start_matches("http://").to_owned();
    let mut slow = TcpStream::connect(&address).await.unwrap();
    let head = format!(
        "POST /api/v1/reservations HTTP/1.1\r\nhost: localhost\r\nx-user-id: {}\r\ncontent-type: application/json\r\n\
         content-length: 100\r\nexpect: 100-continue\r\n\r\n",
        Uuid::now_v7()
    );
    slow.write_all(head.as_bytes()).await.unwrap();
    // The service waits for the body, and a stop would wait as long.
    let mut answer = [0; 12];
    slow.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 100");

    processes::signal(&booking.child, "TERM").await;
    wait_until("the process stops", Duration::from_secs(10), async || TcpStream::connect(&address).await.is_err())
        .await;
    assert!(booking.child.try_wait().unwrap().is_none(), "the request in progress was dropped");
    processes::signal(&booking.child, "TERM").await;
    let ended = tokio::time::timeout(Duration::from_secs(5), booking.child.wait()).await.unwrap().unwrap();
    assert_eq!(ended.code(), Some(130));
    system.finish().await;
}
