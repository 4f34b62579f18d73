import pytest

from moejax.cli._options import parse_ints, parse_names, parse_sizes
from moejax.errors import UsageError


def test_lists_keep_their_order():
    assert parse_ints("16,1, 4", "--batch-sizes", minimum=1) == (16, 1, 4)
    assert parse_names("oracle, lru,", "--strategies", ("lru", "oracle")) == ("oracle", "lru")
    assert parse_names("anything", "--name") == ("anything",)
    assert parse_sizes("2GB,4000MiB", "--budget") == (2_000_000_000, 4000 * 2**20)


@pytest.mark.parametrize("text", ["", "a", "1,", "1.5", "0", "-1", "1,2,1", "256", "9" * 5000])
def test_wrong_numbers_are_usage_errors(text):
    with pytest.raises(UsageError, match="--batch-sizes") as caught:
        parse_ints(text, "--batch-sizes", minimum=1, maximum=255)
    assert "from 1 to 255" in caught.value.hint


@pytest.mark.parametrize("text", ["", ",", "lru,lru", "lru,belady"])
def test_wrong_names_are_usage_errors(text):
    with pytest.raises(UsageError, match="--strategies"):
        parse_names(text, "--strategies", ("lru", "oracle"))


@pytest.mark.parametrize("text", ["", "2 gigs", "-1GB", "1GB,", "nanGB"])
def test_wrong_sizes_are_usage_errors(text):
    with pytest.raises(UsageError, match="--budget"):
        parse_sizes(text, "--budget")
