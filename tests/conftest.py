"""Set-up of all tests. Runs use a small network on scikit-learn's digits."""
import contextlib
import functools
import io
import json
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a second one slows small networks down
for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_"))]:
    del os.environ[name]  # the tests are no job of a cluster's, wherever they run

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.run
import torch.multiprocessing
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

import builder

REPO = Path(__file__).parent.parent
REAL = "shufflenet_v2_x0_5"  # for what is started without this file
SMALL = ["--device", "cpu", "--arch", "tiny"]


def build_backbone(arch, small_images=False, bn_splits=1, real=builder.build_backbone):
    """One network more, of two layers: a step takes a tenth of the time of torchvision's least."""
    if arch != "tiny":
        return real(arch, small_images, bn_splits)
    layers = OrderedDict()
    for i, width in ((1, 3), (2, 64)):
        bn = nn.BatchNorm2d(64)
        layers[f"conv{i}"] = nn.Conv2d(width, 64, 3, stride=2, padding=1, bias=False)
        layers[f"bn{i}"] = builder.SplitBatchNorm2d(bn, bn_splits) if bn_splits > 1 else bn
        layers[f"relu{i}"] = nn.ReLU()
    layers.update(pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Identity())
    return nn.Sequential(layers), 64


builder.build_backbone = build_backbone


def pytest_collection_modifyitems(items):
    """The two longest files first: a process has a file after another."""
    items.sort(key=lambda item: item.path.stem not in ("test_survival", "test_on_gpu"))


# ------------------------------------------------------------------------------------- processes


@functools.cache
def fork_server():
    """A process without threads that has imported all that runs need, and forks in no time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["conftest", "pretrain", "lincls", "faiss",
                                    "sklearn.model_selection", "torch.utils.tensorboard"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{REPO}{os.pathsep}{Path(__file__).parent}")
        multiprocessing.forkserver.ensure_running()
    return context


def in_processes(function, world_size, *args):
    """function(rank, world_size, *args) in so many processes; an error of one is an error here."""
    fork_server()
    torch.multiprocessing.start_processes(function, (world_size, *args), world_size,
                                          start_method="forkserver")


def forked(command, script, argv, patch, said, environment):
    """What a process that Running has forked becomes."""
    os.setsid()
    os.chdir(REPO)
    os.environ |= environment
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests run under nohup
    signal.signal(signal.SIGINT, signal.default_int_handler)  # or in a script's background
    for number in (1, 2):
        os.dup2(os.open(said, os.O_WRONLY | os.O_APPEND), number)
    if command and command[0] == "torchrun":
        return torch.distributed.run.main([*command[1:], script, *argv])
    if command:
        os.execvp(command[0], [*command, script, *argv])
    import pretrain
    torch.set_num_threads(1)
    start = torch.multiprocessing.start_processes
    pretrain.mp.start_processes = functools.partial(start, start_method="fork")  # as fast
    main = __import__(script.removesuffix(".py")).main
    sys.argv = [script, *argv]
    exec(patch, dict(os=os, signal=signal, sys=sys, time=time, builder=builder, pretrain=pretrain))
    main()


class Running:
    """A script in the background, in a session of its own, with what it says in a file. It is
    started by the words of `command`; without, forked, with the tiny network, and after `patch`."""

    def __init__(self, output, flags, patch="", command=(), script="pretrain.py"):
        self.output, self.said = output, output.with_suffix(".said")
        output.parent.mkdir(exist_ok=True)
        self.said.touch()
        argv = [*map(str, flags), "--output", str(output)]
        inputs = [*map(str, command)], script, argv, patch, self.said, {**os.environ}
        self.process = fork_server().Process(target=forked, args=inputs)
        self.process.start()
        self.pid = self.process.pid

    def until(self, condition, seconds=120):
        """Wait for what must come before the run ends."""
        end = time.time() + seconds
        while not condition():
            assert self.process.exitcode is None and time.time() < end, self.text()
            time.sleep(0.02)

    def steps(self, count):
        log = self.output / "log.jsonl"
        self.until(lambda: log.exists() and any(line["step"] >= count for line in read_log(log)))

    def end(self, seconds=90):
        """Wait for the end: the exit status, and what was said."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, self.text()
        return self.process.exitcode, self.text()

    def text(self):
        return self.said.read_text()

    def family(self):
        """Its process, and all below it."""
        found = [self.pid]
        for pid in found:
            with contextlib.suppress(OSError):  # it has ended
                for task in Path(f"/proc/{pid}/task").iterdir():
                    found += map(int, (task / "children").read_text().split())
        return found

    def kill(self):
        """This process and all that it has led to, also where they have sessions of their own."""
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended
                pid, words = int(folder.name), (folder / "cmdline").read_bytes().split(b"\0")
                if os.getsid(pid) == self.pid or str(self.output).encode() in words:
                    os.kill(pid, signal.SIGKILL)
        self.end()


@pytest.fixture
def start():
    """start(...) is Running(...) that does not outlive the test."""
    runs = []
    yield lambda *args, **options: runs.append(Running(*args, **options)) or runs[-1]
    for run in runs:
        run.kill()


def script(*argv, cwd=REPO):
    """Run a script as a user does: the finished process, with its output as text."""
    return subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True,
                          timeout=300, cwd=cwd)


def called(main, *argv):
    """Call a script's main in this process: (exit status, standard output, standard error)."""
    status, said, errors = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
        try:
            main([str(arg) for arg in argv])
        except SystemExit as stop:
            status = stop.code
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    return status, said.getvalue(), errors.getvalue()


def here(main, *argv):
    """The same of a call that ends well: what it says."""
    status, said, errors = called(main, *argv)
    assert status == 0, errors
    return said


@pytest.fixture
def call():
    return called


def one_line(errors, *words):
    """That an error is one line with these words; argparse repeats the usage before it."""
    *usage, line = errors.strip().splitlines()
    assert ": error: " in line and all(word in line for word in words), errors
    assert all(other.startswith(("usage:", " ")) for other in usage), errors


def gone(pids, seconds=30):
    """All of these processes end by themselves."""
    def runs(pid):
        with contextlib.suppress(OSError):
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    end = time.time() + seconds
    while any(map(runs, pids)):
        assert time.time() < end, "a process was left behind"
        time.sleep(0.05)


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.*") if path.name != ".lock"}


@pytest.fixture
def refused(tmp_path):
    """refused(main, flags, words): main ends with one line and status 2, and writes nothing."""
    def check(main, flags, *words, output=tmp_path / "out"):
        before = files(output.parent)
        status, _, errors = called(main, "--device", "cpu", *flags, "--output", output)
        assert status == 2 and files(output.parent) == before, errors
        one_line(errors, *words)
    return check


@contextlib.contextmanager
def joined(rank, world_size, folder):
    """In a process group of so many processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group{world_size}", rank=rank,
                            world_size=world_size)
    yield
    dist.destroy_process_group()


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    with joined(0, 1, tmp_path):
        yield


@pytest.fixture(autouse=True)
def torch_settings():
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(torch.float32)


def read_log(path):
    """The reports in the log of an output folder: all whole lines but that of the flags."""
    path = path / "log.jsonl" if path.is_dir() else path
    lines = path.read_text().splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in records if "flags" not in record]


def untimed(log):
    return [{name: value for name, value in line.items()
             if "second" not in name and name != "images_per_s"} for line in log]


def read_checkpoint(path):
    path = path / "checkpoint.pth" if path.is_dir() else path
    return torch.load(path, weights_only=True)


def assert_same(a, b, path=""):
    """Bit for bit, through dicts and lists."""
    if isinstance(a, (list, tuple)):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for name in a:
            assert_same(a[name], b[name], f"{path}.{name}")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, path


def same_ending(a, b):
    assert_same(*(read_checkpoint(path) | dict(args=None) for path in (a, b)))


# ------------------------------------------------------------------------------------------ data


@functools.cache
def digits():
    """Images (n, 8, 8) uint8 and their labels."""
    images, labels = load_digits(return_X_y=True)
    return (images.reshape(-1, 8, 8) * 15).astype(np.uint8), labels.astype(np.uint8)


def write_fashion_mnist(root, train, val):
    """Images (n, H, W) uint8 and labels (n,) of two sets, in files like Fashion-MNIST's."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for split, (images, labels) in (("train", train), ("t10k", val)):
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
            (raw / f"{split}-{kind}-ubyte").write_bytes(header + values.tobytes())
    return root


@pytest.fixture(scope="session")
def few(tmp_path_factory):
    """Flags of a run on 352 digits, 11 steps an epoch, with 48 for the monitor."""
    images, labels = digits()
    images = np.pad(images.repeat(3, 1).repeat(3, 2), ((0, 0), (2, 2), (2, 2)))  # 28 x 28
    sets = ((images[rows], labels[rows]) for rows in (slice(352), slice(352, 400)))
    root = write_fashion_mnist(tmp_path_factory.mktemp("few"), *sets)
    return [root, "--dataset", "fashionmnist", *SMALL, "--crop-size", 8, "--batch-size", 32,
            "--warmup-epochs", 1, "--print-every", 3, "--num-clusters", 20, 40, "--lr", 0.01]


def write_image_folder(root, train, val):
    """So many digits of each split as PNG files in two classes."""
    images, labels = digits()
    for split, rows in (("train", range(train)), ("val", range(train, train + val))):
        for i in rows:
            folder = root / split / ("odd" if labels[i] % 2 else "even")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i]).resize((20 + i % 7, 20 + i % 5)).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """60 training and 20 validation images in two classes, of several sizes, modes and formats."""
    root = write_image_folder(tmp_path_factory.mktemp("images"), 60, 20)
    kinds = "L.jpg RGB.jpg RGBA.png P.png CMYK.jpg 1.png LA.png I;16.png".split()
    for path in sorted(root.rglob("*.png")):
        (mode, ending), image = kinds[int(path.stem) % 8].split("."), Image.open(path)
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image) * np.uint16(257))
        path.unlink()
        image.convert(mode).save(path.with_suffix(f".{ending}"))
    return root


def unit(*shape, seed=0):
    """Rows of length 1, in float64."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(x, dim=-1)
