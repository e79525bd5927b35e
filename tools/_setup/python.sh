#!/usr/bin/env bash
# Prints a Python >= 3.11 that can make virtual environments and build extensions; as root on a system with apt it
# installs one if there is none.
set -euo pipefail

usable() {
    "$1" -c '
import ensurepip, os, sys, sysconfig, venv
sys.exit(sys.version_info < (3, 11) or not os.path.exists(sysconfig.get_path("include") + "/Python.h"))
' >/dev/null 2>&1 </dev/null
}

find_python() {
    local name
    for name in python3 python3.14 python3.13 python3.12 python3.11; do
        if command -v "$name" >/dev/null && usable "$name"; then
            command -v "$name"
            return
        fi
    done
    return 1
}

find_python && exit
packages="python3 python3-venv python3-dev"
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "setup: installing $packages" >&2
    { apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -q -y --no-install-recommends install $packages; } \
        >&2 </dev/null
    find_python && exit
fi
cat >&2 <<TEXT
setup: no Python here that is 3.11 or newer and has the venv module and the C headers.
       Debian 12 and later, Ubuntu 24.04 and later: apt-get install $packages
TEXT
exit 1
