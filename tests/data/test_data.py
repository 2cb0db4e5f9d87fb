"""Tests the Dataset class, the digits and the choice of a dataset by name."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from pictures import error_line

from smallbatch_jax import data
from smallbatch_jax.config import experiment
from smallbatch_jax.data.doubts import doubts


def arrays(**changes):
    """Returns the arguments of a small valid Dataset, with some of them changed."""
    return {
        "train_images": np.zeros((4, 5, 5, 3), np.uint8),
        "train_labels": np.array([0, 1, 2, 1]),
        "test_images": np.zeros((2, 5, 5, 3), np.uint8),
        "test_labels": np.array([2, 0]),
        "num_classes": 3,
    } | changes


@pytest.mark.parametrize(
    ("name", "hint"), [("digit", "did you mean 'digits'?"), ("Folder", "did you mean 'folder'?"), ("xyz", "'xyz'.")]
)
def test_unknown_name_is_refused_with_the_nearest(name, hint):
    message = error_line(data.load, name)
    assert message.startswith(f"dataset.name: unknown dataset {name!r}")
    assert hint in message
    assert message.endswith("Known: digits, folder, cifar10, cifar100, imagenet2012.")


@pytest.mark.parametrize(
    ("name", "size", "said"),
    [
        ("digits", 32, "got 32, but the images of digits share one size"),
        ("cifar10", 224, "got 224, but the images of cifar10 share one size"),
        ("imagenet2012", None, "got None, but imagenet2012 does not fit in memory; use 224"),
        ("folder", 4, "got 4, accepts an integer from 8"),
    ],
)
def test_an_image_size_that_does_not_go_with_the_dataset_is_refused(name, size, said):
    assert error_line(data.load, name, image_size=size).startswith(f"dataset.image_size: {said}")


def test_import_loads_no_heavy_library():
    """Commands show their --help without waiting for JAX, scikit-learn or Pillow."""
    heavy = ("jax", "sklearn", "PIL", "rich", "cv2", "simplejpeg", "grain")
    code = f"import sys, smallbatch_jax.data; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("dtype", [np.float16, np.float64, jnp.bfloat16])
def test_images_of_any_floating_dtype_become_float32(dtype):
    images = np.array([[0.5, -2], [3, 0.25]], dtype)
    found = data.Dataset(images, np.zeros(2, int), images, np.zeros(2, int), 1).train_images
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [[0.5, -2], [3, 0.25]])


def test_dataset_normalises_types():
    """Labels become int32, floating images become float32 with their values kept, and lists are accepted."""
    images = np.linspace(-1, 1, 8).reshape(4, 2)
    dataset = data.Dataset(
        **arrays(
            train_images=images,
            train_labels=[0, 1, 0, 1],
            test_images=images[:1].tolist(),
            test_labels=np.array([1], np.uint8),
            num_classes=np.int64(2),
        )
    )
    assert dataset.train_images.dtype == dataset.test_images.dtype == np.float32
    assert dataset.train_labels.dtype == dataset.test_labels.dtype == np.int32
    assert type(dataset.num_classes) is int
    np.testing.assert_allclose(dataset.train_images, images, rtol=1e-6)


def test_dataset_does_not_copy_what_already_fits():
    images = np.zeros((4, 5, 5, 3), np.uint8)
    assert data.Dataset(**arrays(train_images=images)).train_images is images


@pytest.mark.parametrize(
    ("changes", "argument", "said"),
    [
        ({"train_images": np.zeros((4, 5, 5, 3), np.int64)}, "train_images", "int64"),
        ({"train_images": np.zeros((4, 5, 5, 3), object)}, "train_images", "object"),
        ({"train_images": [[1.0, 2.0], [3.0]]}, "train_images", "cannot be made an array"),
        ({"train_images": np.zeros(4, np.uint8)}, "train_images", "(4,)"),
        ({"train_images": np.zeros((4, 0), np.uint8)}, "train_images", "(4, 0)"),
        ({"train_images": np.zeros((0, 5, 5, 3), np.uint8), "train_labels": []}, "train_images", "(0, 5, 5, 3)"),
        ({"test_images": np.zeros((0, 5, 5, 3), np.uint8)}, "test_images", "(0, 5, 5, 3)"),
        ({"test_images": np.zeros((2, 5, 6, 3), np.uint8)}, "test_images", "(5, 6, 3)"),
        ({"test_images": np.zeros((2, 5, 5, 3), np.float32)}, "test_images", "float32"),
        ({"train_images": np.full((4, 5), np.nan), "test_images": np.zeros((2, 5))}, "train_images", "finite"),
        ({"train_images": np.full((4, 5), 1e300), "test_images": np.zeros((2, 5))}, "train_images", "finite"),
        ({"train_labels": np.zeros(3, int)}, "train_labels", "3 labels for 4 images"),
        ({"test_labels": np.zeros(3, int)}, "test_labels", "3 labels for 2 images"),
        ({"train_labels": np.array([0, 1, 2, 3])}, "train_labels", "0 to 3"),
        ({"train_labels": np.array([0, 1, 2, -1])}, "train_labels", "-1 to 2"),
        ({"test_labels": np.array([2**32, 0])}, "test_labels", str(2**32)),
        ({"train_labels": np.zeros(4)}, "train_labels", "float64"),
        ({"train_labels": np.eye(4, 3, dtype=int)}, "train_labels", "(4, 3)"),
        ({"train_labels": np.eye(4, 3, dtype=int)}, "train_labels", "labels.argmax(1)"),
        ({"train_labels": np.array([[0], [1], [2], [1]])}, "train_labels", "labels[:, 0]"),
        ({"train_labels": np.array([1, 2, 3, 1])}, "train_labels", "it accepts 0 to 2; subtract 1"),
        ({"train_images": np.zeros((4, 5, 5, 3), bool)}, "train_images", "bool"),
        ({"train_images": np.zeros((4, 5, 5, 3), int)}, "train_images", "images.astype(np.uint8)"),
        ({"train_images": np.ma.masked_less(np.arange(20.0).reshape(4, 5), 3)}, "train_images", "masked values"),
        ({"validation_labels": np.zeros(2, int)}, "validation_labels", "without validation_images"),
        ({"num_classes": 0}, "num_classes", "0"),
        ({"num_classes": 2.5}, "num_classes", "2.5"),
        ({"class_names": ("a", "b")}, "class_names", "3 strings"),
        ({"class_names": "abc"}, "class_names", "3 strings"),
        ({"class_names": 3}, "class_names", "3 strings"),
        ({"train_images": np.zeros((4, 1), int), "train_labels": None}, "train_labels", "[N, T ≥ 2] as train_images"),
    ],
)
def test_bad_arrays_are_refused_by_name(changes, argument, said):
    message = error_line(data.Dataset, **arrays(**changes))
    assert message.startswith(f"Dataset.{argument}: ")
    assert said in message


def test_an_array_of_another_library_that_cannot_be_read_is_refused_by_name():
    class Tensor:  # as one of PyTorch's that needs a gradient
        def __array__(self, dtype=None, copy=None):
            raise RuntimeError("Can't call numpy() on Tensor that requires grad.")

    line = error_line(data.Dataset, **arrays(train_images=Tensor()))
    assert line.startswith("Dataset.train_images: cannot be made an array (Can't call numpy() on Tensor that requires grad.)")


def sound(**changes):
    """Returns a dataset about which there is no warning, with some of its arrays changed."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (200, 4, 4, 3)).astype(np.uint8)
    labels = np.arange(200) % 3
    given = arrays(train_images=images[:150], train_labels=labels[:150], test_images=images[150:], test_labels=labels[150:])
    return data.Dataset(**given | changes)


FLOATS = (np.random.default_rng(1).random((200, 4, 4, 3)), np.arange(200) % 3)
TOKENS = np.arange(800).reshape(200, 4) % 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"train_images": FLOATS[0][:150], "test_images": FLOATS[0][150:]}, []),
        ({"train_images": 255 * FLOATS[0][:150], "test_images": 255 * FLOATS[0][150:]}, ["floats that reach 25"]),
        ({"train_images": FLOATS[0][:150], "test_images": 255 * FLOATS[0][150:]}, ["scale both alike"]),
        (
            {"train_images": sound().train_images // 128, "test_images": sound().test_images // 128},
            ["uint8 with no value above 1"],
        ),
        ({"train_images": sound().train_images[:1].repeat(150, 0)}, ["all train_images are the same"]),
        ({"train_images": TOKENS[:150], "test_images": TOKENS[150:]}, ["for pixels in 0..255 give images.astype(np.uint8)"]),
        ({"train_images": TOKENS[:150] + 256, "test_images": TOKENS[150:] + 256}, []),
        ({"test_images": sound().train_images[:50]}, ["50 of 50 test images are training images too"]),
        ({"test_images": np.concatenate([sound().test_images[:49], sound().train_images[:1]])}, ["1 of 50 test images"]),
        ({"train_labels": np.arange(150) % 2 + 1}, ["1 of 3 classes have no training example: 0."]),
        ({"num_classes": 10}, ["7 of 10 classes have no training example: 3, 4, 5, 6, 7, …"]),
        (
            {"train_images": sound().train_images[:40], "train_labels": np.arange(40) % 3},
            ["more test examples (50) than training"],
        ),
    ],
)
def test_what_may_not_be_meant_is_doubted(changes, said):
    found = doubts(sound(**changes))
    assert [text in line for text, line in zip(said, found, strict=True)] == [True] * len(said)


def one_class(images):
    return data.Dataset(images, np.zeros(len(images), int), images[:1], np.zeros(1, int), num_classes=1)


@pytest.mark.parametrize("shape", [(700, 6, 5, 3), (700, 6, 5, 1), (700, 4)])
def test_channel_statistics_are_numpys(shape):
    """They equal the mean and standard deviation of the whole array in float64."""
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    dataset = one_class(images)
    mean, std = dataset.channel_statistics()
    flat = images.reshape(-1, shape[-1])
    assert mean.dtype == std.dtype == np.float32
    np.testing.assert_allclose(mean, flat.mean(axis=0, dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(std, flat.std(axis=0, dtype=np.float64), rtol=1e-6)


def test_channel_statistics_of_a_constant_channel_can_divide():
    images = np.full((3, 7, 7, 2), 77, np.uint8)
    images[0, 0, 0, 1] = 78
    mean, std = one_class(images).channel_statistics()
    assert mean[0] == 77
    assert std[0] == 1
    assert 0 < std[1] < 1


def test_channel_statistics_leave_float_images_as_they_are():
    images = np.random.default_rng(0).normal(5, 3, (4, 2, 2, 3))
    mean, std = one_class(images).channel_statistics()
    np.testing.assert_array_equal(mean, np.zeros(3, np.float32))
    np.testing.assert_array_equal(std, np.ones(3, np.float32))


class Bytes:
    """A user-defined source of encoded images."""

    upright = False

    def __init__(self, contents):
        self.contents = contents

    def __len__(self):
        return len(self.contents)

    def read(self, index):
        return self.contents[index], 0


def test_photographs_without_a_listing_are_known_by_their_content():
    names = [
        data.Photographs(Bytes(train), Bytes([b"t"]), 8, 1, ("a",)).digest()
        for train in ([b"a", b"b"], [b"a", b"b"], [b"a", b"c"], [b"a", b"b", b"b"])
    ]
    assert names[0] == names[1]
    assert len(set(names)) == 3


def test_a_subset_is_the_first_examples_of_every_class():
    """Where a class has too few examples, the others fill the subset."""
    labels = np.array([2, 2, 2, 0, 0, 1, 2, 0])
    images = np.arange(8, dtype=np.uint8).reshape(8, 1)
    whole = data.Dataset(images, labels, images, labels, 3)
    kept = {count: whole.with_subset(count).train_images[:, 0].tolist() for count in (3, 5, 7, 8)}
    assert kept == {3: [0, 3, 5], 5: [0, 1, 3, 4, 5], 7: [0, 1, 2, 3, 4, 5, 7], 8: list(range(8))}
    part = whole.with_subset(3)
    assert part.train_labels.tolist() == [2, 0, 1]
    assert len(part.test_labels) == 8
    targets = data.Dataset(np.ones((4, 2)), np.arange(4.0), np.ones((4, 2)), np.arange(4.0))
    assert targets.with_subset(2).train_labels.tolist() == [0, 1]
    assert error_line(whole.with_subset, 9) == "dataset.subset: got 9, but there are only 8 training examples."


def test_a_subset_is_cut_before_the_validation_split():
    chosen = experiment.Dataset("digits", subset=1000, validation_fraction=0.1)
    found = data.load_section(chosen)
    assert (found.num_train, data.num_train_examples(chosen)) == (900, 900)
    counts = np.bincount(np.concatenate([found.train_labels, found.validation_labels]))
    assert (counts == 100).all()


@pytest.mark.parametrize("wrong", [{"subset": 2000}, {"subset": 1, "validation_fraction": 0.9}])
def test_the_number_of_training_examples_is_refused_as_loading_refuses_it(wrong):
    chosen = experiment.Dataset("digits", **wrong)
    assert error_line(data.num_train_examples, chosen) == error_line(data.load_section, chosen)


def test_digest_is_that_of_values_types_and_classes():
    changes = ({}, {"num_classes": 4}, {"test_labels": np.array([0, 0])}, {"train_images": np.ones((4, 5, 5, 3), np.uint8)})
    floats = {f"{split}_images": arrays()[f"{split}_images"].astype(np.float32) for split in ("train", "test")}
    assert len({data.Dataset(**arrays(**change)).digest() for change in (*changes, floats)}) == 5
    assert data.Dataset(**arrays()).digest() == data.Dataset(**arrays(class_names=("a", "b", "c"))).digest()


def test_digits_shapes_and_range():
    digits = data.load("digits")
    assert digits.train_images.shape == (1437, 8, 8, 1)
    assert digits.test_images.shape == (360, 8, 8, 1)
    assert digits.train_images.dtype == np.uint8
    assert (digits.train_images.min(), digits.train_images.max()) == (0, 255)
    assert digits.num_classes == 10
    assert digits.class_names == tuple("0123456789")


def test_digits_scale_is_linear_in_the_ink():
    """The 17 levels x = 0..16 of scikit-learn's digits become round(255·x/16)."""
    levels = np.unique(data.load("digits").train_images)
    np.testing.assert_array_equal(levels, [round(255 * x / 16) for x in range(17)])


def test_digits_split_covers_the_source_once():
    """Every digit of scikit-learn is in exactly one split."""
    from sklearn.datasets import load_digits

    digits = data.load("digits")
    ours = np.concatenate([digits.train_images, digits.test_images]).reshape(1797, 64)
    theirs = np.rint(np.asarray(load_digits(return_X_y=True)[0]) * 255 / 16).astype(np.uint8)
    assert sorted(map(bytes, ours)) == sorted(map(bytes, theirs))


def test_digits_split_is_stratified():
    """The test split has a fifth of each class, to within one example."""
    digits = data.load("digits")
    train, test = np.bincount(digits.train_labels), np.bincount(digits.test_labels)
    assert len(train) == len(test) == 10
    assert np.all(np.abs(test - (train + test) / 5) <= 1)


def test_digits_are_the_same_on_each_call():
    first, second = data.load("digits"), data.load("digits", data_dir="")
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def test_digits_refuse_a_folder(tmp_path):
    assert error_line(data.load, "digits", data_dir=tmp_path).startswith(f"dataset.data_dir: got {str(tmp_path)!r}")
