#!/usr/bin/env bash
# Make a video through a running `python -m mlx_sora serve`: bash examples/curl.sh
set -euo pipefail
url="${OPENAI_BASE_URL:-http://127.0.0.1:8420/v1}"
ask() { curl -sS --fail-with-body -H "Authorization: Bearer ${MLX_SORA_TOKEN:-none}" "$@"; }
field() { [[ "$(cat)" =~ \"$1\":\"([^\"]*)\" ]] && echo "${BASH_REMATCH[1]}"; }

prompt="a green triangle growing on a navy background"
id=$(ask "$url/videos" -H "Content-Type: application/json" \
    -d "{\"prompt\": \"$prompt\", \"steps\": 10, \"seed\": 2}" | field id)

status=queued
while [[ $status == queued || $status == in_progress ]]; do
    sleep 0.5
    status=$(ask "$url/videos/$id" | field status)
done
ask "$url/videos/$id/content" -o triangle.mp4
ask "$url/videos/$id/content?variant=spritesheet" -o triangle.jpg
echo "triangle.mp4: $id $status"
