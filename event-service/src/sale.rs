//! Whether a session is on sale, by the database's time.

use chrono::{DateTime, Utc};
use serde::Serialize;
use service_kit::error::{Error, Result};
use shared_contracts::ids::SessionId;
use shared_contracts::money::{Currency, Money};
use shared_contracts::problem::Code;
use sqlx::{FromRow, PgConnection};
use utoipa::ToSchema;

/// Whether it takes place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, sqlx::Type, ToSchema)]
#[serde(rename_all = "snake_case")]
#[sqlx(type_name = "text", rename_all = "snake_case")]
pub enum SessionStatus {
    /// It does.
    Scheduled,
    /// It does not.
    Cancelled,
}

/// What a buyer must know of a session: when its seats are sold, by the database's time, and for how much.
#[derive(Debug, Clone, FromRow)]
pub(crate) struct Sale {
    session_status: SessionStatus,
    opens: Option<DateTime<Utc>>,
    closes: DateTime<Utc>,
    now: DateTime<Utc>,
    /// Before seat and tier.
    pub(crate) base_price: Money,
    /// Of all its prices.
    pub(crate) currency: Currency,
}

impl Sale {
    /// Refuses a session that is not on sale at this moment: cancelled, before its sales, after them, or begun.
    pub(crate) fn must_be_open(&self) -> Result<()> {
        let time = |time: DateTime<Utc>| time.to_rfc3339_opts(chrono::SecondsFormat::Secs, true);
        match self.opens {
            _ if self.session_status == SessionStatus::Cancelled => Err(cancelled_error()),
            Some(opens) if self.now < opens => {
                let detail =
                    format!("Seats of this session are sold from {} until {}.", time(opens), time(self.closes));
                Err(Error::refused(Code::SalesNotStarted, detail))
            }
            _ if self.now >= self.closes => {
                let detail = format!("Seats of this session were sold until {}.", time(self.closes));
                Err(Error::refused(Code::SalesEnded, detail))
            }
            _ => Ok(()),
        }
    }
}

/// Refuses a session that is cancelled; whether it exists is not asked.
pub(crate) async fn must_not_be_cancelled(connection: &mut PgConnection, session_id: SessionId) -> Result<()> {
    let sql = "select exists (select from sessions where session_id = $1 and status = 'cancelled')";
    let cancelled: bool = sqlx::query_scalar(sql).bind(session_id).fetch_one(connection).await?;
    if cancelled { Err(cancelled_error()) } else { Ok(()) }
}

fn cancelled_error() -> Error {
    Error::refused(Code::SessionCancelled, "This session does not take place; choose another.")
}
