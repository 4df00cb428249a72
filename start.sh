#!/usr/bin/env bash
# Starts the whole ticketing system. See ./start.sh --help.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/libraries.sh
source scripts/libraries.sh
# shellcheck source=scripts/http.sh
source scripts/http.sh
# shellcheck source=scripts/demo.sh
source scripts/demo.sh

usage() {
    cat <<'HELP'
Usage: ./start.sh [--docker | --native] [--demo] [--observe]

Starts PostgreSQL (two servers), Redis, RabbitMQ, the Event Service, the Booking Service and
the booking worker. Builds the programs first if they are missing or old. It is safe to repeat:
parts that run stay as they are, a part that died starts again, and a new build or a changed
setting restarts the parts that use it.

  --docker   runs everything in containers, with docker-compose.yml
  --native   runs everything as processes of this machine; installs missing packages
             Without --docker and --native: native if the system runs natively already; else
             Docker if a Docker engine answers and Compose is installed; else native.
  --demo     adds a hall with 2,000 seats, two sessions and three price tiers, and prints a
             line that books a seat
  --observe  also starts Prometheus with its alerts, Grafana with the dashboard of the sale, and
             Jaeger for traces. Native mode starts only Prometheus; the others need Docker
  --help     prints this text

Ports, each with the variable that changes it:
  EVENT_SERVICE_PORT=8000         BOOKING_SERVICE_PORT=8001     BOOKING_WORKER_PORT=8002
  EVENT_DB_PORT=5433              BOOKING_DB_PORT=5434          REDIS_PORT=6379
  RABBITMQ_PORT=5672              RABBITMQ_MANAGEMENT_PORT=15672
  PROMETHEUS_PORT=9090            GRAFANA_PORT=3000             JAEGER_PORT=16686

In Docker mode the file .env may set them too, like every other variable in .env.example.

Other variables:
  TICKETING_STATE_DIR=.local      native mode: the folder of data, logs and pid files. A second
                                  system on this machine needs its own folder and ports
  TICKETING_BUILD_PROFILE=start   native mode: how to build the programs.
                                  start: builds quickly. release: fat LTO, less CPU time a request,
                                  for load tests; Docker mode uses it by default.
                                  dev: with debug data and checks, slower than start
  TICKETING_TOKEN                 with --demo and AUTH_MODE=jwt: an organizer's access token. Not
                                  needed if JWT_SECRET is set
  INTERNAL_PORT                   a separate listener for the internal API
  The services also read their own settings (RESERVATION_TIMEOUT_MINUTES, LOG_LEVEL, ...).
HELP
}

# Sets mode and prints the reason.
choose_mode() {
    if native_runs; then
        mode=native
        step 'Native mode, because the system runs natively already (--docker uses containers)'
    elif engine_answers && find_compose; then
        mode=docker
        step 'Docker mode, because a Docker engine answers (--native uses no containers)'
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
        --demo) demo=yes ;;
        --observe) observe=yes ;;
        *) read_common_option "$argument" ;;
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
    step 'Next steps'
    say './start.sh --demo          adds data to experiment with'
    say './test_integration.sh      checks the whole flow'
    say './stop.sh                  stops everything'
fi
