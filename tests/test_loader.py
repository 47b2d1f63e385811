"""Data sets, any mode of image, augmentation against torchvision's, keyed views, sharding."""
import gzip
import os
import resource
import struct

import numpy as np
import pytest
import torch
from conftest import script
from PIL import ExifTags, Image, ImageFilter
from torch._utils import ExceptionWrapper
from torchvision.transforms import RandomResizedCrop, functional

import loader


def test_digits_are_split_once_and_stratified():
    train, val = loader.load("digits", None)
    assert (len(train), len(val), train.num_classes) == (1437, 360, 10)
    share = torch.bincount(train.labels) / len(train) - torch.bincount(val.labels) / len(val)
    assert share.abs().max() < 0.005
    pixels = [{image.numpy().tobytes() for image in half.images} for half in (train, val)]
    assert not pixels[0] & pixels[1]


def test_statistics_standardise_the_training_images():
    train = loader.load("digits", None)[0]
    mean, std = train.statistics
    x = train.images.double() / 255
    assert mean == pytest.approx([x.mean().item()] * 3)
    assert std == pytest.approx([x.std(correction=0).item()] * 3)


def test_statistics_are_of_images_from_all_of_the_set():
    sorted_by_class = np.repeat(np.uint8([0, 255]), loader.STATISTICS_IMAGES)[:, None, None]
    data = loader.Arrays(sorted_by_class, np.zeros(len(sorted_by_class)))
    assert data.statistics[0] == pytest.approx([0.5] * 3, abs=1e-3)


def test_a_channel_without_contrast_stays_finite():
    data = loader.Arrays(np.zeros((2, 4, 4, 3), np.uint8), [0, 1])
    (x, _), = loader.evaluation(data, 4, "cpu", 2)
    assert x.isfinite().all()


def write_fashion_mnist(root):
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        images = gzip.compress(bytes(16) + PIXELS.tobytes())
        (raw / f"{split}-images-idx3-ubyte.gz").write_bytes(images)
        (raw / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + LABELS))
    return raw


PIXELS, LABELS = np.random.default_rng(0).integers(0, 256, (4, 28, 28), dtype=np.uint8), b"\0\1\2\1"


def test_fashion_mnist_is_read_from_gz_alone(tmp_path):
    raw = write_fashion_mnist(tmp_path)
    data = loader.load("fashionmnist", tmp_path)[1]
    assert (data.images[:, 0].numpy() == PIXELS).all() and data.labels.tolist() == [0, 1, 2, 1]
    assert sorted(path.suffix for path in raw.iterdir()) == [".gz"] * 4


def test_a_damaged_fashion_mnist_is_said_in_one_line(tmp_path):
    raw = write_fashion_mnist(tmp_path)
    whole = (raw / "train-images-idx3-ubyte.gz").read_bytes()
    spoilt = gzip.compress(gzip.decompress(whole)[:-1])
    for content in (whole[:-20], b"no gzip", whole[:30] + b"xx" + whole[32:], spoilt):
        (raw / "train-images-idx3-ubyte.gz").write_bytes(content)
        with pytest.raises(loader.FileError, match="damaged.*fetch again"):
            loader.load("fashionmnist", tmp_path)


@pytest.mark.parametrize("flags", [dict(classes="x"), dict(bits=12)])
def test_arrays_take_no_flags_of_folders(flags):
    with pytest.raises(loader.UsageError, match="only an image folder"):
        loader.load("digits", None, **flags)


def test_a_data_set_is_one_function_in_the_table(monkeypatch):
    def zeros(root, device):
        return loader.Arrays(np.zeros((4, 8, 8), np.uint8), [0, 1, 0, 1], device), None
    monkeypatch.setitem(loader.DATASETS, "zeros", zeros)
    train, val = loader.load("zeros", None)
    assert train.labels.tolist() == [0, 1, 0, 1] and val is None


def test_errors_have_the_status_of_their_kind_and_pass_from_a_worker(tmp_path):
    assert (loader.UsageError.status, loader.FileError.status) == (2, 1)
    name = "new\nline\udcff.png"
    (tmp_path / name).write_bytes(b"no image")
    try:
        loader.Files(tmp_path, [name], [0], 1)[0]
    except loader.FileError:
        wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(loader.FileError) as caught:
        wrapped.reraise()
    last = str(caught.value).splitlines()[-1]
    assert f"{tmp_path}/new\\nline\\udcff.png: cannot be read as an image" in last
    assert "python loader.py DIR" in last


# ------------------------------------------------------------------------------ what a folder holds


def write(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (80, 80)).save(root / name)  # too large to be held in memory
    return root


def folder(root, *names, **options):
    """The training set of a folder with such files."""
    return loader.load("folder", write(root, *names), **options)[0]


def said(data, *words):
    """Whether one of the notes has all the words."""
    return any(all(word in note for word in words) for note in data.notes)


def test_folder_labels_follow_the_training_classes_in_both_splits(tmp_path):
    train = folder(tmp_path, "train/b/1.png", "train/a/x/2.png", "train/c/3.PNG", "val/c/4.png",
                   "val/b/5.png", "val/a/6.png")
    val = loader.load("folder", tmp_path)[1]
    assert train.labels.tolist() == [0, 1, 2] and train.num_classes == 3
    assert train.names == ["train/a/x/2.png", "train/b/1.png", "train/c/3.PNG"]
    assert val.labels.tolist() == [0, 1, 2] and val.names[1] == "val/b/5.png"
    assert train.notes == [] and val.unknown_classes == []


@pytest.mark.parametrize("content", [
    b"c\nb\n", b"\xef\xbb\xbfc\r\nb\r\n\r\n", " c\r\nb\r\n".encode("utf-16"), b"b/\nc/\n"])
def test_classes_are_read_as_unix_and_windows_write_them(content, tmp_path):
    write(tmp_path, *(f"{split}/{name}/1.png" for split in ("train", "val") for name in "abc"))
    (tmp_path / "keep").write_bytes(content)
    both = loader.load("folder", tmp_path, tmp_path / "keep")
    for split, data in zip(("train", "val"), both):
        assert data.names == [f"{split}/b/1.png", f"{split}/c/1.png"]
        assert data.labels.tolist() == [0, 1] and data.unknown_classes == []


def test_any_tree_of_images_is_unlabelled_data(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    data = folder(tmp_path, "1.png", "deep/er/2.jpg", "deep/3.png")
    assert data.names == ["1.png", "deep/3.png", "deep/er/2.jpg"]
    assert data.labels.tolist() == [-1] * 3 and loader.load("folder", tmp_path)[1] is None
    assert said(data, "no folder train", "without labels") and said(data, "left out: 1 .txt")


def test_hidden_names_are_not_there(tmp_path):
    write(tmp_path, "train/a/1.png", "train/b/1.png", "train/.ipynb_checkpoints/1.png",
          "train/a/.thumbnails/1.png", ".val/a/1.png")
    for name in ("train/a/._1.png", "train/a/.DS_Store"):
        (tmp_path / name).write_bytes(b"companion")
    data = loader.load("folder", tmp_path)[0]
    assert data.names == ["train/a/1.png", "train/b/1.png"] and data.notes == []


@pytest.mark.parametrize("name", ["@eaDir/1.jpg/THUMB.jpg", "$RECYCLE.BIN/S-1/$R1.jpg",
                                  "__MACOSX/train/1.jpg", "train/@eaDir/1.png", "lost+found/x"])
def test_folders_that_systems_make_are_not_there(name, tmp_path):
    write(tmp_path, "train/a/1.png", "train/b/1.png")
    (tmp_path / name).parent.mkdir(parents=True)
    Image.new("RGB", (80, 80)).save(tmp_path / name, "jpeg")
    data = loader.load("folder", tmp_path)[0]
    assert data.names == ["train/a/1.png", "train/b/1.png"] and data.notes == []


def test_accents_are_the_same_as_macos_and_others_write_them(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    data = folder(tmp_path, f"train/{decomposed}/1.png", f"val/{composed}/1.png")
    assert data.notes == [] and len(loader.load("folder", tmp_path)[1]) == 1
    (tmp_path / "keep").write_text(composed)
    assert len(loader.load("folder", tmp_path, tmp_path / "keep")[0]) == 1
    write(tmp_path, f"val/{decomposed}/2.png")
    assert len(loader.load("folder", tmp_path)[1]) == 2  # in both spellings
    both = folder(tmp_path, f"train/{composed}/1.png")
    assert len(both) == 2 and both.classes == [composed] and both.notes == []


def test_a_class_folder_without_images_is_said(tmp_path):
    (tmp_path / "train" / "c").mkdir(parents=True)
    data = folder(tmp_path, "train/a/1.png", "train/b/1.png")
    assert data.num_classes == 2 and said(data, "no images of their own in 1 folders: c")


def test_of_two_spellings_of_train_one_is_taken_and_the_other_said(tmp_path):
    data = folder(tmp_path, "train/a/1.png", "Train/a/2.png", "val/a/3.png")
    assert data.names == ["train/a/1.png"] and said(data, "not used: Train")


@pytest.mark.parametrize("link", ["train", "val", "train/c", "train/a/b"])
def test_a_link_that_leads_nowhere_is_named(link, tmp_path):
    names = [f"{split}/a/1.png" for split in ("train", "val") if split != link]
    write(tmp_path, *names)
    (tmp_path / link).symlink_to(tmp_path / "nowhere")
    with pytest.raises(loader.FileError, match=f"{link}: this folder or link cannot"):
        loader.load("folder", tmp_path)


def test_a_link_that_leads_nowhere_beside_the_images_is_of_no_matter(tmp_path):
    write(tmp_path, "train/a/1.png", "train/b/1.png")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "lock").symlink_to("host:17")
    assert len(loader.load("folder", tmp_path)[0]) == 2
    assert loader.main([str(tmp_path)]) == 0


def test_a_link_to_a_file_that_is_gone_is_no_image(tmp_path):
    (tmp_path / "labels.txt").symlink_to(tmp_path / "nowhere")
    assert said(folder(tmp_path, "1.png"), "1 .txt")


def test_loose_images_beside_class_folders_are_left_out_and_counted(tmp_path):
    data = folder(tmp_path, "train/a/1.png", "train/b/1.png", "train/loose.png")
    assert data.labels.tolist() == [0, 1] and said(data, "1 images beside the class folders")


def test_mostly_loose_images_are_all_taken_without_labels(tmp_path):
    data = folder(tmp_path, "train/a/1.png", *(f"train/{i}.png" for i in range(5)))
    assert data.labels.tolist() == [-1] * 6 and data.num_classes == 0
    assert said(data, "most images lie beside its folders")


def test_a_class_called_train_is_one_of_the_classes(tmp_path):
    data = folder(tmp_path, "bus/1.png", "car/1.png", "train/1.png")
    assert data.names == ["bus/1.png", "car/1.png", "train/1.png"]
    assert said(data, "train is taken for one of the folders", "bus", "without labels")
    (tmp_path / "keep").write_text("bus\ntrain\n")
    data = loader.load("folder", tmp_path, tmp_path / "keep")[0]
    assert data.num_classes == 2 and not said(data, "without labels")


def test_folders_beside_the_splits_are_said_to_be_unused(tmp_path):
    data = folder(tmp_path, "train/a/1.png", "val/a/1.png", "extra/1.png", "0.png")
    assert data.names == ["train/a/1.png"] and said(data, "not used: extra, 1 images beside train")


@pytest.mark.parametrize("train, val", [
    ("train", "validation"), ("training", "val"), ("Training", "Valid"), ("train", "test")])
def test_usual_names_of_splits_are_known_and_said(train, val, tmp_path):
    data = folder(tmp_path, f"{train}/a/1.png", f"{val}/a/2.png")
    assert data.names == [f"{train}/a/1.png"] and said(data, f"{val} for the monitor")
    assert loader.load("folder", tmp_path)[1].names == [f"{val}/a/2.png"]


def test_val_is_preferred_to_test(tmp_path):
    data = folder(tmp_path, "train/a/1.png", "val/a/2.png", "test/a/3.png")
    assert loader.load("folder", tmp_path)[1].names == ["val/a/2.png"]
    assert said(data, "not used: test")


def test_a_val_without_train_is_said_to_be_trained_on(tmp_path):
    data = folder(tmp_path, "a/1.png", "val/1.png")
    assert len(data) == 2 and said(data, "those of val too")
    assert loader.load("folder", tmp_path)[1] is None


@pytest.mark.parametrize("place", ["", "train"])
def test_links_lead_to_each_file_once(place, tmp_path):
    write(tmp_path / "images", *(f"{place or '.'}/{name}/{i}.png" for name in "ab" for i in (1, 2)))
    inside = tmp_path / "images" / place
    (inside / "a" / "up").symlink_to("..")
    (inside / "a" / "root").symlink_to(tmp_path)
    (inside / "a" / "other").symlink_to("../b")
    (inside / "a" / "itself").symlink_to("itself")
    data = loader.load("folder", tmp_path / "images")[0]
    expected = [os.path.join(place, f"{name}/{i}.png") for name in "ab" for i in (1, 2)]
    assert data.names == expected


def test_classes_may_be_links(tmp_path):
    write(tmp_path, "pool/x/1.png", "pool/y/2.png")
    (tmp_path / "set" / "train").mkdir(parents=True)
    for name in "xy":
        (tmp_path / "set" / "train" / name).symlink_to(tmp_path / "pool" / name)
    data = loader.load("folder", tmp_path / "set")[0]
    assert data.names == ["train/x/1.png", "train/y/2.png"] and data.labels.tolist() == [0, 1]


@pytest.mark.parametrize("names", [("train/a/1.png", "train/b/2.png"), ("1.png", "train/b/2.png"),
                                   ("train/a/1.png", "train/c/2.png", "val/b/2.png")])
def test_a_folder_without_permission_is_named(names, tmp_path, monkeypatch):
    write(tmp_path, *names)
    scandir = os.scandir

    def refuse(path):  # as for those who are not root
        if str(path).rstrip("/").endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(loader.FileError, match="/b: this folder or link.*Permission denied"):
        loader.load("folder", tmp_path)


def test_what_pillow_reads_is_an_image_and_other_files_are_counted(tmp_path):
    read = ["a.gif", "b.jfif", "c.jpe", "d.jp2", "e.tga", "f.avif", "g.webp", "h.TIF"]
    for name in ("x.txt", "y.txt", "z.csv", "raw", "v.mpg", "data.h5"):
        (tmp_path / name).write_text("text")
    data = folder(tmp_path, *read)
    assert data.names == read and [data[i][0].shape for i in range(8)] == [(3, 80, 80)] * 8
    assert said(data, "2 .txt", "1 .csv", "1 without", "1 .mpg", "1 .h5")


def test_unknown_and_absent_classes_of_val_are_named(tmp_path):
    data = folder(tmp_path, "train/a/1.png", "train/b/1.png", "val/a/1.png", "val/bb/1.png")
    val = loader.load("folder", tmp_path)[1]
    assert val.names == ["val/a/1.png"] and val.unknown_classes == ["bb"]
    assert said(data, "left out: bb") and said(data, "no images of 1 classes: b")


def test_a_flat_val_is_no_monitor(tmp_path):
    data = folder(tmp_path, "train/a/1.png", "val/1.png", "val/2.png")
    assert loader.load("folder", tmp_path)[1] is None and len(data) == 1
    assert said(data, "val: not used, as it has no class folders", "2 images")


@pytest.mark.parametrize("shapes, held", [
    ([(64, 48)], True), ([(65, 48)], False), ([(48, 64), (64, 48)], False)])
def test_small_images_of_one_size_are_held_in_memory(shapes, held, tmp_path):
    random = np.random.default_rng(0)
    for split, label in ((split, label) for split in ("train", "val") for label in "ab"):
        for j, shape in enumerate(shapes):
            path = tmp_path / split / label / f"{j}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(path)
    for split, data in zip(("train", "val"), loader.load("folder", tmp_path)):
        names = [f"{split}/{label}/{j}.png" for label in "ab" for j in range(len(shapes))]
        assert data.names == names and data.labels.tolist() == sorted([0, 1] * len(shapes))
        assert data.notes == data.unknown_classes == []
        assert hasattr(data, "images") == held
        for i, name in enumerate(names):
            image = data.images[i] if held else data[i][0]
            assert (image.permute(1, 2, 0).numpy() == np.asarray(Image.open(tmp_path / name))).all()


def test_the_digest_tells_other_images_of_the_same_number(tmp_path):
    first, again = (folder(tmp_path / root, "1.png", "2.png") for root in "xy")
    other = folder(tmp_path / "z", "1.png", "3.png")
    assert first.digest == again.digest != other.digest
    arrays = [loader.Arrays(np.full((2, 4, 4), value, np.uint8), [0, 1]) for value in (0, 0, 1)]
    assert arrays[0].digest == arrays[1].digest != arrays[2].digest


# -------------------------------------------------------------------------------------- image files


def test_small_images_that_exif_turns_are_held_upright(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # a quarter
    (tmp_path / "train").mkdir()
    for i in range(2):
        Image.new("RGB", (64, 48), (i, 0, 0)).save(tmp_path / "train" / f"{i}.png", exif=exif)
    data = loader.load("folder", tmp_path)[0]
    assert data.images.shape == (2, 3, 64, 48)
    assert data.statistics[0] == pytest.approx([0.5 / 255, 0, 0])


def test_a_palette_with_transparent_colours_is_over_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([9, 9, 9, 0, 1, 2, 3, 255], "RGBA")
    image.putpixel((1, 0), 1)
    assert [loader.to_rgb(image).getpixel((x, 0)) for x in (0, 1)] == [(255,) * 3, (1, 2, 3)]


@pytest.mark.parametrize("mode, colour, rgb", [
    ("L", 77, (77, 77, 77)), ("1", 1, (255, 255, 255)), ("RGB", (1, 2, 3), (1, 2, 3)),
    ("CMYK", (0, 0, 0, 255), (0, 0, 0)), ("RGBA", (200, 0, 0, 0), (255, 255, 255)),
    ("RGBA", (200, 0, 0, 255), (200, 0, 0)), ("LA", (9, 0), (255, 255, 255)),
    ("I;16", 77 * 257, (77, 77, 77)), ("I", 77 * 257, (77, 77, 77)), ("F", 0.4, (102, 102, 102))])
def test_any_mode_becomes_rgb(mode, colour, rgb):
    image = loader.to_rgb(Image.new(mode, (3, 2), colour))
    assert image.mode == "RGB" and image.size == (3, 2) and image.getpixel((1, 1)) == rgb


def grey_file(root, name, values, dtype):
    Image.fromarray(np.array([values], dtype)).save(root / name)
    return loader.read_image(root / name)[0, 0].tolist()


@pytest.mark.parametrize("name, values, dtype, expected", [
    ("x.png", [0, 257, 65535], np.uint16, [0, 1, 255]),
    ("x.pgm", [0, 257, 65535], np.uint16, [0, 1, 255]),
    ("x.tif", [0, 257, 65535], np.uint16, [0, 1, 255]),
    ("x.tif", [0, 0.2, 1], np.float32, [0, 51, 255])])
def test_depth_is_scaled_by_the_types_range(name, values, dtype, expected, tmp_path):
    assert grey_file(tmp_path, name, values, dtype) == expected


@pytest.mark.parametrize("values, dtype, words", [
    ([0, 300, 70000], np.int32, "32-bit integers"), ([-5, 3, 4], np.int32, "signed"),
    ([0, 0.5, 1.01], np.float32, "outside"), ([0, -0.1, 1], np.float32, "outside"),
    ([0, np.nan, 1], np.float32, "NaN")])
def test_a_depth_that_would_be_guessed_is_refused(values, dtype, words, tmp_path):
    with pytest.raises(loader.FileError, match=f"x.tif: holds .*{words}.*convert"):
        grey_file(tmp_path, "x.tif", values, dtype)


def test_bits_scale_16_bit_files_that_use_fewer(tmp_path):
    write(tmp_path, "8.png")
    Image.fromarray(np.array([[0, 273, 4095]], np.uint16)).save(tmp_path / "12.png")
    plain, scaled = (loader.load("folder", tmp_path, bits=bits)[0] for bits in (16, 12))
    assert scaled[0][0][0].tolist() == [[0, 17, 255]] and scaled[1][0].max() == 0
    assert said(plain, "use 12 bits", "4095", "--bits 12") and not said(scaled, "--bits")
    Image.fromarray(np.array([[4096]], np.uint16)).save(tmp_path / "12.png")
    with pytest.raises(loader.FileError, match="12.png: holds the value 4096.*--bits"):
        scaled[0]


def test_16_bit_colours_that_use_fewer_are_mentioned_and_not_scaled(tmp_path):
    values = np.array([[[0, 2048, 4095]]], ">u2")
    (tmp_path / "x.ppm").write_bytes(b"P6 1 1 65535\n" + values.tobytes())
    data = loader.load("folder", tmp_path)[0]
    assert said(data, "16-bit files use", "convert them to 8 bits")
    with pytest.raises(loader.FileError, match="x.ppm: holds colours of 16 bits.*convert"):
        loader.read_image(tmp_path / "x.ppm", bits=12)
    (tmp_path / "x.ppm").write_bytes(b"P6 1 1 65535\n" + (16 * values).tobytes())
    Image.fromarray(np.array([[4095]], np.uint16)).save(tmp_path / "grey.png")
    data = loader.load("folder", tmp_path)[0]
    assert len(data.notes) == 2 and said(data, "--bits 12")  # whatever lies beside


def test_colours_of_16_bits_in_all_are_no_deep_ones(tmp_path):
    (tmp_path / "565.bmp").write_bytes(
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 70, 0, 0, 66, 40, 1, 1, 1, 16, 3, 4, 0, 0, 0, 0)
        + struct.pack("<IIIHH", 0xF800, 0x07E0, 0x001F, 0xF800, 0))
    assert loader.read_image(tmp_path / "565.bmp", bits=12)[:, 0, 0].tolist() == [255, 0, 0]


def test_a_tiff_says_what_its_values_mean(tmp_path):
    signed, inverted = tmp_path / "signed.tif", tmp_path / "inverted.tif"
    Image.new("L", (2, 2)).save(signed, tiffinfo={339: 2})
    with pytest.raises(loader.FileError, match="signed.tif: holds signed or"):
        loader.read_image(signed)
    Image.fromarray(np.array([[0, 257, 65535]], np.uint16)).save(inverted)
    black_is_zero, white_is_zero = (struct.pack("<HHIHH", 262, 3, 1, x, 0) for x in (1, 0))
    assert inverted.read_bytes().count(black_is_zero) == 1
    inverted.write_bytes(inverted.read_bytes().replace(black_is_zero, white_is_zero))
    assert loader.read_image(inverted)[0, 0].tolist() == [255, 254, 0]


@pytest.mark.parametrize("name", ["x.png", "x.tif", "16.tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, name, tmp_path):
    pixels, exif = np.arange(6, dtype=np.uint8).reshape(2, 3), Image.Exif()
    image = Image.fromarray(pixels if name.startswith("x") else pixels * np.uint16(257))
    exif[ExifTags.Base.Orientation] = orientation
    image.save(tmp_path / name, exif=exif)
    x = np.arange(6).reshape(2, 3)
    expected = [x, x[:, ::-1], x[::-1, ::-1], x[::-1], x.T, np.rot90(x, -1), x[::-1, ::-1].T,
                np.rot90(x)]
    assert (loader.read_image(tmp_path / name)[0].numpy() == expected[orientation - 1]).all()


@pytest.mark.parametrize("error, words", [
    (PermissionError(13, "Permission denied"), "Permission denied.*may be whole$"),
    (OSError(24, "Too many open files"), "Too many.*may be whole"), (MemoryError(), "--workers")])
def test_a_whole_file_that_cannot_be_read_is_not_called_broken(error, words, tmp_path, monkeypatch):
    def fail(*_):
        raise error
    write(tmp_path, "x.png")
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(loader.FileError, match=words) as caught:
        loader.read_image(tmp_path / "x.png")
    assert "remove" not in str(caught.value)


def test_a_decompression_bomb_is_not_called_broken(tmp_path, monkeypatch):
    write(tmp_path, "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 7)
    words = "over 14 pixels.*shrink it.*MAX_IMAGE_PIXELS"
    with pytest.raises(loader.FileError, match=words) as caught:
        loader.read_image(tmp_path / "x.png")
    assert "broken" not in str(caught.value) and "remove" not in str(caught.value)


def test_all_broken_files_are_listed_at_once(tmp_path):
    write(tmp_path, "ok.png", "deep/ok.jpg")
    assert loader.main([str(tmp_path)]) == 0
    for name in ("deep/1.jpg", "2.png"):
        (tmp_path / name).write_bytes(b"no image")
    Image.fromarray(photo(64, 64).permute(1, 2, 0).numpy()).save(tmp_path / "3.png")
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:6000])  # cut short
    Image.fromarray(np.array([[4096]], np.uint16)).save(tmp_path / "4.png")
    done = script("loader.py", tmp_path, "--bits", "12")
    lines = sorted(done.stdout.splitlines())
    assert done.returncode == 1 and len(lines) == 4, done.stderr
    for line, name in zip(lines, ("2.png", "3.png", "4.png", "deep/1.jpg")):
        assert line.startswith(f"{tmp_path / name}: ")
        assert "cannot be read as an image" in line or "holds the value 4096" in line


def test_a_folder_that_cannot_be_listed_is_one_line(tmp_path, monkeypatch, capsys):
    write(tmp_path, "a/1.png")
    monkeypatch.setattr(loader, "_identity", lambda path: loader._unreadable(
        PermissionError(13, "Permission denied", str(path))))
    with pytest.raises(SystemExit) as caught:
        loader.main([str(tmp_path)])
    assert caught.value.code == 1 and "Permission denied" in capsys.readouterr().err


# --------------------------------------------------- each operation against torchvision's, by image


def photo(height=48, width=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def images(n=8, size=48):
    return torch.stack([photo(size, size, seed) for seed in range(n)]).float() / 255


FACTORS = torch.tensor([0.6, 1.4, 1.0, 0.83, 1.17, 0.7, 1.3, 0.95])


@pytest.mark.parametrize("operation, reference", [
    (0, functional.adjust_brightness), (1, functional.adjust_contrast),
    (2, functional.adjust_saturation)])
def test_blend_is_torchvisions_for_each_image(operation, reference):
    x = images()
    factors = torch.full((8, 3), 9.0)
    factors[:, operation] = FACTORS
    out = loader._blend(x, torch.full((8,), operation), factors, torch.arange(8) != 7)
    for i in range(7):
        expected = reference(x[i], FACTORS[i].item())  # its luma has 4 digits
        torch.testing.assert_close(out[i], expected, atol=2e-4, rtol=0)
    assert torch.equal(out[7], x[7])  # not its turn


def test_hue_is_torchvisions_for_each_image():
    x = images()
    x[6] = x[6, :1]  # grey has no hue
    shift = torch.tensor([-0.4, -0.1, 0.0, 0.1, 0.4, 0.25, 0.3, -0.5])
    out = loader.shift_hue(x, shift)
    for i in range(8):
        expected = functional.adjust_hue(x[i], shift[i].item())
        torch.testing.assert_close(out[i], expected, atol=1e-5, rtol=0)


def test_grey_is_torchvisions():
    x = images()
    torch.testing.assert_close(loader.grey(x), functional.rgb_to_grayscale(x), atol=2e-4, rtol=0)


def test_blur_is_a_gaussian_with_the_edge_repeated_and_near_pils():
    sigma = torch.tensor([0.1, 0.5, 1.0, 1.5, 2.0])
    x = images(5)
    out = loader.blur(x, sigma)
    for i, s in enumerate(sigma.tolist()):
        padded = torch.nn.functional.pad(x[i:i + 1], [8] * 4, mode="replicate")[0]
        expected = functional.gaussian_blur(padded, 17, s)[:, 8:-8, 8:-8]
        torch.testing.assert_close(out[i], expected, atol=1e-6, rtol=0)
        # a photograph has no white noise
        smooth = functional.to_pil_image(functional.gaussian_blur(x[i], 9, 1.5))
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
        brightness, contrast, saturation = (0.6 + 0.8 * u[i, 5:8]).tolist()
        shift = hue * (2 * u[i, 8].item() - 1)
        steps = [lambda y: functional.adjust_brightness(y, brightness),
                 lambda y: functional.adjust_contrast(y, contrast),
                 lambda y: functional.adjust_saturation(y, saturation),
                 lambda y: functional.adjust_hue(y, shift)]
        expected, order = x[i], u[i, loader.ORDER].argsort().tolist()
        for step in order:
            expected = steps[step](expected)
        torch.testing.assert_close(out[i], expected, atol=2e-3, rtol=0)
        orders.add(tuple(order))
    assert len(orders) > 18  # of 24


@pytest.mark.parametrize("aug, size, shares", [
    ("v1", 64, (1, 0.2, 0, 0.5)), ("v2", 32, (0.8, 0.2, 0, 0.5)),
    ("v2", 64, (0.8, 0.2, 0.5, 0.5)), ("crop", 32, (0, 0, 0, 0.5))])
def test_mocos_probabilities(aug, size, shares, monkeypatch):
    """Each operation is replaced by one that adds a power of two: the sum tells which were done."""
    monkeypatch.setattr(loader.Augment, "jitter", lambda self, x, u, hue: x + 1)
    monkeypatch.setattr(loader, "grey", lambda x: x + 2)
    monkeypatch.setattr(loader, "blur", lambda x, sigma: x + 4)
    mirrored = torch.zeros(2000, 3, size, size)
    mirrored[..., 0] = 8
    out = loader.Augment(aug, size, ((0, 0, 0), (1, 1, 1)))(mirrored, draws(2000))
    applied = out.amax((1, 2, 3)).int() - 8
    found = [(applied & bit > 0).double().mean().item() for bit in (1, 2, 4)]
    found.append((out[:, 0, 0, -1] >= 8).double().mean().item())
    assert found == pytest.approx(shares, abs=0.035)  # 3 standard deviations


def test_random_boxes_are_distributed_as_torchvisions():
    u = torch.rand(4000, 10, 4, generator=torch.Generator().manual_seed(0))
    ours = loader.random_boxes(u, 40, 60, 0.2)
    torch.manual_seed(0)
    theirs = torch.tensor([RandomResizedCrop.get_params(photo(40, 60), (0.2, 1), (3 / 4, 4 / 3))
                           for _ in range(4000)])
    assert ((ours == ours.round()) & (ours >= 0)).all()
    assert (ours[:, 0] + ours[:, 2]).max() == 40 and (ours[:, 1] + ours[:, 3]).max() == 60
    for column in range(4):
        a, b = ours[:, column].sort().values, theirs[:, column].float().sort().values
        assert (a - b).abs().mean() < 0.6, column  # pixels between the two distributions


def test_a_box_that_never_fits_is_the_whole_image():
    boxes = loader.random_boxes(torch.ones(1, 10, 4) * 0.99, 10, 1000, 0.9)
    assert boxes.tolist() == [[0, 0, 10, 1000]]


@pytest.mark.parametrize("size", [8, 20, 33])
def test_resample_is_pils_bilinear_of_each_box(size):
    x = torch.stack([photo(40, 30, seed) for seed in range(5)])
    boxes = torch.tensor([[0, 0, 40, 30], [5, 3, 9, 11], [0, 7, 33, 12], [30, 20, 10, 10],
                          [1, 1, 8, 20]])
    out = loader.resample(x, boxes.float(), size)
    for i, (top, left, height, width) in enumerate(boxes.tolist()):
        image = Image.fromarray(x[i].permute(1, 2, 0).numpy())
        crop = image.crop((left, top, left + width, top + height))
        expected = functional.to_tensor(crop.resize((size, size), Image.BILINEAR))
        # PIL rounds twice to 8 bits
        torch.testing.assert_close(out[i], expected, atol=1.1 / 255, rtol=0)


@pytest.mark.parametrize("aug", ["v1", "v2", "crop"])
@pytest.mark.parametrize("n, size", [(20, 64), (3, 224)])
def test_a_cpu_that_chooses_images_has_the_values_of_all_at_once(aug, n, size, monkeypatch):
    augment = loader.Augment(aug, size, loader.IMAGENET_STATISTICS)
    x = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)
    chosen = augment(x, draws(n))
    monkeypatch.setattr(loader, "_all_at_once", lambda x: True)
    torch.testing.assert_close(chosen, augment(x, draws(n)), atol=1e-5, rtol=0)


def test_a_cpu_jitters_and_blurs_only_the_images_that_are_chosen(monkeypatch):
    blurred = []
    monkeypatch.setattr(loader, "blur", lambda x, sigma: blurred.append(len(x)) or x)
    u = draws(40)
    loader.Augment("v2", 64, loader.IMAGENET_STATISTICS)(torch.rand(40, 3, 64, 64), u)
    assert sum(blurred) == (u[:, loader.BLUR] < 0.5).sum() and max(blurred) <= 16


def test_the_augmentation_is_one_graph():
    augment = loader.Augment("v2", 64, loader.IMAGENET_STATISTICS)
    compiled = torch.compile(augment, fullgraph=True, backend="eager")
    x, u = (images(4, 64) * 255).to(torch.uint8), draws(4)
    torch.testing.assert_close(compiled(x, u), augment(x, u))


def test_evaluation_of_a_file_is_its_resized_centre(tmp_path):
    Image.fromarray(photo(300, 400).permute(1, 2, 0).numpy()).save(tmp_path / "x.png")
    data = loader.load("folder", tmp_path)[0]
    (x, labels), = loader.evaluation(data, 224, "cpu", batch_size=4)
    resized = functional.resize(Image.open(tmp_path / "x.png"), 256)
    centre = functional.to_tensor(functional.center_crop(resized, 224))
    expected = functional.normalize(centre, *data.statistics)
    assert (x[0] - expected).abs().max() < 1.1 / 255 / 0.224 and labels.tolist() == [-1]


@pytest.mark.parametrize("height, width", [(1, 60_000), (60_000, 1), (2, 9001)])
def test_evaluation_of_a_thin_image_is_its_centre_in_little_memory(height, width):
    x = torch.full((3, height, width), 255, dtype=torch.uint8)
    middle = slice(max(height, width) // 2 - 5, max(height, width) // 2 + 5)
    (x[:, middle] if height > width else x[:, :, middle]).fill_(7)
    crops = loader.CentreCrops([(x, 5)], 224, 256)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    crop, label = crops[0]
    assert crop.shape == (3, 224, 224) and label == 5 and (crop == 7).all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_evaluation_of_small_images_is_the_whole_centre_square(kind, tmp_path):
    image = photo(32, 40).permute(1, 2, 0).numpy()
    Image.fromarray(image).save(tmp_path / "x.png")
    data = loader.Files(tmp_path, ["x.png"], [0], 1)
    if kind == "memory":
        data = loader.Arrays(image[None], [0])
    (x, _), = loader.evaluation(data, 32, "cpu", 1)
    expected = functional.normalize(photo(32, 40)[:, :, 4:-4] / 255, *data.statistics)
    torch.testing.assert_close(x[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("height, width", [(33, 32), (32, 33)])
def test_evaluation_in_memory_is_that_of_the_file(height, width, tmp_path):
    image = photo(height, width).permute(1, 2, 0).numpy()
    Image.fromarray(image).save(tmp_path / "x.png")
    both = loader.Files(tmp_path, ["x.png"], [0], 1), loader.Arrays(image[None], [0])
    for data in both:
        data.statistics = loader.IMAGENET_STATISTICS
    (file, _), (memory, _) = (next(loader.evaluation(data, 32, "cpu", 1)) for data in both)
    torch.testing.assert_close(memory, file, atol=1e-5, rtol=0)


@pytest.mark.parametrize("height, width", [(1, 64), (64, 1), (2, 1)])
@pytest.mark.parametrize("size", [32, 224])
def test_evaluation_in_memory_of_a_line_is_its_middle_pixel(height, width, size):
    image = photo(height, width)
    data = loader.Arrays(image.permute(1, 2, 0)[None].numpy(), [0])
    (x, _), = loader.evaluation(data, size, "cpu", 1)
    middle = image[:, (height - 1) // 2, (width - 1) // 2, None, None].expand(3, size, size)
    expected = functional.normalize(middle / 255, *data.statistics)
    torch.testing.assert_close(x[0], expected, atol=1e-4, rtol=0)


def test_evaluation_in_memory_is_the_resized_centre():
    photos = torch.stack([photo(128, 128, seed) for seed in range(3)])
    data = loader.Arrays(photos.permute(0, 2, 3, 1).numpy(), [0, 1, 2])
    (x, _), (last, labels) = loader.evaluation(data, 112, "cpu", batch_size=2)
    image = data.images[2].float() / 255  # 256/224 of 112 is 128: the middle 112 pixels as they are
    expected = functional.normalize(image[:, 8:-8, 8:-8], *data.statistics)
    torch.testing.assert_close(last[0], expected, atol=1e-5, rtol=0)
    assert len(x) == 2 and labels.tolist() == [2]


# ----------------------------------------------------------------------------- keyed random numbers


def views(data, seed=0, epoch=2, start=0, workers=0, **place):
    batches = loader.Batches(torch.arange(len(data)), 8, seed, **place)
    augment = loader.Augment("v2", 16, data.statistics)
    return loader.Views(data, batches, augment, "cpu", workers=workers).epoch(epoch, start)


@pytest.fixture(params=["memory", "files"])
def data(request, image_folder):
    if request.param == "files":
        return loader.load("folder", image_folder)[0]
    return loader.load("digits", None)[1]


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
    """Whole images, without augmentation, are compared pixel by pixel."""
    def whole(u, height, width, min_scale):
        return torch.tensor([0.0, 0.0, height, width]).expand(len(u), 4)
    monkeypatch.setattr(loader.Augment, "forward", lambda self, x, u: x * 1.0)
    monkeypatch.setattr(loader, "random_boxes", whole)
    monkeypatch.setattr(RandomResizedCrop, "get_params", lambda image, *_: (0, 0, *image.shape[1:]))
    for _, im_k, index, labels in views(data):
        assert torch.equal(labels, data.labels[index])
        for i in range(8):
            if hasattr(data, "images"):
                image, im_k[i] = data.images[index[i]].expand(3, -1, -1), 255 * im_k[i]
            else:
                image = data[index[i]][0]
            expected = functional.resize(image, [16, 16], antialias=True)
            assert (im_k[i] - expected).abs().max() < 1.5


@pytest.mark.parametrize("workers", [1, 2])
def test_views_are_the_same_for_any_number_of_workers(workers, image_folder):
    data = loader.load("folder", image_folder)[0]
    for a, b in zip(views(data), views(data, workers=workers), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_processes_share_out_the_views_of_the_global_batch(data):
    whole = next(iter(views(data)))
    parts = [next(iter(views(data, rank=rank, world_size=2))) for rank in range(2)]
    for i in (0, 1, 3):
        torch.testing.assert_close(torch.cat([part[i] for part in parts]), whole[i])
    assert torch.equal(parts[0][2], whole[2]) and torch.equal(parts[1][2], whole[2])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_goes_on_at_its_step(data, workers):
    whole, rest = list(views(data)), list(views(data, start=4, workers=workers))
    assert len(rest) == len(whole) - 4 > 0
    for a, b in zip(rest, whole[4:], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_kept_workers_serve_one_epoch_after_another(image_folder):
    data = loader.load("folder", image_folder)[0]
    batches = loader.Batches(torch.arange(len(data)), 8, 0)
    kept = loader.Views(data, batches, loader.Augment("v2", 16, data.statistics), "cpu", workers=1)
    for epoch, start in ((2, 3), (3, 0), (2, 0)):
        again = list(kept.epoch(epoch, start))
        assert len(batches) == 7 and len(again) == 7 - start
        for a, b in zip(again, views(data, epoch=epoch, start=start), strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_batches_hold_each_image_at_most_once_and_drop_an_incomplete_one():
    some = torch.arange(0, 69, 3)
    batches = loader.Batches(some, 6, seed=0)
    whole = [index.tolist() for _, index in batches.whole(epoch=1)]
    assert [len(batch) for batch in whole] == [6] * 3 and len(set(sum(whole, []))) == 18
    assert len(batches) == 3 and set(sum(whole, [])) < set(some.tolist())


class Own:
    """A fork's data set that is not in memory."""
    labels, num_classes, statistics = torch.arange(8), 8, loader.IMAGENET_STATISTICS
    classes, names, digest, notes = (), [*map(str, range(8))], "own", ()

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return photo(20, 24, i), int(self.labels[i])


def test_a_data_set_of_ones_own_has_views_and_evaluation():
    (_, _, index, labels), = views(Own())
    assert torch.equal(index, labels) and sorted(labels.tolist()) == list(range(8))
    batches = list(loader.evaluation(Own(), 16, "cpu", 5))
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(8))


@pytest.mark.parametrize("name", ["labels", "num_classes", "classes", "names", "statistics",
                                  "digest", "notes", "__getitem__"])
def test_what_a_data_set_lacks_is_named(name):
    loader.check(Own())
    lacking = {key: value for key, value in vars(Own).items() if key != name}
    with pytest.raises(TypeError, match=f"Lacking lacks .*{name}"):
        loader.check(type("Lacking", (), lacking)())


@pytest.mark.parametrize("total", [0, 1, 5, 12, 13])
@pytest.mark.parametrize("world_size", [1, 2, 4, 7])
def test_shards_hold_every_row_once(total, world_size):
    shards = [loader.shard(total, rank, world_size) for rank in range(world_size)]
    assert [row for shard in shards for row in shard] == list(range(total))
    assert all(len(shard) <= -(-total // world_size) for shard in shards)
