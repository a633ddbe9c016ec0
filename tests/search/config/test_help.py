"""What help says comes from the comments in conf/."""

from search.config import help


def test_every_option_has_a_few_words() -> None:
    lines = help.options().splitlines()
    assert "agent=" in lines
    assert any(line.split()[:1] == ["ddpg"] and "AMC" in line for line in lines)
    options = [line for line in lines if line.startswith("  ") and line[2] != " "]
    assert all(len(line.split()) > 1 for line in options)
    assert max(map(len, lines)) <= 100


def test_settings_have_their_default_and_meaning() -> None:
    lines = help.settings("search").splitlines()
    assert any(line.startswith("  search.episodes=300 ") and "environment" in line for line in lines)
    assert "  max_ratio=0.9               the most that a decision may remove, in (0, 1)" in lines
