"""Real files as they come: whole ones are decoded to the right pixels, all others are one line with the path."""

import io
import os
import resource
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from pictures import GREEN, RED, error_line, load, png, save
from PIL import Image

from smallbatch_jax.config.experiment import InputError
from smallbatch_jax.data import decode

NOISE = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)


def encoded(image, file_format, **options):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, file_format, **options)
    return stream.getvalue()


@pytest.fixture
def load_one(tmp_path):
    """Loads a folder whose one training picture has the content given; the picture, or the error's line."""
    (tmp_path / "one" / "train" / "a").mkdir(parents=True)

    def load_one(content, name="0.png", test=None, refused=False):
        path = tmp_path / "one" / "train" / "a" / name
        path.write_bytes(content)
        test_path = tmp_path / "one" / "test" / "a" / name
        test_path.parent.mkdir(parents=True, exist_ok=True)
        test_path.write_bytes(content if test is None else test)
        if not refused:
            return load(tmp_path / "one").train_images[0]
        line = error_line(load, tmp_path / "one")
        assert repr(str(path)) in line
        return line

    return load_one


WHOLE = {
    "JPEG": encoded(NOISE, "JPEG"),
    "grey JPEG": encoded(NOISE[..., 0], "JPEG"),
    "progressive JPEG": encoded(NOISE, "JPEG", progressive=True),
    "JPEG with restarts": encoded(NOISE, "JPEG", restart_marker_blocks=1),
    "PNG": encoded(NOISE, "PNG"),
    "grey PNG": encoded(NOISE[..., 0], "PNG"),
}


def lost(kind, whole):
    """Lengths to which a file is cut: its header, half of it, the last bytes; always a part of the pixels is lost.

    Behind those of a PNG are 20 bytes: two checksums, and a chunk that says "end".
    """
    most = len(whole) - (20 if kind.endswith("PNG") else 0)
    return [*range(2, most - 12, 61), *range(most - 12, most)]


@pytest.mark.parametrize("kind", WHOLE)
def test_a_picture_cut_short_anywhere_is_refused(load_one, kind):
    """Never is it decoded with grey pixels for those that are lost."""
    whole = WHOLE[kind]
    for length in lost(kind, whole):
        load_one(whole[:length], test=whole, refused=True)


@pytest.mark.parametrize("kind", WHOLE)
def test_a_picture_whose_rest_is_zeros_is_refused(load_one, kind):
    """What a crash leaves of a file that was being written; Pillow alone decodes such a JPEG to grey."""
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
    """Cameras put films and depth there."""
    for kind in ("JPEG", "PNG"):
        np.testing.assert_array_equal(load_one(WHOLE[kind] + b"\xff\xda film"), load_one(WHOLE[kind]))


@pytest.mark.parametrize("kind", WHOLE)
def test_garbage_within_a_picture_is_refused_or_decoded_to_its_shape(load_one, kind):
    """A PNG's checksums notice it all; a JPEG has none, and its decoder goes on where it can."""
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
    """It is refused, unless it is in what Pillow does not read; the pixels' own checksum must agree."""
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
    """One rule for all of them: no decoder is started but those of the kinds that a folder takes."""
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
    assert time.perf_counter() - began < 5  # on a busy machine; else some milliseconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16  # KiB


def adobe_marker(content):
    """Where the APP14 segment begins, and ends."""
    at = content.find(b"\xff\xee\0\x0eAdobe")
    return at, at + 16


def without_marker(content):
    start, end = adobe_marker(content)
    return content[:start] + content[end:]


def as_ycck(content):
    """The same file, its first three channels now said to be YCbCr."""
    _, end = adobe_marker(content)
    return content[: end - 1] + b"\2" + content[end:]


def cmyk_jpeg(*ink):
    return encoded_image(Image.new("CMYK", (16, 16), ink), "JPEG", quality=100)


def encoded_image(image, file_format, **options):
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def ycc(r, g, b):
    """JFIF's YCbCr of RGB."""
    y = 0.299 * r + 0.587 * g + 0.114 * b
    return round(y), round(128 + (b - y) / 1.772), round(128 + (r - y) / 1.402)


INK, RGB = (0, 120, 220, 60), (195, 103, 27)  # RGB = (255 - ink) (255 - black) / 255


@pytest.mark.parametrize("kind", ["Adobe", "no marker", "YCCK"])
def test_cmyk_jpegs_have_their_colours(load_one, kind):
    """Stored inverted, as Adobe's are; so is what has no marker to say whose it is."""
    content = cmyk_jpeg(*INK)
    if kind == "no marker":
        content = without_marker(content)
    if kind == "YCCK":  # of YCC that stand for RGB = 255 - stored CMY = CMY; Pillow inverts what it is given to write
        content = as_ycck(cmyk_jpeg(*(255 - value for value in ycc(*INK[:3])), INK[3]))
    assert Image.open(io.BytesIO(content)).info.get("adobe_transform") == {"Adobe": 0, "no marker": None, "YCCK": 2}[kind]
    found = load_one(content)
    assert found.shape == (16, 16, 3)
    np.testing.assert_allclose(found.reshape(-1, 3).astype(int), [RGB] * 256, atol=3)


@pytest.mark.parametrize("colour_first", [True, False])
def test_a_grey_jpeg_among_colour_pictures(tmp_path, colour_first):
    """As digits are among photos: its value in all three channels, within JPEG's own error."""
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
    """Transparent pixels too: they show what is stored beneath, not a background."""
    rng = np.random.default_rng(2)
    samples = rng.integers(0, 2**depth, (5, 7, channels + (colour_type in (GREY_ALPHA, COLOUR_ALPHA))))
    samples[0, :, channels:] = 0  # wholly transparent
    raw = b"".join(b"\0" + row.astype(">u2" if depth == 16 else "u1").tobytes() for row in samples)
    found = load_one(png(7, 5, depth, colour_type, zlib.compress(raw)))
    np.testing.assert_array_equal(found, samples[..., :channels] >> (depth - 8))


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
    """Adam7's seven passes: first column and row, and their steps."""
    picture = NOISE[:13, :11]
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    rows = [row for x, y, dx, dy in passes for row in picture[y::dy, x::dx]]
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    np.testing.assert_array_equal(load_one(png(11, 13, 8, COLOUR, zlib.compress(raw), interlace=1)), picture)


UPRIGHT = np.kron([[10, 60, 110], [160, 210, 250]], np.ones((8, 8))).astype(np.uint8)

# Of each orientation the sides of the upright picture that the first stored row and column show (EXIF 2.3, tag 274).
AS_STORED = {
    1: lambda p: p,  # top, left
    2: lambda p: p[:, ::-1],  # top, right
    3: lambda p: p[::-1, ::-1],  # bottom, right
    4: lambda p: p[::-1],  # bottom, left
    5: lambda p: p.T,  # left, top
    6: lambda p: p.T[::-1],  # right, top
    7: lambda p: p.T[::-1, ::-1],  # right, bottom
    8: lambda p: p.T[:, ::-1],  # left, bottom
}


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
    """It is the size as seen that must agree."""
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


@pytest.mark.parametrize("where", ["train/cat/up", "train/cat/1.png", "test/dog/x.jpg"])
def test_links_to_directories_above_are_not_followed_within_a_class(root, where):
    path = root / where
    path.unlink(missing_ok=True)
    path.symlink_to(root, target_is_directory=True)
    assert load(root).train_images.shape[1:] == (4, 6, 3)


@pytest.mark.parametrize("target", [".", "..", "../.."])
def test_a_class_that_leads_back_to_a_directory_above_is_named(root, target):
    """Its own split, the root, and what holds the root: none holds pictures."""
    (root / "test" / "loop").symlink_to(target, target_is_directory=True)
    assert "class 'loop' has no images in train/" in error_line(load, root)
    (root / "train" / "loop").symlink_to(target, target_is_directory=True)
    line = error_line(load, root)
    assert "class 'loop' has no images in train/" in line
    assert repr(str(root / "train" / "loop")) in line


def test_a_directory_may_be_named_like_a_picture(root):
    """As a class it is one; within a class it is none."""
    for split in ("train", "test"):
        save(root / split / "x.png" / "0.png", Image.new("RGB", (6, 4), (1, 2, 3)))
        (root / split / "x.png" / "1.png").mkdir()
    pictures = load(root)
    assert pictures.class_names == ("cat", "dog", "x.png")
    np.testing.assert_array_equal(pictures.train_images[pictures.train_labels == 2], np.full((1, 4, 6, 3), (1, 2, 3)))


@pytest.mark.parametrize("becomes", ["nothing", "directory", "empty"])
def test_a_picture_that_goes_away_while_others_are_read_is_named(root, monkeypatch, becomes):
    path = root / "train" / "dog" / "1.png"
    decode_images = decode.decode_images

    def decode_later(*args):
        path.unlink()
        if becomes == "directory":
            path.mkdir()
        elif becomes == "empty":
            path.touch()
        return decode_images(*args)

    monkeypatch.setattr(decode, "decode_images", decode_later)
    said = {"nothing": "cannot be read (No such file or directory)", "directory": "cannot be read (Is a directory)"}
    assert error_line(load, root).startswith(f"dataset.data_dir: {str(path)!r} {said.get(becomes, 'is not a JPEG')}")


NAMES = {
    "spaces": " two words ",
    "combining": "e\u0301",
    "composed": "\xe9",
    "emoji": "🐈‍⬛",
    "right to left": "חתול \u202e gpj",
    "dash": "-rf",
    "line break": "a\nb\r\u2028c",
    "quotes": 'it\'s "this"',
    "format": "%s{0}\\n",
    "not UTF-8": os.fsdecode(b"\xff\xfe cat"),
}


@pytest.mark.parametrize("name", NAMES.values(), ids=list(NAMES))
def test_any_name_of_a_class_and_of_a_picture_will_do(root, name):
    for split in ("train", "test"):
        (root / split / "dog").rename(root / split / name)
    save(root / "train" / name / f"{name}.png", Image.new("RGB", (6, 4), (7, 8, 9)))
    pictures = load(root)
    assert pictures.class_names == tuple(sorted(["cat", name]))
    label = pictures.class_names.index(name)
    mine = pictures.train_images[pictures.train_labels == label][:, 0, 0].tolist()
    assert sorted(mine) == sorted([[7, 8, 9], *([*GREEN[:2], i] for i in range(3))])
    assert load(root).class_names == pictures.class_names  # from the cache


@pytest.mark.parametrize("name", NAMES.values(), ids=list(NAMES))
def test_any_name_is_one_line_that_can_be_printed(root, name):
    path = root / "train" / name / f"{name}.png"
    for split in ("train", "test"):
        save(root / split / name / f"{name}.png", Image.new("RGB", (6, 4)))
    path.write_bytes(b"text")
    line = error_line(load, root)
    assert line.startswith(f"dataset.data_dir: {str(path)!r} is not a JPEG, PNG, WebP, BMP, TIFF or GIF image")
    line.encode("utf-8")
    (root / "test" / name).rename(root / "elsewhere")
    line = error_line(load, root)
    assert f"class {name!r} has no images in test/" in line
    line.encode("utf-8")


def test_errors_can_be_printed_where_the_terminal_knows_ascii_alone(root):
    """Names that are not UTF-8, everywhere; all others where the whole locale is ASCII."""
    for name, environment in (
        (os.fsdecode(b"\xff"), {"PYTHONIOENCODING": "ascii"}),
        ("\xe9🐈", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    ):
        path = root / "train" / "cat" / f"{name}.png"
        path.write_bytes(b"")
        code = f"""
from smallbatch_jax import data
try:
    data.load("folder", {str(root)!r})
except ValueError as error:
    print(error)
"""
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, env=os.environ | environment)
        assert run.stderr == b""
        assert run.stdout.startswith(b"dataset.data_dir: ")
        assert run.stdout.isascii()
        assert run.stdout.endswith(b" image; replace or remove it\n")
        path.unlink()


@pytest.mark.parametrize("count", [3_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_class_of_many_pictures(tmp_path, count):
    """Links to ten files, so that they are quickly there; with few files open at any time."""
    for i in range(10):
        save(tmp_path / "sources" / f"{i}.png", Image.new("RGB", (8, 8), (i, 10 * i, 255 - i)))
    for split, name, number in (("train", "many", count), ("train", "one", 1), ("test", "many", 1), ("test", "one", 1)):
        (tmp_path / "root" / split / name).mkdir(parents=True)
        for i in range(number):
            os.link(tmp_path / "sources" / f"{i % 10}.png", tmp_path / "root" / split / name / f"{i:06}.png")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, before[1]))
        began = time.perf_counter()
        pictures = load(tmp_path / "root")
        seconds = time.perf_counter() - began
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert pictures.train_images.shape == (count + 1, 8, 8, 3)
    np.testing.assert_array_equal(pictures.train_labels, [0] * count + [1])
    number = np.append(np.arange(count) % 10, 0)
    np.testing.assert_array_equal(pictures.train_images[:, 0, 0], np.stack([number, 10 * number, 255 - number], -1))
    np.testing.assert_array_equal(pictures.train_images.max((1, 2)), pictures.train_images.min((1, 2)))
    assert seconds < 60


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


def test_only_of_a_png_a_byte_is_the_colour_type(load_one):
    """A TIFF with the same byte in the same place: its height is a LONG, type 4."""
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


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP"])
def test_a_file_of_several_pictures_is_refused(load_one, kind):
    frames = [Image.fromarray(NOISE), Image.fromarray(NOISE[::-1])]
    content = encoded_image(frames[0], kind, save_all=True, append_images=frames[1:])
    assert "2 pictures in one file" in load_one(content, "0.png", refused=True)


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
