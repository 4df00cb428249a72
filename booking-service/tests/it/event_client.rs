//! What leaves together for the Event Service, and comes back in pieces.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::post;
use axum::{Json, Router};
use booking_service::event_client::{ChangeOutcome, EventClient};
use chrono::DateTime;
use futures::future::join_all;
use service_kit::auth::InternalKeys;
use service_kit::error::Error;
use service_kit::lifecycle::Lifecycle;
use service_kit::tls::Trust;
use shared_contracts::ids::{ReservationId, SessionId, SessionSeatId};
use shared_contracts::problem::{Code, Problem};
use shared_contracts::seat_api::{
    CallAnswer, CallAnswers, Calls, Hold, ReleaseRequest, ReserveRequest, SEATS_PER_CALL_MAX, SeatsChanged, SeatsFreed,
};
use tokio::net::TcpListener;

const CALLS: usize = 8;

/// Exchanges of one call, and of several.
type Counted = Arc<[AtomicUsize; 2]>;

fn held(request: ReserveRequest) -> SeatsChanged {
    let ReserveRequest { reservation_id, session_seat_ids, .. } = request;
    SeatsChanged { reservation_id, session_seat_ids, pricing: None }
}

async fn alone(State(counted): State<Counted>, Json(request): Json<ReserveRequest>) -> Json<SeatsChanged> {
    counted[0].fetch_add(1, Ordering::Relaxed);
    Json(held(request))
}

/// A client of an Event Service with these routes.
async fn client_of(routes: Router) -> EventClient {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base = format!("http://{}", listener.local_addr().unwrap());
    #[expect(clippy::disallowed_methods, reason = "it ends with the test")]
    tokio::spawn(async move { axum::serve(listener, routes).await });
    EventClient::new(&base, &InternalKeys::default(), &Trust::default(), &Lifecycle::new()).unwrap()
}

/// The reservations that want holds, and what they are answered, in an Event Service with these routes.
async fn ask(routes: Router<Counted>) -> (Vec<(ReservationId, Result<SeatsChanged, Error>)>, [usize; 2]) {
    let counted = Counted::default();
    let routes = routes.route("/api/internal/sessions/{session}/seats/reserve", post(alone));
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
            ChangeOutcome::Done(held) => held,
            ChangeOutcome::Refused(conflicts) => panic!("{conflicts:?}"),
        });
        (reservation_id, answer)
    };
    // All are asked before the client gets to its work, so they leave together.
    let answers = join_all((0..CALLS).map(|_| ask(ReservationId::new()))).await;
    (answers, [0, 1].map(|which: usize| counted[which].load(Ordering::Relaxed)))
}

#[tokio::test]
async fn an_event_service_that_takes_one_call_at_a_time_is_asked_for_each_by_itself() {
    let older = Router::new().fallback(async |State(counted): State<Counted>| {
        counted[1].fetch_add(1, Ordering::Relaxed);
        service_kit::error::problem_response(Problem::new(Code::NotFound, "There is nothing here."))
    });
    let (answers, [alone, together]) = ask(older).await;
    for (owner, answer) in answers {
        assert_eq!(answer.unwrap().reservation_id, owner);
    }
    assert_eq!((alone, together), (CALLS, 1));
}

#[tokio::test]
async fn each_of_many_gets_its_own_answer_and_what_failed_alone_is_asked_for_again() {
    let each = async |State(counted): State<Counted>, Json(calls): Json<Calls<ReserveRequest>>| {
        counted[1].fetch_add(1, Ordering::Relaxed);
        let answer = |(place, request): (usize, ReserveRequest)| {
            CallAnswer::from(match place % 3 {
                0 => Ok(held(request)),
                1 => Err(Problem::new(Code::SessionNotFound, request.reservation_id.to_string())),
                _ => Err(Problem::new(Code::DatabaseUnavailable, "Come again.")),
            })
        };
        let requests = calls.calls.into_iter().map(|call| call.body);
        Json(CallAnswers { answers: requests.enumerate().map(answer).collect() })
    };
    let (answers, [alone, together]) = ask(Router::new().route("/api/internal/seats/reserve", post(each))).await;
    // What failed where others did not was asked for again.
    assert_eq!((alone, together), (CALLS / 3, 1));
    for (place, (owner, answer)) in answers.into_iter().enumerate() {
        match answer {
            Ok(held) => assert_eq!((held.reservation_id, place % 3 == 1), (owner, false)),
            Err(Error::Refused(problem)) => assert_eq!((problem.detail, place % 3), (owner.to_string(), 1)),
            Err(error) => panic!("{error}"),
        }
    }
}

#[tokio::test]
async fn an_answer_that_can_not_be_read_costs_the_others_nothing() {
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
async fn fewer_answers_than_calls_are_no_answer() {
    let one = async |Json(calls): Json<Calls<ReserveRequest>>| {
        Json(CallAnswers { answers: vec![CallAnswer::from(Ok(held(calls.calls[0].body.clone())))] })
    };
    let (answers, _) = ask(Router::new().route("/api/internal/seats/reserve", post(one))).await;
    let failed = answers.iter().filter(|(_, answer)| matches!(answer, Err(Error::Internal(_)))).count();
    assert_eq!(failed, CALLS);
}

#[tokio::test]
async fn more_holds_than_a_call_takes_end_in_several() {
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

/// One of the first call's seats is locked by somebody; those of the second are freed all the same, and the caller hears of the fault.
#[tokio::test]
async fn a_release_that_fails_costs_those_behind_it_nothing() {
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
