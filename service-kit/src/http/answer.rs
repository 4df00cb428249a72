//! Answers that both services give in the same form.

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};

/// `201` with the new resource, and its path in the `Location` header.
#[derive(Debug)]
pub struct Created<T> {
    /// The path of the new resource, for the `Location` header.
    pub location: String,
    /// The new resource, sent as JSON.
    pub body: T,
}

impl<T: IntoResponse> IntoResponse for Created<T> {
    fn into_response(self) -> Response {
        (StatusCode::CREATED, [(header::LOCATION, self.location)], self.body).into_response()
    }
}
