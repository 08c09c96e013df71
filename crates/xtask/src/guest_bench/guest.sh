# Runs in the guest, after a line that sets seconds=NUMBER rounds=NUMBER options='OPTIONS OF FIO', with the PCI
# addresses of the disks as arguments. Before each of fio's outputs, which has a job for each disk, comes a line
# "run ROUND RW IODEPTH"; a line "begin" is before all of them.
set -eu

disks=
for address in "$@"; do
    try=0
    until disk=$(ls "/sys/bus/pci/devices/$address"/virtio*/block 2>/dev/null) && [ -b "/dev/$disk" ]; do
        try=$((try + 1))
        if [ "$try" -ge 300 ]; then
            echo "there is no disk at $address" >&2
            exit 1
        fi
        sleep 0.1
    done
    disks="$disks /dev/$disk"
done

work=$(mktemp -d)
echo "begin"
round=1
while [ "$round" -le "$rounds" ]; do
    for rw in randread randwrite randrw; do
        for iodepth in 1 4; do
            jobs=
            for disk in $disks; do
                jobs="$jobs --name=$disk --stonewall --filename=$disk"
            done
            echo "run $round $rw $iodepth"
            # Jobs inherit what is set before the first one.
            # shellcheck disable=SC2086
            fio $options --ioengine=libaio --direct=1 --rw="$rw" --iodepth="$iodepth" --runtime="$seconds" \
                --ramp_time=0.5s --randseed="$round" $jobs >"$work/output" 2>"$work/errors" || {
                cat "$work/output" "$work/errors" >&2
                exit 1
            }
            cat "$work/output"
            echo
        done
    done
    round=$((round + 1))
done
echo "end"
