"""Mamba in one file: the selective state space model (S6), its language model, and constant-time generation.

Albert Gu and Tri Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), arXiv:2312.00752;
"the paper" below. A state space model carries a state h through the sequence. In Mamba the step size dt and the
projections B and C depend on the current input, so the model selects what to keep in h and what to forget. Training
reads a whole sequence in linear time; generation keeps only h and the last few inputs, however long the text is.

Copy this file into your project; it needs torch and einops (and to load or save checkpoints safetensors and
huggingface_hub, which come with transformers):

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
    h           h       (b, e, n)       its state (`ssm_state` in the cache)
    dt          Delta   (b, l, e)       step size; large: take the input in, small: keep the state (section 3.5)
    A           A       (e, n)          state matrix, diagonal and negative; the parameter is A_log = log(-A)
    B, C        B, C    (b, l, n)       input and output projections of the state, selected by the input
    D           D       (e,)            skip connection
    z                   (b, l, e)       gate of the block (Figure 3)
    conv_state          (b, e, d_conv)  the last inputs of the convolution, newest last
    t, w, r                             how the scan is worked on: steps of a block, blocks side by side, rows at once
"""

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import re
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

# ----------------------------------------------------------------------------------------------------------------------
# 2. Config
# ----------------------------------------------------------------------------------------------------------------------

HERE = Path(globals().get("__file__", "")).parent  # there is no file when this is pasted into a notebook
DEFAULT_CHECKPOINT = HERE / "pretrained" / "shakespeare-mamba"  # of the command line


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
    d_inner: int | None = None  # None becomes expand * d_model: to replace either, give d_inner=None again
    dt_rank: int | str = "auto"  # "auto" becomes ceil(d_model / 16): likewise
    dt_min: float = 0.001  # dt starts log-uniform in [dt_min, dt_max], but at least dt_init_floor
    dt_max: float = 0.1
    dt_init: str = "random"  # how dt_proj.weight starts: "random" or "constant"
    dt_scale: float = 1.0  # and its scale, times dt_rank ** -0.5
    dt_init_floor: float = 1e-4
    mixer_rms_eps: float | None = None  # a number puts an RMS norm on dt, B and C: FalconMamba
    bias: bool = False  # of in_proj and out_proj
    conv_bias: bool = True
    norm_epsilon: float = 1e-5
    residual_in_fp32: bool = True
    tie_embeddings: bool = True
    initializer_range: float = 0.02  # standard deviation of the embedding at the start
    bos_token_id: int | None = None  # kept in checkpoints, as is pad_token_id
    eos_token_id: int | Sequence[int] | None = None  # for the command line, and kept in checkpoints
    pad_token_id: int | None = None
    gradient_checkpointing: bool = False  # recompute each block in the backward pass
    num_labels: int = 2  # the classifier's fields: these three
    pooling_strategy: str = "last"
    dropout: float = 0.1

    def __post_init__(self) -> None:
        sizes = ["d_model", "n_layer", "pad_vocab_size_multiple", "d_state", "d_conv", "expand"]
        sizes += ["num_labels"]
        self._check("a positive integer", lambda v: type(v) is int and v > 0, *sizes)
        self._check("a positive integer or None", lambda v: v is None or (type(v) is int and v > 0), "vocab_size")
        self._check("a positive number", lambda v: _is_number(v) and v > 0, "dt_min", "dt_max", "dt_scale")
        self._check("a positive number", lambda v: _is_number(v) and v > 0, "dt_init_floor", "norm_epsilon")
        self._check("a number, 0 or greater", lambda v: _is_number(v) and v >= 0, "initializer_range")
        self._check("in [0, 1)", lambda v: _is_number(v) and 0 <= v < 1, "dropout")
        switches = ["bias", "conv_bias", "residual_in_fp32", "tie_embeddings", "gradient_checkpointing"]
        self._check("True or False", lambda v: type(v) is bool, *switches)
        self._check("'random' or 'constant'", lambda v: v in ("random", "constant"), "dt_init")
        self._check("'last', 'mean' or 'max'", lambda v: v in ("last", "mean", "max"), "pooling_strategy")
        self._check("None or an integer", lambda v: v is None or type(v) is int, "bos_token_id", "pad_token_id")
        self._check("None, an integer or a list of them", _are_ids, "eos_token_id")
        self._check("None or a positive number", lambda v: v is None or (_is_number(v) and v > 0), "mixer_rms_eps")
        self._check(f"at least dt_min ({self.dt_min})", lambda v: v >= self.dt_min, "dt_max")
        if self.d_inner is None:
            self.d_inner = self.expand * self.d_model
        if self.dt_rank == "auto":
            self.dt_rank = math.ceil(self.d_model / 16)
        self._check("a positive integer or None", lambda v: type(v) is int and v > 0, "d_inner")
        self._check("a positive integer or 'auto'", lambda v: type(v) is int and v > 0, "dt_rank")
        for setting in fields(self):  # transformers refuses whole numbers in these
            if setting.type in (float, float | None) and getattr(self, setting.name) is not None:
                setattr(self, setting.name, float(getattr(self, setting.name)))

    def _check(self, allowed: str, test, *names: str) -> None:
        for name in names:
            if not test(getattr(self, name)):
                raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)!r}")

    @property
    def padded_vocab_size(self) -> int | None:
        """Rows of the embedding: vocab_size, rounded up to a multiple of pad_vocab_size_multiple."""
        if self.vocab_size is None:
            return None
        return math.ceil(self.vocab_size / self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        known = [f.name for f in fields(cls)]
        for name, value in values.items():
            if name not in known:
                raise ValueError(f"unknown config field {name!r} = {value!r}; allowed are {', '.join(known)}")
        return cls(**values)

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def save_to_json(self, path: str | os.PathLike) -> None:
        _write_text(Path(path), self.to_json_string() + "\n")

    @classmethod
    def from_json(cls, path: str | os.PathLike) -> Self:
        return cls.from_dict(json.loads(Path(path).read_text()))

    @classmethod
    def from_checkpoint(cls, stored: Mapping[str, Any]) -> Self:
        """The settings in a checkpoint's config.json, in transformers' or in state-spaces' format.

        Raises ValueError for a model that this file does not implement, saying what it is.
        """
        if "model_type" not in stored:
            return cls.from_dict(_from_state_spaces(stored, "Mamba1"))
        model_type = stored["model_type"]
        if model_type == "mamba2":
            raise ValueError("config.json describes a Mamba-2 model (model_type 'mamba2'): load it with mamba2.py")
        if model_type not in ("mamba", "falcon_mamba"):
            raise ValueError(f"model_type must be 'mamba' or 'falcon_mamba', got {model_type!r}")
        values = _from_transformers(stored)
        if model_type == "falcon_mamba":
            values["mixer_rms_eps"] = stored.get("mixer_rms_eps", 1e-6)
        return cls.from_dict(values)

    @property
    def architecture(self) -> str:
        """The name of the language model's class in transformers."""
        return "MambaForCausalLM" if self.mixer_rms_eps is None else "FalconMambaForCausalLM"

    def to_checkpoint(self) -> dict[str, Any]:
        """The fields of config.json in transformers' format."""
        model_type = {"model_type": "mamba" if self.mixer_rms_eps is None else "falcon_mamba"}
        rms_eps = {} if self.mixer_rms_eps is None else {"mixer_rms_eps": self.mixer_rms_eps}
        return model_type | rms_eps | _to_transformers(self)


@dataclass
class BaseMambaConfig(MambaConfig):
    """MiniMamba's: there is no vocabulary unless one is given."""

    vocab_size: int | None = None


# Our field: transformers' name for it, and the value that an absent one has there.
TRANSFORMERS_FIELDS = {
    "d_model": "hidden_size",
    "n_layer": "num_hidden_layers",
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "expand": "expand",
    "d_inner": "intermediate_size",
    "dt_rank": "time_step_rank",
    "dt_min": "time_step_min",
    "dt_max": "time_step_max",
    "dt_init": "time_step_init_scheme",
    "dt_scale": "time_step_scale",
    "dt_init_floor": "time_step_floor",
    "bias": "use_bias",
    "conv_bias": "use_conv_bias",
    "norm_epsilon": "layer_norm_epsilon",
    "residual_in_fp32": "residual_in_fp32",
    "tie_embeddings": "tie_word_embeddings",
    "initializer_range": "initializer_range",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
    "num_labels": "num_labels",
    "pooling_strategy": "pooling_strategy",
    "dropout": "classifier_dropout",
}
TRANSFORMERS_DEFAULTS = {"n_layer": 32, "vocab_size": 50280, "initializer_range": 0.1}
TRANSFORMERS_DEFAULTS |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
STATE_SPACES_FIELDS = [
    "d_model",
    "n_layer",
    "vocab_size",
    "pad_vocab_size_multiple",
    "residual_in_fp32",
    "tie_embeddings",
]
# The layer's arguments in ssm_cfg: fields of ours, those that must have one value, those that only choose a kernel.
SSM_CFG_FIELDS = ["d_state", "d_conv", "expand", "dt_rank", "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor"]
SSM_CFG_FIELDS += ["conv_bias", "bias"]
SSM_CFG_FIXED = {}
SSM_CFG_IGNORED = ["use_fast_path"]


def _write_text(path: Path, text: str) -> None:
    """Write a file beside its place and rename it, so that it is there whole or not at all."""
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(beside, 0o644)
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _are_ids(value: Any) -> bool:
    ids = value if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else [value]
    return value is None or all(type(token) is int for token in ids)


def _from_transformers(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of ours from a config.json of transformers; what we don't use is ignored."""
    for name, *allowed in (("hidden_act", "silu", "swish"), ("quantization_config", None)):
        if stored.get(name, allowed[0]) not in allowed:
            raise ValueError(f"{name} of a checkpoint must be {allowed[0]!r} here, got {stored[name]!r}")
    values = {ours: stored[name] for ours, name in TRANSFORMERS_FIELDS.items() if name in stored}
    values = TRANSFORMERS_DEFAULTS | values
    rows = stored.get("vocab_size", TRANSFORMERS_DEFAULTS["vocab_size"])
    if rows is None:
        return values | {"vocab_size": None}
    multiple = stored.get("pad_vocab_size_multiple")
    multiple = multiple if type(multiple) is int and multiple > 0 and rows % multiple == 0 else rows
    vocab_size = stored.get("unpadded_vocab_size", rows)
    if "transformers_version" in stored:  # there each row may be a token
        vocab_size = rows
    return values | {"vocab_size": vocab_size, "pad_vocab_size_multiple": multiple}


def _to_transformers(config: MambaConfig) -> dict[str, Any]:
    """The fields of a config.json of transformers; it reads vocab_size as the number of rows, padding included."""
    stored = {name: getattr(config, ours) for ours, name in TRANSFORMERS_FIELDS.items()}
    stored |= {"vocab_size": config.padded_vocab_size, "unpadded_vocab_size": config.vocab_size}
    stored |= {"pad_vocab_size_multiple": config.pad_vocab_size_multiple}
    return stored | {"hidden_act": "silu", "use_cache": True}


def _from_state_spaces(stored: Mapping[str, Any], layer: str) -> dict[str, Any]:
    """Fields of ours from a config.json of state-spaces/mamba whose ssm_cfg must name this layer."""
    if "d_model" not in stored:
        raise ValueError("config.json has neither model_type (transformers) nor d_model (state-spaces)")
    for name, what in (("attn_layer_idx", "attention"), ("d_intermediate", "MLP")):
        if stored.get(name):
            raise ValueError(f"{name} must be empty, got {stored[name]!r} (a hybrid with {what} layers): use mamba_ssm")
    if not stored.get("rms_norm", True):
        raise ValueError("rms_norm must be true, got false (a model with LayerNorm): use mamba_ssm")
    ssm_cfg = dict(stored.get("ssm_cfg") or {})
    if (found := ssm_cfg.pop("layer", "Mamba1")) != layer:
        where = {"Mamba1": "mamba.py", "Mamba2": "mamba2.py"}.get(found, "mamba_ssm")
        raise ValueError(f"ssm_cfg['layer'] must be {layer!r} in this file, got {found!r}: use {where}")
    values = {name: stored[name] for name in STATE_SPACES_FIELDS if name in stored}
    for name, value in ssm_cfg.items():
        if name in SSM_CFG_FIELDS:
            values[name] = value
        elif name not in SSM_CFG_IGNORED and SSM_CFG_FIXED.get(name, ...) != value:
            known = ", ".join([*SSM_CFG_FIELDS, *SSM_CFG_FIXED, *SSM_CFG_IGNORED])
            raise ValueError(f"ssm_cfg[{name!r}] = {value!r} is not implemented here (known: {known}): use mamba_ssm")
    return values


States = dict[int, tuple[Tensor, Tensor]]  # of each layer, by its index: conv_state and ssm_state


@dataclass
class InferenceParams:
    """The state of every layer after the tokens read so far: all that generation has to remember.

    `key_value_memory_dict[layer] = (conv_state, ssm_state)`; an empty dict is the start of a sequence. Models take any
    object with that dict. States are written in place: repeat them for more rows, don't expand them. `seqlen_offset`
    counts the tokens read, padding included, for information.
    """

    key_value_memory_dict: States = field(default_factory=dict)
    seqlen_offset: int = 0

    def reset(self) -> None:
        """Forget everything: the next call starts a new sequence."""
        self.key_value_memory_dict.clear()
        self.seqlen_offset = 0

    reset_cache = reset  # MiniMamba's name

    def clone(self) -> "InferenceParams":
        """A copy with its own states: continue one prefix in several ways."""
        states = {i: (conv.clone(), ssm.clone()) for i, (conv, ssm) in self.key_value_memory_dict.items()}
        return InferenceParams(states, self.seqlen_offset)

    def get_cache_info(self) -> dict[str, float]:
        """memory_mb (10^6 bytes), cached_layers, total_tensors, seqlen_offset."""
        return _cache_info(self)


def _cache_info(inference_params: Any) -> dict[str, float]:
    tensors = [state for states in inference_params.key_value_memory_dict.values() for state in states]
    return {
        "memory_mb": sum(state.numel() * state.element_size() for state in tensors) / 1e6,
        "cached_layers": len(inference_params.key_value_memory_dict),
        "total_tensors": len(tensors),
        "seqlen_offset": getattr(inference_params, "seqlen_offset", 0),
    }


def _check_vectors(name: str, x: Tensor, width: int) -> None:
    """Raise ValueError unless x is floating point of shape (b, l, width)."""
    if x.ndim != 3 or x.shape[-1] != width or not x.is_floating_point():
        allowed = f"floating point of shape (b, l, d_model = {width})"
        raise ValueError(f"{name} must be {allowed}, got {x.dtype} of shape {tuple(x.shape)}")


def _check_states(states: tuple[Tensor, Tensor], shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """Raise ValueError unless a layer's cached states have the shapes that this input and this layer need."""
    found = tuple(tuple(state.shape) for state in states)
    if found != shapes:
        of_batch = f" (batch size {found[0][0]} against the input's {shapes[0][0]})"
        raise ValueError(f"inference_params must hold states of shapes {shapes}, got {found}{of_batch}")


# ----------------------------------------------------------------------------------------------------------------------
# 3. The selective scan
# ----------------------------------------------------------------------------------------------------------------------


LOG2_E = math.log2(math.e)  # decays are exp2(dt (A log2(e))): CPUs are slow with an exp that underflows, some with any
_NAMESPACE = re.sub(r"^(?=\d)|\W", "_", __name__, flags=re.ASCII)  # of the operators: each copy of the file has its own


def _full_precision(function: Callable) -> Callable:
    """Switch autocast off inside a function: the state is float32 (or float64) also where the layers are not."""

    @functools.wraps(function)
    def wrapped(x: Tensor, *args, **kwargs):
        if x.is_meta or not torch.is_autocast_enabled(x.device.type):  # autocast knows no meta device
            return function(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **kwargs)

    return wrapped


def _check_reverse_mode(*tensors: Tensor | None) -> None:
    """Raise NotImplementedError in forward-mode differentiation, where torch takes our operators' derivatives for 0."""
    if torch.compiler.is_compiling():
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError("there are no forward-mode derivatives (jvp, jacfwd): use reverse mode")


def selective_scan_recurrence(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition (equation 2 with the discretisation of Algorithm 2), one step after the other.

    Arguments, here all of one type, and results are those of `selective_scan`, which computes the same numbers fast.
    """
    h = u.new_zeros(u.shape[0], *A.shape) if initial_state is None else initial_state
    ys = []
    for u_t, dt_t, B_t, C_t in zip(u.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), strict=True):
        # Algorithm 2 names the zero-order hold (equation 4); the official code uses dt * B, Euler's rule, for B.
        h = torch.exp(dt_t[..., None] * A) * h + (dt_t * u_t)[..., None] * B_t[:, None]  # (b, e, n)
        ys.append((h @ C_t[..., None]).squeeze(-1))  # (b, e)
    y = torch.stack(ys, 1) if ys else torch.zeros_like(u)
    y = y if D is None else y + D * u
    return y if z is None else y * F.silu(z), h


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    block_len: int | None = None,
    n_parallel: int | None = None,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The selective scan (Algorithm 2), each channel of the inner width e with its own state of size n:

        h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t        y_t = (C_t . h_t + D u_t) SiLU(z_t)

    u, dt: (b, l, e), dt not negative, its type is that of the computation; A: (e, n), negative; B, C: (b, l, n);
    initial_state: (b, e, n) and D: (e,), zero when None; z: (b, l, e), no gate when None. Returns y (b, l, e) and the
    final state (b, e, n). Differentiable once, in every argument. Raises ValueError for shapes that don't fit.

    The sequence is walked in blocks of `block_len` steps, whose (block_len, rows, n, e) tensors stay in cache: one
    product and one exp for all decays, one product for all inputs, a multiply-add for each step, one product with C.
    Every decay is in [0, 1], so nothing overflows. The backward pass keeps only the states between blocks.
    `n_parallel` blocks are worked on side by side, with the same recurrence once more over their ends: that keeps a GPU
    busy, with a number of kernels that grows like the square root of the length (in proportion to it beyond 2^26
    elements). Both change the work and not the result; None chooses them by the sizes and the device.
    """
    (b, l, e), n = u.shape, A.shape[-1]
    names = ("dt", "A", "B", "C", "initial_state", "D", "z")
    shapes = ((b, l, e), (e, n), (b, l, n), (b, l, n), (b, e, n), (e,), (b, l, e))
    for name, value, shape in zip(names, (dt, A, B, C, initial_state, D, z), shapes, strict=True):
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    for name, value in (("block_len", block_len), ("n_parallel", n_parallel)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be None or a positive integer, got {value}")
    _check_reverse_mode(u, dt, A, B, C, initial_state, D, z)
    h = dt.new_zeros(b, n, e) if initial_state is None else initial_state.mT.to(dt.dtype).contiguous()
    D = A.new_zeros(e) if D is None else D
    given = (u, dt, A, B, C, D, h, z)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    y, h, _ = _scan(*given, block_len or 0, n_parallel or 0, keep)
    return y, h.mT.contiguous()


@_full_precision
def scan_step(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, D: Tensor, z: Tensor
) -> tuple[Tensor, Tensor]:
    """`selective_scan` for one step: u, dt, z (b, e), B and C (b, n), state (b, e, n) to y (b, e) and the new state."""
    state = state * torch.exp2((dt * LOG2_E)[..., None] * A)
    state = state.addcmul_((dt * u)[..., None], B[:, None].to(dt.dtype))  # (b, e, n)
    y = (state @ C[..., None].to(dt.dtype)).squeeze(-1)  # (b, e)
    return torch.addcmul(y, u, D) * F.silu(z), state


def _tiling(
    b: int, l: int, e: int, n: int, device: torch.device, block_len: int, n_parallel: int
) -> tuple[int, int, int]:
    """t steps of a block, w blocks side by side, and r rows of the batch worked on at once; 0 stands for a free choice.

    sym_min and sym_max are min and max; `torch.compile` keeps b and l open in them.
    """
    row = max(1, n * e)  # elements of one step
    if device.type == "cpu":
        most = 2**20  # elements of a tensor: several of them stay in the cache
        t, w = torch.sym_min(64, torch.sym_max(16, most // (row * torch.sym_max(1, b)))), 1
        t = torch.sym_max(1, -(-l // torch.sym_max(1, -(-l // t))))  # blocks of about the same length
    else:
        most = 2**26  # bounds the memory
        steps = max(1, min(l, most // row))
        t = math.isqrt(steps - 1) + 1
        w = math.ceil(steps / t)
    t, w = block_len or t, n_parallel or w
    return t, w, torch.sym_max(1, torch.sym_min(b, most // (t * w * row)))


def _segments(l: int, t: int, w: int) -> list[tuple[int, int, int]]:
    """Cut l steps into segments (start, t, w) of w blocks of t steps; the last ones are what is left over."""
    segments, start = [], 0
    while start < l:
        t, w = min(t, l - start), max(1, min(w, (l - start) // t))
        segments.append((start, t, w))
        start += t * w
    return segments


def _n_segments(l: int, t: int, w: int) -> int:
    """How many segments `_segments` makes: the whole ones, one of fewer blocks, one of a shorter block."""
    rest = l % (t * w)
    return l // (t * w) + torch.sym_min(1, rest // t) + torch.sym_min(1, rest % t)


def _blocks(x: Tensor, rows: slice, segments: list[tuple[int, int, int]]) -> list[Tensor]:
    """(b, l, c) to views of its segments, with the steps of a block first: (t, r, w, c) each."""
    pieces = x[rows].split([t * w for _, t, w in segments], dim=1)
    shapes = ((len(piece), w, t, piece.shape[-1]) for piece, (_, t, w) in zip(pieces, segments, strict=True))
    return [piece.view(shape).permute(2, 0, 1, 3) for piece, shape in zip(pieces, shapes, strict=True)]


def _enter_(x_0: Tensor, entering: Tensor, block: int = 0) -> None:
    """Let a state (r, n, e) enter the first step x_0 (r, w, n, e) of one block, and zero the others."""
    if x_0.shape[1] > 1:
        x_0.zero_()
    x_0[:, block] = entering


def _recur_(x: Tensor, xs: Sequence[Tensor], ds: Sequence[Tensor], reverse: bool = False) -> None:
    """x[i + 1] += d[i] * x[i] in each block, with x[0] the state at the end of the block before it.

    x: (t + 1, r, w, n, e), holds the inputs and becomes the states; xs and ds: x and the decays (t, r, w, n, e) by
    steps; x[0] of the first block is what `_enter_` put there. reverse: from the last step to the first, likewise the
    blocks.
    """
    w = x.shape[2]
    xs, ds, order = (xs[::-1], ds[::-1], range(w)[::-1]) if reverse else (xs, ds, range(w))
    for d, x_i, x_next in zip(ds, xs, xs[1:], strict=False):
        x_next.addcmul_(d, x_i)
    if w == 1:
        return
    product = torch.empty_like(x)  # the decay since the block began
    ps = product.unbind(0)[::-1] if reverse else product.unbind(0)
    ps[1].copy_(ds[0])
    for d, p, p_next in zip(ds[1:], ps[1:], ps[2:], strict=False):
        torch.mul(p, d, out=p_next)
    for before, i in itertools.pairwise(order):  # the same recurrence, over the ends of the blocks
        xs[0][:, i] = xs[-1][:, before]
        xs[-1][:, i].addcmul_(ps[-1][:, i], xs[0][:, i])
    later = slice(0, -1) if reverse else slice(1, None)
    x[1:-1, :, later].addcmul_(product[1:-1, :, later], xs[0][:, later])


@torch.library.custom_op(f"{_NAMESPACE}::selective_scan", mutates_args=())
@_full_precision
def _scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    h0: Tensor,
    z: Tensor | None,
    block_len: int,
    n_parallel: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (b, l, e), the final state (b, n, e) and, if `keep`, the states at which segments begin (segments, b, n, e)."""
    (b, l, e), n, dtype = u.shape, A.shape[1], dt.dtype
    t, w, r = _tiling(b, l, e, n, u.device, block_len, n_parallel)
    segments = _segments(l, t, w)
    y, final = torch.empty_like(dt), torch.empty_like(h0)
    borders = dt.new_empty(len(segments) if keep else 0, b, n, e)
    gate = dt if z is None else z  # dt only stands in, here and below
    A = (A.to(dtype) * LOG2_E).t().contiguous()  # (n, e)

    @functools.cache
    def buffers(t: int, r: int, w: int) -> tuple:
        decay, x = dt.new_empty(t, r, w, n, e), dt.new_empty(t + 1, r, w, n, e)
        return decay, x, decay.unbind(0), x.unbind(0)

    for row in range(0, b, r):
        rows = slice(row, row + r)
        h = h0[rows]
        parts = zip(*(_blocks(v, rows, segments) for v in (dt, u, B, C, gate, y)), strict=True)
        for i, (dt_i, u_i, B_i, C_i, z_i, y_i) in enumerate(parts):
            decay, x, ds, xs = buffers(*dt_i.shape[:3])
            _enter_(xs[0], h)
            if keep:
                borders[i, rows] = h
            torch.mul(dt_i[..., None, :], A, out=decay).exp2_()
            torch.mul((dt_i * u_i)[..., None, :], B_i.to(dtype)[..., None], out=x[1:])
            _recur_(x, xs, ds)
            ungated = (C_i.to(dtype)[..., None, :] @ x[1:]).squeeze(-2).addcmul_(u_i, D)  # (t, r, w, e)
            y_i.copy_(ungated if z is None else ungated.mul_(F.silu(z_i)))
            h = xs[-1][:, -1]
        final[rows] = h
    return y, final, borders


@torch.library.custom_op(f"{_NAMESPACE}::selective_scan_backward", mutates_args=())
@_full_precision
def _scan_backward(
    dy: Tensor,
    dh: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    borders: Tensor,
    block_len: int,
    n_parallel: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of u, dt, A, B, C, D, the initial state (b, n, e) and z, from those of y and of the final state.

    Each segment's states are computed again from the one at its border (section 3.3.2). With g the gradient of h, and
    with dy that of what the gate multiplies:

        g_t = C_t dy_t + exp(dt_{t+1} A) g_{t+1}        and that of dt_t A is  q_t = g_t * exp(dt_t A) * h_{t-1}
    """
    (b, l, e), n, dtype = u.shape, A.shape[1], dt.dtype
    t, w, most = _tiling(b, l, e, n, u.device, block_len, n_parallel)
    segments = _segments(l, t, w)
    gate = dt if z is None else z
    du, ddt, dB, dC, dh0, dz = (torch.empty_like(x) for x in (u, dt, B, C, dh, gate))
    dA, dD = dt.new_zeros(most, w, n, e), dt.new_zeros(e)
    A_ne = A.to(dtype).t().contiguous()  # (n, e)
    A_log2 = A_ne * LOG2_E

    @functools.cache
    def buffers(t: int, r: int, w: int) -> tuple:
        decay, x, g = (dt.new_empty(t + 1, r, w, n, e) for _ in range(3))
        return decay, x, g, decay.unbind(0), x.unbind(0), g.unbind(0), g[:-1].unbind(-2)

    for row in range(0, b, most):
        rows = slice(row, row + most)
        entering = dh[rows]
        tensors = (dt, u, B, C, dy, gate, du, ddt, dB, dC, dz)
        parts = zip(*(_blocks(v, rows, segments) for v in tensors), strict=True)
        for i, (*given, du_i, ddt_i, dB_i, dC_i, dz_i) in reversed(list(enumerate(parts))):
            dt_i, u_i, B_i, C_i, dy_i, z_i = (v.to(dtype) for v in given)
            dtu = dt_i * u_i
            r, w = dt_i.shape[1:3]
            decay, x, g, ds, xs, gs, g_by_n = buffers(*dt_i.shape[:3])
            torch.mul(dt_i[..., None, :], A_log2, out=decay[:-1]).exp2_()
            torch.mul(dtu[..., None, :], B_i[..., None], out=x[1:])
            _enter_(xs[0], borders[i, rows])
            _recur_(x, xs, ds[:-1])
            if z is not None:
                ungated = (C_i[..., None, :] @ x[1:]).squeeze(-2).addcmul_(u_i, D)  # (t, r, w, e)
                dz_i.copy_(torch.ops.aten.silu_backward(ungated.mul_(dy_i), z_i))
                dy_i = dy_i * F.silu(z_i)
            ds[-1][:, :-1] = ds[0][:, 1:]  # the decay of the next block's first step
            ds[-1][:, -1] = 1  # is in `entering` already
            torch.mul(dy_i[..., None, :], C_i[..., None], out=g[:-1])
            _enter_(gs[-1], entering, block=w - 1)
            _recur_(g, gs, ds[1:], reverse=True)
            entering = ds[0][:, 0] * gs[0][:, 0]
            dC_i.copy_((dy_i[..., None, :] @ x[1:].mT).squeeze(-2))  # faster than x @ dy
            dB_i.copy_((dtu[..., None, :] @ g[:-1].mT).squeeze(-2))
            d_dtu = (B_i[..., None, :] @ g[:-1]).squeeze(-2)  # (t, r, w, e)
            du_i.copy_((d_dtu * dt_i).addcmul_(dy_i, D))
            dD += (dy_i * u_i).sum((0, 1, 2))
            d_dt = d_dtu.mul_(u_i)
            g[:-1].mul_(decay[:-1]).mul_(x[:-1])  # g is q from here on
            for q_n, A_n in zip(g_by_n, A_ne.unbind(0), strict=True):
                d_dt.addcmul_(q_n, A_n)
            ddt_i.copy_(d_dt)
            dA_i = dA[:r, :w]
            for q_t, dt_t in zip(gs[:-1], dt_i[..., None, :].unbind(0), strict=True):
                dA_i.addcmul_(q_t, dt_t)
        dh0[rows] = entering
    return du, ddt, dA.sum((0, 1)).t().to(A.dtype).contiguous(), dB, dC, dD.to(D.dtype), dh0, dz


@_scan.register_fake
def _(u, dt, A, B, C, D, h0, z, block_len, n_parallel, keep):
    (b, l, e), n = u.shape, A.shape[1]
    t, w, _ = _tiling(b, l, e, n, u.device, block_len, n_parallel)
    return torch.empty_like(dt), torch.empty_like(h0), dt.new_empty(_n_segments(l, t, w) if keep else 0, b, n, e)


@_scan_backward.register_fake
def _(dy, dh, u, dt, A, B, C, D, z, borders, block_len, n_parallel):
    return tuple(torch.empty_like(x) for x in (u, dt, A, B, C, D, dh, dt if z is None else z))


def _scan_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, _, z, ctx.block_len, ctx.n_parallel, _ = inputs
    ctx.save_for_backward(*tensors, z, output[2])
    ctx.set_materialize_grads(False)  # the stored states have none


def _scan_gradients(ctx: Any, dy: Tensor | None, dh: Tensor | None, _: None) -> tuple:
    _, dt, *_, z, borders = saved = ctx.saved_tensors
    dy = torch.zeros_like(dt) if dy is None else dy
    dh = borders.new_zeros(borders.shape[1:]) if dh is None else dh
    *gradients, dz = _scan_backward(dy, dh, *saved, ctx.block_len, ctx.n_parallel)
    return *gradients, None if z is None else dz, None, None, None


_scan.register_autograd(_scan_gradients, setup_context=_scan_setup)


# ----------------------------------------------------------------------------------------------------------------------
# 4. The layer (Figure 3)
# ----------------------------------------------------------------------------------------------------------------------


def causal_conv(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A causal depthwise convolution and SiLU: (b, l, c) to the same shape and type, and the new state.

    conv_state: (b, c, k), the inputs before x, newest last; weight: (c, 1, k); lengths: (b,), how many steps of each
    row are real (the padding follows them and never enters the new state).
    """
    _check_reverse_mode(x, conv_state, weight, bias)
    l, k = x.shape[1], weight.shape[-1]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    taps = weight[:, 0].t().to(dtype).contiguous()  # (k, c)
    y = _conv(x, conv_state.mT.to(x.dtype), taps, torch.zeros_like(taps[0]) if bias is None else bias.to(dtype))
    if lengths is not None:
        index = lengths[:, None] + torch.arange(k, device=x.device)
        newest = torch.cat([conv_state.mT, x], dim=1).gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
    elif torch.compiler.is_compiling():  # nothing here compares l with k, so that torch.export can leave it open
        newest = torch.cat([conv_state.mT, x], dim=1)[:, l:]  # (b, k, c)
    else:  # the same without a copy of x
        newest = torch.cat([conv_state.mT[:, min(l, k) :], x[:, max(l - k, 0) :]], dim=1)
    return y.to(x.dtype), newest.detach().to(weight.dtype).mT.contiguous()


def _tiles(x: Tensor) -> list[tuple[slice, int, int]]:
    """Cut (b, l, c) into tiles (rows, start, length) that stay in a CPU's cache; on other devices there is one tile."""
    b, l, c = x.shape
    most = 2**18 if x.device.type == "cpu" else max(1, x.numel())
    length = max(1, min(l, most // c))
    rows = max(1, most // (length * c))
    return [(slice(r, r + rows), s, min(length, l - s)) for r in range(0, b, rows) for s in range(0, l, length)]


def _conv_tile(
    y: Tensor, x: Tensor, before: Tensor, taps: Tensor, bias: Tensor, rows: slice, start: int, length: int
) -> None:
    """y = bias + sum over i of taps[k-1-i] * x[t-i], as k shifted multiply-adds: faster on (b, l, c) than nn.Conv1d."""
    k = taps.shape[0]
    torch.addcmul(bias, x[rows, start : start + length], taps[-1], out=y)
    for i in range(1, k):
        first = min(max(i - start, 0), length)  # the steps before it look at `before`
        y[:, first:].addcmul_(x[rows, start + first - i : start + length - i], taps[-1 - i])
        if first:
            y[:, :first].addcmul_(before[rows, k - i + start : k - i + start + first], taps[-1 - i])


@torch.library.custom_op(f"{_NAMESPACE}::causal_conv", mutates_args=())
def _conv(x: Tensor, before: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """x: (b, l, c); before: (b, k, c), the inputs before x; taps: (k, c); bias: (c,); result: (b, l, c), as taps."""
    y = torch.empty(x.shape, dtype=taps.dtype, device=x.device)
    for rows, start, length in _tiles(x):
        y_tile = y[rows, start : start + length]
        _conv_tile(y_tile, x, before, taps, bias, rows, start, length)
        F.silu(y_tile, inplace=True)
    return y


@torch.library.custom_op(f"{_NAMESPACE}::causal_conv_backward", mutates_args=())
def _conv_backward(
    dy: Tensor, x: Tensor, before: Tensor, taps: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, before, taps and bias; what SiLU was applied to is computed again, tile by tile."""
    k = taps.shape[0]
    dx, dbefore = torch.zeros(x.shape, dtype=taps.dtype, device=x.device), torch.zeros_like(before, dtype=taps.dtype)
    dtaps, dbias = torch.zeros_like(taps), torch.zeros_like(bias)
    for rows, start, length in _tiles(x):
        dy_tile = dy[rows, start : start + length]
        y = torch.empty(dy_tile.shape, dtype=taps.dtype, device=x.device)
        _conv_tile(y, x, before, taps, bias, rows, start, length)
        g = torch.ops.aten.silu_backward(dy_tile, y)
        dbias += g.sum((0, 1))
        for i in range(k):
            first = min(max(i - start, 0), length)
            shifted = slice(start + first - i, start + length - i)
            dx[rows, shifted].addcmul_(g[:, first:], taps[-1 - i])
            dtaps[-1 - i] += (g[:, first:] * x[rows, shifted]).sum((0, 1))
            if first:
                shifted = slice(k - i + start, k - i + start + first)
                dbefore[rows, shifted].addcmul_(g[:, :first], taps[-1 - i])
                dtaps[-1 - i] += (g[:, :first] * before[rows, shifted]).sum((0, 1))
    return dx.to(x.dtype), dbefore.to(before.dtype), dtaps, dbias


@_conv.register_fake
def _(x, before, taps, bias):
    return torch.empty(x.shape, dtype=taps.dtype, device=x.device)


@_conv_backward.register_fake
def _(dy, x, before, taps, bias):
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return dx, torch.empty_like(before), torch.empty_like(taps), torch.empty_like(bias)


_conv.register_autograd(
    lambda ctx, dy: _conv_backward(dy, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def conv_step(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """`causal_conv` for one step: (b, c) to the same shape and type, and the new state."""
    conv_state = torch.cat([conv_state[..., 1:], x[..., None].to(conv_state.dtype)], dim=-1)  # (b, c, k)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    y = (conv_state * weight[:, 0].to(dtype)).sum(-1)
    return F.silu(y if bias is None else y + bias).to(x.dtype), conv_state


HAS_AMX = getattr(torch.cpu, "_is_amx_tile_supported", bool)()  # bool() is False
IS_AMD = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name", "").startswith("AMD")
IS_AMD_AVX512 = IS_AMD and torch.backends.cpu.get_cpu_capability() == "AVX512"  # there MKL computes with AVX2

# glibc returns freed memory to the system, and the next layer waits for each of its pages again. Once a block of this
# size, the largest that counts, was freed, it keeps 64 MB.
torch.empty(2**25 - 2**16, dtype=torch.uint8, device="cpu")


class Linear(nn.Linear):
    """nn.Linear; few vectors, as in decoding, and on some CPUs many are multiplied in the way that is fastest there."""

    def forward(self, x: Tensor) -> Tensor:
        count = x.numel() // max(1, x.shape[-1])
        plain = type(self.weight) in (Tensor, nn.Parameter)  # others, quantized ones say, know nn.Linear alone
        open_size = isinstance(count, torch.SymInt)  # in torch.export
        if not plain or open_size or count == 0:
            return super().forward(x)
        many = count >= 512 and count * self.weight.numel() >= 2**25
        if many and x.is_cpu and x.dtype == torch.float32 and IS_AMD_AVX512:
            return self._as_convolution(x)
        if torch.is_grad_enabled() or count > 16:
            return super().forward(x)
        if count == 1 and x.is_cpu and x.dtype == torch.float32 and IS_AMD:  # there MKL reads blocks of rows faster
            blocks = self.weight.unflatten(0, (math.gcd(len(self.weight), 16), -1))
            y = torch.bmm(blocks, x.reshape(1, -1).mT.expand(len(blocks), -1, -1)).view(*x.shape[:-1], -1)
            return y if self.bias is None else y + self.bias
        # what is below would round twice with a bias, and reads bfloat16 more slowly than oneDNN on such a CPU
        if self.bias is not None or (count > 1 and x.dtype == torch.bfloat16 and IS_AMD_AVX512):
            return super().forward(x)
        # a product with a vector is torch.mv, which CPUs without AMX run slower than that with a matrix of one column
        flat = count == 1 and (HAS_AMX or not x.is_cpu or torch.compiler.is_compiling())
        columns = x.reshape(-1) if flat else x.reshape(count, -1).mT  # (i,) or (i, count)
        return (self.weight @ columns).view(-1, count).mT.reshape(*x.shape[:-1], -1)

    def _as_convolution(self, x: Tensor) -> Tensor:
        """The same, as convolutions over single pixels: oneDNN runs them, with AVX-512, on channels-last views.

        It adds up a pixel's channels one after the other: 256 at most, or it would round off more than MKL does.
        """
        images = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2).split(256, dim=1)  # (1, 256, 1, count) each
        weights = self.weight[..., None, None].split(256, dim=1)
        y = F.conv2d(images[0], weights[0], self.bias)  # (1, o, 1, count)
        for image, weight in zip(images[1:], weights[1:], strict=True):
            product = F.conv2d(image, weight)  # selective checkpointing may keep it, and y: then not in place
            y = y + product if torch.is_grad_enabled() else y.add_(product)
        return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


class MambaMixer(nn.Module):
    """The Mamba layer, (b, l, d_model) to the same shape: convolution and selective scan, gated by a second branch."""

    def __init__(self, config: MambaConfig, layer_idx: int = 0) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        e, n, dt_rank = config.d_inner, config.d_state, config.dt_rank
        self.in_proj = Linear(config.d_model, 2 * e, bias=config.bias)
        self.conv1d = nn.Conv1d(e, e, config.d_conv, groups=e, bias=config.conv_bias)
        self.x_proj = Linear(e, dt_rank + 2 * n, bias=False)
        self.dt_proj = Linear(dt_rank, e)
        self.A_log = nn.Parameter(torch.empty(e, n))
        self.D = nn.Parameter(torch.empty(e))
        self.out_proj = Linear(e, config.d_model, bias=config.bias)
        self._init_parameters()

    @torch.no_grad()
    def _init_parameters(self) -> None:
        """The initialisation of the official code, which the paper's section 3.6 describes.

        The paper draws dt uniformly from [dt_min, dt_max]; the code, followed here, log-uniformly.
        """
        config = self.config
        self.A_log.copy_(torch.arange(1, config.d_state + 1, dtype=torch.float32).log().expand_as(self.A_log))
        self.D.fill_(1)
        scale = config.dt_scale * config.dt_rank**-0.5
        if config.dt_init == "constant":
            self.dt_proj.weight.fill_(scale)
        else:
            self.dt_proj.weight.uniform_(-scale, scale)
        log_dt = torch.empty_like(self.dt_proj.bias).uniform_(math.log(config.dt_min), math.log(config.dt_max))
        dt = log_dt.exp().clamp(min=config.dt_init_floor)
        self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.out_proj.weight.div_(math.sqrt(config.n_layer))
        for linear in (self.in_proj, self.out_proj):
            if linear.bias is not None:
                linear.bias.zero_()
        for parameter in (self.A_log, self.D, self.dt_proj.bias):
            parameter._no_weight_decay = True

    def forward(self, x: Tensor, inference_params: Any = None, lengths: Tensor | None = None) -> Tensor:
        """(b, l, d_model) to the same shape.

        inference_params: the states of layer `layer_idx` are taken from it, and replaced by the new ones.
        lengths: (b,), how many steps of each row are real; padding follows them and leaves the states alone.
        """
        _check_vectors("x", x, self.config.d_model)
        states = None if inference_params is None else inference_params.key_value_memory_dict.get(self.layer_idx)
        if states is None:
            states = self.new_states(x.shape[0])
        else:
            _check_states(states, self.state_shapes(x.shape[0]))
        conv_state, ssm_state = (state.clone() for state in states)  # the backward pass needs them as they are now
        u, z = self.in_proj(x).chunk(2, dim=-1)  # (b, l, e) each
        u, conv_state = causal_conv(u, conv_state, self.conv1d.weight, self.conv1d.bias, lengths)
        dt, B, C = self._select(u)
        if lengths is not None:
            padding = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]  # (b, l)
            dt = dt.masked_fill(padding[..., None], 0)  # dt = 0 leaves the state alone
        A = -torch.exp(self.A_log.to(dt.dtype))
        y, ssm_state = selective_scan(u, dt, A, B, C, ssm_state, D=self.D, z=z)  # (b, l, e)
        if inference_params is not None:
            inference_params.key_value_memory_dict[self.layer_idx] = (conv_state, ssm_state.detach())
        return self.out_proj(y.to(x.dtype))

    def _select(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dt (..., e), B and C (..., n) from u (..., e): what makes the state space model selective (Algorithm 2)."""
        config = self.config
        dt, B, C = self.x_proj(u).split([config.dt_rank, config.d_state, config.d_state], dim=-1)
        dtype = torch.promote_types(self.A_log.dtype, torch.float32)
        if config.mixer_rms_eps is not None:  # FalconMamba
            dt, B, C = (F.rms_norm(v.to(dtype), v.shape[-1:], eps=config.mixer_rms_eps).to(v.dtype) for v in (dt, B, C))
        if type(self.dt_proj) is Linear and dt.dtype != dtype:  # the bias is not rounded to the product's type
            dt = F.linear(dt, self.dt_proj.weight).to(dtype)
            dt = dt + self.dt_proj.bias  # not in place: selective checkpointing may have kept the product
        else:
            dt = self.dt_proj(dt).to(dtype)
        return F.softplus(dt), B, C

    def step(self, x: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One token, (b, d_model) to the same shape, and the two new states."""
        u, z = self.in_proj(x).chunk(2, dim=-1)  # (b, e) each
        u, conv_state = conv_step(u, conv_state, self.conv1d.weight, self.conv1d.bias)
        dt, B, C = self._select(u)  # (b, e), (b, n), (b, n)
        y, ssm_state = scan_step(u, dt, -torch.exp(self.A_log.to(dt.dtype)), B, C, ssm_state, self.D, z)
        return self.out_proj(y.to(x.dtype)), conv_state, ssm_state

    def state_shapes(self, batch_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of conv_state and ssm_state."""
        e = self.config.d_inner
        return (batch_size, e, self.config.d_conv), (batch_size, e, self.config.d_state)

    def new_states(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Zero states, for the start of a sequence: conv_state in the weights' type, ssm_state in float32 at least."""
        conv_shape, ssm_shape = self.state_shapes(batch_size)
        weight = self.conv1d.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return weight.new_zeros(conv_shape), weight.new_zeros(ssm_shape, dtype=dtype)


# ----------------------------------------------------------------------------------------------------------------------
# 5. Block, encoder, model, language model
# ----------------------------------------------------------------------------------------------------------------------


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last dimension, in float32 at least; the result has the weight's type."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        x = F.rms_norm(x.to(dtype), self.normalized_shape, self.weight.to(dtype), self.eps)
        return x.to(self.weight.dtype)


class MambaBlock(nn.Module):
    """x + mixer(norm(x)), on (b, l, d_model)."""

    def __init__(self, config: MambaConfig, layer_idx: int = 0) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, eps=config.norm_epsilon)
        self.norm.weight._no_weight_decay = True
        self.mixer = MambaMixer(config, layer_idx)

    def forward(self, x: Tensor, inference_params: Any = None, lengths: Tensor | None = None) -> Tensor:
        return x + self.mixer(self.norm(x), inference_params, lengths)

    def step(self, x: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One token, (b, d_model) to the same shape, and the two new states."""
        y, conv_state, ssm_state = self.mixer.step(self.norm(x), conv_state, ssm_state)
        return x + y, conv_state, ssm_state


class MambaPreTrained(nn.Module):
    """What every model here has: a config, checkpoints, and words about its cache."""

    config: MambaConfig

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """The model stored in a directory or in a repository of the Hugging Face hub, in evaluation mode.

        `name` holds config.json and weights in transformers' or state-spaces' format (safetensors or pytorch_model.bin,
        in one file or sharded). `dtype` None keeps the stored type, or where there are several takes config.json's;
        `device` None means the CPU. Raises OSError where a file is missing or the hub can't be reached, ValueError for
        a model that this file does not implement and for tensors that are missing, left over or of another shape. A
        classifier may be loaded from a language model's checkpoint: its last layer then is new.
        """
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype must be None or a torch.dtype, got {dtype!r}")
        stored = _read_config(name)
        with torch.device("meta"):
            model = cls(MambaConfig.from_checkpoint(stored))
        _load_weights(model, name, device or "cpu", dtype)
        named = str(stored.get("dtype") or stored.get("torch_dtype")).removeprefix("torch.")
        mixed = len({parameter.dtype for parameter in model.parameters()}) > 1
        if mixed and dtype is None and named in ("float64", "float32", "float16", "bfloat16"):
            model.to(getattr(torch, named))
        return model.eval()

    def gradient_checkpointing_enable(self, **_: Any) -> None:
        """Set config.gradient_checkpointing: blocks are recomputed in the backward pass. The name is transformers'."""
        self.config.gradient_checkpointing = True

    activation_checkpointing_enable = gradient_checkpointing_enable  # its newer name there

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write config.json and model.safetensors (sharded above 5 GB) in transformers' format.

        All files are written beside their places and then moved there: after an error the old ones are as they were.
        Other files there, a tokenizer say, stay.
        """
        _save(self, Path(directory))

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that an optimizer should not decay: A_log, D, the bias of dt, norms.

        The method is timm's. The parameters have state-spaces' mark, `_no_weight_decay`, as well, but copies lose it.
        """
        ending = re.compile(r"(A_log|\bD|dt_bias|dt_proj\.bias|norm(_f)?\.weight)$")
        return {name for name, p in self.named_parameters() if ending.search(name) or hasattr(p, "_no_weight_decay")}

    def get_cache_info(self, inference_params: Any) -> dict[str, float]:
        """memory_mb (10^6 bytes), cached_layers, total_tensors, seqlen_offset."""
        return _cache_info(inference_params)

    def reset_cache(self, inference_params: Any) -> None:
        """Forget everything: the next call starts a new sequence."""
        inference_params.key_value_memory_dict.clear()
        if isinstance(inference_params, InferenceParams):
            inference_params.seqlen_offset = 0


class MambaEncoder(MambaPreTrained):
    """The blocks and a final norm, (b, l, d_model) to the same shape: for inputs that are vectors already."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(MambaBlock(config, layer_idx) for layer_idx in range(config.n_layer))
        self.norm_f = RMSNorm(config.d_model, eps=config.norm_epsilon)
        self.norm_f.weight._no_weight_decay = True

    def _residual(self, x: Tensor) -> Tensor:
        """The residual stream starts in float32 (residual_in_fp32) or in the weights' type."""
        dtype = self.norm_f.weight.dtype
        return x.to(torch.promote_types(dtype, torch.float32) if self.config.residual_in_fp32 else dtype)

    def _states(self, inference_params: Any) -> States:
        """A copy of the cache's dict, which must hold states for all layers or none."""
        states = dict(inference_params.key_value_memory_dict)
        if states and states.keys() != set(range(len(self.layers))):
            allowed = f"hold states for layers 0 to {len(self.layers) - 1}, or none"
            raise ValueError(f"inference_params must {allowed}, got {sorted(states)}")
        return states

    def forward(self, x: Tensor, inference_params: Any = None, *, attention_mask: Tensor | None = None) -> Tensor:
        """(b, l, d_model) to the same shape, in the weights' type.

        inference_params: continue from its states and leave the new ones there; an error leaves it as it was.
        attention_mask: (b, l) of 0 and 1, the tokens of this call; padding on the left or on the right, no holes.
        """
        _check_vectors("x", x, self.config.d_model)
        x = self._residual(x)
        lengths = left = None
        if attention_mask is not None:
            left, lengths = _padding(attention_mask, x.shape[:2])
        if left is not None:
            x = _roll(x, left)  # the real tokens first, so that only padding on the right remains
            x = x.masked_fill((torch.arange(x.shape[1], device=x.device) >= lengths[:, None])[..., None], 0)
        cache = None if inference_params is None else InferenceParams(self._states(inference_params))
        # A block can't be recomputed from a cache, which holds its new states by then.
        recompute = self.config.gradient_checkpointing and self.training and torch.is_grad_enabled() and cache is None
        for layer in self.layers:
            x = checkpoint(layer, x, None, lengths, use_reentrant=False) if recompute else layer(x, cache, lengths)
        x = self.norm_f(x)
        if inference_params is not None:
            _commit(cache.key_value_memory_dict, inference_params, x.shape[1])
        return x if left is None else _roll(x, -left)

    @torch.no_grad()
    def step(self, x: Tensor, inference_params: Any) -> Tensor:
        """One vector of each sequence, (b, d_model) to the same shape, after those that the states have seen."""
        if _hooked(self):
            return self(x[:, None], inference_params)[:, 0]
        states = self._states(inference_params) or self.new_states(x.shape[0])
        for i, layer in enumerate(self.layers):
            _check_states(states[i], layer.mixer.state_shapes(x.shape[0]))
        x, states = self.advance(x, states)
        _commit(states, inference_params, 1)
        return x

    def advance(self, x: Tensor, states: States) -> tuple[Tensor, States]:
        """`step` as a function: one vector of each sequence and the states of all layers to the same, one step on."""
        x, new = self._residual(x), {}
        for i, layer in enumerate(self.layers):
            x, *new[i] = layer.step(x, *states[i])
        return self.norm_f(x), {i: tuple(pair) for i, pair in new.items()}

    def new_states(self, batch_size: int) -> States:
        """The states of all layers at the start of a sequence."""
        return {i: layer.mixer.new_states(batch_size) for i, layer in enumerate(self.layers)}


def _hooked(encoder: MambaEncoder) -> bool:
    """Whether hooks or wrappers in a layer, but those of torch.compile, wait for `forward`: `advance` does without."""
    parts = [encoder]
    for layer in encoder.layers:
        if not hasattr(layer, "mixer"):
            return True
        parts += layer, layer.mixer, *layer._modules.values(), *layer.mixer._modules.values()
    hooks = any(part._forward_hooks or part._forward_pre_hooks for part in parts)
    return hooks or any("forward" in vars(part) and not hasattr(part, "_orig_mod") for part in parts)


def _padding(attention_mask: Tensor, shape: torch.Size) -> tuple[Tensor | None, Tensor | None]:
    """How many padding tokens each row begins with, and how many real ones follow, both (b,); None if all are real."""
    if attention_mask.shape != shape:
        raise ValueError(f"attention_mask must have shape {tuple(shape)}, got {tuple(attention_mask.shape)}")
    real = attention_mask.bool()
    if torch.compiler.is_compiling():  # values are out of reach
        return real.int().argmax(1), real.sum(1)
    if not torch.equal(real.to(attention_mask.dtype), attention_mask):
        raise ValueError("attention_mask must hold 0 and 1 only")
    if real.all():
        return None, None
    lengths, left = real.sum(1), real.int().argmax(1)
    position = torch.arange(shape[1], device=real.device) - left[:, None]
    if not torch.equal(real, (position >= 0) & (position < lengths[:, None])):
        raise ValueError("attention_mask must have its zeros on the left or on the right, got a hole between ones")
    return left, lengths


def _roll(x: Tensor, by: Tensor) -> Tensor:
    """Move each row of (b, l, d) to the left by its own number of positions, around the end."""
    index = (torch.arange(x.shape[1], device=x.device) + by[:, None]) % x.shape[1]
    return x.gather(1, index[..., None].expand_as(x))


def _commit(new: States, inference_params: Any, n_tokens: int) -> None:
    """Write the new states of all layers over the old ones, in place."""
    old = inference_params.key_value_memory_dict
    outside = not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled()
    for layer_idx, states in new.items():
        if outside and any(state.is_inference() for state in old.get(layer_idx, ())):
            old[layer_idx] = states  # those of inference mode can't be written to outside of it
        for target, state in zip(old.setdefault(layer_idx, states), states, strict=True):
            if target is not state:
                target.copy_(state)
    if isinstance(inference_params, InferenceParams):
        inference_params.seqlen_offset += n_tokens


class MambaModel(MambaEncoder):
    """The encoder with an embedding: ids (b, l), or embeddings (b, l, d_model), to hidden states (b, l, d_model)."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__(config)
        if config.vocab_size is None:
            raise ValueError("vocab_size must be a positive integer in a model with an embedding, got None")
        self.embeddings = nn.Embedding(config.padded_vocab_size, config.d_model)
        nn.init.normal_(self.embeddings.weight, std=config.initializer_range)

    def forward(
        self, input_ids: Tensor, inference_params: Any = None, *, attention_mask: Tensor | None = None
    ) -> Tensor:
        return super().forward(self.embed(input_ids), inference_params, attention_mask=attention_mask)

    def embed(self, input_ids: Tensor, name: str = "input_ids") -> Tensor:
        """Ids (b, l) to vectors (b, l, d_model), which are let through. Raises ValueError for any other input."""
        if input_ids.is_floating_point() and input_ids.ndim == 3 and input_ids.shape[-1] == self.config.d_model:
            return input_ids
        if input_ids.dtype not in (torch.int64, torch.int32) or input_ids.ndim != 2:
            allowed = f"int64 of shape (b, l), or floating point of shape (b, l, d_model = {self.config.d_model})"
            raise ValueError(f"{name} must be {allowed}, got {input_ids.dtype} of shape {tuple(input_ids.shape)}")
        _check_ids(name, input_ids, getattr(self.embeddings, "num_embeddings", self.config.padded_vocab_size))
        return self.embeddings(input_ids)


def _check_ids(name: str, ids: Tensor, size: int) -> None:
    """Raise ValueError unless all ids are in [0, size); not in compiled code, where values are out of reach."""
    if torch.compiler.is_compiling() or ids.is_meta or not ids.numel():
        return
    low, high = (bound.item() for bound in torch.aminmax(ids))
    if low < 0 or high >= size:
        raise ValueError(f"{name} must be in [0, {size}), got {low if low < 0 else high}")


class MambaForCausalLM(MambaPreTrained):
    """The language model: next-token logits for every position."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = MambaModel(config)
        self.lm_head = Linear(config.d_model, config.padded_vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embeddings.weight

    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> dict[str, Any]:
        """As usual, but a tied head is a copy: safetensors, and so transformers' Trainer, stores no tensor twice."""
        state = super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        if self._tied and not keep_vars:
            for name in state:  # torch.compile may have wrapped the head
                if name.startswith(f"{prefix}lm_head.") and name.endswith(".weight"):
                    state[name] = state[name].clone()
        return state

    def _load_from_state_dict(self, state_dict: dict, prefix: str, local_metadata: dict, *args: Any) -> None:
        if self._tied and local_metadata.get("assign_to_params_buffers"):  # they would become two parameters
            names = [f"{prefix}{name}" for name in ("backbone.embeddings.weight", "lm_head.weight")]
            given = [state_dict[name] for name in names if name in state_dict]
            if given and all("weight" in part._parameters for part in (self.backbone.embeddings, self.lm_head)):
                one = nn.Parameter(given[0], requires_grad=self.lm_head.weight.requires_grad)
                state_dict |= dict.fromkeys(names, one)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        tied = self._tied
        super()._apply(*args, **kwargs)
        if tied:  # to_empty makes new parameters
            self.lm_head.weight = self.backbone.embeddings.weight
        return self

    @property
    def _tied(self) -> bool:
        """Whether the head's own weight, not one inside an adapter, is the embedding's."""
        head = getattr(self, "lm_head", None)
        head = getattr(head, "_orig_mod", head)  # what torch.compile has wrapped
        weight = getattr(head, "_parameters", {}).get("weight")
        return weight is not None and weight is getattr(self.backbone.embeddings, "weight", None)

    def forward(
        self,
        input_ids: Tensor,
        inference_params: Any = None,
        labels: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        num_last_tokens: int = 0,
    ) -> Tensor | dict[str, Tensor]:
        """Logits (b, l, padded_vocab_size), float32, from ids (b, l) or embeddings (b, l, d_model).

        inference_params: states to continue from, updated in place (see InferenceParams). Any number of tokens a call.
        labels: (b, l), the ids themselves (they are shifted here), -100 where none counts; padding never does. Then
            the result is a dict of "loss" (mean cross entropy in nats, float32) and "logits".
        attention_mask: (b, l) of 0 and 1; padding on the left or on the right.
        num_last_tokens: k > 0 gives the logits of the last k positions alone.
        """
        if labels is not None:
            if labels.shape != input_ids.shape[:2] or labels.dtype != torch.int64 or num_last_tokens:
                allowed = f"int64 of shape {tuple(input_ids.shape[:2])}, without num_last_tokens"
                raise ValueError(f"labels must be {allowed}, got {labels.dtype} of shape {tuple(labels.shape)}")
            _check_ids("labels", labels.masked_fill(labels == -100, 0), self.lm_head.out_features)
        if num_last_tokens < 0:
            raise ValueError(f"num_last_tokens must be 0 (all) or positive, got {num_last_tokens}")
        hidden = self.backbone(input_ids, inference_params, attention_mask=attention_mask)
        logits = self._logits(hidden[:, -num_last_tokens:])
        if labels is None:
            return logits
        if attention_mask is not None:  # nor does the token after padding on the left, which nothing predicts
            labels = labels.masked_fill(~(attention_mask.bool() & attention_mask.bool().roll(1, dims=1)), -100)
        loss = F.cross_entropy(rearrange(logits[:, :-1], "b l v -> (b l) v"), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self.lm_head(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @torch.no_grad()
    def step(self, token_ids: Tensor, inference_params: Any) -> Tensor:
        """Logits (b, padded_vocab_size) after one more token (b,): time and memory don't depend on what came before."""
        if token_ids.ndim != 1 or token_ids.is_floating_point():
            raise ValueError(
                f"token_ids must be int64 of shape (b,), got {token_ids.dtype} of {tuple(token_ids.shape)}"
            )
        vectors = self.backbone.embed(token_ids[:, None], "token_ids")[:, 0]
        return self._logits(self.backbone.step(vectors, inference_params))

    @torch.no_grad()
    def advance(self, token_ids: Tensor, states: States) -> tuple[Tensor, States]:
        """`step` as a function, for torch.compile and torch.export: ids (b,) and states to logits and new states.

        states: `backbone.new_states(b)`, or the `key_value_memory_dict` that a prompt has filled.
        """
        x, states = self.backbone.advance(self.backbone.embeddings(token_ids), states)
        return self._logits(x), states

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int = 50,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        eos_token_id: int | Sequence[int] | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool = True,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue prompts (b, l): ids (b, l + new), new <= max_new_tokens.

        temperature 0 takes the likeliest token; else one is drawn from softmax(logits / temperature), of the `top_k`
        likeliest tokens and then of the fewest likeliest ones that hold `top_p` of the probability. A row that drew
        an id of eos_token_id is filled up with the first of them; the result is shorter when all rows did.
        attention_mask (b, l): padded prompts. use_cache=False reads the whole text anew for every token: the same ids,
        slowly.
        """
        settings = (max_new_tokens, temperature, top_k, top_p, eos_token_id, attention_mask, use_cache, generator)
        tokens = list(_generate(self, input_ids, *settings))
        return torch.cat([input_ids, *(token[:, None] for token in tokens)], dim=1)

    def stream(
        self,
        input_ids: Tensor,
        max_new_tokens: int = 50,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        eos_token_id: int | Sequence[int] | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool = True,
        generator: torch.Generator | None = None,
    ) -> Iterator[int | Tensor]:
        """The new tokens of `generate`, each as soon as it is known: an int for one prompt, ids (b,) for several."""
        settings = (max_new_tokens, temperature, top_k, top_p, eos_token_id, attention_mask, use_cache, generator)
        tokens = _generate(self, input_ids, *settings)
        return (token.item() for token in tokens) if input_ids.shape[0] == 1 else tokens

    generate_streaming = stream  # MiniMamba


class MambaForFeatureExtraction(MambaPreTrained):
    """Hidden states (b, l, d_model) from ids (b, l) or vectors (b, l, d_model); vectors alone if vocab_size is None."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = MambaEncoder(config) if config.vocab_size is None else MambaModel(config)

    def forward(self, inputs: Tensor, inference_params: Any = None, *, attention_mask: Tensor | None = None) -> Tensor:
        """The arguments are those of the encoder."""
        return self.backbone(inputs, inference_params, attention_mask=attention_mask)


class MambaForSequenceClassification(MambaPreTrained):
    """A linear classifier (config.num_labels) on the pooled hidden states (config.pooling_strategy)."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = MambaEncoder(config) if config.vocab_size is None else MambaModel(config)
        self.dropout = nn.Dropout(config.dropout)
        self.reset_classifier()

    def reset_classifier(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        """A new classifier, as at the start of training, for config.num_labels; by default where the backbone is."""
        norm = self.backbone.norm_f.weight
        where = {"device": device or norm.device, "dtype": dtype or norm.dtype}
        self.classifier = nn.Linear(self.config.d_model, self.config.num_labels, **where)
        nn.init.normal_(self.classifier.weight, std=self.config.initializer_range)
        nn.init.zeros_(self.classifier.bias)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor | dict[str, Tensor]:
        """Logits (b, num_labels), float32, from ids (b, l) or vectors (b, l, d_model).

        attention_mask: (b, l) of 0 and 1; padding on the left or on the right takes no part.
        labels: (b,) classes, or numbers where num_labels is 1. Then the result is a dict of "loss" (mean cross entropy,
            or mean squared error) and "logits".
        """
        hidden = self.backbone(input_ids, attention_mask=attention_mask)
        pooled = _pool(hidden, attention_mask, self.config.pooling_strategy)
        logits = self.classifier(self.dropout(pooled))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if labels is None:
            return logits
        if labels.shape != logits.shape[:1]:
            raise ValueError(f"labels must have shape {tuple(logits.shape[:1])}, got {tuple(labels.shape)}")
        if self.config.num_labels == 1:
            return {"loss": F.mse_loss(logits[:, 0], labels.to(logits.dtype)), "logits": logits}
        _check_ids("labels", labels, self.config.num_labels)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def _pool(hidden: Tensor, attention_mask: Tensor | None, strategy: str) -> Tensor:
    """The last, the mean or the largest of each row's real hidden states (b, l, d_model): (b, d_model)."""
    real = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    real = real if attention_mask is None else attention_mask.bool()
    if not torch.compiler.is_compiling() and not real.any(1).all():
        raise ValueError("input_ids must have at least one real token in every row to pool over, got a row of none")
    if strategy == "last":
        position = torch.arange(hidden.shape[1], device=hidden.device)
        return hidden[torch.arange(len(hidden), device=hidden.device), (position * real).argmax(1)]
    if strategy == "mean":
        sums = hidden.masked_fill(~real[..., None], 0).sum(1, dtype=torch.promote_types(hidden.dtype, torch.float32))
        return (sums / real.sum(1, keepdim=True)).to(hidden.dtype)
    return hidden.masked_fill(~real[..., None], -math.inf).amax(1)


# The names of the projects whose users this file should feel like home to.
MambaLMConfig = MambaClassificationConfig = MambaConfig  # MiniMamba
S6 = MambaMixer  # MiniMamba
MambaLMHeadModel = MambaForCausalLM  # state-spaces/mamba


class Mamba(MambaForCausalLM):
    """MiniMamba's: a language model from a config, or from the fields of one, vocab_size among them."""

    def __init__(self, config: MambaConfig | None = None, **fields: Any) -> None:
        if (config is None) != ("vocab_size" in fields) or (config is not None and fields):
            got = f"{type(config).__name__} and {', '.join(fields) or 'no fields'}"
            raise TypeError(f"Mamba needs a config, or fields with vocab_size (the layer is MambaMixer), got {got}")
        super().__init__(MambaConfig(**fields) if config is None else config)


# ----------------------------------------------------------------------------------------------------------------------
# 6. Checkpoints
# ----------------------------------------------------------------------------------------------------------------------

WEIGHT_FILES = (
    "model.safetensors",  # transformers may leave the index of an older checkpoint beside it
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def _checkpoint_file(name: str | os.PathLike, filename: str) -> Path | None:
    """The path of a checkpoint's file, fetched from the hub unless `name` is a directory; None if there is none."""
    if Path(name).is_dir():
        path = Path(name) / filename
        return path if path.exists() else None
    if "/" not in str(name):
        raise OSError(f"can't load {str(name)!r}: no such directory, and no name of the form owner/model")
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(str(name), filename))
    except EntryNotFoundError as error:
        if not isinstance(error, LocalEntryNotFoundError):
            return None
        if try_to_load_from_cache(str(name), filename) is _CACHED_NO_EXIST:  # the hub said so when it was reached
            return None
        reason = "no such directory, the model hub can't be reached, and its cache has no copy"
    except HFValidationError:
        reason = "no such directory, and no name of the form owner/model"
    except OSError as error:  # an HTTP error, offline mode
        reason = str(error).strip().splitlines()[0]
    raise OSError(f"can't load {str(name)!r}: {reason}")


def _read_json(path: Path) -> dict[str, Any]:
    """JSON with infinity as `Infinity` or as transformers 5 writes it, {"__float__": "Infinity"}."""
    try:
        return json.loads(
            path.read_text(), object_hook=lambda d: float(d["__float__"]) if d.keys() == {"__float__"} else d
        )
    except ValueError as error:  # not JSON, or no text at all
        raise ValueError(f"can't read {path}: {error}") from None


def _read_config(name: str | os.PathLike) -> dict[str, Any]:
    path = _checkpoint_file(name, "config.json")
    if path is None:
        raise OSError(f"can't load {str(name)!r}: it has no config.json")
    stored = _read_json(path)
    with contextlib.suppress(Exception):  # nothing wrong with this second file may stop the loading
        if "model_type" in stored and stored.get("eos_token_id") is None:
            eos = _read_json(_checkpoint_file(name, "generation_config.json"))["eos_token_id"]
            stored |= {"eos_token_id": eos} if _are_ids(eos) else {}
    return stored


def _stored_tensors(name: str | os.PathLike) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint one after the other, as views of mapped files: nothing is read before it is used."""
    for filename in WEIGHT_FILES:
        if (path := _checkpoint_file(name, filename)) is not None:
            break
    else:
        raise OSError(f"can't load {str(name)!r}: it has none of {', '.join(WEIGHT_FILES)}")
    files = [filename]
    if filename.endswith(".index.json"):
        files = sorted(set(_read_json(path)["weight_map"].values()))
    for filename in files:
        if (path := _checkpoint_file(name, filename)) is None:
            raise OSError(f"can't load {str(name)!r}: its index names {filename}, which is missing")
        if filename.endswith(".safetensors"):
            from safetensors import SafetensorError, safe_open

            try:
                file = safe_open(path, "pt")
            except SafetensorError as error:
                raise OSError(f"can't load {str(name)!r}: {filename}: {error}") from None
            with file:
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    yield key, file.get_tensor(key)
        else:
            mmap = zipfile.is_zipfile(path)  # torch before 1.6 wrote no zip files
            yield from torch.load(path, map_location="cpu", mmap=mmap, weights_only=True).items()


HEADS = {"lm_head.weight", "classifier.weight", "classifier.bias"}


def _load_weights(model: MambaPreTrained, name: str | os.PathLike, device: Any, dtype: torch.dtype | None) -> None:
    """Give a model on the meta device the weights of a checkpoint, converted one at a time."""
    wanted = dict(model.named_parameters())
    inside, tied = hasattr(model, "backbone"), hasattr(model, "lm_head") and "lm_head.weight" not in wanted
    found, unexpected, misshapen, head = set(), [], [], None

    def take(key: str, tensor: Tensor) -> None:
        found.add(key)
        if tensor.shape == (shape := model.get_parameter(key).shape):
            _set_parameter(model, key, tensor.to(device, dtype, copy=True))
        else:
            misshapen.append(f"{key} {tuple(tensor.shape)} for {tuple(shape)}")

    for key, tensor in _stored_tensors(name):
        key = key.replace("backbone.embedding.", "backbone.embeddings.")
        if not inside:
            key = key.removeprefix("backbone.")
        elif f"backbone.{key}" in wanted:  # the checkpoint of a model without a head
            key = f"backbone.{key}"
        if key in wanted:
            take(key, tensor)
        elif key == "lm_head.weight" and tied:
            head = tensor
        elif key not in HEADS:  # a head that this model lacks is left out
            unexpected.append(key)
    if head is not None and "backbone.embeddings.weight" not in found:
        take("backbone.embeddings.weight", head)
    elif head is not None and not misshapen:
        table = model.backbone.embeddings.weight
        if not (table.is_meta or torch.equal(head.to(table), table)):
            model.config.tie_embeddings = False  # the config is wrong; transformers, too, believes the tensors
            take("lm_head.weight", head)
    new = {"classifier.weight", "classifier.bias"} & wanted.keys()
    if new and not new & found:  # a language model's checkpoint
        model.reset_classifier(device, dtype)
        found |= new
    missing = sorted(wanted.keys() - found)
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    if any(problems.values()):
        found = "; ".join(f"{what}: {_some(keys)}" for what, keys in problems.items() if keys)
        raise ValueError(f"the tensors of {str(name)!r} do not fit {type(model).__name__}: {found}")
    if hasattr(model, "tie_weights"):
        model.tie_weights()


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _set_parameter(model: nn.Module, key: str, tensor: Tensor) -> None:
    owner, _, leaf = key.rpartition(".")
    owner = model.get_submodule(owner)
    parameter = nn.Parameter(tensor)
    parameter.__dict__.update(getattr(owner, leaf).__dict__)  # _no_weight_decay
    setattr(owner, leaf, parameter)


WRAPPERS = re.compile(r"\b(_orig_mod|_checkpoint_wrapped_module)\.")  # torch.compile's, activation checkpointing's


def _save(model: MambaPreTrained, directory: Path) -> None:
    from huggingface_hub import save_torch_state_dict

    config = model.config
    tensors = {WRAPPERS.sub("", name): value.detach() for name, value in model.named_parameters()}
    architecture = type(model).__name__
    if isinstance(model, MambaForCausalLM):  # subclasses too, whose names no other library knows
        architecture = config.architecture
        config = replace(config, tie_embeddings=model._tied)
    wanted = {}
    with contextlib.suppress(Exception), torch.device("meta"):  # a subclass may need more than a config
        wanted = dict(type(model)(config).named_parameters())
    if missing := sorted(wanted.keys() - tensors.keys()):
        what = "(wrapped, parametrized or shared with another): nothing could load what is left"
        raise ValueError(f"can't store {type(model).__name__}: it has no tensor {_some(missing)} {what}")
    stored = {"architectures": [architecture], **config.to_checkpoint()}
    if len(types := {tensor.dtype for tensor in tensors.values()}) == 1:
        stored["dtype"] = str(*types).removeprefix("torch.")
    text = json.dumps(stored, indent=2) + "\n"
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as beside:
        new, old = Path(beside, "new"), Path(beside, "old")
        new.mkdir(), old.mkdir()
        save_torch_state_dict(tensors, new, metadata={"format": "pt"})
        (new / "config.json").write_text(text)
        for path in new.iterdir():
            path.chmod(0o644)
        _swap(directory, new, old)


def _swap(directory: Path, new: Path, old: Path) -> None:
    """Move a directory's checkpoint to `old` and the one in `new` to its place; after an error all is as it was."""
    patterns = ("config.json", *WEIGHT_FILES, "model-?????-of-?????.safetensors", "pytorch_model-?????-of-?????.bin")
    outdated = [path.name for pattern in patterns for path in directory.glob(pattern)]
    moved = []
    try:
        for source, target, names in ((directory, old, outdated), (new, directory, os.listdir(new))):
            for name in names:
                os.replace(source / name, target / name)
                moved.append((source / name, target / name))
    except BaseException:
        for source, target in reversed(moved):
            os.rename(target, source)
        raise


# ----------------------------------------------------------------------------------------------------------------------
# 7. Generation
# ----------------------------------------------------------------------------------------------------------------------

PROMPT_SEGMENT = 512  # tokens (of all rows together) of a prompt read at once: bounds the memory that a prompt takes


def _generate(
    model: MambaForCausalLM,
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    eos_token_id: int | Sequence[int] | None,
    attention_mask: Tensor | None,
    use_cache: bool,
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    """Check the settings of `generate`, then return an iterator over its new tokens, (b,) each."""
    if input_ids.ndim != 2 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids must have shape (b, l) with l > 0, got {tuple(input_ids.shape)}")
    if type(max_new_tokens) is not int or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be an integer, 0 or greater, got {max_new_tokens!r}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 (greedy) or greater, got {temperature!r}")
    if top_k is not None and (type(top_k) is not int or top_k < 1):
        raise ValueError(f"top_k must be None or a positive integer, got {top_k!r}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p!r}")
    if attention_mask is not None:
        _, lengths = _padding(attention_mask, input_ids.shape)
        if lengths is not None and not lengths.all():
            raise ValueError("attention_mask must leave at least one real token in every row")
    if not _are_ids(eos_token_id):
        raise ValueError(f"eos_token_id must be None, an integer or a list of them, got {eos_token_id!r}")
    eos = [eos_token_id] if type(eos_token_id) is int else list(eos_token_id or [])
    sampling = (temperature, top_k, top_p, generator)
    return _tokens(model, input_ids, max_new_tokens, sampling, eos, attention_mask, use_cache)


@torch.no_grad()
def _tokens(
    model: MambaForCausalLM,
    input_ids: Tensor,
    max_new_tokens: int,
    sampling: tuple,
    eos: list[int],
    attention_mask: Tensor | None,
    use_cache: bool,
) -> Iterator[Tensor]:
    if attention_mask is not None and not use_cache:  # tokens can be appended to prompts that end with a real one
        left, lengths = _padding(attention_mask, input_ids.shape)
        if left is not None:
            right = input_ids.shape[1] - left - lengths
            input_ids, attention_mask = (_roll(v[..., None], -right)[..., 0] for v in (input_ids, attention_mask))
    cache, token, hooked = InferenceParams(), None, _hooked(model.backbone)
    finished = torch.zeros_like(input_ids[:, 0], dtype=torch.bool)
    for _ in range(max_new_tokens):
        if token is None:
            logits = _read_prompt(model, input_ids, cache, attention_mask)
        elif use_cache and hooked:
            logits = model.step(token, cache)
        elif use_cache:
            logits, cache.key_value_memory_dict = model.advance(token, cache.key_value_memory_dict)
        else:
            input_ids = torch.cat([input_ids, token[:, None]], dim=1)
            attention_mask = None if attention_mask is None else F.pad(attention_mask, (0, 1), value=1)
            logits = _read_prompt(model, input_ids, InferenceParams(), attention_mask)
        token = sample(logits[:, : model.config.vocab_size], *sampling)
        if eos:
            token = token.masked_fill(finished, eos[0])
            finished |= torch.isin(token, torch.tensor(eos, device=token.device))
        yield token
        if eos and finished.all():
            return


def _read_prompt(model: MambaForCausalLM, ids: Tensor, cache: InferenceParams, mask: Tensor | None) -> Tensor:
    """Logits (b, padded_vocab_size) after each row's last real token; a long prompt is read piece by piece."""
    b, l = ids.shape
    size = max(1, PROMPT_SEGMENT // max(1, b))
    for start in range(0, l, size):
        piece = None if mask is None else mask[:, start : start + size]
        hidden = model.backbone(ids[:, start : start + size], cache, attention_mask=piece)
        if piece is None:
            last = hidden[:, -1]
            continue
        position = torch.arange(hidden.shape[1], device=ids.device)
        newest = hidden[torch.arange(b, device=ids.device), (position * piece.long()).argmax(1)]  # (b, d_model)
        last = newest if start == 0 else torch.where(piece.any(1)[:, None], newest, last)
    return model._logits(last)


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a token for each row of logits (b, v): ids (b,). The settings are those of `generate`."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits - logits.amax(-1, keepdim=True)  # the largest is 0, which no temperature makes infinite
    logits = logits / max(temperature, torch.finfo(logits.dtype).tiny)
    probs = F.softmax(filter_logits(logits, top_k, top_p), dim=-1)
    return torch.multinomial(probs, 1, generator=generator).squeeze(1)


def filter_logits(logits: Tensor, top_k: int | None = None, top_p: float = 1.0) -> Tensor:
    """Set to -inf all logits (b, v) but the top_k largest, then all but the fewest that hold top_p of the probability.

    The same tokens are kept as by transformers' TopKLogitsWarper and TopPLogitsWarper.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if top_p < 1:
        ascending, index = logits.sort(dim=-1)
        removed = F.softmax(ascending, dim=-1).cumsum(-1) <= 1 - top_p
        removed[:, -1] = False
        logits = logits.masked_fill(removed.scatter(1, index, removed), -math.inf)
    return logits


# ----------------------------------------------------------------------------------------------------------------------
# 8. Command line
# ----------------------------------------------------------------------------------------------------------------------


def _load_tokenizer(name: str | os.PathLike) -> Any:
    """The checkpoint's tokenizer; state-spaces' checkpoints have none and use GPT-NeoX's."""
    from tokenizers import Tokenizer

    path = _checkpoint_file(name, "tokenizer.json")
    if path is None and "model_type" in _read_config(name):
        raise OSError(f"can't load {str(name)!r}: it has no tokenizer.json")
    path = path or _checkpoint_file("EleutherAI/gpt-neox-20b", "tokenizer.json")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers has no class of its own for it
        raise OSError(f"can't read {path}: {error}") from None


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Continue a text with a Mamba language model.")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")  # one line, no usage
    parser.add_argument("prompt", nargs="?", help="the text to continue; read from standard input when piped")
    parser.add_argument("--model", default=str(DEFAULT_CHECKPOINT), help="a directory or a name on the model hub")
    parser.add_argument("--max-new-tokens", type=int, default=500)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=None)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=None, help="the same seed gives the same text")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    types = ["auto", "float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", choices=types, default="auto", help="auto: float32 on a CPU, else the stored type")
    arguments = parser.parse_args(argv)
    try:
        if arguments.prompt is None and sys.stdin and not sys.stdin.isatty():
            arguments.prompt = sys.stdin.read()
        (arguments.prompt or "").encode()
    except UnicodeError:
        parser.error("the prompt must be UTF-8 text")
    if not arguments.prompt:
        parser.error("no prompt: give one as an argument or on standard input")
    if arguments.model == str(DEFAULT_CHECKPOINT) and not DEFAULT_CHECKPOINT.is_dir():
        parser.error(f"no checkpoint in {DEFAULT_CHECKPOINT}: give --model, a directory or a name on the model hub")
    if arguments.seed is not None and not 0 <= arguments.seed < 2**64:
        parser.error(f"--seed must be in [0, 2^64), got {arguments.seed}")
    devices = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if arguments.device == "auto":
        arguments.device = next(device for device, available in devices.items() if available)
    if not devices[arguments.device]:
        parser.error(f"--device {arguments.device}: torch finds no such device here")
    if arguments.dtype == "auto":
        arguments.dtype = "float32" if arguments.device == "cpu" else None
    return arguments


def _run(arguments: argparse.Namespace) -> None:
    """Stream the continuation to standard output and a summary to standard error."""
    from huggingface_hub.utils import logging
    from tokenizers.decoders import DecodeStream

    logging.set_verbosity_error()  # an unreachable hub ends in one line
    dtype = arguments.dtype and getattr(torch, arguments.dtype)
    model = MambaForCausalLM.from_pretrained(arguments.model, device=arguments.device, dtype=dtype)
    tokenizer = _load_tokenizer(arguments.model)
    prompt = tokenizer.encode(arguments.prompt).ids
    generator = torch.Generator(arguments.device)
    generator.seed() if arguments.seed is None else generator.manual_seed(arguments.seed)
    tokens = model.stream(
        torch.tensor([prompt], device=arguments.device),
        arguments.max_new_tokens,
        arguments.temperature,
        arguments.top_k,
        arguments.top_p,
        model.config.eos_token_id,
        generator=generator,
    )
    print(arguments.prompt, end="", flush=True)
    decoder = DecodeStream(skip_special_tokens=True)
    times = [time.perf_counter()]
    try:
        for token in tokens:
            print(decoder.step(tokenizer, token) or "", end="", flush=True)
            times.append(time.perf_counter())
    finally:
        print(flush=True)
        _print_summary(model, len(prompt), times)


def _print_summary(model: MambaForCausalLM, prompt_length: int, times: list[float]) -> None:
    weight = model.lm_head.weight
    count = sum(parameter.numel() for parameter in model.parameters())
    summary = f"{weight.device.type}, {str(weight.dtype).removeprefix('torch.')}, {count / 1e6:.1f}M parameters"
    if len(times) > 1:
        summary += f"; prompt {prompt_length} tokens, {prompt_length / (times[1] - times[0]):.0f} tokens/s"
    if len(times) > 2:
        summary += f"; generated {len(times) - 1} tokens, {(len(times) - 2) / (times[-1] - times[1]):.0f} tokens/s"
    print(summary, file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    try:
        _run(_parse_arguments(argv))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of the output, `head` say, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (OSError, ValueError, RuntimeError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
