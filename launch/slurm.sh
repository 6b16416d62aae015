#!/usr/bin/env bash
# One jaxrlhf command over the nodes of a Slurm job, a process a GPU (or a node without any): JAX finds its peers by
# Slurm's environment, and gives each process of a node a GPU of its own.
#
#   sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 launch/slurm.sh run --config=configs/tldr.py:llama-7b --workdir=/shared/tldr
#   launch/slurm.sh --dry-run run --config=…      prints the command that a job would run, and runs nothing
#
# Two minutes before the time limit, and where a partition gives preempted jobs a GraceTime, a job gets SIGTERM: it saves
# within a step and is queued again, into the same workdir. So is one that loses a node.
# Environment: JAXRLHF_VENV, the virtual environment (default .venv of this checkout).
#SBATCH --job-name=jaxrlhf
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
set -euo pipefail

dry=""
if [ "${1:-}" = --dry-run ]; then
  dry=1
  shift
fi
if [ $# -eq 0 ]; then
  printf 'error: the jaxrlhf command is missing, for example run --config=configs/tldr.py --workdir=/shared/tldr\n' >&2
  exit 2
fi
# Slurm runs a copy of this script from its spool; the job's own directory is where sbatch was called.
checkout=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}
line=(srun --kill-on-bad-exit=1 --label "${JAXRLHF_VENV:-$checkout/.venv}/bin/jaxrlhf" "$@")
if [ -n "$dry" ]; then
  printf 'JAXRLHF_RESTARTS=1 '
  printf '%q ' "${line[@]}"
  printf '\n'
  exit
fi
cd "$checkout"
export JAXRLHF_RESTARTS=1 # a command that was stopped and saved ends with status 75
trap : TERM               # the tasks hear it themselves
status=0
"${line[@]}" || status=$?
[ "$status" != 75 ] || scontrol requeue "$SLURM_JOB_ID"
exit "$status"
