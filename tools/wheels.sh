#!/usr/bin/env bash
# The GPU set for a machine without network: collected where there is one, moved in parts where a transfer has a limit.
#
#   tools/wheels.sh collect DIR       download the wheels, build what has none; installs torch; Python 3.12, Linux x86_64, gcc
#   tools/wheels.sh split DIR MIB     cut what is larger than MIB into parts of that size; checksums of the whole into DIR/SHA256SUMS
#   tools/wheels.sh join DIR          put the parts together again and check every file
#   tools/wheels.sh install DIR       join, then install what is there without network and without resolving
#
# PYTHON chooses the interpreter. Building needs nvcc (CUDA_HOME, default /usr/local/cuda) and takes some minutes; without nvcc its source
# is collected instead, and `install` builds it there.
set -euo pipefail
PYTHON=${PYTHON:-python3}
say() { printf '[wheels] %s\n' "$*"; }
fail() { printf 'error: tools/wheels.sh: %s\n' "$*" >&2; exit 2; }
pip() { "$PYTHON" -m pip --disable-pip-version-check "$@"; }

# the set whose versions go together; docs/gpu.md has the table
TORCH=2.13.0 CORE=0.19.2 ENGINE=2.12.0 VLLM=0.32.0 CUDA=cu13

# build_engine SOURCE DIR: transformer-engine's part for the torch that is installed, for Hopper unless NVTE_CUDA_ARCHS says otherwise
build_engine() {
  local site
  site=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia
  export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda} NVTE_FRAMEWORK=pytorch NVTE_CUDA_ARCHS=${NVTE_CUDA_ARCHS:-90}
  export CPLUS_INCLUDE_PATH=$site/cudnn/include:$site/nccl/include:$site/$CUDA/include C_INCLUDE_PATH=$site/cudnn/include:$site/nccl/include:$site/$CUDA/include
  # a wheel that pip kept may be for another torch
  pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir "$2" "$1"
}

collect() {
  local nvcc=${CUDA_HOME:-/usr/local/cuda}/bin/nvcc stand_in
  # three of reasoning-gym's have no wheel on the index and become one here; the line after them is what transformer-engine-torch imports
  pip wheel --wheel-dir "$1" --only-binary=:all: --no-binary=cellpylib,pycosat,zss \
    "torch==$TORCH" "vllm==$VLLM" "megatron-core==$CORE" "transformer-engine==$ENGINE" "transformer-engine-$CUDA==$ENGINE" \
    einops onnx onnxscript nvdlfw-inspect pybind11 ninja packaging setuptools wheel psutil \
    datasets httpx math-verify numpy pydantic reasoning-gym rich safetensors tensorboard transformers
  pip install --no-index --find-links "$1" "torch==$TORCH" pybind11 ninja packaging setuptools wheel
  if [ -x "$nvcc" ]; then
    build_engine "transformer-engine-torch==$ENGINE" "$1"
  else
    say "no $nvcc: the source of transformer-engine-torch is collected, to be built where it is installed"
    # pip asks a source for its metadata, for which this one asks nvcc for its version and no more
    stand_in=$(mktemp -d)
    mkdir "$stand_in/bin"
    printf '#!/bin/sh\necho release 13.0\n' >"$stand_in/bin/nvcc"
    chmod +x "$stand_in/bin/nvcc"
    CUDA_HOME=$stand_in pip download --dest "$1" --no-deps --no-build-isolation --no-binary=transformer-engine-torch \
      "transformer-engine-torch==$ENGINE"
    rm -r "$stand_in"
  fi
  say "$(find "$1" -type f | wc -l) files, $(du -sm "$1" | cut -f1) MiB"
}

split_files() {
  [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || fail "split DIR MIB: MIB = '${2:-}' is not a number of MiB"
  local sums
  cd "$1"
  sums=$(find . -maxdepth 1 -type f ! -name SHA256SUMS ! -name '*.part-*' -printf '%f\n' | sort | xargs -d '\n' -r sha256sum --)
  printf '%s\n' "$sums" >SHA256SUMS
  find . -maxdepth 1 -type f -size +"$(($2 << 20))"c ! -name '*.part-*' -printf '%f\n' | while read -r file; do
    split --bytes="$2M" --numeric-suffixes --suffix-length=3 -- "$file" "$file.part-"
    rm -- "$file"
    say "$file: $(find . -maxdepth 1 -name "$file.part-*" | wc -l) parts"
  done
}

join_files() {
  cd "$1"
  find . -maxdepth 1 -name '*.part-000' -printf '%f\n' | while read -r first; do
    cat -- "${first%.part-000}".part-* >"${first%.part-000}"
    rm -- "${first%.part-000}".part-*
  done
  [ -f SHA256SUMS ] || return 0
  sha256sum --check --quiet SHA256SUMS >&2 || fail "$1: a file is damaged or a part is missing; copy what is named above again"
}

install() {
  (join_files "$1")
  find "$1" -maxdepth 1 -name '*.whl' -print0 | xargs -0 -r "$PYTHON" -m pip --disable-pip-version-check install --no-index --no-deps
  find "$1" -maxdepth 1 -name 'transformer_engine_torch-*.tar.gz' | while read -r source; do
    build_engine "$source" "$1"
    pip install --no-index --no-deps "$1"/transformer_engine_torch-*.whl
  done
  say "installed; now: $PYTHON -m megatron_r1 doctor"
}

[ $# -ge 2 ] || fail "use: collect DIR | split DIR MIB | join DIR | install DIR"
mkdir -p "$2"
case $1 in
  collect) collect "$2" ;;
  split) split_files "$2" "${3:-}" ;;
  join) join_files "$2" ;;
  install) install "$2" ;;
  *) fail "'$1' is none of collect, split, join, install" ;;
esac
