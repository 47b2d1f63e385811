"""Data sets, any mode of image, crops and augmentation against torchvision's, keyed views."""
import os

import numpy as np
import pytest
import torch
from conftest import assert_same, digits, write_fashion_mnist
from PIL import ExifTags, Image, ImageOps
from sklearn.datasets import load_sample_image
from torchvision import transforms
from torchvision.transforms import RandomResizedCrop, functional, v2

import loader

NEUTRAL = [0] * 3, [1] * 3  # statistics that leave images as they are


def photo(height=48, width=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def photos(n, height, width):
    return torch.stack([photo(height, width, seed) for seed in range(n)])


def save(root, images, split="train"):
    (root / split / "a").mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        functional.to_pil_image(image).save(root / split / "a" / f"{i}.png")
    return root


def both_kinds(root, images):
    """The same images (n, 3, H, W) in memory and in files."""
    names = [f"train/a/{i}.png" for i in range(len(images))]
    files = loader.Files(save(root, images), names, [0] * len(images))
    memory = loader.Arrays(images.permute(0, 2, 3, 1).numpy(), [0] * len(images))
    memory.statistics = files.statistics
    return memory, files


def test_digits_are_split_once_and_stratified():
    train, val = loader.load("digits", None)
    assert (len(train), len(val), train.num_classes) == (1437, 360, 10)
    share = torch.bincount(train.labels) / len(train) - torch.bincount(val.labels) / len(val)
    assert share.abs().max() < 0.005


def test_statistics_are_of_each_channel_over_all_of_the_set():
    x = photos(4, 4, 6).permute(0, 2, 3, 1).numpy() // np.uint16([1, 2, 256])
    x = x.astype(np.uint8).repeat(loader.STATISTICS_IMAGES // 2, axis=0)  # sorted by class
    mean, std = loader.Arrays(x, [0] * len(x)).statistics
    assert mean == pytest.approx(x.mean((0, 1, 2)) / 255)
    assert std == pytest.approx([*x[..., :2].std((0, 1, 2)) / 255, 1 / 255])  # of black, a level


def test_fashion_mnist_is_read_as_torchvision_leaves_it_and_called_damaged_if_cut(tmp_path):
    pixels, labels = digits()
    write_fashion_mnist(tmp_path, (pixels, labels), (pixels, labels))
    train, _ = loader.load("fashionmnist", tmp_path)
    assert (train.images[:, 0].numpy() == pixels).all() and (train.labels.numpy() == labels).all()
    os.truncate(next(tmp_path.rglob("train-images*")), 5000)
    with pytest.raises(loader.UsageError, match="FashionMNIST is not there, or damaged.*$"):
        loader.load("fashionmnist", tmp_path)


# ------------------------------------------------------------------------------ what a folder holds


def write(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (80, 80)).save(root / name)  # too large to be held in memory
    return root


@pytest.mark.parametrize("content, classes", [
    (None, "abc"), ("b\na\n", "ab"), ("\ufeffb\r\na\r\n\r\n", "ab"), ("a/\nb/", "ab")])
def test_labels_follow_the_training_classes_kept_in_both_splits(content, classes, tmp_path):
    names = ["train/a/x/2.png", "train/b/1.png", "train/c/3.PNG"], ["val/b/6.png", "val/c/5.png"]
    (tmp_path / "keep").write_text(content or "")
    train, val = loader.load("folder", write(tmp_path, *names[0], *names[1]),
                             content and tmp_path / "keep")
    kept = len(classes)
    assert train.names == names[0][:kept] and val.names == names[1][:kept - 1]
    assert train.labels.tolist() == [*range(kept)] and val.labels.tolist() == [*range(1, kept)]
    assert train.classes == val.classes == [*classes] and train.num_classes == kept


@pytest.mark.parametrize("names, labels, left_out", [
    ([*"a.gif b.jfif c.jpe d.jp2 deep/er/1.jpg e.tga f.avif g.webp h.TIF".split()], [-1] * 9, 2),
    (["train/1.png", "train/2.png", "val/a/3.png"], [-1, -1], 0),
    (["train/a/1.png", "val/2.png", "val/3.png"], [0], 2),
    (["train/a/1.png", "train/2.png", "val/a/3.png"], [0], 1),
    (["train/a/1.png", "train/a/._1.png", "train/.b/1.png", ".val/a/1.png"], [0], 0),
], ids=["any file of Pillow's", "no classes", "no classes in val", "beside classes", "hidden"])
def test_what_has_no_class_folder_is_no_labelled_image(names, labels, left_out, tmp_path):
    (tmp_path / "notes.txt").write_text("beside train nothing is looked at")
    (tmp_path / "features.h5").write_text("Pillow has but a stub for it")
    train, val = loader.load("folder", write(tmp_path, *names))
    assert train.names == names[:len(labels)] and train.labels.tolist() == labels
    assert train.left_out == left_out and bool(val) == (left_out == 1 and labels == [0])


@pytest.mark.parametrize("names, classes, match", [
    (["train/a/1.png", "val/bb/1.png"], None, "/val: has classes that train has not, .*: bb$"),
    ([], None, "no image at any depth"), (["train/.a/1.png", "val/a/1.png"], None, "no image"),
    (["train/a/1.png"], "a\nc", "--classes .*/keep: .*/train, .*'c'"),
    (["train/a/1.png"], "\n", "--classes .*/keep: .*class folders of")])
def test_a_folder_or_choice_that_breaks_the_convention_is_refused(names, classes, match, tmp_path):
    (tmp_path / "keep").write_text(classes or "")
    with pytest.raises(loader.UsageError, match=match):
        loader.load("folder", write(tmp_path, *names), classes and tmp_path / "keep")


@pytest.mark.parametrize("link", ["train", "val", "train/c", "train/a/b", "val/a/b.txt"])
def test_a_link_that_leads_nowhere_is_named(link, tmp_path):
    write(tmp_path, *(f"{split}/a/1.png" for split in ("train", "val") if split != link))
    (tmp_path / link).symlink_to(tmp_path / "nowhere")
    with pytest.raises(loader.UsageError, match=f"{tmp_path}/{link}: "):
        loader.load("folder", tmp_path)


def test_links_lead_to_each_file_once_also_out_of_the_folder(tmp_path):
    expected = ["train/a/1.png", "train/a/2.png", "train/b/1.png"]
    inside = write(tmp_path / "images", *expected) / "train"
    out = write(tmp_path / "pool", "1.png")
    for name, to in (("a/up", ".."), ("a/root", tmp_path), ("a/b", "../b"), ("c", "b"), ("d", out)):
        (inside / name).symlink_to(to)
    assert loader.load("folder", tmp_path / "images")[0].names == [*expected, "train/d/1.png"]


def test_a_folder_without_permission_is_named(tmp_path, monkeypatch):
    def refuse(path, scandir=os.scandir):  # as for those who are not root
        if str(path).endswith("val/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)
    write(tmp_path, "train/b/1.png", "val/b/2.png")
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(loader.UsageError, match="/val/b: this .* cannot.*Permission denied"):
        loader.load("folder", tmp_path)


@pytest.mark.parametrize("train, val, memory, kind", [
    ([(64, 48)] * 3, [(64, 48)], 4 * 64 * 48 * 3, "Arrays"),
    ([(64, 48)] * 3, [(64, 48)], 4 * 64 * 48 * 3 - 1, "Files"),
    ([(65, 48)] * 3, [(65, 48)], 1e9, "Files"),
    ([(9, 8), (9, 9), (9, 8)], [(9, 8)], 1e9, "Files"), ([(9, 8)] * 3, [(9, 9)], 1e9, "Files")])
def test_small_images_of_one_size_are_held(train, val, memory, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "MEMORY", memory)
    for split, sizes in (("train", train), ("val", val)):
        save(tmp_path, [photo(*size, i) for i, size in enumerate(sizes)], split)
    for split, sizes, data in zip(("train", "val"), (train, val), loader.load("folder", tmp_path)):
        assert type(data).__name__ == kind and data.classes == ["a"]
        assert (data.statistics == loader.IMAGENET_STATISTICS) == (kind == "Files")
        assert data.names == [f"{split}/a/{i}.png" for i in range(len(sizes))]
        assert all(torch.equal(data[i], photo(*size, i)) for i, size in enumerate(sizes))


@pytest.mark.parametrize("size, digest_of", [(10, "pixels"), (80, "names")])
def test_a_digest_is_of_labels_and_of_what_it_says(size, digest_of, tmp_path):
    def now():
        return loader.load("folder", tmp_path)[0].digest
    save(tmp_path, photos(2, size, size))
    first, again = now(), now()
    save(tmp_path, photos(2, size, size).flip(0))
    overwritten = now()
    os.rename(tmp_path / "train/a/1.png", tmp_path / "train/a/2.png")
    renamed = now()
    os.renames(tmp_path / "train/a/2.png", tmp_path / "train/b/2.png")
    assert first == again and now() not in (first, overwritten, renamed)
    assert loader.load("folder", tmp_path)[0].digest_of == digest_of
    assert (first == overwritten) == (digest_of == "names")
    assert (overwritten == renamed) == (digest_of == "pixels")


@pytest.mark.parametrize("mode, colour, rgb", [
    ("L", 77, [77, 77, 77]), ("1", 1, [255, 255, 255]), ("RGB", (1, 2, 3), [1, 2, 3]),
    ("CMYK", (0, 0, 0, 255), [0, 0, 0]), ("CMYK", (255, 0, 0, 0), [0, 255, 255]),
    ("RGBA", (200, 0, 0, 0), [255, 255, 255]), ("RGBA", (200, 0, 0, 255), [200, 0, 0]),
    ("LA", (9, 0), [255, 255, 255]), ("LA", (9, 255), [9, 9, 9]),
    ("P", 0, [255, 255, 255]), ("P", 1, [1, 2, 3]),
    ("I;16", 4095, [16, 16, 16]), ("I;16", 65535, [255, 255, 255])])
def test_any_mode_becomes_8_bit_rgb_over_white(mode, colour, rgb, tmp_path):
    image = Image.new(mode, (3, 2), colour)
    if mode == "P":
        image.putpalette([9, 9, 9, 0, 1, 2, 3, 255], "RGBA")
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image.save(path)
    assert (loader.read_image(path) == torch.tensor(rgb)[:, None, None].expand(3, 2, 3)).all()


@pytest.mark.parametrize("name", ["x.png", "x.tif", "16.tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, name, tmp_path):
    x, exif = np.arange(6, dtype=np.uint8).reshape(2, 3), Image.Exif()
    image = Image.fromarray(x if name.startswith("x") else x * np.uint16(257))
    exif[ExifTags.Base.Orientation] = orientation
    image.save(tmp_path / name, exif=exif)
    expected = [x, x[:, ::-1], x[::-1, ::-1], x[::-1], x.T, np.rot90(x, -1), x[::-1, ::-1].T,
                np.rot90(x)]
    assert (loader.read_image(tmp_path / name)[0].numpy() == expected[orientation - 1]).all()


@pytest.mark.parametrize("mode, turn, how", [
    ("RGB", 1, {}), ("RGB", 1, dict(progressive=True)), ("RGB", 6, {}), ("L", 1, {}),
    ("CMYK", 1, {}), ("RGB", 1, dict(format="PNG")),
    ("RGB", 1, dict(format="MPO", save_all=True, append_images=[Image.new("RGB", (9, 9))]))])
def test_a_jpeg_that_is_read_smaller_has_the_views_of_all_its_pixels(mode, turn, how, tmp_path):
    """Within 2 of 255 on average; bit for bit where there are too few pixels, or half ones."""
    photo, exif = Image.fromarray(load_sample_image("china.jpg")), Image.Exif()
    exif[ExifTags.Base.Orientation] = turn
    for width, height, size, part in ((640, 424, 200, 1), (640, 427, 60, 1), (638, 426, 20, 2),
                                      (640, 424, 60, 2), (640, 424, 30, 4), (640, 424, 16, 4)):
        image, part = photo.crop((0, 0, width, height)), 1 if "PNG" in how.values() else part
        image.convert(mode).save(tmp_path / "x.jpg", **dict(format="JPEG", exif=exif) | how)
        with Image.open(tmp_path / "x.jpg") as image:
            whole = functional.pil_to_tensor(ImageOps.exif_transpose(image).convert("RGB"))
        files, u = loader.Files(tmp_path, ["x.jpg"], [0]), torch.rand(1, 40, 10, 4)
        read = files.read(0, loader.ENOUGH * size / 0.2 ** 0.5)
        assert read.shape[1] == whole.shape[1] / part and read.shape[2] == whole.shape[2] / part
        boxes = loader.random_boxes(u[0], *read.shape[1:], 0.2)
        views = [*files.random_crops(torch.zeros(1).int(), u, size, 0.2)[0],
                 files.centre_crops(size, [0])[0]]
        theirs = [v2.functional.resized_crop(whole, *box, [size] * 2, antialias=True)
                  for box in (part * boxes).int().tolist()] + [loader.centre_crop(whole, size)]
        off = [(a.int() - b.int()).abs().float().mean() for a, b in zip(views, theirs)]
        assert max(off[:-1]) <= (2 if part > 1 else 0) and off[-1] <= 2, (width, size, off)


@pytest.mark.parametrize("name, make, reason", [
    ("x.tif", Image.new("I", (2, 2)).save, "range is not known"),
    ("x.tif", Image.new("F", (2, 2)).save, "range is not known"),
    ("x.png", os.mkdir, "Is a directory"), ("x.jpg", lambda path: (
        functional.to_pil_image(photo()).save(path), os.truncate(path, 2000)), "truncated"),
    ("new\nline\udcff.png", lambda path: path.write_bytes(b"no image"), "cannot identify")])
def test_a_file_that_cannot_be_read_is_named_in_one_line(name, make, reason, tmp_path):
    make(tmp_path / name)
    with pytest.raises(loader.UsageError) as error:
        loader.Files(tmp_path, [name], [0]).centre_crops(2, [0])
    line, shown = str(error.value), name.replace("\n", r"\n").replace("\udcff", r"\udcff")
    assert line.startswith(f"{tmp_path}/{shown}: cannot be read as an image") and reason in line
    assert line.isprintable()


@pytest.mark.parametrize("height, width", [(40, 60), (16, 64), (64, 16), (8, 64)])
def test_random_boxes_are_distributed_as_torchvisions(height, width):
    image, ratio, n = photo(height, width), (3 / 4, 4 / 3), 2500
    never_fits = torch.tensor(RandomResizedCrop.get_params(image, (9, 9), ratio))
    u = torch.rand(n, loader.TRIES, 4, generator=torch.Generator().manual_seed(0))
    ours = loader.random_boxes(u, height, width, 0.2)
    torch.manual_seed(0)
    theirs = torch.tensor([RandomResizedCrop.get_params(image, (0.2, 1), ratio)
                           for _ in range(n)]).float()
    assert torch.equal(ours, ours.round()) and (ours >= 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= torch.tensor([height, width])).all()
    share, their_share = ((x == never_fits).all(1).double().mean() for x in (ours, theirs))
    assert (share - their_share).abs() < 0.056  # 4 standard deviations
    for column in range(4):
        a, b = ours[:, column].sort().values, theirs[:, column].sort().values
        assert (a - b).abs().mean() < 0.6, column  # pixels between the two distributions


@pytest.mark.parametrize("size", [8, 20, 33])
@pytest.mark.parametrize("height, width", [(33, 32), (16, 64), (8, 64)])
def test_random_crops_in_memory_are_pils_of_the_files(height, width, size, tmp_path):
    memory, files = (views(data, aug="crop", size=size)
                     for data in both_kinds(tmp_path, photos(8, height, width)))
    for (*x, index, _), (*y, index_of_files, _) in zip(memory, files, strict=True):
        assert torch.equal(index, index_of_files)
        torch.testing.assert_close(x, y, atol=1.1 / 255 / 0.224, rtol=0)  # PIL rounds twice


@pytest.mark.parametrize("size", [8, 32, 63, 64, 112])
@pytest.mark.parametrize("height, width", [(8, 8), (28, 28), (40, 33), (33, 64), (64, 64), (1, 9)])
def test_centre_crops_are_torchvisions_in_memory_and_from_files(height, width, size, tmp_path):
    x = photos(3, height, width)
    memory, files = (data.centre_crops(size, range(1, 3)) for data in both_kinds(tmp_path, x))
    assert torch.equal(memory, files)
    resized = size * 256 // 224 if size >= 64 else size
    field = transforms.Compose([transforms.Resize(resized), transforms.CenterCrop(size)])
    expected = [functional.pil_to_tensor(field(functional.to_pil_image(image))) for image in x[1:]]
    assert (memory.int() - torch.stack(expected).int()).abs().max() <= 1  # pixels' last digit


def test_evaluation_is_of_normalised_centres_in_parts(tmp_path):
    x, statistics = photos(70, 12, 14), ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    for data in both_kinds(tmp_path, x):
        data.labels = torch.arange(70)
        parts = [[*loader.centre_batches(data, 12, statistics, rank, 2, workers=rank)]
                 for rank in range(2)]
        found, labels = map(torch.cat, zip(*parts[0], *parts[1]))
        torch.testing.assert_close(found, functional.normalize(x[..., 1:13] / 255, *statistics))
        assert torch.equal(labels, data.labels)


# --------------------------------------------------- each operation against torchvision's, by image


def draws(n):
    return torch.rand(n, loader.DRAWS, generator=torch.Generator().manual_seed(0))


def test_blur_is_a_gaussian_with_the_edge_repeated():
    x, sigma = photos(5, 48, 48) / 255, torch.tensor([0.1, 0.5, 1.0, 1.5, 2.0])
    padded = torch.nn.functional.pad(x, [8] * 4, mode="replicate")
    expected = [functional.gaussian_blur(image, 17, s)[:, 8:-8, 8:-8]
                for image, s in zip(padded, sigma.tolist())]
    torch.testing.assert_close(loader.blur(x, sigma), torch.stack(expected), atol=1e-6, rtol=0)


def test_jitter_is_torchvisions_operations_in_every_order():
    x, u = photos(64, 12, 12) / 255, draws(64)
    x[6] = x[6, :1]  # grey has no hue
    out, orders = loader.jitter(x, u), u[:, loader.ORDER].argsort(1)
    steps = (functional.adjust_brightness, functional.adjust_contrast,
             functional.adjust_saturation, functional.adjust_hue)
    for i in range(64):
        amounts = [*(0.6 + 0.8 * u[i, 5:8]).tolist(), 0.1 * (2 * u[i, 8].item() - 1)]
        for step in orders[i].tolist():
            x[i] = steps[step](x[i], amounts[step])
    torch.testing.assert_close(out, x, atol=2e-3, rtol=0)
    assert len(orders.unique(dim=0)) > 18  # of 24


@pytest.mark.parametrize("aug, size, shares", [
    ("v2", 32, (0.8, 0.2, 0, 0.5)), ("v2", 64, (0.8, 0.2, 0.5, 0.5)), ("crop", 32, (0, 0, 0, 0.5))])
def test_mocos_probabilities(aug, size, shares, monkeypatch):
    """Each operation is replaced by one that adds a power of two: the sum tells which were done."""
    monkeypatch.setattr(loader, "jitter", lambda x, u: x + 1)
    monkeypatch.setattr(loader, "grey", lambda x: x + 2)
    monkeypatch.setattr(loader, "blur", lambda x, sigma: x + 4)
    mirrored = torch.nn.functional.pad(torch.zeros(2000, 3, size, size - 1), [1, 0], value=8)
    out = loader.Augment(aug, size, NEUTRAL)(mirrored, draws(2000))
    applied = out.amax((1, 2, 3)).int() - 8
    found = [(applied & bit > 0).double().mean().item() for bit in (1, 2, 4)]
    found.append((out[:, 0, 0, -1] >= 8).double().mean().item())
    assert found == pytest.approx(shares, abs=0.035)  # 3 standard deviations


# ----------------------------------------------------------------------------- keyed random numbers


def views(data, seed=0, epoch=2, start=0, aug="v2", size=16, **options):
    index, augment = torch.arange(len(data)), loader.Augment(aug, size, data.statistics)
    return loader.Views(data, index, 8, augment, seed, **options).epoch(epoch, start)


@pytest.fixture(params=["memory", "files"])
def data(request, image_folder):
    if request.param == "files":
        return loader.load("folder", image_folder)[0]
    return loader.load("digits", None)[1]


def test_views_depend_on_seed_and_epoch_alone(data, monkeypatch):
    first, others = next(views(data)), [dict(seed=1), dict(epoch=3)]
    torch.manual_seed(2)
    assert_same(first, next(views(data)))
    assert not torch.equal(*first[:2])
    assert not any(torch.equal(next(views(data, **other))[2], first[2]) for other in others)
    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.arange(n))  # the order is the same
    im_q, *_ = next(views(data))
    assert not any(torch.equal(next(views(data, **other))[0], im_q) for other in others)


@pytest.mark.parametrize("number", [1, 3])
def test_views_are_of_the_images_that_they_name(number, data, monkeypatch):
    """Whole images, without augmentation, are compared pixel by pixel."""
    monkeypatch.setattr(loader.Augment, "forward", lambda self, x, u: x * 1.0)
    monkeypatch.setattr(loader, "random_boxes", lambda u, height, width, min_scale:
                        torch.tensor([0.0, 0.0, height, width]).expand(len(u), 4))
    for *x, index, labels in views(data, views=number):
        assert len(x) == number and torch.equal(labels, data.labels[index])
        for i in range(8):
            expected = functional.resize(data[index[i]], [16, 16], antialias=True)
            scale = 255 if isinstance(data, loader.Arrays) else 1
            assert all((scale * view[i] - expected).abs().max() < 1.5 for view in x)


def test_processes_share_out_the_views_of_the_global_batch(data):
    whole = next(views(data))
    parts = [next(views(data, rank=rank, world_size=2)) for rank in range(2)]
    for i in (0, 1, 3):
        torch.testing.assert_close(torch.cat([part[i] for part in parts]), whole[i])
    assert torch.equal(parts[0][2], whole[2]) and torch.equal(parts[1][2], whole[2])


@pytest.mark.parametrize("start, workers", [(4, 0), (0, 1), (4, 2)])
def test_an_epoch_goes_on_at_any_step_with_any_number_of_workers(start, workers, data):
    whole, rest = [*views(data)], [*views(data, start=start, workers=workers)]
    assert len(rest) == len(whole) - start > 0
    assert_same(rest, whole[start:])


def test_an_epoch_has_each_image_at_most_once_and_drops_an_incomplete_batch(data):
    some = torch.arange(1, len(data), 2)[:23]
    all_views = loader.Views(data, some, 6, loader.Augment("crop", 8, data.statistics), seed=0)
    found = [index.tolist() for *_, index, _ in all_views.epoch(1)]
    assert [len(batch) for batch in found] == [6] * 3 and len(all_views) == 3
    assert len({*sum(found, [])}) == 18 and {*sum(found, [])} < {*some.tolist()}


def test_a_data_set_of_ones_own_has_views_and_evaluation(monkeypatch):
    class Own(loader.Files):
        def read(self, i, least=None):
            return photo(20, 24, i)
    own = Own("nowhere", [*map(str, range(8))], [*range(8)], "abcdefgh")
    monkeypatch.setitem(loader.DATASETS, "own", lambda root, classes: (own, own))
    train, val = loader.load("own", "anywhere")
    (_, _, index, labels), = views(train, workers=1)
    assert torch.equal(index, labels) and sorted(labels.tolist()) == [*range(8)]
    (x, _), = loader.centre_batches(val, 20, NEUTRAL, workers=1)
    assert torch.equal((255 * x).round().byte(), photos(8, 20, 24)[..., 2:22])


@pytest.mark.parametrize("total", [0, 1, 5, 12, 13])
@pytest.mark.parametrize("world_size", [1, 2, 4, 7])
def test_shards_hold_every_row_once(total, world_size):
    shards = [loader.shard(total, rank, world_size) for rank in range(world_size)]
    assert [row for shard in shards for row in shard] == list(range(total))
    assert all(len(shard) <= -(-total // world_size) for shard in shards)
