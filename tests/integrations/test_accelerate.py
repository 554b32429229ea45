"""himo_kernels.accelerate: same values and gradients, on one instance only, and reversible."""

import copy
import pickle
import re

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from upstream import (
    OLDEST,
    ReleasedCLIP,
    Towers,
    UnpublishedClipLoss,
    oldest_open_clip_loss,
    open_clip_loss,
)

import himo_kernels
from himo_kernels.dispatch import OPERATORS
from himo_kernels.integrations.patch import KINDS

upstream = open_clip_loss()
needs_open_clip = pytest.mark.skipif(
    upstream is None, reason="open_clip_torch is not installed (pip install --no-deps)"
)
WIDTH, FEATURES, ROWS = 24, 16, 40


def batch(generator: torch.Generator, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    image = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)
    noise = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)
    return image, image + 0.5 * noise


def gradients(model: nn.Module, *losses: Tensor) -> list[Tensor]:
    model.zero_grad()
    sum(losses).backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


class TestVersionsOfClipLoss:
    """0.2.0 has three arguments, 3.3.0 five and use_horovod, the repository's no use_horovod."""

    @pytest.fixture(params=["oldest", "newest", "unpublished"])
    def loss(self, request: pytest.FixtureRequest) -> nn.Module:
        if request.param == "unpublished":
            return UnpublishedClipLoss()
        module = oldest_open_clip_loss() if request.param == "oldest" else upstream
        if module is None:
            pytest.skip(f"the {request.param} open_clip_torch is not installed ({OLDEST}, or pip)")
        return module.ClipLoss()

    def test_value_and_gradients(self, loss, generator):
        model, (image, text) = Towers(WIDTH, FEATURES).double(), batch(generator)

        def step() -> tuple[Tensor, list[Tensor]]:
            out = model(image, text)
            value = loss(out["image_features"], out["text_features"], out["logit_scale"])
            return value, gradients(model, value + 0 * model.logit_bias)

        expected = step()
        with himo_kernels.accelerate(loss):
            torch.testing.assert_close(step(), expected, rtol=1e-9, atol=1e-12)
        assert step()[0] == expected[0]

    def test_a_bool_in_fourth_place_is_output_dict(self, loss, generator):
        # Like versions without logit_bias.
        features = Towers(WIDTH, FEATURES).double()(*batch(generator))
        features.pop("logit_bias")
        himo_kernels.accelerate(loss)
        value = loss(*features.values())
        assert loss(*features.values(), True) == {"contrastive_loss": value}
        assert loss(*features.values(), False) == value
        assert loss(*features.values(), None, True) == {"contrastive_loss": value}
        with pytest.raises(TypeError, match="ClipLoss: expected logit_bias to be a number"):
            loss(*features.values(), True, True)

    @pytest.mark.parametrize("name", ["local_loss", "gather_with_grad", "world_size"])
    def test_what_a_version_lacks_is_named(self, loss, name):
        delattr(loss, name)
        with pytest.raises(NotImplementedError, match=rf"got no \['{name}'\]"):
            himo_kernels.accelerate(loss)
        assert "forward" not in vars(loss)


@needs_open_clip
class TestClipLoss:
    @pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
    @pytest.mark.parametrize("output_dict", [False, True])
    def test_value_and_gradients(self, bias, output_dict, generator, used):
        model, (image, text) = Towers(WIDTH, FEATURES).double(), batch(generator)
        loss = upstream.ClipLoss()

        def step() -> tuple[Tensor, list[Tensor]]:
            out = model(image, text)
            if not bias:
                out["logit_bias"] = None
                model.logit_bias.requires_grad_(False)
            value = loss(**out, output_dict=output_dict)
            if output_dict:
                assert list(value) == ["contrastive_loss"]
                value = value["contrastive_loss"]
            return value, gradients(model, value)

        expected = step()
        assert not used
        with himo_kernels.accelerate(loss) as inside:
            assert inside is loss
            found = step()
        assert used == ["info_nce"]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        again = step()  # undone
        assert len(used) == 1
        torch.testing.assert_close(again, expected, rtol=0, atol=0)

    def test_under_autocast_features_are_multiplied_in_its_dtype(self, generator, monkeypatch):
        image, text = (x.float() for x in batch(generator))
        model, loss = Towers(WIDTH, FEATURES), upstream.ClipLoss()
        himo_kernels.accelerate(loss)
        dtypes = []
        resolve = OPERATORS["info_nce"].resolve
        monkeypatch.setattr(
            OPERATORS["info_nce"],
            "resolve",
            lambda name, *tensors: dtypes.append(tensors[0].dtype) or resolve(name, *tensors),
        )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(image, text)
            value = loss(**out)
            # Towers that end in a layer norm give float32; the two towers may differ.
            same = loss(**{**out, "text_features": out["text_features"].float()})
            loss(**{**out, "image_features": out["image_features"].float()})
        assert dtypes == [torch.bfloat16] * 3
        assert same == value and value.dtype == torch.float32
        assert all(gradient.isfinite().all() for gradient in gradients(model, value))

    def test_the_named_backend_alone_computes(self, generator, monkeypatch):
        out, loss = Towers(WIDTH, FEATURES).double()(*batch(generator)), upstream.ClipLoss()
        himo_kernels.accelerate(loss, backend="reference")
        names = []
        resolve = OPERATORS["info_nce"].resolve
        monkeypatch.setattr(
            OPERATORS["info_nce"],
            "resolve",
            lambda name, *tensors: names.append(name) or resolve(name, *tensors),
        )
        loss(**out)
        assert names == ["reference"]

    def test_the_name_alone_makes_no_clip_loss(self):
        ClipLoss = type("ClipLoss", (nn.Module,), {"forward": upstream.ClipLoss.forward})
        with pytest.raises(TypeError, match=r"got .*\.ClipLoss$"):
            himo_kernels.accelerate(ClipLoss())

    def test_under_autocast_float64_stays(self, generator):
        out, loss = Towers(WIDTH, FEATURES).double()(*batch(generator)), upstream.ClipLoss()
        expected = loss(**out)
        himo_kernels.accelerate(loss)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(loss(**out), expected, rtol=1e-9, atol=1e-12)

    def test_another_forward_is_refused(self):
        loss = upstream.DistillClipLoss()
        words = "got DistillClipLoss with a forward of its own"
        with pytest.raises(NotImplementedError, match=words):
            himo_kernels.accelerate(loss)
        assert "forward" not in vars(loss)

    def test_a_bias_that_is_a_number(self, generator):
        out, loss = Towers(WIDTH, FEATURES).double()(*batch(generator)), upstream.ClipLoss()
        expected = loss(**{**out, "logit_bias": -10.0})
        himo_kernels.accelerate(loss)
        found = loss(**{**out, "logit_bias": -10.0})
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)

    def test_a_bias_that_the_softmax_would_see_is_refused(self, generator):
        out, loss = Towers(WIDTH, FEATURES).double()(*batch(generator)), upstream.ClipLoss()
        himo_kernels.accelerate(loss)
        with pytest.raises(ValueError, match=r"ClipLoss: expected logit_bias .*, got \[40\]"):
            loss(**{**out, "logit_bias": torch.zeros(ROWS)})

    def test_on_meta(self):
        features, loss = torch.empty(ROWS, FEATURES, device="meta"), upstream.ClipLoss()
        himo_kernels.accelerate(loss)
        assert loss(features, features, 10.0).shape == ()

    @pytest.mark.parametrize("method", ["get_logits", "get_ground_truth"])
    def test_another_way_to_the_same_forward_is_refused(self, method):
        # Methods that ClipLoss.forward calls: a subclass that masks pairs still inherits forward.
        masked = type("Masked", (upstream.ClipLoss,), {method: lambda self, *inputs: inputs})()
        with pytest.raises(NotImplementedError, match=f"got Masked with a {method} of its own"):
            himo_kernels.accelerate(masked)
        loss = upstream.ClipLoss()
        setattr(loss, method, masked.forward)
        with pytest.raises(ValueError, match=f"expected module with the {method} of its class"):
            himo_kernels.accelerate(loss)
        assert "forward" not in vars(masked) and "forward" not in vars(loss)

    def test_horovod_is_refused(self):
        with pytest.raises(NotImplementedError, match="use_horovod=True"):
            himo_kernels.accelerate(upstream.ClipLoss(use_horovod=True))

    def test_a_world_that_is_not_there(self, generator):
        loss = upstream.ClipLoss(world_size=2)
        himo_kernels.accelerate(loss)
        out = Towers(WIDTH, FEATURES).double()(*batch(generator))
        with pytest.raises(ValueError, match="ClipLoss: expected world_size .* 1, got 2"):
            loss(**out)

    @pytest.mark.parametrize(
        "options, error, words",
        [
            ({"strategy": "tree"}, ValueError, "strategy"),
            ({"backend": "gpu"}, ValueError, "backend"),
            (
                {"backend": "cpu", "preset": "paper"},
                TypeError,
                r"expected options among \['strategy', 'backend'\], got \['preset'\]",
            ),
        ],
    )
    def test_wrong_options_change_nothing(self, options, error, words):
        loss = upstream.ClipLoss()
        with pytest.raises(error, match=words):
            himo_kernels.accelerate(loss, **options)
        assert "forward" not in vars(loss)

    def test_compiled_in_one_graph(self, generator):
        loss = upstream.ClipLoss()
        out = Towers(WIDTH, FEATURES).double()(*batch(generator))
        del out["logit_bias"]
        expected = loss(**out)
        himo_kernels.accelerate(loss)
        found = torch.compile(loss, fullgraph=True, backend="aot_eager")(**out)
        torch.testing.assert_close(found, expected)


class TestReleasedModel:
    @pytest.mark.parametrize("ratio", [{}, {"pca_ratio": 0.9}], ids=str)
    def test_values_and_gradients(self, ratio, generator, used):
        model, (image, text) = ReleasedCLIP(WIDTH, FEATURES).double(), batch(generator)
        expected = model(image, text, 0, **ratio)
        expected_gradients = gradients(model, *expected)
        with himo_kernels.accelerate(model):
            found = model(image, text, 0, **ratio)
        assert "himo_loss" in used
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        found_gradients = gradients(model, *found)
        for gradient, other in zip(found_gradients, expected_gradients, strict=True):
            error = (gradient - other).norm() / other.norm()
            assert error <= 1e-6  # the original differentiates an SVD, ours has gap_eps = 1e-6

    def test_labels_as_captions(self, generator):
        # Eight labels, equally frequent: equal singular values, and autograd through an SVD divides
        # by their differences.
        model, (image, _) = ReleasedCLIP(WIDTH, FEATURES).double(), batch(generator)
        with torch.no_grad():
            model.text_tower.weight.copy_(torch.eye(FEATURES, WIDTH))
        text = torch.eye(WIDTH, dtype=torch.float64)[torch.arange(ROWS) % 8]
        assert any(g.isnan().any() for g in gradients(model, *model(image, text, 0)))
        himo_kernels.accelerate(model)
        assert all(g.isfinite().all() for g in gradients(model, *model(image, text, 0)))

    def test_under_autocast(self, generator):
        model, (image, text) = ReleasedCLIP(WIDTH, FEATURES), (x.float() for x in batch(generator))
        expected = model(image, text, 0)
        himo_kernels.accelerate(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = model(image, text, 0)
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=0)
        assert all(gradient.isfinite().all() for gradient in gradients(model, *found))

    def test_another_preset(self, generator):
        model, (image, text) = ReleasedCLIP(WIDTH, FEATURES).double(), batch(generator)
        himo_kernels.accelerate(model, preset="paper")
        found = model(image, text, 0, pca_ratio=0.9)
        features = model.encode_image(image), model.encode_text(text), model.logit_scale.exp()
        expected = himo_kernels.nn.HiMoLoss("paper")(*features, output_dict=True)
        assert found == (expected["contrastive_loss"], expected["component_loss"])

    @pytest.mark.parametrize(
        "option", ["variance_threshold", "contrastive_weight", "component_weight", "tau"]
    )
    def test_what_the_trainer_decides_is_no_option(self, option):
        model = ReleasedCLIP(WIDTH, FEATURES)
        with pytest.raises(TypeError, match=rf"expected options among .*, got \['{option}'\]"):
            himo_kernels.accelerate(model, **{option: 0.5})
        assert "forward" not in vars(model)

    def test_an_impossible_option_raises_at_once(self):
        model = ReleasedCLIP(WIDTH, FEATURES)
        with pytest.raises(ValueError, match="preset"):
            himo_kernels.accelerate(model, preset="best")
        assert "forward" not in vars(model)

    def test_a_share_that_is_no_number_raises(self, generator):
        model, (image, text) = ReleasedCLIP(WIDTH, FEATURES).double(), batch(generator)
        himo_kernels.accelerate(model)
        with pytest.raises(TypeError, match="expected pca_ratio to be a number, got list"):
            model(image, text, 0, pca_ratio=[0.9])

    @pytest.mark.parametrize("method", ["forward", "cumratio_PCA"])
    def test_a_subclass_that_computes_something_else_is_refused(self, method):
        other = type("Other", (ReleasedCLIP,), {method: lambda self, *inputs: inputs})
        model = other(WIDTH, FEATURES)
        with pytest.raises(NotImplementedError, match=f"got Other with a {method} of its own"):
            himo_kernels.accelerate(model)
        assert "forward" not in vars(model)

    def test_a_wrapper_that_shows_the_attributes_of_a_model_is_refused(self):
        # As in FSDP, PEFT and torch.compile, whose own forward would be skipped.
        class Wrapper(nn.Module):
            def __init__(self, model):
                super().__init__()
                self.model = model

            def __getattr__(self, name):
                return getattr(vars(self)["_modules"]["model"], name)

        model = ReleasedCLIP(WIDTH, FEATURES)
        wrapper = Wrapper(model)
        assert wrapper.cumratio_PCA == model.cumratio_PCA
        for module in (wrapper, torch.compile(model)):
            with pytest.raises(TypeError, match=f"got .*{type(module).__name__}$"):
                himo_kernels.accelerate(module)
        assert "forward" not in vars(wrapper)


class TestInstance:
    def test_state_dict_and_others_of_its_class_stay(self):
        model, other = ReleasedCLIP(WIDTH, FEATURES), ReleasedCLIP(WIDTH, FEATURES)
        names = list(model.state_dict())
        himo_kernels.accelerate(model)
        assert list(model.state_dict()) == names
        assert type(model) is ReleasedCLIP and "forward" not in vars(other)

    def test_a_deep_copy_computes_with_its_own_parameters(self, generator):
        model, (image, text) = ReleasedCLIP(WIDTH, FEATURES).double(), batch(generator)
        himo_kernels.accelerate(model)
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin.image_tower.weight.zero_().add_(torch.eye(FEATURES, WIDTH))
        assert twin(image, text, 0)[0] != model(image, text, 0)[0]
        assert twin.forward.__self__ is twin

    def test_a_pickle_opens_with_the_forward_of_its_class(self, generator):
        model, (image, text) = ReleasedCLIP(WIDTH, FEATURES).double(), batch(generator)
        expected = model(image, text, 0)
        himo_kernels.accelerate(model)
        opened = pickle.loads(pickle.dumps(model))
        assert opened(image, text, 0) == expected
        with himo_kernels.accelerate(opened):
            assert opened(image, text, 0) == model(image, text, 0)
        assert opened(image, text, 0) == expected

    def test_inside_distributed_data_parallel(self, generator, used):
        model, (image, text) = ReleasedCLIP(WIDTH, FEATURES).double(), batch(generator)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            ddp = DistributedDataParallel(model)
            with himo_kernels.accelerate(ddp) as inside:
                assert inside is ddp  # not the model, whose gradients would not be averaged
                ddp(image, text, 0)
            assert "himo_loss" in used and "forward" not in vars(model)
            del ddp, inside  # gloo aborts if a DDP module outlives the group
        finally:
            dist.destroy_process_group()

    def test_data_parallel_is_refused(self):
        # Its replicas are shallow copies: they would run the original model's forward.
        with pytest.raises(TypeError, match="got .*DataParallel"):
            himo_kernels.accelerate(nn.DataParallel(ReleasedCLIP(WIDTH, FEATURES)))

    def test_undo_twice_and_after_an_error(self):
        model = ReleasedCLIP(WIDTH, FEATURES)
        handle = himo_kernels.accelerate(model)
        handle.undo()
        handle.undo()
        assert "forward" not in vars(model)
        with pytest.raises(RuntimeError, match="in the block"), himo_kernels.accelerate(model):
            raise RuntimeError("in the block")
        assert "forward" not in vars(model)

    def test_undo_leaves_what_is_not_its_own(self):
        model = ReleasedCLIP(WIDTH, FEATURES)
        first = himo_kernels.accelerate(model)
        first.undo()
        second = himo_kernels.accelerate(model)
        first.undo()
        assert "forward" in vars(model)
        second.undo()
        assert "forward" not in vars(model)

    def test_a_block_after_undo_is_refused(self):
        handle = himo_kernels.accelerate(ReleasedCLIP(WIDTH, FEATURES))
        with handle:
            pass
        with pytest.raises(ValueError, match="expected a with block before undo"), handle:
            pass

    def test_what_is_returned_is_not_the_module(self):
        model = himo_kernels.accelerate(ReleasedCLIP(WIDTH, FEATURES))
        with pytest.raises(TypeError, match="the module to be called itself, .* in place"):
            model(None, None)
        with pytest.raises(AttributeError, match="parameters of the module itself"):
            model.parameters()

    def test_twice_is_refused(self):
        model = ReleasedCLIP(WIDTH, FEATURES)
        himo_kernels.accelerate(model)
        # The name, not the repr, which prints the whole model.
        got = r"got 'himo_kernels\.integrations\.himo_clip\.[\w.<>]+'$"
        with pytest.raises(ValueError, match=f"with the forward of its class, {got}"):
            himo_kernels.accelerate(model)

    def test_its_documentation_names_every_kind(self):
        text = himo_kernels.accelerate.__doc__
        for kind in KINDS:
            name = re.search(r"HiMo-CLIP|\w+Loss", kind.name)[0].removeprefix("Cached")
            assert re.search(rf"\b{name}\b", text), kind.name

    @pytest.mark.parametrize("module", [nn.Linear(2, 2), torch.relu, None], ids=type)
    def test_anything_else_is_refused(self, module):
        with pytest.raises(TypeError, match="accelerate: expected module to be"):
            himo_kernels.accelerate(module)
