"""The paper's tables: their values, bootstrap intervals, and cells as csv, LaTeX and text."""

import csv
import io
import re
import zlib

import numpy as np
import pytest
from evaluate_cases import CONFIG
from hypothesis import given, settings
from hypothesis import strategies as st

from himo.clip_config import CLIPConfig
from himo.errors import HimoError
from himo.evaluate.intervals import DRAWS, estimate, mean_estimate
from himo.evaluate.paper import BACKBONES, OURS, TABLES
from himo.evaluate.suite import Scored
from himo.evaluate.tables import (
    Model,
    backbone,
    csv_text,
    latex,
    shown_cell,
    tables,
    terminal,
)

LARGE = CLIPConfig(
    **CONFIG.to_dict()
    | {"image_resolution": 224, "vision_width": 1024, "vision_patch_size": 14, "vision_layers": 2}
)
SETS = {
    "urban1k": ("R@1 I2T", "R@1 T2I", "HiMo@2", "HiMo@3"),
    "docci": ("R@1 I2T", "R@1 T2I", "HiMo@2", "HiMo@3"),
    "long-dci": ("R@1 I2T", "R@1 T2I", "HiMo@2", "HiMo@3"),
    "cola": ("COLA",),
}


def _model(config: CLIPConfig, name: str = "run_1.pt") -> Model:
    """Measures of 100 hits or misses each, 60 of them hits in urban1k, 70 in docci, ..."""
    scored = {}
    for number, (of, measures) in enumerate(SETS.items()):
        values = [100.0] * (60 + 10 * number) + [0.0] * (40 - 10 * number)
        sections = {"protocol": {"images": 100, "official_size": None}}
        scored[of] = Scored(sections, {x: estimate(values, name=of) for x in measures})
    return Model(name, config, scored)


def test_the_averages_that_the_paper_prints_are_those_of_its_values():
    (table,) = [table for table in TABLES if table.number == 3]
    assert len(table.rows) == 7
    for _, _, values in table.rows:
        for start in (0, 4):
            # Printed to one decimal, each of the three and their mean.
            assert abs(sum(values[start : start + 3]) / 3 - values[start + 3]) <= 0.1


def test_every_row_of_the_paper_has_a_value_for_each_column():
    assert [len(table.rows) for table in TABLES] == [19, 14, 7]
    for table in TABLES:
        assert all(len(values) == len(table.columns) for _, _, values in table.rows)
        ours = [of for method, of, _ in table.rows if method == OURS]
        assert ours == list(BACKBONES[1:] if table.number == 3 else BACKBONES)
        best = {of: values for method, of, values in table.rows if method == OURS}
        assert None not in best["ViT-L/14"]


def test_tables_of_a_large_model_have_the_difference_from_the_paper():
    assert backbone(LARGE) == "ViT-L/14"
    found = tables([_model(LARGE)])
    assert [table["table"] for table in found] == [1, 3]  # no short captions were scored
    row = found[0]["rows"][-1]
    assert [cell["value"] for cell in row["cells"]] == [60, 60, 70, 70, 80, 80]
    cell = row["cells"][0]
    assert (cell["paper"], cell["difference"]) == (93.0, 60 - 93.0)
    assert cell["difference_low"] == cell["low"] - 93.0
    assert cell["difference_high"] == cell["high"] - 93.0
    cells = found[1]["rows"][-1]["cells"]
    assert cells[3]["value"] == cells[7]["value"] == 70  # the averages
    assert cells[8] is None and cells[9]["value"] == 90
    # The mean of three sets varies less than each of them.
    assert cells[3]["high"] - cells[3]["low"] < min(x["high"] - x["low"] for x in cells[:3])


@pytest.mark.slow
def test_a_backbone_that_the_paper_lacks_is_told_and_has_no_difference():
    assert backbone(CONFIG) == "width 32, patch 16, 32 px"
    found = tables([_model(CONFIG)])
    assert all("paper" not in cell for cell in found[0]["rows"][-1]["cells"])
    base = CLIPConfig(**LARGE.to_dict() | {"vision_width": 768, "vision_patch_size": 16})
    assert backbone(base) == "ViT-B/16"
    found = tables([_model(base)])
    assert found[0]["rows"][-1]["cells"][0]["paper"] == 89.2
    assert "paper" not in found[1]["rows"][-1]["cells"][0]  # table 3 has ViT-L/14 alone


def test_two_checkpoints_are_rows_of_one_table_and_names_are_escaped():
    models = [_model(LARGE, "=a_1&%.pt"), _model(CONFIG, "b.pt")]
    found = tables(models)
    assert [row["method"] for row in found[0]["rows"][-2:]] == ["=a_1&%.pt", "b.pt"]
    rows = list(csv.DictReader(io.StringIO(csv_text(found, models))))
    assert {row["method"] for row in rows if row["source"] == "measured"} == {"'=a_1&%.pt", "b.pt"}
    text = latex(found)
    assert r"=a\_1\&\%.pt & ViT-L/14 & 60.0" in text
    assert r"\multicolumn{4}{c}{H2}" in text and text.count(r"\midrule") == 3 + 2
    rows = [
        line for line in text.splitlines() if line.endswith(r"\\") and "multicolumn" not in line
    ]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in rows} == {2 + 6 - 1, 2 + 10 - 1}
    assert all(len(line) <= 80 for line in terminal(found, models).splitlines())


@pytest.mark.parametrize(
    ("cell", "decimals", "shown"),
    [
        (None, 1, ("-", "", "")),
        ({"value": 93.0}, 1, ("93.0", "", "")),
        ({"value": 1.25, "low": 1.0, "high": 2.0}, 2, ("1.25", "[1.00, 2.00]", "")),
        (
            {"value": 5.0, "low": 4.0, "high": 6.0, "paper": 5.5, "difference": -0.5}
            | {"difference_low": -1.5, "difference_high": 0.5},
            1,
            ("5.0", "[4.0, 6.0]", "-0.5"),
        ),
    ],
)
def test_a_cell_as_text(cell, decimals, shown):
    assert tuple(shown_cell(cell, decimals)) == shown


def test_the_interval_of_a_share_is_the_binomials():
    count, hits = 400, 120
    of = estimate([1.0] * hits + [0.0] * (count - hits))
    low, high = of.interval()
    assert of.value == 0.3 and of.draws.shape == (DRAWS,)
    spread = (0.3 * 0.7 / count) ** 0.5  # of a binomial share, nearly normal here
    assert low == pytest.approx(0.3 - 1.96 * spread, abs=0.15 * spread)
    assert high == pytest.approx(0.3 + 1.96 * spread, abs=0.15 * spread)
    assert of.draws.std() == pytest.approx(spread, rel=0.06)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(-9, 9), st.integers(0, 5)), min_size=1, max_size=30))
def test_each_draw_is_the_mean_over_the_images_drawn(pairs):
    """Against a loop that draws the same images."""
    values, groups = zip(*pairs, strict=True)
    of = estimate(values, groups, name="x")
    assert of.value == pytest.approx(np.mean(values))
    images = [[v for v, g in pairs if g == group] for group in sorted(set(groups))]
    generator = np.random.default_rng(zlib.crc32(b"x"))
    drawn = generator.integers(len(images), size=(DRAWS, len(images)))
    for draw in (0, 1, DRAWS - 1):
        expected = np.mean([value for image in drawn[draw] for value in images[image]])
        assert of.draws[draw] == pytest.approx(expected)


def test_captions_of_an_image_stay_together():
    values = [1.0, 0.0] * 50
    together = estimate(np.repeat(values, 5).tolist(), np.repeat(np.arange(100), 5).tolist())
    alone = estimate(values)
    assert together.interval() == alone.interval()
    assert together.value == alone.value == 0.5


def test_draws_of_two_sets_are_independent_and_those_of_one_the_same():
    values = np.random.default_rng(0).normal(size=200).tolist()
    first, again, other = (estimate(values, name=name) for name in ("a", "a", "b"))
    assert (first.draws == again.draws).all()
    assert abs(np.corrcoef(first.draws, other.draws)[0, 1]) < 0.1
    mean = mean_estimate([first, other])
    assert mean.value == pytest.approx(first.value)
    assert mean.draws.std() == pytest.approx(first.draws.std() / 2**0.5, rel=0.1)


def test_one_value_has_an_interval_of_no_width_and_none_is_an_error():
    assert estimate([3.0]).interval() == (3.0, 3.0)
    for values, groups in (([], None), ([1.0], [0, 1])):
        with pytest.raises(HimoError, match="expected as many values as groups, at least one"):
            estimate(values, groups)
