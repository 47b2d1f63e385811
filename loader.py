"""Images in: data sets by name or folder, two augmented views with the image's index, sharding for evaluation.

Images of a folder are read and cropped by workers, images in memory are cropped on the device; all else is done to whole
batches on the device. Random numbers come from `key(seed, epoch, index)` for what a worker does to an image, and from
`key(seed, epoch, step)` for what is done to a global batch, of which each process takes its rows. So a run sees the same
views for any number of workers and processes, and can go on at any step without replaying what came before.

n images of this process, N of the global batch, V views of each, S pixels of a crop.
"""
import gzip
import hashlib
import math
import os
import signal
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional

DATASETS = ("folder", "digits", "cifar10", "cifar100", "fashionmnist")
IMAGENET_STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def key(*parts):
    """A 63-bit generator seed that depends on every part: key(seed, epoch, index)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


# ---------------------------------------------------------------------------------------------------------- data sets


def load(dataset, root, split, classes=None, device="cpu"):
    """The `split` ("train" or "val") of a data set: Files, or Arrays on `device`; None where there is no such split.

    dataset: one of DATASETS. root: the image folder, or where torchvision's sets are or will be put. classes: a file of
    class folders to keep, one a line. Both kinds have `labels` (n,) long on the CPU, -1 where there are none; `num_classes`;
    and `statistics`, the mean and standard deviation of the channels. Raises ValueError or OSError with a line for the user.
    """
    if dataset != "folder" and classes:
        raise ValueError("--classes: only an image folder has class folders to choose from")
    train = split == "train"
    if dataset == "folder":
        return _folder(Path(root), split, classes)
    if dataset == "digits":
        digits = load_digits()
        images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # 1797x8x8
        halves = train_test_split(images, digits.target, test_size=0.2, stratify=digits.target, random_state=0)
        return Arrays(halves[0 if train else 1], halves[2 if train else 3], device)
    raw = Path(root) / "FashionMNIST" / "raw" / ("train" if train else "t10k")
    files = [Path(f"{raw}-{name}.gz") for name in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    if dataset == "fashionmnist" and all(f.is_file() for f in files):
        try:
            images, labels = (gzip.decompress(f.read_bytes()) for f in files)
            labels = np.frombuffer(labels, np.uint8, offset=8)
            return Arrays(np.frombuffer(images, np.uint8, offset=16).reshape(len(labels), 28, 28), labels, device)
        except (EOFError, ValueError, OSError, zlib.error) as error:
            raise OSError(f"{files[0].parent}: a file is damaged ({error}); fetch it again") from None
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "fashionmnist": datasets.FashionMNIST}[dataset]
    try:
        data = kind(root, train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise OSError(f"{root}: {dataset} is not there and cannot be downloaded ({error}); put its archives there, or "
                      f"name the folder that holds them: python pretrain.py DIR --dataset {dataset}") from None
    return Arrays(np.asarray(data.data), data.targets, device)


class Arrays:
    """A data set in the device's memory, of images (n, H, W) or (n, H, W, 3) uint8, and labels (n,)."""

    def __init__(self, images, labels, device="cpu"):
        images = torch.from_numpy(np.array(images)).to(device)
        self.images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)  # nxcxHxW
        self.labels = torch.as_tensor(np.array(labels), dtype=torch.long)
        self.num_classes = int(self.labels.max()) + 1
        part = self.images[:10_000].double() / 255
        self.statistics = tuple(x.expand(3).tolist() for x in (part.mean((0, 2, 3)), part.std((0, 2, 3), correction=0)))

    def __len__(self):
        return len(self.images)


class Files(Dataset):
    """A data set of image files: (3, H, W) uint8, label. An image that cannot be read raises OSError with its path."""

    def __init__(self, samples, num_classes):
        # Arrays, not lists: a million Python objects would be copied into every worker as their reference counts change.
        self.paths = np.array([os.fsencode(path) for path, _ in samples])
        self.labels = torch.tensor([label for _, label in samples])
        self.num_classes, self.statistics = num_classes, IMAGENET_STATISTICS

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        path, label = os.fsdecode(self.paths[i]), int(self.labels[i])
        try:
            with Image.open(path) as image:
                return functional.pil_to_tensor(to_rgb(image)), label
        except Exception as error:  # PIL raises nearly anything on a broken file
            raise OSError(f"{path}: cannot be read as an image ({error}); replace or remove it") from None


def _folder(root, split, classes):
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; give one that holds train/CLASS/*.jpg, or any tree of images")
    train = root / "train" if (root / "train").is_dir() else root
    folders = sorted(entry.name for entry in os.scandir(train) if entry.is_dir())
    if classes:
        keep = _lines(classes)
        missing = sorted(keep.difference(folders))
        if missing or not keep:
            raise ValueError(f"--classes {classes}: " + (f"{train} has no folder {missing[0]!r}" if missing else "is empty"))
        folders = sorted(keep)
    labelled = bool(folders) and (train != root or bool(classes))
    if split == "val" and not (labelled and (root / "val").is_dir()):
        return None
    directory, extensions = (train if split == "train" else root / "val"), datasets.folder.IMG_EXTENSIONS
    if labelled:
        numbers = {name: i for i, name in enumerate(folders)}
        samples = datasets.folder.make_dataset(str(directory), numbers, extensions, allow_empty=True)
    else:  # unlabelled images, wherever below they are
        samples = [(os.path.join(parent, name), -1) for parent, _, names in os.walk(directory, followlinks=True)
                   for name in names if datasets.folder.has_file_allowed_extension(name, extensions)]
        samples.sort()
    if not samples:
        where = f"in the class folders of {train}" if labelled else "at any depth"
        raise FileNotFoundError(f"{directory}: holds no image {where}; these are read: {' '.join(extensions)}")
    return Files(samples, len(folders) if labelled else 0)


def _lines(path):
    try:
        return set(filter(None, map(str.strip, Path(path).read_text().splitlines())))
    except (OSError, UnicodeDecodeError) as error:
        raise OSError(f"--classes {path}: cannot be read ({error}); give a text file with one folder name a line") from None


def to_rgb(image):
    """Any PIL image as 8-bit RGB: transparency over white, 16 bits scaled to 8."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.float64)
        image = Image.fromarray((values if image.mode == "F" else values / 257).clip(0, 255).round().astype(np.uint8))
    elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


# -------------------------------------------------------------------------------------------------------------- views


class Batches:
    """The batches of a shuffled epoch, the same for any number of processes; an incomplete last one is dropped.

    Set `epoch`, and `start` to leave out the steps before it. A DataLoader takes this process's rows of each from it, as
    (epoch, index).
    """

    def __init__(self, total, batch_size, seed, rank=0, world_size=1):
        self.total, self.batch_size, self.seed = total, batch_size, seed
        self.rows = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self.epoch = self.start = 0

    def __len__(self):
        return self.total // self.batch_size - self.start

    def __iter__(self):
        return ([(self.epoch, i) for i in index[self.rows].tolist()] for _, index in self.whole())

    def whole(self):
        """Each step and the indices (N,) of its global batch."""
        order = torch.randperm(self.total, generator=torch.Generator().manual_seed(key(self.seed, self.epoch)))
        for step in range(self.start, self.total // self.batch_size):
            yield step, order[step * self.batch_size:(step + 1) * self.batch_size]


class Views:
    """The training batches of one process: V random views (n, 3, S, S) of each of its images, on `device`; the indices (N,)
    of the whole batch's images, on the CPU; and the labels (n,) of its own, on `device`.

    augment: what is done after cropping. min_scale: the least share of an image's area that a crop takes.
    """

    def __init__(self, data, batches, augment, device, views=2, min_scale=0.2, workers=0):
        self.data, self.batches, self.augment, self.device = data, batches, augment.to(device), device
        self.views, self.min_scale = views, min_scale
        if isinstance(data, Files):
            self.crops = in_workers(RandomCrops(data, augment.size, batches.seed, views, min_scale), workers, device,
                                    batch_sampler=batches, persistent_workers=workers > 0)

    def __iter__(self):
        crops = iter(self.crops) if isinstance(self.data, Files) else None
        for step, index in self.batches.whole():
            own, generator = index[self.batches.rows], torch.Generator().manual_seed(
                key(self.batches.seed, self.batches.epoch, "step", step))
            draws = torch.rand(len(index), self.views, Augment.draws + (0 if crops else 40), generator=generator)
            draws = draws[self.batches.rows].flatten(0, 1).to(self.device, non_blocking=True)  # nV rows
            if crops:
                x = next(crops).flatten(0, 1).to(self.device, non_blocking=True)
            else:
                images = self.data.images[own.to(self.device, non_blocking=True)].repeat_interleave(self.views, dim=0)
                boxes = random_boxes(draws[:, Augment.draws:].view(-1, 10, 4), *images.shape[2:], self.min_scale)
                x = resample(images, boxes, self.augment.size)
            x = self.augment(x, draws[:, :Augment.draws]).unflatten(0, (-1, self.views))
            yield *x.unbind(1), index, self.data.labels[own].to(self.device, non_blocking=True)


class RandomCrops(Dataset):
    """RandomResizedCrops of image files: (V, 3, S, S) uint8. Indexed by (epoch, index), as `Batches` yields them."""

    def __init__(self, data, size, seed, views, min_scale):
        self.data, self.size, self.seed, self.views, self.scale = data, size, seed, views, (min_scale, 1)

    def __getitem__(self, epoch_index):
        image, _ = self.data[epoch_index[1]]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(key(self.seed, *epoch_index))
            boxes = [RandomResizedCrop.get_params(image, self.scale, (3 / 4, 4 / 3)) for _ in range(self.views)]
        return torch.stack([functional.resized_crop(image, *box, [self.size] * 2, antialias=True) for box in boxes])


def random_boxes(u, height, width, min_scale, ratio=(3 / 4, 4 / 3)):
    """RandomResizedCrop's boxes (n, 4), each top, left, height, width, from uniform u (n, 10, 4): the first of ten tries at
    a share of the area and an aspect ratio that fits into the image, and the whole image if none does."""
    area = height * width * (min_scale + (1 - min_scale) * u[..., 0])
    aspect = torch.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * u[..., 1])
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()  # nx10
    top, left = (u[..., 2] * (height - h + 1)).floor(), (u[..., 3] * (width - w + 1)).floor()
    fits = (h > 0) & (h <= height) & (w > 0) & (w <= width)
    boxes = torch.stack([top, left, h, w], dim=-1)
    first = boxes[torch.arange(len(u), device=u.device), fits.to(torch.uint8).argmax(1)]
    whole = torch.stack([torch.full_like(u[:, 0, 0], side) for side in (0, 0, height, width)], dim=1)
    return torch.where(fits.any(1, keepdim=True), first, whole)


def resample(images, boxes, size):
    """Cut `boxes` (n, 4), each top, left, height, width, out of images (n, c, H, W) uint8, and resize them as PIL's bilinear
    filter does, with antialiasing: (n, 3, size, size) float32 in [0, 1]. The filter is a matrix for rows and for columns."""
    def weights(start, length, total):  # nx1, nx1 -> nxsizextotal
        pixel = torch.arange(total, device=images.device) + 0.5
        centre = start + length / size * (torch.arange(size, device=images.device) + 0.5)
        support = (length / size).clamp(min=1)[:, :, None]
        triangle = (1 - (pixel - centre[:, :, None]).abs() / support).clamp(min=0)
        inside = (pixel > start) & (pixel < start + length)
        triangle = triangle * inside[:, None]
        return triangle / triangle.sum(-1, keepdim=True)
    top, left, height, width = boxes[:, :, None].unbind(1)
    rows, columns = weights(top, height, images.shape[2]), weights(left, width, images.shape[3])
    crops = rows[:, None] @ (images.float() / 255) @ columns[:, None].mT
    return crops.expand(-1, 3, -1, -1)


class Augment(nn.Module):
    """What MoCo does to a crop after cutting it, to a whole batch, with draws of its own for each image.

    aug: "v1" or "v2" (arXiv 2003.04297), or "crop" for flip alone, as in the linear probe. size: S; crops under 64 pixels
    are not blurred. statistics: mean and standard deviation of the channels. flip: mirror half of the images.
    The operations are torchvision's on floats: unlike in PIL's pipeline nothing is rounded to 8 bits on the way, and the
    blur is a Gaussian, not three box filters.
    """
    draws = 13

    def __init__(self, aug, size, statistics, flip=True):
        super().__init__()
        self.aug, self.size, self.flip = aug, size, flip
        self.register_buffer("mean", torch.tensor(statistics[0]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(statistics[1]).view(3, 1, 1))

    def forward(self, x, u=None):
        """x: (n, 3, S, S) uint8, or float in [0, 1]; u: (n, draws) uniform in [0, 1), which "crop" without flip does not need.
        Returns (n, 3, S, S) float32, normalised."""
        x = x / 255 if x.dtype == torch.uint8 else x
        if self.aug == "v1":
            x = torch.where(_each(u[:, 1] < 0.2), grey(x), x)
            x = self.jitter(x, u, hue=0.4)
        elif self.aug == "v2":
            x = torch.where(_each(u[:, 0] < 0.8), self.jitter(x, u, hue=0.1), x)
            x = torch.where(_each(u[:, 1] < 0.2), grey(x), x)
            if self.size >= 64:
                x = torch.where(_each(u[:, 2] < 0.5), blur(x, 0.1 + 1.9 * u[:, 4]), x)
        if self.flip:
            x = torch.where(_each(u[:, 3] < 0.5), x.flip(-1), x)
        return ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def jitter(self, x, u, hue, strength=0.4):
        """torchvision's ColorJitter: brightness, contrast, saturation and hue, in an order of each image's own."""
        factors = 1 + strength * (2 * u[:, 5:8] - 1)  # of brightness, contrast, saturation
        order = u[:, 9:13].argsort(1)  # which operation comes first, second, ...; 3 is the hue
        place = (order == 3).to(torch.uint8).argmax(1)
        for slot in range(3):
            x = _blend(x, order[:, slot], factors, slot < place)
        x = shift_hue(x, hue * (2 * u[:, 8] - 1))
        for slot in range(1, 4):
            x = _blend(x, order[:, slot], factors, slot > place)
        return x


def grey(x):
    """(n, 3, S, S) -> (n, 1, S, S): ITU-R 601's luma."""
    r, g, b = x.split(1, dim=1)
    return 0.299 * r + 0.587 * g + 0.114 * b


def shift_hue(x, shift):
    """Turn the hue of x (n, 3, S, S) in [0, 1] by shift (n,), in turns, and keep HSV's saturation and value."""
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    r, g, b = x.unbind(1)
    safe = torch.where(chroma == 0, 1, chroma)
    sixth = torch.where(value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    sixth = sixth + 6 * shift[:, None, None]
    channels = []
    for offset in (5, 3, 1):  # HSV to RGB without cases: a channel is value - chroma * a trapezium of the hue
        k = (sixth + offset) % 6
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, dim=1)


def blur(x, sigma, radius=8):
    """Gaussian blur of x (n, 3, S, S) by sigma (n,) pixels, at most radius / 4; the edge's pixels are repeated outwards."""
    size = x.shape[-1]
    distance = torch.arange(-radius, size + radius, device=x.device) - torch.arange(size, device=x.device)[:, None]
    weights = (-distance.square() / (2 * sigma[:, None, None].square())).softmax(-1)[:, None]  # nx1xSx(S + 2 radius)
    return weights @ F.pad(x, [radius] * 4, mode="replicate") @ weights.mT


def _blend(x, operation, factors, active):
    """Each image's brightness (0), contrast (1) or saturation (2) by its factor: a blend with black, mean grey or grey."""
    luma = grey(x)
    other = torch.where(_each(operation == 2), luma, _each(operation == 1) * luma.mean((2, 3), keepdim=True))
    factor = factors.gather(1, operation.clamp(max=2)[:, None])[:, 0]
    factor = _each(torch.where(active, factor, 1))
    return (factor * x + (1 - factor) * other).clamp(0, 1)


def _each(x):
    return x[:, None, None, None]


# --------------------------------------------------------------------------------------------------------- evaluation


def evaluation(data, size, device, batch_size, rank=0, world_size=1, workers=0):
    """One process's shard of a data set, in batches: the images' centres (n, 3, size, size), normalised, on `device`, and
    their labels (n,). The centre is that of the image with its shorter side resized to 256/224 of `size`."""
    rows, resized = shard(len(data), rank, world_size), size * 256 // 224
    normalise = Augment("crop", size, data.statistics, flip=False).to(device)
    if isinstance(data, Files):
        crops = in_workers(CentreCrops(data, size, resized), workers, device, batch_size=batch_size, sampler=rows)
        for x, labels in crops:
            yield normalise(x.to(device, non_blocking=True)), labels
        return
    height, width = data.images.shape[2:]
    side = min(height, width) * size / resized
    box = torch.tensor([[(height - side) / 2, (width - side) / 2, side, side]], device=device)
    for start in range(rows.start, rows.stop, batch_size):
        own = slice(start, min(start + batch_size, rows.stop))
        yield normalise(resample(data.images[own], box, size)), data.labels[own]


class CentreCrops(Dataset):
    def __init__(self, data, size, resized):
        self.data, self.size, self.resized = data, size, resized

    def __getitem__(self, i):
        image, label = self.data[i]
        return functional.center_crop(functional.resize(image, [self.resized], antialias=True), self.size), label


def in_workers(data, workers, device, **options):
    # Below a spawned process workers would be spawned too, and import torch anew for every E-step: ten seconds each.
    context = "fork" if workers and sys.platform == "linux" else None
    return DataLoader(data, num_workers=workers, pin_memory=torch.device(device).type == "cuda",
                      worker_init_fn=leave_signals_to_the_parent, multiprocessing_context=context, **options)


def leave_signals_to_the_parent(_):
    """A signal to the whole job is not to kill a worker under a step that is to be finished. A second SIGTERM is: by it
    multiprocessing ends what is left at exit."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def shard(total, rank, world_size):
    """The rows of `total` that process `rank` holds: ceil(total / world_size) in a row, fewer at the end, none twice."""
    size = -(-total // world_size)
    return range(min(rank * size, total), min((rank + 1) * size, total))
