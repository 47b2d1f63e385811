"""Bad input: one line that names the flag or file and says what works, status 2 for usage and 1 for
the rest; and what only looks bad is taken."""
import argparse
import contextlib
import datetime
import os
import re
import shutil
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import (SMALL, digits, here, read_checkpoint, write_fashion_mnist,
                      write_image_folder)

import builder
import lincls
import losses
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


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}


def one_line(errors, *words):
    lines = errors.strip().splitlines()
    assert "Traceback" not in errors and all(word in lines[-1] for word in words), errors
    # argparse repeats the usage.
    assert all(line.startswith(("usage:", " ")) for line in lines[:-1]), errors


@pytest.mark.parametrize("flags, status, words", [
    (["{tmp}/nowhere"], 1, ["nowhere", "no such folder"]),
    (["{tmp}/empty"], 1, ["empty", "holds no image"]),
    (["--arch", "resnet19"], 2, ["--arch resnet19", "did you mean resnet1"]),
    (["--arch", "squeezenet1_1"], 2, ["--arch squeezenet1_1", "resnets"]),
    (["--dataset", "mnist"], 2, ["--dataset", "fashionmnist"]),
    (["--dataset", "cifar10", "{tmp}/empty"], 1, ["cifar10", "cannot be downloaded"]),
    (["--classes", "{tmp}/none"], 2, ["--classes"]),
    (["{tmp}/tree", "--classes", "{tmp}/none"], 1, ["--classes", "cannot be read"]),
    (["{tmp}/tree", "--classes", "{tmp}/wrong"], 2, ["--classes", "no folder 'wrong'"]),
    (["--num-clusters", "10", "1438"], 2, ["--num-clusters 1438", "1437"]),
    (["--num-clusters", "1"], 2, ["--num-clusters 1", "from 2 to 1437"]),
    (["--num-clusters", "3", "0"], 2, ["--num-clusters 0", "0 alone"]),
    (["--num-clusters", "3,x"], 2, ["--num-clusters", "3,x"]),
    (["--batch-size", "1438"], 2, ["--batch-size 1438", "1437"]),
    (["--batch-size", "7", "--bn-splits", "2"], 2, ["--batch-size 7", "6 works"]),
    (["--queue-size", "0"], 2, ["--queue-size", "positive", "0"]),
    (["--queue-size", "2000"], 2, ["--queue-size 2000", "1437"]),
    (["--epochs", "0"], 2, ["--epochs", "positive"]),
    (["--lr", "-1"], 2, ["--lr", "positive"]),
    (["--lr", "nan"], 2, ["--lr", "positive"]),
    (["--temperature", "0"], 2, ["--temperature", "positive"]),
    (["--moco-m", "1.5"], 2, ["--moco-m", "0 to under 1"]),
    (["--bits", "17"], 2, ["--bits", "16"]),
    (["--proto", "-1"], 2, ["--proto"]),
    (["--align", "-1"], 2, ["--align"]),
    (["--resume", "{tmp}/none.pth"], 1, ["none.pth", "no such checkpoint"]),
    (["--init", "{tmp}/none.pth"], 1, ["none.pth", "no such checkpoint"]),
    (["--output", "{tmp}/wrong/run"], 1, ["wrong"]),
    (["--world-size", "2"], 2, ["--dist-url tcp://HOST:PORT"]),
    (["--world-size", "2", "--dist-url", "tcp://node0"], 2, ["--dist-url tcp://HOST:PORT"]),
    (["--cos", "--schedule", "3"], 2, ["--cos and --schedule"]),
    (["--rank", "1"], 2, ["--rank 1", "last is 0"]),
])
def test_a_bad_flag_is_one_line_with_what_works(flags, status, words, tmp_path, call):
    (tmp_path / "empty").mkdir()
    (tmp_path / "tree" / "train" / "a").mkdir(parents=True)
    (tmp_path / "wrong").write_text("wrong\n")
    before = files(tmp_path / "tree")
    output = [] if "--output" in flags else ["--output", tmp_path / "run"]
    code, _, errors = call(pretrain.main, *[flag.format(tmp=tmp_path) for flag in flags],
                           "--device", "cpu", *output)
    assert code == status, errors
    one_line(errors, *words)
    assert files(tmp_path / "tree") == before and not list(tmp_path.rglob("*.pth"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("main, flag", [(pretrain.main, "--init"), (lincls.main, "--pretrained")])
def test_cuda_without_a_gpu_is_refused(main, flag, run, call):
    code, _, errors = call(main, flag, run / "backbone.pth", "--device", "cuda")
    assert code == 2
    one_line(errors, "--device cuda", "--device cpu")


def test_an_error_in_several_processes_is_one_line(tmp_path, start):
    run = start(tmp_path / "run", ["--device", "cpu", "--nproc", 2, "--arch", "resnet19"])
    status, said = run.end()
    assert status == 2
    lines = [line for line in said.splitlines() if not line.startswith(("data", "--q", "W"))]
    one_line("\n".join(lines), "pretrain.py: error: --arch resnet19")


# --------------------------------------------------------------------------------------- few images


@pytest.mark.parametrize("images", [1, 2, 3, 5, 9])
def test_advice_on_the_batch_works_when_it_is_followed(images, group):
    """And where there is none, no batch works."""
    def fitted(batch_size, splits):
        args = pretrain.parse_args(["--bn-splits", str(splits)])
        args.batch_size = batch_size
        pretrain.fit_batch(args, images, default=64)
        return args.batch_size
    for splits in range(1, 6):
        works = set()
        for batch_size in range(1, images + 3):
            try:
                works.add(fitted(batch_size, splits))
            except pretrain.UsageError as error:
                advised = re.search(r"(\d+) works", str(error))
                if advised:
                    assert fitted(int(advised.group(1)), splits) == int(advised.group(1))
        if works:
            assert fitted(None, splits) in works
        else:
            with pytest.raises(pretrain.UsageError, match=f"{images} images? (is|are) too few"):
                fitted(None, splits)
        assert works == {n for n in range(2 * splits, images + 1) if n % splits == 0}


def test_one_image_is_refused_and_two_train(tmp_path, call):
    flags = [*SMALL, "--crop-size", 32, "--epochs", 1, "--warmup-epochs", 0]
    code, _, errors = call(pretrain.main, write_image_folder(tmp_path / "one", 1, 0), *flags,
                           "--output", tmp_path / "run")
    assert code == 2
    one_line(errors, "1 image is too few")
    here(pretrain.main, write_image_folder(tmp_path / "two", 2, 0), *flags, "--output",
         tmp_path / "run")
    assert read_checkpoint(tmp_path / "run")["epoch"] == 1


# -------------------------------------------------------------------------------------- checkpoints


class Thing:
    """An object that is not data."""


class Dangerous:
    """Unpickles by calling open(path, "w")."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def spoil(run, kind, path):
    whole = (run / "checkpoint.pth").read_bytes()
    if kind == "cut short":
        path.write_bytes(whole[:100_000])
    elif kind == "flipped":
        path.write_bytes(whole[:len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1])
                         + whole[len(whole) // 2 + 1:])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "junk":
        path.write_bytes(np.random.default_rng(0).bytes(5000))
    elif kind == "zip":
        shutil.make_archive(path, "zip", run, "log.jsonl")
        path.with_suffix(".pth.zip").rename(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "legacy, cut short":
        torch.save(torch.load(run / "backbone.pth"), path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "script":
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    else:
        torch.save({"list": [1, 2], "code": {"state_dict": Dangerous(path.with_suffix(".ran"))},
                    "object": {"state_dict": {}, "model": Thing()},
                    "date": {"state_dict": {}, "made": datetime.date(2020, 1, 1)}}[kind], path)


SPOILT = [("cut short", 1, "cut short or damaged"), ("flipped", 1, "cut short or damaged"),
          ("empty", 1, "is an empty file"), ("text", 1, "not a whole checkpoint"),
          ("junk", 1, "not a whole checkpoint"), ("zip", 1, "not a whole checkpoint"),
          ("folder", 1, "cannot be read"), ("legacy, cut short", 1, "not a whole checkpoint"),
          ("script", 1, "TorchScript"), ("code", 1, "open"), ("object", 1, "Thing"),
          ("date", 1, "datetime.date"), ("list", 1, "holds a list")]


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize("main, flag", [
    (pretrain.main, "--resume"), (pretrain.main, "--init"), (lincls.main, "--pretrained"),
    (lincls.main, "--evaluate")])
@pytest.mark.parametrize("kind, status, words", SPOILT)
def test_a_spoilt_checkpoint_is_one_line_of_our_own(run, main, flag, kind, status, words, tmp_path,
                                                    call):
    path = tmp_path / "spoilt.pth"
    spoil(run, kind, path)
    code, out, errors = call(main, flag, path, "--device", "cpu", "--output", tmp_path / "out")
    assert code == status, errors
    one_line(errors, "spoilt.pth", words)
    assert "weights_only" not in out + errors and "torch.load" not in out + errors
    assert not path.with_suffix(".ran").exists()


def test_a_legacy_file_is_said_to_be_broken_wherever_it_was_cut(run, tmp_path):
    path = tmp_path / "it.pth"
    torch.save(torch.load(run / "backbone.pth"), path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for size in range(1, 2000, 7):
        path.write_bytes(whole[:size])
        with pytest.raises(pretrain.FileError, match="not a whole checkpoint"):
            pretrain.load(path)


def test_a_file_that_cannot_be_read_is_not_taken_for_a_damaged_one(run, tmp_path, monkeypatch):
    def stale(*_):
        raise OSError(116, "Stale file handle")
    own = shutil.copytree(run, tmp_path / "run") / "checkpoint.pth"
    shutil.copy(own, own.with_suffix(".prev.pth"))
    monkeypatch.setattr(pretrain.zipfile, "is_zipfile", stale)
    with pytest.raises(pretrain.RunError, match="Stale file handle"):
        pretrain.load_or_previous(own, own)
    assert own.exists()


@pytest.mark.parametrize("thing", [
    np.float64(0.1), np.float32(0.1), np.int64(3), np.bool_(True), np.uint8(3), np.float16(0.5)])
def test_numpy_scalars_in_a_checkpoint_are_accepted(thing, tmp_path):
    torch.save({"best": thing}, tmp_path / "it.pth")
    assert pretrain.load(tmp_path / "it.pth") == {"best": thing}


def test_arrays_and_paths_in_a_checkpoint_are_accepted(tmp_path):
    torch.save(dict(x=np.arange(3.0), path=Path("a/b")), tmp_path / "it.pth")
    found = pretrain.load(tmp_path / "it.pth")
    assert found["x"].tolist() == [0, 1, 2] and found["path"] == Path("a/b")


@pytest.mark.parametrize("thing, name", [
    (range(3), "range"), (frozenset("a"), "frozenset"), (np.array([{}]), "Object")])
def test_an_object_that_is_refused_is_named(thing, name, tmp_path):
    torch.save({"thing": thing}, tmp_path / "it.pth")
    with pytest.raises(pretrain.FileError, match=f"data alone: it holds a .*{name}"):
        pretrain.load(tmp_path / "it.pth")


def test_the_other_scripts_checkpoint_is_no_resume(run, short, tmp_path, call):
    code, _, errors = call(lincls.main, "--pretrained", run / "backbone.pth", "--arch", "tiny",
                           "--device", "cpu", "--resume", run / "checkpoint.pth", "--output",
                           tmp_path / "out")
    assert code == 2
    one_line(errors, "a checkpoint of the other script")


def test_a_published_checkpoint_with_a_namespace_and_scalars_is_taken(run, short, tmp_path):
    """As MoCo's, PCL's and many others' training scripts save them."""
    ours = read_checkpoint(run)
    torch.save({"args": argparse.Namespace(lr=0.03, arch="resnet50"), "best_acc1": np.float64(1.5),
                "epoch": np.int64(3), "state_dict": ours["state_dict"]}, tmp_path / "moco.pth.tar")
    said = here(pretrain.main, *short, "--epochs", 1, "--init", tmp_path / "moco.pth.tar",
                "--output", tmp_path / "run")
    assert "module.encoder_q." in said


def test_an_object_that_only_looks_like_a_namespace_is_refused(tmp_path):
    torch.save({"args": types.SimpleNamespace(lr=3)}, tmp_path / "it.pth")
    with pytest.raises(pretrain.FileError, match="SimpleNamespace"):
        pretrain.load(tmp_path / "it.pth")


def test_a_backbone_of_another_arch_is_refused_by_init(run, short, tmp_path, call):
    code, _, errors = call(pretrain.main, *short, "--arch", "resnet18", "--init",
                           run / "backbone.pth", "--output", tmp_path / "out")
    assert code == 2
    one_line(errors, f"{run / 'backbone.pth'}: ", "--arch resnet18 with the small-image stem")


# ---------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("flags, words", [
    (["--arch", "shufflenet_v2_x0_5"], "--arch tiny (now shufflenet_v2_x0_5)"),
    (["--dim", "64"], "--dim 128 (now 64)"), (["--no-mlp"], "--mlp True (now False)"),
    (["--queue-size", "50"], "--queue-size 88 (now 50)"),
    (["--batch-size", "100"], "--batch-size 170 (now 100)")])
def test_a_resume_whose_flags_would_change_the_model_is_refused(run, short, flags, words, tmp_path,
                                                                call):
    code, _, errors = call(pretrain.main, *short, "--epochs", 1, *flags, "--resume",
                           run / "checkpoint.pth", "--output", tmp_path / "out")
    assert code == 2
    one_line(errors, words)


def test_another_number_of_cores_is_no_other_flag(run, short, tmp_path, monkeypatch):
    output = shutil.copytree(run, tmp_path / "run")
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3))
    said = here(pretrain.main, *short, "--epochs", 1, "--output", output, "--resume", "auto")
    assert "resumed with" not in said


@pytest.mark.parametrize("same", [True, False])
def test_a_resume_on_as_many_other_images_is_refused(same, run, short, tmp_path, call):
    images, labels = digits()
    images = np.pad(images.repeat(3, 1).repeat(3, 2), ((0, 0), (2, 2), (2, 2)))
    if not same:
        images[5, 9, 9] += 1
    root = write_fashion_mnist(tmp_path / "data", (images[:352], labels[:352]),
                               (images[352:400], labels[352:400]))
    code, _, errors = call(pretrain.main, root, *short[1:], "--epochs", 1, "--resume",
                           run / "checkpoint.pth", "--output", tmp_path / "out")
    if same:
        assert code == 0, errors
    else:
        assert code == 2
        one_line(errors, "other images than these 352")


def test_an_output_folder_in_use_is_refused_and_left_as_it_is(run, short, call):
    before = files(run)
    code, _, errors = call(pretrain.main, *short, "--output", run)
    assert code == 2
    one_line(errors, f"--output {run}", "--resume auto", "another --output")
    assert files(run) == before


# -------------------------------------------------------------------------------------- the probe


def test_a_probe_of_another_arch_is_refused(run, tmp_path, call):
    code, _, errors = call(lincls.main, "--pretrained", run / "checkpoint.pth", "--arch",
                           "resnet18", "--device", "cpu", "--output", tmp_path / "out")
    assert code == 2
    one_line(errors, "checkpoint.pth", "--arch resnet18")


def test_a_probe_without_labels_is_refused(run, image_folder, tmp_path, call):
    code, _, errors = call(lincls.main, image_folder / "train" / "odd", "--dataset", "folder",
                           "--pretrained", run / "checkpoint.pth", "--device", "cpu", "--output",
                           tmp_path / "out")
    assert code == 2
    one_line(errors, "labels")


# ------------------------------------------------------------------------------ images and numbers


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_stops_the_run_and_is_named(image_folder, tmp_path, workers,
                                                                 call):
    shutil.copytree(image_folder, tmp_path / "images")
    broken = tmp_path / "images" / "train" / "odd" / "broken.jpg"
    broken.write_bytes(b"not an image")
    code, _, errors = call(pretrain.main, tmp_path / "images", *SMALL, "--crop-size", 32,
                           "--batch-size", 20, "--workers", workers, "--knn-every", 0, "--output",
                           tmp_path / "run")
    assert code == 1
    one_line(errors, str(broken), "loader.py")


def test_a_loss_that_is_not_finite_names_the_step_and_promises_only_what_is_known(
        short, tmp_path, call, monkeypatch):
    real, count = losses.info_nce, []

    def diverge(*inputs):
        count.append(inputs)
        loss, accuracy = real(*inputs)
        return loss * (float("nan") if len(count) == 4 else 1), accuracy
    monkeypatch.setattr(losses, "info_nce", diverge)
    code, _, errors = call(pretrain.main, *short, "--epochs", 2, "--output", tmp_path / "out")
    assert code == 1
    one_line(errors, "epoch 2, step 2", "not finite", "--lr", "--keep-every", "start anew")
    assert "is good" not in errors
    checkpoint = read_checkpoint(tmp_path / "out")
    assert checkpoint["epoch"] == 1
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


def test_weights_that_are_not_finite_are_not_saved(short, tmp_path, call, monkeypatch):
    real, count = builder.MoCo.enqueue, []

    def spoil_the_weights(model, k, index):
        real(model, k, index)
        count.append(k)
        if len(count) == 4:  # the last step of the second epoch
            builder.head_of(model.encoder_q)[0].bias.data[3] = float("inf")
    monkeypatch.setattr(builder.MoCo, "enqueue", spoil_the_weights)
    code, _, errors = call(pretrain.main, *short, "--epochs", 2, "--output", tmp_path / "out")
    assert code == 1
    one_line(errors, "epoch 2", "weights are not finite and were not saved", "--lr")
    assert read_checkpoint(tmp_path / "out")["epoch"] == 1


@pytest.mark.parametrize("skipped, ends", [(30, False), (31, True)])
def test_gradients_that_stay_not_finite_end_an_fp16_run(skipped, ends, tmp_path, group):
    args = pretrain.parse_args(["--output", str(tmp_path)])
    scaler, net = torch.amp.GradScaler("cpu"), torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(net.parameters(), 1)
    for _ in range(skipped):
        scaler.scale(net(torch.full((1, 1), torch.inf))).backward()
        scaler.step(optimizer)
        scaler.update()
    log, run = types.SimpleNamespace(mark=lambda: 0), dict(epoch=2)
    with pytest.raises(pretrain.Diverged, match="epoch 3") if ends else contextlib.nullcontext():
        pretrain.save_checkpoint(args, run, net, optimizer, scaler, log)
    assert (tmp_path / "checkpoint.pth").exists() != ends


def test_embeddings_that_are_not_finite_name_the_epoch(few, tmp_path, call, monkeypatch):
    monkeypatch.setattr(pretrain, "embed", lambda encoder, data, args: (
        torch.full((len(data), 4), float("nan")), None))
    code, _, errors = call(pretrain.main, *few, "--epochs", 1, "--warmup-epochs", 0, "--knn-every",
                           0, "--output", tmp_path / "out")
    assert code == 1
    one_line(errors, "epoch 1", "not finite", "--lr")


# ------------------------------------------------------------------ machines that are not this one


@pytest.fixture
def eight_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)


@pytest.mark.parametrize("flags, started", [
    ([], 2), (["--batch-size", "256"], 8), (["--batch-size", "20"], 1), (["--nproc", "8"], 8),
    (["--batch-size", "128", "--world-size", "2", "--dist-url", "tcp://localhost:1"], 2)])
def test_a_process_has_at_least_32_images_of_the_batch_unless_asked_for(flags, started, eight_gpus,
                                                                        monkeypatch, capsys):
    found = []
    monkeypatch.setattr(pretrain, "in_process", lambda _, __, ___, ____, nproc, *rest:
                        found.append(nproc))
    monkeypatch.setattr(pretrain.mp, "start_processes", lambda function, args, nproc, **_: (
        found.append(nproc), types.SimpleNamespace(processes=[]))[1])
    monkeypatch.setattr(pretrain, "supervise", lambda start, _: start())
    pretrain.main(flags)
    assert found == [started]
    said = capsys.readouterr().out
    assert (f"{started} of 8 GPUs" in said and "--nproc 8" in said) == (started < 8)


def test_the_probe_takes_every_gpu(eight_gpus):
    assert pretrain.processes(pretrain.parse_args([]), cuda=True, batch_size=None) == 8


@pytest.mark.parametrize("dataset, batch_size", [("folder", 256), ("digits", 64)])
def test_finetuning_shares_out_the_batch_of_the_data_set_that_was_trained_on(
        dataset, batch_size, run, tmp_path, monkeypatch):
    checkpoint, found = torch.load(run / "checkpoint.pth", weights_only=True), []
    checkpoint["args"].update(dataset=dataset, dir=str(tmp_path))
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    monkeypatch.setattr(pretrain, "launch", lambda _, __, size: found.append(size))
    for flags in (["--finetune"], ["--finetune", "--batch-size", "20"], []):
        lincls.main(["--pretrained", str(tmp_path / "checkpoint.pth"), *flags])
    assert found == [batch_size, 20, None]


def test_more_processes_than_gpus_are_refused(eight_gpus, call):
    code, _, errors = call(pretrain.main, "--nproc", 9)
    assert code == 2
    one_line(errors, "--nproc 9", "works here is 8")


@pytest.mark.parametrize("cuda, backend", [(True, "nccl"), (False, "gloo")])
def test_a_process_group_knows_its_gpu(cuda, backend, tmp_path, monkeypatch):
    def set_up(args, local_rank, *_):
        args.device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    groups = []
    monkeypatch.setattr(pretrain, "set_up", set_up)
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **options:
                        groups.append((args, options)))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    group = dict(init_method="tcp://localhost:1", rank=8, world_size=16)
    pretrain.in_process(3, lambda args: None, pretrain.parse_args([]), cuda, 8, group, tmp_path)
    (args, options), = groups
    assert args == (backend,) and (options["rank"], options["world_size"]) == (11, 16)
    assert options["timeout"].days == 1
    assert options.get("device_id") == (torch.device("cuda", 3) if cuda else None)


@pytest.mark.parametrize("torchrun, omp, nproc, expected", [
    (True, "1", 2, 6), (True, "1", 8, 4), (False, "1", 2, None), (False, None, 1, 12)])
def test_threads_of_kmeans_are_the_cores_of_the_processes_that_cluster_at_once(
        torchrun, omp, nproc, expected, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    if omp:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12), raising=False)
    args = pretrain.parse_args(["--num-clusters", "5", "6", "7"])
    pretrain.set_up(args, 0, False, nproc)
    assert args.kmeans_threads == expected


@pytest.mark.parametrize("cores, workers", [(4, 1), (16, 2), (999, 16)])
def test_a_gpu_has_at_least_one_data_worker(cores, workers, eight_gpus, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    args = pretrain.parse_args([])
    pretrain.set_up(args, 0, True, 8)
    assert (args.workers, args.amp) == (workers, "bf16")


def test_torchruns_store_waits_as_long_as_the_group_and_unused_flags_are_said(monkeypatch, capsys):
    store, joined = dist.HashStore(), []
    monkeypatch.setattr(dist, "rendezvous", lambda _: iter([(store, 0, 2)]))
    for name, value in dict(TORCHELASTIC_RUN_ID="x", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(pretrain, "name_of_start", lambda *_: "start")
    monkeypatch.setattr(pretrain, "in_process", lambda *args: joined.append(args))
    pretrain.join_torchrun(None, pretrain.parse_args(["--nproc", "3", "--rank", "1"]), False)
    assert store.timeout == pretrain.DAY and joined[0][5]["store"].timeout == pretrain.DAY
    said = capsys.readouterr().out
    assert "--nproc --rank" in said and "--world-size" not in said


@pytest.mark.parametrize("sizes", [(2, 2), (3, 3, 3), (2, 3, 1)])
def test_processes_meet_under_a_name_of_their_own_start_of_torchrun(sizes):
    """Also after others that have come to nothing, with as many processes or with others."""
    store, names = dist.HashStore(), []
    for size in sizes:
        store.set("word of 0", "of one that has died before the others came")
        with ThreadPoolExecutor(size) as pool:
            found = []
            for rank in reversed(range(size)):
                found.append(pool.submit(pretrain.name_of_start, store, rank, size))
                time.sleep(0.15)
            names.append({one.result(20) for one in found})
    assert all(len(name) == 1 for name in names) and len(set.union(*names)) == len(sizes)


@pytest.mark.parametrize("statuses, killed, caught, status", [
    ([0, 0], {}, 0, 0), ([1, 0], {}, 0, 1), ([1, 2], {}, 0, 2), ([0, -9], {1: 9}, 0, 1),
    ([143, 143], {}, 15, 143), ([138, 0], {}, 10, 138), ([1, 138], {}, 10, 1),
    ([143, 2], {}, 15, 2), ([-15, 143], {}, 15, 143), ([0, 0], {}, 15, 143),
    ([-2, 130], {}, 9, 130), ([143, 1], {}, 0, 143)])
def test_the_status_of_a_job_is_that_of_what_failed(statuses, killed, caught, status):
    assert pretrain.job_status(statuses, killed, caught) == status
