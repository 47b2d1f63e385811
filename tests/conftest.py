"""Runs use a small network on real images: scikit-learn's digits, or files that the tests write from them."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from sklearn.datasets import load_digits

REPO = Path(__file__).parent.parent
SMALL = ["--device", "cpu", "--arch", "shufflenet_v2_x0_5"]


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def call(capsys):
    """Call a script's main in this process: returns (exit status, standard output, standard error)."""
    def run(main, *argv):
        capsys.readouterr()
        status = 0
        try:
            main([str(arg) for arg in argv])
        except SystemExit as stop:
            status = stop.code
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        return status, *capsys.readouterr()
    return run


def script(*argv, launcher=(sys.executable,), timeout=300, **environment):
    """Run a script as a user does: the finished process, with its output as text."""
    return subprocess.run([*launcher, *map(str, argv)], cwd=REPO, capture_output=True, text=True, timeout=timeout,
                          env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)  # a second one slows small networks down


def descendants(pid):
    children = [int(child) for task in Path(f"/proc/{pid}/task").glob("*") for child in (task / "children").read_text().split()]
    return children + [below for child in children for below in descendants(child)]


def read_log(output):
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def untimed(log):
    return [{name: value for name, value in line.items() if "second" not in name and name != "images_per_s"} for line in log]


def assert_same(a, b, path=""):
    """Bit for bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for name in a:
            assert_same(a[name], b[name], f"{path}.{name}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, pair in enumerate(zip(a, b)):
            assert_same(*pair, f"{path}[{i}]")
    else:
        assert a == b, path


def same_ending(a, b):
    a, b = (torch.load(output / "checkpoint.pth", weights_only=True) for output in (a, b))
    for name in ("state_dict", "optimizer", "epoch", "step", "num_images"):
        assert_same(a[name], b[name], name)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """60 training and 20 validation images in two classes: JPEG and PNG, of several sizes and modes."""
    root = tmp_path_factory.mktemp("images")
    images, labels = load_digits(return_X_y=True)
    modes = ["L", "RGB", "RGBA", "P", "CMYK", "1", "LA", "I;16"]
    for split, rows in (("train", range(60)), ("val", range(60, 80))):
        for i in rows:
            folder = root / split / ("even" if labels[i] % 2 == 0 else "odd")
            folder.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray((images[i].reshape(8, 8) * 15).astype(np.uint8)).resize((20 + i % 7, 20 + i % 5))
            mode = modes[i % len(modes)]
            if mode == "I;16":
                image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
            else:
                image = image.convert(mode)
            image.save(folder / f"{i}.{'jpg' if mode in ('L', 'RGB', 'CMYK') else 'png'}")
    return root


@pytest.fixture(autouse=True)
def torch_settings():
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(torch.float32)
