//! The OpenAPI document is kept as a file, so that a change of the interface shows in review.

use service_kit::testing::assert_matches_file;

#[tokio::test]
async fn the_document_is_the_one_in_review() {
    let document = booking_service::app::document().unwrap().to_pretty_json().unwrap();
    assert_matches_file(&document, concat!(env!("CARGO_MANIFEST_DIR"), "/openapi.json"));
}
