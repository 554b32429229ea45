"""`himo train` takes the steps of the released loop, and those that the paper describes.

Both loops are written out here: losses by SVD and cross-entropy, AdamW by torch, the schedule, the
order and the batches. Towers and tokens are himo's; other tests compare those.
"""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from step_formula import MEAN, STD, dual_loss, order, rate
from torch import Tensor
from train_runs import SMALL, lines, refused, train_here

import himo
from himo.config import TrainConfig
from himo.flags import as_arguments
from himo.model import HiMoCLIP
from himo.optimizer import make_optimizer
from himo.recipes import chosen, other_batch, taken_up, with_model, with_schedule

PAIRS, BATCH, WARMUP, LR = 88, 32, 5, 1e-6
RELEASED_EPOCHS, PUBLISHED_EPOCHS = 4, 6  # of three batches, and of two full ones: 12 steps
CLOSE = 1.6e-5 / 17  # of a loss: a run of the released code on real towers came so close


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Noise in 88 colours, of the model's resolution, and a model of features far apart."""
    folder = tmp_path_factory.mktemp("released")
    rng = np.random.default_rng(0)
    with (folder / "pairs.jsonl").open("w") as file:
        for number in range(PAIRS):
            pixels = rng.integers(0, 255, (32, 32, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
            words = " ".join(f"word{word}" for word in rng.integers(0, 999, 12))
            file.write(json.dumps({"image": f"{number}.png", "caption": words}) + "\n")
    torch.manual_seed(0)
    model = HiMoCLIP(SMALL)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(50))
        for parameter in (model.visual.conv1.weight, model.token_embedding.weight):
            parameter.mul_(10)
    himo.save(model, folder / "small.safetensors")
    return folder / "pairs.jsonl"


def run(pairs: Path, logs: Path, *flags: str) -> list[dict]:
    start = ["--pretrained", str(pairs.with_name("small.safetensors")), "--recipe", "paper-b16"]
    settings = {"batch-size": BATCH, "epochs": RELEASED_EPOCHS, "warmup": WARMUP, "lr": LR}
    given = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    assert train_here(pairs, logs, *start, *given, *flags) == 0
    return lines(logs)


def batch(pairs: Path, rows: list[int]) -> tuple[Tensor, Tensor]:
    records = [json.loads(line) for line in pairs.read_text().splitlines()]
    images = [np.asarray(Image.open(pairs.with_name(records[row]["image"]))) for row in rows]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, STD))
    return (pixels - mean) / std, himo.tokenize([records[row]["caption"] for row in rows])


def trained(model: HiMoCLIP) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in model.named_parameters() if value.requires_grad]


def released(
    pairs: Path, *, tau: float = 0.9, log_scale: float = 4.6052, lr: float = LR
) -> tuple[list[float], list[float], HiMoCLIP]:
    """Losses, rates and the model of train/train.py as its run file starts it."""
    model, _ = himo.load(pairs.with_name("small.safetensors"))
    model.train()
    model.logit_scale = torch.nn.Parameter(torch.ones([]) * log_scale)
    optimizer = torch.optim.AdamW([p for _, p in trained(model)], lr=lr, weight_decay=1e-2)
    rows = order(PAIRS, 0)  # in every epoch, with its last batch
    batches = [rows[start : start + BATCH] for start in range(0, PAIRS, BATCH)]
    total = RELEASED_EPOCHS * len(batches)
    losses, rates = [], []
    for step in range(total):
        rates.append(rate(step, total, lr, WARMUP))
        optimizer.param_groups[0]["lr"] = rates[-1]
        optimizer.zero_grad()
        images, tokens = batch(pairs, batches[step % len(batches)])
        features = model.encode_image(images), model.encode_text(tokens)
        scale = model.logit_scale.exp()
        loss = dual_loss(*features, scale, tau, smoothing=0.1, unit=False, constant_keys=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, rates, model


def published(pairs: Path) -> tuple[list[float], list[float], HiMoCLIP]:
    """The same as the paper describes it, with CLIP's clamp and decay of matrices alone."""
    model, _ = himo.load(pairs.with_name("small.safetensors"))
    model.train()
    groups = [
        {"params": [p for _, p in trained(model) if (p.dim() > 1) == has_decay], "weight_decay": wd}
        for has_decay, wd in ((True, 1e-2), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR)
    full = PAIRS // BATCH
    losses, rates = [], []
    for step in range(PUBLISHED_EPOCHS * full):
        rates.append(rate(step, PUBLISHED_EPOCHS * full, LR, WARMUP))
        for group in optimizer.param_groups:
            group["lr"] = rates[-1]
        optimizer.zero_grad()
        first = step % full * BATCH
        rows = order(PAIRS, step // full)[first : first + BATCH]
        images, tokens = batch(pairs, rows)
        features = model.encode_image(images), model.encode_text(tokens)
        loss = dual_loss(*features, model.logit_scale.exp(), tau=0.9)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        losses.append(loss.item())
    return losses, rates, model


def assert_same_steps(
    rows: list[dict], losses: list[float], rates: list[float], model: HiMoCLIP
) -> None:
    assert len(rows) == len(losses) == 12
    assert [row["lr"] for row in rows] == rates
    for row, loss in zip(rows[:11], losses, strict=False):
        assert abs(row["loss"] - loss) <= CLOSE * loss, row["step"]
    assert rows[-1]["logit_scale"] == pytest.approx(model.logit_scale.exp().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("flags", "given"),
    [
        ([], {}),
        (["--lr", "1e-4"], {"lr": 1e-4}),  # so that the weights move
        (["--tau", "0.85"], {"tau": 0.85}),  # the default of train.py, not of its run file
        (["--log-scale", "4"], {"log_scale": 4.0}),
    ],
    ids=" ".join,
)
def test_eleven_steps_are_those_of_the_released_loop(pairs, tmp_path, flags, given):
    rows = run(pairs, tmp_path, "--preset", "official", *flags)
    assert_same_steps(rows, *released(pairs, **given))
    scale = math.exp(given.get("log_scale", 4.6052))
    assert rows[0]["logit_scale"] == pytest.approx(scale, rel=1e-4)
    assert given or rows[0]["logit_scale"] > 100  # above the clamp


def test_eleven_steps_are_those_that_the_paper_describes(pairs, tmp_path):
    rows = run(pairs, tmp_path, "--epochs", str(PUBLISHED_EPOCHS))
    assert_same_steps(rows, *published(pairs))
    assert rows[0]["logit_scale"] == pytest.approx(50, rel=1e-4)  # the checkpoint's


def settings(**given) -> TrainConfig:
    given = {"recipe": "paper-b16", **given}
    return with_schedule(with_model(TrainConfig("x", **given), 1000), 1000)


@pytest.mark.parametrize(
    ("given", "together", "advice"),
    [
        ({}, 128, "; --accum-freq 8 has as many"),
        ({"batch_size": 64, "accum_freq": 2}, 512, "; --accum-freq 4 has as many"),
        ({}, 384, ""),
        ({}, 2048, ""),
        ({}, 1024, None),
        ({"recipe": "auto"}, 128, None),
    ],
    ids=str,
)
def test_another_batch_than_the_papers_is_said(given, together, advice):
    said = other_batch(settings(**given), together)
    expected = f"1024 pairs together, 128 on each of 8 GPUs, and this run {together}{advice}"
    assert said is None if advice is None else said.endswith(expected)


RELEASED = {
    "keep_last_batch": True,
    "same_order": True,
    "decay_all": True,
    "clamp_scale": False,
    "log_scale": 4.6052,
    "tau": 0.9,
}


def test_the_official_preset_is_the_run_file_and_flags_win():
    official = settings(preset="official")
    assert {name: getattr(official, name) for name in RELEASED} == RELEASED
    others = {name: not v if v in (True, False) else v / 2 for name, v in RELEASED.items()}
    given = settings(preset="official", **others)
    assert {name: getattr(given, name) for name in RELEASED} == others


def test_the_paper_preset_and_the_plain_loss_leave_them_off():
    for given in ({}, {"loss": "clip"}):
        found = settings(**given)
        assert found.clamp_scale is True and found.log_scale is None and found.tau is None
        assert found.keep_last_batch is found.same_order is found.decay_all is False


def test_what_the_official_preset_chose_is_listed_as_flags():
    before = TrainConfig("x", recipe="paper-b16", preset="official", tau=0.8)
    after = settings(preset="official", tau=0.8)
    assert " ".join(as_arguments(chosen(before, after))).endswith(
        "--wd 0.01 --warmup 200 --keep-last-batch --same-order --decay-all --no-clamp-scale "
        "--log-scale 4.6052"
    )
    assert not chosen(TrainConfig("x"), settings()).keys() & RELEASED.keys()


@pytest.mark.parametrize("decay_all", [False, True])
def test_decay_spares_vectors_and_the_temperature_or_nothing(decay_all):
    model = HiMoCLIP(SMALL)
    optimizer = make_optimizer(model, settings(decay_all=decay_all))
    decayed = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert decayed == {id(p) for _, p in trained(model)}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            has_decay = decay_all or parameter.dim() >= 2
            assert group["weight_decay"] == (0.01 if has_decay else 0.0)


def test_a_run_that_goes_on_with_the_plain_loss_has_no_tau():
    begun = dataclasses.asdict(settings(preset="official"))
    given = TrainConfig("x", loss="clip", resume="latest", allow_changes="loss,preset,tau")
    new = with_model(taken_up(given, begun), 1000)
    assert new.tau is None and new.log_scale == 4.6052 and new.decay_all is True
    for name in RELEASED:  # a checkpoint of before these flags
        del begun[name]
    assert with_model(taken_up(given, begun), 1000).tau is None


def test_a_checkpoint_of_before_these_flags_goes_on_as_it_began():
    old = dataclasses.asdict(settings(preset="official"))
    for name in RELEASED:
        del old[name]
    old["tau"] = None
    new = with_model(taken_up(TrainConfig("x", preset="official"), old), 1000)
    assert new.decay_all is new.same_order is new.keep_last_batch is new.clamp_scale is False
    assert new.tau == 0.85


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--log-scale", "-1"], "--log-scale: expected 0.0 to 20.0, got -1.0"),
        (["--log-scale", "21"], "--log-scale: expected 0.0 to 20.0, got 21.0"),
        (["--log-scale", "nan"], "--log-scale: expected 0.0 to 20.0, got nan"),
    ],
)
def test_bad_values_are_named(pairs, tmp_path, capsys, flags, said):
    assert said in refused(capsys, pairs, tmp_path, *flags)
