# Runs in the guest, with nvme-async's additional arguments as its own, after a line that sets
# seconds=NUMBER ramp_ms=NUMBER limit=SECONDS, and before lines that say which runs there are. NVME0
# is the address of the controller. Tells the host, line by line:
#   note TEXT            what is measured here
#   run NUMBER           that a run begins
#   out TEXT, err TEXT   what it wrote
#   ended NUMBER STATUS  that it is over; the status is timeout(1)'s
set -eu

note() {
    echo "note $*"
}

# Lets the kernel have the controller, and waits for $disk.
use_kernel_driver() {
    nvme-async unbind "$NVME0" >/dev/null
    tries=0
    until disk=$(ls /dev/nvme*n1 2>/dev/null) && [ -b "$disk" ]; do
        tries=$((tries + 1))
        if [ "$tries" -ge 300 ]; then
            echo "the kernel's driver shows no namespace" >&2
            exit 1
        fi
        sleep 0.1
    done
}

use_vfio() {
    nvme-async bind "$NVME0" >/dev/null
}

# NUMBER PEER RW IODEPTH, then further arguments of nvme-async.
run() {
    number=$1
    peer=$2
    rw=$3
    depth=$4
    shift 4
    rate_file=/run/rate-$rw-$depth
    case $peer in
    libaio | io_uring)
        set -- fio --name=vm-bench --filename="$disk" --ioengine="$peer" \
            --rw="$rw" --iodepth="$depth" --bs=4k --direct=1 --numjobs=1 \
            --norandommap --randrepeat=1 \
            --time_based --runtime="${seconds}s" --ramp_time="${ramp_ms}ms" \
            --unified_rw_reporting=mixed --lat_percentiles=1 --clat_percentiles=0 \
            --output-format=json
        ;;
    qemu-img)
        # It is told how many, not how long: as many as fio did in that time.
        rate=$(cat "$rate_file" 2>/dev/null) || true
        count=$((${rate:-1000} * seconds))
        [ "$rw" = randread ] && write= || write=-w
        set -- qemu-img bench -c "$count" -d "$depth" -s 4096 -f raw $write "nvme://$NVME0/1"
        ;;
    nvme-async)
        set -- nvme-async bench "nvme://$NVME0/1" --rw "$rw" --bs 4k --iodepth "$depth" \
            --runtime "$seconds" --ramp "$((ramp_ms / 1000)).$(printf %03d $((ramp_ms % 1000)))" \
            --json "$@"
        ;;
    esac
    echo "run $number"
    status=0
    timeout --kill-after=5 "$limit" "$@" >/run/output 2>/run/errors </dev/null || status=$?
    sed 's/^/out /' /run/output
    sed 's/^/err /' /run/errors
    # The last of these lines may have no end.
    printf '\nended %s %s\n' "$number" "$status"
    if [ "$peer" = libaio ] && [ "$status" = 0 ]; then
        sed -n 's/^ *"iops" : \([1-9][0-9]*\).*/\1/p' /run/output |
            sort -n | tail -n 1 >"$rate_file"
    fi
}

note "Linux $(uname -r), $(nproc) processors, $(fio --version)," \
    "$(qemu-img --version | head -n 1)"
[ $# = 0 ] || note "nvme-async bench $*"
