"""Each protocol of lincls.py through its command line, on the digits: a small network that was
pre-trained for a moment, an untrained one, and one judged by shuffled labels."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, read_log
from PIL import Image
from sklearn import metrics
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

import builder
import lincls
import loader
import pretrain

CPU = ["--device", "cpu"]
CHANCE = 20  # percent of ten classes, on 360 images: over six standard deviations above a tenth
FROZEN = ["--knn", 5, 20, "--shots", 1, 8, "--logreg", "--cluster"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    output = tmp_path_factory.mktemp("lincls") / "run"
    argv = [*SMALL, "--num-clusters", 0, "--epochs", 4, "--batch-size", 32, "--lr", 0.06,
            "--knn-every", 4, "--output", output]
    pretrain.main([str(arg) for arg in argv])
    return output / "checkpoint.pth"


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("untrained") / "backbone.pth"
    torch.save(builder.build_backbone("tiny")[0].state_dict(), path)
    return path


@pytest.fixture
def evaluate(call, tmp_path):
    """Calls lincls.py: its results, by protocol and what tells those of one protocol apart."""
    def run(path, *argv, output=tmp_path / "out"):
        source = [] if "--evaluate" in argv else ["--pretrained", path]
        arch = ["-a", "tiny"]
        status, out, errors = call(lincls.main, *source, *argv, *CPU, *arch, "--output", output)
        assert status == 0, errors
        run.out = out
        log = read_log(output) if (output / "log.jsonl").exists() else []
        lines = [line for line in log if "protocol" in line]
        return {(line["protocol"], line.get("k", line.get("shots"))): line for line in lines}
    return run


def refused(call, words, *argv, status=2):
    code, _, errors = call(lincls.main, *argv, *CPU)
    assert code == status and len(errors.strip().splitlines()) == 1, errors
    assert all(word in errors for word in words), errors


@pytest.fixture(scope="module")
def kept(trained):
    """A file of the trained network's features."""
    path = trained.parent / "features.pt"
    lincls.main(["--pretrained", str(trained), *CPU, "--features", str(path)])
    return path


@pytest.fixture(scope="module")
def features(kept):
    return torch.load(kept, weights_only=True)


def shuffled(monkeypatch):
    """Labels that have nothing to do with the images."""
    real = loader.load

    def load(*args):
        both = real(*args)
        for data in both:
            order = torch.randperm(len(data), generator=torch.Generator().manual_seed(1))
            data.labels = data.labels[order]
        return both
    monkeypatch.setattr(loader, "load", load)


# ------------------------------------------------------------------------------ on frozen features


def test_frozen_protocols_share_one_extraction_and_print_and_log_a_line_each(
        trained, evaluate, monkeypatch):
    embedded, real = [], pretrain.embed
    monkeypatch.setattr(pretrain, "embed", lambda encoder, data, args:
                        embedded.append(len(data)) or real(encoder, data, args))
    found = evaluate(trained, *FROZEN)
    assert embedded == [1437, 360]
    assert found.keys() == {("knn", 5), ("knn", 20), ("shots", 1), ("shots", 8), ("logreg", None),
                            ("cluster", None)}
    for (protocol, more), name in ((("knn", 20), "knn"), (("logreg", None), "top1"),
                                   (("shots", 1), "std"), (("cluster", None), "ami")):
        assert f"{name} {found[protocol, more][name]:.2f}" in evaluate.out
    assert found["knn", 5]["temperature"] == 0.07 and found["shots", 8]["runs"] == 5
    assert found["logreg", None]["l2"] in lincls.L2 and found["cluster", None]["clusters"] == 10


def test_shuffled_labels_give_chance(trained, kept, evaluate, monkeypatch):
    shuffled(monkeypatch)
    found = evaluate(trained, *FROZEN, "--features", kept)
    assert all(found["knn", k]["knn"] < CHANCE for k in (5, 20))
    assert all(found["shots", shots]["top1"] < CHANCE for shots in (1, 8))
    assert found["logreg", None]["top1"] < CHANCE and found["logreg", None]["top5"] < 62
    assert abs(found["cluster", None]["ami"]) < 0.03
    assert found["cluster", None]["accuracy"] < CHANCE


def test_an_untrained_network_gives_less(trained, untrained, kept, evaluate, tmp_path):
    flags = ["--knn", "--shots", 8, "--cluster"]  # --logreg needs more than a moment's training
    more = evaluate(trained, *flags, "--features", kept)
    less = evaluate(untrained, *flags, "--crop-size", 8, output=tmp_path / "untrained")
    for place, name in ((("knn", 20), "knn"), (("shots", 8), "top1"), (("cluster", None), "ami")):
        assert less[place][name] < more[place][name], (place, less[place], more[place])


def test_knn_is_the_monitors(trained, evaluate):
    monitor = [line["knn"] for line in read_log(trained.parent) if "knn" in line][-1]
    assert evaluate(trained, "--knn")["knn", 20]["knn"] == pytest.approx(monitor)


def test_low_shot_is_scikit_learns_svms(trained, kept, evaluate, features):
    found = evaluate(trained, "--shots", 4, "--runs", 3, "--features", kept)["shots", 4]
    x, y = F.normalize(features["train"], dim=1), features["train_labels"]
    queries, top1 = F.normalize(features["val"], dim=1).numpy(), []
    for run in range(3):
        rows = torch.cat([order[:4] for order in lincls.draw(y, 0, "shots", run)])
        assert y[rows].bincount().tolist() == [4] * 10
        scores = []
        for label in range(10):  # one against the rest, as PCL's script
            svm = LinearSVC(C=0.5, class_weight={1: 2, -1: 1}, max_iter=2000, random_state=0)
            svm.fit(x[rows].numpy(), np.where(y[rows] == label, 1, -1))
            scores.append(svm.decision_function(queries))
        right = np.argmax(scores, axis=0) == features["val_labels"].numpy()
        top1.append(100 * right.mean())
    assert found["top1"] == pytest.approx(np.mean(top1), abs=0.1)
    assert found["std"] == pytest.approx(np.std(top1), abs=0.1)


def test_of_two_classes_there_is_one_svm_of_plain_c(features, settings, tmp_path):
    two = [features[f"{split}_labels"] < 2 for split in ("train", "val")]
    bank, queries = ((features[split][rows], features[f"{split}_labels"][rows])
                     for split, rows in zip(("train", "val"), two))
    settings.shots, settings.runs = [2], 5
    lincls.low_shot(bank, queries, 2, {}, settings)
    top1 = []
    for run in range(5):
        rows = torch.cat([order[:2] for order in lincls.draw(bank[1], 0, "shots", run)])
        x, x_val = (F.normalize(x, dim=1).numpy() for x in (bank[0][rows], queries[0]))
        svm = LinearSVC(C=0.5, max_iter=2000, random_state=0).fit(x, bank[1][rows])
        top1.append(100 * svm.score(x_val, queries[1]))
    assert read_log(tmp_path)[0]["top1"] == pytest.approx(np.mean(top1), abs=1e-4)


@pytest.mark.parametrize("l2", [1e-1, 1e-3])
def test_logistic_regression_is_scikit_learns(features, l2):
    x, y = features["train"], features["train_labels"]
    x = (x - x.mean(0)) / x.std(0, correction=0).clamp(min=1e-6)
    ours = lincls.fit_logreg(x, y, 10, l2)
    theirs = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-8, max_iter=5000)
    theirs.fit(x.double().numpy(), y.numpy())
    weights = torch.from_numpy(theirs.coef_).float()
    assert torch.allclose(ours.weight, weights, atol=0.02 * weights.abs().max())
    probabilities = torch.from_numpy(theirs.predict_proba(x.double().numpy())).float()
    assert torch.allclose(ours(x).softmax(1), probabilities, atol=2e-3)


def test_logreg_reports_the_best_of_its_l2(trained, kept, evaluate, features):
    found = evaluate(trained, "--logreg", "--features", kept)["logreg", None]
    train, val = features["train"], features["val"]
    mean, std = train.mean(0), train.std(0, correction=0).clamp(min=1e-6)
    theirs = LogisticRegression(C=1 / (found["l2"] * len(train)), tol=1e-6, max_iter=5000)
    theirs.fit(((train - mean) / std).numpy(), features["train_labels"].numpy())
    top1 = 100 * theirs.score(((val - mean) / std).numpy(), features["val_labels"].numpy())
    assert found["top1"] == pytest.approx(top1, abs=0.6)  # two images


@pytest.fixture
def settings(group, tmp_path):
    args = lincls.parse_args(["--pretrained", "x", "--output", str(tmp_path)])
    args.device, args.kmeans_threads = torch.device("cpu"), None
    return args


def test_clustering_is_scikit_learns_k_means(features, settings, tmp_path):
    v, labels = F.normalize(features["val"], dim=1), features["val_labels"]
    assignments = lincls.kmeans(v, 10, settings).assignments
    centres = torch.stack([v[assignments == j].mean(0) for j in range(10)])
    theirs = KMeans(10, n_init=5, random_state=0).fit(v.numpy())
    assert (v - centres[assignments]).square().sum() < 1.02 * theirs.inertia_
    lincls.cluster(v, labels, 10, settings)
    line, = read_log(tmp_path)
    for name, score in (("ami", metrics.adjusted_mutual_info_score),
                        ("nmi", metrics.normalized_mutual_info_score),
                        ("ari", metrics.adjusted_rand_score)):
        assert line[name] == pytest.approx(score(labels, assignments)), name
        assert line[name] > 0.3


def test_perfect_clusters_have_perfect_figures(settings, tmp_path):
    labels = torch.arange(40) % 4
    lincls.cluster(torch.eye(4)[(labels + 1) % 4], labels, 4, settings)
    line, = read_log(tmp_path)
    assert [line[name] for name in ("ami", "nmi", "ari")] == pytest.approx([1, 1, 1])
    assert line["accuracy"] == 100


def test_features_are_read_again_and_refused_for_another_backbone(
        trained, untrained, kept, features, evaluate, call, tmp_path, monkeypatch):
    assert features["train"].shape == (1437, 64) and len(features["val_names"]) == 360
    monkeypatch.setattr(pretrain, "embed", None)
    monkeypatch.chdir(tmp_path)  # digits are the same from everywhere
    evaluate(trained, "--knn", "--features", kept)
    refused(call, ["--features", "another"], "--pretrained", untrained, "--crop-size", 8, "-a",
            "tiny", "--knn", "--features", kept, "--output", tmp_path / "out")


def test_two_processes_give_what_one_gives(trained, kept, features, evaluate, tmp_path, start):
    one = evaluate(trained, "--knn", "--cluster", "--features", kept)
    run = start(tmp_path / "two", ["--pretrained", trained, "--knn", "--cluster", "--features",
                                   tmp_path / "two.pt", *CPU, "--nproc", 2], script="lincls.py")
    assert run.end()[0] == 0, run.text()
    others = torch.load(tmp_path / "two.pt", weights_only=True)
    for split in ("train", "val"):
        assert torch.allclose(features[split], others[split], atol=1e-5)
        assert torch.equal(features[f"{split}_labels"], others[f"{split}_labels"])
    two = {line["protocol"]: line for line in read_log(tmp_path / "two")}
    assert two["knn"]["knn"] == one["knn", 20]["knn"] and len(two) == 2
    assert two["cluster"]["ami"] == pytest.approx(one["cluster", None]["ami"], abs=0.02)


def test_the_picture_frames_neighbours_by_class(trained, kept, evaluate, tmp_path):
    evaluate(trained, "--neighbours", 3, "--features", kept)
    image = np.asarray(Image.open(tmp_path / "out" / "neighbours.png"))
    step = lincls.TILE + lincls.GAP
    lime, red = ((image == colour).all(-1).sum() for colour in ((0, 255, 0), (255, 0, 0)))
    frame = 4 * 2 * (lincls.TILE - 2)
    assert lime + red == frame * (3 * lincls.ROW + 3 * (lincls.ROW + 1)) and lime > red
    assert image.shape[1] == (lincls.ROW + 1) * step + lincls.GAP


# --------------------------------------------------------------------------------- labelled images


def test_a_fraction_is_stratified_and_part_of_a_larger_one(group):
    args = lincls.parse_args(["--pretrained", "x", "--knn", "--label-fraction", "0.01", "0.1"])
    data = loader.load("digits", "data")[0]
    (_, few), (_, more) = lincls.label_subsets(args, data)
    assert data.labels[few].bincount().tolist() == [1] * 10
    assert set(few.tolist()) < set(more.tolist())
    counts = (data.labels.bincount() * 0.1).round().long()
    assert data.labels[more].bincount().tolist() == counts.tolist()
    args.seed = 1
    assert lincls.label_subsets(args, data)[0][1].tolist() != few.tolist()


def test_a_label_list_is_written_and_then_read(trained, kept, evaluate, tmp_path):
    path = tmp_path / "list.txt"
    flags = ["--knn", "--features", kept, "--label-list", path]
    first = evaluate(trained, *flags, "--label-fraction", 0.1)["knn", 20]
    assert len(path.read_text().splitlines()) == first["images"] == 142
    again = evaluate(trained, *flags, "--seed", 5)["knn", 20]
    assert again["knn"] == first["knn"] and again["label_list"] == str(path)


@pytest.mark.parametrize("lines, rows", [
    ("n01_1.JPEG\nn02_2.JPEG\n", [0, 2]),
    ("\ufefftrain/n02/n02_2.JPEG\r\nelsewhere.JPEG\r\n", [2])])
def test_a_label_list_names_files_or_paths(group, tmp_path, lines, rows):
    names = ["train/n01/n01_1.JPEG", "train/n01/n01_2.JPEG", "train/n02/n02_2.JPEG"]
    (tmp_path / "list").write_text(lines)
    assert lincls.read_label_list(tmp_path / "list", names).tolist() == rows


@pytest.mark.parametrize("lines", ["1.png\n", "c.png\n"])
def test_a_label_list_that_is_ambiguous_or_of_other_images_is_refused(group, tmp_path, lines):
    (tmp_path / "list").write_text(lines)
    with pytest.raises(lincls.UsageError, match="train/a/1.png"):
        lincls.read_label_list(tmp_path / "list", ["train/a/1.png", "train/b/1.png"])


# ------------------------------------------------------------------------------- trained in epochs


def test_the_probe_learns_logs_and_evaluates(trained, evaluate, call, tmp_path):
    evaluate(trained, "--knn")
    evaluate(trained, "--epochs", 3)
    log = read_log(tmp_path / "out")
    first, *_ = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    assert json.loads(first)["flags"]["small_images"]
    assert log[0]["protocol"] == "knn"  # is kept when the probe begins a log
    last = log[-1]
    assert last["epoch"] == 3 and 2 * CHANCE < last["top1"] <= last["best"] <= last["top5"] < 100
    found = evaluate(None, "--evaluate", tmp_path / "out" / "checkpoint.pth", "--crop-size", 8)
    assert found["evaluate", None]["top1"] == last["top1"]
    assert f"top1 {last['top1']:.2f}  top5 {last['top5']:.2f}" in evaluate.out


@pytest.mark.parametrize("flags", [[], ["--finetune"]])
def test_training_on_shuffled_labels_gives_chance(trained, evaluate, monkeypatch, tmp_path, flags):
    shuffled(monkeypatch)
    evaluate(trained, "--epochs", 1, *flags)
    assert read_log(tmp_path / "out")[-1]["top1"] < CHANCE


def test_finetuning_gives_more_than_chance_and_moves_the_backbone(trained, evaluate, tmp_path):
    evaluate(trained, "--finetune", "--epochs", 4, "--label-fraction", 0.5)
    checkpoint = torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=True)
    start = torch.load(trained.parent / "backbone.pth", weights_only=True)
    assert read_log(tmp_path / "out")[-1]["top1"] > 2 * CHANCE
    for name in ("conv1.weight", "bn1.running_mean"):
        assert not torch.equal(start[name], checkpoint["state_dict"][name])
    assert [group["lr"] for group in checkpoint["optimizer"]["param_groups"]] == [0.03, 0.01]


def test_finetuning_at_rate_0_with_frozen_bn_is_the_probe(trained, evaluate, monkeypatch, tmp_path):
    flags = ["--epochs", 2, "--lr", 0.1, "--schedule", 9]
    evaluate(trained, *flags)
    bn = torch.nn.BatchNorm2d
    monkeypatch.setattr(bn, "train", lambda self, mode=True: torch.nn.Module.train(self, False))
    evaluate(trained, *flags, "--finetune", "--backbone-lr", 0, output=tmp_path / "finetune")
    a, b = (torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)["state_dict"]
            for name in ("out", "finetune"))
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-5), name
    assert not torch.equal(a["fc.bias"], torch.zeros(10))


def test_finetuning_drops_both_rates_as_swav(trained):
    args = lincls.parse_args(["DIR", "--pretrained", "x", "--finetune", "--label-fraction", "0.01"])
    lincls.adopt(args, {})
    lincls.adopt_schedule(args, 0.01)
    rates = torch.optim.SGD([dict(params=[torch.zeros(1)]), dict(params=[torch.zeros(1)])], 1)
    found = {}
    for epoch in (0, 11, 12, 16):
        lincls.set_learning_rates(rates, dict(epoch=epoch, step=0, steps=1), args)
        found[epoch] = [group["lr"] for group in rates.param_groups]
    assert found[0] == found[11] == [5, 0.02] and args.epochs == 20 and args.wd == 0
    assert found[12] == pytest.approx([1, 0.004]) and found[16] == pytest.approx([0.2, 0.0008])


@pytest.mark.parametrize("flags", [[], ["--finetune"]])
def test_a_resumed_run_is_the_uninterrupted_one(trained, evaluate, call, tmp_path, monkeypatch,
                                                flags):
    flags = [*flags, "--epochs", 2, "--save-every", 9, "--print-every", 3]
    evaluate(trained, *flags)
    real, steps = pretrain.end_step, []

    def stop(*args):
        real(*args)
        steps.append(0)
        if len(steps) == 10:
            raise RuntimeError("stopped here")
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "end_step", stop)
        assert call(lincls.main, "--pretrained", trained, *flags, *CPU, "--output",
                    tmp_path / "twice")[0] == 1
    evaluate(trained, *flags, "--resume", "auto", output=tmp_path / "twice")
    a, b = (torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)
            for name in ("out", "twice"))
    assert all(torch.equal(x, b["state_dict"][name]) for name, x in a["state_dict"].items())
    logs = [[{name: line[name] for name in ("loss", "top1") if name in line}
             for line in read_log(tmp_path / name)] for name in ("out", "twice")]
    assert logs[0] == logs[1] and a["best"] == b["best"]


def test_fc_sees_float32_and_is_not_under_autocast(trained, evaluate, monkeypatch):
    seen, real = [], torch.nn.Linear.forward

    def forward(self, x):
        seen.append((x.dtype, torch.is_autocast_enabled("cpu")))
        return real(self, x)
    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    evaluate(trained, "--epochs", 1, "--amp", "bf16")
    assert set(seen) == {(torch.float32, False)}


# ----------------------------------------------------------------------------------- what is wrong


def test_a_probe_resumed_on_another_backbone_is_refused_at_the_start(trained, untrained, evaluate,
                                                                     call, tmp_path):
    evaluate(trained, "--epochs", 1)
    before = (tmp_path / "out" / "log.jsonl").read_bytes()
    refused(call, ["backbone", "begun"], "--pretrained", untrained, "-a", "tiny",
            "--crop-size", 8, "--epochs", 2, "--resume", "auto", "--output", tmp_path / "out")
    assert (tmp_path / "out" / "log.jsonl").read_bytes() == before


def test_a_probe_resumed_on_a_backbone_with_the_other_stem_is_refused_too(call, tmp_path):
    for size in (8, 64):
        torch.manual_seed(0)
        backbone, _ = builder.build_backbone("shufflenet_v2_x0_5", size < loader.SMALL_CROP)
        torch.save(dict(state_dict=backbone.state_dict(), digest="x", arch="shufflenet_v2_x0_5",
                        args=dict(dataset="digits", crop_size=size, classes=None, bits=16)),
                   tmp_path / f"{size}.pth")
    flags = ["--crop-size", 32, "--epochs", 1, "--label-fraction", 0.05, "--output",
             tmp_path / "out"]
    status, _, errors = call(lincls.main, "--pretrained", tmp_path / "8.pth", *CPU, *flags)
    assert status == 0, errors
    refused(call, ["backbone", "begun"], "--pretrained", tmp_path / "64.pth", *flags, "--resume",
            "auto")


def test_what_a_kill_has_cut_does_not_spoil_the_log(trained, evaluate, tmp_path):
    evaluate(trained, "--knn", 5, 20)
    log = tmp_path / "out" / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-9])
    evaluate(trained, "--epochs", 1)
    first, second, *_ = read_log(tmp_path / "out")
    assert first["k"] == 5 and second["step"] == 10


def test_images_without_a_label_are_not_drawn():
    labels = torch.tensor([1, -1, 0, 1, -1, 0])
    assert [sorted(rows.tolist()) for rows in lincls.draw(labels, 0)] == [[2, 5], [0, 3]]


def test_a_backbone_that_moves_is_noticed(trained, call, monkeypatch, tmp_path):
    real = lincls.train_epoch

    def train_epoch(backbone, *rest):
        real(backbone, *rest)
        next(backbone.parameters()).data.add_(1)
    monkeypatch.setattr(lincls, "train_epoch", train_epoch)
    status, _, errors = call(lincls.main, "--pretrained", trained, *CPU, "--epochs", 1, "--output",
                             tmp_path / "out")
    assert status == 1 and "the frozen backbone moved: conv1.weight" in errors


def test_a_saved_probe_finds_its_stem_at_a_crop_of_the_other_kind(trained, evaluate, tmp_path):
    evaluate(trained, "--epochs", 1, "--crop-size", 64, "--label-fraction", 0.05)
    log = read_log(tmp_path / "out")
    found = evaluate(None, "--evaluate", tmp_path / "out" / "checkpoint.pth")
    assert found["evaluate", None]["top1"] == log[-1]["top1"]


def test_another_folder_does_not_get_the_checkpoints_classes():
    then = dict(dataset="folder", dir="one", classes="list.txt", crop_size=32, bits=12)
    for folder, classes in (("one", "list.txt"), (None, "list.txt"), ("other", None)):
        args = lincls.parse_args([*([folder] if folder else []), "--pretrained", "x"])
        lincls.adopt(args, dict(args=then, arch="resnet18", digest="x"))
        assert (args.classes, args.arch, args.crop_size) == (classes, "resnet18", 32), folder
        assert args.dataset == "folder" and args.small_images


@pytest.mark.parametrize("words, argv", [
    (["not a probe of 10 classes"], ["--evaluate", "{trained}"]),
    (["checkpoint.pth", "--arch resnet18 with the small-image stem", "--crop-size"],
     ["--pretrained", "{trained}", "-a", "resnet18"]),
    (["--shots 200"], ["--pretrained", "{trained}", "--shots", "200"]),
    (["--cluster 361"], ["--pretrained", "{trained}", "--cluster", "361"]),
    (["--label-list", "does not exist"],
     ["--pretrained", "{trained}", "--label-list", "{tmp}/no", "--knn"])])
def test_a_mistake_is_one_line(trained, call, tmp_path, words, argv):
    argv = [word.format(trained=trained, tmp=tmp_path) for word in argv]
    refused(call, words, *argv, "--output", tmp_path / "out")


@pytest.mark.parametrize("flags", [["--knn"], ["--knn", "--features", "{tmp}/file/x.pt"],
                                   ["--evaluate"]])
def test_a_folder_that_cannot_be_written_is_noticed_before_the_work(trained, call, tmp_path, flags,
                                                                    monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(pretrain, "embed", None)
    output = tmp_path / ("out" if len(flags) > 2 else "file")
    flags = [flag.format(tmp=tmp_path) for flag in flags]
    if flags != ["--evaluate"]:
        flags.append("--pretrained")
    status, _, errors = call(lincls.main, *flags, trained, *CPU, "--output", output)
    assert status == 1 and errors.count("\n") == 1 and "file: cannot be written" in errors, errors


@pytest.mark.parametrize("args, arch", [
    (dict(dataset=dict(name="imagenet"), crop_size=16), "resnet18"),
    (dict(dataset="folder", crop_size=[16, 8]), "resnet18"), (None, 3), ("text", "resnet18")])
def test_the_flags_of_other_projects_are_none_of_ours(args, arch):
    own = lincls.parse_args(["images", "--pretrained", "x"])
    lincls.adopt(own, dict(args=args, arch=arch))
    assert (own.dataset, own.crop_size) == ("folder", 224)
    assert own.arch == ("resnet18" if arch != 3 else "resnet50")


def images_of(root, train, val):
    for folder in [*(f"train/{name}" for name in train), *(f"val/{name}" for name in val)]:
        (root / folder).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(root / folder / f"{i}.png")
    return root


def test_a_probe_of_other_classes_is_refused(trained, call, tmp_path):
    ours, others = (images_of(tmp_path / name, name, name) for name in ("ab", "xy"))
    probe = tmp_path / "out" / "checkpoint.pth"
    status, _, errors = call(lincls.main, ours, "--pretrained", trained, *CPU, "--epochs", 1,
                             "--output", probe.parent)
    assert status == 0, errors
    assert call(lincls.main, ours, "--evaluate", probe, *CPU)[0] == 0
    refused(call, ["other classes: a, where there is x here"], others, "--evaluate", probe)


def test_one_class_is_no_probe_and_clusters_are_no_more_than_vals_images(trained, call, tmp_path):
    one, many = images_of(tmp_path / "1", "a", "a"), images_of(tmp_path / "2", "abcde", "a")
    out = "--output", tmp_path / "out"
    refused(call, ["has one class"], one, "--pretrained", trained, "--knn", *out)
    refused(call, ["--cluster 5", "3 images"], many, "--pretrained", trained, "--cluster", *out)


@pytest.mark.parametrize("flags", [
    ["--finetune", "--knn"], ["--label-fraction", "0.1", "1"], ["--evaluate", "y"], ["--cos"]])
def test_flags_that_exclude_each_other(call, flags):
    status, _, errors = call(lincls.main, "--pretrained", "x", *flags)
    assert status == 2 and "error" in errors


@pytest.mark.parametrize("val, words", [
    (None, "a probe needs labels"), (["a", "b", "other"], "other"), ([""], "a probe needs labels")])
def test_a_val_without_the_classes_of_train_is_refused(trained, call, tmp_path, val, words):
    images = images_of(tmp_path / "images", "ab", val or ())
    refused(call, [words], images, "--pretrained", trained, "--output", tmp_path / "out")
