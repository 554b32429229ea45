"""Layers of CLIP's transformers, with the parameters of OpenAI's release.

Attention is torch's `scaled_dot_product_attention`. The last block of a tower computes only the
positions whose features are used.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

HALF_TYPES = (torch.float16, torch.bfloat16)


def _taken(x: Tensor, at: Tensor) -> Tensor:  # [B, L, W], [B, K] -> [B, K, W]
    return x[torch.arange(x.shape[0], device=x.device)[:, None], at]


class LayerNorm(nn.LayerNorm):
    """LayerNorm that computes float16 and bfloat16 inputs in float32 and returns their dtype."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype in HALF_TYPES:
            weight, bias = self.weight.float(), self.bias.float()
            normalised = F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)
            return normalised.to(x.dtype)
        return super().forward(x)


class Attention(nn.Module):
    """Multi-head self-attention with the parameters of nn.MultiheadAttention."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)  # as nn.MultiheadAttention starts
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, at: Tensor | None = None, visible: Tensor | None = None) -> Tensor:
        """[B, L, W] -> [B, L, W]; with at [B, K], only positions at[b] of row b: [B, K, W].

        Position i attends to each j with visible[b, i, j], bool [B, L, L]. By default that is all,
        or all up to i if causal.
        """
        if at is not None:
            return self._some_positions(x, at, visible)
        batch, length, width = x.shape
        projected = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        split = projected.view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, heads, L, W / heads]
        if visible is None:
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=visible[:, None])
        joined: Tensor = self.out_proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return joined

    def _some_positions(self, x: Tensor, at: Tensor, visible: Tensor | None) -> Tensor:
        batch, length, width = x.shape
        size, weight, bias = width // self.heads, self.in_proj_weight, self.in_proj_bias
        query = F.linear(_taken(x, at), weight[:width], bias[:width])
        query = query.unflatten(2, (self.heads, size)).transpose(1, 2) * size**-0.5
        projected = F.linear(x, weight[width:], bias[width:])
        split = projected.view(batch, length, 2, self.heads, size)
        key, value = split.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, heads, L, W / heads]
        # torch's attention of one query rounds differently on a CPU with the number of rows.
        scores = query @ key.transpose(2, 3)  # [B, heads, K, L]
        if visible is not None:
            scores = scores.masked_fill(~_taken(visible, at)[:, None], -math.inf)
        elif self.causal:
            later = torch.arange(length, device=x.device) > at[:, :, None]
            scores = scores.masked_fill(later[:, None], -math.inf)
        mixed = scores.softmax(dim=-1) @ value  # [B, heads, K, W / heads]
        joined: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return joined


class MLP(nn.Module):
    """Two layers around CLIP's quick-GELU, x * sigmoid(1.702 x), or around GELU."""

    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        self.quick = activation == "quick_gelu"
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # [B, L, W] -> [B, L, W]
        out: Tensor
        if self.quick:
            # SiLU saves only its input for the backward pass: one tensor of 4 W channels less.
            out = self.c_proj(F.silu(1.702 * self.c_fc(x)) / 1.702)
        else:
            out = self.c_proj(F.gelu(self.c_fc(x)))
        return out


class ResidualAttentionBlock(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool, activation: str) -> None:
        super().__init__()
        self.attn = Attention(width, heads, causal)
        self.ln_1 = LayerNorm(width)
        self.mlp = MLP(width, activation)
        self.ln_2 = LayerNorm(width)

    def forward(self, x: Tensor, at: Tensor | None = None, visible: Tensor | None = None) -> Tensor:
        """[B, L, W] -> [B, L, W], or [B, K, W]: as `Attention`."""
        x = (x if at is None else _taken(x, at)) + self.attn(self.ln_1(x), at, visible)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, causal: bool, activation: str) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(width, heads, causal, activation) for _ in range(layers)
        )
        self.grad_checkpointing = False

    def forward(self, x: Tensor, at: Tensor, visible: Tensor | None = None) -> Tensor:
        """[B, L, W], [B, K] -> [B, K, W]: of row b positions at[b]; visible is as in `Attention`.

        The last block computes only these positions: no other output of it is used.
        """
        last = self.resblocks[-1]
        for block in self.resblocks:
            positions = at if block is last else None
            if self.grad_checkpointing and torch.is_grad_enabled():
                # Nothing in a block is random, so the RNG state need not be restored.
                x = checkpoint(
                    block, x, positions, visible, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x = block(x, positions, visible)
        return x
