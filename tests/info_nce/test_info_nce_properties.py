"""Identities of InfoNCE on generated batches: symmetries, limits, properties of gradients."""

import itertools
import math

import pytest
import torch
from info_nce_cases import (
    NAMES,
    Inputs,
    Target,
    losses_and_gradients,
    make_inputs,
    targets,
    targets_by_dtype,
)
from torch import Tensor

from himo_kernels.testing import DEGENERATE

hypothesis = pytest.importorskip(
    "hypothesis", reason="property tests need hypothesis: pip install hypothesis"
)
st = hypothesis.strategies

EXAMPLES = hypothesis.settings().max_examples  # per property and backend
EXACT = 1e-12
SCALES = st.floats(-30, 100)  # an untrained model, a wrong sign, and CLIP's clamp

in_float64 = pytest.mark.parametrize("target", targets("info_nce", dtype=torch.float64))

# No database: a failure prints the blob that reproduces it, and no file is written. No deadline:
# other tests and threads share the processor.
many_examples = hypothesis.settings(deadline=None, database=None, print_blob=True)


@st.composite
def batches(
    draw,
    min_samples: int = 1,
    scales: st.SearchStrategy[float] = SCALES,
) -> tuple[Inputs, float]:
    """Rows [N, D] of length 1 around a common mean, a scale, and a label smoothing.

    The numbers come from a seed: hypothesis looks for shapes and settings, not for digits.
    """
    inputs = make_inputs(
        "info_nce",
        draw(st.integers(min_samples, 24), "N"),
        draw(st.integers(2, 24), "D"),
        scale=draw(scales, "scale"),
        generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1), "seed")),
    )
    return inputs, draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]), "label smoothing")


def on_device(target: Target, inputs: Inputs) -> Inputs:
    return {name: value.to(target.device) for name, value in inputs.items()}


def loss_of(target: Target, inputs: Inputs, label_smoothing: float = 0.0, **changed) -> float:
    (loss,) = target(**{**inputs, **changed}, label_smoothing=label_smoothing)
    return loss.item()


def rows_and_columns(target: Target, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Returns -log of each positive's probability among its row, and among its column."""
    _, rows, columns = target.kernel("fwd")(*inputs.values(), 0.0, target.backend)
    return rows, columns


def close(value: object) -> object:
    # Logits reach 100: equal sums in another order differ by about 1e-14.
    return pytest.approx(value, rel=EXACT, abs=EXACT)


@in_float64
@many_examples
@hypothesis.given(batches())
def test_loss_is_not_negative_without_smoothing(target, batch):
    inputs = on_device(target, batch[0])
    rows, columns = rows_and_columns(target, inputs)
    assert (rows >= 0).all()
    assert (columns >= 0).all()
    assert loss_of(target, inputs) >= 0


@in_float64
@many_examples
@hypothesis.given(batches(min_samples=2), st.randoms(use_true_random=False))
def test_order_of_the_pairs_does_not_matter(target, batch, random):
    inputs, label_smoothing = on_device(target, batch[0]), batch[1]
    order = list(range(len(inputs["image_features"])))
    random.shuffle(order)
    permuted = dict(inputs)
    for name in ("image_features", "text_features"):
        permuted[name] = inputs[name][order]
    (loss,), gradients = losses_and_gradients(target, inputs, label_smoothing=label_smoothing)
    (other,), moved = losses_and_gradients(target, permuted, label_smoothing=label_smoothing)
    assert other.item() == close(loss.item())
    for name in ("image_features", "text_features"):
        torch.testing.assert_close(moved[name], gradients[name][order], rtol=EXACT, atol=EXACT)
    assert moved["logit_scale"].item() == close(gradients["logit_scale"].item())


@in_float64
@many_examples
@hypothesis.given(batches())
def test_images_and_texts_may_change_places(target, batch):
    inputs, label_smoothing = on_device(target, batch[0]), batch[1]
    image, text, scale = inputs.values()
    swapped = {"image_features": text, "text_features": image, "logit_scale": scale}
    for differentiate_keys in (True, False):
        options = {"label_smoothing": label_smoothing, "differentiate_keys": differentiate_keys}
        (loss,), gradients = losses_and_gradients(target, inputs, **options)
        (other,), mirrored = losses_and_gradients(target, swapped, **options)
        assert other.item() == close(loss.item())
        for name, mirror in (
            ("image_features", "text_features"),
            ("text_features", "image_features"),
            ("logit_scale", "logit_scale"),
        ):
            torch.testing.assert_close(mirrored[mirror], gradients[name], rtol=EXACT, atol=EXACT)


@in_float64
@many_examples
@hypothesis.given(batches(), st.integers(0, 2**31 - 1))
def test_a_vector_added_to_all_texts_leaves_the_rows_alone(target, batch, seed):
    # It adds one number to all logits of an image, which does not change a softmax over the texts.
    inputs = on_device(target, batch[0])
    generator = torch.Generator().manual_seed(seed)
    width = inputs["text_features"].shape[-1]
    vector = torch.randn(width, dtype=torch.float64, generator=generator) / width**0.5
    rows, columns = rows_and_columns(target, inputs)
    shifted, moved = dict(inputs), dict(inputs)
    shifted["text_features"] = inputs["text_features"] + vector.to(target.device)
    moved["image_features"] = inputs["image_features"] + vector.to(target.device)
    torch.testing.assert_close(rows_and_columns(target, shifted)[0], rows, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(rows_and_columns(target, moved)[1], columns, rtol=1e-11, atol=1e-11)


@in_float64
@many_examples
@hypothesis.given(batches(scales=st.just(0.0)))
@pytest.mark.sample(12)
def test_scale_zero_is_a_uniform_guess(target, batch):
    inputs, label_smoothing = on_device(target, batch[0]), batch[1]
    samples = len(inputs["image_features"])
    assert loss_of(target, inputs, label_smoothing) == close(math.log(samples))


@in_float64
@many_examples
@hypothesis.given(batches(scales=st.floats(-20, 40)))
@pytest.mark.sample(12)
def test_gradient_of_the_scale_is_the_slope(target, batch):
    inputs, label_smoothing = on_device(target, batch[0]), batch[1]
    step = 1e-5
    scale = inputs["logit_scale"]
    _, gradients = losses_and_gradients(target, inputs, label_smoothing=label_smoothing)
    ahead, behind = (
        loss_of(target, inputs, label_smoothing, logit_scale=scale + by) for by in (step, -step)
    )
    slope = (ahead - behind) / (2 * step)
    assert gradients["logit_scale"].item() == pytest.approx(slope, rel=1e-7, abs=1e-8)


@in_float64
@many_examples
@hypothesis.given(batches())
def test_gradients_of_features_and_scale_agree_on_size(target, batch):
    # S is of first degree in V, in U and in s: <V, dL/dV> = <U, dL/dU> = s dL/ds = <S, dL/dS>.
    inputs, label_smoothing = on_device(target, batch[0]), batch[1]
    _, gradients = losses_and_gradients(target, inputs, label_smoothing=label_smoothing)
    along = {name: (gradients[name] * inputs[name]).sum().item() for name in inputs}
    size = pytest.approx(along["logit_scale"], rel=1e-11, abs=1e-11)
    assert along["image_features"] == size
    assert along["text_features"] == size


@in_float64
@many_examples
@hypothesis.given(batches())
def test_constant_keys_give_no_gradient_along_what_all_keys_share(target, batch):
    # With constant keys the gradient of an image is s sum_j G_ij u_j with sum_j G_ij = 0, so a
    # vector that all texts share adds nothing to it; and the same for the texts.
    inputs, label_smoothing = on_device(target, batch[0]), batch[1]
    options = {"label_smoothing": label_smoothing, "differentiate_keys": False}
    _, gradients = losses_and_gradients(target, inputs, **options)
    # One more feature, 1 in every key and 0 in every query, leaves the logits as they are; the
    # gradient of the queries in it is s times the row sums of G.
    for query, key in (("image_features", "text_features"), ("text_features", "image_features")):
        wide = dict(inputs)
        wide[query] = torch.nn.functional.pad(inputs[query], (0, 1))
        wide[key] = torch.nn.functional.pad(inputs[key], (0, 1), value=1.0)
        _, widened = losses_and_gradients(target, wide, **options)
        assert widened[query][:, -1].abs().max().item() == close(0.0)
        torch.testing.assert_close(widened[query][:, :-1], gradients[query], rtol=EXACT, atol=EXACT)


@in_float64
@many_examples
@hypothesis.given(batches(), st.floats(0, 1))
def test_smoothing_interpolates(target, batch, label_smoothing):
    # The target distribution, and with it loss and gradients, is linear in the smoothing.
    inputs = on_device(target, batch[0])
    (none,), plain = losses_and_gradients(target, inputs)
    (full,), uniform = losses_and_gradients(target, inputs, label_smoothing=1.0)
    (loss,), gradients = losses_and_gradients(target, inputs, label_smoothing=label_smoothing)
    torch.testing.assert_close(
        loss, torch.lerp(none, full, label_smoothing), rtol=EXACT, atol=EXACT
    )
    for name, gradient in gradients.items():
        expected = torch.lerp(plain[name], uniform[name], label_smoothing)
        torch.testing.assert_close(gradient, expected, rtol=EXACT, atol=EXACT)


@in_float64
@many_examples
@hypothesis.given(
    batches(scales=st.one_of(st.floats(-30, -1e-9), st.floats(1e-9, 100))),
    st.sampled_from([0.5, 2.0, 8.0]),
)
def test_scale_and_length_of_features_are_one_factor(target, batch, factor):
    # Powers of two, and no scale so small that products underflow: products are equal, and the loss
    # is bitwise equal.
    inputs, label_smoothing = on_device(target, batch[0]), batch[1]
    longer = dict(inputs)
    longer["image_features"] = inputs["image_features"] * factor
    longer["logit_scale"] = inputs["logit_scale"] / factor
    (loss,), gradients = losses_and_gradients(target, inputs, label_smoothing=label_smoothing)
    (other,), scaled = losses_and_gradients(target, longer, label_smoothing=label_smoothing)
    assert other.item() == loss.item()
    assert torch.equal(scaled["text_features"], gradients["text_features"])
    assert torch.equal(scaled["image_features"], gradients["image_features"] / factor)
    assert torch.equal(scaled["logit_scale"], gradients["logit_scale"] * factor)


@in_float64
@many_examples
@hypothesis.given(batches(), st.integers(0, 2**31 - 1))
def test_a_common_rotation_turns_the_gradients(target, batch, seed):
    inputs, label_smoothing = on_device(target, batch[0]), batch[1]
    generator = torch.Generator().manual_seed(seed)
    width = inputs["text_features"].shape[-1]
    rotation, _ = torch.linalg.qr(
        torch.randn(width, width, dtype=torch.float64, generator=generator)
    )
    rotation = rotation.to(target.device)
    turned = dict(inputs)
    for name in ("image_features", "text_features"):
        turned[name] = inputs[name] @ rotation
    (loss,), gradients = losses_and_gradients(target, inputs, label_smoothing=label_smoothing)
    (other,), moved = losses_and_gradients(target, turned, label_smoothing=label_smoothing)
    assert other.item() == close(loss.item())
    for name in ("image_features", "text_features"):
        torch.testing.assert_close(moved[name], gradients[name] @ rotation, rtol=1e-11, atol=1e-11)


@in_float64
@many_examples
@hypothesis.given(batches(scales=st.floats(-30, 30)))
def test_repeating_the_batch_adds_log_two(target, batch):
    # Every pair twice: each positive's probability halves, in rows and in columns.
    inputs = on_device(target, batch[0])
    twice = {
        name: torch.cat([value, value]) if value.dim() else value for name, value in inputs.items()
    }
    assert loss_of(target, twice) == close(loss_of(target, inputs) + math.log(2))


@in_float64
@many_examples
@hypothesis.given(batches(), st.integers(0, 2**31 - 1))
def test_one_more_pair_makes_every_positive_less_likely(target, batch, seed):
    inputs = on_device(target, batch[0])
    generator = torch.Generator().manual_seed(seed)
    more = dict(inputs)
    for name in ("image_features", "text_features"):
        row = torch.randn(1, inputs[name].shape[-1], dtype=torch.float64, generator=generator)
        row = torch.nn.functional.normalize(row, dim=-1).to(target.device)
        more[name] = torch.cat([inputs[name], row])
    for before, after in zip(
        rows_and_columns(target, inputs), rows_and_columns(target, more), strict=True
    ):
        assert (after[:-1] >= before * (1 - EXACT)).all()


@in_float64
@many_examples
@hypothesis.given(
    st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4),
    st.integers(1, 12),
    st.integers(1, 12),
    st.floats(0, 1),
)
def test_problems_side_by_side_do_not_meet(target, seeds, samples, features, label_smoothing):
    problems = [
        on_device(
            target,
            make_inputs(
                "info_nce", samples, features, generator=torch.Generator().manual_seed(seed)
            ),
        )
        for seed in seeds
    ]
    joined = {
        name: torch.stack([problem[name] for problem in problems])
        for name in ("image_features", "text_features")
    }
    joined["logit_scale"] = problems[0]["logit_scale"]
    (losses,), gradients = losses_and_gradients(target, joined, label_smoothing=label_smoothing)
    for index, problem in enumerate(problems):
        (loss,), alone = losses_and_gradients(target, problem, label_smoothing=label_smoothing)
        assert losses[index].item() == close(loss.item())
        for name in ("image_features", "text_features"):
            torch.testing.assert_close(gradients[name][index], alone[name], rtol=EXACT, atol=EXACT)


@targets_by_dtype(*NAMES)
@hypothesis.settings(many_examples, max_examples=EXAMPLES // 2)
@hypothesis.given(
    names=st.tuples(*[st.sampled_from(sorted(DEGENERATE))] * 3),
    samples=st.integers(1, 24),
    features=st.integers(1, 24),
    scale=st.sampled_from([0.0, 1.0, 100.0, 1e4, -100.0]),
    label_smoothing=st.floats(0, 1),
    seed=st.integers(0, 2**31 - 1),
)
@pytest.mark.sample
def test_finite_for_every_degenerate_batch(
    target, dtype, names, samples, features, scale, label_smoothing, seed
):
    # Duplicates, equal rows, one-hot rows, zeros ... for images, texts and components alike.
    generator = torch.Generator().manual_seed(seed)
    inputs = make_inputs(
        target.operator, samples, features, scale=scale, dtype=dtype, generator=generator
    )
    replaced = ("image_features", "text_features", "component_features")
    for argument, name in zip(replaced, names, strict=True):
        if argument in inputs:
            rows = DEGENERATE[name](samples, features, dtype=dtype, generator=generator)
            inputs[argument] = rows
    losses, gradients = losses_and_gradients(
        target, on_device(target, inputs), label_smoothing=label_smoothing
    )
    values = itertools.chain(losses, gradients.values())
    assert all(value.isfinite().all() for value in values)
