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

# A root of a Debian release with these packages, apart from what nobody reads in a test. The mirror may be a frozen one: its
# Release files are past their date, their signatures hold.
debian() { # SUITE DIRECTORY VARIANT PACKAGES [OPTION…]
  local suite=$1 directory=$2 variant=$3 packages=$4
  shift 4
  mmdebstrap --quiet --mode=root --variant="$variant" --include="$packages" --aptopt='APT::Install-Recommends "false"' \
    --aptopt='Acquire::Languages "none"' --aptopt='Acquire::Check-Valid-Until "false"' --dpkgopt='path-exclude=/usr/share/doc/*' \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' "$@" \
    "$suite" "$directory" "deb $MIRROR $suite main"
}
