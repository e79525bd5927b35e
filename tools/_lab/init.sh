#!/bin/sh
# Process 1 of the lab guest. The root is the host's, read-only: everything writable is a tmpfs.
# Mounts, runs the job that the host left on the "lab" share, reports its status on the "ctl" port, powers off.
# It must work with what a minimal Debian has: dash, mount, setsid, dmesg.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

mount -t proc -o nosuid,nodev,noexec proc /proc
mount -t sysfs -o nosuid,nodev,noexec sysfs /sys
[ -c /dev/null ] || mount -t devtmpfs devtmpfs /dev
for folder in /run /tmp /var/tmp; do
    [ -d $folder ] && mount -t tmpfs -o mode=1777 tmpfs $folder
done
mkdir -p /dev/shm /dev/pts /dev/hugepages /run/lab
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t devpts -o mode=620,ptmxmode=666 devpts /dev/pts
mount -t hugetlbfs hugetlbfs /dev/hugepages 2>/dev/null
mount -t debugfs debugfs /sys/kernel/debug 2>/dev/null
mount -t cgroup2 cgroup2 /sys/fs/cgroup 2>/dev/null
[ -e /dev/fd ] || ln -s /proc/self/fd /dev/fd
[ -e /dev/stdin ] || ln -s /proc/self/fd/0 /dev/stdin
[ -e /dev/stdout ] || ln -s /proc/self/fd/1 /dev/stdout
[ -e /dev/stderr ] || ln -s /proc/self/fd/2 /dev/stderr

port() {  # device node of the virtio-serial port with this name
    for entry in /sys/class/virtio-ports/*; do
        [ "$(cat "$entry/name" 2>/dev/null)" = "$1" ] && echo "/dev/${entry##*/}" && return
    done
}
ctl=$(port ctl)
exec 3>"$ctl"

finish() {
    echo "exit $1" >&3
    exec 3>&-
    echo 1 > /proc/sys/kernel/sysrq
    echo o > /proc/sysrq-trigger
    while :; do :; done  # the root may already be gone: builtins only
}

# 9p: nothing cached, because host and guest both write here
if ! mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=none lab /run/lab; then
    echo "vfiopy init: the lab share does not mount"
    finish 125
fi
# an interface that is down would make even 127.0.0.1 unreachable
if command -v ip >/dev/null; then ip link set lo up; fi

dmesg > /run/lab/boot.dmesg
echo start >&3
if [ -e /run/lab/interactive ]; then
    setsid -c -w /bin/sh /run/lab/job.sh </dev/hvc0 >/dev/hvc0 2>&1 3>&-
else
    setsid -w /bin/sh /run/lab/job.sh </dev/null >"$(port out)" 2>"$(port err)" 3>&-
fi
status=$?

if [ -w /sys/kernel/debug/kmemleak ]; then
    echo scan > /sys/kernel/debug/kmemleak
    sleep 6  # kmemleak reports objects only once they are 5 s old
    echo scan > /sys/kernel/debug/kmemleak
    cat /sys/kernel/debug/kmemleak > /run/lab/kmemleak
fi
dmesg > /run/lab/dmesg
finish $status
