//! The pool of the batches: connections are used again, replaced when they break, and never lost.

use std::time::Duration;

use futures::future::join_all;
use service_kit::postgres::database::{DESK_CONNECTIONS_MAX, DeskPool, DeskTransaction, TRUSTED_IDLE_MAX};
use service_kit::process::settings::Secret;
use service_kit::testing::wires::{FaultyWire, Strike};
use service_kit::testing::{server, wait_until};
use sqlx::PgConnection;

#[tokio::test]
async fn a_desk_uses_its_connection_again_and_not_one_that_broke_while_it_rested() {
    let backend = async |connection: &mut PgConnection| -> i32 {
        sqlx::query_scalar("select pg_backend_pid()").fetch_one(connection).await.unwrap()
    };
    let desks = DeskPool::new(&Secret::from(server("TEST_POSTGRES_URL").as_str()), "test").unwrap();
    let mut connection = desks.take().await.unwrap();
    let first = backend(&mut connection).await;
    desks.keep(connection);
    assert_eq!(desks.kept_count(), 1);
    let mut connection = desks.take().await.unwrap();
    assert_eq!((backend(&mut connection).await, desks.kept_count()), (first, 0));

    let mut other = desks.take().await.unwrap();
    sqlx::query("select pg_terminate_backend($1)").bind(first).execute(&mut *other).await.unwrap();
    drop(other);
    desks.keep(connection);
    tokio::time::sleep(2 * TRUSTED_IDLE_MAX).await;
    let mut connection = desks.take().await.unwrap();
    assert_ne!(backend(&mut connection).await, first);
}

/// The server falls silent while every desk waits for it. New connections would find it well again.
#[tokio::test]
async fn a_server_that_vanishes_without_a_word_costs_the_desks_no_place() {
    let places = DESK_CONNECTIONS_MAX as usize;
    let url = server("TEST_POSTGRES_URL");
    let (_wire, url) = FaultyWire::to_statements(&url, "silent_word", Strike::Silence, places).await;
    let desks = DeskPool::new(&Secret::from(url.as_str()), "test").unwrap();
    let waits = (0..places).map(|_| async {
        let mut connection = desks.take().await.unwrap();
        let asked = sqlx::query("select 1 as silent_word").execute(&mut *connection);
        assert!(tokio::time::timeout(Duration::from_millis(500), asked).await.is_err(), "it has answered");
    });
    join_all(waits).await;
    wait_until("there are connections again", Duration::from_secs(10), async || match desks.take().await {
        Ok(mut connection) => sqlx::query("select 1").execute(&mut *connection).await.is_ok(),
        Err(_) => false,
    })
    .await;
}

#[tokio::test]
async fn who_waits_for_a_connection_gets_one_as_soon_as_it_is_kept() {
    let desks = DeskPool::new(&Secret::from(server("TEST_POSTGRES_URL").as_str()), "test").unwrap();
    let crowd = (0..3 * DESK_CONNECTIONS_MAX).map(|_| async {
        let mut connection = desks.take().await.unwrap();
        sqlx::query("select pg_sleep(0.01)").execute(&mut *connection).await.unwrap();
        desks.keep(connection);
    });
    join_all(crowd).await;
}

#[tokio::test]
async fn a_desks_transaction_keeps_its_connection_and_one_that_is_dropped_leaves_nothing_open() {
    let desks = DeskPool::new(&Secret::from(server("TEST_POSTGRES_URL").as_str()), "test").unwrap();
    let key = i64::from(std::process::id());
    let lock = async |tx: &mut DeskTransaction| -> i32 {
        let sql = "select pg_backend_pid() from (select pg_advisory_xact_lock($1)) locked";
        sqlx::query_scalar(sql).bind(key).fetch_one(tx.connection().unwrap()).await.unwrap()
    };
    let mut ended = desks.begin().await.unwrap();
    let first = lock(&mut ended).await;
    ended.commit().await.unwrap();
    let mut ended = desks.begin().await.unwrap();
    assert_eq!((lock(&mut ended).await, desks.kept_count()), (first, 0));
    ended.rollback().await.unwrap();
    let mut dropped = desks.begin().await.unwrap();
    assert_eq!(lock(&mut dropped).await, first);
    drop(dropped);
    // Waits until the server has let go of it.
    let mut next = desks.begin().await.unwrap();
    assert_ne!(lock(&mut next).await, first);
}
