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
load_site
cd "$ROOT" || die "no folder $ROOT: submit from where slurm/ is, or set CACO_ROOT"
(($# > 0)) || die "give a run or a file of weights: sbatch slurm/linear.sh RUN_OR_WEIGHTS --data TRAIN --val VAL"
EVALUATION=${EVALUATION:-linear}
one_of EVALUATION linear knn finetune
LOGS=$RUNS/evaluate/slurm/$JOB.$RESTART
mkdir -p "$LOGS" || die "cannot write $LOGS: give another RUNS"
describe_job
# shellcheck disable=SC2317 # the trap calls it
come_back_later() {
  say "SIGUSR1: the job's end is near"
  [ "$REQUEUE" = no ] || scontrol requeue "$JOB" || say "scontrol requeue fails: submit again, it resumes"
}
trap come_back_later USR1
say "$EVALUATION evaluation of $1 on $SLURM_JOB_NODELIST, $PROCESSES process(es); logs in $LOGS"
# shellcheck disable=SC2016
launcher='trap "" USR1; exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' # its own on every node
srun "${STEP[@]}" --output="$LOGS/node%n.log" "${CONTAINER[@]}" bash -c "$launcher" launcher \
  --config_file "$ROOT/ds_configs/ddp.yaml" --num_machines "$NODES" --num_processes "$PROCESSES" \
  --main_process_ip "$MASTER_ADDR" --main_process_port $((MASTER_PORT + 1)) \
  -m caco_scale.evaluate "$EVALUATION" "$@" --world_size "$PROCESSES" &
STEP_PID=$!
until wait $STEP_PID; RC=$?; ! kill -0 $STEP_PID 2> /dev/null; do :; done # a signal ends a wait, not the step
cat "$LOGS/node0.log"
# One that was stopped has saved and ends with 0, but there is no result: this job is not COMPLETED.
[ "$RC" = 0 ] && grep -q '^stopped by SIG[A-Z0-9]* after step' "$LOGS/node0.log" || exit "$RC"
come_back unfinished
