//! What a scenario reports: its phases, its figures, and whether its own promises were kept.

use serde::Serialize;

use crate::bench::Phase;

/// The result of a scenario.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Measured {
    /// The phases, in the order in which they ran.
    pub phases: Vec<Phase>,
    /// The scenario's own promises, apart from those of the audit.
    pub promises: Vec<Promise>,
    /// Other counts, as pairs of name and value.
    pub figures: Vec<(String, String)>,
}

/// A statement that must hold under any load.
#[derive(Debug, Clone, Serialize)]
pub struct Promise {
    /// The statement, in a few words.
    pub says: String,
    /// Whether the statement held.
    pub kept: bool,
    /// What the check found, in words.
    pub found: String,
}

impl Promise {
    /// Makes a promise from a statement and what was found.
    pub fn new(says: &str, kept: bool, found: impl Into<String>) -> Self {
        Self { says: says.to_owned(), kept, found: found.into() }
    }
}
