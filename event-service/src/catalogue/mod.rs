//! The catalogue: what is put on, by whom, where and when. One file a resource, with its types, routes and SQL.

pub mod events;
pub(crate) mod folded_labels;
pub mod halls;
pub mod locations;
pub mod organizers;
pub mod seats;
pub mod sessions;
