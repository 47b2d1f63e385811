"""The study: methods and seeds, by the project's own functions.

    python tests/study.py --grid hierarchy --seeds 10               # Gaussians: 6 s a run on a core
    python tests/study.py --data DIR --cpu --jobs 2                 # 2 or 11 min a run and core
    python tests/study.py --data DIR --grid main --seeds 3 --jobs 4 # ResNet-18 at 28 px, one GPU
    python tests/study.py THE SAME --test                           # once, when all is chosen
    python tests/study.py --plot                                    # img/hierarchy.png
    python tests/study.py --quick                                   # does it work?

DIR holds FashionMNIST/raw/*-ubyte, and with --cpu cifar10/train/CLASS/* and cifar10/val/CLASS/*, of
which val is the test set; with --dataset folder it is such a folder. A flag that is not in --help
here goes to pretrain.py. A tenth of the training images is held out; every figure and choice is on
it. The test set is read by --test alone, with the last epoch's weights.

OUTPUT/images.jsonl and hierarchy.jsonl have one line a run, GRID.md the means over those seeds, and
RUN/run.txt what a run printed. What is there is skipped, whatever the flags, or goes on.

Diversity and rank are of the momentum encoder's embeddings of the training images, in 20 clusters
for every method; proto_ are those of the prototypes' head. All else is of the frozen backbone's
features: linear is logistic regression, linear_10 and linear_2 the mean of 5 draws of so many
labels a class, ami that of k-means with as many clusters as classes.
"""
import argparse
import copy
import functools
import json
import multiprocessing
import os
import signal
import statistics
import sys
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

DIGITS = dict(ami=3, diversity=3, proto_diversity=3)  # of the others 1, of their differences 2
CPU_FLAGS = "--grid final --arch small --batch-size 64 --queue-size 1000 --knn-every 0"
CPU = dict(  # with --cpu: where below --data, and the flags that are no longer to be given
    fashionmnist=("", f"{CPU_FLAGS} --images 4000 --crop-size 14 --epochs 20 --warmup-epochs 4"),
    cifar10=("cifar10", f"{CPU_FLAGS} --images 10000 --crop-size 16 --epochs 30 --warmup-epochs 6 "
                        "--dataset folder --moco-m 0.99"))
QUICK = """--output study/quick --grid hierarchy main --seeds 2 --steps 60 --images 128
    --dataset digits --arch shufflenet_v2_x0_5 --epochs 2 --warmup-epochs 1"""
QUICK_METHODS = "PCL, P = 5", "PAUC, two heads, P = 5", "PAUC, two heads"
MOCO = "--heads 1 --proto 0 --align 0 --uniform 0 --corr 0".split()  # clusters are in its log
MOCO_UNIFORM = "--heads 1 --proto 0 --align 0 --corr 0".split()  # the control
PCL = "--heads 1 --align 0 --uniform 0 --corr 0".split()
read = functools.cache(loader.load)  # the project's own


def methods(*sizes):
    """Of a grid: {method: (flags of pretrain, the methods that it is held against)}."""
    P = f", P = {', '.join(sizes)}" if sizes else ""
    clusters = ["--num-clusters", *sizes] if sizes else []
    uniform, pcl, one = "MoCo + uniformity", f"PCL{P}", f"PAUC, one head{P}"
    return {
        "MoCo": (MOCO, []),
        uniform: (MOCO_UNIFORM, ["MoCo"]),
        pcl: ([*clusters, *PCL], ["MoCo"]),
        one: ([*clusters, "--heads", "1"], ["MoCo", uniform, pcl]),
        f"PAUC, two heads{P}": ([*clusters, "--heads", "2"], ["MoCo", uniform, pcl, one])}


GRIDS = dict(main=methods(), final=methods("10", "40"), hierarchy={
    name: method for P in ("5", "10", "100", "400", "1000") for name, method in methods(P).items()})


def parse_args(preset=""):
    """preset: flags that those given go before."""
    parser = argparse.ArgumentParser(description="PAUC's study", allow_abbrev=False)
    add = parser.add_argument
    add("--data", type=Path, default="data", metavar="DIR", help="holds FashionMNIST/raw/*-ubyte")
    add("--grid", nargs="+", choices=GRIDS, default=["main"], help="with --cpu final")
    add("--seeds", type=int, default=3, help="how many, from --first-seed on")
    add("--first-seed", type=int, default=0)
    add("--jobs", type=int, default=1, help="runs at once, all on one device")
    add("--images", type=int, default=54_000, help="training images")
    add("--steps", type=int, default=600, help="of a run on the hierarchy")
    add("--cpu", nargs="*", choices=CPU, help="what two cores can do in hours, of both or of one")
    add("--test", action="store_true", help="read the test set")
    add("--output", type=Path, default=Path("study"))
    add("--plot", action="store_true", help="only draw img/hierarchy.png")
    add("--quick", action="store_true", help="a few tiny runs of each kind")
    args, args.flags = parser.parse_known_args([*preset.split(), *sys.argv[1:]])
    return args


# --------------------------------- a hierarchy of Gaussians: 10 groups of 10 classes that overlap

VECTORS, DIMENSIONS, GROUPS, CLASSES = 4000, 64, 10, 100
GROUP_SPREAD, CLASS_SPREAD, VIEW_NOISE, DROPPED = 0.45, 0.65, 1.0, 0.4  # in a class: 1
HIDDEN, WIDTH, EMBEDDING, BATCH, QUEUE = 128, 64, 32, 256, 1000
RATE, KEEP, CLUSTER_EVERY = 0.3, 0.99, 30


def gaussians(generator):
    """Vectors (n, DIMENSIONS) to train on, as many to evaluate on, the labels (n,) of either."""
    def draw(*shape):
        return torch.randn(shape, generator=generator)
    centre = GROUP_SPREAD * draw(GROUPS, 1, DIMENSIONS)
    centre = centre + CLASS_SPREAD * draw(GROUPS, CLASSES // GROUPS, DIMENSIONS)
    labels = torch.arange(VECTORS) % CLASSES
    means = centre.flatten(0, 1)[labels]
    return means + draw(VECTORS, DIMENSIONS), means + draw(VECTORS, DIMENSIONS), labels


def levels(encoder, x):
    """The unit rows (n, EMBEDDING) of each head."""
    return F.normalize(encoder(x).view(len(x), -1, EMBEDDING), dim=2).unbind(1)


def train_on_hierarchy(flags, seed, steps):
    """A run, a quarter of it warm-up. flags: pretrain's weights, --heads, --num-clusters. Returns
    the encoders (encoder[0] is the backbone), the vectors, their labels and pretrain's args."""
    def view(x):
        noisy = x + VIEW_NOISE * torch.randn(x.shape, generator=generator)
        return noisy * (torch.rand(x.shape, generator=generator) >= DROPPED)
    args = pretrain.parse_args(["--temperature", "0.2", "--num-clusters", "10", *flags])
    args.device, args.seed = torch.device("cpu"), seed
    generator = torch.Generator().manual_seed(seed)
    x, x_val, labels = gaussians(generator)
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Linear(DIMENSIONS, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(),
                             nn.Linear(HIDDEN, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU())
    heads = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, EMBEDDING))
             for _ in range(args.heads)]
    encoder_q = nn.Sequential(backbone, builder.TwoHeads(*heads) if args.heads == 2 else heads[0])
    encoder_k = copy.deepcopy(encoder_q).requires_grad_(False)
    groups = [nn.ModuleList([backbone, heads[0]]), *heads[1:]]
    optimizer = torch.optim.SGD([dict(params=group.parameters()) for group in groups], RATE,
                                momentum=0.9, weight_decay=args.wd)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    queue, queue_index = torch.zeros(EMBEDDING, QUEUE), torch.full((QUEUE,), builder.EMPTY)
    warmup, clusterings = steps // 4, []
    for step in range(steps):
        if step >= warmup and (step - warmup) % CLUSTER_EVERY == 0:
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
            k = levels(encoder_k.train(), view(x[index]))
        q = levels(encoder_q, view(x[index]))
        batch = losses.Batch(q[0], k[0], q[-1], k[-1], index, queue, queue_index,
                             slice(0, BATCH), 0, step)
        loss, _ = pretrain.pauc(batch, clusterings, args)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        columns = (step * BATCH + torch.arange(BATCH)) % QUEUE
        queue[:, columns], queue_index[columns] = k[0].T, index
    return encoder_q.eval(), encoder_k.eval(), x, x_val, labels, args


def hierarchy(flags, seed, steps=600):
    """The figures of a run: of the 100 classes the probes, on vectors that were not trained on; of
    the embeddings the coagulation, and the AMI of their 10 clusters with the groups."""
    torch.set_num_threads(1)
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    encoder_q, encoder_k, x, x_val, labels, args = train_on_hierarchy(flags, seed, steps)
    with torch.inference_mode():
        bank, queries = (F.normalize(encoder_q[0](part), dim=1) for part in (x, x_val))
        embeddings = levels(encoder_k, x)
    args.kmeans_restarts = 3
    clusterings = [pretrain.kmeans(v, GROUPS, seed, args)[0] for v in embeddings]
    groups, found = labels // (CLASSES // GROUPS), clusterings[0].assignments
    return dict(probes(bank, labels, queries, labels), **coagulation(embeddings, clusterings),
                ami=adjusted_mutual_info_score(groups, found))


def plot(steps, seed=0, group=4):
    """The embeddings of one group's vectors and classes on their own two principal components, at
    the same scale. Circles: the root of the mean squared distance from the group's mean."""
    import matplotlib.pyplot as plt  # pip install matplotlib
    plt.rcParams.update({"font.size": 9, "savefig.dpi": 110})
    fig, axes = plt.subplots(1, 3, figsize=(9, 3.3), layout="constrained", sharex=True, sharey=True)
    radii = []
    for axis, (name, own) in zip(axes, {"MoCo": MOCO, "PCL": PCL, "PAUC": []}.items()):
        _, encoder_k, x, _, labels, _ = train_on_hierarchy(own, seed, steps)
        rows = labels // (CLASSES // GROUPS) == group
        with torch.inference_mode():
            v = levels(encoder_k, x[rows])[0]
        v, label = v - v.mean(0), labels[rows] % (CLASSES // GROUPS)
        spread = v.square().sum(1).mean().item()
        radii.append(spread ** 0.5)
        places = v @ torch.linalg.svd(v, full_matrices=False).Vh[:2].T
        axis.scatter(*places.T, c=label, cmap="tab10", s=5, linewidths=0, alpha=0.5)
        means = torch.stack([places[label == c].mean(0) for c in label.unique()])
        axis.scatter(*means.T, c=label.unique(), cmap="tab10", s=60, edgecolors="k", linewidths=0.6)
        for radius, style in ((radii[0], ":"), (radii[-1], "-")):  # MoCo's in every panel
            axis.add_patch(plt.Circle((0, 0), radius, fill=False, linestyle=style))
        axis.set(title=f"{name}: diversity {2 * spread:.2f}", aspect="equal")
        axis.axis("off")
    fig.savefig("img/hierarchy.png", bbox_inches="tight")


def probes(bank, labels, queries, truth):
    """Top-1 in percent on queries by bank, both unit rows, and its labels: of kNN as pretrain's
    monitor has it, and of logistic regression, also with 10 and 2 labels a class."""
    near = pretrain.nearest(bank, labels, queries, pretrain.NEIGHBOURS)
    found = dict(linear=linear(bank, labels, queries, truth),
                 knn=pretrain.vote(*near, truth, pretrain.NEIGHBOURS))
    for n in 10, 2:
        draws = []
        for draw in range(5):
            order = torch.randperm(len(bank), generator=torch.Generator().manual_seed(draw))
            rows = torch.cat([order[labels[order] == c][:n] for c in labels.unique()])
            draws.append(linear(bank[rows], labels[rows], queries, truth))
        found[f"linear_{n}"] = statistics.fmean(draws)
    return found


def linear(bank, labels, queries, truth):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it need not converge
        model = LogisticRegression(C=100, max_iter=40, tol=1e-3).fit(bank.numpy(), labels.numpy())
    return 100 * model.score(queries.numpy(), truth.numpy())


def coagulation(embeddings, clusterings):
    """Diversity and rank of the instances' level and, where there is one, of the prototypes'."""
    found = {}
    for level, v, clustering in zip(("", "proto_"), embeddings, clusterings):
        found[f"{level}diversity"] = losses.coagulation(v, *clustering[:2])["diversity"]
        found[f"{level}effective_rank"] = losses.effective_rank(v)
    return found


# --------------------------------------------------------------------------------- a run on images


def small_resnet(arch="small", small_images=True, bn_splits=1):
    """Stands in for builder.build_backbone with --arch small: three blocks, 32 to 128 wide."""
    def block(width, out, stride):
        shortcut = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        return BasicBlock(width, out, stride, shortcut if width != out else None)
    stem = nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True)
    net = nn.Sequential(*stem, block(32, 32, 1), block(32, 64, 2), block(64, 128, 2),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.fc = nn.Identity()
    return net, 128


def data(args, test):
    """Stands in for loader.load: "train" are the first nine tenths of a fixed permutation of the
    training images, "val" is the rest of them, at most 4,000, or the test set."""
    def load(dataset, root, classes):
        whole, held_out = read(dataset, root)
        order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
        most = len(whole) * 9 // 10
        chosen = [(whole, order[:most][:args.images]),
                  (held_out, slice(None)) if test else (whole, order[most:][:4000])]
        return [loader.Arrays(source.images[rows].permute(0, 2, 3, 1).squeeze(3).numpy(),
                              source.labels[rows].numpy()) for source, rows in chosen]
    return load


def images(folder, record, flags, args):
    """Train and measure: a run's record. Of what is in `record` nothing is made again."""
    folder.mkdir(exist_ok=True)
    os.dup2(os.open(folder / "run.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), 1)
    os.dup2(1, 2)
    cuda = torch.cuda.is_available() and "cpu" not in args.flags
    torch.set_num_threads(max(1, os.cpu_count() // args.jobs) if cuda else 1)
    if "small" in args.flags:
        builder.build_backbone = small_resnet
    argv = [str(args.data), "--dataset", "fashionmnist", "--nproc", "1", *args.flags, *flags,
            "--seed", str(record["seed"]), "--output", str(folder), "--resume", "auto"]
    if dist.is_initialized():  # a run that failed has left it
        dist.destroy_process_group()
    try:
        if "linear" not in record:
            loader.load = data(args, test=False)
            pretrain.main(argv)
            record |= measure(argv, folder)
        if args.test:
            loader.load = data(args, test=True)
            figures = measure(argv, folder, labels_alone=True)
            record |= {f"test_{name}": value for name, value in figures.items()}
    except SystemExit as ended:  # pretrain's, with the reason in run.txt
        if ended.code > 128:  # a signal: no more runs
            os._exit(ended.code)
        raise
    return record | dict(argv=argv, torch=torch.__version__,
                         device=torch.cuda.get_device_name() if cuda else "cpu")


def measure(argv, folder, labels_alone=False):
    """The figures of a run: of probes on loader.load's "val", and of the training images alone."""
    found = {}

    def worker(args):
        train, val = pretrain.open_data(args)
        pretrain.settle(args, train, val, None)
        model = builder.MoCo(args.arch, args.dim, args.queue_size, args.moco_m, args.mlp,
                             args.crop_size < loader.SMALL_CROP, heads=args.heads)
        state = pretrain.load(folder / "checkpoint.pth")["state_dict"]
        model.load_state_dict({name.removeprefix("module."): x for name, x in state.items()})
        model.to(args.device, memory_format=torch.channels_last)
        backbone = builder.backbone_of(model.encoder_q)
        both = [pretrain.embed(backbone, split, args) for split in (train, val)]
        parts = [x.cpu() for v, labels in both for x in (F.normalize(v, dim=1), labels)]
        found.update(probes(*parts))
        if labels_alone:
            return
        bank, labels, *_ = parts
        classes = lincls.best_kmeans(bank, train.num_classes, args).assignments.cpu()
        embeddings = model.unit_rows(pretrain.embed(model.encoder_k, train, args)[0]).unbind(1)
        clusterings = [lincls.best_kmeans(v, 20, args) for v in embeddings]
        found.update(coagulation(embeddings, clusterings),
                     ami=adjusted_mutual_info_score(labels, classes))
    pretrain.launch(worker, pretrain.parse_args(argv))
    return found


# ---------------------------------------------------------------------------------------- all runs


def main():
    args = parse_args()
    if args.plot:
        return plot(args.steps)
    pretrain.parse_args(args.flags)  # wrong ones end here
    signal.signal(signal.SIGTERM, end)
    chosen = [("", "", QUICK if args.quick else "")]
    if args.cpu is not None:
        chosen = [(name, *CPU[name]) for name in args.cpu or CPU]
    failed = 0
    for name, below, preset in chosen:
        args = parse_args(preset)
        args.data, args.output = args.data / below, args.output / name
        args.output.mkdir(parents=True, exist_ok=True)
        failed += sum(run_grid(grid, args) for grid in args.grid)
    sys.exit(failed > 0)


def end(*_):
    for child in multiprocessing.active_children():
        child.terminate()
    sys.exit(143)


def run_grid(grid, args):
    """The runs of a grid that are not there yet; returns how many failed."""
    kind = "hierarchy" if grid == "hierarchy" else "images"
    wanted = "test_linear" if args.test and kind == "images" else "linear"
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    path = args.output / f"{kind}.jsonl"
    rows = map(json.loads, path.read_text().splitlines() if path.exists() else ())
    records = {(row["name"], row["seed"]): row for row in rows}
    failed, futures = 0, {}
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        for seed in seeds:  # all methods of one seed first
            for name, (flags, _) in GRIDS[grid].items():
                record = records.get((name, seed), dict(name=name, seed=seed))
                if wanted in record or args.quick and name not in QUICK_METHODS:
                    continue
                folder = args.output / f"{name}, seed {seed}"
                call = (hierarchy, flags, seed, args.steps) if kind == "hierarchy" else (
                    images, folder, record, flags, args)
                futures[pool.submit(*call)] = record, folder
        print(f"{len(futures)} runs to do, {args.jobs} at once, to {path}", flush=True)
        for future in as_completed(futures):
            record, folder = futures[future]
            error = future.exception()
            if error:
                failed += 1
                bug = "" if isinstance(error, SystemExit) else error.__cause__
                print(f"{folder.name}: failed, see {folder}/run.txt", bug, flush=True)
                continue
            records[record["name"], record["seed"]] = record | future.result()
            new = path.with_suffix(".new")
            new.write_text("".join(json.dumps(record) + "\n" for record in records.values()))
            os.replace(new, path)
            print(f"{folder.name}: done", flush=True)
    text = table({key: x for key, x in records.items() if key[1] in seeds}, GRIDS[grid])
    (args.output / f"{grid}.md").write_text(text)
    print(text)
    return failed


def table(records, methods):
    """Markdown: mean and standard deviation over seeds, then differences over shared seeds and
    their standard errors. records: {(method, seed): figures}, methods: a grid."""
    def row(title, runs, sign=""):
        cells = [title, str(len(runs))]
        for figure in columns:
            x = [run[figure] for run in runs if figure in run]
            digits = DIGITS.get(figure, 2 if sign else 1)
            cell = f"{statistics.fmean(x):{sign}.{digits}f}" if x else ""
            if len(x) > 1:
                spread = statistics.stdev(x) / (len(x) ** 0.5 if sign else 1)
                cell += f" ± {spread:.{digits}f}"
            cells.append(cell)
        return "| " + " | ".join(cells) + " |"

    runs = {key: {name: x for name, x in record.items() if isinstance(x, float)}
            for key, record in records.items() if key[0] in methods}
    columns = [*dict.fromkeys(figure for figures in runs.values() for figure in figures)]
    head = ["| | n | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    means, differences = [], []
    for name, (_, bases) in methods.items():
        own = {seed: x for (other, seed), x in runs.items() if other == name}
        means += [row(name, own.values())] if own else []
        for base in bases:
            both = [(x, runs[base, seed]) for seed, x in own.items() if (base, seed) in runs]
            gains = [{name: x[name] - y[name] for name in x if name in y} for x, y in both]
            differences += [row(f"{name} − {base}", gains, "+")] if gains else []
    return "\n".join([
        "Mean ± standard deviation over n seeds, accuracies in percent:", "", *head, *means, "",
        "Differences, mean ± standard error over the n seeds that both have:", "", *head,
        *differences]) + "\n"


if __name__ == "__main__":
    main()
