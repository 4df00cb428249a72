//! The reference of the settings, written from the code. Names, defaults and ranges come from the reader; meanings come
//! from the table here and from those of the services.
//!
//! `docs/reference/settings.md` and `.env.example` hold what [`markdown`] and [`env_file`] write. A test compares them.

use std::fmt::Write;

use crate::process::settings::{Asked, SettingsReader};

/// The longest line of a comment in an `.env` file.
const COMMENT_CHARS_MAX: usize = 118;

/// One setting, as the reference describes it.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    /// The environment variable, such as `PORT`.
    pub name: &'static str,
    meaning: &'static str,
    default: Option<&'static str>,
    see: Option<&'static str>,
    /// Whether `.env` may set it. The compose files set the others themselves.
    pub in_env_file: bool,
}

/// The settings under one heading.
#[derive(Debug, Clone, Copy)]
pub struct Section<'a> {
    /// The text of the heading, without marks.
    pub title: &'a str,
    /// The rows, in their order.
    pub settings: &'a [Setting],
}

/// A setting that `.env` may set, with the default that the code has.
#[must_use]
pub const fn setting(name: &'static str, meaning: &'static str) -> Setting {
    Setting { name, meaning, default: None, see: None, in_env_file: true }
}

impl Setting {
    /// Describes the default in words, instead of the value that the code has.
    #[must_use]
    pub const fn default_is(self, words: &'static str) -> Self {
        Self { default: Some(words), ..self }
    }

    /// Refers to a page below `docs/`.
    #[must_use]
    pub const fn see(self, page: &'static str) -> Self {
        Self { see: Some(page), ..self }
    }

    /// For a setting that the compose files set themselves, or that needs a mounted file.
    #[must_use]
    pub const fn not_in_env_file(self) -> Self {
        Self { in_env_file: false, ..self }
    }

    fn asked<'a>(&self, asked: &'a [Asked]) -> Option<&'a Asked> {
        asked.iter().find(|asked| asked.name == self.name)
    }

    /// The default as a user reads it; none if there is none.
    fn default<'a>(&self, asked: &'a [Asked]) -> Option<&'a str>
    where
        Self: 'a,
    {
        let of_the_code = || self.asked(asked)?.default.as_deref().filter(|text| !text.is_empty());
        self.default.or_else(of_the_code)
    }

    fn range(&self, asked: &[Asked]) -> String {
        let range = self.asked(asked).and_then(|asked| asked.range.as_ref());
        range.map(|(min, max)| format!("{min} to {max}")).unwrap_or_default()
    }
}

/// A reader in which the modes are on that read more settings.
#[must_use]
pub fn reader() -> SettingsReader {
    let set = [("AUTH_MODE", "jwt"), ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4318")];
    SettingsReader::new(move |name| set.iter().find(|(set, _)| *set == name).map(|(_, value)| (*value).to_owned()))
}

/// The sections as Markdown tables.
#[must_use]
pub fn markdown(sections: &[Section<'_>], asked: &[Asked]) -> String {
    let mut page = String::new();
    for Section { title, settings } in sections {
        let _ = write!(page, "## {title}\n\n| Setting | Default | Range | What it does |\n| --- | --- | --- | --- |\n");
        for setting in *settings {
            let default = match (setting.default, setting.default(asked)) {
                (Some(words), _) => words.to_owned(),
                (None, Some(value)) => format!("`{value}`"),
                (None, None) => "none".to_owned(),
            };
            let see = setting.see.map(|page| format!(". See [{}](../{page})", file_name(page))).unwrap_or_default();
            let Setting { name, meaning, .. } = setting;
            let _ = writeln!(page, "| `{name}` | {default} | {} | {meaning}{see} |", setting.range(asked));
        }
        page.push('\n');
    }
    page
}

fn file_name(page: &str) -> &str {
    let page = page.split('#').next().unwrap_or(page);
    page.rsplit('/').next().unwrap_or(page)
}

/// The sections as lines of an `.env` file. Each value is empty, so that the service's default counts.
#[must_use]
pub fn env_file(sections: &[Section<'_>], asked: &[Asked]) -> String {
    let mut page = String::new();
    for Section { title, settings } in sections {
        let _ = write!(page, "# --- {title} ---\n\n");
        for setting in settings.iter().filter(|setting| setting.in_env_file) {
            let mut text = setting.meaning.replace('`', "");
            let default = setting.default(asked).unwrap_or("none");
            let _ = write!(text, ". Default: {default}");
            let range = setting.range(asked);
            if !range.is_empty() {
                let _ = write!(text, "; {range}");
            }
            if let Some(page) = setting.see {
                let _ = write!(text, ". See docs/{}", page.split('#').next().unwrap_or(page));
            }
            comment(&mut page, &text);
            let _ = writeln!(page, "{}=", setting.name);
        }
        page.push('\n');
    }
    page
}

/// Writes the text as comment lines, broken between words.
fn comment(page: &mut String, text: &str) {
    let mut line = "#".to_owned();
    for word in text.split(' ') {
        if line.len() + 1 + word.len() > COMMENT_CHARS_MAX {
            let _ = writeln!(page, "{line}");
            "#".clone_into(&mut line);
        }
        line.push(' ');
        line.push_str(word);
    }
    let _ = writeln!(page, "{line}");
}

/// The settings that both services read in the same way.
pub const SHARED: Section<'static> = Section {
    title: "Both services",
    settings: &[
        setting("HOST", "Address to listen on").not_in_env_file(),
        setting(
            "TOKIO_WORKER_THREADS",
            "Threads of one process, 1 to 1024. On a dedicated machine, set it to the number of cores",
        )
        .default_is("half of the cores, rounded up"),
        setting("REQUESTS_IN_FLIGHT_MAX", "Requests that one process accepts at a time. Any more get `503 overloaded` at once"),
        setting(
            "REQUEST_TIMEOUT_SECONDS",
            "Longest time that a client waits for its answer. Then it gets `503 deadline_exceeded`",
        ),
        setting(
            "REQUEST_HEADER_TIMEOUT_SECONDS",
            "Time from the first to the last byte of a request's head. Then the connection is closed",
        ),
        setting("REQUEST_BODY_TIMEOUT_SECONDS", "Time for a body of up to 32 KiB. Then `408 request_timeout`"),
        setting(
            "KEEP_ALIVE_SECONDS",
            "How long a connection may be idle between two requests. Set it longer than your proxy's",
        ),
        setting("CONNECTIONS_MAX", "Client connections of one process. Each is an open file. Any more get a bare `503`"),
        setting("RATE_LIMIT_ENABLED", "`false` turns rate limits off, for load tests").see("operations/limits.md"),
        setting(
            "RATE_LIMIT_READ",
            "Seat maps, lists and other reads of one user: `20,100` is 20 a second, 100 at once. `0` means no limit",
        ),
        setting("RATE_LIMIT_HOLD", "New reservations of one user"),
        setting("RATE_LIMIT_CONFIRM", "Calls of one user on their own reservations and tickets"),
        setting("RATE_LIMIT_ADMIN", "Changes of the catalogue by one user"),
        setting("RATE_LIMIT_ADDRESS_FACTOR", "One address may call this many times as often as one user"),
        setting(
            "TRUSTED_PROXIES",
            "Addresses and networks of your own proxies, such as `10.0.0.0/8,2001:db8::/32`. The services trust what \
             these report about the client's address",
        ),
        setting(
            "TRUSTED_PROXY_HEADER",
            "The header with the client's address: this one, or `forwarded` (RFC 7239). The proxy must write it itself",
        ),
        setting(
            "REDIS_URL",
            "Redis: replicas share rate limits there, and the Booking Service keeps its seat locks there",
        )
        .not_in_env_file(),
        setting(
            "CORS_ALLOWED_ORIGINS",
            "Origins whose pages may call from a browser, such as `https://shop.example.com,https://m.example.com`",
        ),
        setting("RABBITMQ_URL", "The message broker").not_in_env_file(),
        setting("RABBITMQ_EXCHANGE", "The topic exchange. It must be the same for both services"),
        setting(
            "RABBITMQ_QUEUE",
            "The queue that all Event Service replicas share. Dead letters go to `<name>.dead`; the Booking Service's \
             audit reads it",
        ),
        setting("LOG_LEVEL", "A level, or a filter such as `info,service_kit::layers=debug`"),
        setting("LOG_FORMAT", "`json` or `pretty`"),
        setting(
            "AUTH_MODE",
            "`header`: `X-User-ID` names the user, for trials only. `jwt`: an access token does",
        )
        .see("reference/access.md"),
        setting("JWT_ISSUER", "Required with `jwt`: the value of a token's `iss`"),
        setting("JWT_AUDIENCE", "Required with `jwt`: the value of a token's `aud`"),
        setting(
            "JWT_SECRET",
            "With `jwt`, set exactly one of the three key sources. This one is a secret shared with the issuer, 32 \
             bytes or more (HS256)",
        ),
        setting(
            "JWT_JWKS_FILE",
            "Key source: a file with the issuer's public keys (RS256, ES256, EdDSA). The service reads it again when \
             it changes. In a container, mount it",
        ),
        setting(
            "JWT_JWKS_URL",
            "Key source: the same over HTTP. The service fetches it every five minutes, and for an unknown key at most \
             once a minute",
        ),
        setting("JWT_LEEWAY_SECONDS", "How far the issuer's clock may differ from ours"),
        setting(
            "INTERNAL_API_KEY",
            "The key by which the services know each other, the same for all. Without it `/api/internal` is open",
        ),
        setting("INTERNAL_API_KEY_PREVIOUS", "A second key that is accepted too, while you change the key"),
        setting(
            "ENVIRONMENT",
            "With `production`, a service refuses to start with anything that is for trials only, and reports all of it",
        )
        .see("operations/deploy.md#production"),
        setting(
            "TLS_CERTIFICATE",
            "PEM, the certificate with its intermediates: the service speaks HTTPS instead of HTTP. As \
             `TLS_CERTIFICATE_FILE`, it is loaded again when it changes",
        )
        .see("operations/tls.md")
        .not_in_env_file(),
        setting(
            "TLS_PRIVATE_KEY",
            "PEM, the key of that certificate. As `TLS_PRIVATE_KEY_FILE`, it is loaded again when it changes",
        )
        .not_in_env_file(),
        setting(
            "TLS_CA_FILE",
            "PEM file of your own certificate authorities, trusted beside the public ones on the links to PostgreSQL, \
             Redis, RabbitMQ and the Event Service",
        )
        .not_in_env_file(),
        setting(
            "TLS_TERMINATED_BY_PROXY",
            "`true` lets `ENVIRONMENT=production` run without a certificate, where only a TLS proxy reaches the process",
        ),
        setting(
            "OTEL_EXPORTER_OTLP_ENDPOINT",
            "Where traces go, by OTLP over HTTP, such as `http://jaeger:4318`. Without it no spans are made. `./start.sh \
             --observe` sets it to its own Jaeger",
        ),
        setting("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "The same with its whole path. It wins over the endpoint above")
            .not_in_env_file(),
        setting("OTEL_EXPORTER_OTLP_HEADERS", "`name=value` pairs, separated by commas"),
        setting("OTEL_EXPORTER_OTLP_COMPRESSION", "`gzip` or `none`"),
        setting("OTEL_EXPORTER_OTLP_PROTOCOL", "The only protocol supported; any other is a fault").not_in_env_file(),
        setting(
            "OTEL_TRACES_SAMPLER",
            "Which requests are traced. `parentbased_traceidratio` traces a share of them",
        ),
        setting("OTEL_TRACES_SAMPLER_ARG", "The share: `0.01` traces one request in a hundred"),
        setting("OTEL_SERVICE_NAME", "Its name in traces").default_is("the process's name").not_in_env_file(),
        setting("OTEL_SDK_DISABLED", "`true` turns traces off").not_in_env_file(),
    ],
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_has_the_default_and_the_range_of_the_code() {
        let mut reader = reader();
        reader.within("SEATS_MAX", 10, 1, 100);
        reader.optional("KEY");
        let settings = [
            setting("SEATS_MAX", "Seats of one reservation").see("operations/limits.md#seats"),
            setting("KEY", "A key with `dots`").not_in_env_file(),
            setting("THREADS", "Threads").default_is("half"),
        ];
        let sections = [Section { title: "Here", settings: &settings }];
        assert_eq!(
            markdown(&sections, reader.asked()),
            "## Here\n\n| Setting | Default | Range | What it does |\n| --- | --- | --- | --- |\n\
             | `SEATS_MAX` | `10` | 1 to 100 | Seats of one reservation. See [limits.md](../operations/limits.md#seats) |\n\
             | `KEY` | none |  | A key with `dots` |\n| `THREADS` | half |  | Threads |\n\n"
        );
        assert_eq!(
            env_file(&sections, reader.asked()),
            "# --- Here ---\n\n# Seats of one reservation. Default: 10; 1 to 100. See docs/operations/limits.md\n\
             SEATS_MAX=\n# Threads. Default: half\nTHREADS=\n\n"
        );
    }

    #[test]
    fn a_long_comment_is_broken_between_words() {
        let mut page = String::new();
        comment(&mut page, &["word"; 50].join(" "));
        assert!(page.lines().count() > 1, "{page}");
        assert!(page.lines().all(|line| line.starts_with("# ") && line.len() <= COMMENT_CHARS_MAX), "{page}");
    }
}
