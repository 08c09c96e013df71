# What a guest of QEMU's does with its disks, after the functions of guest.sh.

# How often a queue has interrupted the guest. Arguments: a disk, and the number of the queue.
interrupts() {
    device=$(basename "$(readlink "/sys/block/$1/device")")
    awk -v queue="$device-req.$2" '$NF == queue { for (cpu = 2; cpu <= 3; cpu++) sum += $cpu } END { print sum + 0 }' \
        /proc/interrupts
}

# Each processor has a queue of its own.
has_queues() {
    [ "$(ls "/sys/block/$1/mq" | wc -l)" = 2 ]
    [ "$(cat "/sys/block/$1/mq/0/cpu_list") $(cat "/sys/block/$1/mq/1/cpu_list")" = "0 1" ]
}
on_both appears
on_both has_queues
# The number of the namespace, and where the range begins.
[ "$(cat /sys/block/vda/serial) $(cat /sys/block/vdb/serial)" = "1-1000000 1-a000000" ]
step "both are there, with two queues and a write cache each"

# A job for each processor, and so for each queue.
mixed() {
    first=$(interrupts "$1" 0)
    second=$(interrupts "$1" 1)
    verified "$1" mixed --ioengine=libaio --rw=randwrite --bsrange=512-256k --bs_unaligned=0 --iodepth=16 \
        --size=48M --offset_increment=64M --numjobs=2 --cpus_allowed=0,1 --cpus_allowed_policy=split
    first=$(($(interrupts "$1" 0) - first))
    second=$(($(interrupts "$1" 1) - second))
    echo "disk: the queues of $1 have interrupted $first and $second times"
    [ "$first" -ge 100 ]
    [ "$second" -ge 100 ]
}
on_both mixed
on_both fsynced
step "what is written is read, in requests of all sizes, through all queues"

# The host kills the server between these two lines, and starts it again.
echo "disk: under load"
killed() {
    verified "$1" killed --ioengine=libaio --rw=randwrite --bs=4k --iodepth=16 --size=32M --offset_increment=64M \
        --numjobs=2 --cpus_allowed=0,1 --cpus_allowed_policy=split --time_based --runtime=16 --verify_backlog=512
}
on_both killed
echo "disk: load is over"
after() {
    verified "$1" after --ioengine=libaio --rw=randrw --bs=16k --iodepth=8 --size=16M
}
on_both after
step "a server that is killed and comes back is not noticed"

goes_on
