#!/usr/bin/env bash
# apt-install.sh PACKAGE...: installs packages and prevents them from starting servers, now and at the next boot.
# Needs root. scripts/packages.sh calls it, with sudo if necessary.
set -euo pipefail

readonly POLICY=/usr/sbin/policy-rc.d
readonly SAVED_POLICY=$POLICY.saved-by-ticketing
readonly CLUSTER_CONFIG=/etc/postgresql-common/createcluster.conf
readonly SAVED_CLUSTER_CONFIG=$CLUSTER_CONFIG.saved-by-ticketing

# The servers in the packages. epmd belongs to RabbitMQ, uuidd comes with uuidgen.
readonly UNITS=(postgresql.service redis-server.service rabbitmq-server.service
    epmd.socket epmd.service uuidd.socket uuidd.service prometheus.service)

restore() {
    if [[ -e $SAVED_CLUSTER_CONFIG ]]; then
        mv -f "$SAVED_CLUSTER_CONFIG" "$CLUSTER_CONFIG"
    fi
    rm -f "$POLICY"
    if [[ -e $SAVED_POLICY ]]; then
        mv -f "$SAVED_POLICY" "$POLICY"
    fi
}

# Debian asks this program before a package may start a service: 101 means "not allowed".
forbid_service_starts() {
    # A saved file exists if an earlier run was killed. It is the original.
    if [[ -e $POLICY && ! -e $SAVED_POLICY ]]; then
        mv "$POLICY" "$SAVED_POLICY"
    fi
    printf '#!/bin/sh\nexit 101\n' >"$POLICY"
    chmod 755 "$POLICY"
}

# The installation would make a database cluster "main" and start it at each boot. The switch for that is in a file of
# postgresql-common, so this installs that package first.
forbid_default_cluster() {
    apt_get install postgresql-common
    if [[ ! -e $SAVED_CLUSTER_CONFIG ]]; then
        cp -p "$CLUSTER_CONFIG" "$SAVED_CLUSTER_CONFIG"
    fi
    printf 'create_main_cluster = false\n' >"$CLUSTER_CONFIG"
}

apt_get() {
    apt-get --yes --quiet --no-install-recommends \
        -o DPkg::Lock::Timeout=300 -o Dpkg::Options::=--force-confold "$@"
}

install_packages() {
    if [[ " $* " == *' postgresql '* ]]; then
        forbid_default_cluster || return
    fi
    apt_get install "$@"
}

unit_installed() {
    [[ -e /lib/systemd/system/$1 || -e /usr/lib/systemd/system/$1 ]]
}

new_units=()
for unit in "${UNITS[@]}"; do
    unit_installed "$unit" || new_units+=("$unit")
done

trap restore EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
forbid_service_starts

# A fresh system has no list of packages, and an old list names versions that no longer exist.
if ! install_packages "$@"; then
    printf 'Trying again with a fresh list of packages.\n' >&2
    apt_get update
    install_packages "$@"
fi

for unit in "${new_units[@]}"; do
    unit_installed "$unit" || continue
    if command -v systemctl >/dev/null 2>&1; then
        systemctl disable "$unit" >/dev/null 2>&1 || true
    elif [[ -e /etc/init.d/${unit%.*} ]]; then
        update-rc.d "${unit%.*}" disable >/dev/null 2>&1 || true
    fi
done
