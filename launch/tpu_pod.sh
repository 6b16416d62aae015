#!/usr/bin/env bash
# One jaxrlhf command on every worker of a Cloud TPU slice: finds or creates it, installs this checkout, runs, follows the
# log, and after a preemption makes the slice anew and runs the same command again, which goes on from the workdir.
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

state() {
  [ -z "$dry" ] || {
    echo ABSENT
    return
  }
  gcloud compute tpus tpu-vm describe "$name" "${where[@]}" --format='value(state)' 2>/dev/null || echo ABSENT
}

create() {
  local asked=()
  if [ -n "$queued" ]; then
    [ -z "$spot" ] || asked+=(--spot)
    tpu queued-resources create "$name" --node-id="$name" --accelerator-type="$type" \
      --runtime-version="$runtime" "${asked[@]}"
    printf 'waiting for the queued resource %s\n' "$name" >&2
    [ -n "$dry" ] || until [ "$(state)" = READY ]; do sleep 30; done
  else
    [ -z "$spot" ] || asked+=(--spot)
    tpu tpu-vm create "$name" --accelerator-type="$type" --version="$runtime" "${asked[@]}"
  fi
}

remove() {
  if [ -n "$queued" ]; then
    tpu queued-resources delete "$name" --force
  else
    tpu tpu-vm delete "$name"
  fi
}

# Called where errexit does not hold, so that one failure must end it by itself.
install() {
  local folder
  folder=$(mktemp -d) &&
    do_it git -C "$checkout" archive --format=tar.gz --output="$folder/jaxrlhf.tar.gz" HEAD &&
    tpu tpu-vm scp "$folder/jaxrlhf.tar.gz" "$name:jaxrlhf.tar.gz" --worker=all &&
    on_all_workers "mkdir -p jaxrlhf && tar -xzf jaxrlhf.tar.gz -C jaxrlhf && cd jaxrlhf && python3 -m venv .venv && .venv/bin/pip install --quiet -e '.[tpu,gs]'"
}

for ((try = 1; try <= tries; try++)); do
  case "$(state)" in
    READY) printf '%s is there already\n' "$name" >&2 ;;
    ABSENT) create ;;
    *)
      remove
      create
      ;;
  esac
  # A slice can be taken away while it is set up, too.
  if install && on_all_workers "cd jaxrlhf && JAXRLHF_HOSTS=auto .venv/bin/jaxrlhf $command"; then
    [ -z "$delete" ] || remove
    exit 0
  else
    status=$?
  fi
  if [ "$(state)" = READY ]; then
    printf 'error: the command failed on a slice that is still there; its last lines say why\n' >&2
    exit "$status"
  fi
  printf 'the slice was taken away (%s of %s tries); making it anew\n' "$try" "$tries" >&2
done
printf 'error: taken away %s times; the same command goes on from %s\n' "$tries" "$workdir" >&2
exit 1
