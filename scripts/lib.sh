# shellcheck shell=bash
# Shared by the other scripts; sourced by bash with the checkout as working directory.

PATH=$PATH:/usr/sbin:/sbin # ldconfig, where it is not in a user's PATH

die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# Print the first Python that is new enough and can make virtual environments (Debian packages that apart).
find_python() {
    local python
    for python in python3 python3.{14,13,12,11,10}; do
        if "$python" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$python"
            return
        fi
    done
    return 1
}

# install_packages PACKAGE...: make apt install them; does nothing without arguments.
install_packages() {
    (($#)) || return 0
    command -v apt-get >/dev/null || die "please install what Debian calls $*, then try again"
    local as_root=(env DEBIAN_FRONTEND=noninteractive)
    if ((EUID)); then
        command -v sudo >/dev/null || die "as root, run: apt-get install $*"
        as_root=(sudo "${as_root[@]}")
    fi
    "${as_root[@]}" apt-get update -qq >&2
    local package wanted=()
    for package; do
        # Releases since 2024 have renamed it.
        if [[ $package == libfuse2 ]] && apt-cache show libfuse2t64 >/dev/null 2>&1; then package=libfuse2t64; fi
        wanted+=("$package")
    done
    "${as_root[@]}" apt-get install -qq --no-install-recommends "${wanted[@]}" >&2
}

# install_missing COMMAND:PACKAGE...: the named commands, and what a mount needs.
install_missing() {
    local pair missing=()
    find_python >/dev/null || missing+=(python3-venv)
    [[ $(ldconfig -p) == *libfuse.so.2* ]] || missing+=(libfuse2)
    for pair in fusermount:fuse3 "$@"; do
        command -v "${pair%:*}" >/dev/null || missing+=("${pair#*:}")
    done
    install_packages "${missing[@]}"
}

# make_venv FOLDER PIP_ARGUMENT...: a virtual environment with this checkout in it; quick when nothing changed.
make_venv() {
    local venv=$1 python
    shift
    if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
        python=$(find_python) || die "needs Python 3.10 or newer with venv; install python3 and python3-venv"
        "$python" -m venv --clear "$venv"
    fi
    if [[ $(cat "$venv/installed" 2>/dev/null) != "$(printf "%s\n" "$@" && cat pyproject.toml)" ]]; then
        # pip installs dependency groups since 25.1.
        "$venv/bin/python" -m pip install -q --disable-pip-version-check --upgrade 'pip>=25.1'
        "$venv/bin/python" -m pip install -q "$@"
        (printf "%s\n" "$@" && cat pyproject.toml) >"$venv/installed"
    fi
    PATH=$(realpath "$venv")/bin:$PATH
}

# make_mptester FOLDER: SQLite's own test of several processes, and its scripts, from the distribution's source package,
# for the library that is installed. The machine's own package lists stay as they are.
make_mptester() {
    local folder work list missing=() version options
    mkdir -p "$1"
    folder=$(realpath "$1")
    command -v apt-get >/dev/null || return 0
    command -v gcc >/dev/null || missing+=(gcc libc6-dev)
    command -v xz >/dev/null || missing+=(xz-utils)
    [[ -e /usr/include/sqlite3.h ]] || missing+=(libsqlite3-dev)
    install_packages "${missing[@]}"
    version=$(dpkg-query -W -f '${Version}' libsqlite3-0)
    if [[ $(cat "$folder/version" 2>/dev/null) == "$version" ]]; then return; fi
    work=$(mktemp -d)
    mkdir -p "$work"/{parts,lists/partial,cache/archives/partial}
    for list in /etc/apt/sources.list.d/{debian,ubuntu}.sources; do
        if [[ -e $list ]]; then sed 's/^Types:.*/Types: deb-src/' "$list" >"$work/parts/${list##*/}"; fi
    done
    if [[ -e /etc/apt/sources.list ]]; then
        sed -n 's/^deb /deb-src /p' /etc/apt/sources.list >"$work/parts/here.list"
    fi
    options=(-qq -o Dir::Etc::sourcelist=- -o Dir::Etc::sourceparts="$work/parts" -o Dir::State::lists="$work/lists"
        -o Dir::Cache="$work/cache" -o APT::Sandbox::User=)
    if ! (
        cd "$work" &&
            apt-get "${options[@]}" update &&
            apt-get "${options[@]}" source --download-only sqlite3 &&
            tar -xf sqlite3_*.orig.tar.?z --strip-components=2 --wildcards '*/mptest/*' &&
            gcc -O1 -o mptester mptest.c -lsqlite3 &&
            mv mptester ./*test "$folder/" &&
            printf '%s' "$version" >"$folder/version"
    ) >&2; then
        printf 'cannot build mptester: its tests are skipped\n' >&2
    fi
    rm -r "$work"
}
