//! The one error type of request handling: a refusal that the client can act on, or a failure that only we can repair.

use std::fmt;
use std::sync::Arc;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use shared_contracts::problem::{CONTENT_TYPE, Code, FieldError, Problem};

use crate::http::request_context;
use crate::postgres::database;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The client can act on this.
    #[error("refused: {}", .0.code)]
    Refused(Box<Problem>),
    /// A part that the request needs does not answer: `503`, and the client may retry.
    #[error("unavailable: {}", problem.code)]
    Unavailable {
        /// The problem that the client gets.
        problem: Box<Problem>,
        /// The cause, for the log only.
        #[source]
        cause: anyhow::Error,
    },
    /// The database failed. Its error decides between `503` and `500`.
    #[error("the database failed")]
    Database(#[from] sqlx::Error),
    /// The batch of this call got no answer, or the process is stopping. The call may have taken effect. The client
    /// gets the same answer as when the database does not answer.
    #[error("the outcome of this call is unknown")]
    OutcomeUnknown(#[source] anyhow::Error),
    /// A bug, or a part that broke its contract.
    #[error("internal error")]
    Internal(#[source] anyhow::Error),
}

/// The result of request handling.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// A refusal with this code. `detail` explains it to the client.
    pub fn refused(code: Code, detail: impl Into<String>) -> Self {
        Problem::new(code, detail).into()
    }

    /// `422` for one fault.
    #[must_use]
    pub fn invalid(fault: FieldError) -> Self {
        Problem::validation(vec![fault]).into()
    }

    /// The same error for one more call of a batch. The errors of libraries can't be cloned, so the calls share the
    /// cause, with all its sources.
    #[must_use]
    pub fn for_another(&mut self) -> Self {
        match self {
            Self::Refused(problem) => Self::Refused(problem.clone()),
            Self::Unavailable { problem, cause } => {
                Self::Unavailable { problem: problem.clone(), cause: SharedCause::of(cause) }
            }
            Self::Database(error) => {
                let is_unavailable = database::is_unavailable(error);
                let cause = anyhow::Error::from(std::mem::replace(error, sqlx::Error::PoolClosed));
                *self = if is_unavailable { Self::OutcomeUnknown(cause) } else { Self::Internal(cause) };
                self.for_another()
            }
            Self::OutcomeUnknown(cause) => Self::OutcomeUnknown(SharedCause::of(cause)),
            Self::Internal(cause) => Self::Internal(SharedCause::of(cause)),
        }
    }

    /// The problem code that the client gets.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            Self::Refused(problem) | Self::Unavailable { problem, .. } => problem.code,
            Self::Database(error) if database::is_unavailable(error) => Code::DatabaseUnavailable,
            Self::OutcomeUnknown(_) => Code::DatabaseUnavailable,
            Self::Database(_) | Self::Internal(_) => Code::InternalError,
        }
    }

    pub(crate) fn into_problem(self) -> (Problem, Option<anyhow::Error>) {
        match self {
            Self::Refused(problem) => (*problem, None),
            Self::Unavailable { problem, cause } => (*problem, Some(cause)),
            Self::Database(error) if database::is_unavailable(&error) => (unknown_outcome(), Some(error.into())),
            Self::OutcomeUnknown(cause) => (unknown_outcome(), Some(cause)),
            Self::Database(error) => (internal_problem(), Some(error.into())),
            Self::Internal(error) => (internal_problem(), Some(error)),
        }
    }
}

fn unknown_outcome() -> Problem {
    let detail = "The database did not answer in time. If this call changes something, check whether it did before you repeat it.";
    Problem::new(Code::DatabaseUnavailable, detail).retry_after(1)
}

/// One cause of several errors, with its own sources.
#[derive(Debug, Clone)]
struct SharedCause(Arc<anyhow::Error>);

impl SharedCause {
    /// Makes `cause` shared, and returns another handle on it.
    fn of(cause: &mut anyhow::Error) -> anyhow::Error {
        if let Some(shared) = cause.downcast_ref::<Self>() {
            return shared.clone().into();
        }
        let shared = Self(Arc::new(std::mem::replace(cause, anyhow::Error::msg(""))));
        *cause = shared.clone().into();
        shared.into()
    }
}

impl fmt::Display for SharedCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for SharedCause {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source()
    }
}

fn internal_problem() -> Problem {
    Problem::new(
        Code::InternalError,
        "The fault is recorded under the request id of this answer. Trying again may not help.",
    )
}

impl From<Problem> for Error {
    fn from(problem: Problem) -> Self {
        Self::Refused(Box::new(problem))
    }
}

impl From<anyhow::Error> for Error {
    fn from(error: anyhow::Error) -> Self {
        match error.downcast::<sqlx::Error>() {
            Ok(error) => Self::Database(error),
            Err(error) => Self::Internal(error),
        }
    }
}

/// The internal cause of an error. [`layers`] logs it once, with the request's id.
#[derive(Debug, Clone)]
pub(crate) struct Cause(pub(crate) Arc<anyhow::Error>);

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        let (problem, cause) = self.into_problem();
        let mut response = problem_response(problem);
        if let Some(cause) = cause {
            response.extensions_mut().insert(Cause(Arc::new(cause)));
        }
        response
    }
}

/// The answer for a problem: status, content type, `Retry-After`, and the request's id as its instance.
#[must_use]
pub fn problem_response(mut problem: Problem) -> Response {
    problem.instance =
        request_context::request_id().and_then(|id| id.parse().ok()).map(|id: uuid::Uuid| format!("urn:uuid:{id}"));
    let status = StatusCode::from_u16(problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let body = serde_json::to_vec(&problem).unwrap_or_default();
    let mut response = (status, [(header::CONTENT_TYPE, HeaderValue::from_static(CONTENT_TYPE))], body).into_response();
    if let Some(seconds) = problem.retry_after_seconds {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    /// Every call of an unanswered batch gets the same error, and each log line names the whole chain of causes.
    #[test]
    fn calls_of_a_failed_batch_share_its_cause_with_all_sources() {
        let lost = || Err::<(), _>(std::io::Error::other("the wire broke")).context("reading the answer");
        for (error, code) in [
            (Error::OutcomeUnknown(lost().unwrap_err()), Code::DatabaseUnavailable),
            (Error::Database(sqlx::Error::Io(std::io::Error::other("the wire broke"))), Code::DatabaseUnavailable),
            (Error::Internal(lost().unwrap_err()), Code::InternalError),
        ] {
            let mut error = error;
            let others = [error.for_another(), error.for_another()];
            for error in others.into_iter().chain([error]) {
                assert_eq!(error.code(), code);
                let (problem, cause) = error.into_problem();
                assert_eq!(problem.code, code);
                assert!(format!("{:#}", cause.unwrap()).ends_with("the wire broke"));
            }
        }
    }
}
