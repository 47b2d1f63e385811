"""Whole runs of both scripts, and what they leave."""
import gzip
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from conftest import REPO, SMALL, assert_same, read_log, same_ending, script, untimed
from torchvision import models

import builder
import lincls
import loader
import pretrain

TERMS = {"loss", "loss_ins", "loss_proto", "loss_align", "loss_uniform", "loss_corr", "acc_ins", "acc_proto", "lr",
         "images_per_s"}
FIGURES = {"diversity", "separation", "effective_rank", "balance", "empty", "kmeans_objective", "seconds_embed",
           "seconds_kmeans", "knn"}


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """Three epochs, of which one is warm-up, with a copy of every checkpoint that was written."""
    output = tmp_path_factory.mktemp("digits") / "run"
    done = script("pretrain.py", *SMALL, "--batch-size", 128, "--epochs", 3, "--warmup-epochs", 1, "--print-every", 3,
                  "--keep-every", 1, "--num-negatives", 40, "--output", output)
    assert done.returncode == 0, done.stderr
    return output


def test_the_log_has_every_term_and_figure(digits_run):
    log = read_log(digits_run)
    assert log[0].keys() == {"epoch", "step", "knn"} and log[0]["epoch"] == 0
    steps, epochs = [line for line in log if "loss" in line], [line for line in log[1:] if "loss" not in line]
    assert [line["step"] for line in steps] == list(range(3, 3 * 11 + 1, 3)) and [line["epoch"] for line in epochs] == [1, 2, 3]
    assert all(TERMS <= line.keys() for line in steps if line["epoch"] > 1)
    assert all("loss_proto" not in line and line["loss"] == line["loss_ins"] for line in steps if line["epoch"] == 1)
    assert FIGURES.isdisjoint(epochs[0].keys() - {"knn"}) and all(FIGURES <= line.keys() for line in epochs[1:])
    assert all(len(line[name]) == 3 for line in epochs[1:] for name in ("diversity", "separation", "balance", "empty"))
    assert list(digits_run.glob("events.out.tfevents.*"))


def test_the_backbone_loads_in_torchvision_but_for_its_final_layer(tmp_path, call):
    status, _, errors = call(pretrain.main, *SMALL, "--crop-size", 64, "--epochs", 1, "--num-clusters", 0, "--batch-size", 512,
                             "--knn-every", 0, "--output", tmp_path / "run")
    assert status == 0, errors
    weights = torch.load(tmp_path / "run" / "backbone.pth", weights_only=True)
    keys = models.shufflenet_v2_x0_5().load_state_dict(weights, strict=False)
    assert keys.missing_keys == ["fc.weight", "fc.bias"] and not keys.unexpected_keys


def test_a_run_resumed_after_its_second_epoch_is_the_uninterrupted_one(digits_run, tmp_path):
    resumed = tmp_path / "run"
    resumed.mkdir()
    shutil.copy(digits_run / "checkpoint_0002.pth", resumed / "checkpoint.pth")
    shutil.copy(digits_run / "log.jsonl", resumed / "log.jsonl")  # with lines from after the checkpoint
    done = script("pretrain.py", *SMALL, "--batch-size", 128, "--epochs", 3, "--warmup-epochs", 1, "--print-every", 3,
                  "--keep-every", 1, "--num-negatives", 40, "--output", resumed, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    same_ending(digits_run, resumed)
    assert untimed(read_log(resumed)) == untimed(read_log(digits_run))


def test_the_default_weights_gain_most_in_the_readmes_table():
    """In linear top-1 over PCL, on held-out images."""
    row = re.compile(r"^\| PAUC ([\d.]+) ([\d.]+) ([\d.]+)[^|]* − PCL \| 2 \| [^|]* \| ([+-][\d.]+) ", re.MULTILINE)
    rows = [tuple(map(float, found)) for found in row.findall((REPO / "README.md").read_text())]
    args = pretrain.parse_args(["DIR"])
    assert len(rows) > 4 and max(rows, key=lambda values: values[3])[:3] == (args.align, args.uniform, args.corr)


def test_a_resumed_run_takes_another_weight_decay_and_momentum(digits_run, tmp_path, call):
    (tmp_path / "run").mkdir()
    shutil.copy(digits_run / "checkpoint_0002.pth", tmp_path / "run" / "checkpoint.pth")
    status, out, _ = call(pretrain.main, *SMALL, "--batch-size", 128, "--epochs", 3, "--wd", 0.5, "--momentum", 0.5,
                          "--knn-every", 0, "--output", tmp_path / "run", "--resume", "auto")
    assert status == 0 and "--wd 0.0001 (now 0.5)" in out
    group, = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)["optimizer"]["param_groups"]
    assert (group["weight_decay"], group["momentum"]) == (0.5, 0.5)


def test_a_run_resumed_within_an_epoch_is_the_uninterrupted_one(tmp_path, call, monkeypatch):
    flags = [*SMALL, "--batch-size", 128, "--epochs", 3, "--warmup-epochs", 1, "--print-every", 3, "--num-negatives", 40,
             "--keep-every", 1]
    assert call(pretrain.main, *flags, "--output", tmp_path / "whole")[0] == 0
    first, real_enqueue, count = tmp_path / "run", builder.MoCo.enqueue, [0]

    def stop_in_the_second_epoch(model, k):
        real_enqueue(model, k)
        count[0] += 1
        if count[0] == 18:
            raise OSError("stopped here")
    with monkeypatch.context() as patch:
        patch.setattr(builder.MoCo, "enqueue", stop_in_the_second_epoch)
        assert call(pretrain.main, *flags, "--save-every", 7, "--output", first)[0] == 1
    assert torch.load(first / "checkpoint.pth", weights_only=True)["step"] == 3  # step 14 of the run
    monkeypatch.setattr(pretrain, "kmeans", lambda *_: (_ for _ in ()).throw(OSError("clustered again")))
    _, _, errors = call(pretrain.main, *flags, "--output", first, "--resume", "auto")
    assert "clustered again" in errors  # in the third epoch, not in the rest of the second
    a, b = (torch.load(path, weights_only=True) for path in (first / "checkpoint.pth",
                                                             tmp_path / "whole" / "checkpoint_0002.pth"))
    for name in ("state_dict", "optimizer", "epoch", "step"):
        assert_same(a[name], b[name], name)


def test_another_seed_is_another_run(digits_run, tmp_path, call):
    call(pretrain.main, *SMALL, "--epochs", 1, "--seed", 1, "--warmup-epochs", 1, "--output", tmp_path / "run")
    a, b = (torch.load(path, weights_only=True)["state_dict"]["queue"]
            for path in (tmp_path / "run" / "checkpoint.pth", digits_run / "checkpoint_0001.pth"))
    assert not torch.equal(a, b)


def test_the_probe_reports_resumes_and_evaluates(digits_run, tmp_path, call):
    output = tmp_path / "probe"
    flags = ["--pretrained", digits_run / "checkpoint.pth", "--device", "cpu", "--epochs", 3, "--lr", 100, "--output",
             output]
    status, out, errors = call(lincls.main, *flags)
    assert status == 0, errors
    last = read_log(output)[-1]
    assert last["epoch"] == 3 and 20 < last["top1"] <= last["best"] <= 100 and last["top1"] <= last["top5"]
    status, out, _ = call(lincls.main, "--evaluate", output / "checkpoint.pth", "--device", "cpu")
    assert status == 0 and f"top1 {last['top1']:.2f}  top5 {last['top5']:.2f}" in out
    once = tmp_path / "once"
    assert call(lincls.main, *flags[:-1], once, "--save-every", 4)[0] == 0
    same_ending(output, once)


@pytest.mark.parametrize("source", ["checkpoint.pth", "backbone.pth", "moco.pth"])
def test_the_probe_takes_every_kind_of_checkpoint_and_its_knn_is_the_monitors(digits_run, tmp_path, call, source):
    path = digits_run / source
    if source == "moco.pth":
        checkpoint = torch.load(digits_run / "checkpoint.pth", weights_only=True)
        path = tmp_path / "moco.pth"
        torch.save({"epoch": 3, "arch": checkpoint["arch"], "optimizer": checkpoint["optimizer"], "state_dict": {
            f"module.{name}": value for name, value in checkpoint["state_dict"].items()}}, path)
    status, out, errors = call(lincls.main, "--pretrained", path, "--knn", "--device", "cpu", "-a", "shufflenet_v2_x0_5",
                               "--output", tmp_path / "probe")
    assert status == 0, errors
    assert f"knn {read_log(digits_run)[-1]['knn']:.2f}" in out


def test_the_probe_fails_when_the_backbone_moves(digits_run, tmp_path, call, monkeypatch):
    real = builder.without_head
    monkeypatch.setattr(builder, "without_head", lambda net: type("Moving", (), {
        "eval": lambda self: net.train(), "__call__": lambda self, image: real(net)(image)})())
    status, _, errors = call(lincls.main, "--pretrained", digits_run / "checkpoint.pth", "--device", "cpu", "--epochs", 1,
                             "--output", tmp_path / "probe")
    assert status == 1 and "the frozen backbone moved" in errors


def test_a_folder_of_mixed_images_runs_through_both_scripts(image_folder, tmp_path):
    flags = ["--epochs", 2, "--batch-size", 20, "--device", "cpu", "--crop-size", 32, "--workers", 2]
    done = script("pretrain.py", image_folder, *SMALL, *flags, "--warmup-epochs", 1, "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "--queue-size 60, not 16384: fitted" in done.stdout and read_log(tmp_path / "run")[-1]["knn"] > 0
    done = script("lincls.py", image_folder, *flags, "--pretrained", tmp_path / "run" / "checkpoint.pth")
    assert done.returncode == 0, done.stderr
    assert read_log(tmp_path / "run" / "lincls")[-1]["top5"] == 100


def test_unlabelled_images_train_without_the_monitor(image_folder, tmp_path, call):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (image_folder / "train").rglob("*.*"):
        shutil.copy(path, flat)
    status, out, errors = call(pretrain.main, flat, *SMALL, "--epochs", 1, "--warmup-epochs", 0, "--crop-size", 32,
                               "--batch-size", 20, "--output", tmp_path / "run")
    assert status == 0, errors
    assert "diversity" in read_log(tmp_path / "run")[-1] and "knn" not in out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_default_trains_on_a_gpu(tmp_path):
    done = script("pretrain.py", "--device", "cuda", "--nproc", 1, "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    knn = [line["knn"] for line in read_log(tmp_path / "run") if "knn" in line]
    assert "1 x cuda" in done.stdout and knn[-1] > knn[0]


@pytest.mark.parametrize("launcher", [["--nproc", "2"], ["torchrun"]])
def test_two_processes_train_the_default(launcher, tmp_path):
    start = dict(launcher=(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29571")
                 ) if launcher == ["torchrun"] else {}
    flags = [] if start else launcher
    done = script("pretrain.py", "--device", "cpu", "--epochs", 1, "--num-clusters", 20, 30, 40,
                  "--output", tmp_path / "run", *flags, **start)
    assert done.returncode == 0, done.stderr
    log = read_log(tmp_path / "run")
    assert log[-1]["epoch"] == 1 and len(log[-1]["diversity"]) == 3 and "2 x cpu" in done.stdout


def test_two_processes_log_what_one_with_two_bn_splits_does(tmp_path):
    flags = [*SMALL, "--epochs", 1, "--num-clusters", 0, "--print-every", 1, "--lr", 1e-4]
    for name, more in (("one", ["--bn-splits", 2]), ("two", ["--nproc", 2])):
        done = script("pretrain.py", *flags, *more, "--output", tmp_path / name)
        assert done.returncode == 0, done.stderr
    one, two = (read_log(tmp_path / name) for name in ("one", "two"))
    assert one[0]["knn"] == pytest.approx(two[0]["knn"], abs=0.3)
    for step, tolerance in ((1, 1e-5), (2, 1e-3)):  # float32's rounding grows fast from step to step
        assert one[step]["loss_ins"] == pytest.approx(two[step]["loss_ins"], rel=tolerance)


def embed_shard(rank, world_size, path):
    dist.init_process_group("gloo", init_method=f"file://{path}/meet{world_size}", rank=rank, world_size=world_size)
    torch.manual_seed(0)
    args = pretrain.parse_args([])
    args.device, args.amp, args.workers, args.batch_size = torch.device("cpu"), "off", 0, 100
    encoder = builder.build_backbone("shufflenet_v2_x0_5", small_images=True, num_classes=4)
    data = loader.load("digits", None, "val")
    data.images, data.labels = data.images[:11], data.labels[:11]
    v, labels = pretrain.embed(encoder, data, args)
    torch.save((builder.gather(v)[:11], builder.gather(labels)[:11], data.labels), path / f"{world_size}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 3])
def test_embedding_holds_every_image_once_when_processes_do_not_divide_them(world_size, tmp_path):
    mp.spawn(embed_shard, (world_size, tmp_path), world_size)
    embed_shard(0, 1, tmp_path)
    expected, labels, true_labels = torch.load(tmp_path / "1-0.pt")
    assert torch.equal(labels, true_labels) and len(expected.unique(dim=0)) == 11
    for rank in range(world_size):
        v, labels, _ = torch.load(tmp_path / f"{world_size}-{rank}.pt")
        torch.testing.assert_close(v, expected)
        assert torch.equal(labels, true_labels)


def test_kmeans_finds_clusters_that_are_there():
    args = pretrain.parse_args([])
    args.device = torch.device("cpu")
    centres = F.normalize(torch.randn(6, 128, generator=torch.Generator().manual_seed(0)), dim=1)
    truth = torch.arange(300) % 6
    v = F.normalize(centres[truth] + 0.02 * torch.randn(300, 128, generator=torch.Generator().manual_seed(1)), dim=1)
    assignments, prototypes, phi, objective = pretrain.kmeans(v, 6, 0, args)
    own = prototypes[assignments]
    assert (own - centres[truth]).norm(dim=1).max() < 0.1 and prototypes.norm(dim=1).allclose(torch.ones(6))
    assert phi.mean().item() == pytest.approx(args.temperature, rel=1e-5)
    means = torch.stack([v[truth == j].mean(0) for j in range(6)])[truth]
    assert objective.item() == pytest.approx((v - means).square().sum().item(), rel=1e-3)


def test_coagulation_figures_equal_plain_loops():
    v = F.normalize(torch.randn(40, 5, generator=torch.Generator().manual_seed(0)).double(), dim=1)
    assignments = torch.tensor([0] * 20 + [1] * 12 + [3] * 7 + [4])
    prototypes = F.normalize(torch.randn(5, 5, generator=torch.Generator().manual_seed(1)).double(), dim=1)
    figures = pretrain.coagulation(v, assignments, prototypes)

    def spread(x):
        return np.mean([((a - b) ** 2).sum().item() for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    assert figures["diversity"] == pytest.approx(np.mean([spread(v[assignments == j]) for j in (0, 1, 3)]))
    assert figures["separation"] == pytest.approx(spread(prototypes))
    shares = np.array([20, 12, 7, 1]) / 40
    assert figures["balance"] == pytest.approx(-(shares * np.log(shares)).sum() / np.log(5)) and figures["empty"] == 1


def test_effective_rank_of_equal_axes_is_their_number():
    axes = torch.cat([torch.eye(6), -torch.eye(6)])[:, :]
    assert pretrain.effective_rank(axes) == pytest.approx(6)
    assert pretrain.effective_rank(torch.ones(9, 4)) == pytest.approx(1)


def test_learning_rate_is_a_half_cosine_or_steps():
    args = pretrain.parse_args(["--lr", "2", "--epochs", "10"])
    assert [pretrain.learning_rate(epoch, args) for epoch in (0, 5, 10)] == pytest.approx([2, 1, 0])
    args = pretrain.parse_args(["--lr", "2", "--schedule", "4", "8"])
    assert [pretrain.learning_rate(epoch, args) for epoch in (3.9, 4, 8.5)] == pytest.approx([2, 0.2, 0.02])


def test_mocos_and_pcls_flag_names_are_aliases():
    args = pretrain.parse_args("--moco-k 99 --moco-t 0.5 --moco-dim 7 --pcl-r 3 --num-cluster 5 6".split())
    assert (args.queue_size, args.temperature, args.dim, args.num_negatives, args.num_clusters) == (99, 0.5, 7, 3, [5, 6])


DEBIAN = Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_learns(tmp_path):
    """PAUC on 10,000 training images, judged on 2,000 others: at least 3 points of kNN over the untrained network."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for split, count in (("train", 10_000), ("t10k", 2_000)):
        for kind, header, size in (("images-idx3", 16, 784), ("labels-idx1", 8, 1)):
            data = gzip.decompress((DEBIAN / f"{split}-{kind}-ubyte.gz").read_bytes())[:header + count * size]
            (raw / f"{split}-{kind}-ubyte.gz").write_bytes(gzip.compress(data, 1))
    done = script("pretrain.py", tmp_path, "--dataset", "fashionmnist", *SMALL, "--crop-size", 14, "--min-scale", 0.5,
                  "--epochs", 4, "--warmup-epochs", 2, "--batch-size", 64, "--queue-size", 256, "--output", tmp_path / "run",
                  timeout=500)
    assert done.returncode == 0, done.stderr
    log = read_log(tmp_path / "run")
    figures = [line for line in log if "diversity" in line]
    assert len(figures) == 2 and min(figures[-1]["separation"]) > 1  # the embeddings have not collapsed
    knn = [line["knn"] for line in log if "knn" in line]
    assert knn[-1] >= knn[0] + 3, knn
