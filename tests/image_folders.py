"""Folders of small image files, made by tests."""

import os

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


def make_strangers_folder(root, n):
    """A folder as people have them: n good photographs, ten odd ones, and nine wrong files."""
    for number in range(n):
        save_image(root / "Urlaub in Österreich" / f"IMG {number}.JPG", 30, 40, seed=number)
    good = Image.open(root / "Urlaub in Österreich" / "IMG 0.JPG").convert("RGB")
    odd = root / "odd"
    odd.mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    good.save(odd / "turned.jpg", exif=turned)
    good.convert("CMYK").save(odd / "print.jpg")
    good.convert("P").save(odd / "palette.png", transparency=0)
    good.convert("LA").save(odd / "transparent.png")
    good.convert("1").save(odd / "fax.tif")
    good.resize((1, 90)).save(odd / "narrow.png")
    good.resize((700, 1)).save(odd / "panorama.webp")
    good.save(odd / "a png.jpg", format="PNG")
    good.save(odd / "phone.jpg", format="MPO", save_all=True, append_images=[good])
    (odd / "link.png").symlink_to(odd / "palette.png")
    wrong = root / "wrong"
    wrong.mkdir()
    content = (odd / "narrow.png").read_bytes()
    (wrong / "cut off.png").write_bytes(content[: len(content) // 2])
    (wrong / "empty.png").write_bytes(b"")
    (wrong / "page.jpg").write_bytes(b"<html>")
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(wrong / "deep.png")
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(wrong / "deep.tif")
    (wrong / "gone.png").symlink_to(wrong / "nothing")
    os.mkfifo(wrong / "pipe.png")
    for ending in (".png", ".webp"):
        good.save(wrong / f"film{ending}", save_all=True, append_images=[good.rotate(180)])
    (root / "._IMG 0.JPG").write_bytes(b"resource fork")
    (root / "Thumbs.db").write_bytes(b"no image")
    return root
