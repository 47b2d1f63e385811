#!/usr/bin/env bash
# scikit-learn 1.9.1, numpy 2.4.6.
#
# LogisticRegression with its defaults (lbfgs, C=1, tol=1e-4) on L2-normalised embeddings of many
# classes stops before its first step: n_iter_ 0, every weight 0, accuracy of chance, no warning.
# tol is held against the largest entry of the MEAN gradient, and on unit rows that entry falls
# as 1/classes: at 1000 classes x 512 dimensions the start itself already passes.
#
# Guessed: more classes make it slower; at 1000 classes (from memory) it uses up its 100
#   iterations and warns, or (after a look at 300 classes: 7 iterations) takes about 5; the
#   accuracy is within 1 point of a run with tol=1e-8. The first class count with 0 iterations
#   was put at 450 for 512 dimensions; on clean blobs it lay between 1200 and 1600.
# Seen:
#   100 classes, tol 1e-04:  4 iterations, largest weight 0.85, test accuracy 0.795, warnings 0
#  1000 classes, tol 1e-04:  0 iterations, largest weight 0.00, test accuracy 0.001, warnings 0
#  1000 classes, tol 1e-07:  4 iterations, largest weight 0.85, test accuracy 0.574, warnings 0
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check scikit-learn==1.9.1 numpy==2.4.6
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
"$dir/venv/bin/python" - <<'PY'
import warnings
import numpy as np
from sklearn.linear_model import LogisticRegression

def run(classes, tol, per=10, dim=512):
    rng = np.random.default_rng(0)
    centre = rng.standard_normal((classes, dim))
    y = np.repeat(np.arange(classes), 2 * per)
    x = centre[y] + 4 * rng.standard_normal((len(y), dim))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    train = np.arange(len(y)) % (2 * per) < per
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = LogisticRegression(tol=tol).fit(x[train], y[train])
    acc = model.score(x[~train], y[~train])
    print(f"{classes:5d} classes, tol {tol:.0e}: {model.n_iter_[0]:2d} iterations, largest weight "
          f"{abs(model.coef_).max():.2f}, test accuracy {acc:.3f}, warnings {len(caught)}", flush=True)
    return model, acc, len(caught)

few = run(100, 1e-4)
many = run(1000, 1e-4)
tight = run(1000, 1e-7)
print("expected: the second line as good as the third, to a point")
assert few[0].n_iter_[0] > 0 and few[1] > 0.5
assert many[0].n_iter_[0] == 0 and not many[0].coef_.any() and many[2] == 0
assert many[1] < 0.005 and tight[1] > 0.4
PY
