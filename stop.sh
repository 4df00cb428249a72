#!/usr/bin/env bash
# Stops what start.sh started, and nothing else. See ./stop.sh --help.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/libraries.sh
source scripts/libraries.sh

usage() {
    cat <<'HELP'
Usage: ./stop.sh [--docker | --native] [--keep | --clean]

Stops the services, then RabbitMQ, Redis and PostgreSQL.

  --keep     keeps all data
  --clean    deletes all data and logs; in Docker mode it deletes the containers, the volumes and
             the network
  --docker   stops the system in containers
  --native   stops the system that runs as processes of this machine
  --help     prints this text

Without --keep and --clean it asks. Without a terminal it does not ask and keeps the data.
Without --docker and --native it stops the native system if that runs, else the containers.
TICKETING_STATE_DIR selects the native system to stop, as in ./start.sh (default: .local).
HELP
}

# Sets choice to keep, clean or cancel.
ask() {
    local answer
    cat <<'MENU'
What should happen to the data?
  1) keep it
  2) delete everything
  3) cancel, and leave the system running
MENU
    while true; do
        # The end of the input (Ctrl-D) asks neither to delete nor to stop, so it cancels.
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

# Sets mode to the system that runs, or else to the one that has left data.
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
        *) read_common_option "$argument" ;;
    esac
done

use_state_dir "${TICKETING_STATE_DIR:-.local}"
chosen=$mode
[[ -n $mode ]] || choose_mode
if [[ -z $choice ]]; then
    if [[ -t 0 ]]; then ask; else choice=keep; fi
fi
if [[ $choice == cancel ]]; then
    say 'Nothing was stopped.'
    exit 0
fi

"${mode}_stop" "$choice"
# Without this a user would believe that everything has stopped while the containers still run.
if [[ -z $chosen && $mode == native ]] && engine_answers && docker_system_exists; then
    say 'The system in containers still runs: ./stop.sh --docker'
fi
