"""Tests of mamba.py, mamba2.py and mamba3.py, each against a source that is not ours: recurrences written out below in
float64, transformers' classes, finite differences, or the same model fed in another way.

    pytest                  what runs everywhere: no network, no GPU, nothing outside this directory
    pytest -m slow -n 0     what takes minutes: long texts, long compilations
    pytest -m hub           published weights, from the model hub

    HYPOTHESIS_PROFILE=long python -m pytest -k random      thousands of random models, in place of some fixed fifty

Letters in shapes: b batch, l length, e channels, n state size, h heads, p head width, g groups.
"""

import ast
import base64
import concurrent.futures
import contextlib
import copy
import csv
import functools
import gc
import importlib.metadata
import inspect
import io
import itertools
import json
import math
import os
import pickle
import re
import runpy
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import Mock

import huggingface_hub
import hypothesis
import hypothesis.strategies as st
import nbformat
import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchgen
import transformers
import yaml
from nbclient import NotebookClient
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.functional import hvp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import mamba
import mamba2
import mamba3

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)  # the tensors are tiny: a second thread only costs, and tenfold where the cores are busy

ROOT = Path(__file__).resolve().parent

PRESENT = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
DEVICES = ["cpu", *(pytest.param(name, marks=pytest.mark.gpu) for name, present in PRESENT.items() if present)]
on_each_device = pytest.mark.parametrize("device", DEVICES)
on_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
with_fsdp = pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 needs a GPU here")
on_posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork, and no signal that kills")

# Sources of truth: the recurrences, and the whole model around them, in plain loops -----------------------------------


def scan_by_definition(u, dt, A, B, C, state=None):
    """h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t and y_t = C_t . h_t. u, dt (b, l, e), A (e, n), B, C (b, l, n)."""
    ys, h = [u[:, :0]], u.new_zeros(u.shape[0], *A.shape) if state is None else state  # (b, e, n)
    for u_t, dt_t, B_t, C_t in zip(u.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), strict=True):
        h = torch.exp(dt_t[..., None] * A) * h + (dt_t * u_t)[..., None] * B_t[:, None]
        ys.append((h @ C_t[..., None]).mT)
    return torch.cat(ys, dim=1), h


def ssd_by_definition(x, dt, A, B, C, state=None):
    """The same recurrence with one decay per head. x (b, l, h, p), dt (b, l, h), A (h,), B, C (b, l, g, n)."""
    B, C = (M.repeat_interleave(x.shape[2] // M.shape[2], dim=2) for M in (B, C))  # (b, l, h, n)
    h = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[-1]) if state is None else state  # (b, h, p, n)
    ys = [x[:, :0]]
    for x_t, dt_t, B_t, C_t in zip(x.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), strict=True):
        h = torch.exp(dt_t * A)[..., None, None] * h + (dt_t[..., None] * x_t)[..., None] * B_t[:, :, None]
        ys.append((h @ C_t[..., None]).squeeze(-1)[:, None])
    return torch.cat(ys, dim=1), h


def trapezoid_by_definition(v, dt, lam, A, k, q, state, last):
    """Mamba-3's recurrence, element by element: v (b, h, l, r, p), dt, lam, A (b, h, l), k, q (b, h, l, r, n)."""
    ys = [v[:, :, :0]]
    for t in range(v.shape[2]):
        alpha, now = torch.exp(dt[:, :, t] * A[:, :, t]), torch.einsum("bhrp,bhrn->bhpn", v[:, :, t], k[:, :, t])
        beta, gamma = (1 - lam[:, :, t]) * dt[:, :, t] * alpha, lam[:, :, t] * dt[:, :, t]
        alpha, beta, gamma = (w[..., None, None] for w in (alpha, beta, gamma))
        state, last = alpha * state + beta * last + gamma * now, now
        ys.append(torch.einsum("bhpn,bhrn->bhrp", state, q[:, :, t])[:, :, None])
    return torch.cat(ys, dim=2), state


def rms_norm_by_definition(x, eps, groups=1):
    x = x.unflatten(-1, (groups, -1))
    return (x / (x.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2)


def convolution_by_definition(x, weight, bias):
    """Causal and depthwise, then SiLU. x (b, l, channels), weight (channels, 1, width)."""
    padded = F.pad(x, (0, 0, (width := weight.shape[-1]) - 1, 0))
    out = sum(padded[:, i : i + x.shape[1]] * weight[:, 0, i] for i in range(width))
    return F.silu(out if bias is None else out + bias)


def mamba_mixer_by_definition(x, w, c):
    """Figure 3 of the Mamba paper; w holds the weights by name."""
    u, z = F.linear(x, w["in_proj.weight"], w.get("in_proj.bias")).chunk(2, dim=-1)
    u = convolution_by_definition(u, w["conv1d.weight"], w.get("conv1d.bias"))
    dt, B, C = F.linear(u, w["x_proj.weight"]).split([c.dt_rank, c.d_state, c.d_state], dim=-1)
    if c.mixer_rms_eps is not None:
        dt, B, C = (rms_norm_by_definition(v, c.mixer_rms_eps) for v in (dt, B, C))
    dt = F.softplus(F.linear(dt, w["dt_proj.weight"], w["dt_proj.bias"]))
    y, _ = scan_by_definition(u, dt, -w["A_log"].exp(), B, C)
    return F.linear((y + w["D"] * u) * F.silu(z), w["out_proj.weight"], w.get("out_proj.bias"))


def mamba2_mixer_by_definition(x, w, c):
    """The block figure of the Mamba-2 paper."""
    e, g, n, h = c.d_inner, c.ngroups, c.d_state, c.nheads
    zxBCdt = F.linear(x, w["in_proj.weight"], w.get("in_proj.bias"))
    z, xBC, dt = zxBCdt.split([e, e + 2 * g * n, h], dim=-1)
    xBC = convolution_by_definition(xBC, w["conv1d.weight"], w.get("conv1d.bias"))
    x, B, C = xBC.split([e, g * n, g * n], dim=-1)
    x, B, C = x.unflatten(-1, (h, -1)), B.unflatten(-1, (g, -1)), C.unflatten(-1, (g, -1))
    dt = F.softplus(dt + w["dt_bias"]).clamp(*c.dt_limit)
    y, _ = ssd_by_definition(x, dt, -w["A_log"].exp(), B, C)
    y = (y + w["D"][:, None] * x).flatten(-2) * F.silu(z)
    y = rms_norm_by_definition(y, c.norm_epsilon, groups=g) * w["norm.weight"]
    return F.linear(y, w["out_proj.weight"], w.get("out_proj.bias"))


def mamba3_mixer_by_definition(x, w, c):
    """The steps of the layer; pairs of entries are turned as complex numbers, in radians."""
    e, h, p, n, g, r = c.d_inner, c.nheads, c.headdim, c.d_state, c.ngroups, c.mimo_rank if c.is_mimo else 1
    s, zeros, ones = int(n * c.rope_fraction) // 2, x.new_zeros(len(x), h, p, n), x.new_ones(h, r, p)
    sizes = [e, e, n * g * r, n * g * r, h, h, h, s]
    z, x, B, C, dt, A, lam, theta = F.linear(x, w["in_proj.weight"]).split(sizes, dim=-1)
    dt, lam = F.softplus(dt + w["dt_bias"]), torch.sigmoid(lam)
    rate = F.softplus(A) if c.A_activation == "softplus" else torch.where(A >= 0, 1 + A, 1 / (1 - A))
    dt, lam, A = (v.mT for v in (dt, lam, -rate.clamp(min=c.A_floor)))  # (b, h, l)
    phi = (math.pi * torch.tanh(theta)[:, None] * dt[..., None]).cumsum(2)[..., None, :]  # (b, h, l, 1, s)

    def turned(B, norm, bias):
        B = rms_norm_by_definition(B.unflatten(-1, (r, g, n)), 1e-5) * w[norm]
        B = B.permute(0, 3, 1, 2, 4).repeat_interleave(h // g, dim=1) + w[bias][:, None]  # (b, h, l, r, n)
        pairs = B.unflatten(-1, (2, n // 2)).mT if c.is_mimo else B.unflatten(-1, (n // 2, 2))
        u = torch.complex(pairs[..., 0], pairs[..., 1])
        u = torch.cat([u[..., :s] * torch.polar(torch.ones_like(phi), phi), u[..., s:]], dim=-1)
        return torch.view_as_real(u).flatten(-2)  # in the order of pairs: no product of k and q changes

    k, q = turned(B, "B_norm.weight", "B_bias"), turned(C, "C_norm.weight", "C_bias")
    z, v = (u.unflatten(-1, (h, 1, p)).transpose(1, 2) for u in (z, x))  # (b, h, l, 1, p)
    z, v = z * w.get("mimo_z", ones)[:, None], v * w.get("mimo_x", ones)[:, None]  # (b, h, l, r, p)
    o = trapezoid_by_definition(v, dt, lam, A, k, q, zeros, zeros)[0] + w["D"][:, None, None, None] * v
    if c.is_outproj_norm:
        o = rms_norm_by_definition(o, 1e-5) * w["norm.weight"].view(h, 1, 1, p)
    o = (o * F.silu(z) * w.get("mimo_o", ones)[:, None]).sum(3)  # (b, h, l, p)
    return F.linear(o.transpose(1, 2).flatten(2), w["out_proj.weight"])


MIXERS = dict(mamba=mamba_mixer_by_definition, mamba2=mamba2_mixer_by_definition, mamba3=mamba3_mixer_by_definition)


@torch.no_grad()
def logits_by_definition(model, input_ids):
    """Logits (b, l, vocabulary) of ids (b, l), computed here in float64 from the weights and settings of a model."""
    c, weights = model.config, {name: w.double() for name, w in model.state_dict().items()}
    x = weights["backbone.embeddings.weight"][input_ids]
    for i in range(c.n_layer):
        w = {k.removeprefix(f"backbone.layers.{i}."): v for k, v in weights.items() if f".layers.{i}." in k}
        of_mixer = {k.removeprefix("mixer."): v for k, v in w.items()}
        u = rms_norm_by_definition(x, c.norm_epsilon) * w["norm.weight"]
        x = x + MIXERS[type(model).__module__](u, of_mixer, c)
        if "mlp.fc1.weight" in w:
            u = rms_norm_by_definition(x, c.norm_epsilon) * w["norm2.weight"]
            u, gate = F.linear(u, w["mlp.fc1.weight"]).chunk(2, dim=-1)
            x = x + F.linear(u * F.silu(gate), w["mlp.fc2.weight"])
    x = rms_norm_by_definition(x, c.norm_epsilon) * weights["backbone.norm_f.weight"]
    return F.linear(x, weights.get("lm_head.weight", weights["backbone.embeddings.weight"]))


# The files, and models to compare: odd settings, weights far from their initialisation --------------------------------


def scan_inputs(b, length, e, n, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    u, dt = torch.randn(b, length, e, generator=g), F.softplus(2 * torch.randn(b, length, e, generator=g) - 1)
    A = -torch.exp(torch.randn(e, n, generator=g))
    B, C = torch.randn(2, b, length, n, generator=g)
    return [t.to(dtype) for t in (u, dt, A, B, C, torch.randn(b, e, n, generator=g))]


def ssd_inputs(b, length, h, p, g, n, dtype=torch.float64, seed=0):
    r = torch.Generator().manual_seed(seed)
    x, dt = torch.randn(b, length, h, p, generator=r), F.softplus(2 * torch.randn(b, length, h, generator=r) - 1)
    A = -torch.exp(torch.randn(h, generator=r))
    B, C = torch.randn(2, b, length, g, n, generator=r)
    return [t.to(dtype) for t in (x, dt, A, B, C, torch.randn(b, h, p, n, generator=r))]


def trapezoid_inputs(b, length, h, p, r, n, dtype=torch.float64, seed=0):
    g, rows = torch.Generator().manual_seed(seed), (b, h, length)
    v, lam = torch.randn(*rows, r, p, generator=g), torch.rand(rows, generator=g)
    dt, A = F.softplus(2 * torch.randn(rows, generator=g) - 1), -torch.exp(torch.randn(rows, generator=g))
    k, q = torch.randn(2, *rows, r, n, generator=g)
    state, last = torch.randn(2, b, h, p, n, generator=g)
    return [t.to(dtype) for t in (v, dt, lam, A, k, q, state, last)]


def names(module, prefix, tiny, dt_bias, heart, definition, inputs, *sizes):
    """What the files have in common, by the same names; with their scan or SSD, its definition and inputs for both."""
    parts = dict(Config="Config", Mixer="Mixer", Block="Block", Encoder="Encoder", LM="ForCausalLM")
    parts = {name: getattr(module, prefix + part) for name, part in parts.items()}
    parts |= dict(new=module.InferenceParams, tiny=tiny, dt_bias=dt_bias, heart=heart, definition=definition)
    parts["inputs"] = lambda length, dtype=torch.float64: inputs(2, length, *sizes, dtype)
    return SimpleNamespace(name=module.__name__, module=module, **parts)


HEARTS = {
    "mamba": ("dt_proj.bias", mamba.selective_scan, scan_by_definition, scan_inputs, 4, 3),
    "mamba2": ("dt_bias", mamba2.ssd, ssd_by_definition, ssd_inputs, 4, 3, 2, 5),
    "mamba3": ("dt_bias", mamba3.trapezoid_scan, trapezoid_by_definition, trapezoid_inputs, 4, 3, 2, 5),
}
FILES = {
    "mamba": names(mamba, "Mamba", dict(d_state=8), *HEARTS["mamba"]),
    "mamba2": names(mamba2, "Mamba2", dict(d_state=8, headdim=8, chunk_size=16), *HEARTS["mamba2"]),
    "mamba3": names(mamba3, "Mamba3", dict(d_state=8, headdim=8, chunk_size=16), *HEARTS["mamba3"]),
}


CONVOLUTIONAL = ("bias", "d_conv", "conv_bias")  # settings that mamba3.py doesn't have; `tiny` leaves them out there
FIRST = ("mamba", "mamba2")  # the files with a convolution, and with transformers' format


@pytest.fixture(params=FILES)
def file(request):
    """One of the files, by the names that they have in common."""
    return FILES[request.param]


@pytest.fixture(params=FIRST)
def first_file(request):
    """mamba.py or mamba2.py."""
    return FILES[request.param]


TRANSFORMERS = {
    "mamba": (transformers.MambaConfig, transformers.MambaForCausalLM),
    "falcon_mamba": (transformers.FalconMambaConfig, transformers.FalconMambaForCausalLM),
    "mamba2": (transformers.Mamba2Config, transformers.Mamba2ForCausalLM),
}

UNTIED, ONE, EPSILON = dict(tie_word_embeddings=False), dict(num_hidden_layers=1), dict(layer_norm_epsilon=0.5)
LIMITED, WIDE = dict(time_step_limit=(0.01, 0.5)), dict(expand=16, intermediate_size=128, time_step_rank=5)


def heads(n, width, groups, chunk, **more):
    return "mamba2", dict(num_heads=n, head_dim=width, n_groups=groups, chunk_size=chunk) | more


ODD_SETTINGS = {
    "mamba": ("mamba", dict()),
    "mamba expand 1, conv 2": ("mamba", UNTIED | dict(expand=1, conv_kernel=2, use_bias=True, use_conv_bias=False)),
    "mamba expand 3, conv 3": ("mamba", dict(expand=3, conv_kernel=3, use_bias=True, state_size=7)),
    "mamba expand 16": ("mamba", WIDE | UNTIED | EPSILON),
    # One layer: FalconMamba's norms of dt, B and C enlarge rounding; with two layers and noise 0.1 transformers itself
    # is up to 6e-6 of the largest logit away from float64.
    "falcon_mamba": ("falcon_mamba", ONE | EPSILON),
    "falcon_mamba expand 16": ("falcon_mamba", WIDE | ONE | dict(conv_kernel=3, use_bias=True, mixer_rms_eps=1e-5)),
    "falcon_mamba deep": ("falcon_mamba", UNTIED),
    "mamba2": heads(4, 32, 1, 64),
    "mamba2 expand 1, conv 2": heads(4, 16, 2, 16, expand=1, conv_kernel=2, use_bias=True, tie_word_embeddings=True),
    "mamba2 expand 3, conv 3": heads(8, 24, 4, 100, expand=3, conv_kernel=3, use_conv_bias=False, **LIMITED),
    "mamba2 chunk 256": heads(8, 16, 4, 256, use_bias=True, time_step_limit=(0.1, math.inf), **EPSILON),
}
SETTINGS = ["mamba expand 3, conv 3", "falcon_mamba expand 16", "mamba2 expand 3, conv 3", "mamba2 chunk 256"]
NOISES, VOCAB = [0.1, 0.3], 99
SPLIT_BOUNDS = {0.1: 5e-6, 0.3: 5e-5}  # Mamba-3's are 20 times as large: its angles are sums over all steps


@torch.no_grad()
def randomise(model, noise, seed=0):
    """Add noise to every parameter and spread the biases of dt over [-4, 2]; the names are the same on both sides."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if name.endswith(("dt_proj.bias", "dt_bias")):
            p.copy_(torch.linspace(-4, 2, p.numel())[torch.randperm(p.numel(), generator=generator)])
        else:
            p.add_(noise * torch.randn(p.shape, generator=generator))
    return model.eval()


def transformers_model(settings, noise, **changes):
    model_type, fields = ODD_SETTINGS[settings]
    config_class, model_class = TRANSFORMERS[model_type]
    sizes = dict(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, state_size=16, initializer_range=0.02)
    torch.manual_seed(0)
    return randomise(model_class(config_class(**sizes | fields | changes)), noise)


def file_for(settings):
    return FILES[name if (name := settings[:6]) in FILES else "mamba"]


@functools.cache
def theirs_for(settings, noise):
    return transformers_model(settings, noise)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """saved(settings, noise): the directory into which transformers saved that model."""

    @functools.cache
    def save(settings, noise):
        directory = tmp_path_factory.mktemp("checkpoint")
        theirs_for(settings, noise).save_pretrained(directory)
        return directory

    return save


@pytest.fixture(scope="session")
def ours_for(saved):
    """ours_for(settings, noise, device): the same model in our class, for reading only."""

    @functools.cache
    def load(settings, noise, device="cpu", dtype=None):
        model = file_for(settings).LM.from_pretrained(saved(settings, noise), device=device, dtype=dtype)
        if settings.startswith("mamba2"):
            model.config.chunk_size = theirs_for(settings, noise).config.chunk_size  # not read from checkpoints
        return model

    return load


def tiny(file, noise=0.1, **changes):
    """A small model of ours whose weights are away from their initialisation."""
    torch.manual_seed(0)
    changes = {k: v for k, v in changes.items() if hasattr(file.Config, k) or k not in CONVOLUTIONAL}
    model = file.LM(file.Config(**dict(d_model=32, n_layer=2, vocab_size=VOCAB) | file.tiny | changes))
    return randomise(model, noise)


def random_ids(batch, length, seed=0, vocab=VOCAB, device="cpu"):
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed)).to(device)


def error(got, exact):
    """The largest difference, as a share of the largest exact value."""
    assert got.shape == exact.shape
    if exact.numel() == 0:
        return 0.0
    exact = exact.detach().double().cpu()
    return ((got.detach().double().cpu() - exact).abs().max() / exact.abs().max().clamp(min=1e-30)).item()


def assert_all_close(got, wanted, bound=1e-12):
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert error(a, b) <= bound, i


def distance(got, exact):
    """The mean over positions of the largest difference there, logits (b, l, vocabulary): the largest of all stems from
    one ill-conditioned position, and differs threefold between two orders of summing the same float32 numbers."""
    assert got.shape == exact.shape
    return (got.double() - exact.double()).abs().amax(-1).mean().item()


@torch.no_grad()
def logits_of(model, input_ids, *args, **kwargs):
    device = next(model.parameters()).device
    return model(input_ids.to(device), *args, **kwargs).cpu()


@torch.no_grad()
def their_logits(theirs, input_ids):
    for layer in theirs.backbone.layers:
        if hasattr(layer.mixer, "chunk_size"):  # they pad any sequence to whole chunks; with zeros, but it takes long
            layer.mixer.chunk_size = max(1, min(theirs.config.chunk_size, input_ids.shape[1]))
    return theirs(input_ids).logits


def states(inference_params):
    """All states of a cache in one list, layer by layer."""
    cache = inference_params.key_value_memory_dict
    return [state for layer in sorted(cache) for state in cache[layer]]


def snapshot(inference_params):
    return [state.clone() for state in states(inference_params)]


def assert_same_states(got, wanted, bound):
    assert len(got) == len(wanted) > 0
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype and error(a, b) <= bound


def padded_batch(lengths, side):
    """Rows of these lengths, padded on a side, or anywhere, with token 7: ids, mask, each row's own ids (1, length)."""
    ids, position, lengths = random_ids(len(lengths), max(lengths)), torch.arange(max(lengths)), torch.tensor(lengths)
    mask = (position < lengths[:, None] if side == "right" else position >= len(position) - lengths[:, None]).long()
    mask = mask[:, torch.randperm(len(position), generator=torch.Generator().manual_seed(0))] if side == "any" else mask
    rows = [row[keep.bool()][None] for row, keep in zip(ids, mask, strict=True)]
    return ids.masked_fill(mask == 0, 7), mask, rows


def leaves_of(values, dtype=None, device=None):
    return [v.to(device, dtype, copy=True).requires_grad_() for v in values]


def gradients(outputs, leaves):
    """Gradients of a fixed weighted sum of some outputs."""
    weights = [torch.cos(torch.arange(v.numel(), device=v.device)).reshape(v.shape).to(v.dtype) for v in outputs]
    total = sum((v * weight).sum() for v, weight in zip(outputs, weights, strict=True))
    return torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True, retain_graph=True)


# The selective scan and SSD -------------------------------------------------------------------------------------------

CASES = [("mamba", "selective_scan_recurrence", scan_inputs(2, l, 5, 3), {}) for l in (0, 1, 13)]
SCANS = [(l, w) for l in (0, 1, 2, 13, 64, 97) for w in (None, 1, 2, 7, 100)]
CASES += [("mamba", "selective_scan", scan_inputs(2, l, 5, 3), {"pieces": w}) for l, w in SCANS]
FORMS = [("ssd_recurrence", 1), ("ssd_recurrence", 4), ("ssd", 1), ("ssd", 4)]
CASES += [("mamba2", form, ssd_inputs(2, l, 4, 3, g, 5), {}) for form, g in FORMS for l in (0, 1, 2, 13, 97)]
CHUNKS = [(l, q) for l in (7, 48, 97) for q in (1, 7, 16, 256)]
CASES += [("mamba2", "ssd", ssd_inputs(2, l, 4, 3, 2, 5), {"chunk_size": q}) for l, q in CHUNKS]
# Beyond one block of rows, of channels, and beyond one segment of chunks.
CASES += [("mamba", "selective_scan", scan_inputs(*sizes), {}) for sizes in ((40, 37, 64, 32), (3, 37, 2048, 16))]
CASES += [("mamba2", "ssd", ssd_inputs(1, 600, 32, 64, 2, 4), {})]
CASES += [("mamba3", "trapezoid_recurrence", trapezoid_inputs(2, l, 3, 4, 2, 5), {}) for l in (0, 1, 9)]
CHUNKS = [(l, r, q) for l, r in ((0, 2), (1, 1), (9, 1), (9, 3), (130, 2)) for q in (1, 4, 64)]
CASES += [("mamba3", "trapezoid_scan", trapezoid_inputs(2, l, 3, 4, r, 5), {"chunk_size": q}) for l, r, q in CHUNKS]


@pytest.mark.parametrize("name, form, inputs, way", CASES)
def test_each_form_cut_in_any_way_has_the_values_and_gradients_of_the_definition(name, form, inputs, way):
    function, inputs = functools.partial(getattr(FILES[name].module, form), **way), leaves_of(inputs)
    if name != "mamba3":  # else from a state of zeros
        assert_all_close(function(*inputs[:5]), FILES[name].definition(*inputs[:5]))
    got, wanted = function(*inputs), FILES[name].definition(*inputs)
    assert_all_close(got, wanted)
    for part in (slice(0, 2), slice(0, 1), slice(1, 2)) if inputs[0].numel() else ():  # both, y alone, the state alone
        assert_all_close(gradients(got[part], inputs), gradients(wanted[part], inputs))


def last_place(dt_A, l):
    """GPUs may round exp by a unit in the last place (CUDA allows two); as long as the state lasts, that adds up."""
    return 2**-24 * min(l, 1 / -math.expm1(dt_A))


@on_each_device
@pytest.mark.parametrize("dt_A", [-(10.0**k) for k in range(-6, 5)])
def test_scan_is_exact_at_any_decay(dt_A, device):
    u, _, _, B, C, _ = scan_inputs(1, 4096, 8, 4, torch.float32)
    inputs = u, torch.full_like(u, 0.125), torch.full((8, 4), dt_A / 0.125), B, C
    exact = scan_by_definition(*(v.double() for v in inputs))[0]

    def channel_error(y):
        return ((y.double().cpu() - exact).abs().amax(1) / exact.abs().amax(1)).max().item()

    plain = channel_error(scan_by_definition(*(v.to(device) for v in inputs))[0])
    bound = 1e-6 if abs(dt_A) >= 1e-2 else 1.5 * plain
    bound = bound if device == "cpu" else max(bound, last_place(dt_A, 4096))
    for pieces in (None, 8):
        assert channel_error(mamba.selective_scan(*(v.to(device) for v in inputs), pieces=pieces)[0]) <= bound


@on_each_device
@pytest.mark.parametrize("dt_A", ["mixed", *(-(10.0**k) for k in range(-6, 5))])
def test_ssd_is_exact_at_any_decay(dt_A, device):
    x, dt, _, B, C, _ = ssd_inputs(1, 1000, 4, 8, 1, 16, torch.float32)
    # Mixed: steps that keep nearly all and steps that forget all, side by side in one chunk.
    mixed = 10 ** (6 * torch.rand(dt.shape, generator=torch.Generator().manual_seed(0)) - 4)
    inputs = [x, mixed if dt_A == "mixed" else torch.full_like(dt, -dt_A), -torch.ones(4), B, C]
    exact, plain = ssd_by_definition(*(v.double() for v in inputs)), ssd_by_definition(*inputs)
    for chunk_size in (16, 64, 256):
        got = mamba2.ssd(*(v.to(device) for v in inputs), chunk_size=chunk_size)
        for g, p, wanted in zip(got, plain, exact, strict=True):
            bound = 1e-6 if dt_A == "mixed" else 2e-6 if dt_A <= -1e-2 else max(1e-6, 1.5 * error(p, wanted))
            assert error(g, wanted) <= bound


@on_each_device
@pytest.mark.parametrize("name, way", [("mamba", {}), ("mamba", {"pieces": 4}), ("mamba2", {})])
@pytest.mark.parametrize("dt_A", [-16.0, -1.0, -1e-1, -1e-2, -1e-3, -1e-4])
def test_float32_gradients_are_exact_at_any_decay(dt_A, name, way, device):
    x, dt, A, *others = FILES[name].inputs(400, torch.float32)
    inputs, results = [x, torch.full_like(dt, 0.5), torch.full_like(A, dt_A / 0.5), *others], []
    ours, definition = functools.partial(FILES[name].heart, **way), FILES[name].definition
    for function, to in ((definition, "cpu"), (definition, device), (ours, device)):
        leaves = leaves_of(inputs, torch.float64 if not results else torch.float32, to)
        results.append(gradients(function(*leaves), leaves))
    for i, (exact, plain, got) in enumerate(zip(*results, strict=True)):
        bound = max(2e-6 if name == "mamba2" else 1e-6, 1.5 * error(plain, exact))
        assert error(got, exact) <= (bound if device == "cpu" else max(bound, last_place(dt_A, 400))), i


WAYS = [("mamba", {"pieces": w}) for w in (1, 2, 3)] + [("mamba2", {"chunk_size": q}) for q in (3, 4, 16)]


@pytest.mark.parametrize("name, way", WAYS)
def test_derivatives_of_scan_and_ssd_equal_finite_differences(name, way):
    heart = functools.partial(FILES[name].heart, **way)
    if name == "mamba":
        assert gradcheck(heart, leaves_of(scan_inputs(2, 7, 3, 2)))
    else:  # in both modes, and of second order
        assert gradcheck(heart, leaves_of(ssd_inputs(2, 7, 2, 1, 1, 2)), check_forward_ad=True)
        assert gradgradcheck(heart, leaves_of(ssd_inputs(1, 5, 2, 1, 1, 1)))


@pytest.mark.parametrize("argument", range(6))
def test_torch_func_sees_through_ssd_and_is_refused_by_the_scan(file, argument):
    v = (inputs := file.inputs(9))[argument]

    def derivatives(function):
        f = lambda v: function(*inputs[:argument], v, *inputs[argument + 1 :])[0].square().sum()  # noqa: E731
        return lambda: torch.func.jvp(f, (v,), (v,))[1], lambda: torch.func.grad(f)(v), lambda: hvp(f, v, v)[1]

    for ours, exact in zip(derivatives(file.heart), derivatives(file.definition), strict=True):
        if file.name != "mamba":
            assert error(ours(), exact()) <= 1e-12
        else:  # through a custom operator some would be 0 in silence
            with pytest.raises(NotImplementedError, match=r"jvp|reverse mode"):
                ours()


def test_flops_of_ssd_are_those_of_listing_1():
    b, chunks, q, h, p, g, n = 2, 3, 8, 4, 3, 2, 5
    with FlopCounterMode(display=False) as counter:
        mamba2.ssd(*ssd_inputs(b, chunks * q, h, p, g, n), chunk_size=q)
    diagonal, states_and_outputs = g * q * n * q + h * q * q * p, 2 * h * p * q * n
    assert counter.get_total_flops() == 2 * b * chunks * (diagonal + states_and_outputs)


def test_an_initial_state_in_half_precision_goes_on_in_float32(file):
    *inputs, state = file.inputs(40, torch.float32)
    for got, exact in zip(file.heart(*inputs, state.half()), file.heart(*inputs, state.half().float()), strict=True):
        assert got.dtype == torch.float32 and torch.equal(got, exact)


@pytest.mark.parametrize("name, backward_inside", [("mamba", False), ("mamba", True), ("mamba2", False)])
def test_autocast_leaves_scan_and_ssd_in_float32(name, backward_inside):
    inputs, results = FILES[name].inputs(40, torch.float32), []
    for enabled in (True, False):
        leaves = leaves_of(inputs)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs = FILES[name].heart(*leaves)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled and backward_inside):
            results.append([*outputs, *gradients(outputs, leaves)])
    assert all(got.dtype == exact.dtype and torch.equal(got, exact) for got, exact in zip(*results, strict=True))


def test_an_argument_of_scan_or_ssd_that_does_not_fit_is_named(file):
    first, *names = inspect.signature(file.heart).parameters
    inputs = dict(zip([first, *names], file.inputs(6), strict=False))
    inputs |= ({"D": torch.ones(4)} if "D" in names else {}) | ({"z": inputs["dt"]} if "z" in names else {})
    wrong = [(name, value) for name, v in inputs.items() for value in (v[..., 0], v.int(), v * 1j)]
    wrong += [(name, v[:1]) for name, v in inputs.items() if name != first]  # which says how long the others must be
    for name, value in [*wrong, ("starts", torch.zeros(2, 6)), ("pieces" if "pieces" in names else "chunk_size", 0)]:
        with pytest.raises(ValueError, match=rf"\b{name} (must|be)"):
            file.heart(**inputs | {name: value})


# Gradients of layers and models ---------------------------------------------------------------------------------------

SMALLEST_LAYERS = {
    "mamba": ("mamba", dict(d_state=2, d_conv=3, bias=True)),
    "falcon_mamba": ("mamba", dict(d_state=2, d_conv=2, conv_bias=False, dt_rank=2, mixer_rms_eps=1e-3)),
    "mamba2": ("mamba2", dict(d_state=2, headdim=2, ngroups=2, d_conv=3, bias=True, chunk_size=3)),
    "mamba2 limits": ("mamba2", dict(d_state=2, headdim=4, ngroups=1, d_conv=2, chunk_size=4, dt_limit=(0.1, 1.0))),
    "mamba3": ("mamba3", dict(d_state=4, headdim=2, chunk_size=3, A_activation="softplus")),
    "mamba3 norm": ("mamba3", dict(d_state=4, headdim=2, chunk_size=3, rope_fraction=1.0, is_outproj_norm=True)),
    "mamba3 MIMO": ("mamba3", dict(d_state=4, headdim=2, ngroups=2, chunk_size=3, is_mimo=True, mimo_rank=2)),
}


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("name", SMALLEST_LAYERS)
def test_layer_gradients_equal_finite_differences_from_the_first_state_to_the_last(name, length):
    file, settings = FILES[SMALLEST_LAYERS[name][0]], SMALLEST_LAYERS[name][1]
    torch.manual_seed(0)
    mixer = randomise(file.Mixer(file.Config(d_model=2, **settings)).double(), 0.3)
    names, parameters = zip(*mixer.named_parameters(), strict=True)
    zeros = torch.zeros(2, length, 2).double(), *vars(mixer.new_state(2)).values()
    x, *first = leaves_of(map(torch.randn_like, zeros))

    def layer(x, *values):
        state = file.module.LayerState(*values[: len(first)])
        y = torch.func.functional_call(mixer, dict(zip(names, values[len(first) :], strict=True)), (x, state))
        return y, *vars(state).values()

    assert gradcheck(layer, (x, *first, *parameters), check_forward_ad=file.name != "mamba")


def test_a_learned_state_gets_its_gradient_through_any_number_of_calls_and_is_never_written_to(file):
    torch.manual_seed(0)
    mixer, x = tiny(file).double().backbone.layers[0].mixer, torch.randn(3, 9, 32).double()
    learned = [torch.nn.Parameter(torch.randn_like(v)) for v in vars(mixer.new_state(1)).values()]
    before, results = [v.detach().clone() for v in learned], []
    for pieces in ([9], [4, 1, 1, 3]):
        state = file.module.LayerState(*(v.expand(3, *v.shape[1:]) for v in learned))
        y = torch.cat([mixer(piece, state) for piece in x.split(pieces, dim=1)], dim=1)
        results.append([y, *vars(state).values(), *gradients([y, state.ssm_state], [*learned, *mixer.parameters()])])
    assert_all_close(*results)
    assert all(map(torch.equal, learned, before)) and all(v.any() for v in results[0][3:5])


@pytest.mark.parametrize("dtype, with_cache", [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)])
def test_gradient_checkpointing_runs_a_block_twice_and_gives_the_same_gradients(file, dtype, with_cache):
    keep_products = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    ids, found, calls = random_ids(2, 30), {}, {}
    for mode in ("plain", "saving", "saving, in evaluation", "selective"):
        model, calls[mode] = tiny(file).to(dtype).train(mode != "saving, in evaluation"), []
        model.backbone.layers[0].mixer.register_forward_pre_hook(lambda *_, seen=calls[mode]: seen.append(1))
        if mode.startswith("saving"):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for layer in model.backbone.layers if mode == "selective" and not with_cache else ():
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, context_fn=keep_products)
        model(ids, file.new() if with_cache else None, labels=ids)["loss"].backward()
        found[mode] = [p.grad for p in model.parameters()]
    assert [len(seen) for seen in calls.values()] == ([1, 1, 1, 1] if with_cache else [1, 2, 1, 2])
    assert all(torch.equal(*pair) for mode in found for pair in zip(found[mode], found["plain"], strict=True))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_model_trains_and_steps_in_bfloat16_and_under_autocast(file, autocast):
    model, ids, params = tiny(file).to(torch.float32 if autocast else torch.bfloat16), random_ids(2, 20), file.new()
    exact = copy.deepcopy(model).float()
    exact(ids, labels=ids)["loss"].backward()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(ids, labels=ids)["loss"]
        steps = torch.stack([model.step(token, params) for token in ids.unbind(1)], dim=1)
    loss.backward()
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert 0 < error(p.grad, q.grad) <= (0.1 if file.name == "mamba3" else 0.05), name  # its angles are sums
    assert 0 < error(steps, logits_of(exact, ids)) <= 0.05
    assert all(v.dtype == torch.float32 for v in (loss, steps, *states(params)[1::2]))


# The whole model against transformers and float64 ---------------------------------------------------------------------


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("settings", ODD_SETTINGS)
def test_in_float64_the_model_is_its_definition(settings, noise, ours_for):
    model, ids = ours_for(settings, noise, dtype=torch.float64), random_ids(2, 150)
    assert error(logits_of(model, ids), logits_by_definition(model, ids)) <= 1e-12


@on_each_device
@pytest.mark.parametrize("length", [1, 3, 63, 64, 65, 300])
@pytest.mark.parametrize("noise, bound", [(0.1, 2e-6), (0.3, 2e-4)])
@pytest.mark.parametrize("settings", ODD_SETTINGS)
def test_logits_equal_those_of_transformers_and_are_near_to_float64(settings, noise, bound, length, device, ours_for):
    ids = random_ids(max(2, math.ceil(300 / length)), length, seed=length)
    exact = logits_of(ours_for(settings, noise, dtype=torch.float64), ids)
    ours, theirs = logits_of(ours_for(settings, noise, device), ids), their_logits(theirs_for(settings, noise), ids)
    assert distance(ours, exact) <= 1.5 * distance(theirs, exact)
    if (settings, noise) != ("falcon_mamba deep", 0.1):  # where transformers is farther from float64: see ODD_SETTINGS
        assert ours.dtype == torch.float32 and error(ours[:2], theirs[:2]) <= bound


IN_HALF_PRECISION = [(settings, False, True) for settings in ["mamba", "falcon_mamba", "mamba2", *SETTINGS]]
# Token by token without limits of dt: transformers' cached step ignores them.
IN_HALF_PRECISION += [(settings, True, True) for settings in ["mamba", "falcon_mamba expand 16", "mamba2"]]
IN_HALF_PRECISION += [(settings, False, False) for settings in ["mamba", "mamba2"]]


@on_each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings, by_token, residual_in_fp32", IN_HALF_PRECISION)
@torch.no_grad()
def test_half_precision_is_as_near_to_float32_as_that_of_transformers(
    settings, by_token, residual_in_fp32, dtype, device, tmp_path
):
    ids, theirs = random_ids(4, 100), transformers_model(settings, 0.1, residual_in_fp32=residual_in_fp32).to(dtype)
    theirs.save_pretrained(tmp_path)
    load, got, wanted = functools.partial(file_for(settings).LM.from_pretrained, tmp_path), [], []
    exact, ours = logits_of(load(dtype=torch.float32), ids), load(device=device)  # of the same rounded weights
    cache, params, seen = None, file_for(settings).new(), []
    ours.backbone.layers[-1].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    for piece in ids.split(1 if by_token else 100, dim=1):
        out = theirs(piece, cache_params=cache, use_cache=True)
        cache = out.cache_params
        wanted.append(out.logits)
        got.append(logits_of(ours, piece, params))
    assert {p.dtype for p in ours.parameters()} == {dtype}
    assert set(seen) == {torch.float32 if residual_in_fp32 else dtype}
    assert distance(torch.cat(got, 1), exact) <= 1.2 * distance(torch.cat(wanted, 1), exact)


@pytest.mark.parametrize("settings", ODD_SETTINGS)
def test_greedy_generation_equals_that_of_transformers(settings, ours_for):
    ids, theirs = random_ids(2, 20), theirs_for(settings, 0.1)
    theirs.generation_config.eos_token_id = None
    limited = getattr(theirs.config, "time_step_limit", (0, math.inf)) != (0, math.inf)
    options = {"attention_mask": torch.ones_like(ids), "use_cache": not limited}  # their cached step ignores the limit
    wanted = theirs.generate(ids, max_new_tokens=50, do_sample=False, **options)
    assert torch.equal(ours_for(settings, 0.1).generate(ids, 50, temperature=0, eos_token_id=()), wanted)


@pytest.mark.parametrize("settings", SETTINGS)
def test_hidden_states_loss_and_its_gradients_equal_those_of_transformers(settings, saved):
    ids, theirs = random_ids(3, 50), transformers_model(settings, 0.1)
    ours, labels = file_for(settings).LM.from_pretrained(saved(settings, 0.1)), ids.clone()
    labels[0, :20] = labels[2, 7] = labels[1, -1] = -100
    vectors, hidden = ours.backbone.embeddings(ids), theirs.backbone(ids).last_hidden_state
    for given in (ids, vectors):  # may stand in for ids
        assert error(ours.backbone(given), hidden) <= 2e-6 and error(ours(given), theirs(ids).logits) <= 2e-6
    for target in (ids, labels):
        out, loss = ours(ids, labels=target), theirs(ids, labels=target).loss
        assert set(out) == {"loss", "logits"} and out["loss"].item() == pytest.approx(loss.item(), rel=1e-6)
        (out["loss"] + loss).backward()
    got, wanted = (dict(model.named_parameters()) for model in (ours, theirs))
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert error(got[name].grad, wanted[name].grad) <= 2e-4, name


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_of_padded_rows_is_that_of_the_rows_alone(file, side):
    model, (ids, mask, rows) = tiny(file, bias=True), padded_batch([12, 5, 9], side)
    alone = [(model(row, labels=row)["loss"], row.shape[1] - 1) for row in rows]
    wanted = sum(mean * n for mean, n in alone) / sum(n for _, n in alone)
    assert error(model(ids, labels=ids, attention_mask=mask)["loss"], wanted) <= 1e-6


# Random models, texts, masks, splits and options ----------------------------------------------------------------------

register = functools.partial(hypothesis.settings.register_profile, deadline=None, database=None)
register("short", derandomize=True, max_examples=50, suppress_health_check=list(hypothesis.HealthCheck))
register("long", max_examples=2000, suppress_health_check=list(hypothesis.HealthCheck))
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))

number, flag, one_of = st.integers, st.booleans(), st.sampled_from
ANY = dict(n_layer=number(1, 2), vocab_size=number(1, 40), pad_vocab_size_multiple=number(1, 8), tie_embeddings=flag)
ANY |= dict(residual_in_fp32=flag, norm_epsilon=one_of([1e-5, 0.1]), d_conv=number(1, 5), bias=flag, conv_bias=flag)
ANY |= dict(d_state=number(1, 9), expand=number(1, 3), chunk_size=number(1, 20), mixer_rms_eps=one_of([None, 0.1]))
ANY |= dict(d_inner=st.none() | number(1, 30), dt_rank=one_of(["auto", 1, 5]), dt_limit=one_of([(0, 1e9), (0.1, 0.5)]))
ANY |= dict(d_intermediate=one_of([0, 5]), is_mimo=flag, mimo_rank=number(1, 3), rope_fraction=st.floats(0.01, 1))
ANY |= dict(is_outproj_norm=flag, A_activation=one_of(["heavy_tail", "softplus"]))


@st.composite
def models(draw, file, dtype=torch.float64):
    fields, (heads, groups, width) = draw(st.fixed_dictionaries(ANY)), draw(st.tuples(*3 * [number(1, 5)]))
    fields |= dict(d_model=heads * groups * width, headdim=width, ngroups=groups)
    fields["d_state"] *= 2 if file.name == "mamba3" else 1
    config = file.Config(**{name: fields[name] for name in fields.keys() & file.Config.__dataclass_fields__})
    return randomise(file.LM(config), 0.1, seed=draw(number(0, 99))).to(dtype)


@st.composite
def texts(draw, config, least=0):
    """Ids (b, l), at least so many, and a mask, with holes, or None; each row then has at least as many real tokens."""
    chunk = getattr(config, "chunk_size", 32)  # 32: the block of the scan
    lengths = [l for l in (0, 1, 2, 5, chunk - 1, chunk, chunk + 1, 2 * chunk + 1) if l >= least]
    b, l = draw(number(1, 3)), draw(one_of(lengths))
    mask = draw(st.none() | st.lists(flag, min_size=b * l, max_size=b * l))
    mask = None if mask is None else torch.tensor(mask, dtype=torch.bool).view(b, l)
    if mask is not None and least:
        mask[:, draw(number(0, l - 1))] = True
    return random_ids(b, l, draw(number(0, 99)), config.vocab_size), mask


def state_after(file, model, ids):
    """The states after ids (l,) alone."""
    model(ids[None], params := file.new())
    return [v[0] for v in states(params)]


@hypothesis.given(data=st.data())
@torch.no_grad()
def test_random_models_read_random_texts_in_random_pieces_as_their_definition_does(file, data):
    dtype, bound = data.draw(one_of([(torch.float64, 1e-9), (torch.float32, 1e-3)]))
    model = data.draw(models(file, dtype))
    ids, mask = data.draw(texts(model.config))
    cuts, params, logits = sorted(data.draw(st.lists(number(0, ids.shape[1]), max_size=3))), file.new(), []
    for i, j in itertools.pairwise([0, *cuts, ids.shape[1]]):
        logits.append(model(ids[:, i:j], params, attention_mask=None if mask is None else mask[:, i:j]))
    for i, (row, of_row) in enumerate(zip(ids, torch.cat(logits, 1), strict=True)):
        real = slice(None) if mask is None else mask[i]
        if len(row[real]):
            assert error(of_row[real][None], logits_by_definition(model, row[real][None])) <= bound
        if dtype == torch.float64:
            assert_same_states([v[i] for v in states(params)], state_after(file, model, row[real]), bound)


@hypothesis.given(data=st.data())
@torch.no_grad()
def test_random_generation_draws_kept_tokens_ends_each_row_and_needs_no_cache(file, data):
    model = data.draw(models(file))
    vocab, seed, new = model.config.vocab_size, data.draw(number(0, 99)), data.draw(number(0, 6))
    ids, mask = data.draw(texts(model.config, least=1))
    eos = data.draw(st.none() | number(0, vocab - 1) | st.lists(number(0, vocab - 1), max_size=3))
    options = dict(temperature=one_of([0, 0.3, 1.0, 2.5]), top_k=one_of([None, 0, 1, 2, 5, 1000]))
    options = data.draw(st.fixed_dictionaries(options | dict(top_p=one_of([1.0, 0.9, 0.5, 1e-6]))))
    call, params = options | dict(eos_token_id=eos, attention_mask=mask), file.new()
    out = model.generate(ids, new, generator=generator(seed), inference_params=params, **call)
    drawn, ends, lengths = out[:, ids.shape[1] :], [eos] if type(eos) is int else eos or [], []
    assert torch.equal(model.generate(ids, new, generator=generator(seed), use_cache=False, **call), out)
    stream = model.stream(ids, new, generator=generator(seed), **call)
    assert torch.equal(torch.cat([ids, *(torch.as_tensor(token).view(-1, 1) for token in stream)], 1), out)
    for i, row in enumerate(drawn.tolist()):
        lengths.append(next((n + 1 for n, token in enumerate(row) if token in ends), len(row)))
        assert all(token == ends[0] for token in row[lengths[-1] :])
        text = torch.cat([ids[i] if mask is None else ids[i][mask[i]], drawn[i, : lengths[-1]]])
        logits = logits_by_definition(model, text[None])[0, -lengths[-1] - 1 : -1, :vocab]
        for token, of_token in zip(row, logits, strict=False):
            greedy = options["temperature"] == 0
            assert of_token[token] == of_token.max() if greedy else warped(of_token[None], **options)[0, token] > -1e9
        if states(params) or len(text) > 1:  # a token and none asked for: nothing is read
            assert_same_states([v[i] for v in states(params)], state_after(file, model, text[:-1]), 1e-9)
    assert drawn.shape[1] == (max(lengths) if all(any(t in ends for t in row) for row in drawn.tolist()) else new)


# The cache: any split, any batch, padding, steps ----------------------------------------------------------------------

PIECES = [[1, 129], [129, 1], [3, 60, 1, 2, 64], [64, 64, 2], [0, 65, 0, 0, 65, 0]]


@on_each_device
@pytest.mark.parametrize("settings, noise", [*itertools.product([*SETTINGS, "mamba3"], NOISES)])
def test_any_split_of_padded_rows_and_steps_give_what_each_row_gives_alone(settings, noise, device, ours_for):
    of_3, new, tokens = settings == "mamba3", file_for(settings).new, random_ids(4, 3, seed=1)
    model = tiny(FILES[settings], noise, d_model=64).to(device) if of_3 else ours_for(settings, noise, device)
    bound = SPLIT_BOUNDS[noise] * (20 if of_3 else 1)
    ids, mask, rows = padded_batch([130, 65, 1, 0], "any")
    for pieces in PIECES:
        params, got = new() if pieces[0] else SimpleNamespace(key_value_memory_dict={}), []  # any object with that dict
        for piece, real in zip(ids.split(pieces, dim=1), mask.to(device).split(pieces, dim=1), strict=True):
            got.append(logits_of(model, piece, params, attention_mask=real))
        got, steps = torch.cat(got, 1), [model.step(token, params).cpu() for token in tokens.to(device).unbind(1)]
        for i, row in enumerate(rows):
            wanted = logits_of(model, torch.cat([row, tokens[i : i + 1]], dim=1), alone := new())[0]
            of_row = torch.cat([got[i, mask[i].bool()], torch.stack(steps, 1)[i]])
            assert of_row.dtype == torch.float32 and error(of_row, wanted) <= bound
            assert_same_states([v[i : i + 1] for v in states(params)], states(alone), bound)


@torch.no_grad()
def test_what_stands_in_padding_does_not_matter(file):
    model, (_, mask, _), results = tiny(file, bias=True), padded_batch([12, 5], "left"), []
    for padding in (0.0, 3.0, math.nan):
        x, params = torch.ones(2, 12, 32).masked_fill(mask[..., None] == 0, padding), file.new()
        results.append([model(x, params, attention_mask=mask)[mask.bool()], *states(params)])
    assert all(torch.equal(v, exact) for other in results[1:] for v, exact in zip(other, results[0], strict=True))


@torch.no_grad()
def test_a_sequence_and_a_batch_may_be_empty_and_the_last_logits_can_be_had_alone(file):
    model, ids = tiny(file), random_ids(2, 9)
    for empty, new in itertools.product((ids[:, :0], ids[:0]), (file.new, lambda: None)):
        assert model(empty, new()).shape == (*empty.shape, model.config.padded_vocab_size)
    assert all(error(model(ids, num_last_tokens=k), model(ids)[:, -k:]) <= 1e-6 for k in (1, 3, 9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_states_have_the_documented_shapes_and_types_stay_finite_and_never_grow(file, dtype):
    model, params, s = tiny(file, noise=0.3).to(dtype), file.new(), torch.promote_types(dtype, torch.float32)
    shapes = {"mamba": [(3, 64, 4), (3, 64, 8)], "mamba2": [(3, 64 + 2 * 8, 4), (3, 8, 8, 8)]}
    shapes = (shapes | {"mamba3": [(3, 8, 2), (3, 8, 8, 8), (3, 1, 8, 8), (3, 8, 8)]})[file.name]
    types, mixer = [dtype, s] if file.name in FIRST else [s] * 4, model.backbone.layers[0].mixer
    for length in (2, 1, 300):
        assert logits_of(model, random_ids(3, length), params).isfinite().all()
        for layer in (*params.key_value_memory_dict.values(), vars(mixer.new_state(3)).values()):
            assert [tuple(v.shape) for v in layer] == shapes and [v.dtype for v in layer] == types
            assert all(v.isfinite().all() and v.untyped_storage().nbytes() == v.nbytes for v in layer)
        if length == 2 and file.name in FIRST:  # the newest stands last
            assert [bool(v.any()) for v in params.key_value_memory_dict[1][0].split(2, dim=-1)] == [False, True]


def test_the_cache_detaches_counts_resets_clones_selects_and_reports(file):
    model, params, ids = tiny(file), file.new(), random_ids(3, 6)
    model(ids[:, :5], params)
    assert not any(v.requires_grad for v in states(params))  # gradients stop between two calls of a model
    model.step(ids[:, 5], params)
    info = dict(memory_mb=sum(v.nbytes for v in states(params)) / 1e6, cached_layers=2, seqlen_offset=6)
    assert model.get_cache_info(params) == params.get_cache_info() == info | {"total_tensors": len(states(params))}
    twin, chosen, before = params.clone(), params.select(torch.tensor([2, 0, 0, 2])), snapshot(params)
    logits_of(model, ids, params)
    assert_same_states(states(twin), before, 0)
    assert_same_states(states(chosen), [v[[2, 0, 0, 2]] for v in before], 0)
    assert twin.seqlen_offset == chosen.seqlen_offset == 6 and params.seqlen_offset == 12
    foreign = SimpleNamespace(key_value_memory_dict=chosen.key_value_memory_dict)
    assert model.get_cache_info(foreign)["cached_layers"] == 2
    for cache in (params, foreign):
        model.reset_cache(cache)
    twin.reset()
    assert vars(twin) == vars(params) == vars(file.new()) and vars(foreign) == {"key_value_memory_dict": {}}


# Wrong calls: an error that names what is wrong, and a cache and weights as they were ---------------------------------


def table(text):
    """Rows of columns; in the one before the last `_` stands for each of the values in the last."""
    for line in text.strip().splitlines():
        *columns, call, values = line.split(" | ")
        yield from ((*columns, re.sub(r"\b_\b", lambda _, v=v: v, call)) for v in values.split("; "))


IDS, NOTHING = random_ids(2, 5), torch.tensor([[1] * 5, [0] * 5])
WRONG_CALLS = r"""
num_last_tokens | m(IDS, c, num_last_tokens=_) | -1; 1.5; "1"; 2, labels=IDS
seq_idx|mask | m(IDS, c, _) | seq_idx=IDS[:, :4]; seq_idx=IDS / 2; IDS, seq_idx=IDS[:, :1]; IDS, attention_mask=ONES[:1]
attention_mask | m(IDS, c, attention_mask=_) | 2 * ONES; ONES / 2; ONES * math.nan; -ONES; ONES / -0.0; ONES.T
attention_mask | m(IDS, c, attention_mask=_) | ONES[..., None]; ONES[:, None, None]; ONES[:, :4]; ONES[:1]
labels | m(IDS, c, labels=_) | IDS.float(); IDS > 3; IDS + 0j; ONES[..., None]; IDS[:, :4]; -IDS - 1; IDS + 5000
input_ids | m(_, c) | IDS > 3; IDS.byte(); IDS[None]; IDS[0]; IDS[0, 0]; IDS - 100; IDS + 5000; VECTORS + 0j
the input | m(_, c) | VECTORS[0]; VECTORS[..., 1:]; IDS.float()
mixer | delattr(m.backbone.layers[1], _) or m(IDS, c) | "mixer"
key_value_memory_dict | m(IDS, _) | ONES; {}; 3
inference_params must | m(IDS, new(_)) | {"0": d[0], "1": d[1]}; {**d, "x": d[0]}; {1: d[1]}; {**d, 2: d[0]}
(?i)state | m(IDS, new({i: tuple(_) for i in d})) | d[i][::-1]; 2 * d[i]; (v.mT for v in d[i]); (v[:1] for v in d[i])
(?i)state | m(IDS, new({i: tuple(_) for i in d})) | (v[:, 1:] for v in d[i]); (v.int() for v in d[i])
state | m(_, c) | IDS[:1]; IDS[[0, 0, 1]]
state | tiny(file, _)(IDS, c) | d_model=64; d_state=4; d_conv=3; n_layer=3
ids|the input | m.step(_, c) | IDS; IDS[0, 0]; torch.tensor([1, 5000]); ONES[:, 0]
state|InferenceParams | m.advance(_) | IDS[:1, 0], d; torch.tensor([1, 2, 3]), d; IDS[:, 0], c
temperature | m.generate(IDS, 3, temperature=_, inference_params=c) | "1"; None; 1j; -1; math.nan; math.inf
top_. must | m.generate(IDS, 3, inference_params=c, _) | top_p="0.9"; top_p=0; top_p=1.5; top_k="5"; top_k=1.0; top_k=-1
max_new_tokens | m.generate(IDS, _, inference_params=c) | "5"; None; True; -1; 2.0
eos_token_id | m.generate(IDS, 3, eos_token_id=_, inference_params=c) | -1; 5000; [3, 10**30]; {3}; [[3]]; [1.5]; "</s>"
input_ids | m.generate(_, 3, inference_params=c) | IDS[:, :0]; IDS[0]; IDS > 3; IDS.byte(); IDS + 5000; VECTORS
attention_mask | m.generate(IDS, 3, attention_mask=_, inference_params=c) | 2 * ONES; NOTHING; ONES[:1]
generator|use_cache | m.generate(IDS, 3, inference_params=c, _) | generator=3; use_cache=False
state | m.generate(_, 3, inference_params=c) | IDS[:1]; IDS[[0, 0, 1]]
temperature|num_beams | next(m.stream(IDS, inference_params=c, _)) | temperature=-0.5; num_beams=2
rows must | c.select(_) | [0, 2]; [-1]; [[0, 1]]; []; torch.tensor([0.5]); torch.tensor([True, False])
vocab_size | m.resize_token_embeddings(_) | None; 0; -1; 99.5; "5"; True
the input|state | m.backbone.layers[0].mixer(_) | IDS; VECTORS[0]; VECTORS, m.backbone.layers[0].mixer.new_state(3)
the input|mask | build(file, "Encoder")(_) | IDS; VECTORS[0]; VECTORS[None]; VECTORS, attention_mask=ONES[:, :4]
token|attention_mask | build(file, "ForSequenceClassification")(_) | IDS[:, :0]; IDS, NOTHING; IDS, ONES / 2
labels | build(file, "ForSequenceClassification")(IDS, labels=_) | IDS; IDS[:, 0] * 0 + 3; ONES[:, 0]; IDS[:, 0] - 100
dtype|gpu0 | file.LM.from_pretrained(place, _) | dtype=torch.int32; dtype=torch.cfloat; dtype="half"; device="gpu0"
(?i)exists|directory | _ | file.Config.from_json("."); m.save_pretrained(ROOT / "LICENSE")
Missing|floating | m.save_pretrained(tmp / "never", state_dict=_) | {}; {k: v.int() for k, v in m.state_dict().items()}
norm_f.weight|unknown | m.load_state_dict({**m.state_dict(), _: ONES}) | "backbone.norm_f.weight"; "unknown"
norm_f.weight | m.save_pretrained(tmp / "never", state_dict={**m.state_dict(), _}) | "backbone.norm_f.weight": ONES
"""
WRONG_CALLS = list(table(WRONG_CALLS))
OF_TORCH = {"device=": RuntimeError, "m(": AttributeError, "load_state": RuntimeError}  # which say enough


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("words, call", WRONG_CALLS, ids=[call for _, call in WRONG_CALLS])
def test_a_wrong_call_ends_in_an_error_that_names_the_argument_and_changes_nothing(file, words, call, tmp_path):
    if "d_conv" in call and file.name not in FIRST:
        pytest.skip("there is no convolution")
    model, params, ones = tiny(file), file.new(), torch.ones(2, 5)
    logits_of(model, IDS, params)
    before, weights = snapshot(params), {name: p.clone() for name, p in model.state_dict().items()}
    known = dict(m=model, c=params, d=params.key_value_memory_dict, new=file.new, file=file, tmp=tmp_path, ONES=ones)
    errors = [errors for part, errors in OF_TORCH.items() if part in call]
    known |= dict(VECTORS=torch.ones(2, 5, 32), place=PRETRAINED / f"shakespeare-{file.name}")
    with pytest.raises((ValueError, TypeError, OSError, *errors), match=words):
        eval(call, globals() | known)
    assert len(states(params)) == len(before) and all(map(torch.equal, states(params), before))
    assert params.seqlen_offset == 5 and all(torch.equal(weights[name], p) for name, p in model.state_dict().items())
    assert not (tmp_path / "never").exists()


# State: threads, casts, interruptions, memory -------------------------------------------------------------------------


def test_threads_with_a_cache_each_share_a_model(file):
    model, together, alone = tiny(file, noise=0.3), *([file.new() for _ in range(4)] for _ in range(2))

    def text(i, cache):
        return model.generate(random_ids(1, 20, i), 20, generator=generator(i), inference_params=cache)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(text, range(4), together))
    assert all(map(torch.equal, texts, map(text, range(4), alone)))
    for one, other in zip(together, alone, strict=True):
        assert_same_states(states(one), states(other), 0)


@pytest.mark.parametrize("first, then", [*itertools.permutations([torch.float32, torch.bfloat16, torch.float64], 2)])
@torch.no_grad()
def test_a_model_that_is_cast_between_two_calls_goes_on_from_its_cache(file, first, then):
    model, ids, params, fresh = tiny(file).to(first), random_ids(2, 20), file.new(), file.new()
    model(ids[:, :10], params)
    logits = model.to(then)(ids[:, 10:], params)
    assert error(logits, tiny(file).double()(ids)[:, 10:]) <= (0.1 if torch.bfloat16 in (first, then) else 1e-5)
    model(ids, fresh)
    assert [v.dtype for v in states(params)] == [v.dtype for v in states(fresh)]  # whatever stood there before


def test_generation_that_is_interrupted_goes_on_from_its_cache(file):
    model, ids, params = tiny(file, noise=0.3), random_ids(2, 10), file.new()
    stream = model.stream(ids, 12, temperature=0, inference_params=params)
    tokens = torch.stack([next(stream) for _ in range(5)], dim=1)
    stream.close()
    rest = model.generate(tokens[:, -1:], 7, temperature=0, inference_params=params)
    assert torch.equal(torch.cat([ids, tokens, rest[:, 1:]], 1), model.generate(ids, 12, temperature=0))


def test_a_cache_holds_no_more_memory_than_it_says_and_generation_leaves_nothing_behind(file):
    model, params, alive = tiny(file, d_model=16, n_layer=1), file.new(), []
    logits_of(model, random_ids(1, 300), params)
    size = round(1e6 * params.get_cache_info()["memory_mb"])
    stream = model.stream(random_ids(1, 3), 1100, inference_params=params)
    for count in (0, 100, 1000):
        assert len([*itertools.islice(stream, count)]) == count
        gc.collect()
        alive.append(sum(issubclass(type(v), torch.Tensor) for v in gc.get_objects()))
        assert sum(v.untyped_storage().nbytes() for v in states(params)) == size  # they are no views of a sequence
    assert alive[1] == alive[2]


# Numbers at their limits ----------------------------------------------------------------------------------------------

EXTREMES = {"equal tokens": {}, "all zero": {"": 0.0}, "dt large": {"dt_bias": 300.0, "dt_proj.bias": 300.0}}
EXTREMES |= {"dt tiny": {"dt_bias": -1e4, "dt_proj.bias": -1e4}, "decay at once": {"A_log": 80.0, "dt_bias": 5.0}}
EXTREMES |= {"no decay": {"A_log": -80.0}, "embedding large": {"embeddings": 1e3}, "projection large": {"in_proj": 0.3}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_weights_give_finite_logits_states_and_gradients(file, name, dtype):
    model, ids, params = tiny(file), torch.full((2, 300), 5), file.new()
    for (key, p), (part, value) in itertools.product(model.named_parameters(), EXTREMES[name].items()):
        p.data.masked_fill_(torch.tensor(part in key), value)
    logits, loss = logits_of(model.to(dtype), ids, params), model(ids[:, :70], labels=ids[:, :70])["loss"]
    loss.backward()
    assert all(v.isfinite().all() for v in (logits, loss, *states(params), *(p.grad for p in model.parameters())))
    assert model.generate(ids[:, :9], 5, inference_params=params, generator=generator()).shape == (2, 14)


@pytest.mark.parametrize("length", [1, 2, 70])
def test_a_nan_or_infinity_in_one_row_stays_there(file, length):
    model, x, params, alone = tiny(file), torch.randn(3, length, 32, generator=generator()), file.new(), file.new()
    healthy, x[1, 0] = x[[0, 2]], torch.tensor([math.nan, math.inf]).repeat(16)
    for _ in range(2):  # from zero, then from a state whose row is not finite
        logits, exact = logits_of(model, x, params), logits_of(model, healthy, alone)
        assert logits[1].isnan().any() and error(logits[[0, 2]], exact) <= 1e-5
        assert_same_states([v[[0, 2]] for v in states(params)], states(alone), 1e-5)


# One path: what changes a model changes training, reading with a cache, and generation alike --------------------------


def steered(forward):
    def steered_forward(*args, **kwargs):
        y = forward(*args, **kwargs)
        return y + torch.linspace(-1, 1, y.shape[-1])

    return steered_forward


class Wrapped(torch.nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part, self.forward = part, steered(part)


CHANGES = {
    "subclass": lambda model, name, part: setattr(
        part, "__class__", type("Steered", (type(part),), {"forward": steered(type(part).forward)})
    ),
    "patch": lambda model, name, part: setattr(part, "forward", steered(part.forward)),
    "hook": lambda model, name, part: part.register_forward_hook(lambda module, args, y: steered(torch.clone)(y)),
    "wrap": lambda model, name, part: model.set_submodule(name, Wrapped(part)),
}
MIXER = "backbone.layers.1.mixer"
PARTS = ["", "backbone", "backbone.layers.1", MIXER, f"{MIXER}.in_proj", f"{MIXER}.conv1d", f"{MIXER}.out_proj"]
HOOKED = [*PARTS, "backbone.embeddings", "backbone.norm_f", "backbone.layers.1.norm"]
CHANGED = {"subclass": PARTS[:4], "patch": PARTS[:4], "hook": HOOKED, "wrap": PARTS[2:]}
CHANGED |= {"layers": [(0, 2, 1, 3), (0, 1, 1, 2), (0, 2, 3)]}  # reordered, shared, left out


@pytest.mark.parametrize("change, part", [(change, part) for change in CHANGED for part in CHANGED[change]], ids=str)
def test_a_change_counts_in_training_with_a_cache_and_in_generation(file, change, part):
    if "conv1d" in part and file.name not in FIRST:
        pytest.skip("there is no convolution")
    model, ids, params = tiny(file, n_layer=4), random_ids(2, 6), file.new()
    plain = logits_of(model, ids)
    if change == "layers":
        model.backbone.layers = torch.nn.ModuleList(model.backbone.layers[i] for i in part)
    else:
        CHANGES[change](model, part, model.get_submodule(part))
    wanted = logits_of(model, ids)
    assert error(wanted, plain) > 1e-2 and error(model.train()(ids), wanted) <= 5e-6
    pieces = [logits_of(model, ids[:, :3], params), *(model.step(v, params)[:, None] for v in ids[:, 3:].unbind(1))]
    assert error(torch.cat(pieces, dim=1), wanted) <= 5e-6
    assert torch.equal(model.generate(ids, 6, 0), model.generate(ids, 6, 0, use_cache=False))


@torch.no_grad()
def test_two_layers_in_a_row_each_with_its_state_go_on_as_the_two_would(file):
    one, two = (block.mixer for block in tiny(file).double().backbone.layers)
    x, first, second = torch.randn(2, 9, 32).double(), file.module.LayerState(), two.new_state(2)
    y = torch.cat([two(one(token, first), second) for token in x.split(1, dim=1)], dim=1)
    assert error(y, two(one(x))) <= 1e-12


@pytest.mark.parametrize("tie", [True, False])
@torch.no_grad()
def test_a_model_offloaded_by_accelerate_gives_the_same_logits_and_text(file, tie):
    accelerate = pytest.importorskip("accelerate")
    model, ids = tiny(file, tie_embeddings=tie), random_ids(2, 6)
    wanted = model(ids), model.generate(ids, 5, temperature=0)
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert all(map(torch.equal, (model(ids), model.generate(ids, 5, temperature=0)), wanted))


@pytest.mark.filterwarnings("ignore")  # torch deprecates it
def test_a_dynamically_quantized_model_reads_steps_and_generates(file):
    model, ids, params = tiny(file, tie_embeddings=False), random_ids(2, 6), file.new()
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
    mixer, wanted = quantized.backbone.layers[0].mixer, logits_of(model, ids)
    for part in (quantized.lm_head, mixer.in_proj, mixer.out_proj):
        assert isinstance(part, torch.ao.nn.quantized.dynamic.Linear)
    steps = torch.stack([quantized.step(token, params) for token in ids.unbind(1)], dim=1)
    assert 0 < error(logits_of(quantized, ids), wanted) <= 0.2 and 0 < error(steps, wanted) <= 0.2
    assert quantized.generate(ids, 5).shape == (2, 11)


@with_fsdp
def test_a_sharded_model_generates_and_is_saved_from_gathered_weights(file, tmp_path):
    model, ids = tiny(file), random_ids(2, 6)
    wanted = model.generate(ids, 8, temperature=0)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        for part in (*model.backbone.layers, model):
            fully_shard(part, mesh=mesh)
        assert torch.equal(model.generate(ids, 8, temperature=0), wanted)
        with pytest.raises(ValueError, match="get_model_state_dict"):
            model.save_pretrained(tmp_path / "never")
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        model.save_pretrained(tmp_path / "whole", state_dict=weights)
    finally:
        dist.destroy_process_group()
    assert same_weights(file.LM.from_pretrained(tmp_path / "whole"), tiny(file)) and len([*tmp_path.iterdir()]) == 1


def test_what_users_of_other_projects_write_works(file):
    model, ids, x = tiny(file), random_ids(2, 6), torch.randn(1, 5, 64)
    texts = [model.generate(ids, 9, top_k=k, generator=torch.Generator().manual_seed(0)) for k in (0, None)]
    assert torch.equal(*texts)  # mamba2-minimal's and transformers' top_k=0: no limit
    assert mamba2.Mamba2(mamba2.Mamba2Config(d_model=64))(x).shape == x.shape


# Packed documents -----------------------------------------------------------------------------------------------------

DOCUMENTS = [[1, 15, 16, 17, 1, 2], [52], [1, 1, 50], [30, 3, 19]]  # lengths of a row's documents; chunks have 16 steps


def packed(rows):
    """Documents of these lengths, a list for each row: ids (b, l), seq_idx (b, l), and each row's documents (1, l)."""
    ids = random_ids(len(rows), sum(rows[0]))
    numbers = [[n % 3 for n, length in enumerate(row) for _ in range(length)] for row in rows]  # they may come again
    return ids, torch.tensor(numbers), [ids[i : i + 1].split(row, dim=1) for i, row in enumerate(rows)]


@pytest.mark.parametrize("settings", [{}, dict(mixer_rms_eps=1e-6), dict(ngroups=2), dict(is_mimo=True)])
def test_packed_documents_are_read_and_learnt_as_if_each_were_alone(file, settings):
    if not all(hasattr(file.Config, name) for name in settings):
        pytest.skip(f"{file.name}.py has no {next(iter(settings))}")
    model, (ids, seq_idx, rows) = tiny(file, bias=True, **settings).double(), packed(DOCUMENTS)
    logits_of(model, random_ids(len(rows), 5, seed=1), before := file.new())
    got, wanted, losses, cache = logits_of(model, ids, cache := before.clone(), seq_idx=seq_idx), [], [], cache
    for i, documents in enumerate(rows):
        alone = [before.select([i]), *(file.new() for _ in documents[1:])]  # the first goes on with the cache's text
        wanted += [torch.cat([logits_of(model, *pair) for pair in zip(documents, alone, strict=True)], dim=1)]
        assert_same_states([v[i : i + 1] for v in states(cache)], states(alone[-1]), 1e-12)
        losses += [(model(d, labels=d)["loss"], d.shape[1] - 1) for d in documents if d.shape[1] > 1]
    assert error(got, torch.cat(wanted)) <= 1e-12
    loss, leaves = sum(mean * n for mean, n in losses) / sum(n for _, n in losses), list(model.parameters())
    for model.config.gradient_checkpointing, loss_only in itertools.product((False, True), (False, True)):
        out = model(ids, labels=ids, seq_idx=seq_idx, loss_only=loss_only)
        assert error(out["loss"], loss) <= 1e-12 and ("logits" in out) != loss_only
        assert_all_close(gradients([out["loss"]], leaves), gradients([loss], leaves))


@pytest.mark.parametrize("side", ["left", "right", "any"])
def test_packed_rows_may_be_padded(file, side):
    model, (ids, seq_idx, _) = tiny(file, bias=True).double(), packed(DOCUMENTS)
    _, mask, _ = padded_batch([52, 40, 50, 0], side)
    got = logits_of(model, ids, cache := file.new(), attention_mask=mask, seq_idx=seq_idx)
    for i, real in enumerate(mask.bool()):
        wanted = logits_of(model, ids[i : i + 1, real], alone := file.new(), seq_idx=seq_idx[i : i + 1, real])
        assert error(got[i, real], wanted[0]) <= 1e-12
        assert_same_states([v[i : i + 1] for v in states(cache)], states(alone), 1e-12)


@pytest.mark.parametrize(
    "way", [{}, {"pieces": 2}, {"pieces": 7}, {"chunk_size": 1}, {"chunk_size": 7}, {"chunk_size": 40}]
)
@pytest.mark.parametrize("heart", ["selective_scan", "ssd"])
def test_a_state_is_forgotten_where_a_document_starts(heart, way):
    if (heart == "ssd") == ("pieces" in way):
        pytest.skip("the scan has pieces, SSD has chunks")
    inputs = leaves_of(scan_inputs(2, 40, 5, 3) if heart == "selective_scan" else ssd_inputs(2, 40, 4, 3, 2, 5))
    file, at = FILES["mamba" if heart == "selective_scan" else "mamba2"], [0, 1, 13, 14, 39]  # at 0 too
    starts = torch.zeros(2, 40, dtype=torch.bool)
    starts[1, at] = True  # of the second row alone
    got, wanted = getattr(file.module, heart)(*inputs, starts=starts, **way), []
    x, dt, A, B, C, state = inputs
    first = file.definition(x[:1], dt[:1], A, B[:1], C[:1], state[:1])
    pieces = itertools.pairwise([*at, 40])
    second = [file.definition(x[1:, i:j], dt[1:, i:j], A, B[1:, i:j], C[1:, i:j]) for i, j in pieces]
    wanted = torch.cat([first[0], torch.cat([y for y, _ in second], dim=1)]), torch.cat([first[1], second[-1][1]])
    assert_all_close(got, wanted)
    assert_all_close(gradients(got, inputs), gradients(wanted, inputs))


def test_transformers_trainer_trains_packed_documents_and_transformers_opens_the_result(first_file, tmp_path):
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    model = tiny(first_file)
    data = [{"input_ids": row[:n].tolist()} for n, row in zip(range(5, 21), random_ids(16, 20, vocab=9), strict=True)]
    pack = transformers.DataCollatorWithFlattening(return_position_ids=False, return_seq_idx=True)
    settings = dict(max_steps=6, per_device_train_batch_size=8, learning_rate=0.01, logging_steps=1, save_strategy="no")
    quiet = dict(use_cpu=True, report_to=[], disable_tqdm=True)
    arguments = transformers.TrainingArguments(tmp_path / "trainer", **settings, **quiet)
    trainer = transformers.Trainer(model, arguments, train_dataset=data, data_collator=pack)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6 and losses[-1] < 0.8 * losses[0]
    model.eval().save_pretrained(tmp_path)
    theirs, ids = transformers.AutoModelForCausalLM.from_pretrained(tmp_path), random_ids(2, 30, vocab=9)
    assert error(logits_of(model, ids), their_logits(theirs, ids)) <= 1e-5


# What the files ask of a device; copies -------------------------------------------------------------------------------


@functools.cache
def operators_on_mps():
    """Torch's operators that have a kernel for MPS or are made of others, by name: "aten::add.Tensor"."""
    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    entries = {entry["func"].split("(")[0]: entry for entry in yaml.load(path.read_text(), yaml.CSafeLoader)}
    kernels = {name: entries[entry.get("structured_delegate", name)] for name, entry in entries.items()}
    keys = {name: " ".join(entry.get("dispatch", ["Composite"])) for name, entry in kernels.items()}
    return {f"aten::{name}" for name in keys if re.search(r"\bMPS\b|Composite", keys[name])}


class Recorder(TorchDispatchMode):
    """The operators that run, and the types of the tensors that they take and give."""

    def __init__(self):
        super().__init__()
        self.operators, self.dtypes = set(), set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **kwargs or {})
        tensors = [v for v in pytree.tree_leaves((args, kwargs, result)) if isinstance(v, torch.Tensor)]
        self.dtypes |= {v.dtype for v in tensors}
        self.operators |= {operator.name()} if operator.namespace == "aten" else set()  # the optimizer has profiler's
        return result


ON_MPS = [("mamba", {}), ("mamba", dict(mixer_rms_eps=1e-5, bias=True)), ("mamba2", {}), ("mamba3", {})]
ON_MPS += [("mamba3", dict(is_mimo=True, is_outproj_norm=True, d_intermediate=8, A_activation="softplus"))]


@pytest.mark.parametrize("name, settings", ON_MPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_operator_has_an_mps_kernel_and_none_is_given_double_precision(name, settings, dtype, monkeypatch):
    file, (ids, mask, _), params = FILES[name], padded_batch([70, 1, 40], "left"), FILES[name].new()
    for part, value in list(vars(file.module).items()):
        if isinstance(value, torch.library.CustomOpDef):  # run what is in it as plain operators, which can be seen
            monkeypatch.setattr(file.module, part, value._init_fn)
    model = tiny(file, tie_embeddings=False, **settings).to(dtype).train()
    classifier = build(file, "ForSequenceClassification", pooling_strategy="mean").to(dtype)
    adam = torch.optim.AdamW(model.parameters(), foreach=False)
    with Recorder() as seen:
        for model.config.gradient_checkpointing in (False, True):
            model(ids, labels=ids, attention_mask=mask)["loss"].backward()
        adam.step()
        sampling = dict(temperature=0.8, top_k=5, top_p=0.9, eos_token_id=[3, 5], generator=generator())
        model.generate(ids, 5, attention_mask=mask, inference_params=params, **sampling)
        model.generate(ids, 2, temperature=0, use_cache=False)
        model.step(ids[:, 0], params.select([2, 0, 1]).clone())
        classifier(ids, mask, torch.tensor([0, 1, 2]))["loss"].backward()
    assert len(seen.operators) > 50
    assert seen.operators - operators_on_mps() == set()
    assert not any(dtype == torch.float64 or dtype.is_complex for dtype in seen.dtypes)


@torch.no_grad()
def test_models_caches_and_states_can_be_copied_and_pickled_and_models_made_without_memory(file):
    model, ids, params = tiny(file), random_ids(2, 9), file.new()
    logits = model(ids, params)
    for copied in (copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))):
        twin, cache, state = copied((model, params, file.module.LayerState(*params.key_value_memory_dict[0])))
        assert twin.config == model.config and twin.config is not model.config and torch.equal(twin(ids), logits)
        assert torch.equal(twin(ids, cache), model(ids, params.clone())) and cache.seqlen_offset == 18
        assert all(map(torch.equal, vars(state).values(), params.key_value_memory_dict[0]))
    with torch.device("meta"):
        empty, cache = file.LM(model.config), file.new()
        loss = empty(ids.to("meta"), cache, labels=ids.to("meta"))["loss"]
    assert loss.is_meta and [v.shape for v in states(cache)] == [v.shape for v in states(params)]
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert torch.equal(empty(ids), logits)


# Compiled and exported ------------------------------------------------------------------------------------------------

HAS_COMPILER = any(map(shutil.which, ("c++", "g++", "clang++")))
INDUCTOR = pytest.param("inductor", marks=pytest.mark.skipif(not HAS_COMPILER, reason="there is no C++ compiler"))


@pytest.fixture
def prefilled(file):
    """A small model, the ids that come next, and the states that a prompt has left."""
    torch._dynamo.reset()
    model, params = tiny(file, n_layer=1), file.new()
    logits_of(model, random_ids(2, 9), params)
    return model, random_ids(2, 1)[:, 0], params


def compiled_and_plain(model, ids, training, **options):
    """Logits without gradients, then loss and gradients of a training step, of a compiled model and of itself."""
    torch._dynamo.reset()
    for run_model in (torch.compile(model, fullgraph=True, **options), model):
        model.zero_grad()
        with torch.no_grad():
            logits = run_model(ids)
        loss = run_model(ids, labels=ids, **training)["loss"]
        loss.backward()
        yield [logits, loss, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("training", [{}, {"loss_only": True, "seq_idx": torch.arange(35).expand(2, 35) // 9}])
def test_forward_and_training_step_compile_whole_and_give_the_same_numbers(file, training):
    model, ids = tiny(file, n_layer=1), random_ids(2, 35)
    assert_all_close(*compiled_and_plain(model, ids, training, backend="aot_eager"), bound=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="there is no C++ compiler")
def test_two_layers_compile_whole_at_length_2048(file, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, start = file.LM(file.Config(n_layer=2, vocab_size=256)), time.perf_counter()
    compiled, plain = compiled_and_plain(model, random_ids(1, 2048, vocab=256), {})
    print(f"forward and training step compiled and ran, then ran plain, in {time.perf_counter() - start:.0f} s")
    assert_all_close(compiled, plain, bound=1e-4)


@torch.no_grad()
def test_forward_compiles_whole_with_a_filled_cache_and_with_a_mask(prefilled, file):
    model, _, params = prefilled
    compiled, ids, mask = torch.compile(model, backend="aot_eager", fullgraph=True), random_ids(2, 6), torch.ones(2, 6)
    mask[0, :4], twin = 0, params.clone()
    assert error(compiled(ids, params), model(ids, twin)) < 1e-5
    assert_same_states(states(params), states(twin), 1e-5)
    assert error(*(run_model(ids, attention_mask=mask)[mask.bool()] for run_model in (compiled, model))) < 1e-5


@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
def test_advance_is_step_without_side_effects_and_compiles_once(prefilled, backend):
    model, ids, params = prefilled
    before, (logits, new) = snapshot(params), model.advance(ids, params.key_value_memory_dict)
    assert all(map(torch.equal, states(params), before))
    assert torch.equal(logits, model.step(ids, params)) and all(map(torch.equal, sum(new.values(), ()), states(params)))
    advance = torch.compile(model.advance, backend=backend, fullgraph=True)
    for i in range(5):
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            logits, new = advance(ids, new)
        assert error(logits, model.step(ids, params)) < 1e-5
        ids = logits.argmax(-1)


class Step(torch.nn.Module):
    """`advance` with states as arguments and results: those of layer 0, of layer 1, ..."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, token_ids, *states):
        n = len(states) // len(self.model.backbone.layers)
        layers = (states[i : i + n] for i in range(0, len(states), n))
        logits, new = self.model.advance(token_ids, dict(enumerate(layers)))
        return logits, *sum(new.values(), ())


def test_a_step_and_a_forward_pass_can_be_exported(prefilled, tmp_path):
    model, ids, params = prefilled
    for module, args in ((Step(model), (ids, *states(params))), (model, (random_ids(2, 40),))):
        with torch.no_grad():
            torch.export.save(torch.export.export(module, args), tmp_path / "program.pt2")
            got, wanted = torch.export.load(tmp_path / "program.pt2").module()(*args), module(*args)
        assert_all_close(got, wanted, bound=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_a_step_runs_in_onnxruntime(prefilled, tmp_path):
    *_, onnxruntime = (pytest.importorskip(package) for package in ("onnx", "onnxscript", "onnxruntime"))
    model, ids, params = prefilled
    torch.onnx.export(Step(model).eval(), (ids, *states(params)), tmp_path / "step.onnx", dynamo=True, verbose=False)
    session, new = onnxruntime.InferenceSession(tmp_path / "step.onnx"), states(params)
    for _ in range(3):
        inputs = {i.name: v.numpy() for i, v in zip(session.get_inputs(), (ids, *new), strict=True)}
        logits, *new = map(torch.tensor, session.run(None, inputs))
        assert error(logits, model.step(ids, params)) <= 1e-5
        ids = logits.argmax(-1)


# Initialisation and settings ------------------------------------------------------------------------------------------


def fresh(file, ending, **changes):
    """The parameters of a new model whose names have an ending, in one vector; of Mamba-2 with many heads."""
    torch.manual_seed(0)
    sizes = dict(d_model=256, n_layer=4, vocab_size=1000) | ({"headdim": 1} if file.name != "mamba" else {})
    model = file.LM(file.Config(**sizes | changes))
    return torch.cat([p.detach().flatten() for name, p in model.named_parameters() if name.endswith(ending)])


def log10_dt(bias):
    return F.softplus(bias).log10()


UNIFORM = 12**-0.5  # standard deviation of the uniform distribution, for a range of 1
STARTS = [  # file, names' ending, settings, function of the values; its lowest, highest, mean, standard deviation
    (None, (".D", "norm.weight", "norm_f.weight"), {}, torch.abs, 1, 1, 1, 0),
    (None, ("in_proj.bias", "out_proj.bias"), dict(bias=True), torch.abs, 0, 0, 0, 0),
    (None, "embeddings.weight", {}, torch.clone, None, None, 0, 0.02),
    (None, "embeddings.weight", dict(initializer_range=0.1), torch.clone, None, None, 0, 0.1),
    (None, "in_proj.weight", {}, torch.clone, -1 / 16, 1 / 16, 0, 1 / 8 * UNIFORM),
    (None, "out_proj.weight", {}, torch.clone, -(512**-0.5) / 2, 512**-0.5 / 2, 0, 512**-0.5 * UNIFORM),
    ("mamba", "dt_proj.weight", dict(dt_scale=0.5), torch.clone, -1 / 8, 1 / 8, 0, 1 / 4 * UNIFORM),
    ("mamba", "dt_proj.weight", dict(dt_scale=0.5, dt_init="constant"), torch.clone, 1 / 8, 1 / 8, 1 / 8, 0),
    ("mamba", "A_log", {}, torch.exp, 1, 16, 8.5, 16 * UNIFORM),
    ("mamba2", "A_log", {}, torch.exp, 1, 16, 8.5, 15 * UNIFORM),
    ("mamba2", "A_log", dict(A_init_range=(2, 6)), torch.exp, 2, 6, 4, 4 * UNIFORM),
    (None, "dt", dict(dt_min=0.01, dt_max=1.0), log10_dt, -2, 0, -1, 2 * UNIFORM),
    (None, "dt", dict(dt_min=1e-6, dt_max=1e-3), log10_dt, -4, -3, None, None),  # the floor
]


@pytest.mark.parametrize("name, ending, settings, function, low, high, mean, std", STARTS)
def test_parameters_start_as_in_the_official_code(file, name, ending, settings, function, low, high, mean, std):
    if name not in (None, file.name) or (file.name == "mamba3" and "bias" in settings):
        pytest.skip("this is about the other file")
    p = function(fresh(file, file.dt_bias if ending == "dt" else ending, **settings).double())
    assert mean is None or ((p.mean() - mean).abs() <= 0.05 * std + 1e-6 and (p.std() - std).abs() <= 0.05 * std)
    for got, wanted in ((p.min(), low), (p.max(), high)):
        assert wanted is None or (abs(got - wanted) <= 0.02 * abs(wanted or 1) and low - 1e-4 <= got <= high + 1e-4)


def test_a_lone_layer_starts_with_decays_from_1_to_n_and_ends_in_a_linear_layer_like_any(file):
    config, linear = file.Config(d_model=256, d_state=16), torch.nn.Linear(512, 256)
    for mixer in (file.Mixer(config), file.Block(config).mixer):
        assert mixer.out_proj.weight.std().item() == pytest.approx(linear.weight.std().item(), rel=0.02)
        if file.name == "mamba":
            assert torch.allclose(mixer.A_log.exp(), torch.arange(1.0, 17).expand(512, 16), rtol=1e-6)


def test_a_tied_model_has_one_matrix_and_weight_decay_is_off_for_states_steps_skips_and_norms_alone(file):
    sizes = dict(vocab_size=97, pad_vocab_size_multiple=8, bias=True)
    models = [tiny(file, tie_embeddings=tie, **sizes) for tie in (False, True)]
    untied, tied = (dict(model.named_parameters()) for model in models)
    assert untied.keys() - tied.keys() == {"lm_head.weight"} and untied["lm_head.weight"].shape == (104, 32)
    exempt = ("A_log", ".D", file.dt_bias, "norm.weight", "norm_f.weight", "_norm.weight")
    for part in (*models, models[0].backbone):
        assert part.no_weight_decay() == {name for name, _ in part.named_parameters() if name.endswith(exempt)}


def test_settings_survive_a_round_trip_through_json(first_file, tmp_path):
    changes = dict(d_model=48, vocab_size=77, d_conv=3, bias=True, norm_epsilon=1e-6, eos_token_id=[1, 2])
    own = {"mamba": dict(mixer_rms_eps=1e-6, dt_rank=5), "mamba2": dict(headdim=24, dt_limit=(0.01, 0.5))}
    Config, path = first_file.Config, tmp_path / "settings.json"
    for config in (Config(), Config(**changes | own[first_file.name])):
        config.save_to_json(path)
        assert Config.from_json(path) == Config.from_dict(config.to_dict()) == config


WRONG = {name: [0, -8, "64", 64.5, True, None] for name in ("d_model", "n_layer", "d_state", "d_conv", "expand")}
WRONG |= {name: [0, -1, 1.5] for name in ("vocab_size", "pad_vocab_size_multiple", "num_labels")}
WRONG |= {name: [0.0, -1.0, math.inf, math.nan, True, "1"] for name in ("norm_epsilon", "dt_min", "dt_max")}
WRONG |= {name: ["no", 1] for name in ("bias", "conv_bias", "residual_in_fp32", "tie_embeddings")}
WRONG |= dict(initializer_range=[-0.1], dt_init_floor=[-1.0], dropout=[1.5, 1.0], pooling_strategy=["first"])
WRONG |= dict(gradient_checkpointing=["no"], pad_token_id=["<pad>"], eos_token_id=["</s>", "", b"1", [1, 2.5]])
WRONG_IN_ONE = {
    "mamba": dict(dt_rank=["all", 0], d_inner=[0], dt_init=["zeros"], dt_scale=[-1.0], mixer_rms_eps=[-1.0]),
    "mamba2": dict(headdim=[0, 100], ngroups=[0, 7], chunk_size=[0], dt_limit=[(0.5, 0.1), 1]),
}
WRONG_IN_ONE |= {"mamba3": dict(headdim=[0, 100], ngroups=[0, 7], rope_fraction=[0, 1.5], mimo_rank=[0])}
WRONG_IN_ONE["mamba3"] |= dict(A_activation=["relu"], d_intermediate=[-1], A_floor=[0.0], d_state=[3])
WRONG_IN_ONE["mamba2"] |= dict(A_init_range=[(0, 16), (16, 1), (1, math.inf)])


def test_a_wrong_or_unknown_setting_is_named(file):
    for name, values in (WRONG | WRONG_IN_ONE[file.name] | {"n_layers": [3]}).items():
        for value in values if name == "n_layers" or hasattr(file.Config, name) else ():
            with pytest.raises((ValueError, TypeError), match=name) as caught:
                file.Config(**{name: value})
            assert name == "n_layers" or str(value).strip("()") in str(caught.value), (name, value)
    for wrong, settings in (("dt_max", {"dt_min": 0.5, "dt_max": 0.1}), ("n_layers", {"n_layers": 3})):
        with pytest.raises(ValueError, match=wrong):
            file.Config.from_dict(settings)


FULL_MATCH = 2e-6  # of the largest logit: float32 logits of two implementations at noise 0.1


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def build(file, suffix, **settings):
    """A small model of the class with this ending: "Model", "ForSequenceClassification", ..."""
    config = file.Config(**dict(d_model=32, n_layer=2, vocab_size=VOCAB, num_labels=3) | file.tiny | settings)
    torch.manual_seed(0)
    return randomise(getattr(file.module, file.LM.__name__.removesuffix("ForCausalLM") + suffix)(config), 0.1)


def again(model, directory):
    """A model of ours, saved and loaded."""
    model.save_pretrained(directory)
    return type(model).from_pretrained(directory)


def put(path, **fields):
    """Change fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit(directory, change_weights=None, **fields):
    """Change what is stored: the tensors by a function, fields of the config."""
    put(directory / "config.json", **fields)
    if change_weights:
        weights = safetensors.torch.load_file(path := directory / "model.safetensors")
        change_weights(weights)
        safetensors.torch.save_file(weights, path, metadata={"format": "pt"})


def same_weights(a, b):
    """Whether two models hold the same parameters, bit by bit, under the same names."""
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


# Checkpoints ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", ODD_SETTINGS)
def test_a_checkpoint_of_either_side_has_the_same_weights_and_logits_in_the_other(settings, ours_for, tmp_path):
    ours, theirs, ids = ours_for(settings, 0.1), theirs_for(settings, 0.1), random_ids(2, 65)
    assert same_weights(ours, theirs) and not ours.training and all(p.requires_grad for p in ours.parameters())
    assert ours.config.tie_embeddings == theirs.config.tie_word_embeddings and ours.config.padded_vocab_size == VOCAB
    ours.save_pretrained(tmp_path)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(theirs) and not any(info[k] for k in ("missing_keys", "unexpected_keys"))
    assert same_weights(loaded, theirs) and torch.equal(their_logits(loaded, ids), their_logits(theirs, ids))


UNUSUAL = dict(d_model=48, n_layer=1, vocab_size=60, pad_vocab_size_multiple=16, d_conv=3, bias=True, conv_bias=False)
UNUSUAL |= dict(residual_in_fp32=False, bos_token_id=2, eos_token_id=[3, 4], pad_token_id=5, tie_embeddings=False)
UNUSUAL |= dict(num_labels=5, pooling_strategy="max", dropout=0.3)  # then whole numbers, no floats to transformers
UNUSUAL |= dict(dt_min=1, dt_max=2, dt_init_floor=1, norm_epsilon=1, initializer_range=1)
UNUSUAL_IN_ONE = {"mamba": dict(dt_init="constant", dt_scale=2, d_inner=80, dt_rank=5, mixer_rms_eps=1)}
UNUSUAL_IN_ONE |= {"mamba2": dict(headdim=24, ngroups=2, dt_limit=(0.1, 2))}


@pytest.mark.parametrize("name", FIRST)
def test_a_checkpoint_of_a_model_born_here_keeps_all_settings(name, tmp_path):
    model = FILES[name].LM(FILES[name].Config(**UNUSUAL | UNUSUAL_IN_ONE[name]))
    assert again(model, tmp_path).config == model.config
    theirs, ids = transformers.AutoModelForCausalLM.from_pretrained(tmp_path), random_ids(2, 40, vocab=60)
    assert theirs.config.vocab_size == 64 and theirs.config.eos_token_id == [3, 4]
    assert error(logits_of(model, ids), their_logits(theirs, ids)) <= FULL_MATCH


SHARDS = dict(max_shard_size="50KB")
save_bin = functools.partial(huggingface_hub.save_torch_state_dict, safe_serialization=False)
WEIGHT_FORMATS = {
    "safetensors in shards": lambda theirs, path: theirs.save_pretrained(path, **SHARDS),
    "bin": lambda theirs, path: save_bin(theirs.state_dict(), path),
    "bin in shards": lambda theirs, path: save_bin(theirs.state_dict(), path, **SHARDS),
}


@pytest.mark.parametrize("store", WEIGHT_FORMATS.values(), ids=WEIGHT_FORMATS)
@pytest.mark.parametrize("settings", TRANSFORMERS)
def test_weights_load_from_every_kind_of_file_and_stay_when_it_goes(settings, store, tmp_path):
    theirs_for(settings, 0.1).config.save_pretrained(tmp_path)
    store(theirs_for(settings, 0.1), tmp_path)
    model = file_for(settings).LM.from_pretrained(tmp_path)
    for path in tmp_path.glob("*model*"):
        with open(path, "r+b") as stored:  # in place, under a mapping that may still be open
            stored.write(bytes(path.stat().st_size))
    assert same_weights(model, theirs_for(settings, 0.1))


@pytest.mark.parametrize("settings", TRANSFORMERS)
def test_absent_fields_take_the_defaults_of_transformers(settings, tmp_path):
    config_class, model_class = TRANSFORMERS[settings]
    sizes = dict(hidden_size=32, vocab_size=VOCAB) | (dict(num_heads=8, head_dim=8) if settings == "mamba2" else {})
    theirs, LM = model_class(config_class(**sizes)), file_for(settings).LM
    theirs.save_pretrained(tmp_path)
    with_all_fields = LM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"model_type": settings}))
    model = LM.from_pretrained(tmp_path)
    assert same_weights(model, theirs) and model.config == with_all_fields.config


STRANGE_FIELDS = [
    ("mamba expand 3, conv 3", dict(d_model=9, n_layer=9, d_inner=7, rms_norm=False)),  # contradict; model_type decides
    ("falcon_mamba", dict(hidden_act="swish", pad_vocab_size_multiple=None)),  # another name of SiLU
    ("mamba2 expand 1, conv 2", dict(norm_before_gate=True, rms_norm=True)),  # Codestral's; transformers ignores it
    ("mamba2 chunk 256", dict(time_step_limit=[0.1, math.inf])),
    ("mamba2 chunk 256", dict(time_step_limit=[0.1, {"__float__": "Infinity"}])),  # transformers 5
]


@pytest.mark.parametrize("settings, fields", STRANGE_FIELDS)
def test_fields_mean_what_they_mean_in_transformers(settings, fields, tmp_path):
    theirs_for(settings, 0.1).save_pretrained(tmp_path)
    edit(tmp_path, **fields)
    theirs, ids = type(theirs_for(settings, 0.1)).from_pretrained(tmp_path), random_ids(2, 40)
    ours = file_for(settings).LM.from_pretrained(tmp_path)
    assert error(logits_of(ours, ids), their_logits(theirs, ids)) <= FULL_MATCH


@pytest.mark.parametrize("settings", ["mamba", "falcon_mamba", "mamba2 expand 1, conv 2"])
@pytest.mark.parametrize("only_a_head", [True, False])
def test_tensors_count_more_than_a_config_that_says_tied(settings, only_a_head, tmp_path):
    def untie(weights):
        embedding = weights.pop("backbone.embeddings.weight")
        weights["lm_head.weight"] = embedding.clone()
        if not only_a_head:
            weights["backbone.embeddings.weight"] = embedding + torch.randn(embedding.shape, generator=generator())

    theirs_for(settings, 0.1).save_pretrained(tmp_path)
    edit(tmp_path, untie)
    theirs, ids = type(theirs_for(settings, 0.1)).from_pretrained(tmp_path), random_ids(2, 9)
    ours = file_for(settings).LM.from_pretrained(tmp_path)
    assert ours.config.tie_embeddings == only_a_head
    assert error(logits_of(ours, ids), their_logits(theirs, ids)) <= FULL_MATCH
    assert same_weights(again(ours, tmp_path), ours)
    assert torch.equal(their_logits(type(theirs).from_pretrained(tmp_path), ids), their_logits(theirs, ids))


def in_state_spaces_format(directory, theirs, with_head=True, **changes):
    """Store a transformers model as state-spaces/mamba does; its vocabulary of 96 holds 93 tokens and padding."""
    c = theirs.config
    ssm_cfg = dict(d_state=c.state_size, d_conv=c.conv_kernel, expand=c.expand, conv_bias=c.use_conv_bias)
    if c.model_type == "mamba2":
        ssm_cfg |= dict(layer="Mamba2", headdim=c.head_dim, ngroups=c.n_groups, dt_limit=[0.0, math.inf])
    ssm_cfg |= dict(bias=True) if c.use_bias else {}
    config = dict(d_model=c.hidden_size, n_layer=c.num_hidden_layers, vocab_size=93, ssm_cfg=ssm_cfg, rms_norm=True)
    config |= dict(d_intermediate=0, attn_layer_idx=[], attn_cfg={}, residual_in_fp32=True, fused_add_norm=True)
    config |= dict(pad_vocab_size_multiple=16, tie_embeddings=c.tie_word_embeddings)
    (directory / "config.json").write_text(json.dumps(config | changes))
    weights = theirs.state_dict().items() if with_head else [*theirs.state_dict().items()][:-1]
    torch.save({k.replace("embeddings.", "embedding."): v for k, v in weights}, directory / "pytorch_model.bin")


@pytest.mark.parametrize("settings", ["mamba", "mamba expand 1, conv 2", "mamba2", "mamba2 expand 1, conv 2"])
def test_the_format_of_state_spaces_gives_the_same_logits(settings, tmp_path):
    theirs, ids = transformers_model(settings, 0.1, vocab_size=96), random_ids(2, 65, vocab=93)
    for with_head in {True, not theirs.config.tie_word_embeddings}:  # a tied one may be there or not
        in_state_spaces_format(tmp_path, theirs, with_head)
        model = file_for(settings).LM.from_pretrained(tmp_path)
        assert error(logits_of(model, ids), their_logits(theirs, ids)) <= FULL_MATCH
    assert model.config.vocab_size == 93 and model.config.padded_vocab_size == 96
    assert model.config.eos_token_id == 0  # GPT-NeoX's end of text


READ = {"mamba": dict(d_state=5, dt_rank=3, dt_min=0.01, dt_init="constant", dt_scale=2.0)}
READ |= {"mamba2": dict(d_state=5, headdim=16, dt_limit=(0.1, 1.0), A_init_range=(2, 3), dt_max=0.2)}
OF_KERNELS = {"mamba": dict(use_fast_path=False), "mamba2": dict(layer="Mamba2", rmsnorm=True, D_has_hdim=False)}
OF_KERNELS["mamba2"] |= dict(conv_init=None, use_mem_eff_path=True, norm_before_gate=False)
SSM_CFG = [("mamba", {}, {}), ("mamba", {}, None), ("mamba2", {}, {"layer": "Mamba2"})]
SSM_CFG += [(name, READ[name], OF_KERNELS[name]) for name in READ]


@pytest.mark.parametrize("name, read, ignored", SSM_CFG)
def test_the_fields_of_ssm_cfg_are_read_and_those_of_kernels_ignored(name, read, ignored, tmp_path):
    fields = dict(d_model=64, n_layer=1, vocab_size=VOCAB, residual_in_fp32=False)
    model = FILES[name].LM(FILES[name].Config(**fields | read, eos_token_id=0))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    ssm_cfg = None if ignored is None else read | ignored
    (tmp_path / "config.json").write_text(json.dumps(fields | {"ssm_cfg": ssm_cfg}))
    loaded = FILES[name].LM.from_pretrained(tmp_path)
    assert same_weights(loaded, model) and loaded.config == model.config


LAYERS = {"mamba": "Mamba1", "mamba2": "Mamba2"}  # in ssm_cfg
REFUSED = {"attn_layer_idx": dict(attn_layer_idx=[1]), "d_intermediate": dict(d_intermediate=128)}
REFUSED |= {"rms_norm": dict(rms_norm=False), "Hyena": dict(layer="Hyena"), "d_stat": dict(ssm_cfg={"d_stat": 16})}
REFUSED |= {"hidden_act": dict(hidden_act="gelu"), "quantization_config": dict(quantization_config={"bits": 4})}
REFUSED |= {"gpt2": dict(model_type="gpt2")}
REFUSED = [(name, field, changes) for name in LAYERS for field, changes in REFUSED.items()]
FOREIGN = dict(norm_before_gate=True, D_has_hdim=True, d_ssm=64, rmsnorm=False)
REFUSED += [("mamba2", field, dict(ssm_cfg={field: value})) for field, value in FOREIGN.items()]
for name, other in itertools.permutations(LAYERS, 2):
    REFUSED += [(name, rf"use {other}\.py", changes) for changes in ({"model_type": other}, {"layer": LAYERS[other]})]
REFUSED += [(name, r"use mamba3\.py", {"layer": "Mamba3"}) for name in LAYERS]


@pytest.mark.parametrize("name, message, changes", REFUSED)
def test_a_checkpoint_of_another_kind_or_file_is_refused(name, message, changes, tmp_path):
    if changes.keys() & {"hidden_act", "quantization_config", "model_type"}:  # transformers' fields
        theirs_for(name, 0.1).save_pretrained(tmp_path)
        edit(tmp_path, **changes)
    else:
        ssm_cfg = {"layer": changes.get("layer", LAYERS[name])} | changes.get("ssm_cfg", {})
        in_state_spaces_format(tmp_path, theirs_for(name, 0.1), **changes | {"ssm_cfg": ssm_cfg})
    with pytest.raises(ValueError, match=message):
        FILES[name].LM.from_pretrained(tmp_path)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_the_stored_type_is_kept_unless_another_is_asked_for(file, stored, tmp_path):
    model = tiny(file).to(stored)
    assert same_weights(again(model, tmp_path), model)
    wanted = file.LM.from_pretrained(tmp_path, device="cpu", dtype=torch.float64)
    assert same_weights(wanted, copy.deepcopy(model).double())
    assert {p.device.type for p in file.LM.from_pretrained(tmp_path, device="meta").parameters()} == {"meta"}


def test_hub_arguments_are_handed_to_huggingface_hub(file, tmp_path, monkeypatch):
    model, options, asked = tiny(file), dict(revision="v1", token="t", cache_dir="c", local_files_only=True), []

    def snapshot_download(*name, allow_patterns, **given):
        asked.append("pytorch_model.bin" in allow_patterns)
        assert name == ("some/model",) and given == options
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model.save_pretrained(tmp_path)
    assert same_weights(file.LM.from_pretrained("some/model", **options), model)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")  # asked for where there is nothing else
    assert same_weights(file.LM.from_pretrained("some/model", **options), model)
    assert asked == [False, False, True]
    with pytest.raises(TypeError, match="trust_remote_code"):
        file.LM.from_pretrained(tmp_path, trust_remote_code=True)


@pytest.mark.parametrize("offline, reason", [(False, "no network"), (True, "OFFLINE")])
def test_without_network_a_hub_name_gives_one_clear_error(file, offline, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", Mock(side_effect=socket.gaierror("no network")))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(OSError, match=rf"^[^\n]*some/model[^\n]*{reason}[^\n]*$") as caught:
        file.LM.from_pretrained("some/model", cache_dir=tmp_path)
    assert caught.value.__suppress_context__  # one error, not a chain of them


def listing(directory):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def test_saving_replaces_an_old_checkpoint_and_keeps_other_files(file, tmp_path):
    kept = {"README.md", "tokenizer.json", "model_ema.safetensors", "pytorch_model_best.bin"}
    gone = {"model.safetensors.index.json", "model-00001-of-00002.safetensors", "pytorch_model.bin"}
    for name in kept | gone | {"pytorch_model.bin.index.json", "pytorch_model-00001-of-00003.bin"}:
        (tmp_path / name).write_text("{}")
    assert same_weights(again(tiny(file), tmp_path), tiny(file))
    own = {"generation_config.json"} if file.name == "mamba3" else set()
    assert set(listing(tmp_path)) == kept | {"config.json", "model.safetensors"} | own


def test_saving_leaves_frozen_parameters_frozen(file, tmp_path):
    model = tiny(file).requires_grad_(False)
    assert same_weights(again(model, tmp_path), model) and not any(p.requires_grad for p in model.parameters())


HEADS = [(name, name) for name in ("Model", "Encoder", "ForFeatureExtraction", "ForSequenceClassification")]
HEADS += [(name, "ForSequenceClassification") for name in ("Model", "ForCausalLM")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored, wanted", [*HEADS, ("ForSequenceClassification", "ForCausalLM")])
def test_any_model_starts_from_a_checkpoint_with_its_backbone(file, stored, wanted, dtype, tmp_path):
    model, wanted, x = build(file, stored).to(dtype), build(file, wanted), torch.randn(2, 5, 32).to(dtype)
    model.save_pretrained(tmp_path)
    loaded = type(wanted).from_pretrained(tmp_path)
    assert same_weights(getattr(loaded, "backbone", loaded), getattr(model, "backbone", model))
    assert loaded(x).shape == wanted(x.float()).shape and loaded(x).isfinite().all()
    assert stored == "Encoder" or loaded.get_input_embeddings()(random_ids(2, 5)).shape == (2, 5, 32)
    assert type(model) is not type(loaded) or torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("tokens", [130, 50])
def test_resizing_keeps_the_rows_that_stay(file, tokens, tie, tmp_path):
    model, before, ids = tiny(file, tie_embeddings=tie), tiny(file, tie_embeddings=tie), random_ids(2, 9, vocab=50)
    embeddings = model.resize_token_embeddings(tokens)
    assert embeddings is model.get_input_embeddings() is model.backbone.embeddings
    rows, kept, logits = model.config.padded_vocab_size, min(tokens, VOCAB), logits_of(model, ids)
    assert model.config.vocab_size == tokens and model.get_output_embeddings().weight.shape == (rows, 32)
    assert logits.shape[-1] == rows and torch.equal(logits[..., :kept], logits_of(before, ids)[..., :kept])
    new = embeddings.weight[before.config.padded_vocab_size :]
    assert len(new) == 0 or 0.015 < new.std() < 0.025  # as in a new model: initializer_range, 0.02
    assert torch.equal(logits_of(again(model, tmp_path), ids), logits)


# Checkpoints that nobody should trust ---------------------------------------------------------------------------------

NORM = "backbone.norm_f.weight"
KINDS = {"safe": "model.safetensors", "bin": "pytorch_model.bin", "transformers": "model.safetensors"}
KINDS |= {"of mamba3": "model.safetensors"}
KINDS |= {"shards": "model-00001-of-*.safetensors", "bin shards": "pytorch_model-00001-of-*.bin"}
GROUPS = {"each": ["safe", "bin", "shards", "bin shards"], "bins": ["bin", "bin shards"]}
GROUPS |= {"sharded": ["shards", "bin shards"], "whole": ["safe", "bin"]}
HOSTILE = """
each | weights | path.write_bytes(_) | b""; path.read_bytes()[:2000]; path.read_bytes()[:-1]; b"<html>"
each | weights | path.unlink() or path._ | mkdir(); symlink_to(path.name)
safe | weights | path.write_bytes(struct.pack("<Q", _) + b"{}") | 2**64 - 1; 90 * 10**6
safe | weights | header(path, _) | shape=[2**63, 2**63]; shape=[-16]; shape="x"; data_offsets=[0, 2**50]; dtype="X9"
bins | weights | torch.save(_, path) | [torch.ones(3)]; torch.ones(3); {1: torch.ones(3)}; {NORM: 3.0}; {NORM: "x"}
bins | weights | torch.save({NORM: _}, path) | runs(os.system, f"touch {pwned}"); runs(open, pwned, "w")
bins | weights | path.write_bytes(pickle.dumps(_)) | {NORM: runs(os.system, f"touch {pwned}")}; runs(open, pwned, "w")
bins | weights | archive(path, "w")._ | close(); writestr("a/b", "text")
whole | weights | change(NORM, lambda v: v.to(torch._)) | int32; bool; cfloat; float8_e5m2
safe | weights | save({k: v for k, v in load(path).items() if _}, path) | k != NORM; "head" not in k; ".D" not in k
safe | weights | save({**load(path), _: torch.ones(3)}, path) | NORM; "lm_head.bias"; "backbone.layers.1.norm.weight"
bin | weights | change(_) | NORM, torch.Tensor.to_sparse; "", lambda v: v.to("meta")
bin | weights | put(config, vocab_size=10**_), change("embed", wide), change("lm_head", wide) | 9
sharded | weights | save({**load(two), **{k: v + 1 for k, v in load(_).items()}}, two) | path
sharded | *.index.json | put(path, weight_map=_) | None; "x"; {}; {NORM: 3}
sharded | *.index.json | put(path, weight_map={**old["weight_map"], NORM: _}) | ["x"]; "."; "config.json"; "x" * 300
sharded | *.index.json | put(path, weight_map={k: f"_/{v}" for k, v in old["weight_map"].items()}) | ../d; {far}
sharded | *.index.json | path.write_text(_) | ""; "[]"; "NaN"; "[" * 10**5
safe | config.json | path.write_text(_) | ""; "{}"; "[]"; "NaN"; "[" * 10**5; '{"a":' * 10**5
safe | config.json | path._ | unlink(); write_bytes(b'{"d_model": "\\xff"}'); write_bytes("{}".encode("utf16"))
safe | config.json | put(path, d_model=_) | "16"; None; [16]; {}; math.nan; -16; 0; 1.5; True; 10**9; 10**400
safe | config.json | put(path, n_layer=_) | "1"; {"__float__": None}; -1; 2; 10**6; 10**30
safe | config.json | put(path, vocab_size=_) | None; 1.5; 10**9; 10**30; 10**400
safe | config.json | put(path, _) | pad_vocab_size_multiple=0; tie_embeddings=3; eos_token_id=[1.5]; attn_layer_idx=[1]
safe | config.json | put(path, quantization_config=_) | 4; {"bits": 4}
safe | config.json | put(path, ssm_cfg=_) | "x"; [1]; {"layer": ["x"]}; {"layer": {}}; {"layer": None}
safe | config.json | put(path, ssm_cfg={**old["ssm_cfg"], "d_state": _}) | -1; "8"; math.nan; 6; 10**12; 10**30
safe | config.json | put(path, ssm_cfg=dict(old["ssm_cfg"], _)) | expand=0; expand=10**6; headdim=0; layers=1
of mamba3 | generation_config.json | path.write_text(_) | ""; "[]"; '{"eos_token_id": [1.5]}'
transformers | config.json | put(path, _) | hidden_size="x"; hidden_size=10**30; num_hidden_layers=10**9
transformers | config.json | path.write_text(_) | '{"a": {"__float__": [1]}}'; '"model_type"'; "3"
transformers | config.json | put(path, _) | model_type=["x"]; model_type=3; hidden_act={}
"""
HOSTILE = [(kind, *rest) for group, *rest in table(HOSTILE) for kind in GROUPS.get(group, [group])]


def runs(*call):
    """Unpickled without care, this calls a function."""
    return type("Runs", (), {"__reduce__": lambda self: (call[0], call[1:])})()


@functools.cache
def valid(name, kind):
    """The files of a small valid checkpoint, by name; but for one kind in state-spaces' format, which all read."""
    model, directory = tiny(FILES[name], d_model=16, n_layer=1, tie_embeddings=False), Path(tempfile.mkdtemp())
    if kind == "transformers":
        model.save_pretrained(directory)
    else:
        top = ("d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple", "tie_embeddings")
        layer = {"layer": name.capitalize() + "1" * (name == "mamba")} | FILES[name].tiny
        stored = {field: getattr(model.config, field) for field in top} | {"ssm_cfg": layer}
        (directory / "config.json").write_text(json.dumps(stored))
        how = dict(max_shard_size="6KB" if "shards" in kind else "1GB", safe_serialization="bin" not in kind)
        huggingface_hub.save_torch_state_dict({k: p.detach() for k, p in model.named_parameters()}, directory, **how)
    assert same_weights(FILES[name].LM.from_pretrained(directory), model)
    files = listing(directory)
    shutil.rmtree(directory)
    return files


def header(path, **fields):
    stored = path.read_bytes()
    text = json.loads(stored[8 : 8 + (size := struct.unpack("<Q", stored[:8])[0])])
    text = json.dumps(text | {NORM: text[NORM] | fields}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + stored[8 + size :])


def tools(path, pwned):
    """What the table above uses."""
    load, save = safetensors.torch.load_file, safetensors.torch.save_file
    load, save = (torch.load, torch.save) if path.suffix == ".bin" else (load, save)
    old = json.loads(path.read_text()) if path.match("*.json") and path.exists() else None
    far, two = path.parent.with_name("d"), max(path.parent.glob("*model-*"), default=None)
    shutil.copytree(path.parent, far)
    config, wide = path.parent / "config.json", lambda v: v[:1, :1].expand(10**9, 16)
    archive = zipfile.ZipFile

    def change(part, function):
        save({key: function(v) if part in key else v for key, v in load(path).items()}, path)

    return locals()


@contextlib.contextmanager
def bounded(seconds=5, megabytes=400):
    """Fails after some time; memory beyond some is refused."""
    import resource  # there is none on Windows

    pages, limits = int(Path("/proc/self/statm").read_text().split()[0]), resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"took more than {seconds} s"))
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + megabytes * 2**20, limits[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)


@on_linux
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind, name, change", HOSTILE, ids=[f"{kind}: {change[:60]}" for kind, _, change in HOSTILE])
def test_a_hostile_checkpoint_ends_at_once_in_an_error_that_names_the_fault(file, kind, name, change, tmp_path):
    if (kind == "transformers" and file.name not in FIRST) or (kind == "of mamba3" and file.name in FIRST):
        pytest.skip("the format is another")
    directory, name = tmp_path / "c", KINDS[kind] if name == "weights" else name
    directory.mkdir()
    for stored, content in valid(file.name, kind).items():
        (directory / stored).write_bytes(content)
    path, pwned = next(directory.glob(name), directory / name), str(tmp_path / "pwned")
    eval(change, globals() | tools(path, pwned))
    with bounded(), pytest.raises((ValueError, OSError)) as caught:
        file.LM.from_pretrained(directory)
    assert not Path(pwned).exists() and "alloc" not in str(caught.value)
    words = ["config.json", "can't load", "do not fit", "model-0", "norm_f", "n_layer", "d_model", path.name]
    assert re.search("|".join([*words, *re.findall(r"\w{5,}", change)]), str(caught.value))


# Saving that is cut short ---------------------------------------------------------------------------------------------


def killed_at(call, function):
    """Whether a function makes so many renames and removals; at that one the process that runs it here is killed."""
    if child := os.fork():
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    count = itertools.count()

    def counted(original, *args, **kwargs):
        if ".saving-" not in str(args[-1]) and next(count) == call:  # what happens in there harms nobody
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    for name in ("replace", "rename", "unlink"):
        setattr(os, name, functools.partial(counted, getattr(os, name)))
    try:
        function()
    finally:
        os._exit(0)


def store_as(kind, model, directory):
    """A checkpoint of this kind; save_pretrained writes only the first."""
    model.save_pretrained(directory)
    if kind != "model.safetensors":
        weights, sizes = safetensors.torch.load_file(directory / "model.safetensors"), dict(max_shard_size="6KB")
        (directory / "model.safetensors").unlink()
        how = {
            "shards": sizes,
            "bin": dict(safe_serialization=False),
            "bin shards": dict(safe_serialization=False) | sizes,
        }
        huggingface_hub.save_torch_state_dict(weights, directory, **how[kind])


@on_posix
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("old", ["model.safetensors", "shards", "bin shards"])
@pytest.mark.parametrize("settings", [{}, dict(n_layer=2), dict(dropout=0.5), dict(eos_token_id=7)])
def test_saving_that_is_killed_leaves_the_old_checkpoint_or_the_new(file, old, settings, tmp_path):
    small, directory, killed, calls = dict(d_model=16, n_layer=1), tmp_path / "c", True, itertools.count()
    models = tiny(file, **small), tiny(file, noise=0.2, **small | settings)
    while killed:
        shutil.rmtree(directory, ignore_errors=True)
        store_as(old, models[0], directory)
        killed = killed_at(next(calls), lambda: models[1].save_pretrained(directory))
        try:
            stored = file.LM.from_pretrained(directory)
        except (OSError, ValueError):  # refused, not mixed: no rename changes settings and weights at once
            assert killed and settings
            continue
        either = models if killed else models[1:]
        settled = [all(getattr(stored.config, f) == getattr(m.config, f) for f in small | settings) for m in either]
        assert any(settled and same_weights(stored, m) for settled, m in zip(settled, either, strict=True))
    assert next(calls) > 2


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("at", ["safetensors.torch.save_file", "pathlib.Path.write_text", "os.chmod"])
def test_saving_that_fails_leaves_all_files_as_they_were(file, error, at, tmp_path, monkeypatch):
    tiny(file).save_pretrained(tmp_path)
    before = listing(tmp_path)
    monkeypatch.setattr(at, Mock(side_effect=error))
    with pytest.raises(type(error)):
        tiny(file, n_layer=3).save_pretrained(tmp_path)
    assert listing(tmp_path) == before


# Generation -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def with_fixed_logits(file, logits, **changes):
    """A model that gives these logits at every position whatever came before, and 3 for the vocabulary's padding."""
    model = tiny(file, d_model=16, n_layer=1, vocab_size=len(logits), tie_embeddings=False, **changes)
    model.backbone.layers[0].mixer.out_proj.weight.zero_()
    model.backbone.embeddings.weight.fill_(1.0)
    model.backbone.norm_f.weight.fill_((1 + model.config.norm_epsilon) ** 0.5)
    model.lm_head.weight.fill_(3 / 16)
    model.lm_head.weight[: len(logits)] = logits[:, None] / 16
    assert torch.allclose(model(random_ids(1, 2, vocab=3))[0, 1, : len(logits)], logits, atol=1e-5)
    return model


def warped(logits, temperature=1.0, top_k=None, top_p=None):
    """As transformers' generate does it, in its order."""
    logits = TemperatureLogitsWarper(float(temperature))(None, logits)
    logits = TopKLogitsWarper(top_k)(None, logits) if top_k else logits
    return TopPLogitsWarper(top_p)(None, logits) if top_p else logits


SAMPLING = [dict(), dict(temperature=0.6), dict(temperature=1.5, top_k=1), dict(top_k=3), dict(top_k=0)]  # 3: a tie
SAMPLING += [dict(top_p=0.31), dict(top_p=1e-6), dict(top_k=6, top_p=0.9), dict(temperature=1.4, top_p=0.7)]
SAMPLING += [dict(temperature=0.6, top_k=7, top_p=0.85), dict(top_k=1000, top_p=1.0)]


@pytest.mark.parametrize("options", SAMPLING)
def test_sampling_draws_the_tokens_that_transformers_keeps_as_often(file, options):
    logits = torch.tensor([0.3, 2.0, -1.0, 1.1, 0.9, 0.9, -0.3, 1.7, 0.1, -0.7, 0.6])
    logits[5] -= 0.05 if "top_p" in options else 0.0  # the order of ties is nobody's promise
    prompts = torch.zeros(500, 1, dtype=torch.long)
    ids = with_fixed_logits(file, logits).generate(prompts, 8, generator=generator(), **options)
    counts = torch.bincount(ids[:, 1:].flatten(), minlength=16)
    probabilities = F.pad(warped(logits[None], **options)[0].softmax(-1), (0, 16 - len(logits)))
    assert (counts > 0).tolist() == (probabilities > 0).tolist()
    deviation = (4000 * probabilities * (1 - probabilities)).sqrt()
    assert ((counts - 4000 * probabilities).abs() <= 5 * deviation + 1e-3).all()


def test_padding_of_the_vocabulary_is_never_generated_but_for_rows_that_became_tokens(file, tmp_path):
    model, prompt = with_fixed_logits(file, torch.full((11,), -2.0)), torch.zeros(50, 2, dtype=torch.long)
    assert logits_of(model, prompt)[..., 11:].min() > 0  # the padding would win
    for m, options in itertools.product((model, again(model, tmp_path)), (dict(temperature=0), dict(top_k=5))):
        assert m.generate(prompt, 5, generator=generator(), **options).max() < 11
    if file.name in FIRST:  # for transformers each row may be a token
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        theirs.resize_token_embeddings(model.config.padded_vocab_size)
        theirs.save_pretrained(tmp_path)
        assert file.LM.from_pretrained(tmp_path).generate(prompt, 5, temperature=0)[:, 2:].min() >= 11


@pytest.mark.parametrize("options", [dict(temperature=0), dict(), dict(temperature=1.3, top_k=20, top_p=0.9)])
def test_one_seed_gives_one_text_with_and_without_cache_and_as_a_stream(file, options):
    model, ids = tiny(file).train(), random_ids(3, 10)
    one, two = (model.generate(ids, 20, use_cache=c, generator=generator(5), **options) for c in (True, False))
    assert torch.equal(one, two) and one.shape == (3, 30) and torch.equal(one[:, :10], ids)
    assert model.training and not one.requires_grad
    row = model.generate(ids[:1], 9, generator=generator(5), **options)[0, 10:].tolist()
    for stream in (model.stream, model.generate_streaming):
        tokens = [*itertools.islice(stream(ids[:1], 10**9, generator=generator(5), **options), 9)]  # as they come
        assert tokens == row and all(type(token) is int for token in tokens)
    other = model.generate(ids, 20, generator=generator(6), **options)
    torch.manual_seed(6)  # decides where no generator is given
    assert torch.equal(other, one) == (options == dict(temperature=0))
    assert torch.equal(other, model.generate(ids, 20, **options))


@pytest.mark.parametrize("of_config", [5, [2, 5], (5,)])
def test_generation_ends_where_the_config_says_unless_told_otherwise(file, of_config):
    model, ids = with_fixed_logits(file, 100 * torch.eye(8)[5], eos_token_id=of_config), random_ids(3, 4, vocab=5)
    assert model.generate(ids, 9).shape == model.generate(ids, 9, eos_token_id=[1, 5]).shape == (3, 5)
    assert model.generate(ids, 9, eos_token_id=()).shape == model.generate(ids, 9, eos_token_id=2).shape == (3, 13)
    model.config.eos_token_id = None
    assert model.generate(ids, 9).shape == (3, 13)


@pytest.mark.parametrize("side", ["left", "any"])
def test_a_long_prompt_is_read_in_segments_like_each_row_in_one_pass(file, side):
    model, params, sizes = tiny(file, d_model=16, n_layer=1, bias=True), file.module.InferenceParams(), []
    ids, mask, rows = padded_batch([3000, 1400, 20], side)
    hook = model.backbone.layers[0].register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[:2].numel()))
    out = model.generate(ids, 1, temperature=0, attention_mask=mask, inference_params=params)[:, -1]
    assert max(sizes) <= 1000 and sum(sizes) == ids.numel()
    hook.remove()
    for i, row in enumerate(rows):
        whole = file.module.InferenceParams()
        assert out[i] == logits_of(model, row, whole, num_last_tokens=1)[0, -1, :VOCAB].argmax()
        angle = 4 if file.name == "mamba3" else 1  # a sum over all tokens: 1e-5 after 3000 of them
        assert_same_states(states(params.select([i])), states(whole), angle * SPLIT_BOUNDS[0.1])


def test_one_prefix_serves_many_questions(file):
    model, prefix, state = tiny(file, noise=0.3), random_ids(1, 30), file.module.InferenceParams()
    logits_of(model, prefix, state)
    before, (ids, mask, rows) = snapshot(state), padded_batch([6, 1, 4], "left")
    out = model.generate(ids, 8, temperature=0, attention_mask=mask, inference_params=state.select([0, 0, 0]))
    for row, new in zip(rows, out[:, -8:], strict=True):
        assert new.tolist() == model.generate(torch.cat([prefix, row], 1), 8, temperature=0)[0, -8:].tolist()
    assert_same_states(states(state), before, 0)  # what was selected from is as it was


# The command line, the embedded checkpoints, the files as files, README, notebook, examples, benchmark ----------------

PRETRAINED = ROOT / "pretrained"


def run(*command, cwd=ROOT, **environment):
    """A Python script or module in a process of its own."""
    settings = dict(cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=600, check=False)
    return subprocess.run([sys.executable, *map(str, command)], **settings)


@pytest.fixture
def script(monkeypatch, capsys):
    """script(path, *arguments): status, out and err of a script run in this process; starting one takes seconds."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def start(path, *arguments):
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        status = message = None
        try:
            runpy.run_path(str(ROOT / path), run_name="__main__")
        except SystemExit as stopped:
            status, message = (1, stopped.code) if isinstance(stopped.code, str) else (stopped.code, None)
        out, err = capsys.readouterr()
        return SimpleNamespace(status=status or 0, out=out, err=f"{err}{message}\n" if message else err)

    yield start
    torch.set_num_threads(1)  # some scripts choose


def test_the_command_line_continues_its_argument_and_standard_input(file, script):
    options = ["--temperature", 0.7, "--top-k", 20, "--top-p", 0.9, "--seed", 3, "--max-new-tokens", 60]
    sampling = dict(temperature=0.7, top_k=20, top_p=0.9, generator=generator(3))
    model = file.LM.from_pretrained(PRETRAINED / f"shakespeare-{file.name}", dtype=torch.float32)
    wanted = model.generate(torch.tensor([[*b"ROMEO:"]]), 60, **sampling)[0].tolist()  # its tokens are bytes
    done = script(f"{file.name}.py", "ROMEO:", *options)
    assert done.status == 0 and done.out.strip() == bytes(wanted).decode(errors="replace").strip()
    assert re.fullmatch(r"\w+, .*tokens/s", done.err.strip())  # a summary in one line
    command = [sys.executable, f"{file.name}.py", *map(str, options)]
    piped = subprocess.run(command, cwd=ROOT, input="ROMEO:", capture_output=True, text=True, check=True)
    assert piped.stdout == done.out and "no prompt" in script(f"{file.name}.py").err


def test_a_checkpoint_without_tokenizer_takes_the_published_one_and_nothing_else(file, script, tmp_path, monkeypatch):
    model, download = shutil.copytree(PRETRAINED / f"shakespeare-{file.name}", tmp_path / "model"), Mock()
    download.return_value = str((model / "tokenizer.json").rename(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    done = script(f"{file.name}.py", "ROMEO:", "--model", model, "--max-new-tokens", 3, "--dtype", "bfloat16")
    assert done.status == 0 and done.out.startswith("ROMEO:")
    name = "NousResearch/Meta-Llama-3.1-8B" if file.name == "mamba3" else "EleutherAI/gpt-neox-20b"
    download.assert_called_once_with(name, "tokenizer.json")  # not gigabytes of weights


BAD = [["--model", "no/such-model"], ["--model", "docs"], ["--temperature", -1], ["--top-p", 2], ["--seed", 2**70]]
BAD = [(f"{name}.py", ["ROMEO:", *options]) for name in FILES for options in [*BAD, ["--device", "abacus"]]]
BAD += [("examples/quickstart.py", ["--device", "abacus"]), ("examples/time_series.py", ["--csv", "none.csv"])]
BAD += [("examples/classify.py", ["--epochs", 0]), ("examples/train.py", ["--data", "none", "--out", "none"])]
WRONG_OPTIONS = [["--steps", 0], ["--dropout", 1], ["--accumulate", 3], ["--seq-len", 10**6]]
BAD += [("examples/train.py", ["--data", ROOT / "README.md", "--out", "{}", *options]) for options in WRONG_OPTIONS]
BAD += [("examples/selective_copying.py", []), ("examples/induction_heads.py", ["--evaluate", "pretrained"])]


@pytest.mark.parametrize("path, options", [*BAD, ("benchmarks/bench.py", ["--only", "backward"])])
def test_a_bad_command_line_ends_in_one_line_and_a_status(path, options, script, tmp_path):
    done = script(path, *(str(option).format(tmp_path) for option in options))
    assert done.status != 0 and re.fullmatch(rf"{Path(path).name}: error: .+\n", done.err), done.err


def test_the_embedded_checkpoint_is_small_and_knows_shakespeare_by_its_bytes(file):
    place = PRETRAINED / f"shakespeare-{file.name}"
    model, tokenizer = file.LM.from_pretrained(place), transformers.AutoTokenizer.from_pretrained(place)
    assert sum(p.numel() for p in model.parameters()) <= 3e6 and sum(p.stat().st_size for p in place.iterdir()) <= 6e6
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for text in ("ROMEO:\nBut, soft!", "naïve café, 東京 🐍\t\x00\n"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text and tokenizer(text).input_ids == [*text.encode()]
    ids = torch.tensor([[*b"JULIET:\nO, swear not by the moon, the inconstant moon,\nThat monthly changes"]])
    assert model(ids, labels=ids)["loss"] < 2  # nats per character; log(256) = 5.5 untrained


@torch.no_grad()
@pytest.mark.parametrize("length", [64, 256, 4096, pytest.param(2**20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [n for n in FILES if (PRETRAINED / f"induction-heads-{n}").exists()])
def test_the_embedded_induction_heads_are_right_far_beyond_the_training_length(name, length):
    model = FILES[name].LM.from_pretrained(PRETRAINED / f"induction-heads-{name}", dtype=torch.float32)
    rows, special, params = torch.arange(min(16, 2**21 // length)), 15, mamba.InferenceParams()
    ids, place = random_ids(len(rows), length, vocab=15), torch.randint(length - 2, rows.shape, generator=generator())
    ids[rows, place] = ids[:, -1] = special  # what followed the special symbol must follow it again
    for piece in ids.split(4096, dim=1):
        logits = model(piece, params, num_last_tokens=1)[:, 0]
    assert torch.equal(logits.argmax(-1), ids[rows, place + 1])


@pytest.mark.hub
def test_mamba_130m_gives_the_published_logits_and_text():
    name = "state-spaces/mamba-130m-hf"
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(name), mamba.MambaForCausalLM.from_pretrained(name)
    ids = tokenizer("Hey how are you doing?", return_tensors="pt").input_ids
    published = torch.tensor([-55.6909, -69.7903, -49.8981, -51.7581, -57.6544, -57.9368, -56.9591, -57.9033])
    assert torch.allclose(logits_of(model, ids)[0, 0, :8], published, atol=1e-3)
    text = tokenizer.decode(model.generate(ids, max_new_tokens=10, temperature=0)[0])
    assert text == "Hey how are you doing?\n\nI'm so glad you're here."


def source_of(name):
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


OWN = r"MambaLMConfig|S6|BaseMambaConfig|MambaLMHeadModel|Mamba"  # other projects' names; then a config's fields
OWN += r"|TRANSFORMERS_\w+|\(?LAYER.*|SSM_CFG\w*|_\w+_transformers|_check_fields"
OWN_OF_3 = r"\w+Block|GatedMLP|\w+PreTrained|\w+Encoder|InferenceParams|_from_\w+|_load|_save|main|OFFICIAL|TOP_LEVEL"
OWN_OF_3 += r"|SPECIAL_TOKENS|_to_\w+"  # a block with an MLP, four states, another format


def shared_part(name, number):
    """The definitions of a part, without what a model has of its own, as if the file were mamba.py."""
    parts = re.split(r"(?m)^# -+ (\d)\. .* -+$", source_of(name))
    text = re.sub(r"([Mm]amba)(-?[23])?", r"\1", parts[parts.index(str(number)) + 1])
    nodes = [(getattr(n, "name", None) or ast.unparse(n).split(" ")[0].rstrip(","), n) for n in ast.parse(text).body]
    kept = {name: ast.get_source_segment(text, n) for name, n in nodes if not re.fullmatch(OWN, name)}
    return {name: "".join(lines.split()).replace(",)", ")") for name, lines in kept.items()}  # however lines break


@pytest.mark.parametrize("number", [5, 6, 7, 8, 9])
@pytest.mark.parametrize("other", list(FILES)[1:])
def test_parts_5_to_9_are_the_same_text_in_all_files(number, other):
    first, second = shared_part(next(iter(FILES)), number), shared_part(other, number)
    own = OWN_OF_3 if other == "mamba3" else "nothing"
    first, second = ({n: text for n, text in part.items() if not re.fullmatch(own, n)} for part in (first, second))
    assert first == second and (len(first) > 0 or own != "nothing")


LIMITS = dict(mamba=(1110, 700), mamba2=(1020, 620), mamba3=(1060, 680))  # lines; where the language model ends


def test_everything_is_short_enough_to_be_read(file):
    tree = ast.parse(source_of(file.name))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    (end,) = (node.end_lineno for node in tree.body if getattr(node, "name", "") == file.LM.__name__)
    longest = max(f.end_lineno - f.lineno + 1 for f in functions)
    sizes = dict(lines=source_of(file.name).count("\n"), end=end, functions=len(functions), longest=longest)
    limits = dict(zip(sizes, (*LIMITS[file.name], 85, 55), strict=True))
    for path, limit in {"README.md": 235, "benchmarks/bench.py": 500, Path(__file__).name: 2700}.items():
        sizes[path], limits[path] = (ROOT / path).read_text(encoding="utf-8").count("\n"), limit
    assert {name: size for name, size in sizes.items() if size > limits[name]} == {}


def test_a_file_alone_in_an_empty_directory_works_and_imports_what_it_may(file, tmp_path):
    imports = r"(?m)^{}(?:import|from) (\w+)(?: import|$|\.)"
    at_top, all_of_them = ({*re.findall(imports.format(indent), source_of(file.name))} for indent in ("", " *"))
    assert at_top - sys.stdlib_module_names <= {"torch", "einops"}
    assert all_of_them - at_top - sys.stdlib_module_names <= {"huggingface_hub", "safetensors", "tokenizers"}
    code = f"""
import sys, torch, {file.name} as m
config, ids = m.{file.Config.__name__}(d_model=64, n_layer=1, vocab_size=50), torch.ones(1, 3).long()
model = m.{file.LM.__name__}(config)
print(model.generate(ids).shape, {{*sys.modules}} & {{"transformers", "huggingface_hub", "safetensors", "tokenizers"}})
model.save_pretrained("here")
assert torch.equal(type(model).from_pretrained("here")(ids), model.eval()(ids))"""
    shutil.copy(ROOT / f"{file.name}.py", tmp_path)
    done = run("-c", code, cwd=tmp_path, PYTHONPATH="")
    assert done.stdout == "torch.Size([1, 53]) set()\n", done.stderr


def test_a_file_pasted_into_a_notebook_works(file, monkeypatch):
    pasted = ModuleType(f"pasted {file.name}")  # a module without __file__
    monkeypatch.setitem(sys.modules, pasted.__name__, pasted)
    exec(source_of(file.name), vars(pasted))
    classes = {part: getattr(pasted, getattr(file, part).__name__) for part in ("LM", "Config")}
    model = tiny(SimpleNamespace(tiny=file.tiny, **classes))
    assert torch.equal(logits_of(model, IDS), logits_of(tiny(file), IDS))


def test_the_snippets_in_the_readme_run_one_after_the_other(script, tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (tmp_path / "snippets.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)))
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    monkeypatch.chdir(tmp_path)
    done = script(tmp_path / "snippets.py")
    assert done.status == 0 and done.out.startswith("ROMEO:"), done.err


def test_an_installation_imports_from_anywhere(tmp_path):
    found = {d.name: d.version for d in importlib.metadata.distributions() if d.name in ("pip", "setuptools")}
    if len(found) < 2 or int(found["setuptools"].split(".")[0]) < 77:
        pytest.skip(f"pip and setuptools 77 or newer (torch brings it) are needed, found {found}")
    (tmp_path / "source").mkdir()
    for name in (*(f"{name}.py" for name in FILES), "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "source")
    options = ["-q", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-build-isolation"]
    done = run("-m", "pip", "install", *options, "--target", tmp_path / "site", tmp_path / "source")
    assert done.returncode == 0, done.stderr
    done = run("-m", "mamba", "ROMEO:", cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"), HF_HUB_OFFLINE="1")
    assert done.returncode != 0 and "error" in done.stderr and done.stderr.count("\n") == 1  # the checkpoints stay here
    assert {f"{name}.py" for name in FILES} <= {path.name for path in (tmp_path / "site").iterdir()}


def test_the_notebook_runs_without_network_and_holds_one_clean_run(tmp_path, monkeypatch):
    notebook = nbformat.read(ROOT / "demo.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}
    assert not re.findall(r"/home|/tmp|/root|/work|/Users|Warning|Traceback", json.dumps(outputs))
    pictures = [output.get("data", {}).get("image/png", "") for output in outputs]
    assert (ROOT / "docs" / "selectivity.png").read_bytes() in map(base64.b64decode, pictures)  # README shows it
    changes = dict(HF_HOME=tmp_path, IPYTHONDIR=tmp_path, HF_ENDPOINT="http://127.0.0.1:9", OMP_NUM_THREADS=1)
    for name, value in changes.items():  # nothing was downloaded before, nothing answers
        monkeypatch.setenv(name, str(value))
    for cell in cells:
        cell.source = re.sub(r"(?m)^(SECONDS\b.*?= ?)\d+", r"\g<1>3", cell.source)  # of training
    NotebookClient(notebook, timeout=150, resources={"metadata": {"path": ROOT}}).execute()  # a failing cell raises
    assert "we use the embedded" in json.dumps(cells)  # these models stand in for those of the hub


SMALL = ["--d-model", 32, "--n-layer", 1]
SERIES = ["--csv", "{}/level.csv", "--column", "level", "--season", 12, "--horizon", 12, "--context", 24, "--no-plot"]
EXAMPLES = {  # name: options, what is printed (a naive forecast of the season is off by the trend alone, 12 * 0.05)
    "quickstart": ([*SMALL, "--vocab-size", 99, "--new-tokens", 4], r"\(2, 128\) ids[^§]*[1-9]\d* tokens/s"),
    "time_series": ([*SERIES, *SMALL, "--steps", 3], r"last season +0\.600[^§]*\n{} +\d"),
    "classify": ([*SMALL, "--epochs", 1], r"logistic regression +[\d.]+% +[\d.]+%[^§]*ForSequenceClassification +\d"),
}


@pytest.mark.parametrize("name, model", [*itertools.product(EXAMPLES, FIRST), ("quickstart", "mamba3")])
def test_an_example_prints_what_it_promises(name, model, script, tmp_path):
    if name == "classify":
        pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    values = [0.05 * t + 3 * math.sin(2 * math.pi * t / 12) for t in range(400)]
    (tmp_path / "level.csv").write_text("level\n" + "\n".join(map(str, values)))
    options, printed = EXAMPLES[name]
    done = script(f"examples/{name}.py", "--model", model, *(str(option).format(tmp_path) for option in options))
    assert done.status == 0 and re.search(printed.format(model), done.out), done.out + done.err


TRAINING = {"induction_heads": ["--max-length", 64], "selective_copying": ["--length", 20, "--lr", 0.001]}


def results(directory):
    """The stored weights, byte by byte, or the curves of a training."""
    curves = {path.name: json.loads(path.read_text()).get("curve") for path in directory.glob("*-0.001.json")}
    return curves | {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


@pytest.mark.parametrize("name, model", [*itertools.product(["induction_heads"], FIRST), ("selective_copying", None)])
def test_an_interrupted_training_resumes_to_the_same_result(name, model, script, tmp_path, monkeypatch):
    replace, options = os.replace, [*TRAINING[name], "--steps", 4, "--eval-every", 2]
    options += ["--model", model] if model else []  # selective copying compares Mamba with itself without selection

    def replace_and_stop(source, target):  # as by Ctrl-C, just after the first training state is in its place
        monkeypatch.setattr(os, "replace", replace)
        replace(source, target)
        raise KeyboardInterrupt

    done = script(f"examples/{name}.py", "--out", tmp_path / "whole", *options)
    assert done.status == 0 and len(results(tmp_path / "whole")) > 0, done.err
    monkeypatch.setattr(os, "replace", replace_and_stop)
    start = functools.partial(script, f"examples/{name}.py", "--out", tmp_path / "cut", *options)
    refused = (start(), start())[1]  # an unfinished run is not overwritten
    assert refused.status == 2 and re.fullmatch(rf"{name}\.py: error: .+\n", refused.err)
    assert results(tmp_path / "cut") == {} and start("--resume").status == 0
    assert results(tmp_path / "cut") == results(tmp_path / "whole") and not list(tmp_path.rglob("*.pt"))


TRAIN = ["examples/train.py", *SMALL, "--seq-len", 32, "--batch-size", 4, "--device", "cpu", "--no-amp"]
TRAIN += ["--headdim", 16, "--d-state", 16, "--log-every", 1, "--data", ROOT / "README.md", ROOT / "docs/tools.md"]


def losses_in(directory):
    """step: training and validation loss, as written in log.csv."""
    with open(directory / "log.csv") as log:
        return {int(row["step"]): (row["train_loss"], row["val_loss"]) for row in csv.DictReader(log)}


def test_training_without_a_text_learns_and_leaves_a_model_a_log_and_a_curve(script, tmp_path):
    options = ["--seq-len", 32, "--batch-size", 4, "--steps", 20, "--warmup", 5, "--eval-every", 10, "--dropout", 0]
    done = script("examples/train.py", *SMALL, *options, "--out", tmp_path, "--lr", 0.01, "--threads", 1)
    assert done.status == 0 and "step 10: train" in done.out, done.err
    losses = losses_in(tmp_path)
    assert list(losses) == [5, 10, 15, 20] and float(losses[20][0]) < float(losses[5][0]) - 0.5
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    names = {"model.safetensors", "config.json", "tokenizer.json", "options.json"}
    assert names <= {path.name for path in tmp_path.iterdir()} and not list(tmp_path.glob("checkpoint*"))
    evaluated = script("examples/train.py", "--evaluate", tmp_path, "--threads", 1)
    assert abs(float(evaluated.out.split()[2]) - float(losses[20][1])) < 0.01  # stored in bfloat16
    refused = {"finished": ["--resume"], "is there": [], "leave out n_layer": ["--init", tmp_path, "--n-layer", 6]}
    for word, more in (refused | {"lr must": ["--lr", -1], "seq_len must": ["--seq-len", 1]}).items():
        again = script("examples/train.py", "--out", tmp_path, *more)
        assert again.status == 2 and word in again.err


@pytest.mark.parametrize("model", FIRST)
def test_a_trained_model_gives_the_same_logits_in_transformers(model, script, tmp_path):
    assert script(*TRAIN, "--model", model, "--steps", 2, "--out", tmp_path).status == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ours = FILES[model].LM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path)("ROMEO:", return_tensors="pt").input_ids
    assert ids.tolist() == [[*b"ROMEO:"]] and error(logits_of(ours, ids), their_logits(theirs, ids)) <= FULL_MATCH


KILLED = """
import os, pickle, runpy, signal, sys
module, name, last = {"replace": os, "dump": pickle}[sys.argv[1]], sys.argv[1], int(sys.argv[2])
original, calls = getattr(module, name), []
def until_killed(*args, **kwargs):
    calls.append(name)
    if len(calls) == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
setattr(module, name, until_killed)
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# pickle.dump writes a checkpoint's last file: here that of step 4. os.replace names tokens.bin, options.json, a model's
# two files, a checkpoint's last file and the checkpoint: the ninth is within that of step 4.
MOMENTS = [("replace", 2), ("replace", 9), ("dump", 2)]


@on_posix
def test_a_training_killed_while_it_saves_resumes_to_the_losses_of_one_that_was_not(script, tmp_path):
    options, whole = [*TRAIN, "--steps", 6, "--eval-every", 2, "--out"], tmp_path / "whole"
    assert script(*options, whole, "--seq-len", 10**6).status == 2  # and that is forgotten
    assert script(*options, whole, "--resume").status == 0
    for moment in MOMENTS:
        out = tmp_path / str(moment)
        assert run("-c", KILLED, *moment, *options, out).returncode == -signal.SIGKILL
        if list(out.glob("checkpoint-*")):  # an unfinished run is not overwritten
            refused = script(*options, out)
            assert refused.status == 2 and re.fullmatch(r"train\.py: error: .+ --resume.+\n", refused.err)
        assert script(*options, out, "--resume").status == 0
        assert losses_in(out) == losses_in(whole) and len(losses_in(out)) == 6
        stored, wanted = (directory.joinpath("model.safetensors").read_bytes() for directory in (out, whole))
        assert stored == wanted and not list(out.glob("checkpoint*"))


SHARED = [("mamba", ["--accumulate", 2]), pytest.param("mamba2", ["--fsdp", "--accumulate", 2], marks=with_fsdp)]


@pytest.mark.parametrize("model, way", SHARED)
def test_two_processes_train_to_the_losses_of_one(model, way, script, tmp_path):
    options = [*TRAIN, f"--model={model}", "--steps=20", "--dropout=0", "--warmup=5", r"--separator=\n\n"]
    assert script(*options, "--out", tmp_path / "one").status == 0
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    done = run(*launch, *options, *way, "--out", tmp_path / "two", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    one, two = (losses_in(tmp_path / name) for name in ("one", "two"))
    one, two = (torch.tensor([[float(v or 0) for v in losses[step]] for step in range(1, 21)]) for losses in (one, two))
    assert one[0, 0] - one[-1, 0] > 0.1 and (two - one).abs().max() <= 1e-4


def test_documents_of_one_token_leave_no_row_without_a_loss(script, tmp_path):
    (tmp_path / "a.txt").write_text(("a\n" * 60 + "to be\nor\n") * 500)
    options = [*TRAIN[:-3], "--data", tmp_path, "--separator", r"\n", "--seq-len", 2, "--accumulate", 4, "--steps", 20]
    assert script(*options, "--out", tmp_path / "out").status == 0 and len(losses_in(tmp_path / "out")) == 20


@pytest.mark.parametrize("separator, begins", [("", [0, 13]), ("|", [0, 5, 11]), (r"\x7c", [0, 5, 11])])
def test_files_and_what_stands_between_separators_are_documents(separator, begins, tmp_path):
    store = runpy.run_path(str(ROOT / "examples/train_files.py"))["store"]
    (tmp_path / "a.txt").write_text("To be|or not|")
    (tmp_path / "b.txt").write_text("to be")
    store([tmp_path], separator, None, tmp_path)
    assert np.load(tmp_path / "documents.npy").tolist() == begins
    text = "To be|or not|to be".replace("|", "" if separator else "|")
    assert (tmp_path / "tokens.bin").read_bytes() == text.encode()


def test_rows_of_a_corpus_number_its_documents_on_both_sides_of_the_split(tmp_path):
    read = runpy.run_path(str(ROOT / "examples/train_files.py"))["read"]
    tokens, begins = np.arange(20, dtype=np.uint8), np.array([0, 5, 11])
    tokens.tofile(tmp_path / "tokens.bin")
    np.save(tmp_path / "documents.npy", begins)
    for corpus, first in zip(read(tmp_path, None, 4, 1), (0, 18), strict=True):
        ids, seq_idx = corpus.rows(torch.tensor([[0]]), len(corpus.tokens), "cpu")
        assert ids[0].tolist() == [*range(20)][first : first + len(corpus.tokens)]
        assert seq_idx[0].tolist() == np.searchsorted(begins, ids[0].numpy(), side="right").tolist()


def test_training_goes_on_from_a_checkpoint_with_its_tokenizer(script, tmp_path):
    words = sorted({*re.findall(r"\w+|[^\w\s]+", (ROOT / "README.md").read_text(encoding="utf-8"))})
    vocab = {word: 2 * i for i, word in enumerate(["<|endoftext|>", *words[:999]])}  # with gaps
    of_words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<|endoftext|>"))
    of_words.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\w+|\s+|[^\w\s]+"), "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=of_words, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(tmp_path / "words")
    store = runpy.run_path(str(ROOT / "examples/train_files.py"))["store"]
    store.__globals__["PART"] = 1000  # characters at once
    store(texts := [ROOT / "README.md", ROOT / "docs/README.ja.md"], "", tokenizer, tmp_path)
    whole = [[*tokenizer(path.read_text(encoding="utf-8")).input_ids, 0] for path in texts]
    assert np.fromfile(tmp_path / "tokens.bin", np.uint16).tolist() == [*whole[0], *whole[1]]
    assert np.load(tmp_path / "documents.npy").tolist() == [0, len(whole[0])]
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="latin must be UTF-8"):
        store([tmp_path / "latin"], "", tokenizer, tmp_path)
    options = [*TRAIN[:1], "--seq-len", 16, "--batch-size", 2, "--steps", 2, "--data", ROOT / "README.md"]
    first = script(*options, *SMALL, "--tokenizer", tmp_path / "words", "--out", tmp_path / "first", "--threads", 1)
    assert first.status == 0, first.err
    config = json.loads((tmp_path / "first/config.json").read_text())
    assert config["unpadded_vocab_size"] == max(vocab.values()) + 1 and config["eos_token_id"] == tokenizer.eos_token_id
    options += ["--init", tmp_path / "first", "--lr", 0, "--min-lr", 0]
    assert script(*options, "--out", tmp_path / "second").status == 0
    before, after = (float(losses_in(tmp_path / name)[2][1]) for name in ("first", "second"))
    assert after == pytest.approx(before, 0.01)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "second").get_vocab() == tokenizer.get_vocab()


def test_a_checkpoint_without_a_tokenizer_asks_for_one(file, script, tmp_path):
    tiny(file).save_pretrained(tmp_path / "model")
    done = script("examples/train.py", "--init", tmp_path / "model", "--out", tmp_path / "out")
    assert done.status == 2 and re.fullmatch(r"train\.py: error: .+ --tokenizer .+\n", done.err)


def test_the_benchmark_writes_a_page_of_tables(script, tmp_path):
    done = script("benchmarks/bench.py", "--quick", "--only", "forward", "--output", tmp_path / "page.md")
    assert done.status == 0, done.err
    text = (tmp_path / "page.md").read_text()
    assert len(re.findall(r"\| Mamba-\d, float32, l \| limit \| ours \| transformers", text)) == len(FIRST)
    distances = re.findall(r"transformers(?:, q \d+)? (\d\.?\d*e-\d+)", text)
    assert len(distances) >= 4 and max(map(float, distances)) < 1e-5  # the layers compute the same function


# Time and memory that do not grow, on two otherwise idle cores
MEMORY = """
import sys, threading, time, torch, {file.name} as m
Config, LM = m.{file.Config.__name__}, m.{file.LM.__name__}
def megabytes(field):  # not ru_maxrss: a child process starts from its parent's
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(field))
"""
LOADING = """
import safetensors.torch, huggingface_hub
samples, done = [megabytes("RssAnon")], threading.Event()  # pages of a mapped file are the kernel's to drop
def watch():
    while not done.wait(0.001):
        samples.append(megabytes("RssAnon"))
threading.Thread(target=watch).start()
model = LM.from_pretrained(sys.argv[1])
done.set()
print(sum(p.nbytes for p in model.parameters()) / 2**20, max(samples) - samples[0])
"""
GENERATION = """
model, ids = LM(Config(d_model=64, n_layer=2, vocab_size=256)), torch.randint(256, (1, int(sys.argv[1])))
start = time.perf_counter()
model.generate(ids, max_new_tokens=64, eos_token_id=())
print(time.perf_counter() - start, megabytes("VmHWM"))
"""


def measured(file, code, *arguments):
    """The numbers that a process of its own prints."""
    done = run("-c", MEMORY.format(file=file) + code, *arguments, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    return tuple(map(float, done.stdout.split()))


@on_linux
@pytest.mark.slow
@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_loading_does_not_hold_the_weights_twice(file, weights, tmp_path):
    model = file.LM(file.Config(d_model=1024, n_layer=16))
    model.save_pretrained(tmp_path)
    if weights == "pytorch_model.bin":
        torch.save(model.state_dict(), tmp_path / weights)
        (tmp_path / "model.safetensors").unlink()
    size, extra = measured(file, LOADING, tmp_path)
    print(f"{size:.0f} MB of weights, {extra:.0f} MB of peak memory")
    assert 0.9 * size <= extra <= 1.25 * size


@on_linux
@pytest.mark.slow
def test_generation_after_a_million_tokens_takes_linear_time_and_no_more_memory(file):
    times, peaks = zip(*(measured(file, GENERATION, length) for length in (10_000, 100_000, 1_000_000)), strict=True)
    print(f"seconds {times}, MB {peaks}")
    assert peaks[2] - peaks[0] <= 100 and times[2] <= 1.3 * 10 * times[1]


@pytest.mark.slow
def test_a_step_costs_the_same_at_position_10_and_100000(file):
    model, token, cases = tiny(file, d_model=256, n_layer=4), torch.tensor([1]), []
    for position in (10, 100_000):
        cases.append((file.module.InferenceParams(), []))
        model.generate(random_ids(1, position), 1, inference_params=cases[-1][0])
    for params, seconds in 200 * cases:  # in turn
        start = time.perf_counter()
        model.step(token, params)
        seconds.append(time.perf_counter() - start)
    assert statistics.median(cases[1][1]) <= 1.2 * statistics.median(cases[0][1])


# Mamba-3 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [dict(), dict(is_mimo=True, ngroups=2, is_outproj_norm=True)])
def test_mamba_3_is_its_definition_in_float64_and_near_to_it_in_float32(settings):
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        model, ids = tiny(FILES["mamba3"], **settings).to(dtype), random_ids(2, 150)
        assert error(logits_of(model, ids), logits_by_definition(model, ids)) <= bound


def test_published_mamba_3_models_have_the_published_numbers_of_parameters():
    mimo = dict(d_intermediate=1264, is_mimo=True, mimo_rank=4)
    for wanted, settings in ((186_849_600, dict(d_intermediate=1536)), (187_291_968, mimo)):
        config = mamba3.Mamba3Config(d_model=768, n_layer=12, vocab_size=128256, **settings)
        with torch.device("meta"):
            model = mamba3.Mamba3ForCausalLM(config)
        assert sum(p.numel() for p in model.parameters()) == wanted


# Names of a block's tensors and of config.json's fields in state-spaces' format.
PUBLISHED = """norm.weight norm2.weight mlp.fc1.weight mlp.fc2.weight mixer.in_proj.weight mixer.dt_bias mixer.B_bias
mixer.C_bias mixer.B_norm.weight mixer.C_norm.weight mixer.D mixer.mimo_x mixer.mimo_z mixer.mimo_o
mixer.out_proj.weight"""
OFFICIAL_KEYS = """d_model d_intermediate n_layer vocab_size ssm_cfg attn_layer_idx attn_cfg rms_norm residual_in_fp32
fused_add_norm pad_vocab_size_multiple tie_embeddings"""


@pytest.mark.parametrize("safe", [True, False])
def test_a_mamba_3_checkpoint_of_state_spaces_loads_saves_and_loads_again(safe, tmp_path):
    model = tiny(FILES["mamba3"], d_intermediate=100, is_mimo=True, mimo_rank=2).to(torch.bfloat16)
    ssm_cfg = dict(layer="Mamba3", d_state=8, headdim=8, chunk_size=16, is_mimo=True, mimo_rank=2)
    written = dict(d_model=32, n_layer=2, vocab_size=VOCAB, d_intermediate=100, ssm_cfg=ssm_cfg, attn_layer_idx=[])
    (tmp_path / "config.json").write_text(json.dumps(written | dict(rms_norm=True, pad_vocab_size_multiple=16)))
    tensors = {name.replace("embeddings.", "embedding."): p for name, p in model.state_dict().items()}
    torch.save(tensors | {"lm_head.weight": tensors["backbone.embedding.weight"]}, tmp_path / "pytorch_model.bin")
    read = mamba3.Mamba3ForCausalLM.from_pretrained(tmp_path)
    read.config.eos_token_id = [3, 4]
    read.save_pretrained(tmp_path / "again", safe_serialization=safe)
    twin, ids = mamba3.Mamba3ForCausalLM.from_pretrained(tmp_path / "again"), random_ids(2, 30)
    assert all(torch.equal(logits_of(m, ids), logits_of(model, ids)) for m in (read, twin))
    assert twin.config == read.config and same_weights(twin, model)
    assert json.loads((tmp_path / "again" / "config.json").read_text()).keys() == {*OFFICIAL_KEYS.split()}
    if safe:
        stored = safetensors.torch.load_file(tmp_path / "again" / "model.safetensors")
    else:
        stored = torch.load(tmp_path / "again" / "pytorch_model.bin", weights_only=True)
        assert torch.equal(stored["lm_head.weight"], stored["backbone.embedding.weight"])
    assert {name.split(".", 3)[3] for name in stored if ".layers." in name} == {*PUBLISHED.split()}


REFUSED_BY_3 = {"use mamba2.py": dict(ssm_cfg={"layer": "Mamba2"}), "use mamba.py": {}}
REFUSED_BY_3["model_type"] = dict(model_type="mamba3")
REFUSED_BY_3 |= {"attn_layer_idx": dict(ssm_cfg={"layer": "Mamba3"}, attn_layer_idx=[1])}
REFUSED_BY_3 |= {"d_conv": dict(ssm_cfg={"layer": "Mamba3", "d_conv": 4})}


@pytest.mark.parametrize("message, changes", REFUSED_BY_3.items(), ids=REFUSED_BY_3)
def test_what_mamba3_does_not_implement_is_refused(message, changes, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dict(d_model=32, n_layer=1, vocab_size=9) | changes))
    with pytest.raises(ValueError, match=re.escape(message)):
        mamba3.Mamba3ForCausalLM.from_pretrained(tmp_path)
    odd = tiny(FILES["mamba3"], norm_epsilon=1e-6)
    with pytest.raises(ValueError, match="norm_epsilon"):
        odd.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_the_angle_of_mamba_3_stays_exact_over_a_million_steps():
    turns = 0.5 * torch.tanh(torch.randn(4, 2**20)) * torch.rand(4, 2**20)
    exact = turns.double().cumsum(-1)
    difference = (mamba3.cumsum_modulo_1(turns).double() - exact + 0.5) % 1 - 0.5
    assert 2 * math.pi * difference.abs().max() <= 1e-3


@pytest.mark.parametrize("modulus", [2, 5])
def test_state_tracking_trains_both_models_and_prints_a_row_for_each(modulus, script, tmp_path):
    options = ["--steps", 3, "--lr", 0.003, "--length", 6, "--modulus", modulus]
    done = script("examples/state_tracking.py", "--out", tmp_path, *options)
    assert done.status == 0 and re.search(r"mamba2, \d+ param[^§]*\nmamba3, \d+ param[^§]* 96: +[\d.]+%", done.out)
    assert (tmp_path / "accuracy.png").stat().st_size > 1000
    assert len(json.loads((tmp_path / "results.json").read_text())) == 2
