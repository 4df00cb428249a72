//! The OpenAPI document: kept as a snapshot, so that a change of the interface shows in review, and true of routes and
//! database.

use event_service::app;
use event_service::state::MIGRATIONS;
use insta::{assert_json_snapshot, with_settings};
use service_kit::admit::bulkheads::RequestClass;
use service_kit::testing::{
    assert_database_has_the_limits_of, assert_document_fits_routes, database, request_classes_of,
};

/// After an intended change, `INSTA_UPDATE=always` writes the snapshot anew.
#[tokio::test]
async fn the_document_is_the_one_in_the_snapshot() {
    let document = app::skeleton().unwrap().1;
    with_settings!({ sort_maps => true, omit_expression => true, prepend_module_to_snapshot => false }, {
        assert_json_snapshot!("openapi", document);
    });
}

#[tokio::test]
async fn every_route_is_in_the_document_and_every_operation_has_a_route() {
    let (routes, document) = app::skeleton().unwrap();
    assert_document_fits_routes(routes, &document).await;
}

#[tokio::test]
async fn every_route_has_a_request_class() {
    let lanes = request_classes_of(&app::skeleton().unwrap().1, app::request_class);
    for (route, lane) in &lanes {
        let expected = match route.as_str() {
            "GET /api/v1/sessions/{session_id}/seats"
            | "GET /api/v1/sessions/{session_id}/seat-map"
            | "GET /api/v1/sessions/{session_id}/seat-map/stream" => RequestClass::Map,
            _ if route.starts_with("GET ") => RequestClass::Read,
            _ => RequestClass::Admin,
        };
        assert_eq!(*lane, expected, "{route}");
    }
}

#[tokio::test]
async fn the_database_has_the_limits_of_the_document() {
    let database_url = database("event", &MIGRATIONS).await;
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
