# Makes a copied system another one. Arguments: the instance's ID, its name, a machine ID.
set -u
instance=$1 name=$2 machine=$3
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
fail() { echo "$*" >&2; exit 1; }
has() { command -v "$1" >/dev/null 2>&1; }

for file in /etc/machine-id /var/lib/dbus/machine-id; do
	if [ -s "$file" ] && [ ! -h "$file" ]; then
		echo "$machine" >"$file" || fail "$file can't be written"
	fi
done

if has cloud-init; then
	# The disk with the seed is another one than what the kernel has read.
	seed=$(findfs LABEL=cidata 2>/dev/null) && blockdev --flushbufs "$seed"
	# What was done once for the original is done: packages, users' own commands. Only its keys have to be others.
	new=/var/lib/cloud/instances/$instance
	mkdir -p "$new/sem" || fail "$new can't be made"
	for done in /var/lib/cloud/instance/sem/config_*; do
		case $done in
		*/config_ssh | */config_set_hostname | */config_update_hostname | */config_update_etc_hosts | */config_seed_random) ;;
		*) cp -p "$done" "$new/sem/" 2>/dev/null ;;
		esac
	done
	cloud-init init --local >&2
	cloud-init init >&2
	[ "$(readlink -f /var/lib/cloud/instance)" = "$new" ] || fail "cloud-init didn't become another instance"
else
	hostname "${name%%.*}" || fail "its name can't be set"
	if [ -e /etc/hostname ]; then echo "${name%%.*}" >/etc/hostname; fi
	if has ssh-keygen && ls /etc/ssh/ssh_host_* >/dev/null 2>&1; then
		rm -f /etc/ssh/ssh_host_*_key /etc/ssh/ssh_host_*_key.pub
		ssh-keygen -A >&2 || fail "ssh has no keys"
	fi
fi

if has systemctl; then
	systemctl try-restart systemd-journald.service ssh.service sshd.service >&2
elif has rc-service; then
	rc-service --ifstarted sshd restart >&2
fi
exit 0
