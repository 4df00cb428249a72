//! Whether a session is on sale, by the database's time.

use chrono::{DateTime, Utc};
use serde::Serialize;
use service_kit::http::error::{Error, Result};
use shared_contracts::ids::SessionId;
use shared_contracts::money::{Currency, Money};
use shared_contracts::problem::Code;
use sqlx::{FromRow, PgConnection};
use utoipa::ToSchema;

/// Whether the session takes place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, sqlx::Type, ToSchema)]
#[serde(rename_all = "snake_case")]
#[sqlx(type_name = "text", rename_all = "snake_case")]
pub enum SessionStatus {
    /// The session takes place.
    Scheduled,
    /// The organizer has cancelled the session.
    Cancelled,
}

/// When the seats of a session are on sale, and the price to start from. All times are the database's.
#[derive(Debug, Clone, FromRow)]
pub(crate) struct Sale {
    session_status: SessionStatus,
    opens: Option<DateTime<Utc>>,
    closes: DateTime<Utc>,
    now: DateTime<Utc>,
    /// When the session ends.
    pub(crate) end_time: DateTime<Utc>,
    /// The session's price, before that of the seat and the tier's multiplier.
    pub(crate) base_price: Money,
    /// The currency of all prices of the session.
    pub(crate) currency: Currency,
}

impl Sale {
    /// Refuses a session that is not on sale: it is cancelled, has begun, or its sales have not started or have ended.
    pub(crate) fn must_be_open(&self) -> Result<()> {
        let time = |time: DateTime<Utc>| time.to_rfc3339_opts(chrono::SecondsFormat::Secs, true);
        match self.opens {
            _ if self.session_status == SessionStatus::Cancelled => Err(cancelled_error()),
            Some(opens) if self.now < opens => {
                let detail =
                    format!("Seats of this session are on sale from {} until {}.", time(opens), time(self.closes));
                Err(Error::refused(Code::SalesNotStarted, detail))
            }
            _ if self.now >= self.closes => {
                let detail = format!("Seats of this session were on sale until {}.", time(self.closes));
                Err(Error::refused(Code::SalesEnded, detail))
            }
            _ => Ok(()),
        }
    }
}

/// Refuses a session that is cancelled. An unknown session passes.
pub(crate) async fn must_not_be_cancelled(connection: &mut PgConnection, session_id: SessionId) -> Result<()> {
    let sql = "select exists (select from sessions where session_id = $1 and status = 'cancelled')";
    let cancelled: bool = sqlx::query_scalar(sql).bind(session_id).fetch_one(connection).await?;
    if cancelled { Err(cancelled_error()) } else { Ok(()) }
}

fn cancelled_error() -> Error {
    Error::refused(Code::SessionCancelled, "This session is cancelled; choose another.")
}
