# Sourced by the other scripts: installs what is missing, makes the Python environment, builds. Says what it does.
# Everything is idempotent: a second run finds its work done.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build_folder=$root/build
python=$build_folder/venv/bin/python
export CCACHE_BASEDIR=$root   # what one build folder has compiled, another need not
export CCACHE_DEPEND=1        # by the files that the compiler says it read: no preprocessing of what is not cached
# Ninja's default is two more than there are cores: on two, a tenth more of processor time, since jobs share caches.
export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}

say() { printf '==> %s\n' "$*"; }
die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# Runs apt-get as root, with sudo where that is needed.
run_apt() {
  local as_root=()
  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || die "not root, and no sudo; run as root: apt-get $*"
    as_root=(sudo)
  fi
  DEBIAN_FRONTEND=noninteractive "${as_root[@]}" apt-get "$@"
}

# Installs those of the named Debian packages that are missing.
need_packages() {
  local missing=() package
  if ! command -v dpkg-query >/dev/null; then
    say "this is no Debian or Ubuntu: expecting the equivalents of $* to be installed"
    return
  fi
  for package in "$@"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
  done
  if [ ${#missing[@]} = 0 ]; then
    say "packages: all ${#} are installed"
    return
  fi
  say "packages: installing ${missing[*]}"
  run_apt update -qq || die "apt-get update failed; is there a network?"
  run_apt install -y -qq --no-install-recommends "${missing[@]}" >/dev/null ||
    die "apt-get install failed for: ${missing[*]}"
}

need_build_packages() {
  need_packages g++ cmake ninja-build ccache git pkgconf python3 libcli11-dev libfmt-dev nlohmann-json3-dev libgtest-dev
}

# A virtual environment inside the build folder with the Python packages of both requirements files. The ones for
# scripts/ are installed without their dependencies, which the scripts do not use and which are large.
need_python() {
  local wanted stamp=$build_folder/venv/.installed
  python3 -c 'import ensurepip, venv' 2>/dev/null || need_packages python3 python3-venv
  wanted=$(cat "$root/tests/requirements.txt" "$root/scripts/requirements.txt" | cksum)
  if [ -x "$python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    say "python: build/venv is up to date"
    return
  fi
  say "python: making build/venv (downloads about 150 MB)"
  mkdir -p "$build_folder"
  python3 -m venv "$build_folder/venv" || die "python3 -m venv failed; install python3-venv"
  "$python" -m pip install -q -r "$root/tests/requirements.txt" || die "pip failed on tests/requirements.txt"
  "$python" -m pip install -q --no-deps -r "$root/scripts/requirements.txt" ||
    die "pip failed on scripts/requirements.txt"
  printf '%s' "$wanted" >"$stamp"
}

# Whether a GPU of compute capability 10 or more is in this machine.
has_blackwell_gpu() {
  nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -qE '^1[0-9]'
}

# configure PRESET [CMAKE OPTION...]
configure() {
  local preset=$1 log=$build_folder/$1.log
  shift
  mkdir -p "$build_folder"
  (cd "$root" && cmake --preset "$preset" -DFOURFOLD_TEST_PYTHON="$python" "$@") >"$log" 2>&1 ||
    { cat "$log" >&2; die "cmake --preset $preset failed"; }
}

# build PRESET [TARGET [CMAKE OPTION...]]: configures and builds, quietly unless something is wrong.
build() {
  local preset=$1 target=${2:-all} log=$build_folder/$1.log
  shift $(($# < 2 ? $# : 2))
  say "building preset $preset, target $target (log: build/$preset.log)"
  configure "$preset" "$@"
  grep -E '^-- fourfold:' "$log" | sed 's/^-- /    /' || true
  if [ -t 1 ]; then
    (cd "$root" && cmake --build --preset "$preset" --target "$target") || die "the build failed"
  else
    (cd "$root" && cmake --build --preset "$preset" --target "$target") >>"$log" 2>&1 ||
      { tail -n 60 "$log" >&2; die "the build failed"; }
  fi
}
