#!/usr/bin/env bash
# clang-tidy with the checks of .clang-tidy over the C++ sources, as preset cpu compiles them. It finds nothing, or it
# prints what it found.
#
#   scripts/tidy.sh [--changed] [--jobs N] [TEXT ...]
#
#     --changed   files that differ from main: committed or not, and every file that includes a changed header
#     --jobs N    so many at a time (default: the number of cores)
#     TEXT        files whose path holds one of these: src/numeric, quantize
#
# CUDA sources are not among them. Exit status: 0 nothing found, 1 findings or an error, 2 usage.
set -euo pipefail
source "$(dirname "$0")/environment.sh"

clang_version=19  # older ones do not parse the sources; other versions have other checks
usage() { printf 'error: %s; see --help\n' "$*" >&2; exit 2; }

changed=0 jobs=$(nproc) texts=()
while [ $# -gt 0 ]; do
  case $1 in
    --changed) changed=1 ;;
    --jobs) [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || usage "--jobs needs a number above 0, found '${2:-}'"; jobs=$2; shift ;;
    --help | -h) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 0 ;;
    -*) usage "unknown option $1" ;;
    *) texts+=("$1") ;;
  esac
  shift
done

need_build_packages
need_packages "clang-tidy-$clang_version" "libomp-$clang_version-dev"
tidy=clang-tidy-$clang_version
command -v "$tidy" >/dev/null || die "no $tidy on the PATH"
mkdir -p "$build_folder"
# A folder of its own: here every file is a translation unit.
(cd "$root" && cmake --preset cpu -B "$build_folder/tidy" -DFOURFOLD_UNITY=OFF) >"$build_folder/tidy.log" 2>&1 ||
  { cat "$build_folder/tidy.log" >&2; die "cmake --preset cpu failed"; }
cd "$root"

# The sources that preset cpu compiles, relative to the root.
mapfile -t files < <(python3 - "$build_folder/tidy/compile_commands.json" "$root/" <<'END'
import json, sys
with open(sys.argv[1], encoding="utf-8") as commands:
    files = {command["file"] for command in json.load(commands)}
print("\n".join(sorted(file.removeprefix(sys.argv[2]) for file in files if file.startswith(sys.argv[2] + "src")
                       or file.startswith(sys.argv[2] + "tests"))))
END
)

# Keeps of `files` those of which function $1 holds.
keep() {
  local kept=() file
  for file in "${files[@]}"; do
    if "$1" "$file"; then kept+=("$file"); fi
  done
  files=(${kept[@]+"${kept[@]}"})
}

holds_a_text() {
  local text
  for text in "${texts[@]}"; do
    [[ $1 == *"$text"* ]] && return 0
  done
  return 1
}

# A changed source, or one that includes a changed header, however far away: the compiler says what it includes.
is_concerned() {
  local path
  [ -n "${is_changed[$1]:-}" ] && return 0
  [ "$headers_changed" = 1 ] || return 1
  while read -r path; do
    [ -n "${is_changed[$path]:-}" ] && return 0
  done < <(g++ -std=c++20 -MM -MG -Iinclude -Isrc -Itests -I. "$1" 2>/dev/null | tr -d '\\' | tr ' ' '\n')
  return 1
}

[ ${#texts[@]} = 0 ] || keep holds_a_text
if [ $changed = 1 ]; then
  base=$(git merge-base HEAD main) || die "--changed needs a branch main"
  declare -A is_changed=()
  headers_changed=0
  while read -r path; do
    is_changed[$path]=1
    case $path in *.h | *.inc) headers_changed=1 ;; esac
  done < <(git diff --name-only "$base"; git ls-files --others --exclude-standard)
  keep is_concerned
fi
if [ ${#files[@]} = 0 ]; then
  [ $changed = 1 ] || usage "no source's path holds ${texts[*]}"
  say "no source is concerned"
  exit 0
fi

say "$tidy: ${#files[@]} files, $jobs at a time"
# Its count of warnings in other people's headers is no news.
printf '%s\0' "${files[@]}" |
  xargs -0 -n 1 -P "$jobs" "$tidy" --quiet -p "$build_folder/tidy" 2> >(grep -v ' warnings\? .*generated\.$' >&2) ||
  die "clang-tidy found something"
say "nothing found"
