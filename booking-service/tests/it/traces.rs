//! The trace of one booking, as a collector receives it. Both services run as processes, and send their spans when they
//! end.

use std::collections::HashMap;
use std::process::Stdio;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::routing::post;
use futures::future::join_all;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use prost::Message;
use service_kit::process::settings::Secret;
use service_kit::testing::{server, wait_until};
use tokio::net::TcpListener;
use tokio::process::Command;

use crate::processes::{self, Process, free_port};
use crate::support::{SOON, System, answer, text_of};

const SAMPLED: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
const NOT_SAMPLED: &str = "00-aaf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00";

/// Spans and the services that sent them.
type Received = Arc<Mutex<Vec<(String, Span)>>>;

/// A collector that accepts OTLP over HTTP.
async fn collector() -> (Received, String) {
    let received = Received::default();
    let take = async |State(received): State<Received>, body: Bytes| {
        for sent in ExportTraceServiceRequest::decode(body).unwrap().resource_spans {
            let resource = format!("{:?}", sent.resource);
            let service =
                ["event-service", "booking-service"].into_iter().find(|name| resource.contains(name)).unwrap();
            let spans = sent.scope_spans.into_iter().flat_map(|scope| scope.spans);
            received.lock().unwrap().extend(spans.map(|span| (service.to_owned(), span)));
        }
    };
    let routes = Router::new().route("/v1/traces", post(take)).with_state(Arc::clone(&received));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    #[expect(clippy::disallowed_methods, reason = "it ends with the test")]
    tokio::spawn(async move { axum::serve(listener, routes).await });
    (received, url)
}

/// Books, pays, and waits until the seat is sold.
async fn buy(system: &System, sale: &crate::support::Sale, seat: usize, booking: &str, event: &str, traceparent: &str) {
    let post = async |path: &str, body: Option<serde_json::Value>, expected| {
        let request = system.http.post(format!("{booking}{path}")).header("traceparent", traceparent);
        let request = request.header("x-user-id", "019ac1c0-0000-7000-8000-000000000001");
        let request = if let Some(body) = body { request.json(&body) } else { request };
        answer(request.send().await.unwrap(), expected).await
    };
    let reservation = post("/api/v1/reservations", Some(sale.order(&[seat])), 201).await;
    post(&format!("/api/v1/reservations/{}/confirm", text_of(&reservation, "id")), None, 200).await;
    wait_until("the seat is sold", SOON, async || {
        let seats = system.http.get(format!("{event}/api/v1/sessions/{}/seats", sale.session)).send().await.unwrap();
        answer(seats, 200).await[seat]["status"] == "sold"
    })
    .await;
}

/// Stops the process as an operator would. Returns what it has logged.
async fn end(process: Process) -> String {
    processes::signal(&process.child, "TERM").await;
    String::from_utf8(process.child.wait_with_output().await.unwrap().stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_booking_is_one_trace_through_both_services_and_the_broker() {
    let system = System::start().await;
    let sale = system.sale(10).await;
    // Processes replace the services in here, on the same databases and queue. The services here cannot reach the
    // broker.
    system.to_broker.cut();
    system.lifecycle.stop();
    let (received, collector) = collector().await;
    let traced = |mut command: Command| {
        command.env("OTEL_EXPORTER_OTLP_ENDPOINT", &collector).env("OTEL_EXPORTER_OTLP_COMPRESSION", "none");
        // No batch is sent before the exit, so the export at exit is tested, too.
        command.env("OTEL_BSP_SCHEDULE_DELAY", "60000").env("LOG_LEVEL", "info").stdout(Stdio::piped());
        command
    };
    let port = free_port().await;
    let mut settings = system.settings.clone();
    settings.broker.url = Secret::from(server("TEST_RABBITMQ_URL").as_str());
    let event = processes::event(&settings, system.event_database_url.reveal(), port);
    let event = processes::start(traced(event)).await;
    settings.event_service_url = event.base.clone();
    let booking = processes::start(traced(processes::booking(&settings, "serve", free_port().await))).await;
    buy(&system, &sale, 0, &booking.base, &event.base, SAMPLED).await;
    buy(&system, &sale, 1, &booking.base, &event.base, NOT_SAMPLED).await;
    // At the same time, so that their calls to the Event Service share a batch.
    let concurrent: Vec<String> = (2..10).map(|seat| SAMPLED.replace("4bf92f35", &format!("{seat:08x}"))).collect();
    let buying =
        (2..10).zip(&concurrent).map(|(seat, trace)| buy(&system, &sale, seat, &booking.base, &event.base, trace));
    join_all(buying).await;
    let (booking_log, event_log) = (end(booking).await, end(event).await);

    let received = std::mem::take(&mut *received.lock().unwrap());
    let of_trace = |traceparent: &str| {
        let id = hex::decode(&traceparent[3..35]).unwrap();
        received.iter().filter(move |(_, span)| span.trace_id == id).cloned().collect::<Vec<_>>()
    };
    assert_eq!(of_trace(NOT_SAMPLED), [], "what the caller does not sample is not sampled here");
    let spans = of_trace(SAMPLED);
    let tree = tree_of(&spans);
    assert_eq!(
        tree,
        [
            "booking-service: POST /api/v1/reservations Server < the caller",
            "booking-service: POST /api/v1/reservations/{id}/confirm Server < the caller",
            "booking-service: POST Client < reservation.reserve",
            "booking-service: payment.charge Internal < POST /api/v1/reservations/{id}/confirm",
            "booking-service: payment.complete Internal < POST /api/v1/reservations/{id}/confirm",
            "booking-service: payment.lease Internal < POST /api/v1/reservations/{id}/confirm",
            "booking-service: publish reservation.confirmed Producer < payment.complete",
            "booking-service: reservation.lock Internal < POST /api/v1/reservations",
            "booking-service: reservation.reserve Internal < POST /api/v1/reservations",
            "booking-service: reservation.tiers Internal < POST /api/v1/reservations",
            "booking-service: reservation.write Internal < POST /api/v1/reservations",
            "event-service: POST /api/internal/sessions/{session_id}/seats/reserve Server < POST",
            "event-service: process reservation.confirmed Consumer < publish reservation.confirmed",
            "event-service: session_seats.apply Internal < process reservation.confirmed",
            "event-service: session_seats.look Internal < POST /api/internal/sessions/{session_id}/seats/reserve",
            "event-service: session_seats.reserve Internal < POST /api/internal/sessions/{session_id}/seats/reserve",
        ]
    );
    let trees = concurrent.iter().map(|trace| tree_of(&of_trace(trace))).collect();
    assert_batched_traces_match(trees, &tree);
    assert!(spans.iter().all(|(_, span)| span.end_time_unix_nano >= span.start_time_unix_nano));
    for (log, line) in [(&booking_log, "Published event"), (&event_log, "Received message")] {
        for trace in [SAMPLED, NOT_SAMPLED] {
            let found = log.lines().any(|shown| shown.contains(line) && shown.contains(&trace[3..35]));
            assert!(found, "no line {line:?} has the trace's id in:\n{log}");
        }
    }
}

/// Describes each span and its parent, sorted.
fn tree_of(spans: &[(String, Span)]) -> Vec<String> {
    let caller = (hex::decode(&SAMPLED[36..52]).unwrap(), "the caller".to_owned());
    let names = spans.iter().map(|(_, span)| (span.span_id.clone(), span.name.clone()));
    let names: HashMap<Vec<u8>, String> = names.chain([caller]).collect();
    let described = |(service, span): &(String, Span)| {
        let parent = names.get(&span.parent_span_id).map_or("nothing", String::as_str);
        format!("{service}: {} {} < {parent}", span.name, kind(span))
    };
    let mut tree: Vec<String> = spans.iter().map(described).collect();
    tree.sort();
    tree
}

fn assert_batched_traces_match(trees: Vec<Vec<String>>, expected: &[String]) {
    let batched = trees.iter().flatten().filter(|step| step.contains("/api/internal/seats/reserve Server")).count();
    assert!(batched > 1, "no two holds shared a batch: {trees:#?}");
    for batched in trees {
        let as_single =
            |step: String| step.replace("/api/internal/seats/", "/api/internal/sessions/{session_id}/seats/");
        let mut single: Vec<String> = batched.into_iter().map(as_single).collect();
        single.sort();
        assert_eq!(single, expected);
    }
}

fn kind(span: &Span) -> &'static str {
    match span.kind() {
        SpanKind::Server => "Server",
        SpanKind::Client => "Client",
        SpanKind::Producer => "Producer",
        SpanKind::Consumer => "Consumer",
        SpanKind::Internal | SpanKind::Unspecified => "Internal",
    }
}
