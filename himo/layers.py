"""Layers of CLIP's transformers, with the parameters of OpenAI's release.

Attention is torch's `scaled_dot_product_attention`. The last block of a tower computes only the
positions whose features are used.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

HALF_TYPES = (torch.float16, torch.bfloat16)


# Rows and tokens in a row, of each group of equally long rows in a packed batch.
Groups = Sequence[tuple[int, int]]


def _taken(x: Tensor, at: Tensor) -> Tensor:  # [B, L, W], [B, K] -> [B, K, W], or [T, W], [B]
    return x[at] if x.dim() == 2 else x[torch.arange(x.shape[0], device=x.device)[:, None], at]


def _rows(x: Tensor, groups: Groups) -> Iterator[Tensor]:  # [T, C] -> [rows, length, C], ...
    parts = x.split([rows * length for rows, length in groups])
    for part, (rows, length) in zip(parts, groups, strict=True):
        yield part.view(rows, length, -1)


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

    def forward(
        self,
        x: Tensor,
        at: Tensor | None = None,
        visible: Tensor | None = None,
        groups: Groups | None = None,
    ) -> Tensor:
        """[B, L, W] -> [B, L, W]; with at [B, K], only positions at[b] of row b: [B, K, W].

        Position i attends to each j with visible[b, i, j], bool [B, L, L]. By default that is all,
        or all up to i if causal.

        With groups the batch is packed: x is [T, W] with the tokens of all rows, one row after the
        other, group by group. The result is [T, W], or [B, W] at the tokens at [B] of x, one in
        each row.
        """
        if at is not None:
            return self._some_positions(x, at, visible, groups)
        projected = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        if groups is None:
            mixed = self._mixed(projected, visible)
        else:
            parts = [self._mixed(part).flatten(0, 1) for part in _rows(projected, groups)]
            mixed = torch.cat(parts)
        joined: Tensor = self.out_proj(mixed)
        return joined

    def _mixed(self, projected: Tensor, visible: Tensor | None = None) -> Tensor:
        """[B, L, 3 W], query, key and value -> [B, L, W]."""
        split = projected.unflatten(2, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, heads, L, W / heads]
        if visible is None:
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=visible[:, None])
        return mixed.transpose(1, 2).flatten(2)

    def _some_positions(
        self, x: Tensor, at: Tensor, visible: Tensor | None, groups: Groups | None
    ) -> Tensor:
        width, weight, bias = x.shape[-1], self.in_proj_weight, self.in_proj_bias
        query = F.linear(_taken(x, at), weight[:width], bias[:width])
        projected = F.linear(x, weight[width:], bias[width:])
        if groups is None:
            mixed = self._mixed_at(query, projected, at, visible)
        else:
            found, row, token = [], 0, 0
            for part, (rows, length) in zip(_rows(projected, groups), groups, strict=True):
                of_group = slice(row, row + rows)
                places = (at[of_group, None] - token) % length  # within each row
                found.append(self._mixed_at(query[of_group, None], part, places, None)[:, 0])
                row, token = row + rows, token + rows * length
            mixed = torch.cat(found)
        joined: Tensor = self.out_proj(mixed)
        return joined

    def _mixed_at(
        self, query: Tensor, projected: Tensor, at: Tensor, visible: Tensor | None
    ) -> Tensor:
        """[B, K, W] at [B, K], and key and value [B, L, 2 W] -> [B, K, W]."""
        batch, length, _ = projected.shape
        size = query.shape[-1] // self.heads
        query = query.unflatten(2, (self.heads, size)).transpose(1, 2) * size**-0.5
        split = projected.view(batch, length, 2, self.heads, size)
        key, value = split.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, heads, L, W / heads]
        # torch's attention of one query rounds differently on a CPU with the number of rows.
        scores = query @ key.transpose(2, 3)  # [B, heads, K, L]
        if visible is not None:
            scores = scores.masked_fill(~_taken(visible, at)[:, None], -math.inf)
        elif self.causal:
            later = torch.arange(length, device=at.device) > at[:, :, None]
            scores = scores.masked_fill(later[:, None], -math.inf)
        mixed = scores.softmax(dim=-1) @ value  # [B, heads, K, W / heads]
        return mixed.transpose(1, 2).flatten(2)


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

    def forward(
        self,
        x: Tensor,
        at: Tensor | None = None,
        visible: Tensor | None = None,
        groups: Groups | None = None,
    ) -> Tensor:
        """[B, L, W] -> [B, L, W], or [B, K, W]: as `Attention`."""
        x = (x if at is None else _taken(x, at)) + self.attn(self.ln_1(x), at, visible, groups)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, causal: bool, activation: str) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(width, heads, causal, activation) for _ in range(layers)
        )
        self.grad_checkpointing = False

    def forward(
        self,
        x: Tensor,
        at: Tensor,
        visible: Tensor | None = None,
        groups: Groups | None = None,
    ) -> Tensor:
        """[B, L, W], [B, K] -> [B, K, W]: of row b positions at[b]; or packed, as in `Attention`.

        The last block computes only these positions: no other output of it is used.
        """
        last = self.resblocks[-1]
        for block in self.resblocks:
            positions = at if block is last else None
            if self.grad_checkpointing and torch.is_grad_enabled():
                # Nothing in a block is random, so the RNG state need not be restored.
                given = x, positions, visible, groups
                x = checkpoint(block, *given, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, positions, visible, groups)
        return x
