//! The OpenAPI document: kept as a file, so that a change of the interface shows in review, and true of routes and database.

use booking_service::app;
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
async fn every_route_has_a_lane_and_paying_has_one_without_a_crowd() {
    let lanes = lanes_of(&app::skeleton().unwrap().1, app::lane_of);
    let in_lane = |wanted| lanes.iter().filter(|(_, lane)| **lane == wanted).map(|(route, _)| route.as_str()).collect();
    let holds: Vec<&str> = in_lane(Lane::Hold);
    assert_eq!(holds, ["POST /api/v1/reservations"]);
    let payers: Vec<&str> = in_lane(Lane::Confirm);
    assert_eq!(
        payers,
        [
            "DELETE /api/v1/reservations/{id}",
            "GET /api/v1/reservations/{id}",
            "GET /api/v1/tickets/user/{user_id}",
            "GET /api/v1/tickets/{id}",
            "GET /api/v1/tickets/{id}/qr",
            "POST /api/v1/reservations/{id}/confirm",
            "POST /api/v1/tickets/{id}/refund",
        ]
    );
    assert_eq!(lanes["POST /api/v1/payments/webhook"], Lane::Notice);
    assert_eq!(lanes["GET /api/v1/reservations"], Lane::Read);
    assert_eq!(lanes["POST /api/v1/price-tiers"], Lane::Admin);
}

#[tokio::test]
async fn the_database_has_the_limits_of_the_document() {
    let database_url = database("booking", &app::MIGRATIONS).await;
    let pairs = [
        ("CreatePriceTier", "price_tiers"),
        ("Reservation", "reservations"),
        ("ReservationItem", "reservation_items"),
        ("Ticket", "tickets"),
    ];
    assert_database_has_the_limits_of(&app::skeleton().unwrap().1, &database_url, &pairs).await;
}
