# Builds both services at once: `docker build --target event-service .`, `docker build --target booking-service .`
# (the worker is the booking-service image with another command). Works with BuildKit and with the classic builder.

# --- the build ----------------------------------------------------------------------------
FROM rust:1-bookworm AS build

# release for production. start and dev build faster and run slower; they are for tests and CI.
ARG CARGO_PROFILE=release
# Incremental data helps only a second build in the same folder, and there is none here.
ENV CARGO_INCREMENTAL=0
WORKDIR /build

# Builds the dependencies, from the manifests and empty crates. Docker repeats this slow layer only after a change of a
# manifest or of the lock file.
COPY Cargo.toml Cargo.lock ./
COPY shared-contracts/Cargo.toml shared-contracts/
COPY service-kit/Cargo.toml service-kit/
COPY event-service/Cargo.toml event-service/
COPY booking-service/Cargo.toml booking-service/
# Not built here, but Cargo requires every member of the workspace.
COPY load-test/Cargo.toml load-test/
RUN for crate in shared-contracts service-kit event-service booking-service load-test; do \
        mkdir "$crate/src" && : >"$crate/src/lib.rs" || exit; \
    done \
 && for crate in event-service booking-service; do echo 'fn main() {}' >"$crate/src/main.rs" || exit; done \
 && cargo build --locked --profile "$CARGO_PROFILE" --bin event-service --bin booking-service \
# Removes the builds of the empty crates: they can be newer than our files, and Cargo would not build those.
 && cargo clean --profile "$CARGO_PROFILE" -p shared-contracts -p service-kit -p event-service -p booking-service

# Tells sqlx to check statements by the files in the repository.
COPY .cargo .cargo
COPY shared-contracts shared-contracts
COPY service-kit service-kit
COPY event-service event-service
COPY booking-service booking-service
# Cargo's folder for the profile dev is called debug. The images have no use for debug data, so strip removes it.
RUN cargo build --locked --profile "$CARGO_PROFILE" --bin event-service --bin booking-service \
 && case $CARGO_PROFILE in dev) folder=debug ;; *) folder=$CARGO_PROFILE ;; esac \
 && mkdir /programs && cp "target/$folder/event-service" "target/$folder/booking-service" /programs/ \
 && strip --strip-debug /programs/*

# --- the base of both images ----------------------------------------------------------------
FROM debian:bookworm-slim AS runtime

# curl is for debugging the network from inside a container; the services do not need it. The user has no rights, home or
# shell, and an id that usual hosts do not use.
RUN apt-get update \
 && apt-get install -y --no-install-recommends curl \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log \
 && groupadd --gid 10001 ticketing \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin ticketing

# By number, so that an orchestrator can check that it is not root.
USER 10001:10001
# The services write no files: the root file system may be read-only.
WORKDIR /
# The services finish their requests and end within 20 seconds.
STOPSIGNAL SIGTERM
LABEL org.opencontainers.image.licenses="MIT OR Apache-2.0" \
      org.opencontainers.image.base.name="docker.io/library/debian:bookworm-slim"

# --- the images ---------------------------------------------------------------------------
FROM runtime AS event-service

COPY --from=build /programs/event-service /usr/local/bin/
ENTRYPOINT ["event-service"]
CMD ["serve"]
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["event-service", "healthcheck"]

# At the end, because a new revision repeats every step after this line.
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="event-service" \
      org.opencontainers.image.description="Catalogue, seat maps, and the authority on who has a seat" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"

FROM runtime AS booking-service

COPY --from=build /programs/booking-service /usr/local/bin/
ENTRYPOINT ["booking-service"]
CMD ["serve"]
EXPOSE 8001 8002
# The worker listens on 8002. Set PORT=8002 for it, so that its health check uses that port.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["booking-service", "healthcheck"]

ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="booking-service" \
      org.opencontainers.image.description="Price tiers, reservations, payment and tickets, and their worker" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"
