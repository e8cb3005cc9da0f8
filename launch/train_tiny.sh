#!/usr/bin/env bash
# The embedded tiny model, from nothing to its scores. What was interrupted goes on by the same command.
#   launch/train_tiny.sh              # one GPU
#   launch/train_tiny.sh data=2       # two, half of every batch on each
set -euo pipefail

mesh=${1:-data=1}
PATH=$(dirname "$0")/../.venv/bin:$PATH

osjax train tiny_image --run.mesh "$mesh"
osjax train tiny_vae --ckpt_path runs/tiny_image/bundle --run.mesh "$mesh"
osjax train tiny_flow --ckpt_path runs/tiny_vae/bundle --run.mesh "$mesh"
osjax train tiny_pairs --ckpt_path runs/tiny_flow/bundle --run.mesh "$mesh"
python -m osjax.training.evaluate --ckpt_path runs/tiny_pairs/bundle --out runs/tiny_pairs/scores.json
