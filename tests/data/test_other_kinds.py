"""Tests pictures that are neither JPEG nor PNG."""

import struct

import numpy as np
import pytest
from pictures import AS_STORED, GREEN, NOISE, RED, UPRIGHT, encoded, encoded_image
from PIL import Image


@pytest.mark.parametrize("name", ["0.png", "0.webp"])
@pytest.mark.parametrize(
    ("kind", "options"), [("BMP", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})]
)
def test_other_kinds_are_decoded_whatever_their_suffix(load_one, kind, options, name):
    np.testing.assert_array_equal(load_one(encoded(NOISE, kind, **options), name), NOISE)


def test_a_gif_has_the_colours_of_its_palette(load_one):
    np.testing.assert_array_equal(load_one(encoded_image(Image.new("RGB", (8, 8), RED), "GIF"), "0.gif")[0, 0], RED)
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    np.testing.assert_array_equal(load_one(encoded(grey, "GIF"), "0.gif"), grey[..., None])


@pytest.mark.parametrize("kind", ["TIFF", "WEBP", "BMP"])
def test_alpha_of_other_kinds_is_dropped(load_one, kind):
    rgba = np.concatenate([NOISE, np.full((*NOISE.shape[:2], 1), 4, np.uint8)], -1)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(load_one(encoded(rgba, kind, **options), "0.png"), NOISE)


def test_the_colour_type_byte_is_read_of_png_files_only(load_one):
    """In a TIFF the byte at that offset can have the same value: here its height is a LONG, type 4."""
    tags = [
        (256, 3, 2),
        (257, 4, 1),
        (258, 3, 8),
        (259, 3, 1),
        (262, 3, 2),
        (273, 4, 146),
        (277, 3, 4),
        (278, 4, 1),
        (279, 4, 8),
    ]
    tags += [(284, 3, 1), (338, 3, 2)]
    entries = b"".join(
        struct.pack(">HHI" + ("HH" if kind == 3 else "I"), tag, kind, 1, value, *[0] * (kind == 3)) for tag, kind, value in tags
    )
    content = b"MM\0*" + struct.pack(">IH", 8, len(tags)) + entries + bytes(4) + bytes((*RED, 9, *GREEN, 9))
    assert content[25] == 4
    np.testing.assert_array_equal(load_one(content, "0.tif"), [[RED, GREEN]])


def test_a_tiff_of_16_bits_keeps_the_upper_eight(load_one):
    samples = np.random.default_rng(0).integers(0, 2**16, (5, 7)).astype(np.uint16)
    np.testing.assert_array_equal(load_one(encoded(samples, "TIFF"), "0.tif")[..., 0], samples >> 8)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_a_tiff_of_other_numbers_is_refused(load_one, dtype):
    line = load_one(encoded(np.full((5, 7), 70_000, dtype), "TIFF"), "0.tif", refused=True)
    assert "unsigned integers of up to 16 bits are accepted" in line


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_a_file_of_several_pictures_is_refused(load_one, kind):
    frames = [Image.fromarray(NOISE), Image.fromarray(NOISE[::-1])]
    content = encoded_image(frames[0], kind, save_all=True, append_images=frames[1:])
    assert "2 pictures in one file" in load_one(content, "0.png", refused=True)


def test_the_first_picture_of_a_cameras_jpeg_is_taken(load_one):
    grey = [Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (50, 200)]
    content = encoded_image(grey[0], "MPO", save_all=True, append_images=grey[1:])
    np.testing.assert_array_equal(load_one(content, "0.jpg"), np.full((8, 8, 1), 50))


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "BMP"])
def test_other_kinds_cut_short_are_refused(load_one, kind):
    whole = encoded(NOISE, kind)
    for length in range(40, len(whole) * 9 // 10, max(1, len(whole) // 10)):
        load_one(whole[:length], test=whole, refused=True)


@pytest.mark.parametrize("kind", ["TIFF", "WEBP"])
def test_other_kinds_are_turned_upright_once(load_one, kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.ascontiguousarray(AS_STORED[6](UPRIGHT))
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(load_one(encoded(stored, kind, exif=exif, **options), "0.png")[..., 0], UPRIGHT)
