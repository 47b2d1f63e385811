"""Kill pre-training with SIGKILL at random moments, and see that it ends bit for bit where an
uninterrupted run does.

    python tests/soak.py                # 20 kills: 0 and 2 data workers, 1 and 2 processes, 5 each
    python tests/soak.py --kills 10     # in each of the four
"""
import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from conftest import REAL, Running, read_log, same_ending, untimed, write_image_folder

FLAGS = ["--device", "cpu", "--arch", REAL, "--crop-size", 8, "--batch-size", 64, "--epochs", 4,
         "--warmup-epochs", 1, "--num-clusters", 20, 40, "--queue-size", 256, "--print-every", 2,
         "--save-every", 3, "--resume", "auto"]


def main():
    parser = argparse.ArgumentParser(description="kill pre-training at random moments")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    with tempfile.TemporaryDirectory() as root:
        images = write_image_folder(Path(root) / "images", 576, 64)
        for workers in (0, 2):
            for nproc in (1, 2):
                flags = [images, *FLAGS, "--workers", workers, "--nproc", nproc]
                soak(Path(root) / f"{workers}-{nproc}", flags, args.kills)


def soak(root, flags, kills):
    start = time.time()
    finish(root / "whole", flags)
    length = time.time() - start
    for kill in range(kills):
        output, moment = root / f"killed-{kill}", random.uniform(0, length)
        run = launch(output, flags)
        until = time.time() + moment
        while run.process.exitcode is None and time.time() < until:
            time.sleep(0.01)
        run.kill()
        log = output / "log.jsonl"
        lines = len(log.read_bytes().splitlines()) if log.exists() else 0
        finish(output, flags)
        same_ending(output, root / "whole")
        assert untimed(read_log(output)) == untimed(read_log(root / "whole"))
        print(f"{root.name} (workers-processes): killed after {moment:.1f} s of {length:.1f}, with "
              f"{lines} of {len(read_log(output)) + 1} lines in the log: the same end, bit for "
              f"bit, and the same log", flush=True)


def launch(output, flags):
    return Running(output, flags, command=[sys.executable])


def finish(output, flags):
    run = launch(output, flags)
    status, said = run.end(600)
    assert status == 0, said


if __name__ == "__main__":
    main()
