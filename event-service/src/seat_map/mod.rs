//! Seat maps: the present map, and the stream of its changes.

mod chunks;
pub mod map;
pub mod stream;
