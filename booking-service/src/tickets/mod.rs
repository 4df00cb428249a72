//! Tickets as customers see them: their routes and their QR codes.

pub(crate) mod code;
pub(crate) mod routes;
