#!/usr/bin/env bash
# Stands in for python where a test is about the jobs alone: `stub.sh -m megatron_r1 COMMAND ...`. What a container was given, and
# what each command was, is left in RUN; the trainer's first rank waits for the others, and while there is a file `hold` for `stop`.
set -euo pipefail
shift 2
mkdir -p "$RUN/ranks" "$RUN/checkpoints"
env | { grep ^PYXIS_STUB_ || true; } | sort >"$RUN/$1.container"
echo "$*" >"$RUN/$1.arguments"
case $1 in
  doctor) echo "stub=1" ;;
  plan) echo "# a stub" ;;
  convert) echo "converted" ;;
  serve)
    trap 'exit 0' TERM
    sleep 600 &
    wait
    ;;
  *)
    touch "$RUN/ranks/$RANK"
    if [ "$RANK" != 0 ]; then exit; fi
    while [ "$(find "$RUN/ranks" -type f | wc -l)" -lt "$WORLD_SIZE" ] || [ -e "$RUN/hold" ]; do
      if [ -e "$RUN/stop" ]; then exit; fi
      sleep 0.2
    done
    echo "$WORLD_SIZE ranks" | tee "$RUN/done"
    ;;
esac
