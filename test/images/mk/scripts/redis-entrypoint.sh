#!/bin/sh
set -e

# `docker run redis --save ""` and `docker run redis /path/redis.conf` mean redis-server.
if [ "${1#-}" != "$1" ] || [ "${1%.conf}" != "$1" ]; then
	set -- redis-server "$@"
fi

# In a container others are meant to connect; a configuration that says otherwise counts.
case " $* " in
" redis-server "*protected-mode* | " redis-server "*.conf*) ;;
" redis-server "*) set -- "$@" --protected-mode no ;;
esac

if [ "$1" = redis-server ] && [ "$(id -u)" = 0 ]; then
	find . \! -user redis -exec chown redis {} +
	exec setpriv --reuid=redis --regid=redis --clear-groups "$0" "$@"
fi

umask 0077
exec "$@"
