"""CLIP with a text tower of 248 tokens.

Parameters are named as in OpenAI's CLIP, open_clip and HiMo-CLIP. It computes the features of the
released HiMo-CLIP code (f235e97) in another way: the text tower runs only to the longest caption of
the batch, and attention is torch's `scaled_dot_product_attention`.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from himo.clip_config import CONFIGS, CONTEXT_LENGTH, KEPT_POSITIONS, CLIPConfig, named_config
from himo.errors import HimoError
from himo.layers import HALF_TYPES, Attention, LayerNorm, ResidualAttentionBlock, Transformer

__all__ = [
    "CONFIGS",
    "CONTEXT_LENGTH",
    "KEPT_POSITIONS",
    "CLIPConfig",
    "HiMoCLIP",
    "longest_text",
    "named_config",
    "text_lengths",
]

_MULTIPLE = 16  # tokens that the texts of a group differ by, at most, in a packed batch
_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.")


def _normal_(weight: Tensor, std: float) -> None:
    # A model that will be loaded from a checkpoint is on the meta device, where a process's first
    # normal_ imports torch's compiler: two seconds.
    if not weight.is_meta:
        nn.init.normal_(weight, std=std)


def _normal(std: float, *shape: int) -> nn.Parameter:
    parameter = nn.Parameter(torch.empty(shape))
    _normal_(parameter, std)
    return parameter


class VisionTransformer(nn.Module):
    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.input_resolution = config.image_resolution
        self.output_dim = config.embed_dim
        width, patch = config.vision_width, config.vision_patch_size
        positions = (config.image_resolution // patch) ** 2 + 1  # patches and class token
        scale = width**-0.5
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.class_embedding = _normal(scale, width)
        self.positional_embedding = _normal(scale, positions, width)
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(
            width, config.vision_layers, config.vision_heads, False, config.activation
        )
        self.ln_post = LayerNorm(width)
        self.proj = _normal(scale, width, config.embed_dim)

    def forward(self, image: Tensor) -> Tensor:  # [B, 3, R, R] -> [B, E]
        patches = self.conv1(image).flatten(2).transpose(1, 2)  # [B, (R / patch)^2, W]
        start = self.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        x = torch.cat([start, patches], dim=1) + self.positional_embedding.to(patches.dtype)
        at_start = torch.zeros(x.shape[0], 1, dtype=torch.int64, device=x.device)
        x = self.transformer(self.ln_pre(x), at_start)[:, 0]
        return self.ln_post(x) @ self.proj


class HiMoCLIP(nn.Module):
    """CLIP's image and text towers; features are not normalised, as upstream.

    There are two tables of text positions [context_length, W]. Rows 0 to 19 are read from
    `positional_embedding`, which is frozen, and the others from `positional_embedding_res`,
    which is trained; the remaining rows are unused. `logit_scale` is the logarithm of the logit
    multiplier. A new model is initialised as CLIP is.

    Args:
        config: the sizes and the activation.
    """

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        #: Where the weights came from; `himo.load` sets it and `himo.save` stores it.
        self.provenance: dict[str, Any] = {}
        width = config.text_width
        self.visual = VisionTransformer(config)
        self.transformer = Transformer(
            width, config.text_layers, config.text_heads, True, config.activation
        )
        self.token_embedding = nn.Embedding.from_pretrained(
            torch.empty(config.vocab_size, width), freeze=False
        )
        self.positional_embedding_res = _normal(0.01, config.context_length, width)
        positions = self.positional_embedding_res.detach().clone()
        self.positional_embedding = nn.Parameter(positions, requires_grad=False)
        self.ln_final = LayerNorm(width)
        self.text_projection = _normal(width**-0.5, width, config.embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self._initialise_text()

    def _initialise_text(self) -> None:
        width, layers = self.config.text_width, self.config.text_layers
        _normal_(self.token_embedding.weight, std=0.02)
        residual_std = width**-0.5 * (2 * layers) ** -0.5  # of layers that add to the residual
        for block in self.transformer.resblocks:
            assert isinstance(block, ResidualAttentionBlock)  # nn.ModuleList does not know
            _normal_(block.attn.in_proj_weight, std=width**-0.5)
            _normal_(block.attn.out_proj.weight, std=residual_std)
            _normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            _normal_(block.mlp.c_proj.weight, std=residual_std)

    @property
    def context_length(self) -> int:
        """Tokens of the longest text."""
        return self.config.context_length

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the matmuls' weights, and of the features outside autocast."""
        return self.visual.conv1.weight.dtype

    def set_precision(self, dtype: torch.dtype) -> "HiMoCLIP":
        """Casts the weights of matmuls to dtype, and returns the model.

        For float16 and bfloat16 the LayerNorms, embeddings and logit_scale become float32, as in
        upstream's `convert_weights`; otherwise everything is cast to dtype.
        """
        if dtype not in (*HALF_TYPES, torch.float32, torch.float64):
            raise HimoError(
                f"model: expected a dtype of float16, bfloat16, float32 or float64, got {dtype}"
            )
        self.to(torch.float32 if dtype in HALF_TYPES else dtype)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | Attention):
                module.to(dtype)
        self.visual.proj.data = self.visual.proj.data.to(dtype)
        self.text_projection.data = self.text_projection.data.to(dtype)
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes each block's activations in the backward pass instead of saving them."""
        self.visual.transformer.grad_checkpointing = enable
        self.transformer.grad_checkpointing = enable

    def lock_image_tower(self, unlocked_groups: int = 0) -> None:
        """Freezes the image tower, its projection included.

        Args:
            unlocked_groups: that many of the last `layer_groups` are not frozen.
        """
        self._lock(self.layer_groups()[0], unlocked_groups, "--lock-image-unlocked-groups")

    def lock_text_tower(self, unlocked_layers: int = 0) -> None:
        """Freezes the text tower, its projection included, but not `logit_scale`.

        Args:
            unlocked_layers: that many of the last `layer_groups` are not frozen.
        """
        self._lock(self.layer_groups()[1], unlocked_layers, "--lock-text-unlocked-layers")

    def _lock(self, groups: list[list[str]], unlocked: int, flag: str) -> None:
        if unlocked > len(groups):
            raise HimoError(
                f"{flag}: expected at most {len(groups)} for this model, got {unlocked}"
            )
        for group in groups[: len(groups) - unlocked]:
            for name in group:
                self.get_parameter(name).requires_grad_(False)

    def layer_groups(self) -> tuple[list[list[str]], list[list[str]]]:
        """The names of the parameters of the image and the text tower, from input to output.

        As open_clip groups them: the embeddings; each block, the last one with the norm after it;
        the projection. `logit_scale` is of no tower.
        """
        names = [name for name, _ in self.named_parameters() if name != "logit_scale"]
        of_image = [name for name in names if name.startswith("visual.")]
        of_text = [name for name in names if not name.startswith("visual.")]
        config = self.config
        return _layers(of_image, config.vision_layers), _layers(of_text, config.text_layers)

    def encode_image(self, image: Tensor, *, normalize: bool = False) -> Tensor:
        """Image features [B, E].

        Args:
            image: [B, 3, R, R], of a floating-point dtype, scaled and normalised as the
                preprocessing that `himo.load` returns does.
            normalize: divides each row by its L2 norm.

        Raises:
            HimoError: wrong shape, or an integer dtype (pixels that are not normalised).
        """
        size = self.visual.input_resolution
        if image.dim() != 4 or tuple(image.shape[1:]) != (3, size, size):
            raise HimoError(
                f"encode_image: expected image of shape [B, 3, {size}, {size}], "
                f"got {list(image.shape)}"
            )
        if not image.is_floating_point():
            raise HimoError(
                f"encode_image: expected image of a floating-point dtype, normalised, "
                f"got {image.dtype}"
            )
        features: Tensor = self.visual(image.to(self.dtype))
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(
        self,
        text: Tensor,
        max_length: int | None = None,
        *,
        lengths: Sequence[int] | None = None,
        normalize: bool = False,
    ) -> Tensor:
        """Text features [B, E].

        The tower runs over the first `max_length` tokens only. Causal attention hides the tokens
        after a text's end, so the features equal the features of the padded texts up to rounding.

        Args:
            text: [B, L] token ids, int32 or int64, L <= context_length. The highest id of a row
                (`argmax`, the first one of equals) ends the text and is where the feature is taken.
            max_length: at least the length of every text, such as `longest_text(text)` computed
                while the tokens are on the CPU. By default it is computed here, with one sync on
                CUDA. Cutting the tokens beforehand does not avoid the sync; passing text.shape[1]
                does.
            lengths: the tokens of each text, up to its end, as `text_lengths(text)` finds them
                while the tokens are on the CPU. With it the tower computes almost no padding, and
                max_length is not needed. The features differ by rounding.
            normalize: divides each row by its L2 norm.

        A compiler or exporter (torch.compile, torch.export, ONNX) sees no values of text: it gets
        the tower over max_length or all L tokens, without the checks of values.

        Raises:
            HimoError: wrong shape or dtype, or more tokens than the context. For tokens on the CPU
                also an id outside the vocabulary, a text longer than max_length, or lengths that
                are not the lengths of text.
        """
        if text.dim() != 2 or not 1 <= text.shape[1] <= self.context_length:
            raise HimoError(
                f"encode_text: expected text of shape [B, L], 1 <= L <= {self.context_length}, "
                f"got {list(text.shape)}"
            )
        if text.dtype not in (torch.int32, torch.int64):
            raise HimoError(f"encode_text: expected text of dtype int32 or int64, got {text.dtype}")
        readable = text.device.type == "cpu" and not _is_traced()  # without a sync
        if readable and text.numel():
            low, high = (int(x) for x in torch.aminmax(text))
            if low < 0 or high >= self.config.vocab_size:
                wrong = low if low < 0 else high
                raise HimoError(
                    f"encode_text: expected token ids from 0 to {self.config.vocab_size - 1}, "
                    f"got {wrong}"
                )
        if lengths is not None:
            fit = len(lengths) == len(text) and all(1 <= n <= text.shape[1] for n in lengths)
            if not fit or (readable and text_lengths(text) != list(lengths)):
                raise HimoError("encode_text: expected lengths to be those of text, one for each")
        if lengths:
            return self._projected(self._packed(text, lengths), normalize)
        end = text.argmax(dim=-1)  # [B]
        if max_length is None:
            max_length = text.shape[1] if _is_traced() else longest_text(text)
        elif not 1 <= max_length <= text.shape[1] or (readable and longest_text(text) > max_length):
            raise HimoError(
                f"encode_text: expected max_length to reach the end of every text and no more "
                f"than {text.shape[1]} tokens, got {max_length}"
            )
        x = self.token_embedding(text[:, :max_length]).to(self.dtype)
        x = x + self._positions(max_length).to(self.dtype)
        return self._projected(self.transformer(x, end[:, None])[:, 0], normalize)

    def _projected(self, x: Tensor, normalize: bool) -> Tensor:  # [B, W] -> [B, E]
        features = self.ln_final(x) @ self.text_projection
        return F.normalize(features, dim=-1) if normalize else features

    def _packed(self, text: Tensor, lengths: Sequence[int]) -> Tensor:
        """The text tower's output at the end of each text: [B, W].

        All layers but attention take the tokens of all texts as one sequence. Texts are sorted by
        length. Texts of about the same length form a group, and attention takes a group at a time.
        """
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        groups: list[tuple[int, int]] = []
        ends, back, tokens = [], [0] * len(order), 0
        for place, text_number in enumerate(order):
            length = min(-(-lengths[text_number] // _MULTIPLE) * _MULTIPLE, text.shape[1])
            rows = groups.pop()[0] if groups and groups[-1][1] == length else 0
            groups.append((rows + 1, length))
            ends.append(tokens + lengths[text_number] - 1)
            back[text_number] = place
            tokens += length
        indices = torch.tensor([order, ends, back], dtype=torch.int64)
        sorted_by_length, at, as_given = indices.to(text.device, non_blocking=True)
        parts = text[sorted_by_length].split([rows for rows, _ in groups])
        ids = torch.cat([p[:, :n].flatten() for p, (_, n) in zip(parts, groups, strict=True)])
        table = self._positions(text.shape[1]).to(self.dtype)
        places = torch.cat([table[:length].repeat(rows, 1) for rows, length in groups])
        x = self.token_embedding(ids).to(self.dtype) + places
        packed: Tensor = self.transformer(x, at, None, groups)
        return packed[as_given]

    def encode_shared_text(
        self, tokens: Tensor, positions: Tensor, visible: Tensor, ends: Tensor
    ) -> Tensor:
        """Features [B, K, E] of K texts in each row, which share the tokens they begin with.

        They equal the features of `encode_text` up to rounding if each token has its position in
        its text, and sees only this text's tokens up to itself. `himo.evaluate.shared_prefixes`
        lays texts out in this way.

        Args:
            tokens: int64 [B, S], of all texts of a row, a shared token once.
            positions: int64 [B, S], from 0 to context_length - 1: where a token is in its text.
            visible: bool [B, S, S], True if the row's token attends to the column's token. Every
                token sees itself, including tokens that pad a row.
            ends: int64 [B, K], where in the row the last token of each text is.
        """
        x = self.token_embedding(tokens).to(self.dtype)
        x = x + self._positions(self.context_length).to(self.dtype)[positions]
        x = self.ln_final(self.transformer(x, ends, visible))  # [B, K, W]
        return x @ self.text_projection

    def _positions(self, length: int) -> Tensor:  # -> [length, W]
        # Cut after the concatenation, so that an exported graph is the same for every length.
        frozen = self.positional_embedding[:KEPT_POSITIONS]
        return torch.cat([frozen, self.positional_embedding_res[KEPT_POSITIONS:]])[:length]

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """(logits_per_image [B, T], logits_per_text [T, B]): scaled cosine similarities.

        Args:
            image: [B, 3, R, R], as `encode_image` takes it.
            text: [T, L] token ids, as `encode_text` takes them.
        """
        image_features = self.encode_image(image, normalize=True)
        text_features = self.encode_text(text, normalize=True)
        logit_scale = self.logit_scale.exp().to(image_features.dtype)
        logits_per_image = logit_scale * image_features @ text_features.t()
        return logits_per_image, logits_per_image.t()


def _layers(names: list[str], blocks: int) -> list[list[str]]:
    groups: list[list[str]] = [[] for _ in range(blocks + 2)]
    for name in names:
        if block := _BLOCK.search(name):
            groups[int(block[1]) + 1].append(name)
        elif name.startswith(("visual.ln_post.", "ln_final.")):
            groups[blocks].append(name)
        elif name in ("visual.proj", "text_projection"):
            groups[blocks + 1].append(name)
        else:
            groups[0].append(name)
    return groups


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def text_lengths(text: Tensor) -> list[int]:
    """Tokens of each row of text [B, L], its end included. Syncs with the device of the tokens."""
    return [end + 1 for end in text.argmax(dim=-1).tolist()] if text.numel() else []


def longest_text(text: Tensor) -> int:
    """Tokens of the longest row of text [B, L], its end included; 1 for no rows.

    Syncs with the device of the tokens.
    """
    return int(text.argmax(dim=-1).max()) + 1 if text.numel() else 1
