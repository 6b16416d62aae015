#!/usr/bin/env bash
# One jaxrlhf command on every worker of a Cloud TPU slice: finds or creates it, installs this checkout's last commit, runs,
# follows the log, and after a preemption makes the slice anew and runs the same command again, which goes on from the
# workdir.
#
#   launch/tpu_pod.sh --name=rlhf --zone=us-west4-a --type=v5litepod-64 [--project=P] [--runtime=v2-alpha-tpuv5-lite]
#                     [--queued] [--spot] [--delete] [--tries=20] [--dry-run]
#                     -- run --config=configs/tldr.py:llama-7b --workdir=gs://BUCKET/tldr
#
# --queued asks through a queued resource, --spot for preemptible capacity; --delete gives the slice back at the end.
# --dry-run prints every command and runs none. Needs gcloud, logged in. The workdir must be one that all workers see.
set -euo pipefail

name="" zone="" type="" project="" runtime="v2-alpha-tpuv5-lite" queued="" spot="" delete="" tries=20 dry=""

fail() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

usage() {
  sed -n '2,/^set -/p' "$0" | sed -e '$d' -e 's/^# \{0,1\}//'
}

while [ $# -gt 0 ]; do
  case "$1" in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --tries=*) tries=${1#*=} ;;
    --queued) queued=1 ;;
    --spot) spot=1 ;;
    --delete) delete=1 ;;
    --dry-run) dry=1 ;;
    -h | --help)
      usage
      exit 0
      ;;
    --)
      shift
      break
      ;;
    *) fail "$1: not a flag; the jaxrlhf command comes after --" ;;
  esac
  shift
done
[ -n "$name" ] || fail "--name=NAME is missing: what the slice is called"
[ -n "$zone" ] || fail "--zone=ZONE is missing, for example us-west4-a"
[ -n "$type" ] || fail "--type=TYPE is missing, for example v5litepod-64"
[[ "$tries" =~ ^[1-9][0-9]*$ ]] || fail "--tries=$tries: must be a whole number from 1"
[ $# -gt 0 ] || fail "the jaxrlhf command is missing, for example -- run --config=configs/tldr.py --workdir=gs://BUCKET/tldr"

workdir=""
for word in "$@"; do
  case "$word" in --workdir=*) workdir=${word#*=} ;; esac
done
case "$workdir" in
  gs://* | /mnt/*) ;;
  *) fail "--workdir=$workdir: must be on storage that every worker sees, gs://BUCKET/… or a mount under /mnt" ;;
esac

where=(--zone="$zone")
[ -z "$project" ] || where+=(--project="$project")
checkout=$(cd "$(dirname "$0")/.." && pwd)
command=$(printf '%q ' "$@")
# What this prints is a command line, quoted so that it could be typed.
do_it() {
  if [ -n "$dry" ]; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

tpu() {
  do_it gcloud compute tpus "$@" "${where[@]}" --quiet
}

on_all_workers() {
  tpu tpu-vm ssh "$name" --worker=all --command="$1"
}

# Of the slice, or with `queued-resources state.state` of the request for it.
state() {
  if [ -n "$dry" ]; then
    echo ABSENT
  else
    gcloud compute tpus "${1:-tpu-vm}" describe "$name" "${where[@]}" --format="value(${2:-state})" 2>/dev/null || echo ABSENT
  fi
}

settled() {
  local now
  while now=$(state) && [[ "$now" =~ ING$ ]]; do sleep 15; done # CREATING, REPAIRING, DELETING, …
  echo "$now"
}

create() {
  local asked=()
  [ -z "$spot" ] || asked+=(--spot)
  if [ -z "$queued" ]; then
    tpu tpu-vm create "$name" --accelerator-type="$type" --version="$runtime" "${asked[@]}"
    return
  fi
  case "$(state queued-resources state.state)" in
    FAILED | SUSPEND*) remove ;; # it would not be served again
  esac
  if [ "$(state queued-resources state.state)" = ABSENT ]; then
    tpu queued-resources create "$name" --node-id="$name" --accelerator-type="$type" \
      --runtime-version="$runtime" "${asked[@]}"
  fi
  printf 'waiting for the queued resource %s\n' "$name" >&2
  until [ -n "$dry" ] || [ "$(state)" = READY ]; do
    case "$(state queued-resources state.state)" in
      FAILED | SUSPEND* | ABSENT)
        printf 'error: the queued resource %s was not served; gcloud compute tpus queued-resources describe says why\n' "$name" >&2
        exit 1
        ;;
    esac
    sleep 30
  done
}

remove() {
  if [ -n "$queued" ]; then
    tpu queued-resources delete "$name" --force
  else
    tpu tpu-vm delete "$name"
  fi
}

# Called where errexit does not hold, so that one failure must end it by itself. uv brings Python where the runtime's own
# is older than ours.
install() {
  do_it git -C "$checkout" archive --format=tar.gz --output="$folder/jaxrlhf.tar.gz" HEAD &&
    tpu tpu-vm scp "$folder/jaxrlhf.tar.gz" "$name:jaxrlhf.tar.gz" --worker=all &&
    on_all_workers "mkdir -p jaxrlhf && tar -xzf jaxrlhf.tar.gz -C jaxrlhf && cd jaxrlhf && python3 -m pip install --quiet uv && python3 -m uv venv --quiet --allow-existing --python=3.12 .venv && python3 -m uv pip install --quiet --python=.venv -e '.[tpu,gs]'"
}

# A preempted slice may look ready for a while.
taken_away() {
  local i
  for ((i = 0; i < 6; i++)); do
    [ "$(state)" = READY ] || return 0
    sleep 10
  done
  return 1
}

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

for ((try = 1; try <= tries; try++)); do
  now=$(settled)
  case "$now" in
    READY) printf '%s is there already\n' "$name" >&2 ;;
    ABSENT) create ;;
    PREEMPTED | TERMINATED)
      remove
      create
      ;;
    *) fail "$name is $now; start it or delete it" ;;
  esac
  # A slice can be taken away while it is set up, too. A command that was told ahead saves and ends with a status that is
  # not 0 (JAXRLHF_RESTARTS).
  if install && on_all_workers "cd jaxrlhf && JAXRLHF_HOSTS=auto JAXRLHF_RESTARTS=1 .venv/bin/jaxrlhf $command"; then
    [ -z "$delete" ] || remove
    exit 0
  else
    status=$?
  fi
  if [ "$status" = 75 ]; then
    printf 'stopped and saved (%s of %s tries); going on\n' "$try" "$tries" >&2
    sleep 60
    continue
  fi
  if ! taken_away; then
    printf 'error: the command failed on a slice that is still there; its last lines say why\n' >&2
    exit "$status"
  fi
  printf 'the slice was taken away (%s of %s tries); making it anew\n' "$try" "$tries" >&2
done
printf 'error: stopped %s times; the same command goes on from %s\n' "$tries" "$workdir" >&2
exit 1
