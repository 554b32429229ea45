"""Maps the names of a CLIP's tensors between projects, and deduces its sizes from their shapes.

"himo" are the names of OpenAI's CLIP and of `HiMoCLIP`. "open_clip" has one table of text
positions instead of two. "hf", Hugging Face's CLIPModel, has other names, separate query, key and
value projections, and transposed output projections. A mapping moves values and changes none, so a
round trip is exact to the bit.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from himo.clip_config import CONTEXT_LENGTH, KEPT_POSITIONS, UNSHAPED, CLIPConfig
from himo.errors import HimoError, quoted, shortened

State = dict[str, Tensor]
LAYOUTS = ("himo", "open_clip", "hf")

POSITIONS = "positional_embedding"
TRAINED_POSITIONS = "positional_embedding_res"
_CLIP_CONTEXT = 77
# Data-parallel training, torch.compile and FSDP insert these into names.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Numbers in OpenAI's files and buffers in old files of others: the shapes tell the same.
_IGNORED = {
    "input_resolution",
    "context_length",
    "vocab_size",
    "n_averaged",  # of torch's AveragedModel
    "text_model.embeddings.position_ids",
    "vision_model.embeddings.position_ids",
}
_MARK = "visual.conv1.weight"  # every CLIP with a ViT has it, after any prefix
_MAX_MODELS = 8  # in one state dict
_HF_MARK = "vision_model.embeddings.patch_embedding.weight"

_HF_TOP = {
    _MARK: _HF_MARK,
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",  # so spelled
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    POSITIONS: "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
_HF_TOWERS = {
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "transformer.resblocks": "text_model.encoder.layers",
}
_HF_BLOCK = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TRANSPOSED = {"visual.proj", "text_projection"}
_IN_PROJ = "attn.in_proj_"  # then "weight" or "bias"
_BLOCK = re.compile(r"((?:visual\.)?transformer\.resblocks)\.(\d+)\.(.+)")


def holds_clip(names: Iterable[str]) -> bool:
    """Whether a state dict has a CLIP's image tower, under any prefix."""
    return any(name.endswith((_MARK, _HF_MARK)) for name in names)


def to_himo(state: Mapping[str, Tensor]) -> tuple[State, str, list[str]]:
    """(state dict under himo's names, layout it had, notes for the user), from any layout.

    Removes the names of wrappers, and the prefix of the module that held the CLIP. Both tables of
    text positions become the one that the model reads: 20 rows from `positional_embedding`, the
    others from `positional_embedding_res`. A file's other rows are never read; they may be
    uninitialised memory.

    Raises:
        ValueError: two names are equal after the names of wrappers are removed.
    """
    state, notes = _unwrapped(state)
    state = {name: value for name, value in state.items() if name not in _IGNORED}
    if _HF_MARK in state:
        return _with_both_tables(_from_hf(state)), "hf", notes
    if "text.token_embedding.weight" in state:  # open_clip's models with a separate text tower
        state = {name.removeprefix("text."): value for name, value in state.items()}
    layout = "himo" if TRAINED_POSITIONS in state else "open_clip"
    return _with_both_tables(state), layout, notes


def from_himo(state: Mapping[str, Tensor], layout: str) -> State:
    """The state dict of a `HiMoCLIP` under the names of layout: "himo", "open_clip" or "hf"."""
    merged = _with_both_tables(dict(state))
    if layout == "himo":
        return merged
    del merged[TRAINED_POSITIONS]
    return _to_hf(merged) if layout == "hf" else merged


def stretch_positions(state: State) -> State:
    """The state dict with CLIP's 77 rows of text positions stretched to 248; others unchanged.

    Copies the first 20 rows. Each of rows 20 to 76 becomes four, by linear interpolation to the
    next row; the last row is extrapolated (Long-CLIP, arXiv 2403.15378, section 3.1).
    """
    table = state.get(POSITIONS)
    if table is None or table.dim() != 2 or table.shape[0] != _CLIP_CONTEXT:
        return state
    first, rows = table[:KEPT_POSITIONS], table[KEPT_POSITIONS:].float()
    following = torch.cat([rows[1:], (2 * rows[-1:] - rows[-2:-1])])  # [57, W]
    weights = torch.arange(4).view(1, 4, 1) / 4
    stretched = (1 - weights) * rows[:, None] + weights * following[:, None]  # [57, 4, W]
    table = torch.cat([first, stretched.flatten(0, 1).to(table.dtype)])
    assert table.shape[0] == CONTEXT_LENGTH
    return {**state, POSITIONS: table, TRAINED_POSITIONS: table.clone()}


def deduce_config(state: Mapping[str, Tensor], stated: Mapping[str, Any], path: str) -> CLIPConfig:
    """The configuration of the model of a state dict under himo's names.

    Args:
        state: the state dict; a tensor may be missing if the shape of another tells its size.
        stated: the fields that no shape tells, as far as they are known.
        path: for messages.

    Raises:
        HimoError: a tensor that tells a size is missing or misshapen.
    """
    # The tensors that tell the sizes, and their numbers of dimensions.
    ranks = {
        "visual.conv1.weight": 4,
        "visual.positional_embedding": 2,
        "token_embedding.weight": 2,
        POSITIONS: 2,
    }
    if any(name.startswith("visual.layer1.") for name in state):
        raise HimoError(f"{path}: its image tower is a ResNet, expected a ViT")
    missing = [name for name in ranks if name not in state]
    if missing:
        held = ", ".join(shortened(name) for name in list(state)[:3]) or "none"
        raise HimoError(
            f"{path}: not a CLIP: no {', '.join(missing)} among its {len(state)} tensors ({held}"
            f"{', ...' if len(state) > 3 else ''})"
        )
    for name, rank in ranks.items():
        if state[name].dim() != rank:
            raise HimoError(
                f"{path}: expected {name} to have {rank} dimensions, got shape "
                f"{list(state[name].shape)}"
            )
    projections = [n for n in ("text_projection", "visual.proj") if n in state]
    if not projections or state[projections[0]].dim() != 2:
        raise HimoError(f"{path}: not a CLIP: no text_projection [W, E] and no visual.proj [W, E]")
    width, _, patch, _ = state["visual.conv1.weight"].shape
    patches = state["visual.positional_embedding"].shape[0] - 1
    grid = round(max(patches, 0) ** 0.5)
    if grid * grid != patches:
        raise HimoError(
            f"{path}: expected visual.positional_embedding of a square number of patches and "
            f"one, got {patches + 1} rows"
        )
    blocks = [match for match in map(_BLOCK.fullmatch, state) if match]
    try:
        return CLIPConfig(
            embed_dim=state[projections[0]].shape[1],
            image_resolution=grid * patch,
            vision_layers=len({m[2] for m in blocks if m[1].startswith("visual.")}),
            vision_width=width,
            vision_patch_size=patch,
            context_length=state[POSITIONS].shape[0],
            vocab_size=state["token_embedding.weight"].shape[0],
            text_width=state["token_embedding.weight"].shape[1],
            text_layers=len({m[2] for m in blocks if not m[1].startswith("visual.")}),
            **{field: stated[field] for field in UNSHAPED if field in stated},
        )
    except HimoError as error:
        raise HimoError(f"{path}: {error}") from error


def _unwrapped(state: Mapping[str, Tensor]) -> tuple[State, list[str]]:
    named: State = {}
    for name, value in state.items():
        short = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if short in named:
            raise ValueError(f"{quoted(short)} twice, once in a wrapper")
        named[short] = value
    # In the order of the file, but averaged weights last.
    prefixes = dict.fromkeys(
        name.removesuffix(mark)
        for name in sorted(named, key=lambda name: "ema" in name.lower())
        for mark in (_MARK, _HF_MARK)
        if name == mark or name.endswith(f".{mark}")
    )
    if len(prefixes) > _MAX_MODELS:
        raise ValueError(f"{len(prefixes):,} models, expected at most {_MAX_MODELS}")
    prefix, *others = [*prefixes] or [""]
    inner = tuple(other for other in others if len(other) > len(prefix))
    inside = {n: v for n, v in named.items() if n.startswith(prefix) and not n.startswith(inner)}
    state = {name.removeprefix(prefix): value for name, value in inside.items()}
    left = [shortened(name) for name in named if name not in inside]
    if not left:
        return state, []
    place = f"the model under {quoted(prefix)}" if prefix else "the model without a prefix"
    few = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
    return state, [f"read is {place}; {len(left)} tensors are left alone: {few}"]


def _with_both_tables(state: State) -> State:
    frozen, trained = state.get(POSITIONS), state.get(TRAINED_POSITIONS)
    if frozen is None:
        return state
    table = frozen
    if trained is not None:
        if trained.shape != frozen.shape or trained.dtype != frozen.dtype or not frozen.dim():
            return state  # the check of shapes and dtypes will say what is wrong
        table = torch.cat([frozen[:KEPT_POSITIONS], trained[KEPT_POSITIONS:]])
    return {**state, POSITIONS: table, TRAINED_POSITIONS: table.clone()}


def _to_hf(state: State) -> State:
    renamed: State = {}
    for name, value in state.items():
        block = _BLOCK.fullmatch(name)
        if block is None:
            value = value.t().contiguous() if name in _TRANSPOSED else value
            renamed[_renamed(name, _HF_TOP)] = value
            continue
        layer, parameter = f"{_HF_TOWERS[block[1]]}.{block[2]}", block[3]
        if parameter.startswith(_IN_PROJ):
            kind = parameter.removeprefix(_IN_PROJ)
            for part, tensor in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{layer}.self_attn.{part}_proj.{kind}"] = tensor.clone()
        else:
            renamed[f"{layer}.{_renamed(parameter, _HF_BLOCK)}"] = value
    return renamed


def _from_hf(state: State) -> State:
    towers, modules, top = (
        {hf: name for name, hf in names.items()} for names in (_HF_TOWERS, _HF_BLOCK, _HF_TOP)
    )
    block_pattern = re.compile(f"({'|'.join(towers)})" + r"\.(\d+)\.(.+)\.(weight|bias)")
    renamed: State = {}
    for name, value in state.items():
        block = block_pattern.fullmatch(name)
        if block is None:
            new = _renamed(name, top)
            transpose = new in _TRANSPOSED and value.dim() == 2
            renamed[new] = value.t().contiguous() if transpose else value
            continue
        layer, module, parameter = f"{towers[block[1]]}.{block[2]}", block[3], block[4]
        if module in modules:
            renamed[f"{layer}.{modules[module]}.{parameter}"] = value
        elif module == "self_attn.q_proj":
            prefix = name.removesuffix(f"q_proj.{parameter}")
            parts = [state.get(f"{prefix}{part}_proj.{parameter}") for part in "qkv"]
            if value.dim() and all(p is not None and p.shape == value.shape for p in parts):
                joined = torch.cat([p for p in parts if p is not None])
                renamed[f"{layer}.{_IN_PROJ}{parameter}"] = joined
        elif module not in ("self_attn.k_proj", "self_attn.v_proj"):
            renamed[name] = value  # unexpected
    return renamed


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """The new name, from a table that has the whole name or the name of the parameter's module."""
    module, _, parameter = name.rpartition(".")
    if name in names:
        return names[name]
    return f"{names[module]}.{parameter}" if module in names else name
