//! The service put together: every route on one screen, and what runs beside them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::ensure;
use axum::Router;
use axum::extract::DefaultBodyLimit;
use service_kit::amqp::{self, ConsumedQueue};
use service_kit::health::{self, Health};
use service_kit::lifecycle::Lifecycle;
use service_kit::{database, openapi, server};
use shared_contracts::booking_event::BookingEventType;
use sqlx::PgPool;
use sqlx::migrate::Migrator;
use tokio::net::TcpListener;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::settings::Settings;
use crate::{booking_consumer, events, halls, internal_api, locations, organizers, seat_map, sessions};

/// The schema, compiled in.
pub static MIGRATIONS: Migrator = sqlx::migrate!();

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Event Service",
        description = "Organizers, events, locations, halls, seats, sessions and seat maps.\n\n\
            **New here?** Go down the tags in their order: create an organizer, an event, a location, a hall with seats, and a session; \
            each example body works once you put in the ids that the answers before gave you. `GET …/seat-map` then shows the seats. \
            They are booked at the Booking Service (port 8001).",
    ),
    tags(
        (name = "1 Organizers"), (name = "2 Events"), (name = "3 Locations"), (name = "4 Halls and seats"), (name = "5 Sessions"),
        (name = "6 Internal seat API", description = "For the Booking Service"), (name = "Health"),
    )
)]
struct Document;

/// All routes, and the document that describes them.
fn api(db: PgPool, health: Health) -> OpenApiRouter {
    OpenApiRouter::with_openapi(openapi::complete(Document::openapi()))
        .routes(routes!(organizers::create_organizer, organizers::list_organizers))
        .routes(routes!(organizers::get_organizer))
        .routes(routes!(events::create_event, events::list_events))
        .routes(routes!(events::get_event))
        .routes(routes!(locations::create_location, locations::list_locations))
        .routes(routes!(locations::get_location))
        .routes(routes!(halls::create_hall, halls::list_halls))
        .routes(routes!(halls::get_hall))
        .routes(routes!(halls::create_seat, halls::list_seats))
        .merge(
            OpenApiRouter::new()
                .routes(routes!(halls::create_seats))
                .layer(DefaultBodyLimit::max(halls::BULK_BODY_BYTES_MAX)),
        )
        .routes(routes!(sessions::create_session, sessions::list_sessions))
        .routes(routes!(sessions::get_session))
        .routes(routes!(seat_map::list_session_seats))
        .routes(routes!(seat_map::get_seat_map))
        .routes(routes!(internal_api::check_availability))
        .routes(routes!(internal_api::reserve_seats))
        .routes(routes!(internal_api::release_seats))
        .routes(routes!(internal_api::confirm_seats))
        .routes(routes!(internal_api::get_pricing))
        .routes(routes!(internal_api::list_overdue_holds))
        .routes(routes!(internal_api::get_internal_health, internal_api::post_internal_health))
        .with_state(db)
        .merge(health::routes(health))
}

fn router(db: PgPool, health: Health) -> Router {
    let (routes, document) = api(db, health).split_for_parts();
    routes.merge(openapi::pages(document))
}

/// The OpenAPI document, as `/openapi.json` shows it.
#[must_use]
pub fn document() -> utoipa::openapi::OpenApi {
    let unused = PgPool::connect_lazy_with(sqlx::postgres::PgConnectOptions::new());
    api(unused, Health::new("event-service", env!("CARGO_PKG_VERSION"))).into_openapi()
}

/// Starts the service: brings the schema up to date, then serves requests and consumes events until `lifecycle` stops.
///
/// # Errors
/// The database does not answer or can't be migrated.
pub async fn run(settings: Settings, listener: TcpListener, lifecycle: &Lifecycle) -> anyhow::Result<()> {
    let db = database::connect(&settings.database_url, "event-service", settings.database_connections_max, &MIGRATIONS)
        .await?;
    let queue = ConsumedQueue {
        name: settings.queue,
        routing_keys: BookingEventType::ALL.map(BookingEventType::routing_key).to_vec(),
        up: Arc::new(AtomicBool::new(false)),
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
    let consumer_db = db.clone();
    let consumer = amqp::consume(settings.broker, queue, lifecycle.token().clone(), move |incoming| {
        booking_consumer::handle(consumer_db.clone(), incoming)
    });
    lifecycle.spawn("booking consumer", consumer);
    server::serve(lifecycle, listener, router(db, health));
    Ok(())
}
