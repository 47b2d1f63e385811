"""Images in: data sets by name or folder, two augmented views with the image's index, sharding for evaluation.

Random numbers come from `key(seed, epoch, index)`, never from a worker's state: a run sees the same views for any number
of workers and processes, and can go on at any step without replaying what came before.
"""
import gzip
import hashlib
import os
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import Dataset
from torchvision import datasets, transforms

DATASETS = ("folder", "digits", "cifar10", "cifar100", "fashionmnist")
IMAGENET_STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def key(*parts):
    """A 63-bit generator seed that depends on every part: key(seed, epoch, index)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


# ---------------------------------------------------------------------------------------------------------- data sets


def load(dataset, root, split, classes=None):
    """The `split` ("train" or "val") of a data set: a Dataset of (RGB image, label), None where there is no such split.

    dataset: one of DATASETS. root: the image folder, or where torchvision's sets are or will be put. classes: a file of
    class folders to keep, one a line. The Dataset has `labels` (n,) long, -1 where there are none; `num_classes`; and
    `statistics`, the mean and standard deviation of the channels. Raises ValueError or OSError with a line for the user.
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
        return Arrays(halves[0 if train else 1], halves[2 if train else 3])
    raw = Path(root) / "FashionMNIST" / "raw" / ("train" if train else "t10k")
    files = [Path(f"{raw}-{name}.gz") for name in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    if dataset == "fashionmnist" and all(f.is_file() for f in files):
        try:
            images, labels = (gzip.decompress(f.read_bytes()) for f in files)
            labels = np.frombuffer(labels, np.uint8, offset=8)
            return Arrays(np.frombuffer(images, np.uint8, offset=16).reshape(len(labels), 28, 28), labels)
        except (EOFError, ValueError, OSError, zlib.error) as error:
            raise OSError(f"{files[0].parent}: a file is damaged ({error}); fetch it again") from None
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "fashionmnist": datasets.FashionMNIST}[dataset]
    try:
        data = kind(root, train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise OSError(f"{root}: {dataset} is not there and cannot be downloaded ({error}); put its archives there, or "
                      f"name the folder that holds them: python pretrain.py DIR --dataset {dataset}") from None
    return Arrays(np.asarray(data.data), data.targets)


class Arrays(Dataset):
    """A data set in memory: images (n, H, W) or (n, H, W, 3) uint8, labels (n,)."""

    def __init__(self, images, labels):
        self.images = images
        self.labels = torch.as_tensor(np.array(labels), dtype=torch.long)
        self.num_classes = int(self.labels.max()) + 1
        channels = images[:10_000].reshape(-1, images.shape[3] if images.ndim == 4 else 1)
        mean, std = channels.mean(0) / 255, channels.std(0) / 255
        self.statistics = np.broadcast_to(mean, 3).tolist(), np.broadcast_to(std, 3).tolist()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return Image.fromarray(self.images[i]).convert("RGB"), int(self.labels[i])


class Files(Dataset):
    """A data set of image files. An image that cannot be read raises OSError with its path."""

    def __init__(self, samples, num_classes):
        # Arrays, not lists: a million Python objects would be copied into every worker as their reference counts change.
        self.paths = np.array([os.fsencode(path) for path, _ in samples])
        self.labels = torch.tensor([label for _, label in samples])
        self.num_classes, self.statistics = num_classes, IMAGENET_STATISTICS

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        path = os.fsdecode(self.paths[i])
        try:
            with Image.open(path) as image:
                return to_rgb(image), int(self.labels[i])
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


def augmentation(aug, crop_size, statistics, min_scale=0.2, flip=True):
    """MoCo's augmentation, "v1" or "v2" (arXiv 2003.04297), or "crop" and flip alone, as its linear probe has it.

    min_scale: the least share of the image's area that a random crop takes, 0.2 in MoCo and 0.08 in its probe.
    flip: mirror half of the images. Crops under 64 pixels are not blurred.
    PIL image -> (3, crop_size, crop_size) float32, normalised.
    """
    steps = {
        "crop": [],
        "v1": [transforms.RandomGrayscale(p=0.2), transforms.ColorJitter(0.4, 0.4, 0.4, 0.4)],
        "v2": [transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
               transforms.RandomGrayscale(p=0.2),
               *([transforms.RandomApply([GaussianBlur()], p=0.5)] if crop_size >= 64 else [])],
    }[aug]
    mirror = [transforms.RandomHorizontalFlip()] if flip else []
    return transforms.Compose([transforms.RandomResizedCrop(crop_size, (min_scale, 1)), *steps, *mirror,
                               transforms.ToTensor(), transforms.Normalize(*statistics)])


def centre_crop(crop_size, statistics):
    """The view for evaluation: the shorter side resized to 256/224 of the crop, then the centre."""
    return transforms.Compose([transforms.Resize(crop_size * 256 // 224), transforms.CenterCrop(crop_size),
                               transforms.ToTensor(), transforms.Normalize(*statistics)])


class GaussianBlur:
    """SimCLR's blur (arXiv 2002.05709) as in MoCo v2: PIL's, with a sigma drawn uniformly from [0.1, 2] pixels."""

    def __call__(self, image):
        return image.filter(ImageFilter.GaussianBlur(torch.empty(()).uniform_(0.1, 2).item()))


class Views(Dataset):
    """`views` random views of each image, its index and its label. Indexed by (epoch, index), as `Batches` yields them."""

    def __init__(self, data, transform, seed, views=2):
        self.data, self.transform, self.seed, self.views = data, transform, seed, views

    def __getitem__(self, epoch_index):
        epoch, index = epoch_index
        image, label = self.data[index]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(key(self.seed, epoch, index))
            return *(self.transform(image) for _ in range(self.views)), index, label


class Batches:
    """The batches of one process: its rows of each global batch of a shuffled epoch. An incomplete last one is dropped.

    Set `epoch`, and `start` to leave out the steps before it. A global batch is the same for any number of processes.
    """

    def __init__(self, total, batch_size, seed, rank=0, world_size=1):
        self.total, self.batch_size, self.seed = total, batch_size, seed
        self.rows = shard(batch_size, rank, world_size)
        self.epoch = self.start = 0

    def __len__(self):
        return self.total // self.batch_size - self.start

    def __iter__(self):
        order = torch.randperm(self.total, generator=torch.Generator().manual_seed(key(self.seed, self.epoch))).tolist()
        for step in range(self.start, self.total // self.batch_size):
            yield [(self.epoch, order[step * self.batch_size + row]) for row in self.rows]


class Evaluation(Dataset):
    """One process's shard of a data set, transformed without randomness: (image, label)."""

    def __init__(self, data, transform, rank=0, world_size=1):
        self.data, self.transform, self.rows = data, transform, shard(len(data), rank, world_size)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        image, label = self.data[self.rows[i]]
        return self.transform(image), label


def shard(total, rank, world_size):
    """The rows of `total` that process `rank` holds: ceil(total / world_size) in a row, fewer at the end, none twice."""
    size = -(-total // world_size)
    return range(min(rank * size, total), min((rank + 1) * size, total))
