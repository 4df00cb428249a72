//! Paging through lists while other clients insert, and searching for events.

use std::collections::HashMap;

use shared_contracts::ids::SessionId;
use sqlx::PgPool;

use crate::support::{TestApp, id};

/// Inserts sessions without seats, one an hour from hour `first` on.
async fn insert_sessions(db: &PgPool, event: &str, hall: &str, first: i64, count: usize) -> Vec<String> {
    let ids: Vec<SessionId> = (0..count).map(|_| SessionId::new()).collect();
    sqlx::query(
        "insert into sessions (session_id, event_id, hall_id, start_time, end_time, base_price, currency)
         select id, $2::uuid, $3::uuid, hour, hour + interval '30 minutes', 1, 'USD'
         from (select id, timestamptz '2030-01-01' + (n + $4) * interval '1 hour' as hour from unnest($1::uuid[]) with ordinality as made (id, n)) made",
    )
    .bind(&ids)
    .bind(event.parse::<uuid::Uuid>().unwrap())
    .bind(hall.parse::<uuid::Uuid>().unwrap())
    .bind(first)
    .execute(db)
    .await
    .unwrap();
    ids.iter().map(ToString::to_string).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_of_ten_thousand_rows_is_shown_once_while_a_thousand_are_inserted() {
    let app = TestApp::spawn().await;
    let (event, hall) = (app.event().await, app.hall(1).await);
    let present = insert_sessions(&app.db, &event, &hall, 0, 10_000).await;
    let writer = async {
        for batch in 0..1000 {
            insert_sessions(&app.db, &event, &hall, 10_000 + batch, 1).await;
        }
    };
    let reader = async {
        let (mut seen, mut cursor, mut last) = (HashMap::<String, u32>::new(), String::new(), String::new());
        loop {
            let page = app.get(&format!("/api/v1/sessions?limit=100{cursor}"), 200).await;
            for item in page["items"].as_array().unwrap() {
                let session = id(item, "session_id");
                assert!(session > last, "{session} comes after {last}");
                last.clone_from(&session);
                *seen.entry(session).or_default() += 1;
            }
            match page["next_cursor"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => return seen,
            }
        }
    };
    let (seen, ()) = tokio::join!(reader, writer);
    for session in &present {
        assert_eq!(seen.get(session), Some(&1), "{session}");
    }
    println!("{} of 11,000 rows were seen", seen.len());
}

#[tokio::test]
async fn events_are_found_by_words_in_title_and_description() {
    let app = TestApp::spawn().await;
    let organizer = app.organizer().await;
    for (title, description) in
        [("Winter Concert", "Two hours"), ("Summer concert", "100% fun_"), ("Match", "A winter game")]
    {
        let event = serde_json::json!({ "organizer_id": organizer, "title": title, "description": description, "event_type": "other" });
        app.post("/api/v1/events", &event, 201).await;
    }
    let found = async |query: &str| -> Vec<String> {
        let page = app.get(&format!("/api/v1/events?q={query}"), 200).await;
        page["items"].as_array().unwrap().iter().map(|event| id(event, "title")).collect()
    };
    assert_eq!(found("CONCERT").await, ["Winter Concert", "Summer concert"]);
    assert_eq!(found("winter%20conc").await, ["Winter Concert"]);
    assert_eq!(found("winter").await, ["Winter Concert", "Match"]);
    assert_eq!(found("100%25").await, ["Summer concert"]);
    for nothing in ["%25wint%25", "fu_n", "hours%20winter%20match", "%5C"] {
        assert!(found(nothing).await.is_empty(), "{nothing}");
    }
    let problem = app.get(&format!("/api/v1/events?q={}&limit=0&event_type=party", "x".repeat(101)), 422).await;
    let mut named: Vec<_> = problem["errors"].as_array().unwrap().iter().map(|fault| id(fault, "parameter")).collect();
    named.sort();
    assert_eq!(named, ["event_type", "limit", "q"], "all errors at once");
}
