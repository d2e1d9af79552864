"""The report says what the results say, stands alone, and is written whole or not."""

import html.parser
import itertools
import json
import math
import os
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from kvjax.evaluation.compare_rows import Row
from kvjax.evaluation.kept_tokens import Kept
from kvjax.evaluation.statistics import Interval, wilson
from kvjax.report import documents, html_page, pictures
from kvjax.report import table as report_table
from kvjax.report.figures import compare


def make_row(name, *, read, hits, lost=0.1, kl=0.2, **more):
    return Row(
        method=name,
        bytes_read=read,
        bytes_measured=0.75 * read,
        bytes_held=2 * read,
        kl=Interval(kl, kl / 2, 2 * kl, 3),
        kl_p99=Interval(10 * kl, 5 * kl, math.inf, 3),
        tokens_before_difference=Interval(7.2, 3.4, 12.6, 3),
        perplexity=Interval(7.1234, 6.0, 8.0, 3),
        nats_lost=Interval(lost, lost - 0.05, lost + 0.05, 3),
        passkey=wilson(hits, 4),
        multikey=wilson(4 - hits, 4),
        chain=Interval(0.35, 0.2, 0.5, 4),
        chain_links=5,
        passkey_by_depth=((0.0, hits // 2, 2), (1.0, hits - hits // 2, 2)),
        multikey_by_depth=((0.0, 1, 2), (1.0, 0, 2)),
        top1_agreement=Interval(0.5, -math.inf, math.inf, 1),
        output_error=Interval(0.0123, 0.01, 0.0146, 3),
        dropped_mass=Interval(0.00456, -math.inf, math.inf, 1),
        support=Interval(0.75, 0.7, 0.8, 3),
        proved_exact=Interval(0.125, 0.1, 0.15, 3),
        full_steps=Interval(0.2, 0.2, 0.2, 3),
        tokens_per_second=1234.5,
        prefill_seconds=0.25,
    )._replace(**more)


ROWS = [
    make_row("full", read=64 * 1024, hits=4, kl=0.0),
    make_row("quest:budget=<32>", read=16 * 1024, hits=1),
]
SETTINGS = {"context": 512, "new_tokens": 16, "examples": 4, "windows": 3, "batch": 2}


@pytest.fixture(scope="module")
def results():
    about = documents.manifest(
        version="1.2.3",
        model="some model",
        arguments=["compare", "--budget", "32"],
        settings=SETTINGS,
    )
    held = [np.array([0, 1]), np.array([0, 3]), np.array([0, 5])]
    kept = [Kept("streaming_llm:budget=2", [2, 4, 6], held, layer=3, head=0)]
    return documents.results(ROWS, about, kept)


@pytest.fixture(scope="module")
def page(results):
    return html_page.html(results)


class Reader(html.parser.HTMLParser):
    """Collects the table's cells, and whatever a page would load."""

    def __init__(self):
        super().__init__()
        self.cells, self.loads, self.open = [], [], None

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag in ("script", "link", "img", "iframe"):
            self.loads.append(tag)
        for key in ("src", "href", "xlink:href"):
            if not attributes.get(key, "#").startswith(("#", "data:")):
                self.loads.append(attributes[key])
        if tag == "td":
            self.cells.append("")
            self.open = tag

    def handle_endtag(self, tag):
        if tag == "td":
            self.open = None

    def handle_data(self, data):
        if self.open:
            self.cells[-1] += data


def test_results_are_json_without_infinities(results):
    again = json.loads(json.dumps(results, allow_nan=False))
    assert again["format"] == documents.FORMAT
    assert again["rows"][0]["top1_agreement"] == {
        "mean": 0.5,
        "low": None,
        "high": None,
        "n": 1,
    }
    assert again["rows"][1]["passkey_by_depth"][1] == {
        "depth": 1.0,
        "correct": 1,
        "asked": 2,
    }


def test_the_manifest_can_be_run_again(results):
    about = results["manifest"]
    assert about["kvjax"] == "1.2.3"
    assert about["arguments"] == ["compare", "--budget", "32"]
    assert about["settings"] == SETTINGS
    assert about["backend"] == "cpu"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", about["date"])
    assert re.match(r"0\.\d+", about["jax"])


def test_the_page_holds_the_table_and_loads_nothing(page, results):
    reader = Reader()
    reader.feed(page)
    assert reader.loads == []
    sheets = report_table.sheets(results)
    assert reader.cells == [x for sheet in sheets for row in sheet.rows for x in row]
    assert reader.cells[-7:-4] == ["16.0 KiB", "12.0 KiB", "0.012 [0.01, 0.015]"]
    assert reader.cells[-4:] == ["0.0046", "75% [70, 80]", "12.5%", "20%"]
    assert "quest:budget=<32>" in reader.cells  # escaped, so it survives
    assert "url(http" not in page


def test_the_tables_numbers(results):
    predicted, answered, attention = report_table.sheets(results)
    assert dict(zip(predicted.headings, predicted.rows[0], strict=True)) == {
        **dict.fromkeys(predicted.headings, "-"),
        "method": "full",
        "read / token": "64.0 KiB",
        "held": "128 KiB",
        "perplexity": "7.123",
    }
    assert dict(zip(predicted.headings, predicted.rows[1], strict=True)) == {
        "method": "quest:budget=<32>",
        "read / token": "16.0 KiB",
        "held": "32.0 KiB",
        "KL": "0.2 [0.1, 0.4]",
        "KL p99": "2 [1, ∞)",
        "top-1": "50%",
        "same tokens": "7 [3, 13]",
        "perplexity": "7.123",
        "nats lost": "+0.100 ±0.050",
    }
    headings = list(predicted.headings)
    kl_first = ["KL", "KL p99", "top-1", "same tokens", "perplexity"]
    assert headings[3:8] == kl_first
    assert dict(zip(answered.headings, answered.rows[1], strict=True)) == {
        "method": "quest:budget=<32>",
        "read / token": "16.0 KiB",
        "passkey": "25% [5, 70]",
        "multi-key": "75% [30, 95]",
        "chain": "35% [20, 50]",
        "tokens/s": "1,234",
        "prefill s": "0.25",
    }
    assert len(attention.headings) == len(attention.rows[1]) == 8


def test_the_host_has_columns_where_a_row_has_something_there(results):
    away = make_row(
        "offload+quest",
        read=2**14,
        hits=2,
        bytes_in_host=2**20,
        bytes_moved=1536.0,
        pages_found=Interval(0.9, 0.85, 0.95, 3),
    )
    made = documents.results([*ROWS, away], results["manifest"])
    predicted, _, attention = report_table.sheets(made)
    found = dict(zip(predicted.headings, predicted.rows[2], strict=True))
    assert (found["held"], found["in host"]) == ("32.0 KiB", "1.00 MiB")
    assert predicted.headings[2:4] == ("held", "in host")
    assert "In host: held in the host's memory" in predicted.caption
    found = dict(zip(attention.headings, attention.rows[2], strict=True))
    assert (found["over the link"], found["found"]) == ("1.50 KiB", "90% [85, 95]")
    assert "Over the link: the keys and values that came" in attention.caption
    quest = dict(zip(attention.headings, attention.rows[1], strict=True))
    assert (quest["over the link"], quest["found"]) == ("-", "-")
    for sheet in report_table.sheets(results):
        assert not {"in host", "over the link", "found"} & set(sheet.headings)
        assert "host" not in sheet.caption


def test_a_prompt_that_is_read_in_part_has_a_column(results):
    part = make_row("critiprefill+full", read=2**14, hits=2, prompt_share=0.404)
    made = documents.results([*ROWS, part], results["manifest"])
    answered = report_table.sheets(made)[1]
    cells = dict(zip(answered.headings, answered.rows[2], strict=True))
    assert cells["prompt pairs"] == "40%"
    assert answered.rows[1][answered.headings.index("prompt pairs")] == "-"
    assert "Prompt pairs: of a prompt's query-key pairs" in answered.caption
    for sheet in report_table.sheets(results):
        assert "prompt pairs" not in sheet.headings
        assert "Prompt pairs" not in sheet.caption


def test_figures_are_svg_that_parses_and_shows_every_method(results):
    layouts = compare.BROAD, compare.NARROW, compare.COLUMN
    scatters = [compare.scatter(results, layout=layout) for layout in layouts]
    for figure in (*scatters, compare.needles(results)):
        text = pictures.svg(figure)
        root = ElementTree.fromstring(text)
        assert root.tag.endswith("svg")
        said = "".join(root.itertext())
        assert "full" in said
        assert "quest:budget=<32>" in said


def test_what_is_held_is_drawn_if_there_is_any(page, results):
    assert page.count("<h2>What is held</h2>") == 1
    assert "streaming_llm:budget=2: 2 of 6 tokens" in page
    assert results["kept"][0]["positions"] == [[0, 1], [0, 3], [0, 5]]
    assert "What is held" not in html_page.html(results | {"kept": []})


def test_the_heat_map_shows_the_counts_at_their_depths(results):
    figure = compare.needles(results)
    axis = figure.axes[0]
    shown = {text.get_position(): text.get_text() for text in axis.texts}
    expected = {(0, 0): "2/2", (1, 0): "2/2", (0, 1): "0/2", (1, 1): "1/2"}
    assert shown == {(x + 0.5, y + 0.5): text for (x, y), text in expected.items()}
    assert axis.get_ylim() == (2, 0)  # the first method on top
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0%", "100%"]
    assert axis.collections[0].get_array().tolist() == [[1.0, 1.0], [0.0, 0.5]]


def test_the_scatter_has_each_method_at_its_bytes_and_accuracy(results):
    axes = compare.scatter(results, compare.answered(results)).axes
    points = [
        [tuple(map(float, bars[0].get_xydata()[0])) for bars in axis.containers]
        for axis in axes
    ]
    assert points == [
        [(64.0, 1.0), (16.0, 0.25)],
        [(64.0, 0.0), (16.0, 0.75)],
        [(64.0, 0.35), (16.0, 0.35)],
    ]


def drawn(results, names, *, read=None, hits=2, layout=compare.BROAD):
    rows = [
        make_row(name, read=(read or [2**14] * len(names))[i], hits=hits)
        for i, name in enumerate(names)
    ]
    made = documents.results(rows, results["manifest"])
    figure = compare.scatter(made, layout=layout)
    figure.draw_without_rendering()
    return figure


def looks(figure):
    """Colour and marker of the rows of the first panel, in the order drawn."""
    bars = [container[0] for container in figure.axes[0].containers]
    return [(line.get_color(), line.get_marker()) for line in bars]


def test_a_comparison_of_an_earlier_format_has_the_columns_it_can(results):
    old = {"kl_p99", "tokens_before_difference"}
    rows = [
        {name: value for name, value in row.items() if name not in old}
        for row in results["rows"]
    ]
    sheets = report_table.sheets(results | {"rows": rows})
    headings = sheets[0].headings
    assert "KL" in headings
    assert not {"KL p99", "same tokens"} & set(headings)
    assert "p99" not in sheets[0].caption
    assert html_page.html(results | {"rows": rows})


def test_one_of_a_kind_is_named_so(results):
    about = results["manifest"]
    few = {"windows": 1, "examples": 1, "batch": 1}
    about = about | {"settings": about["settings"] | few}
    sheets = report_table.sheets(results | {"manifest": about})
    captions = " ".join(sheet.caption for sheet in sheets)
    for said in ("1 window of", "1 example a", "1 row together"):
        assert said in captions


def test_both_times_of_asking_have_columns_and_panels(results):
    rows = [
        make_row(name, read=2**14, hits=2, chain_after=wilson(1, 4))
        for name in ("full", "quest")
    ]
    about = results["manifest"]
    about = about | {"settings": about["settings"] | {"question": "both"}}
    made = documents.results(rows, about)
    answered = report_table.sheets(made)[1]
    assert answered.headings[2:6] == ("passkey", "multi-key", "chain", "chain, after")
    assert answered.rows[1][5] == "25% [5, 70]"
    assert "after: they come once it has" in answered.caption
    titles = [axis.get_title() for axis in compare.scatter(made).axes]
    assert titles[1:] == [
        *("pass key", "one key of many", "chain before a mistake"),
        "chain before a mistake, after",
    ]
    assert made["pareto"]["chain_after"] == ["full", "quest"]


def test_methods_differ_in_colour_and_shape_however_many(results):
    names = ["full", *(f"method_{i}:budget=64" for i in range(40))]
    figure = drawn(results, names)
    found = looks(figure)
    assert len(set(found)) == len(names)
    assert len({colour for colour, _ in found[:9]}) == 9
    hollow = [c[0].get_markerfacecolor() == "white" for c in figure.axes[0].containers]
    assert hollow == [False] * 9 + ([True] * 8 + [False] * 8) * 2
    for (colour, marker), (after, shape) in itertools.pairwise(found):
        assert colour != after
        assert marker != shape


def test_a_line_goes_through_the_budgets_of_a_method(results):
    names = ["full", "quest:budget=128", "h2o:budget=64", "quest:budget=64"]
    names += ["quest:budget=128,page_size=8"]
    read = [2**16, 2**14, 2**13, 2**13, 2**14]
    figure = drawn(results, names, read=read)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [
        *("Pareto front", "full", "quest", "h2o at 64", "quest:page_size=8 at 128"),
    ]
    _, quest, again, h2o, other = looks(figure)  # a method's rows by bytes
    assert quest == again
    assert len({quest, h2o, other}) == 3
    solid = [line for line in figure.axes[0].lines if line.get_linestyle() == "-"]
    (line,) = (line for line in solid if len(line.get_xdata()) == 2)
    assert list(line.get_xdata()) == [8, 16]
    assert line.get_color() == quest[0]


@pytest.mark.parametrize("layout", [compare.BROAD, compare.NARROW])
def test_markers_never_cover_each_other(results, layout):
    names = ["full", *(f"m{i}" for i in range(15))]
    figure = drawn(results, names, hits=4, layout=layout)
    for axis in figure.axes:
        lines = [container[0] for container in axis.containers]
        places = [
            line.get_transform().transform(line.get_xydata())[0] for line in lines
        ]
        points = [place * 72 / figure.dpi for place in places]
        nearest = min(math.dist(a, b) for a, b in itertools.combinations(points, 2))
        assert nearest > layout.marker
        # Aside, not elsewhere: the value is where it was.
        assert len({tuple(line.get_xydata()[0]) for line in lines}) == 1


def test_the_figure_is_saved_beside_the_report(tmp_path, results):
    html_page.write(tmp_path, results)
    begins = {"svg": b"<?xml", "pdf": b"%PDF-", "png": b"\x89PNG"}
    measures = {"accuracy": compare.answered(results), "kl": ["kl"]}
    for (name, panels), (kind, begin) in itertools.product(
        measures.items(), begins.items()
    ):
        data = (tmp_path / f"{name}-by-bytes.{kind}").read_bytes()
        assert data.startswith(begin)
        figure = compare.scatter(results, panels, layout=compare.COLUMN)
        assert data == pictures.drawn(figure, kind)
    html_page.begin(tmp_path, results)
    assert os.listdir(tmp_path) == ["results.json"]


def test_the_same_results_make_the_same_page(page, results):
    assert html_page.html(results) == page


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (98304, "96.0 KiB"),
        (5 * 1024**2, "5.00 MiB"),
        (300 * 1024**3, "300 GiB"),
    ],
)
def test_bytes_in_binary_units(count, text):
    assert report_table.format_bytes(count) == text


def test_both_files_are_written_and_replaced(tmp_path, results):
    (tmp_path / "report.html").write_text("old")
    page, data = html_page.write(tmp_path, results)
    assert page.read_text("utf-8").startswith("<!doctype html>")
    assert json.loads(data.read_text("utf-8")) == results
    names = {path.name for path in tmp_path.iterdir()}
    assert {name for name in names if "-by-bytes." not in name} == {
        *("report.html", "results.json", "results.csv", "results.parquet")
    }
    assert page.stat().st_mode & 0o777 == 0o644


def test_the_terminal_table_has_every_cell(results, capsys):
    report_table.print_table(results)
    out = capsys.readouterr().out
    for sheet in report_table.sheets(results):
        for cell in sheet.rows[1]:
            assert cell in out
    said = " ".join(out.split())
    assert "KL: quest:budget=<32>, full" in said  # who reads least for it
    assert "512 tokens" in said
    assert "links of 5" in said


def test_a_section_that_was_cut_off_before_its_first_row_is_not_shown(results, capsys):
    cut = {**results, "rows": [], "complete": False}
    page = html_page.html(results | {"sections": [cut]})
    assert page.count("<h1>") == 1
    report_table.print_table(results)
    alone = capsys.readouterr().out
    report_table.print_table(results | {"sections": [cut]})
    assert capsys.readouterr().out == alone


SHARE = {"mean": 0.5, "low": 0.25, "high": 0.75, "n": 4}


def print_task(capsys, **document):
    report_table.print_task(
        {"task": "t", "method": "m", "context": 99, "n": 4, **document}
    )
    return capsys.readouterr().out.splitlines()


def test_a_chains_result_says_how_often_how_far(capsys):
    scores = [0.0, 0.5, 0.5, 1.0]
    examples = [{"score": score} for score in scores]
    out = print_task(capsys, valid_prefix=SHARE, links=2, examples=examples)
    assert out == [
        "t, m, context 99: mean valid prefix 50% [25, 75], n=4",
        "  0 of 2 links: 1",
        "  1 of 2 links: 2",
        "  2 of 2 links: 1",
    ]


def test_a_perplexity_comes_with_bits_per_byte(capsys):
    perplexity = {"mean": 7.0, "low": 6.0, "high": 8.0, "n": 4}
    bits = {"mean": 2.0, "low": -math.inf, "high": math.inf, "n": 1}
    (line,) = print_task(capsys, perplexity=perplexity, bits_per_byte=bits)
    assert line.endswith(
        "perplexity 7.000 [6.000, 8.000], 2.000 bits per byte, n=4 windows"
    )
    perplexity = {"mean": 7.0, "low": 0.0, "high": math.inf, "n": 1}
    (line,) = print_task(capsys, perplexity=perplexity, bits_per_byte=bits)
    assert line.endswith("perplexity 7.000, 2.000 bits per byte, n=4 windows")


def test_the_page_knows_narrow_screens_and_dark_ones(page):
    style = page[page.index("<style>") : page.index("</style>")]
    assert "prefers-color-scheme: dark" in style
    assert "position: sticky" in style
    assert page.count('<div class="wide') == page.count("<table>") + page.count("<svg")
    # No colour is set but by a name that the dark page gives another value.
    named = re.findall(r"(?<!-)(?:color|background): ([^;]+);", style)
    assert named
    assert all(value.startswith("var(--") for value in named)
    # A long name breaks where its parts end.
    assert "quest:<wbr>budget=&lt;32&gt;" in page


@pytest.mark.parametrize("count", [3, 17])
def test_figures_of_a_column_can_be_read(results, count):
    names = ["full", *(f"method_{i}:budget={b}" for i in range(count) for b in (64, 8))]
    rows = [make_row(name, read=2**12 + 64 * i, hits=3) for i, name in enumerate(names)]
    made = documents.results(rows, results["manifest"])
    for measures in (["kl"], compare.answered(made)):
        figure = compare.scatter(made, measures, layout=compare.COLUMN)
        figure.draw_without_rendering()
        width, height = figure.get_size_inches()
        assert width == 3.3
        assert height < 9
        for text in figure.findobj(lambda x: hasattr(x, "get_fontsize")):
            assert text.get_fontsize() >= 7 or not text.get_text(), text
        box = figure.bbox
        legend = figure.legends[0].get_window_extent()
        assert legend.x0 >= box.x0 - 1
        assert legend.x1 <= box.x1 + 1
        for axis in figure.axes:
            panel = axis.get_window_extent()
            assert panel.width >= 70 * figure.dpi / 72
            assert panel.height >= 45 * figure.dpi / 72
            assert legend.y1 <= panel.y0
