groupadd --system --gid 999 redis
useradd --system --uid 999 --gid redis --home-dir /data --shell /usr/sbin/nologin redis
install redis-server || { apt-get update -qq && install redis-server; }
mkdir -p /data
chown redis:redis /data
rm -f /etc/redis/redis.conf
