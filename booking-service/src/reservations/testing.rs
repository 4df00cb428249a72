//! Rows for the tests of this folder.

use service_kit::postgres::database::BatchPool;
use shared_contracts::ids::{ReservationId, UserId};

/// Inserts a reservation of one seat in the state `status`.
pub(crate) async fn reservation(db: &BatchPool, id: ReservationId, user: UserId, status: &str) {
    sqlx::query(
        "with made as (
             insert into reservations (id, user_id, session_id, status, confirming_until, booking_time, expiry_time, seats_count, total_amount, currency)
             values ($1, $2, gen_random_uuid(), $3, case $3 when 'confirming' then now() end, now(), now() + interval '1 hour', 1, 100, 'USD')
         )
         insert into reservation_items (id, reservation_id, session_seat_id, price_tier_id, row_number, seat_number, price, discount_amount, final_price)
         values (gen_random_uuid(), $1, gen_random_uuid(), gen_random_uuid(), '1', '1', 100, 0, 100)",
    )
    .bind(id)
    .bind(user)
    .bind(status)
    .execute(db.pool())
    .await
    .unwrap();
}
