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
