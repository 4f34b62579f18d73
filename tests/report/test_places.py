import pytest

from moejax.report._places import link, place, pointer, resolve


@pytest.mark.parametrize(
    ("pointers", "expected"),
    [
        (["/grid/7"], "/grid/7"),
        ([f"/grid/{index}" for index in range(10)], "/grid/0-9"),
        (["/grid/1", "/grid/3", "/grid/4", "/baseline/5"], "/grid/1;/grid/3-4;/baseline/5"),
        (["/grid/4", "/grid/3"], "/grid/4;/grid/3"),
        (["/curve/lru", "/curve/lfu"], "/curve/lru;/curve/lfu"),
    ],
)
def test_neighbours_become_a_range_and_come_back(pointers: list[str], expected: str):
    content = {
        "grid": list(range(100, 110)),
        "baseline": list(range(200, 210)),
        "curve": {"lru": 1, "lfu": 2},
    }
    assert place(pointers) == expected
    assert [found.pointer for found in resolve(content, expected)] == pointers


def test_a_range_is_one_of_lists_only():
    assert [found.value for found in resolve({"cases": {"0-1": "named"}}, "/cases/0-1")] == [
        "named"
    ]
    assert [found.value for found in resolve({"cases": [5, 6]}, "/cases/0-1")] == [5, 6]


@pytest.mark.parametrize("lost", ["/grid/9", "/grid/0-9", "/other", "/grid/x", "/grid/0/x/y"])
def test_a_place_that_is_not_there(lost: str):
    with pytest.raises(LookupError):
        resolve({"grid": [{"x": 1}]}, lost)


def test_names_are_escaped_on_the_way_and_in_the_address():
    odd = "a/b~c (d)"
    where = pointer("curve", odd)
    assert where == "/curve/a~1b~0c (d)"
    assert resolve({"curve": {odd: 3}}, where)[0].value == 3
    assert link("3", where) == "[3](results.json#/curve/a~1b~0c%20%28d%29)"
