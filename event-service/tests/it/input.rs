//! What clients send is what they meant: misspelt members and parameters, doubled members, codings, invisible
//! characters.

use std::io::Write;

use event_service::app;
use event_service::state::MIGRATIONS;
use flate2::Compression;
use flate2::write::GzEncoder;
use reqwest::Method;
use serde_json::{Value, json};
use service_kit::testing::{assert_bodies_are_strict, assert_unknown_parameters_are_refused, database, wait_until};
use sqlx::PgPool;

use crate::booking_consumer::SOON;
use crate::support::{TestApp, id};

#[tokio::test]
async fn every_body_refuses_members_that_it_does_not_know() {
    assert_bodies_are_strict(&app::skeleton().unwrap().1, &[]);
}

#[tokio::test]
async fn every_operation_refuses_parameters_that_it_does_not_know() {
    let app = TestApp::spawn().await;
    let call = async |method: &str, path: String| {
        let response = app.call(method.parse().unwrap(), &path, None).await;
        (response.status().as_u16(), response.json().await.unwrap_or_default())
    };
    assert_unknown_parameters_are_refused(&event_service::app::skeleton().unwrap().1, call).await;
    let problem = app.get("/api/v1/sessions?hallid=x", 422).await;
    assert_eq!(problem["errors"][0]["detail"], "there is no such parameter; did you mean `hall_id`?");
}

#[tokio::test]
async fn a_misspelt_member_is_named_with_the_one_that_was_meant() {
    let app = TestApp::spawn().await;
    let mut session = app.session_body(&app.event().await, &app.hall(1).await);
    session["sale_start"] = json!("2031-01-01T00:00:00Z");
    let problem = app.post("/api/v1/sessions", &session, 422).await;
    let fault = json!({ "pointer": "/sale_start", "detail": "there is no such member; did you mean `sales_start`?" });
    assert_eq!(problem["errors"], json!([fault]));
    // The internal calls are lenient: old and new versions of the services meet there.
    let look_up = json!({ "session_seat_ids": [uuid::Uuid::nil()], "added_later": 1 });
    app.post("/api/internal/seats/look-up", &look_up, 200).await;
}

#[tokio::test]
async fn what_was_read_can_be_sent_back_and_a_status_can_not_be_set() {
    let app = TestApp::spawn().await;
    let (session, _) = app.session(1).await;
    let hall = id(&app.get(&format!("/api/v1/sessions/{session}"), 200).await, "hall_id");
    let seats = app.get(&format!("/api/v1/halls/{hall}/seats"), 200).await;
    let location = id(&app.get(&format!("/api/v1/halls/{hall}"), 200).await, "location_id");
    let event = app.event().await;
    let organizer = id(&app.get(&format!("/api/v1/events/{event}"), 200).await, "organizer_id");
    let seat = id(&seats["items"][0], "seat_id");
    for path in [
        format!("/api/v1/organizers/{organizer}"),
        format!("/api/v1/events/{event}"),
        format!("/api/v1/locations/{location}"),
        format!("/api/v1/halls/{hall}"),
        format!("/api/v1/seats/{seat}"),
        format!("/api/v1/sessions/{session}"),
    ] {
        let read = app.get(&path, 200).await;
        let mut edited: Value = app.call(Method::PATCH, &path, Some(&read)).await.json().await.unwrap();
        let mut before = read.clone();
        for resource in [&mut edited, &mut before] {
            resource.as_object_mut().unwrap().remove("updated_at");
        }
        assert_eq!(edited, before, "{path}");
        let answer = app.call(Method::PATCH, &path, Some(&json!({ "no_such": 1 }))).await;
        assert_eq!(answer.status(), 422, "{path}");
        let problem: Value = answer.json().await.unwrap();
        assert_eq!(problem["errors"][0]["pointer"], "/no_such", "{path}");
    }
    let answer =
        app.call(Method::PATCH, &format!("/api/v1/sessions/{session}"), Some(&json!({ "status": "cancelled" }))).await;
    assert_eq!(answer.status(), 422);
    let problem: Value = answer.json().await.unwrap();
    assert_eq!(problem["errors"][0]["pointer"], "/status", "{problem}");
    assert_eq!(app.get(&format!("/api/v1/sessions/{session}"), 200).await["status"], "scheduled");
}

#[tokio::test]
async fn a_body_is_read_once_and_plainly() {
    let app = TestApp::spawn().await;
    let send = async |body: Vec<u8>, header: Option<(&str, &str)>| {
        let request =
            app.http.post(format!("{}/api/v1/organizers", app.base)).header("content-type", "application/json");
        let request = header.into_iter().fold(request, |request, (name, value)| request.header(name, value));
        let response = request.body(body).send().await.unwrap();
        (response.status().as_u16(), response.json::<Value>().await.unwrap())
    };
    let (status, problem) = send(br#"{"name":"A","name":"B"}"#.to_vec(), None).await;
    assert_eq!((status, &problem["code"]), (400, &json!("malformed_json")));
    assert!(problem["detail"].as_str().unwrap().contains("the member \"name\" stands twice"), "{problem}");
    let (status, made) = send("\u{FEFF}{\"name\":\"A\"}".into(), None).await;
    assert_eq!((status, &made["name"]), (201, &json!("A")));
    let mut packed = GzEncoder::new(Vec::new(), Compression::default());
    packed.write_all(br#"{"name":"A"}"#).unwrap();
    let (status, problem) = send(packed.finish().unwrap(), Some(("content-encoding", "gzip"))).await;
    assert_eq!((status, &problem["code"]), (415, &json!("unsupported_media_type")));
    let (status, _) = send(br#"{"name":"A"}"#.to_vec(), Some(("content-encoding", "identity"))).await;
    assert_eq!(status, 201);
    // A change must not take effect behind an error: every coding that we have is excluded here.
    let (status, _) = send(br#"{"name":"A"}"#.to_vec(), Some(("accept-encoding", "deflate, *;q=0"))).await;
    assert_eq!(status, 201);
}

#[tokio::test]
async fn an_empty_text_means_null_and_an_address_is_an_address() {
    let app = TestApp::spawn().await;
    let organizer = |email: &str| json!({ "name": "A", "description": " ", "contact_email": email });
    let made = app.post("/api/v1/organizers", &organizer("kasse@b\u{fc}hne.example"), 201).await;
    assert_eq!(made["description"], Value::Null);
    app.post("/api/v1/organizers", &organizer(""), 422).await;
    let problem = app.post("/api/v1/organizers", &organizer("Box Office <box@example.org>"), 422).await;
    assert!(problem["errors"][0]["detail"].as_str().unwrap().contains("is not an e-mail address such as"), "{problem}");
}

#[tokio::test]
async fn names_and_titles_are_stored_in_one_form_and_without_what_nobody_sees() {
    let app = TestApp::spawn().await;
    let made = app.post("/api/v1/organizers", &json!({ "name": "Cafe\u{301}" }), 201).await;
    assert_eq!(made["name"], "Caf\u{e9}");
    for (name, character) in
        [("A\u{202E}B", "U+202E"), ("A\u{1B}[31m", "U+001B"), ("A\nB", "U+000A"), ("\u{AD}", "U+00AD")]
    {
        let problem = app.post("/api/v1/organizers", &json!({ "name": name }), 422).await;
        assert_eq!(problem["errors"][0]["pointer"], "/name");
        assert!(problem["errors"][0]["detail"].as_str().unwrap().contains(character), "{problem}");
    }
    app.post("/api/v1/organizers", &json!({ "name": "A", "description": "Two lines:\nhere" }), 201).await;
}

#[tokio::test]
async fn two_seats_of_a_hall_never_look_the_same() {
    let app = TestApp::spawn().await;
    let hall = app.hall(1000).await;
    let bulk = format!("/api/v1/halls/{hall}/seats/bulk");
    let seat = |section: &str, row: &str, number: &str| json!({ "section": section, "row_number": row, "seat_number": number });
    let list = |seats: Vec<Value>| json!({ "seats": seats });
    // Each pair looks the same on a ticket.
    for (one, other) in [
        (seat("", "1", "1"), json!({ "row_number": "1", "seat_number": "1" })),
        (seat("S", "A", "1"), seat("S", "\u{410}", "1")),
        (seat("S", "Caf\u{e9}", "1"), seat("S", "Cafe\u{301}", "1")),
        (seat("S", "B 1", "1"), seat("S", "B  1", "1")),
        (seat("Stalls", "1", "1"), seat("STALLS", "1", "1")),
    ] {
        let problem = app.post(&bulk, &list(vec![one.clone(), other.clone()]), 409).await;
        assert_eq!((&problem["code"], &problem["errors"][0]["pointer"]), (&json!("seat_exists"), &json!("/seats/1")));
        assert!(problem["errors"][0]["detail"].as_str().unwrap().contains("looks like /seats/0"), "{problem}");
        app.post(&bulk, &list(vec![one]), 201).await;
        let problem = app.post(&bulk, &list(vec![seat("other", "9", "9"), other]), 409).await;
        assert_eq!(problem["errors"][0]["pointer"], "/seats/1", "{problem}");
        assert!(problem["errors"][0]["detail"].as_str().unwrap().contains("looks like the seat "), "{problem}");
        sqlx::query("delete from seats").execute(&app.db).await.unwrap();
    }
    let different = ["1", "I", "l", "0", "O", "a", "A", "\u{5D0}", "\u{30A2}"].map(|row| seat("S", row, "1"));
    assert_eq!(app.post(&bulk, &list(different.to_vec()), 201).await["created"], 9);
    for (number, invisible) in
        ["1\u{200B}", "1\u{AD}", "\u{200F}1", "1\n2", "\u{200B}", "1\u{1B}[1m"].into_iter().enumerate()
    {
        for labels in [seat("S", invisible, "1"), seat("S", "1", invisible), seat(invisible, "1", "1")] {
            let problem = app.post(&bulk, &list(vec![labels]), 422).await;
            assert!(problem["errors"][0]["detail"].as_str().unwrap().contains("remove it"), "{number}: {problem}");
        }
    }
    // An edit can't make two look the same either.
    let seats = app.get(&format!("/api/v1/halls/{hall}/seats"), 200).await;
    let path = format!("/api/v1/seats/{}", id(&seats["items"][0], "seat_id"));
    let answer = app.call(Method::PATCH, &path, Some(&json!({ "row_number": "\u{410}" }))).await;
    assert_eq!(answer.status(), 409);
    assert_eq!(answer.json::<Value>().await.unwrap()["code"], "seat_exists");
}

#[tokio::test]
async fn of_five_hundred_imported_seats_the_double_is_named() {
    let app = TestApp::spawn().await;
    let hall = app.hall(1000).await;
    let mut seats: Vec<Value> =
        (0..500).map(|n| json!({ "section": "S", "row_number": n / 20, "seat_number": n % 20 })).collect();
    seats[317] = seats[45].clone();
    let problem = app.post(&format!("/api/v1/halls/{hall}/seats/bulk"), &json!({ "seats": seats }), 409).await;
    let fault = json!({ "pointer": "/seats/317", "detail": "section S, row 2, seat 5 looks like /seats/45: section S, row 2, seat 5" });
    assert_eq!(problem["errors"], json!([fault]));
}

/// Seats of an older version of the service have no key yet.
#[tokio::test]
async fn the_keys_of_older_seats_are_filled_and_doubles_stay_as_they_are() {
    let database_url = database("event", &MIGRATIONS).await;
    let db = PgPool::connect(database_url.reveal()).await.unwrap();
    sqlx::raw_sql(
        "insert into locations (location_id, name, address, city, country, timezone) values (gen_random_uuid(), 'M', 'a', 'b', 'c', 'UTC');
         insert into halls (hall_id, location_id, name, capacity) select gen_random_uuid(), location_id, 'H', 10000 from locations;
         insert into seats (seat_id, hall_id, row_number, seat_number, seat_type)
         select gen_random_uuid(), hall_id, n / 50, n % 50, 'regular' from halls, generate_series(1, 5000) as n;
         insert into seats (seat_id, hall_id, row_number, seat_number, section, seat_type)
         select gen_random_uuid(), hall_id, '1', '1', '', 'regular' from halls",
    )
    .execute(&db)
    .await
    .unwrap();
    let app = TestApp::spawn_with(database_url, crate::support::own_exchange()).await;
    let unfolded = async || -> i64 {
        sqlx::query_scalar("select count(*) from seats where folded_label is null").fetch_one(&app.db).await.unwrap()
    };
    wait_until("all seats but the double have a key", SOON, async || unfolded().await == 1).await;
    let hall: uuid::Uuid = sqlx::query_scalar("select hall_id from halls").fetch_one(&app.db).await.unwrap();
    let again = json!({ "row_number": "7", "seat_number": "7" });
    app.post(&format!("/api/v1/halls/{hall}/seats"), &again, 409).await;
    // An older version that still runs relabels a seat and leaves the key.
    let relabelled = "update seats set row_number = 'old' where row_number = '7' and seat_number = '7'";
    sqlx::query(relabelled).execute(&app.db).await.unwrap();
    assert_eq!(unfolded().await, 2);
    app.post(&format!("/api/v1/halls/{hall}/seats"), &again, 201).await;
}
