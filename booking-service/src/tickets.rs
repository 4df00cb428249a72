//! Tickets: made when a reservation is confirmed, given back by a refund. Their QR codes are drawn when someone asks for them.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use chrono::{DateTime, Utc};
use qrcode::canvas::{Canvas, MaskPattern};
use qrcode::render::{Renderer, svg};
use qrcode::{Color, EcLevel, bits, ec};
use serde::{Deserialize, Serialize};
use service_kit::auth::Caller;
use service_kit::coalesce::{Coalescer, Lanes, own_parts};
use service_kit::database::DeskPool;
use service_kit::error::{Error, Result};
use service_kit::extract::ApiPath;
use service_kit::lifecycle::Lifecycle;
use service_kit::query::ApiQuery;
use service_kit::refusals;
use shared_contracts::ids::{ReservationId, ReservationItemId, SessionId, SessionSeatId, TicketId, UserId};
use shared_contracts::label::Label;
use shared_contracts::money::Money;
use shared_contracts::problem::Code;
use sqlx::{FromRow, PgConnection, PgPool};
use utoipa::{IntoParams, ToSchema};

use crate::reservations::{Reservation, ReservationItem};

/// Pixels of one dot of a QR code.
const DOT_PIXELS: usize = 6;
/// Dots of white around it; readers need four.
const QUIET_ZONE_DOTS: usize = 4;
/// The most tickets that a customer's list shows, newest first; a bare array has no pages.
const LIST_MAX: i64 = 1000;
/// QR codes that are drawn before others get their turn.
const DRAWN_AT_ONCE: usize = 8;

/// A ticket: the right to sit on one session seat.
#[derive(Debug, Clone, Serialize, Deserialize, FromRow, ToSchema)]
pub struct Ticket {
    /// Its id; the content of its QR code is `TICKET:` and this.
    pub id: TicketId,
    /// The reservation that it came from.
    pub reservation_id: ReservationId,
    /// Its owner.
    pub user_id: UserId,
    /// The session.
    pub session_id: SessionId,
    /// The seat.
    pub session_seat_id: SessionSeatId,
    /// The seat's row.
    pub row_number: Label,
    /// The seat's number.
    pub seat_number: Label,
    /// What was paid.
    pub price: Money,
    /// Whether it admits.
    pub status: TicketStatus,
    /// The QR code as a `data:image/png;base64,` URL. Left out of the answers to confirm and refund, where a buyer waits.
    #[sqlx(skip)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qr_code: Option<String>,
    /// Whether it has admitted someone.
    pub is_used: bool,
    /// When it was made.
    pub created_at: DateTime<Utc>,
}

/// Whether a ticket admits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, sqlx::Type, ToSchema)]
#[serde(rename_all = "snake_case")]
#[sqlx(type_name = "text", rename_all = "snake_case")]
pub enum TicketStatus {
    /// It does.
    Active,
    /// It has.
    Used,
    /// It was given back.
    Refunded,
}

/// The columns of [`Ticket`], for `query_as`.
macro_rules! columns {
    () => {
        "id, reservation_id, user_id, session_id, session_seat_id, row_number, seat_number, price, status, status = 'used' as is_used, created_at"
    };
}

/// How to draw a QR code.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct QrQuery {
    /// `png` when left out.
    #[param(inline)]
    format: Option<QrFormat>,
}

#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum QrFormat {
    Png,
    Svg,
}

/// Bytes of an image, for the document.
#[derive(ToSchema)]
#[schema(value_type = String, format = Binary)]
#[expect(dead_code, reason = "only its description is of interest")]
struct Image(Vec<u8>);

/// Where tickets are asked for, by their ids or by their owners: those that are asked for at the same time are read by one statement. One a
/// process.
#[derive(Debug)]
pub(crate) struct TicketDesk {
    by_id: Coalescer<TicketId, Option<Ticket>>,
    by_owner: Coalescer<UserId, Vec<Ticket>>,
}

const LANES: Lanes = Lanes::usual(Duration::from_secs(5));
/// As many lists as the server can sort in its memory, however long they are.
const OWNER_LANES: Lanes = Lanes { batch_max: 16, ..LANES.with_company() };

impl TicketDesk {
    /// Opens it. It closes when nobody can ask any more.
    pub(crate) fn open(db: DeskPool, lifecycle: &Lifecycle) -> Self {
        let own = db.clone();
        Self {
            by_id: Coalescer::start(lifecycle, LANES, move |ids| look_for_all(own.clone(), ids)),
            by_owner: Coalescer::start(lifecycle, OWNER_LANES, move |owners| look_for_owners(db.clone(), owners)),
        }
    }

    /// The ticket, if it is this owner's; anyone's, when none is given.
    async fn find(&self, id: TicketId, owner: Option<UserId>) -> Result<Ticket> {
        let found = self.by_id.call(id).await?;
        found.filter(|ticket| owner.is_none_or(|owner| ticket.user_id == owner)).ok_or_else(|| not_found(id))
    }

    /// The latest [`LIST_MAX`] of this owner's, newest first.
    async fn of_owner(&self, owner: UserId) -> Result<Vec<Ticket>> {
        self.by_owner.call(owner).await
    }
}

async fn look_for_all(db: DeskPool, asked: Vec<TicketId>) -> Vec<Result<Option<Ticket>>> {
    let looked = async {
        let mut connection = db.take().await?;
        let sql = concat!("select ", columns!(), " from tickets where id = any($1)");
        let found: Vec<Ticket> = sqlx::query_as(sql).bind(&asked).fetch_all(&mut *connection).await?;
        db.keep(connection);
        Ok(found)
    };
    own_parts(&asked, looked.await, |found, id| found.iter().find(|ticket| ticket.id == *id).cloned())
}

async fn look_for_owners(db: DeskPool, owners: Vec<UserId>) -> Vec<Result<Vec<Ticket>>> {
    let looked = async {
        let mut connection = db.take().await?;
        let sql = concat!(
            "select found.* from (select distinct owner from unnest($1::uuid[]) as asked (owner)) asked
             cross join lateral (select ",
            columns!(),
            " from tickets where user_id = owner order by id desc limit $2) found order by id desc"
        );
        let found: Vec<Ticket> = sqlx::query_as(sql).bind(&owners).bind(LIST_MAX).fetch_all(&mut *connection).await?;
        db.keep(connection);
        let mut of_owner: HashMap<UserId, Vec<Ticket>> = HashMap::new();
        for ticket in found {
            of_owner.entry(ticket.user_id).or_default().push(ticket);
        }
        Ok(of_owner)
    };
    own_parts(&owners, looked.await, |found, owner| found.get(owner).cloned().unwrap_or_default())
}

refusals!(GetRefusals: &[Code::Unauthenticated, Code::TicketNotFound, Code::ValidationFailed]);
refusals!(ListRefusals: &[Code::Unauthenticated, Code::TicketNotFound, Code::ValidationFailed]);

/// List a user's tickets, newest first
///
/// Another user's is `404`, as if there were no such user.
#[utoipa::path(get, path = "/api/v1/tickets/user/{user_id}", tag = "3 Tickets", params(("user_id" = UserId, Path)), security(("user_id" = []), ("bearer" = [])),
    responses((status = 200, description = "The tickets", body = Vec<Ticket>), ListRefusals))]
pub(crate) async fn list_tickets(
    State(tickets): State<Arc<TicketDesk>>,
    caller: Caller,
    ApiPath(user_id): ApiPath<UserId>,
) -> Result<Json<Vec<Ticket>>> {
    if caller.confined_to().is_some_and(|own| own != user_id) {
        return Err(Error::refused(Code::TicketNotFound, format!("You have no tickets of the user {user_id}.")));
    }
    let tickets = tickets.of_owner(user_id).await?;
    let mut shown = Vec::with_capacity(tickets.len());
    for ticket in tickets {
        shown.push(ticket.with_qr_code()?);
        if shown.len().is_multiple_of(DRAWN_AT_ONCE) {
            // A thousand codes take tens of milliseconds, in which others want to pay.
            tokio::task::yield_now().await;
        }
    }
    Ok(Json(shown))
}

/// Get a ticket
#[utoipa::path(get, path = "/api/v1/tickets/{id}", tag = "3 Tickets", params(("id" = TicketId, Path)), security(("user_id" = []), ("bearer" = [])),
    responses((status = 200, description = "The ticket", body = Ticket), GetRefusals))]
pub(crate) async fn get_ticket(
    State(tickets): State<Arc<TicketDesk>>,
    caller: Caller,
    ApiPath(id): ApiPath<TicketId>,
) -> Result<Json<Ticket>> {
    tickets.find(id, caller.confined_to()).await?.with_qr_code().map(Json)
}

/// Get a ticket's QR code
#[utoipa::path(get, path = "/api/v1/tickets/{id}/qr", tag = "3 Tickets", params(("id" = TicketId, Path), QrQuery), security(("user_id" = []), ("bearer" = [])),
    responses((status = 200, description = "The image", content((inline(Image) = "image/png"), (String = "image/svg+xml"))), GetRefusals))]
pub(crate) async fn get_ticket_qr(
    State(tickets): State<Arc<TicketDesk>>,
    caller: Caller,
    ApiPath(id): ApiPath<TicketId>,
    ApiQuery(query, _): ApiQuery<QrQuery>,
) -> Result<Response> {
    let code = tickets.find(id, caller.confined_to()).await?.qr()?;
    Ok(match query.format.unwrap_or(QrFormat::Png) {
        QrFormat::Png => ([(header::CONTENT_TYPE, "image/png")], png_of(&code)?).into_response(),
        QrFormat::Svg => (
            [(header::CONTENT_TYPE, "image/svg+xml")],
            Renderer::<svg::Color<'_>>::new(&code.dots, code.width, QUIET_ZONE_DOTS as u32).build(),
        )
            .into_response(),
    })
}

/// Makes the tickets of reservations, one for each of their items, in the transaction that confirms them and began at `now`.
pub(crate) async fn issue(
    tx: &mut PgConnection,
    reservations: &[&Reservation],
    now: DateTime<Utc>,
) -> std::result::Result<Vec<Ticket>, sqlx::Error> {
    let of_item = |(reservation, item): (&&Reservation, &ReservationItem)| {
        (
            item.id,
            Ticket {
                id: TicketId::new(),
                reservation_id: reservation.id,
                user_id: reservation.user_id,
                session_id: reservation.session_id,
                session_seat_id: item.session_seat_id,
                row_number: item.row_number.clone(),
                seat_number: item.seat_number.clone(),
                price: item.final_price,
                status: TicketStatus::Active,
                qr_code: None,
                is_used: false,
                created_at: now,
            },
        )
    };
    let items =
        reservations.iter().flat_map(|reservation| reservation.items.iter().map(move |item| (reservation, item)));
    let (items, tickets): (Vec<ReservationItemId>, Vec<Ticket>) = items.map(of_item).unzip();
    sqlx::query(
        "insert into tickets (id, reservation_item_id, reservation_id, user_id, session_id, session_seat_id, row_number, seat_number, price, created_at, updated_at)
         select *, $10, $10 from unnest($1::uuid[], $2::uuid[], $3::uuid[], $4::uuid[], $5::uuid[], $6::uuid[], $7::text[], $8::text[], $9::numeric[])",
    )
    .bind(tickets.iter().map(|ticket| ticket.id).collect::<Vec<_>>())
    .bind(items)
    .bind(tickets.iter().map(|ticket| ticket.reservation_id).collect::<Vec<_>>())
    .bind(tickets.iter().map(|ticket| ticket.user_id).collect::<Vec<_>>())
    .bind(tickets.iter().map(|ticket| ticket.session_id).collect::<Vec<_>>())
    .bind(tickets.iter().map(|ticket| ticket.session_seat_id).collect::<Vec<_>>())
    .bind(tickets.iter().map(|ticket| ticket.row_number.as_str()).collect::<Vec<_>>())
    .bind(tickets.iter().map(|ticket| ticket.seat_number.as_str()).collect::<Vec<_>>())
    .bind(tickets.iter().map(|ticket| ticket.price).collect::<Vec<_>>())
    .bind(now)
    .execute(tx)
    .await?;
    Ok(tickets)
}

/// `active → refunded`, if it is this owner's, or anyone's when none is given; `None` when nothing was changed.
///
/// The reservation's row is locked first: refunds of its tickets wait for each other, and the last one sees that it is.
pub(crate) async fn refund(tx: &mut PgConnection, id: TicketId, owner: Option<UserId>) -> Result<Option<Ticket>> {
    let lock = "select from reservations
                where id = (select reservation_id from tickets where id = $1 and ($2::uuid is null or user_id = $2)) for no key update";
    sqlx::query(lock).bind(id).bind(owner).execute(&mut *tx).await?;
    let sql = concat!(
        "update tickets set status = 'refunded', updated_at = now()
         where id = $1 and ($2::uuid is null or user_id = $2) and status = 'active' returning ",
        columns!()
    );
    Ok(sqlx::query_as(sql).bind(id).bind(owner).fetch_optional(tx).await?)
}

/// `active → refunded` for all tickets of these reservations, whose rows the caller has locked.
pub(crate) async fn refund_all(tx: &mut PgConnection, reservations: &[ReservationId]) -> Result<Vec<Ticket>> {
    let sql = concat!(
        "update tickets set status = 'refunded', updated_at = now() where reservation_id = any($1) and status = 'active' returning ",
        columns!()
    );
    Ok(sqlx::query_as(sql).bind(reservations).fetch_all(tx).await?)
}

/// The ticket, if it is this owner's; anyone's, when none is given.
pub(crate) async fn find(db: &PgPool, id: TicketId, owner: Option<UserId>) -> Result<Ticket> {
    let sql = concat!("select ", columns!(), " from tickets where id = $1 and ($2::uuid is null or user_id = $2)");
    let found = sqlx::query_as(sql).bind(id).bind(owner).fetch_optional(db).await?;
    found.ok_or_else(|| not_found(id))
}

fn not_found(id: TicketId) -> Error {
    Error::refused(Code::TicketNotFound, format!("You have no ticket with the id {id}."))
}

/// A reservation's tickets in the order of its items.
pub(crate) async fn of_reservation(db: &PgPool, id: ReservationId) -> Result<Vec<Ticket>> {
    let sql = concat!("select ", columns!(), " from tickets where reservation_id = $1 order by id");
    Ok(sqlx::query_as(sql).bind(id).fetch_all(db).await?)
}

impl Ticket {
    fn qr(&self) -> Result<QrCode> {
        let content = format!("TICKET:{}", self.id);
        QrCode::of(content.as_bytes()).map_err(|error| Error::Internal(error.into()))
    }

    fn with_qr_code(mut self) -> Result<Self> {
        let png = png_of(&self.qr()?)?;
        self.qr_code = Some(format!("data:image/png;base64,{}", BASE64.encode(png)));
        Ok(self)
    }
}

/// The dots of a QR code, row by row, without the white around it.
struct QrCode {
    dots: Vec<Color>,
    width: usize,
}

impl QrCode {
    /// As the library makes it, but for the choice of the mask: weighing all eight against each other was most of the work, a third of
    /// a millisecond a ticket, for a difference that no reader of today needs.
    fn of(content: &[u8]) -> qrcode::QrResult<Self> {
        let bits = bits::encode_auto(content, EcLevel::M)?;
        let version = bits.version();
        let (data, correction) = ec::construct_codewords(&bits.into_bytes(), version, EcLevel::M)?;
        let mut canvas = Canvas::new(version, EcLevel::M);
        canvas.draw_all_functional_patterns();
        canvas.draw_data(&data, &correction);
        canvas.apply_mask(MaskPattern::DiagonalLines);
        let dots = canvas.into_colors();
        Ok(Self { width: dots.len().isqrt(), dots })
    }
}

/// A QR code as a PNG of one bit a pixel: about a kilobyte.
fn png_of(code: &QrCode) -> Result<Vec<u8>> {
    let QrCode { dots: colors, width: dots } = code;
    let dots = *dots;
    let side = (dots + 2 * QUIET_ZONE_DOTS) * DOT_PIXELS;
    let mut pixels = Vec::with_capacity(side.div_ceil(8) * side);
    for dot_row in 0..dots + 2 * QUIET_ZONE_DOTS {
        let mut line = vec![0xFF_u8; side.div_ceil(8)];
        if let Some(row) = dot_row.checked_sub(QUIET_ZONE_DOTS).filter(|row| *row < dots) {
            let dark = (0..dots).filter(|column| colors[row * dots + column] == Color::Dark);
            for x in dark
                .flat_map(|column| (0..DOT_PIXELS).map(move |pixel| (column + QUIET_ZONE_DOTS) * DOT_PIXELS + pixel))
            {
                line[x / 8] &= !(0x80 >> (x % 8));
            }
        }
        (0..DOT_PIXELS).for_each(|_| pixels.extend_from_slice(&line));
    }
    let mut image = Vec::new();
    let mut encoder = png::Encoder::new(&mut image, side as u32, side as u32);
    encoder.set_color(png::ColorType::Grayscale);
    encoder.set_depth(png::BitDepth::One);
    // Twice the bytes of the best in a tenth of its time, which was a seventh of this service's work for a ticket.
    encoder.set_compression(png::Compression::Fastest);
    let written = encoder.write_header().and_then(|mut writer| writer.write_image_data(&pixels));
    written.map_err(|error| Error::Internal(error.into()))?;
    Ok(image)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reservations::pay_desk::tests::reservation;
    use crate::schema::MIGRATIONS;

    /// A confirmed reservation with that many tickets.
    async fn bought(db: &DeskPool, user: UserId, seats: i32) {
        let id = ReservationId::new();
        reservation(db, id, user, "confirmed").await;
        sqlx::query(
            "insert into tickets (id, reservation_id, reservation_item_id, user_id, session_id, session_seat_id, row_number, seat_number, price)
             select gen_random_uuid(), $1, gen_random_uuid(), $2, gen_random_uuid(), gen_random_uuid(), '1', n::text, 100 from generate_series(1, $3) n",
        )
        .bind(id)
        .bind(user)
        .bind(seats)
        .execute(db.pool())
        .await
        .unwrap();
    }

    #[tokio::test]
    async fn owners_who_ask_together_get_their_own_newest_first_and_no_more_than_a_list_shows() {
        let url = service_kit::testing::database("booking", &MIGRATIONS).await;
        let db = DeskPool::new(&url, "test").unwrap();
        let [many, few, none] = [(); 3].map(|()| UserId::new());
        bought(&db, many, LIST_MAX as i32 + 1).await;
        bought(&db, few, 3).await;
        let asked = vec![few, many, none, few];
        let lists: Vec<Vec<Ticket>> =
            look_for_owners(db.clone(), asked.clone()).await.into_iter().map(Result::unwrap).collect();
        assert_eq!(lists.iter().map(Vec::len).collect::<Vec<_>>(), [3, LIST_MAX as usize, 0, 3]);
        for (owner, list) in asked.iter().zip(&lists) {
            assert!(list.iter().all(|ticket| ticket.user_id == *owner), "{list:?}");
            assert!(list.is_sorted_by(|newer, older| newer.id > older.id), "{list:?}");
        }
        let newest = "select id from tickets where user_id = $1 order by id desc limit 1";
        let newest: TicketId = sqlx::query_scalar(newest).bind(many).fetch_one(db.pool()).await.unwrap();
        assert_eq!(lists[1].first().map(|ticket| ticket.id), Some(newest));
    }
}
