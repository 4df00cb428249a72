//! The one error of request handling: a refusal that the client can act on, or a failure that only we can.

use std::sync::Arc;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use shared_contracts::problem::{CONTENT_TYPE, Code, FieldError, Problem};

use crate::database;
use crate::layers;

/// Why a request was not done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The client can act on this.
    #[error("refused: {}", .0.code)]
    Refused(Box<Problem>),
    /// A needed part does not answer: `503`, and the client may try again.
    #[error("unavailable: {}", problem.code)]
    Unavailable {
        /// What the client is told.
        problem: Box<Problem>,
        /// What the log is told.
        #[source]
        cause: anyhow::Error,
    },
    /// The database failed; whether that is a `503` or a `500` is decided by what it said.
    #[error("the database failed")]
    Database(#[from] sqlx::Error),
    /// A bug, or a part that broke its contract.
    #[error("internal error")]
    Internal(#[source] anyhow::Error),
}

/// The result of request handling.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// A refusal of this kind.
    pub fn refused(code: Code, detail: impl Into<String>) -> Self {
        Problem::new(code, detail).into()
    }

    /// `422` for one fault.
    #[must_use]
    pub fn invalid(fault: FieldError) -> Self {
        Problem::validation(vec![fault]).into()
    }

    /// The same for one more of those who waited for the same work (`coalesce.rs`): errors of the libraries can't be copied.
    #[must_use]
    pub fn for_another(&self) -> Self {
        match self {
            Self::Refused(problem) => Self::Refused(problem.clone()),
            Self::Unavailable { problem, cause } => {
                Self::Unavailable { problem: problem.clone(), cause: anyhow::anyhow!("{cause:#}") }
            }
            Self::Database(error) if database::is_unavailable(error) => Self::Database(sqlx::Error::WorkerCrashed),
            Self::Database(error) => Self::Internal(anyhow::anyhow!("{error}")),
            Self::Internal(error) => Self::Internal(anyhow::anyhow!("{error:#}")),
        }
    }

    /// What kind of problem the client is told of.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            Self::Refused(problem) | Self::Unavailable { problem, .. } => problem.code,
            Self::Database(error) if database::is_unavailable(error) => Code::DatabaseUnavailable,
            Self::Database(_) | Self::Internal(_) => Code::InternalError,
        }
    }

    pub(crate) fn into_problem(self) -> (Problem, Option<anyhow::Error>) {
        match self {
            Self::Refused(problem) => (*problem, None),
            Self::Unavailable { problem, cause } => (*problem, Some(cause)),
            Self::Database(error) if database::is_unavailable(&error) => {
                let problem = Problem::new(
                    Code::DatabaseUnavailable,
                    "The database did not answer in time. If this call was to change something, look whether it did before you repeat it.",
                );
                (problem.retry_after(1), Some(error.into()))
            }
            Self::Database(error) => (internal_problem(), Some(error.into())),
            Self::Internal(error) => (internal_problem(), Some(error)),
        }
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

/// What went wrong inside, on its way to the log: [`layers`] writes it once, with the request's id.
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
        layers::request_id().and_then(|id| id.parse().ok()).map(|id: uuid::Uuid| format!("urn:uuid:{id}"));
    let status = StatusCode::from_u16(problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let body = serde_json::to_vec(&problem).unwrap_or_default();
    let mut response = (status, [(header::CONTENT_TYPE, HeaderValue::from_static(CONTENT_TYPE))], body).into_response();
    if let Some(seconds) = problem.retry_after_seconds {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
}
