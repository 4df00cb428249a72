# shellcheck shell=bash
# Sourced by start.sh, stop.sh and test.sh: every library of functions, each after those that it calls.
# http.sh and demo.sh are not among them, because http.sh makes a folder when it is sourced.

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
