# Makes a disk image of a Debian or Ubuntu system as clouds have it: cloud-init, an ssh server, QEMU's guest agent. It
# boots by a BIOS and by UEFI. Nothing is mounted for it.
# Usage: machine.sh SUITE KERNEL-PACKAGE WORK-DIRECTORY SOURCES...    leaves WORK-DIRECTORY/disk/system.qcow2
suite=$1 kernel=$2 work=$3
shift 3
export DEBIAN_FRONTEND=noninteractive PATH=$PATH:/usr/sbin:/sbin LC_ALL=C.UTF-8
cd "$work"
mmdebstrap --quiet --variant=minbase --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
  --include="systemd,systemd-sysv,udev,dbus,cloud-init,openssh-server,$kernel,initramfs-tools,qemu-guest-agent,iproute2,netplan.io,systemd-resolved,libnss-resolve,e2fsprogs,netbase,cloud-guest-utils,sudo" \
  "$suite" root.tar "$@"
mkdir root disk
tar -xf root.tar -C root --exclude='./dev/*'
rm root.tar
vmlinuz=$(echo root/boot/vmlinuz-*)
initrd=$(echo root/boot/initrd.img-*)
echo 'LABEL=root / ext4 defaults 0 1' >root/etc/fstab
: >root/etc/machine-id
echo 'locale: false' >root/etc/cloud/cloud.cfg.d/90-locale.cfg
rm -f root/etc/resolv.conf && ln -s ../run/systemd/resolve/stub-resolv.conf root/etc/resolv.conf
rm -f root/etc/ssh/ssh_host_* root/etc/hostname

# What starts the kernel: syslinux for a BIOS, and for UEFI one program of kernel, initrd and command line.
command='root=LABEL=root rw console=tty0 console=ttyS0,115200'
printf 'DEFAULT linux\nPROMPT 0\nTIMEOUT 1\nLABEL linux\n KERNEL /vmlinuz\n APPEND initrd=/initrd.img %s\n' "$command" >syslinux.cfg
printf '%s' "$command" >cmdline
objcopy --add-section .cmdline=cmdline --change-section-vma .cmdline=0x30000 --add-section .linux="$vmlinuz" --change-section-vma .linux=0x2000000 \
  --add-section .initrd="$initrd" --change-section-vma .initrd=0x4000000 /usr/lib/systemd/boot/efi/linuxx64.efi.stub boot.efi
truncate -s 96M boot.img
mkfs.vfat -n BOOT boot.img >/dev/null
mmd -i boot.img ::/EFI ::/EFI/BOOT
mcopy -i boot.img "$vmlinuz" ::/vmlinuz
mcopy -i boot.img "$initrd" ::/initrd.img
mcopy -i boot.img syslinux.cfg ::/syslinux.cfg
mcopy -i boot.img boot.efi ::/EFI/BOOT/BOOTX64.EFI
syslinux --install boot.img
rm -rf root/boot/*

truncate -s 1500M root.img
mkfs.ext4 -q -L root -d root root.img
truncate -s 1600M disk.raw
printf 'label: dos\nstart=2048,size=%d,type=ef,bootable\nstart=%d,size=%d,type=83\n' $((96 * 2048)) $((97 * 2048)) $((1500 * 2048)) | sfdisk -q disk.raw
dd if=/usr/lib/syslinux/mbr/mbr.bin of=disk.raw conv=notrunc bs=440 count=1 status=none
dd if=boot.img of=disk.raw conv=notrunc,sparse bs=1M seek=1 status=none
dd if=root.img of=disk.raw conv=notrunc,sparse bs=1M seek=97 status=none
qemu-img convert -c -O qcow2 -o compression_type=zstd disk.raw disk/system.qcow2
chmod 644 disk/system.qcow2
