#!/usr/bin/env bash
# Stops what start.sh has started, and nothing else. See ./stop.sh --help.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/common.sh
source scripts/common.sh
# shellcheck source=scripts/daemons.sh
source scripts/daemons.sh
# shellcheck source=scripts/native-servers.sh
source scripts/native-servers.sh
# shellcheck source=scripts/native-mode.sh
source scripts/native-mode.sh
# shellcheck source=scripts/packages.sh
source scripts/packages.sh
# shellcheck source=scripts/docker-mode.sh
source scripts/docker-mode.sh

usage() {
    cat <<'HELP'
Usage: ./stop.sh [--docker | --native] [--keep | --clean]

Stops the services, then RabbitMQ, Redis and PostgreSQL.

  --keep     keeps all data
  --clean    deletes all data and logs; in Docker mode containers, volumes and network
  --docker   the system in containers
  --native   the system that runs as processes of this machine
  --help     this text

Without --keep or --clean it asks; where nobody can answer (no terminal) it keeps the data.
Without --docker or --native it stops what runs, the native one first.
TICKETING_STATE_DIR names the native system to stop, as for ./start.sh (.local).
HELP
}

# Sets choice to keep, clean or cancel.
ask() {
    local answer
    cat <<'MENU'
What shall happen to the data?
  1) keep it
  2) delete everything
  3) cancel, and leave the system running
MENU
    while true; do
        # The end of the input (Ctrl-D) is nobody's wish to delete or to stop.
        read -r -p 'Choice [1-3]: ' answer || answer=3
        case $answer in
            1) choice=keep ;;
            2) choice=clean ;;
            3) choice=cancel ;;
            *) continue ;;
        esac
        return
    done
}

# Sets mode to what runs, or else to what has left data.
choose_mode() {
    if native_runs; then
        mode=native
    elif engine_answers && find_compose && docker_system_exists; then
        mode=docker
    elif [[ ! -e $STATE_DIR/$STATE_MARKER ]] && [[ -z $ENGINE_PROBLEM ]] && docker_data_exists; then
        mode=docker
    else
        mode=native
    fi
}

name_failures
choice=''
mode=''
for argument in "$@"; do
    case $argument in
        --keep) choice=keep ;;
        --clean) choice=clean ;;
        --docker) mode=docker ;;
        --native) mode=native ;;
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
chosen=$mode
[[ -n $mode ]] || choose_mode
if [[ -z $choice ]]; then
    if [[ -t 0 ]]; then ask; else choice=keep; fi
fi
if [[ $choice == cancel ]]; then
    say 'Nothing has been stopped.'
    exit 0
fi

"${mode}_stop" "$choice"
# Nobody should believe that all has ended while the other half goes on.
if [[ -z $chosen && $mode == native ]] && engine_answers && docker_system_exists; then
    say 'The system in containers still runs: ./stop.sh --docker'
fi
