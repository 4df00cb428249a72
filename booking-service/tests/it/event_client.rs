//! Batched calls to the Event Service, and the separate answer of each.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::post;
use axum::{Json, Router};
use booking_service::event_client::{EventClient, SeatChange};
use chrono::DateTime;
use futures::future::join_all;
use service_kit::auth::InternalKeys;
use service_kit::http::error::Error;
use service_kit::http::tls::Trust;
use service_kit::process::lifecycle::Lifecycle;
use shared_contracts::ids::{ReservationId, SessionId, SessionSeatId};
use shared_contracts::problem::{Code, Problem};
use shared_contracts::seat_api::{
    CallAnswer, CallAnswers, Calls, Hold, ReleaseRequest, ReserveRequest, SEATS_PER_CALL_MAX, SeatsChanged, SeatsFreed,
};
use tokio::net::TcpListener;

const CALLS: usize = 8;

/// Counts the requests that carry one call, and those that carry several.
type Counted = Arc<[AtomicUsize; 2]>;

fn held(request: ReserveRequest) -> SeatsChanged {
    let ReserveRequest { reservation_id, session_seat_ids, .. } = request;
    SeatsChanged { reservation_id, session_seat_ids, pricing: None }
}

async fn single(State(counted): State<Counted>, Json(request): Json<ReserveRequest>) -> Json<SeatsChanged> {
    counted[0].fetch_add(1, Ordering::Relaxed);
    Json(held(request))
}

/// A client of an Event Service that has these routes.
async fn client_of(routes: Router) -> EventClient {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base = format!("http://{}", listener.local_addr().unwrap());
    #[expect(clippy::disallowed_methods, reason = "it ends with the test")]
    tokio::spawn(async move { axum::serve(listener, routes).await });
    EventClient::new(&base, &InternalKeys::default(), &Trust::default(), &Lifecycle::new()).unwrap()
}

/// Sends [`CALLS`] holds to an Event Service with these routes. Returns each reservation with its answer, and the
/// counts.
async fn ask(routes: Router<Counted>) -> (Vec<(ReservationId, Result<SeatsChanged, Error>)>, [usize; 2]) {
    let counted = Counted::default();
    let routes = routes.route("/api/internal/sessions/{session}/seats/reserve", post(single));
    let client = client_of(routes.with_state(Arc::clone(&counted))).await;
    let ask = async |reservation_id: ReservationId| {
        let session_seat_ids = vec![SessionSeatId::new()];
        let request = ReserveRequest {
            reservation_id,
            session_seat_ids,
            reserved_until: DateTime::UNIX_EPOCH,
            with_prices: true,
        };
        let answer = client.reserve(SessionId::new(), request).await.map(|outcome| match outcome {
            SeatChange::Done(held) => held,
            SeatChange::Refused(conflicts) => panic!("{conflicts:?}"),
        });
        (reservation_id, answer)
    };
    // All calls are queued before the client's task runs, so they share a batch.
    let answers = join_all((0..CALLS).map(|_| ask(ReservationId::new()))).await;
    (answers, [0, 1].map(|which: usize| counted[which].load(Ordering::Relaxed)))
}

#[tokio::test]
async fn an_event_service_without_batches_gets_each_call_separately() {
    let older = Router::new().fallback(async |State(counted): State<Counted>| {
        counted[1].fetch_add(1, Ordering::Relaxed);
        service_kit::http::error::problem_response(Problem::new(Code::NotFound, "There is nothing here."))
    });
    let (answers, [single, batched]) = ask(older).await;
    for (owner, answer) in answers {
        assert_eq!(answer.unwrap().reservation_id, owner);
    }
    assert_eq!((single, batched), (CALLS, 1));
}

#[tokio::test]
async fn each_call_of_a_batch_gets_its_own_answer_and_failed_ones_are_repeated() {
    let each = async |State(counted): State<Counted>, Json(calls): Json<Calls<ReserveRequest>>| {
        counted[1].fetch_add(1, Ordering::Relaxed);
        let answer = |(place, request): (usize, ReserveRequest)| {
            CallAnswer::from(match place % 3 {
                0 => Ok(held(request)),
                1 => Err(Problem::new(Code::SessionNotFound, request.reservation_id.to_string())),
                _ => Err(Problem::new(Code::DatabaseUnavailable, "Try again later.")),
            })
        };
        let requests = calls.calls.into_iter().map(|call| call.body);
        Json(CallAnswers { answers: requests.enumerate().map(answer).collect() })
    };
    let (answers, [single, batched]) = ask(Router::new().route("/api/internal/seats/reserve", post(each))).await;
    // The calls that failed while others succeeded were sent again.
    assert_eq!((single, batched), (CALLS / 3, 1));
    for (place, (owner, answer)) in answers.into_iter().enumerate() {
        match answer {
            Ok(held) => assert_eq!((held.reservation_id, place % 3 == 1), (owner, false)),
            Err(Error::Refused(problem)) => assert_eq!((problem.detail, place % 3), (owner.to_string(), 1)),
            Err(error) => panic!("{error}"),
        }
    }
}

#[tokio::test]
async fn an_unreadable_answer_fails_only_its_own_call() {
    let newer = async |Json(calls): Json<Calls<ReserveRequest>>| {
        let mut answers: Vec<_> =
            calls.calls.into_iter().map(|call| serde_json::json!({ "done": held(call.body) })).collect();
        answers[0] = serde_json::json!({ "refused": { "code": "of_a_later_day" } });
        Json(serde_json::json!({ "answers": answers }))
    };
    let (answers, _) = ask(Router::new().route("/api/internal/seats/reserve", post(newer))).await;
    let failed: Vec<bool> = answers.iter().map(|(_, answer)| answer.is_err()).collect();
    assert_eq!((failed[0], failed[1..].contains(&true)), (true, false));
}

#[tokio::test]
async fn a_batch_with_fewer_answers_than_calls_fails_as_a_whole() {
    let one = async |Json(calls): Json<Calls<ReserveRequest>>| {
        Json(CallAnswers { answers: vec![CallAnswer::from(Ok(held(calls.calls[0].body.clone())))] })
    };
    let (answers, _) = ask(Router::new().route("/api/internal/seats/reserve", post(one))).await;
    let failed = answers.iter().filter(|(_, answer)| matches!(answer, Err(Error::Internal(_)))).count();
    assert_eq!(failed, CALLS);
}

#[tokio::test]
async fn more_holds_than_one_call_accepts_are_released_by_several() {
    let counted = Counted::default();
    let release = async |State(counted): State<Counted>, Json(request): Json<ReleaseRequest>| {
        counted[0].fetch_add(1, Ordering::Relaxed);
        counted[1].fetch_add(request.holds.len(), Ordering::Relaxed);
        assert!(request.holds.len() <= SEATS_PER_CALL_MAX);
        Json(SeatsFreed { session_seat_ids: Vec::new() })
    };
    let routes = Router::new().route("/api/internal/seats/release", post(release));
    let client = client_of(routes.with_state(Arc::clone(&counted))).await;
    let hold = |_| Hold { reservation_id: ReservationId::new(), session_seat_id: SessionSeatId::new() };
    client.release_all(&(0..=SEATS_PER_CALL_MAX).map(hold).collect::<Vec<_>>()).await.unwrap();
    client.release_all(&[]).await.unwrap();
    assert_eq!([0, 1].map(|which: usize| counted[which].load(Ordering::Relaxed)), [2, SEATS_PER_CALL_MAX + 1]);
}

/// One seat of the first call is locked. The seats of the second call are freed all the same, and the caller gets the
/// error.
#[tokio::test]
async fn a_failed_release_does_not_stop_the_releases_after_it() {
    let counted = Counted::default();
    let locked = SessionSeatId::new();
    let release = async move |State(counted): State<Counted>, Json(request): Json<ReleaseRequest>| {
        if request.holds.iter().any(|hold| hold.session_seat_id == locked) {
            return Err(StatusCode::SERVICE_UNAVAILABLE);
        }
        counted[0].fetch_add(request.holds.len(), Ordering::Relaxed);
        Ok(Json(SeatsFreed { session_seat_ids: Vec::new() }))
    };
    let routes = Router::new().route("/api/internal/seats/release", post(release));
    let client = client_of(routes.with_state(Arc::clone(&counted))).await;
    let hold = |session_seat_id| Hold { reservation_id: ReservationId::new(), session_seat_id };
    let mut holds = vec![hold(locked)];
    holds.extend((0..SEATS_PER_CALL_MAX).map(|_| hold(SessionSeatId::new())));
    let released = client.release_all(&holds).await;
    assert!(matches!(released, Err(Error::Unavailable { .. })), "{released:?}");
    assert_eq!(counted[0].load(Ordering::Relaxed), 1);
}
