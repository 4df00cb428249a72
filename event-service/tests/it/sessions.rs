//! Sessions and their seats over HTTP.

use reqwest::Method;
use serde_json::json;

use crate::support::{TestApp, id};

#[tokio::test]
async fn a_session_has_one_session_seat_for_each_seat_of_its_hall() {
    let app = TestApp::spawn().await;
    let (session, seats) = app.session(7).await;
    assert_eq!(seats.len(), 7);
    let shown = app.get(&format!("/api/v1/sessions/{session}"), 200).await;
    assert_eq!(
        (&shown["seats_count"], &shown["available_seats_count"], &shown["currency"]),
        (&json!(7), &json!(7), &json!("USD"))
    );
    let text = app.call(Method::GET, &format!("/api/v1/sessions/{session}/seats"), None).await.text().await.unwrap();
    assert!(text.contains("\"price\":100.00"), "money has two decimals: {text}");
}

#[tokio::test]
async fn two_sessions_in_a_hall_may_touch_but_not_overlap() {
    let app = TestApp::spawn().await;
    let (hall, event) = (app.hall(1).await, app.event().await);
    app.post(&format!("/api/v1/halls/{hall}/seats"), &json!({ "row_number": 1, "seat_number": 1 }), 201).await;
    let session = |from: &str, to: &str| json!({ "event_id": event, "hall_id": hall, "base_price": 5, "start_time": format!("2031-05-01T{from}:00Z"), "end_time": format!("2031-05-01T{to}:00Z") });
    app.post("/api/v1/sessions", &session("10:00", "12:00"), 201).await;
    for (from, to) in [("11:59", "13:00"), ("09:00", "10:01"), ("10:30", "11:00"), ("09:00", "13:00")] {
        assert_eq!(app.post("/api/v1/sessions", &session(from, to), 409).await["code"], "session_overlap");
    }
    app.post("/api/v1/sessions", &session("12:00", "13:00"), 201).await;
    assert_eq!(
        app.post("/api/v1/sessions", &session("15:00", "15:00"), 422).await["errors"][0]["pointer"],
        "/end_time"
    );
}

#[tokio::test]
async fn a_rejected_session_leaves_no_seats() {
    let app = TestApp::spawn().await;
    let (hall, event) = (app.hall(1).await, app.event().await);
    assert_eq!(app.post("/api/v1/sessions", &app.session_body(&event, &hall), 409).await["code"], "hall_has_no_seats");
    let stranger = uuid::Uuid::now_v7().to_string();
    assert_eq!(app.post("/api/v1/sessions", &app.session_body(&stranger, &hall), 404).await["code"], "event_not_found");
    assert_eq!(app.post("/api/v1/sessions", &app.session_body(&event, &stranger), 404).await["code"], "hall_not_found");
    let left: i64 = sqlx::query_scalar("select (select count(*) from sessions) + (select count(*) from session_seats)")
        .fetch_one(&app.db)
        .await
        .unwrap();
    assert_eq!(left, 0);
}

#[tokio::test]
async fn sessions_are_listed_by_event_hall_and_time() {
    let app = TestApp::spawn().await;
    let (first, _) = app.session(1).await;
    let (second, _) = app.session(1).await;
    let shown = app.get(&format!("/api/v1/sessions/{second}"), 200).await;
    let listed = async |query: String| -> Vec<String> {
        let page = app.get(&format!("/api/v1/sessions?{query}"), 200).await;
        page["items"].as_array().unwrap().iter().map(|item| id(item, "session_id")).collect()
    };
    assert_eq!(listed(String::new()).await, [first.clone(), second.clone()]);
    assert_eq!(listed(format!("event_id={}", id(&shown, "event_id"))).await, std::slice::from_ref(&second));
    assert_eq!(listed(format!("hall_id={}", id(&shown, "hall_id"))).await, std::slice::from_ref(&second));
    assert_eq!(listed(format!("from={}", id(&shown, "start_time"))).await, [second]);
    assert_eq!(listed(format!("to={}", id(&shown, "start_time"))).await, [first]);
}

/// Moves a session, so that it began and ended so many minutes from now. Sessions of the past can't be created.
async fn move_to(app: &TestApp, session: &str, begins_in: i32, ends_in: i32) {
    let moved = "update sessions set start_time = now() + make_interval(mins => $2), end_time = now() + make_interval(mins => $3) where session_id::text = $1";
    sqlx::query(moved).bind(session).bind(begins_in).bind(ends_in).execute(&app.db).await.unwrap();
}

#[tokio::test]
async fn a_session_says_whether_it_is_on_sale_and_why_not() {
    let app = TestApp::spawn().await;
    let (session, seats) = app.session(2).await;
    let path = format!("/api/v1/sessions/{session}");
    let sale = async || {
        let shown = app.get(&path, 200).await;
        assert_eq!(shown["on_sale"], json!(shown["off_sale_reason"].is_null()), "{shown}");
        let listed = app.get("/api/v1/sessions", 200).await["items"][0].clone();
        assert_eq!(listed, shown);
        (
            shown["off_sale_reason"].as_str().unwrap_or("on sale").to_owned(),
            shown["available_seats_count"].as_i64().unwrap(),
        )
    };
    assert_eq!(sale().await, ("on sale".to_owned(), 2));
    let set = async |change: serde_json::Value| {
        assert_eq!(app.call(Method::PATCH, &path, Some(&change)).await.status(), 200, "{change}");
    };
    set(json!({ "sales_start": "2031-01-01T00:00:00Z" })).await;
    assert_eq!(sale().await, ("not_started".to_owned(), 0));
    assert_eq!(app.get(&path, 200).await["on_sale_from"], "2031-01-01T00:00:00Z");
    set(json!({ "sales_start": null, "sales_end": "2020-01-01T00:00:00Z" })).await;
    assert_eq!(sale().await, ("ended".to_owned(), 0));
    // Sales may go on while the session runs, up to its end.
    move_to(&app, &session, -60, 60).await;
    set(json!({ "sales_end": null })).await;
    assert_eq!(sale().await, ("ended".to_owned(), 0));
    set(json!({ "sales_end": "2031-01-01T00:00:00Z" })).await;
    assert_eq!(sale().await, ("on sale".to_owned(), 2));
    let hold = json!({ "reservation_id": uuid::Uuid::now_v7(), "session_seat_ids": seats, "reserved_until": "2031-01-01T00:00:00Z", "with_prices": true });
    app.post(&format!("/api/internal/sessions/{session}/seats/reserve"), &hold, 200).await;
    assert_eq!(sale().await, ("sold_out".to_owned(), 0));
    move_to(&app, &session, -120, -60).await;
    assert_eq!(sale().await, ("ended".to_owned(), 0));
}

#[tokio::test]
async fn a_session_must_have_times_that_can_be_sold() {
    let app = TestApp::spawn().await;
    let body = app.session_body(&app.event().await, &app.hall(1).await);
    for (change, place) in [
        (json!({ "start_time": "2020-01-01T19:00:00Z", "end_time": "2020-01-01T21:00:00Z" }), "/end_time"),
        (json!({ "sales_start": "2031-01-05T20:00:00Z", "sales_end": "2031-01-05T19:00:00Z" }), "/sales_start"),
        (json!({ "sales_start": "2032-01-01T00:00:00Z" }), "/sales_start"),
        (json!({ "end_time": "9999-12-31T23:00:00-05:00" }), "/end_time"),
        (json!({ "sales_end": "9999-12-31T23:59:59-00:01" }), "/sales_end"),
    ] {
        let mut session = body.clone();
        session.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        let problem = app.post("/api/v1/sessions", &session, 422).await;
        assert_eq!(problem["errors"][0]["pointer"], place, "{problem}");
    }
}

#[tokio::test]
async fn a_session_that_has_taken_place_is_neither_cancelled_nor_deleted() {
    let app = TestApp::spawn().await;
    let (session, seats) = app.session(2).await;
    let hold = json!({ "reservation_id": uuid::Uuid::now_v7(), "session_seat_ids": [seats[0]], "reserved_until": "2031-01-01T00:00:00Z" });
    app.post(&format!("/api/internal/sessions/{session}/seats/reserve"), &hold, 200).await;
    move_to(&app, &session, -120, -60).await;
    let path = format!("/api/v1/sessions/{session}");
    assert_eq!(app.post(&format!("{path}/cancel"), &json!({}), 409).await["code"], "session_over");
    let shown = app.get(&path, 200).await;
    assert_eq!(shown["status"], "scheduled");
    let hall = shown["hall_id"].as_str().unwrap();
    let seat = id(&app.get(&format!("/api/v1/halls/{hall}/seats"), 200).await["items"][1], "seat_id");
    let mut paths = [path.clone(), format!("/api/v1/seats/{seat}"), format!("/api/v1/halls/{hall}")]
        .map(|path| (Method::DELETE, path))
        .to_vec();
    paths.push((Method::PATCH, format!("/api/v1/seats/{seat}")));
    for (method, path) in paths {
        let body = (method == Method::PATCH).then(|| json!({ "seat_number": "new" }));
        let response = app.call(method, &path, body.as_ref()).await;
        assert_eq!(response.status(), 409, "{path}");
        let problem: serde_json::Value = response.json().await.unwrap();
        let detail = problem["detail"].as_str().unwrap();
        assert!(detail.contains("taken place") && !detail.to_lowercase().contains("cancel"), "{path}: {detail}");
    }
    // While it runs, it may still be broken off.
    move_to(&app, &session, -60, 60).await;
    assert_eq!(app.post(&format!("{path}/cancel"), &json!({}), 200).await["status"], "cancelled");
}
