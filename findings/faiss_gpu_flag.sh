#!/usr/bin/env bash
# faiss-cpu 1.15.1, numpy 2.4.6.
#
# faiss.Kmeans(..., gpu=True) in the build without GPU code: no error, no warning; the flag
# becomes 0 and the CPU does the work, to the same bits. gpu=1, "one GPU", the same. Only from
# gpu=2 on is there an error, and not one that says what is wrong: a NameError on an inner name.
# So a job that was meant for a GPU and got the wrong wheel runs, at a CPU's pace.
#
# Guessed: gpu=True raises at construction or in train(); gpu=4 raises as well.
# Seen:
#   gpu=True  -> trained, .gpu is 0, same centroids as without, warnings: 0
#   gpu=1     -> trained, .gpu is 0, same centroids as without, warnings: 0
#   gpu=2     -> NameError: name 'StandardGpuResources' is not defined
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check faiss-cpu==1.15.1 numpy==2.4.6
export OMP_NUM_THREADS=1
"$dir/venv/bin/python" - <<'PY'
import warnings
import numpy as np
import faiss

x = np.random.default_rng(0).standard_normal((4000, 32)).astype(np.float32)

def train(**kw):
    k = faiss.Kmeans(32, 20, niter=5, **kw)
    k.train(x)
    return k

ref = train()
seen = {}
for gpu in (True, 1, 2, 4):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            k = train(gpu=gpu)
            same = bool((k.centroids == ref.centroids).all())
            seen[repr(gpu)] = f"trained, .gpu is {k.gpu}, same bits {same}, warnings {len(caught)}"
        except Exception as e:
            seen[repr(gpu)] = f"{type(e).__name__}: {e}"
    print(f"gpu={gpu!r:5} -> {seen[repr(gpu)]}   (expected: an error that names the missing GPU)")
quiet = "trained, .gpu is 0, same bits True, warnings 0"
assert seen["True"] == quiet and seen["1"] == quiet
assert seen["2"].startswith("NameError") and seen["4"].startswith("NameError")
PY
