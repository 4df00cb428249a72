//! What leaves together for the Event Service, and comes back in pieces.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::extract::{Path, State};
use axum::routing::post;
use axum::{Json, Router};
use booking_service::event_client::EventClient;
use futures::future::join_all;
use service_kit::auth::InternalKeys;
use service_kit::error::Error;
use service_kit::lifecycle::Lifecycle;
use service_kit::tls::Trust;
use shared_contracts::ids::{SessionId, SessionSeatId};
use shared_contracts::problem::{Code, Problem};
use shared_contracts::seat_api::{Availability, CallAnswer, CallAnswers, Calls, CheckAvailabilityRequest};
use tokio::net::TcpListener;

const CALLS: usize = 8;

/// Exchanges of one call, and of several.
type Counted = Arc<[AtomicUsize; 2]>;

fn available(session_id: SessionId) -> Availability {
    Availability {
        available: true,
        session_id,
        seats: Vec::new(),
        unavailable_seat_ids: Vec::new(),
        unknown_seat_ids: Vec::new(),
        pricing: None,
    }
}

async fn alone(State(counted): State<Counted>, Path(session_id): Path<SessionId>) -> Json<Availability> {
    counted[0].fetch_add(1, Ordering::Relaxed);
    Json(available(session_id))
}

/// The sessions that calls ask for, and what they are answered, in an Event Service with these routes.
async fn ask(routes: Router<Counted>) -> (Vec<(SessionId, Result<Availability, Error>)>, [usize; 2]) {
    let counted = Counted::default();
    let routes = routes.route("/api/internal/sessions/{session}/seats/check-availability", post(alone));
    let routes = routes.with_state(Arc::clone(&counted));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base = format!("http://{}", listener.local_addr().unwrap());
    #[expect(clippy::disallowed_methods, reason = "it ends with the test")]
    tokio::spawn(async move { axum::serve(listener, routes).await });
    let client = EventClient::new(&base, &InternalKeys::default(), &Trust::default(), &Lifecycle::new()).unwrap();
    let ask = async |session: SessionId| (session, client.check_availability(session, &[SessionSeatId::new()]).await);
    // All are asked before the client gets to its work, so they leave together.
    let answers = join_all((0..CALLS).map(|_| ask(SessionId::new()))).await;
    (answers, [0, 1].map(|which: usize| counted[which].load(Ordering::Relaxed)))
}

#[tokio::test]
async fn an_event_service_that_takes_one_call_at_a_time_is_asked_for_each_by_itself() {
    let older = Router::new().fallback(async |State(counted): State<Counted>| {
        counted[1].fetch_add(1, Ordering::Relaxed);
        service_kit::error::problem_response(Problem::new(Code::NotFound, "There is nothing here."))
    });
    let (answers, [alone, together]) = ask(older).await;
    for (session, answer) in answers {
        assert_eq!(answer.unwrap().session_id, session);
    }
    assert_eq!((alone, together), (CALLS, 1));
}

#[tokio::test]
async fn each_of_many_gets_its_own_answer_and_what_failed_alone_is_asked_for_again() {
    let each = async |State(counted): State<Counted>, Json(calls): Json<Calls<CheckAvailabilityRequest>>| {
        counted[1].fetch_add(1, Ordering::Relaxed);
        let answer = |(place, session): (usize, SessionId)| {
            CallAnswer::from(match place % 3 {
                0 => Ok(available(session)),
                1 => Err(Problem::new(Code::SessionNotFound, session.to_string())),
                _ => Err(Problem::new(Code::DatabaseUnavailable, "Come again.")),
            })
        };
        let sessions = calls.calls.iter().map(|call| call.session_id);
        Json(CallAnswers { answers: sessions.enumerate().map(answer).collect() })
    };
    let (answers, [alone, together]) =
        ask(Router::new().route("/api/internal/seats/check-availability", post(each))).await;
    // What failed where others did not was asked for again.
    assert_eq!((alone, together), (CALLS / 3, 1));
    for (place, (session, answer)) in answers.into_iter().enumerate() {
        match answer {
            Ok(availability) => assert_eq!((availability.session_id, place % 3 == 1), (session, false)),
            Err(Error::Refused(problem)) => assert_eq!((problem.detail, place % 3), (session.to_string(), 1)),
            Err(error) => panic!("{error}"),
        }
    }
}

#[tokio::test]
async fn an_answer_that_can_not_be_read_costs_the_others_nothing() {
    let newer = async |Json(calls): Json<Calls<CheckAvailabilityRequest>>| {
        let mut answers: Vec<_> =
            calls.calls.iter().map(|call| serde_json::json!({ "done": available(call.session_id) })).collect();
        answers[0] = serde_json::json!({ "refused": { "code": "of_a_later_day" } });
        Json(serde_json::json!({ "answers": answers }))
    };
    let (answers, _) = ask(Router::new().route("/api/internal/seats/check-availability", post(newer))).await;
    let failed: Vec<bool> = answers.iter().map(|(_, answer)| answer.is_err()).collect();
    assert_eq!((failed[0], failed[1..].contains(&true)), (true, false));
}

#[tokio::test]
async fn fewer_answers_than_calls_are_no_answer() {
    let one = async |Json(calls): Json<Calls<CheckAvailabilityRequest>>| {
        Json(CallAnswers { answers: vec![CallAnswer::from(Ok(available(calls.calls[0].session_id)))] })
    };
    let (answers, _) = ask(Router::new().route("/api/internal/seats/check-availability", post(one))).await;
    let failed = answers.iter().filter(|(_, answer)| matches!(answer, Err(Error::Internal(_)))).count();
    assert_eq!(failed, CALLS);
}
