"""Folders of small image files, made by tests."""

import numpy as np
from PIL import Image


def save_image(path, height=8, width=8, seed=0, channels=3):
    """Save an image of random pixels in the format of the path's ending; return the pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (height, width, 3) if channels == 3 else (height, width)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def make_split_folder(root, n_train, n_val, n_test, **image):
    """A folder with the given numbers of PNG files in train/, val/ and test/."""
    seed = 0
    for split, n in (("train", n_train), ("val", n_val), ("test", n_test)):
        for number in range(n):
            save_image(root / split / f"{number:03}.png", seed=seed, **image)
            seed += 1
    return root
