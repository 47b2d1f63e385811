#!/usr/bin/env bash
# albumentationsx 2.5.1 (opencv-python-headless 5.0.0.93, numpy 2.4.6; it wants torch too: 2.13.0).
#
# MoCo v2's augmentations with albumentations 2.0's argument names still build and run in its
# successor, but ColorJitter(brightness, contrast, saturation, hue) and GaussianBlur(blur_limit,
# sigma_limit) are dropped with one UserWarning each and the defaults stand: hue +-0.5 (the whole circle)
# in place of +-0.1, the others +-0.2 in place of +-0.4, blur sigma from 0.5 to 3 in place of 0.1 to 2.
# RandomResizedCrop, ToGray, Solarize, Normalize keep their names.
#
# Guessed: all as before, the mean change of a pixel within 15 % of torchvision's; arguments that
#   no longer exist raise.
# Seen: hue=0.1 alone, and brightness=0.4 alone, give the same images, to the bit, as no argument;
#   the mean shift of the hue is four to five times that of the same transform told by its new name.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.13.0 albumentationsx==2.5.1 opencv-python-headless==5.0.0.93 numpy==2.4.6
export NO_ALBUMENTATIONS_UPDATE=1 OMP_NUM_THREADS=1
"$dir/venv/bin/python" - <<'PY'
import colorsys, warnings
import numpy as np
import albumentations as A

image = np.empty((8, 8, 3), np.uint8)
image[:] = (200, 90, 60)
base = colorsys.rgb_to_hsv(200, 90, 60)[0]

def run(make):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe = A.Compose([make()], seed=0)
    out = [pipe(image=image)["image"] for _ in range(400)]
    shift = [colorsys.rgb_to_hsv(*map(float, o[0, 0]))[0] - base for o in out]
    shift = np.abs((np.array(shift) + 0.5) % 1 - 0.5).mean()
    return np.stack(out), shift, [str(c.message) for c in caught]

none = run(lambda: A.ColorJitter(p=1))
hue = run(lambda: A.ColorJitter(brightness=0, contrast=0, saturation=0, hue=0.1, p=1))
full = run(lambda: A.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=1))
new = run(lambda: A.ColorJitter(brightness_range=(0.6, 1.4), contrast_range=(0.6, 1.4),
                                saturation_range=(0.6, 1.4), hue_range=(-0.1, 0.1), p=1))
for name, r in (("no argument", none), ("hue=0.1 alone", hue), ("0.4, 0.4, 0.4, 0.1", full), ("the same, new names", new)):
    print(f"ColorJitter, {name:20}: mean hue shift {r[1]:.3f} of the circle (expected 0.05 where 0.1 is asked for) {r[2]}")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    blur = A.GaussianBlur(blur_limit=(3, 7), sigma_limit=(0.1, 2.0), p=1)
print("GaussianBlur(sigma_limit=(0.1, 2.0)) has sigma", tuple(blur.sigma_range), [str(c.message) for c in caught])
assert (none[0] == hue[0]).all() and (none[0] == full[0]).all() and len(full[2]) == 1
assert full[1] > 3 * new[1] and new[2] == []
assert tuple(blur.sigma_range) == (0.5, 3.0) and len(caught) == 1
PY
