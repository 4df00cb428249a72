//! The OpenAPI document: kept as a file, so that a change of the interface shows in review, and true of routes and database.

use event_service::app;
use service_kit::lanes::Lane;
use service_kit::testing::{
    assert_database_has_the_limits_of, assert_document_fits_routes, assert_matches_file, database, lanes_of,
};

#[tokio::test]
async fn the_document_is_the_one_in_review() {
    let document = app::skeleton().unwrap().1.to_pretty_json().unwrap();
    assert_matches_file(&document, concat!(env!("CARGO_MANIFEST_DIR"), "/openapi.json"));
}

#[tokio::test]
async fn every_route_is_in_the_document_and_every_operation_has_a_route() {
    let (routes, document) = app::skeleton().unwrap();
    assert_document_fits_routes(routes, &document).await;
}

#[tokio::test]
async fn every_route_has_a_lane() {
    let lanes = lanes_of(&app::skeleton().unwrap().1, app::lane_of);
    for (route, lane) in &lanes {
        let expected = match route.as_str() {
            "GET /api/v1/sessions/{session_id}/seats"
            | "GET /api/v1/sessions/{session_id}/seat-map"
            | "GET /api/v1/sessions/{session_id}/seat-map/stream" => Lane::Map,
            _ if route.starts_with("GET ") => Lane::Read,
            _ => Lane::Admin,
        };
        assert_eq!(*lane, expected, "{route}");
    }
}

#[tokio::test]
async fn the_database_has_the_limits_of_the_document() {
    let database_url = database("event", &app::MIGRATIONS).await;
    let pairs = [
        ("CreateOrganizer", "organizers"),
        ("CreateEvent", "events"),
        ("CreateLocation", "locations"),
        ("CreateHall", "halls"),
        ("CreateSeat", "seats"),
        ("CreateSession", "sessions"),
    ];
    assert_database_has_the_limits_of(&app::skeleton().unwrap().1, &database_url, &pairs).await;
}
