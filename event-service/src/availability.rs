//! What a buyer may have and for how much: a look at a session and some of its seats, in one statement. It changes and locks nothing.

use service_kit::error::Result;
use shared_contracts::ids::{SessionId, SessionSeatId};
use shared_contracts::label::Label;
use shared_contracts::money::Money;
use shared_contracts::seat_api::{SeatPrice, SeatStatus};
use sqlx::{FromRow, PgConnection};

use crate::sessions::Sale;

/// One seat as `check-availability` sees it.
#[derive(Debug)]
pub(crate) struct SeatLook {
    /// Who has it.
    pub(crate) status: SeatStatus,
    /// Held past its time.
    pub(crate) overdue: bool,
    /// Its price and labels.
    pub(crate) price: SeatPrice,
}

#[derive(Debug, FromRow)]
struct LookRow {
    #[sqlx(flatten)]
    sale: Sale,
    /// Absent, as all below it, when none of the seats is the session's.
    session_seat_id: Option<SessionSeatId>,
    status: Option<SeatStatus>,
    overdue: Option<bool>,
    price: Option<Money>,
    row_number: Option<Label>,
    seat_number: Option<Label>,
}

impl LookRow {
    fn into_look(self) -> Option<SeatLook> {
        let price = SeatPrice {
            session_seat_id: self.session_seat_id?,
            price: self.price?,
            row_number: self.row_number?,
            seat_number: self.seat_number?,
        };
        Some(SeatLook { status: self.status?, overdue: self.overdue?, price })
    }
}

/// Looks at a session and those of `seats` that are its own, without changing or locking anything; nothing when there is no such session.
///
/// # Errors
/// The database failed.
pub(crate) async fn look(
    connection: &mut PgConnection,
    session_id: SessionId,
    seats: &[SessionSeatId],
) -> Result<Option<(Sale, Vec<SeatLook>)>> {
    let rows: Vec<LookRow> = sqlx::query_as(
        "select c.status as session_status, sales_start as opens, least(start_time, sales_end) as closes, now() as now, base_price, currency,
                session_seat_id, s.status, s.status = 'reserved' and reserved_until < clock_timestamp() as overdue,
                price, row_number, seat_number
         from sessions c
         left join (select * from session_seats where session_seat_id = any($1) offset 0) s using (session_id)
         left join seats using (seat_id)
         where session_id = $2",
    )
    .bind(seats)
    .bind(session_id)
    .fetch_all(connection)
    .await?;
    let mut sale = None;
    let mut looks = Vec::with_capacity(rows.len());
    for row in rows {
        // Each row has the same.
        sale.get_or_insert_with(|| row.sale.clone());
        looks.extend(row.into_look());
    }
    Ok(sale.map(|sale| (sale, looks)))
}
