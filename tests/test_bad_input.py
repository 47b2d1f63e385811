"""Bad input: one line that names the flag or file and says what works, status 2, nothing lost."""
import shutil

import pytest
import torch
from conftest import REAL, SMALL, here, one_line

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


@pytest.mark.parametrize("gpus, flags, words", [
    (0, ["--device", "cuda"], ["--device cuda", "--device cpu"]),
    (8, ["--device", "auto", "--nproc", 9], ["--nproc 9", "works here is 8"])])
def test_gpus_that_are_not_there_are_refused(gpus, flags, words, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    refused(pretrain.main, flags, *words)


def test_a_folder_that_cannot_be_written_is_noticed_before_the_work(run, tmp_path, refused,
                                                                    monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(pretrain, "embed", None)
    probe = ["--pretrained", run / "backbone.pth"]
    for main, flags in ((pretrain.main, SMALL), (lincls.main, probe)):
        refused(main, flags, "file/out: cannot be written", output=tmp_path / "file" / "out")


class Dangerous(str):
    def __reduce__(self):  # unpickled it is open(self, "w")
        return open, (str(self), "w")


SPOIL = {
    "cut short": lambda whole, path: path.write_bytes(whole[:100_000]),
    "flipped": lambda whole, path: path.write_bytes(
        whole[:100_000] + bytes([whole[100_000] ^ 1]) + whole[100_001:]),
    "text": lambda whole, path: path.write_text("not a checkpoint"),
    "code": lambda whole, path: torch.save({"model": Dangerous(path.with_suffix(".ran"))}, path),
    "object": lambda whole, path: torch.save({"model": torch.nn.Identity()}, path)}


@pytest.mark.parametrize("kind", SPOIL)
def test_a_spoilt_checkpoint_is_refused_in_our_own_words(run, kind, tmp_path):
    path = tmp_path / "spoilt.pth"
    SPOIL[kind]((run / "checkpoint.pth").read_bytes(), path)
    with pytest.raises(pretrain.UsageError, match="spoilt.pth: not a whole checkpoint") as error:
        pretrain.load(path)
    assert "weights_only" not in str(error.value) and len(str(error.value).splitlines()) == 1
    assert not path.with_suffix(".ran").exists()


@pytest.mark.parametrize("main, flag", [
    (pretrain.main, "--resume"), (pretrain.main, "--init"), (lincls.main, "--pretrained"),
    (lincls.main, "--evaluate")])
def test_a_checkpoint_with_code_is_one_line_for_each_flag(main, flag, tmp_path, refused):
    SPOIL["code"](b"", tmp_path / "spoilt.pth")
    refused(main, [flag, tmp_path / "spoilt.pth"], "spoilt.pth: not a whole checkpoint")
    assert not (tmp_path / "spoilt.ran").exists()


def test_the_other_scripts_checkpoint_is_no_resume(run, refused):
    refused(lincls.main, ["--pretrained", run / "backbone.pth", "-a", "tiny", "--resume",
                          run / "checkpoint.pth"], "is a checkpoint of the other script")


def test_a_backbone_of_another_arch_is_refused(run, short, refused):
    words = "backbone.pth: its weights are not those of --arch resnet18", "--crop-size"
    for main, flags in ((pretrain.main, [*short, "--init"]), (lincls.main, ["--pretrained"])):
        refused(main, [*flags, run / "backbone.pth", "--arch", "resnet18"], *words)


def test_a_resume_of_another_model_or_batch_is_refused(run, short, refused):
    refused(pretrain.main, [*short, "--arch", REAL, "--dim", 64, "--batch-size", 100, "--resume",
                            run / "checkpoint.pth"],
            f"--arch tiny (now {REAL}), --dim 128 (now 64), --batch-size 170 (now 100)")


def test_a_resume_on_as_many_other_images_is_refused(run, short, tmp_path, refused):
    root = shutil.copytree(short[0], tmp_path / "data")
    flags = [root, *short[1:], "--epochs", 1, "--resume", run / "checkpoint.pth"]
    here(pretrain.main, *flags, "--output", tmp_path / "same")
    with open(next(root.rglob("train-images*")), "r+b") as file:
        file.seek(5000)
        file.write(b"\1")
    refused(pretrain.main, flags, "was made on other images", "by their pixels")


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
