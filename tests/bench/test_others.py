"""What other programs took of the processors."""

import os

import pytest

from moejax.bench._others import Moment, moment, others_ratio


def test_what_is_busy_beside_this_process_is_of_others():
    num_cpus = os.cpu_count() or 1
    start, end = Moment(1.0, 10.0, 5.0), Moment(3.0, 10.0 + 1.5 * num_cpus, 5.0 + num_cpus)
    assert others_ratio(start, end) == pytest.approx(0.25)
    # Clocks of different steps: less than nothing is nothing.
    assert others_ratio(start, Moment(3.0, 10.0, 6.0)) == 0.0


def test_where_nobody_tells_nothing_is_known(monkeypatch, tmp_path):
    monkeypatch.setattr("moejax.bench._others._STAT", tmp_path / "none")
    assert moment() is None
    assert others_ratio(None, None) is None


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="no /proc")
def test_moments_go_on():
    first, second = moment(), moment()
    assert first is not None
    assert second is not None
    assert first.busy_s <= second.busy_s
    assert first.own_s <= second.own_s
