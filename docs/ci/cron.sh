#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Compares a branch of a kernel tree with what was tested last, and prints something only if a test regressed, or if it
# could not be tested: cron then sends a mail. A line for crontab(5):
#
#   30 2 * * * TREE=$HOME/linux BRANCH=origin/master $HOME/mremap-harness/docs/ci/cron.sh
#
# TREE must be an absolute path. docs/ci.md explains it.
set -euo pipefail

tree=${TREE:?the kernel tree, a git repository}
branch=${BRANCH:-origin/master}
bin=${HARNESS:-$(cd "$(dirname "$0")/../.." && pwd)/.venv/bin}
results=${RESULTS:-$HOME/mremap-results}

mkdir -p "$results"
exec 9>"$results/lock"
flock --nonblock 9 || { echo "the run before has not ended: $results/lock"; exit 1; }

git -C "$tree" fetch --quiet
new=$(git -C "$tree" rev-parse "$branch")
old=$(cat "$results/tested" 2>/dev/null || git -C "$tree" rev-parse "$new~1")
[ "$new" != "$old" ] || exit 0

# A place of its own for each run, so that none overwrites another.
out=$(mktemp -d "$results/$(date +%Y-%m-%d)-XXXXXX")
status=0
cd "$out"
nice "$bin/pytest" -p no:cacheprovider --kernel="git:$tree@$old" --kernel="git:$tree@$new" -n auto --fail-on=regressed \
    --results="$out/results.jsonl" --html="$out/results.html" --artifacts="$out/failures" \
    >"$out/output" 2>&1 || status=$?

case $status in
0) echo "$new" >"$results/tested" ;;
1) tail -n 60 "$out/output" ;; # the next night begins from the same base, until this is mended or accepted
*) echo "pytest ended with status $status"; tail -n 20 "$out/output" ;;
esac
[ "$status" = 0 ] || echo "all results: $out"

"$bin/harness" cache --prune=14d >>"$out/output"
# Results are kept for 90 days.
find "$results" -mindepth 1 -maxdepth 1 -type d -mtime +90 -exec rm -r {} +
exit "$status"
