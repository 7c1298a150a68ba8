#!/usr/bin/env bash
# Submit a training script with this site's options, on its own or as a chain; look at it first; or try the cluster.
#
#   slurm/submit.sh NAME [options] [sbatch's options, with =] [-- trainer's flags]
#
#   NAME                        800ep, 200ep, 800ep_multicrop: a script of this folder
#   --nodes N                   on so many nodes
#   --chain array|singleton     where jobs may not requeue: links that follow each other until the run is DONE
#   --links K                   of so many (default 10)
#   --dry-run                   show the script, check it by bash and sbatch, estimate GPU-hours and price; submit nothing
#   --images-per-second X       for the estimate, of all GPUs together (default: what the run has measured so far)
#   --self-test                 the demo on 2 nodes for 5 minutes: is interrupted, must resume and finish
#
#   slurm/submit.sh 800ep --dry-run --images-per-second 12800 -- --data.shards /data/imagenet/train
set -uo pipefail
CACO_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export CACO_ROOT
# shellcheck source=slurm/lib.sh
source "$CACO_ROOT/slurm/lib.sh"

usage() { sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

parse() {
  NAME='' NODES='' LINKS=10 KIND='' DRY_RUN='' SELF_TEST='' IMAGES_PER_SECOND='' OPTIONS=() FLAGS=()
  while (($#)); do
    case $1 in
      -h | --help) usage && exit ;;
      --nodes | --chain | --links | --images-per-second) (($# > 1)) || die "$1 needs a value: see slurm/submit.sh --help" ;;&
      --nodes) NODES=$2 && shift ;;
      --nodes=*) NODES=${1#*=} ;;
      --chain) KIND=$2 && shift ;;
      --links) LINKS=$2 && shift ;;
      --images-per-second) IMAGES_PER_SECOND=$2 && shift ;;
      --dry-run) DRY_RUN=yes ;;
      --self-test) SELF_TEST=yes ;;
      --) shift && FLAGS=("$@") && break ;;
      --*=* | --exclusive) one_line "the option" "$1" && OPTIONS+=("$1") ;;
      -*) die "unknown option $1: sbatch's own are given with =, the trainer's after -- (slurm/submit.sh --help)" ;;
      *) [ -z "$NAME" ] || die "two names, $NAME and $1: the trainer's flags come after --" && NAME=$1 ;;
    esac
    shift
  done
  SCRIPT=$CACO_ROOT/slurm/$NAME.sh
  [ -n "$(recipe_of "$SCRIPT")" ] || die "no training script '$NAME': give one of $(names)"
  [[ ${NODES:-1} =~ ^[1-9][0-9]*$ && $LINKS =~ ^[1-9][0-9]*$ ]] || die "--nodes $NODES --links $LINKS: give whole numbers"
  [[ ${KIND:-array} =~ ^(array|singleton)$ ]] || die "--chain $KIND: give array or singleton"
}

# The recipe that a script of this folder trains by default; nothing where it does not train.
# shellcheck disable=SC2016
recipe_of() { sed -n 's/^RECIPE=${RECIPE:-\([a-z0-9_]*\)}$/\1/p' "$1" 2> /dev/null; }

names() {
  local script
  for script in "$CACO_ROOT"/slurm/*.sh; do [ -z "$(recipe_of "$script")" ] || basename "$script" .sh; done | paste -s -d ' '
}

# What is asked of sbatch here, which wins over the site's variables and those over the script's header.
collect_options() {
  local options=("--job-name=caco-$RUN_NAME") numbers=%j
  [ -z "$NODES" ] || options+=("--nodes=$NODES")
  case $KIND in
    array) options+=(--no-requeue "--array=1-$LINKS%1") && numbers=%A_%a ;;
    singleton) options+=(--no-requeue --dependency=singleton) ;;
  esac
  OPTIONS=("${options[@]}" "--output=$RUN_DIR/slurm/job-$numbers.out" "${OPTIONS[@]}")
}

# The script as it is submitted: its own header, then all of that.
render() {
  local name last option
  for name in "${!SBATCH_@}"; do printf '# from the environment: %s=%q\n' "$name" "${!name}"; done > "$RENDERED.env"
  for option in "${OPTIONS[@]}"; do
    [[ $option =~ ^[[:alnum:]_./+=@:,%-]*$ ]] || option=$(printf %q "$option") # sbatch reads these lines as a shell does
    printf '#SBATCH %s\n' "$option"
  done >> "$RENDERED.env"
  # Said in the script, for sbatch may be told (SBATCH_EXPORT, --export) to hand no variables on.
  for name in CACO_ROOT CACO_CHAIN RECIPE RUN_NAME RUN_DIR STRATEGY SITE EXTEND PROCESSES_PER_NODE; do
    [ -z "${!name:-}" ] || printf 'export %s=%q\n' "$name" "${!name}"
  done >> "$RENDERED.env"
  # After the header's last line: of two lines with one option sbatch takes the later one.
  last=$(grep -n '^#SBATCH' "$SCRIPT" | tail -n 1 | cut -d : -f 1)
  sed "${last}r $RENDERED.env" "$SCRIPT" > "$RENDERED"
}

# The number that the job will have of something: header NAME [VARIABLE]
header() {
  local asked
  asked=$(printf '%s\n' "${OPTIONS[@]}" | sed -n "s/^--$1=//p" | tail -n 1)
  [ -n "$asked" ] || [ $# = 1 ] || asked=${!2:-}
  [ -n "$asked" ] || asked=$(sed -n "s/^#SBATCH --$1=//p" "$SCRIPT")
  echo "$asked"
}

dry_run() {
  local gpus nodes
  cat "$RENDERED"
  bash -n "$RENDERED" || die "the script is not valid bash"
  nodes=$(header nodes) gpus=$(header gpus-per-node SBATCH_GPUS_PER_NODE)
  gpus=${gpus##*:} # of h100:8
  [[ $nodes =~ ^[1-9][0-9]*$ && $gpus =~ ^(0|[1-9][0-9]*)$ ]] || die "no estimate for $nodes nodes of $gpus GPUs: give numbers"
  gpus=$((nodes * gpus))
  "${CONTAINER[@]}" python -m caco_scale.doctor.estimate "$RECIPE" "${FLAGS[@]}" --run.dir "$RUN_DIR" --gpus $((gpus > 0 ? gpus : 1)) \
    ${IMAGES_PER_SECOND:+--images-per-second "$IMAGES_PER_SECOND"} ${PRICE_PER_GPU_HOUR:+--price "$PRICE_PER_GPU_HOUR"} ||
    exit $MISTAKE
  sbatch --test-only "${OPTIONS[@]}" "$RENDERED" "${FLAGS[@]}" || die "sbatch refuses the job as it stands"
}

# Prints the number of the (first) job.
submit() {
  local link job first=''
  mkdir -p "$RUN_DIR/slurm" || die "cannot write $RUN_DIR: give another RUNS"
  for ((link = 1; link <= $([ "$KIND" = singleton ] && echo "$LINKS" || echo 1); link++)); do
    job=$(sbatch --parsable "${OPTIONS[@]}" "$RENDERED" "${FLAGS[@]}") || die "sbatch refuses the job"
    first=${first:-$job}
  done
  echo "$first"
}

# Interrupts itself at the first steps; passes when the run has gone on from its checkpoint to its end.
self_test() {
  local job target resumed
  job=$(submit) || exit
  target=$job
  [ "$KIND" != array ] || target=${job}_1
  echo "self-test: job $job trains in $RUN_DIR"
  wait_for "$job" "$RUN_DIR/metrics.jsonl"
  scancel --batch --signal=USR1 "$target"
  wait_for "$job" "$RUN_DIR/DONE"
  resumed=$(sed -n 's/.*"resumed_step": \([0-9]*\),.*/\1/p' "$RUN_DIR/attempts.jsonl" 2> /dev/null | tail -n 1)
  if [ -s "$RUN_DIR/DONE" ] && [ -n "$resumed" ]; then
    echo "self-test passed: interrupted and saved after step $resumed, resumed there, $(cat "$RUN_DIR/DONE")"
    exit 0
  fi
  echo "self-test FAILED: see $RUN_DIR/slurm/ledger.tsv, $RUN_DIR/slurm/*.out and $RUN_DIR/slurm/latest/" >&2
  exit 1
}

# Until the file has something in it, or the job is over.
wait_for() {
  while [ ! -s "$2" ] && [ "$(patiently 13 squeue -h -j "$1" -o %A)" ]; do sleep 1; done
}

parse "$@"
if [ -n "$SELF_TEST" ]; then
  NODES=${NODES:-2} OPTIONS=(--time=5 --signal=B:USR1@60 "${OPTIONS[@]}") FLAGS=(--run.log_every 1 "${FLAGS[@]}")
  RECIPE=${RECIPE:-demo} RUN_NAME=${RUN_NAME:-self-test-$(date +%Y%m%d-%H%M%S)}
fi
RECIPE=${RECIPE:-$(recipe_of "$SCRIPT")}
load_site
name_run
[ -z "$SELF_TEST" ] || [ "$REQUEUE" = yes ] || KIND=${KIND:-array}
[ "$REQUEUE" = yes ] || [ -n "$KIND" ] || say "note: jobs do not requeue here (REQUEUE=no): --chain array goes on where one ends"
for name in RECIPE STRATEGY SITE EXTEND PROCESSES_PER_NODE CACO_CHAIN; do one_line "$name" "${!name:-}"; done
export RECIPE RUN_NAME RUN_DIR CACO_CHAIN=${CACO_CHAIN:-$(date +%s)-$$}
RENDERED=$(mktemp) || die "no room for a temporary file"
trap 'rm -f "$RENDERED" "$RENDERED.env"' EXIT
collect_options
render
if [ -n "$DRY_RUN" ]; then
  dry_run
elif [ -n "$SELF_TEST" ]; then
  self_test
else
  job=$(submit) || exit
  echo "job $job trains in $RUN_DIR: $RUN_DIR/slurm/ledger.tsv, touch $(printf %q "$RUN_DIR/STOP") to end it"
fi
