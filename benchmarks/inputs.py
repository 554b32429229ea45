"""The inputs of each operator, drawn in float64 on the CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case
from himo_kernels import testing as hkt

Inputs = dict[str, Tensor]

LOGIT_SCALE = 50.0  # between CLIP's initial 14.3 and its maximum of 100
LOGIT_BIAS = -30.0  # logits of pairs are then above 0, of most other images and texts below


def texts(case: Case, generator: torch.Generator) -> Tensor:
    N, D, drawn = case.N, case.D, {"dtype": torch.float64, "generator": generator}
    if case.spectrum == "duplicates":
        problems = [hkt.duplicate_captions(N, D, N // 2, **drawn) for _ in range(case.B)]
        return problems[0] if case.B == 1 else torch.stack(problems)
    flat = {"exponent": 0.0, "noise": 0.0} if case.spectrum == "flat" else {}
    batch = () if case.B == 1 else (case.B,)
    return hkt.power_law(N, D, batch=batch, **drawn, **flat)


def samples(case: Case, generator: torch.Generator) -> Inputs:
    return {"x": texts(case, generator)}


def unnormalized_rows(case: Case, generator: torch.Generator) -> Inputs:
    return {"features": _stretched(texts(case, generator), generator)}


def _stretched(rows: Tensor, generator: torch.Generator) -> Tensor:
    # Rows of different lengths, as a projection layer returns them.
    powers = torch.randn(*rows.shape[:-1], 1, dtype=torch.float64, generator=generator)
    return rows * powers.exp()


def pairs(case: Case, generator: torch.Generator) -> Inputs:
    # Images are near their captions, so that the loss is neither 0 nor log N.
    text = texts(case, generator)
    noise = torch.randn(text.shape, dtype=torch.float64, generator=generator) / case.D**0.5
    return {"image_features": F.normalize(text + noise, dim=-1), "text_features": text}


def scaled(inputs: Inputs) -> Inputs:
    return inputs | {"logit_scale": torch.tensor(LOGIT_SCALE, dtype=torch.float64)}


def sides(case: Case, generator: torch.Generator) -> Inputs:
    features = pairs(case, generator)
    if case.form == "simclr":
        features = {name: _stretched(rows, generator) for name, rows in features.items()}
    inputs = scaled(features)
    if case.form == "labels":  # rows against themselves
        del inputs["text_features"]
    if case.form == "negatives":
        negatives = texts(case, generator)
        scale = inputs.pop("logit_scale")
        inputs |= {"negative_features": negatives, "logit_scale": scale}
    return inputs


def biased(inputs: Inputs) -> Inputs:
    return scaled(inputs) | {"logit_bias": torch.tensor(LOGIT_BIAS, dtype=torch.float64)}


def factors(case: Case, generator: torch.Generator) -> Inputs:
    # Texts projected onto `inner` random directions.
    inputs = pairs(case, generator)
    directions = torch.randn(case.D, case.inner, dtype=torch.float64, generator=generator)
    basis = torch.linalg.qr(directions)[0].T.contiguous()
    coefficients = inputs["text_features"] @ basis.T
    return scaled(inputs | {"coefficients": coefficients, "basis": basis})


def triples(case: Case, generator: torch.Generator) -> Inputs:
    inputs = factors(case, generator)
    scale, basis = inputs.pop("logit_scale"), inputs.pop("basis")
    component = inputs.pop("coefficients") @ basis
    return inputs | {"component_features": component, "logit_scale": scale}


def component(inputs: Inputs) -> Tensor:
    if "component_features" in inputs:
        return inputs["component_features"]
    return inputs["coefficients"] @ inputs["basis"]
