//! TLS on every link: with the right certificate everything works, and with any other no data is sent.

use std::collections::HashMap;

use booking_service::event_client::EventClient;
use booking_service::seat_locks::SeatLocks;
use booking_service::settings::Settings;
use service_kit::amqp::Publisher;
use service_kit::process::common::Common;
use service_kit::process::lifecycle::Lifecycle;
use service_kit::process::settings::SettingsReader;
use service_kit::testing::tls::{Pair, TestCa, TlsProxy};
use service_kit::testing::wires::authority;
use service_kit::testing::{empty_database, server};
use sqlx::{Connection, PgConnection};

use crate::support::System;

/// The settings of a service with one link, `setting`, that trusts `ca`.
fn settings(setting: &str, url: &str, ca: &TestCa) -> Settings {
    let texts = HashMap::from([
        (setting.to_owned(), url.to_owned()),
        ("TLS_CA_FILE".to_owned(), ca.file().to_str().unwrap().to_owned()),
    ]);
    Settings::read(SettingsReader::new(move |name| texts.get(name).cloned()), 8001).unwrap()
}

/// Tries a link through proxies with the right certificate and with three wrong ones, and to a server without TLS.
async fn try_link(setting: &str, url: &str, reach: impl AsyncFn(Settings) -> anyhow::Result<()>) {
    let ca = TestCa::new();
    let wrong: [(Pair, &[&str]); 3] = [
        (TestCa::new().local(), &["UnknownIssuer"]),
        (ca.issue(&["elsewhere.example.com"], 2100), &["not valid for name", "NotValidForName"]),
        (ca.issue(&["localhost", "127.0.0.1"], 2021), &["expired", "Expired"]),
    ];
    for (pair, causes) in wrong {
        let (proxy, through) = TlsProxy::in_front_of(url, &pair).await;
        let error = format!("{:#}", reach(settings(setting, &through, &ca)).await.unwrap_err());
        assert!(causes.iter().any(|cause| error.contains(cause)), "{setting}: {causes:?} is not in: {error}");
        assert_eq!((proxy.heard(), proxy.in_clear()), (0, 0), "{setting}, {causes:?}: the client sent data");
    }
    let (proxy, through) = TlsProxy::in_front_of(url, &ca.local()).await;
    reach(settings(setting, &through, &ca)).await.unwrap();
    assert!(proxy.heard() > 0 && proxy.in_clear() == 0, "{setting}");
    // A server that has no TLS.
    let bare = through.replacen(authority(&through), authority(url), 1);
    assert!(reach(settings(setting, &bare, &ca)).await.is_err(), "{setting}: plaintext is accepted");
}

#[tokio::test]
async fn postgresql_is_used_only_if_its_certificate_is_valid() {
    try_link("DATABASE_URL", empty_database().await.reveal(), async |settings: Settings| {
        Ok(PgConnection::connect(settings.database_url.reveal()).await?.ping().await?)
    })
    .await;
}

#[tokio::test]
async fn redis_is_used_only_if_its_certificate_is_valid() {
    try_link("REDIS_URL", &server("TEST_REDIS_URL"), async |settings: Settings| {
        SeatLocks::new(&settings.redis_url, &settings.common.trust)?.ping().await
    })
    .await;
}

#[tokio::test]
async fn the_broker_is_used_only_if_its_certificate_is_valid() {
    try_link("RABBITMQ_URL", &server("TEST_RABBITMQ_URL"), async |settings: Settings| {
        Publisher::new(settings.broker, "test").connect_if_needed().await
    })
    .await;
}

#[tokio::test]
async fn the_event_service_is_used_only_if_its_certificate_is_valid() {
    let system = System::start().await;
    try_link("EVENT_SERVICE_URL", &system.event_base, async |settings: Settings| {
        let Common { auth, trust, .. } = &settings.common;
        EventClient::new(&settings.event_service_url, &auth.internal_keys, trust, &Lifecycle::new())?.ping().await
    })
    .await;
    system.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_tls_on_every_link_a_seat_is_sold_and_refunded() {
    let ca = TestCa::new();
    let system = System::start_with_tls(&ca).await;
    for url in [&system.event_base, &system.booking_base, &system.settings.event_service_url] {
        assert!(url.starts_with("https://"), "{url}");
    }
    let sale = system.sale(2).await;
    let (id, user) = system.reserved(&sale, &[0]).await;
    assert_eq!(system.lock_owner(&sale, 0).await.as_ref(), Some(&id), "Redis is used");
    let tickets = system.confirm(&id, user, None, 200).await;
    system.seats_become(&sale, &["sold", "available"]).await;
    let ticket = crate::support::text_of(&tickets["tickets"][0], "id");
    system.refund(&ticket, user, 200).await;
    system.seats_become(&sale, &["available", "available"]).await;
    let health = system.get("/health", user, 200).await;
    assert_eq!(health["status"], "healthy", "{health}");
    for (link, proxy) in &system.tls_proxies {
        assert!(proxy.heard() > 0 && proxy.in_clear() == 0, "{link} is not used, or in plaintext");
    }
    system.finish().await;
}
