//! Seat maps: the map as it is now, and the stream of its changes.

mod chunks;
pub mod map;
pub mod stream;
