"""Derivatives of the InfoNCE operators, autograd's modes, layouts and repeated runs."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from fresh_process import run_python
from info_nce_cases import (
    DIFFERENTIABLE,
    NAMES,
    Inputs,
    Losses,
    Target,
    assert_equal_to,
    eager_losses,
    fingerprints,
    losses_and_gradients,
    make_inputs,
    targets,
    targets_by_dtype,
)
from torch import Tensor

from himo_kernels.dispatch import OPERATORS
from himo_kernels.info_nce.op import CACHING_BACKENDS
from himo_kernels.testing import relative_error

EXACT = 1e-12


def per_target(*operators: str, dtype: torch.dtype = torch.float32) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("target", targets(*operators, dtype=dtype))


def leaves_of(inputs: Inputs) -> Inputs:
    return {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}


def arguments_of(target: Target, inputs: Inputs) -> list[Tensor]:
    # The kernels' arguments: the public function's, with rank before logit_scale.
    *features, scale = (inputs[name].detach() for name in DIFFERENTIABLE[target.operator])
    if target.operator != "dual_info_nce_low_rank":
        return [*features, scale]
    rank = torch.full(features[0].shape[:-2], features[2].shape[-1], device=scale.device)
    return [*features, rank, scale]


class TestDerivatives:
    @per_target(*NAMES, dtype=torch.float64)
    @pytest.mark.parametrize(
        "shape", [(3, 5), (5, 3), (2, 3, 4), (2, 2, 3, 2)], ids=lambda s: "x".join(map(str, s))
    )
    @pytest.mark.parametrize("label_smoothing", [0.0, 0.1], ids="smoothing={}".format)
    @pytest.mark.sample
    def test_gradcheck(
        self,
        target: Target,
        shape: tuple[int, ...],
        label_smoothing: float,
        generator: torch.Generator,
    ) -> None:
        *batch, samples, features = shape
        inputs = make_inputs(
            target.operator,
            samples,
            features,
            batch=tuple(batch),
            inner=2,
            device=target.device,
            generator=generator,
        )

        def function(*values: Tensor) -> Losses:
            return target(**dict(zip(inputs, values, strict=True)), label_smoothing=label_smoothing)

        leaves = tuple(leaves_of(inputs).values())
        assert torch.autograd.gradcheck(function, leaves, atol=1e-6, rtol=1e-5)

    @per_target(*NAMES, dtype=torch.float64)
    def test_directional_derivative_of_random_problems(
        self, target: Target, generator: torch.Generator
    ) -> None:
        # 100 problems per operator, each with another shape, scale, smoothing and rank: the slope
        # along one random direction, by central differences.
        step = 1e-5
        for _ in range(100):
            samples, features, inner = torch.randint(1, 10, (3,), generator=generator).tolist()
            inputs = make_inputs(
                target.operator,
                samples,
                features,
                inner=inner,
                scale=30 * torch.rand((), generator=generator).item() - 10,
                device=target.device,
                generator=generator,
            )
            options = {"label_smoothing": torch.rand((), generator=generator).item()}
            if target.operator == "dual_info_nce_low_rank":
                rank = torch.randint(inner + 1, (), generator=generator)
                options["rank"] = rank.to(target.device)

            def along(shape: torch.Size, device: str = target.device) -> Tensor:
                return torch.randn(shape, dtype=torch.float64, generator=generator).to(device)

            direction = {name: along(value.shape) for name, value in inputs.items()}
            ahead = {name: value + step * direction[name] for name, value in inputs.items()}
            behind = {name: value - step * direction[name] for name, value in inputs.items()}
            losses_ahead, losses_behind = target(**ahead, **options), target(**behind, **options)
            weights = tuple(along(loss.shape) for loss in losses_ahead)
            _, gradients = losses_and_gradients(target, inputs, weights, **options)
            slope = sum((gradients[name] * direction[name]).sum() for name in inputs)
            difference = sum(
                weight * (after - before) / (2 * step)
                for weight, after, before in zip(weights, losses_ahead, losses_behind, strict=True)
            )
            case = f"N={samples}, D={features}, K={inner}, scale={inputs['logit_scale']}, {options}"
            error = abs(slope - difference).item()
            assert error <= 1e-6 * (1 + abs(difference).item()), f"{case}: off by {error:.1e}"

    @per_target(*NAMES)
    def test_double_backward_is_refused(self, target: Target, generator: torch.Generator) -> None:
        inputs = make_inputs(
            target.operator, 4, 3, dtype=torch.float32, device=target.device, generator=generator
        )
        leaves = leaves_of(inputs)
        with pytest.raises(RuntimeError, match=f"^{target.operator}: expected a first-order"):
            torch.autograd.grad(sum(target(**leaves)), leaves["image_features"], create_graph=True)

    @per_target(*NAMES)
    @pytest.mark.parametrize("keep_logits_mib", [0, 1])
    def test_logits_are_saved_only_within_their_budget(
        self, target: Target, keep_logits_mib: float, generator: torch.Generator
    ) -> None:
        samples = 64
        losses = 1 if target.operator == "info_nce" else 2
        inputs = make_inputs(
            target.operator,
            samples,
            5,
            dtype=torch.float32,
            device=target.device,
            generator=generator,
        )
        saved: list[int] = []

        def note(tensor: Tensor) -> Tensor:
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            target(**leaves_of(inputs), keep_logits_mib=keep_logits_mib)
        logits = losses * samples * samples
        if keep_logits_mib and target.backend in CACHING_BACKENDS:
            assert saved.pop() == logits
        assert saved
        assert max(saved) < samples * samples

    @per_target(*NAMES)
    def test_kept_logits_change_no_gradient_by_more_than_rounding(
        self, target: Target, generator: torch.Generator
    ) -> None:
        inputs = make_inputs(
            target.operator,
            70,
            33,
            batch=(2,),
            dtype=torch.float32,
            device=target.device,
            generator=generator,
        )
        _, again = losses_and_gradients(target, inputs, keep_logits_mib=0)
        _, kept = losses_and_gradients(target, inputs, keep_logits_mib=64)
        for name, gradient in kept.items():
            assert relative_error(gradient, again[name]) <= 1e-6, name


class TestRequiresGrad:
    @targets_by_dtype(*NAMES, dtypes=[torch.float32, torch.bfloat16])
    def test_every_subset_gets_its_gradients_and_no_others(
        self, target: Target, dtype: torch.dtype, generator: torch.Generator
    ) -> None:
        inputs = make_inputs(
            target.operator, 9, 6, dtype=dtype, device=target.device, generator=generator
        )
        _, full = losses_and_gradients(target, inputs)
        for size in range(1, len(inputs) + 1):
            for subset in itertools.combinations(inputs, size):
                leaves = {
                    name: value.clone().requires_grad_(name in subset)
                    for name, value in inputs.items()
                }
                sum(loss.sum() for loss in target(**leaves)).backward()
                for name, leaf in leaves.items():
                    if name in subset:
                        assert torch.equal(leaf.grad, full[name]), f"{name} of {subset}"
                    else:
                        assert leaf.grad is None, f"{name} of {subset}"

    @per_target(*NAMES, dtype=torch.bfloat16)
    def test_backward_kernel_returns_nothing_for_what_is_not_needed(
        self, target: Target, generator: torch.Generator
    ) -> None:
        inputs = make_inputs(
            target.operator, 9, 6, dtype=torch.bfloat16, device=target.device, generator=generator
        )
        inputs["logit_scale"] = inputs["logit_scale"].double()
        arguments = arguments_of(target, inputs)
        outputs = target.kernel("fwd")(*arguments, 0.1, target.backend)
        nlls = [output for index, output in enumerate(outputs) if index % 3]
        ones = [torch.ones_like(loss) for loss in outputs[::3]]

        def gradients(needs_grad: tuple[bool, ...]) -> Losses:
            return target.kernel("bwd")(
                *ones, *arguments, *nlls, 0.1, True, list(needs_grad), target.backend
            )

        full = gradients((True,) * len(inputs))
        for gradient, value in zip(full, inputs.values(), strict=True):
            assert (gradient.shape, gradient.dtype) == (value.shape, value.dtype)
        for needs_grad in itertools.product([False, True], repeat=len(inputs)):
            for needed, gradient, wanted in zip(
                needs_grad, gradients(needs_grad), full, strict=True
            ):
                assert torch.equal(gradient, wanted) if needed else gradient.numel() == 0

    @per_target(*NAMES)
    def test_backward_kernel_is_told_what_is_needed(
        self, target: Target, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        table = OPERATORS[target.operator].backends
        backend = table[target.backend]
        asked: list[list[bool]] = []

        def bwd(*arguments: object, **kept: object) -> object:
            asked.append(arguments[-1])
            return backend.kernels["bwd"](*arguments, **kept)

        kernels = {**backend.kernels, "bwd": bwd}  # which plain calls do not use
        changed = dataclasses.replace(backend, kernels=kernels, plain=None)
        monkeypatch.setitem(table, target.backend, changed)
        inputs = make_inputs(
            target.operator, 9, 6, dtype=torch.float32, device=target.device, generator=generator
        )
        for wanted in inputs:
            leaves = {
                name: value.clone().requires_grad_(name == wanted) for name, value in inputs.items()
            }
            sum(target(**leaves)).backward()
            assert asked.pop() == [name == wanted for name in inputs]

    @per_target(*NAMES)
    def test_nothing_requires_grad(self, target: Target, generator: torch.Generator) -> None:
        inputs = make_inputs(
            target.operator, 4, 3, dtype=torch.float32, device=target.device, generator=generator
        )
        assert all(loss.grad_fn is None for loss in target(**inputs))
        with torch.no_grad():
            assert not any(loss.requires_grad for loss in target(**leaves_of(inputs)))


class TestUpstreamGradient:
    @per_target(*NAMES, dtype=torch.float64)
    def test_every_loss_has_a_gradient_of_its_own(
        self, target: Target, generator: torch.Generator
    ) -> None:
        inputs = make_inputs(
            target.operator, 5, 6, batch=(4,), device=target.device, generator=generator
        )
        upstream = tuple(
            torch.randn(4, dtype=torch.float64, generator=generator).to(target.device)
            for _ in target(**inputs)
        )
        assert_equal_to(
            losses_and_gradients(target, inputs, upstream),
            losses_and_gradients(eager_losses, inputs, upstream),
            EXACT,
        )

    @per_target(*NAMES, dtype=torch.float64)
    def test_expanded_upstream_gradient(self, target: Target, generator: torch.Generator) -> None:
        # sum().backward() passes one element with stride 0.
        inputs = make_inputs(
            target.operator, 5, 6, batch=(2, 3), device=target.device, generator=generator
        )
        leaves = leaves_of(inputs)
        sum(loss.sum() for loss in target(**leaves)).backward()
        _, expected = losses_and_gradients(eager_losses, inputs)
        for name, leaf in leaves.items():
            assert relative_error(leaf.grad, expected[name]) <= EXACT, name

    @per_target(*NAMES)
    def test_retained_graph_gives_the_same_gradient_again(
        self, target: Target, generator: torch.Generator
    ) -> None:
        inputs = make_inputs(
            target.operator, 9, 6, dtype=torch.float32, device=target.device, generator=generator
        )
        leaves = leaves_of(inputs)
        loss = sum(target(**leaves))
        wanted = list(leaves.values())
        first = torch.autograd.grad(loss, wanted, retain_graph=True)
        second = torch.autograd.grad(loss, wanted)
        assert all(map(torch.equal, first, second))
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(loss, wanted)

    @per_target(*NAMES)
    def test_an_input_changed_before_backward_is_noticed(
        self, target: Target, generator: torch.Generator
    ) -> None:
        inputs = make_inputs(
            target.operator, 9, 6, dtype=torch.float32, device=target.device, generator=generator
        )
        leaves = leaves_of(inputs)
        loss = sum(target(**leaves))
        with torch.no_grad():
            leaves["text_features"].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


class TestOneSpecificationOfWhatIsSaved:
    @per_target(*NAMES)
    @pytest.mark.parametrize("differentiate_keys", [True, False], ids=["keys", "constant-keys"])
    @pytest.mark.sample
    def test_any_backward_takes_any_forward(
        self, target: Target, differentiate_keys: bool, generator: torch.Generator
    ) -> None:
        inputs = make_inputs(
            target.operator,
            20,
            17,
            batch=(2,),
            dtype=torch.float32,
            device=target.device,
            generator=generator,
        )
        arguments = arguments_of(target, inputs)
        outputs = target.kernel("fwd")(*arguments, 0.1, target.backend)
        upstream = tuple(
            torch.randn(2, generator=generator).to(target.device) for _ in outputs[::3]
        )
        nlls = [output for index, output in enumerate(outputs) if index % 3]
        assert all(nll.shape == (2, 20) for nll in nlls)
        options = {"label_smoothing": 0.1, "differentiate_keys": differentiate_keys}
        _, exact = losses_and_gradients(
            eager_losses,
            {name: value.double() for name, value in inputs.items()},
            tuple(weight.double() for weight in upstream),
            **options,
        )
        for backend in OPERATORS[target.operator].backends:
            if OPERATORS[target.operator].why_not(backend, *arguments) is not None:
                continue
            gradients = target.kernel("bwd")(
                *upstream, *arguments, *nlls, *options.values(), [True] * len(inputs), backend
            )
            for name, gradient in zip(inputs, gradients, strict=True):
                error = relative_error(gradient, exact[name])
                if name == "logit_scale":  # a difference of mean cosines: relative to cosines
                    error *= min(1.0, exact[name].norm().item())
                assert error <= 1e-5, f"forward {target.backend}, backward {backend}: {name}"

    @targets_by_dtype(*NAMES, dtypes=[torch.float32, torch.bfloat16])
    def test_a_hundred_runs_give_one_bit_pattern(
        self, target: Target, dtype: torch.dtype, generator: torch.Generator
    ) -> None:
        inputs = make_inputs(
            target.operator,
            100,
            67,
            scale=100.0,
            dtype=dtype,
            device=target.device,
            generator=generator,
        )
        losses, gradients = losses_and_gradients(target, inputs, label_smoothing=0.1)
        for _ in range(99):
            again, gradients_again = losses_and_gradients(target, inputs, label_smoothing=0.1)
            assert all(map(torch.equal, losses, again))
            for name, gradient in gradients.items():
                assert torch.equal(gradients_again[name], gradient), name


@pytest.mark.slow
def test_another_process_gives_the_same_bits(generator: torch.Generator) -> None:
    # With a fixed number of threads, on which the order of sums depends.
    seed = int(torch.randint(2**31, (), generator=generator))
    program = (
        f"import json, sys, torch; sys.path[:0] = {[str(p) for p in Path(__file__).parents[:2]]!r};"
        f"torch.set_num_threads({torch.get_num_threads()});"
        f"from info_nce_cases import fingerprints; print(json.dumps(fingerprints({seed})))"
    )
    assert json.loads(run_python("-c", program)) == fingerprints(seed)


def transposed(value: Tensor) -> Tensor:
    return value.mT.contiguous().mT


def sliced(value: Tensor) -> Tensor:
    # Every second column of every second row, with an offset.
    wide = value.new_full((*value.shape[:-2], 2 * value.shape[-2], 2 * value.shape[-1] + 1), 7.0)
    view = wide[..., 1::2, 1::2]
    view.copy_(value)
    return view


def batch_last(value: Tensor) -> Tensor:
    return value.movedim(0, -1).contiguous().movedim(-1, 0)


class TestLayouts:
    @per_target(*NAMES, dtype=torch.float64)
    @pytest.mark.parametrize("layout", [transposed, sliced, batch_last], ids=lambda f: f.__name__)
    def test_strides_do_not_matter(
        self, target: Target, layout: object, generator: torch.Generator
    ) -> None:
        inputs = make_inputs(
            target.operator, 7, 5, batch=(3,), device=target.device, generator=generator
        )
        laid_out = {
            name: layout(value) if value.dim() > 1 else value for name, value in inputs.items()
        }
        assert not laid_out["image_features"].is_contiguous()
        before = {name: value.clone() for name, value in laid_out.items()}
        result = losses_and_gradients(target, laid_out, label_smoothing=0.1)
        assert_equal_to(
            result, losses_and_gradients(eager_losses, inputs, label_smoothing=0.1), EXACT
        )
        for name, value in laid_out.items():
            assert torch.equal(value, before[name]), f"{name} was changed"

    @per_target(*NAMES, dtype=torch.float64)
    def test_expanded_inputs_get_the_sum_of_their_gradients(
        self, target: Target, generator: torch.Generator
    ) -> None:
        # One set of texts for a batch of images, and one row for all images: stride 0 in both.
        inputs = make_inputs(
            target.operator, 6, 5, batch=(3,), device=target.device, generator=generator
        )
        inputs["image_features"] = inputs["image_features"][:, :1].clone()  # [3, 1, 5]
        inputs["text_features"] = inputs["text_features"][:1].clone()  # [1, 6, 5]

        def expanded(function):
            def call(image_features: Tensor, text_features: Tensor, **others: Tensor) -> Losses:
                images, texts = image_features.expand(3, 6, 5), text_features.expand(3, 6, 5)
                return function(image_features=images, text_features=texts, **others)

            return call

        assert_equal_to(
            losses_and_gradients(expanded(target), inputs),
            losses_and_gradients(expanded(eager_losses), inputs),
            EXACT,
        )

    @per_target("info_nce", dtype=torch.float64)
    def test_one_tensor_as_both_features(self, target: Target, generator: torch.Generator) -> None:
        inputs = make_inputs("info_nce", 8, 5, device=target.device, generator=generator)
        features = {"features": inputs["image_features"], "scale": inputs["logit_scale"]}

        def twice(function):
            def call(features: Tensor, scale: Tensor) -> Losses:
                return function(image_features=features, text_features=features, logit_scale=scale)

            return call

        assert_equal_to(
            losses_and_gradients(twice(target), features),
            losses_and_gradients(twice(eager_losses), features),
            EXACT,
        )


class TestLogitScale:
    @targets_by_dtype(*NAMES, dtypes=[torch.float32, torch.bfloat16])
    def test_every_form_gives_one_loss(
        self, target: Target, dtype: torch.dtype, generator: torch.Generator
    ) -> None:
        inputs = make_inputs(
            target.operator, 9, 6, dtype=dtype, device=target.device, generator=generator
        )
        del inputs["logit_scale"]
        scales = [
            torch.tensor(10.0),
            torch.tensor([10.0]),
            torch.tensor([[10.0]]),
            torch.tensor(10.0, dtype=torch.float64),
            torch.tensor(10.0, dtype=torch.bfloat16),
            torch.nn.Parameter(torch.tensor(10.0)),
        ]
        forms = [10.0, 10, *(scale.to(target.device) for scale in scales)]
        results = [target(**inputs, logit_scale=form) for form in forms]
        for form, losses in zip(forms, results, strict=True):
            assert all(loss.shape == () and loss.dtype == torch.float32 for loss in losses)
            assert all(map(torch.equal, losses, results[0])), f"logit_scale = {form!r}"

    @per_target(*NAMES, dtype=torch.bfloat16)
    @pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
    @pytest.mark.parametrize(
        "dtype",
        [torch.float64, torch.float32, torch.bfloat16],
        ids=lambda dtype: str(dtype)[6:],
    )
    def test_gradient_has_its_shape_and_dtype(
        self,
        target: Target,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> None:
        inputs = make_inputs(
            target.operator, 9, 6, dtype=torch.bfloat16, device=target.device, generator=generator
        )
        _, expected = losses_and_gradients(target, inputs)
        scale = torch.full(shape, 10.0, dtype=dtype, device=target.device, requires_grad=True)
        inputs["logit_scale"] = scale
        sum(target(**inputs)).backward()
        assert scale.grad.shape == shape
        assert scale.grad.dtype == dtype
        assert torch.equal(scale.grad.reshape(()), expected["logit_scale"].to(dtype))

    @per_target(*NAMES)
    def test_a_constant_scale_leaves_the_other_gradients_alone(
        self, target: Target, generator: torch.Generator
    ) -> None:
        inputs = make_inputs(
            target.operator, 9, 6, dtype=torch.float32, device=target.device, generator=generator
        )
        _, full = losses_and_gradients(target, inputs)
        scale = inputs.pop("logit_scale")
        for constant in (scale.item(), scale):
            leaves = leaves_of(inputs)
            sum(target(**leaves, logit_scale=constant)).backward()
            for name, leaf in leaves.items():
                assert torch.equal(leaf.grad, full[name]), name

    @per_target("info_nce", dtype=torch.float64)
    def test_gradient_reaches_the_logarithm_that_a_model_trains(
        self, target: Target, generator: torch.Generator
    ) -> None:
        # d L(exp t) / dt = s dL/ds.
        inputs = make_inputs("info_nce", 9, 6, device=target.device, generator=generator)
        _, gradients = losses_and_gradients(target, inputs)
        logarithm = torch.tensor(math.log(10.0), dtype=torch.float64, device=target.device)
        logarithm.requires_grad_()
        (loss,) = target(**{**inputs, "logit_scale": logarithm.exp()})
        loss.backward()
        torch.testing.assert_close(
            logarithm.grad, 10.0 * gradients["logit_scale"], rtol=EXACT, atol=EXACT
        )
