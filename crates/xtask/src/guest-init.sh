#!/bin/busybox sh
# The first process of the guest. Binds the NVMe controllers, puts the host's root beneath a
# file system in memory, runs the command in it, and reports over virtio-serial:
# port 1 is the command's output, port 2 its errors, port 3 `exit STATUS` or `failed REASON`.

export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev

# kernel_driver=yes|no, marker=TEXT
. /config

fail() {
    echo "init: $*"
    echo "failed $*" >/dev/vport0p3
    sleep 5
    poweroff -f
}

bind_controllers() {
    for device in /sys/bus/pci/devices/*; do
        [ "$(cat "$device/class")" = 0x010802 ] || continue
        echo vfio-pci >"$device/driver_override"
        echo "${device##*/}" >/sys/bus/pci/drivers_probe
        [ -e /sys/bus/pci/drivers/vfio-pci/"${device##*/}" ] ||
            fail "vfio-pci does not take ${device##*/}"
    done
}

# The kernel's own nvme driver comes last in the list and takes what vfio-pci has not.
while read -r module; do
    insmod "/modules/$module" || fail "cannot load $module"
    if [ "$module" = vfio-pci.ko ] && [ "$kernel_driver" = no ]; then
        bind_controllers
    fi
done </modules/order

# The kernel adds the ports one by one, at its leisure.
tries=0
until [ -c /dev/vport0p1 ] && [ -c /dev/vport0p2 ] && [ -c /dev/vport0p3 ]; do
    tries=$((tries + 1))
    [ "$tries" -lt 300 ] || fail "the virtio-serial ports do not appear"
    sleep 0.1
done

# There is one where the machine has ports that lead to the guest's.
if [ -e /sys/class/net/eth0 ]; then
    ifconfig eth0 10.0.2.15 netmask 255.255.255.0 || fail "cannot set the network up"
fi

mkdir /host /memory /guest
mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose host /host ||
    fail "cannot mount the host's root"
mount -t tmpfs tmpfs /memory
mkdir /memory/upper /memory/work
mount -t overlay -o lowerdir=/host,upperdir=/memory/upper,workdir=/memory/work overlay /guest ||
    fail "cannot mount the overlay"
mount -t proc proc /guest/proc
mount -t sysfs sysfs /guest/sys
mount -t devtmpfs devtmpfs /guest/dev
mkdir -p /guest/dev/shm /guest/dev/pts
mount -t tmpfs tmpfs /guest/dev/shm
mount -t devpts devpts /guest/dev/pts
mount -t tmpfs tmpfs /guest/run
for link in fd:fd stdin:fd/0 stdout:fd/1 stderr:fd/2; do
    ln -s "/proc/self/${link#*:}" "/guest/dev/${link%:*}"
done
cp /command /guest/run/command

# Through pipes, so that the command may open its own output anew; the marker tells the host
# that nothing follows.
mkfifo /output /errors
{
    cat /output
    printf '\001%s' "$marker"
} >/dev/vport0p1 &
{
    cat /errors
    printf '\001%s' "$marker"
} >/dev/vport0p2 &
chroot /guest /bin/sh /run/command </dev/null >/output 2>/errors
status=$?

# What the command left running would keep the pipes open.
left_over() {
    found=no
    for process in /proc/[0-9]*; do
        case $(readlink "$process/root") in
        /guest*)
            kill -9 "${process#/proc/}"
            found=yes
            ;;
        esac
    done
    [ "$found" = yes ]
}
while left_over; do
    sleep 0.1
done
wait

echo "exit $status" >/dev/vport0p3
# The host ends the machine now.
sleep 60
poweroff -f
