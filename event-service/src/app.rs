//! Every route on one screen, and the start of the service.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::ensure;
use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::Method;
use service_kit::admit::bulkheads::RequestClass;
use service_kit::admit::limits::Limits;
use service_kit::amqp::{self, ConsumedQueue};
use service_kit::http::{openapi, query, server};
use service_kit::postgres::database::{self, BatchPool};
use service_kit::process::common::Common;
use service_kit::process::health::{self, Health};
use service_kit::process::lifecycle::Lifecycle;
use service_kit::process::settings::Secret;
use shared_contracts::booking_event::BookingEventType;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::booking_consumer::Applier;
use crate::catalogue::{events, folded_labels, halls, locations, organizers, seats, sessions};
use crate::internal_api;
use crate::metrics::EventMetrics;
use crate::seat_map::stream::SeatStreams;
use crate::seat_map::{map, stream};
use crate::settings::Settings;
use crate::state::{AppState, MIGRATIONS};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Event Service",
        description = "Organizers, events, locations, halls, seats, sessions and seat maps.\n\n\
            **New here?** Follow the tags in order: create an organizer, an event, a location, a hall with seats, and a session. \
            Each example body works once you replace its ids by those of the earlier answers. `GET …/seat-map` then shows the seats. \
            Book them with the Booking Service.",
    ),
    tags(
        (name = "1 Organizers"), (name = "2 Events"), (name = "3 Locations"), (name = "4 Halls and seats"), (name = "5 Sessions"),
        (name = "6 Internal seat API", description = "For the Booking Service"), (name = "Health"),
    )
)]
struct Document;

/// The public routes, the routes for the Booking Service, and the document that describes both.
fn api(state: AppState, health: Health) -> (Router, Router, utoipa::openapi::OpenApi) {
    let metrics = state.metrics.common.routes();
    let (routes, mut document) = OpenApiRouter::with_openapi(openapi::complete(Document::openapi()))
        .routes(routes!(organizers::create_organizer, organizers::list_organizers))
        .routes(routes!(organizers::get_organizer, organizers::update_organizer, organizers::delete_organizer))
        .routes(routes!(events::create_event, events::list_events))
        .routes(routes!(events::get_event, events::update_event, events::delete_event))
        .routes(routes!(locations::create_location, locations::list_locations))
        .routes(routes!(locations::get_location, locations::update_location, locations::delete_location))
        .routes(routes!(halls::create_hall, halls::list_halls))
        .routes(routes!(halls::get_hall, halls::update_hall, halls::delete_hall))
        .routes(routes!(seats::create_seat, seats::list_seats))
        .merge(
            OpenApiRouter::new()
                .routes(routes!(seats::create_seats))
                .layer(DefaultBodyLimit::max(seats::BULK_BODY_BYTES_MAX)),
        )
        .routes(routes!(seats::get_seat, seats::update_seat, seats::delete_seat))
        .routes(routes!(sessions::create_session, sessions::list_sessions))
        .routes(routes!(sessions::get_session, sessions::update_session, sessions::delete_session))
        .routes(routes!(sessions::cancel_session))
        .routes(routes!(map::list_session_seats))
        .routes(routes!(map::get_seat_map))
        .routes(routes!(stream::stream_seat_map))
        .with_state(state.clone())
        .merge(health::routes(health))
        .merge(metrics)
        .split_for_parts();
    let routes = query::strict(routes, &document);
    let (internal_routes, internal_document) = OpenApiRouter::new()
        .routes(routes!(internal_api::check_availability))
        .routes(routes!(internal_api::reserve_seats))
        .routes(routes!(internal_api::reserve_seats_for_many))
        .routes(routes!(internal_api::release_seats))
        .routes(routes!(internal_api::release_seats_of_many))
        .routes(routes!(internal_api::confirm_seats))
        .routes(routes!(internal_api::get_pricing))
        .routes(routes!(internal_api::get_session_times))
        .routes(routes!(internal_api::list_overdue_holds))
        .routes(routes!(internal_api::list_cancelled_sessions))
        .routes(routes!(internal_api::list_owned_seats))
        .routes(routes!(internal_api::look_up_seats))
        .routes(routes!(internal_api::get_internal_health, internal_api::post_internal_health))
        .with_state(state)
        .split_for_parts();
    document.merge(internal_document);
    openapi::refer_to_items(&mut document);
    openapi::describe_security(&mut document);
    openapi::share_errors(&mut document);
    (routes, internal_routes, document)
}

/// The class of a route, whose requests share a limit. The internal routes have theirs elsewhere.
#[must_use]
pub fn request_class(method: &Method, path: &str) -> Option<RequestClass> {
    let is_map = path.ends_with("/seat-map")
        || path.ends_with("/seat-map/stream")
        || path == "/api/v1/sessions/{session_id}/seats";
    match (path.starts_with("/api/v1/"), method.is_safe()) {
        (true, true) if is_map => Some(RequestClass::Map),
        (true, true) => Some(RequestClass::Read),
        (true, false) => Some(RequestClass::Admin),
        (false, _) => None,
    }
}

/// The router and the OpenAPI document without a database or broker, for the `openapi` command and for tests of the
/// routes.
///
/// # Errors
/// A metric or a setting is wrong in the code; the environment can cause no error.
pub fn skeleton() -> anyhow::Result<(Router, utoipa::openapi::OpenApi)> {
    let nowhere = Secret::from("postgres://localhost");
    let db = database::lazy_pool(&nowhere, "openapi", 1)?;
    let streams = SeatStreams::new(db.clone(), 0, CancellationToken::new());
    let batch_db = BatchPool::new(&nowhere, "openapi")?;
    let state = AppState::new(db, &batch_db, streams, EventMetrics::new()?, &Lifecycle::new());
    let (routes, internal_routes, document) = api(state, Health::new("event-service", env!("CARGO_PKG_VERSION")));
    Ok((routes.merge(internal_routes), document))
}

/// Migrates the database, then serves requests and consumes events until `lifecycle` stops.
///
/// # Errors
/// The database does not answer, or a migration fails.
pub async fn run(settings: Settings, listener: TcpListener, lifecycle: &Lifecycle) -> anyhow::Result<()> {
    let db = database::connect(&settings.database_url, "event-service", settings.database_connections_max, &MIGRATIONS)
        .await?;
    let batch_db = BatchPool::new(&settings.database_url, "event-service")?;
    let metrics = EventMetrics::new()?;
    metrics.watch(&db, &batch_db)?;
    let queue = ConsumedQueue {
        name: settings.queue,
        routing_keys: BookingEventType::ALL.map(BookingEventType::routing_key).to_vec(),
        up: Arc::new(AtomicBool::new(false)),
        metrics: metrics.consumer.clone(),
    };
    let consumer_up = Arc::clone(&queue.up);
    let health = Health::new("event-service", env!("CARGO_PKG_VERSION")).needs_database(db.clone()).uses(
        "rabbitmq",
        move || {
            let up = consumer_up.load(Ordering::Relaxed);
            async move {
                ensure!(up, "no consumer is registered at the broker");
                Ok(())
            }
        },
    );
    let applier = Applier::start(batch_db.clone(), db.clone(), metrics.clone(), lifecycle);
    let stopping = lifecycle.token().clone();
    lifecycle.spawn("booking consumer", async move {
        amqp::consume(settings.broker, queue, stopping, async |incoming| applier.handle(&incoming).await).await
    });
    lifecycle.spawn("folded labels", folded_labels::fill(db.clone(), lifecycle.token().clone()));
    let streams = SeatStreams::new(db.clone(), settings.seat_stream_watchers_max, lifecycle.token().clone());
    lifecycle.spawn("seat streams", Arc::clone(&streams).run());
    let state = AppState::new(db, &batch_db, streams, metrics.clone(), lifecycle);
    let (mut routes, internal_routes, mut document) = api(state, health);
    openapi::narrow_security(&mut document, &settings.common.auth);
    match settings.internal_listen {
        None => routes = routes.merge(internal_routes),
        Some(address) => {
            let internal = Common {
                auth: settings.common.auth.internal_only(),
                // Rate limits are for the public; other services have none.
                limits: Limits { rates: None, ..settings.common.limits.clone() },
                ..settings.common.clone()
            };
            server::serve(
                lifecycle,
                server::listen(address).await?,
                internal_routes,
                &internal,
                &metrics.common,
                request_class,
            );
        }
    }
    let router = routes.merge(openapi::pages(&document));
    server::serve(lifecycle, listener, router, &settings.common, &metrics.common, request_class);
    Ok(())
}
