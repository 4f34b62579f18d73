import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moejax.report import FIGURES, ReportData, load_data
from moejax.report._captions import caption, title
from moejax.report._data import NotDrawnError
from moejax.report._palette import look
from moejax.report.figures import CLAIMS_FIGURES, FURTHER_FIGURES, STYLE
from moejax.report.figures._canvas import spread_apart, time_unit

from ._factory import STUDY, plan, results, write_run

OF_THE_RUN = [name for name in FIGURES if name not in (*CLAIMS_FIGURES, *FURTHER_FIGURES.values())]


def load(folder: Path, *, has_plan: bool = True, **options) -> ReportData:
    write_run(folder, results(**options))
    if has_plan:
        (folder / "plan.json").write_text(json.dumps(plan()))
    return load_data(folder)


def draw(name: str, data: ReportData) -> Figure:
    with style.context(dict(STYLE), after_reset=True):
        figure = FIGURES[name](data)
        FigureCanvasAgg(figure)
        figure.set_dpi(40)
        figure.canvas.draw()
    return figure


def words(figure: Figure) -> set[str]:
    found = {text.get_text() for axes in figure.axes for text in axes.texts}
    found |= {tick.get_text() for axes in figure.axes for tick in axes.get_yticklabels()}
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes)]
    found |= {text.get_text() for one in legends if one is not None for text in one.get_texts()}
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> ReportData:
    return load(tmp_path_factory.mktemp("run"), num_runs=3)


@pytest.mark.parametrize("name", OF_THE_RUN)
def test_every_figure_is_drawn_with_units_and_names(name: str, whole: ReportData):
    figure = draw(name, whole)
    visible = [axes for axes in figure.axes if axes.get_visible()]
    assert visible
    for axes in visible:
        # A panel without ticks says what it shows, and its unit, in its title.
        assert axes.get_xlabel() or axes.get_title() or axes.get_title("left")
    if name == "tiers":
        expected = {"L1 (device)", "L2 (pinned)", "L3 (pageable)", "store only"}
    elif name == "pareto_complexity":
        expected = set(STUDY)
    elif name == "hit_curve":
        expected = set(whole.run.hit_curve) | {"published, ±0.03"}
    else:
        expected = set(whole.run.strategies)
    assert expected <= words(figure)
    assert caption(name, whole)
    assert title(name)


@pytest.mark.parametrize("name", OF_THE_RUN)
def test_two_strategies_one_batch_one_run(name: str, tmp_path: Path):
    data = load(tmp_path, strategies=("oracle", "lru"), batch_sizes=(4,), num_runs=1)
    assert draw(name, data).axes


def test_latency_has_a_panel_a_dispatch(tmp_path: Path):
    data = load(tmp_path, num_runs=2, dispatches=("batched", "sequential"))
    figure = draw("latency", data)
    assert [axes.get_title("left") for axes in figure.axes] == ["batched", "sequential"]


def test_lines_carry_the_means(whole: ReportData):
    axes = draw("latency", whole).axes[0]
    heights = {container.lines[0].get_color(): container.lines[0] for container in axes.containers}
    for strategy in whole.run.strategies:
        shown = np.asarray(heights[look(strategy).colour].get_ydata(orig=False))
        expected = [1e3 * cell.latency_s.mean for cell in whole.series(strategy)]
        np.testing.assert_allclose(shown, expected)


def test_bars_of_the_breakdown_add_up(whole: ReportData):
    axes = draw("stall_breakdown", whole).axes[0]
    total = sum(bar.get_width() for bar in axes.patches)
    cells = whole.cells(1)
    assert total == pytest.approx(
        1e3 * sum(cell.compute_s.mean + cell.stall_s.mean for cell in cells)
    )


@pytest.mark.parametrize("name", ["speedup", "pareto_memory", "pareto_complexity"])
def test_without_a_baseline(name: str, tmp_path: Path):
    data = load(tmp_path, strategies=("oracle", "fifo"), num_runs=1)
    with pytest.raises(NotDrawnError, match="on_demand nor lru"):
        draw(name, data)


def test_speedup_falls_back_to_lru(tmp_path: Path):
    data = load(tmp_path, strategies=("oracle", "lru"), num_runs=2)
    assert draw("speedup", data).axes[0].get_ylabel() == "speedup over lru (times)"


def test_without_plan_or_curve(tmp_path: Path):
    content = results(num_runs=1) | {"hit_curve": {}}
    data = load_data(write_run(tmp_path, content))
    for name, said in (("tiers", "tune-cache"), ("hit_curve", "no hit curve")):
        with pytest.raises(NotDrawnError, match=said):
            draw(name, data)


def test_published_points_only_for_their_model(tmp_path: Path):
    data = load(tmp_path, num_runs=1, model="qwen3-30b-a3b")
    assert "published, ±0.03" not in words(draw("hit_curve", data))
    assert "published" in caption("hit_curve", data)
    assert "Hollow" not in caption("hit_curve", data)


@given(st.lists(st.floats(0, 1), max_size=12).map(sorted), st.floats(0.01, 0.2))
def test_labels_are_apart_and_in_order(places: list[float], gap: float):
    moved = spread_apart(places, gap)
    assert len(moved) == len(places)
    assert all(b - a >= gap - 1e-9 for a, b in itertools.pairwise(moved))
    if all(b - a > gap + 1e-6 for a, b in itertools.pairwise(places)):
        assert moved == pytest.approx(places)
    if places:
        assert np.mean(moved) == pytest.approx(np.mean(places), abs=1e-9)


def test_time_unit_suits_the_largest():
    assert time_unit([0.5, 2.0]).name == "s"
    assert time_unit([0.5e-3, 20e-3]).name == "ms"
    assert time_unit([5e-6]).name == "µs"
