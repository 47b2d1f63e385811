"""Bad input: one line that names the flag or file and says what works, status 2, nothing lost."""
import shutil

import numpy as np
import pytest
import torch
from conftest import SMALL, digits, here, one_line, write_fashion_mnist, write_image_folder

import lincls
import pretrain


@pytest.fixture(scope="module")
def short(few):
    """Flags of two steps."""
    return [*few, "--num-clusters", 0, "--knn-every", 0, "--batch-size", 170]


@pytest.fixture(scope="module")
def run(short, tmp_path_factory):
    """A run of one short epoch, of which copies are spoilt."""
    output = tmp_path_factory.mktemp("bad") / "run"
    here(pretrain.main, *short, "--epochs", 1, "--output", output)
    return output


@pytest.fixture
def refused(call, tmp_path):
    """refused(main, flags, words): main ends with one line and status 2, and writes nothing."""
    def check(main, flags, *words, output=tmp_path / "out"):
        before = {path: path.stat().st_mtime_ns for path in output.parent.rglob("*.*")}
        status, out, errors = call(main, *flags, "--device", "cpu", "--output", output)
        assert status == 2, errors
        one_line(errors, *words)
        after = {path: path.stat().st_mtime_ns for path in output.parent.rglob("*.*")}
        before.pop(output / ".lock", None), after.pop(output / ".lock", None)
        assert after == before
        return out + errors
    return check


# ------------------------------------------------------------------------------------------ flags


@pytest.mark.parametrize("flags, words", [
    (["{tmp}/nowhere"], ["nowhere", "cannot be read", "No such file"]),
    (["{tmp}/wrong.d"], ["wrong.d", "no image"]),
    (["--arch", "resnet19"], ["--arch resnet19"]),
    (["--arch", "squeezenet1_1"], ["--arch squeezenet1_1", "resnets"]),
    (["--dataset", "mnist"], ["--dataset", "fashionmnist"]),
    (["--num-clusters", "10", "1438"], ["--num-clusters 1438", "1437"]),
    (["--batch-size", "7", "--bn-splits", "2"], ["--batch-size 7", "6 works"]),
    (["--queue-size", "2000"], ["--queue-size 2000", "1437"]),
    (["--lr", "nan"], ["--lr", "positive", "nan"]),
    (["--epochs", "0"], ["--epochs", "positive", "0"]),
    (["--resume", "{tmp}/none.pth"], ["none.pth", "cannot be read", "No such file"]),
    (["{tmp}/wrong.d", "--classes", "{tmp}/none"], ["--classes", "cannot be read"])])
def test_a_bad_flag_is_one_line_with_what_works(flags, words, tmp_path, refused):
    (tmp_path / "wrong.d" / "train" / "a").mkdir(parents=True)
    refused(pretrain.main, [flag.format(tmp=tmp_path) for flag in flags], *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("main, flag", [(pretrain.main, "--init"), (lincls.main, "--pretrained")])
def test_cuda_without_a_gpu_is_refused(main, flag, run, call):
    status, _, errors = call(main, flag, run / "backbone.pth", "--device", "cuda")
    assert status == 2
    one_line(errors, "--device cuda", "--device cpu")


def test_more_processes_than_gpus_are_refused(call, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    status, _, errors = call(pretrain.main, "--nproc", 9)
    assert status == 2
    one_line(errors, "--nproc 9", "works here is 8")


def test_a_folder_that_cannot_be_written_is_noticed_before_the_work(run, tmp_path, refused,
                                                                    monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(pretrain, "embed", None)
    probe = ["--pretrained", run / "backbone.pth"]
    for main, flags in ((pretrain.main, SMALL), (lincls.main, probe)):
        refused(main, flags, "file/out: cannot be written", output=tmp_path / "file" / "out")


# ------------------------------------------------------------------------------------ checkpoints


class Thing:
    """An object that is not data."""


class Dangerous:
    """Unpickles by calling open(path, "w")."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def spoil(run, kind, path):
    whole = bytearray((run / "checkpoint.pth").read_bytes())
    if kind == "cut short":
        path.write_bytes(whole[:100_000])
    elif kind == "flipped":
        whole[len(whole) // 2] ^= 1
        path.write_bytes(whole)
    elif kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "code":
        torch.save({"state_dict": Dangerous(path.with_suffix(".ran"))}, path)
    else:
        torch.save({"state_dict": {}, "model": Thing()}, path)


@pytest.mark.parametrize("kind", ["cut short", "flipped", "text", "code", "object"])
def test_a_spoilt_checkpoint_is_refused_in_our_own_words(run, kind, tmp_path):
    path = tmp_path / "spoilt.pth"
    spoil(run, kind, path)
    with pytest.raises(pretrain.UsageError, match="spoilt.pth: not a whole checkpoint") as error:
        pretrain.load(path)
    assert "weights_only" not in str(error.value) and len(str(error.value).splitlines()) == 1
    assert not path.with_suffix(".ran").exists()


@pytest.mark.parametrize("main, flag", [
    (pretrain.main, "--resume"), (pretrain.main, "--init"), (lincls.main, "--pretrained"),
    (lincls.main, "--evaluate")])
def test_a_checkpoint_with_code_is_one_line_for_each_flag(run, main, flag, tmp_path, refused):
    path = tmp_path / "spoilt.pth"
    spoil(run, "code", path)
    said = refused(main, [flag, path], "spoilt.pth: not a whole checkpoint that is data alone")
    assert "weights_only" not in said and not path.with_suffix(".ran").exists()


def test_the_other_scripts_checkpoint_is_no_resume(run, refused):
    refused(lincls.main, ["--pretrained", run / "backbone.pth", "-a", "tiny", "--resume",
                          run / "checkpoint.pth"], "is a checkpoint of the other script")


def test_a_backbone_of_another_arch_is_refused(run, short, refused):
    words = "backbone.pth: its weights are not those of --arch resnet18", "--crop-size"
    for main, flags in ((pretrain.main, [*short, "--init"]), (lincls.main, ["--pretrained"])):
        refused(main, [*flags, run / "backbone.pth", "--arch", "resnet18"], *words)


# --------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("flags, words", [
    (["--arch", "shufflenet_v2_x0_5"], "--arch tiny (now shufflenet_v2_x0_5)"),
    (["--dim", "64"], "--dim 128 (now 64)"),
    (["--batch-size", "100"], "--batch-size 170 (now 100)")])
def test_a_resume_of_another_model_or_batch_is_refused(run, short, flags, words, refused):
    refused(pretrain.main, [*short, *flags, "--resume", run / "checkpoint.pth"], words)


@pytest.mark.parametrize("same", [True, False])
def test_a_resume_on_as_many_other_images_is_refused(same, run, short, tmp_path, call, refused):
    images, labels = digits()
    images = np.pad(images.repeat(3, 1).repeat(3, 2), ((0, 0), (2, 2), (2, 2)))
    if not same:
        images[5, 9, 9] += 1
    root = write_fashion_mnist(tmp_path / "data", (images[:352], labels[:352]),
                               (images[352:400], labels[352:400]))
    flags = [root, *short[1:], "--epochs", 1, "--resume", run / "checkpoint.pth"]
    if same:
        assert call(pretrain.main, *flags, "--output", tmp_path / "out")[0] == 0
    else:
        refused(pretrain.main, flags, "was made on other images", "by their pixels")


# ------------------------------------------------------------------------------- images and labels


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_ends_the_run_and_is_named(image_folder, tmp_path, workers,
                                                               call):
    shutil.copytree(image_folder, tmp_path / "images")
    broken = tmp_path / "images" / "train" / "odd" / "broken.jpg"
    broken.write_bytes(b"not an image")
    status, _, errors = call(pretrain.main, tmp_path / "images", *SMALL, "--crop-size", 32,
                             "--batch-size", 20, "--workers", workers, "--knn-every", 0, "--output",
                             tmp_path / "run")
    assert status == 2
    one_line(errors, f"{broken}: cannot be read as an image")


def test_one_image_is_refused(tmp_path, refused):
    images = write_image_folder(tmp_path / "one", 1, 0)
    refused(pretrain.main, [images, *SMALL], "1 images are too few")


def test_a_probe_without_labels_is_refused(run, image_folder, refused):
    refused(lincls.main, [image_folder / "train" / "odd", "--dataset", "folder", "--pretrained",
                          run / "checkpoint.pth", "-a", "tiny"], "needs labels of two classes")
