//! The internal seat API, called the way the Booking Service calls it.

use reqwest::Method;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::support::TestApp;

fn hold(owner: Uuid, seats: &[String], until: &str) -> Value {
    json!({ "reservation_id": owner, "session_seat_ids": seats, "reserved_until": until })
}

const LATER: &str = "2031-01-01T00:00:00Z";
const PAST: &str = "2020-01-01T00:00:00Z";

#[tokio::test]
async fn a_seat_goes_from_available_through_reserved_to_sold() {
    let app = TestApp::spawn().await;
    let (session, seats) = app.session(2).await;
    let path = |call: &str| format!("/api/internal/sessions/{session}/seats/{call}");
    let owner = Uuid::now_v7();
    let all = json!({ "session_seat_ids": seats });
    assert_eq!(app.post(&path("check-availability"), &all, 200).await["available"], true);
    app.post(&path("reserve"), &hold(owner, &seats[..1], LATER), 200).await;
    let availability = app.post(&path("check-availability"), &all, 200).await;
    assert_eq!(
        (&availability["available"], &availability["unavailable_seat_ids"]),
        (&json!(false), &json!([seats[0]]))
    );
    app.post(&path("confirm"), &json!({ "reservation_id": owner, "session_seat_ids": [seats[0]] }), 200).await;
    assert_eq!(app.statuses(&session).await, ["sold", "available"]);
    let refused = app.post(&path("reserve"), &hold(Uuid::now_v7(), &seats, LATER), 409).await;
    assert_eq!(
        (&refused["code"], &refused["seats"]),
        (&json!("seat_unavailable"), &json!([{ "session_seat_id": seats[0], "status": "sold" }]))
    );
    assert_eq!(app.statuses(&session).await, ["sold", "available"], "a rejected reserve changed a seat");
}

#[tokio::test]
async fn unknown_sessions_and_seats_are_told_apart() {
    let app = TestApp::spawn().await;
    let (session, seats) = app.session(1).await;
    let (nowhere, nothing) = (Uuid::now_v7(), Uuid::now_v7().to_string());
    let check = format!("/api/internal/sessions/{nowhere}/seats/check-availability");
    assert_eq!(app.post(&check, &json!({ "session_seat_ids": seats }), 404).await["code"], "session_not_found");
    let path = format!("/api/internal/sessions/{session}/seats");
    let availability =
        app.post(&format!("{path}/check-availability"), &json!({ "session_seat_ids": [seats[0], nothing] }), 200).await;
    assert_eq!(
        (&availability["unknown_seat_ids"], &availability["unavailable_seat_ids"]),
        (&json!([nothing]), &json!([nothing]))
    );
    assert_eq!(
        app.post(&format!("{path}/reserve"), &hold(Uuid::now_v7(), &[nothing], LATER), 404).await["code"],
        "seat_not_found"
    );
    app.get(&format!("/api/internal/sessions/{nowhere}/pricing"), 404).await;
}

#[tokio::test]
async fn each_call_of_a_batch_is_answered_as_if_it_were_sent_alone() {
    let app = TestApp::spawn().await;
    let ((session, seats), (other, others)) = (app.session(3).await, app.session(1).await);
    let [first, rival, second] = [(); 3].map(|()| Uuid::now_v7());
    let call = |session: &str, body: Value| json!({ "session_id": session, "body": body });
    let calls = json!({ "calls": [
        call(&session, hold(first, &seats[..2], LATER)),
        call(&session, hold(rival, &seats[1..], LATER)),
        call(&other, hold(second, &others, LATER)),
        call(&other, hold(rival, &seats[2..], LATER)),
    ] });
    let held = app.post("/api/internal/seats/reserve", &calls, 200).await;
    let held = held["answers"].as_array().unwrap();
    assert_eq!(held.len(), 4);
    assert_eq!(held[0]["done"]["session_seat_ids"], json!(seats[..2]));
    assert_eq!(
        (&held[1]["refused"]["code"], &held[1]["refused"]["seats"]),
        (&json!("seat_unavailable"), &json!([{ "session_seat_id": seats[1], "status": "reserved" }]))
    );
    assert_eq!(held[2]["done"]["reservation_id"], json!(second));
    assert_eq!(held[3]["refused"]["code"], "seat_not_found", "the seat is in another session");
    assert_eq!(app.statuses(&session).await, ["reserved", "reserved", "available"]);
    assert_eq!(app.post("/api/internal/seats/reserve", &calls, 200).await["answers"], json!(held), "repeated");

    for bad in [
        json!({ "calls": [] }),
        json!({ "calls": vec![call(&session, hold(first, &seats, LATER)); 33] }),
        json!({ "calls": [{ "body": hold(first, &seats, LATER) }] }),
    ] {
        app.post("/api/internal/seats/reserve", &bad, 422).await;
    }
}

/// One request checks availability, holds the seats and returns prices, alone and in a batch.
#[tokio::test]
async fn a_hold_with_prices_requires_a_session_on_sale_and_returns_the_prices() {
    let app = TestApp::spawn().await;
    let (session, seats) = app.session(4).await;
    let (nowhere, nothing) = (Uuid::now_v7().to_string(), vec![Uuid::now_v7().to_string()]);
    let priced = |owner: Uuid, seats: &[String]| json!({ "reservation_id": owner, "session_seat_ids": seats, "reserved_until": LATER, "with_prices": true });
    let path = |session: &str| format!("/api/internal/sessions/{session}/seats/reserve");
    let [first, second, third, fourth] = [(); 4].map(|()| Uuid::now_v7());

    let alone = app.post(&path(&session), &priced(first, &seats[..1]), 200).await;
    let pricing = async |seat: &str| {
        app.get(&format!("/api/internal/sessions/{session}/pricing?session_seat_ids={seat}"), 200).await
    };
    assert_eq!((&alone["pricing"], &alone["session_seat_ids"]), (&pricing(&seats[0]).await, &json!(seats[..1])));
    assert_eq!(app.post(&path(&session), &priced(first, &seats[..1]), 200).await, alone, "repeated");
    let unpriced = app.post(&path(&session), &hold(first, &seats[..1], LATER), 200).await;
    assert_eq!(unpriced.get("pricing"), None);

    let call = |session: &str, body: Value| json!({ "session_id": session, "body": body });
    let calls = json!({ "calls": [
        call(&session, priced(second, &seats[1..2])), call(&nowhere, priced(third, &seats[3..])),
        call(&session, priced(third, &seats[..1])), call(&session, priced(third, &nothing)),
        call(&session, priced(fourth, &seats[2..3])),
    ] });
    let answers = app.post("/api/internal/seats/reserve", &calls, 200).await["answers"].clone();
    for (place, seat) in [(0, &seats[1]), (4, &seats[2])] {
        assert_eq!(answers[place]["done"]["pricing"], pricing(seat).await, "the prices of its own seats");
    }
    for (place, code) in [(1, "session_not_found"), (2, "seat_unavailable"), (3, "seat_not_found")] {
        assert_eq!(answers[place]["refused"]["code"], code);
    }
    let over = json!({ "sales_end": "2020-01-01T00:00:00Z" });
    assert_eq!(app.call(Method::PATCH, &format!("/api/v1/sessions/{session}"), Some(&over)).await.status(), 200);
    assert_eq!(app.post(&path(&session), &priced(third, &seats[3..]), 409).await["code"], "sales_ended");
    let metrics = app.call(Method::GET, "/metrics", None).await.text().await.unwrap();
    for counted in [r#"{outcome="held"} 5"#, r#"{outcome="refused"} 4"#] {
        assert!(metrics.contains(&format!("event_holds_total{counted}\n")), "{metrics}");
    }
    assert_eq!(app.statuses(&session).await, ["reserved", "reserved", "reserved", "available"]);
}

#[tokio::test]
async fn one_call_releases_holds_of_several_sessions_and_nothing_else() {
    let app = TestApp::spawn().await;
    let ((session, seats), (other, others)) = (app.session(4).await, app.session(1).await);
    let [first, second, third] = [(); 3].map(|()| Uuid::now_v7());
    let path = |session: &str, call: &str| format!("/api/internal/sessions/{session}/seats/{call}");
    app.post(&path(&session, "reserve"), &hold(first, &seats[..2], LATER), 200).await;
    app.post(&path(&session, "reserve"), &hold(second, &seats[2..], LATER), 200).await;
    app.post(&path(&session, "confirm"), &json!({ "reservation_id": second, "session_seat_ids": seats[2..] }), 200)
        .await;
    app.post(&path(&other, "reserve"), &hold(third, &others, LATER), 200).await;
    let of = |owner: Uuid, seat: &str| json!({ "reservation_id": owner, "session_seat_id": seat });
    let holds = json!({ "holds": [
        of(first, &seats[0]), of(first, &seats[0]), of(third, &others[0]),
        of(third, &seats[1]), of(second, &seats[2]), of(first, &seats[3]), of(first, &Uuid::now_v7().to_string()),
    ] });
    let freed = app.post("/api/internal/seats/release", &holds, 200).await;
    let mut freed: Vec<_> =
        freed["session_seat_ids"].as_array().unwrap().iter().map(|id| id.as_str().unwrap()).collect();
    freed.sort_unstable();
    let mut expected = [seats[0].as_str(), others[0].as_str()];
    expected.sort_unstable();
    assert_eq!(freed, expected, "each seat that its reservation held, once");
    assert_eq!(app.statuses(&session).await, ["available", "reserved", "sold", "sold"]);
    assert_eq!(app.statuses(&other).await, ["available"]);
    assert_eq!(app.post("/api/internal/seats/release", &holds, 200).await["session_seat_ids"], json!([]), "repeated");
    for bad in [json!({ "holds": [] }), json!({ "holds": vec![of(first, &seats[0]); 501] })] {
        app.post("/api/internal/seats/release", &bad, 422).await;
    }
}

#[tokio::test]
async fn prices_come_with_labels_for_all_seats_or_some_of_them() {
    let app = TestApp::spawn().await;
    let (session, seats) = app.session(3).await;
    let all = app.get(&format!("/api/internal/sessions/{session}/pricing"), 200).await;
    assert_eq!((all["seats"].as_array().unwrap().len(), all["base_price"].as_f64()), (3, Some(100.0)));
    let some = app
        .get(&format!("/api/internal/sessions/{session}/pricing?session_seat_ids={},{}", seats[2], Uuid::now_v7()), 200)
        .await;
    assert_eq!(
        some["seats"],
        json!([{ "session_seat_id": seats[2], "price": 100.0, "row_number": "1", "seat_number": "3" }])
    );
    app.get(&format!("/api/internal/sessions/{session}/pricing?session_seat_ids=x"), 422).await;
}

#[tokio::test]
async fn overdue_holds_are_paged_in_order_without_gaps() {
    let app = TestApp::spawn().await;
    let (session, seats) = app.session(5).await;
    let path = format!("/api/internal/sessions/{session}/seats/reserve");
    for (seat, until) in seats.iter().zip([PAST, PAST, PAST, "2020-01-02T00:00:00Z", LATER]) {
        app.post(&path, &hold(Uuid::now_v7(), std::slice::from_ref(seat), until), 200).await;
    }
    let mut walked = Vec::new();
    let mut query = "limit=2".to_owned();
    loop {
        let page = app.get(&format!("/api/internal/holds/overdue?{query}"), 200).await;
        walked.extend(
            page["items"].as_array().unwrap().iter().map(|hold| hold["session_seat_id"].as_str().unwrap().to_owned()),
        );
        let Some(cursor) = page["next_cursor"].as_str() else {
            break;
        };
        query = format!("limit=2&cursor={cursor}");
    }
    assert_eq!((walked.len(), &walked[3]), (4, &seats[3]));
    let running = app.get("/api/internal/holds/overdue?before=2032-01-01T00:00:00Z", 200).await;
    assert_eq!(running["items"].as_array().unwrap().len(), 5);
    for bad in ["limit=0", "limit=1001", "cursor=x", "before=yesterday"] {
        app.get(&format!("/api/internal/holds/overdue?{bad}"), 422).await;
    }
}

#[tokio::test]
async fn the_internal_health_check_accepts_both_methods() {
    let app = TestApp::spawn().await;
    assert_eq!(app.get("/api/internal/health", 200).await["status"], "healthy");
    assert_eq!(app.post("/api/internal/health", &json!({}), 200).await["status"], "healthy");
}
