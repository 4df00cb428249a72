//! PostgreSQL's own counts of what it has written and flushed.

use std::time::Duration;

use anyhow::Context;
use serde::Serialize;
use sqlx::{Connection, PgConnection};

use crate::system::System;

/// A backend reports its numbers within this time after its last statement. PostgreSQL's longest delay is ten seconds.
const NUMBERS_LATE_MAX: Duration = Duration::from_millis(10_500);

/// Connects to the database at `url`.
///
/// # Errors
/// If the database does not answer.
pub async fn connect(url: &str) -> anyhow::Result<PgConnection> {
    // The error does not show the URL, because it contains a password.
    PgConnection::connect(url)
        .await
        .context("a database of the system does not answer; are --event-db and --booking-db right?")
}

/// The databases whose log is watched. Their connections stay open, so that opening them costs nothing while CPU time
/// is counted.
pub struct Logs(Vec<(&'static str, PgConnection)>);

/// What a server has written to its log since its counters were reset.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, sqlx::FromRow)]
pub struct Wal {
    syncs: i64,
    records: i64,
    bytes: i64,
}

/// What one server has written to its log during a run.
#[derive(Debug, Clone, Serialize)]
pub struct WalUse {
    /// The server's label.
    pub server: String,
    /// How many flushes to disk.
    pub flushes: i64,
    /// How many log records.
    pub records: i64,
    /// How many bytes.
    pub bytes: i64,
    /// Flushes per operation.
    pub flushes_per_operation: f64,
}

impl Logs {
    /// Connects to each database of the system whose URL is known.
    ///
    /// # Errors
    /// If one of them does not answer.
    pub async fn open(system: &System) -> anyhow::Result<Self> {
        let mut open = Vec::new();
        for (server, url) in [("event-db", &system.event_db), ("booking-db", &system.booking_db)] {
            if let Some(url) = url {
                open.push((server, connect(url).await?));
            }
        }
        Ok(Self(open))
    }

    /// Watches no database.
    #[must_use]
    pub fn none() -> Self {
        Self(Vec::new())
    }

    /// The counters of each database, read once every backend has reported what it did until now.
    ///
    /// # Errors
    /// If a server has no such counters (versions 14 to 17 have them).
    pub async fn read_settled(&mut self) -> anyhow::Result<Vec<Wal>> {
        if !self.0.is_empty() {
            tokio::time::sleep(NUMBERS_LATE_MAX).await;
        }
        let mut numbers = Vec::new();
        for (server, connection) in &mut self.0 {
            let sql = "select wal_sync as syncs, wal_records as records, wal_bytes::int8 as bytes from pg_stat_wal";
            let read = sqlx::query_as(sql).fetch_one(connection).await;
            numbers.push(read.with_context(|| format!("{server} does not count its flushes; PostgreSQL 14 to 17 do"))?);
        }
        Ok(numbers)
    }

    /// The difference between two readings.
    #[must_use]
    pub fn used(&self, before: &[Wal], after: &[Wal], operations: u64) -> Vec<WalUse> {
        let each = self.0.iter().zip(before.iter().zip(after));
        each.map(|((server, _), (before, after))| WalUse {
            server: (*server).to_owned(),
            flushes: after.syncs - before.syncs,
            records: after.records - before.records,
            bytes: after.bytes - before.bytes,
            flushes_per_operation: (after.syncs - before.syncs) as f64 / operations as f64,
        })
        .collect()
    }
}
