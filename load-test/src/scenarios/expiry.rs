//! `expiry`: up to a hundred thousand holds end at the same moment, while reservations in another session go on.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use chrono::{DateTime, Utc};
use clap::Args;
use sqlx::PgConnection;
use uuid::Uuid;

use crate::bench::{Bench, LoadArguments};
use crate::databases::connect;
use crate::measured::{Measured, Promise};
use crate::sale::{self, Session};
use crate::scenarios::reserve::{RESERVE, Reserve};

/// How many holds one statement writes.
const HOLDS_PER_STATEMENT: usize = 10_000;
/// The time from the writing of the last hold to the common end. Only reservations run in it.
const CALM: Duration = Duration::from_secs(3);
/// How often the held seats are counted.
const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// The options of `expiry`.
#[derive(Debug, Clone, Args)]
pub struct Arguments {
    #[command(flatten)]
    load: LoadArguments,
    /// Holds that end at once
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    holds: u32,
    /// Time within which all seats must be on sale again
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..=3600))]
    within_seconds: u32,
}

/// Writes holds with their reservations, as bookings would have left them. They end in a day.
async fn hold(event_db: &mut PgConnection, booking_db: &mut PgConnection, session: &Session) -> anyhow::Result<()> {
    for seats in session.seats.chunks(HOLDS_PER_STATEMENT) {
        let seats: Vec<Uuid> = seats.iter().map(|seat| seat.session_seat_id).collect();
        let made: Vec<Uuid> = seats.iter().map(|_| Uuid::now_v7()).collect();
        sqlx::query(
            "with made as (
                 insert into reservations (id, user_id, session_id, status, booking_time, expiry_time, seats_count, total_amount, currency)
                 select id, gen_random_uuid(), $2, 'active', now(), now() + interval '1 day', 1, 100, 'USD' from unnest($1::uuid[]) as new (id)
             )
             insert into reservation_items (id, reservation_id, session_seat_id, price_tier_id, row_number, seat_number, price, discount_amount, final_price)
             select gen_random_uuid(), id, seat, $4, '1', '1', 100, 0, 100 from unnest($1::uuid[], $3::uuid[]) as new (id, seat)",
        )
        .bind(&made)
        .bind(session.id)
        .bind(&seats)
        .bind(session.tier)
        .execute(&mut *booking_db)
        .await
        .context("the holds' reservations can't be written")?;
        sqlx::query(
            "update session_seats set status = 'reserved', reservation_id = id, reserved_until = now() + interval '1 day'
             from unnest($1::uuid[], $2::uuid[]) as new (id, seat) where session_seat_id = seat",
        )
        .bind(&made)
        .bind(&seats)
        .execute(&mut *event_db)
        .await
        .context("the holds can't be written")?;
    }
    Ok(())
}

/// Sets the same end for all holds. Returns that moment.
async fn let_end(
    event_db: &mut PgConnection,
    booking_db: &mut PgConnection,
    session: &Session,
    in_seconds: f64,
) -> anyhow::Result<DateTime<Utc>> {
    let due: DateTime<Utc> = sqlx::query_scalar("select now() + make_interval(secs => $1)")
        .bind(in_seconds)
        .fetch_one(&mut *booking_db)
        .await?;
    let reservations = "update reservations set expiry_time = $2 where session_id = $1 and status = 'active'";
    sqlx::query(reservations).bind(session.id).bind(due).execute(&mut *booking_db).await?;
    let holds = "update session_seats set reserved_until = $2 where session_id = $1 and status = 'reserved'";
    sqlx::query(holds).bind(session.id).bind(due).execute(&mut *event_db).await?;
    Ok(due)
}

async fn seconds_since(booking_db: &mut PgConnection, due: DateTime<Utc>) -> anyhow::Result<f64> {
    let sql = "select extract(epoch from clock_timestamp() - $1)::float8";
    Ok(sqlx::query_scalar(sql).bind(due).fetch_one(booking_db).await?)
}

/// How the seats returned to sale.
#[derive(Debug, Default)]
struct SeatsBack {
    /// Seconds after the end, and how many seats were on sale again.
    points: Vec<(f64, usize)>,
    complete: bool,
}

impl SeatsBack {
    /// When this share of the seats was first seen on sale again.
    fn after(&self, holds: usize, share: f64) -> String {
        let wanted = (holds as f64 * share).ceil() as usize;
        let found = self.points.iter().find(|(_, back)| *back >= wanted);
        found.map_or_else(|| "not seen".to_owned(), |(seconds, _)| format!("{seconds:.1} s after their end"))
    }
}

/// Counts the held seats until none is left or `time_max` is over, and then sets `stop`.
async fn watch(
    mut event_db: PgConnection,
    session: Uuid,
    holds: usize,
    due: Instant,
    time_max: Duration,
    stop: Rc<Cell<bool>>,
) -> anyhow::Result<SeatsBack> {
    let mut back = SeatsBack::default();
    let watched = async {
        while due.elapsed() < time_max && !back.complete {
            tokio::time::sleep(POLL_INTERVAL).await;
            let sql = "select count(*) from session_seats where session_id = $1 and status = 'reserved'";
            let left: i64 = sqlx::query_scalar(sql).bind(session).fetch_one(&mut event_db).await?;
            let (at, count) = (due.elapsed().as_secs_f64(), holds - left as usize);
            println!("{at:>6.1} s after the end: {count} of {holds} on sale again");
            back.points.push((at, count));
            back.complete = left == 0;
        }
        anyhow::Ok(())
    };
    let watched = watched.await;
    stop.set(true);
    watched.map(|()| back)
}

pub(super) async fn run(arguments: &Arguments, bench: &Bench<'_>) -> anyhow::Result<Measured> {
    let system = bench.system;
    let (Some(event_url), Some(booking_url)) = (&system.event_db, &system.booking_db) else {
        anyhow::bail!("holds are written into the databases: give --event-db and --booking-db, or --state-dir");
    };
    let (mut event_db, mut booking_db) = (connect(event_url).await?, connect(booking_url).await?);
    let holds = arguments.holds as usize;
    let whole = LoadArguments { seconds: f64::from(arguments.within_seconds), ..arguments.load.clone() };
    let on_sale = sale::SaleArguments::of(2000).open(system, whole.operations_max(60_000)).await?;
    let held = sale::open(&system.event, &system.bookings[0], 1, holds).await?;
    println!("writing {holds} holds");
    hold(&mut event_db, &mut booking_db, &held[0]).await?;
    let reserve = Rc::new(Reserve::all_of(&on_sale, 1));
    let calm = bench.measure("reservations before the end", &arguments.load, RESERVE, &reserve).await?;

    // The update of the end is one statement in each database. Both must be over before the end comes.
    let in_seconds = CALM.as_secs_f64() + holds as f64 / 10_000.0;
    let due = let_end(&mut event_db, &mut booking_db, &held[0], in_seconds).await?;
    let ahead = -seconds_since(&mut booking_db, due).await?;
    ensure!(ahead > 0.0, "writing the holds' end took longer than {in_seconds} s; is the machine busy?");
    tokio::time::sleep(Duration::from_secs_f64(ahead)).await;
    let time_max = Duration::from_secs(arguments.within_seconds.into());
    let watching = watch(event_db, held[0].id, holds, Instant::now(), time_max, Rc::clone(&bench.stop));
    let watching = tokio::task::spawn_local(watching);
    // Does not count flushes, because that needs quiet seconds and the end does not wait.
    let load = LoadArguments { warm_up_seconds: 0.0, no_flushes: true, ..whole };
    let rush = bench.measure("reservations while holds end", &load, RESERVE, &reserve).await?;
    let back = watching.await??;

    let left = holds - back.points.last().map_or(0, |(_, back)| *back);
    let found = format!("{left} of {holds} were not on sale after {} s", arguments.within_seconds);
    let figures = [("half", 0.5), ("99 %", 0.99), ("all", 1.0)]
        .map(|(name, share)| (format!("{name} of the seats on sale again"), back.after(holds, share)));
    Ok(Measured {
        phases: vec![calm, rush],
        promises: vec![
            Promise::new("every seat whose hold has ended is on sale again", back.complete, found),
            reserve.promise(bench).await,
        ],
        figures: figures.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_reached_at_the_first_count_that_shows_it() {
        let back = SeatsBack { points: vec![(0.5, 10), (1.0, 98), (1.5, 99), (2.0, 100)], complete: true };
        assert_eq!(back.after(100, 0.5), "1.0 s after their end");
        assert_eq!(back.after(100, 0.99), "1.5 s after their end");
        assert_eq!(back.after(200, 1.0), "not seen");
    }
}
