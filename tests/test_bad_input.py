"""Bad input: one line that names the flag or file and says what works, status 2 for usage and 1 for the rest."""
import shutil

import pytest
import torch
from conftest import SMALL, script

import builder
import lincls
import pretrain


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one short epoch, of which copies are spoilt."""
    output = tmp_path_factory.mktemp("bad") / "run"
    done = script("pretrain.py", *SMALL, "--epochs", 1, "--num-clusters", 0, "--knn-every", 0, "--batch-size", 700,
                  "--output", output)
    assert done.returncode == 0, done.stderr
    return output


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def one_line(errors, *words):
    lines = errors.strip().splitlines()
    assert "Traceback" not in errors and all(word in lines[-1] for word in words), errors
    assert all(line.startswith(("usage:", " ")) for line in lines[:-1]), errors  # argparse repeats the usage


@pytest.mark.parametrize("flags, status, words", [
    (["{tmp}/nowhere"], 1, ["nowhere", "no such folder"]),
    (["{tmp}/empty"], 1, ["empty", "holds no image"]),
    (["--arch", "resnet19"], 2, ["--arch resnet19", "did you mean resnet1"]),
    (["--arch", "vgg11"], 2, ["--arch vgg11", "resnets"]),
    (["--dataset", "mnist"], 2, ["--dataset", "fashionmnist"]),
    (["--dataset", "cifar10", "{tmp}/empty"], 1, ["cifar10", "cannot be downloaded"]),
    (["--classes", "{tmp}/none"], 2, ["--classes"]),
    (["{tmp}/tree", "--classes", "{tmp}/none"], 1, ["--classes", "cannot be read"]),
    (["{tmp}/tree", "--classes", "{tmp}/wrong"], 2, ["--classes", "no folder 'wrong'"]),
    (["--num-clusters", "10", "1438"], 2, ["--num-clusters 1438", "1437"]),
    (["--num-clusters", "1"], 2, ["--num-clusters 1", "from 2 to 1437"]),
    (["--batch-size", "1438"], 2, ["--batch-size 1438", "1437"]),
    (["--batch-size", "7", "--bn-splits", "2"], 2, ["--batch-size 7", "6 works"]),
    (["--queue-size", "0"], 2, ["--queue-size", "positive", "0"]),
    (["--queue-size", "2000"], 2, ["--queue-size 2000", "1437"]),
    (["--epochs", "0"], 2, ["--epochs", "positive"]),
    (["--lr", "-1"], 2, ["--lr", "positive"]),
    (["--lr", "nan"], 2, ["--lr", "positive"]),
    (["--temperature", "0"], 2, ["--temperature", "positive"]),
    (["--moco-m", "1.5"], 2, ["--moco-m", "0 to under 1"]),
    (["--resume", "{tmp}/none.pth"], 1, ["none.pth", "no such checkpoint"]),
    (["--output", "{tmp}/wrong/run"], 1, ["wrong"]),
    (["--world-size", "2"], 2, ["--dist-url tcp://HOST:PORT"]),
    (["--rank", "1"], 2, ["--rank 1", "last is 0"]),
    (["--align", "-1"], 2, ["--align"]),
])
def test_bad_flags_of_pretrain(flags, status, words, tmp_path, call):
    (tmp_path / "empty").mkdir()
    (tmp_path / "tree" / "train" / "a").mkdir(parents=True)
    (tmp_path / "wrong").write_text("wrong\n")
    before = files(tmp_path / "tree")
    output = [] if "--output" in flags else ["--output", tmp_path / "run"]
    device = ["--device", "cpu"]
    code, _, errors = call(pretrain.main, *[flag.format(tmp=tmp_path) for flag in flags], *device, *output)
    assert code == status, errors
    one_line(errors, *words)
    assert files(tmp_path / "tree") == before and not list(tmp_path.rglob("*.pth"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("main, flags", [(pretrain.main, []), (lincls.main, ["--pretrained", "x.pth"])])
def test_cuda_without_a_gpu(main, flags, call):
    code, _, errors = call(main, *flags, "--device", "cuda")
    assert code == 2
    one_line(errors, "--device cuda", "--device cpu")


def spoil(run, kind, path):
    if kind == "cut":
        path.write_bytes((run / "checkpoint.pth").read_bytes()[:100_000])
    elif kind == "flipped":
        data = bytearray((run / "checkpoint.pth").read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "code":
        torch.save({"state_dict": Dangerous(path.with_suffix(".ran"))}, path)


class Dangerous:
    """Unpickles by calling open(path, "w")."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("main, flag", [(pretrain.main, "--resume"), (lincls.main, "--pretrained"), (lincls.main, "--evaluate")])
@pytest.mark.parametrize("kind, status, words", [
    ("cut", 1, "not a whole checkpoint"), ("flipped", 1, "not a whole checkpoint"), ("text", 1, "not a whole checkpoint"),
    ("code", 1, "not a whole checkpoint"), ("list", 2, "")])
def test_a_spoilt_checkpoint(run, main, flag, kind, status, words, tmp_path, call):
    path = tmp_path / "spoilt.pth"
    spoil(run, kind, path)
    code, _, errors = call(main, flag, path, "--device", "cpu", "--output", tmp_path / "out")
    assert code == status, errors
    one_line(errors, "spoilt.pth", words)
    assert not path.with_suffix(".ran").exists()


@pytest.mark.parametrize("flags, words", [
    (["--arch", "shufflenet_v2_x1_0"], "--arch shufflenet_v2_x0_5 (now shufflenet_v2_x1_0)"),
    (["--dim", "64"], "--dim 128 (now 64)"), (["--no-mlp"], "--mlp True (now False)"),
    (["--queue-size", "512"], "--queue-size"), (["--batch-size", "100"], "--batch-size 700 (now 100)")])
def test_a_resume_whose_flags_would_change_the_model(run, flags, words, tmp_path, call):
    same = [*SMALL, "--epochs", 1, "--num-clusters", 0, "--knn-every", 0, "--batch-size", 700]
    code, _, errors = call(pretrain.main, *same, *flags, "--resume", run / "checkpoint.pth", "--output", tmp_path / "out")
    assert code == 2
    one_line(errors, words)


def test_an_output_folder_in_use(run, call):
    before = files(run)
    code, _, errors = call(pretrain.main, *SMALL, "--output", run)
    assert code == 2 and files(run) == before
    one_line(errors, f"--output {run}", "--resume auto", "another --output")


def test_a_probe_of_another_arch(run, tmp_path, call):
    code, _, errors = call(lincls.main, "--pretrained", run / "checkpoint.pth", "--arch", "resnet18", "--device", "cpu",
                           "--output", tmp_path / "out")
    assert code == 2
    one_line(errors, "checkpoint.pth", "--arch resnet18")


def test_a_probe_without_labels(run, image_folder, tmp_path, call):
    code, _, errors = call(lincls.main, image_folder / "train" / "odd", "--pretrained", run / "checkpoint.pth",
                           "--device", "cpu", "--output", tmp_path / "out")
    assert code == 2
    one_line(errors, "a probe needs labels")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_stops_the_run_and_is_named(image_folder, tmp_path, workers, call):
    shutil.copytree(image_folder, tmp_path / "images")
    broken = tmp_path / "images" / "train" / "odd" / "broken.jpg"
    broken.write_bytes(b"not an image")
    code, _, errors = call(pretrain.main, tmp_path / "images", *SMALL, "--crop-size", 32, "--batch-size", 20, "--workers",
                           workers, "--knn-every", 0, "--output", tmp_path / "run")
    assert code == 1
    one_line(errors, str(broken), "cannot be read as an image")


def test_a_loss_that_is_not_finite_names_epoch_and_step_and_leaves_the_last_checkpoint(run, tmp_path, call, monkeypatch):
    flags = [*SMALL, "--num-clusters", 0, "--knn-every", 0, "--batch-size", 700, "--output", tmp_path / "out"]
    real = builder.MoCo.enqueue

    def diverge(model, k):
        real(model, k)
        enqueued.append(k)
        if len(enqueued) == 3:  # after the first of the second epoch's two steps
            model.queue.fill_(float("nan"))
    enqueued = []
    monkeypatch.setattr(builder.MoCo, "enqueue", diverge)
    code, _, errors = call(pretrain.main, *flags, "--epochs", 2)
    assert code == 1
    one_line(errors, "epoch 2, step 2", "not finite", "--lr")
    checkpoint = torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=True)
    assert checkpoint["epoch"] == 1 and all(value.isfinite().all() for value in checkpoint["state_dict"].values())


def test_embeddings_that_are_not_finite_name_the_epoch(tmp_path, call, monkeypatch):
    monkeypatch.setattr(pretrain, "embed", lambda encoder, data, args: (torch.full((len(data), 4), float("nan")), None))
    code, _, errors = call(pretrain.main, *SMALL, "--warmup-epochs", 0, "--knn-every", 0, "--output", tmp_path / "out")
    assert code == 1
    one_line(errors, "epoch 1", "not finite", "--lr")


def test_an_error_in_several_processes_is_one_line(tmp_path):
    done = script("pretrain.py", "--device", "cpu", "--nproc", 2, "--arch", "vgg11", "--output", tmp_path / "run")
    assert done.returncode == 2
    one_line("\n".join(line for line in done.stderr.splitlines() if not line.startswith("W")), "pretrain.py: error: --arch vgg11")
