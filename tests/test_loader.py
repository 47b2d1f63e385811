"""Data sets, any mode of image, augmentation against torchvision's, keyed views, sharding."""
import gzip

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision.transforms import RandomResizedCrop, functional

import loader


def test_digits_are_split_once_and_stratified():
    train, val = loader.load("digits", None, "train"), loader.load("digits", None, "val")
    assert (len(train), len(val), train.num_classes) == (1437, 360, 10)
    share = torch.bincount(train.labels) / len(train) - torch.bincount(val.labels) / len(val)
    assert share.abs().max() < 0.005
    assert not {image.numpy().tobytes() for image in train.images} & {image.numpy().tobytes() for image in val.images}


def test_statistics_standardise_the_training_images():
    train = loader.load("digits", None, "train")
    mean, std = train.statistics
    x = train.images.double() / 255
    assert mean == pytest.approx([x.mean().item()] * 3) and std == pytest.approx([x.std(correction=0).item()] * 3)


def test_fashion_mnist_is_read_from_gz_alone(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
    for split in ("train", "t10k"):
        (raw / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + images.tobytes()))
        (raw / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + bytes([0, 1, 2, 3, 2, 9])))
    data = loader.load("fashionmnist", tmp_path, "val")
    assert (data.images[:, 0].numpy() == images).all() and data.labels.tolist() == [0, 1, 2, 3, 2, 9]
    assert sorted(path.suffix for path in raw.iterdir()) == [".gz"] * 4


def test_folder_labels_follow_the_training_classes_in_both_splits(tmp_path):
    for name in ("train/b/1.png", "train/a/x/2.png", "train/c/3.PNG", "val/c/4.png", "val/b/5.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    train, val = loader.load("folder", tmp_path, "train"), loader.load("folder", tmp_path, "val")
    assert train.labels.tolist() == [0, 1, 2] and val.labels.tolist() == [1, 2] and train.num_classes == 3
    (tmp_path / "keep").write_text("c\nb\n")
    assert loader.load("folder", tmp_path, "train", tmp_path / "keep").labels.tolist() == [0, 1]
    assert loader.load("folder", tmp_path, "val", tmp_path / "keep").labels.tolist() == [0, 1]


def test_any_tree_of_images_is_unlabelled_data(tmp_path):
    for name in ("1.png", "deep/er/2.jpg", "deep/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    data = loader.load("folder", tmp_path, "train")
    assert len(data) == 3 and data.labels.tolist() == [-1] * 3 and loader.load("folder", tmp_path, "val") is None


@pytest.mark.parametrize("mode, colour, rgb", [
    ("L", 77, (77, 77, 77)), ("1", 1, (255, 255, 255)), ("RGB", (1, 2, 3), (1, 2, 3)), ("CMYK", (0, 0, 0, 255), (0, 0, 0)),
    ("RGBA", (200, 0, 0, 0), (255, 255, 255)), ("RGBA", (200, 0, 0, 255), (200, 0, 0)), ("LA", (9, 0), (255, 255, 255)),
    ("I;16", 77 * 257, (77, 77, 77)), ("I", 77 * 257, (77, 77, 77)), ("F", 77.2, (77, 77, 77))])
def test_any_mode_becomes_rgb(mode, colour, rgb):
    image = loader.to_rgb(Image.new(mode, (3, 2), colour))
    assert image.mode == "RGB" and image.size == (3, 2) and image.getpixel((1, 1)) == rgb


def test_a_transparent_palette_is_laid_over_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "x.png", transparency=0)
    rgb = loader.to_rgb(Image.open(tmp_path / "x.png"))
    assert [rgb.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (40, 50, 60)]


def test_an_unreadable_image_is_named(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 not an image")
    with pytest.raises(OSError, match="broken.jpg: cannot be read as an image"):
        loader.load("folder", tmp_path, "train")[0]


# ----------------------------------------------------------------------------- each operation against torchvision's, by image


def photo(height=48, width=48, seed=0):
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def images(n=8, size=48):
    return torch.stack([photo(size, size, seed) for seed in range(n)]).float() / 255


FACTORS = torch.tensor([0.6, 1.4, 1.0, 0.83, 1.17, 0.7, 1.3, 0.95])


@pytest.mark.parametrize("operation, reference", [
    (0, functional.adjust_brightness), (1, functional.adjust_contrast), (2, functional.adjust_saturation)])
def test_blend_is_torchvisions_for_each_image(operation, reference):
    x = images()
    factors = torch.full((8, 3), 9.0)
    factors[:, operation] = FACTORS
    out = loader._blend(x, torch.full((8,), operation), factors, torch.arange(8) != 7)
    for i in range(7):
        torch.testing.assert_close(out[i], reference(x[i], FACTORS[i].item()), atol=2e-4, rtol=0)  # its luma has 4 digits
    assert torch.equal(out[7], x[7])  # not its turn


def test_hue_is_torchvisions_for_each_image():
    x = images()
    x[6] = x[6, :1]  # grey has no hue
    shift = torch.tensor([-0.4, -0.1, 0.0, 0.1, 0.4, 0.25, 0.3, -0.5])
    out = loader.shift_hue(x, shift)
    for i in range(8):
        torch.testing.assert_close(out[i], functional.adjust_hue(x[i], shift[i].item()), atol=1e-5, rtol=0)


def test_grey_is_torchvisions():
    x = images()
    torch.testing.assert_close(loader.grey(x), functional.rgb_to_grayscale(x), atol=2e-4, rtol=0)


def test_blur_is_a_gaussian_with_the_edge_repeated_and_near_pils():
    sigma = torch.tensor([0.1, 0.5, 1.0, 1.5, 2.0])
    x = images(5)
    out = loader.blur(x, sigma)
    for i, s in enumerate(sigma.tolist()):
        padded = torch.nn.functional.pad(x[i:i + 1], [8] * 4, mode="replicate")[0]
        torch.testing.assert_close(out[i], functional.gaussian_blur(padded, 17, s)[:, 8:-8, 8:-8], atol=1e-5, rtol=0)
        smooth = functional.to_pil_image(functional.gaussian_blur(x[i], 9, 1.5))  # a photograph has no white noise
        ours = loader.blur(functional.to_tensor(smooth)[None], sigma[i:i + 1])[0]
        pils = functional.to_tensor(smooth.filter(ImageFilter.GaussianBlur(s)))
        assert (ours - pils).abs().max() < 4 / 255


def draws(n):
    return torch.rand(n, loader.Augment.draws, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("hue", [0.1, 0.4])
def test_jitter_is_torchvisions_operations_in_every_order(hue):
    x, u = images(64, 12), draws(64)
    out, orders = loader.Augment("v2", 12, loader.IMAGENET_STATISTICS).jitter(x, u, hue), set()
    for i in range(64):
        brightness, contrast, saturation, shift = (0.6 + 0.8 * u[i, 5:8]).tolist() + [hue * (2 * u[i, 8].item() - 1)]
        steps = [lambda y: functional.adjust_brightness(y, brightness), lambda y: functional.adjust_contrast(y, contrast),
                 lambda y: functional.adjust_saturation(y, saturation), lambda y: functional.adjust_hue(y, shift)]
        expected, order = x[i], u[i, 9:13].argsort().tolist()
        for step in order:
            expected = steps[step](expected)
        torch.testing.assert_close(out[i], expected, atol=2e-3, rtol=0)
        orders.add(tuple(order))
    assert len(orders) > 18  # of 24


@pytest.mark.parametrize("aug, size, shares", [("v1", 64, (1, 0.2, 0, 0.5)), ("v2", 32, (0.8, 0.2, 0, 0.5)),
                                               ("v2", 64, (0.8, 0.2, 0.5, 0.5)), ("crop", 32, (0, 0, 0, 0.5))])
def test_mocos_probabilities(aug, size, shares, monkeypatch):
    """Each operation is replaced by one that adds a power of two, so that the sum tells which were applied."""
    monkeypatch.setattr(loader.Augment, "jitter", lambda self, x, u, hue: x + 1)
    monkeypatch.setattr(loader, "grey", lambda x: x + 2)
    monkeypatch.setattr(loader, "blur", lambda x, sigma: x + 4)
    mirrored = torch.zeros(2000, 3, size, size)
    mirrored[..., 0] = 8
    out = loader.Augment(aug, size, ((0, 0, 0), (1, 1, 1)))(mirrored, draws(2000))
    applied = out.amax((1, 2, 3)).int() - 8
    found = [(applied & bit > 0).double().mean().item() for bit in (1, 2, 4)] + [(out[:, 0, 0, -1] >= 8).double().mean().item()]
    assert found == pytest.approx(shares, abs=0.035)  # 3 standard deviations


def test_random_boxes_are_distributed_as_torchvisions():
    u = torch.rand(4000, 10, 4, generator=torch.Generator().manual_seed(0))
    ours = loader.random_boxes(u, 40, 60, 0.2)
    torch.manual_seed(0)
    theirs = torch.tensor([RandomResizedCrop.get_params(photo(40, 60), (0.2, 1), (3 / 4, 4 / 3)) for _ in range(4000)])
    assert ((ours == ours.round()) & (ours >= 0)).all()
    assert (ours[:, 0] + ours[:, 2]).max() == 40 and (ours[:, 1] + ours[:, 3]).max() == 60
    for column in range(4):
        a, b = ours[:, column].sort().values, theirs[:, column].float().sort().values
        assert (a - b).abs().mean() < 0.6, column  # the distance between the two distributions, in pixels


def test_a_box_that_never_fits_is_the_whole_image():
    assert loader.random_boxes(torch.ones(1, 10, 4) * 0.99, 10, 1000, 0.9).tolist() == [[0, 0, 10, 1000]]


@pytest.mark.parametrize("size", [8, 20, 33])
def test_resample_is_pils_bilinear_of_each_box(size):
    x = torch.stack([photo(40, 30, seed) for seed in range(5)])
    boxes = torch.tensor([[0, 0, 40, 30], [5, 3, 9, 11], [0, 7, 33, 12], [30, 20, 10, 10], [1, 1, 8, 20]])
    out = loader.resample(x, boxes.float(), size)
    for i, (top, left, height, width) in enumerate(boxes.tolist()):
        crop = Image.fromarray(x[i].permute(1, 2, 0).numpy()).crop((left, top, left + width, top + height))
        expected = functional.to_tensor(crop.resize((size, size), Image.BILINEAR))
        torch.testing.assert_close(out[i], expected, atol=1.1 / 255, rtol=0)  # PIL rounds twice to 8 bits


def test_the_augmentation_is_one_graph():
    augment = loader.Augment("v2", 64, loader.IMAGENET_STATISTICS)
    compiled = torch.compile(augment, fullgraph=True, backend="eager")
    x, u = (images(4, 64) * 255).to(torch.uint8), draws(4)
    torch.testing.assert_close(compiled(x, u), augment(x, u))


def test_evaluation_of_a_file_is_its_resized_centre(tmp_path):
    Image.fromarray(photo(300, 400).permute(1, 2, 0).numpy()).save(tmp_path / "x.png")
    data = loader.load("folder", tmp_path, "train")
    (x, labels), = loader.evaluation(data, 224, "cpu", batch_size=4)
    resized = functional.resize(Image.open(tmp_path / "x.png"), 256)
    expected = functional.normalize(functional.to_tensor(functional.center_crop(resized, 224)), *data.statistics)
    assert (x[0] - expected).abs().max() < 1.1 / 255 / 0.224 and labels.tolist() == [-1]


def test_evaluation_in_memory_is_the_resized_centre():
    data = loader.Arrays(torch.stack([photo(64, 64, seed) for seed in range(3)]).permute(0, 2, 3, 1).numpy(), [0, 1, 2])
    (x, _), (last, labels) = loader.evaluation(data, 56, "cpu", batch_size=2)
    image = data.images[2].float() / 255  # 256/224 of 56 is 64: the middle 56 pixels as they are
    torch.testing.assert_close(last[0], functional.normalize(image[:, 4:-4, 4:-4], *data.statistics), atol=1e-5, rtol=0)
    assert len(x) == 2 and labels.tolist() == [2]


# ------------------------------------------------------------------------------------------------- keyed random numbers


def views(data, seed=0, epoch=2, workers=0, **place):
    batches = loader.Batches(len(data), 8, seed, **place)
    batches.epoch = epoch
    return loader.Views(data, batches, loader.Augment("v2", 16, data.statistics), "cpu", workers=workers)


@pytest.fixture(params=["memory", "files"])
def data(request, image_folder):
    return loader.load("folder", image_folder, "train") if request.param == "files" else loader.load("digits", None, "val")


def test_views_depend_on_seed_and_epoch_alone(data):
    torch.manual_seed(1)
    first = next(iter(views(data)))
    torch.manual_seed(2)
    again = next(iter(views(data)))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    im_q, im_k, index, labels = first
    assert not torch.equal(im_q, im_k) and torch.equal(labels, data.labels[index])
    for other in (views(data, seed=1), views(data, epoch=3)):
        assert not torch.equal(next(iter(other))[0], im_q)


def test_views_are_of_the_images_that_they_name(data, monkeypatch):
    monkeypatch.setattr(loader.Augment, "forward", lambda self, x, u: x * 1.0)
    batches = views(data)
    batches.min_scale = 1.0
    if not isinstance(data, loader.Arrays):
        monkeypatch.setattr(RandomResizedCrop, "get_params", lambda image, *_: (0, 0, *image.shape[1:]))
    _, im_k, index, _ = next(iter(batches))
    for i in range(8):
        image = data.images[index[i]].expand(3, -1, -1) if isinstance(data, loader.Arrays) else data[index[i]][0]
        expected = functional.resize(image, [16, 16], antialias=True).float().mean()
        assert abs(im_k[i].mean() * (255 if isinstance(data, loader.Arrays) else 1) - expected) < 12


@pytest.mark.parametrize("workers", [1, 2])
def test_views_are_the_same_for_any_number_of_workers(workers, image_folder):
    data = loader.load("folder", image_folder, "train")
    for a, b in zip(views(data), views(data, workers=workers), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_processes_share_out_the_views_of_the_global_batch(data):
    whole = next(iter(views(data)))
    parts = [next(iter(views(data, rank=rank, world_size=2))) for rank in range(2)]
    for i in (0, 1, 3):
        torch.testing.assert_close(torch.cat([part[i] for part in parts]), whole[i])
    assert torch.equal(parts[0][2], whole[2]) and torch.equal(parts[1][2], whole[2])


def test_an_epoch_goes_on_at_its_step(data):
    batches = views(data)
    whole = list(batches)
    batches.batches.start = 4
    rest = list(batches)
    assert len(batches.batches) == len(rest) == len(whole) - 4
    assert all(torch.equal(x, y) for a, b in zip(rest, whole[4:], strict=True) for x, y in zip(a, b))


def test_batches_hold_each_image_at_most_once_and_drop_an_incomplete_one():
    whole = [index.tolist() for _, index in loader.Batches(23, 6, seed=0).whole()]
    assert [len(batch) for batch in whole] == [6] * 3 and len(set(sum(whole, []))) == 18


@pytest.mark.parametrize("total", [0, 1, 5, 12, 13])
@pytest.mark.parametrize("world_size", [1, 2, 4, 7])
def test_shards_hold_every_row_once(total, world_size):
    shards = [loader.shard(total, rank, world_size) for rank in range(world_size)]
    assert [row for shard in shards for row in shard] == list(range(total))
    assert all(len(shard) <= -(-total // world_size) for shard in shards)
