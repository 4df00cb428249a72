//! What a scenario reports: its phases, its figures, and whether its own promises were kept.

use serde::Serialize;

use crate::bench::Phase;

/// What a scenario has measured and found.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Measured {
    /// Stretch by stretch.
    pub phases: Vec<Phase>,
    /// Its own promises.
    pub promises: Vec<Promise>,
    /// What else it has counted, by name.
    pub figures: Vec<(String, String)>,
}

/// Something that must be so, whatever the load.
#[derive(Debug, Clone, Serialize)]
pub struct Promise {
    /// What.
    pub says: String,
    /// Whether it was.
    pub kept: bool,
    /// What was found.
    pub found: String,
}

impl Promise {
    /// A promise and what was found of it.
    pub fn new(says: &str, kept: bool, found: impl Into<String>) -> Self {
        Self { says: says.to_owned(), kept, found: found.into() }
    }
}
