"""The names under which a CLIP's tensors are stored, and what they tell of the architecture.

"himo" names are those of OpenAI's CLIP, and what the model itself uses; open_clip has one table
of text positions where himo has two; Hugging Face's CLIPModel ("hf") has names of its own,
separate query, key and value projections, and transposed output projections. Every mapping moves
values and changes none, so there and back is the same bit for bit.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from himo.errors import HimoError
from himo.model import CONTEXT_LENGTH, KEPT_POSITIONS, CLIPConfig

State = dict[str, Tensor]
LAYOUTS = ("himo", "open_clip", "hf")

POSITIONS = "positional_embedding"
TRAINED_POSITIONS = "positional_embedding_res"
_CLIP_CONTEXT = 77
# What data-parallel training and torch.compile put before every name.
_WRAPPERS = ("module.", "_orig_mod.")
# Numbers in OpenAI's files, and buffers in old files of the others, that the shapes tell.
_IGNORED = {
    "input_resolution",
    "context_length",
    "vocab_size",
    "text_model.embeddings.position_ids",
    "vision_model.embeddings.position_ids",
}
_HF_MARK = "vision_model.embeddings.patch_embedding.weight"

_HF_TOP = {
    "visual.conv1.weight": _HF_MARK,
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


def to_himo(state: Mapping[str, Tensor]) -> tuple[State, str]:
    """(state dict under himo's names, layout it had), from any of the layouts.

    Both tables of text positions become the one that the model reads: its first 20 rows from
    `positional_embedding`, the others from `positional_embedding_res`. What a file has in the
    other rows is never read, and may be uninitialised memory.
    """
    state = dict(state)
    for _ in range(len(_WRAPPERS)):
        for wrapper in _WRAPPERS:
            if state and all(name.startswith(wrapper) for name in state):
                state = {name.removeprefix(wrapper): value for name, value in state.items()}
    state = {name: value for name, value in state.items() if name not in _IGNORED}
    if _HF_MARK in state:
        return _with_both_tables(_from_hf(state)), "hf"
    layout = "himo" if TRAINED_POSITIONS in state else "open_clip"
    return _with_both_tables(state), layout


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


def deduce_config(state: Mapping[str, Tensor], heads: Mapping[str, int], path: str) -> CLIPConfig:
    """The sizes of the model that a state dict under himo's names belongs to.

    Args:
        state: the state dict; a tensor may be missing where another one tells its shape.
        heads: "vision_heads" and "text_heads" where the file tells them.
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
        held = ", ".join(list(state)[:3]) or "none"
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
            vision_heads=heads.get("vision_heads", 0),
            text_heads=heads.get("text_heads", 0),
        )
    except HimoError as error:
        raise HimoError(f"{path}: {error}") from error


def heads_of_hf(config: Mapping[str, Any], path: str) -> dict[str, int]:
    """The heads that Hugging Face's `config.json` of a CLIPModel tells.

    Raises:
        HimoError: the model computes something else than a HiMoCLIP with the same weights.
    """
    heads = {}
    for tower in ("vision", "text"):
        part = config.get(f"{tower}_config")
        if not isinstance(part, dict):
            raise HimoError(f"{path}: not the configuration of a CLIPModel: no {tower}_config")
        for key, default in (("hidden_act", "quick_gelu"), ("layer_norm_eps", 1e-5)):
            if part.get(key, default) != default:
                raise HimoError(
                    f"{path}: expected {tower}_config.{key} to be {default!r}, got {part[key]!r}"
                )
        default_heads = {"vision": 12, "text": 8}[tower]  # of Hugging Face
        heads[f"{tower}_heads"] = part.get("num_attention_heads", default_heads)
    text = config["text_config"]
    end, last = text.get("eos_token_id", 49407), text.get("vocab_size", 49408) - 1
    if end not in (last, 2):  # 2: what old files say and Hugging Face reads as the highest id
        raise HimoError(
            f"{path}: expected text_config.eos_token_id to be the highest token, {last}, got {end}"
        )
    return heads


def heads_of_open_clip(config: Mapping[str, Any], path: str) -> dict[str, int]:
    """The heads that open_clip's `open_clip_config.json` tells.

    Raises:
        HimoError: the model computes something else than a HiMoCLIP with the same weights.
    """
    model = config.get("model_cfg")
    vision, text = (
        model.get(f"{tower}_cfg") if isinstance(model, dict) else None
        for tower in ("vision", "text")
    )
    if not (isinstance(model, dict) and isinstance(vision, dict) and isinstance(text, dict)):
        raise HimoError(f"{path}: not the configuration of a CLIP of open_clip")
    activation = model.get("quick_gelu", False)  # open_clip's default is GELU
    if activation is not True:
        raise HimoError(f"{path}: expected model_cfg.quick_gelu to be True, got {activation!r}")
    width, of_a_head = vision.get("width", 768), vision.get("head_width", 64)
    if not all(type(value) is int and value > 0 for value in (width, of_a_head)):
        raise HimoError(
            f"{path}: expected vision_cfg.width and head_width to be positive integers, "
            f"got {width!r} and {of_a_head!r}"
        )
    return {"vision_heads": width // of_a_head, "text_heads": text.get("heads", 8)}


def hf_config(config: CLIPConfig) -> dict[str, Any]:
    """Hugging Face's `config.json` of a model."""
    common = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "attention_dropout": 0.0}
    text = {
        **common,
        "model_type": "clip_text_model",
        "vocab_size": config.vocab_size,
        "hidden_size": config.text_width,
        "intermediate_size": 4 * config.text_width,
        "projection_dim": config.embed_dim,
        "num_hidden_layers": config.text_layers,
        "num_attention_heads": config.text_heads,
        "max_position_embeddings": config.context_length,
        # CLIP's vocabulary ends with the start and the end of a text; 0 follows the end.
        "bos_token_id": config.vocab_size - 2,
        "eos_token_id": config.vocab_size - 1,
        "pad_token_id": 0,
    }
    vision = {
        **common,
        "model_type": "clip_vision_model",
        "hidden_size": config.vision_width,
        "intermediate_size": 4 * config.vision_width,
        "projection_dim": config.embed_dim,
        "num_hidden_layers": config.vision_layers,
        "num_attention_heads": config.vision_heads,
        "num_channels": 3,
        "image_size": config.image_resolution,
        "patch_size": config.vision_patch_size,
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": 2.6592,  # ln(1 / 0.07), CLIP's
        "text_config": text,
        "vision_config": vision,
    }


def open_clip_config(config: CLIPConfig) -> dict[str, Any]:
    """The `open_clip_config.json` of a model, as open_clip reads it from a `local-dir:`."""
    return {
        "model_cfg": {
            "embed_dim": config.embed_dim,
            "quick_gelu": True,
            "vision_cfg": {
                "image_size": config.image_resolution,
                "layers": config.vision_layers,
                "width": config.vision_width,
                "head_width": config.vision_width // config.vision_heads,
                "patch_size": config.vision_patch_size,
            },
            "text_cfg": {
                "context_length": config.context_length,
                "vocab_size": config.vocab_size,
                "width": config.text_width,
                "heads": config.text_heads,
                "layers": config.text_layers,
            },
        },
        "preprocess_cfg": {
            "mean": [0.48145466, 0.4578275, 0.40821073],
            "std": [0.26862954, 0.26130258, 0.27577711],
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }


def _with_both_tables(state: State) -> State:
    kept, trained = state.get(POSITIONS), state.get(TRAINED_POSITIONS)
    if kept is None:
        return state
    table = kept
    if trained is not None:
        if trained.shape != kept.shape or trained.dtype != kept.dtype:
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
            if all(p is not None and p.shape == value.shape for p in parts):
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
