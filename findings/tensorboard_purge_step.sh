#!/usr/bin/env bash
# tensorboard 2.21.0 (tensorboard-data-server 0.7.2), torch 2.13.0, numpy 2.4.6, setuptools 84.2.1.
#
# Three readers of one event folder show three curves, and purge_step changes none that the server
# shows. A run logs steps 0-99, is resumed and logs 60-79 again, with and without
# SummaryWriter(purge_step=60); in a third folder two processes log one tag (steps 0-99 each).
#
# Guessed: resumed without purge_step and two processes: all points stay (a zigzag); with
#   purge_step the old 60-99 are gone; whoever reads.
# Seen, points shown:              resumed   resumed, purge_step   two processes
#   EventAccumulator                   120            80                 200
#   server (default loader)             80            80                 100 (one of the two)
#   server --load_fast=false           120           120                 200
set -euo pipefail
dir=$(mktemp -d); server=; trap '[ -z "$server" ] || kill "$server" 2>/dev/null || true; rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6 tensorboard==2.21.0 tensorboard-data-server==0.7.2 setuptools==84.2.1
cat > "$dir/write.py" <<'PY'
import sys, time
from torch.utils.tensorboard import SummaryWriter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
def log(run, value, steps, **kw):
    with SummaryWriter(f"{sys.argv[1]}/{run}", **kw) as w:
        for i in steps:
            w.add_scalar("loss", value, i)
for run, kw in (("resumed", {}), ("purged", {"purge_step": 60}), ("two", {})):
    log(run, 1.0, range(100))
    time.sleep(1.1)  # the files' names carry the second
    log(run, 2.0, range(100) if run == "two" else range(60, 80), **kw)
out = []
for run in ("resumed", "purged", "two"):
    acc = EventAccumulator(f"{sys.argv[1]}/{run}")
    acc.Reload()
    out.append(len(acc.Scalars("loss")))
print(*out)
PY
cat > "$dir/ask.py" <<'PY'
import json, sys, time, urllib.request
def get(q):
    return json.load(urllib.request.urlopen(f"http://localhost:{sys.argv[1]}/data/plugin/scalars/{q}", timeout=5))
last, same = None, 0
for _ in range(120):  # until the answer has been the same for 4 s
    time.sleep(1)
    try:
        now = [len(get(f"scalars?run={r}&tag=loss")) for r in ("resumed", "purged", "two")]
    except OSError:
        continue
    same = same + 1 if now == last else 0
    last = now
    if same == 4:
        break
print(*last)
PY
port=$("$dir/venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
accumulator=$("$dir/venv/bin/python" "$dir/write.py" "$dir/logs" 2>/dev/null)
for fast in auto false; do
  "$dir/venv/bin/python" -m tensorboard.main --logdir "$dir/logs" --port "$port" --load_fast "$fast" >/dev/null 2>&1 & server=$!
  declare "$fast=$("$dir/venv/bin/python" "$dir/ask.py" "$port")"
  kill "$server"; wait "$server" 2>/dev/null || true; server=
done
echo "points shown: resumed, resumed with purge_step, two processes"
echo "EventAccumulator          $accumulator"
echo "server, default loader    $auto"
echo "server, load_fast=false   $false"
echo "expected of all three     120 80 200"
test "$accumulator / $auto / $false" = "120 80 200 / 80 80 100 / 120 120 200"
