"""Settings and fixtures shared by all tests; the settings are made before any JAX backend starts."""

import atexit
import gc
import os
import shutil
import tempfile
from pathlib import Path

# One cache of compiled programs for the whole session: this process, pytest-xdist's workers and the commands that tests start.
# Most tests train the same few tiny programs; JAX finds one in the cache only if every compiler flag is the same.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    CACHE = tempfile.mkdtemp(prefix="smallbatch_compiled_")
    atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": CACHE, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

import jax
import pytest
from pictures import GREEN, RED, error_line, load, save
from PIL import Image

from smallbatch_jax.data import decode
from smallbatch_jax.program import jax_flags
from smallbatch_jax.program.devices import use_all_cores

use_all_cores()  # it sets compiler flags, so that results in this process equal those of the commands
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Tests compile many programs and run each for a few steps only, so LLVM does not optimise the loops: a fifth less time.
UNOPTIMIZED = "jax_disable_most_optimizations"
jax.config.update(UNOPTIMIZED, True)
jax_flags.HELD[UNOPTIMIZED] = True

gc.freeze()  # tracing makes so many objects that the default thresholds would scan all of JAX's modules every second
gc.set_threshold(50_000, 20, 100)


def pytest_collectreport(report):
    """Ends the session at a file that cannot be imported, which pytest-xdist would report only after all other tests."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        pytest.exit(report.longreprtext, returncode=2)


@pytest.fixture(scope="module")
def optimized():
    """Compiles programs as users' are, for a module that compares different programs bit for bit."""
    jax_flags.HELD[UNOPTIMIZED] = False
    jax.config.update(UNOPTIMIZED, False)
    yield
    jax.config.update(UNOPTIMIZED, True)
    jax_flags.HELD[UNOPTIMIZED] = True


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    """Returns a cache directory of the test's own, so that the user's is left alone."""
    monkeypatch.setenv("SMALLBATCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path):
    """Returns a folder of two classes with three training and two test pictures each: RGB PNGs, 6 wide and 4 high."""
    root = tmp_path / "pictures"
    for split, count in (("train", 3), ("test", 2)):
        for name, colour in (("cat", RED), ("dog", GREEN)):
            for i in range(count):
                save(root / split / name / f"{i}.png", Image.new("RGB", (6, 4), (*colour[:2], i)))
    return root


@pytest.fixture
def load_one(tmp_path):
    """Returns a function that loads a folder with the given bytes as its training picture: the picture, or the error's line."""
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


@pytest.fixture
def decoded_files(monkeypatch):
    """Returns a list to which the path of every decoded picture is appended."""
    seen = []
    real = decode._decode_image
    monkeypatch.setattr(decode, "_decode_image", lambda path: seen.append(path) or real(path))
    return seen


@pytest.fixture
def forbidden():
    """Yields a folder that every user can reach, while this process runs without root's permissions."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root ignores file permissions
    yield folder
    os.seteuid(user)
    shutil.rmtree(folder)
