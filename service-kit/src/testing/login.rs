//! A token issuer for tests: keys of every kind, good and forged tokens, and a check of which callers each operation
//! lets in.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;

use aws_lc_rs::encoding::AsDer;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;
use jsonwebtoken::jwk::Jwk;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use reqwest::{Client, Method, Response};
use serde_json::{Value, json};
use utoipa::openapi::OpenApi;
use uuid::Uuid;

use super::{operations_of, unique};
use crate::auth::{AuthMode, AuthSettings, InternalKeys, JwtSettings, KeySource};
use crate::http::tls::Trust;

/// The issuer that the tokens of the tests name.
pub const ISSUER: &str = "https://login.example.com";
/// The audience that the tokens of the tests name.
pub const AUDIENCE: &str = "ticketing";
/// The key that the services of the tests send each other in `X-Internal-API-Key`.
pub const INTERNAL_KEY: &str = "internal key of the tests, long enough";

/// A private key that signs tokens.
pub struct SigningKey {
    /// The key id under which the public half is published.
    pub kid: String,
    algorithm: Algorithm,
    key: EncodingKey,
}

impl SigningKey {
    /// A key that signs with RS256.
    #[must_use]
    pub fn rsa() -> Self {
        let pair = rsa::KeyPair::generate(rsa::KeySize::Rsa2048).expect("an RSA key");
        let pkcs8 = pair.as_der().expect("DER");
        // Skips the PKCS #8 header, which has one length for all keys of this size.
        Self::new(Algorithm::RS256, EncodingKey::from_rsa_der(&pkcs8.as_ref()[26..]))
    }

    /// A key that signs with ES256.
    #[must_use]
    pub fn ec() -> Self {
        let pkcs8 =
            EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &SystemRandom::new()).expect("an EC key");
        Self::new(Algorithm::ES256, EncodingKey::from_ec_der(pkcs8.as_ref()))
    }

    /// A key that signs with EdDSA.
    #[must_use]
    pub fn ed() -> Self {
        let pkcs8 = Ed25519KeyPair::generate_pkcs8v1(&SystemRandom::new()).expect("an Ed25519 key");
        Self::new(Algorithm::EdDSA, EncodingKey::from_ed_der(pkcs8.as_ref()))
    }

    fn new(algorithm: Algorithm, key: EncodingKey) -> Self {
        Self { kid: unique("key"), algorithm, key }
    }

    /// Signs a token with these claims.
    #[must_use]
    pub fn sign(&self, claims: &Value) -> String {
        let header = Header { kid: Some(self.kid.clone()), ..Header::new(self.algorithm) };
        jsonwebtoken::encode(&header, claims, &self.key).expect("a token")
    }

    /// The public half, as a JWK.
    #[must_use]
    pub fn published(&self) -> Value {
        let mut jwk = Jwk::from_encoding_key(&self.key, self.algorithm).expect("a JWK");
        jwk.common.key_id = Some(self.kid.clone());
        serde_json::to_value(jwk).expect("JSON")
    }

    /// The bytes of the public key. An attacker signs HS256 with them, and hopes that a service takes them for a
    /// secret.
    fn public_bytes(&self) -> Vec<u8> {
        let jwk = self.published();
        let part = |name: &str| BASE64.decode(jwk[name].as_str().unwrap_or_default()).expect("base64");
        match self.algorithm {
            Algorithm::RS256 => part("n"),
            _ => [vec![4], part("x"), part("y")].concat(),
        }
    }
}

/// A JWK set of these keys.
#[must_use]
pub fn jwks(keys: &[&SigningKey]) -> String {
    json!({ "keys": keys.iter().map(|key| key.published()).collect::<Vec<_>>() }).to_string()
}

/// Settings that accept tokens signed by these keys.
#[must_use]
pub fn believing(keys: KeySource) -> AuthSettings {
    let leeway = std::time::Duration::from_secs(5);
    let jwt =
        JwtSettings { keys, issuer: ISSUER.to_owned(), audience: AUDIENCE.to_owned(), leeway, trust: Trust::default() };
    AuthSettings { mode: AuthMode::Jwt(jwt), internal_keys: InternalKeys::new(INTERNAL_KEY, None) }
}

/// Claims of a token that is valid for an hour.
#[must_use]
pub fn claims(user: Uuid, roles: &[&str]) -> Value {
    let now = jsonwebtoken::get_current_timestamp();
    json!({ "iss": ISSUER, "aud": AUDIENCE, "sub": user, "roles": roles, "exp": now + 3600, "nbf": now })
}

/// The headers that a caller adds to its request: name and value.
pub type Headers = Vec<(&'static str, String)>;

/// A token issuer with a key of each kind, published in a file.
pub struct Login {
    rsa: SigningKey,
    ec: SigningKey,
    ed: SigningKey,
    /// The file of the JWK set; dropping the issuer removes it.
    pub path: PathBuf,
}

impl Default for Login {
    fn default() -> Self {
        Self::new()
    }
}

impl Login {
    /// Creates an issuer with new keys, and publishes them in a file.
    #[must_use]
    pub fn new() -> Self {
        let login = Self {
            rsa: SigningKey::rsa(),
            ec: SigningKey::ec(),
            ed: SigningKey::ed(),
            path: std::env::temp_dir().join(unique("jwks")),
        };
        fs::write(&login.path, jwks(&[&login.rsa, &login.ec, &login.ed])).expect("the file can be written");
        login
    }

    /// The settings of services that trust this issuer.
    #[must_use]
    pub fn settings(&self) -> AuthSettings {
        believing(KeySource::File(self.path.clone()))
    }

    /// Signs a token; the user's id decides which of the keys does so.
    #[must_use]
    pub fn token(&self, user: Uuid, roles: &[&str]) -> String {
        let keys = [&self.rsa, &self.ec, &self.ed];
        keys[user.as_bytes()[15] as usize % keys.len()].sign(&claims(user, roles))
    }

    /// The callers of the tests: a name for reports, what kind of caller it is, and the headers that it sends.
    #[must_use]
    pub fn callers(&self) -> Vec<(&'static str, Kind, Headers)> {
        let user = Uuid::now_v7();
        let bearer = |token: String| vec![("authorization", format!("Bearer {token}"))];
        let changed = |key: &SigningKey, change: Value| {
            let mut claims = claims(user, &["customer", "organizer", "admin"]);
            for (name, value) in change.as_object().into_iter().flatten() {
                claims[name] = value.clone();
            }
            bearer(key.sign(&claims))
        };
        let without = |name: &str| {
            let mut claims = claims(user, &["admin"]);
            claims.as_object_mut().expect("claims").remove(name);
            bearer(self.ec.sign(&claims))
        };
        let good = claims(user, &["admin"]);
        let unsigned = |algorithm: &str| {
            let header = json!({ "alg": algorithm, "typ": "JWT", "kid": self.rsa.kid });
            bearer(format!("{}.{}.", BASE64.encode(header.to_string()), BASE64.encode(good.to_string())))
        };
        let confused = |key: &SigningKey| {
            let header = Header { kid: Some(key.kid.clone()), ..Header::new(Algorithm::HS256) };
            let secret = EncodingKey::from_secret(&key.public_bytes());
            bearer(jsonwebtoken::encode(&header, &good, &secret).expect("a token"))
        };
        let other_key = SigningKey { kid: self.ec.kid.clone(), ..SigningKey::ec() };
        let now = jsonwebtoken::get_current_timestamp();
        let stranger = Kind::Stranger;
        vec![
            ("no token", stranger, Vec::new()),
            ("a user id in X-User-ID", stranger, vec![("x-user-id", user.to_string())]),
            ("another scheme", stranger, vec![("authorization", "Basic YWRtaW46YWRtaW4=".to_owned())]),
            ("no JWT", stranger, bearer("admin".to_owned())),
            ("two tokens", stranger, [bearer(self.ec.sign(&good)), bearer(self.ed.sign(&good))].concat()),
            ("expired", stranger, changed(&self.rsa, json!({ "exp": now - 60 }))),
            ("not yet", stranger, changed(&self.ed, json!({ "nbf": now + 60 }))),
            ("an exp that is no time", stranger, changed(&self.ec, json!({ "exp": "never" }))),
            ("another audience", stranger, changed(&self.ec, json!({ "aud": "billing" }))),
            ("another issuer", stranger, changed(&self.ec, json!({ "iss": "https://login.example.org" }))),
            ("no exp", stranger, without("exp")),
            ("no aud", stranger, without("aud")),
            ("no iss", stranger, without("iss")),
            ("no sub", stranger, without("sub")),
            ("a sub that is no user id", stranger, changed(&self.ec, json!({ "sub": "admin" }))),
            ("the sub of nobody", stranger, changed(&self.ec, json!({ "sub": Uuid::nil() }))),
            ("roles that are no list", stranger, changed(&self.ec, json!({ "roles": "admin" }))),
            ("alg none", stranger, unsigned("none")),
            ("alg None", stranger, unsigned("None")),
            ("another key", stranger, bearer(other_key.sign(&good))),
            ("a key that is not published", stranger, bearer(SigningKey::ed().sign(&good))),
            ("HS256 by the RSA public key", stranger, confused(&self.rsa)),
            ("HS256 by the EC public key", stranger, confused(&self.ec)),
            ("a customer", Kind::Customer, bearer(self.rsa.sign(&claims(user, &["customer"])))),
            ("another customer", Kind::Customer, bearer(self.ed.sign(&claims(Uuid::now_v7(), &["customer"])))),
            ("someone without roles", Kind::Customer, changed(&self.ec, json!({ "roles": null }))),
            ("someone with roles elsewhere", Kind::Customer, changed(&self.ec, json!({ "roles": ["ADMIN", "root"] }))),
            ("an organizer", Kind::Organizer, bearer(self.ec.sign(&claims(user, &["organizer"])))),
            ("an admin", Kind::Admin, bearer(self.rsa.sign(&claims(user, &["admin"])))),
            ("an internal key", Kind::Service, vec![("x-internal-api-key", INTERNAL_KEY.to_owned())]),
            ("another internal key", stranger, vec![("x-internal-api-key", format!("{INTERNAL_KEY}."))]),
        ]
    }
}

impl Drop for Login {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// The kind of a caller, which decides what it may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A caller without a valid proof of identity.
    Stranger,
    /// A caller without a special role.
    Customer,
    /// A user with the role `organizer`.
    Organizer,
    /// A user with the role `admin`.
    Admin,
    /// Another service of ours.
    Service,
}

/// The proof that an operation requires of its caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// The operation needs no proof of identity.
    Nothing,
    /// A known user, with any role.
    User,
    /// The role `organizer` or `admin`.
    Organizer,
    /// The role `admin`.
    Admin,
    /// The internal key of our services.
    Service,
    /// A signature over the request, which none of the callers has.
    Signature,
}

impl Need {
    /// The status of the refusal, or `None` if this caller is let in.
    fn refuses(self, caller: Kind) -> Option<u16> {
        let role_enough = match self {
            Self::Nothing => return None,
            Self::Service => return (caller != Kind::Service).then_some(401),
            Self::Signature => return Some(401),
            Self::User => true,
            Self::Organizer => matches!(caller, Kind::Organizer | Kind::Admin),
            Self::Admin => caller == Kind::Admin,
        };
        match caller {
            Kind::Stranger | Kind::Service => Some(401),
            _ => (!role_enough).then_some(403),
        }
    }

    /// The `security` that the OpenAPI document must state: alternatives, each a scheme and its roles.
    fn described(self) -> Value {
        match self {
            Self::Nothing | Self::Signature => Value::Null,
            Self::User => json!([{ "user_id": [] }, { "bearer": [] }]),
            Self::Organizer => json!([{}, { "bearer": ["organizer", "admin"] }]),
            Self::Admin => json!([{}, { "bearer": ["admin"] }]),
            Self::Service => json!([{}, { "internal_key": [] }]),
        }
    }
}

/// Calls every operation of the document as every kind of caller. `needs` must name exactly the operations of the
/// document, so that a new one can't be forgotten. Paths have ids of nothing and bodies are empty, so a call that is
/// let in changes nothing.
pub async fn assert_only_those_who_may_are_let_in(
    base: &str,
    document: &OpenApi,
    login: &Login,
    needs: &[(&str, Need)],
) {
    let needs: BTreeMap<&str, Need> = needs.iter().copied().collect();
    let operations = operations_of(document);
    let named: BTreeSet<String> = needs.keys().map(|name| (*name).to_owned()).collect();
    assert_eq!(
        operations.keys().cloned().collect::<BTreeSet<_>>(),
        named,
        "operations (left) and table (right) differ"
    );

    let http = Client::builder().build().expect("a client");
    let mut faults = Vec::new();
    for (operation, described) in &operations {
        let need = needs[operation.as_str()];
        if described["security"] != need.described() {
            faults.push(format!("{operation} needs {need:?} and is described with {}", described["security"]));
        }
        let (method, path) = operation.split_once(' ').expect("method and path");
        for (name, kind, headers) in login.callers() {
            let path: Vec<String> = path
                .split('/')
                .map(|part| if part.starts_with('{') { Uuid::now_v7().to_string() } else { part.to_owned() })
                .collect();
            let method: Method = method.parse().expect("a method");
            let mut request = http.request(method.clone(), format!("{base}{}", path.join("/")));
            for (header, value) in headers {
                request = request.header(header, value);
            }
            if matches!(method, Method::POST | Method::PATCH | Method::PUT) {
                request = request.json(&json!({}));
            }
            let response = request.send().await.expect("an answer");
            if let Some(fault) = fault_of(response, need, need.refuses(kind)).await {
                faults.push(format!("{operation} as {name}: {fault}"));
            }
        }
    }
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults.join("\n"));
}

async fn fault_of(response: Response, need: Need, expected: Option<u16>) -> Option<String> {
    let status = response.status().as_u16();
    let challenge = response.headers().get("www-authenticate").and_then(|value| value.to_str().ok());
    let challenge = challenge.unwrap_or_default().to_owned();
    let right = match (expected, need) {
        (None, _) => !matches!(status, 401 | 403 | 500..),
        (Some(_), Need::Signature) => status == 401,
        (Some(401), Need::Service) => status == 401 && challenge.starts_with("ApiKey"),
        (Some(401), _) => status == 401 && challenge.starts_with("Bearer"),
        (Some(expected), _) => status == expected && challenge.contains("error=\"insufficient_scope\""),
    };
    let body = response.text().await.unwrap_or_default();
    let code = if expected == Some(403) { "\"forbidden\"" } else { "\"unauthenticated\"" };
    let named = expected.is_none() || body.contains(code);
    (!right || !named).then(|| format!("expected {expected:?}, got {status} with {challenge:?}: {body:.200}"))
}
