#!/usr/bin/env bash
#SBATCH --job-name=paperflows
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@120
#
# Run an experiment as a SLURM job; submit it from the repository's root. Partition, account, time
# and GPUs are flags of sbatch, or its variables (SBATCH_PARTITION, SBATCH_ACCOUNT ...).
#
#   sbatch reproduce/slurm.sh realnvp_cifar10 seed=1
#   sbatch --gpus-per-node=4 --ntasks-per-node=4 --cpus-per-task=8 \
#       reproduce/slurm.sh realnvp_cifar10 preset=gpu
#   sbatch --nodes=2 --gpus-per-node=4 --ntasks-per-node=4 \
#       reproduce/slurm.sh realnvp_cifar10 preset=gpu
#   sbatch --array=0-4 reproduce/slurm.sh realnvp_cifar10            # seeds 0 to 4
#   sbatch --array=0-11 reproduce/slurm.sh realnvp_cifar10 \
#       --grid configs/sweeps/realnvp_cifar10_grid.yaml              # rows 0 to 11 of the grid
#
# The run folder is outputs/<experiment>/slurm-<job> or slurm-<array job>_<index>, or that of
# run_dir=. Two minutes before the time limit, or when it is preempted, the job saves and queues
# itself again; it later continues from there. A cancelled job has saved too: submit the same
# command with run_dir=<its folder> to continue it.
#
# Start one task for each GPU. Every task has to see all GPUs of its node: give --gpus-per-node, not
# --gpus-per-task. PYTHON=... chooses the interpreter; the default is .venv/bin/python if it exists,
# else python.

set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 1
}

# sbatch runs a copy of this file from another folder, so go to where the job was submitted.
[ -n "${SLURM_JOB_ID:-}" ] ||
    fail "this is a job script: sbatch reproduce/slurm.sh ${*:-EXPERIMENT key=value ...}"
cd "$SLURM_SUBMIT_DIR"
if [ ! -f reproduce/slurm.sh ] || [ ! -d configs ]; then
    fail "$PWD is not the repository's root: submit from there, sbatch reproduce/slurm.sh $*"
fi

known=""
for recipe in configs/*.yaml; do
    name=$(basename "$recipe" .yaml)
    if [ -f "reproduce/$name.py" ]; then known+="${known:+, }$name"; fi
done
usage="sbatch reproduce/slurm.sh EXPERIMENT key=value ..., with one of $known"
[ $# -gt 0 ] || fail "no experiment given: $usage"
experiment=$1
shift
[[ ", $known," == *", $experiment,"* ]] ||
    fail "experiment $experiment is not known: give one of $known"

grid=""
words=""
overrides=()
while [ $# -gt 0 ]; do
    case $1 in
        --grid)
            [ $# -gt 1 ] || fail "--grid needs a file"
            grid=$2
            shift
            ;;
        -*)
            fail "$1 is not known: give key=value or --grid FILE;" \
                "sbatch's own flags stand before reproduce/slurm.sh"
            ;;
        *)
            words+=" $1"
            overrides+=("$1")
            ;;
    esac
    shift
done

if [ -n "${PYTHON:-}" ]; then
    python=$PYTHON
elif [ -x .venv/bin/python ]; then
    python=.venv/bin/python
else
    python=python
fi

task=${SLURM_ARRAY_TASK_ID:-}
# One task of an array has the array's number as its SLURM_JOB_ID, by which Slurm's commands mean
# the whole array. So a task is named by the array's number and its index.
id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$task}
id=${id:-$SLURM_JOB_ID}
if [ -n "$task" ] && [[ $words == *" run_dir="* ]]; then
    fail "run_dir= is one folder for all tasks of an array: leave it out, each task makes its own"
elif [ -n "$grid" ]; then
    [ -n "$task" ] ||
        fail "--grid without an array: sbatch --array=0-N, a task for each row of the grid"
    row=$("$python" -m reproduce.grid "$grid" "$task") || exit 1
    mapfile -t -O "${#overrides[@]}" overrides <<<"$row"
elif [ -n "$task" ]; then
    [[ $words != *" seed="* ]] ||
        fail "the index of an array is the seed: leave seed= out, or give a --grid"
    overrides+=("seed=$task")
fi

# The job is named after its experiment, unless the user has named it.
if [ "${SLURM_JOB_NAME:-paperflows}" = paperflows ]; then
    scontrol update "JobId=$id" "JobName=$experiment" 2>/dev/null || true
fi
# So is the step: Lightning does not use Slurm in a job that is called bash or interactive.
export SLURM_JOB_NAME=$experiment
# Since Slurm 22.05 srun does not read --cpus-per-task of sbatch, but this variable.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi

nodes=$SLURM_NNODES tasks=${SLURM_NTASKS_PER_NODE:-1}
all=$((nodes * tasks))
[ "${SLURM_NTASKS:-$all}" -eq "$all" ] ||
    fail "$SLURM_NTASKS tasks on $nodes nodes of $tasks: give --nodes and --ntasks-per-node," \
        "and no --ntasks"
own=("trainer.num_nodes=$nodes" "trainer.devices=$tasks")
[ "$all" -eq 1 ] || own+=(trainer.strategy=ddp)
layout=()
for word in "${own[@]}"; do # a key may not come twice: leave out what the user has given
    [[ $words == *" ${word%%=*}="* ]] || layout+=("$word")
done
[[ $words == *" resume="* ]] || overrides+=(resume=auto)

where="$SLURM_JOB_NODELIST, $tasks a node"
echo "$(date '+%F %T') $experiment, job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}: $where"
code=0
srun --kill-on-bad-exit --nodes="$nodes" --ntasks="$all" --ntasks-per-node="$tasks" \
    "$python" -m "reproduce.$experiment" "${layout[@]+"${layout[@]}"}" "${overrides[@]}" || code=$?
# Slurm queues a preempted job again if the job was still running at the end of its grace time. This
# one has ended before, so it has to ask.
if [ "$code" -ne 0 ] && scontrol show job "$id" | grep "PreemptTime=[0-9]" >/dev/null; then
    scontrol requeue "$id"
fi
exit "$code"
