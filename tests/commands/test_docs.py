"""Everything that the documentation points to exists: files, headings, commands and flags, configs and fields."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import smallbatch_jax
from smallbatch_jax.config import overrides

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "notebooks/results/README.md",
]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PYTHON = re.compile(r"```python\n(.*?)```", re.S)
STORED = {"quickstart": "digits/fig08", "fig01_small": "cifar10/fig01"}  # workdirs that a page's commands would have trained
NOT_A_VALUE = re.compile(r"[…\[\]<>]|DIR|ROOT|NAME|FILE")  # placeholders that a reader replaces

ids = {"ids": lambda path: str(path.relative_to(ROOT))}


def anchors(page):
    """Returns the fragments of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(text):
    """Returns the targets of links and pictures that are not on the web."""
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:", target)]


def commands(text):
    """Yields (script, arguments) of a page's commands of experiments/ and benchmarks/, lines joined, without comments."""
    code = [*re.findall(r"```\w*\n(.*?)```", text, re.S), *re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)]
    code += re.findall(r"^ {4}(.*(?:\\\n.*)*)$", text, re.M)
    for block in code:
        for line in block.replace("\\\n", " ").split("\n"):
            for found in re.finditer(r"(?:python )?(?:experiments|benchmarks)/(\w+)\.py([^;&|]*)", line):
                if line[: found.start() + 7].rstrip().endswith("python") or not line[: found.start()].strip():
                    yield found[1], re.findall(r"""--[\w.]+(?:=(?:"[^"]*"|[^\s"\]]+))?""", found[2].partition("#")[0])


def file_of(script):
    """Returns the path of a script of benchmarks/ or experiments/."""
    timed = ROOT / "benchmarks" / f"{script}.py"
    return timed if timed.is_file() else ROOT / "experiments" / f"{script}.py"


def flags_of(script):
    """Returns the names of the flags that a script defines itself or imports with modules of experiments/."""
    text = file_of(script).read_text()
    own = re.findall(r'DEFINE_\w+\(\s*"(\w+)"', text)
    own += [f"no{name}" for name in re.findall(r'DEFINE_bool\(\s*"(\w+)"', text)]
    own += ["config"] * ("define_config_flag()" in text)
    others = {"distributed", "training"} & set(re.findall(r"^import (\w+)", text, re.M))
    return {"help", *own, *(flag for other in others for flag in flags_of(other))}


def mistakes(script, arguments):
    """Returns what is wrong with a command line of the documentation."""
    if not file_of(script).is_file():
        return [f"experiments/{script}.py is not there"]
    found, known = [], flags_of(script)
    for argument in arguments:
        name, _, value = argument.removeprefix("--").partition("=")
        if name.startswith("config.") and "config" in known and name != "config.FIELD":
            if name.removeprefix("config.") not in overrides.FIELDS:
                found.append(f"{name}: unknown field")
        elif name.partition(".")[0] not in known:
            found.append(f"{script}.py has no flag --{name}")
        elif name == "config" and value and not NOT_A_VALUE.search(value) and not (ROOT / value).is_file():
            found.append(f"--config={value} is not there")
    return found


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], **ids)
def test_every_relative_link_leads_to_a_file_and_a_heading_of_it(page):
    for target in links(page.read_text()):
        path, _, fragment = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not fragment or fragment in anchors(file), target


@pytest.mark.parametrize("page", PAGES, **ids)
def test_every_command_line_names_a_script_flags_and_a_config_that_are_there(page):
    assert [wrong for script, arguments in commands(page.read_text()) for wrong in mistakes(script, arguments)] == []


def test_commands_are_found_in_blocks_tables_and_over_several_lines():
    text = (
        "```bash\npip install x && python experiments/a.py --b \\\n    --c=1  # why\n```\n| `python experiments/d.py [--e]` |\n"
    )
    assert list(commands(text)) == [("a", ["--b", "--c=1"]), ("d", ["--e"])]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("nothing --workdir=x", "experiments/nothing.py is not there"),
        ("sweep --worldir=x", "sweep.py has no flag --worldir"),
        ("claims --config=configs/quickstart.py", "claims.py has no flag --config"),
        ("sweep --config=configs/fig99.py", "--config=configs/fig99.py is not there"),
        ("sweep --config.epoch=2", "epoch: unknown field"),
    ],
)
def test_a_planted_mistake_is_found(command, said):
    script, *arguments = command.split()
    assert said in " ".join(mistakes(script, arguments))


def packages_of(root):
    """Returns the module names of each package of a tree by dotted name, "top level" for the root."""
    found = {}
    for init in root.rglob("__init__.py"):
        folder = init.parent
        name = ".".join(folder.relative_to(root).parts) or "top level"
        found[name] = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    return found


def packages_on_the_map(text):
    """Returns the rows of CONTRIBUTING's map in the form of `packages_of`."""
    rows = re.findall(r"^\| (`[\w.]+`|top level) \| (.*) \|$", text.partition("## Map of")[2], re.M)
    return {package.strip("`"): set(re.findall(r"`(\w+)`", modules)) for package, modules in rows}


def test_the_map_names_every_package_and_module_and_nothing_else():
    there = {name: modules for name, modules in packages_of(ROOT / "smallbatch_jax").items() if modules}
    assert packages_on_the_map((ROOT / "CONTRIBUTING.md").read_text()) == there


def test_a_map_that_lacks_or_invents_a_module_differs(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("__init__.py", "optim.py", "data/__init__.py", "data/order.py"):
        (tmp_path / name).touch()
    text = (
        "## Map of x\n\n| package | modules |\n|---|---|\n| `data` | `order`: of examples |\n| top level | `optim`: Eq. 2 |\n"
    )
    assert packages_on_the_map(text) == packages_of(tmp_path)
    assert packages_on_the_map(text.replace("`order`", "`mirrors`")) != packages_of(tmp_path)


def test_contributing_names_files_that_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for name in re.findall(r"`((?:\w+/)*\w+\.py|(?:\w+/)+)`", text):
        assert any((base / name).exists() for base in (ROOT, ROOT / "smallbatch_jax")) or name == "__init__.py", name


def test_every_public_name_has_a_page_of_its_module_in_the_api_reference():
    pages = {path.stem: path.read_text() for path in (ROOT / "docs/api").glob("*.md")}
    modules = smallbatch_jax._PUBLIC | smallbatch_jax._FUNCTIONS
    assert [name for name in modules if f"::: smallbatch_jax.{modules[name]}\n" not in pages.get(name, "")] == []


def test_the_site_lists_every_page_once():
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    pages = [str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(re.findall(r"[\w/]+\.md\b", nav)) == sorted(["index.md", *pages])


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if PYTHON.search(page.read_text())], **ids)
def test_the_python_of_a_page_runs_from_top_to_bottom(page, tmp_path):
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    (tmp_path / "runs").mkdir()
    for name, stored in STORED.items():
        (tmp_path / "runs" / name).symlink_to(ROOT / "notebooks/results" / stored)
    (tmp_path / "page.py").write_text("\n".join(PYTHON.findall(page.read_text())))
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    options = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": path}, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "page.py"], timeout=900, **options)
    assert done.returncode == 0, done.stderr[-2000:]
