//! The OpenAPI document: kept as a file, so that a change of the interface shows in review, and true of routes and database.

use event_service::app;
use service_kit::testing::{
    assert_database_has_the_limits_of, assert_document_fits_routes, assert_matches_file, database,
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
