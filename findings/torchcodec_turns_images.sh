#!/usr/bin/env bash
# torchcodec 0.17.0 and torchvision 0.29.1 with torch 2.14.1, pillow 13.0.0, numpy 2.4.6.
#
# torchvision's image decoders are deprecated since 0.29 in favour of torchcodec's. torchvision's turn
# an image by its EXIF orientation only if asked to (apply_exif_orientation, off by default), and
# Pillow leaves it to ImageOps.exif_transpose. torchcodec's turn it always, JPEG, PNG, WebP and AVIF alike, and have no
# flag: a backbone that was trained on pictures from phones as torchvision or Pillow gave them, lying
# on their sides, is evaluated on others after the move, and shapes in a cache of sizes change.
#
# Guessed: the same bits as torchvision's, turned if asked to.
# Seen (orientation 6, a picture of 48 x 32, as height, width):
#   JPEG, PNG, WebP, AVIF: torchcodec 48, 32, upright to the bit; Pillow 32, 48
#   torchvision, JPEG, PNG: 32, 48; with apply_exif_orientation=True 48, 32 and torchcodec's bits
#   without orientation all three are equal to the bit
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.14.1 \
  torchvision==0.29.1 torchcodec==0.17.0 pillow==13.0.0 numpy==2.4.6
export OMP_NUM_THREADS=1
"$dir/venv/bin/python" -W ignore - <<'PY'
import inspect, io
import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torchcodec.decoders import decode_image
from torchvision import io as tv

blocks = np.random.default_rng(0).integers(256, size=(4, 6, 3), dtype=np.uint8)
picture = Image.fromarray(blocks.repeat(8, 0).repeat(8, 1))

def pixels(image):
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)

for name in "JPEG", "PNG", "WEBP", "AVIF":
    for turn in 1, 6:
        file, exif = io.BytesIO(), Image.Exif()
        exif[ExifTags.Base.Orientation] = turn
        picture.save(file, name, exif=exif)
        image = Image.open(file)
        upright, opened = pixels(ImageOps.exif_transpose(image)), pixels(image)
        codec = decode_image(file.getvalue())
        print(f"{name} orientation {turn}: Pillow {[*opened.shape[1:]]}, torchcodec {[*codec.shape[1:]]}",
              end="")
        assert codec.equal(upright) and codec.equal(opened) == (turn == 1)
        if name in ("JPEG", "PNG"):
            data = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
            plain, asked = (tv.decode_image(data, mode="RGB", apply_exif_orientation=x)
                            for x in (False, True))
            print(f", torchvision {[*plain.shape[1:]]}, asked to {[*asked.shape[1:]]}", end="")
            assert plain.equal(opened) and asked.equal(codec)
            assert tv.decode_image(data, mode="RGB").equal(plain)  # the default
        print()
flags = [*inspect.signature(decode_image).parameters]
print("flags of torchcodec's decode_image:", flags, "- expected: one for the orientation, off by default")
assert not any("exif" in flag or "orient" in flag for flag in flags)
PY
