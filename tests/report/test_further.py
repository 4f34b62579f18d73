"""What `--full` adds to a report, from made-up experiments."""

import copy
import re
from pathlib import Path

import pytest
from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg

from moejax.errors import BadFileError
from moejax.report import FIGURES, ReportData, load_data, report_markdown
from moejax.report._answer import answer
from moejax.report._captions import caption
from moejax.report._further_text import further_section
from moejax.report._hybrids import judge_hybrids
from moejax.report.figures import FURTHER_FIGURES, STYLE
from moejax.units import format_bytes, format_seconds

from ._factory import results, without_links, write_run
from ._further import full_results

TIMES = "\N{MULTIPLICATION SIGN}"


@pytest.fixture(scope="module")
def content() -> dict:
    return full_results()


@pytest.fixture(scope="module")
def data(content, tmp_path_factory) -> ReportData:
    return load_data(write_run(tmp_path_factory.mktemp("full"), content))


@pytest.fixture(scope="module")
def text(data) -> str:
    return without_links("\n\n".join(further_section(data, {"gpus": "![cards]"})))


def row_of(text: str, *first: str) -> list[str]:
    """The first table line that begins with these cells."""
    lines = [[one.strip() for one in line.strip("|").split("|")] for line in text.splitlines()]
    return next(line for line in lines if line[: len(first)] == list(first))


def test_every_experiment_has_its_part(text):
    headings = re.findall(r"^### (.*)$", text, re.MULTILINE)
    assert headings == [
        "Other cache sizes",
        "Six cards",
        "Switch beside this model",
        "K of 4, 8 and 16",
        "Hybrid strategies",
    ]
    assert text.index("### Six cards") < text.index("![cards]") < text.index("### Switch")
    assert "nan" not in text
    assert "None" not in text


def test_a_run_without_them_has_no_part(tmp_path: Path):
    plain = load_data(write_run(tmp_path, results(num_runs=2)))
    assert further_section(plain, {}) == []
    assert "## Beyond the study" not in report_markdown(plain, [], {})


def test_sizes_are_the_cells(data, text):
    (cell,) = data.run.further["capacities"].where(strategy="lru", slots=45, batch_size=1)
    row = row_of(text, "`lru`")
    assert row[2] == f"{format_seconds(cell.mean('latency_s'))}, 65.0 %"
    assert row_of(text, "*device memory*")[2] == format_bytes(cell.mean("memory_bytes"))
    assert "`on_demand`" not in text[: text.index("### Six cards")]


def test_a_card_that_is_too_small_says_what_is_needed(data, text):
    cells = data.run.further["gpus"].where(strategy="lru", cache="as in the run", batch_size=1)
    needed = 3.1e9 + 1000 + cells[0].mean("memory_bytes")
    row = row_of(text, "`lru`", "as in the run")
    assert row[2] == f"needs {format_bytes(needed)}"
    assert row[3] == format_seconds(cells[1].mean("latency_s"))
    # Bold is the fastest that can be built, not the oracle.
    assert row_of(text, "`intelligent`", "as in the run")[3].startswith("**")
    assert not row_of(text, "`oracle`", "as in the run")[3].startswith("**")
    crowded = text[text.index("| batch 16 | slots |") :]
    assert row_of(crowded, "`lru`", "all that fit")[2] == "does not fit"
    assert row_of(text, "`small`")[4] == "2 of 60"
    assert row_of(text, "`small`")[6] == "does not run"
    assert row_of(text, "`large`")[4] == "all 60"


def test_speedups_are_within_a_model_and_its_share(data, text):
    cells = data.run.further["models"].where(model="switch-base-128", share_ratio=0.5, batch_size=1)
    mean_s = {cell.strategy: cell.mean("latency_s") for cell in cells}
    row = row_of(text, "`switch-base-128`", "50.0 %", "1")
    assert row[3].startswith(f"{mean_s['on_demand'] / mean_s['oracle']:.2f}{TIMES}")
    assert f"speedups of 10.6{TIMES} to 15.8{TIMES} and more than 99.0 % hits for Switch" in text


def test_both_readings_of_top_k_are_there(text):
    pins = row_of(text[text.index("K experts of every layer pinned") :], "strategy")
    routed = row_of(text[text.index("K experts a token") :], "strategy")
    assert pins[2:] == ["K 4", "K 8", "K 16", "K 32"]
    assert routed[2:] == ["top 4", "top 8", "top 16"]
    # 0.6 sqrt(K / 40) for K of 4 and 32.
    assert "With K = 4 Top-K hits 19.0 % at batch 1, with K = 32 53.7 %" in text


def test_hybrids_are_paired_with_their_fastest_part(data, text):
    judged = judge_hybrids(data, data.run.further["hybrids"])
    pinned, on_host = (one for one in judged if one.cell.batch_size == 1)
    assert pinned.part == "lru"
    assert pinned.changes["stated"].ratio == pytest.approx(-0.1)
    assert list(pinned.changes) == ["stated"]
    assert pinned.verdict == "faster"
    assert on_host.changes["stated"].ratio == pytest.approx(-0.5)
    assert on_host.changes["cautious"].ratio == pytest.approx(0.2)
    assert on_host.verdict == "depends on the host"
    assert "Without `host_compute` they beat the best of their parts in 2 of 2 cases" in text
    assert "With it they beat the best of their parts in 0 of 2 cases; in 2 it depends" in text
    assert "a host that reads experts at 90.0 GB/s (derived: a page)" in text


def test_one_draw_judges_no_hybrid(tmp_path: Path):
    one = load_data(write_run(tmp_path, full_results(num_runs=1)))
    judged = judge_hybrids(one, one.run.further["hybrids"])
    assert {each.verdict for each in judged} == {""}
    assert "One draw of requests gives no verdicts." in "\n".join(further_section(one, {}))


@pytest.mark.parametrize("name", FURTHER_FIGURES.values())
def test_figures_are_drawn(data, name: str):
    with style.context(dict(STYLE), after_reset=True):
        figure = FIGURES[name](data)
        FigureCanvasAgg(figure).draw()
    assert [axes.get_title("left")[3:] for axes in figure.axes] == ["batch 1", "batch 16"]
    assert all(axes.lines for axes in figure.axes)
    assert caption(name, data)


def test_the_sizes_figure_joins_the_run_and_its_other_sizes(data):
    with style.context(dict(STYLE), after_reset=True):
        axes = FIGURES["sizes"](data).axes[0]
    points = {line.get_label(): len(line.get_xdata()) for line in axes.lines}
    assert list(points.values()) == [1, 3, 3, 3, 3]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda c: c.update(capacities=[]), "capacities is []"),
        (lambda c: c["capacities"].update(cells=[]), "capacities.cells is empty"),
        (lambda c: c["gpus"]["cells"][1].pop("cache"), "gpus.cells[1].cache is missing"),
        (lambda c: c["top_k"]["cells"][0].update(latency_s=[0.0, 1.0]), "top_k.cells[0] has no"),
        (lambda c: c["models"]["cells"][0].update(p99_s=[1.0]), "models.cells[0] has no"),
        (lambda c: c["gpus"]["cards"][0].update(vram_bytes=0), "gpus.cards[0].vram_bytes"),
        (lambda c: c["gpus"]["cards"][1].update(price_usd="much"), "gpus.cards[1].price_usd"),
        (lambda c: c["gpus"]["rooms"][0].pop("kv_bytes"), "gpus.rooms[0].kv_bytes"),
        (lambda c: c["models"]["models"][1].pop("num_experts"), "models.models[1].num_experts"),
        (lambda c: c["hybrids"].pop("parts"), "hybrids.parts is missing"),
        (lambda c: c["hybrids"]["parts"].update({"pinned(lru)": []}), "hybrids.parts.pinned(lru)"),
    ],
)
def test_a_damaged_experiment_is_named(content, tmp_path: Path, spoil, said: str):
    damaged = copy.deepcopy(content)
    spoil(damaged)
    with pytest.raises(BadFileError) as caught:
        load_data(write_run(tmp_path, damaged))
    assert said in str(caught.value)


def test_the_answer_says_what_all_slots_that_fit_give(data, tmp_path: Path):
    cells = data.run.further["gpus"].where(hardware="rtx-3090", cache="all that fit", batch_size=1)
    mean_s = {cell.strategy: cell.mean("latency_s") for cell in cells}
    said = without_links(answer(data))
    fastest = (
        f"the fastest is `intelligent` as well: {format_seconds(mean_s['intelligent'])} a step"
    )
    assert (
        f"**With the 45 that fit {fastest}** beside {format_seconds(mean_s['lru'])} with `lru`."
        in said
    )
    plain = load_data(write_run(tmp_path, results(num_runs=2)))
    assert "the fastest is" not in answer(plain)
