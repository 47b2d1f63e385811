"""What only a GPU can show, in a quarter of an hour on a rented GPU node: does the main job run,
how long is a step beside MoCo's, does the input keep up, what are the methods worth on CIFAR-10?

    python tests/on_gpu.py --output DIR --data cifar10-jpeg.tar.xz     # 8 minutes
    python tests/on_gpu.py --output DIR --data IMAGES --seconds 300    # what is not done yet
    python tests/on_gpu.py --output DIR --quick                        # on the CPU: does it run?

Needed are a GPU, requirements.txt (faiss-cpu will do) and no network.
IMAGES holds cifar10/train/CLASS/* and cifar10/val/CLASS/*, the archive train and test. A stage is a
process, and ends with all that it has led to when its time is over. Figures and ends of stages go
to DIR/results.jsonl at once, what they print to DIR/STAGE.log, their runs' logs to DIR/runs.jsonl,
the study to DIR/study (3 GB). The next call with this DIR skips what is done, and goes on.
"""
import argparse
import json
import lzma
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from contextlib import suppress
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
CIFAR10 = """--dataset folder --grid final --first-seed 3 --seeds 3 --jobs 8 --images 10000
    --arch resnet18 --crop-size 32 --batch-size 128 --queue-size 2048 --moco-m 0.99 --lr 0.06
    --epochs 30 --warmup-epochs 6 --knn-every 0 --amp bf16 --workers 0""".split()
LAST = 200  # seconds: kept for the last stage


def main():
    args = parse_args()
    if "ON_GPU" in os.environ:
        work = Path(os.environ["ON_GPU"])
        for what, figures in STAGES[work.name][1](work, args):
            write("results.jsonl", dict(stage=work.name, what=what, figures=figures), args)
        return 0
    end = time.time() + args.seconds
    args.output.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends a stage too
    subprocess.run([sys.executable, "-c", "import torch, faiss"], check=True)  # from a cold disk
    with tempfile.TemporaryDirectory(prefix="on-gpu-") as work:
        for name in [name for name in STAGES if name not in done(args)]:
            kept = 0 if args.quick or name == "cifar10" else LAST
            limit = STAGES[name][0] * (4 if args.quick else 1)  # a CPU that others use too
            run_stage(Path(work) / name, min(limit, end - kept - time.time()), args)
        print_table(args)
    return int(len(done(args)) < len(STAGES))


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--data", type=Path, metavar="IMAGES", help="a folder, or an archive")
    parser.add_argument("--seconds", type=float, default=480, help="for all that is to be done")
    parser.add_argument("--quick", action="store_true", help="all on the CPU, with little to do")
    args = parser.parse_args()
    args.output = args.output.resolve()
    args.device = ["--device", "cpu" if args.quick else "cuda"]
    args.on = [*args.device, "--nproc", 1, "--amp", "bf16"]
    if args.quick:
        args.on += ["--arch", "shufflenet_v2_x0_5", "--batch-size", 256]
        os.environ["OMP_NUM_THREADS"] = "1"  # a second one slows small networks down
    return args


def smoke(work, args):
    """The digits: stopped by a signal in the second epoch, resumed, evaluated."""
    log = work / "log.jsonl"
    flags = ["pretrain.py", *args.on, "--epochs", 2, "--print-every", 1, "--resume", "auto",
             "--output", work]
    process = start(*flags)
    while process.poll() is None and not any(line.get("epoch") == 2 for line in read(log)):
        time.sleep(0.01)
    process.terminate()
    finish([process], 128 + signal.SIGTERM)
    finish([start(*flags)])
    steps = [line["step"] for line in read(log) if "loss" in line]
    assert steps == [*range(1, len(steps) + 1)], steps
    yield "pretrain.py", dict(steps=len(steps), loss=read(log)[-2]["loss"])
    finish([start("lincls.py", "--pretrained", work / "checkpoint.pth", "--knn", "--logreg",
                  "--shots", 1, "--cluster", "--neighbours", 4, *args.on)])
    finish([start("lincls.py", "--pretrained", work / "backbone.pth", "--epochs", 2, *args.on)])
    for line in read(work / "lincls" / "results.jsonl"):
        yield f"lincls.py {line['protocol']}", line


def gpu_tests(work, args):
    """Those that are marked, as they skip themselves without a GPU. The log's last line counts."""
    sys.exit(start("-m", "pytest", "tests", "-m", "gpu", "-n", 0, "-rfEs", "--tb=short").wait())


def step(work, args):
    """ResNet-50 at 224 px, batch 256, 25,000, 50,000 and 100,000 prototypes."""
    import benchmark
    options = benchmark.set_up([*args.device, *["--quick"] * args.quick])
    yield "machine", benchmark.machine(options)
    case, batch = benchmark.cases(options)[0]
    methods = benchmark.variants(case, options)
    functions = benchmark.step_functions(case, batch, methods, options)
    yield from benchmark.speeds(functions, batch, 12, options)
    trace = args.output / "profile.json.gz"
    yield "a PAUC step", benchmark.profile_of(functions["PAUC"], 20, trace, options)


def augmentation(work, args):
    """At 32 and 224 px: two views alone, and PAUC's step on them beside one on views at hand."""
    import benchmark
    options = benchmark.set_up([*args.device, *["--quick"] * args.quick])
    yield from benchmark.fed_steps(3, options)


def cifar10(work, args):
    """The study's methods on a part of the images, three seeds, as many runs as there is time for,
    one seed after another. Its folder is in DIR, where it goes on."""
    flags = ["--quick", "--grid", "main", "--seeds", 1, *args.device] if args.quick else [
        "--data", images(args), *CIFAR10]
    process = start("tests/study.py", *flags, "--test", "--output", args.output / "study")
    with suppress(subprocess.TimeoutExpired):
        process.wait(args.seconds - 15)
    process.terminate()  # its runs are saved
    for run in read(args.output / "study" / "images.jsonl"):
        yield f"{run['name']}, seed {run['seed']}", {
            name: value for name, value in run.items() if name != "argv"}
    finish([process])


STAGES = dict(smoke=(90, smoke), tests=(90, gpu_tests), step=(90, step),  # seconds, at most
              augmentation=(40, augmentation), cifar10=(float("inf"), cifar10))


def images(args):
    if args.data.is_dir():
        return args.data.resolve() / "cifar10"
    folder = args.output / "images"  # the same for the next call: the study looks at it
    if not (folder / "val").exists():
        folder.mkdir(exist_ok=True)
        subprocess.run(["tar", "-x", "-C", folder], input=lzma.open(args.data).read(), check=True)
        (folder / "test").rename(folder / "val")
    return folder


def start(*argv):
    return subprocess.Popen([sys.executable, *map(str, argv)], cwd=REPO)


def finish(processes, status=0):
    for process in processes:
        if process.wait() != status:
            raise RuntimeError(f"status {process.returncode}, not {status}: {process.args[1:]}")


def run_stage(work, limit, args):
    name, begun, path = work.name, time.time(), args.output / f"{work.name}.log"
    with open(path, "a") as log:
        process = subprocess.Popen(
            [sys.executable, *sys.argv, "--seconds", str(limit)], stdout=log, stderr=log,
            start_new_session=True, env=os.environ | dict(ON_GPU=str(work)))
    try:
        status = "failed" if process.wait(limit) else "done"
    except subprocess.TimeoutExpired:
        status = "over its limit"
    finally:
        kill(process.pid, f"ON_GPU={work}\0".encode())
    end = dict(status=status, seconds=time.time() - begun, said=path.read_text().splitlines()[-1:])
    write("results.jsonl", dict(stage=name, **end), args)
    for log in sorted([*work.rglob("log.jsonl"), *work.rglob("results.jsonl")]):
        for line in read(log):
            write("runs.jsonl", dict(run=str(log.parent.relative_to(work.parent))) | line, args)


def kill(session, mark):
    """A stage and all that it has led to, also what has a session of its own."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            pid = int(folder.name)
            if os.getsid(pid) == session or mark in (folder / "environ").read_bytes():
                os.kill(pid, signal.SIGKILL)


def write(name, record, args):
    with open(args.output / name, "a") as file:
        file.write(json.dumps(record) + "\n")


def read(path, **how):
    """The whole lines of a file of JSON, which may not be there yet."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line, **how) for line in lines if line.endswith("\n")]


def done(args):
    return {x["stage"] for x in read(args.output / "results.jsonl") if x.get("status") == "done"}


def print_table(args):
    """Of each stage how it ended, and the last of each of its figures."""
    lines = read(args.output / "results.jsonl", parse_float=lambda x: float(f"{float(x):.4g}"))
    for name in STAGES:
        *_, end = own = [line for line in lines if line["stage"] == name]
        found = {line["what"]: line["figures"] for line in own if "what" in line}
        said = [] if found and end["status"] == "done" else end["said"]
        print(f"\n{name}: {end['status']}, {end['seconds']:.0f} s", *said)
        for what, figures in found.items():
            row = f"{what:16} " + json.dumps(figures)[1:-1].replace('"', "")
            print(textwrap.fill(row, 100, initial_indent=" " * 4, subsequent_indent=" " * 21))


if __name__ == "__main__":
    sys.exit(main())
