# Both services from one build: `docker build --target event-service .`, `docker build --target booking-service .`
# (the worker is the booking-service image with another command). Works with BuildKit and with the builder before it.

# --- the build ----------------------------------------------------------------------------
FROM rust:1-bookworm AS build

# release, or dev: builds faster, runs slower. For trials and CI.
ARG CARGO_PROFILE=release
# Incremental data is of use to a second build in the same folder, and here is none.
ENV CARGO_INCREMENTAL=0
WORKDIR /build

# The dependencies, from the manifests and empty crates: this layer, the slow one, is made again only when a manifest
# or the lock file changes.
COPY Cargo.toml Cargo.lock ./
COPY shared-contracts/Cargo.toml shared-contracts/
COPY service-kit/Cargo.toml service-kit/
COPY event-service/Cargo.toml event-service/
COPY booking-service/Cargo.toml booking-service/
# Not built here, but Cargo wants every member of the workspace to be there.
COPY load-test/Cargo.toml load-test/
RUN for crate in shared-contracts service-kit event-service booking-service load-test; do mkdir "$crate/src" && : >"$crate/src/lib.rs" || exit; done \
 && for crate in event-service booking-service; do echo 'fn main() {}' >"$crate/src/main.rs" || exit; done \
 && cargo build --locked --profile "$CARGO_PROFILE" --bin event-service --bin booking-service \
# What was built of the empty crates can be younger than our files, and Cargo would take it for up to date.
 && cargo clean --profile "$CARGO_PROFILE" -p shared-contracts -p service-kit -p event-service -p booking-service

COPY shared-contracts shared-contracts
COPY service-kit service-kit
COPY event-service event-service
COPY booking-service booking-service
# Cargo's folder for the profile dev is called debug. Its binaries are mostly debug data, which nobody looks at here.
RUN cargo build --locked --profile "$CARGO_PROFILE" --bin event-service --bin booking-service \
 && case $CARGO_PROFILE in dev) folder=debug ;; *) folder=$CARGO_PROFILE ;; esac \
 && mkdir /programs && cp "target/$folder/event-service" "target/$folder/booking-service" /programs/ \
 && strip --strip-debug /programs/*

# --- what both images have in common --------------------------------------------------------
FROM debian:bookworm-slim AS runtime

# curl is for people who look into the network from inside a container; the services do not need it. Then a user without
# rights, home or shell, with a number that no user of a usual host has.
RUN apt-get update \
 && apt-get install -y --no-install-recommends curl \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log \
 && groupadd --gid 10001 ticketing \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin ticketing

# By number, so that an orchestrator can see that it is not root.
USER 10001:10001
# Written nowhere: the root file system may be read-only.
WORKDIR /
# The services finish what they have begun, and are done within 20 seconds.
STOPSIGNAL SIGTERM

# --- the images ---------------------------------------------------------------------------
FROM runtime AS event-service

COPY --from=build /programs/event-service /usr/local/bin/
ENTRYPOINT ["event-service"]
CMD ["serve"]
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["event-service", "healthcheck"]

# Last, because a new revision alone makes everything after this line again.
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="event-service" \
      org.opencontainers.image.description="Catalogue, seat maps and the one authority on who has a seat" \
      org.opencontainers.image.licenses="MIT OR Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.base.name="docker.io/library/debian:bookworm-slim"

FROM runtime AS booking-service

COPY --from=build /programs/booking-service /usr/local/bin/
ENTRYPOINT ["booking-service"]
CMD ["serve"]
EXPOSE 8001 8002
# The worker listens on 8002: it needs PORT=8002 for its health check to ask there.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["booking-service", "healthcheck"]

ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="booking-service" \
      org.opencontainers.image.description="Price tiers, reservations, payment and tickets, and their worker" \
      org.opencontainers.image.licenses="MIT OR Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.base.name="docker.io/library/debian:bookworm-slim"
