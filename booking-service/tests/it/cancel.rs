//! Cancellation by the customer.

use crate::support::System;

#[tokio::test]
async fn a_cancelled_reservation_frees_its_seats_before_it_answers() {
    let system = System::start().await;
    let sale = system.sale(2).await;
    let (id, user) = system.reserved(&sale, &[0, 1]).await;
    assert_eq!(system.cancel(&id, user, 200).await["status"], "cancelled");
    assert_eq!(system.statuses(&sale.session).await, ["available", "available"]);
    assert_eq!(system.lock_owner(&sale, 0).await, None);
    assert_eq!(system.cancel(&id, user, 409).await["code"], "reservation_cancelled");
    assert_eq!(system.confirm(&id, user, None, 409).await["code"], "reservation_cancelled");
    system.reserved(&sale, &[0, 1]).await;
    system.finish().await;
}

#[tokio::test]
async fn a_paid_reservation_cannot_be_cancelled() {
    let system = System::start().await;
    let sale = system.sale(1).await;
    let (id, user) = system.reserved(&sale, &[0]).await;
    system.confirm(&id, user, None, 200).await;
    assert_eq!(system.cancel(&id, user, 409).await["code"], "reservation_confirmed");
    system.finish().await;
}
