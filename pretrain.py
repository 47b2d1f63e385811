"""PAUC: self-supervised pre-training of an image encoder (arXiv 2210.10194).

    python pretrain.py                                     # scikit-learn's digits, on what the machine has
    python pretrain.py --dataset cifar10                   # CIFAR-10, one process on every visible GPU
    python pretrain.py IMAGENET --nproc 8                  # an image folder, one node of 8 GPUs
    python pretrain.py IMAGENET --world-size 2 --rank 0 --dist-url tcp://node0:23456    # several nodes: once on each,
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-endpoint node0:23456 pretrain.py IMAGENET      # in either way
    python pretrain.py --num-clusters 0                    # MoCo v2
    python pretrain.py --align 0 --uniform 0 --corr 0      # PCL
"""
import argparse
import inspect
import json
import math
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
import types
import zipfile
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path

import faiss
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import builder
import loader
import losses

# What suits each data set. Batch, queue and clusters (by images a prototype) are fitted to smaller ones.
SMALL = dict(arch="resnet18", crop_size=32, epochs=200, batch_size=256, queue_size=4096, moco_m=0.99, warmup_epochs=20,
             knn_every=5, min_scale=0.2, flip=True, lr=0.03, temperature=0.2, align=0.1, uniform=0.1, corr=0.1)
DEFAULTS = {
    "folder": SMALL | dict(arch="resnet50", crop_size=224, queue_size=16384, moco_m=0.999, knn_every=10),
    "cifar10": SMALL, "cifar100": SMALL, "fashionmnist": SMALL | dict(crop_size=28),
    "digits": SMALL | dict(crop_size=8, min_scale=0.6, flip=False, epochs=12, warmup_epochs=0, batch_size=64, lr=0.01,
                           temperature=0.1, queue_size=1024, knn_every=2, align=1.0, uniform=1.0, corr=1.0),
}
IMAGES_PER_PROTOTYPE = 50, 25, 12
EVALUATION_BATCH = 512
# DDP's flag has two names.
NO_BUFFERS = {next(name for name in ("forward_sync_buffers", "broadcast_buffers")
                   if name in inspect.signature(DistributedDataParallel).parameters): False}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="PAUC pre-training", allow_abbrev=False)
    add = parser.add_argument
    add("dir", nargs="?", metavar="DIR", help="image folder, or where torchvision's data sets are (default: data)")
    add("--dataset", choices=loader.DATASETS, help="default: folder with DIR, digits without")
    add("--classes", metavar="FILE", help="class folders to keep, one a line")
    add("--aug", choices=("v1", "v2"), default="v2", help="MoCo's augmentation")
    add("--min-scale", type=share, help="least share of an image's area in a random crop (default: MoCo's 0.2)")
    add("--flip", action=argparse.BooleanOptionalAction, help="mirror half of the images (default: all but digits)")
    add("--crop-size", type=positive(int), help="pixels; under 64 without blur and with the small-image stem")
    add("-a", "--arch", help="a torchvision net that ends in fc")
    add("--mlp", action=argparse.BooleanOptionalAction, default=True, help="MoCo v2's two-layer head")
    add("--dim", "--moco-dim", type=positive(int), default=128, help="dimensions of the embedding")
    add("--queue-size", "--moco-k", type=positive(int), help="keys in the queue")
    add("--moco-m", type=fraction, help="momentum of the key encoder")
    add("--temperature", "--moco-t", type=positive(float), help="of InfoNCE, and the mean concentration (default: 0.2)")
    add("--bn-splits", type=positive(int), default=1, help="slices of each process's batch with BN of their own")
    add("--epochs", type=positive(int))
    add("--warmup-epochs", type=natural, help="epochs of InfoNCE alone")
    add("-b", "--batch-size", type=positive(int), help="images over all processes")
    add("--lr", "--learning-rate", type=positive(float), help="default: 0.03; never scaled")
    add("--schedule", type=natural, nargs="+", metavar="EPOCH", help="divide lr by 10 there (default: cosine)")
    add("--momentum", type=fraction, default=0.9, help="of SGD")
    add("--wd", "--weight-decay", type=natural_float, default=1e-4)
    add("--num-clusters", "--num-cluster", type=natural, nargs="+", metavar="P",
        help="prototypes of each clustering; 0: MoCo (default: 50, 25 and 12 images a prototype)")
    add("--num-negatives", "--pcl-r", type=natural, default=16384, help="negative prototypes of ProtoNCE")
    add("--kmeans-iters", type=positive(int), default=15, help="PCL: 20")
    add("--kmeans-restarts", type=positive(int), default=1, help="PCL: 5")
    add("--kmeans-init", choices=("auto", "spread", "random"), default="auto",
        help="first centroids: images far apart (AFK-MC2) or any, as in PCL; auto: far apart up to 4096")
    add("--align", type=natural_float, help="weight of the alignment term (default: 0.1, digits: 1)")
    add("--uniform", type=natural_float, help="weight of the uniformity term (likewise)")
    add("--corr", type=natural_float, help="weight of the correlation term (likewise)")
    add("--align-alpha", type=checked(float, lambda value: 1 <= value < math.inf, "1 or more"), default=2.0)
    add("--uniform-t", type=positive(float), default=2.0)
    add("--corr-lambda", type=natural_float, default=0.3, help="weight of the off-diagonal part")
    add("--seed", type=natural, default=0)
    add("--device", choices=("auto", "cuda", "cpu"), default="auto")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto")
    add("-j", "--workers", type=natural, help="data workers of each process")
    add("--nproc", type=positive(int), help="processes on this node (default: one on every GPU)")
    add("--world-size", type=positive(int), default=1, metavar="NODES")
    add("--rank", type=natural, default=0, metavar="NODE")
    add("--dist-url", metavar="tcp://HOST:PORT", help="where the nodes meet")
    add("--output", type=Path, default=Path("output"))
    add("--resume", metavar="PATH", help="go on from a checkpoint; auto: from OUTPUT's, if there is one")
    add("--print-every", type=positive(int), default=10, metavar="STEPS")
    add("--knn-every", type=natural, metavar="EPOCHS", help="0: never")
    add("--keep-every", type=natural, default=0, metavar="EPOCHS", help="keep numbered checkpoints")
    add("--save-every", type=natural, default=0, metavar="STEPS", help="save within epochs too")
    args = parser.parse_args(argv)
    args.dataset = args.dataset or ("folder" if args.dir else "digits")
    args.dir = args.dir or "data"
    for name, value in DEFAULTS[args.dataset].items():
        if name not in ("batch_size", "queue_size") and getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main(argv=None):
    launch(main_worker, parse_args(argv))


def main_worker(args):
    with usage_errors():
        train, val = open_data(args)
        fit(args, len(train))
        checkpoint = open_output(args, len(train))
        torch.manual_seed(args.seed)
        model = builder.MoCo(args.arch, args.dim, args.queue_size, args.moco_m, args.mlp, args.crop_size < 64, args.bn_splits)
        model.to(args.device, memory_format=torch.channels_last)
    ddp = DistributedDataParallel(model, **NO_BUFFERS)  # BN's are process 0's, sent where they are used
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), args.lr, momentum=args.momentum, weight_decay=args.wd)
    scaler = torch.amp.GradScaler(args.device.type, enabled=args.amp == "fp16")
    batches = loader.Batches(len(train), args.batch_size, args.seed, dist.get_rank(), dist.get_world_size())
    augment = loader.Augment(args.aug, args.crop_size, train.statistics, args.flip)
    views = loader.Views(train, batches, augment, args.device, 2, args.min_scale, args.workers)

    # Where the run is: in `epoch`, after `step` of its `steps`, with the prototypes that its E-step found.
    run = dict(epoch=0, step=0, steps=len(batches), clusterings=[], figures={})
    if checkpoint:
        model.load_state_dict(checkpoint["state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        optimizer.param_groups[0].update(momentum=args.momentum, weight_decay=args.wd)  # what the flags say now
        if checkpoint["scaler"]:  # it has none without --amp fp16
            scaler.load_state_dict(checkpoint["scaler"])
        run = {name: checkpoint[name] for name in run}
        run["clusterings"] = [(assignments, prototypes.to(args.device), concentration.to(args.device))
                              for assignments, prototypes, concentration in run["clusterings"]]
    log = Log(args, checkpoint)

    def save_run(name="checkpoint.pth"):
        save_checkpoint(args, run, model, optimizer, log, name, scaler=scaler.state_dict(), num_images=len(train))

    def monitor():
        model.share_running_statistics()
        return knn(builder.without_head(model.encoder_q), train, val, args)

    if dist.get_rank() == 0:
        print(summary(args, train, val), flush=True)
    monitored = val is not None and args.knn_every > 0
    if monitored and not checkpoint:
        log.write(dict(epoch=0, step=0, knn=monitor()))

    while run["epoch"] < args.epochs:
        epoch = run["epoch"]
        if args.num_clusters and epoch >= args.warmup_epochs and not run["clusterings"]:
            run["clusterings"], run["figures"] = e_step(model, train, args, epoch)
        batches.epoch, batches.start = epoch, run["step"]
        m_step(ddp, optimizer, scaler, views, run, args, log, save_run)
        figures = dict(epoch=epoch + 1, step=(epoch + 1) * run["steps"], **run["figures"])
        if monitored and ((epoch + 1) % args.knn_every == 0 or epoch + 1 == args.epochs):
            figures["knn"] = monitor()
        log.write(figures)
        run.update(epoch=epoch + 1, step=0, clusterings=[], figures={})
        if args.keep_every and run["epoch"] % args.keep_every == 0:
            save_run(f"checkpoint_{run['epoch']:04d}.pth")
        if dist.get_rank() == 0:
            backbone = builder.read_backbone(model.state_dict())
            save(args.output / "backbone.pth", {name: value.cpu() for name, value in backbone.items()})
        save_run()  # last: a run that is killed before it does all of this again
    log.close()


# ------------------------------------------------------------------------------------------------------------- E-step


def e_step(model, train, args, epoch):
    """Embed every training image, cluster the embeddings, and look at what the clusters are like.

    Returns the clusterings, each (assignments (n,) long, prototypes (P, C) unit rows, concentration (P,)), and a dict of
    figures. The same on every process; the clusterings are spread over them. Assignments stay on the CPU, as the indices of
    a batch do: the number of prototypes that a batch touches is then known without waiting for the device.
    """
    start = time.time()
    model.share_running_statistics()
    v, _ = embed(model.encoder_k, train, args)
    v = F.normalize(builder.gather(v)[:len(train)], dim=1)  # embeddings of all images: nxC
    if not v.isfinite().all():
        raise FloatingPointError(f"epoch {epoch + 1}: the embeddings are not finite, the run has diverged; resume the last "
                                 f"checkpoint with a lower --lr")
    embedded = time.time()
    mine = {m: kmeans(v, size, loader.key(args.seed, epoch, "k-means", m), args) for m, size in enumerate(args.num_clusters)
            if m % dist.get_world_size() == dist.get_rank()}
    clusterings, objectives, each = [], [], []
    for m, size in enumerate(args.num_clusters):
        result = mine.get(m) or (torch.empty(len(v), dtype=torch.long, device=v.device), v.new_empty(size, args.dim),
                                 v.new_empty(size), v.new_empty((), dtype=torch.float64))
        for part in result:
            dist.broadcast(part, src=m % dist.get_world_size())
        assignments, prototypes, phi, objective = result
        clusterings.append((assignments.cpu(), prototypes, phi))
        objectives.append(objective.item())
        each.append(coagulation(v, assignments, prototypes))
    clustered = time.time()
    figures = {name: [figure[name] for figure in each] for name in each[0]}
    figures.update(effective_rank=effective_rank(v), kmeans_objective=objectives, seconds_embed=embedded - start,
                   seconds_kmeans=clustered - embedded)
    return clusterings, figures


def kmeans(v, num_clusters, seed, args):
    """k-means of v (n, C) by faiss, on this process's GPU where faiss sees one.

    Returns assignments (n,) long, the unit-normalised centroids (P, C), concentration (P,), and the objective: the sum of
    squared distances to the centroids.
    """
    x = v.cpu().numpy()
    clustering = faiss.Clustering(x.shape[1], num_clusters)
    clustering.niter, clustering.nredo, clustering.seed = args.kmeans_iters, args.kmeans_restarts, seed % 2 ** 31
    spread = args.kmeans_init == "spread" or args.kmeans_init == "auto" and num_clusters <= 4096  # its cost grows with P^2
    clustering.init_method = faiss.ClusteringInitMethod_AFK_MC2 if spread else faiss.ClusteringInitMethod_RANDOM
    clustering.min_points_per_centroid, clustering.max_points_per_centroid = 1, 1000  # PCL's; more points are subsampled
    if args.device.type == "cuda" and faiss.get_num_gpus() > 0:
        torch.cuda.empty_cache()  # faiss allocates beside torch
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), args.device.index, faiss.IndexFlatL2(x.shape[1]))
    else:
        index = faiss.IndexFlatL2(x.shape[1])
    clustering.train(x, index)
    squared, assignments = (torch.from_numpy(part[:, 0]).to(v.device) for part in index.search(x, 1))
    centroids = torch.from_numpy(faiss.vector_to_array(clustering.centroids).reshape(num_clusters, -1)).to(v.device)
    phi = losses.concentration(squared.clamp(min=0).sqrt(), assignments, num_clusters, args.temperature)
    return assignments, F.normalize(centroids, dim=1), phi, squared.double().sum()


def coagulation(v, assignments, prototypes):
    """How far the embeddings v (n, C) have collapsed onto their prototypes (P, C).

    diversity: mean squared distance of two members, over prototypes with two or more; separation: of two prototypes;
    balance: entropy of the prototypes' sizes / log P; empty: prototypes with no member.
    """
    num_prototypes = len(prototypes)
    size = torch.bincount(assignments, minlength=num_prototypes)
    mean = torch.zeros_like(prototypes).index_add_(0, assignments, v) / size.clamp(min=1)[:, None]
    spread = 2 * size / (size - 1) * (1 - mean.square().sum(1))
    share = size / len(v)
    return dict(
        diversity=spread[size > 1].mean().item() if (size > 1).any() else 0.0,
        separation=(2 * (num_prototypes ** 2 - prototypes.sum(0).square().sum())
                    / (num_prototypes * (num_prototypes - 1))).item(),
        balance=(torch.special.entr(share).sum() / math.log(num_prototypes)).item(),
        empty=int((size == 0).sum()))


def effective_rank(v):
    """RankMe (arXiv 2210.02885): exp of the entropy of the normalised singular values of v (n, C), centred, evenly thinned
    to at most 10,000 rows."""
    v = v[::-(-len(v) // 10_000)].double()
    values = torch.linalg.svdvals(v - v.mean(0))
    return torch.special.entr(values / values.sum().clamp(min=1e-12)).sum().exp().item()


@torch.inference_mode()
def embed(encoder, data, args):
    """Centre crops through the encoder in eval mode: this process's shard of the embeddings, float32, and its labels.

    Returns (s, C) and (s,), with the same s = ceil(n / processes) everywhere: rows past the shard's end are zero and -1.
    `builder.gather(x)[:n]` is then all n images, each once, in order.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    training, start, rows = encoder.training, 0, -(-len(data) // world_size)
    encoder.eval()
    dim = encoder(torch.zeros(1, 3, args.crop_size, args.crop_size, device=args.device)).shape[1]
    v, labels = torch.zeros(rows, dim, device=args.device), torch.full((rows,), -1, device=args.device)
    for image, label in loader.evaluation(data, args.crop_size, args.device, EVALUATION_BATCH, rank, world_size, args.workers):
        with autocast(args):
            v[start:start + len(image)] = encoder(image).float()
        labels[start:start + len(image)] = label.to(args.device, non_blocking=True)
        start += len(image)
    encoder.train(training)
    return v, labels


@torch.inference_mode()
def knn(backbone, train, val, args, k=20, temperature=0.07):
    """Top-1 in percent of the weighted k-nearest-neighbour classifier (arXiv 1805.01978) on the backbone's features.

    Neighbours are training images by cosine, with votes exp(cosine / temperature). Each process searches its own shard.
    """
    bank, bank_labels = embed(backbone, train, args)
    queries, labels = embed(backbone, val, args)
    F.normalize(bank, dim=1, out=bank)  # ImageNet's takes 10 GB
    queries, labels = builder.gather(F.normalize(queries, dim=1))[:len(val)], builder.gather(labels)[:len(val)]
    near, near_labels = [], []
    for part in queries.split(256):
        cosine, index = (part @ bank.T).masked_fill_(bank_labels < 0, -math.inf).topk(min(k, len(bank)), dim=1)
        near.append(cosine)
        near_labels.append(bank_labels[index])
    world_size = dist.get_world_size()
    near, near_labels = (torch.cat(builder.gather(torch.cat(x)).chunk(world_size), dim=1) for x in (near, near_labels))
    cosine, index = near.topk(min(k, near.shape[1]), dim=1)  # the nearest of all processes' nearest: n_val x k
    votes = torch.zeros(len(val), train.num_classes, device=cosine.device)
    votes.scatter_add_(1, near_labels.gather(1, index).clamp(min=0), (cosine / temperature).exp())
    return 100 * (votes.argmax(1) == labels).double().mean().item()


# ------------------------------------------------------------------------------------------------------------- M-step


def m_step(ddp, optimizer, scaler, views, run, args, log, save_run):
    """The rest of the run's epoch: for each batch momentum update, keys, queries, loss, backward, optimizer, enqueue."""
    model, epoch = ddp.module, run["epoch"]
    model.train()
    for step, (im_q, im_k, index, _), report in steps(views, run, args, log, save_run):
        report["lr"] = optimizer.param_groups[0]["lr"] = learning_rate(epoch + step / run["steps"], args)
        permutation = torch.randperm(args.batch_size, generator=generator("cpu", args.seed, epoch, step, "shuffle"))
        with autocast(args):
            q, k = ddp(im_q, im_k, permutation.to(args.device, non_blocking=True))
        keys = min((epoch * run["steps"] + step) * args.batch_size, args.queue_size)  # that the queue holds by now
        loss, terms = pauc(q, k, index, model.queue[:, :keys], run["clusterings"], args, epoch, step)
        report.update(mean_over_processes({"loss": loss, **terms}, run, args))  # waits; the backward is not waited for
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        model.enqueue(k)


def pauc(q, k, index, queue, clusterings, args, epoch, step):
    """The loss: L_ins + mean over clusterings [L_proto + w_a L_align + w_u L_uniform + w_c L_corr], and its terms by name.

    q: (n, C) queries of this process, k: (N, C) keys of all, index: (N,) of their images in the data set. L_ins is over this
    process's rows; the others are over the whole batch, the same on every process. What is in `terms` is logged.
    """
    n, rank = len(q), dist.get_rank()
    terms = dict(zip(("loss_ins", "acc_ins"), losses.info_nce(q, k[rank * n:(rank + 1) * n], queue, args.temperature)))
    if clusterings:
        q = builder.gather_with_gradient(q)  # the whole batch: NxC
        each = [prototype_terms(q, k, assignments[index], prototypes, concentration, args,
                                generator(args.device, args.seed, epoch, step, m))
                for m, (assignments, prototypes, concentration) in enumerate(clusterings)]
        terms |= {name: sum(clustering[name] for clustering in each) / len(each) for name in each[0]}
    weights = dict(loss_ins=1, loss_proto=1, loss_align=args.align, loss_uniform=args.uniform, loss_corr=args.corr)
    return sum(weights[name] * term for name, term in terms.items() if name in weights), terms


def prototype_terms(q, k, assignments, prototypes, concentration, args, negatives):
    """What one clustering adds for the whole batch, by name; a term of weight 0 is left out. A new term goes here."""
    terms = dict(zip(("loss_proto", "acc_proto"), losses.proto_nce(q, prototypes, concentration, assignments,
                                                                   args.num_negatives, negatives)))
    p, _ = losses.prototype_features(q, assignments)
    p_positive, _ = losses.prototype_features(k, assignments)
    if args.align:
        terms["loss_align"] = losses.alignment(p, p_positive, args.align_alpha)
    if args.uniform:
        terms["loss_uniform"] = losses.uniformity(p, args.uniform_t)
    if args.corr:
        terms["loss_corr"] = losses.correlation(p, p_positive, args.corr_lambda)
    terms["images_per_prototype"] = q.new_full((), len(q) / len(p))  # unlike new_tensor it does not wait
    return terms


def generator(device, *parts):
    return torch.Generator(device).manual_seed(loader.key(*parts))


def learning_rate(epoch, args):
    """At a fractional epoch: a half cosine to 0, or a tenth at each epoch of --schedule."""
    if args.schedule:
        return args.lr * 0.1 ** sum(epoch >= milestone for milestone in args.schedule)
    return args.lr * 0.5 * (1 + math.cos(math.pi * epoch / args.epochs))


# ---------------------------------------------------------------------------------------- fitting the data, resuming


def fit(args, num_images):
    """Fit batch, queue and clusters to the data set where they are defaults; refuse what was asked for and does not fit."""
    defaults = DEFAULTS[args.dataset]
    fit_batch(args, num_images, defaults["batch_size"])
    args.queue_size = fitted("--queue-size", args.queue_size, defaults["queue_size"], num_images)
    if args.num_clusters is None:
        args.num_clusters = sorted({max(2, num_images // images) for images in IMAGES_PER_PROTOTYPE})
    elif args.num_clusters == [0]:
        args.num_clusters = []
    for size in args.num_clusters:
        if not 2 <= size <= num_images:
            raise ValueError(f"--num-clusters {size}: give 0 alone for no clustering, or sizes from 2 to {num_images}, the "
                             f"number of training images")
    if args.num_clusters and args.warmup_epochs >= args.epochs and dist.get_rank() == 0:
        print(f"--warmup-epochs {args.warmup_epochs} leaves no epoch for prototypes: InfoNCE alone", flush=True)


def fit_batch(args, num_images, default):
    groups = bn_groups(args)
    if args.batch_size is None and default % groups and dist.get_rank() == 0:
        print(f"--batch-size {default // groups * groups}, not {default}: fitted to {groups} groups", flush=True)
    default = default // groups * groups
    args.batch_size = fitted("--batch-size", args.batch_size, default, num_images // groups * groups)
    if args.batch_size % groups or args.batch_size < 2 * groups:
        raise ValueError(f"--batch-size {args.batch_size}: is split over {groups} groups (processes x --bn-splits), which must "
                         f"have the same number of images, two or more; {max(2, args.batch_size // groups) * groups} works")


def fitted(name, asked, default, largest):
    if asked is not None and asked > largest:
        raise ValueError(f"{name} {asked}: more than the data set's images; the largest that works is {largest}")
    if asked is None and default > largest and dist.get_rank() == 0:
        print(f"{name} {largest}, not {default}: fitted to the number of images", flush=True)
    return min(default, largest) if asked is None else asked


# A resumed run must be the same model on the same data, in the same batches.
FIXED = "dataset", "arch", "crop_size", "mlp", "dim", "queue_size", "batch_size", "num_clusters"
FREE = ("output", "resume", "workers", "device", "nproc", "world_size", "rank", "dist_url", "print_every", "save_every",
        "keep_every", "knn_every", "bn_splits")


def open_output(args, num_images, fixed=FIXED):
    """Make OUTPUT a folder that can be written, and read the checkpoint to go on from: None for a fresh start."""
    args.output.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=args.output).close()  # can it be written?
    own = args.output / "checkpoint.pth"
    in_use = own.exists() or own.with_suffix(".prev.pth").exists()
    path = own if args.resume in (None, "auto") else Path(args.resume)
    if in_use and (not args.resume or path.resolve().parent != args.output.resolve()):
        raise ValueError(f"--output {args.output}: already holds a checkpoint; go on from it with --resume auto, or give "
                         f"another --output")
    checkpoint = load_or_previous(path, own) if args.resume and (in_use or args.resume != "auto") else None
    position = [checkpoint.get(name, 0) for name in ("epoch", "step")] if isinstance(checkpoint, dict) else [-1, -1]
    if len(builder.gather(torch.tensor([position], device=args.device)).unique(dim=0)) > 1:
        raise ValueError(f"--output {args.output}: the processes found different checkpoints there; name a folder that all "
                         f"nodes share")
    if not args.resume or args.resume == "auto" and not in_use:
        return None
    if not isinstance(checkpoint, dict) or not {"state_dict", "optimizer", "args", "num_images"} <= checkpoint.keys():
        raise ValueError(f"--resume {path}: not a checkpoint of this script")
    now, then = plain(args), checkpoint["args"]
    changed = {name: f"{flag(name, then.get(name))} (now {now[name]})" for name in now if now[name] != then.get(name)}
    if any(name in changed for name in fixed):
        raise ValueError(f"--resume {path}: was made with {', '.join(changed[name] for name in fixed if name in changed)}; "
                         f"resume it with the same")
    if checkpoint["num_images"] != num_images:
        raise ValueError(f"--resume {path}: was made on {checkpoint['num_images']} images, and these are {num_images}")
    told = [changed[name] for name in changed if name not in FREE]
    if told and dist.get_rank() == 0:
        print(f"resumed with other flags than {', '.join(told)}", flush=True)
    if hasattr(args, "bn_splits") and checkpoint["bn_groups"] != bn_groups(args) and dist.get_rank() == 0:
        print(f"resumed with BN over {bn_groups(args)} groups of the batch (processes x --bn-splits), not "
              f"{checkpoint['bn_groups']}: no longer the same computation", flush=True)
    return checkpoint


def bn_groups(args):
    return dist.get_world_size() * getattr(args, "bn_splits", 1)


def flag(name, value):
    return f"--{name.replace('_', '-')} {value}"


def plain(args):
    """The flags as plain types, which a checkpoint may hold."""
    return {name: value if isinstance(value, (int, float, str, list, type(None))) else str(value)
            for name, value in vars(args).items()}


def summary(args, train, val):
    clusters = " ".join(map(str, args.num_clusters)) or "none (MoCo)"
    slow = ", k-means on the CPU: faiss sees no GPU" if args.device.type == "cuda" and not faiss.get_num_gpus() else ""
    return "\n".join((
        f"data    {args.dataset}, {len(train)} images" + (f", {len(val)} for the kNN monitor" if val is not None else ""),
        f"model   {args.arch} at {args.crop_size} px, {args.dim} dimensions, queue {args.queue_size}, "
        f"momentum {args.moco_m}, prototypes {clusters}",
        f"train   {args.epochs} epochs ({args.warmup_epochs} of warm-up) of {len(train) // args.batch_size} steps of "
        f"{args.batch_size} images, lr {args.lr}, weights {args.align} {args.uniform} {args.corr}, seed {args.seed}",
        f"on      {dist.get_world_size()} x {args.device.type}, amp {args.amp}, {args.workers} workers each, "
        f"to {args.output}{slow}"))


# -------------------------------------------------------------------------------- what both scripts need: arguments


def checked(kind, test, what):
    def parse(text):
        value = kind(text)
        if not test(value):
            raise argparse.ArgumentTypeError(f"must be {what}, not {text}")
        return value
    parse.__name__ = kind.__name__  # argparse says it where the text is no number
    return parse


def positive(kind):
    return checked(kind, lambda value: 0 < value < math.inf, "a positive number")


natural = checked(int, lambda value: value >= 0, "0 or more")
natural_float = checked(float, lambda value: 0 <= value < math.inf, "0 or more")
fraction = checked(float, lambda value: 0 <= value < 1, "from 0 to under 1")
share = checked(float, lambda value: 0 < value <= 1, "over 0 and up to 1")


# -------------------------------------------------------------------------------- data


def open_data(args):
    """The training set and the validation set or None. On each node one process goes first, and downloads if need be."""
    if args.local_rank > 0:
        dist.barrier()
    train, val = (loader.load(args.dataset, args.dir, split, args.classes, args.device) for split in ("train", "val"))
    if args.local_rank == 0:
        dist.barrier()
    if val is not None:
        val.statistics = train.statistics
    return train, val


def autocast(args):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[args.amp]
    return torch.autocast(args.device.type, dtype, enabled=dtype is not None)


# -------------------------------------------------------------------------------- steps


def steps(views, run, args, log, save_run):
    """The rest of the run's epoch: yields each step, its batch, and a dict for what the step reports."""
    clock, counted = time.time(), 0
    with deferred_signals(), log.bar(f"epoch {run['epoch'] + 1}/{args.epochs}", run["step"], run["steps"]) as bar:
        for step, batch in enumerate(views, run["step"]):
            report = {}
            yield step, batch, report
            run["step"], counted = step + 1, counted + 1
            bar.update()
            total = run["epoch"] * run["steps"] + run["step"]
            if total % args.print_every == 0:
                speed, clock, counted = counted * args.batch_size / (time.time() - clock), time.time(), 0
                log.write(dict(epoch=run["epoch"] + 1, step=total, **report, images_per_s=speed), bar)
            last = run["step"] == run["steps"]  # what follows is no longer lost by a signal
            if stop.agreed or last or args.save_every and total % args.save_every == 0:
                save_run()
            if stop.agreed:
                if log.speaks:
                    print(f"stopped by {signal.Signals(stop.agreed).name} after step {total}, and saved: --resume auto goes on")
                raise Stopped(stop.agreed)


def mean_over_processes(terms, run, args):
    """{name: 0-dim tensor} -> {name: float}, their means: one collective, and the step's one wait for the device (fp16's
    scaler has another).

    The processes also agree here whether a signal ends the run after this step. Raises FloatingPointError where a mean is
    not finite; call it before the backward, which then runs while the next batch is prepared.
    """
    values = torch.stack([term.detach().float() for term in terms.values()])
    values = torch.cat([values, values.new_full((1,), float(stop.caught))])
    dist.all_reduce(values)
    *values, caught = (values / dist.get_world_size()).tolist()
    means = dict(zip(terms, values))
    if caught:  # by one process or more
        number = torch.tensor(stop.caught, device=args.device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        stop.caught = stop.agreed = int(number)
    if not all(map(math.isfinite, means.values())):
        raise FloatingPointError(f"epoch {run['epoch'] + 1}, step {run['step'] + 1}: the loss is not finite; the last "
                                 f"checkpoint in {args.output} is good, resume it with a lower --lr or --amp off")
    return means


# -------------------------------------------------------------------------------- launch


class UsageError(Exception):
    """What the user asked for cannot be: one line, exit status 2."""


KNOWN = UsageError, OSError, FloatingPointError  # whose message says all that there is to say


@contextmanager
def usage_errors():
    """ValueErrors in here, while a run is set up, are the user's to mend."""
    try:
        yield
    except ValueError as error:
        raise UsageError(error) from None


def launch(worker, args):
    """Run worker(args) in every process of the job, each with `local_rank`, `device` and a process group.

    Under torchrun this is one of them. Else it starts them, one on every GPU or --nproc, and waits; one alone runs here.
    Ends the interpreter with the job's status: 2 for usage, 1 for other failures, 128 + the signal's number for SIGTERM and
    SIGINT, 0 for SIGUSR1.
    """
    try:
        cuda = args.device != "cpu" and torch.cuda.is_available()
        if args.device == "cuda" and not cuda:
            raise UsageError("--device cuda: torch sees no GPU here; use --device cpu")
        if "TORCHELASTIC_RUN_ID" in os.environ:
            store, rank, world_size = next(dist.rendezvous("env://"))
            store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)  # it outlives a restart
            return run(int(os.environ["LOCAL_RANK"]), worker, args, cuda, int(os.environ["LOCAL_WORLD_SIZE"]),
                       dict(store=store, rank=rank, world_size=world_size), None)
        nproc = args.nproc or (torch.cuda.device_count() if cuda else 1)
        if cuda and nproc > torch.cuda.device_count():
            raise UsageError(f"--nproc {nproc}: the largest that works here is {torch.cuda.device_count()}, one for each GPU")
        if args.world_size > 1 and not (args.dist_url or "").startswith("tcp://"):
            raise UsageError("--world-size: several nodes need --dist-url tcp://HOST:PORT, with the host of node 0")
        if args.rank >= args.world_size:
            raise UsageError(f"--rank {args.rank}: of {args.world_size} nodes, the last is {args.world_size - 1}")
    except UsageError as error:
        fail(error)
    with tempfile.TemporaryDirectory(prefix="pauc-") as meeting:
        url = args.dist_url if args.world_size > 1 else f"file://{meeting}/store"  # one node meets in a file: no open port
        if args.world_size == 1 and "lo" in (name for _, name in socket.if_nameindex()):
            for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                os.environ.setdefault(variable, "lo")
        group = dict(init_method=url, rank=args.rank * nproc, world_size=args.world_size * nproc)
        if nproc == 1:
            run(0, worker, args, cuda, nproc, group, meeting)
        else:
            job = mp.start_processes(run, (worker, args, cuda, nproc, group, meeting), nproc, join=False)
            supervise(job.processes, meeting)


def supervise(processes, meeting):
    """Wait for the processes of this node, hand signals on to them, and end with all of them when one has failed."""
    stop.caught = 0

    def hand_on(number, _):
        if number == signal.SIGINT and stop.caught in (signal.SIGINT, signal.SIGKILL):  # not the first
            number = signal.SIGKILL
        stop.caught = number
        for process in processes:
            if process.exitcode is None:
                os.kill(process.pid, number)

    with signal_handlers(hand_on):
        while (running := [p.sentinel for p in processes if p.exitcode is None]) and not any(p.exitcode for p in processes):
            connection.wait(running)
        killed = [(i, p.exitcode) for i, p in enumerate(processes) if (p.exitcode or 0) < 0 and -p.exitcode != stop.caught]
        if killed:
            speak(ChildProcessError(f"process {killed[0][0]} was ended by {signal.Signals(-killed[0][1]).name}"), meeting)
        until = time.time() + 10
        for process in processes:  # those that are left end by themselves, unless they wait for the one that is dead
            process.join(max(0, until - time.time()))
            process.kill()
            process.join()
    status = 1 if killed else max(process.exitcode for process in processes)
    if stop.caught and status <= 0:  # it ended them before they could handle it, or as they were done
        status = 128 + (signal.SIGINT if stop.caught == signal.SIGKILL else stop.caught)
    if status:
        sys.exit(0 if status == 128 + signal.SIGUSR1 else status)


def run(local_rank, worker, args, cuda, nproc, group, meeting):
    """One process of the job."""
    args.local_rank, args.device = local_rank, torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if args.workers is None:
        args.workers = min(16, cores // nproc) if cuda else 0  # on the CPU they would only share the cores
    if cuda:
        torch.cuda.set_device(args.device)
        torch.backends.cudnn.benchmark = True
    elif nproc > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores // nproc))
        faiss.omp_set_num_threads(max(1, cores // nproc))
    if args.amp == "auto":
        args.amp = "bf16" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "off"
    if meeting:
        group["rank"] += local_rank
    stop.caught = stop.agreed = 0
    stop.deferred, stop.alone = False, meeting and nproc == 1
    with signal_handlers(on_signal):
        try:
            # Others wait in a collective while one process clusters or downloads; a dead one is noticed without this.
            dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=3), **group)
            worker(args)
            dist.destroy_process_group()
        except (Stopped, Exception) as error:
            traceback.clear_frames(error.__traceback__)  # the data workers end with the loader that they belong to
            stop.deferred = True  # a signal has nothing left to end
            error = dead_worker(error) or error
            if nproc > 1 and not isinstance(error, (Stopped, *KNOWN)):
                time.sleep(2)  # most likely another process has died, and can say of what
            if stop.caught and not isinstance(error, KNOWN):
                if stop.agreed:
                    dist.destroy_process_group()
                elif group["rank"] == 0:
                    print(f"stopped by {signal.Signals(stop.caught).name}"
                          + ": --resume auto goes on from the last checkpoint" * (args.output / "checkpoint.pth").exists())
                spawned = meeting and nproc > 1  # there status 0 would say that this process has done its work
                sys.exit(0 if stop.caught == signal.SIGUSR1 and not spawned else 128 + stop.caught)
            fail(error, meeting)


def dead_worker(error):
    """The death of a data worker is told by an error in whatever the process was doing, and may have led to others."""
    while error and not str(error).startswith("DataLoader worker"):
        error = error.__context__
    return error and ChildProcessError(str(error))


def fail(error, meeting=None):
    speak(error, meeting)
    sys.exit(2 if isinstance(error, UsageError) else 1)


def speak(error, meeting=None):
    """Say what is wrong: in one line, with a traceback before it if it is a fault of the program. Of several processes that
    `meeting` brought together the first alone speaks."""
    try:
        if meeting:
            os.close(os.open(Path(meeting) / "failed", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    if not isinstance(error, KNOWN):
        traceback.print_exception(error)
    message = (str(error).strip() or type(error).__name__).splitlines()[-1]  # a data worker's comes with its traceback
    message = message.removeprefix("OSError: ")
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)


# -------------------------------------------------------------------------------- signals

# The signal that this process has caught, and the one that all of them know of and end by. While steps are made a signal
# waits for the step's end; elsewhere it ends the process at once, since the last checkpoint is as good as a new one.
stop = types.SimpleNamespace(caught=0, agreed=0, deferred=False, alone=True)


class Stopped(BaseException):
    """A signal ends the run."""


def on_signal(number, _):
    stop.caught = number
    if number == signal.SIGINT and stop.alone:  # of several, each gets the terminal's and their parent's
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
    if not stop.deferred:
        stop.deferred = True  # one is enough
        raise Stopped(number)


@contextmanager
def signal_handlers(handler):
    """SIGTERM, SIGINT and SIGUSR1, which schedulers and people send, go to the handler in here."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, function in before.items():
            signal.signal(number, function)


@contextmanager
def deferred_signals():
    stop.deferred = True
    try:
        yield
    finally:
        stop.deferred = bool(stop.caught)
    if stop.caught:
        raise Stopped(stop.caught)


# -------------------------------------------------------------------------------- checkpoints, log


def save_checkpoint(args, run, model, optimizer, log, name="checkpoint.pth", **more):
    """Process 0 writes all that a resumed run needs; random numbers are keyed, so there is no generator to save."""
    if not torch.stack([parameter.isfinite().all() for parameter in model.parameters()]).all():
        raise FloatingPointError(f"epoch {run['epoch'] + 1}: the weights are not finite and were not saved; the last "
                                 f"checkpoint in {args.output} is good, resume it with a lower --lr or --amp off")
    if dist.get_rank() == 0:
        save(args.output / name, dict(run, arch=args.arch, state_dict=model.state_dict(), optimizer=optimizer.state_dict(),
                                      args=plain(args), bn_groups=bn_groups(args), log_size=log.mark(), **more))
    dist.barrier()


def save(path, state):
    """Write a file whole or not at all: aside, flushed, renamed. The checkpoint before stays as checkpoint.prev.pth."""
    new = path.with_suffix(".new")
    try:
        with open(new, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if path.name == "checkpoint.pth" and path.exists():
            os.replace(path, path.with_suffix(".prev.pth"))
        os.replace(new, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the renames, too, are to outlive a power cut
        os.close(folder)
    except (OSError, RuntimeError) as error:
        new.unlink(missing_ok=True)
        raise OSError(f"{path}: cannot be written ({error}); the checkpoint before it is as it was") from None


def load(path):
    """What is in a checkpoint file, as data alone: nothing in it can run."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():  # torch.load takes flipped bytes in silence
                    raise zipfile.BadZipFile("a part's checksum is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such checkpoint") from None
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise OSError(f"{path}: not a whole checkpoint ({str(error).splitlines()[0]})") from None


def load_or_previous(path, own):
    """What is in a checkpoint file, or in the one before it where this one is damaged or was about to be replaced. This run's
    own is then moved out of the way, lest it become the one before."""
    previous = path.with_suffix(".prev.pth")
    try:
        return load(path)
    except OSError as error:
        if not previous.exists():
            raise
        checkpoint = load(previous)
        if dist.get_rank() == 0:
            print(f"{error}; taking {previous}, the one before", flush=True)
            if path == own and path.exists():
                os.replace(path, path.with_suffix(".damaged.pth"))
        return checkpoint


class Log:
    """Reports of process 0: one JSON line each in OUTPUT/log.jsonl, TensorBoard in OUTPUT, and the terminal."""

    def __init__(self, args, checkpoint):
        self.speaks = dist.get_rank() == 0
        self.terminal = self.speaks and sys.stdout.isatty()
        if self.speaks:
            from torch.utils.tensorboard import SummaryWriter
            self.file = open(args.output / "log.jsonl", "a+b")
            # What came after the checkpoint is about to happen again.
            self.file.truncate(min(self.file.seek(0, os.SEEK_END), checkpoint["log_size"] if checkpoint else 0))
            self.board = SummaryWriter(args.output, purge_step=checkpoint["epoch"] * checkpoint["steps"] + checkpoint["step"] + 1
                                       if checkpoint else 0)

    def mark(self):
        """Write out all that was reported, and return the log's size, to which a resumed run cuts it."""
        self.board.flush()
        return self.file.seek(0, os.SEEK_END)

    def write(self, record, bar=None):
        if not self.speaks:
            return
        self.file.write(json.dumps(record).encode() + b"\n")
        self.file.flush()
        for name, value in record.items():
            for i, part in enumerate(value if isinstance(value, list) else [value]):
                self.board.add_scalar(f"{name}/{i}" if isinstance(value, list) else name, part, record["step"])
        text = "  ".join(f"{name} {' '.join(f'{part:.4g}' for part in (value if isinstance(value, list) else [value]))}"
                         for name, value in record.items())
        if self.terminal and bar is not None:
            bar.set_postfix_str(text)
        else:
            tqdm.write(text)

    def bar(self, title, start, total):
        return tqdm(desc=title, initial=start, total=total, disable=not self.terminal, file=sys.stdout, leave=False,
                    dynamic_ncols=True)

    def close(self):
        if self.speaks:
            self.file.close()
            self.board.close()


if __name__ == "__main__":
    main()
