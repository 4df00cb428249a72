//! Bulkheads: each class of requests has limits of its own, so that a crowd of one class does not delay another. Above
//! all, readers and callers that try to get seats must not delay buyers that pay for seats they hold.
//!
//! - Requests in flight: a class at its limit turns the next requests away at once. A quarter of all permits is
//!   reserved for payments and other services.
//! - Requests being processed: the other requests of a class wait in line for up to 5 s. A payment waits for runnable
//!   tasks and for database connections. Both grow with the requests being processed, so we cap those.

use std::sync::Arc;
use std::time::Duration;

use axum::http::Method;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// What kind of work a request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestClass {
    /// Seat maps, which are answered from memory for all requests of the same moment.
    Map,
    /// Requests that read and change nothing.
    Read,
    /// Requests that make new reservations.
    Hold,
    /// Requests about a reservation or ticket that the caller has, above all payments.
    Confirm,
    /// Notifications of the payment provider. They are signed, and come in crowds when buyers do, so they have no rate
    /// limit.
    Notice,
    /// Changes of the catalogue.
    Admin,
    /// Requests of other services.
    Internal,
    /// Health checks and metrics. They are always answered, because an orchestrator would take a busy process for a
    /// dead one.
    Open,
}

/// The class of a service's route, by its method and its path in the router. `None` for a route that the service does
/// not know.
pub type Classify = fn(&Method, &str) -> Option<RequestClass>;

/// The prefix of the paths that only other services call.
pub(crate) const INTERNAL_PATHS: &str = "/api/internal/";

/// The class of a request. One without a route counts as a read, so that guessing paths is limited too.
pub(crate) fn request_class(service: Classify, method: &Method, path: Option<&str>) -> RequestClass {
    let method = if *method == Method::HEAD { &Method::GET } else { method };
    match path {
        None => RequestClass::Read,
        Some(path) if path.starts_with("/health") || path == "/metrics" => RequestClass::Open,
        Some(path) if path.starts_with(INTERNAL_PATHS) => RequestClass::Internal,
        Some(path) => {
            service(method, path).unwrap_or(if method.is_safe() { RequestClass::Read } else { RequestClass::Admin })
        }
    }
}

/// The longest that a request waits to be processed. A longer wait is of no use to its caller.
const WAIT_TIMEOUT: Duration = Duration::from_secs(5);

/// Requests that wait for a map share it, so many of them processed together cost less than one after the other.
const MAPS_AT_WORK: usize = 64;
/// Each read may take a database connection, of which there are 20. The others are for buyers.
const READS_AT_WORK: usize = 8;
/// Two full batches of the batchers that write. More requests would only wait there.
const HOLDS_AT_WORK: usize = 128;
/// Changes of the catalogue get as many permits as reads.
const ADMIN_AT_WORK: usize = 8;

/// The bulkheads of a process.
#[derive(Debug)]
pub(crate) struct Bulkheads {
    /// The permits for all requests in flight.
    all: Arc<Semaphore>,
    /// The permits for the classes that must leave room for payments and other services.
    ordinary: Arc<Semaphore>,
    maps: ClassLimits,
    reads: ClassLimits,
    holds: ClassLimits,
    admin: ClassLimits,
}

/// The permits of a class: for its requests in flight, and for those of them that are being processed.
#[derive(Debug)]
struct ClassLimits {
    in_flight: Arc<Semaphore>,
    at_work: Arc<Semaphore>,
}

impl ClassLimits {
    fn new(in_flight: usize, at_work: usize) -> Self {
        let semaphore = |places: usize| Arc::new(Semaphore::new(places.max(1)));
        Self { in_flight: semaphore(in_flight), at_work: semaphore(at_work) }
    }
}

/// Permission to process a request. Dropping it admits the next one.
#[derive(Debug)]
pub(crate) struct Permit(#[expect(dead_code, reason = "they are held, not used")] [Option<OwnedSemaphorePermit>; 4]);

/// The class or the process has reached its limit of requests.
#[derive(Debug)]
pub(crate) struct AtCapacity;

impl Bulkheads {
    pub(crate) fn new(in_flight_max: usize) -> Self {
        let share = |percent: usize| in_flight_max * percent / 100;
        Self {
            all: Arc::new(Semaphore::new(in_flight_max)),
            ordinary: Arc::new(Semaphore::new(share(75).max(1))),
            maps: ClassLimits::new(share(50), MAPS_AT_WORK),
            reads: ClassLimits::new(share(25), READS_AT_WORK),
            holds: ClassLimits::new(share(60), HOLDS_AT_WORK),
            admin: ClassLimits::new(share(20), ADMIN_AT_WORK),
        }
    }

    /// Waits for up to [`WAIT_TIMEOUT`] until a request of this class may be processed. Fails at once if too many are
    /// in flight.
    pub(crate) async fn enter(&self, class: RequestClass) -> Result<Permit, AtCapacity> {
        let limits = match class {
            RequestClass::Open => return Ok(Permit([const { None }; 4])),
            RequestClass::Confirm | RequestClass::Notice | RequestClass::Internal => {
                return Ok(Permit([Some(try_take(&self.all)?), None, None, None]));
            }
            RequestClass::Map => &self.maps,
            RequestClass::Read => &self.reads,
            RequestClass::Hold => &self.holds,
            RequestClass::Admin => &self.admin,
        };
        let in_flight = [try_take(&limits.in_flight)?, try_take(&self.ordinary)?, try_take(&self.all)?].map(Some);
        let at_work = Arc::clone(&limits.at_work).acquire_owned();
        let at_work =
            tokio::time::timeout(WAIT_TIMEOUT, at_work).await.map_err(|_| AtCapacity)?.map_err(|_| AtCapacity)?;
        let [a, b, c] = in_flight;
        Ok(Permit([a, b, c, Some(at_work)]))
    }
}

fn try_take(places: &Arc<Semaphore>) -> Result<OwnedSemaphorePermit, AtCapacity> {
    Arc::clone(places).try_acquire_owned().map_err(|_| AtCapacity)
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    /// Takes the permits that are free at once, and counts the requests that wait.
    async fn fill(bulkheads: &Bulkheads, class: RequestClass, count: usize) -> (Vec<Permit>, usize) {
        let mut places = Vec::new();
        let mut waiting = 0;
        for _ in 0..count {
            match bulkheads.enter(class).now_or_never() {
                Some(Ok(place)) => places.push(place),
                Some(Err(AtCapacity)) => break,
                None => waiting += 1,
            }
        }
        (places, waiting)
    }

    #[tokio::test]
    async fn crowds_of_all_other_classes_leave_room_for_payers_and_other_services() {
        let bulkheads = Bulkheads::new(100);
        let mut held = Vec::new();
        for class in [RequestClass::Map, RequestClass::Hold, RequestClass::Read, RequestClass::Admin] {
            held.extend(fill(&bulkheads, class, 100).await.0);
        }
        assert_eq!(held.len(), 75, "ordinary requests have three quarters");
        assert!(matches!(bulkheads.enter(RequestClass::Map).await, Err(AtCapacity)));
        let (paying, _) = fill(&bulkheads, RequestClass::Confirm, 15).await;
        let (asked, _) = fill(&bulkheads, RequestClass::Internal, 15).await;
        assert_eq!((paying.len(), asked.len()), (15, 10), "the process has its maximum");
        assert!(bulkheads.enter(RequestClass::Open).await.is_ok());
        drop(held);
        assert!(bulkheads.enter(RequestClass::Map).await.is_ok());
    }

    #[tokio::test]
    async fn a_few_of_a_class_are_processed_and_the_next_when_one_is_done() {
        let bulkheads = Bulkheads::new(1000);
        let (mut at_work, waiting) = fill(&bulkheads, RequestClass::Read, 50).await;
        assert_eq!((at_work.len(), waiting), (READS_AT_WORK, 50 - READS_AT_WORK));
        let next = bulkheads.enter(RequestClass::Read);
        let leave = async {
            tokio::task::yield_now().await;
            drop(at_work.pop());
        };
        let (next, ()) = tokio::join!(next, leave);
        assert!(next.is_ok());
    }
}
