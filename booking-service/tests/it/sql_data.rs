//! The statements that the compiler checks are checked by the present schema.

use std::path::Path;

use booking_service::schema::MIGRATIONS;
use service_kit::testing::{assert_sql_data_is_current, database};

#[tokio::test]
async fn the_data_of_the_checked_statements_is_that_of_the_migrations() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(".sqlx");
    assert_sql_data_is_current(&folder, &database("booking", &MIGRATIONS).await).await;
}
