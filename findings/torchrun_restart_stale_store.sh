#!/usr/bin/env bash
# torch 2.13.0 (CPU), numpy 2.4.6; seen on 2.14.1 too. One node, 2 workers, gloo, torchrun --standalone.
#
# torchrun's --max-restarts restarts the workers, but against the SAME store: what the first attempt
# wrote is still there, the gloo addresses of its dead processes among it. A restarted rank that
# reads its peer's old entry before the peer overwrites it connects to a closed port and fails, or
# both wait for each other until the time-out. So most restarts are spent on nothing, and with
# --max-restarts 1 a run that could have gone on ends.
#
# Guessed: each attempt has a store (or a prefix) of its own; what an attempt set is gone
#   after a restart, and a restart joins as surely as the start.
# Seen: the key of attempt 0 is there in every later attempt; of 27 restarts on 2.13.0
#   7 joined (8 in one run: 2; 5: 1; 4: 2; 2: 0; 8 runs with one restart: 2), of 4 on 2.14.1 one.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$dir/worker.py" <<'PY'
import datetime, os, sys, time
import torch
import torch.distributed as dist

rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
old = store.check(["set by attempt 0"])
if attempt == 0:
    store.set("set by attempt 0", "x")
try:
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=5))
    dist.all_reduce(torch.ones(1))
    state = "joined"
except RuntimeError as e:
    state = "failed: " + ("refused" if "refused" in str(e) else "timed out")
print(f"attempt {attempt} rank {rank} key of attempt 0 present: {old}, {state}\n", end="", flush=True)
time.sleep(30 if rank == 0 and state == "joined" else 0)
sys.exit(7)  # each attempt ends in a failure, so that torchrun restarts
PY
OMP_NUM_THREADS=1 "$dir/venv/bin/python" -m torch.distributed.run --standalone --nproc-per-node 2 \
  --max-restarts 2 "$dir/worker.py" 2>/dev/null | tee "$dir/out" || true
joined=$(grep -c 'attempt [1-2] rank 1.*joined' "$dir/out" || true)
echo "restarts that joined: $joined of 2, expected 2 (about a quarter join)"
grep -q 'attempt 0 rank 1.*joined' "$dir/out"   # the first attempt is fine
grep -q 'attempt 1 .*present: True' "$dir/out"  # and what it wrote outlives it
grep -q 'attempt 2 .*present: True' "$dir/out"  # whether a restart joins is chance, and not asserted
