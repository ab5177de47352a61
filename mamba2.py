"""Mamba-2 in one file: structured state space duality (SSD), its language model, and constant-time generation.

Tri Dao and Albert Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State
Space Duality" (2024), arXiv:2405.21060; "the paper" below. In Mamba-2 one number per head and step decays the whole
state, where Mamba has one per channel and state entry. The sequence map then is a masked attention as well, and splits
into matrix products: within chunks of the sequence the attention form, across chunks the recurrence. Heads are wide and
states are large; generation keeps only the state and the last few inputs, however long the text is.

Copy this file into your project. It needs torch and einops; checkpoints also need safetensors and huggingface_hub,
which come with transformers.

    model = Mamba2ForCausalLM.from_pretrained("state-spaces/mamba2-130m")     # or a directory
    ids = model.generate(input_ids, max_new_tokens=50)                        # (b, l) -> (b, l + 50)

    $ python mamba2.py "ROMEO:" --max-new-tokens 200

Glossary
    code        paper   shape                   meaning
    b, l        -, T                            batch size, sequence length
    d_model                                     width of the residual stream
    e                                           d_inner, the number of channels inside a layer; h * p
    h, p        H, P                            nheads, the number of heads, and headdim, the width of one
    n           N                               d_state, the size of the state of each channel
    g           G                               ngroups: the k = h / g heads of a group share B and C
    c, q        -, Q                            chunks side by side, and the steps in one
    x, u        X       (b, l, h, p)            input of the state space model
    y           Y       (b, l, h, p)            its output
    state       H       (b, h, p, n)            its state (`ssm_state` in a LayerState)
    dt          Delta   (b, l, h)               step size; large: take the input in, small: keep the state
    A           A       (h,)                    decay rate, negative; the parameter is A_log = log(-A)
    a           log a   (b, c, h, q)            dt * A, the logarithm of a step's decay
    L           L       (b, c, h, q, q)         mask of the attention form: the decay from step j to step i
    B, C        B, C    (b, l, g, n)            input and output projections of the state: the attention's keys, queries
    D           D       (h,)                    skip connection
    z                   (b, l, e)               gate
    conv_state          (b, e + 2 g n, d_conv)  the last inputs of the convolution, newest last
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
class Mamba2Config:
    """Sizes and settings of a model. Raises ValueError for values that make no sense, naming the field."""

    d_model: int = 768
    n_layer: int = 24
    vocab_size: int | None = 50277  # None: no embedding, for the encoder and the heads on vectors
    pad_vocab_size_multiple: int = 16  # embedding and head have `padded_vocab_size` rows
    d_state: int = 128
    d_conv: int = 4
    expand: int = 2
    headdim: int = 64
    ngroups: int = 1  # heads of a group share B and C
    chunk_size: int | None = None  # of SSD, changes no result; None: 64 on a CPU, else 256. Not read from checkpoints
    dt_min: float = 0.001  # dt starts log-uniform in [dt_min, dt_max], but at least dt_init_floor
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    dt_limit: tuple | list = (0.0, math.inf)  # dt is clamped to it
    A_init_range: tuple | list = (1, 16)  # -A starts uniform in it
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
        for name, least, most in (("dt_limit", 0, math.inf), ("A_init_range", 1e-9, 1e9)):
            pair = tuple(float(v) for v in getattr(self, name) if type(v) in (int, float))
            in_order = len(pair) == len(getattr(self, name)) == 2 and least <= pair[0] <= pair[1] <= most
            _require(in_order, f"{name} must be {least} <= low <= high <= {most}, got {getattr(self, name)}")
            setattr(self, name, pair)
        width = f"expand * d_model = {self.d_inner}"
        _require(self.d_inner % self.headdim == 0, f"headdim must divide {width}, got {self.headdim}")
        _require(self.nheads % self.ngroups == 0, f"ngroups must divide {width} / headdim, got {self.ngroups}")

    @property
    def padded_vocab_size(self) -> int | None:
        """Rows of the embedding: vocab_size, rounded up to a multiple of pad_vocab_size_multiple."""
        multiple = self.pad_vocab_size_multiple
        return None if self.vocab_size is None else -(-self.vocab_size // multiple) * multiple

    to_dict = asdict
    d_inner = property(lambda self: self.expand * self.d_model)
    nheads = property(lambda self: self.d_inner // self.headdim)

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


# ------------------------------------------- 3. State space duality (SSD) ---------------------------------------------
def ssd_recurrence(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition: the linear, recurrent form, one step after the other; exp(dt A) and dt x are the paper's A and x.

    Arguments, of one type, and results are those of `ssd` up to initial_state; that computes the same fast."""
    (b, _, h, p), (g, n) = x.shape, B.shape[2:]
    state = x.new_zeros(b, h, p, n) if initial_state is None else initial_state
    ys = []
    for x_t, dt_t, B_t, C_t in zip(x.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), strict=True):
        B_t, C_t = (v.repeat_interleave(h // g, dim=1) for v in (B_t, C_t))  # (b, h, n): heads of a group share them
        decay = torch.exp(dt_t * A)[..., None, None]  # (b, h, 1, 1)
        state = torch.addcmul(decay * state, (dt_t[..., None] * x_t)[..., None], B_t[:, :, None])  # + dt x B^T
        ys.append((state @ C_t[..., None]).squeeze(-1))  # (b, h, p)
    return torch.stack(ys, 1) if ys else torch.zeros_like(x), state


def decay_matrix(a: Tensor) -> Tensor:
    """The 1-semiseparable mask L (section 3; exp(segsum) in Listing 1): L[i, j] = exp(a[j+1] + ... + a[i]), j <= i.

    a: (..., q), not positive; L: (..., q, q), 0 above the diagonal."""
    sums = a[..., None].expand(*a.shape, a.shape[-1]).tril(-1).cumsum(-2)  # without differences, which would cancel
    return _exp(sums).tril()


def _exp(sums: Tensor) -> Tensor:
    """exp, but 0 below tiny ** 0.75: CPUs are slow with numbers below tiny, to which products would come from there."""
    return sums.masked_fill(sums < 0.75 * math.log(torch.finfo(sums.dtype).tiny), -math.inf).exp()


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None = None,
    chunk_size: int | None = None, *, D: Tensor | None = None, starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The chunked form (the block decomposition of section 6, Listing 1): matrix products, linear in l.

    Within a chunk of q steps the dual, quadratic form (section 5), across chunks the recurrence. Per head

        state_t = exp(dt_t A) state_{t-1} + dt_t x_t B_t^T        y_t = state_t C_t + D x_t

    x: (b, l, h, p); dt: (b, l, h), not negative, of the computation's type; A: (h,), negative; B, C: (b, l, g, n), each
    shared by h / g heads; initial_state: (b, h, p, n) and D: (h,), zero when None; starts: (b, l), true where the state
    before is forgotten. Returns y, like x, and the final state. Raises ValueError for arguments that don't fit."""
    _check("x", x, "b", "l", "h", "p")
    _check("B", B, *x.shape[:2], "g", "n")
    (b, l, h, p), (g, n) = x.shape, B.shape[2:]
    for name, v, *shape in (("dt", dt, b, l, h), ("A", A, h), ("D", D, h), ("C", C, b, l, g, n)):
        _check(name, v, *shape)
    _check("initial_state", initial_state, b, h, p, n)
    _check("starts", starts, b, l, kind="boolean")
    fits = h % g == 0 and (chunk_size is None or chunk_size > 0)
    _require(fits, f"B's groups must divide the heads, chunk_size be None or > 0, got {g}, {h}, {chunk_size}")
    x, A, B, C = (v.to(dt.dtype) for v in (x, A, B, C))
    state = dt.new_zeros(b, h, p, n) if initial_state is None else initial_state.to(dt.dtype)
    with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):  # there is none for meta
        if l == 0 or (l == 1 and starts is None):
            y, state = ssd_recurrence(x, dt, A, B, C, state)
        else:
            a = dt * A if starts is None else (dt * A).masked_fill(starts[..., None], -1e30)  # a decay of 0
            q = min(chunk_size or (64 if x.device.type == "cpu" else 256), l)
            budget = 2**26 if x.device.type != "cpu" or torch.compiler.is_compiling() else 2**20  # elements of a tensor
            steps = q * max(1, budget // max(1, b * h * max(q * q, q * p, p * n)))
            state, ys = rearrange(state, "b (g k) p n -> b g n (k p)", g=g), []  # a product for the k heads of a group
            for segment in zip(*(v.split(steps, dim=1) for v in (x * dt[..., None], a, B, C)), strict=True):
                y, state = _ssd_segment(*segment, state, q)
                ys.append(y)
            y, state = torch.cat(ys, dim=1), rearrange(state, "b g n (k p) -> b (g k) p n", p=p)
    return (y if D is None else y.addcmul_(x, D.to(x.dtype)[:, None])), state


def _ssd_segment(dtx: Tensor, a: Tensor, B: Tensor, C: Tensor, state: Tensor, q: int) -> tuple[Tensor, Tensor]:
    """Listing 1 on chunks side by side: dt x (b, l, h, p), dt A (b, l, h), state (b, g, n, k p) to y and the next."""
    (_, l, _, p), g = dtx.shape, B.shape[2]
    if l % q:  # steps with a = dtx = 0 change nothing
        dtx, B, C = (F.pad(v, (0, 0, 0, 0, 0, -l % q)) for v in (dtx, B, C))
        a = F.pad(a, (0, 0, 0, -l % q))
    dtx, a = dtx.unflatten(1, (-1, q)), a.unflatten(1, (-1, q)).mT  # (b, c, q, h, p) and (b, c, h, q)
    B, C = (v.unflatten(1, (-1, q)).transpose(2, 3) for v in (B, C))  # (b, c, g, q, n)
    L = decay_matrix(a)  # (b, c, h, q, q)

    # 1. The output of each chunk from its own inputs: attention with the mask L (diagonal blocks).
    scores = rearrange(L, "b c (g k) i j -> b c g k i j", g=g) * (C @ B.mT)[:, :, :, None]
    y = scores.flatten(2, 3) @ dtx.transpose(2, 3)  # (b, c, h, q, p)

    # 2. The state that each chunk's own inputs leave at its end (right factor of the off-diagonal blocks).
    to_end = rearrange(L[..., -1, :], "b c h q -> b c q h 1")
    own = B.mT @ rearrange(dtx * to_end, "b c q (g k) p -> b c g q (k p)", g=g)  # (b, c, g, n, k p)

    # 3. The state at the start of each chunk: a recurrence across chunks (middle factor).
    from_start = _exp(a.cumsum(-1))  # (b, c, h, q)
    decay = rearrange(from_start[..., -1:].expand(*a.shape[:-1], p), "b c (g k) p -> b c g 1 (k p)", g=g)
    entering = []
    for own_c, decay_c in zip(own.unbind(1), decay.unbind(1), strict=True):
        entering.append(state)
        state = torch.addcmul(own_c, decay_c, state)  # (b, g, n, k p)

    # 4. The output from the state at the start of the chunk (left factor).
    carried = rearrange(C @ torch.stack(entering, 1), "b c g q (k p) -> b c q (g k) p", p=p)
    y = torch.addcmul(y.transpose(2, 3), carried, from_start.mT[..., None])  # (b, c, q, h, p)
    return y.flatten(1, 2)[:, :l], state


# -------------------------------------------- 4. The layer (section 7) -----------------------------------------------
@dataclass
class LayerState:
    """What a layer remembers of the sequence that it has read; empty at the start.

    A layer replaces the tensors and never writes to them: they may be kept, shared, expanded, or learned."""

    conv_state: Tensor | None = None  # (b, channels, d_conv), the last inputs of the convolution, in the weights' type
    ssm_state: Tensor | None = None  # (b, h, p, n), float32 at least


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


class GatedRMSNorm(nn.Module):
    """norm(y * SiLU(z)) * weight over each group of channels (section 7): (..., e) to the same shape."""

    def __init__(self, width: int, ngroups: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.ngroups, self.eps = ngroups, eps

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        groups = (y * F.silu(z.to(y.dtype))).unflatten(-1, (self.ngroups, -1))
        return (F.rms_norm(groups, groups.shape[-1:], eps=self.eps).flatten(-2) * self.weight).to(self.weight.dtype)


class Mamba2Mixer(nn.Module):
    """The paper's Mamba-2 block (section 7), on (b, l, d_model): projection, convolution, SSD, gated norm."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        self.config = config
        e, h, channels = config.d_inner, config.nheads, config.d_inner + 2 * config.ngroups * config.d_state
        self.in_proj = nn.Linear(config.d_model, e + channels + h, bias=config.bias)
        self.conv1d = CausalConv1d(channels, config.d_conv, bias=config.conv_bias)
        dt = torch.empty(h).uniform_(math.log(config.dt_min), math.log(config.dt_max)).exp().clamp(config.dt_init_floor)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.A_log = nn.Parameter(torch.empty(h).uniform_(*config.A_init_range).log())
        self.D = nn.Parameter(torch.ones(h))
        self.norm = GatedRMSNorm(e, config.ngroups, config.norm_epsilon)
        self.out_proj = nn.Linear(e, config.d_model, bias=config.bias)
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
        config = self.config
        _check("the input", x, "b", "l", config.d_model)
        e, h, g, n, state = config.d_inner, config.nheads, config.ngroups, config.d_state, state or LayerState()
        z, xBC, dt = self.in_proj(x).split([e, e + 2 * g * n, h], dim=-1)  # all at once (section 7)
        starts = None if seq_idx is None else _starts(seq_idx, lengths, x.shape[:2])
        xBC = F.silu(self.conv1d(xBC, state, lengths, starts)).to(x.dtype)  # (b, l, e + 2 g n)
        u, B, C = xBC.split([e, g * n, g * n], dim=-1)
        u, B, C = u.unflatten(-1, (-1, config.headdim)), B.unflatten(-1, (g, n)), C.unflatten(-1, (g, n))
        s = torch.promote_types(self.A_log.dtype, torch.float32)
        dt = F.softplus(dt.to(s) + self.dt_bias).clamp(*config.dt_limit)  # (b, l, h)
        if lengths is not None:
            dt = dt.masked_fill(_padded(x.shape[1], lengths)[..., None], 0)  # dt = 0 leaves the state alone
        A = -torch.exp(self.A_log.to(s))  # (h,)
        y, state.ssm_state = ssd(u, dt, A, B, C, state.ssm_state, config.chunk_size, D=self.D, starts=starts)
        return self.out_proj(self.norm(y.flatten(-2), z))

    def new_state(self, batch_size: int, device: Any = None, dtype: torch.dtype | None = None) -> LayerState:
        """The state at the start of a sequence, as zeros; by default with the weights' device and dtype."""
        zeros = torch.zeros_like(self.conv1d.weight, device=device, dtype=dtype)[:, 0].repeat(batch_size, 1, 1)
        config, s = self.config, torch.promote_types(zeros.dtype, torch.float32)
        return LayerState(zeros, zeros.new_zeros(batch_size, config.nheads, config.headdim, config.d_state, dtype=s))


# ------------------------------------- 5. Block, encoder, model, language model ---------------------------------------
class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last dimension, in float32 at least; the result has the weight's type."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return F.rms_norm(x.to(dtype), x.shape[-1:], self.weight.to(dtype), self.eps).to(self.weight.dtype)


class Mamba2Block(nn.Module):
    """x + mixer(norm(x)), on (b, l, d_model); other arguments are the mixer's: state, lengths, seq_idx."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, eps=config.norm_epsilon)
        self.mixer = Mamba2Mixer(config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x + self.mixer(self.norm(x), *args, **kwargs)


class Mamba2PreTrained(nn.Module):
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


class Mamba2Encoder(Mamba2PreTrained):
    """The blocks and a final norm, (b, l, d_model) to the same shape: for inputs that are vectors already."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Mamba2Block(config) for _ in range(config.n_layer))
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


class Mamba2Model(Mamba2Encoder):
    """The encoder with an embedding, if config.vocab_size isn't None: ids (b, l), or vectors, to (b, l, d_model)."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__(config)
        if config.vocab_size is not None:
            self.embeddings = Embedding(config.padded_vocab_size, config.d_model)
            nn.init.normal_(self.embeddings.weight, std=config.initializer_range)

    def forward(self, input_ids: Tensor, inference_params: Any = None, **mask_and_seq_idx: Tensor | None) -> Tensor:
        if not input_ids.is_floating_point() and self.config.vocab_size is not None:
            _check("input_ids", input_ids, "b", "l", kind="integer", below=self.config.padded_vocab_size)
            input_ids = self.embeddings(input_ids)
        return super().forward(input_ids, inference_params, **mask_and_seq_idx)


class Mamba2ForCausalLM(Mamba2PreTrained):
    """The language model: next-token logits for every position."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        _require(config.vocab_size is not None, "vocab_size must be a positive integer in a language model, got None")
        self.config = config
        self.backbone = Mamba2Model(config)
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
    model: Mamba2ForCausalLM, unread: Tensor, max_new_tokens: int = 50, temperature: float = 1.0,
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
class Mamba2ForSequenceClassification(Mamba2PreTrained):
    """A linear classifier (config.num_labels) on the pooled hidden states (config.pooling_strategy)."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        self.config = config
        self.backbone = Mamba2Model(config)
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


Mamba2LMHeadModel = Mamba2ForCausalLM  # mamba2-minimal's and state-spaces'; the others are MiniMamba's
Mamba2 = Mamba2Mixer
Mamba2ForCausalLM.generate_streaming = Mamba2ForCausalLM.stream
Mamba2PreTrained.get_cache_info = lambda _, inference_params: InferenceParams.get_cache_info(inference_params)
Mamba2PreTrained.reset_cache = lambda _, inference_params: InferenceParams.reset(inference_params)
InferenceParams.reset_cache = InferenceParams.reset
Mamba2ForFeatureExtraction = Mamba2Model


# -------------------------------------- 8. Checkpoints, and what a config allows --------------------------------------
# Fields of config.json in transformers' format, ours=theirs, and the values that absent ones have there.
TRANSFORMERS_FIELDS = """
    d_model=hidden_size n_layer=num_hidden_layers d_state=state_size d_conv=conv_kernel expand=expand headdim=head_dim
    ngroups=n_groups dt_min=time_step_min dt_max=time_step_max dt_init_floor=time_step_floor dt_limit=time_step_limit
    bias=use_bias conv_bias=use_conv_bias norm_epsilon=layer_norm_epsilon residual_in_fp32=residual_in_fp32
    tie_embeddings=tie_word_embeddings initializer_range=initializer_range bos_token_id=bos_token_id
    eos_token_id=eos_token_id pad_token_id=pad_token_id num_labels=num_labels pooling_strategy=pooling_strategy
    dropout=classifier_dropout vocab_size=vocab_size"""
TRANSFORMERS_DEFAULTS = {"d_model": 4096, "n_layer": 64, "vocab_size": 32768, "ngroups": 8, "tie_embeddings": False}
TRANSFORMERS_DEFAULTS |= {"pad_vocab_size_multiple": 1, "initializer_range": 0.1}
TRANSFORMERS_DEFAULTS |= {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
# Arguments of state-spaces' layer that aren't read, with the value that they must have; ... where it has no effect.
LAYER, SSM_CFG = "Mamba2", {"chunk_size": ..., "conv_init": ..., "use_mem_eff_path": ..., "d_ssm": None}
SSM_CFG |= {"D_has_hdim": False, "rmsnorm": True, "norm_before_gate": False}


def _to_transformers(config: Mamba2Config) -> dict[str, Any]:
    """The fields of a config.json of transformers, which reads vocab_size as the number of rows, padding included."""
    stored = {name: getattr(config, ours) for ours, name in re.findall(r"(\w+)=(\w+)", TRANSFORMERS_FIELDS)}
    stored |= {"vocab_size": config.padded_vocab_size, "unpadded_vocab_size": config.vocab_size}
    stored |= {"pad_vocab_size_multiple": config.pad_vocab_size_multiple, "hidden_act": "silu", "use_cache": True}
    own = {"model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"]}
    return stored | own | {"num_heads": config.nheads, "chunk_size": config.chunk_size or 256}


def _from_transformers(stored: Mapping[str, Any]) -> Mamba2Config:
    """The config in a config.json of transformers; what we don't use is ignored."""
    use = "mamba.py" if stored["model_type"] in ("mamba", "falcon_mamba") else "transformers"
    for name, *allowed in (("model_type", "mamba2"), ("hidden_act", "silu", "swish"), ("quantization_config", None)):
        value = stored.get(name, allowed[0])
        _require(value in allowed, f"{name} must be {allowed[0]!r} in this file, got {value!r}: use {use}")
    named = {ours: stored[name] for ours, name in re.findall(r"(\w+)=(\w+)", TRANSFORMERS_FIELDS) if name in stored}
    if "unpadded_vocab_size" in stored and "transformers_version" not in stored:  # written here; there all are tokens
        named |= {"vocab_size": stored["unpadded_vocab_size"]}
        named |= {"pad_vocab_size_multiple": stored["pad_vocab_size_multiple"]}
    config, heads = Mamba2Config.from_dict(TRANSFORMERS_DEFAULTS | named), stored.get("num_heads", 128)
    _require(heads == config.nheads, f"num_heads must be expand * hidden_size / head_dim {config.nheads}, got {heads}")
    return config


def _from_state_spaces(stored: Mapping[str, Any]) -> Mamba2Config:
    """The config in a config.json of state-spaces/mamba."""
    _require("d_model" in stored, "config.json has neither model_type (transformers) nor d_model (state-spaces)")
    ssm_cfg = {"layer": "Mamba1"} | (stored.get("ssm_cfg") or {})
    layer = ssm_cfg.pop("layer")
    use = {"Mamba1": "mamba.py", "Mamba2": "mamba2.py", "Mamba3": "mamba3.py"}.get(layer, "mamba_ssm")
    _require(layer == LAYER, f"ssm_cfg['layer'] must be {LAYER!r} in this file, got {layer!r}: use {use}")
    ours = {f.name for f in fields(Mamba2Config)} - SSM_CFG.keys()
    plain = {"attn_layer_idx": [], "d_intermediate": 0, "rms_norm": True, "quantization_config": None}
    wrong = {name: stored[name] for name, value in plain.items() if stored.get(name) not in (None, value)}
    wrong |= {k: v for k, v in ssm_cfg.items() if k not in ours and SSM_CFG.get(k, "unknown") not in (..., v)}
    _require(not wrong, f"config.json is of a model that this file does not implement, with {wrong}: use mamba_ssm")
    # Without a word of it, the end of text is GPT-NeoX's, as in transformers' copies of these checkpoints.
    values = {name: value for name, value in (stored | ssm_cfg).items() if name in ours and value is not None}
    return Mamba2Config(**{"eos_token_id": 0} | values)


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


def _load(cls: type, name: Any, device: Any, dtype: torch.dtype | None, hub: Mapping[str, Any]) -> Mamba2PreTrained:
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


def _fill(model: Mamba2PreTrained, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors into a model, in the place of its own; ValueError, naming them, where names or shapes differ."""
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(f"tensors don't fit: {' '.join(str(error).split())[:1000]}") from None


def _save(model: Mamba2PreTrained, directory: Path, state_dict: Mapping[str, Tensor] | None) -> None:
    """See `save_pretrained`: all is written beside the old files, then renamed, config.json last."""
    from safetensors.torch import save_file

    tensors = {k: v.detach() for k, v in dict(model.named_parameters() if state_dict is None else state_dict).items()}
    whole = all(v.is_floating_point() and not hasattr(v, "full_tensor") for v in tensors.values())
    _require(whole, "state_dict must hold whole, floating-point tensors: of a sharded model, a get_model_state_dict")
    with torch.device("meta"):
        _fill(type(model)(model.config).requires_grad_(False), tensors)
    stored = _to_transformers(model.config)
    if not isinstance(model, Mamba2ForCausalLM):
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


def _check_fields(config: Mamba2Config) -> None:
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

    stored = Path(globals().get("__file__", "")).parent / "pretrained/shakespeare-mamba2"  # a notebook has no __file__
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

    model = Mamba2ForCausalLM.from_pretrained(args.model, device=device, dtype=dtype and getattr(torch, dtype))
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
