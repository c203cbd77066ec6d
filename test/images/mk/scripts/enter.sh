# Runs WORK/install.sh in an overlay over ROOT: enter.sh ROOT LISTS WORK. It is in a mount and a PID namespace of its own,
# which take all mounts and left-over processes with them.
root=$1 lists=$2 work=$3 in=$3/merged
mount --make-rprivate /
mount -t overlay overlay -o "lowerdir=$root,upperdir=$work/upper,workdir=$work/work,redirect_dir=off,metacopy=off,index=off" "$in"
mount -t proc proc "$in/proc"
mount -t tmpfs -o mode=755 tmpfs "$in/dev"
for d in null zero full random urandom tty; do
	touch "$in/dev/$d"
	mount --bind "/dev/$d" "$in/dev/$d"
done
ln -s /proc/self/fd "$in/dev/fd"
mount -t tmpfs -o mode=1777 tmpfs "$in/tmp"
mount -t tmpfs -o mode=755 tmpfs "$in/var/cache/apt"
mount -t tmpfs -o mode=755 tmpfs "$in/var/lib/apt/lists"
mount --bind /etc/resolv.conf "$in/etc/resolv.conf"
mkdir -p "$in/var/cache/apt/archives/partial" "$in/var/lib/apt/lists/partial" "$in/var/log/apt"
cp -a "$lists/." "$in/var/lib/apt/lists/"
cp "$work/install.sh" "$in/tmp/install.sh"
# The way to the packages is the host's.
apt-config dump | grep -i '^Acquire::.*::Proxy' >"$in/tmp/apt.conf" || true
env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root DEBIAN_FRONTEND=noninteractive APT_CONFIG=/tmp/apt.conf \
	SOURCE_DATE_EPOCH="$SOURCE_DATE_EPOCH" http_proxy="${http_proxy-}" https_proxy="${https_proxy-}" \
	chroot "$in" sh -eu -c '
		install() { apt-get install -qq -y --no-install-recommends "$@" </dev/null; }
		. /tmp/install.sh'
rm -rf "$in"/var/log/*.log "$in"/var/log/apt "$in"/var/log/lastlog "$in"/var/log/faillog "$in"/var/cache/debconf/*-old "$in"/var/lib/dpkg/*-old "$in"/var/cache/ldconfig/aux-cache
