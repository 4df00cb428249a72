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

usage() {
    cat <<'HELP'
Usage: ./stop.sh [--keep | --clean]

Stops the services, then RabbitMQ, Redis and PostgreSQL.

  --keep    keeps all data
  --clean   deletes all data and logs
  --help    this text

Without an option it asks; where nobody can answer (no terminal) it keeps the data.
TICKETING_STATE_DIR names the system to stop, as for ./start.sh (.local).
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

name_failures
choice=''
case ${1:-} in
    --keep) choice=keep ;;
    --clean) choice=clean ;;
    --help | -h)
        usage
        exit 0
        ;;
    '') ;;
    *)
        usage >&2
        exit 2
        ;;
esac

if [[ -z $choice ]]; then
    if [[ -t 0 ]]; then ask; else choice=keep; fi
fi
if [[ $choice == cancel ]]; then
    say 'Nothing has been stopped.'
    exit 0
fi

use_state_dir "${TICKETING_STATE_DIR:-.local}"
native_stop "$choice"
