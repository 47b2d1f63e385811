"""Data sets, any mode of image, keyed views, sharding."""
import gzip

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional

import loader


def test_digits_are_split_once_and_stratified():
    train, val = loader.load("digits", None, "train"), loader.load("digits", None, "val")
    assert (len(train), len(val), train.num_classes) == (1437, 360, 10)
    share = torch.bincount(train.labels) / len(train) - torch.bincount(val.labels) / len(val)
    assert share.abs().max() < 0.005
    assert not {image.tobytes() for image in train.images} & {image.tobytes() for image in val.images[:50]}


def test_statistics_standardise_the_training_images():
    train = loader.load("digits", None, "train")
    mean, std = train.statistics
    x = torch.from_numpy(train.images).double() / 255
    assert mean == pytest.approx([x.mean().item()] * 3) and std == pytest.approx([x.std(correction=0).item()] * 3)


def test_fashion_mnist_is_read_from_gz_alone(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
    for split in ("train", "t10k"):
        (raw / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + images.tobytes()))
        (raw / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + bytes([0, 1, 2, 3, 2, 9])))
    data = loader.load("fashionmnist", tmp_path, "val")
    image, label = data[5]
    assert image.mode == "RGB" and (np.asarray(image) == images[5][:, :, None]).all() and label == 9
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


def test_augmentation_has_mocos_parameters():
    v1 = loader.augmentation("v1", 224, loader.IMAGENET_STATISTICS, 0.2).transforms
    crop, grey, jitter, flip = v1[:4]
    assert crop.size == (224, 224) and crop.scale == (0.2, 1) and grey.p == 0.2 and flip.p == 0.5
    assert jitter.brightness == jitter.contrast == jitter.saturation == (0.6, 1.4) and jitter.hue == (-0.4, 0.4)
    v2 = loader.augmentation("v2", 224, loader.IMAGENET_STATISTICS, 0.2).transforms
    assert [type(step).__name__ for step in v2] == ["RandomResizedCrop", "RandomApply", "RandomGrayscale", "RandomApply",
                                                    "RandomHorizontalFlip", "ToTensor", "Normalize"]
    assert v2[1].p == 0.8 and v2[1].transforms[0].hue == (-0.1, 0.1) and v2[2].p == 0.2 and v2[3].p == 0.5
    small = loader.augmentation("v2", 32, loader.IMAGENET_STATISTICS, 0.2).transforms
    assert len(small) == len(v2) - 1  # no blur


def test_evaluation_is_the_resized_centre():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    expected = functional.center_crop(functional.resize(image, 256), 224)
    view = loader.centre_crop(224, ((0, 0, 0), (1, 1, 1)))(image)
    torch.testing.assert_close(view, transforms.ToTensor()(expected))


def views(seed):
    train = loader.load("digits", None, "train")
    return loader.Views(train, loader.augmentation("v2", 8, train.statistics, 0.2), seed)


def test_views_depend_on_seed_epoch_and_index_alone():
    torch.manual_seed(1)
    first = views(0)[3, 7]
    views(0)[2, 5]
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = views(0)[3, 7]
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers are touched
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1]) and first[2] == again[2] == 7
    assert not torch.equal(first[0], first[1])
    for other in (views(1)[3, 7], views(0)[4, 7]):
        assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("workers", [1, 2])
def test_views_are_the_same_for_any_number_of_workers(workers):
    def epoch(workers):
        batches = loader.Batches(40, 8, seed=0)
        batches.epoch = 2
        return list(torch.utils.data.DataLoader(views(0), batch_sampler=batches, num_workers=workers))
    for a, b in zip(epoch(0), epoch(workers), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_processes_share_out_the_global_batch_and_drop_an_incomplete_one():
    whole = [[i for _, i in batch] for batch in loader.Batches(23, 6, seed=0)]
    parts = [[[i for _, i in batch] for batch in loader.Batches(23, 6, 0, rank, 3)] for rank in range(3)]
    assert len(whole) == 3 and len(set(sum(whole, []))) == 18
    assert whole == [sum(step, []) for step in zip(*parts)]


def test_an_epoch_goes_on_at_its_step():
    batches = loader.Batches(50, 5, seed=3)
    batches.epoch = 4
    whole = list(batches)
    batches.start = 7
    assert list(batches) == whole[7:] and len(batches) == 3


@pytest.mark.parametrize("total", [0, 1, 5, 12, 13])
@pytest.mark.parametrize("world_size", [1, 2, 4, 7])
def test_shards_hold_every_row_once(total, world_size):
    shards = [loader.shard(total, rank, world_size) for rank in range(world_size)]
    assert [row for shard in shards for row in shard] == list(range(total))
    assert all(len(shard) <= -(-total // world_size) for shard in shards)
