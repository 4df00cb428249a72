//! The process: its settings, start, stop and health, and crash points for tests.

pub mod common;
pub mod crash;
pub mod health;
pub mod lifecycle;
pub mod settings;
pub mod settings_reference;
pub mod ticks;
