//! Editing and deleting: a resource in use is kept, and no client overwrites a change that it has not seen.

use std::pin::pin;

use event_service::session_seats::{self, HoldRequest, Releasable};
use futures::future::{Either, select};
use reqwest::{Method, Response};
use serde_json::{Value, json};
use service_kit::postgres::database::begin;
use service_kit::testing::wait_until;
use shared_contracts::ids::ReservationId;
use shared_contracts::seat_api::Hold;
use uuid::Uuid;

use crate::booking_consumer::SOON;
use crate::support::{TestApp, id};

async fn edit(app: &TestApp, method: Method, path: &str, body: Option<&Value>, if_match: Option<&str>) -> Response {
    let mut request = app.http.request(method, format!("{}{path}", app.base));
    if let Some(body) = body {
        request = request.json(body);
    }
    if let Some(tag) = if_match {
        request = request.header("if-match", tag);
    }
    request.send().await.unwrap()
}

async fn patch(app: &TestApp, path: &str, body: Value, expected: u16) -> Value {
    let response = edit(app, Method::PATCH, path, Some(&body), None).await;
    let (status, text) = (response.status().as_u16(), response.text().await.unwrap());
    assert_eq!(status, expected, "{path} {text}");
    serde_json::from_str(&text).unwrap()
}

async fn delete(app: &TestApp, path: &str, expected: u16) -> Value {
    let response = edit(app, Method::DELETE, path, None, None).await;
    let (status, text) = (response.status().as_u16(), response.text().await.unwrap());
    assert_eq!(status, expected, "{path} {text}");
    serde_json::from_str(&text).unwrap_or(Value::Null)
}

/// The path of one resource of each kind and an edit for it. Each resource refers to those before it.
async fn one_of_each(app: &TestApp) -> Vec<(String, Value)> {
    let organizer = app.organizer().await;
    let event = json!({ "organizer_id": organizer, "title": "Concert", "description": "old", "event_type": "concert" });
    let event = id(&app.post("/api/v1/events", &event, 201).await, "event_id");
    let location = app.location().await;
    let hall = json!({ "name": "Hall", "capacity": 10 });
    let hall = id(&app.post(&format!("/api/v1/locations/{location}/halls"), &hall, 201).await, "hall_id");
    let seat = json!({ "row_number": "A", "seat_number": 1 });
    let seat = id(&app.post(&format!("/api/v1/halls/{hall}/seats"), &seat, 201).await, "seat_id");
    let session = id(&app.post("/api/v1/sessions", &app.session_body(&event, &hall), 201).await, "session_id");
    vec![
        (format!("/api/v1/organizers/{organizer}"), json!({ "description": "new" })),
        (format!("/api/v1/events/{event}"), json!({ "description": null, "event_type": "other" })),
        (format!("/api/v1/locations/{location}"), json!({ "timezone": "Asia/Tokyo" })),
        (format!("/api/v1/halls/{hall}"), json!({ "capacity": 5 })),
        (format!("/api/v1/seats/{seat}"), json!({ "seat_type": "vip", "x": 2.5 })),
        (format!("/api/v1/sessions/{session}"), json!({ "base_price": 12.5, "sales_start": "2030-01-01T00:00:00Z" })),
    ]
}

/// Members that follow from others.
const COMPUTED: [&str; 5] = ["updated_at", "on_sale", "off_sale_reason", "on_sale_from", "available_seats_count"];

#[tokio::test]
async fn an_edit_changes_only_the_fields_that_it_names() {
    let app = TestApp::spawn().await;
    for (path, change) in one_of_each(&app).await {
        let before = app.get(&path, 200).await;
        let after = patch(&app, &path, change.clone(), 200).await;
        assert_eq!(app.get(&path, 200).await, after);
        for (member, value) in after.as_object().unwrap() {
            let expected = change.get(member).unwrap_or(&before[member]);
            let is_computed = COMPUTED.contains(&member.as_str());
            assert!(value == expected || is_computed, "{path} {member}: {value}, expected {expected}");
        }
        assert_eq!(patch(&app, &path, json!({ "unknown": 1 }), 422).await["errors"][0]["pointer"], "/unknown");
        assert_eq!(patch(&app, &path, json!([]), 422).await["code"], "validation_failed");
    }
}

#[tokio::test]
async fn an_edit_is_validated_like_a_new_resource() {
    let app = TestApp::spawn().await;
    let paths: Vec<String> = one_of_each(&app).await.into_iter().map(|(path, _)| path).collect();
    let bad = [
        json!({ "name": "", "contact_email": "nobody", "description": 5 }),
        json!({ "title": null, "event_type": "party", "organizer_id": "x" }),
        json!({ "timezone": "Europe/Atlantis", "city": " ", "name": "a\u{0}b" }),
        json!({ "capacity": 0, "name": "x".repeat(201) }),
        json!({ "row_number": "", "seat_type": "sofa", "section": "x".repeat(65) }),
        json!({ "base_price": -1, "currency": "euro", "start_time": "noon" }),
    ];
    for (path, body) in paths.iter().zip(bad) {
        let before = app.get(path, 200).await;
        let problem = patch(&app, path, body.clone(), 422).await;
        let mut named: Vec<&str> = problem["errors"]
            .as_array()
            .unwrap()
            .iter()
            .map(|error| &error["pointer"].as_str().unwrap()[1..])
            .collect();
        named.sort_unstable();
        named.dedup();
        let mut wrong: Vec<&str> = body.as_object().unwrap().keys().map(String::as_str).collect();
        wrong.sort_unstable();
        // Text that PostgreSQL can't store is rejected before the other rules are checked.
        assert!(named == wrong || named == ["name"], "{path}: {problem}");
        assert_eq!(app.get(path, 200).await, before);
    }
    let stranger = Uuid::now_v7();
    assert_eq!(patch(&app, &paths[1], json!({ "organizer_id": stranger }), 404).await["code"], "organizer_not_found");
    assert_eq!(patch(&app, &paths[5], json!({ "hall_id": stranger }), 404).await["code"], "hall_not_found");
    assert_eq!(patch(&app, &paths[5], json!({ "event_id": stranger }), 404).await["code"], "event_not_found");
    let problem = patch(&app, &paths[5], json!({ "end_time": "2020-01-01T00:00:00Z" }), 422).await;
    assert_eq!(problem["errors"][0]["pointer"], "/end_time");
}

#[tokio::test]
async fn a_stale_edit_is_refused() {
    let app = TestApp::spawn().await;
    for (path, change) in one_of_each(&app).await {
        let tag = |response: &Response| response.headers()["etag"].to_str().unwrap().to_owned();
        let seen = tag(&app.call(Method::GET, &path, None).await);
        let first = edit(&app, Method::PATCH, &path, Some(&change), Some(&seen)).await;
        assert_eq!(first.status(), 200);
        let now = tag(&first);
        assert_ne!(now, seen);
        for method in [Method::PATCH, Method::DELETE] {
            let body = (method == Method::PATCH).then_some(&change);
            let stale = edit(&app, method, &path, body, Some(&seen)).await;
            assert_eq!(stale.status(), 412, "{path}");
            assert_eq!(stale.json::<Value>().await.unwrap()["code"], "precondition_failed");
        }
        assert_eq!(edit(&app, Method::PATCH, &path, Some(&change), Some(&now)).await.status(), 200);
    }
}

/// Fifty editors have seen the same version, and one edit succeeds.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_edits_of_one_version_one_wins() {
    let app = TestApp::spawn().await;
    let path = format!("/api/v1/organizers/{}", app.organizer().await);
    let bodies: Vec<Value> = (0..50).map(|editor| json!({ "name": format!("Editor {editor}") })).collect();
    let edits = bodies.iter().map(|body| edit(&app, Method::PATCH, &path, Some(body), Some("\"1\"")));
    let statuses: Vec<u16> =
        futures::future::join_all(edits).await.iter().map(|response| response.status().as_u16()).collect();
    assert_eq!(statuses.iter().filter(|status| **status == 200).count(), 1, "{statuses:?}");
    assert!(statuses.iter().all(|status| [200, 412].contains(status)), "{statuses:?}");
}

#[tokio::test]
async fn a_resource_in_use_is_not_deleted_and_the_answer_names_its_users() {
    let app = TestApp::spawn().await;
    let mut paths: Vec<String> = one_of_each(&app).await.into_iter().map(|(path, _)| path).collect();
    let users = ["1 event ", "1 session ", "1 hall ", "1 session ", "1 session "];
    for (path, user) in paths.iter().zip(users) {
        let problem = delete(&app, path, 409).await;
        assert_eq!(problem["code"], "resource_in_use");
        assert!(problem["detail"].as_str().unwrap().starts_with(user), "{path}: {problem}");
        app.get(path, 200).await;
    }
    assert_eq!(patch(&app, &paths[4], json!({ "seat_number": "2" }), 409).await["code"], "resource_in_use");
    assert_eq!(patch(&app, &paths[3], json!({ "capacity": 1 }), 200).await["capacity"], 1);
    // Deleted from the session to the organizer, nothing is in use any more.
    paths.reverse();
    for path in &paths {
        delete(&app, path, 204).await;
        let code = app.get(path, 404).await["code"].as_str().unwrap().to_owned();
        assert_eq!(delete(&app, path, 404).await["code"], code);
        assert_eq!(patch(&app, path, json!({}), 404).await["code"], code);
    }
}

#[tokio::test]
async fn a_hall_is_deleted_with_its_seats_and_can_not_shrink_below_them() {
    let app = TestApp::spawn().await;
    let hall = app.hall(10).await;
    let path = format!("/api/v1/halls/{hall}");
    app.post(&format!("{path}/seats/bulk"), &json!({ "rows": 2, "seats_per_row": 4 }), 201).await;
    assert_eq!(patch(&app, &path, json!({ "capacity": 7 }), 409).await["code"], "hall_full");
    patch(&app, &path, json!({ "capacity": 8 }), 200).await;
    let seats = app.get(&format!("{path}/seats"), 200).await;
    let twice = json!({ "row_number": "1", "seat_number": "2" });
    let seat = format!("/api/v1/seats/{}", id(&seats["items"][0], "seat_id"));
    assert_eq!(patch(&app, &seat, twice, 409).await["code"], "seat_exists");
    delete(&app, &path, 204).await;
    app.get(&seat, 404).await;
}

async fn hold(app: &TestApp, session: &str, seats: &[&String]) -> Uuid {
    let owner = Uuid::now_v7();
    let hold = json!({ "reservation_id": owner, "session_seat_ids": seats, "reserved_until": "2031-01-01T00:00:00Z" });
    app.post(&format!("/api/internal/sessions/{session}/seats/reserve"), &hold, 200).await;
    owner
}

#[tokio::test]
async fn a_session_with_reserved_or_sold_seats_keeps_its_hall_event_and_currency() {
    let app = TestApp::spawn().await;
    let (session, seats) = app.session(3).await;
    let path = format!("/api/v1/sessions/{session}");
    let owner = hold(&app, &session, &[&seats[0]]).await;
    let other_hall = app.hall(5).await;
    app.post(&format!("/api/v1/halls/{other_hall}/seats/bulk"), &json!({ "rows": 1, "seats_per_row": 5 }), 201).await;
    let changes =
        [json!({ "hall_id": other_hall }), json!({ "event_id": app.event().await }), json!({ "currency": "EUR" })];
    for change in &changes {
        assert_eq!(patch(&app, &path, change.clone(), 409).await["code"], "resource_in_use");
    }
    assert_eq!(delete(&app, &path, 409).await["code"], "resource_in_use");
    assert_eq!(app.statuses(&session).await, ["reserved", "available", "available"]);
    // Time and price may change. The new price applies to later buyers.
    let changed = patch(&app, &path, json!({ "base_price": 80, "end_time": "2031-12-31T00:00:00Z" }), 200).await;
    assert_eq!(changed["end_time"], "2031-12-31T00:00:00Z");
    let map = app.get(&format!("{path}/seat-map"), 200).await;
    assert!(map["seats"].as_array().unwrap().iter().all(|seat| seat["price"] == 80.0), "{map}");

    let body = json!({ "reservation_id": owner, "session_seat_ids": [seats[0]] });
    app.post(&format!("/api/internal/sessions/{session}/seats/release"), &body, 200).await;
    for change in changes {
        patch(&app, &path, change, 200).await;
    }
    let moved = app.get(&path, 200).await;
    assert_eq!((&moved["seats_count"], &moved["available_seats_count"]), (&json!(5), &json!(5)));
    assert_eq!(app.get(&format!("{path}/seats"), 200).await[0]["price"], 80.0);
    delete(&app, &path, 204).await;
}

#[tokio::test]
async fn a_session_can_not_be_moved_onto_another_or_into_an_empty_hall() {
    let app = TestApp::spawn().await;
    let (first, _) = app.session(1).await;
    let (second, seats) = app.session(1).await;
    let first = app.get(&format!("/api/v1/sessions/{first}"), 200).await;
    let path = format!("/api/v1/sessions/{second}");
    let onto = json!({ "hall_id": first["hall_id"], "start_time": first["start_time"], "end_time": first["end_time"] });
    assert_eq!(patch(&app, &path, onto, 409).await["code"], "session_overlap");
    assert_eq!(patch(&app, &path, json!({ "hall_id": app.hall(1).await }), 409).await["code"], "hall_has_no_seats");
    let left = app.get(&format!("{path}/seats"), 200).await;
    assert_eq!(id(&left[0], "session_seat_id"), seats[0], "a refused edit changes nothing");
}

#[tokio::test]
async fn a_cancelled_session_is_off_sale_and_its_released_seats_are_blocked() {
    let app = TestApp::spawn().await;
    let (session, seats) = app.session(3).await;
    let path = format!("/api/v1/sessions/{session}");
    let owner = hold(&app, &session, &[&seats[1]]).await;
    let cancelled = app.post(&format!("{path}/cancel"), &json!({}), 200).await;
    assert_eq!((&cancelled["status"], &cancelled["available_seats_count"]), (&json!("cancelled"), &json!(0)));
    assert_eq!(
        app.post(&format!("{path}/cancel"), &json!({}), 200).await,
        cancelled,
        "a repeated cancel changes nothing"
    );
    assert_eq!(app.statuses(&session).await, ["blocked", "reserved", "blocked"]);
    let wanted = json!({ "session_seat_ids": [seats[0]] });
    let check = format!("/api/internal/sessions/{session}/seats/check-availability");
    assert_eq!(app.post(&check, &wanted, 409).await["code"], "session_cancelled");
    let late = json!({ "reservation_id": Uuid::now_v7(), "session_seat_ids": [seats[0]], "reserved_until": "2031-01-01T00:00:00Z" });
    let reserve = format!("/api/internal/sessions/{session}/seats/reserve");
    assert_eq!(app.post(&reserve, &late, 409).await["code"], "session_cancelled");
    assert_eq!(patch(&app, &path, json!({ "base_price": 1 }), 409).await["code"], "session_cancelled");
    let listed = app.get("/api/internal/sessions/cancelled", 200).await;
    assert_eq!(listed["items"][0]["session_id"], session.as_str());

    let body = json!({ "reservation_id": owner, "session_seat_ids": [seats[1]] });
    app.post(&format!("/api/internal/sessions/{session}/seats/release"), &body, 200).await;
    assert_eq!(app.statuses(&session).await, ["blocked", "blocked", "blocked"]);
    // Another session can take its time.
    let again = json!({ "event_id": cancelled["event_id"], "hall_id": cancelled["hall_id"], "base_price": 5,
        "start_time": cancelled["start_time"], "end_time": cancelled["end_time"] });
    app.post("/api/v1/sessions", &again, 201).await;
    delete(&app, &path, 204).await;
    assert_eq!(app.post(&format!("{path}/cancel"), &json!({}), 404).await["code"], "session_not_found");
}

/// One transaction frees a seat and another cancels its session. Neither sees the uncommitted change of the other, so
/// the second one waits.
#[tokio::test]
async fn a_seat_freed_during_the_cancellation_of_its_session_ends_blocked() {
    let app = TestApp::spawn().await;
    for cancelled_first in [false, true] {
        let (session, seats) = app.session(1).await;
        let (owner, id) = (hold(&app, &session, &[&seats[0]]).await, session.parse::<Uuid>().unwrap());
        let mut first = begin(&app.db).await.unwrap();
        let (second, body) = if cancelled_first {
            let cancel = "update sessions set status = 'cancelled', cancelled_at = now() where session_id = $1";
            sqlx::query(cancel).bind(id).execute(&mut *first).await.unwrap();
            session_seats::block_free(&mut first, id.into()).await.unwrap();
            let body = json!({ "reservation_id": owner, "session_seat_ids": seats });
            (format!("/api/internal/sessions/{session}/seats/release"), body)
        } else {
            let seat: Uuid = seats[0].parse().unwrap();
            let hold = Hold { reservation_id: owner.into(), session_seat_id: seat.into() };
            session_seats::free(&mut first, &[hold], Releasable::Held).await.unwrap();
            (format!("/api/v1/sessions/{session}/cancel"), json!({}))
        };
        app.beside(first, app.post(&second, &body, 200)).await;
        assert_eq!(app.statuses(&session).await, ["blocked"], "cancelled first: {cancelled_first}");
    }
}

/// The seat's row changes while the release waits for its lock. The release must free the row as it is after the wait.
#[tokio::test]
async fn a_seat_freed_during_a_price_change_has_the_new_price() {
    let app = TestApp::spawn().await;
    let (session, seats) = app.session(1).await;
    let (owner, id) = (hold(&app, &session, &[&seats[0]]).await, session.parse::<Uuid>().unwrap());
    let mut first = begin(&app.db).await.unwrap();
    sqlx::query("update sessions set base_price = 7 where session_id = $1")
        .bind(id)
        .execute(&mut *first)
        .await
        .unwrap();
    session_seats::set_price(&mut first, id.into(), serde_json::from_value(json!(7)).unwrap()).await.unwrap();
    let body = json!({ "reservation_id": owner, "session_seat_ids": seats });
    let freed =
        app.beside(first, app.post(&format!("/api/internal/sessions/{session}/seats/release"), &body, 200)).await;
    assert_eq!(freed["session_seat_ids"], json!(seats));
    let seat = &app.get(&format!("/api/v1/sessions/{session}/seats"), 200).await[0];
    assert_eq!((&seat["status"], &seat["price"]), (&json!("available"), &json!(7.0)));
}

/// Both transactions need the seat and its session seat. The first has locked only the seat when the second begins.
#[tokio::test]
async fn a_seat_is_edited_while_its_session_seats_are_recreated() {
    let app = TestApp::spawn().await;
    let (session, _) = app.session(1).await;
    let mut first = begin(&app.db).await.unwrap();
    let seat = "select seat_id from session_seats join seats using (seat_id) for update of seats";
    let seat: Uuid = sqlx::query_scalar(seat).fetch_one(&mut *first).await.unwrap();
    let path = format!("/api/v1/sessions/{session}");
    let second = pin!(patch(&app, &path, json!({ "currency": "EUR" }), 200));
    let waits =
        pin!(wait_until("the second transaction waits for a lock", SOON, async || app.waits_for_a_lock().await));
    let Either::Right((_, second)) = select(second, waits).await else { panic!("the second transaction did not wait") };
    session_seats::note_change_of(&mut first, seat.into()).await.unwrap();
    first.commit().await.unwrap();
    second.await;
}

/// The edit can't see a hold that is not committed yet, so it waits for it.
#[tokio::test]
async fn an_uncommitted_hold_also_keeps_event_and_currency() {
    let app = TestApp::spawn().await;
    let (session, seats) = app.session(1).await;
    let request = HoldRequest {
        session_id: session.parse::<Uuid>().unwrap().into(),
        reservation_id: ReservationId::new(),
        seats: vec![seats[0].parse::<Uuid>().unwrap().into()],
        reserved_until: "2031-01-01T00:00:00Z".parse().unwrap(),
    };
    let path = format!("/api/v1/sessions/{session}");
    for change in [json!({ "event_id": app.event().await }), json!({ "currency": "EUR" })] {
        let mut first = begin(&app.db).await.unwrap();
        session_seats::reserve(&mut first, std::slice::from_ref(&request)).await.unwrap();
        let refused = app.beside(first, patch(&app, &path, change, 409)).await;
        assert_eq!(refused["code"], "resource_in_use");
        let body = json!({ "reservation_id": request.reservation_id, "session_seat_ids": seats });
        app.post(&format!("/api/internal/sessions/{session}/seats/release"), &body, 200).await;
    }
}
