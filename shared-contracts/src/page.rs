//! Lists in pages: keyset pagination by id, which is also the order of creation.
//!
//! A page is asked for by the last id of the one before, so rows that others insert meanwhile are neither skipped nor repeated.

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

/// `?limit=` when it is absent.
pub const LIMIT_DEFAULT: u16 = 50;

/// `?limit=` and `?cursor=` of every list.
#[derive(Debug, Clone, Copy, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct PageQuery {
    /// How many rows to answer at most.
    #[param(minimum = 1, maximum = 500, default = 50)]
    pub limit: Option<u16>,
    /// The `next_cursor` of the page before.
    pub cursor: Option<Uuid>,
}

impl PageQuery {
    /// Rows to answer.
    #[must_use]
    pub fn limit(&self) -> usize {
        self.limit.unwrap_or(LIMIT_DEFAULT).into()
    }

    /// Rows to read: one more than to answer, which tells whether there is a next page.
    #[must_use]
    pub fn rows_to_read(&self) -> i64 {
        self.limit() as i64 + 1
    }
}

/// One page of a list.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Page<T> {
    /// The rows.
    pub items: Vec<T>,
    /// Pass it as `cursor` for the next page; null on the last.
    pub next_cursor: Option<String>,
}

impl<T> Page<T> {
    /// Makes the page from the rows read with [`PageQuery::rows_to_read`]; `id_of` names the key that rows are ordered by.
    pub fn from_rows(mut rows: Vec<T>, query: &PageQuery, id_of: impl Fn(&T) -> Uuid) -> Self {
        let more = rows.len() > query.limit();
        rows.truncate(query.limit());
        let next_cursor = if more { rows.last().map(|row| id_of(row).to_string()) } else { None };
        Self { items: rows, next_cursor }
    }
}
