#!/bin/bash
# Starts PostgreSQL; the first time it makes the database cluster, as the official image does:
#   POSTGRES_USER (postgres), POSTGRES_PASSWORD (none), POSTGRES_DB (the user's name), POSTGRES_INITDB_ARGS
#   POSTGRES_HOST_AUTH_METHOD (scram-sha-256 with a password, trust without one, as in the days of 9.4)
#   /docker-entrypoint-initdb.d/*.sh, *.sql, *.sql.gz are run
# Each of the first three may be given as the name of a file, by POSTGRES_PASSWORD_FILE and so on.
set -eo pipefail

if [ "${1:0:1}" = '-' ]; then
	set -- postgres "$@"
fi

from_file() {
	local file="$1_FILE"
	if [ -n "${!1:-}" ] && [ -n "${!file:-}" ]; then
		echo >&2 "error: both $1 and $file are set (but are exclusive)"
		exit 1
	fi
	export "$1=${!1:-$([ -z "${!file:-}" ] || cat "${!file}")}"
}

make_cluster() {
	from_file POSTGRES_USER
	from_file POSTGRES_PASSWORD
	from_file POSTGRES_DB
	POSTGRES_USER=${POSTGRES_USER:-postgres}
	POSTGRES_DB=${POSTGRES_DB:-$POSTGRES_USER}
	local method=${POSTGRES_HOST_AUTH_METHOD:-} password=
	if [ -n "$POSTGRES_PASSWORD" ]; then
		method=${method:-scram-sha-256}
		# Opened by the command that reads it, and in no file that could be left behind.
		# shellcheck disable=SC2016 # evaluated below
		password='--pwfile=<(printf "%s\n" "$POSTGRES_PASSWORD")'
	else
		method=${method:-trust}
		if [ "$method" = trust ]; then
			echo >&2 "WARNING: no password has been set for the database; anyone who can reach it can use it. Set POSTGRES_PASSWORD to change that."
		fi
	fi
	eval "initdb --username=\"\$POSTGRES_USER\" $password ${POSTGRES_INITDB_ARGS:-}"
	printf '\nhost all all all %s\n' "$method" >>"$PGDATA/pg_hba.conf"

	pg_ctl -D "$PGDATA" -o "-c listen_addresses='' -p 5432" -w start >/dev/null
	local -x PGPASSWORD=$POSTGRES_PASSWORD
	local sql=(psql -v ON_ERROR_STOP=1 --no-psqlrc --username "$POSTGRES_USER" --no-password)
	if [ "$POSTGRES_DB" != postgres ]; then
		"${sql[@]}" --dbname postgres --set db="$POSTGRES_DB" <<<'CREATE DATABASE :"db";'
	fi
	local f
	for f in /docker-entrypoint-initdb.d/*; do
		case "$f" in
		*.sh)
			echo "$0: running $f"
			if [ -x "$f" ]; then "$f"; else
				# shellcheck disable=SC1090
				. "$f"
			fi
			;;
		*.sql) echo "$0: running $f" && "${sql[@]}" --dbname "$POSTGRES_DB" -f "$f" ;;
		*.sql.gz) echo "$0: running $f" && gunzip -c "$f" | "${sql[@]}" --dbname "$POSTGRES_DB" ;;
		esac
	done
	pg_ctl -D "$PGDATA" -m fast -w stop >/dev/null
	echo 'PostgreSQL init process complete; ready for start up.'
}

if [ "$1" = postgres ]; then
	if [ "$(id -u)" = 0 ]; then
		mkdir -p "$PGDATA"
		chmod 0700 "$PGDATA"
		find "$PGDATA" \! -user postgres -exec chown postgres {} +
		exec setpriv --reuid=postgres --regid=postgres --clear-groups "${BASH_SOURCE[0]}" "$@"
	fi
	if [ ! -s "$PGDATA/PG_VERSION" ]; then
		make_cluster
	fi
fi

exec "$@"
