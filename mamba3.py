"""Mamba-3 in one file: trapezoidal discretisation, a rotating state, MIMO; its language model and generation.

"Mamba-3: Improved Sequence Modeling using State Space Principles" (2026), arXiv:2603.15569; "the paper" below. Mamba-3
changes three things in Mamba-2. The input enters by a trapezoidal rule: a share of it, selected by the input, one step
late; with biases on B and C that replaces the short convolution. B and C are rotated by an angle that grows with the
input, as if the state were complex, so that the model can count modulo something. And a head may read and write its
state through several ranks at once (MIMO).

Copy this file into your project. It needs torch and einops; checkpoints also need safetensors and huggingface_hub,
which come with transformers.

    model = Mamba3ForCausalLM.from_pretrained("state-spaces/mamba3-siso-187m")    # or a directory
    ids = model.generate(input_ids, max_new_tokens=50)                            # (b, l) -> (b, l + 50)

    $ python mamba3.py "ROMEO:" --max-new-tokens 200

Glossary
    code        paper   shape               meaning
    b, l        -, T                        batch size, sequence length
    d_model     D                           width of the residual stream
    e                                       d_inner, the number of channels inside a layer; h * p
    h, p        H, P                        nheads, the number of heads, and headdim, the width of one
    n           N                           d_state, the size of the state of each channel
    g                                       ngroups: the heads of a group share B and C, but for bias and rotation
    r           R                           rank: mimo_rank, or 1 (SISO)
    s                                       number of rotated pairs among the n entries of B and C
    c, t                                    chunks side by side, and the steps in one
    x, v        x       (b, h, l, r, p)     input (with 1 for r), and x scaled for each rank
    k, q        B, C    (b, h, l, r, n)     normed, biased and rotated B and C: keys and queries of the attention form
    state       h       (b, h, p, n)        the state, `ssm_state` in a LayerState
    dt          Delta   (b, h, l)           step size
    A           A       (b, h, l)           decay rate, negative, selected by the input
    lam         lambda  (b, h, l)           share of the trapezoid's right end; 1 is Euler's rule
    alpha, beta, gamma  (b, h, l)           exp(dt A), (1 - lam) dt alpha, lam dt: weights of state, last and this input
    D                   (h,)                skip connection
    phi                 (b, h, l, s)        angle in turns (1 is 2 pi), the sum of dt tanh(theta) / 2
    z                   (b, h, l, 1, p)     gate
"""

import argparse
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


# ---------------------------------------------------- 2. Config -------------------------------------------------------
@dataclass
class Mamba3Config:
    """Sizes and settings of a model. Raises ValueError for values that make no sense, naming the field."""

    d_model: int = 768
    n_layer: int = 24
    d_intermediate: int = 0  # width of the gated MLP of a block, rounded up to a multiple of 128; 0: none
    vocab_size: int | None = 128256  # None: no embedding, for the encoder and the heads on vectors
    pad_vocab_size_multiple: int = 16  # embedding and head have `padded_vocab_size` rows
    d_state: int = 128
    expand: int = 2
    headdim: int = 64
    ngroups: int = 1  # heads of a group share B and C
    is_mimo: bool = False
    mimo_rank: int = 4
    rope_fraction: float = 0.5  # of the state is rotated; published models have 0.5 or 1.0
    is_outproj_norm: bool = False  # an RMS norm of each head before the gate
    chunk_size: int | None = None  # changes no result; None: 64 on a CPU, else 256, over the rank. Not in checkpoints
    dt_min: float = 0.001  # dt starts log-uniform in [dt_min, dt_max], but at least dt_init_floor
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    A_floor: float = 1e-4  # -A is at least this
    A_activation: Literal["heavy_tail", "softplus"] = "heavy_tail"  # softplus: official until June 2026
    norm_epsilon: float = 1e-5  # of the norms between layers; those inside have 1e-5
    residual_in_fp32: bool = True
    tie_embeddings: bool = True
    initializer_range: float = 0.02  # standard deviation of the embedding at the start
    bos_token_id: int | None = None
    eos_token_id: int | list | tuple | None = None  # where `generate` ends
    pad_token_id: int | None = None
    gradient_checkpointing: bool = False  # recompute each block in the backward pass
    num_labels: int = 2  # the classifier's, as the next two
    pooling_strategy: Literal["last", "mean", "max"] = "last"
    dropout: float = 0.1

    def __post_init__(self) -> None:
        _check_fields(self)
        width = f"expand * d_model = {self.d_inner}"
        _require(self.d_inner % self.headdim == 0, f"headdim must divide {width}, got {self.headdim}")
        _require(self.nheads % self.ngroups == 0, f"ngroups must divide {width} / headdim, got {self.ngroups}")
        _require(self.d_state % 2 == 0, f"d_state must be even, got {self.d_state}")
        _require(self.rope_fraction <= 1, f"rope_fraction must be in (0, 1], got {self.rope_fraction}")

    @property
    def padded_vocab_size(self) -> int | None:
        """Rows of the embedding: vocab_size, rounded up to a multiple of pad_vocab_size_multiple."""
        multiple = self.pad_vocab_size_multiple
        return None if self.vocab_size is None else -(-self.vocab_size // multiple) * multiple

    to_dict = asdict
    d_inner = property(lambda self: self.expand * self.d_model)
    nheads = property(lambda self: self.d_inner // self.headdim)
    rank = property(lambda self: self.mimo_rank if self.is_mimo else 1)
    n_angles = property(lambda self: int(self.d_state * self.rope_fraction) // 2)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        known = [f.name for f in fields(cls)]
        unknown = {name: value for name, value in values.items() if name not in known}
        _require(not unknown, f"unknown config fields {unknown}; allowed are {', '.join(known)}")
        return cls(**values)

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def save_to_json(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json_string() + "\n")

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        return cls.from_dict(json.loads(Path(path).read_text()))


# -------------------------------------- 3. The trapezoidal recurrence and its dual ------------------------------------
def trapezoid_recurrence(
    v: Tensor, dt: Tensor, lam: Tensor, A: Tensor, k: Tensor, q: Tensor, state: Tensor, last: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition, one step after the other. By the trapezoidal rule a step takes in dt times a mean of the input at
    its two ends, weighted by 1 - lam and lam, the earlier one decayed.

    Arguments, for any l, and results are those of `trapezoid_scan` up to last; that computes the same fast."""
    ys = []
    for v_t, dt_t, lam_t, A_t, k_t, q_t in zip(*(x.unbind(2) for x in (v, dt, lam, A, k, q)), strict=True):
        dt_t, lam_t, A_t = (x[..., None, None] for x in (dt_t, lam_t, A_t))  # (b, h, 1, 1)
        alpha = torch.exp(dt_t * A_t)
        beta, gamma = (1 - lam_t) * dt_t * alpha, lam_t * dt_t
        vk = v_t.mT @ k_t  # (b, h, p, n), summed over ranks
        state = alpha * state + beta * last + gamma * vk
        ys.append(q_t @ state.mT)  # (b, h, r, p)
        last = vk
    return torch.stack(ys, 2) if ys else torch.zeros_like(v), state


def decay_matrix(a: Tensor) -> Tensor:
    """The 1-semiseparable mask L of Mamba-2: L[i, j] = exp(a[j+1] + ... + a[i]) for j <= i, else 0.

    a: (..., t), not positive; L: (..., t, t)."""
    sums = a[..., None].expand(*a.shape, a.shape[-1]).tril(-1).cumsum(-2)  # without differences, which would cancel
    return _exp(sums).tril()


def _exp(sums: Tensor) -> Tensor:
    """exp, but 0 below tiny ** 0.75: CPUs are slow with numbers below tiny, to which products would come from there."""
    return sums.masked_fill(sums < 0.75 * math.log(torch.finfo(sums.dtype).tiny), -math.inf).exp()


def trapezoid_scan(
    v: Tensor, dt: Tensor, lam: Tensor, A: Tensor, k: Tensor, q: Tensor, state: Tensor, last: Tensor,
    chunk_size: int = 64, starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The chunked form: Mamba-2's SSD with another mask, in matrix products, linear in l.

        state_t = alpha_t state_{t-1} + beta_t v_{t-1} k_{t-1}^T + gamma_t v_t k_t^T        y_t = q_t state_t^T

    v: (b, h, l, r, p); dt, lam, A: (b, h, l); k, q: (b, h, l, r, n); state: (b, h, p, n); last: (b, h, p, n),
    v k^T of the step before; starts: (b, l), true where all before is forgotten. v k^T is summed over ranks, y has a
    row for each. Returns y (b, h, l, r, p) and the state. Raises ValueError for arguments that don't fit.

    Input i reaches its own output by gamma_i, and later ones by beta_{i+1} as well: in all by the weight
    w_i = gamma_i + (1 - lam_{i+1}) dt_{i+1}, since beta has the decay of step i + 1 in it."""
    _check("v", v, "b", "h", "l", "r", "p")
    _check("k", k, *v.shape[:4], "n")
    (b, h, l, r, p), n, t = v.shape, k.shape[-1], min(chunk_size, v.shape[2])
    inputs = [("dt", dt, l), ("lam", lam, l), ("A", A, l), ("q", q, l, r, n), ("state", state, p, n)]
    for name, x, *shape in [*inputs, ("last", last, p, n)]:
        _check(name, x, b, h, *shape)
    _check("starts", starts, b, l, kind="boolean")
    _require(chunk_size > 0, f"chunk_size must be a positive integer, got {chunk_size}")
    if l == 0 or (l == 1 and starts is None):
        return trapezoid_recurrence(v, dt, lam, A, k, q, state, last)
    late, gamma, a = (1 - lam) * dt, lam * dt, dt * A
    if starts is not None:
        late, a = late.masked_fill(starts[:, None], 0), a.masked_fill(starts[:, None], -1e30)  # a decay of 0
    state = state + late[:, :, 0, None, None] * last  # what the input before this call has left to give
    w = gamma + F.pad(late[:, :, 1:], (0, 1))  # what the last input has left to give the next call adds, likewise
    if l % t:  # steps with v = k = w = a = 0 change nothing
        v, k, q = (F.pad(x, (0, 0, 0, 0, 0, -l % t)) for x in (v, k, q))
        a, w, gamma = (F.pad(x, (0, -l % t)) for x in (a, w, gamma))
    v, k, q = (rearrange(x, "b h (c t) r n -> b h c (t r) n", t=t) for x in (v, k, q))
    a, w, gamma = (x.unflatten(2, (-1, t)) for x in (a, w, gamma))  # (b, h, c, t)
    L = decay_matrix(a)  # (b, h, c, t, t)

    # 1. The output of each chunk from its own inputs: attention with the mask L, weighted; each rank sees all ranks.
    mask = L.tril(-1) * w[..., None, :] + torch.diag_embed(gamma)
    scores = rearrange(q @ k.mT, "b h c (i r) (j m) -> b h c i r j m", r=r, m=r) * mask[..., :, None, :, None]
    y = rearrange(scores, "b h c i r j m -> b h c (i r) (j m)") @ v  # (b, h, c, t r, p)

    # 2. The state that each chunk's own inputs leave at its end.
    to_end = (L[..., -1, :] * w).repeat_interleave(r, -1)[..., None]
    own = (v * to_end).mT @ k  # (b, h, c, p, n)

    # 3. The state at the start of each chunk: a recurrence across chunks.
    from_start, entering = _exp(a.cumsum(-1)), []  # (b, h, c, t)
    for own_c, decay_c in zip(own.unbind(2), from_start[..., -1, None, None].unbind(2), strict=True):
        entering.append(state)
        state = torch.addcmul(own_c, decay_c, state)

    # 4. The output from the state at the start of the chunk.
    carried = q @ torch.stack(entering, 2).mT
    y = torch.addcmul(y, carried, from_start.repeat_interleave(r, -1)[..., None])
    return rearrange(y, "b h c (t r) p -> b h (c t) r p", r=r)[:, :, :l], state


# -------------------------------------------------- 4. The layer ------------------------------------------------------
@dataclass
class LayerState:
    """What a layer remembers of the sequence that it has read; empty at the start.

    A layer replaces the tensors and never writes to them: they may be kept, shared, expanded, or learned."""

    angle: Tensor | None = None  # (b, h, s), phi in turns; all four are float32 at least
    ssm_state: Tensor | None = None  # (b, h, p, n), the n in `rotate`'s order, as in key
    key: Tensor | None = None  # (b, r, h, n), k of the last step
    value: Tensor | None = None  # (b, h, p), x of the last step


def cumsum_modulo_1(x: Tensor) -> Tensor:
    """Sums over the last dimension modulo 1; the error in float32 doesn't grow with the sums, but for a constant x."""
    l = x.shape[-1]
    if l <= 64:
        return x.cumsum(-1) % 1
    x = F.pad(x, (0, -l % 64)).unflatten(-1, (-1, 64)).cumsum(-1)
    before = F.pad(cumsum_modulo_1(x[..., :-1, -1] % 1), (1, 0))  # sums of 64 are reduced before they are summed
    return ((x + before[..., None]) % 1).flatten(-2)[..., :l]


def rotate(B: Tensor, bias: Tensor, phi: Tensor) -> Tensor:
    """Turn pairs of entries of B + bias (..., n) by phi (..., s) turns: (a, c) to (a cos - c sin, a sin + c cos).

    The first half of B holds the a's and the second the c's; the pairs from s on stay as they are. Products of k and q
    turned so see only differences of phi, as if the state turned from step to step (RoPE with selected angles)."""
    s, half, n = phi.shape[-1], B.shape[-1] // 2, B.shape[-1]
    parts = slice(s), slice(s, half), slice(half, half + s), slice(half + s, n)
    a, a_rest, c, c_rest = (B[..., part] + bias[..., part] for part in parts)
    cos, sin = torch.cos(2 * math.pi * phi), torch.sin(2 * math.pi * phi)
    a, c = torch.addcmul(a * cos, c, sin, value=-1), torch.addcmul(c * cos, a, sin)
    return torch.cat([a, a_rest, c, c_rest], dim=-1)


class HeadRMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension of (b, heads, l, r, d), in float32 at least; weight: (d) or (h d)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.promote_types(self.weight.dtype, torch.float32))
        return F.rms_norm(x, x.shape[-1:], eps=1e-5) * self.weight.view(-1, 1, 1, x.shape[-1])


class Mamba3Mixer(nn.Module):
    """The Mamba-3 layer, (b, l, d_model) to the same shape: projection, rotation, trapezoidal scan, gate."""

    def __init__(self, config: Mamba3Config) -> None:
        super().__init__()
        self.config = config
        e, h, p, n, r = config.d_inner, config.nheads, config.headdim, config.d_state, config.rank
        self.sizes = [e, e, config.ngroups * n * r, config.ngroups * n * r, h, h, h, config.n_angles]
        self.in_proj = nn.Linear(config.d_model, sum(self.sizes), bias=False)  # z, x, B, C, dt, A, lam, theta
        dt = torch.empty(h).uniform_(math.log(config.dt_min), math.log(config.dt_max)).exp().clamp(config.dt_init_floor)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.B_bias, self.C_bias = nn.Parameter(torch.ones(h, r, n)), nn.Parameter(torch.ones(h, r, n))
        self.B_norm, self.C_norm = HeadRMSNorm(n), HeadRMSNorm(n)
        self.D = nn.Parameter(torch.ones(h))
        if config.is_mimo:
            self.mimo_x, self.mimo_o = (nn.Parameter(torch.full((h, r, p), 1 / r)) for _ in range(2))  # in and out
            self.mimo_z = nn.Parameter(torch.ones(h, r, p))
        if config.is_outproj_norm:
            self.norm = HeadRMSNorm(e)
        self.out_proj = nn.Linear(e, config.d_model, bias=False)

    def forward(
        self, x: Tensor, state: LayerState | None = None, lengths: Tensor | None = None, seq_idx: Tensor | None = None
    ) -> Tensor:
        """(b, l, d_model) to the same shape, for any l.

        state: what was read before x; the tensors in it are replaced by new ones. None: nothing, and nothing is kept.
        lengths: (b,), how many steps of each row are real; padding follows them and leaves the state alone.
        seq_idx: (b, l), integers that change where a new document begins, before which the state is forgotten; the
            first step goes on with the state's document."""
        config, r, n = self.config, self.config.rank, self.config.d_state
        _check("the input", x, "b", "l", config.d_model)
        (b, l, _), projected = x.shape, self.in_proj(x)
        starts = None if seq_idx is None else _starts(seq_idx, lengths, x.shape[:2])
        now = self.new_state(b, x.device, x.dtype)  # becomes a copy of the given state
        names = () if state is None else ("angle", "ssm_state", "key", "value")
        for name in names:
            given, zeros = getattr(state, name), getattr(now, name)
            _check(f"the state's {name}", given, *zeros.shape)
            setattr(now, name, zeros if given is None else given.to(zeros.dtype))
        # Some chunks at a time: on a CPU as many as stay in its cache, else as 2^26 elements hold.
        chunk = min(config.chunk_size or max(1, (64 if x.device.type == "cpu" else 256) // r), max(1, l))
        largest = b * config.nheads * max((chunk * r) ** 2, chunk * r * n, config.headdim * n)
        in_cache = x.device.type == "cpu" and not torch.compiler.is_compiling()
        steps, ys = chunk * max(1, (2**20 if in_cache else 2**26) // max(1, largest)), []
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):  # there is none for meta
            for i, part in enumerate(projected.split(steps, dim=1)):
                real = None if lengths is None else (lengths - i * steps).clamp(0, part.shape[1])
                new = None if starts is None else starts[:, i * steps : (i + 1) * steps]
                ys.append(self._mix(part, now, real, new, chunk))
        for name in names:
            setattr(state, name, getattr(now, name))
        return self.out_proj(torch.cat(ys, dim=1).to(x.dtype))

    def _mix(self, x: Tensor, state: LayerState, lengths: Tensor | None, starts: Tensor | None, chunk: int) -> Tensor:
        """What lies between the projections, to (b, l, e); updates a state in which nothing is None."""
        config, h = self.config, self.config.nheads
        z, x, B, C, dt, A, lam, theta = x.to(state.angle.dtype).split(self.sizes, dim=-1)
        dt = F.softplus(dt + self.dt_bias).mT  # (b, h, l)
        if lengths is not None:
            dt = dt.masked_fill(_padded(x.shape[1], lengths)[:, None], 0)  # dt = 0 leaves the state alone
        lam, A = torch.sigmoid(lam).mT, A.mT
        rate = F.softplus(A) if config.A_activation == "softplus" else torch.where(A > 0, 1 + A, 1 / (1 + A.abs()))
        A = -rate.clamp(min=config.A_floor)  # the heavy tail is the official code's
        turns = cumsum_modulo_1(torch.tanh(theta).mT[:, None] * dt[:, :, None] / 2)  # pi tanh(theta) dt, as turns
        phi = ((state.angle[..., None] + turns) % 1).mT  # (b, h, l, s)
        if starts is not None:  # a document's angles begin at 0, as if it were alone
            first = (starts * torch.arange(1, x.shape[1] + 1, device=x.device)).cummax(1).values  # from 1; 0: before x
            before = torch.cat([state.angle[:, :, None], phi], 2)  # (b, h, 1 + l, s)
            before = before.take_along_dim((first - 1).clamp(min=0)[:, None, :, None], 2)
            phi = (phi - before * (first > 0)[:, None, :, None]) % 1

        k, q = self._rotated(B, self.B_norm, self.B_bias, phi), self._rotated(C, self.C_norm, self.C_bias, phi)
        x, z = (rearrange(v, "b l (h p) -> b h l 1 p", h=h) for v in (x, z))
        v, before = x, state.value[:, :, None]  # (b, h, l, r, p) and (b, h, r, p)
        if config.is_mimo:
            v, before, z = x * self.mimo_x[:, None], before * self.mimo_x, z * self.mimo_z[:, None]
        last = before.mT @ state.key.transpose(1, 2)  # (b, h, p, n)
        y, after = trapezoid_scan(v, dt, lam, A, k, q, state.ssm_state, last, chunk, starts)
        state.angle = _last(phi, lengths, state.angle)
        state.key = _last(k, lengths, state.key.transpose(1, 2)).transpose(1, 2)
        state.value, state.ssm_state = _last(x[:, :, :, 0], lengths, state.value), after

        y = torch.addcmul(y, v, self.D.to(y.dtype)[:, None, None, None])
        y = (self.norm(y) if config.is_outproj_norm else y) * F.silu(z)
        y = (y * self.mimo_o[:, None]).sum(3) if config.is_mimo else y.squeeze(3)
        return rearrange(y, "b h l p -> b l (h p)")

    def _rotated(self, B: Tensor, norm: nn.Module, bias: Tensor, phi: Tensor) -> Tensor:
        """B or C (b, l, r g n), normed, shared by the heads of a group, biased and rotated: (b, h, l, r, n)."""
        B = norm(rearrange(B, "b l (r g n) -> b g l r n", r=self.config.rank, n=self.config.d_state))
        if not self.config.is_mimo:  # SISO's weights pair neighbours, MIMO's entries n / 2 apart, as `rotate` does
            B, bias = (rearrange(v, "... (j two) -> ... (two j)", two=2) for v in (B, bias))
        bias = rearrange(bias, "(g k) r n -> g k 1 r n", g=self.config.ngroups)
        return rotate(B[:, :, None], bias, phi.unflatten(1, bias.shape[:2])[..., None, :]).flatten(1, 2)

    def new_state(self, batch_size: int, device: Any = None, dtype: torch.dtype | None = None) -> LayerState:
        """The state at the start of a sequence, as zeros, by default on the weights' device; float32 at least."""
        config, b, h, n = self.config, batch_size, self.config.nheads, self.config.d_state
        shapes = [(b, h, config.n_angles), (b, h, config.headdim, n), (b, config.rank, h, n), (b, h, config.headdim)]
        device, dtype = device or self.D.device, torch.promote_types(dtype or self.D.dtype, torch.float32)
        return LayerState(*(torch.zeros(shape, device=device, dtype=dtype) for shape in shapes))


def _last(x: Tensor, lengths: Tensor | None, before: Tensor) -> Tensor:
    """The last real step of each row of x (b, h, l, ...), or `before` (b, h, ...) where there is none."""
    if lengths is None or not x.shape[2]:
        return x[:, :, -1].clone() if x.shape[2] else before  # a view would keep all steps alive
    newest = x[torch.arange(len(x), device=x.device), :, (lengths - 1).clamp(min=0)]
    return torch.where((lengths > 0).view(-1, *[1] * (before.ndim - 1)), newest, before)


# ------------------------------------- 5. Block, encoder, model, language model ---------------------------------------
class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last dimension, in float32 at least; the result has the weight's type."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return F.rms_norm(x.to(dtype), x.shape[-1:], self.weight.to(dtype), self.eps).to(self.weight.dtype)


class GatedMLP(nn.Module):
    """fc2(x * SiLU(gate)) of the halves of fc1, (b, l, d_model) to the same shape."""

    def __init__(self, config: Mamba3Config) -> None:
        super().__init__()
        width = math.ceil(config.d_intermediate / 128) * 128
        self.fc1 = nn.Linear(config.d_model, 2 * width, bias=False)
        self.fc2 = nn.Linear(width, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(x * F.silu(gate))


class Mamba3Block(nn.Module):
    """x + mixer(norm(x)), and with d_intermediate x + mlp(norm2(x)), on (b, l, d_model)."""

    def __init__(self, config: Mamba3Config) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, eps=config.norm_epsilon)
        self.mixer = Mamba3Mixer(config)
        if config.d_intermediate > 0:
            self.norm2 = RMSNorm(config.d_model, eps=config.norm_epsilon)
            self.mlp = GatedMLP(config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = x + self.mixer(self.norm(x), *args, **kwargs)
        return x + self.mlp(self.norm2(x)) if hasattr(self, "mlp") else x


class Mamba3PreTrained(nn.Module):
    """What all models have: a config, checkpoints, and methods about parameters and caches."""

    @classmethod
    def from_pretrained(cls, name: str | Path, device: Any = None, dtype: Any = None, **hub: Any) -> Self:
        """The model stored in a directory or in a repository of the Hugging Face hub, in evaluation mode.

        name: a checkpoint in state-spaces' format, safetensors or pytorch_model.bin, sharded or not. A
            classifier may be loaded from a language model's: its last layer then is new.
        device: None is the CPU; dtype: None keeps the stored; hub: revision, token, cache_dir, local_files_only.
        Raises OSError for missing files, ValueError for models of another kind and for tensors that don't fit."""
        return _load(cls, name, "cpu" if device is None else device, dtype, hub)

    def save_pretrained(
        self, directory: str | Path, state_dict: Mapping[str, Tensor] | None = None, safe_serialization: bool = True
    ) -> None:
        """Write config.json, generation_config.json and model.safetensors; ValueError unless weights and config fit.
        state_dict holds the weights of a model that is sharded over processes. safe_serialization=False writes
        pytorch_model.bin, with lm_head.weight, which the official package loads."""
        _save(self, Path(directory), state_dict, safe_serialization)

    def gradient_checkpointing_enable(self, **_: Any) -> None:
        """Set config.gradient_checkpointing: blocks are recomputed in the backward pass (transformers' name)."""
        self.config.gradient_checkpointing = True

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that an optimizer should not decay: A_log, D, the bias of dt, norms, if any."""
        ending = re.compile(r"(A_log|\bD|dt_bias|dt_proj\.bias|norm\w*\.weight)$")
        return {name for name, _ in self.named_parameters() if ending.search(name)}

    def get_input_embeddings(self) -> nn.Module:
        return getattr(self, "backbone", self).embeddings


class Mamba3Encoder(Mamba3PreTrained):
    """The blocks and a final norm, (b, l, d_model) to the same shape: for inputs that are vectors already."""

    def __init__(self, config: Mamba3Config) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Mamba3Block(config) for _ in range(config.n_layer))
        self.norm_f = RMSNorm(config.d_model, eps=config.norm_epsilon)
        for layer in self.layers:  # the residual stream is a sum of as many, as in the official code also with MLPs
            for linear in (layer.mixer.out_proj, *([layer.mlp.fc2] if config.d_intermediate else [])):
                linear.weight.data.div_(math.sqrt(config.n_layer))

    def forward(
        self, x: Tensor, inference_params: Any = None, *, attention_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """(b, l, d_model) to the same shape, in the weights' type.

        inference_params: a cache, see InferenceParams. The model goes on from the states in it and replaces them, once
            all layers have succeeded; gradients stop there, between two calls.
        attention_mask: (b, l) of 0 and 1, the tokens of this call. Where it is 0 nothing is read.
        seq_idx: (b, l), integers that change where a new document begins, for documents packed into a row: none sees
            another. The first token goes on with the document in the cache, which then holds each row's last one."""
        _check("the input", x, "b", "l", self.config.d_model)
        dtype = self.norm_f.weight.dtype
        x = x.to(torch.promote_types(dtype, torch.float32) if self.config.residual_in_fp32 else dtype)
        order, lengths = (None, None) if attention_mask is None else _real_first(attention_mask, x.shape[:2])
        if order is not None:  # each row's real tokens first, then zeros
            x = x.take_along_dim(order[..., None], 1).masked_fill(_padded(x.shape[1], lengths)[..., None], 0)
            seq_idx = None if seq_idx is None else seq_idx.take_along_dim(order, 1)
        states = [None] * len(self.layers)
        if inference_params is not None:
            stored, layers = inference_params.key_value_memory_dict, range(len(self.layers))
            fits = not stored or stored.keys() == set(layers)
            _require(fits, f"inference_params must hold states of {layers} or none, got {list(stored)}")
            states = [LayerState(*stored.get(i, ())) for i in layers]
        recompute = self.config.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for layer, state in zip(self.layers, states, strict=True):
            if recompute and state is None:  # with a state, a layer would start from where it ended the first time
                x = checkpoint(layer, x, None, lengths, seq_idx, use_reentrant=False)
            else:
                x = layer(x, state, lengths, seq_idx)
        x = self.norm_f(x)
        if inference_params is not None:
            for i, state in enumerate(states):
                kept = (state.angle, state.ssm_state, state.key, state.value)  # None: of a block without a state
                stored[i] = tuple(v.detach() for v in kept if v is not None)
            if isinstance(inference_params, InferenceParams):
                inference_params.seqlen_offset += x.shape[1]
        return x if order is None else x.take_along_dim(order.argsort(1)[..., None], 1)  # back in their places


class Embedding(nn.Embedding):
    """Looks ids (b, l) up, or multiplies vectors (b, l, d_model) by its rows: the head of a model that ties the two."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) if x.is_floating_point() else super().forward(x)


class Mamba3Model(Mamba3Encoder):
    """The encoder with an embedding, if config.vocab_size isn't None: ids (b, l), or vectors, to (b, l, d_model)."""

    def __init__(self, config: Mamba3Config) -> None:
        super().__init__(config)
        if config.vocab_size is not None:
            self.embeddings = Embedding(config.padded_vocab_size, config.d_model)
            nn.init.normal_(self.embeddings.weight, std=config.initializer_range)

    def forward(self, input_ids: Tensor, inference_params: Any = None, **mask_and_seq_idx: Tensor | None) -> Tensor:
        if not input_ids.is_floating_point() and self.config.vocab_size is not None:
            _check("input_ids", input_ids, "b", "l", kind="integer", below=self.config.padded_vocab_size)
            input_ids = self.embeddings(input_ids)
        return super().forward(input_ids, inference_params, **mask_and_seq_idx)


class Mamba3ForCausalLM(Mamba3PreTrained):
    """The language model: next-token logits for every position."""

    def __init__(self, config: Mamba3Config) -> None:
        super().__init__()
        _require(config.vocab_size is not None, "vocab_size must be a positive integer in a language model, got None")
        self.config = config
        self.backbone = Mamba3Model(config)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        """What makes logits of hidden states: `lm_head`, or the embedding where the two are tied."""
        return self.backbone.embeddings if self.config.tie_embeddings else self.lm_head

    def forward(
        self, input_ids: Tensor, inference_params: Any = None, labels: Tensor | None = None, *,
        attention_mask: Tensor | None = None, seq_idx: Tensor | None = None, num_last_tokens: int = 0,
        loss_only: bool = False,
    ) -> Tensor | dict[str, Tensor]:  # fmt: skip
        """Logits (b, l, padded_vocab_size), float32 at least, from ids (b, l) or embeddings (b, l, d_model).

        inference_params, attention_mask, seq_idx: see the encoder. Any number of tokens a call.
        labels: (b, l), the ids themselves (they are shifted here), -100 where none counts; neither does padding, nor
            the first token of a document. Then the result is a dict of "loss" (mean cross entropy in nats, float32
            at least) and "logits", or with loss_only of "loss" alone: that never holds the logits of all positions.
        num_last_tokens: k > 0 gives the logits of the last k positions alone."""
        fits = type(num_last_tokens) is int and 0 <= num_last_tokens <= (math.inf if labels is None else 0)
        _require(fits, f"num_last_tokens must be 0 (all), or greater without labels, got {num_last_tokens!r}")
        if labels is not None:
            ids, size = labels.masked_fill(labels == -100, 0), self.config.padded_vocab_size
            _check("labels", ids, *input_ids.shape[:2], kind="integer", below=size)
        hidden = self.backbone(input_ids, inference_params, attention_mask=attention_mask, seq_idx=seq_idx)
        head = self.get_output_embeddings()
        labels = None if labels is None else _next_labels(labels, attention_mask, seq_idx)
        if loss_only and labels is not None:
            return {"loss": _loss_in_slices(head, hidden, labels)}
        logits = head(hidden[:, -num_last_tokens:]).to(torch.promote_types(hidden.dtype, torch.float32))  # -0: all
        if labels is None:
            return logits
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}

    @torch.no_grad()
    def step(self, token_ids: Tensor, inference_params: Any) -> Tensor:
        """Logits (b, padded_vocab_size) after one more token (b,): time and memory don't depend on what came before."""
        return self(token_ids[..., None], inference_params)[:, -1]

    @torch.no_grad()
    def advance(self, token_ids: Tensor, states: Mapping[int, tuple]) -> tuple[Tensor, dict[int, tuple]]:
        """`step` as a function, for torch.compile and, in a module, torch.export: ids (b,) and states (a cache's
        `key_value_memory_dict`; {} at the start of a sequence) to logits and new states."""
        cache = InferenceParams(dict(states))
        return self(token_ids[..., None], cache)[:, -1], cache.key_value_memory_dict

    def generate(
        self, input_ids: Tensor, max_new_tokens: int = 50, temperature: float = 1.0, top_k: int | None = None,
        top_p: float = 1.0, eos_token_id: int | Sequence[int] | None = None, attention_mask: Tensor | None = None,
        use_cache: bool = True, generator: torch.Generator | None = None, inference_params: Any = None,
    ) -> Tensor:  # fmt: skip
        """Continue prompts (b, l): ids (b, l + new), new <= max_new_tokens.

        temperature 0 takes the likeliest token; else one is drawn from softmax(logits / temperature), of the `top_k`
            likeliest (None or 0: all) and then of the fewest likeliest that hold `top_p` of the probability.
        eos_token_id: an id or several, None for the config's, () for none. A row that drew one is filled up with the
            first of them and its state stays there; the result is shorter when all rows did.
        attention_mask: (b, l) of 0 and 1, for prompts of different lengths. Where it is 0 nothing is read.
        use_cache: False reads the whole text anew for every token: the same ids, slowly.
        inference_params: a cache whose text the prompt continues; then it has read all but each row's last token."""
        sampling = (temperature, top_k, top_p, eos_token_id, attention_mask, use_cache, generator, inference_params)
        tokens = _generate(self, input_ids, max_new_tokens, *sampling)
        return torch.cat([input_ids, *(token[:, None] for token in tokens)], dim=1)

    def stream(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Iterator[int | Tensor]:
        """The new tokens of `generate` (the same arguments) as they come: an int for one prompt, else ids (b,)."""
        tokens = _generate(self, input_ids, *args, **kwargs)
        return (token.item() for token in tokens) if len(input_ids) == 1 else tokens

    def resize_token_embeddings(self, vocab_size: int) -> nn.Module:
        """Give embedding and head rows for vocab_size tokens; those that are new start as in a new embedding."""
        config = replace(self.config, vocab_size=vocab_size or 0)  # checks it
        for part in dict.fromkeys([self.get_input_embeddings(), self.get_output_embeddings()]):
            new = part.weight.new_empty(config.padded_vocab_size, config.d_model).normal_(std=config.initializer_range)
            new[: len(part.weight)] = part.weight.detach()[: len(new)]
            part.weight = nn.Parameter(new, part.weight.requires_grad)
            setattr(part, "num_embeddings" if isinstance(part, nn.Embedding) else "out_features", len(new))
        self.config.vocab_size = vocab_size
        return self.get_input_embeddings()


def _check(name: str, x: Tensor | None, *shape: int | str, kind: str = "real", below: int | None = None) -> None:
    """Raise ValueError unless x is None, or of this kind and shape (a letter: any size), with values in [0, below)."""
    if x is None:
        return
    kinds = {"real": x.is_floating_point(), "boolean": x.dtype == torch.bool}
    fits = kinds.get(kind, x.dtype in (torch.int64, torch.int32)) and x.ndim == len(shape)
    if not fits or any(type(s) is not str and s != n for s, n in zip(shape, x.shape, strict=True)):
        wanted = f"({', '.join(map(str, shape))})"
        raise ValueError(f"{name} must be {kind}, of shape {wanted}, got {x.dtype} of shape {tuple(x.shape)}")
    if below is not None and x.numel() and not (x.is_meta or torch.compiler.is_compiling()):  # which show no values
        low, high = (bound.item() for bound in torch.aminmax(x))
        _require(low >= 0 and high < below, f"{name} must be in [0, {below}), got {low if low < 0 else high}")


def _real_first(attention_mask: Tensor, shape: torch.Size) -> tuple[Tensor | None, Tensor | None]:
    """The positions (b, l) of each row's real tokens, then the others, and how many are real (b,); None if all are."""
    real = attention_mask.bool()
    _check("attention_mask", real, *shape, kind="boolean")
    if not torch.compiler.is_compiling():  # compiled code doesn't look at values
        _require(torch.equal(attention_mask, real.to(attention_mask.dtype)), "attention_mask must hold 0 and 1 alone")
        if real.all():
            return None, None
    return real.int().argsort(dim=1, descending=True, stable=True), real.sum(1)


def _padded(l: int, lengths: Tensor) -> Tensor:
    """Which of l steps are padding, (b, l), where only the first `lengths` (b,) of each row are real."""
    return torch.arange(l, device=lengths.device) >= lengths[:, None]


def _starts(seq_idx: Tensor, lengths: Tensor | None, shape: torch.Size) -> Tensor:
    """Where new documents begin, (b, l), if not at the first step; padding belongs to the last one."""
    _check("seq_idx", seq_idx, *shape, kind="integer")
    starts = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))[:, : shape[1]]
    return starts if lengths is None else starts & ~_padded(shape[1], lengths)


def _next_labels(labels: Tensor, attention_mask: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    """What each position predicts, (b, l): the label of the next; -100, which doesn't count, where there is none."""
    labels = F.pad(labels[:, 1:], (0, 1), value=-100)[:, : labels.shape[1]]
    if attention_mask is not None:
        labels = labels.masked_fill(~(attention_mask.bool() & attention_mask.bool().roll(-1, dims=1)), -100)
    return labels if seq_idx is None else labels.masked_fill(seq_idx != seq_idx.roll(-1, dims=1), -100)


def _loss_in_slices(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    """The loss of hidden states (b, l, d_model), some positions at a time, which the backward pass computes again."""

    def loss(hidden: Tensor, labels: Tensor) -> Tensor:
        logits = head(hidden).to(torch.promote_types(hidden.dtype, torch.float32))
        return F.cross_entropy(logits, labels, reduction="sum")

    slices = zip(hidden.flatten(0, 1).split(LOSS_SLICE), labels.flatten().split(LOSS_SLICE), strict=True)
    return sum(checkpoint(loss, *some, use_reentrant=False) for some in slices) / (labels != -100).sum()


# --------------------------------------------------- 6. Generation ----------------------------------------------------
PROMPT_SEGMENT = 512  # tokens (of all rows together) of a prompt read at once: bounds the memory that a prompt takes
LOSS_SLICE = 1024  # positions (of all rows together) whose logits exist at once, where the loss alone is wanted


@dataclass
class InferenceParams:
    """A cache: the state of every layer after the tokens read so far, all that generation has to remember.

    `key_value_memory_dict[position of the layer] = (angle, ssm_state, key, value)`; empty: the start of a sequence.
    Models take any object with that dict, and replace its tensors by new ones, detached: gradients don't flow from one
    call of a model into the one before. `seqlen_offset` counts the tokens read, padding included, for information."""

    key_value_memory_dict: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    seqlen_offset: int = 0

    def reset(self) -> None:
        """Forget everything: the next call starts a new sequence."""
        self.key_value_memory_dict.clear()
        if isinstance(self, InferenceParams):
            self.seqlen_offset = 0

    def clone(self) -> "InferenceParams":
        """A copy, to continue one prefix in several ways. The two share tensors, none of which is ever written to."""
        return replace(self, key_value_memory_dict=dict(self.key_value_memory_dict))

    def select(self, rows: Tensor | Sequence[int]) -> "InferenceParams":
        """A copy with these rows of the batch, chosen, repeated or reordered: beams, several answers to one prompt."""
        rows, layers = torch.as_tensor(rows), self.key_value_memory_dict.items()
        _check("rows", rows, "k", kind="integer", below=min((len(v) for _, s in layers for v in s), default=None))
        states = {i: tuple(v.index_select(0, rows.to(v.device)) for v in s) for i, s in layers}
        return replace(self, key_value_memory_dict=states)

    def get_cache_info(self) -> dict[str, float]:
        """memory_mb (10^6 bytes), cached_layers, total_tensors, seqlen_offset."""
        layers, seqlen_offset = self.key_value_memory_dict, getattr(self, "seqlen_offset", 0)
        tensors = [tensor for state in layers.values() for tensor in state]
        sizes = {"memory_mb": sum(tensor.nbytes for tensor in tensors) / 1e6, "total_tensors": len(tensors)}
        return sizes | {"cached_layers": len(layers), "seqlen_offset": seqlen_offset}


@torch.no_grad()
def _generate(
    model: Mamba3ForCausalLM, unread: Tensor, max_new_tokens: int = 50, temperature: float = 1.0,
    top_k: int | None = None, top_p: float = 1.0, eos_token_id: int | Sequence[int] | None = None,
    attention_mask: Tensor | None = None, use_cache: bool = True, generator: torch.Generator | None = None,
    inference_params: Any = None,
) -> Iterator[Tensor]:  # fmt: skip
    """The new tokens of `generate`, (b,) each: read what is unread, draw a token, and so on."""
    shape, eos = tuple(unread.shape), model.config.eos_token_id if eos_token_id is None else eos_token_id
    _require(len(shape) == 2 and shape[1] > 0, f"input_ids must have shape (b, l) with l > 0, got {shape}")
    is_count = type(max_new_tokens) is int and max_new_tokens >= 0
    _require(is_count, f"max_new_tokens must be an integer, 0 or greater, got {max_new_tokens!r}")
    token_probabilities(torch.empty(0, 1), temperature, top_k, top_p)  # checks them, before anything is read
    torch.rand(0, device=unread.device, generator=generator)  # likewise
    eos = [] if eos is None else list(eos) if isinstance(eos, (list, tuple)) else [eos]
    are_tokens = all(type(i) is int and 0 <= i < model.config.padded_vocab_size for i in eos)
    _require(are_tokens, f"eos_token_id must be None, a token or a list of them, got {eos}")
    _require(use_cache or inference_params is None, "use_cache must be True with inference_params, got False")
    cache = InferenceParams() if use_cache and inference_params is None else inference_params
    mask = torch.ones_like(unread) if attention_mask is None else attention_mask
    _real_first(mask, unread.shape)  # checks it
    _require(bool(mask.any(1).all()), "attention_mask must leave at least one real token in every row")
    order = mask.int().argsort(dim=1, stable=True)  # padding to the left, so that every row's last token is real
    unread, mask = unread.take_along_dim(order, 1), mask.take_along_dim(order, 1)
    ended = torch.zeros_like(unread[:, 0], dtype=torch.bool)
    if cache is not None and shape[1] > 1:  # all but the last token, in segments
        size = max(1, PROMPT_SEGMENT // max(1, len(unread)))
        for segment, real in zip(*(v[:, :-1].split(size, dim=1) for v in (unread, mask)), strict=True):
            model(segment, cache, attention_mask=real, num_last_tokens=1)
        unread, mask = unread[:, -1:], None
    for _ in range(max_new_tokens):
        logits = model(unread, cache, attention_mask=mask, num_last_tokens=1)
        logits = logits[:, -1, : model.config.vocab_size]  # (b, v), without the padding of the vocabulary
        token = logits.argmax(-1)
        if temperature > 0:
            probabilities = token_probabilities(logits, temperature, top_k, top_p)
            token = probabilities.multinomial(1, generator=generator).squeeze(1)
        token = token.masked_fill(ended, eos[0]) if eos else token
        yield token
        ended = ended | torch.isin(token, torch.tensor(eos, dtype=token.dtype, device=token.device))
        if eos and ended.all():
            return
        if cache is None:  # everything is unread each time
            unread, mask = torch.cat([unread, token[:, None]], dim=1), F.pad(mask, (0, 1), value=1)
        else:  # rows that ended read nothing more
            unread, mask = token[:, None], (~ended)[:, None] if eos and ended.any() else None


def token_probabilities(logits: Tensor, temperature: float, top_k: int | None, top_p: float) -> Tensor:
    """The probabilities (b, v) from which `generate` draws, given logits (b, v) and its settings.

    The same tokens have any as with transformers' TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper."""
    fits = type(temperature) in (int, float) and 0 <= temperature < math.inf
    _require(fits, f"temperature must be 0 (greedy) or greater, got {temperature!r}")
    fits = top_k is None or (type(top_k) is int and top_k >= 0)
    _require(fits, f"top_k must be None or an integer, 0 (all) or greater, got {top_k!r}")
    _require(type(top_p) in (int, float) and 0 < top_p <= 1, f"top_p must be in (0, 1], got {top_p!r}")
    logits = logits - logits.amax(-1, keepdim=True)  # the largest is 0, which no temperature makes infinite
    logits = logits / max(temperature, torch.finfo(logits.dtype).tiny)
    if top_k and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    if top_p < 1:
        ascending, index = logits.sort(dim=-1)
        removed = F.softmax(ascending, dim=-1).cumsum(-1) <= 1 - top_p
        removed[:, -1] = False
        logits = logits.masked_fill(removed.scatter(1, index, removed), -math.inf)
    return F.softmax(logits, dim=-1)


# ------------------------------------ 7. Other heads, and other projects' names ---------------------------------------
class Mamba3ForSequenceClassification(Mamba3PreTrained):
    """A linear classifier (config.num_labels) on the pooled hidden states (config.pooling_strategy)."""

    def __init__(self, config: Mamba3Config) -> None:
        super().__init__()
        self.config = config
        self.backbone = Mamba3Model(config)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.d_model, config.num_labels)
        nn.init.normal_(self.classifier.weight, std=config.initializer_range)
        nn.init.zeros_(self.classifier.bias)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor | dict[str, Tensor]:
        """Logits (b, num_labels), float32 at least, from ids (b, l) or vectors (b, l, d_model).

        attention_mask: (b, l) of 0 and 1. Where it is 0 nothing is read.
        labels: (b,) classes, or numbers where num_labels is 1. Then the result is a dict of "loss" (mean cross entropy,
            or mean squared error) and "logits"."""
        hidden = self.backbone(input_ids, attention_mask=attention_mask)  # (b, l, d_model)
        real = hidden.new_ones(hidden.shape[:2]) if attention_mask is None else attention_mask
        real, s = real.bool()[..., None], torch.promote_types(hidden.dtype, torch.float32)  # (b, l, 1)
        if not torch.compiler.is_compiling():
            _require(bool(real.any(1).all()), "input_ids must have a real token in every row, got a row of none")
        if self.config.pooling_strategy == "max":
            pooled = hidden.masked_fill(~real, -math.inf).amax(1)
        else:  # the mean over all real tokens, or over the last one alone
            last = real & (real.cumsum(1) == real.sum(1, keepdim=True))
            counts = last if self.config.pooling_strategy == "last" else real
            pooled = hidden.masked_fill(~counts, 0).sum(1, dtype=s) / counts.sum(1)
        logits = self.classifier(self.dropout(pooled.to(hidden.dtype))).to(s)
        if labels is None:
            return logits
        if self.config.num_labels == 1:
            _check("labels", labels := labels.to(s), len(logits))
            return {"loss": F.mse_loss(logits[:, 0], labels), "logits": logits}
        _check("labels", labels, len(logits), kind="integer", below=self.config.num_labels)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


Mamba3LMHeadModel = Mamba3ForCausalLM  # state-spaces'; the others are MiniMamba's
Mamba3 = Mamba3Mixer
Mamba3ForCausalLM.generate_streaming = Mamba3ForCausalLM.stream
Mamba3PreTrained.get_cache_info = lambda _, inference_params: InferenceParams.get_cache_info(inference_params)
Mamba3PreTrained.reset_cache = lambda _, inference_params: InferenceParams.reset(inference_params)
InferenceParams.reset_cache = InferenceParams.reset
Mamba3ForFeatureExtraction = Mamba3Model


# -------------------------------------- 8. Checkpoints, and what a config allows --------------------------------------
# The official loader takes these keys of config.json alone, and hands ssm_cfg to the layer, which ignores names that it
# doesn't know: there are the layer's settings by our names, and what else our config has.
OFFICIAL = {"attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True, "fused_add_norm": True}
TOP_LEVEL = ["d_model", "d_intermediate", "n_layer", "vocab_size", "residual_in_fp32", "pad_vocab_size_multiple"]
TOP_LEVEL += ["tie_embeddings"]
SPECIAL_TOKENS = ["bos_token_id", "eos_token_id", "pad_token_id"]  # in generation_config.json


def _from_state_spaces(stored: Mapping[str, Any]) -> Mamba3Config:
    """The config in a config.json of state-spaces/mamba; ValueError for a model that this file does not implement."""
    kind, ssm_cfg = stored.get("model_type"), {"layer": "Mamba1"} | (stored.get("ssm_cfg") or {})
    _require(kind is None, f"a config.json of model_type {kind!r} is for mamba.py, mamba2.py, fla or transformers")
    _require("d_model" in stored, "config.json must have d_model and ssm_cfg, as in state-spaces' format")
    layer, _ = ssm_cfg.pop("layer"), ssm_cfg.pop("chunk_size", None)  # which changes no result
    use = {"Mamba1": "mamba.py", "Mamba2": "mamba2.py", "Mamba3": "mamba3.py"}.get(layer, "mamba_ssm")
    _require(layer == "Mamba3", f"ssm_cfg['layer'] must be 'Mamba3' in this file, got {layer!r}: use {use}")
    plain = {"attn_layer_idx": [], "rms_norm": True, "quantization_config": None}
    wrong = {name: stored[name] for name, value in plain.items() if stored.get(name) not in (None, value)}
    wrong |= {name: value for name, value in ssm_cfg.items() if name not in {f.name for f in fields(Mamba3Config)}}
    _require(not wrong, f"config.json is of a model that this file does not implement, with {wrong}: use mamba_ssm")
    values = {"eos_token_id": 128001} if (stored.get("vocab_size") or 0) > 128001 else {}  # Llama 3.1's end of text
    values |= {name: stored[name] for name in TOP_LEVEL + SPECIAL_TOKENS if name in stored}
    return Mamba3Config.from_dict(values | ssm_cfg)


def _to_state_spaces(config: Mamba3Config) -> dict[str, Any]:
    """The fields of a config.json in state-spaces' format."""
    _require(config.norm_epsilon == 1e-5, f"norm_epsilon must be 1e-5 in a checkpoint, got {config.norm_epsilon}")
    elsewhere = {*TOP_LEVEL, *SPECIAL_TOKENS, "norm_epsilon", "gradient_checkpointing"}
    ssm_cfg = {name: value for name, value in config.to_dict().items() if name not in elsewhere}
    ssm_cfg["chunk_size"] = config.chunk_size or max(1, 64 // config.rank)  # as in the published ones
    return {name: getattr(config, name) for name in TOP_LEVEL} | OFFICIAL | {"ssm_cfg": {"layer": "Mamba3"} | ssm_cfg}


WEIGHT_FILES = [name + end for name in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")]
SHARDS = ["model-*-of-*.safetensors", "pytorch_model-*-of-*.bin"]
HEADS = {"lm_head.weight", "classifier.weight", "classifier.bias"}


def _directory(name: str | Path, hub: Mapping[str, Any]) -> Path:
    """The directory of a checkpoint: `name`, or where huggingface_hub has put its copy."""
    if unknown := hub.keys() - {"revision", "token", "cache_dir", "local_files_only"}:
        raise TypeError(f"from_pretrained got unknown arguments: {', '.join(sorted(unknown))}")
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    files = ["*config.json", "tokenizer.json", *WEIGHT_FILES[:2], *SHARDS[:1]]
    try:
        directory = Path(snapshot_download(str(name), allow_patterns=files, **hub))
        if not any(directory.glob("*.safetensors")):
            snapshot_download(str(name), allow_patterns=WEIGHT_FILES[2:] + SHARDS[1:], **hub)
    except (OSError, ValueError) as error:
        raise OSError(f"{name} is no directory, and the model hub says: {str(error).strip().splitlines()[0]}") from None
    return directory


def _stored_tensors(directory: Path) -> dict[str, Tensor]:
    """A checkpoint's tensors by our names, as views of files that are mapped: read when used."""
    from safetensors.torch import load_file

    there = [name for name in WEIGHT_FILES if (directory / name).exists()] or WEIGHT_FILES
    path, tensors = directory / there[0], {}
    try:
        names = set(json.loads(path.read_text())["weight_map"].values()) if path.suffix == ".json" else there[:1]
        for path in sorted(directory / name for name in names):
            _require(path.parent == directory, "it is not in the directory")
            safe = path.suffix == ".safetensors"
            new = load_file(path) if safe else torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            new = {k.removeprefix("backbone.").replace("embedding.", "embeddings."): v for k, v in new.items()}
            ok = (v.is_cpu and v.layout == torch.strided and v.nbytes <= len(v.untyped_storage()) for v in new.values())
            real = all(v.is_floating_point() and v.itemsize > 1 for v in new.values())
            _require(real and all(ok) and tensors.keys().isdisjoint(new), "it must hold dense, new floats of 16+ bits")
            tensors |= new
    except Exception as error:  # of as many kinds as there are ways to damage a file
        raise OSError(f"can't load {path}: {type(error).__name__}, {str(error).partition(chr(10))[0]}") from error
    return tensors


def _load(cls: type, name: Any, device: Any, dtype: torch.dtype | None, hub: Mapping[str, Any]) -> Mamba3PreTrained:
    """See `from_pretrained`. The names of tensors are without "backbone." in here."""
    path = _directory(name, hub) / "config.json"
    try:
        stored, elsewhere = json.loads(path.read_text()), path.with_name("generation_config.json")
        config = _from_state_spaces(stored | (json.loads(elsewhere.read_text()) if elsewhere.exists() else {}))
        tensors = _stored_tensors(path.parent)
        _require(config.n_layer <= len(tensors), f"n_layer must fit {len(tensors)} tensors, got {config.n_layer}")
        if (head := tensors.get("lm_head.weight")) is not None:  # tensors count more than the config
            embedding = tensors.setdefault("embeddings.weight", head)
            config.tie_embeddings = config.tie_embeddings and torch.equal(head, embedding.to(head.dtype))
        with torch.device("meta"):
            model = cls(config)
        names = {name.removeprefix("backbone."): name for name in model.state_dict()}
        if "classifier.bias" in names and not HEADS & names.keys() & tensors.keys():  # the weights of a language model
            new, classes = tensors["norm_f.weight"].new_zeros, config.num_labels
            tensors["classifier.weight"] = new(classes, config.d_model).normal_(std=config.initializer_range)
            tensors["classifier.bias"] = new(classes)
        _fill(model, {names.get(k, k): v for k, v in tensors.items() if k in names or k not in HEADS})
    except (OSError, ImportError, MemoryError):
        raise
    except Exception as error:  # anything may stand in the place of settings
        raise ValueError(f"{path} makes no {cls.__name__}: {str(error).partition(chr(10))[0]}") from error
    real = dtype is None or getattr(dtype, "is_floating_point", False)
    _require(real, f"dtype must be None or a torch.dtype of real numbers, got {dtype!r}")
    _fill(model, {name: tensor.to(device, dtype, copy=True) for name, tensor in model.state_dict().items()})
    return model.eval()


def _fill(model: Mamba3PreTrained, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors into a model, in the place of its own; ValueError, naming them, where names or shapes differ."""
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(f"tensors don't fit: {' '.join(str(error).split())[:1000]}") from None


def _save(model: Mamba3PreTrained, directory: Path, state_dict: Mapping[str, Tensor] | None, safe: bool) -> None:
    """See `save_pretrained`: all is written beside the old files, then renamed, config.json last."""
    from safetensors.torch import save_file

    tensors = {k: v.detach() for k, v in dict(model.named_parameters() if state_dict is None else state_dict).items()}
    whole = all(v.is_floating_point() and not hasattr(v, "full_tensor") for v in tensors.values())
    _require(whole, "state_dict must hold whole, floating-point tensors: of a sharded model, a get_model_state_dict")
    with torch.device("meta"):
        _fill(type(model)(model.config).requires_grad_(False), tensors)
    special, stored = {name: getattr(model.config, name) for name in SPECIAL_TOKENS}, _to_state_spaces(model.config)
    files = {"generation_config.json": json.dumps(special, indent=2), "config.json": json.dumps(stored, indent=2)}
    tensors = {k.replace("embeddings.", "embedding."): v.contiguous() for k, v in tensors.items()}
    if not safe and model.config.tie_embeddings:  # the official loader is strict
        tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as beside:
        weights = Path(beside, "model.safetensors" if safe else "pytorch_model.bin")
        save_file(tensors, weights, metadata={"format": "pt"}) if safe else torch.save(tensors, weights)
        for name, text in files.items():
            Path(beside, name).write_text(text)
        weights.chmod(Path(beside, "config.json").stat().st_mode)  # safetensors makes files that nobody else reads
        old = [(directory / name).read_bytes() for name in files if (directory / name).exists()]
        if old and old != [text.encode() for text in files.values()]:
            (directory / "config.json").unlink(missing_ok=True)  # else a save cut short leaves it with others' weights
        weights.replace(directory / weights.name)
        for path in (path for name in WEIGHT_FILES + SHARDS for path in directory.glob(name)):
            if path.name != weights.name:  # of the checkpoint before
                path.unlink()
        for name in files:
            Path(beside, name).replace(directory / name)


def _check_fields(config: Mamba3Config) -> None:
    """Raise ValueError for a field of the wrong type or a number that isn't positive; make floats of whole numbers."""
    may_be_0 = ("d_intermediate", "initializer_range", "dropout", "bos_token_id", "eos_token_id", "pad_token_id")
    for f in fields(config):
        value, kinds = getattr(config, f.name), get_args(f.type) or (f.type,)  # types of a union, or literals
        if float in kinds and type(value) is int:
            setattr(config, f.name, value := float(value))
        fits = value in kinds if get_origin(f.type) is Literal else type(value) in kinds
        if type(value) in (int, float):
            fits = fits and 0 <= value < math.inf and (value > 0 or f.name in may_be_0)
        elif type(value) in (list, tuple):
            fits = fits and all(type(v) is int or (type(v) is float and int not in kinds) for v in value)
        allowed = " or ".join(getattr(kind, "__name__", repr(kind)) for kind in kinds)
        _require(fits, f"{f.name} must be {allowed}, numbers finite and positive, got {value!r}")
    _require(config.dt_min <= config.dt_max, f"dt_max must be at least dt_min ({config.dt_min}), got {config.dt_max}")
    _require(config.dropout < 1, f"dropout must be in [0, 1), got {config.dropout}")


def _require(holds: bool, message: str) -> None:
    """Raise ValueError with this message unless it holds."""
    if not holds:
        raise ValueError(message)


# -------------------------------------------------- 9. Command line ---------------------------------------------------
def main() -> None:
    """Stream the continuation of a text to standard output, and a summary to standard error."""
    from huggingface_hub import hf_hub_download
    from tokenizers import Tokenizer
    from tokenizers.decoders import DecodeStream

    stored = Path(globals().get("__file__", "")).parent / "pretrained/shakespeare-mamba3"  # a notebook has no __file__
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    parser = argparse.ArgumentParser(description="Continue a text with a Mamba language model.")
    add, shown = parser.add_argument, {"help": "(default: %(default)s)"}
    add("prompt", nargs="?", help="the text to continue; read from standard input when piped")
    add("--model", default=str(stored), metavar="DIRECTORY_OR_NAME", **shown)
    add("--max-new-tokens", type=int, default=500, **shown)
    add("--temperature", type=float, default=0.8, **shown)
    add("--top-k", type=int, default=0, **shown)
    add("--top-p", type=float, default=1.0, **shown)
    add("--seed", type=int, default=time.time_ns() % 2**32, help="the same seed gives the same text")
    add("--device", default=best, **shown)
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="by default float32 on a CPU, else as stored")
    args = parser.parse_args()
    args.prompt = sys.stdin.read() if args.prompt is None and not sys.stdin.isatty() else args.prompt
    if not args.prompt:
        parser.error("no prompt: give one as an argument or on standard input")
    device, dtype = args.device, args.dtype or ("float32" if args.device == "cpu" else None)

    model = Mamba3ForCausalLM.from_pretrained(args.model, device=device, dtype=dtype and getattr(torch, dtype))
    path = _directory(args.model, {}) / "tokenizer.json"
    if not path.exists():  # the published checkpoints have none and use Llama 3.1's
        path = hf_hub_download("NousResearch/Meta-Llama-3.1-8B", "tokenizer.json")  # a mirror
    tokenizer, decoder = Tokenizer.from_file(str(path)), DecodeStream(skip_special_tokens=True)
    prompt = torch.tensor([tokenizer.encode(args.prompt).ids], device=device)
    rng = torch.Generator(device).manual_seed(args.seed)
    print(args.prompt, end="", flush=True)
    start, count = time.perf_counter(), 0
    for token in model.stream(prompt, args.max_new_tokens, args.temperature, args.top_k, args.top_p, generator=rng):
        count += 1
        print(decoder.step(tokenizer, token) or "", end="", flush=True)
    seconds = time.perf_counter() - start
    speed = f"{prompt.shape[1]} + {count} tokens in {seconds:.1f} s, {count / seconds:.0f} tokens/s"
    print(f"\n{device}, {speed}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, BrokenPipeError):  # control-C; the reader of the output, `head` say, has left
        os._exit(130)
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}")
