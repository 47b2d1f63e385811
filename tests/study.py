"""The study: methods, forms of the terms, weights and seeds, by the project's own functions.

    python tests/study.py --grid hierarchy --seeds 10               # Gaussians: 6 s a run on a core
    python tests/study.py --data DIR --cpu --jobs 2                 # Fashion-MNIST and CIFAR-10,
                                                                    # runs of 2 or 11 min a core
    python tests/study.py --data DIR --grid main --seeds 3 --jobs 4 # ResNet-18 at 28 px, one GPU
    python tests/study.py --data DIR --dataset folder ...           # a folder, as of CIFAR-10
    python tests/study.py THE SAME --test                           # once, when all is chosen
    python tests/study.py --plot                                    # img/hierarchy.png
    python tests/study.py --quick                                   # does it work?

DIR holds FashionMNIST/raw/*-ubyte, or is the folder, of small images of one size; with --cpu it
also holds cifar10/train/CLASS/* and cifar10/val/CLASS/*, of which val is the test set. A flag that
is not in --help here goes to pretrain.py. A tenth of the training images is held out; every figure
and choice is on it. The test set is read by --test alone, with the last epoch's weights.

OUTPUT/images.jsonl and hierarchy.jsonl have one line a run, *.md the means over those --seeds
seeds. What is there is skipped, and a run that was cut short goes on. OUTPUT/RUN/run.txt is what a
run printed.

MoCo is trained with prototypes of weight 0: so its curve of coagulation is in its log like others'.
The coagulation figures of a table are measured after the last epoch, the same for every method:
momentum encoder, training images, k-means of 20. All else is on the frozen backbone's features:
linear is logistic regression, few labels the mean of 5 draws of 2 or 10 labels a class, AMI that of
k-means of the training images, with as many clusters as classes.
"""
import argparse
import copy
import functools
import json
import multiprocessing
import os
import re
import signal
import statistics
import sys
import time
import traceback
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # each run has one core; before torch reads it
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.metrics import adjusted_mutual_info_score  # noqa: E402
from torch import nn  # noqa: E402
from torchvision.models.resnet import BasicBlock  # noqa: E402

import builder  # noqa: E402
import lincls  # noqa: E402
import loader  # noqa: E402
import losses  # noqa: E402
import pretrain  # noqa: E402

MEASURED = 20  # clusters of the embeddings, for every method the same
ANIMALS = torch.tensor([0, 0, 1, 1, 1, 1, 1, 1, 0, 0])  # of CIFAR-10's classes in alphabetic order
COAGULATION = "diversity", "effective_rank", "separation", "balance"
TITLES = dict(linear="linear", knn="kNN", linear_10="10 labels", linear_2="2 labels",
              test_linear="test linear", test_knn="test kNN", test_linear_10="test 10 labels",
              test_linear_2="test 2 labels", test_merged="test animals", ami="AMI",
              diversity="diversity", effective_rank="effective rank",
              proto_diversity="diversity, prototypes", proto_effective_rank="rank, prototypes",
              merged="animals")  # the columns of a table
DIGITS = dict(ami=3, diversity=3, proto_diversity=3)  # of the others 1, of their differences 2
QUICK = dict(hierarchy=["PCL, P = 5", "PAUC, two heads, P = 5"], images=["PAUC, two heads"])
CPU_FLAGS = "--arch small --batch-size 64 --queue-size 1000 --knn-every 0".split()
CPU = {  # with --cpu: where below --data, and the flags that are no longer to be given
    "fashionmnist": ("", dict(
        images=4000, val_images=4000,
        flags=[*CPU_FLAGS, *"--crop-size 14 --epochs 20 --warmup-epochs 4".split()])),
    "cifar10": ("cifar10", dict(
        images=10_000, val_images=4000,
        flags=[*CPU_FLAGS, *"--crop-size 16 --epochs 30 --warmup-epochs 6".split(),
               *"--dataset folder --moco-m 0.99".split()])),
}
read, pauc = functools.cache(loader.load), pretrain.pauc  # the project's own


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="PAUC's study", allow_abbrev=False)
    add = parser.add_argument
    add("--data", default="data", metavar="DIR", help="holds FashionMNIST/raw/*-ubyte")
    add("--grid", nargs="+", choices=grids(), help="default: main, with --cpu coarse")
    add("--seeds", type=int, default=3, help="how many, from --first-seed on")
    add("--first-seed", type=int, default=0)
    add("--jobs", type=int, default=1, help="runs at once, all on one device")
    add("--images", type=int, default=54_000, help="training images")
    add("--val-images", type=int, default=4000, help="held-out images")
    add("--steps", type=int, default=600, help="of a run on the hierarchy")
    add("--cpu", nargs="*", choices=CPU, help="what two cores can do in hours, of both or of one")
    add("--test", action="store_true", help="read the test set")
    add("--output", type=Path, default=Path("study"))
    add("--plot", action="store_true", help="only draw what OUTPUT holds")
    add("--img", type=Path, default=Path("img"), help="where --plot puts its files")
    add("--quick", action="store_true", help="a few tiny runs of each kind")
    args, args.flags = parser.parse_known_args(argv)
    if args.quick:
        args.grid, args.seeds, args.steps = args.grid or ["hierarchy", "main"], 2, 60
        args.images, args.val_images = 128, 50
        args.flags = ["--dataset", "digits", "--arch", "shufflenet_v2_x0_5", "--epochs", "2",
                      "--warmup-epochs", "1", *args.flags]
    return args


# ------------------------------------------------------------------------------------------- grids


def flags(**weights):
    return [part for name, weight in weights.items() for part in (f"--{name}", f"{weight:g}")]


MOCO = flags(heads=1, proto=0, align=0, uniform=0, corr=0)
MOCO_UNIFORM = flags(heads=1, proto=0, align=0, corr=0)  # the control
PCL = flags(heads=1, align=0, uniform=0, corr=0)
PROTOTYPES = "5", "10", "100", "400", "1000"  # on the hierarchy


def grids():
    """{grid: {method: (flags of pretrain, form or None, the methods that it is held against)}}."""
    hierarchy = {}
    for P in PROTOTYPES:
        hierarchy |= methods([P], ["--num-clusters", "10"])
    few = methods(["10", "40"])
    weights = {f"PAUC, weights {w:g}, P = 10, 40": (
        [*few["PAUC, two heads, P = 10, 40"][0], *flags(align=w, uniform=w, corr=w)], None,
        ["PAUC, two heads, P = 10, 40"]) for w in (0.1, 1)}
    first = {f"PAUC, first reading, P = {P}": (["--num-clusters", P, "--heads", "1"],
             "first reading", [f"PCL, P = {P}", f"PAUC, one head, P = {P}"]) for P in PROTOTYPES}
    final = {name: method for name, method in few.items() if "uniformity 1" not in name}
    every, every_hierarchy = (
        {f"{name}, clusters every {n}": ([*own[name][0], "--cluster-every", str(n)], None, [name])
         for name in names for n in (2, 4)}
        for own, names in ((few, ["PAUC, two heads, P = 10, 40"]),
                           (hierarchy, [f"PAUC, two heads, P = {P}" for P in PROTOTYPES])))
    return dict(main=methods([]), coarse=few, final=final, weights=weights, every=every,
                hierarchy=hierarchy, hierarchy_every=every_hierarchy, hierarchy_first=first)


def methods(sizes, moco=()):
    """PAUC with two heads and with one, each also with uniformity of weight 1, and their controls.
    moco: more flags of those that have no prototypes."""
    P = f", P = {', '.join(sizes)}" if sizes else ""
    more = ["--num-clusters", *sizes] if sizes else []
    one, two, hard = ["--heads", "1"], ["--heads", "2"], flags(uniform=1)
    pcl, own = f"PCL{P}", f"PAUC, one head{P}"
    plain, strong = "MoCo + uniformity", "MoCo + uniformity 1"
    return {
        "MoCo": ([*moco, *MOCO], None, []),
        plain: ([*moco, *MOCO_UNIFORM], None, ["MoCo"]),
        strong: ([*moco, *MOCO_UNIFORM, *hard], None, ["MoCo", plain]),
        pcl: ([*more, *PCL], None, ["MoCo"]),
        own: ([*more, *one], None, ["MoCo", plain, pcl]),
        f"PAUC, one head, uniformity 1{P}": ([*more, *one, *hard], None, [strong, pcl, own]),
        f"PAUC, two heads{P}": ([*more, *two], None, ["MoCo", plain, pcl, own]),
        f"PAUC, two heads, uniformity 1{P}": (
            [*more, *two, *hard], None, ["MoCo", plain, strong, pcl, own, f"PAUC, two heads{P}"])}


def first_reading(batch, clusterings, args):
    """All three terms on the batch's means of the prototypes. Takes and returns what pauc does."""
    without = argparse.Namespace(**vars(args) | dict(align=0, uniform=0, corr=0))
    loss, figures = pauc(batch, clusterings, without)
    for clustering in clusterings:
        s = clustering[0][batch.index]
        p, p_positive = (losses.prototype_features(z, s)[0] for z in (batch.x, batch.y))
        terms = (args.align * losses.alignment(p, p_positive, args.align_alpha)
                 + args.uniform * losses.uniformity(p, args.uniform_t)
                 + args.corr * losses.correlation(p, p_positive, args.corr_lambda))
        loss = loss + terms / len(clusterings)
    return loss, figures


LOSSES = {None: pauc, "first reading": first_reading}  # what stands in for pretrain.pauc


# ------------------------------------------------------------------------ a hierarchy of Gaussians
#
# 10 groups of 10 classes that overlap. Two views differ by noise and dropped coordinates.

VECTORS, DIMENSIONS, GROUPS, CLASSES = 4000, 64, 10, 100
GROUP_SPREAD, CLASS_SPREAD, VIEW_NOISE, DROPPED = 0.45, 0.65, 1.0, 0.4  # in a class: 1
HIDDEN, WIDTH, EMBEDDING, BATCH, QUEUE = 128, 64, 32, 256, 1000
RATE, KEEP, CLUSTER_EVERY, EPOCHS = 0.3, 0.99, 30, 20


def gaussians(generator):
    """Vectors (n, DIMENSIONS) to train on, as many to evaluate on, the labels (n,) of either."""
    def draw(*shape):
        return torch.randn(shape, generator=generator)
    centre = GROUP_SPREAD * draw(GROUPS, 1, DIMENSIONS)
    centre = centre + CLASS_SPREAD * draw(GROUPS, CLASSES // GROUPS, DIMENSIONS)
    labels = torch.arange(VECTORS) % CLASSES
    means = centre.flatten(0, 1)[labels]
    return means + draw(VECTORS, DIMENSIONS), means + draw(VECTORS, DIMENSIONS), labels


def view(x, generator):
    noisy = x + VIEW_NOISE * torch.randn(x.shape, generator=generator)
    return noisy * (torch.rand(x.shape, generator=generator) >= DROPPED)


def train_on_hierarchy(flags, seed, form=pauc, steps=600):
    """A run, a quarter of it warm-up. flags: pretrain's, with --num-clusters P. form: what takes
    and returns what pauc does. Returns the encoders in eval mode (encoder[0] is the backbone, and
    there are `--heads` heads), the vectors, their labels and the flags."""
    args = pretrain.parse_args(["--temperature", "0.2", "--warmup-epochs", "5", *flags])
    args.device, args.seed = torch.device("cpu"), seed
    generator = torch.Generator().manual_seed(seed)
    x, x_val, labels = gaussians(generator)
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Linear(DIMENSIONS, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(),
                             nn.Linear(HIDDEN, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU())
    head = [nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, EMBEDDING)]
    if args.heads == 2:
        second = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, EMBEDDING))
        head = [builder.TwoHeads(nn.Sequential(*head), second)]
    encoder_q = nn.Sequential(backbone, *head)
    encoder_k = copy.deepcopy(encoder_q).requires_grad_(False)
    groups = [dict(params=[x for name, x in encoder_q.named_parameters()
                           if ("prototype" in name) == second])
              for second in (False, True)[:args.heads]]
    optimizer = torch.optim.SGD(groups, RATE, momentum=0.9, weight_decay=args.wd)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    size = args.queue_size or QUEUE
    queue, queue_index = torch.zeros(EMBEDDING, size), torch.full((size,), builder.EMPTY)
    warmup, clusterings = steps * args.warmup_epochs // EPOCHS, []
    for step in range(steps):
        if step >= warmup and (step - warmup) % (CLUSTER_EVERY * args.cluster_every) == 0:
            v, *others = levels(encoder_k.eval(), x)
            clusterings = [pretrain.kmeans(v, P, loader.seed_of(seed, step), args)[0]
                           for P in args.num_clusters]
            for y in others:
                clusterings = [losses.prototype_level(y, s, len(c), args.temperature)
                               for s, c, _ in clusterings]
        for group in optimizer.param_groups[1:]:
            group["weight_decay"] = args.wd if clusterings else 0
        index = torch.randperm(VECTORS, generator=generator)[:BATCH]
        with torch.no_grad():
            torch._foreach_lerp_([*encoder_k.parameters()], [*encoder_q.parameters()], 1 - KEEP)
            k = levels(encoder_k.train(), view(x[index], generator))
        q = levels(encoder_q, view(x[index], generator))
        batch = losses.Batch(q[0], k[0], q[-1], k[-1], index, queue, queue_index,
                             slice(0, BATCH), 0, step)
        loss, _ = form(batch, clusterings, args)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        columns = (step * BATCH + torch.arange(BATCH)) % size
        queue[:, columns], queue_index[columns] = k[0].T, index
    return encoder_q.eval(), encoder_k.eval(), x, x_val, labels, args


def levels(encoder, x):
    """The unit rows (n, EMBEDDING) of each head."""
    return F.normalize(encoder(x).view(len(x), -1, EMBEDDING), dim=2).unbind(1)


def hierarchy(flags, seed, form=pauc, steps=600):
    """The figures of a run: of the 100 classes the probes in percent, on vectors that were not
    trained on; of the embeddings' 10 clusters the AMI with the groups, and the diversity; the
    latter, and the rank, of either level where there are two."""
    torch.set_num_threads(1)
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    run = train_on_hierarchy(flags, seed, form, steps)
    encoder_q, encoder_k, x, x_val, labels, args = run
    with torch.inference_mode():
        bank, queries = (F.normalize(encoder_q[0](part), dim=1) for part in (x, x_val))
        v, *others = levels(encoder_k, x)
    args.kmeans_restarts = 3
    clustering, _ = pretrain.kmeans(v, GROUPS, seed, args)
    group = labels // (CLASSES // GROUPS)
    return dict(linear=linear(bank, labels, queries, labels),
                knn=knn(bank, labels, queries, labels),
                **few_labels(bank, labels, queries, labels),
                ami=adjusted_mutual_info_score(group, clustering.assignments),
                diversity=losses.coagulation(v, *clustering[:2])["diversity"],
                effective_rank=losses.effective_rank(v),
                **second_level(others, lambda y: pretrain.kmeans(y, GROUPS, seed, args)[0]))


def second_level(others, kmeans):
    """Coagulation at the prototype level, where there is one: in clusters of its own."""
    return {name: value for y in others for name, value in dict(
        proto_diversity=losses.coagulation(y, *kmeans(y)[:2])["diversity"],
        proto_effective_rank=losses.effective_rank(y)).items()}


def knn(bank, labels, queries, truth):
    """Top-1 in percent as pretrain's monitor has it."""
    near = pretrain.nearest(bank, labels, queries, pretrain.NEIGHBOURS)
    return pretrain.vote(*near, truth, pretrain.NEIGHBOURS)


def linear(bank, labels, queries, truth):
    """Top-1 in percent on queries of logistic regression on bank, unit rows, and its labels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it need not converge
        model = LogisticRegression(C=100, max_iter=40, tol=1e-3).fit(bank.numpy(), labels.numpy())
    return 100 * model.score(queries.numpy(), truth.numpy())


def few_labels(bank, labels, queries, truth, draws=5):
    """`linear` with 2 and 10 labels a class, means over draws of them."""
    found = {2: [], 10: []}
    for draw in range(draws):
        order = torch.randperm(len(bank), generator=torch.Generator().manual_seed(draw))
        for n in found:
            rows = torch.cat([order[labels[order] == c][:n] for c in labels.unique()])
            found[n].append(linear(bank[rows], labels[rows], queries, truth))
    return {f"linear_{n}": statistics.fmean(values) for n, values in found.items()}


def on_hierarchy(run, args, record):
    """A run on the hierarchy: its record."""
    return hierarchy(run["flags"], run["seed"], LOSSES[run["form"]], args.steps)


# ------------------------------------------------------------------------------- one run on images


def small_resnet(arch="small", small_images=True, bn_splits=1):
    """What stands in for builder.build_backbone with --arch small: a ResNet of three basic blocks,
    32, 64 and 128 wide, quick on a CPU."""
    def block(width, out, stride):
        shortcut = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        return BasicBlock(width, out, stride, shortcut if width != out else None)
    stem = nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True)
    net = nn.Sequential(*stem, block(32, 32, 1), block(32, 64, 2), block(64, 128, 2),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.fc = nn.Identity()
    return net, 128


def data(args, held_out="val"):
    """What stands in for loader.load: "train" are the first nine tenths of a fixed permutation of
    the training images, "val" is the rest of them, or the test set."""
    def take(whole, rows):
        images = whole.images[rows].permute(0, 2, 3, 1).squeeze(3)
        return loader.Arrays(images.numpy(), whole.labels[rows].numpy())

    def load(dataset, root, classes):
        whole, test = read(dataset, root)
        order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
        most = len(whole) * 9 // 10
        train = take(whole, order[:most][:args.images])
        if held_out == "test":
            return train, take(test, torch.arange(len(test)))
        return train, take(whole, order[most:][:args.val_images])
    return load


def on_images(run, args, record):
    """A run on images: train and measure. Returns its record, or None where it failed; of what is
    in `record` nothing is made again."""
    folder = args.output / run["folder"]
    folder.mkdir(exist_ok=True)
    os.dup2(os.open(folder / "run.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), 1)
    os.dup2(1, 2)
    cuda = torch.cuda.is_available() and "cpu" not in args.flags
    torch.set_num_threads(max(1, os.cpu_count() // args.jobs) if cuda else 1)
    pretrain.pauc = LOSSES[run["form"]]  # this process makes one run at a time
    if "small" in args.flags:
        builder.build_backbone = small_resnet
    argv = [args.data, "--dataset", "fashionmnist", "--nproc", "1", *args.flags, *run["flags"],
            "--seed", str(run["seed"]), "--output", str(folder), "--resume", "auto"]
    if dist.is_initialized():  # a run that failed has left it
        dist.destroy_process_group()
    try:
        if "linear" not in record:
            started, loader.load = time.time(), data(args)
            pretrain.main(argv)
            record["seconds_pretrain"] = time.time() - started
            record |= measure(argv, folder / "checkpoint.pth")
            record["curve"] = [*logged(folder / "log.jsonl"), {
                name: record[name] for name in ("epoch", *COAGULATION)}]
        if args.test:
            loader.load = data(args, "test")
            found = measure(argv, folder / "checkpoint.pth", labels_alone=True)
            record |= {f"test_{name}": value for name, value in found.items()}
    except SystemExit as ended:  # pretrain's, with the reason in run.txt
        if ended.code > 128:  # a signal: no more runs
            os._exit(ended.code)
        return None
    except Exception:
        traceback.print_exc()
        return None
    device = torch.cuda.get_device_name() if cuda else "cpu"
    return record | dict(argv=argv, torch=torch.__version__, device=device)


def measure(argv, path, labels_alone=False):
    """The figures of a checkpoint: of probes on the backbone's features, judged on loader.load's
    "val"; and of the training images alone, AMI and coagulation."""
    found = {}

    def worker(args):
        train, val = pretrain.open_data(args)
        pretrain.settle(args, train, val, None)
        checkpoint = pretrain.load(path)
        state = {name.removeprefix("module."): x for name, x in checkpoint["state_dict"].items()}
        model = builder.MoCo(args.arch, args.dim, state["queue"].shape[1], args.moco_m, args.mlp,
                             args.crop_size < loader.SMALL_CROP,
                             heads=checkpoint["args"].get("heads", 1))
        model.load_state_dict(state)
        model.to(args.device, memory_format=torch.channels_last)
        backbone = builder.backbone_of(model.encoder_q)
        both = [pretrain.embed(backbone, split, args) for split in (train, val)]
        bank, labels, queries, truth = parts = [
            x.cpu() for features, own in both for x in (F.normalize(features, dim=1), own)]
        found.update(knn=knn(*parts), linear=linear(*parts), **few_labels(*parts))
        if args.dataset == "folder":  # CIFAR-10's
            found["merged"] = linear(bank, ANIMALS[labels], queries, ANIMALS[truth])
        if labels_alone:
            return
        classes = lincls.best_kmeans(bank, train.num_classes, args).assignments.cpu()
        v, *others = model.unit_rows(pretrain.embed(model.encoder_k, train, args)[0]).unbind(1)
        assignments, prototypes, _ = lincls.best_kmeans(v, MEASURED, args)
        found.update(losses.coagulation(v, assignments, prototypes), epoch=checkpoint["epoch"],
                     effective_rank=losses.effective_rank(v),
                     ami=adjusted_mutual_info_score(labels, classes),
                     **second_level(others, lambda y: lincls.best_kmeans(y, MEASURED, args)))
    pretrain.launch(worker, pretrain.parse_args(argv))
    return found


def logged(path):
    """The coagulation figures in a log: an epoch's line has those of its E-step, before it."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: mean(row[name]) for name in COAGULATION} | dict(epoch=row["epoch"] - 1)
            for row in rows if "diversity" in row]


def mean(value):
    return statistics.fmean(value) if isinstance(value, list) else value


# ---------------------------------------------------------------------------------------- all runs


def main(argv=None):
    args = parse_args(argv)
    if args.plot:
        return plot(args)
    pretrain.parse_args(args.flags)  # wrong ones end here
    signal.signal(signal.SIGTERM, end)
    if args.cpu is None:
        args.grid = args.grid or ["main"]
        sys.exit(run_grids(args) > 0)
    failed = 0
    for name in args.cpu or CPU:
        below, recipe = CPU[name]
        own = argparse.Namespace(**vars(args) | recipe)
        own.data, own.output = str(Path(args.data, below)), args.output / name
        own.flags, own.grid = [*recipe["flags"], *args.flags], args.grid or ["coarse"]
        failed += run_grids(own)
    sys.exit(failed > 0)


def run_grids(args):
    """The runs of some grids that are not there yet; returns how many failed."""
    args.output.mkdir(parents=True, exist_ok=True)
    images = [grid for grid in args.grid if not grid.startswith("hierarchy")]
    vectors = [grid for grid in args.grid if grid.startswith("hierarchy")]
    failed = 0
    if vectors:
        failed += run_all("hierarchy", vectors, on_hierarchy, dict(steps=args.steps), args)
    if images:
        names = "data", "flags", "images", "val_images"
        failed += run_all("images", images, on_images, {n: getattr(args, n) for n in names}, args)
    return failed


def end(*_):
    for child in multiprocessing.active_children():
        child.terminate()
    sys.exit(143)


def run_all(title, chosen, function, settings, args):
    """The runs of some grids that are not there yet; returns how many failed."""
    lines, table_file = (args.output / f"{title}.{kind}" for kind in ("jsonl", "md"))
    before = args.output / f"{title}.json"
    if before.exists() and json.loads(before.read_text()) != settings:
        sys.exit(f"--output {args.output}: holds runs with other flags, {before.read_text()}; give "
                 f"another --output")
    before.write_text(json.dumps(settings))
    records, todo = read_runs(lines), []
    methods = {name: method for grid in chosen for name, method in grids()[grid].items()}
    if args.quick:
        methods = {name: methods[name] for name in QUICK[title]}
    wanted = "test_linear" if args.test and title == "images" else "linear"
    seeds = 1 if args.quick and title == "images" else args.seeds
    for seed in range(args.first_seed, args.first_seed + seeds):  # all methods of one seed first
        for name, (own, form, _) in methods.items():
            folder = re.sub(r"[^A-Za-z0-9.]+", "-", name) + f"-s{seed}"
            run = dict(name=name, seed=seed, flags=own, form=form, folder=folder)
            record = records.get((name, seed), {})
            if wanted not in record:
                todo.append((run, args, record))
    print(f"{len(todo)} runs to do, {args.jobs} at once, to {lines}", flush=True)
    failed, context = 0, multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, context) as pool:
        futures = {pool.submit(function, *inputs): inputs[0] for inputs in todo}
        for future in as_completed(futures):
            run, record = futures[future], future.result()
            name, seed = run["name"], run["seed"]
            if record is None:
                failed += 1
                print(f"{name}, seed {seed}: failed, see {args.output / run['folder'] / 'run.txt'}")
                continue
            records[name, seed] = dict(name=name, seed=seed) | record
            new = lines.with_suffix(".new")
            new.write_text("".join(json.dumps(record) + "\n" for record in records.values()))
            os.replace(new, lines)
            shown = [f"{figure} {record[figure]:.4g}" for figure in TITLES if figure in record]
            print("  ".join([f"{name}, seed {seed}:", *shown]), flush=True)
    known = {name: bases for grid, methods in grids().items()
             if grid.startswith("hierarchy") == (title == "hierarchy")
             for name, (_, _, bases) in methods.items()}
    records = {key: record for key, record in records.items()
               if args.first_seed <= key[1] < args.first_seed + args.seeds}
    text = f"{json.dumps(settings)}\n\n{table(records, known)}"
    table_file.write_text(text)
    print(text)
    return failed


def read_runs(path):
    rows = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return {(row["name"], row["seed"]): row for row in rows}


def table(records, known):
    """Markdown: mean and standard deviation over seeds, then differences over shared seeds and
    their standard errors. records: {(method, seed): figures}, known: {method: bases}."""
    figures = [name for name in TITLES if any(name in record for record in records.values())]
    head = ["| | n | " + " | ".join(TITLES[name] for name in figures) + " |",
            "|---" * (len(figures) + 2) + "|"]
    seeds = {name: [seed for other, seed in records if other == name] for name in known}

    def row(name, values, difference):
        cells = []
        for figure in figures:
            x = [value[figure] for value in values if figure in value]
            digits, sign = DIGITS.get(figure, 1 + difference), "+" if difference else ""
            cell = f"{statistics.fmean(x):{sign}.{digits}f}" if x else ""
            if len(x) > 1:
                spread = statistics.stdev(x) / (len(x) ** 0.5 if difference else 1)
                cell += f" ± {spread:.{digits}f}"
            cells.append(cell)
        return "| " + " | ".join([name, str(len(values)), *cells]) + " |"

    text = ["Mean ± standard deviation over n seeds, accuracies in percent:", "", *head]
    text += [row(name, [records[name, seed] for seed in seeds[name]], False)
             for name in known if seeds[name]]
    text += ["", "Differences, mean ± standard error over the n seeds that both have:", "", *head]
    for name, bases in known.items():
        for base in bases:
            both = [(records[name, seed], records[base, seed]) for seed in seeds[name]
                    if seed in seeds[base]]
            gains = [{figure: x[figure] - y[figure] for figure in {*figures} & x.keys() & y.keys()}
                     for x, y in both]
            if gains:
                text.append(row(f"{name} − {base}", gains, True))
    return "\n".join(text) + "\n"


# ---------------------------------------------------------------------------------------- pictures


def plot(args):
    from matplotlib import pyplot  # pip install matplotlib
    args.img.mkdir(parents=True, exist_ok=True)
    pyplot.rcParams.update({"font.size": 9, "savefig.dpi": 110})
    plot_hierarchy(pyplot, args.img / "hierarchy.png", args.steps)


def plot_hierarchy(pyplot, path, steps, seed=0, group=4):
    """The embeddings of one group's vectors and classes on their own two principal components, at
    the same scale. Circles: the root of the mean squared distance from the group's mean."""
    figure, axes = pyplot.subplots(1, 3, figsize=(9, 3.3), layout="constrained", sharex=True,
                                   sharey=True)
    radii = []
    for axis, (name, own) in zip(axes, {"MoCo": MOCO, "PCL": PCL, "PAUC": []}.items()):
        run = train_on_hierarchy(["--num-clusters", "10", *own], seed, steps=steps)
        _, encoder_k, x, _, labels, _ = run
        rows = labels // (CLASSES // GROUPS) == group
        with torch.inference_mode():
            v = levels(encoder_k, x[rows])[0]
        v, label = v - v.mean(0), labels[rows] % (CLASSES // GROUPS)
        spread = v.square().sum(1).mean().item()
        radii.append(spread ** 0.5)
        places = v @ torch.linalg.svd(v, full_matrices=False).Vh[:2].T
        axis.scatter(*places.T, c=label, cmap="tab10", s=5, linewidths=0, alpha=0.5)
        centres = torch.stack([places[label == c].mean(0) for c in label.unique()])
        axis.scatter(*centres.T, c=label.unique(), cmap="tab10", s=60, edgecolors="k",
                     linewidths=0.6)
        for radius, style in ((radii[0], ":"), (radii[-1], "-")):  # MoCo's in every panel
            axis.add_patch(pyplot.Circle((0, 0), radius, fill=False, linestyle=style))
        axis.set(title=f"{name}: diversity {2 * spread:.2f}", aspect="equal")
        axis.axis("off")
    figure.savefig(path, bbox_inches="tight")


if __name__ == "__main__":
    main()
