//! The process around everything else: what it is told, how it starts, stops and says how it is.

pub mod common;
pub mod crash;
pub mod health;
pub mod lifecycle;
pub mod settings;
