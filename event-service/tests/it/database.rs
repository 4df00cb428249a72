//! What the pool guarantees when a request is dropped and when replicas start together.

use futures::future::join_all;
use service_kit::postgres::database::{begin, connect, lazy_pool};
use service_kit::testing::{database, empty_database};
use sqlx::PgPool;

/// A `begin` that is dropped half-way must not leave an open transaction on the connection. The next borrower would
/// commit rows into that transaction, and no other connection would see them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_begin_leaves_no_open_transaction_behind() {
    let url = database("event", &event_service::state::MIGRATIONS).await;
    let pool = lazy_pool(&url, "test", 1).unwrap();
    let others = PgPool::connect(url.reveal()).await.unwrap();
    sqlx::query("create table written (n int)").execute(&pool).await.unwrap();
    let mut dropped = 0;
    for n in 0..300_i32 {
        // Polled 0 to 9 times and then dropped: sometimes before BEGIN is sent, sometimes before its answer arrives.
        let mut begin = Box::pin(begin(&pool));
        let mut begun = false;
        for _ in 0..n % 10 {
            begun = begun || futures::poll!(&mut begin).is_ready();
            tokio::task::yield_now().await;
        }
        dropped += u32::from(!begun);
        drop(begin);
        sqlx::query("insert into written values ($1)").bind(n).execute(&pool).await.unwrap();
        let seen: bool = sqlx::query_scalar("select exists (select from written where n = $1)")
            .bind(n)
            .fetch_one(&others)
            .await
            .unwrap();
        assert!(seen, "row {n} was written into a stale transaction");
    }
    assert!(dropped > 50, "only {dropped} begins were dropped half-way, so the test proves nothing");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_that_start_together_migrate_the_schema_once() {
    let url = empty_database().await;
    let replicas = (0..3).map(|_| connect(&url, "test", 2, &event_service::state::MIGRATIONS));
    for pool in join_all(replicas).await {
        let sessions: i64 =
            sqlx::query_scalar("select count(*) from sessions").fetch_one(&pool.unwrap()).await.unwrap();
        assert_eq!(sessions, 0);
    }
}
