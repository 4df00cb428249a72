//! Which callers each operation admits, and the internal API's own key and listener.

use event_service::app;
use service_kit::auth::{AuthSettings, InternalKeys};
use service_kit::testing::login::Need::{self, Nothing, Organizer, Service};
use service_kit::testing::login::{Login, assert_only_those_who_may_are_let_in};
use tokio::net::TcpListener;

use crate::support::TestApp;

/// What a caller needs for each operation. The test fails if an operation is missing here or no longer exists.
const NEEDS: &[(&str, Need)] = &[
    ("POST /api/v1/organizers", Organizer),
    ("GET /api/v1/organizers", Nothing),
    ("GET /api/v1/organizers/{organizer_id}", Nothing),
    ("PATCH /api/v1/organizers/{organizer_id}", Organizer),
    ("DELETE /api/v1/organizers/{organizer_id}", Organizer),
    ("POST /api/v1/events", Organizer),
    ("GET /api/v1/events", Nothing),
    ("GET /api/v1/events/{event_id}", Nothing),
    ("PATCH /api/v1/events/{event_id}", Organizer),
    ("DELETE /api/v1/events/{event_id}", Organizer),
    ("POST /api/v1/locations", Organizer),
    ("GET /api/v1/locations", Nothing),
    ("GET /api/v1/locations/{location_id}", Nothing),
    ("PATCH /api/v1/locations/{location_id}", Organizer),
    ("DELETE /api/v1/locations/{location_id}", Organizer),
    ("POST /api/v1/locations/{location_id}/halls", Organizer),
    ("GET /api/v1/locations/{location_id}/halls", Nothing),
    ("GET /api/v1/halls/{hall_id}", Nothing),
    ("PATCH /api/v1/halls/{hall_id}", Organizer),
    ("DELETE /api/v1/halls/{hall_id}", Organizer),
    ("POST /api/v1/halls/{hall_id}/seats", Organizer),
    ("POST /api/v1/halls/{hall_id}/seats/bulk", Organizer),
    ("GET /api/v1/halls/{hall_id}/seats", Nothing),
    ("GET /api/v1/seats/{seat_id}", Nothing),
    ("PATCH /api/v1/seats/{seat_id}", Organizer),
    ("DELETE /api/v1/seats/{seat_id}", Organizer),
    ("POST /api/v1/sessions", Organizer),
    ("GET /api/v1/sessions", Nothing),
    ("GET /api/v1/sessions/{session_id}", Nothing),
    ("PATCH /api/v1/sessions/{session_id}", Organizer),
    ("DELETE /api/v1/sessions/{session_id}", Organizer),
    ("POST /api/v1/sessions/{session_id}/cancel", Organizer),
    ("GET /api/v1/sessions/{session_id}/seats", Nothing),
    ("GET /api/v1/sessions/{session_id}/seat-map", Nothing),
    ("GET /api/v1/sessions/{session_id}/seat-map/stream", Nothing),
    ("POST /api/internal/sessions/{session_id}/seats/check-availability", Service),
    ("POST /api/internal/sessions/{session_id}/seats/reserve", Service),
    ("POST /api/internal/sessions/{session_id}/seats/release", Service),
    ("POST /api/internal/sessions/{session_id}/seats/confirm", Service),
    ("GET /api/internal/sessions/{session_id}", Service),
    ("GET /api/internal/sessions/{session_id}/pricing", Service),
    ("GET /api/internal/holds/overdue", Service),
    ("GET /api/internal/sessions/cancelled", Service),
    ("GET /api/internal/seats/owned", Service),
    ("POST /api/internal/seats/look-up", Service),
    ("POST /api/internal/seats/reserve", Service),
    ("POST /api/internal/seats/release", Service),
    ("GET /api/internal/health", Service),
    ("POST /api/internal/health", Service),
    ("GET /metrics", Nothing),
    ("GET /health", Nothing),
    ("GET /health/live", Nothing),
    ("GET /health/ready", Nothing),
];

#[tokio::test]
async fn every_operation_admits_only_the_callers_it_should() {
    let login = Login::new();
    let app = TestApp::spawn_as(login.settings(), None).await;
    assert_only_those_who_may_are_let_in(&app.base, &app::skeleton().unwrap().1, &login, NEEDS).await;
}

fn keyed(current: &str, previous: Option<&str>) -> AuthSettings {
    AuthSettings { internal_keys: InternalKeys::new(current, previous), ..AuthSettings::default() }
}

async fn status_with(base: &str, key: Option<&str>) -> u16 {
    let mut request = reqwest::Client::builder().build().unwrap().get(format!("{base}/api/internal/health"));
    if let Some(key) = key {
        request = request.header("x-internal-api-key", key);
    }
    request.send().await.unwrap().status().as_u16()
}

#[tokio::test]
async fn the_old_and_the_new_internal_key_work_during_a_rotation() {
    let app = TestApp::spawn_as(keyed("the new key", Some("the old key")), None).await;
    for (key, expected) in [
        (None, 401),
        (Some(""), 401),
        (Some("the new ke"), 401),
        (Some("THE NEW KEY"), 401),
        (Some("the new key"), 200),
        (Some("the old key"), 200),
    ] {
        assert_eq!(status_with(&app.base, key).await, expected, "{key:?}");
    }
    let after = TestApp::spawn_as(keyed("the new key", None), None).await;
    assert_eq!(status_with(&after.base, Some("the old key")).await, 401);
    let without = TestApp::spawn().await;
    assert_eq!(status_with(&without.base, None).await, 200, "a service without a key requires none");
}

#[tokio::test]
async fn with_its_own_listener_the_internal_api_is_served_only_there() {
    let port = loop {
        // Below the range from which the kernel picks ports for outgoing connections.
        let port = 10_000 + (uuid::Uuid::now_v7().as_u128() % 10_000) as u16;
        if TcpListener::bind(("127.0.0.1", port)).await.is_ok() {
            break port;
        }
    };
    let app = TestApp::spawn_as(keyed("a key", None), Some(([127, 0, 0, 1], port).into())).await;
    let internal = format!("http://127.0.0.1:{port}");
    assert_eq!(status_with(&app.base, Some("a key")).await, 404);
    assert_eq!(status_with(&internal, Some("a key")).await, 200);
    assert_eq!(status_with(&internal, None).await, 401);
    let public = app.http.get(format!("{internal}/api/v1/events")).send().await.unwrap();
    assert_eq!(public.status(), 404, "the internal listener also serves the public API");
    app.get("/api/v1/events", 200).await;
}

#[tokio::test]
async fn the_document_names_the_credentials_that_this_service_accepts() {
    let schemes = async |app: &TestApp| {
        let document = app.get("/openapi.json", 200).await;
        let names: Vec<String> = document["components"]["securitySchemes"]
            .as_object()
            .map(|schemes| schemes.keys().cloned().collect())
            .unwrap_or_default();
        (names, document["paths"]["/api/v1/organizers"]["post"]["security"].clone())
    };
    let open = TestApp::spawn().await;
    assert_eq!(schemes(&open).await, (vec!["user_id".to_owned()], serde_json::Value::Null));
    let login = Login::new();
    let app = TestApp::spawn_as(login.settings(), None).await;
    assert_eq!(
        schemes(&app).await,
        (
            vec!["bearer".to_owned(), "internal_key".to_owned()],
            serde_json::json!([{ "bearer": ["organizer", "admin"] }])
        )
    );
}
