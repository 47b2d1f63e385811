#!/usr/bin/env bash
# pytorch-metric-learning 2.9.0 with torch 2.13.0, numpy 2.4.6.
#
# NTXentLoss (SimCLR's loss) takes memory that grows with the CUBE of the batch: for every
# positive pair it lays out all the negatives of ALL anchors and masks them. The logits of 512
# embeddings are a matrix of 1 MiB; the loss takes 2 GiB. 1024 took 17 GiB and would be 136 GiB at
# 2048 (batch 1024, two views). SupConLoss of the same package, on the same labels, which is
# the same loss for one positive each, stays quadratic.
#
# Guessed: quadratic, 4 MiB a matrix and tens of MiB in all at 1024 embeddings; with the masks
#   that were dimly remembered from its source perhaps ten times that.
# Seen (peak above the start, forward and backward):
#   NTXentLoss   128 embeddings:     34 MiB
#   NTXentLoss   256 embeddings:    272 MiB
#   NTXentLoss   512 embeddings:   2175 MiB   (8 times 256's)
#   SupConLoss   512 embeddings:     13 MiB; both losses are 7.0925
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6 pytorch-metric-learning==2.9.0
export OMP_NUM_THREADS=1
for job in "NTXentLoss 128" "NTXentLoss 256" "NTXentLoss 512" "SupConLoss 512"; do
  "$dir/venv/bin/python" - $job <<'PY' | tee -a "$dir/out"
import resource, sys
import torch
from pytorch_metric_learning.losses import NTXentLoss, SupConLoss

loss = dict(NTXentLoss=NTXentLoss, SupConLoss=SupConLoss)[sys.argv[1]](temperature=0.07)
n = int(sys.argv[2])
torch.manual_seed(0)
x = torch.randn(n, 128, requires_grad=True)
y = torch.arange(n // 2).repeat(2)
# a small call first, so that what the library loads does not count
loss(torch.randn(8, 128, requires_grad=True), torch.arange(4).repeat(2)).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
value = loss(x, y)
value.backward()
print(sys.argv[1], n, "embeddings:", round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024),
      "MiB, loss", round(value.item(), 4), flush=True)
PY
done
echo "expected: 4 times from line to line and tens of MiB at the most"
"$dir/venv/bin/python" - "$dir/out" <<'PY'
import sys
rows = [line.split() for line in open(sys.argv[1])]
mib = [int(r[3]) for r in rows]
assert mib[2] > 1500 and mib[2] > 6 * mib[1] and mib[3] < 50, mib
assert abs(float(rows[2][-1]) - float(rows[3][-1])) < 1e-3
PY
