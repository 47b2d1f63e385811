"""Pre-training: the loss, several processes, whole runs, what they leave, and resumed ones."""
import gzip
import json
import os
import re
import shutil
import stat
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import (REAL, REPO, SMALL, assert_same, digits, here, in_processes, joined,
                      read_checkpoint, read_log, same_ending, script, unit, untimed,
                      write_fashion_mnist)
from torch.utils.serialization import config
from torchvision import models

import builder
import loader
import losses
import pretrain
import study
from loader import UsageError

TERMS = {"loss", "loss_ins", "loss_proto", "loss_align", "loss_uniform", "loss_corr", "acc_ins",
         "acc_proto", "lr", "images_per_s"}
LEVEL = "diversity", "separation", "balance", "empty"
EACH = {*LEVEL, *(f"proto_{name}" for name in LEVEL), "kmeans_objective"}  # clustering has one
FIGURES = EACH | {"effective_rank", "proto_effective_rank", "seconds_embed", "seconds_kmeans"}
WEIGHTS = dict(proto=1, align=0.3, uniform=0.3, corr=0.3)
THREE_EPOCHS = "--epochs", 3, "--keep-every", 1, "--num-negatives", 25
ONE_EPOCH = "--epochs", 1, "--knn-every", 0, "--warmup-epochs", 0


@pytest.fixture(scope="module")
def whole(few, tmp_path_factory):
    """Three epochs, the first of warm-up, with every epoch's checkpoint; and what was said."""
    output = tmp_path_factory.mktemp("whole") / "run"
    return output, here(pretrain.main, *few, *THREE_EPOCHS, "--output", output)


@pytest.fixture
def two_epochs(whole, tmp_path):
    """A copy of its output folder, to be gone on with from the second epoch's checkpoint."""
    output = shutil.copytree(whole[0], tmp_path / "run")
    return shutil.copy(output / "checkpoint_0002.pth", output / "checkpoint.pth").parent


def set_up(*flags):
    """The flags of a run that has begun on 11 digits, and these."""
    args, data = pretrain.parse_args([*flags, "--device", "cpu"]), loader.Arrays(
        *(x[:11] for x in digits()))
    pretrain.settle_machine(args, ())
    args.statistics = data.statistics
    return args, data


# --------------------------------------------------------------------------------------- the loss

N = 12


def made(*flags):
    """args, a float64 batch of some of 40 images, as its queue, and two clusterings of all."""
    args = pretrain.parse_args(["--temperature", "0.3", *flags])
    images = torch.tensor([4, 1, 8, 8, 39, 6, 12, 2, 2, 2, builder.EMPTY, builder.EMPTY])
    q, k, x, y, queue = (unit(N, 8, seed=seed).requires_grad_() for seed in range(5))
    index = torch.tensor([30, 4, 17, 8, 22, 11, 0, 39, 5, 9, 13, 2])
    batch = losses.Batch(q, k, x, y, index, queue.detach().T, images, slice(0, N), 3, 1)
    return args, batch, [losses.Clustering(torch.arange(40) % size, unit(size, 8, seed=size),
                                           0.1 + unit(size).abs()) for size in (4, 6)]


def assert_same_with_gradients(value, expected, *z):
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, z, allow_unused=True)
                                 for loss in (value, expected)))


def loop_over_older_keys(batch, temperature, rows=range(N)):
    """InfoNCE whose negatives are the keys in the queue of all images but the query's own."""
    total = 0
    for i in rows:
        own = batch.index[i], builder.EMPTY
        logits = [batch.q[i] @ batch.k[i]] + [batch.q[i] @ batch.queue[:, j] for j, other
                                              in enumerate(batch.queue_index) if other not in own]
        logits = torch.stack(logits) / temperature
        total = total - torch.log(logits[0].exp() / logits.exp().sum())
    return total / len(rows)


@pytest.mark.parametrize("rows", [range(N), range(3, 7)])
def test_own_older_keys_and_empty_places_of_the_queue_are_no_negatives(rows):
    """For the whole batch, and for the rows of one process."""
    args, batch, _ = made()
    loss, figures = pretrain.pauc(batch._replace(rows=slice(rows.start, rows.stop)), [], args)
    assert_same_with_gradients(loss, loop_over_older_keys(batch, 0.3, rows), batch.q, batch.k)
    assert figures.keys() == {"loss_ins", "acc_ins"} and torch.equal(figures["loss_ins"], loss)


@pytest.mark.parametrize("left_out", ["proto", "align", "uniform", "corr", None])
def test_the_loss_is_the_weighted_sum_of_its_terms(left_out):
    weights = dict(proto=0.7, align=0.5, uniform=0.4, corr=3) | ({left_out: 0} if left_out else {})
    args, batch, found = made(*(f"--{name}={weight}" for name, weight in weights.items()))
    loss, figures = pretrain.pauc(batch, found, args)
    q, k, x, y = batch[:4]
    expected = loop_over_older_keys(batch, 0.3) + weights["uniform"] * losses.uniformity(q)
    for assignments, prototypes, phi in found:
        s = assignments[batch.index]
        p, p_positive = (losses.prototype_features(z, s) for z in (x, y))
        d, d_positive = (losses.deviations(z, prototypes, s) for z in (x, y))
        expected = expected + (weights["proto"] * losses.proto_nce(x, prototypes, phi, s)[0]
                               + weights["align"] * losses.alignment(p, p_positive)
                               + weights["corr"] * losses.correlation(d, d_positive)) / len(found)
    assert_same_with_gradients(loss, expected, q, k, x, y)
    logged = {f"loss_{name}" for name, weight in weights.items() if weight} | (
        {"acc_proto"} if weights["proto"] else set())
    assert figures.keys() == {"loss_ins", "acc_ins", *logged}


# ------------------------------------------------------------------------------- several processes


def train_two_steps(rank, world_size, bn_splits, path):
    """The M-step on fixed data in float64: what it reports, in float32, and what is left then."""
    with joined(rank, world_size, path):
        torch.set_default_dtype(torch.float64)
        torch.manual_seed(1)
        args, _, found = made("--batch-size", str(N), "--num-negatives", "3", "--lr", "0.1")
        args.device, log = torch.device("cpu"), Mock(step=Mock(return_value=None))
        model = builder.MoCo("tiny", 8, 20, 0.9, bn_splits=bn_splits, heads=2)
        model.queue.copy_(unit(20, 8).T)
        model.queue_index.copy_(torch.arange(20))  # some of the 40 images' own
        optimizer = torch.optim.SGD(model.parameter_groups(), 0.1, momentum=0.9)
        rows = slice(rank * N // world_size, (rank + 1) * N // world_size)
        views = [(*torch.randn(2, N, 3, 8, 8)[:, rows], torch.randperm(40)[:N], 0) for _ in "ab"]
        pretrain.m_step(pretrain.distributed(model), optimizer, Mock(epoch=lambda *_: views),
                        dict(epoch=1, step=0, steps=2, clusterings=found), args, log, [], Mock())
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
        reports = [call.args[0] for call in log.step.call_args_list]
        torch.save((reports, model.state_dict()), path / f"{world_size}-{rank}.pt")


def test_two_processes_equal_one_with_the_whole_batch(tmp_path):
    in_processes(train_two_steps, 2, 1, tmp_path)
    train_two_steps(0, 1, 2, tmp_path)  # BN over the same groups
    reports, state = torch.load(tmp_path / "1-0.pt")
    assert len(reports) == 2 and state["queue_index"].max() > 19
    for rank in range(2):
        their_reports, their_state = torch.load(tmp_path / f"2-{rank}.pt")
        torch.testing.assert_close(their_reports, reports, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(their_state, state, rtol=1e-8, atol=1e-10)


def look_at_shard(rank, world_size, path):
    """The E-step and the monitor of 11 images."""
    with joined(rank, world_size, path):
        torch.manual_seed(0)
        args, data = set_up("--num-clusters", "2", "3", "--crop-size", "8")
        model = builder.MoCo("tiny", 8, 8, heads=2)
        for buffer in model.encoder_k.buffers():
            buffer.add_(rank)  # BN's statistics that are not process 0's
        _, labels = pretrain.embed(model.encoder_k, data, args)
        assert torch.equal(builder.gather(labels)[:11], data.labels)
        found, figures = pretrain.e_step(model, data, args, 0)
        knn = pretrain.monitor(builder.backbone_of(model.encoder_k), data, data, args)
        found = [*map(tuple, found)], untimed([figures]), knn
        torch.save(found, path / f"{world_size}-{rank}.pt")


def test_three_processes_find_what_one_does_when_they_do_not_divide_the_images(tmp_path):
    in_processes(look_at_shard, 3, tmp_path)
    look_at_shard(0, 1, tmp_path)
    one, *three = (torch.load(tmp_path / name) for name in ("1-0.pt", "3-0.pt", "3-1.pt", "3-2.pt"))
    for theirs in three:
        torch.testing.assert_close(theirs, one, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------ what a run leaves


def test_the_log_has_every_term_and_figure(whole):
    log = read_log(whole[0])
    steps, epochs = ([x for x in log if ("loss" in x) == kind] for kind in (True, False))
    assert [line["step"] for line in steps] == list(range(3, 3 * 11 + 1, 3))
    assert [line["epoch"] for line in epochs] == [1, 2, 3]
    warm = {"loss", "loss_ins", "acc_ins", "lr", "images_per_s"}
    assert all(line.keys() - {"epoch", "step"} == (TERMS if line["epoch"] > 1 else warm)
               for line in steps)
    assert [line.keys() - {"epoch", "step", "seconds"} for line in epochs] == [
        set(), FIGURES, FIGURES | {"knn"}]
    assert all(len(line[name]) == 2 for line in epochs[1:] for name in EACH)
    assert list(whole[0].glob("events.out.tfevents.*"))


def test_the_first_line_of_the_log_holds_the_flags(whole, few):
    first = json.loads((whole[0] / "log.jsonl").read_text().splitlines()[0])
    assert first.keys() == {"flags", "step"} and first["step"] == 0
    found = [first["flags"][name] for name in ("dir", "epochs", "num_clusters", "queue_size")]
    assert found == [str(few[0]), 3, [20, 40], 352 // 4]  # the queue as it was fitted


def test_a_line_on_the_terminal_has_at_most_120_characters(whole):
    lines = [line for line in whole[1].splitlines() if line.startswith("epoch ")]
    ends = [line for line in lines if "step" not in line]
    assert len(ends) == 3 and max(map(len, lines)) <= 120
    assert all(word in ends[-1] for word in ("3/3", "knn", "diversity", "rank", "seconds"))


def test_the_start_says_what_was_understood(whole):
    start = whole[1][:whole[1].index("epoch 1")]
    for words in ("352 images in 10 classes", "48 to evaluate on", "queue 88", "[20, 40]",
                  "11 steps of 32 images", "1 x cpu"):
        assert words in start


def test_the_backbone_loads_in_torchvision_but_for_its_final_layer(few, tmp_path):
    here(pretrain.main, *few, *ONE_EPOCH, "--arch", REAL, "--crop-size", 64, "--num-clusters", 0,
         "--batch-size", 352, "--output", tmp_path)
    backbone = torch.load(tmp_path / "backbone.pth", weights_only=True)
    assert (backbone["arch"], backbone["epoch"], backbone["args"]["crop_size"]) == (REAL, 1, 64)
    keys = models.shufflenet_v2_x0_5().load_state_dict(backbone["state_dict"], strict=False)
    assert keys.missing_keys == ["fc.weight", "fc.bias"] and not keys.unexpected_keys


def test_a_clock_that_goes_back_changes_nothing(whole, few, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: -time.perf_counter())
    here(pretrain.main, *few, *THREE_EPOCHS, "--output", tmp_path)
    log = read_log(tmp_path)
    assert untimed(log) == untimed(read_log(whole[0]))
    assert all(value > 0 for line in log for name, value in line.items()
               if "second" in name or name == "images_per_s")


@pytest.mark.parametrize("output", ["> /dev/full", "| true"])
def test_a_terminal_that_cannot_be_written_ends_no_run(output, few, tmp_path, start):
    shell = f'"$@" {output}; exit ${{PIPESTATUS[0]}}'
    run = start(tmp_path / "run", [*few, *ONE_EPOCH, "--arch", REAL, "--num-clusters", 0],
                command=["bash", "-c", shell, "bash", sys.executable])
    status, said = run.end()
    assert status == 0 and not said, said
    assert read_checkpoint(run.output)["epoch"] == 1
    assert [line["step"] for line in read_log(run.output)] == [3, 6, 9, 11]


def test_a_figure_that_is_not_finite_is_logged_as_null_and_stops_nothing(tmp_path, group):
    figures = dict(acc_ins=torch.tensor(float("nan")))
    report, _ = pretrain.exchange(torch.tensor(2.0), figures, dict(epoch=0, step=0), [])
    pretrain.append(tmp_path / "log.jsonl", report)
    assert read_log(tmp_path) == [dict(loss=2.0, acc_ins=None)]


# ------------------------------------------------------------------------------------- resumed runs


def test_a_resume_cuts_off_what_the_log_has_after_its_checkpoint(two_epochs, whole, few):
    """Also a line that a kill has cut short."""
    with open(two_epochs / "log.jsonl", "a") as file:
        file.write('{"epoch": 3, "ste')
    here(pretrain.main, *few, *THREE_EPOCHS, "--output", two_epochs, "--resume", "auto")
    assert untimed(read_log(two_epochs)) == untimed(read_log(whole[0]))
    same_ending(whole[0], two_epochs)


def test_a_resume_from_an_older_checkpoint_goes_on_elsewhere_and_ends_the_same(whole, few, tmp_path,
                                                                               refused):
    flags = [*few, *THREE_EPOCHS, "--resume", whole[0] / "checkpoint_0001.pth"]
    refused(pretrain.main, flags, "is used", "another --output", output=whole[0])
    here(pretrain.main, *flags, "--output", tmp_path / "run")
    later = [line for line in read_log(whole[0]) if line["step"] > 11]
    assert untimed(read_log(tmp_path / "run")) == untimed(later)
    same_ending(whole[0], tmp_path / "run")


def test_a_resume_takes_weight_decay_and_momentum_from_the_flags(two_epochs, few):
    here(pretrain.main, *few, *THREE_EPOCHS, "--wd", 0.5, "--momentum", 0.5, "--output",
         two_epochs, "--resume", "auto")
    groups = read_checkpoint(two_epochs)["optimizer"]["param_groups"]
    assert [(group["weight_decay"], group["momentum"]) for group in groups] == [(0.5, 0.5)] * 2


def test_a_resume_takes_mean_and_deviation_from_the_checkpoint(two_epochs, few, monkeypatch):
    checkpoint, used = read_checkpoint(two_epochs), []
    checkpoint["args"]["statistics"] = statistics = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    torch.save(checkpoint, two_epochs / "checkpoint.pth")
    monkeypatch.setattr(loader, "Augment", lambda *args, real=loader.Augment, **options: (
        used.append([x for x in args if x == statistics]), real(*args, **options))[1])
    here(pretrain.main, *few, *THREE_EPOCHS, "--output", two_epochs, "--resume", "auto")
    assert used == 4 * [[statistics]]  # in training, the E-step, and the monitor's two sets
    assert read_checkpoint(two_epochs)["args"]["statistics"] == statistics


def test_a_prototype_head_is_new_when_the_warm_up_ends(whole):
    first, last = (pretrain.load(whole[0] / f"checkpoint_000{i}.pth") for i in (1, 2))
    args = first["args"]
    torch.manual_seed(args["seed"])
    made = builder.MoCo(args["arch"], args["dim"], args["queue_size"], small_images=True, heads=2)
    made = {name: x for name, x in made.state_dict().items() if "prototype" in name}
    assert len(made) == 8
    for name, x in made.items():
        assert torch.equal(first["state_dict"]["module." + name], x)
        assert not torch.equal(last["state_dict"]["module." + name], x)


def test_clusters_of_every_second_epoch_stay_for_another_also_resumed(few, tmp_path):
    """With one head, as PCL has."""
    flags = [*few, *THREE_EPOCHS, "--heads", 1, "--cluster-every", 2, "--output"]
    here(pretrain.main, *flags, tmp_path / "run")
    found = ["diversity" in line for line in read_log(tmp_path / "run") if "seconds" in line]
    assert found == [False, True, False]
    kept = tmp_path / "run" / "checkpoint_0002.pth"
    assert len(pretrain.load(kept)["clusterings"]) == 2
    here(pretrain.main, *flags, tmp_path / "again", "--resume", kept)
    same_ending(tmp_path / "again", tmp_path / "run")


@pytest.mark.parametrize("source", ["checkpoint.pth", "backbone.pth"])
def test_init_gives_both_encoders_the_backbone_and_leaves_the_heads_new(source, whole, few,
                                                                         tmp_path):
    here(pretrain.main, *few, *ONE_EPOCH, "--init", whole[0] / source, "--lr", 1e-30, "--wd", 0,
         "--batch-size", 352, "--seed", 5, "--output", tmp_path)
    ours, theirs = (read_checkpoint(path)["state_dict"] for path in (tmp_path, whole[0]))
    given = torch.load(whole[0] / "backbone.pth", weights_only=True)["state_dict"]
    for encoder in ("module.encoder_q.", "module.encoder_k."):
        assert all(torch.equal(ours[encoder + name], x) for name, x in given.items()
                   if name.endswith((".weight", ".bias")))
        assert not torch.equal(ours[encoder + "fc.0.weight"], theirs[encoder + "fc.0.weight"])


def test_a_checkpoint_without_checksums_is_read(whole, tmp_path):
    state = read_checkpoint(whole[0])
    with config.patch("save.compute_crc32", False):
        torch.save(state, tmp_path / "it.pth")
    assert_same(pretrain.load(tmp_path / "it.pth"), state)


def test_a_file_system_that_cannot_sync_a_folder_takes_checkpoints(tmp_path, monkeypatch):
    def fsync(file, real=os.fsync):
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(22, "Invalid argument")
        real(file)
    monkeypatch.setattr(os, "fsync", fsync)
    pretrain.save(tmp_path / "it.pth", dict(epoch=1))
    assert pretrain.load(tmp_path / "it.pth") == dict(epoch=1)


ADDED = [("losses.py", "def info_nce(", """\
def spread(batch):
    assert batch.index.shape == (len(batch.q),) and batch.queue_index.ndim == 1  # all is there
    return batch.q.square().sum(1).mean() - batch.q.mean(0).square().sum()


"""), ("pretrain.py", "    loss = sum(weight", """\
    terms.append(("spread", args.spread, losses.spread(batch)))
"""), ("pretrain.py", '    add("--align-alpha"', """\
    add("--spread", type=natural_float, default=0.5)
""")]


def test_a_fork_adds_a_term_by_a_function_a_line_and_a_flag(few, tmp_path):
    fork = shutil.copytree(REPO, tmp_path / "fork", ignore=lambda *_: {".git", "tests", "img"})
    for name, before, line in ADDED:
        code = (fork / name).read_text()
        assert code.count(before) == 1
        (fork / name).write_text(code.replace(before, line + before))
    done = script("pretrain.py", *few, *ONE_EPOCH, "--arch", REAL, "--output", tmp_path, cwd=fork)
    assert done.returncode == 0, done.stderr
    for line in (line for line in read_log(tmp_path) if "loss" in line):
        weights = WEIGHTS | dict(ins=1, spread=0.5)
        total = sum(weight * line[f"loss_{name}"] for name, weight in weights.items())
        assert line["loss"] == pytest.approx(total, rel=1e-5) and line["loss_spread"] > 0.01


@pytest.mark.parametrize("error", [ValueError, KeyError, OSError])
@pytest.mark.parametrize("place", ["builder.build_backbone", "losses.uniformity"])
def test_a_bug_in_a_fork_keeps_its_traceback(place, error, few, tmp_path, monkeypatch):
    def bug_of_a_fork(*args, **options):
        raise error("too many values to unpack")
    monkeypatch.setattr(place, bug_of_a_fork)
    with pytest.raises(error, match="too many values") as kept:
        here(pretrain.main, *few, *ONE_EPOCH, "--output", tmp_path)
    assert kept.type is error and kept.traceback[-1].name == "bug_of_a_fork"


# ------------------------------------------------------------------------------ flags and defaults


def test_the_defaults_of_a_data_set_of_60000_images(group):
    args = pretrain.parse_args(["DIR", "--device", "cpu"])
    data = loader.Arrays(np.zeros((60_000, 1, 1), np.uint8), [0] * 60_000)
    pretrain.settle(args, data, None, None)
    assert {name: getattr(args, name) for name in WEIGHTS} == WEIGHTS
    assert (args.batch_size, args.queue_size) == (256, 15_000)
    assert args.num_clusters == [1200, 2400, 5000]
    assert (args.warmup_epochs, args.epochs, args.heads, args.cluster_every) == (20, 200, 2, 1)


def test_mocos_and_pcls_flag_names_are_aliases():
    args = pretrain.parse_args("--moco-k 99 --moco-t 0.5 --low-dim 7 --pcl-r 3 --num-cluster 2 3 "
                               "--exp-dir X --warmup-epoch 1 -p 5 --learning-rate 2".split())
    assert (args.queue_size, args.temperature, args.dim, args.num_negatives) == (99, 0.5, 7, 3)
    assert (args.num_clusters, args.output, args.warmup_epochs) == ([2, 3], Path("X"), 1)
    assert (args.print_every, args.lr) == (5, 2)


@pytest.mark.parametrize("flags, epochs, parts", [
    (["--epochs", "10"], (0, 5, 10), [1, 0.5, 0]),
    (["--schedule", "4", "8"], (3.9, 4, 8.5), [1, 0.1, 0.01])])
def test_the_learning_rate_is_a_half_cosine_or_steps(flags, epochs, parts):
    args = pretrain.parse_args(flags)
    assert [pretrain.rate_left(epoch, args) for epoch in epochs] == pytest.approx(parts)


@pytest.mark.parametrize("images", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("splits", range(1, 6))
def test_advice_on_the_batch_works_when_it_is_followed(images, splits, group):
    """And where there is none, no batch works."""
    args = pretrain.parse_args(["--bn-splits", str(splits)])
    works = [n for n in range(2 * splits, images + 1) if n % splits == 0]
    for asked in (None, *range(1, images + 3)):
        args.batch_size = asked
        if asked in works or works and not asked:
            pretrain.fit_batch(args, images)
            assert args.batch_size in works and args.batch_size == (asked or args.batch_size)
            continue
        with pytest.raises(UsageError, match="works|images are too few for") as refused:
            pretrain.fit_batch(args, images)
        assert [int(n) in works for n in re.findall(r"(\d+) works", str(refused.value))] == (
            [True] if works else [])


def test_a_folder_of_mixed_images_trains_with_workers_and_has_the_monitor(image_folder, tmp_path):
    here(pretrain.main, image_folder, *SMALL, "--epochs", 1, "--batch-size", 20, "--crop-size", 32,
         "--workers", 2, "--output", tmp_path)
    assert read_checkpoint(tmp_path)["epoch"] == 1 and read_log(tmp_path)[-1]["knn"] > 0


def test_two_unlabelled_images_train_without_the_monitor(image_folder, tmp_path):
    for path in list((image_folder / "train").rglob("*.*"))[:2]:
        shutil.copy(path, tmp_path)
    said = here(pretrain.main, tmp_path, *SMALL, "--epochs", 1, "--warmup-epochs", 0,
                "--crop-size", 32, "--output", tmp_path / "run")
    assert "2 images in no classes, 0 to evaluate on" in said
    figures = read_log(tmp_path / "run")[-1]
    assert "diversity" in figures and "knn" not in figures


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_default_trains_on_a_gpu(tmp_path):
    done = script("pretrain.py", "--device", "cuda", "--nproc", 1, "--output", tmp_path)
    assert done.returncode == 0 and "1 x cuda" in done.stdout, done.stderr
    knn = [line["knn"] for line in read_log(tmp_path) if "knn" in line]
    assert knn[-1] > knn[0]


DEBIAN = Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_trains_without_collapse(tmp_path, monkeypatch):
    """On 2,000 images a few epochs keep what random features whose BN has seen the data have, 72 %
    of 1,000 others by kNN; a training that harms loses it."""
    def read(split, count):
        images, labels = (np.frombuffer(gzip.decompress(
            (DEBIAN / f"{split}-{kind}-ubyte.gz").read_bytes()), np.uint8, offset=header)
            for kind, header in (("images-idx3", 16), ("labels-idx1", 8)))
        return images.reshape(-1, 28, 28)[:count], labels[:count]
    monkeypatch.setattr(builder, "build_backbone", study.small_resnet)
    write_fashion_mnist(tmp_path, read("train", 2_000), read("t10k", 1_000))
    here(pretrain.main, tmp_path, "--dataset", "fashionmnist", *SMALL, "--crop-size", 14,
         "--batch-size", 64, "--warmup-epochs", 2, "--epochs", 4, "--output", tmp_path)
    last = read_log(tmp_path)[-1]
    assert last["knn"] > 70.5 and min(last["separation"]) > 1, last


# -------------------------------------------------------------------------- E-step and kNN monitor


@pytest.mark.parametrize("spread_up_to", [0, 4096])
def test_kmeans_finds_clusters_that_are_there(spread_up_to, monkeypatch):
    monkeypatch.setattr(pretrain, "SPREAD_UP_TO", spread_up_to)
    args, truth = set_up("--kmeans-restarts", "5")[0], torch.arange(300) % 6
    centres, noise = unit(6, 128).float(), unit(300, 128, seed=1).float()
    v = F.normalize(centres[truth] + 0.2 * noise, dim=1)
    (assignments, prototypes, phi), objective = pretrain.kmeans(v, 6, 0, args)
    assert (prototypes[assignments] - centres[truth]).norm(dim=1).max() < 0.1
    assert prototypes.norm(dim=1).allclose(torch.ones(6))
    assert phi.mean().item() == pytest.approx(args.temperature, rel=1e-5)
    means = torch.stack([v[truth == j].mean(0) for j in range(6)])[truth]
    assert objective.item() == pytest.approx((v - means).square().sum().item(), rel=1e-3)


def test_features_that_overflow_are_a_mistake_to_mend(group):
    model, (args, data) = builder.MoCo("tiny", 4, 8), set_up("--num-clusters", "2")
    model.encoder_k.conv2.weight.data.fill_(3e38)  # finite
    with pytest.raises(UsageError, match="output is not finite"):
        pretrain.embed(model.encoder_k, data, args)


def test_files_are_embedded_in_batches_that_fit_into_shared_memory(image_folder):
    names = [path.name for path in (image_folder / "train" / "odd").iterdir()] * 4
    data = loader.Files(image_folder / "train" / "odd", names, [0] * len(names))
    sizes = [len(x) for x, _ in loader.centre_batches(data, 8, data.statistics)]
    assert max(sizes) == 64 and sum(sizes) == len(names) > 64


def order(bank, labels, query):
    """Rows by cosine, then number, but those that are nobody's."""
    rows = [row for row in range(len(bank)) if labels[row] >= 0]
    return sorted(rows, key=lambda row: (-(bank[row] @ query).item(), row))


@pytest.fixture
def ties(group):
    """A bank in which each row stands several times, labels, and queries with the same few cosines,
    of both signs, to all of it."""
    steps = torch.cartesian_prod(*[torch.tensor([-0.5, 0.5])] * 4)  # unit rows
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(-1, 5, (200,), generator=random)
    return steps[torch.randint(0, 16, (200,), generator=random)], labels, steps


@pytest.mark.parametrize("k", [1, 5, 150])
@pytest.mark.parametrize("shards", [1, 3])
def test_the_nearest_are_in_order_of_cosine_then_row(shards, k, ties):
    bank, labels, queries = ties
    names = torch.where(labels < 0, -1, torch.arange(200))  # each row a class of its own
    parts = zip(bank.chunk(shards), names.chunk(shards))
    near = [torch.cat(x, 1) for x in zip(*(pretrain.nearest(*part, queries, k) for part in parts))]
    cosine, places = (x[:, :k] for x in near[0].sort(dim=1, descending=True, stable=True))
    for own, rows, query in zip(cosine, near[1].gather(1, places), queries):
        assert rows.tolist() == order(bank, labels, query)[:k]
        assert torch.equal(own, (bank @ query)[rows])


@pytest.mark.parametrize("k", [1, 5, 20])
def test_the_figure_for_one_k_does_not_depend_on_the_others(k, ties):
    bank, labels, queries = ties
    near = [pretrain.nearest(bank, labels, queries, largest) for largest in (k, 20, 150)]
    assert len({pretrain.vote(*one, torch.arange(16) % 5, k) for one in near}) == 1


@pytest.mark.parametrize("k", [1, 3, 20])
@pytest.mark.parametrize("factor", [1, 10 ** 12])
def test_votes_equal_a_loop_over_classes_of_any_number(factor, k, group):
    """A column for each of 10 ** 12 classes would not fit into memory."""
    random = torch.Generator().manual_seed(0)
    bank, queries = unit(60, 4).float(), unit(300, 4, seed=1).float()
    labels, truth = (factor * torch.randint(low, 5, (n,), generator=random)
                     for low, n in ((-1, 60), (0, 300)))
    right = 0
    for query, label in zip(queries, truth):
        votes = dict.fromkeys(labels.tolist(), 0)
        for row in order(bank, labels, query)[:k]:
            votes[labels[row].item()] += np.exp((bank[row] @ query).item() / 0.2)
        right += max(votes, key=votes.get) == label
    near = pretrain.nearest(bank, labels, queries, 20)
    assert pretrain.vote(*near, truth, k, 0.2) == pytest.approx(100 * right.item() / 300)
