//! The OpenAPI document: kept as a snapshot, so that a change of the interface shows in review, and true of routes and
//! database.

use booking_service::app;
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
async fn every_route_has_a_request_class_and_payments_have_their_own() {
    let lanes = request_classes_of(&app::skeleton().unwrap().1, app::request_class);
    let in_lane = |wanted| lanes.iter().filter(|(_, lane)| **lane == wanted).map(|(route, _)| route.as_str()).collect();
    let holds: Vec<&str> = in_lane(RequestClass::Hold);
    assert_eq!(holds, ["POST /api/v1/reservations"]);
    let payers: Vec<&str> = in_lane(RequestClass::Confirm);
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
    assert_eq!(lanes["POST /api/v1/payments/webhook"], RequestClass::Notice);
    assert_eq!(lanes["GET /api/v1/reservations"], RequestClass::Read);
    assert_eq!(lanes["POST /api/v1/price-tiers"], RequestClass::Admin);
}

#[tokio::test]
async fn the_database_has_the_limits_of_the_document() {
    let database_url = database("booking", &booking_service::schema::MIGRATIONS).await;
    let pairs = [
        ("CreatePriceTier", "price_tiers"),
        ("Reservation", "reservations"),
        ("ReservationItem", "reservation_items"),
        ("Ticket", "tickets"),
    ];
    assert_database_has_the_limits_of(&app::skeleton().unwrap().1, &database_url, &pairs).await;
}
