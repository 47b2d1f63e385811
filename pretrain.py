"""PAUC: self-supervised pre-training of an image encoder (arXiv 2210.10194).

    python pretrain.py                                     # scikit-learn's digits, on CPUs too
    python pretrain.py --dataset cifar10                   # one process on every visible GPU
    python pretrain.py IMAGENET --nproc 8                  # an image folder, on 8 GPUs
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node0:23456 \
        pretrain.py IMAGENET                               # several nodes, the same on each
    python pretrain.py --heads 1 --align 0 --uniform 0 --corr 0   # PCL
    python pretrain.py --num-clusters 0                    # MoCo v2
"""
import argparse
import fcntl
import io
import json
import math
import os
import signal
import sys
import time
import traceback
import warnings
import zipfile
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import builder
import loader
import losses
from loader import UsageError

# What suits each data set. Batch, queue and clusters (by images a prototype) are fitted to it.
SMALL = dict(arch="resnet18", crop_size=32, epochs=200, batch_size=256, queue_size=4096,
             moco_m=0.99, warmup_epochs=20, knn_every=5, min_scale=0.2, flip=True, lr=0.03,
             temperature=0.2)
DEFAULTS = {
    "folder": SMALL | dict(arch="resnet50", crop_size=224, queue_size=16384, moco_m=0.999,
                           knn_every=10),
    "cifar10": SMALL, "cifar100": SMALL, "fashionmnist": SMALL | dict(crop_size=28),
    "digits": SMALL | dict(crop_size=8, min_scale=0.6, flip=False, epochs=12, warmup_epochs=0,
                           batch_size=64, lr=0.01, temperature=0.1, queue_size=1024, knn_every=2),
}
IMAGES_PER_PROTOTYPE = 50, 25, 12
QUEUE_SHARE = 4  # the default queue is at most such a part of the images
SPREAD_UP_TO = 4096  # prototypes; the cost of centroids far apart grows with their square
NEIGHBOURS = 20  # of the kNN monitor
DROP = 0.1  # of the learning rate at each epoch of --schedule
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
DAY = timedelta(days=1)  # others wait in a collective while one clusters or downloads
SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1
TOGETHER = 0.5  # seconds between what is one signal to all
DIVERGED = "the run has diverged; start from an older checkpoint with a lower --lr or --amp off"
# What many published checkpoints hold beside tensors, and what cannot run code.
HARMLESS = [argparse.Namespace, np.dtype, *{type(np.dtype(code)) for code in "?bhilqBHILQefd"},
            *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar")
              for core in ("core", "_core"))]
FIXED = ("dataset", "arch", "crop_size", "mlp", "dim", "heads", "queue_size", "batch_size", "seed",
         "num_clusters")  # a resumed run is the same model on the same data, in the same batches
# What a line on the terminal shows; a mean over the clusterings where they have a figure each.
TERMINAL = ("loss", "acc", "acc_ins", "lr", "images_per_s", "knn", "top1", "top5", "best",
            "diversity", "proto_diversity", "effective_rank", "seconds")


# -------------------------------------------------------------------------------------- arguments


def positive(kind, or_zero=False, most=math.inf):
    def parse(text):
        value = kind(text)
        if not 0 <= value <= most or value == math.inf or value == 0 and not or_zero:
            least = "0 or more" if or_zero else "positive"
            limit = "" if most == math.inf else f" and at most {most}"
            raise argparse.ArgumentTypeError(f"must be {least}{limit}, not {text}")
        return value
    parse.__name__ = kind.__name__  # argparse says it where the text is no number
    return parse


natural, natural_float, part = positive(int, True), positive(float, True), positive(float, most=1)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="PAUC pre-training", allow_abbrev=False)
    add = parser.add_argument
    add("dir", nargs="?", metavar="DIR", help="image folder, or where torchvision keeps its own")
    add("--min-scale", type=part, help="least part of an image in a random crop")
    add("--crop-size", type=positive(int), help="pixels; under 64 no blur and a small-image stem")
    add("--mlp", action=argparse.BooleanOptionalAction, default=True, help="MoCo v2's head")
    add("--dim", "--moco-dim", "--low-dim", type=positive(int), default=128, help="of embeddings")
    add("--queue-size", "--moco-k", type=positive(int), help="keys in the queue")
    add("--moco-m", type=positive(float, or_zero=True, most=1), help="momentum of the key encoder")
    add("--temperature", "--moco-t", type=positive(float), help="of InfoNCE; mean concentration")
    add("--bn-splits", type=positive(int), default=1, help="slices of a batch with their own BN")
    add("--warmup-epochs", "--warmup-epoch", type=natural, help="epochs of InfoNCE alone")
    add("--num-clusters", "--num-cluster", type=natural, nargs="+", metavar="P",
        help="prototypes of each clustering; 0: MoCo (default: 50, 25, 12 images a prototype)")
    add("--cluster-every", type=positive(int), default=1, metavar="EPOCHS", help="of the E-step")
    add("--num-negatives", "--pcl-r", type=natural, default=16384, help="of ProtoNCE")
    add("--kmeans-iters", type=positive(int), default=15, help="PCL: 20")
    add("--kmeans-restarts", type=positive(int), default=1, help="PCL: 5")
    add("--proto", type=natural_float, default=1.0, help="weight of ProtoNCE")
    add("--align", type=natural_float, default=0.3, help="weight of prototypes' alignment")
    add("--uniform", type=natural_float, default=0.3, help="weight of images' uniformity")
    add("--corr", type=natural_float, default=0.3, help="weight of deviations' correlation")
    add("--align-alpha", type=positive(float), default=2.0, help="its exponent")
    add("--uniform-t", type=positive(float), default=2.0, help="its inverse temperature")
    add("--corr-lambda", type=natural_float, default=0.3, help="weight of what is off its diagonal")
    add("--heads", type=int, choices=(1, 2), default=2, help="1: one embedding for both levels")
    add("--init", type=Path, metavar="PATH", help="start from the backbone in a checkpoint")
    add("--knn-every", type=natural, metavar="EPOCHS", help="of the kNN monitor; 0: never")
    add("--keep-every", type=natural, default=0, metavar="EPOCHS", help="keep such checkpoints")
    add("--output", "--exp-dir", type=Path, default=Path("output"))
    add_common(add)
    parser.set_defaults(wd=1e-4)
    args = parser.parse_args(argv)
    args.dataset = args.dataset or ("folder" if args.dir else "digits")
    args.dir = os.path.abspath(args.dir or "data")
    for name, value in DEFAULTS[args.dataset].items():
        if name not in ("batch_size", "queue_size") and getattr(args, name) is None:
            setattr(args, name, value)
    return args


def add_common(add):
    """The flags of both scripts."""
    add("--dataset", choices=loader.DATASETS, help="default: folder with DIR, digits without")
    add("--classes", type=os.path.abspath, metavar="FILE", help="class folders to keep, one a line")
    add("--flip", action=argparse.BooleanOptionalAction, help="mirror half of the images")
    add("-a", "--arch", help="a torchvision net that ends in fc")
    add("--epochs", type=positive(int))
    add("-b", "--batch-size", type=positive(int), help="images over all processes")
    add("--lr", "--learning-rate", type=positive(float), help="never scaled by the batch")
    add("--schedule", type=natural, nargs="+", metavar="EPOCH", help="divide lr by 10 there")
    add("--momentum", type=natural_float, default=0.9, help="of SGD")
    add("--wd", "--weight-decay", type=natural_float)
    add("--seed", type=natural, default=0)
    add("--device", choices=("auto", "cuda", "cpu"), default="auto")
    add("--amp", choices=("auto", "bf16", "off"), default="auto")
    add("-j", "--workers", type=natural, help="data workers of each process")
    add("--nproc", type=positive(int), help="processes (default: one on every GPU)")
    add("--resume", metavar="PATH", help="a checkpoint to go on from; auto: OUTPUT's, if any")
    add("-p", "--print-every", "--print-freq", type=positive(int), default=10, metavar="STEPS")
    add("--save-every", type=natural, default=0, metavar="STEPS", help="save within epochs too")


def main(argv=None):
    launch(main_worker, parse_args(argv))


def main_worker(args):
    held = lock(args.output)
    checkpoint = read_own(args, FIXED)
    train, val = open_data(args)
    settle(args, train, val, checkpoint)
    torch.manual_seed(args.seed)
    model = builder.MoCo(args.arch, args.dim, args.queue_size, args.moco_m, args.mlp,
                         args.crop_size < loader.SMALL_CROP, args.bn_splits, args.heads)
    if args.init and not checkpoint:  # the heads are new
        taken = builder.load_backbone(model.encoder_q, load(args.init), args.init, args.arch)
        model.encoder_k.load_state_dict(model.encoder_q.state_dict())
        say(f"init    {args.init}: {taken}")
    ddp = distributed(model.to(args.device, memory_format=torch.channels_last))
    backbone = builder.backbone_of(model.encoder_q)
    optimizer = torch.optim.SGD(model.parameter_groups(), args.lr, momentum=args.momentum,
                                weight_decay=args.wd)
    augment = loader.Augment("v2", args.crop_size, args.statistics, args.flip)
    views = loader.Views(train, torch.arange(len(train)), args.batch_size, augment, args.seed, 2,
                         args.min_scale, args.workers, dist.get_rank(), dist.get_world_size())

    # Where the run is: in `epoch`, after `step` of its `steps`, with what its E-step found.
    run = dict(epoch=0, step=0, steps=len(views), clusterings=[], figures={})
    if checkpoint:
        restore(checkpoint, run, ddp, optimizer, args)
        run["clusterings"] = [losses.Clustering(assignments, *(x.to(args.device) for x in others))
                              for assignments, *others in run["clusterings"]]
    checkpoint = None  # of a ResNet-50, half a gigabyte in every process
    log = Log(args, run)

    def save_run(name="checkpoint.pth"):
        state = run | dict(clusterings=[tuple(clustering) for clustering in run["clusterings"]])
        save_checkpoint(args.output / name, args, state, ddp, optimizer, digest=train.digest)
        if dist.get_rank() == 0:  # with torchvision's names
            save(args.output / "backbone.pth", dict(
                arch=args.arch, epoch=run["epoch"], args=plain(args),
                state_dict={name: x.cpu() for name, x in backbone.state_dict().items()}))
        dist.barrier()

    with signals() as caught:
        while run["epoch"] < args.epochs:
            start, epoch = time.perf_counter(), run["epoch"]
            if args.num_clusters and epoch >= args.warmup_epochs and not run["clusterings"]:
                run["clusterings"], run["figures"] = e_step(model, train, args, epoch)
            m_step(ddp, optimizer, views, run, args, log, caught, save_run)
            done = epoch + 1
            figures = dict(epoch=done, step=done * run["steps"], **run["figures"])
            if val and args.knn_every and (done % args.knn_every == 0 or done == args.epochs):
                figures["knn"] = monitor(backbone, train, val, args)
            line = log.report(figures | dict(seconds=time.perf_counter() - start), run, args)
            run.update(epoch=done, step=0, figures={})
            if done < args.warmup_epochs or (done - args.warmup_epochs) % args.cluster_every == 0:
                run["clusterings"] = []
            if args.keep_every and done % args.keep_every == 0:
                save_run(f"checkpoint_{done:04d}.pth")
            save_run()  # last: a run that is killed before it does all of this again
            say(line)
    log.close()
    held.close()


# ----------------------------------------------------------------------------- data and settling


def open_data(args):
    """The training set and the validation set or None. A node's first process alone downloads."""
    for turn in (True, False):
        if turn == (int(os.environ.get("LOCAL_RANK", 0)) == 0):
            train, val = loader.load(args.dataset, args.dir, args.classes)
        dist.barrier()
    say(f"data    {args.dataset} of {loader.shown(args.dir)}: {len(train)} images in "
        f"{train.num_classes or 'no'} classes, {len(val or ())} to evaluate on, "
        f"{train.left_out} other files left out")
    return train, val


def settle(args, train, val, checkpoint):
    """What no flag says: by the checkpoint, the machine and the data set. Refuses what was asked
    for and does not fit, and says what holds."""
    most = len(train)
    settle_machine(args, (train, val))
    fit_batch(args, most)
    if args.queue_size is None:
        args.queue_size = min(DEFAULTS[args.dataset]["queue_size"], max(1, most // QUEUE_SHARE))
    if args.num_clusters is None:
        args.num_clusters = sorted({max(2, most // images) for images in IMAGES_PER_PROTOTYPE})
    args.num_clusters = [size for size in args.num_clusters if size]
    if not args.num_clusters:
        args.heads = 1
    if args.queue_size > most:
        raise UsageError(f"--queue-size {args.queue_size}: give at most {most}, one an image")
    for size in args.num_clusters:
        if not 2 <= size <= most:
            raise UsageError(f"--num-clusters {size}: give 2 to {most}, one an image, or 0: MoCo")
    if args.num_clusters:
        __import__("faiss")  # if it does not load: now, rather than after the warm-up
    if checkpoint:
        check_resume(args, checkpoint, train.digest, train.digest_of, FIXED)
    args.statistics = checkpoint["args"]["statistics"] if checkpoint else train.statistics
    say(f"model   {args.arch}, {args.crop_size} px, queue {args.queue_size}, heads {args.heads}, "
        f"prototypes {args.num_clusters}\ntrain   {args.epochs} epochs ({args.warmup_epochs} of "
        f"warm-up), {most // args.batch_size} steps of {args.batch_size} images, seed {args.seed}, "
        f"on {dist.get_world_size()} x {args.device.type}, amp {args.amp}, to {args.output}")


def settle_machine(args, sets):
    """Device, also of the data sets, precision and workers."""
    cuda = on_gpu(args)
    args.device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    for data in filter(None, sets):
        data.to(args.device)
    if args.workers is None:  # on the CPU they would only share the cores
        nproc = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        args.workers = min(16, max(1, CORES // nproc)) if cuda else 0
    if args.amp == "auto":
        bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        args.amp = "bf16" if bf16 else "off"
    torch.backends.cudnn.benchmark = cuda


def fit_batch(args, num_images):
    """Fit the batch to the processes if it is a default; refuse one that does not fit."""
    groups = dist.get_world_size() * getattr(args, "bn_splits", 1)
    asked = args.batch_size or DEFAULTS[args.dataset]["batch_size"]
    if num_images < 2 * groups:
        raise UsageError(f"{args.dir}: {num_images} images are too few for {groups} groups of 2")
    works = min(num_images // groups, max(2, asked // groups)) * groups
    if works != asked and args.batch_size:
        raise UsageError(f"--batch-size {asked}: {groups} groups (processes x --bn-splits) share "
                         f"it, 2 or more each; {works} works")
    args.batch_size = works


def read_own(args, fixed):
    """The checkpoint of this script, by its flags `fixed`, that --resume names, or None."""
    own = args.output / "checkpoint.pth"
    path = own if args.resume in (None, "auto") else Path(args.resume)
    if own.exists() and not (args.resume and path.resolve() == own.resolve()):
        raise UsageError(f"--output {args.output}: is used; give --resume auto or another --output")
    checkpoint, position = None, [0, 0]
    if args.resume and (own.exists() or args.resume != "auto"):
        checkpoint = load(path)
        if "digest" not in checkpoint or not {*fixed} <= checkpoint["args"].keys():
            raise UsageError(f"--resume {path}: is a checkpoint of the other script, or of no run")
        position = [checkpoint["epoch"], checkpoint["step"]]
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    if len(builder.gather(torch.tensor([position], device=device)).unique(dim=0)) > 1:
        raise UsageError(f"--output {args.output}: not the same for all processes; share it")
    return checkpoint


def check_resume(args, checkpoint, digest, digest_of, fixed):
    """Refuse to go on with another model, other data or another batch."""
    now, then = plain(args), checkpoint["args"]
    changed = [f"--{name.replace('_', '-')} {then[name]} (now {now[name]})"
               for name in fixed if now[name] != then[name]]
    if changed:
        raise UsageError(f"--resume {args.resume}: was made with {', '.join(changed)}")
    if checkpoint["digest"] != digest:
        raise UsageError(f"--resume {args.resume}: was made on other images than those in "
                         f"{args.dir}, by their {digest_of}")


def distributed(module):
    """DDP whose resumed runs are exact on the CPU: gloo adds three or more numbers in an order by
    their place in a bucket, and DDP lays its buckets anew after its first backward."""
    def mean_in_order_of_rank(_, bucket):
        mean = torch.futures.Future()
        mean.set_result(builder.gather(bucket.buffer()[None]).mean(0))
        return mean
    ddp = DistributedDataParallel(module)
    ddp.broadcast_buffers = False  # BN's are sent where they are used
    if not next(module.parameters()).is_cuda:
        ddp.register_comm_hook(None, mean_in_order_of_rank)
    return ddp


def restore(checkpoint, run, model, optimizer, args):
    """Put a checkpoint's state into what both scripts train."""
    model.load_state_dict(checkpoint["state_dict"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    for group in optimizer.param_groups:  # what the flags say now
        group.update(momentum=args.momentum, weight_decay=args.wd)
    run.update({name: checkpoint[name] for name in run})


def plain(args):
    """The flags as plain types, which a checkpoint may hold."""
    return {name: str(value) if isinstance(value, (Path, torch.device)) else value
            for name, value in vars(args).items()}


# ----------------------------------------------------------------------------------------- E-step


def e_step(model, train, args, epoch):
    """Embed every training image, cluster the embeddings, and look at what the clusters are like.
    k-means is of the instance level; with two heads prototypes and concentrations are of the other.
    Returns a list of losses.Clustering and a dict of figures, the same on every process. The
    assignments stay on the CPU: how many prototypes a batch touches is known without waiting."""
    start = time.perf_counter()
    v, _ = embed(model.encoder_k, train, args)
    v = model.unit_rows(builder.gather(v)[:len(train)])  # embeddings of all images: nxHxC
    embedded = time.perf_counter()
    clusterings, objectives = cluster_all(v[:, 0].contiguous(), args, epoch)
    figures = dict(coagulation(v[:, 0], clusterings), kmeans_objective=objectives)
    if args.heads == 2:
        clusterings = [losses.prototype_level(v[:, 1], one.assignments, len(one.prototypes),
                                              args.temperature) for one in clusterings]
        for x in (x for one in clusterings for x in one[1:]):
            dist.broadcast(x, src=0)  # sums in another order differ by a last digit
        figures |= {f"proto_{name}": x for name, x in coagulation(v[:, 1], clusterings).items()}
    figures |= dict(seconds_embed=embedded - start, seconds_kmeans=time.perf_counter() - embedded)
    return [one._replace(assignments=one.assignments.cpu()) for one in clusterings], figures


def coagulation(v, clusterings):
    """losses', of embeddings v (n, C) in each clustering, by name; and their effective rank."""
    each = [losses.coagulation(v, one.assignments, one.prototypes) for one in clusterings]
    figures = {name: [figure[name] for figure in each] for name in each[0]}
    return figures | dict(effective_rank=losses.effective_rank(v))


@torch.inference_mode()
def embed(encoder, data, args):
    """Centre crops through the encoder in eval mode: this process's shard of what comes out (s, C),
    float32 and finite, and its labels (s,), with the same s = ceil(n / processes) everywhere. Rows
    past the shard's end are 0 and -1: `builder.gather(x)[:n]` is all n images, once, in order."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    training, start, rows = encoder.training, 0, math.ceil(len(data) / world_size)
    encoder.eval()
    for buffer in encoder.buffers():  # BN's statistics are process 0's
        dist.broadcast(buffer, src=0)
    one = torch.zeros(1, 3, args.crop_size, args.crop_size, device=args.device)
    v = torch.zeros(rows, *encoder(one).shape[1:], device=args.device)
    labels = torch.full((rows,), -1, device=args.device)
    batches = loader.centre_batches(data, args.crop_size, args.statistics, rank, world_size,
                                    args.workers)
    total = math.ceil(rows / data.evaluation_batch)
    for image, label in bar("embedding", 0, total, batches, after=10):
        with autocast(args):
            v[start:start + len(image)] = encoder(image).float()
        labels[start:start + len(image)] = label.to(args.device, non_blocking=True)
        start += len(image)
    encoder.train(training)
    if not v.isfinite().all():
        raise UsageError("the network's output is not finite; give --amp off or a lower --lr")
    return v, labels


def cluster_all(v, args, epoch):
    """k-means of v (n, C) for every number of prototypes, shared out to the processes: clusterings
    on the device, and their objectives."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    own = {m: kmeans(v, size, loader.seed_of(args.seed, epoch, "k-means", m), args)
           for m, size in enumerate(args.num_clusters) if m % world_size == rank}
    found = []
    for m, size in enumerate(args.num_clusters):
        theirs = losses.Clustering(torch.empty(len(v), dtype=torch.long, device=v.device),
                                   v.new_empty(size, v.shape[1]), v.new_empty(size))
        found.append(own.get(m) or (theirs, v.new_empty((), dtype=torch.float64)))
        clustering, objective = found[-1]
        for x in (*clustering, objective):
            dist.broadcast(x, src=m % world_size)
    return [clustering for clustering, _ in found], [objective.item() for _, objective in found]


def kmeans(v, num_clusters, seed, args):
    """k-means of v (n, C) by faiss, on this process's GPU where faiss sees one: a losses.Clustering
    on the device of v, and the sum of squared distances to the centroids, 0-dim float64."""
    import faiss
    x = v.cpu().numpy()
    solver = faiss.Clustering(x.shape[1], num_clusters)
    solver.niter, solver.nredo = args.kmeans_iters, args.kmeans_restarts
    solver.seed = seed % 2 ** 31
    solver.min_points_per_centroid = 1  # fewer than faiss asks for are no mistake
    solver.max_points_per_centroid = 1000  # PCL's; more points are subsampled
    solver.init_method = (faiss.ClusteringInitMethod_AFK_MC2 if num_clusters <= SPREAD_UP_TO
                          else faiss.ClusteringInitMethod_RANDOM)
    index = faiss.IndexFlatL2(x.shape[1])
    if args.device.type == "cuda" and faiss.get_num_gpus() > 0:
        torch.cuda.empty_cache()  # faiss allocates beside torch
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), args.device.index, index)
    solver.train(x, index)
    squared, assignments = (torch.from_numpy(a[:, 0]).to(v.device) for a in index.search(x, 1))
    squared = squared.clamp(min=0)
    centroids = faiss.vector_to_array(solver.centroids).reshape(num_clusters, -1)
    prototypes = F.normalize(torch.from_numpy(centroids).to(v.device), dim=1)
    phi = losses.concentration(squared.sqrt(), assignments, num_clusters, args.temperature)
    return losses.Clustering(assignments, prototypes, phi), squared.double().sum()


# ----------------------------------------------------------------------------------------- M-step


def m_step(ddp, optimizer, views, run, args, log, caught, save_run):
    """The rest of the run's epoch: for each batch queries, momentum update, keys, loss, backward,
    optimizer, enqueue."""
    model, epoch, rank = ddp.module, run["epoch"], dist.get_rank()
    model.train()
    log.start_clock()
    batches = views.epoch(epoch, run["step"])
    for im_q, im_k, index, _ in bar(f"epoch {epoch + 1}", run["step"], run["steps"], batches):
        step, n = run["step"], len(im_q)
        if not epoch and not step:
            log.pairs(im_q, im_k, views.augment)
        rate = args.lr * rate_left(epoch + step / run["steps"], args)
        for group, has_loss in zip(optimizer.param_groups, (True, run["clusterings"])):
            group.update(lr=rate, weight_decay=args.wd if has_loss else 0)
        shuffle = loader.generator(args.seed, epoch, step, "shuffle")
        permutation = torch.randperm(args.batch_size, generator=shuffle)
        with autocast(args):
            z, k = ddp(im_q, im_k, permutation.to(args.device, non_blocking=True))
        z, k = builder.gather_with_gradient(z).unbind(1), k.unbind(1)  # NxC of each head
        batch = losses.Batch(z[0], k[0], z[-1], k[-1], index, model.queue, model.queue_index,
                             slice(rank * n, (rank + 1) * n), epoch, step)
        loss, figures = pauc(batch, run["clusterings"], args)
        report, number = exchange(loss, figures, run, caught)  # waits for the device
        optimizer.zero_grad()
        loss.backward()  # is not waited for
        optimizer.step()
        model.enqueue(batch.k, index)
        end_step(report | dict(lr=rate), number, run, args, log, save_run)


def pauc(batch, clusterings, args):
    """L = L_ins + w_u L_uniform + mean over clusterings [ w_p L_proto + w_a L_align + w_c L_corr ].

    Without clusterings, as in warm-up, L_ins alone. It is over this process's rows, the others over
    the whole batch, the same on every process: GatherWithGradient sums their gradients, DDP divides
    by their number. Returns the loss, and what is only logged, means over the clusterings: terms
    without their weights, and accuracies. A new term is another `if`: name, weight, value."""
    q, k, x, y, rows = batch.q, batch.k, batch.x, batch.y, batch.rows
    share = 1 / max(1, len(clusterings))
    own = batch.index[rows].to(q.device, non_blocking=True)[:, None] == batch.queue_index
    excluded = own | (batch.queue_index == builder.EMPTY)
    value, accuracy = losses.info_nce(q[rows], k[rows], batch.queue, args.temperature, excluded)
    terms, logged = [("ins", 1, value)], [("acc_ins", accuracy)]
    if clusterings and args.uniform:
        terms.append(("uniform", args.uniform, losses.uniformity(q, args.uniform_t)))
    for m, (assignments, prototypes, phi) in enumerate(clusterings):
        s = assignments[batch.index]
        p, p_positive = (losses.prototype_features(z, s) for z in (x, y))
        d, d_positive = (losses.deviations(z, prototypes, s) for z in (x, y))
        if args.proto:
            negatives = loader.generator(args.seed, batch.epoch, batch.step, m, device=q.device)
            value, accuracy = losses.proto_nce(x, prototypes, phi, s, args.num_negatives, negatives)
            terms.append(("proto", share * args.proto, value))
            logged.append(("acc_proto", accuracy))
        if args.align:
            value = losses.alignment(p, p_positive, args.align_alpha)
            terms.append(("align", share * args.align, value))
        if args.corr:
            value = losses.correlation(d, d_positive, args.corr_lambda)
            terms.append(("corr", share * args.corr, value))
    loss = sum(weight * value for _, weight, value in terms)
    logged += [(f"loss_{name}", value.detach()) for name, _, value in terms]
    return loss, {name: torch.stack([value for other, value in logged if other == name]).mean()
                  for name in dict.fromkeys(name for name, _ in logged)}


def autocast(args):
    return torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp == "bf16")


def rate_left(epoch, args, drop=DROP):
    """What is left of a rate at a fractional epoch: a half cosine, or `drop` at each milestone."""
    if args.schedule:
        return drop ** sum(epoch >= milestone for milestone in args.schedule)
    return 0.5 * (1 + math.cos(math.pi * epoch / args.epochs))


def exchange(loss, figures, run, caught):
    """The loss and the figures as floats, means over processes, and the number of a signal that any
    has caught, or 0: one collective, and the step's one wait for the device. Before the backward,
    which runs while the next batch is prepared."""
    values = [x.detach().float() for x in (loss, *figures.values())]
    values.append(values[0].new_full((), max(caught, default=0)))
    rows = builder.gather(torch.stack(values)[None]).tolist()  # one of each process
    *columns, numbers = zip(*rows)
    report = {name: sum(x) / len(x) for name, x in zip(("loss", *figures), columns)}
    if not math.isfinite(report["loss"]):
        raise UsageError(f"epoch {run['epoch'] + 1}, step {run['step'] + 1}: the loss is not "
                         f"finite, {DIVERGED}")
    return report, int(max(numbers))


def end_step(report, number, run, args, log, save_run):
    """What follows a step in both scripts: report, save, then speak; and stop for a signal."""
    run["step"] += 1
    total = run["epoch"] * run["steps"] + run["step"]
    line = log.step(report, total, run, args)
    if number or run["step"] == run["steps"] or args.save_every and total % args.save_every == 0:
        save_run()
    if line:
        say(line)
    if number:
        say(f"stopped by {signal.Signals(number).name} after step {total}, and saved")
        sys.exit(128 + number)


# ---------------------------------------------------------------------------------- kNN monitor


@torch.inference_mode()
def monitor(backbone, train, val, args):
    """Top-1 in percent on val by the nearest training images; each process searches its shard."""
    bank, bank_labels = embed(backbone, train, args)
    queries, labels = (builder.gather(x)[:len(val)] for x in embed(backbone, val, args))
    bank = F.normalize(bank, dim=1, out=bank)  # ImageNet's takes 10 GB
    near = nearest(bank, bank_labels, F.normalize(queries, dim=1), NEIGHBOURS)
    near = [torch.cat(builder.gather(x).chunk(dist.get_world_size()), dim=1) for x in near]
    return vote(*near, labels, NEIGHBOURS)


def nearest(bank, bank_labels, queries, k):
    """The k nearest rows of bank (n, d) to each of queries (m, d), unit rows: cosines and labels,
    (m, k) or of a smaller bank (m, n). Of equal cosines (topk takes any) the first row is nearer.
    Those with a label under 0 are nobody's."""
    found, parts = [], queries.split(256)
    later = 2 ** -52 * torch.arange(len(bank), dtype=torch.double, device=bank.device)
    for rows in bar("neighbours", 0, len(parts), parts, after=10):
        cosine = (rows @ bank.T).masked_fill_(bank_labels < 0, -math.inf)
        index = (cosine - later).topk(min(k, len(bank)), dim=1).indices
        found.append((cosine.gather(1, index), bank_labels[index]))
    return [torch.cat(x) for x in zip(*found)]


def vote(near, near_labels, labels, k, temperature=0.07):
    """The weighted k-nearest-neighbour classifier (arXiv 1805.01978), whose votes are proportional
    to exp(cosine / temperature): top-1 in percent. near, near_labels: as `nearest` gives them, for
    as many neighbours or more, or of several banks, side by side; labels: the queries' own (m,)."""
    right = 0
    for cosine, its, truth in zip(*(x.split(256) for x in (near, near_labels, labels))):
        cosine, index = (x[:, :k] for x in cosine.sort(dim=1, descending=True, stable=True))
        its = its.gather(1, index)
        weights = ((cosine - cosine[:, :1]) / temperature).exp()  # the nearest has 1
        votes = ((its[:, :, None] == its[:, None]) * weights[:, None]).sum(2)  # mxkxk -> mxk
        right += (its.gather(1, votes.argmax(1, keepdim=True))[:, 0] == truth).sum()
    return 100 * right.item() / len(labels)


# ------------------------------------------------------------------------------------ checkpoints


def lock(folder):
    """Keep OUTPUT, which is made if need be, to this run until it closes what is returned."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written ({error.strerror})") from None
    with suppress(OSError):  # on a file system without locks
        try:
            if dist.get_rank() == 0:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"--output {folder}: another run is writing there") from None
    return file


def save_checkpoint(path, args, run, model, optimizer, **more):
    """Process 0 writes all that a resumed run needs; random numbers are keyed, so none is saved."""
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise UsageError(f"epoch {run['epoch'] + 1}: the weights are not finite, {DIVERGED}")
    if dist.get_rank() == 0:
        save(path, dict(run, arch=args.arch, state_dict=model.state_dict(), args=plain(args),
                        optimizer=optimizer.state_dict(), **more))


def save(path, state):
    """Write a file whole or not at all: aside, flushed, renamed."""
    buffer, new = io.BytesIO(), path.with_suffix(".new")
    torch.save(state, buffer)
    try:
        with open(new, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise UsageError(f"{path}: cannot be written ({error.strerror}), all {buffer.tell()} bytes "
                         f"of it; what was there before is as it was") from None
    with suppress(OSError):  # not every file system can; the file is there all the same
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the rename, too, is to outlive a power cut
        os.close(folder)


def load(path):
    """What is in a checkpoint file, as data alone: nothing in it can run."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch.load takes flipped bytes in silence
                if any(part.CRC for part in archive.infolist()) and archive.testzip():
                    raise zipfile.BadZipFile  # torch can leave all sums out
        with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on how to load what is not data alone
            found = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(found, dict):
            raise TypeError
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception:  # torch raises nearly anything on a file that it did not write
        raise UsageError(f"{path}: not a whole checkpoint that is data alone; it is damaged, not "
                         f"torch's, or holds objects: then save its state dict alone") from None
    return found


# -------------------------------------------------------------------------------------------- log


def say(text):
    """Once, of all processes. A terminal that cannot be written any more ends no run."""
    try:
        if dist.get_rank() == 0:
            tqdm.write(text)
            sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w")


def bar(title, start, total, iterable=None, after=0):
    """A progress bar on process 0's terminal, `after` so many seconds."""
    off = dist.get_rank() > 0 or not sys.stdout.isatty()
    return tqdm(iterable, title, total, initial=start, disable=off, file=sys.stdout, leave=False,
                dynamic_ncols=True, delay=after)


def append(path, record):
    """A line of JSON, which has no NaN and no infinity: null."""
    record = json.loads(json.dumps(record), parse_constant=lambda _: None)
    try:
        with open(path, "a") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror})") from None


class Log:
    """Reports of process 0: TensorBoard, and a JSON line each in OUTPUT/log.jsonl, a start's flags
    among them. A start cuts off what is later than the checkpoint that it goes on from."""

    def __init__(self, args, run):
        self.speaks = dist.get_rank() == 0
        if self.speaks:
            from torch.utils.tensorboard import SummaryWriter
            self.path, step = args.output / "log.jsonl", run["epoch"] * run["steps"] + run["step"]
            if self.path.exists():
                self.cut(step, run["step"] == 0)
            self.board = SummaryWriter(args.output, purge_step=step + 1 if step else 0)
            append(self.path, dict(flags=plain(args), step=step))

    def cut(self, *begin):
        """Keep what is not after a step, or, if an epoch ends there, after the epoch's own line."""
        kept = 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            record = json.loads(line) if line.endswith(b"\n") else None  # cut short by a kill
            if not record or (record["step"], "loss" not in record) > begin:
                break
            kept += len(line)
        os.truncate(self.path, kept)

    def start_clock(self):
        self.since, self.counted = time.perf_counter(), 0

    def step(self, report, step, run, args):
        """Report a step, if it is its turn. Returns a line for the terminal, or None."""
        self.counted += 1
        if step % args.print_every:
            return None
        speed = self.counted * args.batch_size / (time.perf_counter() - self.since)
        self.start_clock()
        record = dict(epoch=run["epoch"] + 1, step=step, **report, images_per_s=speed)
        return self.report(record, run, args)

    def report(self, record, run, args):
        """Report a step or an epoch. Returns a line for the terminal, with TERMINAL's figures."""
        if self.speaks:
            append(self.path, record)
            for name, value in record.items():
                several = isinstance(value, list)
                for i, x in enumerate(value if several else [value]):
                    self.board.add_scalar(f"{name}/{i}" if several else name, x, record["step"])
        step = f"  step {run['step']}/{run['steps']}" if "loss" in record else ""
        words = [f"{name} {np.mean(record[name]):.5g}" for name in TERMINAL if name in record]
        return "  ".join([f"epoch {record['epoch']}/{args.epochs}{step}", *words])

    def pairs(self, im_q, im_k, augment, number=16):
        """Augmented pairs, side by side, in TensorBoard: to be looked at."""
        if self.speaks:
            from torchvision.utils import make_grid
            rows = torch.stack([im_q[:number], im_k[:number]], dim=1).flatten(0, 1)
            images = (rows * augment.std + augment.mean).clamp(0, 1)
            self.board.add_image("pairs", make_grid(images, nrow=8), 0)

    def close(self):
        if self.speaks:
            self.board.close()


# ------------------------------------------------------------------------------ launch, signals


def on_gpu(args):
    return args.device != "cpu" and torch.cuda.is_available()


def launch(worker, args):
    """Run worker(args) in every process of the job: this one if torchrun has set LOCAL_RANK, else
    one on every GPU, or --nproc. Status 2 is for what the user is to mend, said in one line, and
    128 + its number for a signal; bugs keep their traceback."""
    if args.device == "cuda" and not on_gpu(args):
        fail("--device cuda: torch sees no GPU here; use --device cpu")
    gpus = torch.cuda.device_count() if on_gpu(args) else None
    nproc = int(os.environ.get("LOCAL_WORLD_SIZE", args.nproc or gpus or 1))
    if gpus and nproc > gpus:
        fail(f"--nproc {nproc}: the largest that works here is {gpus}, one for each GPU")
    if "LOCAL_RANK" in os.environ or nproc == 1:
        return in_process(int(os.environ.get("LOCAL_RANK", 0)), worker, args)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, CORES // nproc)))  # of torch and faiss
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    processes = mp.start_processes(in_process, (worker, args, store.port, nproc), nproc, join=False)
    with signals(processes.pids()) as caught:
        try:
            while not processes.join(grace_period=5):
                pass
        except (mp.ProcessExitedException, mp.ProcessRaisedException) as error:
            status = getattr(error, "exit_code", 1)
            if store.check(["mistake"]):
                fail(store.get("mistake").decode())
            if 0 < status < 128 or status < 0 and not caught:
                raise
            caught.append(status - 128)
    if caught:
        sys.exit(128 + caught[0])


def in_process(local_rank, worker, args, port=None, nproc=1):
    """One of the `nproc` processes that `launch` started, with a store at `port`, or torchrun's."""
    store, group = None, {}
    if port:
        os.setpgrp()  # the terminal's signals come by way of the parent
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # what torch sends where the parent dies
        os.environ |= dict(LOCAL_RANK=str(local_rank), LOCAL_WORLD_SIZE=str(nproc))
        store = dist.TCPStore("localhost", port, is_master=False)
        group = dict(store=store, rank=local_rank, world_size=nproc)
    elif "LOCAL_RANK" not in os.environ:
        group = dict(store=dist.HashStore(), rank=0, world_size=1)
    if on_gpu(args):
        torch.cuda.set_device(local_rank)
        group["device_id"] = torch.device("cuda", local_rank)  # else NCCL guesses it
    try:
        dist.init_process_group("nccl" if on_gpu(args) else "gloo", timeout=DAY, **group)
        worker(args)
        dist.destroy_process_group()
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # the data workers end with their loader
        if isinstance(error, SystemExit):  # for a signal, on which all have agreed
            dist.destroy_process_group()
        if not isinstance(error, UsageError):
            raise
        message = str(error).splitlines()[-1].removeprefix("loader.UsageError: ")  # a worker's
        if store:
            store.set("mistake", message)
            sys.exit(2)
        fail(message)


def fail(message):
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


@contextmanager
def signals(pids=()):
    """A list of the signals that are caught in here and handed on to the processes `pids`, but for
    those ignored, as SIGHUP under nohup. A second one ends the process at once, unless it came
    together with the first: what is sent to all comes by way of the parent too."""
    caught, times = [], []

    def catch(number, _):
        caught.append(number)
        times.append(time.monotonic())
        second = times[-1] - times[0] > TOGETHER
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if second else number)
        if second:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
    heeded = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, catch) for number in heeded}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
