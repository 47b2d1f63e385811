"""What a pre-trained backbone is worth: MoCo's linear probe, and the other usual protocols.

    python lincls.py --pretrained output/checkpoint.pth              # the probe, on the same data
    python lincls.py IMAGENET --pretrained moco_v2_200ep.pth.tar     # others' checkpoints, too
    python lincls.py --evaluate output/lincls/checkpoint.pth         # a saved probe
    python lincls.py --pretrained output/backbone.pth --knn 20 200 --shots 1 4 16 --logreg --cluster
    python lincls.py --pretrained output/checkpoint.pth --finetune --label-fraction 0.1
    python lincls.py --pretrained output/checkpoint.pth --neighbours 8      # a picture to look at
"""
import argparse
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torchvision.transforms.v2 import functional
from torchvision.utils import draw_bounding_boxes, save_image

import builder
import loader
import pretrain
from loader import UsageError, generator
from pretrain import bar, natural_float, part, positive, say

# Of the probe, by data set. Features of small images have a larger scale than an ImageNet ResNet's.
IMAGENET = dict(lr=30.0, epochs=100, min_scale=0.08, flip=True)
SMALL = IMAGENET | dict(lr=0.03)
DEFAULTS = dict(digits=dict(lr=0.3, epochs=30, min_scale=0.8, flip=False))
# SwAV's on 1 % and 10 % of ImageNet (arXiv 2006.09882, its eval_semisup.py), and for small images.
FINETUNE = dict(epochs=20, lr=0.2, backbone_lr=0.01)
FINETUNE_1_PERCENT = FINETUNE | dict(lr=5.0, backbone_lr=0.02)
FINETUNE_SMALL = FINETUNE | dict(lr=0.03, backbone_lr=0.01)
MILESTONES = 0.6, 0.8  # of the epochs, where no --schedule says: MoCo's 60 and 80 of 100
FINETUNE_DROP = 0.2  # of the learning rates at each of them
FIXED = "dataset", "arch", "crop_size", "batch_size", "seed", "finetune"
L2 = [10.0 ** -exponent for exponent in range(7)]
SVM = dict(C=0.5, dual=True, max_iter=2000, random_state=0)
KMEANS = dict(kmeans_iters=100, kmeans_restarts=1, temperature=1.0)
STARTS = 5  # of k-means
ROW, TILE, GAP, FRAME = 8, 40, 4, 2  # of a picture: neighbours in a row, and pixels


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="evaluation of a backbone", allow_abbrev=False)
    add = parser.add_argument
    add("dir", nargs="?", metavar="DIR", help="as pretrain.py's (default: as pre-trained)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--pretrained", type=Path, metavar="PATH", help="a checkpoint or backbone")
    source.add_argument("--evaluate", type=Path, metavar="PATH", help="a saved probe, to evaluate")
    add("--knn", type=positive(int), nargs="*", metavar="K", help="nearest neighbours (20)")
    add("--knn-temperature", type=positive(float), default=0.07)
    add("--shots", type=positive(int), nargs="+", metavar="N", help="SVMs on N labels a class")
    add("--runs", type=positive(int), default=20, help="draws of --shots; PCL: 5")
    add("--logreg", action="store_true", help="logistic regression")
    add("--cluster", type=positive(int), nargs="?", const=0, metavar="P",
        help="k-means of val (default: as many as there are classes)")
    add("--neighbours", type=positive(int), metavar="N", help="draw neighbours and prototypes")
    add("--finetune", action="store_true", help="train the whole network")
    add("--backbone-lr", type=natural_float, help="of --finetune")
    add("--label-fraction", type=part, nargs="+", metavar="PART", help="of all labels")
    add("--label-list", type=Path, metavar="FILE", help="names of the labelled images, one a line")
    add("--crop-size", type=positive(int), help="pixels")
    add("--min-scale", type=part, help="least part of an image in a random crop")
    add("--output", type=Path, help="default: lincls/ beside the checkpoint, or the probe's")
    pretrain.add_common(add)
    parser.set_defaults(wd=0.0)
    args = parser.parse_args(argv)
    args.output = args.output or (args.pretrained.parent / "lincls" if args.pretrained
                                  else args.evaluate.parent)
    args.knn = [20] if args.knn == [] else args.knn
    flags = args.knn, args.shots, args.logreg, args.neighbours  # on frozen features
    args.on_features = any(flags) or args.cluster is not None
    if args.finetune and (args.on_features or args.evaluate):
        parser.error("--finetune: goes with --pretrained, and not with flags on frozen features")
    if len(args.label_fraction or ()) > 1 and not args.on_features:
        parser.error("--label-fraction: one at a time for what is trained, each with an --output")
    return args


def main(argv=None):
    pretrain.launch(main_worker, parse_args(argv))


def main_worker(args):
    source = pretrain.load(args.pretrained or args.evaluate)
    settle(args, source)
    held = pretrain.lock(args.output)
    train, val = pretrain.open_data(args)
    if not val or train.num_classes < 2:
        raise UsageError(f"{args.dir}: needs labels of two classes or more, in train/ and val/")
    pretrain.settle_machine(args, (train, val))
    net = load_net(args, source, train)
    subsets = label_subsets(args, train)
    if args.on_features:
        backbone = builder.backbone_of(net)
        shards = [pretrain.embed(backbone, data, args)[0] for data in (train, val)]
        features = [builder.gather(x)[:len(data)].cpu() for x, data in zip(shards, (train, val))]
        if dist.get_rank() == 0:
            evaluate_features(*features, train, val, subsets, args)
        dist.barrier()  # a node that ends before may take torchrun's store with it
    elif args.evaluate:
        report(args, "evaluate", validate(net, val, args))
    else:
        (_, rows), = subsets
        train_net(net, train, torch.arange(len(train))[rows], val, args)
    held.close()


# ----------------------------------------------------------- what is evaluated, and on what labels


def settle(args, source):
    """What no flag says: by the checkpoint, of a run of ours or not, and by the data set."""
    then = source.get("args")
    if not isinstance(then, dict) or "statistics" not in then:
        then = {}  # MoCo's and PCL's say the arch alone
    same_dir = not args.dir or os.path.abspath(args.dir) == then.get("dir")
    args.dataset = args.dataset or (then.get("dataset") if same_dir else "folder") or "digits"
    if same_dir and args.dataset == then.get("dataset"):
        args.dir, args.classes = then["dir"], args.classes or then["classes"]
    args.dir = os.path.abspath(args.dir or "data")
    usual, arch = pretrain.DEFAULTS[args.dataset], source.get("arch")
    trained_at = then.get("crop_size") or args.crop_size or usual["crop_size"]
    args.small_images = then.get("small_images", trained_at < loader.SMALL_CROP)  # as in a probe's
    args.crop_size = args.crop_size or trained_at
    args.arch = args.arch or (arch if isinstance(arch, str) else usual["arch"])
    args.statistics = then.get("statistics", loader.IMAGENET_STATISTICS)


def settle_training(args, labelled, total):
    """The defaults of what is trained, with so many of all the labels."""
    usual = (SMALL if args.small_images else IMAGENET) | DEFAULTS.get(args.dataset, {})
    if args.finetune:
        large = FINETUNE_1_PERCENT if labelled < 0.05 * total else FINETUNE
        usual = usual | (FINETUNE_SMALL if args.small_images else large)
    for name, value in usual.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.schedule = args.schedule or [round(part * args.epochs) for part in MILESTONES]
    pretrain.fit_batch(args, labelled)


def load_net(args, source, train):
    """The classifier in eval mode; its linear layer is new, or a saved probe's for --evaluate."""
    path = args.pretrained or args.evaluate
    torch.manual_seed(args.seed)
    backbone, width = builder.build_backbone(args.arch, args.small_images)
    fc = nn.Linear(width, train.num_classes)
    nn.init.normal_(fc.weight, std=0.01)
    nn.init.zeros_(fc.bias)
    net = builder.with_head(backbone, fc)
    taken = builder.load_backbone(net, source, path, args.arch)
    say(f"model   {args.arch}, {args.crop_size} px, mean and deviation "
        f"{np.round(args.statistics, 3).tolist()}; {path}: {taken}")
    if args.evaluate and not args.on_features:
        its = builder.tensors(source).get(f"state_dict.{builder.HEAD}.weight")
        if source.get("classes") != train.classes or its is None or its.shape != fc.weight.shape:
            raise UsageError(f"--evaluate {path}: no probe of these {train.num_classes} classes")
        net.load_state_dict(source["state_dict"])
    return net.eval().to(args.device, memory_format=torch.channels_last)


def label_subsets(args, train):
    """The labelled images: a list of what chose them, for the results, and their rows. Each class's
    are drawn in an order that depends on the seed alone: 1 % is a part of 10 %."""
    if args.label_list:
        rows = read_label_list(args.label_list, train.names)
        return [(dict(label_list=str(args.label_list)), rows)]
    if not args.label_fraction:
        return [({}, slice(None))]
    orders, subsets = draw(train.labels, args.seed, "labels"), []
    for fraction in args.label_fraction:
        rows = [order[:max(1, round(fraction * len(order)))] for order in orders]
        subsets.append((dict(label_fraction=fraction), torch.cat(rows).sort().values))
    return subsets


def draw(labels, *seed):
    """The rows of each class, shuffled."""
    rows = labels.argsort(stable=True).split(labels.bincount().tolist())
    return [own[torch.randperm(len(own), generator=generator(*seed, label))]
            for label, own in enumerate(rows)]


def read_label_list(path, names):
    """The rows of the images in a list, by path or, as in SimCLR's, by the file's name alone."""
    lines = set(loader.read_lines("--label-list", path))
    lines_of = {i: name if name in lines else Path(name).name for i, name in enumerate(names)}
    rows = [i for i, line in lines_of.items() if line in lines]
    if not rows or len({lines_of[i] for i in rows}) < len(rows):
        raise UsageError(f"--label-list {path}: give training images, as {loader.shown(names[0])}")
    return torch.tensor(rows)


# ------------------------------------------------------------- linear probe, and the whole network


def train_net(net, train, labelled, val, args):
    """MoCo's linear probe (arXiv 1911.05722, section 4.1) on the training images labelled (n,), or
    the whole network, with BN over each process's part of the batch (SwAV's is over all of it)."""
    checkpoint = pretrain.read_own(args, FIXED)
    settle_training(args, len(labelled), len(train))
    digest = f"{loader.seed_of(train.digest, labelled.tolist()):x}"
    backbone, fc = builder.backbone_of(net).requires_grad_(args.finetune), net.fc
    before = {name: x.clone() for name, x in backbone.state_dict().items()}
    modules = [fc, backbone] if args.finetune else [fc]
    groups = [dict(params=module.parameters()) for module in modules]
    optimizer = torch.optim.SGD(groups, args.lr, momentum=args.momentum, weight_decay=args.wd)
    augment = loader.Augment("crop", args.crop_size, args.statistics, args.flip)
    views = loader.Views(train, labelled, args.batch_size, augment, args.seed, 1, args.min_scale,
                         args.workers, dist.get_rank(), dist.get_world_size())
    run = dict(epoch=0, step=0, steps=len(views), best=0.0)
    if checkpoint:
        pretrain.check_resume(args, checkpoint, digest, train.digest_of, FIXED)
        pretrain.restore(checkpoint, run, net, optimizer, args)
        if not args.finetune and moved(before, backbone):
            raise UsageError("--pretrained: is not the backbone that this probe was begun on")
    del checkpoint
    log = pretrain.Log(args, run)
    trained_fc = pretrain.distributed(fc)
    trained = pretrain.distributed(backbone) if args.finetune else backbone

    def save_run():
        pretrain.save_checkpoint(args.output / "checkpoint.pth", args, run, net, optimizer,
                                 digest=digest, classes=train.classes)
        dist.barrier()

    with pretrain.signals() as caught:
        while run["epoch"] < args.epochs:
            train_epoch(trained, trained_fc, optimizer, views, run, args, log, caught, save_run)
            if not args.finetune and moved(before, backbone):
                raise RuntimeError(f"the frozen backbone moved: {moved(before, backbone)[0]}")
            figures = validate(net, val, args)
            best = max(run["best"], figures["top1"])
            run.update(epoch=run["epoch"] + 1, step=0, best=best)
            say(log.report(dict(epoch=run["epoch"], step=run["epoch"] * run["steps"], **figures,
                                best=best), run, args))
            if run["epoch"] == args.epochs:  # a finished one that is resumed has nothing to report
                report(args, "finetune" if args.finetune else "linear", dict(figures, best=best),
                       epochs=args.epochs, images=len(labelled))
            save_run()  # last: a probe that is killed before it does all of this again
    log.close()


def train_epoch(backbone, fc, optimizer, views, run, args, log, caught, save_run):
    """The rest of the run's epoch. A frozen backbone stays in eval mode, a function of the image
    alone: BN in train mode would take the batch's statistics, and move its running ones."""
    backbone.train(args.finetune)
    log.start_clock()
    batches = views.epoch(run["epoch"], run["step"])
    for image, _, label in bar(f"epoch {run['epoch'] + 1}", run["step"], run["steps"], batches):
        epoch = run["epoch"] + run["step"] / run["steps"]
        left = pretrain.rate_left(epoch, args, FINETUNE_DROP if args.finetune else pretrain.DROP)
        for group, rate in zip(optimizer.param_groups, (args.lr, args.backbone_lr)):
            group["lr"] = rate * left
        with torch.set_grad_enabled(args.finetune), pretrain.autocast(args):
            features = backbone(image)
        logits = fc(features.float())
        loss = F.cross_entropy(logits, label)
        accuracy = (logits.argmax(1) == label).float().mean()
        report, number = pretrain.exchange(loss, dict(acc=accuracy), run, caught)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pretrain.end_step(report | dict(lr=args.lr * left), number, run, args, log, save_run)


def moved(before, backbone):
    """The tensors that are no longer as they were."""
    return [name for name, x in backbone.state_dict().items() if not torch.equal(x, before[name])]


@torch.inference_mode()
def validate(net, val, args):
    """Top-1 and top-5 in percent on all of `val`; as in training the linear layer is in float32."""
    v, labels = pretrain.embed(builder.backbone_of(net), val, args)
    return top(*(builder.gather(x)[:len(val)] for x in (net.fc(v), labels)))


def top(logits, labels):
    """Top-1 and top-5 in percent."""
    right = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return {f"top{k}": 100 * right[:, :k].any(1).double().mean().item() for k in (1, 5)}


# ----------------------------------------------------------------------------- on frozen features


def evaluate_features(v, v_val, train, val, subsets, args):
    """In process 0 alone, so without collectives. v, v_val: all images' features, on the CPU."""
    num_classes, queries = train.num_classes, (v_val, val.labels)
    if args.cluster is not None:
        cluster(*queries, args.cluster or num_classes, args)
    for chosen, rows in subsets:
        bank = v[rows], train.labels[rows]
        chosen = dict(images=len(bank[1]), **chosen)
        if args.knn:
            knn(bank, queries, chosen, args)
        if args.shots:
            low_shot(bank, queries, num_classes, chosen, args)
        if args.logreg:
            logreg(bank, queries, num_classes, chosen, args)
    if args.neighbours:
        draw_neighbours(v, v_val, train, val, args)


def knn(bank, queries, chosen, args):
    """The weighted k-nearest-neighbour classifier (arXiv 1805.01978), by cosine."""
    (x, y), (x_val, y_val) = ((F.normalize(x, dim=1).to(args.device), y.to(args.device))
                              for x, y in (bank, queries))
    near = pretrain.nearest(x, y, x_val, max(args.knn))
    for k in args.knn:
        top1 = pretrain.vote(*near, y_val, k, args.knn_temperature)
        report(args, "knn", dict(top1=top1), k=k, temperature=args.knn_temperature, **chosen)


def low_shot(bank, queries, num_classes, chosen, args):
    """PCL's low-shot classification (arXiv 2005.04966, its eval_svm_voc.py): a linear SVM a class
    on normalised features, whose own images weigh twice (one, unweighted, of two classes), over
    draws of N images a class: top-1 (PCL's mAP is VOC's), its mean and standard error."""
    from sklearn.svm import LinearSVC
    (x, y), (x_val, y_val) = ((F.normalize(x, dim=1).numpy(), y) for x, y in (bank, queries))
    weights = dict.fromkeys(range(num_classes), 2) if num_classes > 2 else None
    counts = y.bincount(minlength=num_classes)
    for shots in args.shots:
        if shots > counts.min():
            raise UsageError(f"--shots {shots}: class {counts.argmin()} has {counts.min()} labels")
        top1 = []
        for run in bar(f"{shots} shots", 0, args.runs, range(args.runs), after=10):
            rows = torch.cat([order[:shots] for order in draw(y, args.seed, "shots", run)])
            svm = LinearSVC(**SVM, class_weight=weights).fit(x[rows], y[rows])
            top1.append(100 * svm.score(x_val, y_val))
        std, mean = torch.std_mean(torch.tensor(top1), correction=min(1, len(top1) - 1))
        report(args, "shots", dict(top1=mean.item(), se=std.item() / len(top1) ** 0.5),
               shots=shots, runs=args.runs, C=SVM["C"], **chosen)


def logreg(bank, queries, num_classes, chosen, args):
    """Multinomial logistic regression on standardised features (arXiv 1805.08974), with the l2 at
    which the cross-entropy on a held-out tenth of them is least."""
    mean, std = bank[0].mean(0), bank[0].std(0, correction=0).clamp(min=1e-6)
    (x, y), (x_val, y_val) = ((((x - mean) / std).to(args.device), y.to(args.device))
                              for x, y in (bank, queries))
    order = torch.randperm(len(x), generator=generator(args.seed, "held out"))
    held, rest = order.to(args.device).tensor_split([math.ceil(len(x) / 10)])
    loss = {}
    for l2 in bar("logistic regression", 0, len(L2), L2, after=10):
        fc = fit_logreg(x[rest], y[rest], num_classes, l2)
        loss[l2] = F.cross_entropy(fc(x[held]), y[held]).item()
    best = min(loss, key=loss.get)
    fc = fit_logreg(x, y, num_classes, best)
    report(args, "logreg", top(fc(x_val), y_val), l2=best, **chosen)


def fit_logreg(x, y, num_classes, l2):
    """The least of the mean cross-entropy plus l2 / 2 times the squared weights, by L-BFGS."""
    fc = nn.Linear(x.shape[1], num_classes, device=x.device)
    for parameter in fc.parameters():
        nn.init.zeros_(parameter)
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
    if num_clusters > len(v):
        raise UsageError(f"--cluster {num_clusters}: give at most {len(v)}, one an image of val")
    assignments = best_kmeans(v, num_clusters, args).assignments.cpu()
    together = metrics.cluster.contingency_matrix(labels, assignments)
    matched = together[linear_sum_assignment(together, maximize=True)].sum()
    figures = dict(ami=metrics.adjusted_mutual_info_score(labels, assignments),
                   nmi=metrics.normalized_mutual_info_score(labels, assignments),
                   ari=metrics.adjusted_rand_score(labels, assignments),
                   accuracy=100 * matched.item() / len(labels))
    report(args, "cluster", figures, clusters=num_clusters, starts=STARTS)


def best_kmeans(v, num_clusters, args):
    """The best of several k-means of the normalised features, a losses.Clustering."""
    v = F.normalize(v, dim=1).to(args.device)
    settings = argparse.Namespace(**vars(args) | KMEANS)
    found = [pretrain.kmeans(v, num_clusters, loader.seed_of(args.seed, "cluster", start), settings)
             for start in bar("k-means", 0, STARTS, range(STARTS), after=10)]
    return min(found, key=lambda one: one[1].item())[0]


def draw_neighbours(bank, v, train, val, args):
    """A picture: some of val's images, each with its nearest training images; below, prototypes of
    val, each with its nearest members. Green: of the right class, or the prototype's main one."""
    bank, v = F.normalize(bank, dim=1), F.normalize(v, dim=1)
    rows, shuffled = [], torch.randperm(len(v), generator=generator(args.seed))
    for i in shuffled[:args.neighbours].tolist():
        near = (bank @ v[i]).topk(min(ROW, len(bank))).indices.tolist()
        rows.append([tile(val, i), *(tile(train, j, val.labels[i]) for j in near)])
    rows.append([])
    clusters = min(len(v), args.cluster or train.num_classes)
    assignments, prototypes, _ = best_kmeans(v, clusters, args)
    for j in assignments.unique()[:args.neighbours].tolist():
        members = (assignments == j).nonzero()[:, 0].cpu()
        order = (v[members] @ prototypes[j].cpu()).argsort(descending=True)
        main = val.labels[members].mode().values
        rows.append([tile(val, i, main) for i in members[order[:ROW + 1]].tolist()])
    tiles = [x for row in rows for x in row + [torch.ones(3, TILE, TILE)] * (ROW + 1 - len(row))]
    save_image(tiles, args.output / "neighbours.png", nrow=ROW + 1, padding=GAP, pad_value=1)
    say(f"neighbours {args.output}/neighbours.png")


def tile(data, i, label=None):
    """An image as a square (3, TILE, TILE) in [0, 1], framed where it is to be of a class."""
    x = functional.center_crop(data[i].cpu(), min(data[i].shape[1:]))
    x = F.interpolate(x[None] / 255, (TILE, TILE), mode="area")[0]  # small pixels stay squares
    if label is not None:
        edge, colour = [[0, 0, TILE - 1, TILE - 1]], "lime" if data.labels[i] == label else "red"
        x = draw_bounding_boxes(x, torch.tensor(edge), colors=colour, width=FRAME)
    return x


def report(args, protocol, figures, **parameters):
    """One line on the terminal and one in OUTPUT/results.jsonl."""
    if dist.get_rank() == 0:
        pretrain.append(args.output / "results.jsonl", dict(
            checkpoint=os.path.abspath(args.pretrained or args.evaluate), dataset=args.dataset,
            dir=args.dir, protocol=protocol, **figures, **parameters))
    say("  ".join([protocol, *(f"{name} {value:.2f}" for name, value in figures.items()),
                   *(f"({name} {value})" for name, value in parameters.items())]))


if __name__ == "__main__":
    main()
