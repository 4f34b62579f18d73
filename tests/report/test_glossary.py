import re
from pathlib import Path

from moejax.report._glossary import GLOSSARY, glossary

README = Path(__file__).resolve().parents[2] / "README.md"


def test_words_mean_what_the_readme_says():
    section = README.read_text(encoding="utf-8").split("## Glossary\n")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", section, re.MULTILINE))
    assert rows.pop("word") == "meaning"
    assert rows == GLOSSARY
    assert all(f"| {word} | {meaning} |" in glossary() for word, meaning in rows.items())
