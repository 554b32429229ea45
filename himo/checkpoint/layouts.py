"""The names under which a CLIP's tensors are stored, and the sizes that their shapes tell.

"himo" names are those of OpenAI's CLIP, and what the model itself uses; open_clip has one table
of text positions where himo has two; Hugging Face's CLIPModel ("hf") has names of its own,
separate query, key and value projections, and transposed output projections. Every mapping moves
values and changes none, so there and back is the same bit for bit.
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
# What data-parallel training, torch.compile and FSDP put into names.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Numbers in OpenAI's files, and buffers in old files of the others, that the shapes tell.
_IGNORED = {
    "input_resolution",
    "context_length",
    "vocab_size",
    "n_averaged",  # of torch's AveragedModel
    "text_model.embeddings.position_ids",
    "vision_model.embeddings.position_ids",
}
_MARK = "visual.conv1.weight"  # which every CLIP with a ViT has, under its own prefix
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
_IN_PROJ = re.compile(r"(.*)\.attn\.in_proj_(weight|bias)")
_BLOCK = re.compile(r"((?:visual\.)?transformer\.resblocks)\.(\d+)\.(.+)")


def holds_clip(names: Iterable[str]) -> bool:
    """Whether a CLIP's image tower, under whatever prefix, is among the names of a state dict."""
    return any(name.endswith((_MARK, _HF_MARK)) for name in names)


def to_himo(state: Mapping[str, Tensor]) -> tuple[State, str, list[str]]:
    """(state dict under himo's names, layout it had, what to say), from any of the layouts.

    Wrappers' names are taken out, and the prefix of the module that the CLIP was in. Both tables
    of text positions become the one that the model reads: its first 20 rows from
    `positional_embedding`, the others from `positional_embedding_res`. What a file has in the
    other rows is never read, and may be uninitialised memory.

    Raises:
        ValueError: two names are one without what wrappers put into them.
    """
    state, notes = _unwrapped(state)
    state = {name: value for name, value in state.items() if name not in _IGNORED}
    if _HF_MARK in state:
        return _with_both_tables(_from_hf(state)), "hf", notes
    if "text.token_embedding.weight" in state:  # open_clip's models with a text tower of their own
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
    """The state dict with text positions of CLIP's 77 rows stretched to 248; others unchanged.

    The first 20 rows are kept. Of rows 20 to 76 each becomes four, linear between it and the
    next; the last one goes on as it came (Long-CLIP, arXiv 2403.15378, section 3.1).
    """
    table = state.get(POSITIONS)
    if table is None or table.dim() != 2 or table.shape[0] != _CLIP_CONTEXT:
        return state
    kept, rows = table[:KEPT_POSITIONS], table[KEPT_POSITIONS:].float()
    following = torch.cat([rows[1:], (2 * rows[-1:] - rows[-2:-1])])  # [57, W]
    weights = torch.arange(4).view(1, 4, 1) / 4
    stretched = (1 - weights) * rows[:, None] + weights * following[:, None]  # [57, 4, W]
    table = torch.cat([kept, stretched.flatten(0, 1).to(table.dtype)])
    assert table.shape[0] == CONTEXT_LENGTH
    return {**state, POSITIONS: table, TRAINED_POSITIONS: table.clone()}


def deduce_config(state: Mapping[str, Tensor], stated: Mapping[str, Any], path: str) -> CLIPConfig:
    """The configuration of the model that a state dict under himo's names belongs to.

    Args:
        state: the state dict; a tensor may be missing where another one tells its shape.
        stated: fields of the configuration that no shape tells, where something else does.
        path: for messages.

    Raises:
        HimoError: a tensor without which the sizes are unknown is missing or misshapen.
    """
    # Dimensions of the tensors that define the sizes.
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
    # In the order of the file, but averaged weights last: they stand beside those they are of.
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
    inside: State = {}
    beside: list[str] = []
    for name, value in named.items():
        if name.startswith(prefix) and not (inner and name.startswith(inner)):
            inside[name.removeprefix(prefix)] = value
        else:
            beside.append(name)
    if not beside:
        return inside, []
    place = f"the model under {quoted(prefix)}" if prefix else "the model without a prefix"
    first = ", ".join(shortened(name) for name in beside[:3])
    more = ", ..." if len(beside) > 3 else ""
    return inside, [f"read is {place}; {len(beside)} tensors are left alone: {first}{more}"]


def _with_both_tables(state: State) -> State:
    kept, trained = state.get(POSITIONS), state.get(TRAINED_POSITIONS)
    if kept is None:
        return state
    table = kept
    if trained is not None:
        if trained.shape != kept.shape or trained.dtype != kept.dtype or not kept.dim():
            return state  # as it is: the check of shapes and dtypes tells what is wrong
        table = torch.cat([kept[:KEPT_POSITIONS], trained[KEPT_POSITIONS:]])
    return {**state, POSITIONS: table, TRAINED_POSITIONS: table.clone()}


def _to_hf(state: State) -> State:
    renamed: State = {}
    for name, value in state.items():
        in_proj, block = _IN_PROJ.fullmatch(name), _BLOCK.fullmatch(name)
        if in_proj and block:
            layer = f"{_HF_TOWERS[block[1]]}.{block[2]}"
            for part, tensor in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{layer}.self_attn.{part}_proj.{in_proj[2]}"] = tensor.clone()
        elif block:
            module, _, parameter = block[3].rpartition(".")
            layer = f"{_HF_TOWERS[block[1]]}.{block[2]}"
            renamed[f"{layer}.{_HF_BLOCK[module]}.{parameter}"] = value
        else:
            value = value.t().contiguous() if name in _TRANSPOSED else value
            renamed[_renamed(name, _HF_TOP)] = value
    return renamed


def _from_hf(state: State) -> State:
    towers = {hf: name for name, hf in _HF_TOWERS.items()}
    modules = {hf: name for name, hf in _HF_BLOCK.items()}
    top = {hf: name for name, hf in _HF_TOP.items()}
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
                renamed[f"{layer}.attn.in_proj_{parameter}"] = joined
        elif module not in ("self_attn.k_proj", "self_attn.v_proj"):
            renamed[name] = value  # unexpected, under the name it has
    return renamed


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """The name by a table that has it whole, or the module that it is a parameter of."""
    module, _, parameter = name.rpartition(".")
    if name in names:
        return names[name]
    return f"{names[module]}.{parameter}" if module in names else name
