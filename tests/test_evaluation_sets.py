"""Whole images of the sets that super-resolution is evaluated on."""

import numpy as np
import pytest
import torch
from image_folders import save_image
from PIL import Image

from datamodules.evaluation_sets import EvaluationSet, Hash, cropped
from datamodules.image_files import UnreadableImage, has_grey_levels, read_whole


def test_images_keep_their_pixels_but_for_the_lower_and_right_border(tmp_path):
    pixels = [
        save_image(tmp_path / "mine" / f"{k}.png", 9 + k, 14, seed=k).transpose(2, 0, 1)
        for k in range(2)
    ]
    images = list(EvaluationSet(tmp_path, "mine", scale=4))
    assert [tuple(image.shape) for image in images] == [(3, 8, 12), (3, 8, 12)]
    for image, original in zip(images, pixels, strict=True):
        assert image.equal(torch.from_numpy(original)[:, :8, :12])


def test_a_large_jpeg_is_decoded_whole_and_a_grey_image_has_equal_channels(tmp_path):
    save_image(tmp_path / "large.jpg", 300, 1100)
    expected = np.asarray(Image.open(tmp_path / "large.jpg"))
    np.testing.assert_array_equal(
        read_whole(tmp_path / "large.jpg", 3).transpose(1, 2, 0), expected
    )
    grey = save_image(tmp_path / "grey.png", 5, 4, channels=1)
    assert read_whole(tmp_path / "grey.png", 3).tolist() == [grey.tolist()] * 3
    assert read_whole(tmp_path / "grey.png", 1).tolist() == [grey.tolist()]


def test_bsd100_is_also_the_validation_part_of_bsds500(tmp_path):
    for k in range(100):
        save_image(tmp_path / "BSDS500" / "val" / f"{k:03}.png", seed=k)
    images = EvaluationSet(tmp_path, "BSD100", 2)
    assert len(images) == 100
    assert images.folder == tmp_path / "BSDS500" / "val"


def test_a_set_that_is_missing_or_not_whole_gets_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"BSD100 is not in .*BSD100 or BSDS500/val there"):
        EvaluationSet(tmp_path, "BSD100", 4)
    for k in range(4):
        save_image(tmp_path / "Set5" / f"{k}.png")
    with pytest.raises(ValueError, match=r"Set5 has 4 images, but Set5 has 5: leave the set's own"):
        EvaluationSet(tmp_path, "Set5", 4)


def test_images_that_cannot_be_used_get_one_line(tmp_path):
    save_image(tmp_path / "mine" / "a.png", 3, 9)
    with pytest.raises(ValueError, match=r"a\.png has a side of less than 4 pixels"):
        list(EvaluationSet(tmp_path, "mine", 4))
    (tmp_path / "mine" / "a.png").write_bytes(b"")
    with pytest.raises(UnreadableImage, match=r"a\.png is empty"):
        list(EvaluationSet(tmp_path, "mine", 4))


def test_the_hash_is_of_pixels_and_their_shapes():
    image = torch.arange(24, dtype=torch.uint8).view(3, 2, 4)
    digests = []
    for images in ([image], [image.view(3, 4, 2)], [image, image], [image.clone()]):
        value = Hash()
        for one in images:
            value.add(one)
        digests.append(value.digest())
    assert len(set(digests[:3])) == 3
    assert digests[3] == digests[0]
    assert cropped(image, 3).numel() == 0


def test_grey_levels_are_a_matter_of_the_file_and_not_of_its_colours(tmp_path):
    grey = Image.new("L", (4, 4), 77)
    grey.save(tmp_path / "grey.png")
    grey.convert("RGB").save(tmp_path / "colour.png")
    assert has_grey_levels(tmp_path / "grey.png")
    assert not has_grey_levels(tmp_path / "colour.png")
