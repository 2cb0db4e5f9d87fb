"""Tests the views that turn photographs of any size into images of one size."""

import io

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image

from smallbatch_jax.data.streaming import views

HEIGHT, WIDTH, SIZE = 375, 500, 224


def smooth(height=HEIGHT, width=WIDTH):
    coarse = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def jpeg(image, quality=98, **options):
    return file(Image.fromarray(image), "JPEG", quality=quality, subsampling=0, **options)


def file(image, kind, **options):
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def draws(seed=0):
    return np.random.default_rng(seed)


def training(content, seed=0, size=SIZE, jitter=False, upright=True):
    return views.training_view(content, size, draws(seed), jitter, upright)


def near(found, expected, mean, most=255):
    """Asserts that the mean and the largest difference are within `mean` and `most` of 255 levels."""
    difference = np.abs(found.astype(int) - expected.astype(int))
    assert difference.mean() < mean, difference.mean()
    assert difference.max() <= most


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (1500, 2000), (100, 140), (256, 256)])
def test_for_testing_the_shorter_side_becomes_256_and_the_middle_is_taken(height, width):
    """The view matches Pillow's resize of the whole picture; 2000 × 1500 is decoded at a quarter, 140 × 100 is enlarged."""
    image = smooth(height, width)
    shorter = min(height, width)
    resized = Image.fromarray(image).resize(
        (round(width * 256 / shorter), round(height * 256 / shorter)), Image.Resampling.BILINEAR
    )
    left, top = (resized.width - SIZE) // 2, (resized.height - SIZE) // 2
    expected = np.asarray(resized)[top : top + SIZE, left : left + SIZE]
    near(views.center_view(jpeg(image), SIZE, True), expected, mean=2.5, most=30)


def test_for_training_scale_place_and_mirror_are_random(monkeypatch):
    """A picture whose colours are its coordinates shows sides of 224/480 … 224/256, at all places, half of them mirrored."""
    down, right = np.mgrid[:HEIGHT, :WIDTH]
    image = np.stack([down * 0.6, right * 0.5, np.zeros_like(down)], -1).astype(np.uint8)
    content = file(Image.fromarray(image), "PNG")
    tops, lefts, sides, mirrored = [], [], [], 0
    for seed in range(300):
        found = training(content, seed).astype(float)
        ends = found[SIZE // 2, [0, -1], 1] / 0.5
        mirrored += ends[0] > ends[1]
        sides.append((found[-1, 0, 0] - found[0, 0, 0]) / 0.6)
        tops.append(found[0, 0, 0] / 0.6)
        lefts.append(min(ends))
    sides = np.array(sides)
    low, high = SIZE * HEIGHT / 480, SIZE * HEIGHT / 256  # in pixels of the picture
    assert low - 5 < sides.min() < low + 8
    assert high - 8 < sides.max() < high + 5
    assert 110 < mirrored < 190
    places = np.array(tops) / (HEIGHT - sides), np.array(lefts) / (WIDTH - sides)
    for place in places:
        assert np.abs(np.percentile(place, [10, 50, 90]) - [0.1, 0.5, 0.9]).max() < 0.12
    shorter = HEIGHT * SIZE / sides
    assert abs(np.median(shorter) - 368) < 15  # the side is uniformly distributed, the scale is not


def test_the_same_draws_give_the_same_view():
    content = jpeg(smooth())
    np.testing.assert_array_equal(training(content, 3), training(content, 3))
    assert not np.array_equal(training(content, 3), training(content, 4))


def test_decoding_at_a_fraction_changes_little(monkeypatch):
    """Views of a large photograph decoded in full and at a reduced scale differ by less than one level on average."""
    content = jpeg(smooth(1500, 2000))
    fast = [training(content, seed) for seed in range(5)]
    decode = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda content, colours, **_: decode(content, colours))
    for seed, found in enumerate(fast):
        near(found, training(content, seed), mean=1)
    shapes = []
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *a, **k: shapes.append(decode(*a, **k).shape) or decode(*a, **k))
    for seed in range(5):
        training(content, seed)
    assert {shape[0] for shape in shapes} <= {375, 563, 750}
    assert 375 in {shape[0] for shape in shapes}


def test_color_jitter_adds_one_colour_to_all_pixels():
    content = jpeg(np.full((300, 300, 3), 128, np.uint8))
    plain, shifts = training(content).astype(int), []
    for seed in range(200):
        shift = training(content, seed, jitter=True).astype(int) - plain
        assert np.abs(shift - shift[0, 0]).max() <= 1
        shifts.append(shift[0, 0])
    expected = 25.5**2 * views.COLOR_COMPONENTS @ views.COLOR_COMPONENTS.T  # standard deviation 0.1 · 255
    found = np.cov(np.array(shifts).T)
    np.testing.assert_allclose(found, expected, atol=0.35 * np.abs(expected).max())


def test_color_jitter_stays_within_the_range():
    white = training(jpeg(np.full((300, 300, 3), 255, np.uint8)), 1, jitter=True)
    black = training(jpeg(np.zeros((300, 300, 3), np.uint8)), 1, jitter=True)
    assert white.min() > 150
    assert black.max() < 100


def test_a_picture_is_turned_as_its_exif_says_where_that_is_wanted():
    exif = Image.Exif()
    exif[0x0112] = 6  # must be turned by 90° clockwise
    image = smooth()
    turned = views.center_view(jpeg(np.ascontiguousarray(np.rot90(image, -1))), SIZE, True)
    near(views.center_view(jpeg(image, exif=exif), SIZE, True), turned, mean=1)
    near(views.center_view(jpeg(image, exif=exif), SIZE, False), views.center_view(jpeg(image), SIZE, True), mean=1)
    png = file(Image.fromarray(image), "PNG", exif=exif)
    near(views.center_view(png, SIZE, True), turned, mean=1)
    near(views.center_view(png, SIZE, False), views.center_view(jpeg(image), SIZE, False), mean=1)


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "1"])
def test_other_kinds_of_picture_become_rgb(mode):
    image = Image.fromarray(smooth())
    kind = "JPEG" if mode in ("L", "CMYK") else "PNG"
    found = views.center_view(file(image.convert(mode), kind), SIZE, True)
    assert found.shape == (SIZE, SIZE, 3)
    expected = views.center_view(jpeg(np.asarray(image.convert(mode).convert("RGB"))), SIZE, True)
    if mode not in ("P", "1"):
        near(found, expected, mean=3)


@pytest.mark.parametrize("size", [8, 31, 64, 300])
def test_any_size_of_image_and_of_picture(size):
    for height, width in ((1, 1), (3, 200), (9, 7), (64, 64)):
        content = file(Image.fromarray(smooth(height, width)), "PNG")
        assert views.center_view(content, size, True).shape == (size, size, 3)
        assert training(content, size=size).shape == (size, size, 3)


def test_the_decoder_that_is_fast_agrees_with_the_one_that_is_careful(monkeypatch):
    content = jpeg(smooth(), quality=90)
    fast = views.center_view(content, SIZE, True)

    def refuses(*_, **__):
        raise ValueError("not today")

    monkeypatch.setattr(simplejpeg, "decode_jpeg", refuses)
    near(fast, views.center_view(content, SIZE, True), mean=0.5, most=4)


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_damage_raises(damage):
    content = {"cut": jpeg(smooth())[:9000], "empty": b"", "text": b"not a picture"}[damage]
    with pytest.raises(Exception, match=r"\w"):
        views.center_view(content, SIZE, True)


def test_a_picture_too_large_to_decode_raises():
    header = jpeg(smooth(16, 16))
    start = header.index(b"\xff\xc0") + 5
    huge = header[:start] + (9000).to_bytes(2, "big") + (9000).to_bytes(2, "big") + header[start + 4 :]
    with pytest.raises(ValueError, match="pixels, at most"):
        views.center_view(huge, SIZE, True)
