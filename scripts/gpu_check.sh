#!/usr/bin/env bash
# Everything that needs a GPU, in one command and some 10 minutes: the GPU tests, layertest (--stress too) and
# gemmtest in all activation formats, compute-sanitizer on small cases, the benchmark's grid, PyTorch's grouped GEMM as
# a control, shapes and routings that no kernel was tuned on, vLLM's kernels as peers, and hardware counters of every
# cell of the grid.
#
#   scripts/gpu_check.sh [--binaries DIR] [--real DIR] [--vllm DIR] [--peers LIST] [--out DIR] [--backend NAME]
#                        [--counters LIST] [--steps LIST]
#
# --binaries DIR  prebuilt by scripts/gpu_bundle.sh (or a build folder); else the project is built here
# --real DIR      a checkpoint of trained weights, as scripts/real_checkpoint.py DIR --layers 15 makes it, for layertest
# --vllm DIR      vLLM's package folder, where its package is not installed (scripts/vllm_peers.py)
# --peers LIST    of marlin,triton_kernels,humming (default: the first two)
# --out DIR       where summary.txt, summary.json, grid.json and the logs go (default: build/gpu_check)
# --backend NAME  default: sm90
# --counters LIST formats of activations whose hardware counters are read, with commas (default: bf16; each takes two to
#                 three minutes)
# --steps LIST    of tests,layertest,grid,control,untuned,peers,sanitizer,counters (default: all, in this order)
#
# Steps that this machine can't run are reported as "not run". Exit code 0 when nothing failed.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

binaries='' real='' vllm='' peers='' out='' backend=sm90 counted=bf16
steps=tests,layertest,grid,control,untuned,peers,sanitizer,counters
while [ $# -gt 0 ]; do
  case $1 in
    --binaries) binaries=${2:?--binaries needs a folder}; shift ;;
    --out) out=${2:?--out needs a folder}; shift ;;
    --backend) backend=${2:?--backend needs a name}; shift ;;
    --steps) steps=${2:?--steps needs a list}; shift ;;
    --real) real=${2:?--real needs a folder}; shift ;;
    --vllm) vllm=${2:?--vllm needs a folder}; shift ;;
    --peers) peers=${2:?--peers needs a list}; shift ;;
    --counters) counted=${2:?--counters needs a list}; shift ;;
    --help | -h) sed -n '2,20s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) printf 'error: unknown option %s; see --help\n' "$1" >&2; exit 2 ;;
  esac
  shift
done

for step in ${steps//,/ }; do
  case $step in
    tests | layertest | grid | control | untuned | peers | sanitizer | counters) ;;
    *) printf 'error: --steps: expected some of tests, layertest, grid, control, untuned, peers, sanitizer and counters, found %s\n' \
      "'$step'" >&2; exit 2 ;;
  esac
done

if [ -z "$binaries" ]; then
  source "$here/environment.sh"
  need_build_packages
  build release
  binaries=$build_folder/release
  out=${out:-$build_folder/gpu_check}
fi
[ -d "$binaries" ] || { printf 'error: --binaries: expected a folder, found none at %s\n' "$binaries" >&2; exit 2; }
out=${out:-gpu_check}
mkdir -p "$out"
binaries=$(cd "$binaries" && pwd) && out=$(cd "$out" && pwd) || exit 2
fourfold=$binaries/fourfold
[ -x "$fourfold" ] || { printf 'error: no fourfold in %s\n' "$binaries" >&2; exit 2; }

shapes=A,B,C
tokens=1,4,16,64,256,1024,4096,8192,16384
formats=(nvfp4 nvfp4x2 fp8 bf16)
families=(deepseek-v3 qwen3-moe qwen2-moe mixtral gpt-oss) # deepseek-v4's shared expert is FP8, which sm90 refuses
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
limit_s=1200 # of the whole script
start_s=$SECONDS
failed=0
: >"$out/summary.txt"
: >"$out/steps.jsonl"

# note STATUS NAME SECONDS DETAIL: one line of the summary. STATUS: passed, failed, skipped, not run.
note() {
  local detail=${4//[$'\n\r\t']/ }
  printf '%-8s %-34s %5ss  %s\n' "$1" "$2" "$3" "$detail" | tee -a "$out/summary.txt"
  detail=${detail//\\/\\\\} detail=${detail//\"/\\\"}
  printf '{"status": "%s", "step": "%s", "seconds": %s, "detail": "%s"}\n' "$1" "$2" "$3" "$detail" >>"$out/steps.jsonl"
  [ "$1" != failed ] || failed=1
}

# log_of NAME: the file of attempt's log.
log_of() {
  printf '%s\n' "$out/${1//[^a-zA-Z0-9]/_}.log"
}

# show NAME: the log of an attempt, if it came to one.
show() {
  local log
  log=$(log_of "$1")
  [ ! -f "$log" ] || cat "$log"
}

# attempt NAME LIMIT_S COMMAND...: runs it with a log of its own. 77 is a skip.
attempt() {
  local name=$1 most=$2 log begin=$SECONDS left code last
  shift 2
  log=$(log_of "$name")
  rm -f "$log"
  left=$((limit_s - (SECONDS - start_s)))
  if [ "$left" -lt 5 ]; then
    note 'not run' "$name" 0 "the $limit_s s of the whole run are over"
    return 1
  fi
  [ "$most" -le "$left" ] || most=$left
  timeout "$most" "$@" </dev/null >"$log" 2>&1
  code=$?
  last=$(grep -v '^[[:space:]]*$' "$log" | tail -n 1 | cut -c 1-160)
  case $code in
    0) note passed "$name" $((SECONDS - begin)) "$last" ;;
    77) note skipped "$name" $((SECONDS - begin)) "$last" ;;
    124) note failed "$name" $((SECONDS - begin)) "stopped after $most s" ;;
    *) note failed "$name" $((SECONDS - begin)) "exit code $code: $last" ;;
  esac
  return "$code"
}

# cuBLAS for the ceiling, where CUDA's own folders or PyTorch's have it and the loader does not know.
find_cublas() {
  local folder
  ldconfig -p 2>/dev/null | grep -q 'libcublas.so.1[23]' && return
  for folder in /usr/local/cuda/lib64 "$(python3 -c 'import nvidia.cu13, os; print(os.path.join(list(nvidia.cu13.__path__)[0], "lib"))' 2>/dev/null)" \
    "$(python3 -c 'import nvidia.cublas, os; print(os.path.join(list(nvidia.cublas.__path__)[0], "lib"))' 2>/dev/null)"; do
    if compgen -G "$folder/libcublas.so.1[23]" >/dev/null; then
      export LD_LIBRARY_PATH=$folder${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
      return
    fi
  done
}

run_tests() {
  local test
  while read -r test; do
    attempt "test $test" 180 "$binaries/tests/$test"
  done <"$binaries/gpu_tests.txt"
}

# A checkpoint small enough for the reference, with experts that get no token and a ragged H and I.
make_checkpoint() {
  [ -d "$scratch/checkpoint" ] && return
  "$fourfold" synthesize "$scratch/checkpoint" --shape 12,416,336,3 --original bf16 --tokens 96 --seed 4 >/dev/null 2>&1
}

# Few tokens, many experts, H and I multiples of 64: both GEMMs in one kernel.
make_fused_checkpoint() {
  [ -d "$scratch/fused" ] && return
  "$fourfold" synthesize "$scratch/fused" --shape 48,320,192,4 --original bf16 --tokens 400 --seed 6 >/dev/null 2>&1
}

fused_layertest() {
  printf '%s\n' "$fourfold" layertest --backend "$backend" --original "$scratch/fused/original" \
    --nvfp4 "$scratch/fused/nvfp4" --input "$scratch/fused/inputs.safetensors" --tokens 12 "$@"
}

layertest() {
  printf '%s\n' "$fourfold" layertest --backend "$backend" --original "$scratch/checkpoint/original" \
    --nvfp4 "$scratch/checkpoint/nvfp4" --input "$scratch/checkpoint/inputs.safetensors" "$@"
}

run_layertest() {
  local format family command
  make_checkpoint
  for format in "${formats[@]}"; do
    mapfile -t command < <(layertest --activations "$format")
    attempt "layertest $format" 60 "${command[@]}"
  done
  make_fused_checkpoint
  for format in nvfp4 bf16; do
    mapfile -t command < <(fused_layertest --activations "$format")
    attempt "layertest fused $format" 60 "${command[@]}"
  done
  mapfile -t command < <(layertest --activations nvfp4 --activation-scale dynamic-token)
  attempt 'layertest nvfp4 dynamic-token' 60 "${command[@]}"
  for family in "${families[@]}"; do
    "$fourfold" synthesize "$scratch/$family" --family "$family" --shape 16,256,128,4 >/dev/null 2>&1
    attempt "layertest $family" 60 "$fourfold" layertest --backend "$backend" --original "$scratch/$family/original" \
      --nvfp4 "$scratch/$family/nvfp4" --input "$scratch/$family/inputs.safetensors"
  done
  for format in "${formats[@]}"; do
    if [ -z "$real" ]; then
      note 'not run' "layertest real $format" 0 'no --real'
    else
      attempt "layertest real $format" 60 "$fourfold" layertest --backend "$backend" --original "$real/original" \
        --nvfp4 "$real/nvfp4" --layer 15 --input "$real/inputs.safetensors" --activations "$format"
    fi
  done
  for format in "${formats[@]}"; do
    attempt "stress $format" 60 "$fourfold" layertest --stress --backend "$backend" --activations "$format"
  done
  attempt gemmtest 60 "$fourfold" gemmtest --backend "$backend"
}

run_grid() {
  attempt grid 240 "$fourfold" bench --backend "$backend" --shape "$shapes" --tokens "$tokens" \
    --activations bf16,nvfp4 --min-time 0.25 --json "$out/grid.json"
  show grid
}

# Three shapes and three routings beside those of the grid: their fractions of the floor should be the neighbours'.
run_untuned() {
  local few=1,16,256,1024,4096 routing
  attempt 'untuned shapes' 120 "$fourfold" bench --backend "$backend" --tokens "$few" --activations bf16,nvfp4 \
    --shape deepseek-v4-pro,qwen3-235b-a22b,mixtral-8x7b --min-time 0.1 --json "$out/untuned.json"
  show 'untuned shapes'
  for routing in zipf one-expert sequences; do
    attempt "routing $routing" 60 "$fourfold" bench --backend "$backend" --tokens "$few" --activations bf16,nvfp4 \
      --shape "$shapes" --routing "$routing" --min-time 0.1 --json "$out/$routing.json"
    show "routing $routing"
  done
}

run_control() {
  if ! python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
    note 'not run' 'torch grouped_mm' 0 'no PyTorch with CUDA on this machine'
    return
  fi
  attempt 'torch grouped_mm' 150 python3 "$here/torch_grouped.py" --shape "$shapes" --tokens "$tokens" \
    --json "$out/control.json" --beside "$out/grid.json"
  show 'torch grouped_mm'
}

run_peers() {
  if ! python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
    note 'not run' "vLLM's kernels" 0 'no PyTorch with CUDA on this machine'
    return
  fi
  rm -f "$out/peers.json" # an older run's
  attempt "vLLM's kernels" 240 python3 "$here/vllm_peers.py" --shape "$shapes" --tokens "$tokens" \
    --json "$out/peers.json" --beside "$out/grid.json" ${vllm:+--vllm "$vllm"} ${peers:+--peers "$peers"}
  show "vLLM's kernels"
}

run_counters() {
  local ncu
  local -a counted_formats
  IFS=, read -ra counted_formats <<<"$counted"
  ncu=$(command -v ncu || ls /usr/local/cuda/bin/ncu 2>/dev/null)
  if [ -z "$ncu" ]; then
    note 'not run' counters 0 'ncu (Nsight Compute) is not on the PATH nor in /usr/local/cuda/bin'
    return
  fi
  rm -f "$out/counters.json" # an older run's
  attempt counters $((180 * ${#counted_formats[@]})) python3 "$here/gpu_counters.py" --fourfold "$fourfold" --ncu "$ncu" --backend "$backend" \
    --activations "$counted" --json "$out/counters.json" {A,B,C}:{1,4,16,64,256,1024,4096,8192,16384}
  show counters
}

run_sanitizer() {
  local sanitizer tool command format cases
  sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
  if [ -z "$sanitizer" ]; then
    note 'not run' compute-sanitizer 0 'it is not on the PATH nor in /usr/local/cuda/bin'
    return
  fi
  make_checkpoint
  make_fused_checkpoint
  for tool in memcheck racecheck initcheck synccheck; do
    mapfile -t command < <(layertest --activations nvfp4 --tokens 24)
    attempt "$tool layertest nvfp4" 60 "$sanitizer" --tool "$tool" --error-exitcode 99 "${command[@]}"
    mapfile -t command < <(layertest --activations bf16 --tokens 24)
    attempt "$tool layertest bf16" 60 "$sanitizer" --tool "$tool" --error-exitcode 99 "${command[@]}"
    for format in nvfp4 bf16; do
      mapfile -t command < <(fused_layertest --activations "$format")
      attempt "$tool layertest fused $format" 60 "$sanitizer" --tool "$tool" --error-exitcode 99 "${command[@]}"
    done
    attempt "$tool gemmtest" 60 "$sanitizer" --tool "$tool" --error-exitcode 99 \
      "$fourfold" gemmtest --backend "$backend" --shape 3,70,80,144
    # Every kernel of the table of shapes, which so few tokens do not reach through a layer. Hazards in shared memory
    # are a kernel's own: they need no case with thousands of tiles, which racecheck takes minutes for.
    cases=small
    [ "$tool" != racecheck ] || cases=forced
    [ ! -x "$binaries/tests/sm90_gemm_test" ] || attempt "$tool sm90_gemm_test" 120 "$sanitizer" --tool "$tool" \
      --error-exitcode 99 "$binaries/tests/sm90_gemm_test" "$RANDOM" "$cases"
    # The stages around Blackwell's GEMMs, and its kernel with the multiply emulated.
    [ ! -x "$binaries/tests/blackwell_stages_test" ] || attempt "$tool blackwell_stages_test" 60 "$sanitizer" \
      --tool "$tool" --error-exitcode 99 "$binaries/tests/blackwell_stages_test" --gtest_filter='*Every*:*Sums*'
    [ "$tool" != memcheck ] || [ ! -x "$binaries/tests/blackwell_emulated_test" ] ||
      attempt "$tool blackwell_emulated_test" 60 "$sanitizer" --tool "$tool" --error-exitcode 99 \
        "$binaries/tests/blackwell_emulated_test" --gtest_filter='*IsSoundForEveryRouting'
  done
}

# Which steps this machine can do at all.
why_not=''
"$fourfold" --version >"$out/version.log" 2>&1 || why_not="fourfold does not run here: $(tail -n 1 "$out/version.log")"
if [ -z "$why_not" ]; then
  line=$(grep -E "^  $backend " "$out/version.log") || why_not="this build has no backend $backend"
  [[ ${line:-} != *'not here:'* ]] || why_not=${line#*not here: }
fi
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader >"$out/gpu.txt" 2>/dev/null || : >"$out/gpu.txt"
printf 'fourfold on %s\n' "$(head -n 1 "$out/gpu.txt" | grep . || echo 'a machine without nvidia-smi')" | tee -a "$out/summary.txt"
find_cublas

for step in ${steps//,/ }; do
  case $step in
    tests) run_tests ;;
    control) run_control ;;
    peers) run_peers ;;
    layertest | grid | untuned | sanitizer | counters)
      if [ -n "$why_not" ]; then note 'not run' "$step" 0 "$why_not"; else "run_$step"; fi ;;
  esac
done

{
  printf '{"gpu": "%s", "seconds": %d, "failed": %s, "steps": [\n' "$(head -n 1 "$out/gpu.txt")" $((SECONDS - start_s)) \
    "$([ $failed = 1 ] && echo true || echo false)"
  sed '$!s/$/,/' "$out/steps.jsonl"
  printf ']}\n'
} >"$out/summary.json"
rm -f "$out/steps.jsonl"
printf '%s in %s s; summary.txt, summary.json, grid.json and logs are in %s\n' \
  "$([ $failed = 1 ] && echo FAILED || echo 'nothing failed')" $((SECONDS - start_s)) "$out" | tee -a "$out/summary.txt"
exit $failed
