#!/bin/busybox sh
# The first process of user-mode Linux. Puts the host's root beneath a file system in memory, and runs the command in
# it. All that is said goes to the console; the last line is the marker and `exit STATUS` or `failed REASON`.

export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev

# marker=TEXT
. /config

end() {
    echo "$marker $*"
    poweroff -f
    sleep 60
}

for module in /modules/*; do
    insmod "$module" || end "failed to load $module"
done
mount -t hostfs -o ro none /host || end "failed to mount the host's root"
mount -t tmpfs tmpfs /memory
mkdir /memory/upper /memory/work
mount -t overlay -o lowerdir=/host,upperdir=/memory/upper,workdir=/memory/work overlay /guest ||
    end "failed to mount the overlay"
mount -t proc proc /guest/proc
mount -t sysfs sysfs /guest/sys
mount -t devtmpfs devtmpfs /guest/dev
mount -t tmpfs tmpfs /guest/run
# What the host has mounted there may be memory of the host's.
mount -t tmpfs tmpfs /guest/tmp
cp /command /guest/run/command
chroot /guest /bin/sh /run/command </dev/null 2>&1
end "exit $?"
