//! The pool's safety net under dropped requests.

use std::time::Duration;

use futures::FutureExt;
use service_kit::database::lazy_pool;
use service_kit::testing::database;
use sqlx::PgPool;

/// A `begin` that is dropped while it is on its way must not leave its transaction to the next borrower, whose "committed"
/// rows nobody else would ever see.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_begin_leaves_no_open_transaction_behind() {
    let url = database("event", &event_service::app::MIGRATIONS).await;
    let pool = lazy_pool(&url, "test", 1).unwrap();
    let others = PgPool::connect(url.reveal()).await.unwrap();
    sqlx::query("create table written (n int)")
        .execute(&pool)
        .await
        .unwrap();
    let mut dropped = 0;
    for n in 0..200 {
        let begin = tokio::time::timeout(Duration::from_micros(n * 3), pool.begin());
        dropped += u32::from(begin.await.is_err());
        // One poll sends BEGIN and then drops the call: the sharpest case.
        drop(pool.begin().now_or_never());
        sqlx::query("insert into written values ($1)")
            .bind(n as i32)
            .execute(&pool)
            .await
            .unwrap();
        let seen: bool = sqlx::query_scalar("select exists (select from written where n = $1)")
            .bind(n as i32)
            .fetch_one(&others)
            .await
            .unwrap();
        assert!(seen, "row {n} was committed into a stale transaction");
    }
    assert!(
        dropped > 10,
        "only {dropped} begins were dropped half-way, so the test has tested nothing"
    );
}
