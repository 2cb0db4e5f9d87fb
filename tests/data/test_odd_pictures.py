"""Tests unusual image files: valid ones decode to the right pixels, and for all others one line names the path."""

import io
import resource
import time
import zlib

import numpy as np
import pytest
from pictures import AS_STORED, GREEN, NOISE, RED, UPRIGHT, encoded, encoded_image, load, png, save
from PIL import Image

from smallbatch_jax.config.experiment import InputError

WHOLE = {
    "JPEG": encoded(NOISE, "JPEG"),
    "grey JPEG": encoded(NOISE[..., 0], "JPEG"),
    "progressive JPEG": encoded(NOISE, "JPEG", progressive=True),
    "JPEG with restarts": encoded(NOISE, "JPEG", restart_marker_blocks=1),
    "PNG": encoded(NOISE, "PNG"),
    "grey PNG": encoded(NOISE[..., 0], "PNG"),
}


def lost(kind, whole):
    """Returns lengths at which to truncate a file, from its header to the last bytes, so that pixels are always lost.

    After the pixels of a PNG come 20 bytes: two checksums, and the IEND chunk.
    """
    most = len(whole) - (20 if kind.endswith("PNG") else 0)
    return [*range(2, most - 12, 61), *range(most - 12, most)]


@pytest.mark.parametrize("kind", WHOLE)
def test_a_picture_cut_short_anywhere_is_refused(load_one, kind):
    """A truncated picture is never decoded with grey pixels in place of the missing ones."""
    whole = WHOLE[kind]
    for length in lost(kind, whole):
        load_one(whole[:length], test=whole, refused=True)


@pytest.mark.parametrize("kind", WHOLE)
def test_a_picture_whose_rest_is_zeros_is_refused(load_one, kind):
    """A crash during a write leaves such a file; Pillow alone decodes such a JPEG to grey."""
    whole = WHOLE[kind]
    for length in lost(kind, whole):
        load_one(whole[:length] + bytes(len(whole) - length), test=whole, refused=True)


@pytest.mark.parametrize("kind", ["PNG", "grey PNG"])
def test_a_png_that_has_all_its_pixels_is_decoded(load_one, kind):
    whole = WHOLE[kind]
    for length in range(len(whole) - 20, len(whole)):
        np.testing.assert_array_equal(load_one(whole[:length]), load_one(whole))


def test_the_end_of_a_thumbnail_is_not_that_of_the_picture(load_one):
    whole = encoded(np.tile(NOISE, (4, 3, 1)), "JPEG", comment=b"\xff\xd9")
    assert load_one(whole).shape == (64, 72, 3)
    half = len(whole) // 2
    assert "its end is missing" in load_one(whole[:half] + bytes(half), test=whole, refused=True)


def test_what_follows_the_end_is_no_matter(load_one):
    """Bytes after the end are ignored; cameras put videos and depth maps there."""
    for kind in ("JPEG", "PNG"):
        np.testing.assert_array_equal(load_one(WHOLE[kind] + b"\xff\xda film"), load_one(WHOLE[kind]))


@pytest.mark.parametrize("kind", WHOLE)
def test_garbage_within_a_picture_is_refused_or_decoded_to_its_shape(load_one, kind):
    """A PNG's checksums detect all damage; a JPEG has none, and its decoder resumes where it can."""
    whole, rng, decoded = WHOLE[kind], np.random.default_rng(1), 0
    start = whole.find(b"\xff\xda") if "JPEG" in kind else whole.find(b"IDAT")
    for _ in range(20):
        at = rng.integers(start + 14, len(whole) - 30)
        damaged = whole[:at] + rng.bytes(10) + whole[at + 10 :]
        try:
            assert load_one(damaged).shape[:2] == (16, 24)
            decoded += 1
        except InputError:
            load_one(damaged, test=whole, refused=True)
    assert "JPEG" in kind or decoded == 0


def flipped(content, at):
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def test_a_png_with_a_wrong_checksum_of_its_header_is_refused(load_one):
    load_one(flipped(WHOLE["PNG"], 8 + 8 + 13), test=WHOLE["PNG"], refused=True)


def test_a_flipped_bit_of_a_png_never_changes_a_pixel(load_one):
    """A flipped bit is refused unless Pillow does not read it, because the checksum of the pixels must agree."""
    whole = WHOLE["PNG"]
    right, decoded = load_one(whole), 0
    for at in range(8, len(whole), 7):
        try:
            np.testing.assert_array_equal(load_one(flipped(whole, at), test=whole), right)
            decoded += 1
        except InputError:
            continue
    assert decoded < 10


@pytest.mark.parametrize("file_format", ["PPM", "PDF", "JPEG2000", "ICO", "EPS"])
@pytest.mark.parametrize("name", ["0.png", "0.jpg"])
def test_another_format_under_our_suffix_is_refused(load_one, file_format, name):
    """Only the decoders of the formats that a folder accepts are started, whatever the suffix."""
    assert "is not a JPEG, PNG, WebP, BMP, TIFF or GIF image" in load_one(encoded(NOISE, file_format), name, refused=True)


@pytest.mark.parametrize(("name", "file_format"), [("0.jpg", "PNG"), ("0.png", "JPEG")])
def test_jpeg_and_png_are_told_by_their_content(load_one, name, file_format):
    grey = np.full((8, 8), 90, np.uint8)
    np.testing.assert_array_equal(load_one(encoded(grey, file_format), name), grey[..., None])


@pytest.mark.parametrize(
    ("width", "height", "rows"),
    [(50_000, 50_000, b""), (8_200, 8_200, b""), (20_000, 20_000, bytes(2_501 * 20_000))],
    ids=["claimed", "claimed, below Pillow's own limit", "real"],
)
def test_a_decompression_bomb_is_refused_before_it_goes_off(load_one, width, height, rows):
    bomb = png(width, height, 1, 0, zlib.compress(rows, 1))
    assert len(bomb) < 2**19
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    assert "pixels" in load_one(bomb, refused=True)
    assert time.perf_counter() - began < 5  # for a busy machine; normally it takes milliseconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16  # KiB


def adobe_marker(content):
    """Returns the offsets at which the APP14 segment begins and ends."""
    at = content.find(b"\xff\xee\0\x0eAdobe")
    return at, at + 16


def without_marker(content):
    start, end = adobe_marker(content)
    return content[:start] + content[end:]


def as_ycck(content):
    """Returns the same file with its marker changed, so that the first three channels mean YCbCr."""
    _, end = adobe_marker(content)
    return content[: end - 1] + b"\2" + content[end:]


def cmyk_jpeg(*ink):
    return encoded_image(Image.new("CMYK", (16, 16), ink), "JPEG", quality=100)


def ycc(r, g, b):
    """Converts RGB to the YCbCr of JFIF."""
    y = 0.299 * r + 0.587 * g + 0.114 * b
    return round(y), round(128 + (b - y) / 1.772), round(128 + (r - y) / 1.402)


INK, RGB = (0, 120, 220, 60), (195, 103, 27)  # RGB = (255 - ink) (255 - black) / 255


@pytest.mark.parametrize("kind", ["Adobe", "no marker", "YCCK"])
def test_cmyk_jpegs_have_their_colours(load_one, kind):
    """CMYK is stored inverted in Adobe's files, and also in files without a marker."""
    content = cmyk_jpeg(*INK)
    if kind == "no marker":
        content = without_marker(content)
    if kind == "YCCK":  # YCC encodes RGB = 255 - stored CMY = CMY; Pillow inverts the values that it writes
        content = as_ycck(cmyk_jpeg(*(255 - value for value in ycc(*INK[:3])), INK[3]))
    assert Image.open(io.BytesIO(content)).info.get("adobe_transform") == {"Adobe": 0, "no marker": None, "YCCK": 2}[kind]
    found = load_one(content)
    assert found.shape == (16, 16, 3)
    np.testing.assert_allclose(found.reshape(-1, 3).astype(int), [RGB] * 256, atol=3)


@pytest.mark.parametrize("colour_first", [True, False])
def test_a_grey_jpeg_among_colour_pictures(tmp_path, colour_first):
    """A grey JPEG among colour pictures has its value in all three channels."""
    names = ("1.jpg", "0.png") if colour_first else ("0.jpg", "1.png")
    for split in ("train", "test"):
        save(tmp_path / split / "a" / names[0], Image.new("L", (16, 16), 90))
        save(tmp_path / split / "a" / names[1], Image.new("RGB", (16, 16), RED))
    images = load(tmp_path).train_images
    assert images.shape == (2, 16, 16, 3)
    expected = [RED, (90,) * 3] if colour_first else [(90,) * 3, RED]
    np.testing.assert_array_equal(images, np.broadcast_to(np.array(expected)[:, None, None], images.shape))


GREY, COLOUR, GREY_ALPHA, COLOUR_ALPHA = 0, 2, 4, 6  # PNG's colour types


@pytest.mark.parametrize(("colour_type", "channels"), [(GREY, 1), (COLOUR, 3), (GREY_ALPHA, 1), (COLOUR_ALPHA, 3)])
@pytest.mark.parametrize("depth", [8, 16])
def test_every_png_keeps_the_upper_eight_bits_and_drops_alpha(load_one, colour_type, channels, depth):
    """Transparent pixels keep their stored colour and are not blended with a background."""
    rng = np.random.default_rng(2)
    samples = rng.integers(0, 2**depth, (5, 7, channels + (colour_type in (GREY_ALPHA, COLOUR_ALPHA))))
    samples[0, :, channels:] = 0  # wholly transparent
    raw = b"".join(b"\0" + row.astype(">u2" if depth == 16 else "u1").tobytes() for row in samples)
    found = load_one(png(7, 5, depth, colour_type, zlib.compress(raw)))
    expected = samples[..., :channels] >> (depth - 8)
    if (colour_type, depth) == (GREY_ALPHA, 16):  # Pillow reads it as RGB with alpha
        expected = np.repeat(expected, 3, axis=2)
    np.testing.assert_array_equal(found, expected)


def test_grey_of_few_bits_is_scaled_to_eight(load_one):
    found = load_one(png(4, 1, 2, GREY, zlib.compress(b"\0\x1b")))
    assert found.ravel().tolist() == [0, 85, 170, 255]


@pytest.mark.parametrize(("colour_type", "trns"), [(GREY, b"\0\x5a"), (COLOUR, b"\0\xfa\0\x0a\0\x0a")])
def test_a_transparent_colour_is_shown_as_stored(load_one, colour_type, trns):
    colour = (90,) if colour_type == GREY else RED
    found = load_one(png(2, 1, 8, colour_type, zlib.compress(b"\0" + bytes(colour) * 2), (b"tRNS", trns)))
    assert found.tolist() == [[list(colour)] * 2]


def test_a_transparent_palette_is_shown_as_stored(load_one):
    palette = (b"PLTE", bytes(RED + GREEN)), (b"tRNS", b"\0\x80")
    assert load_one(png(2, 1, 8, 3, zlib.compress(b"\0\0\1"), *palette)).tolist() == [[list(RED), list(GREEN)]]


def test_an_interlaced_png_is_put_together(load_one):
    """The seven passes of Adam7 (first column and row, and their steps) are decoded to the picture."""
    picture = NOISE[:13, :11]
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    rows = [row for x, y, dx, dy in passes for row in picture[y::dy, x::dx]]
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    np.testing.assert_array_equal(load_one(png(11, 13, 8, COLOUR, zlib.compress(raw), interlace=1)), picture)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
@pytest.mark.parametrize("orientation", AS_STORED)
def test_every_exif_orientation_is_turned_upright(load_one, orientation, file_format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(AS_STORED[orientation](UPRIGHT))
    found = load_one(encoded(stored, file_format, exif=exif, **({"quality": 100} if file_format == "JPEG" else {})))
    np.testing.assert_allclose(found[..., 0].astype(int), UPRIGHT, atol=0 if file_format == "PNG" else 2)


def test_sixteen_bits_are_turned_too(load_one):
    exif = Image.Exif()
    exif[0x0112] = 6
    found = load_one(encoded(UPRIGHT.T[::-1].astype(np.uint16) << 8, "PNG", exif=exif))
    np.testing.assert_array_equal(found[..., 0], UPRIGHT)


def test_turned_and_upright_pictures_share_a_folder(tmp_path):
    """Pictures must agree in their size after the EXIF rotation."""
    exif = Image.Exif()
    exif[0x0112] = 8
    for split in ("train", "test"):
        save(tmp_path / split / "a" / "0.png", Image.new("L", (4, 2)))
        save(tmp_path / split / "a" / "1.png", Image.new("L", (2, 4)), exif=exif)
    assert load(tmp_path).train_images.shape == (2, 2, 4, 1)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
@pytest.mark.parametrize(
    "exif",
    [b"Exif\0\0garbage", b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03", b"Exif\0\0II*\0\xff\xff\xff\xff"],
    ids=["garbage", "nothing", "cut short", "nowhere"],
)
def test_a_sound_picture_with_damaged_exif_is_decoded_as_stored(load_one, file_format, exif):
    grey = np.full((8, 16), 90, np.uint8)
    np.testing.assert_array_equal(load_one(encoded(grey, file_format, exif=exif))[..., 0], grey)
