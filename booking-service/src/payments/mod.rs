//! Payment providers.

pub mod provider;
