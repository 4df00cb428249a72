//! PostgreSQL: one pool with the limits that keep a slow database from becoming a slow service.

use std::ops::{Deref, DerefMut};
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use backon::{ExponentialBuilder, Retryable};
use sqlx::migrate::Migrator;
use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions, PgSslMode};
use sqlx::{Connection, PgConnection, PgTransaction, Postgres};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::process::settings::Secret;

/// How long a request waits for a connection before it is answered with `503`: a full pool is a fast no.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the health check of a released connection may take.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(1);
/// How long start-up waits for a database that is still starting itself.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// One attempt of it, with a look at the schema: a database that has fallen silent is asked again on a new connection.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(5);

/// Limits that the server enforces on our connections, so that none can hold a lock for ever: a statement's time (the
/// longest, 100,000 seats in one call, needs about 3 s), the wait for a lock, an idle transaction.
const SERVER_LIMITS: [(&str, &str); 3] =
    [("statement_timeout", "15s"), ("lock_timeout", "2s"), ("idle_in_transaction_session_timeout", "10s")];

/// How long a connection may have been idle and is used without a ping.
pub const TRUSTED_IDLE_MAX: Duration = Duration::from_millis(100);
/// How often a [`BatchPool`] gives a connection back to the pool behind it.
const RETURN_INTERVAL: Duration = Duration::from_secs(10);

/// The pool of a service that starts: waits for the server to answer, then brings the schema up to date.
///
/// Replicas may start together: the migrator holds an advisory lock while it works, and the others wait for it as long
/// as it takes.
///
/// # Errors
/// The URL is not one, the server does not answer in [`START_TIMEOUT`], or a migration fails.
pub async fn connect(
    url: &Secret,
    application: &'static str,
    connections_max: u32,
    migrator: &Migrator,
) -> anyhow::Result<PgPool> {
    // On a connection of its own, without the limits that are meant for requests.
    let options = base_options(url, application)?;
    let attempt = || async { tokio::time::timeout(ATTEMPT_TIMEOUT, look(&options, migrator)).await? };
    let (mut connection, is_current) = attempt
        .retry(
            ExponentialBuilder::default()
                .with_max_delay(Duration::from_secs(2))
                .with_total_delay(Some(START_TIMEOUT))
                .without_max_times(),
        )
        .notify(
            |error, delay| tracing::warn!(%error, retry_in_ms = delay.as_millis(), "The database does not answer yet"),
        )
        .await
        .context("the database of DATABASE_URL does not answer; is it running, and are user and password right?")?;
    // A migration takes as long as it takes, so a start that needs none must not wait for anything here.
    if !is_current {
        migrator.run(&mut connection).await.context("the database schema can't be brought up to date")?;
    }
    drop(connection);
    lazy_pool(url, application, connections_max)
}

/// A connection, and whether the schema is exactly what `migrator` makes.
async fn look(options: &PgConnectOptions, migrator: &Migrator) -> anyhow::Result<(PgConnection, bool)> {
    let mut connection = PgConnection::connect_with(options).await?;
    let applied = "select version, checksum from _sqlx_migrations where success order by version";
    let applied: Vec<(i64, Vec<u8>)> = match sqlx::query_as(applied).fetch_all(&mut connection).await {
        // There is no such table yet.
        Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some("42P01") => Vec::new(),
        other => other?,
    };
    let wanted = migrator.iter().map(|migration| (migration.version, migration.checksum.to_vec()));
    let is_current = wanted.eq(applied);
    Ok((connection, is_current))
}

fn base_options(url: &Secret, application: &'static str) -> anyhow::Result<PgConnectOptions> {
    let options = PgConnectOptions::from_str(url.reveal())
        .context("DATABASE_URL is not a PostgreSQL URL like postgres://user:password@host:5432/database")?;
    let text = url.reveal();
    // The library's default asks for TLS, takes it unverified, and goes on without: a round trip a connection for no
    // safety.
    let options = if text.contains("sslmode=") || text.contains("ssl-mode=") {
        options
    } else {
        options.ssl_mode(PgSslMode::Disable)
    };
    Ok(options.application_name(application))
}

/// A pool that connects when it is first used.
///
/// # Errors
/// The URL is not one.
pub fn lazy_pool(url: &Secret, application: &'static str, connections_max: u32) -> anyhow::Result<PgPool> {
    Ok(pool_options(connections_max).connect_lazy_with(base_options(url, application)?.options(SERVER_LIMITS)))
}

/// What keeps the plans of [`BatchPool`]: by key, and made once. The planner would weigh them anew for each length of a
/// list, at a third of the statement's cost; and for tables that have grown faster than their statistics it would read
/// all of a table to find ten rows. No machine code for them either: forbidden ways count as dear, and dear plans would
/// be compiled.
const GENERIC_PLAN_SETTINGS: [(&str, &str); 5] = [
    ("plan_cache_mode", "force_generic_plan"),
    ("enable_seqscan", "off"),
    ("enable_hashjoin", "off"),
    ("enable_mergejoin", "off"),
    ("jit", "off"),
];

/// Connections of a [`BatchPool`]: two for each of the seven batchers of the Booking Service, and one for the relay.
pub const BATCH_CONNECTIONS_MAX: u32 = 15;

/// A pool for the handful of statements that run thousands of times in the minute of an on-sale, and look every row up
/// by its key. They do not queue with others for connections, either.
///
/// The library's pool asks a connection how it is each time that one is given back: a round trip beside each statement.
/// Those that are kept here between two uses are not asked.
#[derive(Debug, Clone)]
pub struct BatchPool {
    pool: PgPool,
    /// One permit for each connection in use. An acquire waits for a permit and not for the library's pool, which does
    /// not see that a kept connection is free.
    permits: Arc<Semaphore>,
    kept: Arc<Mutex<Kept>>,
}

/// Connections between two uses.
#[derive(Debug)]
struct Kept {
    /// Each with the time of its last use; the last one used is taken first.
    connections: Vec<(PoolConnection<Postgres>, Instant)>,
    /// When the pool last got one back.
    returned_at: Instant,
}

impl BatchPool {
    /// A pool that connects when it is first used.
    ///
    /// # Errors
    /// The URL is not one.
    pub fn new(url: &Secret, application: &'static str) -> anyhow::Result<Self> {
        let options = base_options(url, application)?.options(SERVER_LIMITS).options(GENERIC_PLAN_SETTINGS);
        let kept = Kept { connections: Vec::new(), returned_at: Instant::now() };
        let pool = pool_options(BATCH_CONNECTIONS_MAX).after_release(|connection, _| {
            // The library asks it without a limit, and until the answer its place is taken: a server that has vanished
            // without a word would cost every batcher its connections for a quarter of an hour.
            Box::pin(async move {
                let answer = tokio::time::timeout(RELEASE_TIMEOUT, connection.ping()).await;
                answer.map_err(|_| sqlx::Error::PoolTimedOut)?.map(|()| true)
            })
        });
        Ok(Self {
            pool: pool.connect_lazy_with(options),
            permits: Arc::new(Semaphore::new(BATCH_CONNECTIONS_MAX as usize)),
            kept: Arc::new(Mutex::new(kept)),
        })
    }

    /// The library's pool behind it, for its metrics alone: an acquire there does not see the connections that are kept
    /// here.
    #[must_use]
    pub fn pool(&self) -> &PgPool {
        &self.pool
    }

    /// Begins a transaction on a connection that is kept again after its commit.
    ///
    /// # Errors
    /// As [`Self::acquire`], or the server does not answer.
    pub async fn begin(&self) -> Result<BatchTransaction, sqlx::Error> {
        let mut transaction = BatchTransaction { pool: self.clone(), connection: Some(self.acquire().await?) };
        transaction.execute("BEGIN").await?;
        Ok(transaction)
    }

    /// Acquires a connection. Return it with [`Self::release`]; the pool checks a dropped one by a round trip.
    ///
    /// # Errors
    /// None can be had in time.
    pub async fn acquire(&self) -> Result<BatchConnection, sqlx::Error> {
        let permit = tokio::time::timeout(ACQUIRE_TIMEOUT, Arc::clone(&self.permits).acquire_owned()).await;
        let permit = permit.map_err(|_| sqlx::Error::PoolTimedOut)?.map_err(|_| sqlx::Error::PoolClosed)?;
        // What has rested too long is looked at by the pool.
        while let Some((connection, used_at)) = self.kept().connections.pop() {
            if used_at.elapsed() <= TRUSTED_IDLE_MAX {
                return Ok(BatchConnection { connection, permit });
            }
        }
        Ok(BatchConnection { connection: self.pool.acquire().await?, permit })
    }

    /// Keeps a connection, outside of any transaction, for the next use.
    pub fn release(&self, used: BatchConnection) {
        let BatchConnection { connection, permit } = used;
        let mut kept = self.kept();
        // Now and then the pool gets one, as it knows when one has become too old.
        if kept.returned_at.elapsed() > RETURN_INTERVAL {
            kept.returned_at = Instant::now();
        } else {
            kept.connections.push((connection, Instant::now()));
        }
        drop((kept, permit));
    }

    /// How many are kept.
    #[must_use]
    pub fn kept_count(&self) -> usize {
        self.kept().connections.len()
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection of a [`BatchPool`] in use.
#[derive(Debug)]
pub struct BatchConnection {
    connection: PoolConnection<Postgres>,
    permit: OwnedSemaphorePermit,
}

impl Deref for BatchConnection {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        &self.connection
    }
}

impl DerefMut for BatchConnection {
    fn deref_mut(&mut self) -> &mut PgConnection {
        &mut self.connection
    }
}

/// A transaction of a batch. Dropped, its connection is closed, and the server rolls it back: so whoever stops waiting,
/// even for its beginning, leaves nothing open for others.
#[derive(Debug)]
pub struct BatchTransaction {
    pool: BatchPool,
    /// There until the end.
    connection: Option<BatchConnection>,
}

impl BatchTransaction {
    /// The connection, for statements.
    ///
    /// # Errors
    /// None before the end.
    pub fn connection(&mut self) -> Result<&mut PgConnection, sqlx::Error> {
        self.connection.as_deref_mut().ok_or(sqlx::Error::WorkerCrashed)
    }

    async fn execute(&mut self, statement: &'static str) -> Result<(), sqlx::Error> {
        sqlx::raw_sql(statement).execute(self.connection()?).await.map(drop)
    }

    /// Commits.
    ///
    /// # Errors
    /// No answer: it may be committed or not.
    pub async fn commit(self) -> Result<(), sqlx::Error> {
        self.end("COMMIT").await
    }

    /// Rolls back, for whom the connection is worth keeping.
    ///
    /// # Errors
    /// No answer.
    pub async fn rollback(self) -> Result<(), sqlx::Error> {
        self.end("ROLLBACK").await
    }

    async fn end(mut self, statement: &'static str) -> Result<(), sqlx::Error> {
        self.execute(statement).await?;
        if let Some(connection) = self.connection.take() {
            self.pool.release(connection);
        }
        Ok(())
    }
}

impl Drop for BatchTransaction {
    fn drop(&mut self) {
        if let Some(open) = &mut self.connection {
            open.connection.close_on_drop();
        }
    }
}

fn pool_options(connections_max: u32) -> PgPoolOptions {
    PgPoolOptions::new()
        .max_connections(connections_max)
        // Opened when the pool is made: the first rush after a start should not have to wait for them.
        .min_connections(connections_max.min(4))
        .acquire_timeout(ACQUIRE_TIMEOUT)
        // A ping before each use costs a round trip a request. One that has rested may have broken meanwhile, so it is
        // asked: after an outage not every connection should cost somebody a refusal.
        .test_before_acquire(false)
        .before_acquire(|connection, metadata| {
            Box::pin(async move {
                if metadata.idle_for > TRUSTED_IDLE_MAX {
                    // Its error has the connection dropped at once; a `false` would have it say goodbye to a peer that
                    // is gone.
                    connection.ping().await?;
                }
                Ok(true)
            })
        })
}

/// Begins a transaction; the only way to do so here (`clippy.toml` bans `Pool::begin`).
///
/// A `begin` of the library that is dropped while it is on its way (a client hung up, a time-out) gives its connection
/// back inside an open transaction, and what the next borrower "commits" there is lost. So it runs in a task of its
/// own: whoever stops waiting drops a finished transaction, which rolls back as it should. (The other cure, a rollback
/// after each use of a connection, was measured at more than half of all transactions of the Booking database.)
///
/// # Errors
/// As those of the library.
pub async fn begin(pool: &PgPool) -> Result<PgTransaction<'static>, sqlx::Error> {
    let pool = pool.clone();
    #[expect(
        clippy::disallowed_methods,
        reason = "this is the one place; the task ends by itself within the pool's time limits"
    )]
    let beginning = tokio::spawn(async move { pool.begin().await });
    beginning.await.unwrap_or_else(|panicked| Err(sqlx::Error::Io(std::io::Error::other(panicked))))
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
        // A connection that ends while TLS is asked for.
        sqlx::Error::Protocol(said) => said.contains("SSLRequest"),
        // 08 connection, 28 and 3D no way in, 53 out of resources, 55 not accepting connections, lock time-out, 57
        // operator intervention (shutdown, statement time-out), 40 serialization and deadlock, 25P03 idle transaction
        // ended.
        sqlx::Error::Database(error) => error.code().is_some_and(|code| {
            ["08", "28", "3D", "40", "53", "55", "57"].iter().any(|class| code.starts_with(class)) || code == "25P03"
        }),
        _ => false,
    }
}

/// The name of the constraint that a statement broke.
#[must_use]
pub fn broken_constraint(error: &sqlx::Error) -> Option<&str> {
    error.as_database_error().and_then(|error| error.constraint())
}
