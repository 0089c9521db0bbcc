#!/usr/bin/env bash
# Replays the Dockerfile's steps for one target in a clean temporary directory, where no Docker engine is at hand:
# its COPY, ENV, WORKDIR and RUN lines are executed with PREFIX inside that directory, for all of its stages; the lines
# that change the system (apt-get, useradd) are printed and left out. Then the installed program is asked for its version.
# TORCH_INDEX is empty unless set, so that the default package index is enough for the replay.
#   deploy/replay_dockerfile.sh [cpu|cuda]
set -euo pipefail
source=$(cd "$(dirname "$0")/.." && pwd)
target=${1:-cpu}
PREFIX=$(mktemp -d)
export PREFIX TORCH_INDEX=${TORCH_INDEX:-}
trap 'rm -rf "$PREFIX"' EXIT
workdir=$PREFIX
stage=none

steps() { # the Dockerfile with continued lines joined, without comments and blank lines
  sed -e :a -e '/\\$/N; s/\\\n//; ta' "$source/Dockerfile" | grep -vE '^[[:space:]]*(#|$)'
}

grep -qE "^FROM .* AS $target\$" "$source/Dockerfile" || { echo "no target $target in the Dockerfile" >&2; exit 2; }
while read -r instruction arguments; do
  if [[ $instruction == FROM ]]; then
    stage=${arguments##* AS }
    continue
  fi
  [[ $stage == base || $stage == build || $stage == "build-$target" || $stage == "$target" ]] || continue
  case $instruction in
    ENV) eval "export $arguments" ;;
    WORKDIR) workdir=$(eval "echo $arguments") && mkdir -p "$workdir" ;;
    COPY)
      [[ $arguments == --from=* ]] && continue # it is there: all stages share the directory
      read -ra files <<<"$arguments"
      for file in "${files[@]:0:${#files[@]}-1}"; do
        cp -r "$source/$file" "$workdir/${files[-1]}"
      done
      ;;
    RUN)
      case $arguments in
        apt-get* | useradd*) echo "left out: RUN $arguments" ;;
        *) echo "RUN $arguments" && (cd "$workdir" && bash -euc "$arguments") ;;
      esac
      ;;
  esac
done < <(steps)
cd "$PREFIX" && "$PREFIX/venv/bin/loramux" version
