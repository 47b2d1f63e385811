"""The study: methods, weights and seeds on Fashion-MNIST, by pretrain.py's and lincls.py's own functions.

    python tests/study.py --data DIR --grid main --seeds 5 --jobs 4                      # ResNet-18 at 28 px, one GPU
    python tests/study.py --data DIR --grid main --seeds 5 --jobs 2 --images 5000 --crop-size 8 --amp bf16 --epochs 10 \
        --warmup-epochs 2 --batch-size 64 --queue-size 1024 --min-scale 0.6 --no-flip --lr 0.01 --temperature 0.1    # two cores
    python tests/study.py THE SAME --grid main --test                                    # once, when every choice is made
    python tests/study.py --plot                                                         # img/*.png of what OUTPUT holds

DIR holds FashionMNIST/raw/*.gz. Grids: main, terms, weights, constants, variants, scale. A flag that is not in --help here
goes to pretrain.py. A tenth of the training images is held out; every figure and choice is on it. The test set is read by
--test alone, with the last epoch's weights.

OUTPUT/runs.jsonl has one line a run, OUTPUT/table.md the means over the first --seeds seeds. What is there is skipped, a
run that was cut short goes on, and with other --probe flags only the probes are made again. OUTPUT/RUN/run.txt is what a
run printed.

The coagulation figures are measured after the last epoch, the same for every method: momentum encoder, training images,
k-means with the same sizes; where one value is given it is the mean over the sizes. A run's curve is from its log, with the
sizes that it trained with, and MoCo's from numbered checkpoints.
"""
import argparse
import contextlib
import io
import json
import multiprocessing
import os
import re
import signal
import statistics
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # each run has one core; before torch and faiss read it
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from sklearn.metrics import adjusted_mutual_info_score  # noqa: E402

import builder  # noqa: E402
import lincls  # noqa: E402
import loader  # noqa: E402
import losses  # noqa: E402
import pretrain  # noqa: E402

TRAIN = 54_000  # nine tenths of Fashion-MNIST's training images
COAGULATION = "diversity", "effective_rank", "separation", "balance"
FIGURES = "knn", "linear", "test_knn", "test_linear", "diversity", "effective_rank", "ami"  # in the table
TITLES = "kNN", "linear", "test kNN", "test linear", "diversity", "effective rank", "AMI"
DIGITS = dict(knn=2, linear=2, test_knn=2, test_linear=2, diversity=3, effective_rank=1, ami=3)
read, prototype_terms, pauc = loader.load, pretrain.prototype_terms, pretrain.pauc  # the project's own


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="PAUC's study", allow_abbrev=False)
    add = parser.add_argument
    add("--data", default="data", metavar="DIR", help="holds FashionMNIST/raw/*.gz")
    add("--grid", nargs="+", choices=methods([]), default=["main"])
    add("--seeds", type=int, default=3, help="seeds 0, 1, ...")
    add("--jobs", type=int, default=1, help="runs at once, all on one device")
    add("--images", type=int, default=TRAIN, help="training images")
    add("--val-images", type=int, default=4000, help="held-out images")
    add("--num-clusters", type=int, nargs="+", metavar="P", help="of PCL and PAUC, and for measuring (default: pretrain's)")
    add("--curve-every", type=int, metavar="EPOCHS", help="of MoCo's curve (default: a tenth of the epochs)")
    add("--probe-lr", type=float, default=0.03, help="chosen once on the held-out images, the same for every method")
    add("--probe-epochs", type=int, default=10)
    add("--probe-batch", type=int, default=256)
    add("--test", action="store_true", help="read the test set")
    add("--output", type=Path, default=Path("study"))
    add("--plot", action="store_true", help="only draw what OUTPUT holds")
    add("--img", type=Path, default=Path("img"), help="where --plot puts its files")
    args, args.flags = parser.parse_known_args(argv)
    args.images = min(args.images, TRAIN)
    args.num_clusters = args.num_clusters or sorted({max(2, args.images // n) for n in pretrain.IMAGES_PER_PROTOTYPE})
    return args


# -------------------------------------------------------------------------------------------------------------- grids


def methods(sizes):
    """{grid: {method: (flags of pretrain, variant or None, the methods that it is held against)}}."""
    def off(*terms):
        return [part for term in terms for part in (f"--{term}", "0")]
    terms = ["align", "uniform", "corr"]
    main = {"MoCo": (["--num-clusters", "0"], None, []), "PCL": (off(*terms), None, ["MoCo"]),
            "PAUC": ([], None, ["MoCo", "PCL"])}
    alone = {f"PCL + {term}": (off(*(t for t in terms if t != term)), None, ["PCL"]) for term in terms}
    without = {f"PAUC without {term}": (off(term), None, ["PAUC"]) for term in terms}
    triples = ("1 1 1", "0.3 0.3 0.3", "0.1 0.1 0.1", "0.03 0.03 0.03", "1 0.1 0.1", "0.1 0.3 0.1", "0.1 0.1 0.3")
    own = " ".join(f"{pretrain.DEFAULTS['fashionmnist'][term]:g}" for term in terms)  # PAUC's
    weights = {f"PAUC {triple}": ([part for term, weight in zip(terms, triple.split()) for part in (f"--{term}", weight)],
                                  None, ["PCL"]) for triple in triples if triple != own}
    values = {"corr-lambda": (0.005, 0.05, 1), "uniform-t": (1, 4), "align-alpha": (1,)}
    constants = {f"PAUC {flag} {value}": ([f"--{flag}", str(value)], None, ["PAUC"])
                 for flag in values for value in values[flag]}
    scales = {"clusters x 6": ["--num-clusters", *(str(6 * size) for size in sizes)], "epochs 20": ["--epochs", "20"],
              "PCL's k-means": ["--kmeans-iters", "20", "--kmeans-restarts", "5", "--kmeans-init", "random"],
              "batch 32": ["--batch-size", "32"],
              "clusters / 8": ["--num-clusters", *(str(max(2, size // 8)) for size in sizes)]}
    scale = {f"{method}, {name}": (main[method][0] + flags, None, [method] + [f"PCL, {name}"] * (method == "PAUC"))
             for name, flags in scales.items() for method in ("PCL", "PAUC")}
    variants = {f"PAUC, {name}": ([], name, ["PAUC"]) for name in VARIANTS}
    for name in ("refreshed prototypes", "the queue's keys"):  # where a prototype has one image in the batch
        variants[f"PAUC, {name}, clusters x 6"] = scales["clusters x 6"], name, ["PAUC, clusters x 6"]
    return dict(main=main, terms=alone | without, weights=weights, constants=constants, variants=variants, scale=scale)


def align_to_centroid(terms, q, k, assignments, prototypes, args):
    p, ids = losses.prototype_features(q, assignments)
    terms["loss_align"] = losses.alignment(p, prototypes[ids.to(q.device)], args.align_alpha)


def corr_of_images(terms, q, k, assignments, prototypes, args):
    terms["loss_corr"] = losses.correlation(q, k, args.corr_lambda)


def corr_across_prototypes(terms, q, k, assignments, prototypes, args):
    """1/J [ sum_j (1 - S_jj)^2 + lambda sum_{j != l} S_jl^2 ], S = p p+^T: the JxJ similarities towards the identity."""
    p, p_positive = (losses.prototype_features(z, assignments)[0] for z in (q, k))
    s = p @ p_positive.T
    on = (1 - s.diagonal()).square().sum()
    terms["loss_corr"] = (on + args.corr_lambda * (s.square().sum() - s.diagonal().square().sum())) / len(s)


def all_three(terms, p, p_positive, args):
    terms.update(loss_align=losses.alignment(p, p_positive, args.align_alpha),
                 loss_uniform=losses.uniformity(p, args.uniform_t),
                 loss_corr=losses.correlation(p, p_positive, args.corr_lambda))


def refreshed(terms, q, k, assignments, prototypes, args, beta=0.5):
    """p_j = normalise(beta c_j + (1 - beta) mean of the batch's members), in both views and all three terms."""
    ids, row, size = (x.to(q.device) for x in assignments.unique(return_inverse=True, return_counts=True))
    p, p_positive = (F.normalize(beta * prototypes[ids] + (1 - beta) * torch.zeros_like(prototypes[ids]).index_add(0, row, z)
                                 / size[:, None], dim=1) for z in (q, k))
    all_three(terms, p, p_positive, args)


waiting = []  # the queue's keys and their images' indices, batch by batch; empty again in a run that goes on


def with_the_queues_keys(terms, q, k, assignments, prototypes, args):
    """p_j and p+_j of the batch's images and of the queue's keys of the same prototype; `assignments` are of both."""
    members = (assignments[:len(q)].unique()[:, None] == assignments).to(q)  # JxN+Q
    p, p_positive = (F.normalize(members @ torch.cat([z, *(keys for keys, _ in waiting)]), dim=1) for z in (q, k))
    all_three(terms, p, p_positive, args)


def with_index_of_the_queue(q, k, index, queue, clusterings, args, epoch, step):
    """pretrain.pauc, where `prototype_terms` gets the assignments of the queue's keys behind those of the batch."""
    found = pauc(q, k, torch.cat([index, *(images for _, images in waiting)]), queue, clusterings, args, epoch, step)
    waiting.append((k, index))
    del waiting[:-(args.queue_size // args.batch_size)]
    return found


VARIANTS = {"align to centroid": align_to_centroid, "corr of images": corr_of_images,
            "corr across prototypes": corr_across_prototypes, "refreshed prototypes": refreshed,
            "the queue's keys": with_the_queues_keys}


def varied(variant):
    """pretrain.prototype_terms with what a variant puts in its place."""
    def terms(q, k, assignments, prototypes, concentration, args, negatives):
        found = prototype_terms(q, k, assignments[:len(q)], prototypes, concentration, args, negatives)
        VARIANTS[variant](found, q, k, assignments, prototypes, args)
        return found
    return terms


# ------------------------------------------------------------------------------------------------------------ one run


def data(args, held_out="val"):
    """What stands in for loader.load: "train" are the first nine tenths of a fixed permutation of the training images, "val"
    is the rest of them, or the test set."""
    def take(whole, rows, device):
        return loader.Arrays(whole.images[rows, 0].numpy(), whole.labels[rows].numpy(), device)

    def load(dataset, root, split, classes=None, device="cpu"):
        whole = read(dataset, root, "train")
        order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
        train = take(whole, order[:TRAIN][:args.images], device)
        if split == "train":
            return train
        val = (read(dataset, root, "val", device=device) if held_out == "test"
               else take(whole, order[TRAIN:][:args.val_images], device))
        val.statistics = train.statistics
        return val
    return load


def work(run, args, old):
    """A run in a process of its own: train, measure, probe, and leave result.json; of a run that is `old`, probe alone."""
    folder, started = args.output / run["folder"], time.time()
    os.dup2(os.open(folder / "run.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), 1)
    os.dup2(1, 2)
    cuda = torch.cuda.is_available() and "cpu" not in args.flags
    torch.set_num_threads(max(1, os.cpu_count() // args.jobs) if cuda else 1)
    pretrain.faiss.omp_set_num_threads(torch.get_num_threads())
    loader.load = data(args)
    if run["variant"]:
        pretrain.prototype_terms = varied(run["variant"])
    if run["variant"] == "the queue's keys":
        pretrain.pauc = with_index_of_the_queue
    then = pretrain.parse_args(run["argv"])
    last, kept, result = folder / "checkpoint.pth", [], dict(old)
    if not old:
        every = ["--keep-every", str(args.curve_every or max(1, then.epochs // 10))] if then.num_clusters == [0] else []
        pretrain.main([*run["argv"], *every, "--output", str(folder), "--resume", "auto"])
        trained, kept = time.time(), sorted(folder.glob("checkpoint_[0-9]*[0-9].pth"))
        *passed, end = measure(run["argv"], [*kept, last], args.num_clusters, folder / "map.npz")
        curve = {row["epoch"]: row for row in [*passed, *logged(folder / "log.jsonl"), end]}
        result = {name: mean(value) for name, value in end.items()} | dict(
            by_size={name: value for name, value in end.items() if isinstance(value, list)}, num_clusters=args.num_clusters,
            curve=[{name: mean(curve[epoch][name]) for name in ("epoch", *COAGULATION)} for epoch in sorted(curve)],
            device=torch.cuda.get_device_name() if cuda else "cpu", torch=torch.__version__,
            seconds_pretrain=trained - started)

    probe = folder / f"probe_{args.probe_lr}_{args.probe_epochs}_{args.probe_batch}"
    common = ["--device", then.device, "--amp", then.amp, "--nproc", "1"]
    lincls.main(["--pretrained", str(last), "--output", str(probe), "--resume", "auto", "--lr", str(args.probe_lr),
                 "--epochs", str(args.probe_epochs), "--schedule", *(str(args.probe_epochs * n // 10) for n in (6, 8)),
                 "--batch-size", str(min(args.probe_batch, args.images)), "--min-scale", str(then.min_scale), *common])
    result["linear"] = json.loads((probe / "log.jsonl").read_text().splitlines()[-1])["top1"]  # the last, not the best
    result["probe"] = [args.probe_lr, args.probe_epochs, args.probe_batch]
    for name in ("test_knn", "test_linear"):
        result.pop(name, None)
    if args.test:
        loader.load = data(args, "test")
        result["test_knn"] = printed("knn", ["--pretrained", str(last), "--knn", *common])
        result["test_linear"] = printed("top1", ["--evaluate", str(probe / "checkpoint.pth"), *common])
    result.setdefault("seconds", time.time() - started)
    (folder / "result.json").write_text(json.dumps(result))
    for path in [*kept, *folder.rglob("*.prev.pth")]:
        path.unlink()


def measure(argv, paths, sizes, picture):
    """The coagulation figures of each checkpoint; for the last one also AMI with the labels, kNN, and what t-SNE draws: up
    to 100 embeddings of each of 8 prototypes of the first clustering, those of one image of each class."""
    rows = []

    def worker(args):
        train, val = pretrain.open_data(args)
        usual, args.num_clusters = pretrain.parse_args([]), sizes
        for name in ("kmeans_iters", "kmeans_restarts", "kmeans_init"):  # not the run's own
            setattr(args, name, getattr(usual, name))
        for path in paths:
            checkpoint = pretrain.load(path)
            state = checkpoint["state_dict"]
            model = builder.MoCo(args.arch, args.dim, state["queue"].shape[1], args.moco_m, args.mlp, args.crop_size < 64)
            model.load_state_dict(state)
            model.to(args.device, memory_format=torch.channels_last)
            clusterings, figures = pretrain.e_step(model, train, args, args.epochs)
            rows.append(dict(epoch=checkpoint["epoch"], **{name: figures[name] for name in COAGULATION}))
        rows[-1]["ami"] = [adjusted_mutual_info_score(train.labels.numpy(), part[0].cpu().numpy()) for part in clusterings]
        rows[-1]["knn"] = pretrain.knn(builder.without_head(model.encoder_q), train, val, args)
        v, _ = pretrain.embed(model.encoder_k, train, args)
        assignments, chosen = clusterings[0][0].cpu(), []
        for label in range(8):
            own = assignments[train.labels == label].tolist()
            chosen += [j for j in dict.fromkeys(own) if j not in chosen][:1]
        members = [(assignments == j).nonzero()[:100, 0] for j in chosen]
        np.savez(picture, v=F.normalize(v, dim=1).cpu()[torch.cat(members)].numpy(),
                 prototype=np.repeat(range(len(members)), [len(part) for part in members]))
    pretrain.launch(worker, pretrain.parse_args(argv))
    return rows


def logged(path):
    """The coagulation figures in a run's log: an epoch's line has those of its E-step, before the epoch."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row | dict(epoch=row["epoch"] - 1) for row in rows if "diversity" in row]


def printed(name, argv):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        lincls.main(argv)
    words = out.getvalue().split()
    return float(words[words.index(name) + 1])


def mean(value):
    return statistics.fmean(value) if isinstance(value, list) else value


# ----------------------------------------------------------------------------------------------------------- all runs


def main(argv=None):
    args = parse_args(argv)
    if args.plot:
        return plot(args)
    pretrain.parse_args(args.flags)  # wrong ones end here
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and so its runs
    args.output.mkdir(parents=True, exist_ok=True)
    same = dict(flags=args.flags, images=args.images, val_images=args.val_images, num_clusters=args.num_clusters)
    settings = args.output / "settings.json"
    if settings.exists() and json.loads(settings.read_text()) != same:
        sys.exit(f"--output {args.output}: holds runs with other flags, {settings.read_text()}; give another --output")
    settings.write_text(json.dumps(same))
    grids, lines, todo = methods(args.num_clusters), args.output / "runs.jsonl", []
    records = read_runs(lines)
    for seed in range(args.seeds):  # all methods of one seed first
        for grid in args.grid:
            for name, (flags, variant, _) in grids[grid].items():
                argv = [args.data, "--dataset", "fashionmnist", "--nproc", "1", *args.flags, "--num-clusters",
                        *map(str, args.num_clusters), *flags, "--seed", str(seed)]
                old = records.get((name, seed), {})
                done = old.get("probe") == [args.probe_lr, args.probe_epochs, args.probe_batch]
                if not done or args.test and "test_knn" not in old:
                    folder = re.sub(r"[^A-Za-z0-9.]+", "-", name) + f"-s{seed}"
                    todo.append((dict(name=name, grid=grid, seed=seed, variant=variant, folder=folder, argv=argv), old))
    print(f"{len(todo)} runs to do, {args.jobs} at once, to {args.output}", flush=True)
    running, failed, context = {}, 0, multiprocessing.get_context("spawn")
    while todo or running:
        while todo and len(running) < args.jobs:
            run, old = todo.pop(0)
            (args.output / run["folder"]).mkdir(exist_ok=True)
            (args.output / run["folder"] / "result.json").unlink(missing_ok=True)
            process = context.Process(target=work, args=(run, args, old), daemon=True)
            process.start()
            running[process.sentinel] = process, run
        for sentinel in wait(list(running)):
            process, run = running.pop(sentinel)
            process.join()
            result = args.output / run["folder"] / "result.json"
            if process.exitcode or not result.exists():
                failed += 1
                print(f"{run['name']}, seed {run['seed']}: failed, see {result.with_name('run.txt')}", flush=True)
                continue
            record = {part: run[part] for part in ("name", "grid", "seed", "argv")} | json.loads(result.read_text())
            records[run["name"], run["seed"]] = record
            new = lines.with_suffix(".new")
            new.write_text("".join(json.dumps(record) + "\n" for record in records.values()))
            os.replace(new, lines)
            print(f"{run['name']}, seed {run['seed']}: " + "  ".join(
                f"{name} {record[name]:.4g}" for name in (*FIGURES, "seconds") if name in record), flush=True)
    chosen = {key: record for key, record in records.items() if key[1] < args.seeds}
    (args.output / "table.md").write_text(text := table(chosen, grids, same))
    print(text)
    sys.exit(failed > 0)


def read_runs(lines):
    rows = map(json.loads, lines.read_text().splitlines()) if lines.exists() else ()
    return {(row["name"], row["seed"]): row for row in rows}


def table(records, grids, same):
    """Markdown: mean and standard deviation over seeds, then differences over shared seeds and their standard errors."""
    figures = [name for name in FIGURES if any(name in record for record in records.values())]
    known = {name: bases for grid in grids.values() for name, (_, _, bases) in grid.items()}
    seeds = {name: {seed: record for (other, seed), record in records.items() if other == name} for name in known}
    probes = {tuple(record["probe"]) for record in records.values()}

    def row(name, values, error, sign=""):
        cells = []
        for figure in figures:
            x = [value[figure] for value in values if figure in value]
            digits = DIGITS[figure]
            spread = f" ± {statistics.stdev(x) / (len(x) ** 0.5 if error else 1):.{digits}f}" if len(x) > 1 else ""
            cells.append(f"{statistics.fmean(x):{sign}.{digits}f}{spread}" if x else "")
        return "| " + " | ".join([name, str(len(values)), *cells]) + " |"

    head = ["| | n | " + " | ".join(TITLES[FIGURES.index(name)] for name in figures) + " |",
            "|---|" + "---|" * (len(figures) + 1)]
    text = [f"{same['images']} training images, held-out {same['val_images']}, sizes measured "
            f"{' '.join(map(str, same['num_clusters']))}; flags `{' '.join(same['flags'])}`; probe (lr, epochs, batch) "
            f"{' and '.join(map(str, sorted(probes)))}; kNN and linear top-1 in percent.", "",
            "Mean ± standard deviation over n seeds:", "", *head]
    text += [row(name, list(seeds[name].values()), False) for name in known if seeds[name]]
    text += ["", "Differences, mean ± standard error over the n seeds that both have:", "", *head]
    for name in known:
        for base in known[name]:
            both = [{figure: seeds[name][seed][figure] - seeds[base][seed][figure] for figure in figures
                     if figure in seeds[name][seed] and figure in seeds[base][seed]}
                    for seed in sorted(seeds[name].keys() & seeds[base].keys())]
            if both:
                text.append(row(f"{name} − {base}", both, True, "+"))
    return "\n".join(text) + "\n"


def plot(args):
    """Curves of MoCo, PCL and PAUC over the epochs, and t-SNE maps of PCL's and PAUC's prototypes."""
    try:
        from matplotlib import pyplot
    except ImportError:
        sys.exit("--plot needs matplotlib: pip install matplotlib")
    from scipy.spatial.distance import pdist
    from sklearn.manifold import TSNE
    records = read_runs(args.output / "runs.jsonl")
    args.img.mkdir(parents=True, exist_ok=True)
    pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 110})
    figure, axes = pyplot.subplots(1, 2, figsize=(7, 2.8), layout="constrained")
    colours = {"MoCo": "0.5", "PCL": "tab:orange", "PAUC": "tab:blue"}
    for method, colour in colours.items():
        curves = [record["curve"] for (name, _), record in records.items() if name == method]
        for axis, title in zip(axes, ("diversity", "effective_rank")):
            epochs = sorted({row["epoch"] for curve in curves for row in curve})
            values = [[row[title] for curve in curves for row in curve if row["epoch"] == epoch] for epoch in epochs]
            centre, spread = np.array([np.mean(x) for x in values]), np.array([np.std(x) for x in values])
            axis.plot(epochs, centre, marker=".", color=colour, label=f"{method} (n={len(curves)})")
            axis.fill_between(epochs, centre - spread, centre + spread, color=colour, alpha=0.2, linewidth=0)
            axis.set(xlabel="epochs trained", title=title.replace("_", " "))
    axes[0].legend(frameon=False)
    figure.savefig(args.img / "coagulation.png")

    figure, axes = pyplot.subplots(1, 3, figsize=(9, 3), layout="constrained")
    for axis, method in zip(axes, ("PCL", "PAUC")):
        path = args.output / f"{method}-s0" / "map.npz"
        if not path.exists() or (method, 0) not in records:
            sys.exit(f"{path}: not there; --plot needs seed 0 of --grid main")
        picture = np.load(path)
        places = TSNE(metric="cosine", init="pca", perplexity=min(30, len(picture["v"]) / 4), random_state=0).fit_transform(
            picture["v"])
        axis.scatter(*places.T, c=picture["prototype"], cmap="tab10", vmax=9, s=6, linewidths=0)
        axis.set(xticks=[], yticks=[], title=f"{method}, diversity {records[method, 0]['diversity']:.3f}")
        axis.axis("equal")
    for method, colour in colours.items():  # t-SNE draws all clusters about equally dense; this does not
        pictures = [np.load(args.output / f"{method}-s{seed}" / "map.npz") for name, seed in records if name == method]
        within = [pdist(x["v"][x["prototype"] == j]) for x in pictures for j in np.unique(x["prototype"])]
        axes[2].hist(np.concatenate(within), bins=60, density=True, histtype="step", color=colour, label=method)
    axes[2].set(yticks=[], title="distances within these prototypes")
    axes[2].legend(frameon=False)
    figure.savefig(args.img / "prototypes.png")


if __name__ == "__main__":
    main()
