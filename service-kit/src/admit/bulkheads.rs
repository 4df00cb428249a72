//! The lanes by which requests go through a process, so that a crowd in one does not delay those in another: above all, readers and
//! those who try to get seats must not delay those who pay for seats they have.
//!
//! Two things are bounded. How many requests are in flight: a lane that is full turns the next ones away at once, and a quarter of all
//! places is for those who pay and for other services alone. And how many of a lane are worked on at a time: the others wait in line
//! for a moment. What delays a payer on a busy machine is the work that is ready to run before theirs and the database connections that
//! others have, and both are as many as there are requests at work.

use std::sync::Arc;
use std::time::Duration;

use axum::http::Method;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Which way a request goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    /// What is answered from memory for all who ask at the same time: seat maps.
    Map,
    /// What reads and changes nothing.
    Read,
    /// New reservations.
    Hold,
    /// What one does with a reservation or ticket that one has: paying above all.
    Confirm,
    /// What the payment provider tells. It is signed, and comes in crowds when buyers do, so no rate limit is on it.
    Notice,
    /// Changes of the catalogue.
    Admin,
    /// What other services ask for.
    Internal,
    /// How the process is: always answered, or a busy process would be taken for a dead one.
    Open,
}

/// Tells the lane of a route of a service, by its method and path as it stands in the router; `None` for one that it does not know.
pub type LaneOf = fn(&Method, &str) -> Option<Lane>;

/// What only other services call.
pub(crate) const INTERNAL_PATHS: &str = "/api/internal/";

/// The lane of a request. What has no route is read like any other, so that guessing paths has its limits, too.
pub(crate) fn lane_of(service: LaneOf, method: &Method, path: Option<&str>) -> Lane {
    let method = if *method == Method::HEAD { &Method::GET } else { method };
    match path {
        None => Lane::Read,
        Some(path) if path.starts_with("/health") || path == "/metrics" => Lane::Open,
        Some(path) if path.starts_with(INTERNAL_PATHS) => Lane::Internal,
        Some(path) => service(method, path).unwrap_or(if method.is_safe() { Lane::Read } else { Lane::Admin }),
    }
}

/// Waiting longer than this for a place at work is no use to anyone.
const WAIT_TIME_MAX: Duration = Duration::from_secs(5);

/// Maps are made once for all who wait, so a crowd at work at the same time costs less than one after the other.
const MAPS_AT_WORK: usize = 64;
/// Each may have a database connection, of which there are 20: the others are for those who buy.
const READS_AT_WORK: usize = 8;
/// Two full batches of the desks that write together; more would wait there.
const HOLDS_AT_WORK: usize = 128;
/// As reads.
const ADMIN_AT_WORK: usize = 8;

/// All lanes of a process.
#[derive(Debug)]
pub(crate) struct Lanes {
    /// All requests in flight.
    all: Arc<Semaphore>,
    /// Those of the lanes that must leave room for payers and other services.
    ordinary: Arc<Semaphore>,
    maps: Width,
    reads: Width,
    holds: Width,
    admin: Width,
}

/// How many a lane has in flight, and how many of them at work.
#[derive(Debug)]
struct Width {
    in_flight: Arc<Semaphore>,
    at_work: Arc<Semaphore>,
}

impl Width {
    fn new(in_flight: usize, at_work: usize) -> Self {
        let semaphore = |places: usize| Arc::new(Semaphore::new(places.max(1)));
        Self { in_flight: semaphore(in_flight), at_work: semaphore(at_work) }
    }
}

/// A place in a lane, given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Place(#[expect(dead_code, reason = "they are held, not used")] [Option<OwnedSemaphorePermit>; 4]);

/// There is no place.
#[derive(Debug)]
pub(crate) struct Full;

impl Lanes {
    pub(crate) fn new(in_flight_max: usize) -> Self {
        let share = |percent: usize| in_flight_max * percent / 100;
        Self {
            all: Arc::new(Semaphore::new(in_flight_max)),
            ordinary: Arc::new(Semaphore::new(share(75).max(1))),
            maps: Width::new(share(50), MAPS_AT_WORK),
            reads: Width::new(share(25), READS_AT_WORK),
            holds: Width::new(share(60), HOLDS_AT_WORK),
            admin: Width::new(share(20), ADMIN_AT_WORK),
        }
    }

    /// A place in this lane, once there is one at work.
    pub(crate) async fn enter(&self, lane: Lane) -> Result<Place, Full> {
        let width = match lane {
            Lane::Open => return Ok(Place([const { None }; 4])),
            Lane::Confirm | Lane::Notice | Lane::Internal => {
                return Ok(Place([Some(try_take(&self.all)?), None, None, None]));
            }
            Lane::Map => &self.maps,
            Lane::Read => &self.reads,
            Lane::Hold => &self.holds,
            Lane::Admin => &self.admin,
        };
        let in_flight = [try_take(&width.in_flight)?, try_take(&self.ordinary)?, try_take(&self.all)?].map(Some);
        let at_work = Arc::clone(&width.at_work).acquire_owned();
        let at_work = tokio::time::timeout(WAIT_TIME_MAX, at_work).await.map_err(|_| Full)?.map_err(|_| Full)?;
        let [a, b, c] = in_flight;
        Ok(Place([a, b, c, Some(at_work)]))
    }
}

fn try_take(places: &Arc<Semaphore>) -> Result<OwnedSemaphorePermit, Full> {
    Arc::clone(places).try_acquire_owned().map_err(|_| Full)
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    /// As many places as there are, and how many of those who enter have one at once.
    async fn fill(lanes: &Lanes, lane: Lane, count: usize) -> (Vec<Place>, usize) {
        let mut places = Vec::new();
        let mut waiting = 0;
        for _ in 0..count {
            match lanes.enter(lane).now_or_never() {
                Some(Ok(place)) => places.push(place),
                Some(Err(Full)) => break,
                None => waiting += 1,
            }
        }
        (places, waiting)
    }

    #[tokio::test]
    async fn crowds_in_all_other_lanes_leave_room_for_payers_and_other_services() {
        let lanes = Lanes::new(100);
        let mut held = Vec::new();
        for lane in [Lane::Map, Lane::Hold, Lane::Read, Lane::Admin] {
            held.extend(fill(&lanes, lane, 100).await.0);
        }
        assert_eq!(held.len(), 75, "ordinary requests have three quarters");
        assert!(matches!(lanes.enter(Lane::Map).await, Err(Full)));
        let (paying, _) = fill(&lanes, Lane::Confirm, 15).await;
        let (asked, _) = fill(&lanes, Lane::Internal, 15).await;
        assert_eq!((paying.len(), asked.len()), (15, 10), "the whole has its maximum");
        assert!(lanes.enter(Lane::Open).await.is_ok());
        drop(held);
        assert!(lanes.enter(Lane::Map).await.is_ok());
    }

    #[tokio::test]
    async fn a_few_of_a_lane_are_at_work_and_the_next_comes_when_one_is_done() {
        let lanes = Lanes::new(1000);
        let (mut at_work, waiting) = fill(&lanes, Lane::Read, 50).await;
        assert_eq!((at_work.len(), waiting), (READS_AT_WORK, 50 - READS_AT_WORK));
        let next = lanes.enter(Lane::Read);
        let leave = async {
            tokio::task::yield_now().await;
            drop(at_work.pop());
        };
        let (next, ()) = tokio::join!(next, leave);
        assert!(next.is_ok());
    }
}
