//! The pool of the batches: connections are used again, replaced when they break, and never lost.

use std::time::Duration;

use futures::future::join_all;
use service_kit::postgres::database::{BATCH_CONNECTIONS_MAX, BatchPool, BatchTransaction, TRUSTED_IDLE_MAX};
use service_kit::process::settings::Secret;
use service_kit::testing::wires::{Fault, FaultProxy};
use service_kit::testing::{server, wait_until};
use sqlx::PgConnection;

#[tokio::test]
async fn a_kept_connection_is_used_again_unless_it_broke_meanwhile() {
    let backend = async |connection: &mut PgConnection| -> i32 {
        sqlx::query_scalar("select pg_backend_pid()").fetch_one(connection).await.unwrap()
    };
    let pool = BatchPool::new(&Secret::from(server("TEST_POSTGRES_URL").as_str()), "test").unwrap();
    let mut connection = pool.acquire().await.unwrap();
    let first = backend(&mut connection).await;
    pool.release(connection);
    assert_eq!(pool.kept_count(), 1);
    let mut connection = pool.acquire().await.unwrap();
    assert_eq!((backend(&mut connection).await, pool.kept_count()), (first, 0));

    let mut other = pool.acquire().await.unwrap();
    sqlx::query("select pg_terminate_backend($1)").bind(first).execute(&mut *other).await.unwrap();
    drop(other);
    pool.release(connection);
    tokio::time::sleep(2 * TRUSTED_IDLE_MAX).await;
    let mut connection = pool.acquire().await.unwrap();
    assert_ne!(backend(&mut connection).await, first);
}

/// The server stops answering while every connection waits for an answer. New connections get answers again.
#[tokio::test]
async fn a_server_that_falls_silent_costs_the_pool_no_permit() {
    let connections = BATCH_CONNECTIONS_MAX as usize;
    let url = server("TEST_POSTGRES_URL");
    let (_wire, url) = FaultProxy::to_statements(&url, "silent_word", Fault::Silence, connections).await;
    let pool = BatchPool::new(&Secret::from(url.as_str()), "test").unwrap();
    let waits = (0..connections).map(|_| async {
        let mut connection = pool.acquire().await.unwrap();
        let asked = sqlx::query("select 1 as silent_word").execute(&mut *connection);
        assert!(tokio::time::timeout(Duration::from_millis(500), asked).await.is_err(), "it has answered");
    });
    join_all(waits).await;
    wait_until("there are connections again", Duration::from_secs(10), async || match pool.acquire().await {
        Ok(mut connection) => sqlx::query("select 1").execute(&mut *connection).await.is_ok(),
        Err(_) => false,
    })
    .await;
}

#[tokio::test]
async fn a_waiting_acquire_gets_a_connection_as_soon_as_one_is_released() {
    let pool = BatchPool::new(&Secret::from(server("TEST_POSTGRES_URL").as_str()), "test").unwrap();
    let crowd = (0..3 * BATCH_CONNECTIONS_MAX).map(|_| async {
        let mut connection = pool.acquire().await.unwrap();
        sqlx::query("select pg_sleep(0.01)").execute(&mut *connection).await.unwrap();
        pool.release(connection);
    });
    join_all(crowd).await;
}

#[tokio::test]
async fn a_transaction_keeps_its_connection_and_a_dropped_one_leaves_nothing_open() {
    let pool = BatchPool::new(&Secret::from(server("TEST_POSTGRES_URL").as_str()), "test").unwrap();
    let key = i64::from(std::process::id());
    let lock = async |tx: &mut BatchTransaction| -> i32 {
        let sql = "select pg_backend_pid() from (select pg_advisory_xact_lock($1)) locked";
        sqlx::query_scalar(sql).bind(key).fetch_one(tx.connection().unwrap()).await.unwrap()
    };
    let mut ended = pool.begin().await.unwrap();
    let first = lock(&mut ended).await;
    ended.commit().await.unwrap();
    let mut ended = pool.begin().await.unwrap();
    assert_eq!((lock(&mut ended).await, pool.kept_count()), (first, 0));
    ended.rollback().await.unwrap();
    let mut dropped = pool.begin().await.unwrap();
    assert_eq!(lock(&mut dropped).await, first);
    drop(dropped);
    // Waits until the server has rolled the dropped transaction back.
    let mut next = pool.begin().await.unwrap();
    assert_ne!(lock(&mut next).await, first);
}
