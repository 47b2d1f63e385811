"""PAUC: self-supervised pre-training of an image encoder (arXiv 2210.10194).

    python pretrain.py                                     # scikit-learn's digits, on any machine
    python pretrain.py --dataset cifar10                   # one process on every visible GPU
    python pretrain.py IMAGENET --nproc 8                  # an image folder, one node of 8 GPUs
    python pretrain.py IMAGENET --nproc 8 --world-size 2 --rank 0 --dist-url tcp://node0:23456
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node0:23456 \
        pretrain.py IMAGENET                               # or so, the same on every node
    python pretrain.py --align 0 --uniform 0 --corr 0      # PCL
    python pretrain.py --num-clusters 0                    # MoCo v2
"""
import argparse
import fcntl
import json
import math
import os
import pickle
import re
import signal
import socket
import sys
import tempfile
import time
import traceback
import uuid
import warnings
import zipfile
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import connection
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
from loader import FileError, UsageError

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
IMAGES_PER_PROCESS = 32  # of a batch, at least, where the number of processes is not asked for
EVALUATION_BATCH, EVALUATION_BATCH_OF_FILES = 512, 64  # files wait in shared memory
SPREAD_UP_TO = 4096  # prototypes; the cost of centroids far apart grows with their square
NEIGHBOURS = 20  # of the kNN monitor
DROP = 0.1  # of the learning rate at each epoch of --schedule
LEAST_SCALE = 2 ** -14  # of fp16's losses: every step that is skipped halves it, from 2 ** 16
DAY = timedelta(days=1)


# -------------------------------------------------------------------------------------- arguments


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
part = checked(float, lambda value: 0 < value <= 1, "over 0 and up to 1")
bits = checked(int, lambda value: 8 <= value <= 16, "from 8 to 16")
power = checked(float, lambda value: 1 <= value < math.inf, "1 or more")


def sizes(text):
    """One or, as in PCL, several with commas between them."""
    return [natural(size) for size in text.split(",")]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="PAUC pre-training", allow_abbrev=False)
    add = parser.add_argument
    add("dir", nargs="?", metavar="DIR",
        help="image folder, or where torchvision's data sets are (default: data)")
    add("--aug", choices=("v1", "v2"), default="v2", help="MoCo's augmentation")
    add("--min-scale", type=part, help="least part of an image in a random crop (default: 0.2)")
    add("--crop-size", type=positive(int), help="pixels; under 64 no blur and a small-image stem")
    add("--mlp", action=argparse.BooleanOptionalAction, default=True, help="MoCo v2's head")
    add("--dim", "--moco-dim", "--low-dim", type=positive(int), default=128, help="of embeddings")
    add("--queue-size", "--moco-k", type=positive(int), help="keys in the queue")
    add("--moco-m", type=fraction, help="momentum of the key encoder")
    add("--temperature", "--moco-t", type=positive(float),
        help="of InfoNCE, and the mean concentration (default: 0.2)")
    add("--bn-splits", type=positive(int), default=1,
        help="slices of each process's batch with BN of their own")
    add("--warmup-epochs", "--warmup-epoch", type=natural, help="epochs of InfoNCE alone")
    add("--num-clusters", "--num-cluster", type=sizes, nargs="+", metavar="P",
        help="prototypes of each clustering; 0: MoCo (default: 50, 25 and 12 images a prototype)")
    add("--num-negatives", "--pcl-r", type=natural, default=16384, help="of ProtoNCE")
    add("--kmeans-iters", type=positive(int), default=15, help="PCL: 20")
    add("--kmeans-restarts", type=positive(int), default=1, help="PCL: 5")
    add("--kmeans-init", choices=("auto", "spread", "random"), default="auto",
        help="first centroids: images far apart, or any, as in PCL; auto: far apart up to 4096")
    add("--proto", type=natural_float, default=1.0, help="weight of ProtoNCE")
    add("--align", type=natural_float, default=0.3,
        help="weight of alignment: a prototype's means in the two views")
    add("--uniform", type=natural_float, default=0.3,
        help="weight of uniformity: the batch's images")
    add("--corr", type=natural_float, default=0.3,
        help="weight of correlation: the images' deviations from their prototypes")
    add("--align-alpha", type=power, default=2.0)
    add("--uniform-t", type=positive(float), default=2.0)
    add("--corr-lambda", type=natural_float, default=0.3, help="weight of the off-diagonal part")
    add("--init", type=Path, metavar="PATH", help="start from the backbone in a checkpoint")
    add("--knn-every", type=natural, metavar="EPOCHS", help="of the kNN monitor; 0: never")
    add("--keep-every", type=natural, default=0, metavar="EPOCHS", help="keep such checkpoints")
    add("--output", "--exp-dir", type=Path, default=Path("output"))
    add_common(add)
    parser.set_defaults(wd=1e-4)
    args = parser.parse_args(argv)
    if args.num_clusters is not None:
        args.num_clusters = sum(args.num_clusters, [])
    if args.schedule and "--cos" in (args.ignored or ()):
        parser.error("--cos and --schedule: give one of the two")
    args.dataset = args.dataset or ("folder" if args.dir else "digits")
    args.dir = args.dir or "data"
    args.knn_first = args.knn_every is not None or args.dataset != "folder"  # 1.3 million are slow
    for name, value in DEFAULTS[args.dataset].items():
        if name not in ("batch_size", "queue_size") and getattr(args, name) is None:
            setattr(args, name, value)
    return args


# MoCo's and PCL's flags that are the default or have no use here: accepted, and said.
IGNORED = ("--aug-plus", "--cos", "--multiprocessing-distributed")
IGNORED_WITH_VALUE = ("--gpu", "--dist-backend", "--start-epoch")


def add_common(add):
    """The flags of both scripts."""
    add("--dataset", choices=loader.DATASETS, help="default: folder with DIR, digits without")
    add("--classes", metavar="FILE", help="class folders to keep, one a line")
    add("--bits", type=bits, default=16, help="that 16-bit image files use")
    add("--flip", action=argparse.BooleanOptionalAction, help="mirror half of the images "
        "(default: all but digits)")
    add("-a", "--arch", help="a torchvision net that ends in fc")
    add("--epochs", type=positive(int))
    add("-b", "--batch-size", type=positive(int), help="images over all processes")
    add("--lr", "--learning-rate", type=positive(float), help="never scaled by the batch")
    add("--schedule", type=natural, nargs="+", metavar="EPOCH", help="divide lr by 10 there")
    add("--momentum", type=fraction, default=0.9, help="of SGD")
    add("--wd", "--weight-decay", type=natural_float)
    add("--seed", type=natural, default=0)
    add("--device", choices=("auto", "cuda", "cpu"), default="auto")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto")
    add("-j", "--workers", type=natural, help="data workers of each process")
    add("--nproc", type=positive(int), help="processes on this node (default: one on every GPU)")
    add("--world-size", type=positive(int), default=1, metavar="NODES")
    add("--rank", type=natural, default=0, metavar="NODE")
    add("--dist-url", metavar="tcp://HOST:PORT", help="where the nodes meet")
    add("--resume", metavar="PATH", help="a checkpoint to go on from; auto: OUTPUT's, if any")
    add("-p", "--print-every", "--print-freq", type=positive(int), default=10, metavar="STEPS")
    add("--save-every", type=natural, default=0, metavar="STEPS", help="save within epochs too")
    for name in IGNORED:
        add(name, dest="ignored", action="append_const", const=name, help=argparse.SUPPRESS)
    for name in IGNORED_WITH_VALUE:
        add(name, dest="ignored", action="append", metavar=name, type=lambda _, name=name: name,
            help=argparse.SUPPRESS)


# ------------------------------------------------------------------------------------------- main


def main(argv=None):
    args = parse_args(argv)
    launch(main_worker, args, args.batch_size or DEFAULTS[args.dataset]["batch_size"])


def main_worker(args):
    lock(args.output)
    train, val = open_data(args)
    fit(args, len(train))
    log_size, checkpoint = open_output(args, train.digest, len(train))
    torch.manual_seed(args.seed)
    small_images = args.crop_size < loader.SMALL_CROP
    model = builder.MoCo(args.arch, args.dim, args.queue_size, args.moco_m, args.mlp, small_images,
                         args.bn_splits)
    if args.init and not checkpoint:
        load_backbone(model.encoder_q, load(args.init), args.init, args.arch, small_images)
        model.encoder_k.load_state_dict(model.encoder_q.state_dict())  # the heads are new
    model.to(args.device, memory_format=torch.channels_last)
    ddp = DistributedDataParallel(model)
    ddp.broadcast_buffers = False  # BN's are sent where they are used
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), args.lr, momentum=args.momentum,
                                weight_decay=args.wd)
    scaler = torch.amp.GradScaler(args.device.type, enabled=args.amp == "fp16")
    augment = loader.Augment(args.aug, args.crop_size, train.statistics, args.flip)
    batches = loader.Batches(torch.arange(len(train)), args.batch_size, args.seed, dist.get_rank(),
                             dist.get_world_size())
    views = loader.Views(train, batches, augment, args.device, 2, args.min_scale, args.workers)

    # Where the run is: in `epoch`, after `step` of its `steps`, with what its E-step found.
    run = dict(epoch=0, step=0, steps=len(batches), clusterings=[], figures={}, loss=math.nan)
    if checkpoint:
        restore(checkpoint, run, ddp, optimizer, scaler, args)
        run["clusterings"] = [losses.Clustering(assignments, *(x.to(args.device) for x in others))
                              for assignments, *others in run["clusterings"]]
    resumed = bool(checkpoint)
    del checkpoint  # of a ResNet-50, half a gigabyte in every process
    log = Log(args, log_size, run)
    say(summary(args, len(train)))
    monitored = val is not None and args.knn_every > 0

    def save_run(name="checkpoint.pth"):
        state = run | dict(clusterings=[tuple(clustering) for clustering in run["clusterings"]])
        save_checkpoint(args, state, ddp, optimizer, scaler, log, name, digest=train.digest,
                        bn_groups=bn_groups(args))

    def monitor():
        return knn(builder.backbone_of(model.encoder_q), train, val, args)

    if monitored and args.knn_first and not resumed:
        log.epoch(dict(epoch=0, step=0, knn=monitor()), run, args)

    while run["epoch"] < args.epochs:
        start, epoch = time.time(), run["epoch"]
        if args.num_clusters and epoch >= args.warmup_epochs and not run["clusterings"]:
            run["clusterings"], run["figures"] = e_step(model, train, args, epoch)
        m_step(ddp, optimizer, scaler, views, run, args, log, save_run)
        figures = dict(epoch=epoch + 1, step=(epoch + 1) * run["steps"], **run["figures"])
        if monitored and ((epoch + 1) % args.knn_every == 0 or epoch + 1 == args.epochs):
            figures["knn"] = monitor()
        log.epoch(figures | dict(seconds=time.time() - start), run, args)
        run.update(epoch=epoch + 1, step=0, clusterings=[], figures={})
        if args.keep_every and run["epoch"] % args.keep_every == 0:
            save_run(f"checkpoint_{run['epoch']:04d}.pth")
        save_backbone(model.encoder_q, args)
        save_run()  # last: a run that is killed before it does all of this again
    log.close()


# ----------------------------------------------------------------------------------------- E-step


def e_step(model, train, args, epoch):
    """Embed every training image, cluster the embeddings, and look at what the clusters are like.

    Returns a list of losses.Clustering and a dict of figures, the same on every process.
    Assignments stay on the CPU, as the indices of a batch do: the number of prototypes that a batch
    touches is then known without waiting for the device.
    """
    start = time.time()
    v, _ = embed(model.encoder_k, train, args)
    v = F.normalize(builder.gather(v)[:len(train)], dim=1)  # embeddings of all images: nxC
    if not v.isfinite().all():
        raise Diverged(f"epoch {epoch + 1}: the embeddings are not finite", args)
    embedded = time.time()
    clusterings, objectives = cluster(v, args, epoch)
    each = [losses.coagulation(v, one.assignments, one.prototypes) for one in clusterings]
    figures = {name: [figure[name] for figure in each] for name in each[0]}
    figures.update(effective_rank=losses.effective_rank(v), kmeans_objective=objectives,
                   seconds_embed=embedded - start, seconds_kmeans=time.time() - embedded)
    clusterings = [one._replace(assignments=one.assignments.cpu()) for one in clusterings]
    return clusterings, figures


def cluster(v, args, epoch):
    """k-means of v (n, C) for every number of prototypes, shared out to the processes: clusterings
    on the device, and their objectives."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    found = []
    for m, size in enumerate(args.num_clusters):
        if m % world_size == rank:
            found.append(kmeans(v, size, loader.seed_of(args.seed, epoch, "k-means", m), args))
        else:
            assignments = torch.empty(len(v), dtype=torch.long, device=v.device)
            clustering = losses.Clustering(assignments, v.new_empty(size, args.dim),
                                           v.new_empty(size))
            found.append((clustering, v.new_empty((), dtype=torch.float64)))
    for m, (clustering, objective) in enumerate(found):
        for x in (*clustering, objective):
            dist.broadcast(x, src=m % world_size)
    return [clustering for clustering, _ in found], [objective.item() for _, objective in found]


def kmeans(v, num_clusters, seed, args):
    """k-means of v (n, C) by faiss, on this process's GPU where faiss sees one.

    Returns a losses.Clustering on the device of v, and the objective: the sum of squared distances
    to the centroids, 0-dim float64.
    """
    import faiss
    x = v.cpu().numpy()
    solver = faiss.Clustering(x.shape[1], num_clusters)
    solver.niter, solver.nredo = args.kmeans_iters, args.kmeans_restarts
    solver.seed = seed % 2 ** 31
    solver.min_points_per_centroid = 1  # fewer than faiss asks for are no mistake
    solver.max_points_per_centroid = 1000  # PCL's; more points are subsampled
    spread = args.kmeans_init == "spread"
    if args.kmeans_init == "auto":
        spread = num_clusters <= SPREAD_UP_TO
    solver.init_method = (faiss.ClusteringInitMethod_AFK_MC2 if spread
                          else faiss.ClusteringInitMethod_RANDOM)
    index = faiss.IndexFlatL2(x.shape[1])
    if args.device.type == "cuda" and faiss.get_num_gpus() > 0:
        torch.cuda.empty_cache()  # faiss allocates beside torch
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), args.device.index, index)
    elif args.kmeans_threads:
        faiss.omp_set_num_threads(args.kmeans_threads)
    solver.train(x, index)
    squared, assignments = index.search(x, 1)
    squared = torch.from_numpy(squared[:, 0]).to(v.device).clamp(min=0)
    assignments = torch.from_numpy(assignments[:, 0]).to(v.device)
    centroids = faiss.vector_to_array(solver.centroids).reshape(num_clusters, -1)
    prototypes = F.normalize(torch.from_numpy(centroids).to(v.device), dim=1)
    phi = losses.concentration(squared.sqrt(), assignments, num_clusters, args.temperature)
    return losses.Clustering(assignments, prototypes, phi), squared.double().sum()


@torch.inference_mode()
def embed(encoder, data, args):
    """Centre crops through the encoder in eval mode: this process's shard of the embeddings,
    float32, and its labels.

    Returns (s, C) and (s,), with the same s = ceil(n / processes) everywhere: rows past the shard's
    end are zero and -1. `builder.gather(x)[:n]` is then all n images, each once, in order.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    training, start, rows = encoder.training, 0, math.ceil(len(data) / world_size)
    encoder.eval()
    for buffer in encoder.buffers():  # BN's statistics are process 0's
        dist.broadcast(buffer, src=0)
    one = torch.zeros(1, 3, args.crop_size, args.crop_size, device=args.device)
    v = torch.zeros(rows, encoder(one).shape[1], device=args.device)
    labels = torch.full((rows,), -1, device=args.device)
    size = EVALUATION_BATCH if hasattr(data, "images") else EVALUATION_BATCH_OF_FILES
    batches = loader.evaluation(data, args.crop_size, args.device, size, rank, world_size,
                                args.workers)
    for image, label in bar("embedding", 0, math.ceil(rows / size), batches, after=10):
        with autocast(args):
            v[start:start + len(image)] = encoder(image).float()
        labels[start:start + len(image)] = label.to(args.device, non_blocking=True)
        start += len(image)
    encoder.train(training)
    return v, labels


@torch.inference_mode()
def knn(backbone, train, val, args):
    """The kNN monitor: top-1 in percent on val of the backbone's features. Each process searches
    its own shard of the training images."""
    bank, bank_labels = embed(backbone, train, args)
    queries, labels = (builder.gather(x)[:len(val)] for x in embed(backbone, val, args))
    bank = F.normalize(bank, dim=1, out=bank)  # ImageNet's takes 10 GB
    near = nearest(bank, bank_labels, F.normalize(queries, dim=1), NEIGHBOURS)
    near = [torch.cat(builder.gather(x).chunk(dist.get_world_size()), dim=1) for x in near]
    return vote(*near, labels, train.num_classes, NEIGHBOURS)


def nearest(bank, bank_labels, queries, k):
    """The k nearest rows of bank (n, d) to each of queries (m, d), unit rows: cosines and labels,
    both (m, k) or, of a smaller bank, (m, n). Those with a label under 0 are nobody's."""
    found, parts = [], queries.split(256)
    for rows in bar("neighbours", 0, len(parts), parts, after=10):
        cosine = (rows @ bank.T).masked_fill_(bank_labels < 0, -math.inf)
        cosine, index = cosine.topk(min(k, len(bank)), dim=1)
        found.append((cosine, bank_labels[index]))
    return [torch.cat(x) for x in zip(*found)]


def vote(near, near_labels, labels, num_classes, k, temperature=0.07):
    """The weighted k-nearest-neighbour classifier (arXiv 1805.01978), whose votes are proportional
    to exp(cosine / temperature): top-1 in percent. near, near_labels: as `nearest` gives them for
    as many neighbours or more; labels: (m,), the queries' own."""
    cosine, index = near.topk(min(k, near.shape[1]), dim=1)
    weights = ((cosine - cosine[:, :1]) / temperature).exp()  # the nearest has 1
    votes = torch.zeros(len(labels), num_classes, device=near.device)
    votes.scatter_add_(1, near_labels.gather(1, index).clamp(min=0), weights)
    return 100 * (votes.argmax(1) == labels).double().mean().item()


# ----------------------------------------------------------------------------------------- M-step


def m_step(ddp, optimizer, scaler, views, run, args, log, save_run):
    """The rest of the run's epoch: for each batch momentum update, keys, queries, loss, backward,
    optimizer, enqueue."""
    model, epoch, rank = ddp.module, run["epoch"], dist.get_rank()
    model.train()
    with stop.after_a_step(), log.progress(run, args):
        for im_q, im_k, index, _ in views.epoch(epoch, run["step"]):
            step, n = run["step"], len(im_q)
            if not epoch and not step:
                log.pairs(im_q, im_k, views.augment)
            rate = learning_rate(epoch + step / run["steps"], args)
            for group in optimizer.param_groups:
                group["lr"] = rate
            shuffle = generator("cpu", args.seed, epoch, step, "shuffle")
            permutation = torch.randperm(args.batch_size, generator=shuffle)
            with autocast(args):
                q, k = ddp(im_q, im_k, permutation.to(args.device, non_blocking=True))
            rows = slice(rank * n, (rank + 1) * n)
            batch = losses.Batch(builder.gather_with_gradient(q), k, index, model.queue,
                                 model.queue_index, rows, epoch, step)
            loss, figures = pauc(batch, run["clusterings"], args)
            report = read_report(loss, figures, run, args)  # waits for the device
            optimizer.zero_grad()
            scaler.scale(loss).backward()  # is not waited for
            scaler.step(optimizer)
            scaler.update()
            model.enqueue(k, index)
            end_step(report | dict(lr=rate), run, args, log, save_run)


def pauc(batch, clusterings, args):
    """L = L_ins + w_u L_uniform + mean over clusterings [ w_p L_proto + w_a L_align + w_c L_corr ].

    L_ins is over this process's rows; the others are over the whole batch, the same on every
    process, whose gradients GatherWithGradient sums and DDP divides by their number. Returns the
    loss, and figures that are only logged: each term without its weight, by name, and the
    accuracies. A new term is one more `add`: with its weight, or not at all.
    """
    loss, figures, share = 0, {}, 1 / max(1, len(clusterings))

    def log(name, value, share):
        figures[name] = figures.get(name, 0) + share * value.detach()

    def add(name, weight, share, term, *inputs):
        nonlocal loss
        if not weight:
            return
        value = term(*inputs)
        if isinstance(value, tuple):
            value, accuracy = value
            log(f"acc_{name}", accuracy, share)
        loss = loss + share * weight * value
        log(f"loss_{name}", value, share)

    q, k, queue, rows = batch.q, batch.k, batch.queue, batch.rows
    own = batch.index[rows].to(q.device, non_blocking=True)[:, None] == batch.queue_index
    excluded = own | (batch.queue_index == builder.EMPTY)
    add("ins", 1, 1, losses.info_nce, q[rows], k[rows], queue, args.temperature, excluded)
    if clusterings:
        add("uniform", args.uniform, 1, losses.uniformity, q, args.uniform_t)
    for m, (assignments, prototypes, phi) in enumerate(clusterings):
        s = assignments[batch.index]
        negatives = generator(args.device, args.seed, batch.epoch, batch.step, m)
        (p, _), (p_positive, _) = (losses.prototype_features(z, s) for z in (q, k))
        d, d_positive = (losses.deviations(z, prototypes, s) for z in (q, k))
        add("proto", args.proto, share, losses.proto_nce, q, prototypes, phi, s,
            args.num_negatives, negatives)
        add("align", args.align, share, losses.alignment, p, p_positive, args.align_alpha)
        add("corr", args.corr, share, losses.correlation, d, d_positive, args.corr_lambda)
        log("images_per_prototype", q.new_full((), len(q) / len(p)), share)
    return loss, figures


def generator(device, *parts):
    return torch.Generator(device).manual_seed(loader.seed_of(*parts))


def autocast(args):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[args.amp]
    return torch.autocast(args.device.type, dtype, enabled=dtype is not None)


def learning_rate(epoch, args):
    """At a fractional epoch: a half cosine to 0, or a tenth at each epoch of --schedule."""
    if args.schedule:
        return args.lr * steps_down(epoch, args)
    return args.lr * 0.5 * (1 + math.cos(math.pi * epoch / args.epochs))


def steps_down(epoch, args, drop=DROP):
    """The part of a rate that is left after the epochs of --schedule."""
    return drop ** sum(epoch >= milestone for milestone in args.schedule)


def read_report(loss, figures, run, args):
    """The loss and the figures as floats, means over processes: one collective, and the step's one
    wait for the device (fp16's scaler has another).

    The processes also agree here whether a signal ends the run after this step. A loss that is not
    finite raises Diverged. Call it before the backward, which then runs while the next batch is
    prepared.
    """
    values = [loss.detach().float(), *(x.float() for x in figures.values())]
    values.append(values[0].new_full((), stop.caught))
    rows = builder.gather(torch.stack(values)[None]).tolist()  # one of each process
    *columns, caught = zip(*rows)
    if any(caught):  # by one process or more, and now by all
        stop.caught = stop.agreed = int(max(caught))
    report = {name: sum(x) / len(x) for name, x in zip(("loss", *figures), columns)}
    if not math.isfinite(report["loss"]):
        where = f"epoch {run['epoch'] + 1}, step {run['step'] + 1}"
        raise Diverged(f"{where}: the loss is not finite", args)
    return report


def end_step(report, run, args, log, save_run):
    """What follows a step in both scripts: report, save, and stop if a signal asked for it."""
    run["step"] += 1
    run["loss"] = report["loss"]
    total = run["epoch"] * run["steps"] + run["step"]
    log.step(report, run, args)
    last = run["step"] == run["steps"]  # what follows is no longer lost by a signal
    if stop.agreed or last or args.save_every and total % args.save_every == 0:
        save_run()
    if stop.agreed:
        say(f"stopped by {signal.Signals(stop.agreed).name} after step {total}, and saved: "
            f"--resume auto goes on")
        raise Stopped(stop.agreed)


# ------------------------------------------------------------------------------- data and resuming


def open_data(args):
    """The training set and the validation set or None. On each node one process goes first, and
    downloads if need be."""
    if args.local_rank > 0:
        dist.barrier()
    train, val = loader.load(args.dataset, args.dir, args.classes, args.bits, args.device)
    if args.local_rank == 0:
        dist.barrier()
    for data in filter(None, (train, val)):
        loader.check(data)
    classes = f" in {train.num_classes} classes" if train.num_classes else ""
    say(f"data    {args.dataset}, {len(train)} images{classes}, {len(val or ())} to evaluate on")
    for note in train.notes:
        say(f"        {note}")
    return train, val


def fit(args, num_images):
    """Fit batch, queue and clusters to the data set where they are defaults; refuse what was asked
    for and does not fit."""
    defaults = DEFAULTS[args.dataset]
    fit_batch(args, num_images, defaults["batch_size"])
    if args.queue_size is None:
        args.queue_size = min(defaults["queue_size"], max(1, num_images // QUEUE_SHARE))
        if args.queue_size < defaults["queue_size"]:
            say(f"--queue-size {args.queue_size}, not {defaults['queue_size']}: fitted to the "
                f"number of images")
    elif args.queue_size > num_images:
        raise UsageError(f"--queue-size {args.queue_size}: more than the data set's images; the "
                         f"largest that works is {num_images}")
    if args.num_clusters is None:
        sizes = {max(2, num_images // images) for images in IMAGES_PER_PROTOTYPE}
        args.num_clusters = sorted(size for size in sizes if size <= num_images)
    elif args.num_clusters == [0]:
        args.num_clusters = []
    for size in args.num_clusters:
        if not 2 <= size <= num_images:
            raise UsageError(f"--num-clusters {size}: give 0 alone for no clustering, or sizes "
                             f"from 2 to {num_images}, the number of training images")
    if args.num_clusters and args.warmup_epochs >= args.epochs:
        say(f"--warmup-epochs {args.warmup_epochs} leaves no epoch for prototypes: InfoNCE alone")


def fit_batch(args, num_images, default):
    groups, asked = bn_groups(args), args.batch_size or default
    if num_images < 2 * groups:
        few = f"{num_images} images are" if num_images != 1 else "1 image is"
        raise UsageError(f"{args.dir}: {few} too few for {groups} groups (processes x --bn-splits) "
                         f"of two or more")
    works = min(num_images // groups, max(2, asked // groups)) * groups
    if works != asked and args.batch_size:
        raise UsageError(f"--batch-size {asked}: is split over {groups} groups (processes x "
                         f"--bn-splits) of as many images each, two or more, of the {num_images} "
                         f"that there are; {works} works")
    if works != asked:
        say(f"--batch-size {works}, not {asked}: fitted to {num_images} images in {groups} groups")
    args.batch_size = works


def bn_groups(args):
    return dist.get_world_size() * getattr(args, "bn_splits", 1)


def load_backbone(encoder, checkpoint, path, arch, small_images):
    """Load an encoder's weights but for its head from what is in the file `path`. Returns the
    prefix of their names there."""
    stem = "small-image stem" if small_images else "stem for large images"
    try:
        prefix = builder.load_backbone(encoder, checkpoint, f"--arch {arch} with the {stem}")
    except builder.UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    say(f"backbone from {path}" + (f", {prefix}*" if prefix else "") + f", {stem}")
    return prefix


# A resumed run must be the same model on the same data, in the same batches.
FIXED = ("dataset", "arch", "crop_size", "mlp", "dim", "queue_size", "batch_size", "num_clusters")
FREE = ("output", "resume", "workers", "device", "nproc", "world_size", "rank", "dist_url", "init",
        "print_every", "save_every", "keep_every", "knn_every", "knn_first", "bn_splits", "ignored",
        "kmeans_threads")


def open_output(args, digest, num_images, fixed=FIXED):
    """Read the checkpoint to go on from, of so many images with this digest. Returns the log's size
    then, and the checkpoint; of a fresh start 0 and None."""
    own = args.output / "checkpoint.pth"
    in_use = own.exists() or own.with_suffix(".prev.pth").exists()
    path = own if args.resume in (None, "auto") else Path(args.resume)
    if in_use and (not args.resume or path.resolve().parent != args.output.resolve()):
        raise UsageError(f"--output {args.output}: already holds a checkpoint; go on from it with "
                         f"--resume auto, or give another --output")
    wanted = args.resume and (in_use or args.resume != "auto")
    checkpoint = load_or_previous(path, own) if wanted else None
    ours = bool(checkpoint) and {"digest", "epoch", "args"} <= checkpoint.keys()
    position = [checkpoint["epoch"], checkpoint["step"]] if ours else [-1, -1]
    positions = builder.gather(torch.tensor([position], device=args.device))
    if len(positions.unique(dim=0)) > 1:
        raise UsageError(f"--output {args.output}: the processes found different checkpoints "
                         f"there; name a folder that all nodes share")
    if not wanted:
        return 0, None
    if not ours:
        raise UsageError(f"--resume {path}: not a checkpoint of this script")
    check_resume(args, checkpoint, digest, num_images, fixed, path)
    return (checkpoint["log_size"] if in_use else 0), checkpoint


def check_resume(args, checkpoint, digest, num_images, fixed, path):
    """Refuse to go on with another model or other data, and say what else has changed."""
    now, then = plain(args), checkpoint["args"]
    if not {*fixed} <= then.keys():
        raise UsageError(f"--resume {path}: is a checkpoint of the other script")
    changed = {name: f"--{name.replace('_', '-')} {then.get(name)} (now {now[name]})"
               for name in now if now[name] != then.get(name)}
    broken = [changed[name] for name in fixed if name in changed]
    if broken:
        raise UsageError(f"--resume {path}: was made with {', '.join(broken)}; resume it with the "
                         f"same")
    if checkpoint["digest"] != digest:
        raise UsageError(f"--resume {path}: was made on other images than these {num_images}; give "
                         f"it those, or start another --output")
    told = [changed[name] for name in changed if name not in FREE]
    if told:
        say(f"resumed with other flags than {', '.join(told)}")
    groups = checkpoint.get("bn_groups")
    if groups not in (None, bn_groups(args)):
        say(f"resumed with BN over {bn_groups(args)} groups of the batch (processes x "
            f"--bn-splits), not {groups}: no longer the same computation")


def restore(checkpoint, run, model, optimizer, scaler, args):
    """Put a checkpoint's state into what both scripts train."""
    model.load_state_dict(checkpoint["state_dict"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    for group in optimizer.param_groups:  # what the flags say now
        group.update(momentum=args.momentum, weight_decay=args.wd)
    if checkpoint["scaler"]:  # it has none without --amp fp16
        scaler.load_state_dict(checkpoint["scaler"])
    run.update({name: checkpoint[name] for name in run})


def plain(args):
    """The flags as plain types, which a checkpoint may hold."""
    return {name: value if isinstance(value, (int, float, str, list, type(None))) else str(value)
            for name, value in vars(args).items()}


def summary(args, num_images):
    """What a run starts with, after its data: the model, the training, and where it runs."""
    clusters = " ".join(map(str, args.num_clusters)) or "none (MoCo)"
    return "\n".join((
        f"model   {args.arch} at {args.crop_size} px, queue {args.queue_size}, prototypes "
        f"{clusters}",
        f"train   {args.epochs} epochs ({args.warmup_epochs} of warm-up) of "
        f"{num_images // args.batch_size} steps of {args.batch_size} images, seed {args.seed}",
        f"on      {dist.get_world_size()} x {args.device.type}, amp {args.amp}, {args.workers} "
        f"workers each, to {args.output}"))


# ----------------------------------------------------------------------------------------- launch


class RunError(UsageError):
    """A run that cannot go on for a reason that one line says."""

    status = 1


class Diverged(RunError):
    def __init__(self, what, args):
        super().__init__(f"{what}, the run has diverged; start anew or from an older checkpoint "
                         f"(--keep-every keeps them) with a lower --lr or --amp off; the last one "
                         f"in {args.output} has finite weights, but may be on its way there")


KNOWN = UsageError, builder.UsageError  # whose message says all that there is to say


def launch(worker, args, batch_size=None):
    """Run worker(args) in every process of the job, each with a process group and, in args, its
    `local_rank` and `device`.

    Under torchrun this is one of them. Else it starts them, one on every GPU or --nproc, and waits;
    one alone runs here. batch_size: what the processes are to share, where their number is not
    asked for. Ends the interpreter with the job's status: 2 for usage, 1 for other failures, 128 +
    the signal's number for signals, and 0 for SIGUSR1.
    """
    try:
        cuda = args.device != "cpu" and torch.cuda.is_available()
        if args.device == "cuda" and not cuda:
            raise UsageError("--device cuda: torch sees no GPU here; use --device cpu")
        if "TORCHELASTIC_RUN_ID" in os.environ:
            return join_torchrun(worker, args, cuda)
        check_slurm(args)
        nproc = args.nproc or processes(args, cuda, batch_size)
        if cuda and nproc > torch.cuda.device_count():
            raise UsageError(f"--nproc {nproc}: the largest that works here is "
                             f"{torch.cuda.device_count()}, one for each GPU")
        if args.world_size > 1 and not re.fullmatch(r"tcp://.+:\d+", args.dist_url or ""):
            raise UsageError("--world-size: several nodes need --dist-url tcp://HOST:PORT, with "
                             "the host of node 0")
        if args.rank >= args.world_size:
            raise UsageError(f"--rank {args.rank}: of {args.world_size} nodes, the last is "
                             f"{args.world_size - 1}")
    except UsageError as error:
        fail(error)
    with tempfile.TemporaryDirectory(prefix="pauc-") as meeting:
        group = dict(init_method=args.dist_url, rank=args.rank * nproc,
                     world_size=args.world_size * nproc)
        if args.world_size == 1:
            group["init_method"] = f"file://{meeting}/store"  # no open port
            if "lo" in (name for _, name in socket.if_nameindex()):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
                os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        else:
            print(f"node {args.rank} of {args.world_size}, waiting for the others", flush=True)
        if group["world_size"] == 1:
            in_process(0, worker, args, cuda, nproc, group)
        else:
            inputs = worker, args, cuda, nproc, group, meeting
            supervise(lambda: mp.start_processes(in_process, inputs, nproc, join=False), meeting)


def processes(args, cuda, batch_size):
    """One on every GPU, but no more than leave each a sensible part of the batch."""
    gpus = torch.cuda.device_count() if cuda else 1
    if batch_size is None:
        return gpus
    most = max(1, batch_size // IMAGES_PER_PROCESS // args.world_size)
    if most < gpus:
        print(f"{most} of {gpus} GPUs, with {batch_size // most // args.world_size} images of the "
              f"batch each; --nproc {gpus} takes all", flush=True)
    return min(gpus, most)


def check_slurm(args):
    """One task a node starts the node's processes; several would be as many jobs."""
    def number(*names):
        found = next((os.environ[name] for name in names if name in os.environ), "1")
        return int(re.match(r"\d*", found).group() or 1)
    if "SLURM_PROCID" not in os.environ:
        return
    nodes = number("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES")
    tasks = number("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    if tasks > nodes or number("SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE") > 1:
        raise UsageError(f"{tasks} SLURM tasks on {nodes} node(s) would be as many runs; start one "
                         f"a node, which starts a process on every GPU: srun --ntasks={nodes} "
                         f"--ntasks-per-node=1 python {' '.join(sys.argv)}")
    if tasks > 1 and args.world_size == 1:
        raise UsageError(f"{tasks} SLURM tasks would be as many runs; give each --world-size "
                         f"{nodes} --rank $SLURM_NODEID --dist-url tcp://HOST:PORT")


def join_torchrun(worker, args, cuda):
    """Be the process of the job that torchrun made this one."""
    unused = {"--nproc": args.nproc, "--world-size": args.world_size > 1, "--rank": args.rank,
              "--dist-url": args.dist_url}
    unused = [name for name in unused if unused[name]]
    nproc = int(os.environ["LOCAL_WORLD_SIZE"])
    if cuda and nproc > torch.cuda.device_count():
        raise UsageError(f"--nproc-per-node {nproc}: the largest that works here is "
                         f"{torch.cuda.device_count()}, one for each GPU")
    store, rank, world_size = next(dist.rendezvous("env://"))
    store.set_timeout(DAY)  # while one process lists or fetches a data set
    if unused and rank == 0:
        print(f"torchrun says how many processes meet and where, not {' '.join(unused)}")
    store = dist.PrefixStore(name_of_start(store, rank, world_size), store)
    in_process(int(os.environ["LOCAL_RANK"]), worker, args, cuda, nproc,
               dict(store=store, rank=rank, world_size=world_size))


def name_of_start(store, rank, world_size):
    """A name that all processes of this start share, and none of an earlier one: torchrun's store
    outlives a restart, and its agents' own counts differ.

    Each process leaves a word of its own. The name is made of all of them, once all have read the
    same: so none of a process that has died is among them.
    """
    words = [f"word of {other}" for other in range(world_size)]
    store.set(words[rank], uuid.uuid4().hex)
    store.wait(words)
    name = None
    while True:
        read = f"start {loader.seed_of(*store.multi_get(words)):x}"
        if read != name:
            name = read
            store.set(f"{name}, read by {rank}", "")
        if store.check([f"{name}, read by {other}" for other in range(world_size)]):
            return name
        time.sleep(0.1)


def in_process(local_rank, worker, args, cuda, nproc, group, meeting=None):
    """One process of the job, of `nproc` on this node. meeting: a folder that those share which
    `supervise` has started."""
    set_up(args, local_rank, cuda, nproc)
    if meeting:
        group["rank"] += local_rank
    stop.reset(alone=group["world_size"] == 1)
    if cuda:
        group["device_id"] = args.device  # else NCCL guesses it from the rank
    with signal_handlers(stop.on_signal):
        try:
            # Python's handlers do not run while others are waited for.
            meets = signal.SIG_DFL if group["world_size"] > 1 else stop.on_signal
            with signal_handlers(meets):
                # Others wait in a collective while one clusters or downloads, and notice its death.
                dist.init_process_group("nccl" if cuda else "gloo", timeout=DAY, **group)
            if args.ignored:
                say(f"{' '.join(args.ignored)}: the default here, or without use")
            worker(args)
            dist.destroy_process_group()
        except (Stopped, Exception) as error:
            stop.waiting = True  # a signal has nothing left to end
            traceback.clear_frames(error.__traceback__)  # the data workers end with their loader
            error = dead_worker(error) or error
            if group["world_size"] > 1 and not isinstance(error, (Stopped, *KNOWN)):
                let_another_speak()
            if stop.caught and not isinstance(error, KNOWN):
                sys.exit(end_by_signal(args, group["rank"], spawned=bool(meeting)))
            fail(error, meeting)


def set_up(args, local_rank, cuda, nproc):
    """What depends on the machine. Of args only `fit` changes more."""
    args.local_rank = local_rank
    args.device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if args.workers is None:  # on the CPU they would only share the cores
        args.workers = min(16, max(1, cores // nproc)) if cuda else 0
    if cuda:
        torch.cuda.set_device(args.device)
        torch.backends.cudnn.benchmark = True
    chosen = "OMP_NUM_THREADS" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    if not cuda and nproc > 1 and not chosen:
        torch.set_num_threads(max(1, cores // nproc))
    at_once = min(nproc, len(getattr(args, "num_clusters", None) or IMAGES_PER_PROTOTYPE))
    args.kmeans_threads = None if chosen else max(1, cores // at_once)  # torchrun leaves one
    if args.amp == "auto":
        bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        args.amp = "bf16" if bf16 else "off"


def let_another_speak(seconds=2):
    """When a process dies the others find their collective broken, which explains nothing: leave it
    the time to say what it died of."""
    time.sleep(seconds)


def dead_worker(error):
    """The death of a data worker is told by an error in whatever the process was doing, and may
    have led to others."""
    while error and not str(error).startswith("DataLoader worker"):
        error = error.__context__
    return error and RunError(str(error))


def fail(error, meeting=None):
    speak(error, meeting)
    sys.exit(getattr(error, "status", 1))


def speak(error, meeting=None):
    """Say what is wrong: in one line, with a traceback before it if it is a fault of the program.
    Of several processes that share a `meeting` the first alone speaks."""
    try:
        if meeting:
            os.close(os.open(Path(meeting) / "failed", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    if not isinstance(error, KNOWN):
        traceback.print_exception(error)
    # A data worker's comes with its traceback.
    message = (str(error).strip() or type(error).__name__).splitlines()[-1]
    message = re.sub(r"^(loader\.)?\w*Error: ", "", message)
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)


def supervise(start, meeting):
    """Start the processes of this node, wait for them, hand signals on to them, and end with all of
    them when one has failed."""
    caught, processes = 0, []

    def hand_on(number, _):
        nonlocal caught
        if number == signal.SIGINT and caught in (signal.SIGINT, signal.SIGKILL):
            number = signal.SIGKILL  # it is not the first
        caught = number
        send(number)

    def send(number):
        for process in processes:
            if process.exitcode is None:
                os.kill(process.pid, number)

    with signal_handlers(hand_on):
        processes += start().processes
        if caught:  # before they were there
            send(caught)
        while not any(process.exitcode for process in processes):
            running = [process.sentinel for process in processes if process.exitcode is None]
            if not running:
                break
            connection.wait(running)
        killed = {i: -process.exitcode for i, process in enumerate(processes)
                  if (process.exitcode or 0) < 0 and -process.exitcode != caught}
        for i, number in list(killed.items())[:1]:
            speak(RunError(f"process {i} was ended by {signal.Signals(number).name}"), meeting)
        until = time.time() + 10
        for process in processes:  # they end by themselves, but those that wait for a dead one
            process.join(max(0, until - time.time()))
            process.kill()
            process.join()
    status = job_status([process.exitcode for process in processes], killed, caught)
    if status:
        sys.exit(0 if status == 128 + signal.SIGUSR1 else status)


def job_status(statuses, killed, caught):
    """The status of a job from those of its processes, and the signal that it was sent or 0."""
    if killed:
        return 1
    if caught:  # a failure counts for more than that others have ended by the signal
        statuses = [status for status in statuses if status < 128] or statuses
    if max(statuses) > 0:
        return max(statuses)
    if caught == signal.SIGKILL:
        return 128 + signal.SIGINT  # a second one
    return 128 + caught if caught else 0  # it ended them before, or as, they were done


# ---------------------------------------------------------------------------------------- signals

SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP


class Stopped(BaseException):
    """A signal ends the run."""


class Stop:
    """The signal that ends this process's run.

    While steps are made a signal waits for the step's end, where the processes agree on it;
    elsewhere it ends the process at once, since the last checkpoint is as good as a new one.
    """

    def __init__(self):
        self.reset(alone=True)

    def reset(self, alone):
        self.caught, self.agreed = 0, 0  # by this process, and by all of them
        self.waiting, self.alone = False, alone

    def on_signal(self, number, _):
        self.caught = number
        if number == signal.SIGINT and self.alone:  # several get the terminal's and their parent's
            signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
        if not self.waiting:
            self.waiting = True  # one is enough
            raise Stopped(number)

    @contextmanager
    def after_a_step(self):
        self.waiting = True
        try:
            yield
        finally:
            self.waiting = bool(self.caught)
        if self.caught:
            raise Stopped(self.caught)


stop = Stop()


@contextmanager
def signal_handlers(handler):
    """What schedulers, terminals and people send goes to the handler in here; a SIGHUP that nohup
    has turned off stays so."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: function for number, function in before.items()
              if (number, function) != (signal.SIGHUP, signal.SIG_IGN)}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, function in before.items():
            signal.signal(number, function)


def end_by_signal(args, rank, spawned):
    """End a process that a signal has stopped: its exit status."""
    if stop.agreed:
        dist.destroy_process_group()
    elif rank == 0:
        saved = (args.output / "checkpoint.pth").exists()
        print(f"stopped by {signal.Signals(stop.caught).name}"
              + (": --resume auto goes on from the last checkpoint" if saved else ""))
    if stop.caught == signal.SIGUSR1 and not spawned:  # of one that was, 0 would say "done"
        return 0
    return 128 + stop.caught


# ------------------------------------------------------------------------------------ checkpoints


@contextmanager
def writing(path):
    """What the disk has against it is said in one line."""
    try:
        yield
    except OSError as error:
        raise FileError(f"{path}: cannot be written ({error.strerror})") from None


def make_folder(folder):
    """See to it that a folder is there and takes files: now, rather than after an hour."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


locks = []


def lock(folder):
    """Keep OUTPUT to this run until it ends, however it ends; data workers do not inherit it."""
    make_folder(folder)
    if dist.get_rank() > 0:
        return
    with writing(folder):
        locks.clear()  # closed later, it would free this process's next one
        locks.append(open(folder / ".lock", "w"))  # until the process ends
    try:
        fcntl.lockf(locks[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UsageError(f"--output {folder}: another run is writing there; wait for its end, or "
                         f"give another --output") from None
    except OSError:
        say(f"{folder}: its file system has no locks; see to it that one run alone writes there")


def save_checkpoint(args, run, model, optimizer, scaler, log, name="checkpoint.pth", **more):
    """Process 0 writes all that a resumed run needs; random numbers are keyed, so there is no
    generator to save."""
    if scaler.get_scale() < LEAST_SCALE:
        raise Diverged(f"epoch {run['epoch'] + 1}: no gradient has been finite for many steps",
                       args)
    finite = [parameter.isfinite().all() for parameter in model.parameters()]
    if not torch.stack(finite).all():
        raise Diverged(f"epoch {run['epoch'] + 1}: the weights are not finite and were not saved",
                       args)
    if dist.get_rank() == 0:
        save(args.output / name, dict(
            run, arch=args.arch, state_dict=model.state_dict(), args=plain(args),
            optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), log_size=log.mark(),
            **more))
    dist.barrier()


def save_backbone(encoder, args):
    """The query encoder's backbone as a file of its own, with torchvision's names."""
    if dist.get_rank() == 0:
        state = builder.backbone_of(encoder).state_dict()
        save(args.output / "backbone.pth", {name: x.cpu() for name, x in state.items()})


def save(path, state):
    """Write a file whole or not at all: aside, flushed, renamed. The checkpoint before stays as
    checkpoint.prev.pth."""
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
        raise FileError(f"{path}: cannot be written ({str(error).splitlines()[0]}); what was there "
                        f"before is as it was") from None


def load(path):
    """What is in a checkpoint file, as data alone: nothing in it can run."""
    path = Path(path)
    try:
        if path.stat().st_size == 0:
            raise FileError(f"{path}: is an empty file, not a checkpoint")
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():  # torch.load takes flipped bytes in silence
                    raise zipfile.BadZipFile("a part's checksum is wrong")
        with torch.serialization.safe_globals(harmless()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on how to load what is not data alone
            found = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(found, dict):
            raise FileError(f"{path}: holds a {type(found).__name__}, not a checkpoint")
        return found
    except FileNotFoundError:
        raise FileError(f"{path}: no such checkpoint") from None
    except OSError as error:  # it may be whole
        raise RunError(f"{path}: cannot be read ({error.strerror})") from None
    except FileError:
        raise
    except Exception as error:  # torch raises nearly anything on a file that it did not write
        raise FileError(f"{path}: {what_is_wrong(path, error)}") from None


def harmless():
    """What many published checkpoints hold beside tensors, and what cannot run code."""
    kinds = {type(np.dtype(code)) for code in np.typecodes["AllInteger"] + "?efdFDU"}
    numpy = np._core.multiarray if hasattr(np, "_core") else np.core.multiarray
    made_by = [(getattr(numpy, name), f"numpy.{core}.multiarray.{name}")
               for name in ("scalar", "_reconstruct") for core in ("core", "_core")]
    return [argparse.Namespace, type(Path()), np.dtype, np.ndarray, *kinds, *made_by]


def what_is_wrong(path, error):
    """In words of our own: torch's advise to load a file in the way that can run code."""
    refused = re.search(r"(?:GLOBAL |<class ')([\w.]+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and refused and "weights_only" in str(error):
        return (f"not a whole checkpoint that is data alone: it holds a {refused.group(1)}; save "
                f"its state dict by itself")
    if "TorchScript" in str(error):
        return "is a TorchScript archive; save the module's state dict by itself"
    with open(path, "rb") as file:
        start = file.read(4)
    if start.startswith(b"PK"):
        return "not a whole checkpoint: it is cut short or damaged"
    return "not a whole checkpoint: it is no file that torch.save wrote, or is damaged"


def load_or_previous(path, own):
    """What is in a checkpoint file, or in the one before it where this one is damaged or was about
    to be replaced. This run's own is then moved out of the way, lest it become the one before."""
    previous = path.with_suffix(".prev.pth")
    try:
        return load(path)
    except FileError as error:
        if not previous.exists():
            raise
        checkpoint = load(previous)
        say(f"{error}; taking {previous}, the one before")
        if dist.get_rank() == 0 and path == own and path.exists():
            os.replace(path, path.with_suffix(".damaged.pth"))
        return checkpoint


# -------------------------------------------------------------------------------------------- log


def say(text):
    """Once, of all processes."""
    if dist.get_rank() == 0:
        tqdm.write(text)
        sys.stdout.flush()


def bar(title, start, total, iterable=None, after=0):
    """A progress bar on process 0's terminal, `after` so many seconds."""
    off = dist.get_rank() > 0 or not sys.stdout.isatty()
    return tqdm(iterable, title, total, initial=start, disable=off, file=sys.stdout, leave=False,
                dynamic_ncols=True, delay=after)


class Log:
    """Reports of process 0: one JSON line each in OUTPUT/log.jsonl, of which the first holds the
    flags; TensorBoard in OUTPUT; and a shorter line on the terminal."""

    def __init__(self, args, size, run):
        """size: where the log of a run that goes on is cut; what came after will come again, but
        for lincls.py's results."""
        self.speaks = dist.get_rank() == 0
        if not self.speaks:
            return
        from torch.utils.tensorboard import SummaryWriter
        done = run["epoch"] * run["steps"] + run["step"]
        self.path = args.output / "log.jsonl"
        with writing(self.path):
            self.board = SummaryWriter(args.output, purge_step=done + 1 if done else 0)
            self.file = open(self.path, "a+b")
            size = min(size, self.file.seek(0, os.SEEK_END))
            self.file.seek(size)
            results = [line for line in self.file
                       if line.startswith(b'{"protocol"') and line.endswith(b"}\n")]
            self.file.truncate(size)
        flags = [] if size else [dict(flags=plain(args))]
        self.write(*flags, *map(json.loads, results))

    def write(self, *records):
        # JSON has no NaN and no infinity: null.
        records = json.loads(json.dumps(records), parse_constant=lambda _: None)
        with writing(self.path):
            self.file.writelines(json.dumps(record).encode() + b"\n" for record in records)
            self.file.flush()

    def mark(self):
        """Write out all that was reported, and return the log's size."""
        self.board.flush()
        return self.file.seek(0, os.SEEK_END)

    @contextmanager
    def progress(self, run, args):
        """A bar over the steps of an epoch, and the clock of their speed."""
        self.since, self.counted = time.time(), 0
        with bar(f"epoch {run['epoch'] + 1}/{args.epochs}", run["step"], run["steps"]) as self.bar:
            yield

    def step(self, report, run, args):
        self.bar.update()
        self.counted += 1
        step = run["epoch"] * run["steps"] + run["step"]
        if step % args.print_every:
            return
        speed = self.counted * args.batch_size / (time.time() - self.since)
        self.since, self.counted = time.time(), 0
        place = f"epoch {run['epoch'] + 1}/{args.epochs}  step {run['step']}/{run['steps']}"
        accuracy = next((value for name, value in report.items() if name.startswith("acc")), 0)
        line = (f"{place}  loss {report['loss']:.4f}  acc {accuracy:.3f}  lr {report['lr']:.2g}  "
                f"{speed:.0f} images/s")
        self.report(dict(epoch=run["epoch"] + 1, step=step, **report, images_per_s=speed), line)

    def epoch(self, record, run, args):
        shown = dict(loss=run["loss"], **record)
        shown = {name: np.mean(shown[name]) for name in TERMINAL if name in shown}
        place = f"epoch {record['epoch']}/{args.epochs}"
        line = "  ".join([place, *(f"{TERMINAL[name]} {value:.4g}" for name, value in shown.items()
                                   if math.isfinite(value))])
        self.report(record, line)

    def pairs(self, im_q, im_k, augment, number=16):
        """Augmented pairs, side by side, in TensorBoard: to be looked at."""
        if self.speaks:
            from torchvision.utils import make_grid
            rows = torch.stack([im_q[:number], im_k[:number]], dim=1).flatten(0, 1)
            images = (rows * augment.std + augment.mean).clamp(0, 1)
            self.board.add_image("pairs", make_grid(images, nrow=8), 0)

    def report(self, record, line):
        if not self.speaks:
            return
        self.write(record)
        for name, value in record.items():
            several = isinstance(value, list)
            for i, x in enumerate(value if several else [value]):
                self.board.add_scalar(f"{name}/{i}" if several else name, x, record["step"])
        say(line)

    def close(self):
        if self.speaks:
            self.file.close()
            self.board.close()


# What an epoch's line shows; a mean over the clusterings where they have a figure each.
TERMINAL = dict(loss="loss", knn="kNN", top1="top-1", top5="top-5", best="best",
                diversity="diversity", effective_rank="rank", seconds="seconds")


if __name__ == "__main__":
    main()
