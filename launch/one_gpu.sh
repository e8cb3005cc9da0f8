#!/usr/bin/env bash
# osjax generate on one GPU. The first argument is a configuration, the rest its options:
#   launch/one_gpu.sh 256px --ckpt_path BUNDLE --prompt "raining, sea"
set -euo pipefail

config=${1:?usage: launch/one_gpu.sh CONFIG [--key value ...]}
shift
PATH=$(dirname "$0")/../.venv/bin:$PATH

# Variables that are set already are kept.
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
# JAX takes three quarters of the memory by default; nothing else runs on this GPU.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.95}

exec osjax generate "$config" "$@"
