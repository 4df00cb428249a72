//! What a buyer may have and for how much: a look at a session and some of its seats, in one statement. It changes and locks nothing.

use std::collections::HashMap;
use std::time::Duration;

use futures::future::join_all;
use service_kit::coalesce::{Coalescer, Lanes, no_answer};
use service_kit::database::DeskPool;
use service_kit::error::Result;
use service_kit::lifecycle::Lifecycle;
use shared_contracts::ids::{ReservationId, SessionId, SessionSeatId};
use shared_contracts::label::Label;
use shared_contracts::money::Money;
use shared_contracts::seat_api::{SeatPrice, SeatStatus};
use sqlx::{FromRow, PgConnection};

use crate::sale::Sale;

/// One seat as a look sees it.
#[derive(Debug, Clone)]
pub(crate) struct SeatLook {
    /// Who has it.
    pub(crate) status: SeatStatus,
    /// Whose it is.
    pub(crate) reservation_id: Option<ReservationId>,
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
    reservation_id: Option<ReservationId>,
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
        let reservation_id = self.reservation_id;
        Some(SeatLook { status: self.status?, reservation_id, overdue: self.overdue?, price })
    }
}

/// A session on sale and those of the wanted seats that are its own; nothing when there is no such session.
type Look = Option<(Sale, Vec<SeatLook>)>;

/// Where all looks come together: those that come at the same time are one statement a session.
#[derive(Debug)]
pub(crate) struct Looks {
    wanted: Coalescer<(SessionId, Vec<SessionSeatId>), Look>,
}

const LANES: Lanes = Lanes::usual(Duration::from_secs(5));

impl Looks {
    /// Starts it; it ends when nobody can ask any more.
    pub(crate) fn start(db: DeskPool, lifecycle: &Lifecycle) -> Self {
        Self { wanted: Coalescer::start(lifecycle, LANES, move |wanted| look_for_all(db.clone(), wanted)) }
    }

    /// Looks at a session and those of `seats` that are its own.
    ///
    /// # Errors
    /// The database failed.
    pub(crate) async fn look(&self, session_id: SessionId, seats: Vec<SessionSeatId>) -> Result<Look> {
        self.wanted.call((session_id, seats)).await
    }
}

async fn look_for_all(db: DeskPool, wanted: Vec<(SessionId, Vec<SessionSeatId>)>) -> Vec<Result<Look>> {
    let mut of_session: HashMap<SessionId, Vec<SessionSeatId>> = HashMap::new();
    for (session_id, seats) in &wanted {
        of_session.entry(*session_id).or_default().extend(seats);
    }
    let looked = of_session.into_iter().map(async |(session_id, seats)| {
        let looked = async {
            let mut connection = db.take().await?;
            let looked = look(&mut connection, session_id, &seats).await?;
            db.keep(connection);
            Ok(looked)
        };
        (session_id, looked.await)
    });
    let mut looked: HashMap<SessionId, Result<Look>> = join_all(looked).await.into_iter().collect();
    let own_part = |(session_id, seats): &(SessionId, Vec<SessionSeatId>)| match looked.get_mut(session_id) {
        Some(Ok(look)) => Ok(look.as_ref().map(|(sale, looks)| {
            let own = looks.iter().filter(|look| seats.contains(&look.price.session_seat_id));
            (sale.clone(), own.cloned().collect())
        })),
        Some(Err(error)) => Err(error.for_another()),
        None => Err(no_answer()),
    };
    wanted.iter().map(own_part).collect()
}

async fn look(connection: &mut PgConnection, session_id: SessionId, seats: &[SessionSeatId]) -> Result<Look> {
    let rows: Vec<LookRow> = sqlx::query_as(
        "select c.status as session_status, sales_start as opens, least(start_time, sales_end) as closes, now() as now, base_price, currency,
                session_seat_id, s.status, reservation_id, s.status = 'reserved' and reserved_until < clock_timestamp() as overdue,
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
