//! Lists in pages: keyset pagination by id, which is also the order of creation.
//!
//! A request names the last id of the previous page. Rows inserted between two requests are therefore never skipped or
//! repeated.

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

/// The page size if the request has no `?limit=`.
pub const LIMIT_DEFAULT: u16 = 50;

/// The query parameters `limit` and `cursor`, which every list accepts.
#[derive(Debug, Clone, Copy, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct PageQuery {
    /// The most items to return in a page.
    #[param(minimum = 1, maximum = 500, default = 50)]
    pub limit: Option<u16>,
    /// The `next_cursor` of the page before.
    pub cursor: Option<Uuid>,
}

impl PageQuery {
    /// The most rows to return in this page.
    #[must_use]
    pub fn limit(&self) -> usize {
        self.limit.unwrap_or(LIMIT_DEFAULT).into()
    }

    /// The number of rows to read: one more than [`Self::limit`], which shows whether there is a next page.
    #[must_use]
    pub fn rows_to_read(&self) -> i64 {
        self.limit() as i64 + 1
    }
}

/// One page of a list.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Page<T> {
    /// The items of this page, in the order of the list.
    pub items: Vec<T>,
    /// The `cursor` of the next page; null on the last page.
    pub next_cursor: Option<String>,
}

impl<T> Page<T> {
    /// Builds a page from rows that were read with [`PageQuery::rows_to_read`]. `id_of` returns the id that orders
    /// them.
    pub fn from_rows(mut rows: Vec<T>, query: &PageQuery, id_of: impl Fn(&T) -> Uuid) -> Self {
        let more = rows.len() > query.limit();
        rows.truncate(query.limit());
        let next_cursor = if more { rows.last().map(|row| id_of(row).to_string()) } else { None };
        Self { items: rows, next_cursor }
    }
}
