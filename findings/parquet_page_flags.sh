#!/usr/bin/env bash
# pyarrow 26.0.1, numpy 2.4.6.
#
# An image set as Parquet (a column of JPEG-size blobs): the flags that promise small pages hardly do a
# thing. The dictionary, "limited" to 1 MiB, takes up the first 1024 rows whatever their size, 49 MiB
# here; dictionary_pagesize_limit=64 KiB and data_page_size=64 KiB write the same layout; and to
# hand out ONE row (iter_batches(batch_size=1), pre_buffer=False) the reader holds twice the
# row group. Without a dictionary, and with 16 rows a page, it still holds the row group once.
# Only row_group_size helps.
#
# Guessed: pages of about 1 MiB; the first row costs a few MiB; with write_batch_size=16 and no
#   dictionary 2 MiB.
# Seen (2000 rows of 50 kB, 95 MiB; dictionary; memory held for the first row):
#   defaults 48.8, 193 | limits of 64 KiB 48.8, 193 | 16 rows a page, no dictionary 0, 98
#   row groups of 100 rows 4.8, 14
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check pyarrow==26.0.1 numpy==2.4.6
export OMP_NUM_THREADS=1
cat > "$dir/write.py" <<'PY'
import sys
import numpy as np, pyarrow as pa, pyarrow.parquet as pq
rng = np.random.default_rng(0)
table = pa.table({"image": pa.array([rng.bytes(50000) for _ in range(2000)], pa.binary())})
for name, kw in {"defaults": {}, "limits": dict(dictionary_pagesize_limit=65536, data_page_size=65536),
                 "pages16": dict(write_batch_size=16, use_dictionary=False), "groups100": dict(row_group_size=100)}.items():
    pq.write_table(table, f"{sys.argv[1]}/{name}.parquet", **kw)
PY
cat > "$dir/read.py" <<'PY'
import sys
import pyarrow as pa, pyarrow.parquet as pq
f = pq.ParquetFile(sys.argv[1], pre_buffer=False)
c = f.metadata.row_group(0).column(0)
size = (c.data_page_offset - c.dictionary_page_offset) / 2**20 if c.has_dictionary_page else 0.0
assert len(next(f.iter_batches(batch_size=1))) == 1
print(round(size, 1), round(pa.default_memory_pool().max_memory() / 2**20, 1))
PY
"$dir/venv/bin/python" "$dir/write.py" "$dir"
declare -A got
for name in defaults limits pages16 groups100; do
  got[$name]=$("$dir/venv/bin/python" "$dir/read.py" "$dir/$name.parquet")
  echo "$name: dictionary and memory for one row, MiB: ${got[$name]} (expected: at most 1, and a few)"
done
"$dir/venv/bin/python" - ${got[defaults]} ${got[limits]} ${got[pages16]} ${got[groups100]} <<'PY'
import sys
d0, m0, d1, m1, d2, m2, d3, m3 = map(float, sys.argv[1:])
assert 45 < d0 == d1 and m0 > 150 and m1 > 150 and d2 == 0 and m2 > 80 and m3 < 30
PY
