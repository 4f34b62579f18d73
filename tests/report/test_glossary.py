import re
from pathlib import Path

from moejax.report._glossary import GLOSSARY, STRATEGIES, glossary, strategies_table
from moejax.report._palette import STRATEGY_ORDER

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


def test_words_mean_what_the_readme_says():
    section = README.split("## Glossary\n")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", section, re.MULTILINE))
    assert rows.pop("word") == "meaning"
    assert rows == GLOSSARY
    assert all(f"| {word} | {meaning} |" in glossary() for word, meaning in rows.items())


def test_strategies_do_what_the_readme_says():
    section = README.split("## Strategies\n")[1].split("\n## ")[0]
    said = {
        name: tuple(words)
        for names, *words in re.findall(r"^\| (`.*`) \| (.*) \| (.*) \| (.*) \|$", section, re.M)
        for name in names.replace("`", "").split(", ")
    }
    assert set(said) == set(STRATEGIES) == set(STRATEGY_ORDER)
    for name, (looks, keeps, prefetches) in said.items():
        assert STRATEGIES[name][::2] == (looks, prefetches)
        # What the README says of several at once, the report says of each.
        assert STRATEGIES[name][1] == keeps or "their names" in keeps or "these caches" in keeps


def test_only_strategies_of_the_run_are_told():
    table = strategies_table(("lru", "pinned(lru)"))
    assert table.splitlines()[2:] == ["| `lru` | the past | what was used last | nothing |"]
    assert strategies_table(("pinned(lru)",)) == ""
