#!/usr/bin/env bash
# osjax generate on all the GPUs of this machine, or on those of CUDA_VISIBLE_DEVICES: the tokens of each video are
# sharded over them. The first argument is a configuration, the rest its options (a --mesh among them wins):
#   launch/one_host.sh 768px --ckpt_path BUNDLE --prompt "raining, sea"
set -euo pipefail

config=${1:?usage: launch/one_host.sh CONFIG [--key value ...]}
shift
PATH=$(dirname "$0")/../.venv/bin:$PATH

if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
    IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
else
    mapfile -t gpus < <(nvidia-smi --list-gpus)
fi
if ((${#gpus[@]} == 0)); then
    echo "one_host.sh: no GPU found: check nvidia-smi, or run osjax generate on the CPU" >&2
    exit 2
fi

# Variables that are set already are kept. NCCL_NVLS_ENABLE is left to NCCL and to whoever runs the machine: NVLink
# multicast needs a working fabric manager, and where that is missing it must stay off.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# JAX takes three quarters of the memory by default; nothing else runs on these GPUs.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.95}
# The all-to-alls around attention run beside the matrix products where the data allow it.
export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true ${XLA_FLAGS:-}"

exec osjax generate "$config" --mesh "data=1,seq=${#gpus[@]}" "$@"
