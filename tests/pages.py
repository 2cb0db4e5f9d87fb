"""Pages of the report and the workdirs that they show, for the tests of the report."""

import html.parser
import json

import tiny

from smallbatch_jax.store import workdir
from smallbatch_jax.store.results import ProgramResults, Row


class Parts(html.parser.HTMLParser):
    """The elements of a page with their attributes, its visible text, and its scripts."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.text, self.scripts, self._open = [], "", [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._open = tag
        if tag == "script":
            self.scripts.append([dict(attrs), ""])

    def handle_endtag(self, tag):
        self._open = ""

    def handle_data(self, data):
        if self._open == "script":
            self.scripts[-1][1] += data
        elif self._open != "style":
            self.text += data

    def script(self, attribute, value="study0"):
        (found,) = [content for attrs, content in self.scripts if attribute in attrs and attrs[attribute] == value]
        return found


def data_of(parts, identity="study0"):
    return json.loads(parts.script("data-study", identity))


def store(path, rows, **fields):
    """Writes a workdir of two batch sizes with one base_lr and 3 epochs; `rows` are (batch size, epoch). Returns its path."""
    experiment = tiny.grid(name="mine", batch_sizes=(2, 4), base_lrs=(2**-6,), **fields)
    with workdir.open_workdir(path, experiment, {"num_classes": 3, "examples": [50, 20]}) as folder:
        for m in (2, 4):
            with ProgramResults(folder, m, m) as program:
                program.append(Row(m, m, 2**-6, 0, e, 50 // m * e, 0.5, 0.8, 0.5, 0.9) for size, e in rows if size == m)
    return folder
