"""MoCo's linear probe: a linear layer on a frozen backbone (arXiv 1911.05722, section 4.1).

    python lincls.py --pretrained output/checkpoint.pth              # on the data that it was trained on
    python lincls.py IMAGENET --pretrained moco_v2_200ep.pth.tar     # also on MoCo's and PCL's checkpoints
    python lincls.py --pretrained output/backbone.pth --knn          # its k nearest neighbours instead
    python lincls.py --evaluate output/lincls/checkpoint.pth         # a saved probe
"""
import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import builder
import loader
import pretrain
from pretrain import natural, natural_float, positive

# The features of small images have a larger scale than an ImageNet ResNet's.
IMAGENET = dict(lr=30.0, epochs=100, schedule=[60, 80], min_scale=0.08, flip=True, batch_size=256)
SMALL = IMAGENET | dict(lr=0.03)
DEFAULTS = {"folder": IMAGENET, "cifar10": SMALL, "cifar100": SMALL, "fashionmnist": SMALL,
            "digits": dict(lr=0.3, epochs=30, schedule=[18, 24], min_scale=0.8, flip=False, batch_size=64)}
FIXED = "dataset", "arch", "crop_size", "batch_size"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="linear probe of a frozen backbone", allow_abbrev=False)
    add = parser.add_argument
    add("dir", nargs="?", metavar="DIR", help="image folder, or where torchvision's data sets are (default: as pre-trained)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--pretrained", type=Path, metavar="PATH", help="checkpoint or backbone of PAUC, MoCo or PCL")
    source.add_argument("--evaluate", type=Path, metavar="PATH", help="a saved probe, to evaluate")
    add("--knn", action="store_true", help="report the kNN top-1 of the features instead")
    add("--dataset", choices=loader.DATASETS, help="default: as pre-trained")
    add("--classes", metavar="FILE", help="class folders to keep, one a line")
    add("--crop-size", type=positive(int), help="pixels")
    add("--min-scale", type=pretrain.share, help="least share of an image's area in a random crop (default: 0.08)")
    add("--flip", action=argparse.BooleanOptionalAction, help="mirror half of the images (default: all but digits)")
    add("-a", "--arch", help="a torchvision net that ends in fc")
    add("--epochs", type=positive(int))
    add("-b", "--batch-size", type=positive(int), help="images over all processes (default: 256, digits: 64)")
    add("--lr", "--learning-rate", type=positive(float), help="default: 30; less for small images, whose features are larger")
    add("--schedule", type=natural, nargs="+", metavar="EPOCH", help="divide lr by 10 there")
    add("--momentum", type=pretrain.fraction, default=0.9)
    add("--wd", "--weight-decay", type=natural_float, default=0.0)
    add("--seed", type=natural, default=0)
    add("--device", choices=("auto", "cuda", "cpu"), default="auto")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto")
    add("-j", "--workers", type=natural, help="data workers of each process")
    add("--nproc", type=positive(int), help="processes on this node (default: one on every GPU)")
    add("--world-size", type=positive(int), default=1, metavar="NODES")
    add("--rank", type=natural, default=0, metavar="NODE")
    add("--dist-url", metavar="tcp://HOST:PORT", help="where the nodes meet")
    add("--output", type=Path, help="default: lincls/ beside the checkpoint")
    add("--resume", metavar="PATH", help="go on from a checkpoint; auto: from OUTPUT's, if there is one")
    add("--print-every", type=positive(int), default=10, metavar="STEPS")
    add("--save-every", type=natural, default=0, metavar="STEPS", help="save within epochs too")
    args = parser.parse_args(argv)
    args.output = args.output or (args.pretrained or args.evaluate).parent / "lincls"
    return args


def main(argv=None):
    pretrain.launch(main_worker, parse_args(argv))


def main_worker(args):
    with pretrain.usage_errors():
        path = args.pretrained or args.evaluate
        source = pretrain.load(path)
        adopt(args, source)
        train, val = pretrain.open_data(args)
        if val is None or not train.num_classes:
            raise ValueError(f"{args.dir}: a probe needs labels: DIR/train/CLASS/* and DIR/val/CLASS/*")
        net = frozen_net(args, source, train.num_classes)
        pretrain.fit_batch(args, len(train), DEFAULTS[args.dataset]["batch_size"])
        if args.pretrained and not args.knn:
            checkpoint = pretrain.open_output(args, len(train), FIXED)
    if args.knn or args.evaluate:
        figures = dict(knn=pretrain.knn(builder.without_head(net), train, val, args)) if args.knn else validate(net, val, args)
        if dist.get_rank() == 0:
            print("  ".join(f"{name} {value:.2f}" for name, value in figures.items()))
        return

    backbone, frozen = builder.without_head(net), {name: value.clone() for name, value in net.state_dict().items()}
    fc = DistributedDataParallel(net.fc)
    optimizer = torch.optim.SGD(net.fc.parameters(), args.lr, momentum=args.momentum, weight_decay=args.wd)
    batches = loader.Batches(len(train), args.batch_size, args.seed, dist.get_rank(), dist.get_world_size())
    augment = loader.Augment("crop", args.crop_size, train.statistics, args.flip)
    views = loader.Views(train, batches, augment, args.device, 1, args.min_scale, args.workers)
    run = dict(epoch=0, step=0, steps=len(batches), best=0.0)
    if checkpoint:
        net.load_state_dict(checkpoint["state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        optimizer.param_groups[0].update(momentum=args.momentum, weight_decay=args.wd)
        run = {name: checkpoint[name] for name in run}
    log = pretrain.Log(args, checkpoint)

    def save_run():
        pretrain.save_checkpoint(args, run, net, optimizer, log, num_images=len(train))

    while run["epoch"] < args.epochs:
        epoch = run["epoch"]
        batches.epoch, batches.start = epoch, run["step"]
        train_epoch(backbone, fc, optimizer, views, run, args, log, save_run)
        for name, value in net.state_dict().items():
            if not name.startswith("fc.") and not torch.equal(value, frozen[name]):
                raise RuntimeError(f"the frozen backbone moved: {name}")
        figures = validate(net, val, args)
        run.update(epoch=epoch + 1, step=0, best=max(run["best"], figures["top1"]))
        log.write(dict(epoch=epoch + 1, step=(epoch + 1) * run["steps"], **figures, best=run["best"]))
        save_run()
    log.close()


def adopt(args, source):
    """Take what no flag says from the checkpoint, else from the data set's defaults."""
    then = source.get("args") if isinstance(source, dict) else None
    then = then if isinstance(then, dict) else {}  # MoCo's and PCL's say the arch alone
    same_data = args.dataset in (None, then.get("dataset")) and not (args.dir and then.get("dataset") == "digits")
    args.dataset = args.dataset or (same_data and then.get("dataset")) or ("folder" if args.dir else "digits")
    defaults = pretrain.DEFAULTS[args.dataset]
    args.small_images = (then.get("crop_size") or args.crop_size or defaults["crop_size"]) < 64
    if same_data:
        args.dir, args.classes = args.dir or then.get("dir"), args.classes or then.get("classes")
    args.dir = args.dir or "data"
    args.crop_size = args.crop_size or then.get("crop_size") or defaults["crop_size"]
    args.arch = args.arch or (isinstance(source, dict) and source.get("arch")) or defaults["arch"]
    for name, value in DEFAULTS[args.dataset].items():
        if name != "batch_size" and getattr(args, name) is None:
            setattr(args, name, value)


def frozen_net(args, source, num_classes):
    """The classifier with the checkpoint's backbone, and its linear layer: a saved probe's, or a new one."""
    torch.manual_seed(args.seed)
    net = builder.build_backbone(args.arch, args.small_images, num_classes=num_classes).requires_grad_(False)
    path = args.pretrained or args.evaluate
    try:
        state = builder.read_backbone(source)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if args.evaluate:
        probe = source.get("state_dict", {})
        if "fc.weight" not in probe or len(probe["fc.weight"]) != num_classes:
            raise ValueError(f"--evaluate {path}: not a probe of {num_classes} classes, saved by this script")
        state |= {name: probe[name] for name in ("fc.weight", "fc.bias")}
    else:
        torch.nn.init.normal_(net.fc.weight, std=0.01)
        torch.nn.init.zeros_(net.fc.bias)
    try:
        missing = set(net.load_state_dict(state, strict=False).missing_keys)
        unexpected = set(state) - set(net.state_dict())
    except RuntimeError:  # sizes differ
        missing = unexpected = {"weights"}
    if missing - {"fc.weight", "fc.bias"} or unexpected:
        stem = "the small-image stem" if args.small_images else "the stem for large images"
        raise ValueError(f"{path}: its weights are not those of --arch {args.arch} with {stem}; name the --arch and "
                         f"--crop-size that it was trained with")
    net.fc.requires_grad_(True)
    return net.to(args.device, memory_format=torch.channels_last)


def train_epoch(backbone, fc, optimizer, views, run, args, log, save_run):
    """The rest of the run's epoch. The backbone stays in eval mode: BN in train mode would take the batch's statistics and
    move its running ones, even without gradient, and a frozen backbone is to be a function of the image alone."""
    backbone.eval()
    for step, (image, _, label), report in pretrain.steps(views, run, args, log, save_run):
        report["lr"] = optimizer.param_groups[0]["lr"] = pretrain.learning_rate(run["epoch"] + step / run["steps"], args)
        with torch.no_grad(), pretrain.autocast(args):
            features = backbone(image)
        logits = fc(features.float())
        loss = F.cross_entropy(logits, label)
        accuracy = (logits.argmax(1) == label).float().mean()
        report.update(pretrain.mean_over_processes(dict(loss=loss, accuracy=accuracy), run, args))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def validate(net, val, args):
    """Top-1 and top-5 in percent over the whole of `val`, each image once for any number of processes."""
    logits, labels = pretrain.embed(net, val, args)
    right = (logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]).double()
    hits = torch.stack([right[:, 0].sum(), right.sum()])
    dist.all_reduce(hits)
    return dict(zip(("top1", "top5"), (100 * hits / len(val)).tolist()))


if __name__ == "__main__":
    main()
