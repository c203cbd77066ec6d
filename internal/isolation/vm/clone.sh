# Makes a copied system another one. Arguments: the instance's ID, its name, a machine ID.
set -u
instance=$1 name=$2 machine=$3
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
fail() { echo "$*" >&2; exit 1; }
has() { command -v "$1" >/dev/null 2>&1; }
active() { has systemctl && systemctl -q is-active "$1"; }

for file in /etc/machine-id /var/lib/dbus/machine-id; do
	if [ -s "$file" ] && [ ! -h "$file" ]; then
		echo "$machine" >"$file" || fail "$file can't be written"
	fi
done

for key in /etc/ssh/ssh_host_*_key; do
	[ -e "$key" ] || continue
	kind=${key#/etc/ssh/ssh_host_}
	rm -f "$key" "$key.pub"
	ssh-keygen -q -t "${kind%_key}" -N '' -f "$key" >&2 || fail "ssh has no new $key"
done

after=${name%%.*}
if grep -qs '^127\.0\.1\.1' /etc/hosts; then
	sed "/^127\.0\.1\.1/s/.*/127.0.1.1 $([ "$name" = "$after" ] || echo "$name ")$after/" /etc/hosts >/etc/hosts.clone &&
		cat /etc/hosts.clone >/etc/hosts
	rm -f /etc/hosts.clone
fi

if has cloud-init; then
	# The disk with the seed is another one than what the kernel has read.
	seed=$(findfs LABEL=cidata 2>/dev/null) && blockdev --flushbufs "$seed"
	# What was done once for the original is done: packages, keys, users' own commands.
	new=/var/lib/cloud/instances/$instance
	mkdir -p "$new/sem" || fail "$new can't be made"
	cp -p /var/lib/cloud/instance/sem/config_* "$new/sem/" 2>/dev/null
	rm -f /run/cloud-init/.instance-id /var/lib/cloud/data/previous-hostname # it would trust what it knows
	cloud-init init --local >&2
	[ "$(readlink -f /var/lib/cloud/instance)" = "$new" ] || fail "cloud-init didn't become another instance"
	# It has written down what the interfaces are to be; at a boot they would come up from that.
	if has netplan && ls /etc/netplan/*.yaml >/dev/null 2>&1; then
		netplan apply >&2
	elif active NetworkManager; then
		nmcli connection reload >&2
		for at in /sys/class/net/*; do
			[ -e "$at/device" ] && nmcli device connect "${at##*/}" >&2
		done
	elif active systemd-networkd; then
		systemctl restart systemd-networkd >&2
	elif has ifup; then
		for at in /sys/class/net/*; do
			[ -e "$at/device" ] || continue
			ifdown --force "${at##*/}" >&2
			ifup "${at##*/}" >&2
		done
	fi
else
	hostname "$after" || fail "its name can't be set"
	if [ -e /etc/hostname ]; then echo "$after" >/etc/hostname; fi
fi

if has systemctl; then
	systemctl try-restart systemd-journald.service ssh.service sshd.service >&2
elif has rc-service; then
	rc-service --ifstarted sshd restart >&2
fi
exit 0
