//! Which seats a buyer can have, and for how much: one statement reads a session and some of its seats. It takes no
//! lock.

use std::collections::HashMap;
use std::time::Duration;

use futures::future::join_all;
use service_kit::http::error::Result;
use service_kit::postgres::batch::{BatchConfig, Batcher, no_answer};
use service_kit::postgres::database::BatchPool;
use service_kit::process::lifecycle::Lifecycle;
use shared_contracts::ids::{ReservationId, SessionId, SessionSeatId};
use shared_contracts::label::Label;
use shared_contracts::money::Money;
use shared_contracts::seat::SeatStatus;
use shared_contracts::seat_api::SeatPrice;
use sqlx::{FromRow, PgConnection};

use crate::sale::Sale;

/// A seat as a query without a lock sees it.
#[derive(Debug, Clone)]
pub(crate) struct PricedSeat {
    pub(crate) status: SeatStatus,
    /// The reservation that holds or owns it.
    pub(crate) reservation_id: Option<ReservationId>,
    /// The seat is held past its deadline.
    pub(crate) overdue: bool,
    pub(crate) price: SeatPrice,
}

/// A session, and those of the wanted seats that belong to it.
#[derive(Debug, Clone)]
pub(crate) struct SessionAvailability {
    pub(crate) sale: Sale,
    pub(crate) seats: Vec<PricedSeat>,
}

#[derive(Debug, FromRow)]
struct AvailabilityRow {
    #[sqlx(flatten)]
    sale: Sale,
    /// Null, like all columns after it, if the session has none of the wanted seats.
    session_seat_id: Option<SessionSeatId>,
    status: Option<SeatStatus>,
    reservation_id: Option<ReservationId>,
    overdue: Option<bool>,
    price: Option<Money>,
    row_number: Option<Label>,
    seat_number: Option<Label>,
    section: Option<String>,
}

impl AvailabilityRow {
    fn into_seat(self) -> Option<PricedSeat> {
        let price = SeatPrice {
            session_seat_id: self.session_seat_id?,
            price: self.price?,
            row_number: self.row_number?,
            seat_number: self.seat_number?,
            section: self.section,
        };
        let reservation_id = self.reservation_id;
        Some(PricedSeat { status: self.status?, reservation_id, overdue: self.overdue?, price })
    }
}

/// Batches availability queries: requests of the same moment share one statement per session.
#[derive(Debug)]
pub(crate) struct AvailabilityLoader {
    queries: Batcher<(SessionId, Vec<SessionSeatId>), Option<SessionAvailability>>,
}

const BATCH_CONFIG: BatchConfig = BatchConfig::with_timeout(Duration::from_secs(5));

impl AvailabilityLoader {
    /// Starts the batch workers. They end when the last loader is dropped.
    pub(crate) fn start(db: BatchPool, lifecycle: &Lifecycle) -> Self {
        Self { queries: Batcher::start(lifecycle, BATCH_CONFIG, move |queries| load_all(db.clone(), queries)) }
    }

    /// Reads a session and those of `seats` that belong to it; `None` if no session has this id.
    ///
    /// # Errors
    /// The database failed.
    pub(crate) async fn load(
        &self,
        session_id: SessionId,
        seats: Vec<SessionSeatId>,
    ) -> Result<Option<SessionAvailability>> {
        self.queries.call((session_id, seats)).await
    }
}

async fn load_all(
    db: BatchPool,
    queries: Vec<(SessionId, Vec<SessionSeatId>)>,
) -> Vec<Result<Option<SessionAvailability>>> {
    let mut by_session: HashMap<SessionId, Vec<SessionSeatId>> = HashMap::new();
    for (session_id, seats) in &queries {
        by_session.entry(*session_id).or_default().extend(seats);
    }
    let loads = by_session.into_iter().map(async |(session_id, seats)| {
        let load = async {
            let mut connection = db.acquire().await?;
            let loaded = load(&mut connection, session_id, &seats).await?;
            db.release(connection);
            Ok(loaded)
        };
        (session_id, load.await)
    });
    let mut loaded: HashMap<SessionId, Result<Option<SessionAvailability>>> =
        join_all(loads).await.into_iter().collect();
    let own_part = |(session_id, wanted): &(SessionId, Vec<SessionSeatId>)| match loaded.get_mut(session_id) {
        Some(Ok(session)) => Ok(session.as_ref().map(|SessionAvailability { sale, seats }| {
            let own = seats.iter().filter(|seat| wanted.contains(&seat.price.session_seat_id));
            SessionAvailability { sale: sale.clone(), seats: own.cloned().collect() }
        })),
        Some(Err(error)) => Err(error.for_another()),
        None => Err(no_answer()),
    };
    queries.iter().map(own_part).collect()
}

async fn load(
    connection: &mut PgConnection,
    session_id: SessionId,
    wanted: &[SessionSeatId],
) -> Result<Option<SessionAvailability>> {
    let rows: Vec<AvailabilityRow> = sqlx::query_as(
        "select c.status as session_status, sales_start as opens, session_sales_close(start_time, end_time, sales_end) as closes, now() as now, end_time, base_price, currency,
                session_seat_id, s.status, reservation_id, s.status = 'reserved' and reserved_until < clock_timestamp() as overdue,
                price, row_number, seat_number, section
         from sessions c
         left join (select * from session_seats where session_seat_id = any($1) offset 0) s using (session_id)
         left join seats using (seat_id)
         where session_id = $2",
    )
    .bind(wanted)
    .bind(session_id)
    .fetch_all(connection)
    .await?;
    let mut sale = None;
    let mut seats = Vec::with_capacity(rows.len());
    for row in rows {
        // Each row repeats the session's columns.
        sale.get_or_insert_with(|| row.sale.clone());
        seats.extend(row.into_seat());
    }
    Ok(sale.map(|sale| SessionAvailability { sale, seats }))
}
