# What a guest in user-mode Linux does with its disks, after the functions of guest.sh.

on_both appears
# The number of the namespace, and where the range begins.
[ "$(cat /sys/block/vda/serial) $(cat /sys/block/vdb/serial)" = "1-1000000 1-a000000" ]
step "both are there, with a write cache"

mixed() {
    verified "$1" mixed --ioengine=libaio --rw=randwrite --bsrange=512-256k --bs_unaligned=0 --iodepth=16 --size=64M
}
on_both mixed
on_both fsynced
step "what is written is read, in requests of all sizes"

goes_on
