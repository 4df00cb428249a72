//! Organizers, events, locations, halls and seats over HTTP.

use reqwest::Method;
use serde_json::json;
use service_kit::admit::limits::BODY_BYTES_MAX;

use crate::support::{TestApp, id};

#[tokio::test]
async fn a_created_resource_is_found_at_its_location() {
    let app = TestApp::spawn().await;
    let body = json!({ "name": "  City Stage  ", "description": "Plays", "contact_email": "a@example.com", "contact_phone": "1" });
    let response = app.call(Method::POST, "/api/v1/organizers", Some(&body)).await;
    assert_eq!(response.status(), 201);
    let location = response.headers()["location"].to_str().unwrap().to_owned();
    let created: serde_json::Value = response.json().await.unwrap();
    assert_eq!(created["name"], "City Stage", "strings are trimmed");
    assert_eq!(app.get(&location, 200).await, created);
    for path in ["events", "locations"] {
        let made = if path == "events" { app.event().await } else { app.location().await };
        app.get(&format!("/api/v1/{path}/{made}"), 200).await;
    }
    let hall = app.hall(5).await;
    assert_eq!(app.get(&format!("/api/v1/halls/{hall}"), 200).await["capacity"], 5);
}

#[tokio::test]
async fn the_pages_of_a_list_show_each_row_once() {
    let app = TestApp::spawn().await;
    let mut made = Vec::new();
    for _ in 0..7 {
        made.push(app.organizer().await);
    }
    let (mut seen, mut path) = (Vec::new(), "/api/v1/organizers?limit=3".to_owned());
    loop {
        let page = app.get(&path, 200).await;
        seen.extend(page["items"].as_array().unwrap().iter().map(|item| id(item, "organizer_id")));
        let Some(cursor) = page["next_cursor"].as_str() else {
            break;
        };
        path = format!("/api/v1/organizers?limit=3&cursor={cursor}");
    }
    assert_eq!(seen, made);
    for bad in ["limit=0", "limit=501", "limit=x", "cursor=x"] {
        let problem = app.get(&format!("/api/v1/organizers?{bad}"), 422).await;
        assert_eq!(problem["errors"][0]["parameter"], bad.split('=').next().unwrap(), "{problem}");
    }
}

#[tokio::test]
async fn a_reference_in_a_body_must_exist() {
    let app = TestApp::spawn().await;
    let nobody = uuid::Uuid::now_v7();
    let event = json!({ "organizer_id": nobody, "title": "T", "event_type": "movie" });
    assert_eq!(app.post("/api/v1/events", &event, 404).await["code"], "organizer_not_found");
    let hall = json!({ "name": "H", "capacity": 1 });
    assert_eq!(app.post(&format!("/api/v1/locations/{nobody}/halls"), &hall, 404).await["code"], "location_not_found");
    assert_eq!(app.get(&format!("/api/v1/locations/{nobody}/halls"), 404).await["code"], "location_not_found");
    let seat = json!({ "row_number": "A", "seat_number": 1 });
    assert_eq!(app.post(&format!("/api/v1/halls/{nobody}/seats"), &seat, 404).await["code"], "hall_not_found");
    assert_eq!(app.get(&format!("/api/v1/halls/{nobody}/seats"), 404).await["code"], "hall_not_found");
}

#[tokio::test]
async fn a_time_zone_must_be_real() {
    let app = TestApp::spawn().await;
    let location = json!({ "name": "M", "address": "a", "city": "c", "country": "d", "timezone": "Europe/Atlantis" });
    let problem = app.post("/api/v1/locations", &location, 422).await;
    assert_eq!(problem["errors"][0]["pointer"], "/timezone");
}

#[tokio::test]
async fn seats_are_created_singly_as_a_grid_and_as_a_list() {
    let app = TestApp::spawn().await;
    let hall = app.hall(100).await;
    let seats = format!("/api/v1/halls/{hall}/seats");
    let one = app
        .post(
            &seats,
            &json!({ "row_number": 7, "seat_number": "12b", "seat_type": "vip", "section": "Box", "x": 1.5, "y": 2.0 }),
            201,
        )
        .await;
    assert_eq!(
        (one["row_number"].as_str(), one["seat_number"].as_str(), one["x"].as_f64()),
        (Some("7"), Some("12b"), Some(1.5))
    );
    let grid = json!({ "rows": 3, "seats_per_row": 4, "section": "Stalls", "seat_type": "wheelchair" });
    assert_eq!(app.post(&format!("{seats}/bulk"), &grid, 201).await["created"], 12);
    let list = json!({ "seats": [{ "row_number": "A", "seat_number": 1 }, { "row_number": "A", "seat_number": 2 }] });
    assert_eq!(app.post(&format!("{seats}/bulk"), &list, 201).await["created"], 2);
    let all = app.get(&format!("{seats}?limit=500"), 200).await;
    assert_eq!(all["items"].as_array().unwrap().len(), 15);
    assert_eq!((&all["items"][1]["section"], &all["items"][1]["seat_type"]), (&json!("Stalls"), &json!("wheelchair")));
}

#[tokio::test]
async fn a_call_creates_all_its_seats_or_none() {
    let app = TestApp::spawn().await;
    let hall = app.hall(5).await;
    let seats = format!("/api/v1/halls/{hall}/seats");
    let twice =
        json!({ "seats": [{ "row_number": "A", "seat_number": 1 }, { "row_number": "A", "seat_number": "1" }] });
    assert_eq!(app.post(&format!("{seats}/bulk"), &twice, 409).await["code"], "seat_exists");
    assert_eq!(
        app.post(&format!("{seats}/bulk"), &json!({ "rows": 2, "seats_per_row": 3 }), 409).await["code"],
        "hall_full"
    );
    assert!(app.get(&seats, 200).await["items"].as_array().unwrap().is_empty());
    app.post(&format!("{seats}/bulk"), &json!({ "rows": 1, "seats_per_row": 5 }), 201).await;
    assert_eq!(app.post(&seats, &json!({ "row_number": "B", "seat_number": 1 }), 409).await["code"], "hall_full");
    for bad in
        [json!({}), json!({ "rows": 1 }), json!({ "seats_per_row": 1 }), json!({ "rows": 1000, "seats_per_row": 101 })]
    {
        app.post(&format!("{seats}/bulk"), &bad, 422).await;
    }
}

#[tokio::test]
async fn a_hundred_thousand_seats_fit_in_one_call() {
    let app = TestApp::spawn().await;
    let hall = app.hall(100_000).await;
    let seats: Vec<_> = (0..100_000)
        .map(|n| json!({ "row_number": n / 500, "seat_number": n % 500, "seat_type": "regular" }))
        .collect();
    assert_eq!(
        app.post(&format!("/api/v1/halls/{hall}/seats/bulk"), &json!({ "seats": seats }), 201).await["created"],
        100_000
    );
}

/// The service parses a body of this size on another thread. Its errors are still reported by pointer.
#[tokio::test]
async fn an_error_in_a_large_body_is_named_by_its_pointer() {
    let app = TestApp::spawn().await;
    let hall = app.hall(100_000).await;
    let mut seats: Vec<_> =
        (0..5000).map(|n| json!({ "row_number": n / 500, "seat_number": n % 500, "seat_type": "regular" })).collect();
    seats[4321]["seat_type"] = "sofa".into();
    let body = json!({ "seats": seats });
    assert!(body.to_string().len() > BODY_BYTES_MAX);
    let problem = app.post(&format!("/api/v1/halls/{hall}/seats/bulk"), &body, 422).await;
    assert_eq!(problem["errors"][0]["pointer"], "/seats/4321/seat_type", "{problem}");
}
