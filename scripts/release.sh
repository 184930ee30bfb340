#!/usr/bin/env bash
# Makes a release of the commit that is checked out: an archive of its source, proved to build and to pass the tests
# of the optimised build without CUDA, and a tag. Pushes nothing.
#
#   scripts/release.sh VERSION [--dry-run]
#
#   VERSION     e.g. 0.1.0: the one of project() in CMakeLists.txt, which CHANGELOG.md describes and dates
#   --dry-run   only check what can be refused; write nothing
#
# Leaves build/release-VERSION/fourfold-VERSION.tar.gz and its .sha256, and the tag vVERSION.
# Exit status: 0 done; 1 refused, or the archive did not build or pass; 2 usage.
set -euo pipefail
source "$(dirname "$0")/environment.sh"

version='' dry_run=''
for argument in "$@"; do
  case $argument in
    --dry-run) dry_run=1 ;;
    --help | -h) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 0 ;;
    [0-9]*) [ -z "$version" ] || { printf 'error: expected one version, found two; see --help\n' >&2; exit 2; }
      version=$argument ;;
    *) printf 'error: unknown argument %s; see --help\n' "$argument" >&2; exit 2 ;;
  esac
done
[[ $version =~ ^[0-9]+\.[0-9]+\.[0-9]+$ ]] ||
  { printf "error: expected a version like 0.1.0, found '%s'; see --help\n" "$version" >&2; exit 2; }

cd "$root"
git rev-parse --git-dir >/dev/null 2>&1 || die "$root: expected a git repository, whose commit is released"

# ---- what can be refused ----

declared=$(sed -n 's/^project(fourfold VERSION \([0-9.]*\).*/\1/p' CMakeLists.txt)
[ "$declared" = "$version" ] ||
  die "CMakeLists.txt: expected project(fourfold VERSION $version), found $declared; change it there, nowhere else"
entry=$(grep -m1 '^## \[' CHANGELOG.md || true)
[[ $entry =~ ^##\ \[$version\]\ -\ [0-9]{4}-[0-9]{2}-[0-9]{2}$ ]] ||
  die "CHANGELOG.md: expected its first entry to be '## [$version] - YYYY-MM-DD', found '${entry:-none}'"
sed "0,/^## \[/d; /^## \[/,\$d" CHANGELOG.md | grep -q '[^[:space:]]' ||
  die "CHANGELOG.md: expected the changes of $version under its entry, found nothing"
changed=$(git status --porcelain)
[ -z "$changed" ] || die "expected a clean tree, since the commit is released and not the files; found: $changed"
if git rev-parse -q --verify "refs/tags/v$version" >/dev/null; then
  die "expected no tag v$version, found one at $(git rev-parse --short "v$version^{commit}"); choose a new version"
fi
commit=$(git rev-parse HEAD)
say "fourfold $version is commit $commit; nothing speaks against it"
if [ -n "$dry_run" ]; then
  say "dry run: would archive it, build and test the archive, and tag it v$version"
  exit 0
fi

# ---- the archive, and the proof that it stands alone ----

folder=$build_folder/release-$version name=fourfold-$version
mkdir -p "$folder"
git archive --format=tar --prefix="$name/" "$commit" | gzip -n -9 >"$folder/$name.tar.gz.part"
unpacked=$(mktemp -d)
trap 'rm -rf "$unpacked" "$folder/$name.tar.gz.part"' EXIT
tar -xzf "$folder/$name.tar.gz.part" -C "$unpacked"
say "building and testing the archive in $unpacked/$name"
(
  source "$unpacked/$name/scripts/environment.sh"  # of the archive: its root is the unpacked folder
  need_build_packages
  need_python
  build cpu
  cd "$root" && ctest --preset cpu --parallel "$(nproc)"
) || die "the archive of $commit does not build and pass; nothing was released"

# ---- done: give it its names ----

mv "$folder/$name.tar.gz.part" "$folder/$name.tar.gz"
(cd "$folder" && sha256sum "$name.tar.gz" >"$name.tar.gz.sha256")
git tag -a "v$version" -m "fourfold $version" "$commit"
say "released: $folder/$name.tar.gz ($(cut -c1-16 "$folder/$name.tar.gz.sha256")...), tag v$version; push it with: git push origin v$version"
