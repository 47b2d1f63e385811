"""Whole runs of pre-training, and what they leave."""
import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import (REAL, REPO, SMALL, assert_same, digits, here, in_processes,
                      read_checkpoint, read_log, same_ending, script, untimed, write_fashion_mnist)
from torchvision import models

import builder
import loader
import losses
import pretrain
import study

TERMS = {"loss", "loss_ins", "loss_proto", "loss_align", "loss_uniform", "loss_corr", "acc_ins",
         "acc_proto", "images_per_prototype", "lr", "images_per_s"}
FIGURES = {"diversity", "separation", "effective_rank", "balance", "empty", "kmeans_objective",
           "seconds_embed", "seconds_kmeans", "knn"}
WEIGHTS = dict(proto=1, align=0.3, uniform=0.3, corr=0.3)
THREE_EPOCHS = "--epochs", 3, "--keep-every", 1, "--num-negatives", 25


@pytest.fixture(scope="module")
def whole(few, tmp_path_factory):
    """Three epochs, of which one is warm-up, with a copy of every epoch's checkpoint; and what was
    said."""
    output = tmp_path_factory.mktemp("whole") / "run"
    return output, here(pretrain.main, *few, *THREE_EPOCHS, "--output", output)


def copied(run, name, to):
    """An output folder as it was when the checkpoint of that name was written."""
    to.mkdir()
    shutil.copy(run / name, to / "checkpoint.pth")
    shutil.copy(run / "log.jsonl", to / "log.jsonl")  # with lines from after the checkpoint
    return to


# ------------------------------------------------------------------------------ what a run leaves


def test_the_log_has_every_term_and_figure(whole):
    output, _ = whole
    log = read_log(output)
    assert log[0].keys() == {"epoch", "step", "knn"} and log[0]["epoch"] == 0
    steps = [line for line in log if "loss" in line]
    epochs = [line for line in log[1:] if "loss" not in line]
    assert [line["step"] for line in steps] == list(range(3, 3 * 11 + 1, 3))
    assert [line["epoch"] for line in epochs] == [1, 2, 3]
    assert all(line.keys() == TERMS | {"epoch", "step"} for line in steps if line["epoch"] > 1)
    assert all("loss_proto" not in line and line["loss"] == line["loss_ins"]
               for line in steps if line["epoch"] == 1)
    assert FIGURES.isdisjoint(epochs[0].keys() - {"knn"})
    assert FIGURES <= epochs[2].keys() and FIGURES - {"knn"} <= epochs[1].keys()
    assert all(len(line[name]) == 2 for line in epochs[1:]
               for name in ("diversity", "separation", "balance", "empty", "kmeans_objective"))
    assert list(output.glob("events.out.tfevents.*"))


def test_the_logged_loss_is_the_weighted_sum_of_the_logged_terms(whole):
    for line in read_log(whole[0]):
        if "loss_proto" in line:
            total = sum(weight * line[f"loss_{name}"] for name, weight in WEIGHTS.items())
            assert line["loss"] == pytest.approx(line["loss_ins"] + total, rel=1e-5)


def test_the_first_line_of_the_log_holds_the_flags(whole, few):
    first, *_ = (json.loads(line) for line in (whole[0] / "log.jsonl").read_text().splitlines())
    flags = first["flags"]
    assert first.keys() == {"flags"}
    assert (flags["dir"], flags["epochs"], flags["num_clusters"]) == (str(few[0]), 3, [20, 40])
    assert flags["queue_size"] == 352 // 4  # as it was fitted


def test_a_line_on_the_terminal_has_at_most_120_characters(whole):
    _, said = whole
    lines = [line for line in said.splitlines() if line.startswith("epoch ")]
    ends = [line for line in lines if "step" not in line]
    assert len(ends) == 4 and max(map(len, lines)) <= 120, said
    assert all(word in ends[-1] for word in ("3/3", "loss", "kNN", "diversity", "rank", "seconds"))


def test_the_start_says_what_was_understood(whole):
    _, said = whole
    start = said[:said.index("epoch 0")]
    for words in ("352 images in 10 classes", "48 to evaluate on", "queue 88",
                  "prototypes 20 40", "11 steps of 32 images", "1 x cpu"):
        assert words in start
    assert len(start.splitlines()) < 12


def test_the_checkpoint_has_the_names_of_mocos_and_the_queues_images(whole):
    state = read_checkpoint(whole[0])["state_dict"]
    assert all(name.startswith("module.") for name in state)
    assert {"module.queue", "module.queue_ptr", "module.encoder_q.conv1.weight",
            "module.encoder_k.fc.2.bias"} <= state.keys()
    images = state["module.queue_index"]
    assert images.shape == (88,) and images.min() >= 0 and images.max() < 352
    assert len(images[-24:].unique()) == 24  # of one batch


def test_the_backbone_loads_in_torchvision_but_for_its_final_layer(few, tmp_path):
    here(pretrain.main, *few, "--arch", REAL, "--crop-size", 64, "--epochs", 1, "--num-clusters", 0,
         "--batch-size", 352, "--knn-every", 0, "--output", tmp_path / "run")
    weights = torch.load(tmp_path / "run" / "backbone.pth", weights_only=True)
    keys = models.shufflenet_v2_x0_5().load_state_dict(weights, strict=False)
    assert keys.missing_keys == ["fc.weight", "fc.bias"] and not keys.unexpected_keys


# ------------------------------------------------------------------------------------- resumed runs


def test_a_run_resumed_after_its_second_epoch_is_the_uninterrupted_one(whole, few, tmp_path):
    resumed = copied(whole[0], "checkpoint_0002.pth", tmp_path / "run")
    here(pretrain.main, *few, *THREE_EPOCHS, "--output", resumed, "--resume", "auto")
    same_ending(whole[0], resumed)
    assert "module.queue_index" in read_checkpoint(resumed)["state_dict"]
    assert untimed(read_log(resumed)) == untimed(read_log(whole[0]))


def test_a_run_resumed_within_an_epoch_is_the_uninterrupted_one(whole, few, tmp_path, call,
                                                                 monkeypatch):
    output, real, count = tmp_path / "run", builder.MoCo.enqueue, []

    def stop_in_the_second_epoch(model, k, index):
        real(model, k, index)
        count.append(k)
        if len(count) == 18:
            raise OSError("stopped here")
    with monkeypatch.context() as patch:
        patch.setattr(builder.MoCo, "enqueue", stop_in_the_second_epoch)
        status, _, errors = call(pretrain.main, *few, *THREE_EPOCHS, "--save-every", 7,
                                 "--output", output)
        assert status == 1 and "stopped here" in errors
    assert read_checkpoint(output)["step"] == 3  # step 14 of the run

    def once_more(*_):
        raise OSError("clustered again")
    monkeypatch.setattr(pretrain, "kmeans", once_more)
    _, _, errors = call(pretrain.main, *few, *THREE_EPOCHS, "--output", output, "--resume", "auto")
    assert "clustered again" in errors  # in the third epoch, not in the rest of the second
    a, b = read_checkpoint(output), read_checkpoint(whole[0] / "checkpoint_0002.pth")
    for name in ("state_dict", "optimizer", "epoch", "step"):
        assert_same(a[name], b[name], name)


def test_a_resumed_run_takes_another_weight_decay_and_momentum(whole, few, tmp_path):
    output = copied(whole[0], "checkpoint_0002.pth", tmp_path / "run")
    said = here(pretrain.main, *few, *THREE_EPOCHS, "--wd", 0.5, "--momentum", 0.5, "--knn-every",
                0, "--output", output, "--resume", "auto")
    assert "--wd 0.0001 (now 0.5)" in said and "--momentum 0.9 (now 0.5)" in said
    group, = read_checkpoint(output)["optimizer"]["param_groups"]
    assert (group["weight_decay"], group["momentum"]) == (0.5, 0.5)


def test_another_seed_is_another_run(whole, few, tmp_path):
    here(pretrain.main, *few, "--epochs", 1, "--knn-every", 0, "--seed", 1, "--output",
         tmp_path / "run")
    a, b = (read_checkpoint(path)["state_dict"]["module.queue"]
            for path in (tmp_path / "run", whole[0] / "checkpoint_0001.pth"))
    assert not torch.equal(a, b)


# ----------------------------------------------------------------------------------- adding to it

SPREAD = '''

def spread(q, index, queue_index, epoch):
    """A fork's: it sees all of the batch."""
    assert index.shape == (len(q),) and queue_index.ndim == 1 and epoch >= 0
    return q.square().sum(1).mean() - q.mean(0).square().sum()
'''
ADDED = """\
        add("spread", args.spread, share, losses.spread, q, batch.index, batch.queue_index,
            batch.epoch)
"""


@pytest.fixture
def fork(tmp_path):
    """A copy of the five files with one more term: a function, a line in pauc, and a flag."""
    folder = tmp_path / "fork"
    folder.mkdir()
    for name in ("losses.py", "builder.py", "loader.py", "pretrain.py", "lincls.py"):
        shutil.copy(REPO / name, folder)
    with open(folder / "losses.py", "a") as file:
        file.write(SPREAD)
    code = (folder / "pretrain.py").read_text()
    for before, line in (('        add("corr", args.corr', ADDED), ('    add("--align-alpha"',
                         '    add("--spread", type=natural_float, default=0.5)\n')):
        assert code.count(before) == 1
        code = code.replace(before, line + before)
    (folder / "pretrain.py").write_text(code)
    return folder


def test_a_fork_adds_a_term_by_a_function_a_line_and_a_flag(fork, few, tmp_path):
    output = tmp_path / "run"
    flags = [*few, "--arch", REAL, "--knn-every", 0, "--warmup-epochs", 0, "--print-every", 1,
             "--output", output]
    code = f"import pretrain; flags = {[*map(str, flags)]!r}\n"
    code += "pretrain.main(flags + ['--epochs', '1'])\n"
    code += "pretrain.main(flags + ['--epochs', '2', '--resume', 'auto'])"
    done = script("-c", code, cwd=fork)
    assert done.returncode == 0, done.stderr
    log = read_log(output)
    steps = [line for line in log if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 23))  # the second half was resumed
    for line in steps:
        terms = sum(weight * line[f"loss_{name}"] for name, weight in WEIGHTS.items())
        added = line["loss"] - line["loss_ins"] - terms
        assert line["loss_spread"] > 0.01
        assert added == pytest.approx(0.5 * line["loss_spread"], rel=1e-2, abs=1e-4)


def test_a_term_without_a_weight_is_neither_trained_nor_logged(group):
    args = pretrain.parse_args(["--proto", "0", "--corr", "0"])
    args.device = torch.device("cpu")
    z = F.normalize(torch.randn(8, 4), dim=1)
    batch = losses.Batch(z, z, torch.arange(8), z.T, torch.full((8,), -2), slice(0, 8), 0, 0)
    found = [losses.Clustering(torch.arange(8) % 2, z[:2], torch.ones(2))]
    _, figures = pretrain.pauc(batch, found, args)
    assert figures.keys() == {"loss_ins", "acc_ins", "loss_uniform", "loss_align",
                              "images_per_prototype"}


@pytest.mark.parametrize("error", [ValueError, KeyError, OSError])
@pytest.mark.parametrize("place", ["builder.build_backbone", "losses.uniformity"])
def test_a_bug_in_a_fork_keeps_its_traceback(place, error, few, tmp_path, call, monkeypatch):
    def bug_of_a_fork(*args, **options):
        raise error("too many values to unpack")
    monkeypatch.setattr(place, bug_of_a_fork)
    status, _, errors = call(pretrain.main, *few, "--epochs", 1, "--warmup-epochs", 0,
                             "--knn-every", 0, "--output", tmp_path / "run")
    assert status == 1
    assert "Traceback" in errors and "in bug_of_a_fork" in errors
    assert "too many values to unpack" in errors.splitlines()[-1]


def test_a_figure_that_is_not_finite_is_logged_as_null_and_stops_nothing(few, tmp_path,
                                                                          monkeypatch):
    real = losses.info_nce
    monkeypatch.setattr(losses, "info_nce", lambda *inputs: (real(*inputs)[0],
                                                             torch.tensor(float("nan"))))
    here(pretrain.main, *few, "--batch-size", 117, "--epochs", 1, "--knn-every", 0, "--output",
         tmp_path / "run")
    steps = [line for line in read_log(tmp_path / "run") if "loss" in line]
    assert len(steps) == 1 and all(line["acc_ins"] is None and line["loss"] for line in steps)


# ------------------------------------------------------------------------------------------- flags


def test_the_default_weights():
    args = pretrain.parse_args(["DIR"])
    assert {name: getattr(args, name) for name in WEIGHTS} == WEIGHTS
    assert {name: getattr(pretrain.parse_args([]), name) for name in WEIGHTS} == WEIGHTS


def test_the_default_prototypes_queue_and_warm_up(group):
    args = pretrain.parse_args(["DIR"])
    args.bn_splits = 2
    pretrain.fit(args, 60_000)
    assert args.num_clusters == [1200, 2400, 5000] and args.queue_size == 15_000
    assert (args.warmup_epochs, args.epochs) == (20, 200)


def test_the_monitor_looks_before_training_only_where_that_is_quick_or_asked_for():
    asked = [], ["--dataset", "cifar10"], ["DIR", "--knn-every", "5"]
    assert all(pretrain.parse_args(flags).knn_first for flags in asked)
    assert not pretrain.parse_args(["DIR"]).knn_first


def test_mocos_and_pcls_flag_names_are_aliases():
    args = pretrain.parse_args("--moco-k 99 --moco-t 0.5 --low-dim 7 --pcl-r 3 --num-cluster 2,3 "
                               "--exp-dir X --warmup-epoch 1 -p 5 --learning-rate 2".split())
    assert (args.queue_size, args.temperature, args.dim, args.num_negatives) == (99, 0.5, 7, 3)
    assert (args.num_clusters, args.output, args.warmup_epochs) == ([2, 3], Path("X"), 1)
    assert (args.print_every, args.lr) == (5, 2)
    for text in (["2", "3"], ["2,3"]):
        assert pretrain.parse_args(["--num-clusters", *text]).num_clusters == [2, 3]


def test_command_lines_of_moco_and_pcl_run_and_say_what_has_no_use(few, tmp_path):
    moco = "--mlp --moco-t 0.2 --aug-plus --cos --multiprocessing-distributed --gpu 0".split()
    pcl = "--exp-dir", tmp_path / "run", "--warmup-epoch", 1, "--num-cluster", "2,3", "-p", 5
    said = here(pretrain.main, *few, *moco, *pcl, "-b", 64, "--epochs", 1, "--knn-every", 0)
    line, = (line for line in said.splitlines() if "--aug-plus" in line)
    assert all(name in line for name in ("--cos", "--multiprocessing-distributed", "--gpu"))
    assert [line["step"] for line in read_log(tmp_path / "run") if "loss" in line] == [5]


def test_proto_0_leaves_protonce_out(few, tmp_path):
    here(pretrain.main, *few, "--proto", 0, "--warmup-epochs", 0, "--epochs", 1, "--knn-every", 0,
         "--batch-size", 96, "--output", tmp_path / "run")
    steps = [line for line in read_log(tmp_path / "run") if "loss" in line]
    for line in steps:
        assert {"loss_align", "loss_uniform", "loss_corr"} <= line.keys()
        assert not {"loss_proto", "acc_proto"} & line.keys()
        terms = sum(0.3 * line[f"loss_{name}"] for name in ("align", "uniform", "corr"))
        assert line["loss"] == pytest.approx(line["loss_ins"] + terms, rel=1e-5)


@pytest.mark.parametrize("source", ["checkpoint.pth", "backbone.pth"])
def test_init_gives_both_encoders_the_backbone_and_leaves_the_heads_new(source, whole, few,
                                                                         tmp_path):
    here(pretrain.main, *few, "--init", whole[0] / source, "--epochs", 1, "--lr", 1e-30, "--wd", 0,
         "--batch-size", 352, "--seed", 5, "--knn-every", 0, "--output", tmp_path / "run")
    ours = read_checkpoint(tmp_path / "run")["state_dict"]
    given = torch.load(whole[0] / "backbone.pth", weights_only=True)
    theirs = read_checkpoint(whole[0])["state_dict"]
    for encoder in ("module.encoder_q.", "module.encoder_k."):
        assert all(torch.equal(ours[encoder + name], x) for name, x in given.items()
                   if "running" not in name and "num_batches" not in name)
        assert not torch.equal(ours[encoder + "fc.0.weight"], theirs[encoder + "fc.0.weight"])
    heads = (ours[f"module.encoder_{encoder}.fc.0.weight"] for encoder in "qk")
    torch.testing.assert_close(*heads)


def test_learning_rate_is_a_half_cosine_or_steps():
    args = pretrain.parse_args(["--lr", "2", "--epochs", "10"])
    rates = [pretrain.learning_rate(epoch, args) for epoch in (0, 5, 10)]
    assert rates == pytest.approx([2, 1, 0])
    args = pretrain.parse_args(["--lr", "2", "--schedule", "4", "8"])
    rates = [pretrain.learning_rate(epoch, args) for epoch in (3.9, 4, 8.5)]
    assert rates == pytest.approx([2, 0.2, 0.02])


# -------------------------------------------------------------------------------------------- data


def test_a_folder_of_mixed_images_runs_through_both_scripts(image_folder, tmp_path):
    flags = ["--epochs", 1, "--batch-size", 20, "--device", "cpu", "--crop-size", 32]
    done = script("pretrain.py", image_folder, "--arch", REAL, *flags, "--warmup-epochs", 0,
                  "--knn-every", 1, "--workers", 2, "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "--queue-size 15, not 16384: fitted" in done.stdout
    assert read_log(tmp_path / "run")[-1]["knn"] > 0
    done = script("lincls.py", image_folder, *flags, "--pretrained",
                  tmp_path / "run" / "checkpoint.pth")
    assert done.returncode == 0, done.stderr
    assert read_log(tmp_path / "run" / "lincls")[-1]["top1"] > 0


def test_unlabelled_images_train_without_the_monitor(image_folder, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (image_folder / "train").rglob("*.*"):
        shutil.copy(path, flat)
    said = here(pretrain.main, flat, *SMALL, "--epochs", 1, "--warmup-epochs", 0, "--crop-size", 32,
                "--batch-size", 20, "--output", tmp_path / "run")
    assert "diversity" in read_log(tmp_path / "run")[-1]
    assert "0 to evaluate on" in said
    assert not any("kNN" in line for line in said.splitlines() if line.startswith("epoch"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_default_trains_on_a_gpu(tmp_path):
    done = script("pretrain.py", "--device", "cuda", "--nproc", 1, "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    knn = [line["knn"] for line in read_log(tmp_path / "run") if "knn" in line]
    assert "1 x cuda" in done.stdout and knn[-1] > knn[0]


# ------------------------------------------------------------------------------ several processes


def test_two_processes_log_what_one_with_two_bn_splits_does(few, tmp_path, start):
    flags = [*few, "--epochs", 1, "--print-every", 1, "--lr", 1e-4, "--warmup-epochs", 0]
    here(pretrain.main, *flags, "--bn-splits", 2, "--output", tmp_path / "one")
    status, said = start(tmp_path / "two", [*flags, "--nproc", 2]).end()
    assert status == 0 and "2 x cpu" in said, said
    one, two = (read_log(tmp_path / name) for name in ("one", "two"))
    assert one[0]["knn"] == pytest.approx(two[0]["knn"], abs=2.1)  # an image of 48
    for step, tolerance in ((1, 1e-5), (2, 1e-3)):  # float32's rounding grows fast
        for name in ("loss_ins", "loss_uniform"):
            assert one[step][name] == pytest.approx(two[step][name], rel=tolerance)


def test_two_torchrun_agents_train_one_model_and_say_what_is_unused(few, tmp_path, start,
                                                                    free_port):
    flags = [*few, "--arch", REAL, "--epochs", 1, "--warmup-epochs", 0, "--world-size", 2]
    agents = [start(tmp_path / "run", flags,
                    torchrun=["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d",
                              "--rdzv-endpoint", f"localhost:{free_port}", "--local-addr",
                              "localhost"]) for _ in range(2)]
    for agent in agents:
        status, said = agent.end(200)
        assert status == 0, said
    log = read_log(tmp_path / "run")
    assert log[-1]["epoch"] == 1 and len(log[-1]["diversity"]) == 2 and said.count("2 x cpu") == 1
    line, = (line for line in said.splitlines() if line.startswith("torchrun says"))
    assert "--world-size" in line and "--rank" not in line


def embed_shard(rank, world_size, path):
    dist.init_process_group("gloo", init_method=f"file://{path}/meet{world_size}", rank=rank,
                            world_size=world_size)
    torch.manual_seed(0)
    args = pretrain.parse_args([])
    args.device, args.amp, args.workers, args.batch_size = torch.device("cpu"), "off", 0, 100
    encoder, _ = builder.build_backbone("tiny")
    for buffer in encoder.buffers():
        buffer.add_(rank)  # BN's statistics that are not process 0's
    data = loader.Arrays(*(x[:11] for x in digits()))
    v, labels = (builder.gather(x)[:11] for x in pretrain.embed(encoder, data, args))
    torch.save((v, labels, data.labels), path / f"{world_size}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 3])
def test_embedding_holds_every_image_once_when_processes_do_not_divide_them(world_size, tmp_path):
    in_processes(embed_shard, world_size, tmp_path)
    embed_shard(0, 1, tmp_path)
    expected, labels, true_labels = torch.load(tmp_path / "1-0.pt")
    assert torch.equal(labels, true_labels) and len(expected.unique(dim=0)) == 11
    for rank in range(world_size):
        v, labels, _ = torch.load(tmp_path / f"{world_size}-{rank}.pt")
        torch.testing.assert_close(v, expected)
        assert torch.equal(labels, true_labels)


class OfFiles(list):
    """A data set whose images are not in memory."""


@pytest.mark.parametrize("data, most", [(OfFiles(range(200)), 64),
                                        (loader.Arrays(np.zeros((200, 8, 8)), [0] * 200), 512)])
def test_files_are_embedded_in_batches_that_fit_into_shared_memory(data, most, group, monkeypatch):
    args, sizes = pretrain.parse_args(["--workers", "0"]), []
    args.device, args.amp = torch.device("cpu"), "off"
    monkeypatch.setattr(loader, "evaluation", lambda _, __, ___, size, *rest:
                        sizes.append(size) or [])
    pretrain.embed(torch.nn.Flatten(), data, args)
    assert sizes == [most]


# --------------------------------------------------------------------------------------- the E-step


@pytest.mark.parametrize("init", ["spread", "random", "auto"])
def test_kmeans_finds_clusters_that_are_there(init):
    args = pretrain.parse_args(["--kmeans-init", init, "--kmeans-restarts", "5"])
    args.device, args.kmeans_threads = torch.device("cpu"), None
    random, truth = torch.Generator().manual_seed(0), torch.arange(300) % 6
    centres = F.normalize(torch.randn(6, 128, generator=random), dim=1)
    v = F.normalize(centres[truth] + 0.02 * torch.randn(300, 128, generator=random), dim=1)
    clustering, objective = pretrain.kmeans(v, 6, 0, args)
    prototypes, phi = clustering.prototypes, clustering.concentration
    own = prototypes[clustering.assignments]
    assert (own - centres[truth]).norm(dim=1).max() < 0.1
    assert prototypes.norm(dim=1).allclose(torch.ones(6))
    assert phi.mean().item() == pytest.approx(args.temperature, rel=1e-5)
    means = torch.stack([v[truth == j].mean(0) for j in range(6)])[truth]
    assert objective.item() == pytest.approx((v - means).square().sum().item(), rel=1e-3)


DEBIAN = Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_learns(tmp_path, monkeypatch):
    """PAUC on 2,000 training images, judged on 1,000 others: at least 3 points of kNN over the
    untrained network."""
    def read(split, count):
        images, labels = (np.frombuffer(gzip.decompress(
            (DEBIAN / f"{split}-{kind}-ubyte.gz").read_bytes()), np.uint8, offset=header)
            for kind, header in (("images-idx3", 16), ("labels-idx1", 8)))
        return images.reshape(-1, 28, 28)[:count], labels[:count]
    monkeypatch.setattr(builder, "build_backbone", study.small_resnet)
    write_fashion_mnist(tmp_path, read("train", 2_000), read("t10k", 1_000))
    here(pretrain.main, tmp_path, "--dataset", "fashionmnist", *SMALL, "--crop-size", 14,
         "--epochs", 4, "--warmup-epochs", 2, "--batch-size", 64, "--knn-every", 4, "--output",
         tmp_path / "run")
    log = read_log(tmp_path / "run")
    figures = [line for line in log if "diversity" in line]
    assert len(figures) == 2 and min(figures[-1]["separation"]) > 1  # they have not collapsed
    knn = [line["knn"] for line in log if "knn" in line]
    assert knn[-1] >= knn[0] + 3, knn
