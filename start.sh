#!/usr/bin/env bash
# Starts the whole ticketing system. See ./start.sh --help.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/common.sh
source scripts/common.sh
# shellcheck source=scripts/packages.sh
source scripts/packages.sh
# shellcheck source=scripts/daemons.sh
source scripts/daemons.sh
# shellcheck source=scripts/native-servers.sh
source scripts/native-servers.sh
# shellcheck source=scripts/native-mode.sh
source scripts/native-mode.sh
# shellcheck source=scripts/docker-mode.sh
source scripts/docker-mode.sh
# shellcheck source=scripts/http.sh
source scripts/http.sh
# shellcheck source=scripts/demo.sh
source scripts/demo.sh

usage() {
    cat <<'HELP'
Usage: ./start.sh [--docker | --native] [--demo] [--observe]

Starts PostgreSQL (two servers), Redis, RabbitMQ, the Event Service, the Booking Service and
the booking worker, and builds before that what is missing. Safe to repeat: what runs is left
alone, what has died is started again, and a new build or another setting restarts the part
that it concerns.

  --docker   in containers, by docker-compose.yml
  --native   as processes of this machine; installs what is missing
             Without either: native where it runs natively already, else Docker where an engine
             with Compose answers, else native.
  --demo     adds a hall with 2,000 seats, two sessions and three price tiers, and prints a
             line that books a seat
  --observe  also starts Prometheus with its alerts, Grafana with the dashboard of the sale, and
             Jaeger for traces; natively Prometheus alone, the others need Docker
  --help     this text

Ports, each moved by a variable:
  EVENT_SERVICE_PORT=8000         BOOKING_SERVICE_PORT=8001     BOOKING_WORKER_PORT=8002
  EVENT_DB_PORT=5433              BOOKING_DB_PORT=5434          REDIS_PORT=6379
  RABBITMQ_PORT=5672              RABBITMQ_MANAGEMENT_PORT=15672
  PROMETHEUS_PORT=9090            GRAFANA_PORT=3000             JAEGER_PORT=16686

In Docker mode they may also stand in the file .env, like all that .env.example lists.

Other variables:
  TICKETING_STATE_DIR=.local      native mode: data, logs and pid files; a second system beside
                                  the first needs another folder and other ports
  TICKETING_BUILD_PROFILE=release release, or dev (builds faster, runs slower)
  TICKETING_TOKEN                 with --demo and AUTH_MODE=jwt: an organizer's access token; not
                                  needed where JWT_SECRET is set
  INTERNAL_PORT                   a listener of its own for the internal API
  Settings of the services (RESERVATION_TIMEOUT_MINUTES, LOG_LEVEL and so on) are handed on.
HELP
}

# Sets mode, and says why.
choose_mode() {
    if native_runs; then
        mode=native
        step 'Native mode, because the system runs natively already (--docker: in containers)'
    elif engine_answers && find_compose; then
        mode=docker
        step 'Docker mode, because a Docker engine answers (--native: without containers)'
    else
        mode=native
        step "Native mode, because ${ENGINE_PROBLEM:-Compose is not installed}"
    fi
}

name_failures
mode=''
demo=no
observe=no
scheme=http
for argument in "$@"; do
    case $argument in
        --native) mode=native ;;
        --docker) mode=docker ;;
        --demo) demo=yes ;;
        --observe) observe=yes ;;
        --help | -h)
            usage
            exit 0
            ;;
        *)
            usage >&2
            exit 2
            ;;
    esac
done

use_state_dir "${TICKETING_STATE_DIR:-.local}"
[[ -n $mode ]] || choose_mode
case $mode in
    native)
        native_start "$observe"
        native_addresses
        scheme=$(service_scheme)
        ;;
    docker)
        docker_start "$demo" "$observe"
        docker_addresses
        ;;
esac

if [[ $demo == yes ]]; then
    case $mode in
        native) make_tokens_by "$(printf %q "$DATA_DIR/bin/booking-service")" ;;
        docker) make_tokens_by 'docker exec booking-service booking-service' ;;
    esac
    create_demo "$scheme://localhost:$EVENT_SERVICE_PORT" "$scheme://localhost:$BOOKING_SERVICE_PORT"
else
    step 'What next'
    say './start.sh --demo          adds data to try things with'
    say './test_integration.sh      checks the whole flow'
    say './stop.sh                  ends everything'
fi
