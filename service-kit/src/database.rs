//! PostgreSQL: one pool with the limits that keep a slow database from becoming a slow service.

use std::str::FromStr;
use std::time::Duration;

use anyhow::Context;
use backon::{ExponentialBuilder, Retryable};
use sqlx::Executor;
use sqlx::migrate::Migrator;
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};

use crate::settings::Secret;

/// How long a request waits for a connection before it is answered with `503`: a full pool is a fast no.
const ACQUIRE_TIME_MAX: Duration = Duration::from_secs(2);
/// How long start-up waits for a database that is still starting itself.
const START_TIME_MAX: Duration = Duration::from_secs(60);

/// Limits that the server enforces on our connections, so that none can hold a lock for ever:
/// a statement's time (the longest, 100,000 seats in one call, needs about 3 s), the wait for a lock, an idle transaction.
const SERVER_LIMITS: [(&str, &str); 3] = [
    ("statement_timeout", "15s"),
    ("lock_timeout", "2s"),
    ("idle_in_transaction_session_timeout", "10s"),
];

/// The pool of a service that starts: waits for the server to answer, then brings the schema up to date.
///
/// Replicas may start together: the migrator holds an advisory lock while it works.
///
/// # Errors
/// The URL is not one, the server does not answer in [`START_TIME_MAX`], or a migration fails.
pub async fn connect(
    url: &Secret,
    application: &'static str,
    connections_max: u32,
    migrator: &Migrator,
) -> anyhow::Result<PgPool> {
    let pool = lazy_pool(url, application, connections_max)?;
    (|| async { pool.acquire().await.map(drop) })
        .retry(ExponentialBuilder::default().with_max_delay(Duration::from_secs(2)).with_total_delay(Some(START_TIME_MAX)).without_max_times())
        .notify(|error, delay| tracing::warn!(%error, retry_in_ms = delay.as_millis(), "The database does not answer yet"))
        .await
        .context("the database of DATABASE_URL does not answer; is it running, and are user and password right?")?;
    migrator
        .run(&pool)
        .await
        .context("the database schema can't be brought up to date")?;
    Ok(pool)
}

/// A pool that connects when it is first used.
///
/// # Errors
/// The URL is not one.
pub fn lazy_pool(url: &Secret, application: &'static str, connections_max: u32) -> anyhow::Result<PgPool> {
    let options = PgConnectOptions::from_str(url.reveal())
        .context("DATABASE_URL is not a PostgreSQL URL like postgres://user:password@host:5432/database")?
        .application_name(application)
        .options(SERVER_LIMITS);
    Ok(PgPoolOptions::new()
        .max_connections(connections_max)
        .min_connections(connections_max.min(4))
        .acquire_timeout(ACQUIRE_TIME_MAX)
        // A broken connection is met by its next statement just as well; a ping before each costs a round trip a request.
        .test_before_acquire(false)
        // A `begin` that is dropped half-way (a client hung up, a time-out) goes back to the pool inside an open
        // transaction, and what the next borrower "commits" there is lost. Off the request path, at one round trip each.
        // Not a bare `rollback`: outside of a transaction each would put a warning into the server's log.
        .after_release(|connection, _| {
            Box::pin(async move { connection.execute("begin; rollback").await.map(|_| true) })
        })
        .connect_lazy_with(options))
}

/// Whether this error says that the database could not be reached or was too busy, so that trying again may help.
#[must_use]
pub fn is_unavailable(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed
        | sqlx::Error::WorkerCrashed
        | sqlx::Error::Io(_)
        | sqlx::Error::Tls(_) => true,
        // 08 connection, 53 out of resources, 57 operator intervention (shutdown, statement time-out), 55P03 lock
        // time-out, 40 serialization and deadlock, 25P03 idle transaction ended.
        sqlx::Error::Database(error) => error.code().is_some_and(|code| {
            ["08", "53", "57", "40"]
                .iter()
                .any(|class| code.starts_with(class))
                || code == "55P03"
                || code == "25P03"
        }),
        _ => false,
    }
}

/// The name of the constraint that a statement broke.
#[must_use]
pub fn broken_constraint(error: &sqlx::Error) -> Option<&str> {
    error.as_database_error().and_then(|error| error.constraint())
}
