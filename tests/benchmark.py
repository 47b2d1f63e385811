"""Speed and memory of the training step, the losses, the data pipeline and the E-step, beside MoCo
and PCL.

    python tests/benchmark.py                       # on the GPU, or on the CPU where there is none
    python tests/benchmark.py --device cpu --only c d --output cpu.json
    python tests/benchmark.py --count               # counted instead of measured, on any machine
    git worktree add /tmp/old d33f62a
    python tests/benchmark.py --device cpu --only c e --old /tmp/old  # reading, and the first run
    python tests/benchmark.py --profile trace.json  # 30 steps, for chrome://tracing
    python tests/benchmark.py --quick               # tiny sizes: does it run?

Prints one table and writes it as JSON. What is compared alternates within one run, after a warm-up:
a figure is the median of the rounds, a ratio the median of the rounds' ratios; k-means runs once. A
step is the momentum update, keys, queries, loss, backward, optimizer and enqueue; the floor is the
two encoders' forward and the query encoder's backward alone. Memory is what is allocated on the
GPU, of the models with one and with two heads where both are measured; on the CPU the process's
resident memory, with all that was there before the step.
"""
import argparse
import gc
import gzip
import importlib.util
import io
import itertools
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
import weakref
from pathlib import Path
from unittest import mock

import faiss
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parent.parent))
import builder  # noqa: E402
import loader  # noqa: E402
import losses  # noqa: E402
import pretrain  # noqa: E402

DIM = 128
IMAGENET = 1_281_167
LARGE = dict(name="ResNet-50 224 px", arch="resnet50", size=224, images=IMAGENET,
             prototypes=(25_000, 50_000, 100_000), queue=65536, negatives=16384)
SMALL = dict(name="ResNet-18 32 px", arch="resnet18", size=32, images=50_000,
             prototypes=(1000, 2000, 4166), queue=4096, negatives=16384)
TINY = SMALL | dict(name="shufflenet 32 px", arch="shufflenet_v2_x0_5", images=500,
                    prototypes=(10, 20, 40), queue=64, negatives=8)
PCL_KMEANS = ("--kmeans-iters", "20", "--kmeans-restarts", "5")
ONE_HEAD = "--heads", "1"
PCL_LOSS = (*ONE_HEAD, "--align", "0", "--uniform", "0", "--corr", "0")
VARIANTS = "MoCo", "PCL", "PAUC, one head", "PAUC"
OTHER_IMAGE = -2  # than any of a batch: what a full queue is of
SHORT, LONGEST = 10, 8  # kernels of a profile: microseconds, and how many are named


def main():
    options = set_up()
    if options.profile:
        return profile(options)
    table = machine(options) | dict(quick=options.quick, rows=[])
    print("  ".join(f"{key} {value}" for key, value in table.items() if key != "rows"))
    print(f"{'':2} {'case':44} {'variant':34} {'value':>12} {'unit':15} {'ratio':>8}")
    for part in options.only:
        for case, variant, value, unit, *ratio in PARTS[part](options):
            ratio, of = ratio or (None, None)
            table["rows"].append(dict(part=part, case=case, variant=variant, value=value, unit=unit,
                                      ratio=ratio, of=of))
            figure = "not measured" if value is None else f"{value:.5g}"
            compared = "" if ratio is None else f" {ratio:8.4f} of {of}"
            print(f"{part:2} {case:44} {variant:34} {figure:>12} {unit:15}{compared}", flush=True)
        options.output.write_text(json.dumps(table, indent=1) + "\n")
    dist.destroy_process_group()


def set_up(argv=None):
    options = parse_options(argv)
    torch.manual_seed(0)
    random.seed(0)
    torch.backends.cudnn.benchmark = True
    dist.init_process_group("nccl" if options.cuda else "gloo", store=dist.HashStore(), rank=0,
                            world_size=1)
    return options


def parse_options(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    cuda = torch.cuda.is_available()
    add("--device", choices=("cuda", "cpu"), default="cuda" if cuda else "cpu")
    add("--output", type=Path, default=Path("benchmark.json"), metavar="JSON")
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts of the table")
    add("--count", dest="only", action="store_const", const=["f"], help="the same as --only f")
    add("--profile", type=Path, metavar="JSON", help="write a trace of 30 steps, and nothing else")
    add("--limit", type=float, metavar="SECONDS", help="longest k-means (default: 600 on a GPU, 90 "
        "on the CPU); over it one restart stands for all")
    add("--old", type=Path, metavar="DIR", help="a checkout of d33f62a, to compare reading with")
    add("--quick", action="store_true", help="tiny sizes")
    options = parser.parse_args(argv)
    options.cuda = options.device == "cuda"
    options.device = torch.device("cuda", 0) if options.cuda else torch.device("cpu")
    options.calls = 5 if options.cuda else 1  # between two looks at the clock
    options.limit = options.limit or (600 if options.cuda else 90)
    return options


# -------------------------------------------------------------------------------------- measuring


def processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def machine(options):
    name = torch.cuda.get_device_name(0) if options.cuda else processor()
    return dict(torch=torch.__version__, faiss=faiss.__version__, faiss_gpus=faiss.get_num_gpus(),
                faiss_threads=faiss.omp_get_max_threads(), python=platform.python_version(),
                device=options.device.type, name=name, threads=torch.get_num_threads())


def settings(options, *flags, case=None, **values):
    """pretrain's arguments, with what its launch and a case add."""
    small = case and case["size"] < 64
    args = pretrain.parse_args([*flags, *(("--dataset", "cifar10") if small else ("DIR",))])
    args.device, args.amp = options.device, "bf16" if options.cuda else "off"
    args.lr, args.statistics = 1e-4, loader.IMAGENET_STATISTICS
    if case:
        args.num_negatives, args.queue_size = case["negatives"], case["queue"]
    vars(args).update(values)
    return args


def clock(options):
    if options.cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def alternate(functions, options, seconds, calls=1, rounds=3):
    """Seconds a call of each {name: function}, one figure a round: at least `rounds`, and as many
    as fit into `seconds`."""
    times = {name: [] for name in functions}
    if options.quick:
        seconds, rounds = 0, 1
    for function in functions.values():
        for _ in range(3 if options.cuda else 1):  # warm-up
            function()
    end = time.perf_counter() + seconds
    while len(times[next(iter(times))]) < rounds or time.perf_counter() < end:
        for name in list(functions)[::1 if random.random() < 0.5 else -1]:
            start = clock(options)
            for _ in range(calls):
                functions[name]()
            times[name].append((clock(options) - start) / calls)
    return times


def ratio(times, name, of):
    """The median ratio of two functions' seconds, each to the other's of the same round."""
    return statistics.median(a / b for a, b in zip(times[name], times[of]))


def peak(function, options):
    """The most memory in MB that a call of the function needs: allocated on the GPU, else resident
    (Linux only)."""
    try:
        if options.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")
        function()
        if options.cuda:
            return torch.cuda.max_memory_allocated() / 2 ** 20
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 2 ** 10 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None


# ------------------------------------------------------------- a, b: the training step and its loss


def cases(options):
    return [(TINY, 8)] if options.quick else [(LARGE, 256), (LARGE, 32), (SMALL, 256)]


def title(case, batch):
    return f"{case['name']} batch {batch} P {'/'.join(map(str, case['prototypes']))}"


def variants(case, options, **values):
    """The methods' arguments and clusterings."""
    args, one, pcl = (settings(options, *flags, case=case, **values)
                      for flags in ((), ONE_HEAD, PCL_LOSS))
    clusterings = [losses.Clustering(
        torch.randint(size, (case["images"],)),
        F.normalize(torch.randn(size, DIM, device=options.device), dim=1),
        0.1 + 0.2 * torch.rand(size, device=options.device)) for size in case["prototypes"]]
    return dict(zip(VARIANTS, [(one, []), (pcl, clusterings), (one, clusterings),
                               (args, clusterings)]))


def one_step(ddp, optimizer, feed, index):
    """A training step on the two views that `feed` gives, a function of a variant's arguments and
    clusterings."""
    views = mock.Mock(epoch=lambda *_: [(*feed(), index, None)])
    scaler = torch.amp.GradScaler(enabled=False)

    def step(args, clusterings):
        run = dict(epoch=0, step=0, steps=2, clusterings=clusterings)
        args.batch_size = len(index)
        log = mock.Mock(**{"step.return_value": None})
        pretrain.m_step(ddp, optimizer, scaler, views, run, args, log, [], None)
    return step


def sgd(model, args, foreach=None):
    return torch.optim.SGD(model.encoder_q.parameters(), args.lr, args.momentum,
                           weight_decay=1e-4, foreach=foreach)


def step_functions(case, batch, methods, options, feed=None):
    """The floor, and a training step of each variant, on a model of as many heads and one batch, or
    on what `feed` gives."""
    device, size = options.device, case["size"]
    views = torch.randn(2 * batch, 3, size, size, device=device)
    im_q, im_k = views.contiguous(memory_format=torch.channels_last).chunk(2)
    index, steps = torch.randperm(case["images"])[:batch], {}
    for args, _ in methods.values():
        if args.heads not in steps:
            model = builder.MoCo(case["arch"], DIM, case["queue"], args.moco_m,
                                 small_images=size < 64, heads=args.heads)
            model.to(device, memory_format=torch.channels_last).train()
            model.queue.copy_(F.normalize(torch.randn_like(model.queue), dim=0))
            model.queue_index.fill_(OTHER_IMAGE)
            ddp = DistributedDataParallel(model)
            ddp.broadcast_buffers = ddp.forward_sync_buffers = False
            optimizer = sgd(model, args)
            steps[args.heads] = one_step(ddp, optimizer, feed or (lambda: (im_q, im_k)), index)
    gradient = torch.randn(batch, args.heads * DIM, device=device)

    def floor():  # with two heads
        optimizer.zero_grad()
        with pretrain.autocast(args):
            q = model.encoder_q(im_q)
            with torch.no_grad():
                model.encoder_k(im_k)
        q.backward(gradient.view_as(q).to(q.dtype))
    return {"floor": floor} | {name: lambda x=x: steps[x[0].heads](*x)
                               for name, x in methods.items()}


def speeds(functions, batch, seconds, options):
    """Figures of the floor and of each variant's step, by name."""
    gc.collect()  # what was measured before
    times = alternate(functions, options, seconds, options.calls)
    for name, function in functions.items():
        yield name, dict(pairs_per_s=batch / statistics.median(times[name]),
                         time_of_moco=ratio(times, name, "MoCo"),
                         speed_of_floor=ratio(times, "floor", name), MB=peak(function, options))


def fed_steps(seconds, options):
    """Figures of two views alone, of a PAUC step, and of one on such views: small and large."""
    sizes = [(SMALL, 256), (LARGE, 256)]
    if options.quick:
        sizes = [(TINY, 8), (TINY | dict(name="shufflenet 64 px", size=64), 8)]
    for case, batch in sizes:
        methods = dict(PAUC=variants(case, options)["PAUC"])
        functions = dict(views=views_of(case, batch, options))
        for name, feed in (("step", None), ("fed step", functions["views"])):
            functions[name] = step_functions(case, batch, methods, options, feed)["PAUC"]
        times = alternate(functions, options, seconds, options.calls)
        speed = {name: batch / statistics.median(times[name]) for name in times}
        yield case["name"], dict(time_of_step=ratio(times, "fed step", "step"), pairs_per_s=speed)


def training_step(options):
    for case, batch in cases(options):
        name = title(case, batch)
        if case is LARGE and not options.cuda:
            for variant, unit in itertools.product(("floor", *VARIANTS),
                                                   ("images/s", "MB at peak")):
                yield name, variant, None, unit
            continue
        methods = variants(case, options)
        functions = step_functions(case, batch, methods, options)
        times = alternate(functions, options, 30 if options.cuda else 90, options.calls)
        stored = sum(x.nbytes for clustering in methods["PAUC"][1] for x in clustering[1:])
        memory = {variant: peak(function, options) for variant, function in functions.items()}
        del functions, methods  # one model at a time, for the memory's sake
        gc.collect()
        for variant in times:
            speed = batch / statistics.median(times[variant])
            yield name, variant, speed, "images/s", ratio(times, "floor", variant), "floor"
            if memory[variant] is None:
                yield name, variant, None, "MB at peak"
                continue
            use = {x: memory[x] - stored / 2 ** 20 * (x in ("floor", "MoCo")) for x in times}
            yield name, variant, use[variant], "MB at peak", use[variant] / use["MoCo"], "MoCo"


def profile(options):
    """The trace shows where the device waits for the host."""
    case, batch = cases(options)[0 if options.cuda else -1]
    function = step_functions(case, batch, variants(case, options), options)["PAUC"]
    figures = profile_of(function, 30, options.profile, options)
    print(json.dumps(figures, indent=1))
    dist.destroy_process_group()


def profile_of(function, calls, path, options):
    """A trace of so many calls, in `path`, and figures of one: the lines where the host waits for
    the GPU, and how often; ms in calls of CUDA, the longest; the part of the time in which the GPU
    is busy; kernels, the part of their number and time that takes under SHORT microseconds, and ms
    of the longest. Without a GPU operations, which hold others, stand for kernels."""
    calls = 2 if options.quick else calls
    for _ in range(1 if options.quick else 3):
        function()
    places = waits(function) if options.cuda else []
    with torch.profiler.profile() as trace:
        start = clock(options)
        for _ in range(calls):
            function()
        seconds = clock(options) - start
    trace.export_chrome_trace(str(path))
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt") as file:
        events = [event for event in json.load(file)["traceEvents"] if "dur" in event]
    cuda_calls = [x for x in events if x.get("cat") in ("cuda_runtime", "cuda_driver")]
    kernels = [x for x in events if x.get("cat") == ("kernel" if options.cuda else "cpu_op")]
    short = [x["dur"] for x in kernels if x["dur"] < SHORT]
    total = sum(x["dur"] for x in kernels)
    return dict(waits={place: places.count(place) for place in places},
                cuda_calls=longest(cuda_calls, calls), busy=total / 1e6 / seconds,
                kernels=len(kernels) / calls, short=len(short) / len(kernels),
                short_time=sum(short) / total, longest=longest(kernels, calls))


def longest(events, calls):
    """The LONGEST of a trace's events: ms a call, by name."""
    ms = {}
    for event in events:
        ms[event["name"]] = ms.get(event["name"], 0) + event["dur"] / 1000 / calls
    return dict(sorted(ms.items(), key=lambda item: -item[1])[:LONGEST])


def waits(function):
    """The lines at which a call waits for the GPU. What is not noticed so is in calls of CUDA."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        function()
    torch.cuda.set_sync_debug_mode("default")
    said = [warning for warning in said if "synchroniz" in str(warning.message)]
    return [f"{Path(warning.filename).name}:{warning.lineno}" for warning in said]


def proto_nce_by_sets(q, prototypes, concentration, assignments, num_negatives=None,
                      generator=None):
    """losses.proto_nce with the negatives drawn as PCL's code draws them."""
    positives, target = assignments.to(q.device).unique(return_inverse=True)
    negatives = list(set(range(len(prototypes))) - set(positives.tolist()))
    if num_negatives is not None and num_negatives < len(negatives):
        negatives = random.sample(negatives, num_negatives)
    negatives = torch.tensor(negatives, dtype=torch.long, device=q.device)
    chosen = torch.cat([positives, negatives])
    logits = q @ prototypes[chosen].T / concentration[chosen]
    accuracy = (logits.detach().argmax(1) == target).to(q.dtype).mean()
    return F.cross_entropy(logits, target), accuracy


def loss_functions(case, batch, methods, options):
    """Forward and backward of each variant's loss, and, with clusterings, with negatives drawn by
    sets."""
    q, k = F.normalize(torch.randn(2, batch, DIM, device=options.device), dim=2)
    queue = F.normalize(torch.randn(DIM, case["queue"], device=options.device), dim=0)
    queue_index = torch.full((case["queue"],), OTHER_IMAGE, device=options.device)
    index, count = torch.randperm(case["images"])[:batch], itertools.count()
    q.requires_grad_()

    def run(args, clusterings, draw=losses.proto_nce):
        q.grad = None
        whole = losses.Batch(q, k, q, k, index, queue, queue_index, slice(batch), 0, next(count))
        with mock.patch.object(losses, "proto_nce", draw):
            pretrain.pauc(whole, clusterings, args)[0].backward()
    functions = {name: lambda x=x: run(*x) for name, x in methods.items()}
    for name, x in methods.items():
        if x[1]:
            functions[f"{name}, negatives by sets"] = lambda x=x: run(*x, proto_nce_by_sets)
    return functions


def loss_part(options):
    for case, batch in cases(options):
        functions = loss_functions(case, batch, variants(case, options), options)
        times = alternate(functions, options, 10, options.calls)
        for name in times:
            of = name.split(",")[0] if "sets" in name else "MoCo"
            speed = 1000 * statistics.median(times[name])
            yield title(case, batch), name, speed, "ms", ratio(times, name, of), of


# --------------------------------------------------------------- c: decoding and augmentation


def write_photographs(folder, number, width, height, kilobytes=None):
    """JPEG files of 1/f noise, of the quality that fits a size (ImageNet's is 110 kB), or 90, and
    then smooth like a camera's."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)).clip(1 / width)
    frequency **= 1 if kilobytes else 1.25
    sizes = []
    for i in range(number):
        noise = np.random.default_rng(i).normal(size=(3, height, width))
        x = np.fft.irfft2(np.fft.rfft2(noise) / frequency, s=(height, width))
        x = 0.7 * x.mean(0) + 0.3 * x  # channels of a photograph go together
        pixels = (128 + 50 * x / x.std()).clip(0, 255).astype(np.uint8)
        image = Image.fromarray(pixels.transpose(1, 2, 0))
        files = []
        for quality in range(60, 97, 2) if kilobytes else (90,):
            image.save(file := io.BytesIO(), "JPEG", quality=quality)
            files.append(file.getvalue())
        best = min(files, key=lambda data: abs(len(data) - 1000 * (kilobytes or 0)))
        (folder / f"{i:03}.jpg").write_bytes(best)
        sizes.append(len(best) / 1000)
    return statistics.mean(sizes)


def moco_v2(size):
    """The pipeline of MoCo v2's code, on PIL images."""
    def gaussian_blur(image):
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2)))
    return transforms.Compose([
        transforms.RandomResizedCrop(size, (0.2, 1)),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        transforms.RandomGrayscale(p=0.2),
        transforms.RandomApply([gaussian_blur], p=0.5),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(*loader.IMAGENET_STATISTICS)])


def augmentation(options):
    kinds = [(500, 375, 110, 32), (4000, 3000, None, 3)]
    for width, height, kilobytes, number in [(300, 200, 20, 2)] if options.quick else kinds:
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root) / "train" / "class"
            folder.mkdir(parents=True)
            kilobytes = write_photographs(folder, number, width, height, kilobytes)
            case = f"{width}x{height} JPEG of {kilobytes:.0f} kB, 224 px"
            yield from reading(case, root, sorted(folder.iterdir()), options)
    augment = loader.Augment("v2", 224, loader.IMAGENET_STATISTICS).to(options.device)
    x = torch.rand(512 if options.cuda else 64, 3, 224, 224, device=options.device)
    u = torch.rand(len(x), loader.DRAWS, device=options.device)
    times = alternate({"": lambda: augment(x, u)}, options, 5, options.calls)[""]
    variant = f"Augment, {options.device.type}, all threads"
    yield "two views of 224 px", variant, len(x) / 2 / statistics.median(times), "pairs/s"


def reading(case, root, paths, options, size=224):
    """Two views, and the centres, on one core, as a data worker has it."""
    data, transform = loader.load("folder", root)[0], moco_v2(size)
    augment, threads = loader.Augment("v2", size, data.statistics), torch.get_num_threads()
    number, epochs = len(paths), itertools.count()

    def decode():
        for path in paths:
            Image.open(path).convert("RGB")

    def pil():
        for path in paths:
            image = Image.open(path).convert("RGB")
            transform(image), transform(image)

    def worker():
        u = torch.rand(number, 2, loader.TRIES, loader.DRAWS_OF_A_BOX)
        return data.random_crops(torch.arange(number), u, size, 0.2)

    def both():
        x = worker().flatten(0, 1)
        return augment(x, torch.rand(len(x), loader.DRAWS))
    functions = {"PIL pipeline of MoCo v2": pil, "decode alone": decode, "worker": worker,
                 "worker and Augment": both,
                 "centres": lambda: data.centre_crops(size, range(number))}
    if options.old:
        old = importlib.util.spec_from_file_location("old_loader", options.old / "loader.py")
        sys.modules[old.name] = module = importlib.util.module_from_spec(old)
        old.loader.exec_module(module)
        files = module.load("folder", root)[0]
        crops = module.RandomCrops(files, size, 0, 2, 0.2)
        centres = module.CentreCrops(files, size, int(size * loader.RESIZED))
        functions |= {
            "old worker": lambda: torch.stack(
                [crops[next(epochs), i] for i in range(number)]),
            "old centres": lambda: torch.stack([centres[i][0] for i in range(number)])}
    torch.set_num_threads(1)
    times = alternate(functions, options, 40, rounds=5)
    torch.set_num_threads(threads)
    for name in times:
        unit = "images/s a core" if "centres" in name else "pairs/s a core"
        of = f"old {name}" if f"old {name}" in times else "PIL pipeline of MoCo v2"
        compared = () if "centres" in name and not options.old else (ratio(times, of, name), of)
        yield case, name, number / statistics.median(times[name]), unit, *compared
    for every in 1, 2, 4:  # where reading is the limit
        longer = 1 + ratio(times, "centres", "worker") / every
        yield case, f"an epoch of PAUC, --cluster-every {every}", longer, "of MoCo's"


def first_run(options):
    """The README's two commands, as they stand, in this checkout and in the older one."""
    small = ("--epochs", "1", "--arch", "shufflenet_v2_x0_5") if options.quick else ()
    seconds = {}
    for name, folder in (("old ", options.old), ("", Path(__file__).parent.parent)):
        with tempfile.TemporaryDirectory() as output:
            source = ["--pretrained", f"{output}/checkpoint.pth"]
            for script, *more in (["pretrain.py", "--output", output], ["lincls.py", *source]):
                start = time.perf_counter()
                if folder:
                    subprocess.run([sys.executable, script, *more, *small], check=True, cwd=folder,
                                   stdout=subprocess.DEVNULL)
                seconds[name + script] = time.perf_counter() - start
    for name, value in seconds.items():
        if options.old or "old" not in name:
            of = (value / seconds[f"old {name}"], f"old {name}") if options.old and (
                "old" not in name) else ()
            yield "digits", name, value, "s", *of


def views_of(case, batch, options):
    """A function that makes two views of a batch of images: small ones are in the device's memory,
    of large ones there are the crops, as data workers leave them."""
    size, rows, device = case["size"], 2 * batch, options.device
    augment = loader.Augment("v2", size, loader.IMAGENET_STATISTICS).to(device)
    images = torch.randint(256, (rows, 3, size, size), dtype=torch.uint8)
    small = size < loader.SMALL_CROP
    if small:
        images = images.to(device)
    elif options.cuda:
        images = images.pin_memory()

    def views():
        x = images.to(device, non_blocking=True)
        if small:
            draws = torch.rand(rows, loader.TRIES, loader.DRAWS_OF_A_BOX, device=device)
            x = loader.resample(x, loader.random_boxes(draws, size, size, 0.2), size)
        x = augment(x, torch.rand(rows, loader.DRAWS, device=device))
        return x.unflatten(0, (-1, 2)).unbind(1)
    return views


# ----------------------------------------------------------------------------------- d: the E-step


def embeddings(n, options):
    """(n, 128) unit rows: 50 coarse centres, 1000 finer ones and 10,000 finest, which overlap, of
    unequal size and spread, with a decaying spectrum. The same structure whatever the number of
    prototypes."""
    g = torch.Generator().manual_seed(0)
    x, spectrum = torch.randn(50, DIM, generator=g), torch.arange(1, DIM + 1) ** -1.0
    for number, scale in ((1000, 0.9), (10_000, 0.7)):
        parent = torch.randint(len(x), (number,), generator=g)
        x = x[parent] + scale * torch.randn(number, DIM, generator=g)
    share = torch.randperm(len(x), generator=g).add(100.0) ** -0.7
    parent = torch.multinomial(share, n, replacement=True, generator=g)
    spread = 0.4 + 0.8 * torch.rand(len(x), 1, generator=g)
    noise = spread[parent] * torch.randn(n, DIM, generator=g)
    return F.normalize((x[parent] + noise) * spectrum, dim=1).to(options.device)


def speed_of_kmeans(options):
    """Multiply-adds a second of pretrain.kmeans, for a guess at what the large ones take."""
    n, size = (200_000, 4000) if options.cuda else (20_000, 1000)
    if options.quick:
        n, size = 500, 10
    v, args = embeddings(n, options), settings(options, "--kmeans-iters", "4")
    pretrain.kmeans(v, size, 0, args)  # warm-up
    start = clock(options)
    pretrain.kmeans(v, size, 0, args)
    return 5 * n * size * DIM / (clock(options) - start)  # four iterations and the last search


def measure_kmeans(v, size, flags, speed, options):
    """Seconds, objective, and a remark; None where it would take longer than the limit."""
    args = settings(options, *flags)
    work = len(v) * size * DIM * args.kmeans_iters / speed  # of one restart
    restarts, remark = args.kmeans_restarts, ""
    if work * restarts > options.limit and restarts > 1:
        args.kmeans_restarts, remark = 1, f", {restarts} x 1 restart"
    if work * args.kmeans_restarts > options.limit:
        return None, None, f", about {work * restarts:.0f} s"
    start = clock(options)
    _, objective = pretrain.kmeans(v, size, 1, args)
    seconds = (clock(options) - start) * restarts / args.kmeans_restarts
    return seconds, objective.item(), remark


def concentration_by_loop(squared, assignments, num_prototypes, temperature):
    """losses.concentration as PCL's code has it, image by image; from squared distances, as faiss
    gives them."""
    members = [[] for _ in range(num_prototypes)]
    for image, j in enumerate(assignments):
        members[j].append(squared[image])
    phi = np.zeros(num_prototypes)
    for j, distances in enumerate(members):
        if len(distances) > 1:
            phi[j] = (np.asarray(distances) ** 0.5).mean() / np.log(len(distances) + 10)
    largest = phi.max()
    for j, distances in enumerate(members):
        if len(distances) <= 1:
            phi[j] = largest
    phi = phi.clip(np.percentile(phi, 10), np.percentile(phi, 90))
    return torch.from_numpy(temperature * phi / phi.mean())


def e_step(options):
    n = 500 if options.quick else IMAGENET if options.cuda else 100_000
    v, speed = embeddings(n, options), speed_of_kmeans(options)
    for images in (50, 25, 12):
        case, pcl = f"k-means, N {n} P {n // images}", None
        for variant, flags in (("PCL's", PCL_KMEANS), ("ours", ())):
            *values, remark = measure_kmeans(v, n // images, flags, speed, options)
            pcl = pcl or values
            for value, base, unit in zip(values, pcl, ("s", "objective")):
                compared = (value / base, "PCL's") if value and base else ()
                yield case, variant + remark, value, unit, *compared
    for total in dict.fromkeys([n] if options.quick else [n, IMAGENET]):
        squared = torch.rand(total) + 0.1
        clusterings = [(torch.randint(total // x, (total,)), total // x) for x in (50, 25, 12)]
        on_device = [(squared.to(options.device), x.to(options.device), size, 0.2)
                     for x, size in clusterings]
        arrays = [(squared.numpy(), x.numpy(), size, 0.2) for x, size in clusterings]

        def ours():
            return [losses.concentration(x.sqrt(), *rest) for x, *rest in on_device]

        def loop():
            return [concentration_by_loop(*x) for x in arrays]
        for a, b in zip(ours(), loop()):
            torch.testing.assert_close(a.cpu().double(), b, rtol=1e-4, atol=0)
        times = alternate({"loop over images": loop, "ours": ours}, options, 0)
        for name in times:
            seconds, of = statistics.median(times[name]), "loop over images"
            yield f"concentration, N {total} x 3", name, seconds, "s", ratio(times, name, of), of


# ------------------------------------------------------------------- f: counted, not measured


class Counter(FakeTensorMode):
    """Counts what is done to tensors without values, as all are that are made in here: operations
    that make more than a view, each a kernel or several, and the bytes that live, at most."""

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self.within, self.kernels, self.bytes, self.peak = False, 0, 0, 0
        self.storages = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        makes = any(isinstance(x, torch.device) and x.type == "cpu" for x in leaves)
        if not makes and not any(isinstance(x, FakeTensor) for x in leaves):
            return func(*args, **kwargs)  # of tensors made before
        if self.within:  # of the operations that another one is made of
            return super().__torch_dispatch__(func, types, args, kwargs)
        self.within = True
        try:
            result = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self.within = False
        launches_nothing = func.is_view or "empty" in func.name()
        self.kernels += func.namespace == "aten" and not launches_nothing
        for x in tree_leaves(result):
            if isinstance(x, FakeTensor) and x.untyped_storage() not in self.storages:
                self.keep(x.untyped_storage())
        return result

    def keep(self, storage):
        self.storages.add(storage)
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self.free, storage.nbytes())

    def free(self, number):
        self.bytes -= number


def count(case, batch, args, clusterings):
    """GFlop of a step's matrix products and convolutions, kernels, and MB at most."""
    index = torch.randperm(case["images"])[:batch]
    with torch.device("meta"):
        model = builder.MoCo(case["arch"], DIM, case["queue"], small_images=case["size"] < 64,
                             heads=args.heads)
    exchanged = mock.Mock(return_value=(dict(loss=0), 0))
    with Counter() as counter, mock.patch.object(pretrain, "exchange", exchanged), \
            mock.patch.object(builder, "gather", torch.clone):
        model._apply(lambda x: torch.empty(x.shape, dtype=x.dtype, device="cpu"))
        clusterings = [losses.Clustering(assignments, *(torch.empty(x.shape) for x in others))
                       for assignments, *others in clusterings]
        im_q, im_k = torch.empty(2, batch, 3, case["size"], case["size"])
        ddp = mock.Mock(side_effect=model, module=model)
        step = one_step(ddp, sgd(model, args, foreach=True), lambda: (im_q, im_k), index)
        step(args, clusterings)  # makes the optimizer's state
        counter.kernels, counter.peak = 0, counter.bytes
        with FlopCounterMode(display=False) as flops:
            step(args, clusterings)
    return flops.get_total_flops() / 1e9, counter.kernels, counter.peak / 2 ** 20


def counted(options):
    """In one process, in bf16, by the CPU's autocast; without DDP's buckets of gradients."""
    case, batch = TINY | dict(name=SMALL["name"], arch=SMALL["arch"]), 8  # of few operations
    if not options.quick:
        case, batch = LARGE, 256
    options = argparse.Namespace(device=torch.device("cpu"), cuda=False)
    moco = None
    for name, (args, clusterings) in variants(case, options, amp="bf16").items():
        values = count(case, batch, args, clusterings)
        moco = moco or values
        for value, base, unit in zip(values, moco, ("GFlop", "kernels", "MB at peak")):
            yield title(case, batch), name, value, unit, value / base, "MoCo"


PARTS = dict(a=training_step, b=loss_part, c=augmentation, d=e_step, e=first_run, f=counted)

if __name__ == "__main__":
    main()
