"""Images in: data sets by name or folder, two augmented views with the image's index, evaluation.

A data set is an `Arrays`, whose images are in the device's memory and are cropped there, or a
`Files`, whose images are read and cropped by workers: the same crops, to a rounding. A new one is a
function (root, classes) -> train, val or None in DATASETS, which makes an Arrays, or a Files with a
`read` of its own; its default flags are in the DEFAULTS of pretrain and, if need be, lincls.

Random numbers are keyed by seed and epoch for the order of images, and by the step for what is done
to a global batch, of which each process takes its rows. So a run sees the same views for any number
of workers and processes, and can go on at any step.

n images of this process, N of the global batch, V views of each, S pixels of a crop.
"""
import hashlib
import math
import os
import signal
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional

IMAGENET_STATISTICS = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # mean, deviation
STATISTICS_IMAGES = 10_000  # at most, evenly spread
RESIZED = 256 / 224  # of an evaluated crop's size: the image's shorter side
SMALL_CROP = 64  # smaller ones are not blurred, and evaluated on whole images
ASPECT = 3 / 4, 4 / 3  # of a random crop
TRIES = 10  # at a random crop that fits into the image
ENOUGH = 1.4  # pixels of a shrunk JPEG for each of a view's, along its shorter side
CHUNK_PIXELS = 2 ** 17  # augmented at once on the CPU, to stay in its cache
MEMORY = 2 ** 30  # bytes: a folder whose small images take no more is held in memory


class UsageError(ValueError):
    """Something that the user is to mend, said in one line, the message's last."""


def seed_of(*parts):
    """A 63-bit generator seed that depends on every part: seed_of(seed, epoch, index)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts, device="cpu"):
    return torch.Generator(device).manual_seed(seed_of(*parts))


def shown(text):
    """Text with file names in it as one line that can be printed."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


# -------------------------------------------------------------------------------------- data sets


def load(dataset, root, classes=None):
    """The training set and the validation set, or None, of one of DATASETS. root: the image folder,
    or where torchvision puts its sets. classes: a file of a folder's class folders to keep."""
    if classes and dataset != "folder":
        raise UsageError("--classes: only an image folder has class folders to choose from")
    return DATASETS[dataset](root, classes)


class Arrays:
    """A data set in memory: images (n, H, W) or (n, H, W, 3) uint8, labels (n,); digest of both."""

    digest_of, evaluation_batch, left_out, device = "pixels", 512, 0, torch.device("cpu")

    def __init__(self, images, labels, classes=()):
        images = np.array(images, order="C")
        assert images.dtype == np.uint8, images.dtype
        self.labels = torch.as_tensor(np.array(labels), dtype=torch.long)  # -1: none
        self.num_classes, self.classes = int(self.labels.max()) + 1, [*classes]
        self.names = [*map(str, range(len(images)))]
        digest = hashlib.blake2b(images, digest_size=8)
        digest.update(self.labels.numpy())
        self.digest = digest.hexdigest()
        images = torch.from_numpy(images)
        self.images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)  # nxcxHxW
        part = self.images[::math.ceil(len(images) / STATISTICS_IMAGES)].double() / 255
        std, mean = torch.std_mean(part, (0, 2, 3), correction=0)
        self.statistics = [x.expand(3).tolist() for x in (mean, std.clamp(min=1 / 255))]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i].expand(3, -1, -1)  # 3xHxW uint8

    def to(self, device):
        self.device, self.images = device, self.images.to(device)

    def random_crops(self, index, u, size, min_scale):
        """RandomResizedCrops of images index (n,) by uniform u (n, V, TRIES, 4): (n, V, 3, S, S)
        float in [0, 1], on the device."""
        images = self.images[upload(index, self.device)].repeat_interleave(u.shape[1], dim=0)
        u = upload(u.flatten(0, 1), self.device)
        boxes = random_boxes(u, *images.shape[2:], min_scale)
        return resample(images, boxes, size).unflatten(0, (len(index), -1))

    def centre_crops(self, size, index):
        """The centres of images index, a range: (n, 3, S, S) uint8 on the device."""
        return centre_crop(self.images[index.start:index.stop], size).expand(-1, 3, -1, -1)

    def each(self, function, items, workers):
        """function(item) of each item, one after another."""
        return map(function, items)


class Files:
    """A data set of image files below `root`: relative names, labels as ints. digest of names."""

    digest_of, evaluation_batch, left_out = "names", 64, 0  # batches wait in shared memory
    device, statistics = torch.device("cpu"), IMAGENET_STATISTICS

    def __init__(self, root, names, labels, classes=()):
        # No lists: as reference counts change, every worker would copy a million Python objects.
        self.root, self.paths = str(root), np.array([os.fsencode(name) for name in names])
        self.labels = torch.tensor(labels, dtype=torch.long)  # -1: none
        self.num_classes, self.classes = max(labels, default=-1) + 1, [*classes]
        self.digest = hashlib.blake2b(self.paths.tobytes(), digest_size=8).hexdigest()

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return self.read(i)

    def read(self, i, least=math.inf):
        """Image i as (3, H, W) uint8; smaller than it is, if its shorter side keeps `least`."""
        return read_image(os.path.join(self.root, os.fsdecode(self.paths[i])), least)

    @property
    def names(self):
        return [os.fsdecode(path) for path in self.paths]

    def to(self, device):
        self.device = device

    def random_crops(self, index, u, size, min_scale):
        """As Arrays': (n, V, 3, S, S) uint8, on the CPU."""
        least, crops = ENOUGH * size / math.sqrt(min_scale), []
        for i, draws in zip(index.tolist(), u):
            image = self.read(i, least)
            for box in random_boxes(draws, *image.shape[1:], min_scale).int().tolist():
                crops.append(functional.resized_crop(image, *box, [size] * 2, antialias=True))
        return torch.stack(crops).unflatten(0, (len(index), -1))

    def centre_crops(self, size, index):
        least = ENOUGH * size * RESIZED
        return torch.stack([centre_crop(self.read(i, least), size) for i in index])

    def each(self, function, items, workers):
        # Below a spawned process workers would be spawned too, and take ten seconds to start.
        context = "fork" if workers and sys.platform == "linux" else None
        return DataLoader(items, batch_size=None, collate_fn=function, num_workers=workers,
                          pin_memory=self.device.type == "cuda", multiprocessing_context=context,
                          worker_init_fn=_leave_signals_to_the_parent)


def _leave_signals_to_the_parent(_):
    """A signal to the whole job is not to kill a worker under a step that is to be finished. A
    second SIGTERM is: by it multiprocessing ends what is left at exit."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def upload(x, device):
    if device.type == "cuda" and not x.is_cuda:
        x = x.pin_memory()  # from other memory over 64 KB wait for what the GPU has to do
    return x.to(device, non_blocking=True)


def _digits(*_):
    from sklearn.datasets import load_digits  # slow to import
    from sklearn.model_selection import train_test_split
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # 1797x8x8
    train, val, train_labels, val_labels = train_test_split(
        images, digits.target, test_size=0.2, stratify=digits.target, random_state=0)
    return Arrays(train, train_labels), Arrays(val, val_labels)


def _torchvision(name, root, _):
    from torchvision import datasets
    try:
        both = [getattr(datasets, name)(root, train=x, download=True) for x in (True, False)]
    except (AssertionError, OSError, RuntimeError, ValueError) as error:
        raise UsageError(shown(f"{root}: {name} is not there, or damaged, and cannot be downloaded "
                               f"({error}); name the DIR where torchvision has put it")) from None
    return [Arrays(np.asarray(data.data), np.asarray(data.targets)) for data in both]


# ------------------------------------------------------------------- folders of images, their files


def _folder(root, classes):
    """DIR/train/CLASS/* and DIR/val/CLASS/*, or any tree of images, without labels: torchvision's
    convention, checked. Images beside class folders are left out."""
    root = Path(root)
    train = root / "train" if (root / "train").is_dir() else root
    images, left_out = _by_class(train)
    names = known = sorted(images.keys() - {""}) if train != root else []
    if classes:
        names = sorted({line.rstrip("/\\") for line in read_lines("--classes", classes)})
        if not names or not {*names} <= {*known}:
            raise UsageError(shown(f"--classes {classes}: is to name class folders of {train}, one "
                                   f"a line, not {sorted({*names} - {*known})[:5]}"))
    sets = [_files(root, train, images, names)]
    left_out += len(images[""]) if names else 0
    if not len(sets[0]):
        raise UsageError(shown(f"{train}: holds no image at any depth"))
    val = root / "val"
    if names and os.path.lexists(val):
        images, others = _by_class(val)
        left_out += others + len(images[""])
        unknown = sorted(images.keys() - {"", *known})
        if unknown:
            raise UsageError(shown(f"{val}: has classes that train has not, rename or remove them: "
                                   f"{', '.join(unknown[:5])}"))
        sets.append(_files(root, val, images, names))
    sets = _held([data for data in sets if len(data)])
    sets[0].left_out = left_out
    return sets[0], sets[1] if len(sets) > 1 else None


def _by_class(folder):
    """The images below a folder by the first folder on their way, "" where there is none: relative
    paths. And how many other files there are."""
    images, others = {"": []}, 0
    for path in _walk(folder):
        top, _, below = path.partition(os.sep)
        kind = Image.registered_extensions().get(os.path.splitext(path)[1].lower())
        if kind in Image.OPEN and kind not in ("BUFR", "GRIB", "HDF5", "MPEG"):  # no readers
            images.setdefault(top if below else "", []).append(path)
            continue
        others += 1
        if os.path.islink(folder / path) and not os.path.exists(folder / path):
            raise UsageError(shown(f"{folder / path}: a link that leads nowhere; remove it"))
    return images, others


def _walk(folder):
    """The files below a folder, by relative path, but for names that begin with a dot. A folder is
    entered once, and by its own path rather than a link if it has one below here."""
    seen, starts = {*folder.resolve().parents}, [folder]
    for start in starts:
        for path, folders, files in os.walk(start, onerror=_unreadable):
            real, below = Path(path).resolve(), os.path.relpath(path, folder)
            folders[:] = sorted(name for name in folders if name[0] != "." and real not in seen)
            files = [name for name in files if name[0] != "." and real not in seen]
            seen.add(real)
            starts += filter(os.path.islink, [os.path.join(path, name) for name in folders])
            yield from (name if below == os.curdir else f"{below}/{name}" for name in files)


def _unreadable(error):
    raise UsageError(shown(f"{error.filename}: this folder cannot be read ({error.strerror})"))


def _files(root, folder, images, classes):
    """Files of the images in the classes' folders; without classes, of all."""
    labels = {name: label for label, name in enumerate(classes)} or dict.fromkeys(images, -1)
    samples = [(path, label) for name, label in labels.items() for path in images.get(name, ())]
    samples.sort(key=lambda sample: (sample[1], sample[0]))
    below = "" if folder == root else f"{folder.name}/"
    names = [below + path for path, _ in samples]
    return Files(root, names, [label for _, label in samples], classes)


def _held(sets):
    """The same sets as Arrays if all their images have one small size; else as they are."""
    shape = sets[0][0].shape
    if max(shape) > SMALL_CROP or sum(map(len, sets)) * shape.numel() > MEMORY:
        return sets
    held = []
    for files in sets:
        images = np.empty((len(files), *shape[1:], 3), np.uint8)
        for i in range(len(files)):
            image = files[i]
            if image.shape != shape:
                return sets
            images[i] = image.permute(1, 2, 0)
        held.append(Arrays(images, files.labels.numpy(), files.classes))
        held[-1].names = files.names
    return held


def read_lines(flag, path):
    """The lines of a text file, but empty ones."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise UsageError(shown(f"{flag} {path}: cannot be read ({error.strerror})")) from None
    return list(filter(None, map(str.strip, text.splitlines())))


def read_image(path, least=math.inf):
    """An image file as (3, H, W) uint8: what Pillow opens, upright, over white, in 8-bit RGB. A
    JPEG whose shorter side keeps `least` pixels then is read at 1/2 or 1/4, for which libjpeg takes
    means at little cost. (At 1/8 views are off by more than 2 of 255 on average.)"""
    try:
        # Pillow scrambles a turned TIFF that it opens by path, and may so map into memory.
        with open(path, "rb") as file, Image.open(file) as image:
            for part in 4, 2:
                size = [side // part for side in image.size]
                if min(size) >= least and not any(side % part for side in image.size):
                    image.draft(None, size)  # without a part of a pixel at the edge
                    break
            image.load()
            with suppress(Exception):  # Pillow raises nearly anything on EXIF data that are broken
                ImageOps.exif_transpose(image, in_place=True)
            return functional.pil_to_tensor(to_rgb(image))
    except Exception as error:  # and on a broken file
        raise UsageError(shown(f"{path}: cannot be read as an image ({error}); replace, convert or "
                               f"remove it")) from None


def to_rgb(image):
    """Any PIL image as 8-bit RGB: transparency over white, 16-bit grey scaled by its range."""
    if image.mode in ("I", "F"):
        raise UsageError("its pixels are 32-bit integers or floats, whose range is not known")
    if image.mode.startswith("I;16"):
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")  # which copies


DATASETS = {"folder": _folder, "digits": _digits, "cifar10": partial(_torchvision, "CIFAR10"),
            "cifar100": partial(_torchvision, "CIFAR100"),
            "fashionmnist": partial(_torchvision, "FashionMNIST")}


# ------------------------------------------------------------------------------------------ crops


def random_boxes(u, height, width, min_scale):
    """RandomResizedCrop's boxes (n, 4), each top, left, height, width, from uniform u (n, TRIES,
    4): the first try at a share of the area and an aspect ratio that fits into the image; if none
    does, the most of its centre that has an aspect ratio allowed."""
    low, high = ASPECT
    area = height * width * (min_scale + (1 - min_scale) * u[..., 0])
    aspect = torch.exp(math.log(low) + math.log(high / low) * u[..., 1])
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()  # nxTRIES
    top, left = (u[..., 2] * (height - h + 1)).floor(), (u[..., 3] * (width - w + 1)).floor()
    fits = (h > 0) & (h <= height) & (w > 0) & (w <= width)
    boxes = torch.stack([top, left, h, w], dim=-1)
    first = boxes[torch.arange(len(u), device=u.device), fits.to(torch.uint8).argmax(1)]
    h, w = min(height, round(width / low)), min(width, round(height * high))
    centre = (height - h) // 2, (width - w) // 2, h, w
    centre = torch.stack([torch.full_like(u[:, 0, 0], side) for side in centre], dim=1)
    return torch.where(fits.any(1, keepdim=True), first, centre)


def resample(images, boxes, size):
    """Cut `boxes` (n, 4), each top, left, height, width, out of images (n, c, H, W) uint8, and
    resize them as PIL's bilinear filter does, with antialiasing: (n, 3, size, size) float32 in
    [0, 1]. The filter is a matrix for rows and for columns."""
    def weights(start, length, total):  # nx1, nx1 -> nxsizextotal
        pixel = torch.arange(total, device=images.device) + 0.5
        centre = start + length / size * (torch.arange(size, device=images.device) + 0.5)
        support = (length / size).clamp(min=1)[:, :, None]
        inside = (pixel > start) & (pixel < start + length)
        triangle = (1 - (pixel - centre[:, :, None]).abs() / support).clamp(min=0) * inside[:, None]
        return triangle / triangle.sum(-1, keepdim=True)
    top, left, height, width = boxes[:, :, None].unbind(1)
    rows, columns = weights(top, height, images.shape[2]), weights(left, width, images.shape[3])
    crops = rows[:, None] @ (images.float() / 255) @ columns[:, None].mT
    return crops.expand(-1, 3, -1, -1)


def centre_crop(x, size):
    """The centre of images (..., H, W) uint8 as torchvision's Resize and CenterCrop take it: their
    shorter side resized to RESIZED of `size`, or to `size` itself if that is small."""
    resized = int(size * RESIZED) if size >= SMALL_CROP else size
    return functional.center_crop(functional.resize(x, [resized], antialias=True), size)


# ------------------------------------------------------------------------------------ augmentation

# The columns of an image's draws: whether each is done, the blur's sigma, the jitter's amounts, and
# four of which the order of jitter's operations is the ranking. After them come those of a box.
JITTER, GREY, BLUR, FLIP, SIGMA = range(5)
FACTORS, HUE, ORDER = slice(5, 8), 8, slice(9, 13)
DRAWS, DRAWS_OF_A_BOX = ORDER.stop, 4
HUE_TURN = 3  # what stands for it in the order, after brightness, contrast and saturation


class Augment(nn.Module):
    """What MoCo does to a crop after cutting it, to a whole batch, with draws for each image.
    aug: "v2" (arXiv 2003.04297), or "crop" for flip alone, as in the linear probe. size: S;
    crops under 64 pixels are not blurred. statistics: mean and standard deviation of the channels.
    flip: mirror half of the images. The operations are torchvision's on floats: unlike in PIL's
    pipeline nothing is rounded to 8 bits on the way, and the blur is a Gaussian, no three boxes."""

    def __init__(self, aug, size, statistics, flip=True):
        super().__init__()
        self.aug, self.size, self.flip = aug, size, flip
        self.register_buffer("mean", torch.tensor(statistics[0]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(statistics[1]).view(3, 1, 1))

    def forward(self, x, u=None):
        """x: (n, 3, S, S) uint8, or float in [0, 1]; u: (n, DRAWS) uniform in [0, 1), which "crop"
        without flip does not need. Returns (n, 3, S, S) float32, normalised."""
        chunk = max(1, CHUNK_PIXELS // x[0, 0].numel())
        if x.device.type == "cpu" and u is not None and len(x) > chunk:
            return torch.cat([self(*part) for part in zip(x.split(chunk), u.split(chunk))])
        x = x / 255 if x.dtype == torch.uint8 else x
        if self.aug == "v2":
            x = torch.where(u[:, JITTER, None, None, None] < 0.8, jitter(x, u), x)
            x = torch.where(u[:, GREY, None, None, None] < 0.2, grey(x), x)
            if self.size >= SMALL_CROP:
                blurred = blur(x, 0.1 + 1.9 * u[:, SIGMA])
                x = torch.where(u[:, BLUR, None, None, None] < 0.5, blurred, x)
        if self.flip:
            x = torch.where(u[:, FLIP, None, None, None] < 0.5, x.flip(-1), x)
        return ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)


def jitter(x, u, hue=0.1, strength=0.4):
    """ColorJitter: brightness, contrast, saturation, hue, in an order of each image's own. The
    dear one, hue, is done once, between those that come before it and those after."""
    factors = 1 + strength * (2 * u[:, FACTORS] - 1)  # of brightness, contrast, saturation
    order = u[:, ORDER].argsort(1)  # which operation comes first, second, ...
    place = (order == HUE_TURN).to(torch.uint8).argmax(1)[:, None, None, None]
    for slot in range(3):
        x = torch.where(slot < place, blend(x, order[:, slot], factors), x)
    x = shift_hue(x, hue * (2 * u[:, HUE] - 1))
    for slot in range(1, 4):
        x = torch.where(slot > place, blend(x, order[:, slot], factors), x)
    return x


def blend(x, operation, factors):
    """Each image's brightness (0), contrast (1) or saturation (2) by its factor: a mixture with
    black, the mean of its grey, or its grey."""
    luma = grey(x)
    mean = luma.mean((2, 3), keepdim=True)
    factor = factors.gather(1, operation.clamp(max=2)[:, None])[:, :, None, None]
    operation = operation[:, None, None, None]
    other = torch.where(operation == 2, luma, (operation == 1) * mean)
    return (factor * x + (1 - factor) * other).clamp(0, 1)


def grey(x):
    """(n, 3, S, S) -> (n, 1, S, S): ITU-R 601's luma."""
    r, g, b = x.split(1, dim=1)
    return 0.299 * r + 0.587 * g + 0.114 * b


def shift_hue(x, turn):
    """Turn the hue of x (n, 3, S, S) in [0, 1] by turn (n,); HSV's saturation and value stay."""
    r, g, b = x.unbind(1)
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    sixth = torch.where(value == r, g - b,
                        torch.where(value == g, b - r + 2 * chroma, r - g + 4 * chroma))
    sixth = sixth / chroma.clamp(min=1e-12) + 6 * turn[:, None, None]
    sixth = sixth - 6 * (sixth / 6).floor()  # `%` takes as long as all else together
    ramps = (sixth - 3).abs() - 1, 2 - (sixth - 2).abs(), 2 - (sixth - 4).abs()
    return torch.stack(ramps, dim=1).clamp_(0, 1).mul_(chroma[:, None]).add_(low[:, None])


def blur(x, sigma, radius=8, block=32):
    """Gaussian blur of x (n, 3, S, S) by sigma (n,) pixels, at most radius / 4; the edge's pixels
    are repeated outwards. Columns, then rows are done by blocks, each times one band of weights."""
    n, c, size, _ = x.shape
    window, padding = block + 2 * radius, [radius, radius - size % -block]
    offset = torch.arange(window, device=x.device)[:, None] - radius
    distance = offset - torch.arange(block, device=x.device)
    weights = -distance.square() / (2 * sigma[:, None, None].square())
    weights = weights.masked_fill(distance.abs() > radius, -math.inf).softmax(1)  # nxwindowxblock
    x = F.pad(x, padding * 2, mode="replicate")
    x = x.unfold(3, window, block).reshape(n, -1, window) @ weights
    x = x.view(n, c, -1, size - size % -block).unfold(2, window, block)  # nxcxblocksxSxwindow
    x = (weights.mT[:, None, None] @ x.mT).flatten(2, 3)
    return x[:, :, :size, :size]


# --------------------------------------------------------------------------- views, and evaluation


class Views:
    """The training batches of one process. index: of the images (n,) that are trained on. augment:
    what is done after cropping. views: V. min_scale: a crop's least share of an image's area."""

    def __init__(self, data, index, batch_size, augment, seed, views=2, min_scale=0.2, workers=0,
                 rank=0, world_size=1):
        self.data, self.index, self.batch_size = data, index, batch_size
        self.augment, self.seed = augment.to(data.device), seed
        self.views, self.min_scale, self.workers = views, min_scale, workers
        self.rows = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)

    def __len__(self):
        """Steps of an epoch; an incomplete last batch is dropped."""
        return len(self.index) // self.batch_size

    def epoch(self, epoch, start=0):
        """The epoch's steps from `start` on. Yields V random views (n, 3, S, S) of each image of
        this process; the indices (N,) of the whole batch's images, on the CPU; labels (n,)."""
        order = torch.randperm(len(self.index), generator=generator(self.seed, epoch))
        steps = self.index[order[:len(self) * self.batch_size]].view(-1, self.batch_size)  # ...xN
        crop, device = partial(self._crop, epoch, steps[:, self.rows]), self.data.device
        crops = self.data.each(crop, range(start, len(self)), self.workers)
        for step, x in enumerate(crops, start):
            u = upload(self._draws(epoch, step)[..., :DRAWS].flatten(0, 1), device)
            x = self.augment(upload(x, device).flatten(0, 1), u).unflatten(0, (-1, self.views))
            labels = self.data.labels[steps[step, self.rows]]
            yield *x.unbind(1), steps[step], upload(labels, device)

    def _crop(self, epoch, own, step):
        """The crops of this process's images of a step."""
        u = self._draws(epoch, step)[..., DRAWS:].unflatten(2, (TRIES, DRAWS_OF_A_BOX))
        return self.data.random_crops(own[step], u, self.augment.size, self.min_scale)

    def _draws(self, epoch, step):
        """Uniform numbers for each view of this process's images of a step: (n, V, ...)."""
        return torch.rand(self.batch_size, self.views, DRAWS + TRIES * DRAWS_OF_A_BOX,
                          generator=generator(self.seed, epoch, "step", step))[self.rows]


def centre_batches(data, size, statistics, rank=0, world_size=1, workers=0):
    """One process's shard of a data set, in batches: the images' centres (n, 3, size, size),
    normalised, on the device, and their labels (n,)."""
    rows = shard(len(data), rank, world_size)
    batches = [rows[i:i + data.evaluation_batch]
               for i in range(0, len(rows), data.evaluation_batch)]
    normalise = Augment("crop", size, statistics, flip=False).to(data.device)
    for batch, x in zip(batches, data.each(partial(data.centre_crops, size), batches, workers)):
        yield normalise(upload(x, data.device)), data.labels[batch.start:batch.stop]


def shard(total, rank, world_size):
    """The rows of `total` that process `rank` holds: ceil(total / world_size) in a row, fewer at
    the end, none twice."""
    size = math.ceil(total / world_size)
    return range(min(rank * size, total), min((rank + 1) * size, total))
