"""The report of a sweep: its numbers against those counted from the lines, its parts, and unfinished sweeps."""

import base64
import dataclasses
import html.parser
import pathlib
import re

import numpy as np
import pytest
import scipy.stats
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from restkv_jax.commands.cli import main
from restkv_jax.evaluate.combining import combine
from restkv_jax.evaluate.example import plot_example
from restkv_jax.evaluate.grid import CacheConfig, Grid, cache_configs
from restkv_jax.evaluate.report import write_report
from restkv_jax.evaluate.report.page import missing_prompts, rerun_command
from restkv_jax.evaluate.report.plots import FULL_COLOR, plot_accuracy, plot_costs, plot_needle_map
from restkv_jax.evaluate.report.summary import (
    Pair,
    Scenario,
    collect,
    compare,
    estimate,
    rank_within,
    variants,
)
from restkv_jax.evaluate.report.units import BYTES, SECONDS, text_of
from restkv_jax.evaluate.results import (
    Cost,
    Costs,
    File,
    LayerErrors,
    PromptId,
    PromptResult,
    Rate,
    line_text,
    open_sweep,
    read_lines,
    read_results,
    results_path,
    write_costs,
    write_errors,
)

GRID = Grid(
    tasks=("single", "multivalue"),
    methods=("full", "restkv", "snapkv", "restkv(temporal=mean)"),
    budgets=("5%", "64"),
    lengths=(256, 512),
    depths=(0.0, 0.5, 1.0),
    prompts=12,
)
SMALL = Grid(tasks=("single",), methods=("restkv",), budgets=("64",), lengths=(256,), prompts=3)
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
CHANCES = {"full": 0.95, "restkv": 0.8, "snapkv": 0.3, "restkv(temporal=mean)": 0.7, "h2o": 0.5}


def make_sweep(directory, grid=GRID, costs=True, stop_after=None):
    """A sweep with answers by chance; only the first `stop_after` lines of it."""
    open_sweep(directory, grid, "checksum")
    rng = np.random.default_rng(0)
    places = [
        (t, n, d) for t in grid.tasks for n in grid.lengths for d in (grid.depths if t == "single" else ()) or (None,)
    ]
    items = [PromptId(*scenario, index) for scenario in places for index in range(grid.prompts)]
    with results_path(directory, 0).open("w") as file:
        for item in items[:stop_after]:
            answers = tuple(str(10**6 + i) for i in range(4 if item.task == "multivalue" else 1))
            said = {
                e.label: ", ".join(a if rng.random() < CHANCES[e.method] else "no" for a in answers)
                for e in cache_configs(grid)
            }
            file.write(line_text(PromptResult(item, item.length, answers, said)))
    if costs:
        found = [
            Cost(n, e.label, 1000 * (i + 1), 0.1, 0.5, 0.002)
            for n in grid.lengths
            for i, e in enumerate(cache_configs(grid))
        ]
        write_costs(directory, Costs("a <device>", tuple(found), (Rate("by itself", 1.5),)))
    return directory


class Page(html.parser.HTMLParser):
    """What a test needs of a page: tables as rows of texts by caption under their heading, images, texts."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.images, self.tags, self.texts = {}, [], set(), []
        self.heading, self.rows, self.inside = "", None, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attrs))
            return
        self.inside.append(tag)
        if tag == "table":
            self.rows = []
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag in ("h2", "h3"):
            self.heading = ""
        elif tag == "small":
            self.rows[-1][-1] += " "

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        self.texts.append(data)
        if self.inside and self.inside[-1] in ("h2", "h3"):
            self.heading += data
        elif self.inside and self.inside[-1] == "caption":
            self.tables[self.heading, data] = self.rows
        elif {"td", "th"} & set(self.inside):
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = make_sweep(tmp_path_factory.mktemp("reports") / "sweep")
    figure = Figure()
    figure.subplots().plot([1, 2])
    write_report(directory, kept=figure, title="Needles & <haystacks>")
    return directory


@pytest.fixture(scope="module")
def results(directory):
    return read_results(directory)


@pytest.fixture(scope="module")
def page(directory):
    return Page((directory / "report.html").read_text(encoding="utf-8"))


def match_shares(directory, label, task, length):
    """Counted from the lines, in the order of depth and number."""
    lines = [line for item, line in read_lines(directory).items() if item[:2] == (task, length)]
    return np.array([np.mean([answer in line.said[label] for answer in line.answers]) for line in lines])


@pytest.mark.parametrize("task", GRID.tasks)
@pytest.mark.parametrize("length", GRID.lengths)
def test_tables_have_the_scores_of_the_lines(directory, page, task, length):
    count = 36 if task == "single" else 12
    rows = page.tables[task, f"{length} tokens, {count} prompts"]
    assert rows[0] == ["method", "budget 5%", "budget 64"]
    assert [row[0] for row in rows[1:]] == ["full", "restkv", "snapkv"]
    for method, *cells in rows[1:]:
        labels = ["full"] if method == "full" else [f"{method} {budget}" for budget in GRID.budgets]
        for label, cell in zip(labels, cells, strict=True):
            score, low, high = map(float, re.findall(r"[\d.]+", cell))
            assert score == pytest.approx(100 * match_shares(directory, label, task, length).mean(), abs=0.051)
            assert low <= score <= high


def test_ranking_is_the_mean_over_tasks_and_lengths(directory, page):
    rows = {row[0]: row[1:] for row in page.tables["All tasks together", "Share of the answers said"]}
    assert list(rows) == ["method", "full", "restkv", "snapkv"]
    means = [match_shares(directory, "snapkv 64", task, n).mean() for task in GRID.tasks for n in GRID.lengths]
    assert float(rows["snapkv"][2].split()[0]) == pytest.approx(100 * np.mean(means), abs=0.051)
    exact = {row[0]: row[1:] for row in page.tables["All tasks together", list(page.tables)[5][1]]}
    assert float(exact["full"][0].split()[0]) < float(rows["full"][0].split()[0])


def test_variants_are_differences_to_their_base(directory, page):
    caption = "multivalue"
    (_, *cells) = page.tables["Variants", caption][1]
    for budget, cell in zip(GRID.budgets, cells, strict=True):
        expected = np.mean(
            [
                match_shares(directory, f"restkv(temporal=mean) {budget}", caption, n)
                - match_shares(directory, f"restkv {budget}", caption, n)
                for n in GRID.lengths
            ]
        )
        assert float(cell.split()[0].replace("\N{MINUS SIGN}", "-")) == pytest.approx(100 * expected, abs=0.051)
    assert ("Variants", "All tasks and lengths") in page.tables


def test_tests_are_mcnemars_with_holms_correction(directory, results):
    scores = collect(results)[Scenario("single", 256)]
    columns = [CacheConfig("full", None), CacheConfig("restkv", "5%"), CacheConfig("snapkv", "5%")]
    estimates = {config: estimate(values.values()) for config, values in scores.items()}
    standings = rank_within(scores, estimates, columns)
    full, restkv, snapkv = (match_shares(directory, e.label, "single", 256) for e in columns)
    p_values = [
        scipy.stats.binomtest(int(np.sum(a > b)), int(np.sum(a != b))).pvalue
        for a, b in ((restkv, full), (snapkv, full), (snapkv, restkv))
    ]
    order = np.argsort(p_values)
    rejected = np.minimum.accumulate(np.array(p_values)[order] * [3, 2, 1] < 0.05)[np.argsort(order)]
    assert [standings[columns[1]].differs_from_full, *standings[columns[2]][2:]] == list(rejected)
    assert standings[columns[1]].is_best and not standings[columns[2]].is_best


def test_variants_compare_the_prompts_that_both_have(results):
    scores = collect(results)
    assert variants(GRID) == [Pair("restkv(temporal=mean)", "restkv")]
    scenario = Scenario("single", 256)
    fewer = {
        scenario: scores[scenario]
        | {CacheConfig("restkv", "64"): dict(list(scores[scenario][CacheConfig("restkv", "64")].items())[:5])}
    }
    compared = compare(fewer, variants(GRID), GRID.budgets, [scenario])
    assert [c.difference.count for c in compared.values()] == [36, 5]


def test_p_values_are_of_the_mean_over_scenarios_whatever_their_prompts():
    many, few = Scenario("single", 256), Scenario("multivalue", 256)
    a, b = CacheConfig("restkv(temporal=mean)", "64"), CacheConfig("restkv", "64")

    def scores(scenario, count, value):
        return {PromptId(scenario.task, 256, None, i): value for i in range(count)}

    found = compare(
        {many: {a: scores(many, 400, 0.75), b: scores(many, 400, 0.5)},
         few: {a: scores(few, 20, 0.5), b: scores(few, 20, 0.75)}},
        variants(GRID), ["64"], [many, few],
    )  # fmt: skip
    ((difference, p),) = found.values()
    assert difference.mean == 0 and p == pytest.approx(1)


def test_errors_of_layers_are_in_their_tables(tmp_path):
    directory = make_sweep(tmp_path / "sweep", SMALL, costs=False)
    write_errors(directory, [LayerErrors("single", 256, "restkv 64", (0.1, 0.3))])
    page = Page(write_report(directory).read_text(encoding="utf-8"))
    assert page.tables["What the layers lose", "single, 256 tokens"] == [["method", "budget 64"], ["restkv", "20.0"]]


def test_costs_are_in_their_tables(page):
    rows = page.tables["Costs", "Bytes of the cache of one prompt, 256 tokens"]
    assert [row[0] for row in rows[1:]] == list(GRID.methods)
    assert rows[1][1] == "1,000 B" and rows[2][1] == "1.95 KiB 200 % of full"
    assert page.tables["Costs", "The same prompts in different ways"][1] == ["by itself", "1.5"]


def test_page_needs_nothing_else(directory, page):
    assert len(page.images) == 4 and all(image["alt"] for image in page.images)
    files = [directory / name for name in ("accuracy.png", "needle_map.png", "kept.png", "costs.png")]
    for image, file in zip(page.images, files, strict=True):
        start, content = image["src"].split(",")
        assert start == "data:image/png;base64"
        assert base64.b64decode(content) == file.read_bytes()
        assert file.read_bytes().startswith(b"\x89PNG")
    assert not {"script", "link", "iframe"} & page.tags
    text = (directory / "report.html").read_text(encoding="utf-8")
    assert "http" not in text and "url(" not in text


def test_labels_are_escaped(directory, page):
    assert "device" not in page.tags and "haystacks" not in page.tags
    assert "Needles & <haystacks>" in page.texts
    assert (directory / "report.md").read_text(encoding="utf-8").startswith("# Needles & \\<haystacks\\>\n")


def test_markdown_has_the_same_tables(directory, page):
    text = (directory / "report.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in text.splitlines() if row.startswith("| ")]
    numbers = {tuple(map(str, re.findall(r"[\d.]+", cell))) for row in rows for cell in row}
    for table in page.tables.values():
        for row in table:
            for cell in row:
                assert tuple(re.findall(r"[\d.]+", cell)) in numbers
    assert all(f"]({image})" in text for image in ("accuracy.png", "needle_map.png", "kept.png", "costs.png"))
    widths = {len(row) for row in rows if row[0] in GRID.methods}
    assert widths == {3, 4}


def test_finished_sweep_says_nothing_is_missing(results, page):
    assert missing_prompts(results) == []
    assert not any("not finished" in text for text in page.texts)


@pytest.mark.parametrize("stop_after", [5, 80])
def test_unfinished_sweep_says_what_is_there(tmp_path, stop_after):
    directory = make_sweep(tmp_path / "sweep", costs=False, stop_after=stop_after)
    text = write_report(directory).read_text(encoding="utf-8")
    first = "single at 256 tokens: 5 of 36 prompts" if stop_after == 5 else "multivalue at 256 tokens: 8 of 12 prompts"
    assert "not finished" in text and first in text
    assert "multivalue at 512 tokens: 0 of 12 prompts" in text or stop_after == 5
    assert "Costs" not in text and not (directory / "costs.png").exists()


def test_sweep_of_one_method_and_length_without_full_cache(tmp_path):
    directory = make_sweep(tmp_path / "sweep", SMALL)
    page = Page(write_report(directory).read_text(encoding="utf-8"))
    assert len(page.images) == 2 and not any("full cache" in text for text in page.texts)
    assert [row[0] for row in page.tables["single", "256 tokens, 3 prompts"]] == ["method", "restkv"]


def test_command_measures_the_same_grid():
    grid = dataclasses.replace(GRID, model="a model")
    assert rerun_command(grid, pathlib.Path("out")) == (
        "restkv evaluate --tasks single multivalue --methods full restkv snapkv 'restkv(temporal=mean)' "
        "--budgets 5% 64 --lengths 256 512 --depths 0.0 0.5 1.0 --prompts 12 --ask within --seed 0 --model 'a model' "
        "--dtype auto --output out"
    )


def test_accuracy_is_drawn_by_method_with_intervals(results, directory):
    figure = plot_accuracy(results)
    assert [a.get_title(loc="left") for a in figure.axes if a.get_visible()] == [
        "single, 256 tokens",
        "single, 512 tokens",
        "multivalue, 256 tokens",
        "multivalue, 512 tokens",
    ]
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    expected = [match_shares(directory, f"snapkv {budget}", "single", 256).mean() for budget in GRID.budgets]
    np.testing.assert_allclose(lines["snapkv"].get_ydata(), expected)
    dashed = next(line for line in figure.axes[0].get_lines() if line.get_color() == FULL_COLOR)
    assert dashed.get_ydata()[0] == pytest.approx(match_shares(directory, "full", "single", 256).mean())
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["5%", "64"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["full cache", "restkv", "snapkv"]
    bars = figure.axes[0].collections[-1].get_segments()
    assert len(bars) == 2 and bars[0][0, 1] < expected[0] < bars[0][1, 1]


@pytest.mark.parametrize("options", ["", "(pooling=successor, kernel_size=12, allocation=adaptive_heads)"])
def test_legend_is_whole_and_leaves_room(results, options):
    """However long the methods' options, no name is cut off, and the panels keep their height."""
    methods = [f"{method}{options}" for method in ("restkv", "snapkv", "h2o", "tova", "knorm")]
    figure = plot_accuracy(results, methods=methods)
    FigureCanvasAgg(figure).draw()
    (legend,) = figure.legends
    texts = [text.get_window_extent() for text in legend.get_texts()]
    assert len(texts) == 6 and min(t.x0 for t in texts) > 0 and max(t.x1 for t in texts) < figure.bbox.width
    assert min(axis.get_window_extent().height for axis in figure.axes) > 1.2 * figure.dpi


def test_needle_map_is_drawn_by_depth_and_length(results, directory):
    figure = plot_needle_map(results)
    panels = {axis.get_title(loc="left"): axis for axis in figure.axes if axis.get_images()}
    assert list(panels) == ["full", "restkv 5%", "restkv 64", "snapkv 5%", "snapkv 64"]
    drawn = panels["snapkv 64"].get_images()[0].get_array()
    assert drawn.shape == (3, 2)
    shares = match_shares(directory, "snapkv 64", "single", 512).reshape(3, 12)
    np.testing.assert_allclose(drawn[:, 1], shares.mean(1))
    assert [text.get_text() for text in panels["full"].get_yticklabels()] == ["0%", "50%", "100%"]
    with pytest.raises(ValueError, match="those that have: single"):
        plot_needle_map(results, "multivalue")


def test_costs_are_drawn_in_units_that_fit(results):
    figure = plot_costs(results)
    assert [axis.get_ylabel() for axis in figure.axes[:3]] == ["KiB", "ms", "ms"]
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    np.testing.assert_allclose(lines["restkv"].get_ydata(), np.array([2000, 3000]) / 1024)
    with pytest.raises(ValueError, match="costs is empty"):
        plot_costs(results._replace(costs=None))


@pytest.mark.parametrize(
    ("value", "units", "text"),
    [
        (0, BYTES, "0 B"),
        (1536, BYTES, "1.5 KiB"),
        (1023 * 2**10, BYTES, "1,023 KiB"),
        (5000 * 2**30, BYTES, "5,000 GiB"),
        (2.5e-5, SECONDS, "25 µs"),
        (0.00123, SECONDS, "1.23 ms"),
        (61, SECONDS, "61 s"),
    ],
)
def test_numbers_have_units(value, units, text):
    assert text_of(value, units) == text


def test_command_writes_the_report_and_keeps_the_picture(tmp_path, capsys):
    make_sweep(tmp_path, SMALL, costs=False)
    kept = base64.b64decode(PIXEL)
    (tmp_path / "kept.png").write_bytes(kept)
    assert main(["report", str(tmp_path), "--title", "Again"]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'report.html'}\n"
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<h1>Again</h1>" in text and PIXEL in text
    assert (tmp_path / "kept.png").read_bytes() == kept


def test_directory_without_results_is_refused(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "does not describe a sweep" in capsys.readouterr().err
    open_sweep(tmp_path, GRID, "checksum")
    with pytest.raises(ValueError, match="has no results yet"):
        write_report(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "[1]", "\xff", '{"device": 1, "costs": [], "rates": []}', '{"costs": 3}'])
@pytest.mark.parametrize("name", ["costs.json", "errors.json", "kept.npz", "sweep.json"])
def test_damaged_files_are_one_line(tmp_path, capsys, name, text):
    make_sweep(tmp_path, SMALL, costs=False)
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    if name == "kept.npz":
        with pytest.raises(ValueError, match=r"kept\.npz' is damaged .* remove it"):
            plot_example(tmp_path)
        return
    assert main(["report", str(tmp_path)]) == (0 if (name, text) == ("errors.json", "[]") else 2)
    if (name, text) == ("errors.json", "[]"):
        return  # as a sweep of methods that have no errors leaves it
    err = capsys.readouterr().err
    assert name in err and err.count("\n") == 1 and any(word in err for word in ("remove it", "give", "measure"))


@pytest.mark.parametrize(
    "line", ["{", "[]", "3", '{"task": "single"}', '"said": ["a"]', '"said": {"restkv 64": 3}', '"answers": 5', "\xff"]
)
def test_damaged_lines_are_named(tmp_path, capsys, line):
    make_sweep(tmp_path, SMALL, costs=False)
    path = tmp_path / "results-0.jsonl"
    good = path.read_text().splitlines()
    if line.startswith('"'):
        name = line.split(":")[0]
        line = re.sub(name + r": (\{.*?\}|\[.*?\])", line.replace("\\", ""), good[1])
    path.write_bytes("\n".join([good[0], line, good[2], ""]).encode("latin-1"))
    assert main(["report", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert f"line 2 of {str(path)!r} is broken" in err and "remove it" in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["accuracy.png", "costs.png"])
def test_a_full_disk_is_one_line(tmp_path, capsys, name):
    make_sweep(tmp_path, SMALL)
    (tmp_path / name).symlink_to("/dev/full")
    assert main(["report", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert f"{str(tmp_path)!r} cannot be written (No space left on device); make room" in err and err.count("\n") == 1


def test_named_pairs_are_compared_and_no_method_is_left_out(tmp_path, capsys):
    make_sweep(tmp_path, costs=False)
    drawn = "snapkv", "restkv(temporal=mean)"
    assert main(["report", str(tmp_path), "--pairs", "snapkv > restkv(temporal=mean)", "--draw", *drawn]) == 0
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert [row[0] for row in page.tables["multivalue", "256 tokens, 12 prompts"][1:]] == list(GRID.methods)
    _, (name, *cells) = page.tables["Pairs of methods", "multivalue"]
    assert name == "snapkv against restkv(temporal=mean)"
    labels = "snapkv 64", "restkv(temporal=mean) 64"
    ours, theirs = (
        np.concatenate([match_shares(tmp_path, label, "multivalue", n) for n in GRID.lengths]) for label in labels
    )
    expected = 100 * (ours - theirs).mean()
    assert float(cells[1].split()[0].replace("\N{MINUS SIGN}", "-")) == pytest.approx(expected, abs=0.051) and expected
    assert ("Variants", "multivalue") not in page.tables


@pytest.mark.parametrize(
    "args", [("--pairs", "restkv"), ("--pairs", "restkv > h2o"), ("--pairs", "a > b > c"), ("--draw", "h2o")]
)
def test_pairs_and_pictures_of_other_methods_are_one_line(tmp_path, capsys, args):
    make_sweep(tmp_path, SMALL, costs=False)
    assert main(["report", str(tmp_path), *args]) == 2
    error = capsys.readouterr().err
    assert args[1] in error and "restkv" in error and error.count("\n") == 1


def test_sweeps_of_other_methods_and_budgets_are_one(tmp_path, results):
    few = dataclasses.replace(GRID, methods=("full", "h2o"), budgets=("10%", "64"))
    other = read_results(make_sweep(tmp_path / "other", few, costs=False, stop_after=7))
    both = combine([other, results])
    assert both.grid.methods == ("full", "h2o", "restkv", "snapkv", "restkv(temporal=mean)")
    assert both.grid.budgets == ("5%", "10%", "64")
    assert set(both.cells) == set(other.cells) | set(results.cells)
    for cell, scores in both.cells.items():
        assert scores is (other if cell.config.method == "h2o" else results).cells[cell]
    timed, other = (sweep._replace(read_seconds={256: 2.0}) for sweep in (results, other))
    assert combine([timed, timed]).read_seconds == {256: 2.0}
    assert not combine([timed, other]).read_seconds  # of other configurations


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": dataclasses.replace(GRID, seed=1)}, "seed is not the same in all sweeps"),
        ({"weights": "another"}, "the model's weights are not the same"),
        ({"files": {"mine.jsonl": File("another")}}, "the file 'mine.jsonl' is not the same"),
    ],
)
def test_sweeps_of_other_prompts_and_models_are_not_one(results, change, message):
    results = results._replace(files={"mine.jsonl": File("one")})
    with pytest.raises(ValueError, match=message):
        combine([results, results._replace(**change)])


def test_prompts_of_ones_own_are_counted(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "a", "answers": ["b"]}\n' * 3)
    grid = dataclasses.replace(SMALL, tasks=(str(path),))
    directory = make_sweep(tmp_path / "sweep", grid, costs=False, stop_after=2)
    assert missing_prompts(read_results(directory)) == [f"{path}: 2 of 3 prompts"]
    write_report(directory)
    text = (directory / "report.md").read_text()
    assert f"- Prompts of {path}: 2." in text and "per task and length" not in text


def test_reports_of_quantised_caches_say_so(tmp_path):
    grid = dataclasses.replace(SMALL, tasks=("divergence",), methods=("full", "restkv"), cache_dtype="int4")
    lines = [PromptResult(PromptId("divergence", 256, None, i), 256, (), {}, None, {"full": 0.25, "restkv 64": 0.5})
             for i in range(3)]  # fmt: skip
    directory = make_sweep(tmp_path, grid, costs=False, stop_after=0)
    results_path(directory, 0).write_text("".join(map(line_text, lines)))
    page = Page(write_report(directory).read_text(encoding="utf-8"))
    assert "All caches store keys and values in int4" in (directory / "report.md").read_text()
    (table,) = (rows for (_, title), rows in page.tables.items() if title.startswith("divergence"))
    assert [row[0] for row in table[1:]] == ["full", "restkv"] and table[1][1].startswith("0.2500")
