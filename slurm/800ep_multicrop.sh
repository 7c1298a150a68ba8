#!/usr/bin/env bash
#SBATCH --job-name=caco-800ep_multicrop
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# CaCo, ResNet-50, ImageNet-1k, 800 epochs, multi-crop, batch 2,048 (published linear top-1: 75.7%).
#   sbatch slurm/800ep_multicrop.sh --data.shards /data/imagenet/train --data.val_shards /data/imagenet/val
RECIPE=${RECIPE:-caco_r50_800ep_multicrop}
# shellcheck source=slurm/lib.sh
source "${CACO_ROOT:-$SLURM_SUBMIT_DIR}/slurm/lib.sh" || exit 2
train "$@"
