#!/usr/bin/env bash
#SBATCH --job-name=caco-linear
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# A linear evaluation of a run or of weights; EVALUATION=knn or finetune for the others. It saves every 100 steps and
# when it is stopped, so that a job that is requeued, by SLURM or by itself at its end, goes on where it was; a finished
# one says so at once.
#   sbatch slurm/linear.sh runs/caco_r50_200ep --data /data/imagenet/train --val /data/imagenet/val [--fast]
# shellcheck source=slurm/lib.sh
source "${CACO_ROOT:-$SLURM_SUBMIT_DIR}/slurm/lib.sh" || exit 2
evaluate "$@"
