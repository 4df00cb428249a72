//! The refusals that several routes share: unknown ids, broken constraints, and resources in use.

use service_kit::http::error::{Error, Result};
use service_kit::postgres::database::broken_constraint;
use shared_contracts::ids::{EventId, HallId, LocationId, OrganizerId, SeatId, SessionId};
use shared_contracts::problem::{Code, FieldError};

/// Maps a broken constraint to the refusal that a client can act on; any other database error stays what it is.
pub(crate) fn of_constraint(error: sqlx::Error) -> Error {
    let refused = Error::refused;
    match broken_constraint(&error) {
        Some("events_organizer_exists") => {
            refused(Code::OrganizerNotFound, "No organizer has this organizer_id; create it first.")
        }
        Some("halls_location_exists") => refused(Code::LocationNotFound, "No location has this id; create it first."),
        Some("seats_hall_exists" | "sessions_hall_exists") => {
            refused(Code::HallNotFound, "No hall has this hall_id; create it first.")
        }
        Some("sessions_event_exists") => refused(Code::EventNotFound, "No event has this event_id; create it first."),
        Some("seats_labels_once" | "seats_looks_once") => refused(
            Code::SeatExists,
            "The hall already has a seat that looks like this one on a ticket. Nothing was changed; choose other labels.",
        ),
        Some("sessions_no_overlap") => refused(
            Code::SessionOverlap,
            "Another session takes place in this hall at that time; choose another time or hall.",
        ),
        Some("sessions_end_after_start") => {
            Error::invalid(FieldError::at("/end_time", "must be later than start_time"))
        }
        Some("sessions_sales_end_after_start") => {
            Error::invalid(FieldError::at("/sales_end", "must be later than sales_start"))
        }
        _ => error.into(),
    }
}

/// Refuses to edit or delete what `count` others depend on.
pub(crate) fn in_use(count: i64, noun: &str, remedy: &str) -> Result<()> {
    let detail = match count {
        0 => return Ok(()),
        1 => format!("1 {noun} depends on it. {remedy}"),
        _ => format!("{count} {noun}s depend on it. {remedy}"),
    };
    Err(Error::refused(Code::ResourceInUse, detail))
}

pub(crate) fn organizer_not_found(id: OrganizerId) -> Error {
    Error::refused(Code::OrganizerNotFound, format!("No organizer has the id {id}."))
}

pub(crate) fn event_not_found(id: EventId) -> Error {
    Error::refused(Code::EventNotFound, format!("No event has the id {id}."))
}

pub(crate) fn location_not_found(id: LocationId) -> Error {
    Error::refused(Code::LocationNotFound, format!("No location has the id {id}."))
}

pub(crate) fn hall_not_found(id: HallId) -> Error {
    Error::refused(Code::HallNotFound, format!("No hall has the id {id}."))
}

pub(crate) fn seat_not_found(id: SeatId) -> Error {
    Error::refused(Code::SeatNotFound, format!("No seat has the id {id}."))
}

pub(crate) fn session_not_found(id: SessionId) -> Error {
    Error::refused(Code::SessionNotFound, format!("No session has the id {id}."))
}
