//! `growth`: the same booking in sessions with more and more seats, and in tables with more and more old reservations.
//! The cost should stay the same.

use std::rc::Rc;

use anyhow::Context;
use clap::Args;
use sqlx::PgConnection;

use crate::bench::{Bench, LoadArguments};
use crate::databases::connect;
use crate::measured::{Measured, Promise};
use crate::sale::SaleArguments;
use crate::scenarios::reserve::{RESERVE, Reserve};

/// How many old reservations one statement writes.
const RESERVATIONS_PER_STATEMENT: i64 = 100_000;
/// How many reservations a closed loop is expected to need.
const CLOSED_MAX: usize = 20_000;

/// The options of `growth`.
#[derive(Debug, Clone, Args)]
pub struct Arguments {
    #[command(flatten)]
    load: LoadArguments,
    /// Seats per session: one or more sizes, measured in turn
    #[arg(long, value_delimiter = ',', default_value = "1000,10000,100000", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    session_seats: Vec<u32>,
    /// Reservations in the table: one or more sizes, rising, because rows are only added
    #[arg(long, value_delimiter = ',', default_value = "0,1000000,5000000", value_parser = clap::value_parser!(u32).range(0..=100_000_000))]
    reservations: Vec<u32>,
}

/// Adds expired reservations of the past year, each with its item, up to `wanted` in all. Their ids contain their
/// booking time, as real ids do. So they cost a booking what a table of that size would cost it.
async fn fill(booking_db: &mut PgConnection, wanted: u32) -> anyhow::Result<i64> {
    let mut there: i64 = sqlx::query_scalar("select count(*) from reservations").fetch_one(&mut *booking_db).await?;
    while there < i64::from(wanted) {
        let more = RESERVATIONS_PER_STATEMENT.min(i64::from(wanted) - there);
        sqlx::query(
            "with new as materialized (
                 select (lpad(to_hex((extract(epoch from booked) * 1000)::int8), 12, '0') || '7' || substr(noise, 1, 3)
                         || '8' || substr(noise, 4, 15))::uuid as id, booked
                 from (select now() - interval '1 day' - random() * interval '1 year' as booked, md5(random()::text) as noise
                       from generate_series(1, $1)) as one
             ), made as (
                 insert into reservations (id, user_id, session_id, status, booking_time, expiry_time, seats_count, total_amount, currency, created_at, updated_at)
                 select id, gen_random_uuid(), gen_random_uuid(), 'expired', booked, booked + interval '10 minutes', 1, 100, 'USD', booked, booked
                 from new
             )
             insert into reservation_items (id, reservation_id, session_seat_id, price_tier_id, row_number, seat_number, price, discount_amount, final_price)
             select gen_random_uuid(), id, gen_random_uuid(), gen_random_uuid(), '1', '1', 100, 0, 100 from new",
        )
        .bind(more)
        .execute(&mut *booking_db)
        .await
        .context("reservations of earlier days can't be written")?;
        there += more;
        println!("{there} reservations in the table");
    }
    // Autovacuum would do this in time.
    sqlx::query("vacuum analyze reservations").execute(&mut *booking_db).await?;
    sqlx::query("vacuum analyze reservation_items").execute(&mut *booking_db).await?;
    Ok(there)
}

pub(super) async fn run(arguments: &Arguments, bench: &Bench<'_>) -> anyhow::Result<Measured> {
    let url = bench.system.booking_db.as_ref();
    let url = url.context("reservations are written into the database: give --booking-db, or --state-dir")?;
    let mut booking_db = connect(url).await?;
    let mut measured = Measured::default();
    for wanted in &arguments.reservations {
        let there = fill(&mut booking_db, *wanted).await?;
        for seats in &arguments.session_seats {
            let sessions =
                SaleArguments::of(*seats).open(bench.system, arguments.load.operations_max(CLOSED_MAX)).await?;
            let reserve = Rc::new(Reserve::all_of(&sessions, 1));
            let name = format!("{seats} seats, {there} reservations");
            let phase = bench.measure(&name, &arguments.load, RESERVE, &reserve).await?;
            let Promise { says, kept, found } = reserve.promise(bench).await;
            measured.promises.push(Promise { says: format!("{says} ({name})"), kept, found });
            measured.phases.push(phase);
        }
    }
    Ok(measured)
}
