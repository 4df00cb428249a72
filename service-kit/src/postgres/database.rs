//! PostgreSQL: connection pools with limits, so that a slow database does not make a slow service.

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

/// How long a request waits for a connection. After that it gets `503`, so a full pool refuses fast.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the health check of a released connection may take.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(1);
/// How long start-up waits for a database that is still starting itself.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// The limit of one attempt to connect and to check the schema. If the database does not answer in this time, the next
/// attempt uses a new connection.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(5);

/// Limits that the server enforces on our connections, so that none can hold a lock for ever. They limit a statement,
/// the wait for a lock, and an idle transaction. The longest statement, 100,000 seats in one call, needs about 3 s.
const SERVER_LIMITS: [(&str, &str); 3] =
    [("statement_timeout", "15s"), ("lock_timeout", "2s"), ("idle_in_transaction_session_timeout", "10s")];

/// A connection that was idle for longer than this is pinged before use.
pub const TRUSTED_IDLE_MAX: Duration = Duration::from_millis(100);
/// How often a [`BatchPool`] returns a connection to the library's pool.
const RETURN_INTERVAL: Duration = Duration::from_secs(10);

/// Connects at start-up: waits for the server to answer, brings the schema up to date, and returns the pool.
///
/// Replicas may start together: the migrator holds an advisory lock while it works, and the others wait for it as long
/// as it takes.
///
/// # Errors
/// The URL is not valid, the server does not answer in [`START_TIMEOUT`], or a migration fails.
pub async fn connect(
    url: &Secret,
    application: &'static str,
    connections_max: u32,
    migrator: &Migrator,
) -> anyhow::Result<PgPool> {
    // Migrations have a connection of their own, without the limits that are meant for requests.
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
    // A migration has no time limit, so a start that needs none must not wait for anything here.
    if !is_current {
        migrator.run(&mut connection).await.context("the database schema can't be brought up to date")?;
    }
    drop(connection);
    lazy_pool(url, application, connections_max)
}

/// Connects, and compares the schema: true if exactly the migrations of `migrator` have been applied.
async fn look(options: &PgConnectOptions, migrator: &Migrator) -> anyhow::Result<(PgConnection, bool)> {
    let mut connection = PgConnection::connect_with(options).await?;
    let applied = "select version, checksum from _sqlx_migrations where success order by version";
    let applied: Vec<(i64, Vec<u8>)> = match sqlx::query_as(applied).fetch_all(&mut connection).await {
        // The table does not exist before the first migration.
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
    // The library's default asks for TLS, accepts it unverified, and goes on without it. That costs a round trip for
    // each connection and gives no safety.
    let options = if text.contains("sslmode=") || text.contains("ssl-mode=") {
        options
    } else {
        options.ssl_mode(PgSslMode::Disable)
    };
    Ok(options.application_name(application))
}

/// Creates a pool that connects when it is first used.
///
/// # Errors
/// The URL is not valid.
pub fn lazy_pool(url: &Secret, application: &'static str, connections_max: u32) -> anyhow::Result<PgPool> {
    Ok(pool_options(connections_max).connect_lazy_with(base_options(url, application)?.options(SERVER_LIMITS)))
}

/// Makes PostgreSQL plan each statement of a [`BatchPool`] once, and by key. Otherwise the planner plans anew for each
/// length of a list, at a third of the statement's cost. For tables that have grown faster than their statistics, it
/// would read the whole table to find ten rows. JIT is off because disabled plan types count as expensive, and
/// PostgreSQL compiles expensive plans.
const GENERIC_PLAN_SETTINGS: [(&str, &str); 5] = [
    ("plan_cache_mode", "force_generic_plan"),
    ("enable_seqscan", "off"),
    ("enable_hashjoin", "off"),
    ("enable_mergejoin", "off"),
    ("jit", "off"),
];

/// Connections of a [`BatchPool`]: two for each of the seven batchers of the Booking Service, and one for the relay.
pub const BATCH_CONNECTIONS_MAX: u32 = 15;

/// A pool for the few statements that run thousands of times in the first minute of a sale, and find every row by its
/// key. They do not compete with other requests for connections, either.
///
/// The library's pool pings each connection that is returned: one round trip for each statement. A connection that this
/// pool keeps between two uses is not pinged.
#[derive(Debug, Clone)]
pub struct BatchPool {
    pool: PgPool,
    /// One permit for each connection in use. An acquire waits for a permit and not for the library's pool, which does
    /// not see that a kept connection is free.
    permits: Arc<Semaphore>,
    kept: Arc<Mutex<Kept>>,
}

/// The connections between two uses.
#[derive(Debug)]
struct Kept {
    /// Each connection with the time of its last use; the last one used is taken first.
    connections: Vec<(PoolConnection<Postgres>, Instant)>,
    /// When this pool last returned a connection to the library's pool.
    returned_at: Instant,
}

impl BatchPool {
    /// Creates a pool that connects when it is first used.
    ///
    /// # Errors
    /// The URL is not valid.
    pub fn new(url: &Secret, application: &'static str) -> anyhow::Result<Self> {
        let options = base_options(url, application)?.options(SERVER_LIMITS).options(GENERIC_PLAN_SETTINGS);
        let kept = Kept { connections: Vec::new(), returned_at: Instant::now() };
        let pool = pool_options(BATCH_CONNECTIONS_MAX).after_release(|connection, _| {
            // The library pings without a limit, and the connection counts as used until the answer. If a server
            // vanished without closing its connections, every batcher would lose them for a quarter of an hour.
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

    /// The library's pool behind this one, for its metrics only. Do not acquire there: it does not see the connections
    /// that are kept here.
    #[must_use]
    pub fn pool(&self) -> &PgPool {
        &self.pool
    }

    /// Begins a transaction. After its commit or rollback, its connection is kept for the next use.
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
    /// No connection is free within two seconds, or the server can't be reached.
    pub async fn acquire(&self) -> Result<BatchConnection, sqlx::Error> {
        let permit = tokio::time::timeout(ACQUIRE_TIMEOUT, Arc::clone(&self.permits).acquire_owned()).await;
        let permit = permit.map_err(|_| sqlx::Error::PoolTimedOut)?.map_err(|_| sqlx::Error::PoolClosed)?;
        // Drop a connection that was idle for too long: the library's pool pings it.
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
        // From time to time the library's pool gets one, because it closes connections that are too old.
        if kept.returned_at.elapsed() > RETURN_INTERVAL {
            kept.returned_at = Instant::now();
        } else {
            kept.connections.push((connection, Instant::now()));
        }
        drop((kept, permit));
    }

    /// The number of connections that are kept for the next use.
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

/// A transaction of a batch. Dropping it closes its connection, and the server rolls it back. So a caller that stops
/// waiting, even during `BEGIN`, leaves no open transaction to others.
#[derive(Debug)]
pub struct BatchTransaction {
    pool: BatchPool,
    /// `None` only after the commit or rollback.
    connection: Option<BatchConnection>,
}

impl BatchTransaction {
    /// The connection, for statements.
    ///
    /// # Errors
    /// None before the commit or rollback.
    pub fn connection(&mut self) -> Result<&mut PgConnection, sqlx::Error> {
        self.connection.as_deref_mut().ok_or(sqlx::Error::WorkerCrashed)
    }

    async fn execute(&mut self, statement: &'static str) -> Result<(), sqlx::Error> {
        sqlx::raw_sql(statement).execute(self.connection()?).await.map(drop)
    }

    /// Commits, and keeps the connection for the next use.
    ///
    /// # Errors
    /// The server did not answer: the transaction may or may not be committed.
    pub async fn commit(self) -> Result<(), sqlx::Error> {
        self.end("COMMIT").await
    }

    /// Rolls back, and keeps the connection for the next use. A drop would close it.
    ///
    /// # Errors
    /// The server did not answer. It rolls back when the connection closes.
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
        // Opened when the pool is created, so that the first requests after a start do not wait for them.
        .min_connections(connections_max.min(4))
        .acquire_timeout(ACQUIRE_TIMEOUT)
        // A ping before each use would cost a round trip for each request. Only a connection that was idle is pinged,
        // because it may have broken. Otherwise every connection could cost a caller a refusal after an outage.
        .test_before_acquire(false)
        .before_acquire(|connection, metadata| {
            Box::pin(async move {
                if metadata.idle_for > TRUSTED_IDLE_MAX {
                    // An error makes the library drop the connection at once. After `false` it would first send a close
                    // to a peer that is gone.
                    connection.ping().await?;
                }
                Ok(true)
            })
        })
}

/// Begins a transaction. Nothing else here may do so: `clippy.toml` bans `Pool::begin`.
///
/// A caller may drop the library's `begin` before it ends: a client hung up, or a timeout passed. Then the connection
/// returns to the pool inside an open transaction, and what its next user "commits" there is lost. So `begin` runs in a
/// task of its own. A caller that stops waiting drops a finished transaction, which rolls back as it should. (The
/// alternative is a rollback after each use of a connection. It was measured at more than half of all transactions of
/// the Booking database.)
///
/// Those of the library's `begin`.
/// As those of the library.
pub async fn begin(pool: &PgPool) -> Result<PgTransaction<'static>, sqlx::Error> {
    let pool = pool.clone();
    #[expect(
        clippy::disallowed_methods,
        reason = "this is the one place; the pool's time limits bound how long the task runs"
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
        // The connection ended during the request for TLS.
        sqlx::Error::Protocol(said) => said.contains("SSLRequest"),
        // 08 connection; 28 login; 3D no such database; 53 out of resources; 55 not accepting connections, lock
        // timeout; 57 operator intervention (shutdown, statement timeout); 40 serialization and deadlock; 25P03 idle
        // transaction ended.
        sqlx::Error::Database(error) => error.code().is_some_and(|code| {
            ["08", "28", "3D", "40", "53", "55", "57"].iter().any(|class| code.starts_with(class)) || code == "25P03"
        }),
        _ => false,
    }
}

/// The name of the constraint that a statement broke; `None` for any other error.
#[must_use]
pub fn broken_constraint(error: &sqlx::Error) -> Option<&str> {
    error.as_database_error().and_then(|error| error.constraint())
}
