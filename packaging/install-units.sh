#!/bin/sh
# Puts the systemd units in place (or takes them away with --remove): make install calls it with PREFIX and DESTDIR.
# A running daemon is restarted, which leaves its containers running.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
units=${DESTDIR:-}/etc/systemd/system
bindir=${PREFIX:-/usr/local}/bin

live() { [ -z "${DESTDIR:-}" ] && [ -d /run/systemd/system ]; }

if [ "${1:-}" = --remove ]; then
	if live; then systemctl disable --now dolium.service dolium.socket || true; fi
	rm -f "$units/dolium.service" "$units/dolium.socket"
	if live; then systemctl daemon-reload; fi
	exit 0
fi

group=root
for g in docker dolium; do
	getent group "$g" >/dev/null && group=$g
done

mkdir -p "$units"
for unit in dolium.service dolium.socket; do
	sed -e "s|@BINDIR@|$bindir|" -e "s|@GROUP@|$group|" "$here/$unit" >"$units/$unit"
	chmod 0644 "$units/$unit"
done

if live; then
	systemctl daemon-reload
	systemctl enable dolium.socket dolium.service
	if systemctl is-active --quiet dolium.service; then
		systemctl restart dolium.service
	else
		systemctl start dolium.socket dolium.service
	fi
	echo "dolium.service is running; try: $bindir/dolium info"
else
	echo "units are in $units (no systemd is running here: start $bindir/doliumd by hand)"
fi
