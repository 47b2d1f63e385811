"""Images in: data sets by name or folder, two augmented views with the image's index, evaluation.

    python loader.py DIR        # lists the images below DIR that cannot be read

Images of a folder are read and cropped by workers, images in memory are cropped on the device; all
else is done to whole batches on the device. Random numbers come from `seed_of(seed, epoch, index)`
for what a worker does to an image, and from `seed_of(seed, epoch, "step", step)` for what is done
to a global batch, of which each process takes its rows. So a run sees the same views for any number
of workers and processes, and can go on at any step without replaying what came before.

A data set is any object with
    __len__, labels      n, and (n,) long on the CPU, -1 where there is none
    num_classes          0 if there are no labels
    classes              their names, or an empty list
    names                n texts, for lists of labelled images and features that are kept
    statistics           mean and standard deviation of the three channels, in [0, 1]
    digest               a short text that differs for other images
    notes                lines that a person should read: what was left out, what was taken for what
    images               (n, c, H, W) uint8 on the device; or else, if it is not in memory,
    __getitem__          i -> (3, H, W) uint8, label
A new one is a function (root, device) -> train, val or None in DATASETS, with its default flags in
pretrain's DEFAULTS and, unless they are those of small images, lincls's.

n images of this process, N of the global batch, V views of each, S pixels of a crop.
"""
import argparse
import errno
import gzip
import hashlib
import math
import os
import signal
import sys
import unicodedata
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import cache, partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional
from tqdm import tqdm

IMAGENET_STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TRAIN_NAMES = "train", "training"
VAL_NAMES = "val", "validation", "valid", "test", "testing", "eval"
NOT_READ = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF",  # Pillow needs other programs for them
            "FITS"}  # whose signed integers it takes for unsigned
SYSTEM = {"@eadir", "#recycle", "#snapshot", "__macosx", "$recycle.bin", "lost+found",
          "system volume information"}  # folders that no person has made
STATISTICS_IMAGES = 10_000
MOST_KINDS = 8  # of other files that a note counts
LOOK_IMAGES = 32  # files whose depth is looked at before a run
SMALL_CROP = 64  # smaller ones are not blurred, and evaluated on whole images
SIGNED_OR_LONG = "holds signed or 32-bit integers; convert it to 8 or 16 bits, unsigned"
SAMPLE_FORMAT, SIGNED, PHOTOMETRIC, WHITE_IS_ZERO = 339, 2, 262, 0  # of a TIFF
ASPECT = 3 / 4, 4 / 3  # of a random crop
MEMORY = 2 ** 30  # bytes: a folder whose small images take no more is held in memory
ASPECT_MOST = 4  # of an image that is resized for evaluation
TRIES = 10  # at a random crop that fits into the image
CHUNK_PIXELS = 2 ** 16  # augmented at once on the CPU, to stay in its cache


class UsageError(ValueError):
    """Something that the user is to mend, said in one line, the message's last."""
    status = 2


class FileError(UsageError):
    """A file or folder that is missing, unreadable or broken."""
    status = 1


def seed_of(*parts):
    """A 63-bit generator seed that depends on every part: seed_of(seed, epoch, index)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def shown(text):
    """Text with file names in it as one line that can be printed."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


# -------------------------------------------------------------------------------------- data sets


def load(dataset, root, classes=None, bits=16, device="cpu"):
    """The training set and the validation set, or None, of one of DATASETS.

    root: the image folder, or where torchvision's sets are or will be put. Of a folder alone:
    classes, a file of class folders to keep, one a line; bits, how many of them 16-bit files use.
    """
    if dataset == "folder":
        train, val = _folder(root, classes, bits)
        for data in filter(None, (train, val)):
            _hold(data, device)
    elif classes:
        raise UsageError("--classes: only an image folder has class folders to choose from")
    elif bits != 16:
        raise UsageError("--bits: only an image folder has files of 16 bits")
    else:
        train, val = DATASETS[dataset](root, device)
    if val is not None:
        val.statistics = train.statistics
    return train, val


class Arrays:
    """A data set in the device's memory, of images (n, H, W) or (n, H, W, 3) uint8, labels (n,)."""

    def __init__(self, images, labels, device="cpu"):
        images, self.notes = np.array(images, order="C"), []
        self.labels = torch.as_tensor(np.array(labels), dtype=torch.long)
        self.num_classes = int(self.labels.max()) + 1
        self.names, self.classes = [*map(str, range(len(images)))], []
        digest = hashlib.blake2b(images, digest_size=8)
        digest.update(self.labels.numpy())
        self.digest = digest.hexdigest()
        images = torch.from_numpy(images).to(device)
        self.images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)  # nxcxHxW
        self.statistics = _statistics(self.images)

    def __len__(self):
        return len(self.images)


def _statistics(images):
    """Mean and standard deviation of the channels of images (n, c, H, W) uint8, over some that are
    evenly spread."""
    part = images[::math.ceil(len(images) / STATISTICS_IMAGES)].double() / 255
    mean, std = part.mean((0, 2, 3)), part.std((0, 2, 3), correction=0).clamp(min=1 / 255)
    return mean.expand(3).tolist(), std.expand(3).tolist()


def _digits(_, device):
    from sklearn.datasets import load_digits  # slow to import
    from sklearn.model_selection import train_test_split
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # 1797x8x8
    train, val, train_labels, val_labels = train_test_split(
        images, digits.target, test_size=0.2, stratify=digits.target, random_state=0)
    return Arrays(train, train_labels, device), Arrays(val, val_labels, device)


def _fashion_mnist(root, device):
    """Its .gz files as they are, if they are there: torchvision would unpack them first."""
    folder = Path(root, "FashionMNIST", "raw")
    files = [(folder / f"{split}-images-idx3-ubyte.gz", folder / f"{split}-labels-idx1-ubyte.gz")
             for split in ("train", "t10k")]
    if not all(path.is_file() for pair in files for path in pair):
        return _torchvision("FashionMNIST", root, device)
    return [_idx(*pair, device) for pair in files]


def _idx(images, labels, device):
    try:
        pixels = np.frombuffer(gzip.decompress(images.read_bytes()), np.uint8, offset=16)
        labels = np.frombuffer(gzip.decompress(labels.read_bytes()), np.uint8, offset=8)
        return Arrays(pixels.reshape(len(labels), 28, 28), labels, device)
    except (EOFError, OSError, ValueError, zlib.error) as error:
        message = f"{images.parent}: {images.name} or its labels are damaged ({error}); fetch again"
        raise FileError(shown(message)) from None


def _torchvision(name, root, device):
    from torchvision import datasets
    try:
        kind = getattr(datasets, name)
        both = [kind(root, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        message = (f"{root}: {name.lower()} is not there and cannot be downloaded ({error}); put "
                   f"its archives there, or name the folder that holds them: "
                   f"python pretrain.py DIR --dataset {name.lower()}")
        raise FileError(shown(message)) from None
    return [Arrays(np.asarray(data.data), data.targets, device) for data in both]


# ------------------------------------------------------------------------------- folders of images


def _folder(root, classes, bits):
    """DIR/train/CLASS/* and DIR/val/CLASS/*, or any tree of images, without labels."""
    root, notes, val_data = Path(root), [], None
    if not os.path.isdir(root):
        raise FileError(shown(f"{root}: no such folder, or one that may not be seen; give one that "
                              f"holds train/CLASS/*.jpg, or any tree of images"))
    train, val = _splits(root, classes, notes)
    images, others = _by_folder(train)
    known, loose = sorted(images.keys() - {""}), len(images[""])
    folders = _chosen(classes, train, known) if classes else known
    labelled = bool(classes) or train != root and 2 * loose <= sum(map(len, images.values()))
    data = _files(root, train, images, folders if labelled else None, bits)
    if not len(data):
        where = f"in the class folders of {train}" if labelled else "at any depth"
        kinds = " ".join(sorted(_extensions()))
        raise FileError(shown(f"{train}: holds no image {where}; these are read: {kinds}"))
    below = _visible(next(os.walk(train))[1]) if labelled else ()
    empty = sorted({*map(_composed, below)} - images.keys())
    if empty:
        notes.append(f"{train}: no images of their own in {len(empty)} folders: "
                     f"{', '.join(empty[:5])}")
    if loose and labelled:
        notes.append(f"{train}: {loose} images beside the class folders are left out")
    elif loose and known and train != root:
        notes.append(f"{train}: most images lie beside its folders; all are taken, without labels")
    if val and not labelled:
        notes.append(f"{val}: not used, as the training images have no labels")
    elif val:
        val_images, val_others = _by_folder(val)
        val_data = _validation(root, val, val_images, known, folders, bits, notes)
        others += val_others
    if others:
        kinds = others.most_common(MOST_KINDS)
        kinds = [f"{number} {kind or 'without extension'}" for kind, number in kinds]
        notes.append(f"{root}: not images by their extension, left out: {', '.join(kinds)}")
    notes += _notes_on_depth(data, bits)
    data.notes = [shown(note) for note in notes]
    return data, val_data


def _validation(root, folder, images, known, wanted, bits, notes):
    """The images of val in the class folders `wanted` of those `known` from train; None if there
    are none."""
    there, loose = images.keys() - {""}, len(images[""])
    unknown, absent = sorted(there - {*known}), sorted({*wanted} - there)
    if not there:
        notes.append(f"{folder}: not used, as it has no class folders; sort its {loose} images "
                     f"into those of the training images to monitor or probe")
        return None
    if unknown:
        notes.append(f"{folder}: classes without training images are left out: "
                     f"{', '.join(unknown)}")
    if absent:
        notes.append(f"{folder}: has no images of {len(absent)} classes: {', '.join(absent[:5])}")
    if loose:
        notes.append(f"{folder}: {loose} images beside the class folders are left out")
    data = _files(root, folder, images, wanted, bits)
    data.unknown_classes = unknown
    return data if len(data) else None


def _by_folder(folder):
    """The images below a folder, relative paths, by the first folder of each, "" where it has none;
    and how many other files there are of each extension."""
    images, others = {"": []}, Counter()
    for path in _walk(folder):
        top, _, below = path.partition(os.sep)
        if _is_image(path):
            images.setdefault(_composed(top) if below else "", []).append(path)
        else:
            _follow(os.path.join(folder, path))
            others[os.path.splitext(path)[1].lower()] += 1
    return images, others


def _composed(name):
    """A name as Unix usually writes its accents; macOS keeps them as characters of their own."""
    return unicodedata.normalize("NFC", name)


def _files(root, folder, images, classes, bits):
    """Files of the images in the classes' folders; without classes, of all."""
    if classes is None:
        samples = [(path, -1) for path in sorted(chain(*images.values()))]
    else:
        samples = [(path, label) for label, name in enumerate(classes)
                   for path in sorted(images.get(name, ()))]
    below = "" if folder == root else folder.name
    names = [os.path.join(below, path) for path, _ in samples]
    data = Files(root, names, [label for _, label in samples], len(classes or ()), bits)
    data.classes = classes or []
    return data


def _hold(files, device):
    """Hold the images of `files` in the device's memory, if all have one small size."""
    shape = files[0][0].shape
    if max(shape) > SMALL_CROP or len(files) * shape.numel() > MEMORY:
        return
    images = torch.empty(len(files), *shape, dtype=torch.uint8)
    for i in tqdm(range(len(files)), "reading", delay=10, disable=None, leave=False):
        image, _ = files[i]
        if image.shape != shape:
            return
        images[i] = image
    files.images, files.statistics = images.to(device), _statistics(images)


def _splits(root, classes, notes):
    """The folders of the training and validation images (None: there is none), by usual names."""
    _, folders, files = next(os.walk(root, onerror=_unreadable))
    folders, files = sorted(_visible(folders)), _visible(files)
    for name in files:
        _follow(root / name)
    names = {name.lower(): name for name in folders}  # of "Train" and "train", the latter
    train, val = (next((names[name] for name in usual if name in names), None)
                  for usual in (TRAIN_NAMES, VAL_NAMES))
    rest = sorted(set(folders) - {train, val})
    without_labels = "" if classes else ", without labels"
    if train and not val:
        full = [name for name in rest if any(map(_is_image, _walk(root / name)))]
        if full:
            notes.append(f"{root}: {train} is taken for one of the folders of images "
                         f"({', '.join(full[:5])}), as there is no val{without_labels}")
            train = None
    elif not train:
        too = f", those of {val} too" if val else ""
        notes.append(f"{root}: there is no folder train: all images at any depth are taken{too}"
                     f"{without_labels}")
    if not train:
        return root, None
    loose = sum(map(_is_image, files))
    rest += [f"{loose} images beside {train}"] if loose else []
    if rest:
        notes.append(f"{root}: not used: {', '.join(rest)}")
    if train.lower() != TRAIN_NAMES[0] or val and val.lower() != VAL_NAMES[0]:
        notes.append(f"{root}: {train} is taken for the training images, {val} for the monitor")
    return root / train, root / val if val else None


def read_lines(flag, path):
    """The lines of a text file, but empty ones, as Unix or Windows writes it."""
    try:
        text = Path(path).read_bytes()
        utf_16 = text.startswith((b"\xff\xfe", b"\xfe\xff"))
        text = text.decode("utf-16" if utf_16 else "utf-8-sig", errors="surrogateescape")
    except (OSError, UnicodeError) as error:
        raise FileError(shown(f"{flag} {path}: cannot be read ({error}); give a text file with one "
                              f"name a line")) from None
    return list(filter(None, map(str.strip, text.splitlines())))


def _chosen(path, train, known):
    """The class folders that a file names, one a line."""
    keep = sorted({_composed(line.rstrip("/\\")) for line in read_lines("--classes", path)})
    missing = [name for name in keep if name not in known]
    if not keep:
        raise UsageError(shown(f"--classes {path}: is empty"))
    if missing:
        raise UsageError(shown(f"--classes {path}: {train} has no folder {missing[0]!r} of images"))
    return keep


def _walk(folder):
    """The files below a folder, by relative path. Names that begin with a dot, and those of SYSTEM,
    are not there.

    Each folder is entered once, and by its own path rather than a link if it has one below here.
    """
    seen = {_identity(parent) for parent in folder.resolve().parents}
    starts = [str(folder)]
    for start in starts:
        for path, folders, files in os.walk(start, onerror=_unreadable):
            identity, below = _identity(path), os.path.relpath(path, folder)
            if identity in seen:
                folders.clear()
                continue
            seen.add(identity)
            folders[:] = sorted(_visible(folders))
            starts += filter(os.path.islink, [os.path.join(path, name) for name in folders])
            for name in _visible(files):
                yield name if below == os.curdir else os.path.join(below, name)


def _follow(path):
    """A link to a folder that is not there, or not to be seen, would pass for a file."""
    try:
        if not os.path.splitext(path)[1] and os.path.islink(path):
            os.stat(path)
    except OSError as error:
        if error.errno != errno.ELOOP:
            _unreadable(error)


def _identity(folder):
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _unreadable(error):
    raise FileError(shown(f"{error.filename}: this folder or link cannot be read "
                          f"({error.strerror}); change its permissions, mend it, or move it away"))


def _visible(names):
    return [name for name in names if not name.startswith(".") and name.lower() not in SYSTEM]


def _is_image(name):
    return os.path.splitext(name)[1].lower() in _extensions()


@cache
def _extensions():
    kinds = Image.registered_extensions().items()
    return {extension for extension, kind in kinds if kind in Image.OPEN and kind not in NOT_READ}


class Files(Dataset):
    """A data set of image files below `root`, by relative name. One that cannot be read raises a
    FileError with its path."""

    def __init__(self, root, names, labels, num_classes, bits=16):
        # Arrays, not lists: a million Python objects would be copied into every worker as their
        # reference counts change.
        self.root, self.paths = str(root), np.array([os.fsencode(name) for name in names])
        self.labels, self.num_classes = torch.tensor(labels, dtype=torch.long), num_classes
        self.bits, self.statistics, self.notes = bits, IMAGENET_STATISTICS, []
        self.classes = []
        self.unknown_classes = []  # folders of val that are none of train's
        self.digest = hashlib.blake2b(self.paths.tobytes(), digest_size=8).hexdigest()

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        try:
            return read_image(self.path(i), self.bits), int(self.labels[i])
        except FileError as error:
            raise FileError(f"{error}; `python loader.py DIR --bits {self.bits}` lists all such "
                            f"files") from None

    def path(self, i):
        return os.path.join(self.root, os.fsdecode(self.paths[i]))

    @property
    def names(self):
        return [os.fsdecode(path) for path in self.paths]


# ------------------------------------------------------------------------------------ reading files


def read_image(path, bits=16):
    """An image file as (3, H, W) uint8, upright."""
    try:
        # Pillow scrambles a turned TIFF that it opens by path, and may so map into memory.
        with open(path, "rb") as file, Image.open(file) as image:
            if bits < 16 and _is_deep_colour(image):
                raise UsageError("holds colours of 16 bits, which --bits does not scale; convert "
                                 "it to 8 bits")
            image.load()
            with suppress(Exception):  # PIL raises nearly anything on EXIF data that are broken
                ImageOps.exif_transpose(image, in_place=True)
            return functional.pil_to_tensor(to_rgb(image, bits))
    except Image.DecompressionBombError:
        problem = (f"has over {2 * Image.MAX_IMAGE_PIXELS:,} pixels, Pillow's guard against files "
                   f"that fill the memory; if it is whole, shrink it, or set "
                   f"Image.MAX_IMAGE_PIXELS higher at the top of loader.py")
    except UsageError as error:
        problem = error
    except MemoryError:
        problem = "needs more memory than there is; give fewer --workers, or shrink it"
    except UnidentifiedImageError:
        problem = "cannot be read as an image of any kind that Pillow knows; replace or remove it"
    except Exception as error:  # PIL raises nearly anything on a broken file
        problem = f"cannot be read as an image ({error}); replace, convert or remove it"
        if getattr(error, "errno", None):  # the system's, not PIL's
            problem = f"cannot be read ({error.strerror}); it may be whole"
    raise FileError(shown(f"{path}: {problem}"))


def to_rgb(image, bits=16):
    """Any PIL image as 8-bit RGB: transparency over white, other depths scaled to 8 bits."""
    if SIGNED in getattr(image, "tag_v2", {}).get(SAMPLE_FORMAT, ()):
        raise UsageError(SIGNED_OR_LONG)
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_to_8_bits(image, bits))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(image, bits):
    """Pixels of 16 bits by the type's range, or that of `bits`; floats in [0, 1] by 255."""
    values = np.asarray(image)
    if image.mode == "F":
        if not ((values >= 0) & (values <= 1)).all():
            raise UsageError("holds floats outside [0, 1], or NaN; convert it to 8 or 16 bits")
        return np.rint(values * 255).astype(np.uint8)
    # Pillow has unsigned 16 bits in mode "I" too, in PGM scaled to all of them
    if image.mode == "I" and image.format not in (None, "PNG", "PPM") or values.min() < 0:
        raise UsageError(SIGNED_OR_LONG)
    largest = 2 ** 16 - 1 if image.format == "PPM" else 2 ** bits - 1
    if values.max() > largest:
        raise UsageError(f"holds the value {values.max()}, over the largest of "
                         f"{largest.bit_length()} bits; convert it, or give another --bits")
    scaled = np.rint(np.arange(largest + 1) / (largest / 255)).astype(np.uint8)[values]
    inverted = getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO
    return 255 - scaled if inverted else scaled


def _is_deep_colour(image):
    """Whether a file that is not loaded yet has colours of 16 bits: Pillow reads the upper 8."""
    args = [tile[3] if isinstance(tile[3], tuple) else (tile[3],) for tile in image.tile]
    deep = any(";16" in str(raw) and raw != "BGR;16" for raw, *_ in args)  # that has 16 in all
    return not image.mode.startswith("I") and (deep or image.format == "PPM" and
                                               any(65535 in parts for parts in args))


def _notes_on_depth(data, bits):
    """Says whether 16-bit files use fewer bits, by a look at a few, evenly spread."""
    largest = {True: 0, False: 0}  # in files that --bits scales, and in those that it does not
    for i in np.linspace(0, len(data) - 1, min(len(data), LOOK_IMAGES)).astype(int):
        try:
            with Image.open(data.path(i)) as image:
                deep = _is_deep_colour(image)
                if deep or image.mode.startswith("I"):
                    value = int(np.asarray(image.convert("RGB") if deep else image).max())
                    scaled = not deep and image.format != "PPM"
                    largest[scaled] = max(largest[scaled], 256 * value + 255 if deep else value)
        except Exception:  # a broken file, which is named when it is read
            continue
    notes = []
    for scaled, value in largest.items() if bits == 16 else ():
        used = value.bit_length()
        advice = f"--bits {used} scales them" if used > 8 and scaled else "convert them to 8 bits"
        if 0 < used < 15:
            notes.append(f"{data.root}: 16-bit files use {used} bits (the largest value seen is "
                         f"{value}) and will be dark; {advice}")
    return notes


def main(argv=None):
    parser = argparse.ArgumentParser(description="list the images that cannot be read")
    parser.add_argument("dir", type=Path, metavar="DIR", help="a folder of images, at any depth")
    parser.add_argument("--bits", type=int, default=16, choices=range(8, 17), metavar="BITS",
                        help="that 16-bit image files use")
    args = parser.parse_args(argv)
    if not os.path.isdir(args.dir):
        parser.exit(FileError.status, shown(f"{args.dir}: no such folder") + "\n")
    try:
        paths = sorted(os.path.join(args.dir, name) for name in _walk(args.dir) if _is_image(name))
    except FileError as error:
        parser.exit(error.status, f"{error}\n")
    broken = 0
    with ProcessPoolExecutor() as pool:
        faults = pool.map(partial(_fault, bits=args.bits), paths, chunksize=16)
        for fault in tqdm(faults, total=len(paths), unit="image", disable=None):
            if fault:
                broken += 1
                tqdm.write(fault)
    tqdm.write(f"{broken} of {len(paths)} images cannot be read", file=sys.stderr)
    return 1 if broken else 0


def _fault(path, bits):
    """What hinders reading an image, in one line that begins with its path; None if nothing."""
    try:
        read_image(path, bits)
    except FileError as error:
        return str(error)


DATASETS = {"folder": _folder, "digits": _digits, "cifar10": partial(_torchvision, "CIFAR10"),
            "cifar100": partial(_torchvision, "CIFAR100"), "fashionmnist": _fashion_mnist}


# ------------------------------------------------------------------------------------------- views


class Batches:
    """The batches of a shuffled epoch, the same for any number of processes; an incomplete last one
    is dropped. index: of the images (n,) that are trained on. rows: this process's of a batch."""

    def __init__(self, index, batch_size, seed, rank=0, world_size=1):
        self.index, self.batch_size, self.seed = index, batch_size, seed
        self.rows = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self._from = 0, 0  # the epoch and step from which a DataLoader takes them: Views sets it

    def __len__(self):
        return len(self.index) // self.batch_size

    def __iter__(self):
        epoch, start = self._from
        for _, index in self.whole(epoch, start):
            yield [(epoch, i) for i in index[self.rows].tolist()]

    def whole(self, epoch, start=0):
        """Each step of the epoch from `start` on, with the indices (N,) of its global batch."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
        order = self.index[torch.randperm(len(self.index), generator=generator)]
        for step in range(start, len(self)):
            yield step, order[step * self.batch_size:(step + 1) * self.batch_size]


class Views:
    """The training batches of one process.

    augment: what is done after cropping. min_scale: the least share of an image's area in a crop.
    """

    def __init__(self, data, batches, augment, device, views=2, min_scale=0.2, workers=0):
        self.data, self.batches, self.augment = data, batches, augment.to(device)
        self.device, self.views, self.min_scale = torch.device(device), views, min_scale
        self.crops = None
        if not hasattr(data, "images"):
            crops = RandomCrops(data, augment.size, batches.seed, views, min_scale)
            self.crops = in_workers(crops, workers, device, batch_sampler=batches,
                                    persistent_workers=workers > 0)

    def epoch(self, epoch, start=0):
        """The epoch's steps from `start` on. Yields V random views (n, 3, S, S) of each image of
        this process; the indices (N,) of the whole batch's images, on the CPU; labels (n,)."""
        self.batches._from = epoch, start
        crops = iter(self.crops) if self.crops else None
        box_draws = 0 if crops else TRIES * DRAWS_OF_A_BOX
        for step, index in self.batches.whole(epoch, start):
            own = index[self.batches.rows]
            seed = seed_of(self.batches.seed, epoch, "step", step)
            draws = torch.rand(len(index), self.views, Augment.draws + box_draws,
                               generator=torch.Generator().manual_seed(seed))
            draws = self._upload(draws[self.batches.rows].flatten(0, 1))  # nV rows
            if crops:
                x = next(crops).flatten(0, 1).to(self.device, non_blocking=True)
            else:
                x = self._crop(own, draws[:, Augment.draws:])
            x = self.augment(x, draws[:, :Augment.draws]).unflatten(0, (-1, self.views))
            yield *x.unbind(1), index, self._upload(self.data.labels[own])

    def _crop(self, own, draws):
        images = self.data.images[self._upload(own)].repeat_interleave(self.views, dim=0)
        draws = draws.view(-1, TRIES, DRAWS_OF_A_BOX)
        boxes = random_boxes(draws, *images.shape[2:], self.min_scale)
        return resample(images, boxes, self.augment.size)

    def _upload(self, x):
        if self.device.type == "cuda" and torch.cuda.is_available():
            x = x.pin_memory()  # from other memory over 64 KB wait for what the GPU has to do
        return x.to(self.device, non_blocking=True)


def check(data):
    """A TypeError says what of the protocol of data sets (above) this one lacks."""
    need = ["__len__", "labels", "num_classes", "classes", "names", "statistics", "digest", "notes"]
    # The class first: a property there, as the names of a million files, is not evaluated.
    missing = [name for name in need if not (hasattr(type(data), name) or hasattr(data, name))]
    if not hasattr(data, "images") and not hasattr(data, "__getitem__"):
        missing.append("images or __getitem__")
    if missing:
        raise TypeError(f"the data set {type(data).__name__} lacks {', '.join(missing)}")


class RandomCrops(Dataset):
    """RandomResizedCrops of image files: (V, 3, S, S) uint8. Indexed by (epoch, index), as
    `Batches` yields them."""

    def __init__(self, data, size, seed, views, min_scale):
        self.data, self.size, self.seed = data, size, seed
        self.views, self.scale = views, (min_scale, 1)

    def __getitem__(self, epoch_index):
        image, _ = self.data[epoch_index[1]]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(self.seed, *epoch_index))
            boxes = [RandomResizedCrop.get_params(image, self.scale, ASPECT)
                     for _ in range(self.views)]
        return torch.stack([functional.resized_crop(image, *box, [self.size] * 2, antialias=True)
                            for box in boxes])


def random_boxes(u, height, width, min_scale):
    """RandomResizedCrop's boxes (n, 4), each top, left, height, width, from uniform u (n, TRIES,
    4): the first try at a share of the area and an aspect ratio that fits into the image, and the
    whole image if none does."""
    low, high = ASPECT
    area = height * width * (min_scale + (1 - min_scale) * u[..., 0])
    aspect = torch.exp(math.log(low) + math.log(high / low) * u[..., 1])
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()  # nxTRIES
    top, left = (u[..., 2] * (height - h + 1)).floor(), (u[..., 3] * (width - w + 1)).floor()
    fits = (h > 0) & (h <= height) & (w > 0) & (w <= width)
    boxes = torch.stack([top, left, h, w], dim=-1)
    first = boxes[torch.arange(len(u), device=u.device), fits.to(torch.uint8).argmax(1)]
    whole = torch.stack([torch.full_like(u[:, 0, 0], side) for side in (0, 0, height, width)], 1)
    return torch.where(fits.any(1, keepdim=True), first, whole)


def resample(images, boxes, size):
    """Cut `boxes` (n, 4), each top, left, height, width, out of images (n, c, H, W) uint8, and
    resize them as PIL's bilinear filter does, with antialiasing: (n, 3, size, size) float32 in
    [0, 1]. The filter is a matrix for rows and for columns."""
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


# ------------------------------------------------------------------------------------ augmentation

# The columns of an image's draws: whether each is done, the blur's sigma, the jitter's amounts, and
# four of which the order of jitter's operations is the ranking. After them come those of a box.
JITTER, GREY, BLUR, FLIP, SIGMA = range(5)
FACTORS, HUE, ORDER = slice(5, 8), 8, slice(9, 13)
DRAWS_OF_A_BOX = 4
HUE_TURN = 3  # shift_hue's place in OPERATIONS


class Augment(nn.Module):
    """What MoCo does to a crop after cutting it, to a whole batch, with draws for each image.

    aug: "v1" or "v2" (arXiv 2003.04297), or "crop" for flip alone, as in the linear probe. size: S;
    crops under 64 pixels are not blurred. statistics: mean and standard deviation of the channels.
    flip: mirror half of the images. The operations are torchvision's on floats: unlike in PIL's
    pipeline nothing is rounded to 8 bits on the way, and the blur is a Gaussian, not three boxes.
    """
    draws = ORDER.stop

    def __init__(self, aug, size, statistics, flip=True):
        super().__init__()
        self.aug, self.size, self.flip = aug, size, flip
        self.register_buffer("mean", torch.tensor(statistics[0]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(statistics[1]).view(3, 1, 1))

    def forward(self, x, u=None):
        """x: (n, 3, S, S) uint8, or float in [0, 1]; u: (n, draws) uniform in [0, 1), which "crop"
        without flip does not need. Returns (n, 3, S, S) float32, normalised."""
        if u is None or _all_at_once(x):
            return self._augment(x, u)
        chunk = max(1, CHUNK_PIXELS // x[0, 0].numel())
        return torch.cat([self._augment(*part) for part in zip(x.split(chunk), u.split(chunk))])

    def _augment(self, x, u):
        x = x / 255 if x.dtype == torch.uint8 else x
        if self.aug == "v1":
            x = _where(u[:, GREY] < 0.2, grey, x)
            x = self.jitter(x, u, hue=0.4)
        elif self.aug == "v2":
            x = _where(u[:, JITTER] < 0.8, partial(self.jitter, hue=0.1), x, u)
            x = _where(u[:, GREY] < 0.2, grey, x)
            if self.size >= SMALL_CROP:
                x = _where(u[:, BLUR] < 0.5, blur, x, 0.1 + 1.9 * u[:, SIGMA])
        if self.flip:
            x = _where(u[:, FLIP] < 0.5, lambda x: x.flip(-1), x)
        return ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def jitter(self, x, u, hue, strength=0.4):
        """ColorJitter: brightness, contrast, saturation, hue, in an order of each image's own."""
        factors = 1 + strength * (2 * u[:, FACTORS] - 1)  # of brightness, contrast, saturation
        turn = hue * (2 * u[:, HUE] - 1)
        order = u[:, ORDER].argsort(1)  # which of OPERATIONS comes first, second, ...
        if not _all_at_once(x):
            amounts = torch.cat([factors, turn[:, None]], dim=1)
            for slot in range(len(OPERATIONS)):
                for i, operation in enumerate(OPERATIONS):
                    x = _where(order[:, slot] == i, operation, x, amounts[:, i])
            return x
        place = (order == HUE_TURN).to(torch.uint8).argmax(1)  # the dear one is done once
        for slot in range(3):
            x = _blend(x, order[:, slot], factors, slot < place)
        x = shift_hue(x, turn)
        for slot in range(1, 4):
            x = _blend(x, order[:, slot], factors, slot > place)
        return x


def _all_at_once(x):
    """Whether all images get all operations, and a mask: choosing images makes a GPU wait, and
    takes longer than it spares where they are small."""
    return x.device.type != "cpu" or x.shape[-1] < SMALL_CROP or torch.compiler.is_compiling()


def _where(chosen, operation, x, *more):
    """operation(x, *more) of the images that are chosen (n,), and the others as they are."""
    if _all_at_once(x):
        return torch.where(_each(chosen), operation(x, *more), x)
    rows = chosen.nonzero()[:, 0]
    if not len(rows):
        return x
    if len(rows) == len(x):
        return operation(x, *more).expand_as(x)
    x = x.clone()
    x[rows] = operation(x[rows], *(part[rows] for part in more)).expand(-1, x.shape[1], -1, -1)
    return x


def brightness(x, factor):
    return (_each(factor) * x).clamp_(0, 1)


def contrast(x, factor):
    factor, mean = _each(factor), grey(x).mean((2, 3), keepdim=True)
    return (factor * x).add_((1 - factor) * mean).clamp_(0, 1)


def saturation(x, factor):
    factor = _each(factor)
    return (factor * x).add_((1 - factor) * grey(x)).clamp_(0, 1)


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


OPERATIONS = brightness, contrast, saturation, shift_hue


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
    x = x.view(n, c, -1, size - size % -block)  # the columns are done
    x = x.unfold(2, window, block)  # nxcxblocksxSxwindow
    x = (weights.mT[:, None, None] @ x.mT).flatten(2, 3)
    return x[:, :, :size, :size]


def _blend(x, operation, factors, active):
    """Each image's brightness (0), contrast (1) or saturation (2) by its factor, where active."""
    luma = grey(x)
    mean = luma.mean((2, 3), keepdim=True)
    other = torch.where(_each(operation == 2), luma, _each(operation == 1) * mean)
    factor = factors.gather(1, operation.clamp(max=2)[:, None])[:, 0]
    factor = _each(torch.where(active, factor, 1))
    return (factor * x + (1 - factor) * other).clamp(0, 1)


def _each(x):
    return x[:, None, None, None]


# -------------------------------------------------------------------------------------- evaluation


def evaluation(data, size, device, batch_size, rank=0, world_size=1, workers=0):
    """One process's shard of a data set, in batches: the images' centres (n, 3, size, size),
    normalised, on `device`, and their labels (n,). The centre is that of the image with its shorter
    side resized to 256/224 of `size`, and to `size` itself if that is small."""
    rows = shard(len(data), rank, world_size)
    resized = size * 256 // 224 if size >= SMALL_CROP else size
    normalise = Augment("crop", size, data.statistics, flip=False).to(device)
    if not hasattr(data, "images"):
        crops = in_workers(CentreCrops(data, size, resized), workers, device,
                           batch_size=batch_size, sampler=rows)
        for x, labels in crops:
            yield normalise(x.to(device, non_blocking=True)), labels
        return
    height, width = data.images.shape[2:]
    least = min(height, width)
    side = least * size / resized
    top, left = ((total - least) // 2 + (least - side) / 2 for total in (height, width))
    box = torch.tensor([[top, left, side, side]], device=device)  # a square of whole pixels' middle
    for start in range(rows.start, rows.stop, batch_size):
        own = slice(start, min(start + batch_size, rows.stop))
        yield normalise(resample(data.images[own], box, size)), data.labels[own]


class CentreCrops(Dataset):
    def __init__(self, data, size, resized):
        self.data, self.size, self.resized = data, size, resized

    def __getitem__(self, i):
        image, label = self.data[i]
        most = ASPECT_MOST * min(image.shape[1:])  # what is further out would only take memory
        image = functional.center_crop(image, [min(side, most) for side in image.shape[1:]])
        image = functional.resize(image, [self.resized], antialias=True)
        return functional.center_crop(image, self.size), label


def in_workers(data, workers, device, **options):
    # Below a spawned process workers would be spawned too, and import torch anew for every E-step:
    # ten seconds each.
    context = "fork" if workers and sys.platform == "linux" else None
    return DataLoader(data, num_workers=workers, pin_memory=torch.device(device).type == "cuda",
                      worker_init_fn=leave_signals_to_the_parent, multiprocessing_context=context,
                      **options)


def leave_signals_to_the_parent(_):
    """A signal to the whole job is not to kill a worker under a step that is to be finished. A
    second SIGTERM is: by it multiprocessing ends what is left at exit."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def shard(total, rank, world_size):
    """The rows of `total` that process `rank` holds: ceil(total / world_size) in a row, fewer at
    the end, none twice."""
    size = math.ceil(total / world_size)
    return range(min(rank * size, total), min((rank + 1) * size, total))


if __name__ == "__main__":
    sys.exit(main())
