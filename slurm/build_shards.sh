#!/usr/bin/env bash
#SBATCH --job-name=caco-shards
#SBATCH --array=1-4
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out
# Images to shards: the tasks of the array share one source, task I of N builds every N-th shard on all its CPUs, and the
# one that ends last checks them all and writes the manifest. Killed or requeued, a task goes on where it was.
#   sbatch [--array=1-16] slurm/build_shards.sh ILSVRC2012_img_train.tar s3://bucket/imagenet/train [data_prep's flags]
# shellcheck source=slurm/lib.sh
source "${CACO_ROOT:-$SLURM_SUBMIT_DIR}/slurm/lib.sh" || exit 2
load_site
cd "$ROOT" || die "no folder $ROOT: submit from where slurm/ is, or set CACO_ROOT"
(($# > 1)) || die "give a source and a destination: sbatch slurm/build_shards.sh SRC DST"
if [ -z "${SLURM_ARRAY_TASK_COUNT:-}" ] || ((SLURM_ARRAY_TASK_MIN != 1 || SLURM_ARRAY_TASK_MAX != SLURM_ARRAY_TASK_COUNT)); then
  die "the array must count from 1: sbatch --array=1-$((${SLURM_ARRAY_TASK_COUNT:-4})) slurm/build_shards.sh SRC DST"
fi
md5=() # of a huge archive: one task is enough to hash it, without whose shards there is no manifest
((SLURM_ARRAY_TASK_ID == 1)) || md5=(--md5 none)
exec "${CONTAINER[@]}" python -m data_prep build "${md5[@]}" "$@" \
  --part "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT" --workers "${SLURM_CPUS_PER_TASK:-1}"
