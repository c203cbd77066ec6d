groupadd --system --gid 999 postgres
useradd --system --uid 999 --gid postgres --home-dir /var/lib/postgresql --shell /bin/bash postgres
apt-cache show postgresql >/dev/null || apt-get update -qq
version=$(apt-cache depends postgresql | sed -n 's/^ *Depends: postgresql-\([0-9]*\)$/\1/p')

# The server and its client are unpacked rather than installed: Debian's management of clusters around them, with the Perl
# it needs, has no use in a container; nor has the compiler of queries, which is bigger than all the rest.
# shellcheck disable=SC2046 # names of packages
install $(apt-cache depends "postgresql-$version" "postgresql-client-$version" |
	sed -n 's/^ *Depends: //p' | sort -u |
	grep -vE '^(<|postgresql|perl|libllvm|locales|debconf|ssl-cert|libjson-perl|sensible|netbase|adduser|sysvinit)') libpq5
cd /tmp || exit 1
apt-get download -qq "postgresql-$version" "postgresql-client-$version"
for deb in postgresql-*.deb; do
	dpkg-deb -x "$deb" /tmp/unpacked
done
rm -rf unpacked/usr/share/man unpacked/usr/share/locale unpacked/usr/share/doc unpacked/usr/share/postgresql/*/man unpacked/usr/share/lintian \
	unpacked/lib unpacked/usr/lib/systemd "unpacked/usr/lib/postgresql/$version/lib/bitcode" "unpacked/usr/lib/postgresql/$version/lib/"llvmjit*
cp -a unpacked/. /
ln -s "$version" /usr/lib/postgresql/current
ldconfig

sed -i "s/^#\?listen_addresses = .*/listen_addresses = '*'/" "/usr/share/postgresql/$version/postgresql.conf.sample"
mkdir -p /var/lib/postgresql/data
chown postgres:postgres /var/lib/postgresql /var/lib/postgresql/data
chmod 1777 /var/lib/postgresql/data
mkdir -p /docker-entrypoint-initdb.d /var/run/postgresql
chown postgres:postgres /var/run/postgresql
chmod 2777 /var/run/postgresql
