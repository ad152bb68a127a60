# For the scripts here: where test material is kept, and where Debian's packages come from.
set -euo pipefail
cache=${GPURUN_TEST_CACHE:-${XDG_CACHE_HOME:-/var/cache}/gpurun-tests}

# The mirror that this machine itself uses.
mirror() {
  local found
  found=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/*.{list,sources} 2>/dev/null |
    sed -nE '/^(deb|URIs:)/s#.*(https?://[^] ]+/debian/?)( .*|$)#\1#p' | grep -v snapshot | sed -n 1p)
  [ -n "$found" ] || { echo "no Debian mirror in this machine's apt sources; name one in DEBIAN_MIRROR" >&2; return 1; }
  echo "$found"
}
MIRROR=${DEBIAN_MIRROR:-$(mirror)}
