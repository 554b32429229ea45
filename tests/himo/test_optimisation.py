"""Averages of the weights, learning rates by layer and step, and towers that are partly frozen."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from train_runs import SMALL, lines, photos, refused, small_model, train_here

import himo
from himo import precision
from himo.average import AverageWeights
from himo.checkpoint.safetensors_files import read_safetensors, write_safetensors
from himo.config import TrainConfig
from himo.errors import HimoError
from himo.model import CONFIGS, HiMoCLIP
from himo.objective import Objective
from himo.optimizer import learning_rate, make_optimizer, set_learning_rate
from himo.run import trained_parameters
from himo.train import build_model
from himo.training_state import find_state

SETTINGS = TrainConfig(train_data="x", model="tiny", lr=1e-3, wd=0.01, epochs=4, warmup=2)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> tuple[Path, list[str]]:
    """(csv, flags) of 24 pairs and a model of 0.8 million parameters."""
    folder = tmp_path_factory.mktemp("photos")
    return photos(folder), small_model(folder)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return himo.load(path)[0].state_dict()


def tensors(path: Path) -> dict[str, torch.Tensor]:
    with open(path, "rb") as file:
        return read_safetensors(file, str(path))[0]


# The average of the weights.


def test_the_average_is_the_weighted_sum_of_all_weights(generator):
    model = torch.nn.Linear(3, 2).double()
    average = AverageWeights(model, decay := 0.9)
    history = [model.weight.detach().clone()]
    for _ in range(7):
        with torch.no_grad():
            model.weight += torch.randn(2, 3, generator=generator, dtype=torch.float64)
        history.append(model.weight.detach().clone())
        average.update()
    steps = len(history) - 1
    shares = [decay**steps, *((1 - decay) * decay ** (steps - t) for t in range(1, steps + 1))]
    assert sum(shares) == pytest.approx(1)
    expected = sum(share * weight for share, weight in zip(shares, history, strict=True))
    torch.testing.assert_close(average.state_dict()["weight"], expected, rtol=0, atol=1e-12)
    before = model.weight
    with average.in_place():
        assert model.weight is before  # for an optimizer
        torch.testing.assert_close(model.weight.detach(), expected, rtol=0, atol=1e-12)
    assert torch.equal(model.weight, history[-1])


def test_the_weights_are_back_after_an_error():
    model = torch.nn.Linear(3, 2)
    average, before = AverageWeights(model, 0.5), model.weight.detach().clone()
    with torch.no_grad():
        model.weight.zero_()
    with pytest.raises(KeyError), average.in_place():
        raise KeyError
    assert not model.weight.any() and torch.equal(average.state_dict()["weight"], before)


def test_a_run_saves_and_validates_the_average_of_its_weights(begun, tmp_path):
    pairs, small = begun
    flags = [*small, "--ema", "0.5", "--save-every-n-steps", "1", "--keep-checkpoints", "0"]
    assert train_here(pairs, tmp_path, *flags, "--held-out", "8", "--seed", "3") == 0
    checkpoints = tmp_path / "run/checkpoints"
    states = [tensors(path) for path in sorted(checkpoints.glob("state-*"))]
    assert len(states) == 4  # of 16 pairs in batches of 8, for 2 epochs
    start = weights(Path(small[1]))
    for name in ("visual.proj", "logit_scale", "positional_embedding_res"):
        expected = start[name].double()
        for state in states:
            expected = 0.5 * expected + 0.5 * state[f"model/{name}"].double()
            torch.testing.assert_close(
                state[f"average/{name}"].double(), expected, rtol=1e-6, atol=1e-8
            )
    saved = weights(checkpoints / "epoch_2.safetensors")
    last = states[-1]
    averaged = [name for name in saved if not name.startswith("positional")]  # saved as one table
    assert all(torch.equal(saved[name], last[f"average/{name}"]) for name in averaged)
    assert not torch.equal(saved["visual.proj"], last["model/visual.proj"])
    assert "average/positional_embedding" not in last  # which is frozen
    # The file of the best holds what was validated: an average of its step.
    best, _ = himo.load(checkpoints / "best.safetensors")
    step = best.provenance["training"]["step"]
    assert torch.equal(best.visual.proj, states[step - 1]["average/visual.proj"])
    # The average takes no part in the training.
    assert train_here(pairs, tmp_path / "raw", *flags[:2], "--held-out", "8", "--seed", "3") == 0
    raw = weights(tmp_path / "raw/run/checkpoints/epoch_2.safetensors")
    assert all(torch.equal(raw[name], last[f"model/{name}"]) for name in averaged)


def test_a_resumed_average_is_the_same_to_the_bit(begun, tmp_path, capsys):
    pairs, small = begun
    flags = [*small, "--ema", "0.9", "--layer-decay", "0.7", "--lr-scheduler", "const-cooldown"]
    flags += ["--epochs-cooldown", "1", "--save-every-n-steps", "1", "--keep-checkpoints", "0"]
    assert train_here(pairs, tmp_path, *flags) == 0
    checkpoints = tmp_path / "run/checkpoints"
    whole = tensors(checkpoints / "state-00000006.safetensors")
    model = weights(checkpoints / "epoch_2.safetensors")
    resumed = ["--resume", str(checkpoints / "state-00000002.safetensors")]
    assert train_here(pairs, tmp_path, *flags, *resumed) == 0
    again = tensors(checkpoints / "state-00000006.safetensors")
    assert again.keys() == whole.keys() and any(n.startswith("average/") for n in again)
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    now = weights(checkpoints / "epoch_2.safetensors")
    assert all(torch.equal(now[name], model[name]) for name in model)
    capsys.readouterr()
    message = refused(capsys, pairs, tmp_path, *flags, *resumed, "--ema", "0.8")
    assert "--ema 0.9 as it began, got 0.8" in message


def test_a_state_without_an_average_begins_one(begun, tmp_path):
    # As a state of an older himo is.
    pairs, small = begun
    flags = [*small, "--save-every-n-steps", "1", "--keep-checkpoints", "0"]
    assert train_here(pairs, tmp_path, *flags, "--epochs", "1") == 0
    checkpoints = tmp_path / "run/checkpoints"
    resumed = ["--resume", str(checkpoints / "state-00000002.safetensors"), "--epochs", "1"]
    assert (
        train_here(pairs, tmp_path, *flags, *resumed, "--ema", "0", "--allow-changes", "ema") == 0
    )
    state = tensors(checkpoints / "state-00000003.safetensors")
    assert torch.equal(state["average/visual.proj"], state["model/visual.proj"])


# The rate of each layer, and of each step.


def test_each_layer_has_its_share_of_the_rate():
    model = HiMoCLIP(CONFIGS["tiny"])
    optimizer = make_optimizer(model, dataclasses.replace(SETTINGS, layer_decay=0.5))
    set_learning_rate(optimizer, 8.0)
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: rates[p] for name, p in model.named_parameters() if p.requires_grad}
    assert (CONFIGS["tiny"].vision_layers, CONFIGS["tiny"].text_layers) == (3, 2)
    expected = {
        **{"logit_scale": 8.0, "visual.proj": 8.0, "text_projection": 8.0},
        **{"visual.ln_post.weight": 4.0, "ln_final.bias": 4.0},
        "visual.transformer.resblocks.2.mlp.c_fc.weight": 4.0,
        "transformer.resblocks.1.attn.in_proj_bias": 4.0,
        "transformer.resblocks.0.ln_1.weight": 2.0,
        "visual.transformer.resblocks.0.attn.in_proj_weight": 1.0,
        **{"token_embedding.weight": 1.0, "positional_embedding_res": 1.0},
        **{"visual.conv1.weight": 0.5, "visual.class_embedding": 0.5, "visual.ln_pre.bias": 0.5},
    }
    assert {name: found[name] for name in expected} == expected
    decays = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    plain = make_optimizer(model, SETTINGS).param_groups
    assert decays == {p: group["weight_decay"] for group in plain for p in group["params"]}
    assert len(plain) == 2 and len(decays) == len(found)


def test_a_step_with_layer_decay_is_that_of_each_layer_alone(generator):
    # AdamW's first step moves each weight by its rate against the sign of its gradient.
    model = HiMoCLIP(CONFIGS["tiny"])
    settings = dataclasses.replace(SETTINGS, layer_decay=0.25, wd=0.0, eps=1e-30)
    optimizer = make_optimizer(model, settings)
    set_learning_rate(optimizer, 1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    for name, share in (("visual.proj", 1), ("transformer.resblocks.0.mlp.c_proj.bias", 1 / 16)):
        parameter = model.get_parameter(name)
        expected = before[name] - 1e-2 * share * parameter.grad.sign()
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-7)


def test_schedules_after_the_warmup():
    rates = {
        name: [
            learning_rate(step, 12, dataclasses.replace(SETTINGS, lr=2.0, **given))
            for step in range(12)
        ]
        for name, given in {
            "cosine": {},
            "const": {"lr_scheduler": "const"},
            "cooldown": {"lr_scheduler": "const-cooldown", "epochs_cooldown": 2},
            "all": {"lr_scheduler": "const-cooldown", "epochs_cooldown": 4},
        }.items()
    }
    assert all(values[:2] == [1.0, 2.0] for values in rates.values())
    assert rates["const"][2:] == [2.0] * 10
    # 12 steps in 4 epochs: the last 6 fall by a sixth each, the first of them not yet.
    assert rates["cooldown"][2:6] == [2.0] * 4
    assert rates["cooldown"][6:] == pytest.approx([2 * left / 6 for left in (6, 5, 4, 3, 2, 1)])
    assert rates["all"][2:] == pytest.approx([2 * left / 12 for left in range(10, 0, -1)])
    assert rates["cosine"][7] == pytest.approx(2 * (1 + math.cos(math.pi / 2)) / 2)


def test_the_rates_of_a_run_follow_its_scheduler(begun, tmp_path):
    pairs, small = begun
    assert train_here(pairs, tmp_path, *small, "--lr-scheduler", "const") == 0
    assert [row["lr"] for row in lines(tmp_path)] == [5e-4, *[1e-3] * 5]


# Towers that are partly frozen.


@pytest.mark.parametrize(
    ("tower", "unlocked"), [*(("image", n) for n in range(6)), *(("text", n) for n in range(5))]
)
def test_the_last_groups_of_a_frozen_tower_are_trained(tower, unlocked, generator):
    flag = {"image": "lock_image_unlocked_groups", "text": "lock_text_unlocked_layers"}[tower]
    given = {f"lock_{tower}": True, flag: unlocked, "loss": "clip"}
    model = build_model(dataclasses.replace(SETTINGS, **given), CPU)
    prefix = "visual." if tower == "image" else ""
    norm, head = ("ln_post", "proj") if tower == "image" else ("ln_final", "text_projection")
    blocks = [f"{prefix}transformer.resblocks.{i}." for i in range(3 if tower == "image" else 2)]
    groups = [
        (f"{prefix}{head}",),
        (blocks.pop(), f"{prefix}{norm}."),
        *((block,) for block in reversed(blocks)),
        ("visual.conv1.", "visual.class", "visual.pos", "visual.ln_pre.")
        if tower == "image"
        else ("token_embedding.", "positional_embedding_res"),
    ]
    trained = tuple(name for group in groups[:unlocked] for name in group)
    for name, parameter in model.named_parameters():
        of_tower = name.startswith("visual.") == (tower == "image") and name != "logit_scale"
        wanted = name.startswith(trained) if of_tower else name != "positional_embedding"
        assert parameter.requires_grad == wanted, name
    images = torch.randint(0, 255, (4, 3, 64, 64), dtype=torch.uint8, generator=generator)
    tokens = himo.tokenize([f"a card with number {number}" for number in range(4)])
    Objective(model, SETTINGS).backward(images, tokens, 12, 4)
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("locked", "said"),
    [
        ({}, "7.5 M of 7.5 M parameters"),
        ({"lock_text": True}, "0.7 M of 7.5 M parameters"),
        (
            {"lock_image": True, "lock_text": True, "lock_image_unlocked_groups": 1},
            "16,385 of 7.5 M parameters",
        ),
    ],
    ids=["all", "images", "projection"],
)
def test_a_run_says_how_many_parameters_it_trains(locked, said):
    model = build_model(dataclasses.replace(SETTINGS, **locked), CPU)
    assert trained_parameters(model) == said


WRONG = {
    ("ema", 1.0): r"--ema: expected a number in \[0, 1\), got 1.0",
    ("ema", -0.1): "--ema: expected a number in",
    ("ema", math.nan): "--ema: expected a number in .* got nan",
    ("layer_decay", 0.0): r"--layer-decay: expected a number in \(0, 1\], got 0.0",
    ("layer_decay", 1.5): "--layer-decay: expected a number in",
    ("epochs_cooldown", 1): "--epochs-cooldown: expected --lr-scheduler const-cooldown beside it",
    ("lr_scheduler", "const-cooldown"): "--epochs-cooldown: expected beside --lr-scheduler",
    ("lock_image_unlocked_groups", 1): "--lock-image-unlocked-groups: expected --lock-image beside",
    ("lock_text_unlocked_layers", 1): "--lock-text-unlocked-layers: expected --lock-text beside it",
    ("lock_text_unlocked_layers", -1): "--lock-text-unlocked-layers: expected at least 0, got -1",
    ("eps", 0.0): "--eps: expected at least 1e-30, got 0.0",
    ("eps", 1e-50): "--eps: expected at least 1e-30, got 1e-50",
    ("grad_clip_norm", 0.0): "--grad-clip-norm: expected more than 0, got 0",
}


@pytest.mark.parametrize(("given", "message"), WRONG.items(), ids=lambda v: str(v[0]))
def test_wrong_values_are_one_line(given, message):
    with pytest.raises(HimoError, match=message):
        dataclasses.replace(SETTINGS, **dict([given]))


def test_more_epochs_of_cooldown_than_there_are_is_an_error():
    with pytest.raises(HimoError, match="--epochs-cooldown: expected at most the 4 epochs.* got 5"):
        dataclasses.replace(SETTINGS, lr_scheduler="const-cooldown", epochs_cooldown=5)


@pytest.mark.parametrize(("tower", "most"), [("image", 5), ("text", 4)])
def test_more_groups_than_a_tower_has_is_an_error(tower, most):
    flag = {"image": "lock_image_unlocked_groups", "text": "lock_text_unlocked_layers"}[tower]
    given = {f"lock_{tower}": True, flag: most + 1}
    message = f"--{flag.replace('_', '-')}: expected at most {most} for this model, got {most + 1}"
    with pytest.raises(HimoError, match=message):
        build_model(dataclasses.replace(SETTINGS, **given), CPU)


# Float16 with a scaled loss. The choice of the dtype is made to take float16 on any processor.


@pytest.fixture
def half_is_fast(monkeypatch):
    monkeypatch.setattr(precision, "is_faster_than_float32", lambda *_: True)


@pytest.mark.slow  # a CPU takes float16 one number at a time
@pytest.mark.parametrize("size", [8, 4])  # the whole batch at once, or in two parts
def test_a_scaled_gradient_is_that_of_float32(size, generator):
    images = torch.randint(0, 255, (8, 3, 32, 32), dtype=torch.uint8, generator=generator)
    tokens = himo.tokenize([f"a card with number {number}" for number in range(8)])
    torch.manual_seed(0)
    start = HiMoCLIP(SMALL).state_dict()
    found = {}
    for name in ("fp32", "amp"):
        settings = dataclasses.replace(SETTINGS, precision=name, loss="clip", batch_size=size)
        model = HiMoCLIP(SMALL)
        model.load_state_dict(start)
        objective, optimizer = Objective(model, settings), make_optimizer(model, settings)
        objective.backward(images, tokens, 12, size)
        if name == "amp":
            largest = max(float(p.grad.abs().max()) for p in model.parameters() if p.requires_grad)
            assert largest > 1000  # they are scaled by 65536
        objective.scaler.unscale_(optimizer)
        found[name] = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    error = (found["amp"] - found["fp32"]).norm() / found["fp32"].norm()
    assert 0 < error < 0.02  # float16 has 11 bits


@pytest.mark.slow
def test_a_scale_that_is_too_large_skips_steps_and_falls(begun, tmp_path, half_is_fast, capsys):
    pairs, small = begun
    flags = [*small, "--precision", "amp", "--save-every-n-steps", "1", "--keep-checkpoints", "0"]
    assert train_here(pairs, tmp_path, *flags) == 0
    state = tmp_path / "run/checkpoints/state-00000003.safetensors"
    with open(state, "rb") as file:
        before, metadata = read_safetensors(file, str(state))
    record = json.loads(metadata["himo_training_state"])
    assert record["scaler"]["scale"] >= 1024  # of a run that went well
    record["scaler"]["scale"] = 2.0**120
    write_safetensors(str(state), before, {"himo_training_state": json.dumps(record)})
    capsys.readouterr()
    assert train_here(pairs, tmp_path, *flags, "--resume", str(state)) == 0
    assert capsys.readouterr().out.count(": skipped, the gradient is ") == 3
    last = state.with_name("state-00000006.safetensors")
    assert find_state(str(last), last.parent).record["scaler"]["scale"] == 2.0**117
    after = tensors(last)
    names = [name for name in after if not name.startswith("random/")]
    assert all(torch.equal(after[name], before[name]) for name in names)


@pytest.mark.slow
def test_a_resumed_scale_is_the_same_to_the_bit(begun, tmp_path, half_is_fast):
    pairs, small = begun
    flags = [*small, "--precision", "amp", "--save-every-n-steps", "1", "--keep-checkpoints", "0"]
    assert train_here(pairs, tmp_path, *flags) == 0
    last = tmp_path / "run/checkpoints/state-00000006.safetensors"
    whole, scaler = tensors(last), find_state(str(last), last.parent).record["scaler"]
    resumed = ["--resume", str(last.with_name("state-00000003.safetensors"))]
    assert train_here(pairs, tmp_path, *flags, *resumed) == 0
    assert find_state(str(last), last.parent).record["scaler"] == scaler
    again = tensors(last)
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_a_fused_step_is_that_of_the_plain_optimizer(generator):
    model = HiMoCLIP(SMALL)
    optimizer = make_optimizer(model, SETTINGS)
    assert all(group["fused"] for group in optimizer.param_groups)
    twins = {p: p.detach().double().requires_grad_() for p in model.parameters() if p.requires_grad}
    groups = [
        {**group, "params": [twins[p] for p in group["params"]], "fused": False}
        for group in optimizer.param_groups
    ]
    plain = torch.optim.AdamW(groups, foreach=False)
    for _ in range(3):
        for parameter, twin in twins.items():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            twin.grad = parameter.grad.double()
        optimizer.step()
        plain.step()
    for parameter, twin in twins.items():
        torch.testing.assert_close(parameter.double(), twin, rtol=1e-5, atol=1e-7)
