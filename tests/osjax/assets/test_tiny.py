"""The embedded model's card tells the figures that its evaluation wrote, of the weights that are there."""

import json
import re

import pytest

from osjax.bundle import bytes_on_disk, read_bundle
from osjax.pipeline import EMBEDDED
from osjax.training.evaluate import ASPECT_RATIOS, COND_TYPES, GOALS

SCORES = json.loads((EMBEDDED / "scores.json").read_text(encoding="utf-8"))
CARD = (EMBEDDED / "README.md").read_text(encoding="utf-8")


def rows(columns):
    """Figure → cells of the card's table that has these columns, as they are written."""
    head = f"| | goal | {' | '.join(columns)} |\n"
    lines = CARD.split(head)[1].split("\n\n")[0].splitlines()[1:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {re.match(r"\w+", name).group(): rest for name, *rest in cells}


@pytest.mark.parametrize(("part", "columns"), [("t2v", ASPECT_RATIOS), ("i2v", COND_TYPES)])
def test_the_card_tells_every_figure_and_goal_and_marks_what_falls_short(part, columns):
    table = rows(columns)
    figures = {name: [SCORES[part][column][name] for column in columns] for name in SCORES[part][columns[0]]}
    assert {*figures} - {*table} == {"prompts"}
    assert {*table} <= {*figures}
    for name, (goal, *cells) in table.items():
        wanted = GOALS.get(name)
        assert goal == ("" if wanted is None else f"{wanted:g}")
        short = [wanted is not None and figure < wanted for figure in figures[name]]
        assert cells == [f"**{f:g}**" if under else f"{f:g}" for f, under in zip(figures[name], short, strict=True)]


def test_the_figures_are_of_these_weights_at_their_default_settings():
    bundle = read_bundle(EMBEDDED)
    how = SCORES["how"]
    assert how["bundle_sha256"] == bundle.digest
    assert dict(bundle.settings).items() <= how["request"].items()
    assert {column["prompts"] for part in ("t2v", "i2v") for column in SCORES[part].values()} == {200}
    assert f"{SCORES['vae']['psnr']:g} dB (goal {GOALS['psnr']})" in CARD


def test_the_bundle_is_small_enough_to_lie_in_a_repository():
    everything = sum(path.stat().st_size for path in EMBEDDED.rglob("*") if path.is_file())
    assert everything <= 24 * 2**20
    assert 0 < sum(bytes_on_disk(part) for part in EMBEDDED.iterdir() if part.is_dir()) < everything
