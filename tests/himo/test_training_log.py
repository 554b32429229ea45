"""himo.training_log: the lines of metrics.jsonl."""

import json
from pathlib import Path

import pytest
import torch

from himo.training_log import TrainingLog, per_second


def test_rate_is_none_where_no_time_has_passed() -> None:
    assert per_second(12, 3.0) == 4.0
    assert per_second(12, 0.0) is None
    assert per_second(12, -1.0) is None


@pytest.mark.parametrize(("step_s", "expected"), [(0.5, 16.0), (0.0, None)])
def test_line_has_a_rate_where_time_has_passed(
    step_s: float, expected: float | None, tmp_path: Path
) -> None:
    metrics = TrainingLog(tmp_path / "metrics.jsonl", pairs_per_step=8)
    loss = torch.tensor(2.0)
    metrics.add_time(0.0, step_s)
    metrics.add(loss, torch.tensor(1.0))
    outputs = {"loss": loss, "contrastive_loss": loss, "component_loss": None, "rank": 3}
    outputs["text_features"] = torch.eye(8)
    metrics.write(1, 0.1, 1e-3, torch.tensor(0.0), outputs)
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["samples_per_s"] == expected
    assert line["step_time_s"] == step_s
