"""Mamba in one file: the selective state space model (S6), its language model, and constant-time generation.

Albert Gu and Tri Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), arXiv:2312.00752;
"the paper" below. A state space model carries a state h through the sequence. In Mamba the step size dt and the
projections B and C depend on the current input, so the model selects what to keep in h and what to forget. Training
reads a whole sequence in linear time; generation keeps only h and the last few inputs, however long the text is.

Copy this file into your project. It needs torch and einops; checkpoints also need safetensors and huggingface_hub,
which come with transformers.

    model = MambaForCausalLM.from_pretrained("state-spaces/mamba-130m-hf")    # or a directory
    ids = model.generate(input_ids, max_new_tokens=50)                        # (b, l) -> (b, l + 50)

    $ python mamba.py "ROMEO:" --max-new-tokens 200

Glossary
    code        paper   shape           meaning
    b, l        B, L                    batch size, sequence length
    d_model                             width of the residual stream
    e           D                       d_inner, the number of channels inside a layer; usually 2 * d_model
    n           N                       d_state, the size of each channel's state
    dt_rank     R                       rank of the projection that makes dt
    u           x       (b, l, e)       input of the state space model
    y           y       (b, l, e)       its output
    h           h       (b, e, n)       its state (`ssm_state` in a LayerState)
    dt          Delta   (b, l, e)       step size; large: take the input in, small: keep the state (section 3.5)
    A           A       (e, n)          state matrix, diagonal and negative; the parameter is A_log = log(-A)
    B, C        B, C    (b, l, n)       input and output projections of the state, selected by the input
    D           D       (e,)            skip connection
    z                   (b, l, e)       gate (Figure 3)
    conv_state          (b, e, d_conv)  the last inputs of the convolution, newest last
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
class MambaConfig:
    """Sizes and settings of a model. Raises ValueError for values that make no sense, naming the field."""

    d_model: int = 768
    n_layer: int = 24
    vocab_size: int | None = 50277  # None: no embedding, for the encoder and the heads on vectors
    pad_vocab_size_multiple: int = 8  # embedding and head have `padded_vocab_size` rows
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    d_inner: int | None = None  # None becomes expand * d_model
    dt_rank: int | str = "auto"  # "auto" becomes ceil(d_model / 16)
    dt_min: float = 0.001  # dt starts log-uniform in [dt_min, dt_max], but at least dt_init_floor
    dt_max: float = 0.1
    dt_init: Literal["random", "constant"] = "random"  # how dt_proj.weight starts
    dt_scale: float = 1.0  # and its scale, times dt_rank ** -0.5
    dt_init_floor: float = 1e-4
    mixer_rms_eps: float | None = None  # a number puts an RMS norm on dt, B and C: FalconMamba
    bias: bool = False  # of in_proj and out_proj
    conv_bias: bool = True
    norm_epsilon: float = 1e-5
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
        self.d_inner = self.expand * self.d_model if self.d_inner is None else self.d_inner
        self.dt_rank = -(-self.d_model // 16) if self.dt_rank == "auto" else self.dt_rank
        _require(type(self.dt_rank) is int, f"dt_rank must be a positive integer or 'auto', got {self.dt_rank!r}")

    @property
    def padded_vocab_size(self) -> int | None:
        """Rows of the embedding: vocab_size, rounded up to a multiple of pad_vocab_size_multiple."""
        multiple = self.pad_vocab_size_multiple
        return None if self.vocab_size is None else -(-self.vocab_size // multiple) * multiple

    to_dict = asdict

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


# ----------------------------------------------- 3. The selective scan ------------------------------------------------
def selective_scan_recurrence(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition: the SSM of Algorithm 2, as the recurrence of equation 2, one step after the other.

    Arguments, of one type, and results are those of `selective_scan` up to its `*`; that computes the same fast."""
    h = u.new_zeros(u.shape[0], *A.shape) if initial_state is None else initial_state  # (b, e, n)
    ys = []
    for u_t, dt_t, B_t, C_t in zip(u.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), strict=True):
        A_bar = torch.exp(dt_t[..., None] * A)  # (b, e, n), discretised by the zero-order hold (equation 4)
        # That would give B_bar = (A_bar - 1) / A * B. The official code takes Euler's rule, the same to first order:
        B_bar_u = (dt_t * u_t)[..., None] * B_t[:, None]  # B_bar = dt B, times u: (b, e, n)
        h = A_bar * h + B_bar_u  # equation 2a
        ys.append((h @ C_t[..., None]).squeeze(-1))  # equation 2b: (b, e)
    return torch.stack(ys, 1) if ys else torch.zeros_like(u), h


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None = None, *,
    D: Tensor | None = None, z: Tensor | None = None, starts: Tensor | None = None, pieces: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The selective scan (Algorithm 2), each channel of the inner width e with its own state of size n:

        h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t        y_t = (C_t . h_t + D u_t) SiLU(z_t)

    u, dt: (b, l, e), dt not negative, its type is that of the computation; A: (e, n), negative; B, C: (b, l, n);
    initial_state: (b, e, n) and D: (e,), zero when None; z: (b, l, e), no gate when None; starts: (b, l), true where
    the state before is forgotten. Returns y (b, l, e) and the final state (b, e, n). Differentiable once, in reverse
    mode. Raises ValueError for arguments that don't fit.

    pieces: how many parts of a sequence are scanned side by side, for GPUs, where a step is a small kernel that keeps
    few cores busy. It changes the work and not the result; None chooses by the sizes and the device."""
    _check("u", u, "b", "l", "e")
    _check("A", A, u.shape[2], "n")
    (b, l, e), n = u.shape, A.shape[-1]
    for name, v, *shape in (("dt", dt, b, l, e), ("B", B, b, l, n), ("C", C, b, l, n), ("D", D, e), ("z", z, b, l, e)):
        _check(name, v, *shape)
    _check("initial_state", initial_state, b, e, n)
    _check("starts", starts, b, l, kind="boolean")
    u, A, B, C = (v.to(dt.dtype) for v in (u, A, B, C))
    h = dt.new_zeros(b, e, n) if initial_state is None else initial_state.to(dt.dtype)
    _require(pieces is None or pieces > 0, f"pieces must be None or a positive integer, got {pieces}")
    if pieces is None:  # enough to fill a GPU, no more than each has steps; each is read twice, so two save nothing
        most = 1 if u.device.type == "cpu" else min(math.isqrt(int(l)), 2**21 // max(1, b * e * n))
        pieces = most if most > 2 else 1
    with torch.autocast("cpu" if u.is_meta else u.device.type, enabled=False):  # there is none for meta
        if l == 0 or (l == 1 and starts is None):
            y, h = selective_scan_recurrence(u, dt, A, B, C, h)
        elif pieces == 1:
            y, h, _ = _Scan.apply(u, dt, A, B, C, h, starts)
        else:
            y, h = _scan_in_pieces(u, dt, A, B, C, h, starts, pieces)
    y = y if D is None else torch.addcmul(y, u, D)
    return (y if z is None else y * F.silu(z)), h


# A sequence is walked in blocks of a few steps, whose (steps, rows, n, e) tensors stay in a CPU's cache: a product and
# an exp for all decays, a product for all inputs, a multiply-add for each step, a product with C. Decays are in [0, 1]:
# nothing overflows. Channels come last, also in A (n, e), so that B and C broadcast over them; t: steps, r: rows of the
# batch. Operators keep torch.compile from unrolling this; _NAMESPACE lets copies of this file live side by side.
BLOCK = 32  # steps
LOG2_E = math.log2(math.e)  # exp(x) = exp2(x log2(e)): CPUs are slow with an exp that underflows
_NAMESPACE = re.sub(r"^(?=\d)|\W", "_", __name__, flags=re.ASCII)


def _blocks(h: Tensor, l: int) -> tuple[list[tuple[slice, slice]], Tensor]:
    """The blocks (rows, steps) of l steps with states like h (b, n, e), first to last, and space for three tensors."""
    b, n, e = h.shape
    elements = 2**20 if h.device.type == "cpu" else 2**26
    r = max(1, min(b, elements // (BLOCK * max(1, n * e))))
    rows = [slice(i, min(i + r, b)) for i in range(0, b, r)]
    blocks = [(some, slice(t, min(t + BLOCK, l))) for some in rows for t in range(0, l, BLOCK)]
    return blocks, h.new_empty(3, BLOCK + 1, r, n, e)


def _block_states(
    space: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, h0: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Of a block, u and dt (t, r, e): the decays (t, r, n, e) and the states before and after (t + 1, r, n, e)."""
    t, r = u.shape[:2]
    decay, h = space[0, :t, :r], space[1, : t + 1, :r]
    steps = dt if starts is None else dt.masked_fill(starts.mT[..., None], torch.finfo(dt.dtype).max)  # a decay of 0
    torch.mul(steps[..., None, :], A * LOG2_E, out=decay)
    if decay.is_cpu:  # slow with numbers below tiny, to which products of smaller decays would come
        F.threshold_(decay, 0.75 * math.log2(torch.finfo(decay.dtype).tiny), -math.inf)
    decay.exp2_()
    torch.mul((dt * u)[..., None, :], B[..., None], out=h[1:])
    h[0] = h0
    for before, after, d in zip(h[:-1].unbind(0), h[1:].unbind(0), decay.unbind(0), strict=True):
        after.addcmul_(d, before)
    return decay, h


@torch.library.custom_op(f"{_NAMESPACE}::selective_scan", mutates_args=())
def _scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """y (b, l, e), the final state (b, n, e) and the states before each block (blocks, b, n, e), given A (n, e)."""
    l = u.shape[1]
    y, h, borders = torch.empty_like(u), h0.clone(), h0.new_empty(-(-l // BLOCK), *h0.shape)
    blocks, space = _blocks(h0, l)
    for rows, steps in blocks:
        borders[steps.start // BLOCK, rows] = h[rows]
        u_i, dt_i, B_i, C_i = (v[rows, steps].transpose(0, 1) for v in (u, dt, B, C))  # (t, r, e) or (t, r, n)
        _, states = _block_states(space, u_i, dt_i, A, B_i, h[rows], None if starts is None else starts[rows, steps])
        y[rows, steps] = (C_i[..., None, :] @ states[1:]).squeeze(-2).transpose(0, 1)
        h[rows] = states[-1]
    return y, h, borders


@torch.library.custom_op(f"{_NAMESPACE}::selective_scan_backward", mutates_args=())
def _scan_backward(
    dy: Tensor, dh: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, borders: Tensor,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of u, dt, A (n, e), B, C and the first state, from those of y and of the final state (b, n, e).

    The states of each block are computed again (section 3.3.2). With g the gradient of h,

        g_t = C_t dy_t + exp(dt_{t+1} A) g_{t+1}        q_t = g_t * exp(dt_t A) * h_{t-1}, the gradient of dt_t A"""
    du, ddt, dB, dC, dh = *(torch.empty_like(v) for v in (u, dt, B, C)), dh.clone()
    blocks, space = _blocks(dh, u.shape[1])
    dA = torch.zeros_like(space[0, 0])  # (r, n, e)
    for rows, steps in reversed(blocks):
        u_i, dt_i, B_i, C_i, dy_i = (v[rows, steps].transpose(0, 1) for v in (u, dt, B, C, dy))
        starts_i = None if starts is None else starts[rows, steps]
        decay, h = _block_states(space, u_i, dt_i, A, B_i, borders[steps.start // BLOCK, rows], starts_i)
        g = torch.mul(dy_i[..., None, :], C_i[..., None], out=space[2, : len(u_i), : u_i.shape[1]])  # (t, r, n, e)
        g[-1] += dh[rows]  # from the block after this one
        for i in range(len(g) - 1, 0, -1):
            g[i - 1].addcmul_(decay[i], g[i])
        dh[rows] = decay[0] * g[0]  # for the one before
        dC[rows, steps] = (dy_i[..., None, :] @ h[1:].mT).squeeze(-2).transpose(0, 1)
        dB[rows, steps] = ((dt_i * u_i)[..., None, :] @ g.mT).squeeze(-2).transpose(0, 1)
        d_dtu = (B_i[..., None, :] @ g).squeeze(-2)  # (t, r, e)
        du[rows, steps] = (d_dtu * dt_i).transpose(0, 1)
        q, ddt_i = g.mul_(decay).mul_(h[:-1]), d_dtu * u_i
        for q_n, A_n in zip(q.unbind(2), A.unbind(0), strict=True):  # a sum over n, below one over t
            ddt_i.addcmul_(q_n, A_n)
        ddt[rows, steps] = ddt_i.transpose(0, 1)
        for q_t, dt_t in zip(q.unbind(0), dt_i[..., None, :].unbind(0), strict=True):
            dA[: len(dt_t)].addcmul_(q_t, dt_t)
    return du, ddt, dA.sum(0), dB, dC, dh


# Shapes for the compiler: outputs are like inputs, and there is a state before each block.
_scan.register_fake(lambda u, dt, A, B, C, h, _: (u.clone(), h.clone(), h.new_empty(-(-u.shape[1] // BLOCK), *h.shape)))
_scan_backward.register_fake(lambda dy, dh, u, dt, A, B, C, *_: tuple(v.clone() for v in (u, dt, A, B, C, dh)))


class _Scan(torch.autograd.Function):
    """The operators as a differentiable function, with states of shape (b, e, n)."""

    @staticmethod
    def forward(
        u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor, starts: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, h, borders = _scan(*(v.contiguous() for v in (u, dt, A.mT, B, C, h0.mT)), starts)
        return y, h.mT.contiguous(), borders

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs[:5], output[2], inputs[6])
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dh: Tensor, _: None) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True, torch.func.grad
            raise NotImplementedError("selective_scan has first derivatives in reverse mode alone: use torch.autograd")
        u, dt, A, B, C, *borders_starts = ctx.saved_tensors
        with torch.autocast(u.device.type, enabled=False):
            tensors = (v.contiguous() for v in (dy, dh.mT, u, dt, A.mT, B, C))
            du, ddt, dA, dB, dC, dh = _scan_backward(*tensors, *borders_starts)
        return du, ddt, dA.mT, dB, dC, dh.mT, None


def _scan_in_pieces(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, starts: Tensor | None, w: int
) -> tuple[Tensor, Tensor]:
    """The scan of w pieces of a sequence as rows: first from zero states, then each from the state that enters it."""
    b, l, _ = u.shape
    rows = (F.pad(v, (0, 0, 0, -l % w)) for v in (u, dt, B, C))  # dt = 0 leaves the state alone
    u, dt, B, C = (rearrange(v, "b (w l) c -> (b w) l c", w=w) for v in rows)
    decay = torch.exp(dt.sum(1)[..., None] * A)  # of a state on its way through a piece: (b w, e, n)
    if starts is not None:
        starts = F.pad(starts, (0, -l % w)).unflatten(1, (w, -1)).flatten(0, 1)
        decay = decay.masked_fill(starts.any(1)[:, None, None], 0)
    _, left, _ = _Scan.apply(u, dt, A, B, C, h.new_zeros(b * w, *A.shape), starts)  # what each piece leaves behind
    entering = []
    for left_i, decay_i in zip(left.unflatten(0, (b, w)).unbind(1), decay.unflatten(0, (b, w)).unbind(1), strict=True):
        entering.append(h)
        h = torch.addcmul(left_i, decay_i, h)  # (b, e, n)
    y, _, _ = _Scan.apply(u, dt, A, B, C, torch.stack(entering, 1).flatten(0, 1), starts)
    return rearrange(y, "(b w) l e -> b (w l) e", w=w)[:, :l], h


# -------------------------------------------- 4. The layer (Figure 3) -----------------------------------------------
@dataclass
class LayerState:
    """What a layer remembers of the sequence that it has read; empty at the start.

    A layer replaces the tensors and never writes to them: they may be kept, shared, expanded, or learned."""

    conv_state: Tensor | None = None  # (b, channels, d_conv), the last inputs of the convolution, in the weights' type
    ssm_state: Tensor | None = None  # (b, e, n), float32 at least


class CausalConv1d(nn.Conv1d):
    """A causal depthwise convolution of (b, l, c) that can go on from a state; computed in float32 at least."""

    def __init__(self, channels: int, kernel_size: int, bias: bool) -> None:
        super().__init__(channels, channels, kernel_size, groups=channels, bias=bias)

    def forward(
        self, x: Tensor, state: LayerState | None = None, lengths: Tensor | None = None, starts: Tensor | None = None
    ) -> Tensor:
        """(b, l, c) to the same shape. `state.conv_state` (b, c, k) holds what came before, and is replaced.

        lengths: (b,), how many steps of each row are real; the padding that follows them stays out of the state.
        starts: (b, l), where a document begins, from which those before stay hidden."""
        (b, l, c), k = x.shape, self.kernel_size[0]
        taps = self.weight[:, 0].to(torch.promote_types(self.weight.dtype, torch.float32))  # (c, k)
        before = x.new_zeros(b, c, k) if state is None or state.conv_state is None else state.conv_state
        _check("the state's conv_state", before, b, c, k)
        x = torch.cat([before.mT.to(taps.dtype), x.to(taps.dtype)], dim=1)  # (b, k + l, c)
        windows = [x[:, i : i + l + 1] for i in range(k)]  # [i][:, j]: the ith of the last k inputs after j steps
        if starts is not None:
            document = F.pad(starts.cumsum(1), (k, 0))  # (b, k + l)
            for i in range(k - 1):  # the newest is of its own document
                windows[i] = torch.where((document[:, i : i + l + 1] == document[:, k - 1 :])[..., None], windows[i], 0)
        y = x.new_zeros(c) if self.bias is None else self.bias.to(x.dtype)
        y = torch.addcmul(y, windows[0][:, 1:], taps[:, 0])
        for i in range(1, k):  # in this layout faster than F.conv1d
            y.addcmul_(windows[i][:, 1:], taps[:, i])
        if state is not None:
            kept = [w[:, -1] if lengths is None else w.take_along_dim(lengths[:, None, None], 1)[:, 0] for w in windows]
            state.conv_state = torch.stack(kept, dim=2).to(self.weight.dtype)
        return y


class StepSize(nn.Linear):
    """The projection from dt_rank to e that makes dt; its bias is added in float32 at least: half would round it."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(self.bias.dtype, torch.float32)
        return F.linear(x, self.weight).to(dtype) + self.bias.to(dtype)


class MambaMixer(nn.Module):
    """The paper's Mamba block (Figure 3), on (b, l, d_model): convolution and selective scan, gated by a branch."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config = config
        e, n, dt_rank = config.d_inner, config.d_state, config.dt_rank
        self.in_proj = nn.Linear(config.d_model, 2 * e, bias=config.bias)
        self.conv1d = CausalConv1d(e, config.d_conv, bias=config.conv_bias)
        self.x_proj = nn.Linear(e, dt_rank + 2 * n, bias=False)
        self.dt_proj = StepSize(dt_rank, e)
        self.A_log = nn.Parameter(torch.arange(1, n + 1).float().log().repeat(e, 1))  # S4D-Real (section 3.6)
        self.D = nn.Parameter(torch.ones(e))
        self.out_proj = nn.Linear(e, config.d_model, bias=config.bias)
        scale = config.dt_scale * dt_rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -scale if config.dt_init == "random" else scale, scale)
        # dt starts log-uniform, as in the official code; section 3.6 says uniform.
        dt = torch.empty(e).uniform_(math.log(config.dt_min), math.log(config.dt_max)).exp()
        dt = dt.clamp(min=config.dt_init_floor)
        self.dt_proj.bias.data = dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus
        for linear in (self.in_proj, self.out_proj) if config.bias else ():
            nn.init.zeros_(linear.bias)

    def forward(
        self, x: Tensor, state: LayerState | None = None, lengths: Tensor | None = None, seq_idx: Tensor | None = None
    ) -> Tensor:
        """(b, l, d_model) to the same shape, for any l.

        state: what was read before x; the tensors in it are replaced by new ones. None: nothing, and nothing is kept.
        lengths: (b,), how many steps of each row are real; padding follows them and leaves the state alone.
        seq_idx: (b, l), integers that change where a new document begins, before which the state is forgotten; the
            first step goes on with the state's document."""
        config, s = self.config, torch.promote_types(self.A_log.dtype, torch.float32)
        state = state or LayerState()
        _check("the input", x, "b", "l", config.d_model)
        u, z = self.in_proj(x).chunk(2, dim=-1)  # (b, l, e) each
        starts = None if seq_idx is None else _starts(seq_idx, lengths, x.shape[:2])
        u = F.silu(self.conv1d(u, state, lengths, starts)).to(x.dtype)  # (b, l, e)
        sizes = [config.dt_rank, config.d_state, config.d_state]
        dt, B, C = self.x_proj(u).split(sizes, dim=-1)  # Algorithm 2, lines 2 to 4, dt in low rank: selected by u
        if config.mixer_rms_eps is not None:  # FalconMamba
            dt, B, C = (F.rms_norm(v.to(s), v.shape[-1:], eps=config.mixer_rms_eps).to(v.dtype) for v in (dt, B, C))
        dt = F.softplus(self.dt_proj(dt))  # the rest of line 4: (b, l, e), float32 at least
        if lengths is not None:
            dt = dt.masked_fill(_padded(x.shape[1], lengths)[..., None], 0)  # dt = 0 leaves the state alone
        A = -torch.exp(self.A_log.to(s))  # (e, n)
        y, state.ssm_state = selective_scan(u, dt, A, B, C, state.ssm_state, D=self.D, z=z, starts=starts)
        return self.out_proj(y.to(x.dtype))

    def new_state(self, batch_size: int, device: Any = None, dtype: torch.dtype | None = None) -> LayerState:
        """The state at the start of a sequence, as zeros; by default with the weights' device and dtype."""
        zeros = torch.zeros_like(self.conv1d.weight, device=device, dtype=dtype)[:, 0].repeat(batch_size, 1, 1)
        s = torch.promote_types(zeros.dtype, torch.float32)
        return LayerState(zeros, zeros.new_zeros(*zeros.shape[:2], self.config.d_state, dtype=s))


# ------------------------------------- 5. Block, encoder, model, language model ---------------------------------------
class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last dimension, in float32 at least; the result has the weight's type."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return F.rms_norm(x.to(dtype), x.shape[-1:], self.weight.to(dtype), self.eps).to(self.weight.dtype)


class MambaBlock(nn.Module):
    """x + mixer(norm(x)), on (b, l, d_model); other arguments are the mixer's: state, lengths, seq_idx."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, eps=config.norm_epsilon)
        self.mixer = MambaMixer(config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x + self.mixer(self.norm(x), *args, **kwargs)


class MambaPreTrained(nn.Module):
    """What all models have: a config, checkpoints, and methods about parameters and caches."""

    @classmethod
    def from_pretrained(cls, name: str | Path, device: Any = None, dtype: Any = None, **hub: Any) -> Self:
        """The model stored in a directory or in a repository of the Hugging Face hub, in evaluation mode.

        name: a checkpoint in transformers' or state-spaces' format, safetensors or pytorch_model.bin, in shards or not.
            A language model's gives a classifier, too, with a new last layer.
        device: None is the CPU; dtype: None keeps the stored; hub: revision, token, cache_dir, local_files_only.
        Raises OSError for missing files, ValueError for models of another kind and for tensors that don't fit."""
        return _load(cls, name, "cpu" if device is None else device, dtype, hub)

    def save_pretrained(self, directory: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write config.json and model.safetensors in transformers' format; ValueError unless weights and config fit.
        state_dict holds the weights of a model that is sharded over processes."""
        _save(self, Path(directory), state_dict)

    def gradient_checkpointing_enable(self, **_: Any) -> None:
        """Set config.gradient_checkpointing: blocks are recomputed in the backward pass (transformers' name)."""
        self.config.gradient_checkpointing = True

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that an optimizer should not decay: A_log, D, the bias of dt, norms, if any."""
        ending = re.compile(r"(A_log|\bD|dt_bias|dt_proj\.bias|norm\w*\.weight)$")
        return {name for name, _ in self.named_parameters() if ending.search(name)}

    def get_input_embeddings(self) -> nn.Module:
        return getattr(self, "backbone", self).embeddings


class MambaEncoder(MambaPreTrained):
    """The blocks and a final norm, (b, l, d_model) to the same shape: for inputs that are vectors already."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(MambaBlock(config) for _ in range(config.n_layer))
        self.norm_f = RMSNorm(config.d_model, eps=config.norm_epsilon)
        for layer in self.layers:  # n_layer of them add to the residual stream
            layer.mixer.out_proj.weight.data.div_(math.sqrt(config.n_layer))

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
                kept = (state.conv_state, state.ssm_state)  # None: of a block without a state
                stored[i] = tuple(v.detach() for v in kept if v is not None)
            if isinstance(inference_params, InferenceParams):
                inference_params.seqlen_offset += x.shape[1]
        return x if order is None else x.take_along_dim(order.argsort(1)[..., None], 1)  # back in their places


class Embedding(nn.Embedding):
    """Looks ids (b, l) up, or multiplies vectors (b, l, d_model) by its rows: the head of a model that ties the two."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) if x.is_floating_point() else super().forward(x)


class MambaModel(MambaEncoder):
    """The encoder with an embedding, if config.vocab_size isn't None: ids (b, l), or vectors, to (b, l, d_model)."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__(config)
        if config.vocab_size is not None:
            self.embeddings = Embedding(config.padded_vocab_size, config.d_model)
            nn.init.normal_(self.embeddings.weight, std=config.initializer_range)

    def forward(self, input_ids: Tensor, inference_params: Any = None, **mask_and_seq_idx: Tensor | None) -> Tensor:
        if not input_ids.is_floating_point() and self.config.vocab_size is not None:
            _check("input_ids", input_ids, "b", "l", kind="integer", below=self.config.padded_vocab_size)
            input_ids = self.embeddings(input_ids)
        return super().forward(input_ids, inference_params, **mask_and_seq_idx)


class MambaForCausalLM(MambaPreTrained):
    """The language model: next-token logits for every position."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        _require(config.vocab_size is not None, "vocab_size must be a positive integer in a language model, got None")
        self.config = config
        self.backbone = MambaModel(config)
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

    `key_value_memory_dict[position of the layer] = (conv_state, ssm_state)`; empty: the start of a sequence. Models
    take any object with that dict, and replace its tensors by new ones, detached: gradients don't flow from one call of
    a model into the one before. `seqlen_offset` counts the tokens read, padding included, for information."""

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
    model: MambaForCausalLM, unread: Tensor, max_new_tokens: int = 50, temperature: float = 1.0,
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
class MambaForSequenceClassification(MambaPreTrained):
    """A linear classifier (config.num_labels) on the pooled hidden states (config.pooling_strategy)."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = MambaModel(config)
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


MambaLMHeadModel = MambaForCausalLM  # state-spaces/mamba; the others are MiniMamba's
Mamba = MambaForCausalLM  # state-spaces' is a layer
MambaForCausalLM.generate_streaming = MambaForCausalLM.stream
MambaPreTrained.get_cache_info = lambda _, inference_params: InferenceParams.get_cache_info(inference_params)
MambaPreTrained.reset_cache = lambda _, inference_params: InferenceParams.reset(inference_params)
InferenceParams.reset_cache = InferenceParams.reset
MambaForFeatureExtraction = MambaModel
MambaLMConfig = MambaClassificationConfig = MambaConfig
S6 = MambaMixer


@dataclass
class BaseMambaConfig(MambaConfig):
    """MiniMamba's: there is no vocabulary unless one is given."""

    vocab_size: int | None = None


# -------------------------------------- 8. Checkpoints, and what a config allows --------------------------------------
# Fields of config.json in transformers' format, ours=theirs, and the values that absent ones have there.
TRANSFORMERS_FIELDS = """
    d_model=hidden_size n_layer=num_hidden_layers d_state=state_size d_conv=conv_kernel expand=expand
    d_inner=intermediate_size dt_rank=time_step_rank dt_min=time_step_min dt_max=time_step_max
    dt_init=time_step_init_scheme dt_scale=time_step_scale dt_init_floor=time_step_floor bias=use_bias
    conv_bias=use_conv_bias norm_epsilon=layer_norm_epsilon residual_in_fp32=residual_in_fp32
    tie_embeddings=tie_word_embeddings initializer_range=initializer_range bos_token_id=bos_token_id
    eos_token_id=eos_token_id pad_token_id=pad_token_id num_labels=num_labels pooling_strategy=pooling_strategy
    dropout=classifier_dropout vocab_size=vocab_size"""
TRANSFORMERS_DEFAULTS = {"n_layer": 32, "vocab_size": 50280, "initializer_range": 0.1}
TRANSFORMERS_DEFAULTS |= {"pad_vocab_size_multiple": 1, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
# Arguments of state-spaces' layer that aren't read, with the value that they must have; ... where it has no effect.
LAYER, SSM_CFG = "Mamba1", {"use_fast_path": ...}


def _to_transformers(config: MambaConfig) -> dict[str, Any]:
    """The fields of a config.json of transformers, which reads vocab_size as the number of rows, padding included."""
    stored = {name: getattr(config, ours) for ours, name in re.findall(r"(\w+)=(\w+)", TRANSFORMERS_FIELDS)}
    stored |= {"vocab_size": config.padded_vocab_size, "unpadded_vocab_size": config.vocab_size}
    stored |= {"pad_vocab_size_multiple": config.pad_vocab_size_multiple, "hidden_act": "silu", "use_cache": True}
    falcon = {} if config.mixer_rms_eps is None else {"mixer_rms_eps": config.mixer_rms_eps}
    names = ("falcon_mamba", "FalconMambaForCausalLM") if falcon else ("mamba", "MambaForCausalLM")
    return stored | falcon | {"model_type": names[0], "architectures": [names[1]]}


def _from_transformers(stored: Mapping[str, Any]) -> MambaConfig:
    """The config in a config.json of transformers; what we don't use is ignored."""
    use, types = "mamba2.py" if stored["model_type"] == "mamba2" else "transformers", ("mamba", "falcon_mamba")
    for name, *allowed in (("model_type", *types), ("hidden_act", "silu", "swish"), ("quantization_config", None)):
        value = stored.get(name, allowed[0])
        _require(value in allowed, f"{name} must be {allowed[0]!r} in this file, got {value!r}: use {use}")
    falcon = {"mixer_rms_eps": stored.get("mixer_rms_eps", 1e-6)} if stored["model_type"] == "falcon_mamba" else {}
    named = {ours: stored[name] for ours, name in re.findall(r"(\w+)=(\w+)", TRANSFORMERS_FIELDS) if name in stored}
    if "unpadded_vocab_size" in stored and "transformers_version" not in stored:  # written here; there all are tokens
        named |= {"vocab_size": stored["unpadded_vocab_size"]}
        named |= {"pad_vocab_size_multiple": stored["pad_vocab_size_multiple"]}
    return MambaConfig.from_dict(TRANSFORMERS_DEFAULTS | named | falcon)


def _from_state_spaces(stored: Mapping[str, Any]) -> MambaConfig:
    """The config in a config.json of state-spaces/mamba."""
    _require("d_model" in stored, "config.json has neither model_type (transformers) nor d_model (state-spaces)")
    ssm_cfg = {"layer": "Mamba1"} | (stored.get("ssm_cfg") or {})
    layer = ssm_cfg.pop("layer")
    use = {"Mamba1": "mamba.py", "Mamba2": "mamba2.py", "Mamba3": "mamba3.py"}.get(layer, "mamba_ssm")
    _require(layer == LAYER, f"ssm_cfg['layer'] must be {LAYER!r} in this file, got {layer!r}: use {use}")
    ours = {f.name for f in fields(MambaConfig)} - SSM_CFG.keys()
    plain = {"attn_layer_idx": [], "d_intermediate": 0, "rms_norm": True, "quantization_config": None}
    wrong = {name: stored[name] for name, value in plain.items() if stored.get(name) not in (None, value)}
    wrong |= {k: v for k, v in ssm_cfg.items() if k not in ours and SSM_CFG.get(k, "unknown") not in (..., v)}
    _require(not wrong, f"config.json is of a model that this file does not implement, with {wrong}: use mamba_ssm")
    # Without a word of it, the end of text is GPT-NeoX's, as in transformers' copies of these checkpoints.
    values = {name: value for name, value in (stored | ssm_cfg).items() if name in ours and value is not None}
    return MambaConfig(**{"eos_token_id": 0} | values)


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


def _load(cls: type, name: Any, device: Any, dtype: torch.dtype | None, hub: Mapping[str, Any]) -> MambaPreTrained:
    """See `from_pretrained`. The names of tensors are without "backbone." in here."""
    path = _directory(name, hub) / "config.json"
    try:  # infinity is `Infinity`, or as transformers 5 writes it, {"__float__": "Infinity"}
        stored = json.loads(path.read_text(), object_hook=lambda d: float(d["__float__"]) if "__float__" in d else d)
        config = (_from_transformers if "model_type" in stored else _from_state_spaces)(stored)
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


def _fill(model: MambaPreTrained, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors into a model, in the place of its own; ValueError, naming them, where names or shapes differ."""
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(f"tensors don't fit: {' '.join(str(error).split())[:1000]}") from None


def _save(model: MambaPreTrained, directory: Path, state_dict: Mapping[str, Tensor] | None) -> None:
    """See `save_pretrained`: all is written beside the old files, then renamed, config.json last."""
    from safetensors.torch import save_file

    tensors = {k: v.detach() for k, v in dict(model.named_parameters() if state_dict is None else state_dict).items()}
    whole = all(v.is_floating_point() and not hasattr(v, "full_tensor") for v in tensors.values())
    _require(whole, "state_dict must hold whole, floating-point tensors: of a sharded model, a get_model_state_dict")
    with torch.device("meta"):
        _fill(type(model)(model.config).requires_grad_(False), tensors)
    stored = _to_transformers(model.config)
    if not isinstance(model, MambaForCausalLM):
        stored["architectures"] = [type(model).__name__]
    if len(types := {tensor.dtype for tensor in tensors.values()}) == 1:
        stored["dtype"] = str(*types).removeprefix("torch.")
    config, text = directory / "config.json", json.dumps(stored, indent=2) + "\n"
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as beside:
        new, weights = Path(beside, "config.json"), Path(beside, "model.safetensors")
        save_file({k: v.contiguous() for k, v in tensors.items()}, weights, metadata={"format": "pt"})
        new.write_text(text)
        weights.chmod(new.stat().st_mode)  # safetensors makes files that nobody else reads
        if config.exists() and config.read_bytes() != text.encode():
            config.unlink()  # a save cut short must not leave it with the weights of another model
        weights.replace(directory / weights.name)
        for path in (path for name in WEIGHT_FILES[1:] + SHARDS for path in directory.glob(name)):
            path.unlink()  # of the checkpoint before
        new.replace(config)


def _check_fields(config: MambaConfig) -> None:
    """Raise ValueError for a field of the wrong type or a number that isn't positive; make floats of whole numbers."""
    may_be_0 = ("initializer_range", "dropout", "bos_token_id", "eos_token_id", "pad_token_id")
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

    stored = Path(globals().get("__file__", "")).parent / "pretrained/shakespeare-mamba"  # a notebook has no __file__
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

    model = MambaForCausalLM.from_pretrained(args.model, device=device, dtype=dtype and getattr(torch, dtype))
    path = _directory(args.model, {}) / "tokenizer.json"
    if not path.exists():  # state-spaces' checkpoints have none and use GPT-NeoX's
        path = hf_hub_download("EleutherAI/gpt-neox-20b", "tokenizer.json")
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
