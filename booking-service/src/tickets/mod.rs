//! Tickets as customers see them: their routes, and the drawing of their QR codes.

pub(crate) mod code;
pub(crate) mod routes;
