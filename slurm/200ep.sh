#!/usr/bin/env bash
#SBATCH --job-name=caco-200ep
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# CaCo, ResNet-50, ImageNet-1k, 200 epochs, batch 1,024 (published linear top-1: 71.3%).
#   sbatch slurm/200ep.sh --data.shards /data/imagenet/train --data.val_shards /data/imagenet/val
RECIPE=${RECIPE:-caco_r50_200ep}
# shellcheck source=slurm/lib.sh
source "${CACO_ROOT:-$SLURM_SUBMIT_DIR}/slurm/lib.sh" || exit 2
train "$@"
