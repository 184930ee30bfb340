#!/usr/bin/env bash
# The Python package on a fresh machine: pip installs it from this folder into a virtual environment of its own
# (build/python-test), then pytest runs, and mypy checks the package, its tests and the example.
#
#   python/tests/run.sh [--torch]    --torch: with PyTorch and transformers (a large download), whose tests are skipped else
#
# CUDA code is left out, since nothing here runs it: the package for a GPU is `pip install .`.
set -euo pipefail
source "$(dirname "$0")/../../scripts/environment.sh"

extras='' venv=$build_folder/python-test
case ${1:-} in
  '') ;;
  --torch) extras='[transformers]' ;;
  --help | -h) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 0 ;;
  *) printf 'error: unknown option %s; see --help\n' "$1" >&2; exit 2 ;;
esac

need_build_packages
python3 -c 'import ensurepip, venv' 2>/dev/null || need_packages python3 python3-venv
[ -x "$venv/bin/python" ] || python3 -m venv "$venv" || die "python3 -m venv failed; install python3-venv"
# As the other builds call it: what they have compiled is in the compiler cache.
export CXX=${CXX:-c++}
say "python: installing the package into build/python-test (log: build/python-test.log)"
{
  "$venv/bin/python" -m pip install -q 'pytest>=7' 'mypy>=1.10'
  "$venv/bin/python" -m pip install -q --no-deps -r "$root/scripts/requirements.txt"  # for scripts/evaluate.py
  # A folder is built and installed again, also where the version is the same.
  "$venv/bin/python" -m pip install -q "$root$extras" -C cmake.define.FOURFOLD_CUDA=OFF
} >"$build_folder/python-test.log" 2>&1 || { tail -n 40 "$build_folder/python-test.log" >&2; die "pip install failed"; }
say "python: tests"
(cd "$root" && OMP_WAIT_POLICY=passive "$venv/bin/python" -m pytest -q -p no:cacheprovider python/tests)
say "python: types"
(cd "$root" && "$venv/bin/python" -m mypy --cache-dir "$build_folder/mypy")
say "python: the stub against the module"
"$venv/bin/python" -m mypy.stubtest fourfold._native --mypy-config-file "$root/pyproject.toml" --ignore-disjoint-bases \
  --allowlist "$root/python/tests/stubtest_allowlist.txt"
