"""What a pre-trained backbone is worth: MoCo's linear probe, and the other usual protocols.

    python lincls.py --pretrained output/checkpoint.pth              # the probe, on the same data
    python lincls.py IMAGENET --pretrained moco_v2_200ep.pth.tar     # others' checkpoints, too
    python lincls.py --evaluate output/lincls/checkpoint.pth         # a saved probe
    python lincls.py --pretrained output/backbone.pth --knn 20 200 --shots 1 4 16 --logreg --cluster
    python lincls.py --pretrained output/checkpoint.pth --finetune --label-fraction 0.1
    python lincls.py --pretrained output/checkpoint.pth --neighbours 8      # a picture to look at

The flags of the fourth line work on the features of the frozen backbone: however many are given,
each image goes through it once, and --features FILE keeps what came out.
"""
import argparse
import hashlib
import json
import math
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch.nn.parallel import DistributedDataParallel

import builder
import loader
import pretrain
from pretrain import UsageError, bar, natural_float, part, positive, say

# The probe's, by data set. Features of small images have a larger scale than an ImageNet ResNet's.
IMAGENET = dict(lr=30.0, epochs=100, schedule=[60, 80], min_scale=0.08, flip=True, batch_size=256)
SMALL = IMAGENET | dict(lr=0.03)
DIGITS = dict(lr=0.3, epochs=30, schedule=[18, 24], min_scale=0.8, flip=False, batch_size=64)
DEFAULTS = {"folder": IMAGENET, "cifar10": SMALL, "cifar100": SMALL, "fashionmnist": SMALL,
            "digits": DIGITS}
FINETUNE = dict(epochs=20, schedule=[12, 16], lr=0.2, backbone_lr=0.01)
FINETUNE_1_PERCENT = FINETUNE | dict(lr=5.0, backbone_lr=0.02)
FINETUNE_SMALL = FINETUNE | dict(lr=0.03, backbone_lr=0.01)
FINETUNE_DROP = 0.2  # of the learning rates at each epoch of --schedule
FIXED = "dataset", "arch", "crop_size", "batch_size", "finetune"
L2 = [10.0 ** -exponent for exponent in range(7)]
SVM = dict(C=0.5, dual=True, max_iter=2000, random_state=0)
KMEANS = dict(kmeans_iters=100, kmeans_restarts=1, kmeans_init="auto", temperature=1.0)
STARTS = 5  # of k-means
ROW, TILE, GAP = 8, 40, 4  # of a picture: neighbours in a row, and pixels


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="evaluation of a backbone", allow_abbrev=False)
    add = parser.add_argument
    add("dir", nargs="?", metavar="DIR", help="image folder, or where torchvision's data sets are "
        "(default: as pre-trained)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--pretrained", type=Path, metavar="PATH", help="a checkpoint or backbone")
    source.add_argument("--evaluate", type=Path, metavar="PATH", help="a saved probe, to evaluate")
    add("--knn", type=positive(int), nargs="*", metavar="K", help="nearest neighbours (20)")
    add("--knn-temperature", type=positive(float), default=0.07)
    add("--shots", type=positive(int), nargs="+", metavar="N", help="SVMs on N labels a class")
    add("--runs", type=positive(int), default=5, help="draws of --shots")
    add("--logreg", action="store_true", help="logistic regression")
    add("--cluster", type=positive(int), nargs="?", const=0, metavar="P",
        help="k-means of val (default: as many as there are classes)")
    add("--neighbours", type=positive(int), metavar="N", help="draw neighbours and prototypes")
    add("--features", type=Path, metavar="FILE", help="keep the features there, and reuse them")
    add("--finetune", action="store_true", help="train the whole network")
    add("--backbone-lr", type=natural_float, help="of --finetune")
    add("--label-fraction", type=part, nargs="+", metavar="PART", help="of each class's labels")
    add("--label-list", type=Path, metavar="FILE",
        help="names of the labelled images, one a line: read if it exists, else written")
    add("--crop-size", type=positive(int), help="pixels")
    add("--min-scale", type=part, help="least part of an image in a random crop (default: 0.08)")
    add("--output", type=Path, help="default: lincls/ beside the checkpoint, or the probe's")
    pretrain.add_common(add)
    args = parser.parse_args(argv)
    args.wd = args.wd or 0.0
    beside = args.pretrained.parent / "lincls" if args.pretrained else args.evaluate.parent
    args.output = args.output or beside
    args.knn = [20] if args.knn == [] else args.knn
    flags = args.knn, args.shots, args.logreg, args.neighbours, args.features
    args.on_features = any(flags) or args.cluster is not None
    if "--cos" in (args.ignored or ()):
        parser.error("--cos: the rates here fall at the epochs of --schedule")
    if args.finetune and (args.on_features or args.evaluate):
        parser.error("--finetune: goes with --pretrained, and not with flags on frozen features")
    if len(args.label_fraction or ()) > 1 and (args.label_list or not args.on_features):
        parser.error("--label-fraction: one at a time for --label-list and for what is trained in "
                     "epochs, each with an --output of its own")
    return args


def main(argv=None):
    args = parse_args(argv)
    usual = DEFAULTS[args.dataset or ("folder" if args.dir else "digits")]["batch_size"]
    batch_size = args.batch_size or usual  # only the BN of --finetune asks how it is shared out
    pretrain.launch(main_worker, args, batch_size if args.finetune else None)


def main_worker(args):
    source = pretrain.load(args.pretrained or args.evaluate)
    adopt(args, source)
    if dist.get_rank() == 0:
        pretrain.make_folder(args.output)
    train, val = pretrain.open_data(args)
    check_labels(args, train, val)
    net = load_net(args, source, train.num_classes, classes_of(train))
    del source
    subsets = label_subsets(args, train)
    if args.on_features:
        evaluate_features(net, train, val, subsets, args)
    elif args.evaluate:
        report(args, "evaluate", validate(net, val, args))
    else:
        (_, rows), = subsets
        labelled = subset(train, rows)
        adopt_schedule(args, len(labelled) / len(train))
        train_net(net, labelled, val, args)


# ------------------------------------------------------------------------------ what is evaluated


def adopt(args, source):
    """Take what no flag says from the checkpoint, else from the data set's defaults."""
    source = source if isinstance(source, dict) else {}
    then, arch = source.get("args"), source.get("arch")
    ours = isinstance(then, dict) and isinstance(then.get("crop_size"), int)
    if not ours or then.get("dataset") not in [*loader.DATASETS]:
        then = {}  # MoCo's and PCL's say the arch alone
    its_dir = then.get("dir") if then.get("dataset") != "digits" else None
    same_dir = not args.dir or its_dir and Path(args.dir).resolve() == Path(its_dir).resolve()
    args.dataset = args.dataset or (then.get("dataset") if same_dir else "folder") or "digits"
    if args.dataset == then.get("dataset"):
        args.dir = args.dir or its_dir
        if same_dir:
            args.classes = args.classes or then.get("classes")
            args.bits = min(args.bits, then.get("bits") or args.bits)
    args.dir = args.dir or "data"
    usual = pretrain.DEFAULTS[args.dataset]
    trained_at = then.get("crop_size") or args.crop_size or usual["crop_size"]
    args.small_images = then.get("small_images", trained_at < loader.SMALL_CROP)  # as in a probe's
    args.crop_size = args.crop_size or trained_at
    args.arch = args.arch or (arch if isinstance(arch, str) else usual["arch"])


def adopt_schedule(args, labelled):
    """Take the defaults of what is trained, with such a part of the labels."""
    usual = SMALL if args.dataset == "folder" and args.small_images else DEFAULTS[args.dataset]
    if args.finetune:
        large = FINETUNE_1_PERCENT if labelled < 0.05 else FINETUNE
        usual = usual | (FINETUNE_SMALL if args.small_images else large)
    for name, value in usual.items():
        if name != "batch_size" and getattr(args, name) is None:
            setattr(args, name, value)


def check_labels(args, train, val):
    say(f"data {args.dataset}, {len(train)} images in {train.num_classes} classes, "
        f"{len(val or ())} to evaluate on")
    for note in train.notes:
        say(note)
    if train.num_classes == 1:
        raise UsageError(f"{args.dir}: has one class, and an evaluation needs two or more")
    if val is None or not train.num_classes:
        raise UsageError(f"{args.dir}: a probe needs labels, DIR/train/CLASS/* and "
                         f"DIR/val/CLASS/*; put the images of each class into a folder of its "
                         f"name, in both")
    if getattr(val, "unknown_classes", None):
        names = loader.shown(", ".join(val.unknown_classes))
        raise UsageError(f"{args.dir}: val has classes that train has not, rename or remove them: "
                         f"{names}")


def load_net(args, source, num_classes, classes):
    """The classifier in eval mode: the checkpoint's backbone, and a linear layer that is new or,
    with --evaluate, the saved probe's, if it is of these classes."""
    path = args.pretrained or args.evaluate
    torch.manual_seed(args.seed)
    backbone, width = builder.build_backbone(args.arch, args.small_images)
    fc = nn.Linear(width, num_classes)
    nn.init.normal_(fc.weight, std=0.01)
    nn.init.zeros_(fc.bias)
    net = builder.with_head(backbone, fc)
    pretrain.load_backbone(net, source, path, args.arch, args.small_images)
    if args.evaluate and not args.on_features:
        state = {name.removeprefix("state_dict.").removeprefix("module."): x
                 for name, x in builder.tensors(source).items()}
        if "fc.weight" not in state or state["fc.weight"].shape != fc.weight.shape:
            raise UsageError(f"--evaluate {path}: not a probe of {num_classes} classes, saved by "
                             f"this script")
        for ours, its in zip(classes, source.get("classes") or ()):
            if loader.composed(ours) != loader.composed(its):
                raise UsageError(loader.shown(f"--evaluate {path}: is a probe of other classes: "
                                              f"{its}, where there is {ours} here"))
        fc.load_state_dict({name: state[f"fc.{name}"] for name in ("weight", "bias")})
    return net.eval().to(args.device, memory_format=torch.channels_last)


# -------------------------------------------------------------------------------- labelled images


def label_subsets(args, train):
    """The labelled images: a list of what chose them, for the log, and their rows or None for all.

    Each class's are drawn in an order that depends on the seed alone: 1 % is a part of 10 %.
    """
    path = args.label_list
    if path and path.exists():
        if args.label_fraction:
            say(f"--label-list {path}: exists and is read; --label-fraction has no use")
        return [(dict(label_list=str(path)), read_label_list(path, names_of(train)))]
    if path and not args.label_fraction:
        raise UsageError(f"--label-list {path}: does not exist; --label-fraction makes it")
    orders = [draw(train.labels, label, args.seed, "labels") for label in range(train.num_classes)]
    subsets = []
    for fraction in args.label_fraction or ():
        rows = [order[:max(1, round(fraction * len(order)))] for order in orders]
        subsets.append((dict(label_fraction=fraction), torch.cat(rows).sort().values))
    if path:
        dist.barrier()  # all have seen that it is not there
        names = names_of(train)
        write(path, "w", "".join(f"{names[i]}\n" for i in subsets[0][1]))
    return subsets or [({}, None)]


def draw(labels, label, *seed):
    """The rows of a class, shuffled."""
    rows = (labels == label).nonzero()[:, 0]
    generator = torch.Generator().manual_seed(loader.seed_of(*seed, label))
    return rows[torch.randperm(len(rows), generator=generator)]


def read_label_list(path, names):
    """The rows of the images in a list, by path or, as in SimCLR's, by the file's name alone."""
    lines = set(loader.read_lines("--label-list", path))
    lines_of = {i: name if name in lines else Path(name).name for i, name in enumerate(names)}
    rows = [i for i, line in lines_of.items() if line in lines]
    if not rows or len({lines_of[i] for i in rows}) < len(rows):
        raise UsageError(f"--label-list {path}: its lines name no training image, or several at "
                         f"once; give names as in {loader.shown(names[0])}")
    say(f"--label-list {path}: {len(rows)} of its {len(lines)} lines are images here")
    return torch.tensor(rows)


def names_of(data):
    return getattr(data, "names", None) or [str(i) for i in range(len(data))]


def classes_of(data):
    """The names of the classes, if they have any."""
    return getattr(data, "classes", None) or []


def subset(data, rows):
    """Some images of a data set, as a data set."""
    if rows is None:
        return data
    some = torch.utils.data.Subset(data, rows.tolist())
    some.labels, some.num_classes = data.labels[rows], data.num_classes
    some.statistics, some.notes = data.statistics, data.notes
    some.classes = classes_of(data)
    some.digest = f"{loader.seed_of(data.digest, rows.tolist()):x}"
    if hasattr(data, "images"):
        some.images = data.images[rows.to(data.images.device)]
    return some


# ------------------------------------------------------------- linear probe, and the whole network


def train_net(net, train, val, args):
    """MoCo's linear probe (arXiv 1911.05722, section 4.1): a linear layer on the frozen backbone.

    --finetune: the whole network, as SwAV on 1 % and 10 % of ImageNet (arXiv 2006.09882, its
    eval_semisup.py): 20 epochs, rates times 0.2 at 12 and 16, no weight decay, 0.01 for the
    backbone and 0.2 for the layer, or 0.02 and 5 with 1 %; small images take 0.01 and 0.03. BN is
    in train mode, over each process's part of the batch (SwAV's over all of it).
    """
    pretrain.fit_batch(args, len(train), DEFAULTS[args.dataset]["batch_size"])
    pretrain.lock(args.output)
    log_size, checkpoint = pretrain.open_output(args, train, FIXED)
    backbone, fc = builder.backbone_of(net).requires_grad_(args.finetune), builder.head_of(net)
    groups = [dict(params=fc.parameters())]
    if args.finetune:
        groups.append(dict(params=backbone.parameters()))
    optimizer = torch.optim.SGD(groups, args.lr, momentum=args.momentum, weight_decay=args.wd)
    scaler = torch.amp.GradScaler(args.device.type, enabled=args.finetune and args.amp == "fp16")
    batches = loader.Batches(len(train), args.batch_size, args.seed, dist.get_rank(),
                             dist.get_world_size())
    augment = loader.Augment("crop", args.crop_size, train.statistics, args.flip)
    views = loader.Views(train, batches, augment, args.device, 1, args.min_scale, args.workers)
    frozen = {} if args.finetune else {name: x.clone() for name, x in backbone.state_dict().items()}
    run = dict(epoch=0, step=0, steps=len(batches), best=0.0, loss=math.nan)
    if checkpoint:
        if moved(frozen, checkpoint["state_dict"]):
            raise UsageError(f"--pretrained {args.pretrained}: is not the backbone that this probe "
                             f"was begun on; give that one, or start another --output")
        pretrain.restore(checkpoint, run, net, optimizer, scaler, args)
    del checkpoint
    others = results_after(log_size, args)
    log = pretrain.Log(args, log_size, run)
    for record in others if log.speaks else ():
        log.write(record)
    trained_fc = DistributedDataParallel(fc)
    trained = DistributedDataParallel(backbone) if args.finetune else backbone

    def save_run():
        pretrain.save_checkpoint(args, run, net, optimizer, log, scaler=scaler.state_dict(),
                                 digest=train.digest, classes=classes_of(train))

    while run["epoch"] < args.epochs:
        epoch = run["epoch"]
        train_epoch(trained, trained_fc, optimizer, scaler, views, run, args, log, save_run)
        if moved(frozen, net.state_dict()):
            raise RuntimeError(f"the frozen backbone moved: {moved(frozen, net.state_dict())[0]}")
        figures = validate(net, val, args)
        run.update(epoch=epoch + 1, step=0, best=max(run["best"], figures["top1"]))
        figures["best"] = run["best"]
        log.epoch(dict(epoch=epoch + 1, step=(epoch + 1) * run["steps"], **figures), run, args)
        save_run()
    log.close()


def train_epoch(backbone, fc, optimizer, scaler, views, run, args, log, save_run):
    """The rest of the run's epoch. A frozen backbone stays in eval mode: BN in train mode would
    take the batch's statistics and move its running ones, even without gradient, and a frozen
    backbone is to be a function of the image alone."""
    backbone.train(args.finetune)
    with pretrain.stop.after_a_step(), log.progress(run, args):
        for image, _, label in views.epoch(run["epoch"], run["step"]):
            rate = set_learning_rates(optimizer, run, args)
            with torch.set_grad_enabled(args.finetune), pretrain.autocast(args):
                features = backbone(image)
            logits = fc(features.float())
            loss = F.cross_entropy(logits, label)
            accuracy = (logits.argmax(1) == label).float().mean()
            figures = pretrain.read_report(loss, dict(accuracy=accuracy), run, args)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            pretrain.end_step(figures | dict(lr=rate), run, args, log, save_run)


def set_learning_rates(optimizer, run, args):
    epoch = run["epoch"] + run["step"] / run["steps"]
    left = pretrain.steps_down(epoch, args, FINETUNE_DROP if args.finetune else pretrain.DROP)
    for group, rate in zip(optimizer.param_groups, (args.lr, args.backbone_lr)):
        group["lr"] = rate * left
    return args.lr * left


def moved(frozen, state):
    """The tensors that are no longer as they were."""
    return [name for name, x in frozen.items() if not torch.equal(x.cpu(), state[name].cpu())]


@torch.inference_mode()
def validate(net, val, args):
    """Top-1 and top-5 in percent over the whole of `val`, each image once for any number of
    processes. As in training, features may be in half precision, the linear layer is not."""
    v, labels = pretrain.embed(builder.backbone_of(net), val, args)
    hits = top_hits(builder.head_of(net)(v), labels)
    dist.all_reduce(hits)
    return dict(zip(("top1", "top5"), (100 * hits / len(val)).tolist()))


def top_hits(logits, labels):
    right = (logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]).double()
    return torch.stack([right[:, 0].sum(), right.sum()])


# ----------------------------------------------------------------------------- on frozen features


def evaluate_features(net, train, val, subsets, args):
    """All protocols asked for, on one extraction; kNN by all processes, the rest by one."""
    num_classes, first = train.num_classes, dist.get_rank() == 0
    clusters = args.cluster or num_classes
    if args.cluster is not None and clusters > len(val):
        raise UsageError(f"--cluster {clusters}: more than val's {len(val)} images")
    for _, rows in subsets:
        labels = train.labels if rows is None else train.labels[rows]
        if args.shots and max(args.shots) > labels.bincount(minlength=num_classes).min():
            raise UsageError(f"--shots {max(args.shots)}: a class has fewer labelled images")
    features = extract(builder.backbone_of(net), train, val, args)
    queries = features["val"], val.labels
    if args.cluster is not None and first:
        cluster(*queries, clusters, args)
    for chosen, rows in subsets:
        bank = features["train"], train.labels
        if rows is not None:
            bank = bank[0][rows], bank[1][rows]
        chosen = dict(images=len(bank[1]), **chosen)
        if args.knn:
            knn(bank, queries, num_classes, chosen, args)
        if args.shots and first:
            low_shot(bank, queries, num_classes, chosen, args)
        if args.logreg and first:
            logreg(bank, queries, num_classes, chosen, args)
    if args.neighbours and first:
        draw_neighbours(features, train, val, args)
    dist.barrier()


def extract(backbone, train, val, args):
    """The features of both sets, float32 on the CPU; --features keeps them with labels and names,
    or has them. Every process has all of them: 10 GB for ImageNet and a ResNet-50."""
    path = args.features
    of = [digest(backbone), train.digest, val.digest, str(Path(args.dir).resolve()),
          args.crop_size, args.bits, args.amp] if path else None
    if path and path.exists():
        features = pretrain.load(path)
        if not isinstance(features, dict) or features.get("of") != of:
            raise UsageError(f"--features {path}: is of another backbone, data or crop; name "
                             f"another file")
        return features
    if path and dist.get_rank() == 0:
        pretrain.make_folder(path.parent)
    features = dict(of=of)
    for split, data in (("train", train), ("val", val)):
        v, _ = pretrain.embed(backbone, data, args)
        features[split] = builder.gather(v)[:len(data)].cpu().clone()
        features |= {f"{split}_labels": data.labels, f"{split}_names": names_of(data)}
    if path and dist.get_rank() == 0:
        pretrain.save(path, features)
    return features


def digest(backbone):
    """A short text that differs for other weights."""
    weights = hashlib.blake2b(digest_size=8)
    for x in backbone.state_dict().values():
        weights.update(x.cpu().numpy().tobytes())
    return weights.hexdigest()


def knn(bank, queries, num_classes, chosen, args):
    """The weighted k-nearest-neighbour classifier (arXiv 1805.01978), by cosine."""
    own = [(own_rows(x, 0, args), own_rows(y, -1, args)) for x, y in (bank, queries)]
    found = pretrain.neighbours(*own, len(queries[0]), num_classes, args.knn,
                                args.knn_temperature)
    for k, top1 in found.items():
        report(args, "knn", dict(knn=top1), k=k, temperature=args.knn_temperature, **chosen)


def own_rows(x, fill, args):
    """This process's rows on its device, as `embed` gives them."""
    own = loader.shard(len(x), dist.get_rank(), dist.get_world_size())
    size = math.ceil(len(x) / dist.get_world_size()), *x.shape[1:]
    rows = torch.full(size, fill, dtype=x.dtype, device=args.device)
    rows[:len(own)] = x[own.start:own.stop]
    return rows


def low_shot(bank, queries, num_classes, chosen, args):
    """PCL's low-shot classification (arXiv 2005.04966, its eval_svm_voc.py): a linear SVM for each
    class on normalised features, C = 0.5, a class's own images weighing twice, over several draws
    of N images a class. PCL reports VOC's mAP; with one class an image it is top-1."""
    from sklearn.svm import LinearSVC
    (x, y), (x_val, y_val) = ((F.normalize(x, dim=1).numpy(), y) for x, y in (bank, queries))
    weights = dict.fromkeys(range(num_classes), 2)
    for shots in args.shots:
        top1 = []
        for run in bar(f"{shots} shots", 0, args.runs, range(args.runs), after=10):
            rows = [draw(y, label, args.seed, "shots", run)[:shots] for label in weights]
            svm = LinearSVC(**SVM, class_weight=weights)
            svm.fit(x[torch.cat(rows)], y[torch.cat(rows)])
            top1.append(100 * svm.score(x_val, y_val))
        std, mean = torch.std_mean(torch.tensor(top1), correction=0)
        report(args, "shots", dict(top1=mean.item(), std=std.item()), shots=shots, runs=args.runs,
               C=SVM["C"], **chosen)


def logreg(bank, queries, num_classes, chosen, args):
    """Multinomial logistic regression on standardised features (arXiv 1805.08974), with the l2,
    from strong to weak, at which the cross-entropy on a held-out tenth of them is least."""
    mean, std = bank[0].mean(0), bank[0].std(0, correction=0).clamp(min=1e-6)
    (x, y), (x_val, y_val) = ((((x - mean) / std).to(args.device), y.to(args.device))
                              for x, y in (bank, queries))
    generator = torch.Generator().manual_seed(loader.seed_of(args.seed, "held out"))
    order = torch.randperm(len(x), generator=generator).to(args.device)
    tenth = math.ceil(len(x) / 10)
    held, rest = order[:tenth], order[tenth:]
    least, best = math.inf, None
    for l2 in bar("logistic regression", 0, len(L2), L2, after=10):
        fc = fit_logreg(x[rest], y[rest], num_classes, l2)
        loss = F.cross_entropy(fc(x[held]), y[held]).item()
        if loss > least:
            break
        least, best = loss, l2
    fc = fit_logreg(x, y, num_classes, best)
    hits = 100 * top_hits(fc(x_val), y_val) / len(x_val)
    report(args, "logreg", dict(zip(("top1", "top5"), hits.tolist())), l2=best, **chosen)


def fit_logreg(x, y, num_classes, l2):
    """The least of the mean cross-entropy plus l2 / 2 times the squared weights, by L-BFGS."""
    fc = nn.Linear(x.shape[1], num_classes, device=x.device)
    nn.init.zeros_(fc.weight)
    nn.init.zeros_(fc.bias)
    optimizer = torch.optim.LBFGS(fc.parameters(), max_iter=1000, tolerance_grad=1e-6,
                                  tolerance_change=1e-10, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(fc(x), y) + l2 / 2 * fc.weight.square().sum()
        value.backward()
        return value
    optimizer.step(loss)
    return fc.requires_grad_(False)


def cluster(v, labels, num_clusters, args):
    """Do the classes come out of k-means alone? AMI as in PCL's table (arXiv 2005.04966), and the
    accuracy of the best one-to-one match of clusters and classes."""
    from scipy.optimize import linear_sum_assignment
    from sklearn import metrics
    assignments = kmeans(v, num_clusters, args).assignments.cpu()
    together = metrics.cluster.contingency_matrix(labels, assignments)
    matched = together[linear_sum_assignment(together, maximize=True)].sum()
    figures = dict(ami=metrics.adjusted_mutual_info_score(labels, assignments),
                   nmi=metrics.normalized_mutual_info_score(labels, assignments),
                   ari=metrics.adjusted_rand_score(labels, assignments),
                   accuracy=100 * matched.item() / len(labels))
    report(args, "cluster", figures, clusters=num_clusters, starts=STARTS)


def kmeans(v, num_clusters, args):
    """The best of several k-means of the normalised features, a losses.Clustering."""
    v = F.normalize(v, dim=1).to(args.device)
    settings = argparse.Namespace(**vars(args) | KMEANS)
    found = [pretrain.kmeans(v, num_clusters, loader.seed_of(args.seed, "cluster", start), settings)
             for start in bar("k-means", 0, STARTS, range(STARTS), after=10)]
    return min(found, key=lambda one: one[1].item())[0]


def draw_neighbours(features, train, val, args):
    """A picture: some of val's images, each with its nearest training images; below, prototypes of
    val, each with its nearest members. Green: of the right class, or the prototype's main one."""
    bank, v = (F.normalize(features[split], dim=1) for split in ("train", "val"))
    generator = torch.Generator().manual_seed(args.seed)
    picture = []
    for i in torch.randperm(len(v), generator=generator)[:args.neighbours].tolist():
        near = (bank @ v[i]).topk(min(ROW, len(bank))).indices.tolist()
        picture.append([tile(val, i, None), *(tile(train, j, val.labels[i]) for j in near)])
    assignments, prototypes, _ = kmeans(v, args.cluster or min(len(v), val.num_classes), args)
    for j in assignments.unique()[:args.neighbours].tolist():
        members = (assignments == j).nonzero()[:, 0].cpu()
        order = (v[members] @ prototypes[j].cpu()).argsort(descending=True)
        main = val.labels[members].mode().values
        picture.append([tile(val, i, main) for i in members[order[:ROW + 1]].tolist()])
    step = TILE + GAP
    height = len(picture) * step + step // 2 + GAP
    sheet = Image.new("RGB", ((ROW + 1) * step + GAP, height), "white")
    for row, tiles in enumerate(picture):
        top = GAP + row * step + (step // 2 if row >= min(args.neighbours, len(v)) else 0)
        for column, image in enumerate(tiles):
            sheet.paste(image, (GAP + column * step, top))
    sheet.save(args.output / "neighbours.png")
    say(f"neighbours {args.output / 'neighbours.png'}")


def tile(data, i, label):
    """An image as a square, framed where it is to be of a class."""
    x = data.images[i].expand(3, -1, -1).cpu() if hasattr(data, "images") else data[i][0]
    image = Image.fromarray(x.permute(1, 2, 0).numpy())
    method = Image.Resampling.NEAREST if min(image.size) < TILE else Image.Resampling.LANCZOS
    image = ImageOps.fit(image, (TILE, TILE), method)
    if label is not None:
        colour = "lime" if data.labels[i] == label else "red"
        ImageDraw.Draw(image).rectangle((0, 0, TILE - 1, TILE - 1), outline=colour, width=2)
    return image


# ---------------------------------------------------------------------------------------- results


def report(args, protocol, figures, **parameters):
    """One line on the terminal and one in OUTPUT/log.jsonl."""
    shown = "  ".join(f"{name} {value:.2f}" for name, value in figures.items())
    title = "" if protocol in figures else f"{protocol} "
    told = ", ".join(f"{name} {value}" for name, value in parameters.items())
    say(f"{title}{shown}" + (f"  ({told})" if told else ""))
    record = dict(protocol=protocol, **figures, **parameters)
    write(args.output / "log.jsonl", "a", json.dumps(record) + "\n")


def results_after(size, args):
    """What other protocols have written into the part of the log that a probe is about to cut."""
    path = args.output / "log.jsonl"
    lines = path.read_bytes()[size:].splitlines() if path.exists() else []
    return [json.loads(line) for line in lines
            if line.startswith(b'{"protocol"') and line.endswith(b"}")]


def write(path, mode, text):
    """Of all processes the first writes."""
    if dist.get_rank() > 0:
        return
    with pretrain.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, mode, encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)


if __name__ == "__main__":
    main()
