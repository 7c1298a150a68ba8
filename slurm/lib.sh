# shellcheck shell=bash
# What the job scripts share: sourced by them, never run. The order of a start is `train`, at the end of this file.
#
# No `set -e`: whatever fails, the end must be reached, where it is decided whether the job comes back.
set -uo pipefail
ROOT=${CACO_ROOT:-$SLURM_SUBMIT_DIR}
JOB=${SLURM_JOB_ID:-} # empty in submit.sh, which uses the first part of this file
# The number of an array's last task is that of the whole array: scontrol and squeue would speak of all tasks.
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || JOB=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
RESTART=${SLURM_RESTART_COUNT:-0}
ASKED=     # the signal that reached this shell, if any
STEP_PID=  # of the srun that runs now
BAD_NODES= # that the preflight found, with commas
MISTAKE=2 NO_PROGRESS=42 LEFT_TO_SLURM=143 # exit codes

say() { printf '%s%s\n' "${JOB:+$(date '+%F %T') [$JOB.$RESTART] }" "$*"; }

# A mistake that no requeue fixes: one line, and the job fails.
die() {
  say "error: $*" >&2
  exit $MISTAKE
}

# ---------------------------------------------------------------------------------------------------------------------
# Names and places

# slurm/site.sh (or the file that SITE names): what is particular to this cluster.
load_site() {
  local site=${SITE:-$ROOT/slurm/site.sh} complaint
  CONTAINER=() SRUN_OPTIONS=() MODULES=()
  if [ -e "$site" ]; then
    complaint=$(bash -n "$site" 2>&1) || die "$site is not valid bash: ${complaint%%$'\n'*}"
    # shellcheck source=slurm/site.sh.example
    source "$site" || die "$site fails: its last command must succeed"
  elif [ -n "${SITE:-}" ]; then
    die "SITE=$SITE is not there"
  else
    say "no $site: the environment is taken as it is ($site.example shows what can be set)"
  fi
  : "${RUNS:=$ROOT/runs}" "${REQUEUE:=yes}" "${PREFLIGHT:=yes}" "${SHM_GB:=1}" "${MIN_FREE_GB:=20}"
  : "${MAX_FAILURES:=3}" "${MAX_STARTS_PER_STEP:=20}" "${MAX_STARTS:=1000}" "${CACHE_DIR:=}"
  one_of REQUEUE yes no
  one_of PREFLIGHT yes no
  local name
  for name in MIN_FREE_GB MAX_FAILURES MAX_STARTS_PER_STEP MAX_STARTS; do whole_number "$name" "correct $site"; done
  [[ $SHM_GB =~ ^[0-9]+(\.[0-9]+)?$ ]] || die "SHM_GB is '$SHM_GB', which is no number: correct $site"
  CACHE=()
  [ -z "$CACHE_DIR" ] || CACHE=(--data.cache_dir "$CACHE_DIR")
  local module
  for module in "${MODULES[@]}"; do module load "$module" || die "module load $module fails: correct MODULES in $site"; done
  if [ -n "${VENV:-}" ]; then
    [ -f "$VENV/bin/activate" ] || die "VENV=$VENV has no bin/activate: correct $site, or make it with python3 -m venv"
    # shellcheck disable=SC1091
    source "$VENV/bin/activate"
  fi
}

# Numbers reach bash's arithmetic, which would run what stands in them; names reach #SBATCH lines and the patterns of
# SLURM's file names, where a blank, a quote, a % or a new line would be another thing than a name.
whole_number() { [[ ${!1} =~ ^(0|[1-9][0-9]{0,8})$ ]] || die "$1 is $(printf %q "${!1}"), which is no whole number: ${2:-correct it}"; }

plain_name() {
  [[ ${!1} =~ ^[[:alnum:]_./+=@:,-]*$ && ${!1} != -* ]] ||
    die "$1 is $(printf %q "${!1}"): give a name of letters, digits and . _ - + = @ : , / alone"
}

one_line() { [[ $2 != *[[:cntrl:]]* ]] || die "$1 is $(printf %q "$2"), which has a new line or another control character"; }

# A site variable and the values that it may have.
one_of() {
  local name=$1 value
  shift
  for value; do [ "${!name}" = "$value" ] && return; done
  die "$name is '${!name}': give one of $*"
}

# Where the run lives, by its name and not by the job's number, so that every job of it finds it.
name_run() {
  RUN_NAME=${RUN_NAME:-$(basename "$RECIPE" .yaml)}
  RUN_DIR=${RUN_DIR:-$RUNS/$RUN_NAME}
  [[ $RUN_DIR = /* ]] || RUN_DIR=$ROOT/$RUN_DIR
  plain_name RUN_NAME
  one_line RUN_DIR "$RUN_DIR"
  [[ $RUN_DIR != *%* ]] || die "RUN_DIR is $RUN_DIR: SLURM puts other words for a % in file names, give a place without"
}

# The files of this start.
make_places() {
  LEDGER=$RUN_DIR/slurm/ledger.tsv
  LOGS=$RUN_DIR/slurm/$JOB.$RESTART
  # The jobs that carry one submission on share a count of failures; a submission by hand begins a new one.
  CHAIN=${CACO_CHAIN:-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}
  { mkdir -p "$LOGS" && date > "$LOGS/started"; } 2> /dev/null
  [ -s "$LOGS/started" ] || die "cannot write $LOGS: fix its rights or free its disk, or give another RUNS or RUN_DIR"
  ln -sfn "$(basename "$LOGS")" "$RUN_DIR/slurm/latest"
}

# How the processes find each other, and what they are told of the job.
describe_job() {
  GPUS=${SLURM_GPUS_ON_NODE:-0}
  NODES=$SLURM_NNODES
  [ "$GPUS" != 0 ] || [ -n "${PROCESSES_PER_NODE:-}" ] ||
    die "the job has no GPUs: give sbatch --gpus-per-node=N, or PROCESSES_PER_NODE=1 to train on CPUs"
  : "${PROCESSES_PER_NODE:=$GPUS}"
  whole_number PROCESSES_PER_NODE
  PROCESSES=$((NODES * PROCESSES_PER_NODE))
  [ "$GPUS" != 0 ] || export CUDA_VISIBLE_DEVICES= # said aloud: the CPU is meant
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  # Below the ephemeral range, and new on every start; the one after it is for training.
  MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + RESTART) * 2 % 10000))
  SLURM_JOB_END_TIME=$(job_end)
  export MASTER_ADDR MASTER_PORT SLURM_JOB_END_TIME
  export SLURM_EXPORT_ENV=ALL # to srun's tasks, also where sbatch was told to hand nothing on
  # The launcher kills trainers so many seconds after a SIGTERM; its default of 30 is less than a save may take.
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
  # On a NCCL time-out every rank leaves its last collectives here (torch's flight recorder).
  export TORCH_NCCL_DUMP_ON_TIMEOUT=1 TORCH_FR_BUFFER_SIZE=2000 TORCH_FR_DUMP_TEMP_FILE=$LOGS/flight_
  STEP=(--nodes="$NODES" --ntasks="$NODES" --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}"
    --kill-on-bad-exit=1 --wait=300 "${SRUN_OPTIONS[@]}")
}

# patiently TRIES COMMAND: what it prints when it succeeds. SLURM's controller may be restarting: ten seconds apart.
patiently() {
  local tries=$1 output
  shift
  until output=$("$@" 2> /dev/null); do
    ((--tries > 0)) || return
    sleep 10
  done
  printf '%s\n' "$output"
}

# job_field NAME [TRIES]: one field of what SLURM says of this job; nothing where it does not answer for two minutes,
# which says nothing of the job.
job_field() { patiently "${2:-13}" scontrol show job -o "$JOB" | tr ' ' '\n' | sed -n "s/^$1=//p" | head -n 1; }

# Seconds since 1970 at which the job ends, nothing where it has no end. SLURM 22.05 does not say so itself.
job_end() {
  local end
  end=$(job_field EndTime)
  [ -z "$end" ] || [ "$end" = Unknown ] || date -d "$end" +%s
}

# ---------------------------------------------------------------------------------------------------------------------
# The ledger: a line per start and per end, so that a job that cannot progress stops instead of looping

# time, chain, job.restart, event, step of the newest checkpoint, detail
note() { printf '%s\t%s\t%s\t%s\t%s\t%s\n' "$(date -Is)" "$CHAIN" "$JOB.$RESTART" "$1" "$(newest_step)" "$2" >> "$LEDGER"; }

# The step of the newest complete checkpoint, 0 without one.
newest_step() {
  find "$RUN_DIR/checkpoints" -maxdepth 1 -name 'step_*' ! -name '*.tmp' 2> /dev/null |
    sed 's/.*step_0*//' | sort -n | tail -n 1 | sed 's/^$/0/' | grep . || echo 0
}

# Failures in a row at this step, starts in a row at this step, starts in all, how the last start ended. A start that
# ended because somebody asked is no failure; one that left no end (its node was lost) is.
history_of_chain() {
  awk -F '\t' -v chain="$CHAIN" -v now="$(newest_step)" '
    $2 != chain { next }
    $4 == "start" { if ($5 != step) failures = starts = 0; step = $5; failures++; starts++; all++ }
    $4 == "stopped" || $4 == "terminated" || $4 == "bad-nodes" { if (open) failures-- }
    { open = $4 == "start"; last = $4 }
    END { if (now != step) failures = starts = 0; print failures + 0, starts + 0, all + 0, last == "" ? "none" : last }
  ' "$LEDGER" 2> /dev/null || echo 0 0 0 none
}

# Ends the job where starting again has not helped.
refuse_to_loop() {
  local failures starts why=
  read -r failures starts STARTS LAST_END < <(history_of_chain)
  ((failures < MAX_FAILURES)) || why="$failures starts in a row failed"
  ((starts < MAX_STARTS_PER_STEP)) || why="$starts starts in a row brought no step"
  ((STARTS < MAX_STARTS)) || why="this is start $((STARTS + 1)), more than MAX_STARTS"
  [ -n "$why" ] || return 0
  note "gave-up" "$why"
  say "error: $why at step $(newest_step): see $RUN_DIR/slurm/*/node*.log, fix it and submit again" >&2
  exit $NO_PROGRESS
}

# ---------------------------------------------------------------------------------------------------------------------
# Before a start: everything that can be known before many GPUs are in use

# Nothing to do, or not wanted: exit 0, so that the later links of a chain cost nothing.
leave_if_over() {
  local marker
  if [ -e "$RUN_DIR/DONE" ] && [ -z "${EXTEND:-}" ]; then
    say "$RUN_DIR is DONE: nothing to do (EXTEND=yes trains on, with a larger --optim.epochs or --run.max_steps)"
    exit 0
  fi
  marker=$RUN_DIR/STOP
  [ ! -e "$marker" ] || { say "$marker is there: remove it to train on"; exit 0; }
}

# Two jobs in one run directory would undo each other's work.
refuse_company() {
  local file=$RUN_DIR/slurm/owner other
  other=$(cat "$file" 2> /dev/null)
  if [ -n "$other" ] && [ "$other" != "$JOB" ] && [ "$(squeue -h -j "$other" -t RUNNING -o %A 2> /dev/null)" ]; then
    die "job $other trains in $RUN_DIR: end it (scancel $other), or give this one another RUN_NAME"
  fi
  echo "$JOB" > "$file"
}

# Seconds on one CPU: space, programs, strategy, then the doctor: recipe, flags, shards, batch arithmetic, memory.
check_before_start() {
  local free config=$ROOT/ds_configs/$STRATEGY.yaml line flag
  [ -f "$config" ] || die "STRATEGY=$STRATEGY has no $config: give one of $(strategies)"
  for flag in "${FLAGS[@]}"; do
    case $flag in --run.dir* | --run-dir*) die "$flag: name the run by RUN_NAME, RUNS or RUN_DIR" ;; esac
  done
  free=$(($(df -Pk "$RUN_DIR" | awk 'NR == 2 { print $4 }') / 1000000))
  ((free >= MIN_FREE_GB)) ||
    refuse_start "$free GB free at $RUN_DIR, less than MIN_FREE_GB=$MIN_FREE_GB: free some, or give another RUNS"
  if [ "$LAST_END" = stopped ] && ((RESTART > 0)); then return; fi # it trained a moment ago, as it is
  on_one_node python -m caco_scale.doctor "$RECIPE" "${CACHE[@]}" "${FLAGS[@]}" --run.dir "$RUN_DIR" \
    --processes "$PROCESSES" --strategy "$STRATEGY" > "$LOGS/doctor.log" 2>&1 && return
  if tail -n 1 "$LOGS/doctor.log" | grep -q ': it would train, with '; then # whoever submits may know better
    sed -n 's/^warn /warning: /p' "$LOGS/doctor.log"
    return
  fi
  line=$(grep -m 1 -E '^(FAIL|error:)' "$LOGS/doctor.log" || tail -n 1 "$LOGS/doctor.log")
  refuse_start "${line#error: } (all in $LOGS/doctor.log)"
}

# A mistake at the first start of a submission. Later its storage may only be away for a while: a failed start like
# any other.
refuse_start() {
  ((STARTS > 0)) || die "$1"
  say "error: $1" >&2
  note start "$SLURM_JOB_NODELIST"
  RC=$MISTAKE
  conclude
}

strategies() { (cd "$ROOT/ds_configs" && echo ./*.yaml | sed 's|\./||g; s|\.yaml||g'); }

# A command in the project's environment, here; where that is an image for srun's own containers, in a step.
on_one_node() {
  case "${SRUN_OPTIONS[*]} " in
    *--container-image*) srun --nodes=1 --ntasks=1 "${SRUN_OPTIONS[@]}" "${CONTAINER[@]}" "$@" ;;
    *) "${CONTAINER[@]}" "$@" ;;
  esac
}

# What was started first, to be read years later; a later start from other code says so.
snapshot() {
  local folder=$RUN_DIR/slurm/snapshot code first
  code=$(code_of_start)
  if [ -d "$folder" ]; then
    first=$(cat "$folder/commit")
    [ "$first" = "$code" ] || say "warning: the run began with $first, this start has $code"
    return
  fi
  mkdir -p "$folder"
  echo "$code" > "$folder/commit"
  ! in_checkout || git -C "$ROOT" diff HEAD > "$folder/changes.diff" 2> /dev/null
  printf '%q ' "RECIPE=$RECIPE" "STRATEGY=$STRATEGY" "RUN_DIR=$RUN_DIR" "$0" "${FLAGS[@]}" > "$folder/command"
  cp "$0" "$folder/job.sh"
  cp "$ROOT/ds_configs/$STRATEGY".* "${SITE:-$ROOT/slurm/site.sh}" "$folder" 2> /dev/null
  # shellcheck disable=SC2016
  cp "$RECIPE" "$folder/recipe.yaml" 2> /dev/null || cp "$ROOT/caco_scale/recipes/$RECIPE.yaml" "$folder/recipe.yaml" 2> /dev/null ||
    on_one_node bash -c 'cat "$(python -m caco_scale path "recipes/$1.yaml")"' recipe "$RECIPE" > "$folder/recipe.yaml"
}

# Is ROOT the code itself, or a folder that `caco slurm init` has filled, beside an installed package?
in_checkout() { [ -e "$ROOT/caco_scale/__init__.py" ]; }

# A checkout's commit, or the installed version.
code_of_start() {
  if in_checkout; then
    git -C "$ROOT" rev-parse HEAD
  else
    on_one_node python -c 'import caco_scale; print("caco_scale", caco_scale.__version__)'
  fi 2> /dev/null || echo unknown
}

# Every node looks at itself and at the others; bad ones are left out, and the job comes back without them.
preflight() {
  [ "$PREFLIGHT" = yes ] || return 0
  local log=$LOGS/preflight.log names bad
  names=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -s -d ,) # there is no scontrol in a container
  run_step "$log" "${CONTAINER[@]}" python -m caco_scale.doctor.preflight --gpus "$GPUS" --shm-gb "$SHM_GB" --hosts "$names"
  [ "$RC" != 0 ] || return 0
  bad=$(sed -n 's/^bad node \([^:]*\):.*/\1/p' "$log" | sort -u)
  grep '^bad node' "$log" || grep -m 1 -E '^(no node|error:)' "$log"
  if ((NODES > 1 && $(wc -w <<< "$bad") == NODES)); then
    say "error: no node passes the preflight, so none is left out: fix what it says of them, or SHM_GB" >&2
  else
    BAD_NODES=$(paste -s -d , <<< "$bad")
  fi
  conclude
}

# ---------------------------------------------------------------------------------------------------------------------
# Running, and being told to stop

# SLURM warns of the time limit or a preemption (--signal), or somebody said scancel --batch --signal=USR1.
on_warning() {
  ASKED=${ASKED:-$1}
  say "SIG$1: asking the trainer for its last checkpoint"
}

# SLURM ends the job: scancel, a requeue, the time limit. The steps have their SIGTERM already.
on_term() {
  [ "$ASKED" = TERM ] || [ -z "${LEDGER:-}" ] || note terminated "SIGTERM"
  ASKED=TERM
  say "SIGTERM"
}

# The trainer of this start has stopped in good order.
marked_interrupted() { [ "$RUN_DIR/INTERRUPTED" -nt "$LOGS/started" ]; }

# run_step LOG COMMAND: one process per node; returns when it has ended, its exit code in RC. A start that is asked to
# stop before it trains does not begin to.
run_step() {
  local log=$1
  shift
  [ -z "$ASKED" ] || return
  # srun's tasks ignore what is meant for the trainer, whose own handlers come with Python.
  srun "${STEP[@]}" --output="$log" bash -c 'trap "" USR1 USR2; exec "$@"' step "$@" &
  STEP_PID=$!
  local told=0
  while kill -0 $STEP_PID 2> /dev/null; do
    sleep 2 &
    wait $! # a signal ends it at once
    if [ -n "$ASKED" ]; then
      # Again and again until it has saved: the first may come before there is a trainer to hear it.
      marked_interrupted || ((told++ % 5)) || kill -USR1 $STEP_PID 2> /dev/null
      [ "$ASKED" != TERM ] || [ "$(job_field Reason 1)" != TimeLimit ] || break # nothing will be heard of it
    fi
  done
  if kill -0 $STEP_PID 2> /dev/null; then RC=$LEFT_TO_SLURM; else wait $STEP_PID; RC=$?; fi
}

# The trainer on all nodes, one launcher on each.
launch() {
  local config=$ROOT/ds_configs/$STRATEGY.yaml launcher
  # shellcheck disable=SC2016
  launcher='exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' # its own on every node
  say "step $(newest_step) on $SLURM_JOB_NODELIST: $RECIPE, $STRATEGY, $PROCESSES process(es); logs in $LOGS"
  run_step "$LOGS/node%n.log" "${CONTAINER[@]}" bash -c "$launcher" launcher \
    --config_file "$config" --num_machines "$NODES" --num_processes "$PROCESSES" \
    --main_process_ip "$MASTER_ADDR" --main_process_port $((MASTER_PORT + 1)) \
    -m caco_scale.pretrain "$RECIPE" --run.dir "$RUN_DIR" --run.world_size "$PROCESSES" "${CACHE[@]}" "${FLAGS[@]}"
}

# ---------------------------------------------------------------------------------------------------------------------
# After the end of the step: done, or again, or SLURM's affair

# The trainer has saved; or it was asked to stop and had nothing to save yet, or no time to.
stopped_in_order() {
  marked_interrupted || { [ -n "$ASKED" ] && { ((RC == 0 || RC > 128)) || taken_away; }; }
}

conclude() {
  local how=failed
  ! stopped_in_order || how=stopped
  [ -z "$BAD_NODES" ] || how='bad-nodes'
  # Of this start, not of the end that EXTEND goes beyond; a trainer that finds nothing to do leaves it as it was.
  if [ "$RUN_DIR/DONE" -nt "$LOGS/started" ] || { [ -e "$RUN_DIR/DONE" ] && [ "$how$RC" = failed0 ]; }; then
    note "done" ""
    say "DONE at step $(newest_step)"
    exit 0
  fi
  note $how "rc=$RC asked=${ASKED:-no} $BAD_NODES"
  say "$how at step $(newest_step)"
  [ "$RC" = 0 ] || grep -h -m 1 -E '^(\[rank[0-9]+\]: )?error:' "$LOGS"/node*.log 2> /dev/null | sort -u
  if [ -e "$RUN_DIR/STOP" ]; then
    say "$RUN_DIR/STOP is there: remove it and submit again"
    exit 0
  fi
  come_back $how
}

# SLURM has taken the job away (scancel, an admin's requeue, a node lost): it knows what comes next.
taken_away() {
  local state
  state=$(job_field JobState)
  [ -n "$state" ] && [ "$state" != RUNNING ] && [ "$(job_field Reason)" != TimeLimit ]
}

# Once more where it fails: after the controller answers again.
requeue() { scontrol requeue "$JOB" || { job_field JobState > /dev/null && scontrol requeue "$JOB"; }; }

come_back() {
  if taken_away; then
    say "ended by SLURM, which decides what comes next"
    exit $LEFT_TO_SLURM
  fi
  if [ "$REQUEUE" = no ] || [ "$(job_field Requeue)" = 0 ]; then
    [ -z "$BAD_NODES" ] || leave_out "$BAD_NODES"
    say "no requeue here: the next link of the chain, or the same sbatch, goes on"
    [ "$1" = stopped ]
    exit
  fi
  trap '' TERM # SLURM's, for a requeued job
  requeue || { say "error: scontrol requeue fails: submit again, it resumes" >&2; exit 1; }
  # It is pending now, and this shell has the time until SLURM kills it.
  [ -z "$BAD_NODES" ] || leave_out "$BAD_NODES" "$JOB"
  exit 0
}

# leave_out NODES [JOB]: the job, and what is pending of its chain, will not run there.
leave_out() {
  local job before
  for job in ${2:-} $(squeue -h -u "$(id -un)" -n "$SLURM_JOB_NAME" -t PENDING -o %A | grep -vx "$JOB"); do
    before=$(scontrol show job -o "$job" | sed -n 's/.* ExcNodeList=\([^ (]\+\).*/\1/p' | head -n 1)
    scontrol update JobId="$job" ExcNodeList="${before:+$before,}$1" && say "job $job leaves out $1"
  done
}

# ---------------------------------------------------------------------------------------------------------------------

# train [--flag value ...]: the life of one start. RECIPE and STRATEGY are set; the flags are the trainer's.
train() {
  trap 'on_warning USR1' USR1
  trap 'on_warning USR2' USR2
  trap on_term TERM
  FLAGS=("$@")
  : "${STRATEGY:=zero2}"
  RC=0
  load_site
  cd "$ROOT" || die "no folder $ROOT: submit from where slurm/ is, or set CACO_ROOT"
  name_run
  make_places
  leave_if_over
  describe_job
  refuse_to_loop
  refuse_company
  check_before_start
  snapshot
  note start "$SLURM_JOB_NODELIST"
  preflight
  launch
  conclude
}
