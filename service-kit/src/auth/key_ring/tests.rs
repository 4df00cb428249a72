//! Keys that change while the service runs.

use std::fs;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use axum::Router;
use axum::http::StatusCode;
use axum::response::IntoResponse;
use axum::routing::get;
use futures::future::join_all;
use serde_json::Value;
use tokio::net::TcpListener;
use uuid::Uuid;

use super::*;
use crate::auth::caller::Caller;
use crate::auth::jwk_set::usable;
use crate::auth::settings::AuthMode;
use crate::auth::verifier::Verifier;
use crate::testing::login::{SigningKey, believing, claims, jwks};
use crate::testing::{unique, wait_until};

const SOON: Duration = Duration::from_secs(10);
const HOUR: Duration = Duration::from_secs(3600);

fn rules(keys: KeySource) -> JwtSettings {
    let AuthMode::Jwt(rules) = believing(keys).mode else { panic!("no JWT settings") };
    rules
}

async fn verify(verifier: &Verifier, key: &SigningKey) -> Result<Caller, AuthError> {
    verifier.verify(&key.sign(&claims(Uuid::now_v7(), &[]))).await
}

/// A server that publishes keys, and can answer something else instead.
struct Site {
    url: Url,
    text: Mutex<String>,
    down: AtomicBool,
    fetches: AtomicUsize,
}

impl Site {
    async fn open(keys: &[&SigningKey], lifecycle: &Lifecycle) -> Arc<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/jwks.json", listener.local_addr().unwrap()).parse().unwrap();
        let site = Arc::new(Self {
            url,
            text: Mutex::new(jwks(keys)),
            down: AtomicBool::new(false),
            fetches: AtomicUsize::new(0),
        });
        let own = Arc::clone(&site);
        let answer = move || {
            own.fetches.fetch_add(1, Ordering::Relaxed);
            let down = own.down.load(Ordering::Relaxed);
            let text = own.text.lock().unwrap().clone();
            async move { if down { StatusCode::BAD_GATEWAY.into_response() } else { text.into_response() } }
        };
        lifecycle.spawn("site", async move {
            Ok(axum::serve(listener, Router::new().route("/jwks.json", get(answer))).await?)
        });
        site
    }

    fn publish(&self, text: impl Into<String>) {
        *self.text.lock().unwrap() = text.into();
    }

    /// A verifier that has the keys already, so that the first read does not count as one for an unknown key id.
    async fn verifier(&self, unknown_key: Duration, lifecycle: &Lifecycle) -> Verifier {
        let pace = Pace { usual: HOUR, after_failure: HOUR, unknown_key };
        let ring = KeyRing::open_at(pace, rules(KeySource::Url(self.url.clone())), lifecycle);
        wait_until("the keys are there", SOON, async || !ring.set.load().is_empty()).await;
        Verifier::Ring(ring)
    }

    fn fetches(&self) -> usize {
        self.fetches.load(Ordering::Relaxed)
    }
}

#[tokio::test]
async fn a_changed_file_is_believed_without_a_restart() {
    let (old, new) = (SigningKey::ec(), SigningKey::rsa());
    let path = std::env::temp_dir().join(unique("jwks"));
    fs::write(&path, jwks(&[&old])).unwrap();
    let lifecycle = Lifecycle::new();
    let pace = Pace { unknown_key: Duration::ZERO, ..Pace::FILE };
    let verifier = Verifier::Ring(KeyRing::open_at(pace, rules(KeySource::File(path.clone())), &lifecycle));
    assert!(verify(&verifier, &old).await.is_ok());

    fs::write(&path, "{ half a fi").unwrap();
    assert_eq!(verify(&verifier, &new).await, Err(AuthError::Token(TokenError::UnknownKey)));
    assert!(verify(&verifier, &old).await.is_ok(), "a file that can't be used took the keys away");

    fs::write(&path, jwks(&[&old, &new])).unwrap();
    wait_until("the new key is accepted", SOON, async || verify(&verifier, &new).await.is_ok()).await;
    assert!(verify(&verifier, &old).await.is_ok());

    // A mounted secret changes in this way: another file takes its name.
    fs::write(path.with_extension("new"), jwks(&[&new])).unwrap();
    fs::rename(path.with_extension("new"), &path).unwrap();
    wait_until("the old key is rejected", SOON, async || {
        verify(&verifier, &old).await == Err(AuthError::Token(TokenError::UnknownKey))
    })
    .await;
    assert!(verify(&verifier, &new).await.is_ok());
    fs::remove_file(&path).unwrap();
    lifecycle.stop();
}

#[tokio::test]
async fn an_unknown_key_is_looked_for_at_the_url_once_a_pause_whoever_asks() {
    let (first, second, made_up) = (SigningKey::ec(), SigningKey::ed(), SigningKey::ed());
    let lifecycle = Lifecycle::new();
    let site = Site::open(&[&first], &lifecycle).await;
    let verifier = site.verifier(HOUR, &lifecycle).await;
    assert!(verify(&verifier, &first).await.is_ok());

    site.publish(jwks(&[&first, &second]));
    let before = site.fetches();
    // All requests arrive before the answer does, and none is turned away.
    let all = join_all((0..20).map(|_| verify(&verifier, &second))).await;
    assert!(all.iter().all(Result::is_ok), "{all:?}");
    assert_eq!(site.fetches(), before + 1);
    for _ in 0..100 {
        assert_eq!(verify(&verifier, &made_up).await, Err(AuthError::Token(TokenError::UnknownKey)));
    }
    assert_eq!(site.fetches(), before + 1, "made-up key ids caused a fetch");
    lifecycle.stop();
}

#[tokio::test]
async fn the_known_keys_stay_when_the_url_fails_or_answers_nonsense() {
    let (old, new) = (SigningKey::ec(), SigningKey::ed());
    let lifecycle = Lifecycle::new();
    let site = Site::open(&[&old], &lifecycle).await;
    let verifier = site.verifier(Duration::ZERO, &lifecycle).await;
    assert!(verify(&verifier, &old).await.is_ok());

    let mut fetches = site.fetches();
    let mut still_believed = async |what: &str| {
        assert_eq!(verify(&verifier, &new).await, Err(AuthError::Token(TokenError::UnknownKey)), "{what}");
        assert!(site.fetches() > fetches, "{what}: the keys were not read");
        fetches = site.fetches();
        assert!(verify(&verifier, &old).await.is_ok(), "{what}");
    };
    site.down.store(true, Ordering::Relaxed);
    still_believed("a server error").await;
    site.down.store(false, Ordering::Relaxed);
    for (what, text) in [
        ("no JSON", "<html>".to_owned()),
        ("no keys", r#"{"keys":[]}"#.to_owned()),
        ("a secret for all to see", r#"{"keys":[{"kty":"oct","k":"c2VjcmV0","alg":"HS256","kid":"1"}]}"#.to_owned()),
        ("a megabyte", format!("{}{}", " ".repeat(1 << 20), jwks(&[&new]))),
    ] {
        site.publish(text);
        still_believed(what).await;
    }
    site.publish(jwks(&[&new]));
    assert!(verify(&verifier, &new).await.is_ok(), "the keys are no longer read");
    lifecycle.stop();
}

#[test]
fn of_a_set_those_keys_are_taken_that_are_for_verifying() {
    let (rsa, ec, ed) = (SigningKey::rsa(), SigningKey::ec(), SigningKey::ed());
    let with = |key: &SigningKey, member: &str, value: Value| {
        let mut jwk = key.published();
        jwk[member] = value;
        jwk
    };
    for key in [&rsa, &ec, &ed] {
        let (kid, algorithm, _) = usable(&key.published()).unwrap();
        assert_eq!((kid.as_deref(), Some(algorithm)), (Some(key.kid.as_str()), Some(algorithm)));
    }
    assert_eq!(usable(&rsa.published()).map(|(_, algorithm, _)| algorithm), Some(Algorithm::RS256));
    for (what, jwk) in [
        ("for encryption", with(&rsa, "use", "enc".into())),
        ("for signing alone", with(&ec, "key_ops", serde_json::json!(["sign"]))),
        ("for another algorithm", with(&rsa, "alg", "PS256".into())),
        ("for a symmetric algorithm", with(&rsa, "alg", "HS256".into())),
        ("of another curve", with(&ec, "crv", "P-384".into())),
        ("of a kind to come", serde_json::json!({ "kty": "AKP", "alg": "ML-DSA-65", "pub": "AA" })),
        ("symmetric", serde_json::json!({ "kty": "oct", "k": "c2VjcmV0" })),
    ] {
        assert!(usable(&jwk).is_none(), "a key {what} is accepted");
    }
}
