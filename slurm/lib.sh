# shellcheck shell=bash
# What the job scripts share: sourced by them, never run. It reads the site file and checks the names; then job.py goes on.
set -uo pipefail
ROOT=${CACO_ROOT:-$SLURM_SUBMIT_DIR}
JOB=${SLURM_JOB_ID:-} # empty in submit.sh, which uses the first part of this file
# The number of an array's last task is that of the whole array: scontrol and squeue would speak of all tasks.
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || JOB=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
RESTART=${SLURM_RESTART_COUNT:-0}
MISTAKE=2 # exit code

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

# ---------------------------------------------------------------------------------------------------------------------
# From here on job.py, in this very process, which SLURM sends its signals to

# train [--flag value ...]: the life of one start. RECIPE is set; the flags are the trainer's.
train() { go_on_as train "$@"; }

# evaluate RUN_OR_WEIGHTS [--flag value ...]
evaluate() { go_on_as evaluate "$@"; }

go_on_as() {
  export CACO_ASKED='' CACO_SCRIPT=$0 CACO_ROOT=$ROOT # the first signal before job.py can hear one
  trap 'CACO_ASKED=${CACO_ASKED:-USR1}' USR1
  trap 'CACO_ASKED=${CACO_ASKED:-USR2}' USR2
  trap 'CACO_ASKED=TERM' TERM
  : "${STRATEGY:=zero2}" "${EXTEND:=}"
  load_site
  cd "$ROOT" || die "no folder $ROOT: submit from where slurm/ is, or set CACO_ROOT"
  if [ "$1" = train ]; then
    name_run
    export RECIPE STRATEGY RUN_NAME RUN_DIR EXTEND
  else
    (($# > 1)) || die "give a run or a file of weights: sbatch slurm/linear.sh RUN_OR_WEIGHTS --data TRAIN --val VAL"
    EVALUATION=${EVALUATION:-linear}
    one_of EVALUATION linear knn finetune
    export EVALUATION
  fi
  export RUNS REQUEUE PREFLIGHT SHM_GB MIN_FREE_GB MAX_FAILURES MAX_STARTS_PER_STEP MAX_STARTS CACHE_DIR
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 6))' 2> /dev/null ||
    die "no python3 of 3.6 or later on $(hostname), which runs slurm/job.py: load it by MODULES, or set VENV"
  trap '' USR1 USR2 TERM # until job.py holds them back
  exec python3 "$ROOT/slurm/job.py" "$1" "${#CONTAINER[@]}" "${CONTAINER[@]}" "${#SRUN_OPTIONS[@]}" "${SRUN_OPTIONS[@]}" "${@:2}"
}
