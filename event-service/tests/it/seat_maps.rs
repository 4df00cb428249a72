//! Seat maps match the tables, are not sent again unchanged, and use the content coding that the client prefers.

use std::io::Read;

use futures::future::join_all;
use serde_json::{Value, json};
use service_kit::amqp::Broker;
use service_kit::http::tls::Trust;
use service_kit::process::settings::Secret;
use service_kit::testing::{database, server, unique};
use uuid::Uuid;

use crate::support::{TestApp, id};

/// Holds one seat for a new reservation, and returns the reservation's id.
async fn hold(app: &TestApp, session: &str, seat: &str) -> Uuid {
    let owner = Uuid::now_v7();
    let hold = json!({ "reservation_id": owner, "session_seat_ids": [seat], "reserved_until": "2031-01-01T00:00:00Z" });
    app.post(&format!("/api/internal/sessions/{session}/seats/reserve"), &hold, 200).await;
    owner
}

/// The seat map's entity tag, the seat map, and the array of `/seats`.
async fn shown(app: &TestApp, session: &str) -> (String, Value, Value) {
    let path = format!("/api/v1/sessions/{session}");
    let map = app.call(reqwest::Method::GET, &format!("{path}/seat-map"), None).await;
    let tag = map.headers()["etag"].to_str().unwrap().to_owned();
    (tag, map.json().await.unwrap(), app.get(&format!("{path}/seats"), 200).await)
}

#[tokio::test]
async fn a_replica_that_follows_changes_has_the_map_that_a_new_one_reads() {
    let (database_url, exchange) = (database("event", &event_service::state::MIGRATIONS).await, unique("exchange"));
    let replica = async || {
        let url = Secret::from(server("TEST_RABBITMQ_URL").as_str());
        let broker = Broker { url, exchange: exchange.clone(), trust: Trust::default() };
        TestApp::spawn_with(database_url.clone(), broker).await
    };
    let (app, other) = (replica().await, replica().await);
    // 150 seats fill more than two compressed chunks.
    let (session, seats) = app.session(150).await;
    let path = format!("/api/v1/sessions/{session}");
    let internal = format!("/api/internal/sessions/{session}/seats");
    let seat_id = id(&app.get(&format!("{path}/seats"), 200).await[70], "seat_id");
    let (first, last) = (hold(&app, &session, &seats[0]).await, hold(&app, &session, &seats[149]).await);
    let own = |owner: Uuid, seat: &str| json!({ "reservation_id": owner, "session_seat_ids": [seat] });
    let patch = async |path: &str, change: Value| {
        assert_eq!(app.call(reqwest::Method::PATCH, path, Some(&change)).await.status(), 200);
    };
    let mut tags = vec![shown(&app, &session).await.0];
    for change in 0..7 {
        match change {
            0 => drop(hold(&app, &session, &seats[64]).await),
            1 => drop(app.post(&format!("{internal}/release"), &own(first, &seats[0]), 200).await),
            2 => drop(app.post(&format!("{internal}/confirm"), &own(last, &seats[149]), 200).await),
            3 => patch(&format!("/api/v1/seats/{seat_id}"), json!({ "seat_type": "vip" })).await,
            4 => patch(&path, json!({ "base_price": 80 })).await,
            5 => drop(app.post(&format!("{path}/cancel"), &json!({}), 200).await),
            _ => {}
        }
        let seen = shown(&app, &session).await;
        assert_eq!(seen, shown(&other, &session).await, "change {change} on the replica that did not make it");
        assert_eq!(seen, shown(&replica().await, &session).await, "change {change} on a new replica");
        assert_eq!(seen.1["seats"], seen.2);
        tags.push(seen.0);
    }
    let unchanged = tags.windows(2).filter(|pair| pair[0] == pair[1]).count();
    assert_eq!(unchanged, 1, "only the last step changed nothing: {tags:?}");
}

/// Another hall has other seats, so the map must show those.
#[tokio::test]
async fn a_seat_map_follows_its_session_to_another_hall_and_into_deletion() {
    let app = TestApp::spawn().await;
    let (session, seats) = app.session(3).await;
    let path = format!("/api/v1/sessions/{session}");
    let hall = app.hall(5).await;
    app.post(&format!("/api/v1/halls/{hall}/seats/bulk"), &json!({ "rows": 1, "seats_per_row": 5 }), 201).await;
    let moved = app.call(reqwest::Method::PATCH, &path, Some(&json!({ "hall_id": hall }))).await;
    assert_eq!(moved.status(), 200);
    let (_, map, list) = shown(&app, &session).await;
    assert_eq!((map["hall_id"].as_str(), list.as_array().unwrap().len()), (Some(hall.as_str()), 5));
    assert!(list.as_array().unwrap().iter().all(|seat| !seats.contains(&id(seat, "session_seat_id"))));
    assert_eq!(app.call(reqwest::Method::DELETE, &path, None).await.status(), 204);
    app.get(&format!("{path}/seat-map"), 404).await;
}

/// Change numbers are drawn in one order and become visible in another.
#[tokio::test]
async fn a_change_that_becomes_visible_late_is_not_missed() {
    let app = TestApp::spawn().await;
    let (session, seats) = app.session(3).await;
    let mut slow = service_kit::postgres::database::begin(&app.db).await.unwrap();
    let block = "update session_seats set status = 'blocked', change_seq = nextval('session_seat_changes'), change_xid = pg_current_xact_id()
                 where session_seat_id = $1::uuid";
    sqlx::query(block).bind(&seats[0]).execute(&mut *slow).await.unwrap();
    hold(&app, &session, &seats[1]).await;
    assert_eq!(app.statuses(&session).await, ["available", "reserved", "available"]);
    slow.commit().await.unwrap();
    assert_eq!(app.statuses(&session).await, ["blocked", "reserved", "available"]);
}

/// Sixteen buyers at once share the reads of the map. Each sees its seat reserved as soon as its hold is answered.
#[tokio::test]
async fn a_buyer_sees_its_own_hold_in_the_next_map() {
    let app = TestApp::spawn().await;
    let (session, seats) = app.session(160).await;
    let buyers = seats.chunks(10).enumerate().map(async |(buyer, own)| {
        for (turn, seat) in own.iter().enumerate() {
            hold(&app, &session, seat).await;
            assert_eq!(app.statuses(&session).await[buyer * 10 + turn], "reserved");
        }
    });
    join_all(buyers).await;
    assert!(app.statuses(&session).await.iter().all(|status| status == "reserved"));
}

#[tokio::test]
async fn a_seat_map_is_not_sent_twice_and_never_stale() {
    let app = TestApp::spawn().await;
    let (session, seats) = app.session(3).await;
    let path = format!("{}/api/v1/sessions/{session}/seat-map", app.base);
    let fresh = app.http.get(&path).send().await.unwrap();
    let etag = fresh.headers()["etag"].to_str().unwrap().to_owned();
    let map: Value = fresh.json().await.unwrap();
    assert_eq!((map["seats"].as_array().unwrap().len(), map["session_id"].as_str()), (3, Some(session.as_str())));
    let again = app.http.get(&path).header("if-none-match", &etag).send().await.unwrap();
    assert_eq!((again.status().as_u16(), again.text().await.unwrap().len()), (304, 0));

    let hold = json!({ "reservation_id": uuid::Uuid::now_v7(), "session_seat_ids": [seats[0]], "reserved_until": "2031-01-01T00:00:00Z" });
    app.post(&format!("/api/internal/sessions/{session}/seats/reserve"), &hold, 200).await;
    let changed = app.http.get(&path).header("if-none-match", &etag).send().await.unwrap();
    assert_eq!(changed.status(), 200);
    let changed: Value = changed.json().await.unwrap();
    assert!(changed["version"].as_i64() > map["version"].as_i64());
    assert_eq!(changed["seats"][0]["status"], "reserved");
    app.get(&format!("/api/v1/sessions/{}/seat-map", uuid::Uuid::now_v7()), 404).await;
}

#[tokio::test]
async fn each_content_coding_of_a_seat_map_has_its_own_tag() {
    let app = TestApp::spawn().await;
    let (session, _) = app.session(200).await;
    let path = format!("{}/api/v1/sessions/{session}/seat-map", app.base);
    let get = async |coding: &str, known: &str| {
        app.http.get(&path).header("accept-encoding", coding).header("if-none-match", known).send().await.unwrap()
    };
    let plain = get("identity", "\"x\"").await;
    let tag = plain.headers()["etag"].to_str().unwrap().to_owned();
    assert!(plain.headers().get("content-encoding").is_none());
    let plain = plain.bytes().await.unwrap();
    let packed = get("gzip", "\"x\"").await.bytes().await.unwrap();
    let mut unpacked = Vec::new();
    flate2::read::GzDecoder::new(&packed[..]).read_to_end(&mut unpacked).unwrap();
    assert_eq!(unpacked, plain);
    let mut tags = vec![tag];
    for (asked, coding) in [("gzip", "gzip"), ("br", "br"), ("zstd", "zstd"), ("gzip;q=0.5, br, x", "br")] {
        let packed = get(asked, "\"x\"").await;
        assert_eq!(packed.headers()["content-encoding"], coding);
        assert!(packed.headers()["vary"].to_str().unwrap().contains("accept-encoding"));
        let tag = packed.headers()["etag"].to_str().unwrap().to_owned();
        assert!(tag.ends_with(&format!("-{coding}\"")), "{tag}");
        tags.push(tag);
        let size = packed.bytes().await.unwrap().len();
        assert!(size < plain.len() / 3, "{coding}: {size} of {} bytes", plain.len());
    }
    for tag in tags {
        let known = get("zstd, br, gzip", &tag).await;
        assert_eq!((known.status().as_u16(), known.headers()["etag"].to_str().unwrap()), (304, tag.as_str()));
    }
    // A short answer is not compressed.
    let short =
        app.http.get(format!("{}/health/live", app.base)).header("accept-encoding", "gzip").send().await.unwrap();
    assert!(short.headers().get("content-encoding").is_none());
}
