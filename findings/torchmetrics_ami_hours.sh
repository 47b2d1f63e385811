#!/usr/bin/env bash
# torchmetrics 1.9.0 with torch 2.13.0, scikit-learn 1.9.1, numpy 2.4.6.
#
# torchmetrics' adjusted_mutual_info_score sums the expected mutual information in three nested
# Python loops with a dozen tensor calls in the innermost: its time grows as points x the smaller
# of classes and clusters, 60 microseconds a step. 1000 points and 20 x 20 take 1.2 s (scikit-learn does
# 50,000 points and 1000 x 1000 in 3 s); ImageNet's 1.28 million at 1000 x 1000 about a day.
#
# Guessed: same value, 5 times slower than scikit-learn's.
# Seen: same value to 1e-5;
#   1000 points, 20 x 20: torchmetrics 1.22 s, scikit-learn 0.0032 s: 380 times slower (CPU time)
#   twice the points: 2.3 times the time; torchmetrics' NMI of the same labels: 0.01 s
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6 torchmetrics==1.9.0 scikit-learn==1.9.1
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
"$dir/venv/bin/python" -W ignore - <<'PY'
import time
import numpy as np
import torch
from sklearn.metrics import adjusted_mutual_info_score as sk
from torchmetrics.functional.clustering import adjusted_mutual_info_score as tm

def clock(f, *a):
    t = time.process_time()
    v = float(f(*a))
    return v, time.process_time() - t

rng = np.random.default_rng(0)
times = {}
for n in (100, 500, 1000):
    y = rng.integers(20, size=n)
    k = np.where(rng.random(n) < 0.5, y, rng.integers(20, size=n))
    a, ta = clock(sk, y, k)
    b, tb = clock(tm, torch.from_numpy(k), torch.from_numpy(y))
    times[n] = ta, tb
    print(f"{n:5d} points, 20 x 20: AMI {a:.5f} / {b:.5f}, scikit-learn {ta:.4f} s, torchmetrics {tb:.2f} s", flush=True)
    assert abs(a - b) < 1e-4
ratio = times[1000][1] / times[1000][0]
print(f"times slower at 1000 points: {ratio:.0f}, expected about 5; "
      f"at 1.28 million points and 1000 x 1000 (points x 1000 steps): {times[1000][1] / (1000 * 20) * 1.28e9 / 3600:.0f} hours")
assert ratio > 100 and times[1000][1] > 1.5 * times[500][1]
PY
