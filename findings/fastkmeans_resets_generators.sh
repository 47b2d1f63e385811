#!/usr/bin/env bash
# fastkmeans 0.5.0 (numpy 2.4.6) with torch 2.13.0.
#
# FastKMeans.train() seeds the GLOBAL generators of torch and of numpy with its own seed (0 by
# default). A trainer that clusters between its epochs (PCL, DeepCluster, SwAV's warm starts)
# thus draws the same order and the same augmentations in every epoch after a clustering, and
# the user's own seed has no say any more: runs of different seeds become the same run.
#
# Guessed: it draws from a generator of its own, or takes numbers from the global one; it never
#   sets the global one back.
# Seen: three epochs of a DataLoader(shuffle=True), each after one train(): one and the same order;
#   with another user seed: that order again. Without train(): all orders differ.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6 fastkmeans==0.5.0
export OMP_NUM_THREADS=1
"$dir/venv/bin/python" - <<'PY'
import numpy as np
import torch
from fastkmeans import FastKMeans

x = np.random.default_rng(0).standard_normal((2000, 16)).astype(np.float32)
loader = torch.utils.data.DataLoader(list(range(100)), batch_size=100, shuffle=True)

def epochs(seed, cluster):
    torch.manual_seed(seed)
    np.random.seed(seed)
    seen = []
    for _ in range(3):
        if cluster:
            FastKMeans(16, 10, niter=2, gpu=False, verbose=False).train(x)
        order = tuple(next(iter(loader)).tolist())
        seen.append((order, np.random.rand()))
    return seen

plain, a, b = epochs(1, False), epochs(1, True), epochs(2, True)
for name, e in (("no clustering, seed 1", plain), ("clustering,    seed 1", a), ("clustering,    seed 2", b)):
    print(name, "| order starts", [o[:4] for o, _ in e], "| numpy", [round(v, 3) for _, v in e])
print("expected: nine different orders; different orders seen:", len({o for e in (plain, a, b) for o, _ in e}))
assert len({o for o, _ in plain}) == 3 and len({v for _, v in plain}) == 3
assert len(set(a + b)) == 1
PY
