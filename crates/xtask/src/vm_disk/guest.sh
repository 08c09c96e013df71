# What a guest does with two disks of one `nvme-async serve vhost-user-blk`, which are ranges of one namespace: what
# all guests can do. Each step that fails ends it.
set -eu
disks="vda vdb"
size=134217728
work=$(mktemp -d)
passed=0

step() {
    passed=$((passed + 1))
    echo "disk: $*"
}

# Does something for each disk, for all at the same time. Arguments: a command, which gets the disk's name as its last
# argument.
on_both() {
    processes=
    for disk in $disks; do
        "$@" "$disk" &
        processes="$processes $!"
    done
    for process in $processes; do
        wait "$process"
    done
}

# Arguments: a disk, a name, and what fio does there. Data is checked as it is written, and once more at the end.
verified() {
    disk=$1
    name=$2
    shift 2
    fio --name="$name" --filename="/dev/$disk" --direct=1 --verify=crc32c --verify_fatal=1 \
        --eta=never --output="$work/fio-$disk" "$@" || {
        cat "$work/fio-$disk"
        exit 1
    }
}

appears() {
    try=0
    until [ -b "/dev/$1" ]; do
        try=$((try + 1))
        [ "$try" -lt 100 ]
        sleep 0.1
    done
    [ "$(blockdev --getsize64 "/dev/$1")" = "$size" ]
    [ "$(cat "/sys/block/$1/queue/write_cache")" = "write back" ]
}

fsynced() {
    verified "$1" fsynced --ioengine=psync --rw=write --bs=4k --size=1M --fsync=1
}

# Arguments: what to do (write or read), and a disk. What is written tells of the disk and of the offset.
patterns() {
    fio --name=patterns --filename="/dev/$2" --direct=1 --ioengine=libaio --iodepth=8 --rw="$1" --bs=128k \
        --verify=pattern --verify_pattern="%o\"$2 has it\"" --verify_fatal=1 --do_verify=0 \
        --eta=never --output="$work/fio-$2" || {
        cat "$work/fio-$2"
        exit 1
    }
}

discarded() {
    blkdiscard "/dev/$1"
    cmp -n 8388608 "/dev/$1" /dev/zero
    verified "$1" again --ioengine=libaio --rw=write --bs=64k --iodepth=4 --size=8M
    blkdiscard --zeroout --length 4194304 "/dev/$1"
    cmp -n 4194304 "/dev/$1" /dev/zero
}

has_files() {
    mkfs.ext4 -q -E nodiscard "/dev/$1"
    mkdir "$work/$1"
    mount -t ext4 "/dev/$1" "$work/$1"
    cp -r /etc "$work/$1/"
    dd if=/dev/urandom of="$work/$1/random" bs=64k count=256 conv=fsync status=none
    sum=$(sha256sum <"$work/$1/random")
    fstrim "$work/$1"
    umount "$work/$1"
    fsck.ext4 -f -n "/dev/$1" >"$work/fsck-$1" 2>&1 || {
        cat "$work/fsck-$1"
        exit 1
    }
    mount -t ext4 "/dev/$1" "$work/$1"
    [ "$(sha256sum <"$work/$1/random")" = "$sum" ]
    diff -r --no-dereference /etc "$work/$1/etc"
    umount "$work/$1"
}

# What guests do whatever happened before.
goes_on() {
    on_both patterns write
    on_both patterns read
    step "no disk has what was written to the other one"
    on_both discarded
    step "discarded blocks and zeroed ones read as zeroes"
    on_both has_files
    step "file systems keep their files"
    if dmesg | grep -E "vd[ab].*(error|timeout|reset)|Buffer I/O error"; then
        exit 1
    fi
    step "the kernel has nothing to complain about"
    echo "test result: ok. $passed passed; 0 failed; 0 ignored"
}
