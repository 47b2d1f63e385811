"""Speed and memory of the training step, the data pipeline and the E-step, beside MoCo and PCL.

    python tests/benchmark.py                       # on the GPU, or on the CPU where there is none
    python tests/benchmark.py --device cpu --only reading kmeans --output cpu.json
    python tests/benchmark.py --count               # counted instead of measured, on any machine
    python tests/benchmark.py --quick               # tiny sizes: does it run?

Prints one table and writes it as JSON. What is compared alternates within one run, after a warm-up:
a figure is the median of the rounds, a ratio the median of the rounds' ratios; k-means runs once. A
step is the momentum update, keys, queries, loss, backward, optimizer and enqueue; the floor is the
two encoders' forward and the query encoder's backward alone. MB: the most a step adds, on a GPU.
"""
import argparse
import collections
import gc
import gzip
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
import warnings
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import faiss
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parent.parent))
import builder  # noqa: E402
import loader  # noqa: E402
import losses  # noqa: E402
import pretrain  # noqa: E402

DIM = 128
LARGE = dict(name="ResNet-50 224 px", size=224, images=1_281_167,
             prototypes=(25_000, 50_000, 100_000), flags="DIR --arch resnet50 --queue-size 65536")
SMALL = dict(name="ResNet-18 32 px", size=32, images=50_000, prototypes=(1000, 2000, 4166),
             flags="--dataset cifar10 --arch resnet18 --queue-size 4096")
TINY = dict(name="shufflenet 32 px", size=32, images=500, prototypes=(10, 20, 40),
            flags="--dataset cifar10 --arch shufflenet_v2_x0_5 --queue-size 64 --num-negatives 8")
COLUMNS = "part", "case", "variant", "value", "unit", "ratio", "of"
SHORT, LONGEST = 10, 8  # kernels of a profile: microseconds, and how many are named


def main():
    options = set_up()
    table = machine(options) | dict(quick=options.quick, rows=[])
    print("  ".join(f"{key} {value}" for key, value in table.items() if key != "rows"))
    for part in options.only:
        for case, variant, value, unit, *beside in PARTS[part](options):
            table["rows"].append(dict(zip(COLUMNS, (part, case, variant, value, unit, *beside))))
            compared = "{:8.4f} of {}".format(*beside) if beside else ""
            print(f"{part:8} {case:36} {variant:18} {value:10.5g} {unit:17} {compared}", flush=True)
        options.output.write_text(json.dumps(table, indent=1) + "\n")
    dist.destroy_process_group()


def set_up(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--output", type=Path, default=Path("benchmark.json"), metavar="JSON")
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts of the table")
    add("--count", dest="only", action="store_const", const=["counted"], help="--only counted")
    add("--quick", action="store_true", help="tiny sizes")
    options = parser.parse_args(argv)
    options.cuda = options.device == "cuda"
    options.device = torch.device("cuda", 0) if options.cuda else torch.device("cpu")
    options.amp = "bf16" if options.cuda else "off"
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    dist.init_process_group("nccl" if options.cuda else "gloo", store=dist.HashStore(), rank=0,
                            world_size=1)
    return options


def machine(options):
    file = Path("/proc/cpuinfo")  # Linux has it
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    name = torch.cuda.get_device_name(0) if options.cuda else [*names, "a CPU"][0]
    return dict(torch=torch.__version__, faiss=faiss.__version__, faiss_gpus=faiss.get_num_gpus(),
                name=name, threads=torch.get_num_threads())


def settings(options, case, flags=""):
    """pretrain's arguments, with what its launch adds."""
    flags = f"{case['flags']} --crop-size {case['size']} --lr 1e-4 --amp {options.amp} {flags}"
    args = pretrain.parse_args(flags.split())
    args.device = options.device
    return args


def clock(options):
    if options.cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def alternate(functions, options, seconds):
    """Seconds a call of each {name: function}, one figure a round: at least three rounds, and as
    many as fit into `seconds`."""
    times = {name: [] for name in functions}
    calls = 5 if options.cuda else 1  # between two looks at the clock
    seconds, rounds = (0, 1) if options.quick else (seconds, 3)
    for function in [*functions.values()] * 3:  # warm-up; in the second step DDP lays its buckets
        function()
    end = time.perf_counter() + seconds
    while len(times[next(iter(times))]) < rounds or time.perf_counter() < end:
        for name in list(functions)[::random.choice((1, -1))]:
            start = clock(options)
            for _ in range(calls):
                functions[name]()
            times[name].append((clock(options) - start) / calls)
    return times


def ratio(times, name, of):
    """The median ratio of two functions' seconds, each to the other's of the same round."""
    return statistics.median(a / b for a, b in zip(times[name], times[of]))


# ------------------------------------------------------------------------------ the training step


def cases(options):
    if options.quick:
        return [(TINY, 8)]
    return [(LARGE, 256), (LARGE, 32), (SMALL, 256)] if options.cuda else [(SMALL, 256)]


def variants(case, options):
    """The methods' arguments and clusterings."""
    args, one, pcl = (settings(options, case, flags) for flags in (
        "", "--heads 1", "--heads 1 --align 0 --uniform 0 --corr 0"))
    clusterings = [losses.Clustering(
        torch.randint(size, (case["images"],)),
        F.normalize(torch.randn(size, DIM, device=options.device), dim=1),
        0.1 + 0.2 * torch.rand(size, device=options.device)) for size in case["prototypes"]]
    return {"MoCo": (one, []), "PCL": (pcl, clusterings), "PAUC, one head": (one, clusterings),
            "PAUC": (args, clusterings)}


def build(args):
    return builder.MoCo(args.arch, DIM, args.queue_size, args.moco_m, heads=args.heads,
                        small_images=args.crop_size < loader.SMALL_CROP)


def train(ddp, optimizer, batches, args, clusterings):
    """pretrain's own step, on the next of `batches`."""
    batch = next(batches)
    args.batch_size = len(batch[0])
    views = SimpleNamespace(epoch=lambda *_: [batch])
    log = SimpleNamespace(start_clock=lambda: None, step=lambda *_: None)
    run = dict(epoch=1, step=0, steps=2, clusterings=clusterings)  # pairs are logged in epoch 0
    pretrain.m_step(ddp, optimizer, views, run, args, log, [], None)


def step_functions(case, batch, methods, options, batches=None):
    """The floor, and a training step of each method, all with a model of their own: on one batch,
    or on the next of `batches`."""
    gc.collect()  # another case's models
    size, steps = case["size"], {}
    views = torch.randn(2 * batch, 3, size, size, device=options.device)
    im_q, im_k = views.contiguous(memory_format=torch.channels_last).chunk(2)
    index = torch.randperm(case["images"])[:batch]
    batches = batches or itertools.repeat((im_q, im_k, index, None))
    for name, (args, clusterings) in methods.items():
        model = build(args).to(options.device, memory_format=torch.channels_last)
        model.queue.copy_(F.normalize(torch.randn_like(model.queue), dim=0))
        model.queue_index.fill_(-2)  # of images that are in no batch
        ddp = pretrain.distributed(model)
        optimizer = torch.optim.SGD(model.parameter_groups(), args.lr, args.momentum)
        steps[name] = partial(train, ddp, optimizer, batches, args, clusterings)

    def floor():  # of the last method, PAUC
        optimizer.zero_grad()
        with pretrain.autocast(args):
            q = model.encoder_q(im_q)
            with torch.no_grad():
                model.encoder_k(im_k)
        q.backward(torch.randn_like(q))
    return dict(floor=floor) | steps


def speeds(functions, batch, seconds, options):
    """Figures of the floor and of each method's step, by name."""
    times = alternate(functions, options, seconds)
    for name, function in functions.items():
        figures = dict(pairs_per_s=batch / statistics.median(times[name]),
                       time_of_moco=ratio(times, name, "MoCo"),
                       speed_of_floor=ratio(times, "floor", name))
        if options.cuda:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            function()
            figures["MB"] = (torch.cuda.max_memory_allocated() - before) / 2 ** 20
        yield name, figures


def training_step(options):
    for case, batch in cases(options):
        functions = step_functions(case, batch, variants(case, options), options)
        for name, figures in speeds(functions, batch, 30 if options.cuda else 90, options):
            row = f"{case['name']} batch {batch}", name
            yield *row, figures["pairs_per_s"], "pairs/s", figures["speed_of_floor"], "floor"
            if options.cuda:
                yield *row, figures["MB"], "MB"
        del functions


def views_of(case, batch, options):
    """Batches of two views of noise, without end. Small images are in the device's memory, of large
    ones there are the crops, as data workers leave them."""
    noise = np.random.default_rng(0).integers(256, size=(10 * batch, 32, 32, 3), dtype=np.uint8)
    data, size = loader.Arrays(noise, np.zeros(len(noise))), case["size"]
    if size >= loader.SMALL_CROP:
        crops = torch.randint(256, (batch, 2, 3, size, size), dtype=torch.uint8,
                              pin_memory=options.cuda)
        data.each = lambda _, steps, workers: (crops for _ in steps)
    data.to(options.device)
    augment = loader.Augment("v2", size, loader.IMAGENET_STATISTICS)
    views = loader.Views(data, torch.arange(len(data)), batch, augment, seed=0)
    for epoch in itertools.count():
        yield from views.epoch(epoch)


def fed_steps(seconds, options):
    """Figures of two views alone, of a PAUC step, and of one on such views: small and large."""
    sizes = [(SMALL, 256), (LARGE, 256)]
    if options.quick:
        sizes = [(TINY, 8), (TINY | dict(name="shufflenet 64 px", size=64), 8)]
    for case, batch in sizes:
        methods = dict(PAUC=variants(case, options)["PAUC"])
        batches = views_of(case, batch, options)
        functions = {"views": partial(next, batches),
                     "step": step_functions(case, batch, methods, options)["PAUC"],
                     "fed step": step_functions(case, batch, methods, options, batches)["PAUC"]}
        times = alternate(functions, options, seconds)
        speed = {name: batch / statistics.median(times[name]) for name in times}
        yield case["name"], dict(time_of_step=ratio(times, "fed step", "step"), pairs_per_s=speed)


def profile_of(function, calls, path, options):
    """A trace of so many calls, in `path`, a .gz, and of one the lines where the host waits for the
    GPU, and how often; the longest calls of CUDA, in ms; the part of the time in which the GPU is
    busy; kernels, the part of their number and time that takes under SHORT microseconds, and the
    longest. Without a GPU operations, which hold others, stand for kernels."""
    calls = 2 if options.quick else calls
    function()
    with torch.profiler.profile() as trace:
        start = clock(options)
        for _ in range(calls):
            function()
        seconds = clock(options) - start
    trace.export_chrome_trace(str(path))
    with gzip.open(path, "rt") as file:
        events = [event for event in json.load(file)["traceEvents"] if "dur" in event]

    def longest(events):
        ms = collections.Counter()
        for event in events:
            ms[event["name"]] += event["dur"] / 1000 / calls
        return dict(ms.most_common(LONGEST))
    cuda_calls = [x for x in events if x.get("cat") in ("cuda_runtime", "cuda_driver")]
    kernels = [x for x in events if x.get("cat") == ("kernel" if options.cuda else "cpu_op")]
    us = np.array([x["dur"] for x in kernels])
    return dict(waits=waits(function) if options.cuda else {}, cuda_calls=longest(cuda_calls),
                busy=us.sum() / 1e6 / seconds, kernels=len(us) / calls,
                short=(us < SHORT).mean(), short_time=us[us < SHORT].sum() / us.sum(),
                longest=longest(kernels))


def waits(function):
    """How often a call waits for the GPU at each line; what goes unnoticed is in calls of CUDA."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        function()
    torch.cuda.set_sync_debug_mode("default")
    return collections.Counter(f"{Path(warning.filename).name}:{warning.lineno}" for warning in said
                               if "synchroniz" in str(warning.message))


# ---------------------------------------------------------------- the data pipeline, and k-means


def write_photographs(folder, number, width, height, slope, quality):
    """JPEG files of noise that falls with the frequency, to the power of the slope; kB of one."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)).clip(1 / width)
    for i in range(number):
        noise = np.random.default_rng(i).normal(size=(3, height, width))
        x = np.fft.irfft2(np.fft.rfft2(noise) / frequency ** slope, s=(height, width))
        x = 0.7 * x.mean(0) + 0.3 * x  # channels of a photograph go together
        pixels = (128 + 50 * x / x.std()).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"{i:03}.jpg", quality=quality)
    return statistics.mean(path.stat().st_size for path in folder.iterdir()) / 1000


def reading(options):
    """Of photographs of ImageNet's size, and of a camera's, which are smoother."""
    kinds = [(32, 500, 375, 1, 88), (3, 4000, 3000, 1.25, 90)]
    for number, width, height, *kind in [(2, 300, 200, 1, 88)] if options.quick else kinds:
        with tempfile.TemporaryDirectory() as root:
            kilobytes = write_photographs(Path(root), number, width, height, *kind)
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            times = alternate(pipelines(root, 224), options, 40)
            torch.set_num_threads(threads)
        case = f"{width}x{height} JPEG of {kilobytes:.0f} kB, 224 px"
        for name in times:
            unit, of = ("images/s", "worker") if name == "centres" else ("pairs/s", "PIL")
            speed = number / statistics.median(times[name])
            yield case, name, speed, f"{unit} a core", ratio(times, of, name), of


def pipelines(root, size):
    """Two views of each image by MoCo v2's code, on PIL images, and as a data worker has them; and
    the centres, which the E-step reads."""
    def blur(image):
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2)))
    transform = transforms.Compose([
        transforms.RandomResizedCrop(size, (0.2, 1)),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        transforms.RandomGrayscale(p=0.2),
        transforms.RandomApply([blur], p=0.5),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(*loader.IMAGENET_STATISTICS)])
    data, _ = loader.load("folder", root)
    number, augment = len(data), loader.Augment("v2", size, data.statistics)

    def pil():
        for path in Path(root).iterdir():
            image = Image.open(path).convert("RGB")
            transform(image), transform(image)

    def worker():
        u = torch.rand(number, 2, loader.TRIES, loader.DRAWS_OF_A_BOX)
        return data.random_crops(torch.arange(number), u, size, 0.2).flatten(0, 1)
    return {"PIL": pil, "worker": worker,
            "worker and Augment": lambda: augment(worker(), torch.rand(2 * number, loader.DRAWS)),
            "centres": lambda: data.centre_crops(size, range(number))}


def kmeans(options):
    """Of unit rows about 10,000 centres, of unequal size, which overlap, with a decaying spectrum;
    as many as ImageNet's images only where faiss has a GPU."""
    case, _ = cases(options)[0 if faiss.get_num_gpus() else -1]
    n, share = case["images"], torch.arange(100.0, 10_100) ** -0.7
    x = torch.randn(10_000, DIM)[torch.multinomial(share, n, replacement=True)]
    v = F.normalize((x + torch.randn(n, DIM)) / torch.arange(1, DIM + 1), dim=1).to(options.device)
    pretrain.kmeans(v[:500], 10, 0, settings(options, case))  # warm-up
    for size in case["prototypes"]:
        pcl = None
        for variant, flags in (("PCL's", "--kmeans-iters 20 --kmeans-restarts 5"), ("ours", "")):
            start = clock(options)
            _, objective = pretrain.kmeans(v, size, 1, settings(options, case, flags))
            values = clock(options) - start, objective.item()
            pcl = pcl or values
            for value, base, unit in zip(values, pcl, ("s", "objective")):
                yield f"N {n} P {size}", variant, value, unit, value / base, "PCL's"


# ---------------------------------------------------------------------------- counted, not measured


class Counter(TorchDispatchMode):
    """Counts what is done to tensors without values, as all are that are made in here: operations
    that make more than a view, each a kernel or several, and the bytes that live, at most."""
    kernels = bytes = peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = tree_leaves((args, kwargs))
        held = {x.untyped_storage() for x in leaves if isinstance(x, FakeTensor)}
        if not held and not any(isinstance(x, torch.device) for x in leaves):
            with unset_fake_temporarily():
                return func(*args, **(kwargs or {}))  # of tensors made before
        result = func(*args, **(kwargs or {}))
        self.kernels += func.namespace == "aten" and not func.is_view and "empty" not in func.name()
        for x in tree_leaves(result):
            if isinstance(x, FakeTensor) and x.untyped_storage() not in held:
                self.allocate(x.untyped_storage().nbytes())
                weakref.finalize(x.untyped_storage(), self.allocate, -x.untyped_storage().nbytes())
        return result

    def allocate(self, number):
        self.bytes += number
        self.peak = max(self.peak, self.bytes)


def counted(options):
    """GFlop of matrix products and convolutions, kernels, and MB at most: of a step in one process,
    in bf16, by the CPU's autocast, without DDP's buckets of gradients."""
    case, batch = (TINY, 8) if options.quick else (LARGE, 256)
    options = SimpleNamespace(device=torch.device("cpu"), amp="bf16")
    index, moco = torch.randperm(case["images"])[:batch], None
    for name, (args, clusterings) in variants(case, options).items():
        with torch.device("meta"):
            model = build(args)
        with FakeTensorMode(allow_non_fake_inputs=True), Counter() as counter, \
                mock.patch.object(pretrain, "exchange", return_value=(dict(loss=0), 0)), \
                mock.patch.object(builder, "gather", torch.clone):
            model._apply(lambda x: torch.empty(x.shape, dtype=x.dtype, device="cpu"))
            ddp = mock.Mock(side_effect=model, module=model)
            sgd = torch.optim.SGD(model.parameter_groups(), args.lr, args.momentum, foreach=True)
            views = torch.empty(2, batch, 3, case["size"], case["size"])
            clusterings = [losses.Clustering(assignments, *(torch.empty(x.shape) for x in others))
                           for assignments, *others in clusterings]
            batches = itertools.repeat((*views, index, None))
            train(ddp, sgd, batches, args, clusterings)  # makes the optimizer's state
            counter.kernels, counter.peak = 0, counter.bytes
            with FlopCounterMode(display=False) as flops:
                train(ddp, sgd, batches, args, clusterings)
        values = flops.get_total_flops() / 1e9, counter.kernels, counter.peak / 2 ** 20
        moco = moco or values
        for value, base, unit in zip(values, moco, ("GFlop", "kernels", "MB at peak")):
            yield f"{case['name']} batch {batch}", name, value, unit, value / base, "MoCo"


PARTS = dict(step=training_step, reading=reading, kmeans=kmeans, counted=counted)

if __name__ == "__main__":
    main()
