import pytest

from moejax.results import Measurement


def test_summaries_are_those_of_the_samples():
    copy = Measurement("copy", "s", tuple(float(sample) for sample in range(101)))
    assert (copy.num_samples, copy.p05, copy.median, copy.p95) == (101, 5.0, 50.0, 95.0)


def test_one_sample_is_its_own_summary():
    copy = Measurement("copy", "s", (2.5,))
    assert copy.p05 == copy.median == copy.p95 == 2.5


@pytest.mark.parametrize("samples", [(), (1.0, float("nan")), (float("inf"),)])
def test_no_samples_or_impossible_ones_are_refused(samples: tuple[float, ...]):
    with pytest.raises(ValueError, match="must be finite"):
        Measurement("copy", "s", samples)
