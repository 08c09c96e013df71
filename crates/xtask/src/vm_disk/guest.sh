# What a guest does with a disk of `nvme-async serve vhost-user-blk`. Each step that fails ends it.
set -eu
disk=/dev/vda
work=$(mktemp -d)
passed=0

step() {
    passed=$((passed + 1))
    echo "disk: $*"
}

# Arguments: a name and what it does. Data is checked as it is written, and once more at the end.
verified() {
    name=$1
    shift
    fio --name="$name" --filename="$disk" --direct=1 --verify=crc32c --verify_fatal=1 \
        --output="$work/fio" "$@" || {
        cat "$work/fio"
        exit 1
    }
}

try=0
until [ -b "$disk" ]; do
    try=$((try + 1))
    [ "$try" -lt 100 ]
    sleep 0.1
done
[ "$(blockdev --getsize64 "$disk")" = 268435456 ]
[ "$(cat /sys/block/vda/queue/write_cache)" = "write back" ]
[ "$(ls /sys/block/vda/mq | wc -l)" = 2 ]
step "it is there, with two queues and a write cache"

verified mixed --ioengine=libaio --rw=randwrite --bsrange=512-256k --bs_unaligned=0 --iodepth=16 \
    --size=48M --numjobs=2 --offset_increment=64M
verified fsynced --ioengine=psync --rw=write --bs=4k --size=1M --fsync=1
step "what is written is read, in requests of all sizes"

blkdiscard "$disk"
cmp -n 8388608 "$disk" /dev/zero
verified again --ioengine=libaio --rw=write --bs=64k --iodepth=4 --size=8M
blkdiscard --zeroout --length 4194304 "$disk"
cmp -n 4194304 "$disk" /dev/zero
step "discarded blocks and zeroed ones read as zeroes"

mkfs.ext4 -q -E nodiscard "$disk"
mkdir "$work/mnt"
mount -t ext4 "$disk" "$work/mnt"
cp -r /etc "$work/mnt/"
dd if=/dev/urandom of="$work/mnt/random" bs=64k count=256 conv=fsync status=none
sum=$(sha256sum <"$work/mnt/random")
fstrim "$work/mnt"
umount "$work/mnt"
fsck.ext4 -f -n "$disk" >"$work/fsck"
mount -t ext4 "$disk" "$work/mnt"
[ "$(sha256sum <"$work/mnt/random")" = "$sum" ]
diff -r --no-dereference /etc "$work/mnt/etc"
umount "$work/mnt"
step "a file system keeps its files"

# The host kills the server between these two lines, and starts it again.
echo "disk: under load"
verified killed --ioengine=libaio --rw=randwrite --bs=4k --iodepth=16 --size=32M --numjobs=2 \
    --offset_increment=64M --time_based --runtime=16 --verify_backlog=512
echo "disk: load is over"
verified after --ioengine=libaio --rw=randrw --bs=16k --iodepth=8 --size=16M
step "a server that is killed and comes back is not noticed"

if dmesg | grep -E "vda.*(error|timeout|reset)|Buffer I/O error"; then
    exit 1
fi
step "the kernel has nothing to complain about"
echo "test result: ok. $passed passed; 0 failed; 0 ignored"
