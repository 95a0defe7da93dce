"""The whole results page: HTML that needs nothing else, and the sections that only it has."""

import base64
import html.parser
import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from test_results import CLAIM, result, speed_row, write, write_claims

from results import speed, targets, webpage
from results.blocks import Fold, Heading, Table, markdown
from results.drawing import Line, Text, svg
from results.files import as_bytes, write_all
from results.page import render, sections
from results.progress import progress
from results.reading import read
from results.reimplementations import Published
from results.webpage import SYMBOLS, inline

VOID = {"meta", "link", "img", "br", "hr", "input"}
SHAPES = {"polyline", "rect", "circle"}  # of an SVG, which close themselves
MOST_BYTES = 2_000_000


class Reader(html.parser.HTMLParser):
    """Every element with its attributes, and the texts; a wrong nesting is an AssertionError."""

    def __init__(self, content):
        super().__init__(convert_charrefs=True)
        self.open = []
        self.elements = []
        self.texts = []
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in VOID | SHAPES
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def values(self, key):
        """The values of an attribute in all elements."""
        return [attributes[key] for _, attributes in self.elements if key in attributes]

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


@pytest.fixture
def root(tmp_path):
    """A results folder with two claims."""
    root = tmp_path / "results"
    write_claims(root, cifar10=CLAIM, mnist=CLAIM | {"value": 1980.5})
    return root


def page(root):
    return render(root)[root / "index.html"]


def add(root, name, pixels=None, **more):
    """Record a run, with a picture of noise where `pixels` are given."""
    record = result(run=name, **more)
    path = root / f"runs/{record['experiment']}/{name}.json"
    write(path, json.dumps(record))
    if pixels is not None:
        stream = io.BytesIO()
        noise = np.random.default_rng(len(name)).integers(0, 256, (pixels, pixels, 3), np.uint8)
        noise[0, 0] = list(name.encode()[-3:].rjust(3))  # no two runs have the same picture
        Image.fromarray(noise).save(stream, "PNG")
        write(path.with_suffix(".png"), stream.getvalue())
    return path


CURVE = [
    {"images": 0, "seconds": 1.0, "val/bpd": 7.0},
    {"images": 6400, "seconds": 60.0, "val/bpd": 4.1, "train/bpd": 4.0},
    {"images": 12_800, "seconds": 120.0, "val/bpd": 3.95},
    {"images": 19_200, "seconds": 180.0, "val/bpd": 3.71},
]


# HTML


def test_the_page_is_well_formed_and_every_link_inside_it_arrives(root):
    add(root, "a", 40, curve=CURVE, suspect="a <b> & c")
    add(root, "b", papers=[])
    write(root / "benchmarks/glow.json", json.dumps([speed_row("ours")]))
    reader = Reader(page(root))
    ids = reader.values("id")
    assert len(set(ids)) == len(ids)
    links = [target[1:] for target in reader.values("href") if target.startswith("#")]
    assert links
    assert set(links) <= set(ids)
    assert {"flow_cifar10-a", "beside-the-papers", "time-to-target", "speed"} <= set(links)


def test_the_page_loads_nothing_from_elsewhere_and_has_no_script(root):
    add(root, "a", 40, curve=CURVE, wandb_url="https://example.com/run")
    content = page(root)
    reader = Reader(content)
    assert {source.partition(",")[0] for source in reader.values("src")} == {
        "data:image/webp;base64"
    }
    assert not {"script", "iframe", "object", "embed"} & {tag for tag, _ in reader.elements}
    assert [a["href"] for tag, a in reader.elements if tag == "link"] == ["data:,"]
    assert "@import" not in content
    assert "url(" not in content
    assert not [key for _, a in reader.elements for key in a if key.startswith("on")]


def test_texts_are_escaped(root):
    hostile = '<script>alert("1")</script><img src=x onerror=alert(1)>'
    write_claims(root, cifar10=CLAIM | {"dataset": hostile, "row": hostile})
    link = "[here](javascript:alert(1)) [there](https://a.b/c?d=1&e=2)"
    curve = [{"images": k, f"val/{hostile}": 1.0 + k} for k in range(3)]
    add(root, "a", device=hostile, suspect=link, curve=curve, overrides=[hostile])
    reader = Reader(page(root))
    assert "script" not in {tag for tag, _ in reader.elements}
    assert "x" not in reader.values("src")
    assert hostile in reader.text
    assert not [target for target in reader.values("href") if target.startswith("javascript")]
    assert "https://a.b/c?d=1&e=2" in reader.values("href")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("`a<b` and **c** d", "<code>a&lt;b</code> and <strong>c</strong> d"),
        ("*a b* c", "<em>a b</em> c"),
        ("[a](#b)", '<a href="#b">a</a>'),
        ("[a](../b/c.md)", '<a href="../b/c.md">a</a>'),
        ('[a]("onclick=x)', "[a](&#34;onclick=x)"),
        ("[a](data:text/html,b)", "[a](data:text/html,b)"),
        ("see https://a.b/c.", 'see <a href="https://a.b/c">https://a.b/c</a>.'),
        ("`[a](b)` 2 * 3 ** 4", "<code>[a](b)</code> 2 * 3 ** 4"),
    ],
)
def test_marks_in_a_text(text, expected):
    assert inline(text) == expected


def test_a_status_is_told_by_a_sign_and_a_word_and_counted_at_the_top(root):
    add(root, "a", value=3.5)
    content = page(root)
    reader = Reader(content)
    assert "✓ reproduced 1 ○ not run 1" in reader.text
    assert len(set(SYMBOLS.values())) == len(SYMBOLS)
    assert content.count('<span class="status reproduced">') == 4  # top, words, table, run


def test_wide_tables_scroll_in_a_box_that_the_keyboard_reaches(root):
    add(root, "a", curve=CURVE)
    reader = Reader(page(root))
    boxes = [a for tag, a in reader.elements if "scroll" in a.get("class", "").split()]
    tables = [tag for tag, _ in reader.elements if tag == "table"]
    assert len(boxes) >= len(tables) > 2
    assert {box["tabindex"] for box in boxes} == {"0"}
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page(root)


# Pictures and size


def test_a_picture_is_on_the_page_as_a_thumbnail_that_is_made_once(root):
    add(root, "a", 1000)
    files = render(root)
    [path] = [path for path in files if path.suffix == ".webp"]
    with Image.open(io.BytesIO(files[path])) as image:
        assert (image.format, image.size) == ("WEBP", (640, 640))
    encoded = base64.b64encode(files[path]).decode()
    assert encoded in files[root / "index.html"]
    write(path, b"kept")  # as another version of the encoder wrote it
    files = render(root)
    assert files[path] == b"kept"
    assert base64.b64encode(b"kept").decode() in files[root / "index.html"]


def test_a_damaged_picture_is_named_in_one_line(root):
    picture = add(root, "a").with_suffix(".png")
    write(picture, b"nothing")
    with pytest.raises(ValueError, match=r"a\.png is not a readable picture") as error:
        render(root)
    assert "\n" not in str(error.value)


def test_a_page_with_many_pictures_stays_small_and_links_to_the_rest(root, monkeypatch):
    assert webpage.MOST_PICTURE_BYTES < MOST_BYTES
    monkeypatch.setattr(webpage, "MOST_PICTURE_BYTES", 60_000)
    for k in range(12):
        add(root, f"run{k:02}", 100)
    content = page(root)
    sources = Reader(content).values("src")
    inside = [source for source in sources if source.startswith("data:")]
    assert 40_000 < sum(map(len, inside)) < 61_000
    assert len(sources) == 12
    assert {re.sub(r"\d+", "", source) for source in set(sources) - set(inside)} == {
        "runs/flow_cifar/run.png"
    }


def test_the_committed_page_is_at_most_two_megabytes_and_well_formed():
    content = next(content for path, content in render().items() if path.name == "index.html")
    assert len(as_bytes(content)) <= MOST_BYTES
    assert "Beside the papers" in Reader(content).text


# Rows


def test_the_same_files_give_the_same_bytes_and_a_run_that_is_removed_is_gone(root):
    empty = render(root)
    path = add(root, "a", 40, curve=CURVE)
    files = render(root)
    write_all(files)
    assert render(root) == files
    assert "cpu-seed" not in files[root / "index.html"]
    for name in ("README.md", "index.html"):
        assert "3.900" in files[root / name]
        assert "3.900" not in empty[root / name]
    path.unlink()
    assert render(root) == empty


def test_papers_with_a_run_come_before_those_without_and_those_that_nobody_has_started(root):
    for name in ("a", "b"):
        paper = {"title": f"Paper {name}", "arxiv": "1", "claims": {"cifar10": CLAIM}}
        write(root / f"paper/{name}.yaml", json.dumps(paper))
    write(root.parent / "configs/b_cifar10.yaml", "")
    add(root, "run")
    for content in (page(root), render(root)[root / "README.md"]):
        body = content[content.index("</header>" if "<html" in content else "## Beside") :]
        titles = ["A flow", "Paper b", "Papers that nobody has started", "Paper a: 1 claim"]
        places = [body.index(title) for title in titles]
        assert places == sorted(places)


def test_another_protocol_is_said_in_words(root):
    record = result(run="a")
    comparison = {"claim": "flow.cifar10", "metric": "test/bpd", "status": "other protocol"}
    comparison |= {"gap": None, "differences": ["samples: 10,000 here, 50,000 in the paper"]}
    run = record | {"comparisons": [comparison]}
    records = read(root)
    records.runs.append(run)
    lines = markdown(sections(records))
    [row] = [line for line in lines if line.startswith("| [flow_cifar10]")]
    assert "| other protocol |" in row
    assert row.endswith("| samples: 10,000 here, 50,000 in the paper |")


def test_what_a_run_could_not_measure_is_said_with_the_reason(root):
    reason = "the extractor's weights are missing: give metrics.inception_weights=FILE"
    reasons = {"test/fid": reason, "test/recall": f"since {reason}", "test/psnr": "no images"}
    add(root, "a", not_measured=reasons, protocol={"test/kid": {"n": 5}})
    lines = markdown(sections(read(root)))
    assert f"Not measured: test/fid, test/recall, since {reason}" in lines
    assert "Not measured: test/psnr, since no images" in lines
    assert "* test/kid: n 5" in lines


def test_quality_of_samples_stands_beside_its_protocol(root):
    facts = {"n": 50_000, "temperature": 0.9, "reference": "train", "reference_n": 45_000}
    metrics = {"test/bpd": 3.9, "test/fid": 46.123, "test/kid": 0.0312}
    metrics |= {"test/recall": 0.25}
    protocol = {"test/fid": facts, "test/kid": facts, "test/recall": facts | {"n": 10_000}}
    add(root, "a", metrics=metrics, protocol=protocol)
    add(root, "b")
    lines = markdown(sections(read(root)))
    start = lines.index("## Quality of samples")
    rows = [line for line in lines[start : start + 8] if line.startswith("| [")]
    figures = "46.12 | 0.0312 | - | - | 0.25 (n=10,000) | 50,000 | 0.9 | train | 45,000 | - | - |"
    assert rows == [f"| [flow_cifar10/a](#flow_cifar10-a) | {figures}"]


# Time to target


def test_time_to_target_is_that_of_the_first_validation_below_it(root):
    add(root, "a", curve=CURVE)
    add(root, "b", curve=CURVE[:3], device="a GPU")
    faster = [row | {"seconds": row["seconds"] / 2} for row in CURVE]
    add(root, "c", curve=faster, config={"data": {"name": "cifar10", "n_bits": 5}})
    below = {"images": 25_600, "seconds": 240.0, "val/bpd": 3.7}
    limited = {"data": {"name": "cifar10"}, "trainer": {"limit_val_batches": 4}}
    add(root, "d", curve=[*CURVE, below], config=limited)
    start = {"model": "a", "experiment": "flow_cifar10", "commit": None, "sha256": "0" * 64}
    add(root, "e", curve=[*CURVE, below], init_from=start)
    [table] = [block for block in targets.section(read(root)) if isinstance(block, Table)]
    assert table.columns[-5:] == ["4.00", "3.70", "3.49", "3.39", "3.35"]
    assert [row[0].partition("]")[0] for row in table.rows] == [
        "[flow_cifar10/d",
        "[flow_cifar10/a",
        "[flow_cifar10/b",
    ]
    assert table.rows[0][0].endswith("(validated on a part of the split)")
    assert table.rows[0][-5:-3] == ["12.8 k images, 2.0 min", "25.6 k images, 4.0 min"]
    assert table.rows[2][-5:] == ["12.8 k images, 2.0 min", *"----"]
    assert targets.section(read(root.parent / "nothing")) == []


# The chart of a claim


def test_a_chart_has_all_runs_the_papers_line_and_published_points():
    runs = [{"run": name, "curve": CURVE} for name in ("seed0", 50 * "x")]
    runs.append({"run": "no curve"})
    picture = progress(runs, CLAIM, [Published(1e6, 3.6, "another implementation")])
    texts = [shape.content for shape in picture.shapes if isinstance(shape, Text)]
    assert {"seed0", "paper 3.49", "10 k", "1 M", "another implementation"} <= set(texts)
    assert f"{41 * 'x'}…" in texts
    assert "no curve" not in texts
    assert sum(shape.dashed for shape in picture.shapes if isinstance(shape, Line)) == 1
    places = [shape.place for shape in picture.shapes if isinstance(shape, Text)]
    assert all(0 <= x <= picture.width and 0 <= y <= picture.height for x, y in places)
    assert "nan" not in svg(picture)
    assert progress(runs[2:], CLAIM) is None


# Speed


def test_of_each_setting_on_a_kind_of_machine_the_newest_is_shown_the_others_are_behind():
    def file(date, threads, *settings):
        row = speed_row("ours") | {"machine": f"a CPU, {threads} threads", "date": date}
        return [row | {"setting": setting} for setting in settings]

    files = {
        "glow-a": file("2026-11-26T10:00:00", 2, "K8 B16", "K32 B16"),
        "glow-b": file("2026-11-27T10:00:00", 1, "K8 B16"),
        "glow-c": file("2026-11-25T10:00:00", 1, "K32 B16"),
        "realnvp": file("2026-11-20T10:00:00", 1, "K8 B16"),
    }
    assert speed.newest(files) == {
        ("glow", "K32 B16"): "glow-a",
        ("glow", "K8 B16"): "glow-b",
        ("realnvp", "K8 B16"): "realnvp",
    }
    heading, table, fold = speed.machine_part("a CPU", files)
    assert heading == Heading("a CPU", 3)
    assert [row[0] for row in table.rows] == [
        "glow K32 B16, 2 threads",
        "glow K8 B16, 1 thread",
        "realnvp K8 B16, 1 thread",
    ]
    assert isinstance(fold, Fold)
    assert fold.title == "All columns of these 3 measurements, and 1 older"
    assert sum(isinstance(block, Table) for block in fold.blocks) == 4


def test_rows_without_a_time_are_behind_the_table():
    rows = [speed_row("ours"), speed_row("ours", "bf16", step=None, sampling=None)]
    _, table, fold = speed.machine_part("a CPU", {"glow": rows})
    assert [row[2] for row in table.rows] == ["float32"]
    assert [row[1] for row in fold.blocks[1].rows] == ["float32", "bf16"]
