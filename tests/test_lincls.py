"""Each protocol of lincls.py through its command line, on the digits: a small network that was
pre-trained for a moment, also judged by labels of other images."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, here, one_line, read_checkpoint, read_log
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
    here(pretrain.main, *SMALL, "--num-clusters", 0, "--epochs", 4, "--batch-size", 32, "--lr",
         0.06, "--knn-every", 4, "--output", output)
    return output / "checkpoint.pth"


def read_results(output):
    return read_log(output / "results.jsonl")


@pytest.fixture
def evaluate(call, tmp_path):
    """Calls lincls.py: its results, by protocol and what tells those of one protocol apart."""
    def run(path, *argv, output=tmp_path / "out"):
        source = [] if "--evaluate" in argv else ["--pretrained", path]
        status, run.out, errors = call(lincls.main, *argv, *source, *CPU, "-a", "tiny", "--output",
                                       output)
        assert status == 0, errors
        return {(line["protocol"], line.get("k", line.get("shots"))): line
                for line in read_results(output)}
    return run


@pytest.fixture
def refused(call, tmp_path):
    def check(words, *argv):
        status, _, errors = call(lincls.main, *argv, *CPU, "--output", tmp_path / "out")
        assert status == 2, errors
        one_line(errors, words)
    return check


@pytest.fixture(scope="module")
def features(trained):
    """The trained network's, and labels: of the training images and of val's."""
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lincls, "evaluate_features", lambda v, v_val, train, val, *_:
                      kept.extend([(v, train.labels), (v_val, val.labels)]))
        here(lincls.main, "--pretrained", trained, "--knn", *CPU)
    return kept


@pytest.fixture
def settings(group, tmp_path):
    args = lincls.parse_args(["--pretrained", "x", "--output", str(tmp_path)])
    args.device = torch.device("cpu")
    return args


# ------------------------------------------------------------------------------ on frozen features


def test_frozen_protocols_share_one_extraction_and_keep_a_line_each(trained, evaluate, monkeypatch):
    embedded, real = [], pretrain.embed
    monkeypatch.setattr(pretrain, "embed", lambda encoder, data, args:
                        embedded.append(len(data)) or real(encoder, data, args))
    found = evaluate(trained, *FROZEN)
    assert embedded == [1437, 360]
    assert found.keys() == {("knn", 5), ("knn", 20), ("shots", 1), ("shots", 8), ("logreg", None),
                            ("cluster", None)}
    for (protocol, more), name in ((("knn", 20), "top1"), (("logreg", None), "top1"),
                                   (("shots", 1), "se"), (("cluster", None), "ami")):
        assert f"{name} {found[protocol, more][name]:.2f}" in evaluate.out
    assert found["knn", 5]["temperature"] == 0.07 and found["shots", 8]["runs"] == 20
    assert found["logreg", None]["l2"] in lincls.L2 and found["cluster", None]["clusters"] == 10
    place = [str(trained), "digits", read_checkpoint(trained)["args"]["dir"]]
    for line in found.values():
        assert [line[name] for name in ("checkpoint", "dataset", "dir")] == place


@pytest.mark.parametrize("flags", [FROZEN, ["--epochs", 1], ["--epochs", 1, "--finetune"]])
def test_labels_of_other_images_give_chance(flags, trained, evaluate, monkeypatch):
    def load(*args, real=loader.load):
        train, val = real(*args)
        train.labels, val.labels = train.labels.roll(1), val.labels.roll(1)  # they are in no order
        return train, val
    monkeypatch.setattr(loader, "load", load)
    for line in evaluate(trained, *flags).values():
        assert all(line.get(name, 0) < CHANCE for name in ("top1", "accuracy")), line
        assert line.get("top5", 0) < 62 and abs(line.get("ami", 0)) < 0.03, line


def test_knn_is_the_monitors(trained, evaluate):
    monitor = [line["knn"] for line in read_log(trained.parent) if "knn" in line][-1]
    assert evaluate(trained, "--knn")["knn", 20]["top1"] == pytest.approx(monitor)


@pytest.mark.parametrize("classes", [10, 2])
def test_low_shot_is_scikit_learns_svms(classes, features, settings, tmp_path):
    """One against the rest, a class's own images weighing twice, as in PCL's script; not of two."""
    bank, queries = ((x, y % classes) for x, y in features)
    (x, y), (x_val, y_val) = ((F.normalize(x, dim=1).numpy(), y) for x, y in (bank, queries))
    settings.shots, settings.runs, top1 = [4], 3, []
    lincls.low_shot(bank, queries, classes, {}, settings)
    for run in range(3):
        rows = torch.cat([order[:4] for order in lincls.draw(y, 0, "shots", run)])
        assert y[rows].bincount().tolist() == [4] * classes
        svm = LinearSVC(C=0.5, max_iter=2000, random_state=0,
                        class_weight={1: 2, -1: 1} if classes > 2 else None)
        scores = [svm.fit(x[rows], np.where(y[rows] == label, 1, -1)).decision_function(x_val)
                  for label in range(classes)]
        top1.append(100 * (np.argmax(scores, axis=0) == y_val.numpy()).mean())
    found, = read_results(tmp_path)
    assert found["top1"] == pytest.approx(np.mean(top1), abs=0.1)
    assert found["se"] == pytest.approx(np.std(top1, ddof=1) / 3 ** 0.5, abs=0.1)


def test_logistic_regression_is_scikit_learns_on_standardised_features(trained, evaluate, features):
    found = evaluate(trained, "--logreg")["logreg", None]
    (bank, y), (queries, y_val) = features
    mean, std = bank.mean(0), bank.std(0, correction=0).clamp(min=1e-6)
    x, x_val = (bank - mean) / std, (queries - mean) / std
    theirs = LogisticRegression(C=1 / (found["l2"] * len(x)), tol=1e-8, max_iter=5000)
    theirs.fit(x.double().numpy(), y.numpy())
    ours = lincls.fit_logreg(x, y, 10, found["l2"])
    weights = torch.from_numpy(theirs.coef_).float()
    assert torch.allclose(ours.weight, weights, atol=0.02 * weights.abs().max())
    probabilities = torch.from_numpy(theirs.predict_proba(x.double().numpy())).float()
    assert torch.allclose(ours(x).softmax(1), probabilities, atol=2e-3)
    top1 = 100 * theirs.score(x_val.double().numpy(), y_val.numpy())
    assert found["top1"] == pytest.approx(top1, abs=0.6)  # two images


def test_clustering_is_scikit_learns_k_means(features, settings, tmp_path):
    v, labels = F.normalize(features[1][0], dim=1), features[1][1]
    assignments = lincls.best_kmeans(v, 10, settings).assignments
    centres = torch.stack([v[assignments == j].mean(0) for j in range(10)])
    theirs = KMeans(10, n_init=5, random_state=0).fit(v.numpy())
    assert (v - centres[assignments]).square().sum() < 1.02 * theirs.inertia_
    lincls.cluster(v, labels, 10, settings)
    line, = read_results(tmp_path)
    for name, score in (("ami", metrics.adjusted_mutual_info_score),
                        ("nmi", metrics.normalized_mutual_info_score),
                        ("ari", metrics.adjusted_rand_score)):
        assert line[name] == pytest.approx(score(labels, assignments)), name
        assert line[name] > 0.3


def test_perfect_clusters_have_perfect_figures(settings, tmp_path):
    labels = torch.arange(40) % 4
    lincls.cluster(torch.eye(4)[(labels + 1) % 4], labels, 4, settings)
    line, = read_results(tmp_path)
    figures = [line[name] for name in ("ami", "nmi", "ari", "accuracy")]
    assert figures == pytest.approx([1, 1, 1, 100])


def test_two_processes_give_what_one_gives(trained, evaluate, tmp_path, start):
    flags = "--knn", "--cluster"
    one = evaluate(trained, *flags)
    run = start(tmp_path / "two", ["--pretrained", trained, *flags, *CPU, "--nproc", 2],
                script="lincls.py")
    assert run.end()[0] == 0, run.text()
    two = {line["protocol"]: line for line in read_results(tmp_path / "two")}
    assert two["knn"]["top1"] == one["knn", 20]["top1"] and len(two) == 2
    assert two["cluster"]["ami"] == pytest.approx(one["cluster", None]["ami"], abs=0.02)


# --------------------------------------------------------------- what belongs to the checkpoint


def test_a_relative_folder_is_found_again_from_elsewhere(tmp_path, call, monkeypatch):
    for place, classes in (("here", "ab"), ("there", "abc")):
        images_of(tmp_path / place / "data", classes, classes)
        (tmp_path / place / "list").write_text("a\nb\n")
    monkeypatch.chdir(tmp_path / "here")
    flags = "--classes", "list", "--num-clusters", 0, "--crop-size", 8, "--epochs", 1
    assert call(pretrain.main, "data", *SMALL, *flags, "--output", tmp_path / "out")[0] == 0
    args = read_checkpoint(tmp_path / "out")["args"]
    assert args["dir"] == str(tmp_path / "here" / "data")
    assert args["classes"] == str(tmp_path / "here" / "list")
    monkeypatch.chdir(tmp_path / "there")
    probed = "--pretrained", tmp_path / "out" / "checkpoint.pth"
    status, said, _ = call(lincls.main, *probed, "--knn", *CPU)
    assert status == 0 and f"{tmp_path}/here/data: 6 images in 2 classes" in said
    assert read_results(tmp_path / "out" / "lincls")[0]["dir"] == args["dir"]


@pytest.mark.parametrize("folder, classes", [("/one", "/list"), (None, "/list"), ("/other", None)])
def test_normalisation_arch_and_crop_are_the_checkpoints_and_classes_on_its_folder(folder, classes):
    then = dict(dataset="folder", dir="/one", classes="/list", crop_size=32, statistics=[[0], [1]])
    args = lincls.parse_args([*([folder] if folder else []), "--pretrained", "x"])
    lincls.settle(args, dict(args=then, arch="resnet18"))
    assert (args.classes, args.arch, args.crop_size) == (classes, "resnet18", 32)
    assert args.dataset == "folder" and args.small_images and args.statistics == [[0], [1]]


@pytest.mark.parametrize("args, arch", [
    (dict(dataset=dict(name="imagenet"), crop_size=16), "resnet18"),
    (dict(dataset="folder", crop_size=[16, 8]), "resnet18"), (None, 3), ("text", "resnet18")])
def test_the_flags_of_other_projects_are_none_of_ours_and_get_imagenets_normalisation(args, arch):
    own = lincls.parse_args(["images", "--pretrained", "x"])
    lincls.settle(own, dict(args=args, arch=arch))
    assert (own.dataset, own.crop_size) == ("folder", 224)
    assert own.arch == ("resnet18" if arch != 3 else "resnet50")
    assert own.statistics == loader.IMAGENET_STATISTICS


def test_the_picture_frames_neighbours_by_class(trained, call, tmp_path):
    call(lincls.main, "--pretrained", trained, "--neighbours", 3, *CPU, "--output",
         tmp_path / "out")
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


@pytest.mark.parametrize("lines, rows", [
    ("2.png\n1.jpg\n", [1, 2]), ("\ufefftrain/b/1.jpg\r\nelsewhere.png\r\n", [2]),
    ("train/a/1.png\n", [0]), ("1.png\n", None), ("c.png\n", None)])
def test_a_label_list_names_files_or_paths_without_doubt(group, tmp_path, lines, rows):
    names = ["train/a/1.png", "train/a/2.png", "train/b/1.jpg", "train/b/1.png"]
    (tmp_path / "list").write_text(lines)
    if rows:
        assert lincls.read_label_list(tmp_path / "list", names).tolist() == rows
    else:
        with pytest.raises(loader.UsageError, match="train/a/1.png"):
            lincls.read_label_list(tmp_path / "list", names)


# ------------------------------------------------------------------------------- trained in epochs


def test_the_probe_learns_logs_and_evaluates(trained, evaluate, tmp_path):
    evaluate(trained, "--epochs", 3)
    last = read_log(tmp_path / "out")[-1]
    assert last["epoch"] == 3 and 2 * CHANCE < last["top1"] <= last["best"] <= last["top5"] < 100
    probe = tmp_path / "out" / "checkpoint.pth"
    found = evaluate(None, "--evaluate", probe, "--crop-size", 8)
    assert found["evaluate", None]["top1"] == found["linear", None]["top1"] == last["top1"]
    assert f"top1 {last['top1']:.2f}  top5 {last['top5']:.2f}" in evaluate.out
    evaluate(trained, "--epochs", 3, "--resume", "auto")  # has ended: there is nothing to do
    assert len(read_results(tmp_path / "out")) == 2


def test_finetuning_gives_more_than_chance_and_moves_the_backbone(trained, evaluate, tmp_path):
    evaluate(trained, "--finetune", "--epochs", 4, "--label-fraction", 0.5)
    state = read_checkpoint(tmp_path / "out")["state_dict"]
    start = torch.load(trained.parent / "backbone.pth", weights_only=True)["state_dict"]
    assert read_log(tmp_path / "out")[-1]["top1"] > 2 * CHANCE
    for name in ("conv1.weight", "bn1.running_mean"):
        assert not torch.equal(start[name], state[name])


def test_finetuning_at_rate_0_with_frozen_bn_is_the_probe(trained, evaluate, monkeypatch, tmp_path):
    flags = ["--epochs", 2, "--lr", 0.1, "--schedule", 9]
    evaluate(trained, *flags)
    bn = torch.nn.BatchNorm2d
    monkeypatch.setattr(bn, "train", lambda self, mode=True: torch.nn.Module.train(self, False))
    evaluate(trained, *flags, "--finetune", "--backbone-lr", 0, output=tmp_path / "finetune")
    a, b = (read_checkpoint(tmp_path / name)["state_dict"] for name in ("out", "finetune"))
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-5), name
    assert not torch.equal(a["fc.bias"], torch.zeros(10))


@pytest.mark.parametrize("flags, rates", [
    ([], [0.3] * 3 + [0.03, 0.003]), (["--finetune"], [0.03] * 3 + [0.006, 0.0012])])
def test_the_rate_drops_at_three_and_four_fifths(flags, rates, trained, evaluate, tmp_path):
    evaluate(trained, *flags, "--epochs", 5, "--label-fraction", 0.05, "--print-every", 1)
    found = {line["epoch"]: line["lr"] for line in read_log(tmp_path / "out") if "lr" in line}
    assert [*found.values()] == pytest.approx(rates)
    groups = read_checkpoint(tmp_path / "out")["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups[1:]] == pytest.approx([0.01 * 0.04] * len(flags))


def test_finetuning_of_one_percent_has_swavs_rates(monkeypatch):
    monkeypatch.setattr(pretrain, "fit_batch", lambda *_: None)
    args = lincls.parse_args(["DIR", "--dataset", "folder", "--pretrained", "x", "--finetune"])
    args.small_images = False
    lincls.settle_training(args, 12_811, 1_281_167)
    assert (args.lr, args.backbone_lr, args.epochs, args.wd) == (5, 0.02, 20, 0)
    assert args.schedule == [12, 16]


def test_fc_sees_float32_and_is_not_under_autocast(trained, evaluate, monkeypatch):
    seen, real = [], torch.nn.Linear.forward

    def forward(self, x):
        seen.append((x.dtype, torch.is_autocast_enabled("cpu")))
        return real(self, x)
    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    evaluate(trained, "--epochs", 1, "--amp", "bf16")
    assert set(seen) == {(torch.float32, False)}


# ----------------------------------------------------------------------------------- what is wrong


def images_of(root, train, val):
    for folder in [*(f"train/{name}" for name in train), *(f"val/{name}" for name in val)]:
        (root / folder).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(root / folder / f"{i}.png")
    return root


def test_a_probe_is_not_resumed_on_another_backbone(trained, evaluate, refused, tmp_path):
    evaluate(trained, "--epochs", 1)
    before = (tmp_path / "out" / "log.jsonl").read_bytes()
    torch.save(builder.build_backbone("tiny")[0].state_dict(), tmp_path / "another.pth")
    refused("is not the backbone that this probe was", "--pretrained", tmp_path / "another.pth",
            "-a", "tiny", "--crop-size", 8, "--epochs", 2, "--resume", "auto")
    assert (tmp_path / "out" / "log.jsonl").read_bytes() == before


def test_a_backbone_that_moves_is_noticed(trained, evaluate, monkeypatch):
    real = lincls.train_epoch

    def train_epoch(backbone, *rest):
        real(backbone, *rest)
        next(backbone.parameters()).data.add_(1)
    monkeypatch.setattr(lincls, "train_epoch", train_epoch)
    with pytest.raises(RuntimeError, match="the frozen backbone moved: conv1.weight"):
        evaluate(trained, "--epochs", 1)


def test_a_saved_probe_finds_its_stem_at_a_crop_of_the_other_kind(trained, evaluate, tmp_path):
    found = evaluate(trained, "--epochs", 1, "--crop-size", 64, "--label-fraction", 0.05)
    again = evaluate(None, "--evaluate", tmp_path / "out" / "checkpoint.pth")
    assert again["evaluate", None]["top1"] == found["linear", None]["top1"]


def test_a_probe_of_other_classes_is_refused(trained, evaluate, refused, tmp_path):
    ours, others = (images_of(tmp_path / name, name, name) for name in ("ab", "xy"))
    probe = tmp_path / "out" / "checkpoint.pth"
    evaluate(trained, ours, "--epochs", 1)
    evaluate(None, ours, "--evaluate", probe)
    refused("no probe of these 2 classes", others, "--evaluate", probe)
    refused("no probe of these 10 classes", "--evaluate", trained)
    torch.save(pretrain.load(probe) | dict(classes=[]), tmp_path / "without names.pth")
    refused("no probe of these 10 classes", "--dataset", "digits", "--evaluate",
            tmp_path / "without names.pth")


@pytest.mark.parametrize("train, val, words, flags", [
    ("ab", "", "needs labels of two classes", []), ("a", "a", "needs labels of two classes", []),
    ("ab", "a", "--shots 3: class 1 has 2 labels", ["--shots", 2, 3]),
    ("abcd", "a", "--cluster 4: give at most 3, one an image of val", ["--cluster"]),
    ("ab", "a", "--label-list nowhere: cannot be read", ["--label-list", "nowhere", "--knn"]),
    ("ab", "a", "--finetune: goes with --pretrained, and not", ["--finetune", "--knn"]),
    ("ab", "a", "--label-fraction: one at a time", ["--label-fraction", 0.1, 1])])
def test_what_does_not_fit_is_refused(train, val, words, flags, trained, refused, tmp_path):
    images = images_of(tmp_path / "images", train, val)
    (images / "train" / train[-1] / "0.png").unlink()
    refused(words, images, "--pretrained", trained, *flags)
