//! What is sold: organizer, event, location, hall, seats, sessions and price tier, made through the public API.

use std::slice;

use anyhow::{Context, bail, ensure};
use clap::Args;
use hyper::body::Bytes;
use hyper::header::HeaderValue;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::http::{Address, Body, Call, Connection, Outcome};
use crate::system::System;

/// Seats made by one call, as a list. Another system in a comparison may accept no more, and no grid.
const SEATS_PER_CALL: usize = 1000;
/// Seats in each row of the hall.
const SEATS_PER_ROW: usize = 100;

/// How much is put on sale.
#[derive(Debug, Clone, Args)]
pub struct SaleArguments {
    /// Seats per session
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    seats: u32,
    /// Sessions, sold one after the other; by default as many as the load can need
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    sessions: Option<u32>,
}

impl SaleArguments {
    /// As many sessions as needed, with this many seats each.
    #[must_use]
    pub fn of(seats: u32) -> Self {
        Self { seats, sessions: None }
    }

    /// Puts at least `needed` seats on sale, unless the number of sessions is given.
    ///
    /// # Errors
    /// If a service does not answer, or refuses.
    pub async fn open(&self, system: &System, needed: usize) -> anyhow::Result<Vec<Session>> {
        let seats = self.seats as usize;
        let sessions = self.sessions.map_or(needed.div_ceil(seats), |sessions| sessions as usize);
        open(&system.event, &system.bookings[0], sessions, seats).await
    }
}

/// A session seat that can be bought.
#[derive(Debug, Clone, Deserialize)]
pub struct Seat {
    /// The session seat's id.
    pub session_seat_id: Uuid,
    row_number: String,
    seat_number: String,
}

/// A session on sale, with its seats.
pub struct Session {
    /// The session's id.
    pub id: Uuid,
    /// All seats of the session.
    pub seats: Vec<Seat>,
    /// The session's own price tier.
    pub tier: Uuid,
}

impl Session {
    /// The path of the session's seat map.
    #[must_use]
    pub fn seat_map(&self) -> String {
        format!("/api/v1/sessions/{}/seat-map", self.id)
    }

    /// Each seat with the body of a reservation of only this seat.
    pub fn single_seats(&self) -> impl Iterator<Item = (&Seat, Bytes)> {
        self.seats.iter().map(move |seat| (seat, self.reservation(slice::from_ref(seat))))
    }

    /// The body of a reservation of these seats.
    #[must_use]
    pub fn reservation(&self, seats: &[Seat]) -> Bytes {
        let seats: Vec<Value> = seats
            .iter()
            .map(|seat| {
                json!({ "session_seat_id": seat.session_seat_id, "price_tier_id": self.tier,
                    "row_number": seat.row_number, "seat_number": seat.seat_number })
            })
            .collect();
        json!({ "session_id": self.id, "seats": seats }).to_string().into()
    }
}

/// The request of this user for a reservation.
#[must_use]
pub fn reserve(body: Bytes, user: Uuid) -> Call {
    by(Call::post("/api/v1/reservations", body), user)
}

/// Adds the user's id to a request.
#[must_use]
pub fn by(call: Call, user: Uuid) -> Call {
    let mut buffer = Uuid::encode_buffer();
    let text = user.hyphenated().encode_lower(&mut buffer);
    // A UUID has only letters, digits and hyphens, so it is always a valid header value.
    let value = HeaderValue::from_str(text).unwrap_or_else(|_| HeaderValue::from_static(""));
    call.with("x-user-id", value)
}

/// Puts this many sessions on sale, on one day after the other, in one new hall with this many seats.
///
/// # Errors
/// If a service does not answer, or refuses.
pub async fn open(event: &Address, booking: &Address, sessions: usize, seats: usize) -> anyhow::Result<Vec<Session>> {
    let mut organizer = Organizer { event: Connection::to(event), booking: Connection::to(booking) };
    organizer.event.open().await?;
    organizer.booking.open().await?;
    let (event_id, hall_id) = organizer.hall(seats).await?;
    let mut opened = Vec::with_capacity(sessions);
    for day in 0..sessions {
        opened.push(organizer.session(&event_id, &hall_id, day).await?);
        let made = opened.last().map_or(0, |session| session.seats.len());
        ensure!(made == seats, "a session in a hall of {seats} seats has {made}");
    }
    Ok(opened)
}

struct Organizer {
    event: Connection,
    booking: Connection,
}

impl Organizer {
    async fn hall(&mut self, seats: usize) -> anyhow::Result<(String, String)> {
        let events = &mut self.event;
        let organizer = json!({ "name": "Load Test", "contact_email": "load-test@example.com" });
        let organizer_id: String = create(events, "/api/v1/organizers", &organizer, "organizer_id").await?;
        let event = json!({ "organizer_id": organizer_id, "title": "The on-sale minute", "event_type": "concert" });
        let event_id = create(events, "/api/v1/events", &event, "event_id").await?;
        let location = json!({ "name": "Load Test Arena", "address": "1 Load Lane", "city": "Berlin", "country": "Germany",
            "timezone": "Europe/Berlin" });
        let location_id: String = create(events, "/api/v1/locations", &location, "location_id").await?;
        let halls = format!("/api/v1/locations/{location_id}/halls");
        let hall_id: String = create(events, &halls, &json!({ "name": "Hall", "capacity": seats }), "hall_id").await?;
        let all: Vec<Value> = (0..seats)
            .map(|seat| {
                json!({ "row_number": (seat / SEATS_PER_ROW + 1).to_string(),
                    "seat_number": (seat % SEATS_PER_ROW + 1).to_string(), "seat_type": "regular" })
            })
            .collect();
        for part in all.chunks(SEATS_PER_CALL) {
            let path = format!("/api/v1/halls/{hall_id}/seats/bulk");
            let created: usize = create(events, &path, &json!({ "seats": part }), "created").await?;
            ensure!(created == part.len(), "of {} seats, {created} were made", part.len());
        }
        Ok((event_id, hall_id))
    }

    async fn session(&mut self, event_id: &str, hall_id: &str, day: usize) -> anyhow::Result<Session> {
        // The dates are far away, so that sales do not end during a test. Sessions of one hall may not overlap, so each
        // has its own day.
        let date = chrono::NaiveDate::from_ymd_opt(2090, 1, 1).context("that day exists")?;
        let date = date + chrono::Days::new(day as u64);
        let session = json!({ "event_id": event_id, "hall_id": hall_id, "base_price": 100.00,
            "start_time": format!("{date}T19:00:00Z"), "end_time": format!("{date}T22:00:00Z") });
        let id: Uuid = create(&mut self.event, "/api/v1/sessions", &session, "session_id").await?;
        // A tier of this session only. The path and the member name are those that other systems know, too.
        let tier = json!({ "session_id": id, "name": "Standard", "multiplier": 1.0 });
        let tier = create(&mut self.booking, "/api/v1/price-tiers", &tier, "id").await?;
        let path = format!("/api/v1/sessions/{id}/seats");
        let answer = self.event.send(Call::get(path), Body::Keep).await;
        ensure!(answer.is(200), "the seats of a new session answered {}", answer.outcome);
        let seats = serde_json::from_slice(&answer.body).context("the seats of a session have an unknown form")?;
        Ok(Session { id, seats, tier })
    }
}

async fn create<T: DeserializeOwned>(
    connection: &mut Connection,
    path: &str,
    new: &Value,
    member: &str,
) -> anyhow::Result<T> {
    let answer = connection.send(Call::post(path, new.to_string()), Body::Keep).await;
    // Some systems answer a bulk call with 200.
    if !matches!(answer.outcome, Outcome::Status(200 | 201)) {
        let text = String::from_utf8_lossy(&answer.body);
        bail!("setting up: POST {path} answered {}: {}", answer.outcome, text.chars().take(500).collect::<String>());
    }
    let mut made: Value = serde_json::from_slice(&answer.body).with_context(|| format!("POST {path} gave no JSON"))?;
    let value = made.get_mut(member).map(Value::take).unwrap_or_default();
    serde_json::from_value(value).with_context(|| format!("POST {path} gave no {member}"))
}
