"""Kill pre-training with SIGKILL at random moments, and see that it ends bit for bit where an uninterrupted run does.

    python tests/soak.py                # 20 kills: 0 and 2 data workers, 1 and 2 processes, 5 kills each
    python tests/soak.py --kills 10     # in each of the four
"""
import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from conftest import REPO, SMALL, descendants, read_log, same_ending, untimed
from PIL import Image
from sklearn.datasets import load_digits

FLAGS = [*SMALL, "--crop-size", "8", "--batch-size", "64", "--epochs", "4", "--warmup-epochs", "1",
         "--num-clusters", "20", "40", "--queue-size", "256", "--print-every", "2", "--save-every", "3", "--resume", "auto"]


def main():
    parser = argparse.ArgumentParser(description="kill pre-training at random moments")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    with tempfile.TemporaryDirectory() as root:
        images = write_images(Path(root) / "images")
        for workers in (0, 2):
            for nproc in (1, 2):
                flags = [str(images), *FLAGS, "--workers", str(workers), "--nproc", str(nproc)]
                soak(Path(root) / f"{workers}-{nproc}", flags, args.kills)


def write_images(root):
    digits = load_digits()
    for i, (image, label) in enumerate(zip(digits.images[:640], digits.target)):
        folder = root / ("train" if i < 576 else "val") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15).astype(np.uint8)).save(folder / f"{i}.png")
    return root


def soak(root, flags, kills):
    start = time.time()
    assert launch(root / "whole", flags).wait() == 0, (root / "whole.said").read_text()
    length = time.time() - start
    for kill in range(kills):
        output = root / f"killed-{kill}"
        process, moment = launch(output, flags), random.uniform(0, length)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            for pid in (process.pid, *descendants(process.pid)):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:  # it ended by itself as its parent went
                    continue
            process.wait()
        log = output / "log.jsonl"
        lines = len(log.read_bytes().splitlines()) if log.exists() else 0
        assert launch(output, flags).wait() == 0, output.with_suffix(".said").read_text()
        same_ending(output, root / "whole")
        assert untimed(read_log(output)) == untimed(read_log(root / "whole"))
        print(f"{root.name} (workers-processes): killed after {moment:.1f} s of {length:.1f}, with {lines} of "
              f"{len(read_log(output))} lines in the log: the same end, bit for bit, and the same log", flush=True)


def launch(output, flags):
    output.parent.mkdir(exist_ok=True)
    with open(output.with_suffix(".said"), "a") as said:
        return subprocess.Popen([sys.executable, "pretrain.py", *flags, "--output", output], cwd=REPO, stdout=said, stderr=said,
                                env=os.environ | {"OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    main()
