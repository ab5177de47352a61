"""Tests of mamba.py and mamba2.py, each against a source that is not ours: recurrences written out below in float64,
transformers' classes, finite differences, or the same model fed in another way.

    pytest                  what runs everywhere: no network, no GPU, nothing outside this directory
    pytest -m slow          speed, memory and size, on two otherwise idle cores
    pytest -m hub           published weights, from the model hub

Letters in shapes: b batch, l length, e channels, n state size, h heads, p head width, g groups.
"""

import base64
import copy
import functools
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import math
import os
import pickle
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import tomllib
from datetime import datetime
from pathlib import Path
from types import ModuleType, SimpleNamespace

import nbformat
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from nbclient import NotebookClient
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import mamba
import mamba2

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)  # the tensors are tiny: a second thread only costs, and tenfold where the cores are busy

ROOT = Path(__file__).resolve().parent

PRESENT = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
DEVICES = ["cpu", *(pytest.param(name, marks=pytest.mark.gpu) for name, present in PRESENT.items() if present)]
on_each_device = pytest.mark.parametrize("device", DEVICES)

FILES = {
    "mamba": SimpleNamespace(
        name="mamba",
        module=mamba,
        Config=mamba.MambaConfig,
        Mixer=mamba.MambaMixer,
        Encoder=mamba.MambaEncoder,
        LM=mamba.MambaForCausalLM,
        tiny=dict(d_state=8),
        dt_bias="dt_proj.bias",
    ),
    "mamba2": SimpleNamespace(
        name="mamba2",
        module=mamba2,
        Config=mamba2.Mamba2Config,
        Mixer=mamba2.Mamba2Mixer,
        Encoder=mamba2.Mamba2Encoder,
        LM=mamba2.Mamba2ForCausalLM,
        tiny=dict(d_state=8, headdim=8, chunk_size=16),
        dt_bias="dt_bias",
    ),
}


@pytest.fixture(params=FILES)
def file(request):
    """One of the two files, by the names that they have in common."""
    return FILES[request.param]


# ----------------------------------------------------------------------------------------------------------------------
# Sources of truth: the two recurrences, and the whole model around them, in plain loops
# ----------------------------------------------------------------------------------------------------------------------


def scan_by_definition(u, dt, A, B, C, state=None):
    """h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t and y_t = C_t . h_t. u, dt (b, l, e), A (e, n), B, C (b, l, n)."""
    h = u.new_zeros(u.shape[0], *A.shape) if state is None else state  # (b, e, n)
    ys = [u[:, :0]]
    for u_t, dt_t, B_t, C_t in zip(u.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), strict=True):
        h = torch.exp(dt_t[..., None] * A) * h + (dt_t * u_t)[..., None] * B_t[:, None]
        ys.append((h @ C_t[..., None]).mT)
    return torch.cat(ys, dim=1), h


def ssd_by_definition(x, dt, A, B, C, state=None):
    """The same recurrence with one decay per head. x (b, l, h, p), dt (b, l, h), A (h,), B, C (b, l, g, n)."""
    heads_per_group = x.shape[2] // B.shape[2]
    B, C = (M.repeat_interleave(heads_per_group, dim=2) for M in (B, C))  # (b, l, h, n)
    h = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[-1]) if state is None else state  # (b, h, p, n)
    ys = [x[:, :0]]
    for x_t, dt_t, B_t, C_t in zip(x.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), strict=True):
        h = torch.exp(dt_t * A)[..., None, None] * h + (dt_t[..., None] * x_t)[..., None] * B_t[:, :, None]
        ys.append((h @ C_t[..., None]).squeeze(-1)[:, None])
    return torch.cat(ys, dim=1), h


def rms_norm_by_definition(x, eps, groups=1):
    x = x.unflatten(-1, (groups, -1))
    return (x / (x.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2)


def convolution_by_definition(x, weight, bias):
    """Causal and depthwise, then SiLU. x (b, l, channels), weight (channels, 1, width)."""
    width = weight.shape[-1]
    padded = F.pad(x, (0, 0, width - 1, 0))
    out = sum(padded[:, i : i + x.shape[1]] * weight[:, 0, i] for i in range(width))
    return F.silu(out if bias is None else out + bias)


def mamba_mixer_by_definition(x, w, config):
    """Figure 3 of the Mamba paper; w holds the weights by name, config is transformers'."""
    u, z = F.linear(x, w["in_proj.weight"], w.get("in_proj.bias")).chunk(2, dim=-1)
    u = convolution_by_definition(u, w["conv1d.weight"], w.get("conv1d.bias"))
    sizes = [config.time_step_rank, config.state_size, config.state_size]
    dt, B, C = F.linear(u, w["x_proj.weight"]).split(sizes, dim=-1)
    if config.model_type == "falcon_mamba":
        dt, B, C = (rms_norm_by_definition(v, config.mixer_rms_eps) for v in (dt, B, C))
    dt = F.softplus(F.linear(dt, w["dt_proj.weight"], w["dt_proj.bias"]))
    y, _ = scan_by_definition(u, dt, -w["A_log"].exp(), B, C)
    return F.linear((y + w["D"] * u) * F.silu(z), w["out_proj.weight"], w.get("out_proj.bias"))


def mamba2_mixer_by_definition(x, w, config):
    """The block figure of the Mamba-2 paper."""
    e, g, n, heads = config.num_heads * config.head_dim, config.n_groups, config.state_size, config.num_heads
    zxBCdt = F.linear(x, w["in_proj.weight"], w.get("in_proj.bias"))
    z, xBC, dt = zxBCdt.split([e, e + 2 * g * n, heads], dim=-1)
    xBC = convolution_by_definition(xBC, w["conv1d.weight"], w.get("conv1d.bias"))
    x, B, C = xBC.split([e, g * n, g * n], dim=-1)
    x, B, C = x.unflatten(-1, (heads, -1)), B.unflatten(-1, (g, -1)), C.unflatten(-1, (g, -1))
    dt = F.softplus(dt + w["dt_bias"]).clamp(*config.time_step_limit)
    y, _ = ssd_by_definition(x, dt, -w["A_log"].exp(), B, C)
    y = (y + w["D"][:, None] * x).flatten(-2) * F.silu(z)
    y = rms_norm_by_definition(y, config.layer_norm_epsilon, groups=g) * w["norm.weight"]
    return F.linear(y, w["out_proj.weight"], w.get("out_proj.bias"))


@torch.no_grad()
def logits_by_definition(theirs, input_ids):
    """Logits (b, l, vocabulary) of a transformers model, computed here in float64 from its weights and settings."""
    config, weights = theirs.config, {name: w.double() for name, w in theirs.state_dict().items()}
    mixer = mamba2_mixer_by_definition if config.model_type == "mamba2" else mamba_mixer_by_definition
    x = weights["backbone.embeddings.weight"][input_ids]
    for i in range(config.num_hidden_layers):
        layer = f"backbone.layers.{i}."
        w = {k.removeprefix(layer + "mixer."): v for k, v in weights.items() if k.startswith(layer + "mixer.")}
        x = x + mixer(rms_norm_by_definition(x, config.layer_norm_epsilon) * weights[layer + "norm.weight"], w, config)
    x = rms_norm_by_definition(x, config.layer_norm_epsilon) * weights["backbone.norm_f.weight"]
    return F.linear(x, weights["lm_head.weight"])


# ----------------------------------------------------------------------------------------------------------------------
# Models to compare: odd settings, weights far from their initialisation
# ----------------------------------------------------------------------------------------------------------------------

TRANSFORMERS = {
    "mamba": (transformers.MambaConfig, transformers.MambaForCausalLM),
    "falcon_mamba": (transformers.FalconMambaConfig, transformers.FalconMambaForCausalLM),
    "mamba2": (transformers.Mamba2Config, transformers.Mamba2ForCausalLM),
}

ODD_SETTINGS = {
    "mamba": ("mamba", dict()),
    "mamba expand 1, conv 2": (
        "mamba",
        dict(expand=1, conv_kernel=2, use_bias=True, use_conv_bias=False, tie_word_embeddings=False),
    ),
    "mamba expand 3, conv 3": ("mamba", dict(expand=3, conv_kernel=3, use_bias=True, state_size=7)),
    "mamba expand 16": ("mamba", dict(expand=16, intermediate_size=128, time_step_rank=5, tie_word_embeddings=False)),
    # One layer: FalconMamba's norms of dt, B and C enlarge rounding; with two layers and noise 0.1 transformers itself
    # is up to 6e-6 of the largest logit away from float64.
    "falcon_mamba": ("falcon_mamba", dict(num_hidden_layers=1)),
    "falcon_mamba expand 16": (
        "falcon_mamba",
        dict(expand=16, intermediate_size=128, time_step_rank=5, conv_kernel=3, use_bias=True, mixer_rms_eps=1e-5)
        | dict(num_hidden_layers=1),
    ),
    "falcon_mamba deep": ("falcon_mamba", dict(tie_word_embeddings=False)),
    "mamba2": ("mamba2", dict(num_heads=4, head_dim=32, n_groups=1, chunk_size=64)),
    "mamba2 expand 1, conv 2": (
        "mamba2",
        dict(expand=1, num_heads=4, head_dim=16, n_groups=2, conv_kernel=2, use_bias=True, chunk_size=16)
        | dict(tie_word_embeddings=True),
    ),
    "mamba2 expand 3, conv 3": (
        "mamba2",
        dict(expand=3, num_heads=8, head_dim=24, n_groups=4, conv_kernel=3, use_conv_bias=False, chunk_size=100)
        | dict(time_step_limit=(0.01, 0.5)),
    ),
    "mamba2 chunk 256": (
        "mamba2",
        dict(num_heads=8, head_dim=16, n_groups=4, use_bias=True, chunk_size=256, time_step_limit=(0.1, math.inf)),
    ),
}
SETTINGS = ["mamba expand 3, conv 3", "falcon_mamba expand 16", "mamba2 expand 3, conv 3", "mamba2 chunk 256"]
LENGTHS = [1, 3, 63, 64, 65, 300]
NOISES = [0.1, 0.3]
VOCAB = 99


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
    return FILES["mamba2" if settings.startswith("mamba2") else "mamba"]


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


def distance(got, exact):
    """The mean over positions of the largest difference there. Logits (b, l, vocabulary).

    The largest difference of all says less: it stems from one ill-conditioned position, and two orders of summing the
    same float32 numbers differ up to threefold in it; in this mean over 300 positions they differ by a quarter.
    """
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


SPLIT_BOUNDS = {0.1: 5e-6, 0.3: 5e-5}


# ----------------------------------------------------------------------------------------------------------------------
# The selective scan
# ----------------------------------------------------------------------------------------------------------------------


def scan_inputs(b, length, e, n, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    u, dt = torch.randn(b, length, e, generator=g), F.softplus(2 * torch.randn(b, length, e, generator=g) - 1)
    A = -torch.exp(torch.randn(e, n, generator=g))
    B, C = torch.randn(2, b, length, n, generator=g)
    state = torch.randn(b, e, n, generator=g)
    return [t.to(dtype) for t in (u, dt, A, B, C, state)]


def assert_all_close(got, wanted, bound=1e-12):
    for a, b in zip(got, wanted, strict=True):
        assert error(a, b) <= bound


@pytest.mark.parametrize("length", [0, 1, 2, 7, 64, 97])
@pytest.mark.parametrize("form", ["selective_scan", "selective_scan_recurrence"])
def test_scan_equals_its_definition(form, length):
    inputs = scan_inputs(2, length, 5, 3)
    scan = getattr(mamba, form)
    assert_all_close(scan(*inputs), scan_by_definition(*inputs))
    assert_all_close(scan(*inputs[:5]), scan_by_definition(*inputs[:5]))


@on_each_device
@pytest.mark.parametrize("n_parallel", [None, 8])
@pytest.mark.parametrize("dt_A", [-(10.0**k) for k in range(-6, 5)])
def test_scan_is_exact_at_any_decay(dt_A, n_parallel, device):
    u, _, _, B, C, _ = scan_inputs(1, 4096, 8, 4, torch.float32)
    dt = torch.full_like(u, 0.125)
    A = torch.full((8, 4), dt_A / 0.125)
    exact, _ = scan_by_definition(*(t.double() for t in (u, dt, A, B, C)))
    got, _ = mamba.selective_scan(*(t.to(device) for t in (u, dt, A, B, C)), n_parallel=n_parallel)

    def channel_error(y):
        return ((y.double().cpu() - exact).abs().amax(1) / exact.abs().amax(1)).max().item()

    if abs(dt_A) >= 1e-2:
        assert channel_error(got) <= 1e-6
    else:
        assert channel_error(got) <= 1.5 * channel_error(scan_by_definition(u, dt, A, B, C)[0])


@pytest.mark.parametrize("length", [1, 13, 64])
@pytest.mark.parametrize(
    "block_len, n_parallel", [(1, 1), (5, 1), (16, 1), (1000, 1), (1, 3), (4, 2), (4, 5), (5, 100), (None, 4)]
)
def test_scan_in_any_blocks_gives_the_same(block_len, n_parallel, length):
    inputs = [t.requires_grad_() for t in scan_inputs(2, length, 3, 4)]
    wanted = scan_by_definition(*inputs)
    got = mamba.selective_scan(*inputs, block_len=block_len, n_parallel=n_parallel)
    assert_all_close(got, wanted)
    weights = [torch.randn_like(t) for t in wanted]
    assert_all_close(torch.autograd.grad(got, inputs, weights), torch.autograd.grad(wanted, inputs, weights))


@pytest.mark.parametrize("b, e, n", [(40, 64, 32), (3, 2048, 16)])
def test_scan_equals_its_definition_at_sizes_beyond_any_block(b, e, n):
    inputs = [t.requires_grad_() for t in scan_inputs(b, 37, e, n)]
    got, wanted = mamba.selective_scan(*inputs), scan_by_definition(*inputs)
    assert_all_close(got, wanted)
    weights = [torch.randn_like(t) for t in wanted]
    assert_all_close(torch.autograd.grad(got, inputs, weights), torch.autograd.grad(wanted, inputs, weights))


@pytest.mark.parametrize("block_len, n_parallel", [(None, None), (3, 1), (2, 2), (1, 3)])
def test_scan_gradients_equal_finite_differences(block_len, n_parallel):
    def scan(*inputs):
        return mamba.selective_scan(*inputs, block_len=block_len, n_parallel=n_parallel)

    assert gradcheck(scan, [t.requires_grad_() for t in scan_inputs(2, 7, 3, 2)])


def test_scan_gradients_equal_finite_differences_without_initial_state():
    assert gradcheck(mamba.selective_scan, [t.requires_grad_() for t in scan_inputs(2, 5, 2, 3)[:5]])


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("block_len, n_parallel", [(None, None), (5, 1), (4, 3)])
def test_scan_with_skip_and_gate(block_len, n_parallel, gated):
    inputs = [t.requires_grad_() for t in scan_inputs(2, 23, 3, 4)]
    D, z = torch.randn(3).double().requires_grad_(), torch.randn(2, 23, 3).double().requires_grad_()
    y, state = scan_by_definition(*inputs)
    wanted = (y + inputs[0] * D) * (z * torch.sigmoid(z) if gated else 1), state
    leaves, weights = [*inputs, D, *[z] * gated], [torch.randn_like(t) for t in wanted]
    exact = torch.autograd.grad(wanted, leaves, weights)
    settings = {"D": D, "z": z if gated else None}
    for scan in (
        lambda *v: mamba.selective_scan(*v, block_len=block_len, n_parallel=n_parallel, **settings),
        lambda *v: mamba.selective_scan_recurrence(*v, **settings),
    ):
        got = scan(*inputs)
        assert_all_close(got, wanted)
        assert_all_close(torch.autograd.grad(got, leaves, weights), exact)


def test_scan_differentiates_the_gate_alone():
    inputs, z = scan_inputs(2, 9, 3, 2), torch.randn(2, 9, 3).double().requires_grad_()
    assert gradcheck(lambda z: mamba.selective_scan(*inputs, z=z), [z])


def test_scan_differentiates_only_what_asks_for_it():
    inputs = scan_inputs(2, 9, 3, 2)
    for i in range(6):
        chosen = [t.clone().requires_grad_(j == i) for j, t in enumerate(inputs)]
        y, state = mamba.selective_scan(*chosen)
        wanted_y, wanted_state = scan_by_definition(*chosen)
        (got,) = torch.autograd.grad(y.sum() + state.square().sum(), chosen[i])
        (wanted,) = torch.autograd.grad(wanted_y.sum() + wanted_state.square().sum(), chosen[i])
        assert error(got, wanted) <= 1e-12


@on_each_device
@pytest.mark.parametrize("n_parallel", [None, 4])
@pytest.mark.parametrize("dt_A", [-16.0, -1.0, -1e-1, -1e-2, -1e-3, -1e-4])
def test_scan_float32_gradients_are_exact_at_any_decay(dt_A, n_parallel, device):
    u, _, _, B, C, state = scan_inputs(2, 400, 6, 4, torch.float32)
    inputs = [u, torch.full_like(u, 0.5), torch.full((6, 4), dt_A / 0.5), B, C, state]

    def gradients(scan, dtype, device="cpu", **kwargs):
        leaves = [t.to(device, dtype, copy=True).requires_grad_() for t in inputs]
        y, final = scan(*leaves, **kwargs)
        weights = [torch.cos(torch.arange(t.numel(), device=device).reshape(t.shape)).to(dtype) for t in (y, final)]
        return torch.autograd.grad([y, final], leaves, weights)

    exact = gradients(scan_by_definition, torch.float64)
    plain = gradients(scan_by_definition, torch.float32)
    got = gradients(mamba.selective_scan, torch.float32, device, n_parallel=n_parallel)
    for name, g, p, wanted in zip(("u", "dt", "A", "B", "C", "initial_state"), got, plain, exact, strict=True):
        assert error(g, wanted) <= max(1e-6, 1.5 * error(p, wanted)), name


def test_a_second_derivative_of_the_scan_raises():
    u, *others = scan_inputs(1, 4, 2, 2)
    u.requires_grad_()
    y, _ = mamba.selective_scan(u, *others)
    (gradient,) = torch.autograd.grad(y.square().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), u)


def test_scan_leaves_its_inputs_alone():
    inputs = scan_inputs(2, 40, 3, 4)
    copies = [t.clone() for t in inputs]
    mamba.selective_scan(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


@pytest.mark.parametrize("name", ["dt", "A", "B", "C", "initial_state", "D", "z"])
def test_the_scan_names_an_argument_that_does_not_fit(name):
    inputs = dict(zip(("u", "dt", "A", "B", "C", "initial_state"), scan_inputs(2, 6, 4, 3), strict=True))
    inputs |= dict(D=torch.ones(4).double(), z=torch.ones(2, 6, 4).double())
    inputs[name] = inputs[name][:1]
    with pytest.raises(ValueError, match=f"^{name} must have shape"):
        mamba.selective_scan(**inputs)


@pytest.mark.parametrize("setting", ["block_len", "n_parallel"])
@pytest.mark.parametrize("value", [0, -2])
def test_the_scan_names_a_wrong_number_of_blocks(setting, value):
    with pytest.raises(ValueError, match=f"^{setting} must be None or a positive integer, got {value}"):
        mamba.selective_scan(*scan_inputs(1, 4, 2, 2), **{setting: value})


@pytest.mark.parametrize("function", [mamba.selective_scan, mamba2.ssd])
def test_an_initial_state_in_half_precision_goes_on_in_float32(function):
    *inputs, state = scan_inputs(2, 40, 4, 3, torch.float32)
    if function is mamba2.ssd:
        *inputs, state = ssd_inputs(2, 40, 4, 3, 2, 5, torch.float32)
    state = state.bfloat16()
    for got, exact in zip(function(*inputs, state), function(*inputs, state.float()), strict=True):
        assert got.dtype == torch.float32 and torch.equal(got, exact)


# ----------------------------------------------------------------------------------------------------------------------
# SSD
# ----------------------------------------------------------------------------------------------------------------------


def ssd_inputs(b, length, h, p, g, n, dtype=torch.float64, seed=0):
    r = torch.Generator().manual_seed(seed)
    x, dt = torch.randn(b, length, h, p, generator=r), F.softplus(2 * torch.randn(b, length, h, generator=r) - 1)
    A = -torch.exp(torch.randn(h, generator=r))
    B, C = torch.randn(2, b, length, g, n, generator=r)
    state = torch.randn(b, h, p, n, generator=r)
    return [t.to(dtype) for t in (x, dt, A, B, C, state)]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("length", [0, 1, 2, 13, 64, 97])
@pytest.mark.parametrize("form", ["ssd_recurrence", "ssd_quadratic", "ssd"])
def test_each_form_of_ssd_equals_its_definition(form, length, groups):
    inputs = ssd_inputs(2, length, 4, 3, groups, 5)
    ssd = getattr(mamba2, form)
    assert_all_close(ssd(*inputs), ssd_by_definition(*inputs))
    assert_all_close(ssd(*inputs[:5]), ssd_by_definition(*inputs[:5]))


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 16, 64, 256])
@pytest.mark.parametrize("length", [0, 1, 7, 48, 97])
def test_ssd_in_any_chunks_gives_the_same(length, chunk_size):
    inputs = ssd_inputs(2, length, 4, 3, 2, 5)
    assert_all_close(mamba2.ssd(*inputs, chunk_size=chunk_size), ssd_by_definition(*inputs))


@pytest.mark.parametrize("chunk_size", [3, 4, 16])
def test_ssd_gradients_equal_finite_differences(chunk_size):
    def ssd(*inputs):
        return mamba2.ssd(*inputs, chunk_size=chunk_size)

    assert gradcheck(ssd, [t.requires_grad_() for t in ssd_inputs(2, 7, 2, 2, 1, 2)])
    assert gradcheck(ssd, [t.requires_grad_() for t in ssd_inputs(1, 5, 4, 1, 2, 2)[:5]])


@on_each_device
@pytest.mark.parametrize("chunk_size", [16, 64, 256])
@pytest.mark.parametrize("dt_A", ["mixed", *(-(10.0**k) for k in range(-6, 5))])
def test_ssd_is_exact_at_any_decay(dt_A, chunk_size, device):
    x, dt, _, B, C, _ = ssd_inputs(1, 1000, 4, 8, 1, 16, torch.float32)
    if dt_A == "mixed":  # steps that keep nearly all and steps that forget all, side by side in one chunk
        dt = 10 ** (6 * torch.rand(dt.shape, generator=torch.Generator().manual_seed(0)) - 4)
    else:
        dt = torch.full_like(dt, -dt_A)
    inputs = [x, dt, -torch.ones(4), B, C]
    exact = ssd_by_definition(*(t.double() for t in inputs))
    plain = ssd_by_definition(*inputs)
    got = mamba2.ssd(*(t.to(device) for t in inputs), chunk_size=chunk_size)
    for g, p, wanted in zip(got, plain, exact, strict=True):
        bound = 1e-6 if dt_A == "mixed" else 2e-6 if dt_A <= -1e-2 else max(1e-6, 1.5 * error(p, wanted))
        assert error(g, wanted) <= bound


@pytest.mark.parametrize("dt_A", [-16.0, -1.0, -1e-1, -1e-2, -1e-3, -1e-4])
def test_ssd_float32_gradients_are_exact_at_any_decay(dt_A):
    x, dt, _, B, C, state = ssd_inputs(2, 400, 4, 6, 2, 5, torch.float32)
    inputs = [x, torch.full_like(dt, 0.5), torch.full((4,), dt_A / 0.5), B, C, state]

    def gradients(ssd, dtype):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in inputs]
        y, final = ssd(*leaves)
        weights = [torch.cos(torch.arange(t.numel()).reshape(t.shape)).to(dtype) for t in (y, final)]
        return torch.autograd.grad([y, final], leaves, weights)

    exact = gradients(ssd_by_definition, torch.float64)
    plain = gradients(ssd_by_definition, torch.float32)
    got = gradients(mamba2.ssd, torch.float32)
    for name, g, p, wanted in zip(("x", "dt", "A", "B", "C", "initial_state"), got, plain, exact, strict=True):
        assert error(g, wanted) <= max(2e-6, 1.5 * error(p, wanted)), name


@pytest.mark.parametrize("name", ["dt", "A", "B", "C", "initial_state", "D"])
def test_ssd_names_an_argument_that_does_not_fit(name):
    inputs = dict(zip(("x", "dt", "A", "B", "C", "initial_state"), ssd_inputs(2, 6, 4, 3, 2, 5), strict=True))
    inputs |= dict(D=torch.ones(4).double())
    inputs[name] = inputs[name][:, :-1] if name == "B" else inputs[name][:1]  # of B, the rest is measured
    with pytest.raises(ValueError, match=f"^{name} must have shape"):
        mamba2.ssd(**inputs)


@pytest.mark.parametrize(
    "message, heads, settings",
    [("groups", 3, {}), ("chunk_size", 4, dict(chunk_size=0)), ("n_parallel", 4, dict(n_parallel=-1))],
)
def test_ssd_names_sizes_that_make_no_sense(message, heads, settings):
    with pytest.raises(ValueError, match=message):
        mamba2.ssd(*ssd_inputs(1, 4, heads, 2, 2, 2), **settings)


# ----------------------------------------------------------------------------------------------------------------------
# Gradients of the layers
# ----------------------------------------------------------------------------------------------------------------------

SMALLEST_LAYERS = {
    "mamba": ("mamba", dict(d_state=2, d_conv=3, bias=True)),
    "falcon_mamba": ("mamba", dict(d_state=2, d_conv=2, conv_bias=False, dt_rank=2, mixer_rms_eps=1e-3)),
    "mamba2": ("mamba2", dict(d_state=2, headdim=2, ngroups=2, d_conv=3, bias=True, chunk_size=3)),
    "mamba2 limits": ("mamba2", dict(d_state=2, headdim=4, ngroups=1, d_conv=2, chunk_size=4, dt_limit=(0.1, 1.0))),
}


@pytest.mark.parametrize("name", SMALLEST_LAYERS)
def test_layer_gradients_equal_finite_differences(name):
    file_name, settings = SMALLEST_LAYERS[name]
    file = FILES[file_name]
    torch.manual_seed(0)
    mixer = randomise(file.Mixer(file.Config(d_model=4, **settings)).double(), 0.3)
    names, parameters = zip(*mixer.named_parameters(), strict=True)
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)

    def layer(x, *parameters):
        return torch.func.functional_call(mixer, dict(zip(names, parameters, strict=True)), (x,))

    assert gradcheck(layer, (x, *parameters))


LARGE_LAYERS = {
    "mamba": (dict(d_state=4), dict(state_size=4, expand=2), mamba_mixer_by_definition),
    "mamba2": (
        dict(d_state=4, headdim=32, ngroups=2, chunk_size=64),
        dict(state_size=4, head_dim=32, num_heads=8, n_groups=2),
        mamba2_mixer_by_definition,
    ),
}


def test_a_layer_larger_than_any_block_equals_its_definition(file):
    ours, theirs, definition = LARGE_LAYERS[file.name]
    torch.manual_seed(0)
    mixer = randomise(file.Mixer(file.Config(d_model=128, **ours)).double(), 0.1)
    config = TRANSFORMERS[file.name][0](hidden_size=128, **theirs)
    names, leaves = zip(*mixer.named_parameters(), strict=True)
    x = torch.randn(3, 1100, 128, dtype=torch.float64, requires_grad=True)
    got, wanted = mixer(x), definition(x, dict(mixer.named_parameters()), config)
    assert error(got, wanted) <= 1e-12
    weights = torch.randn_like(wanted)
    got, wanted = (torch.autograd.grad(y, [x, *leaves], weights) for y in (got, wanted))
    for name, g, w in zip(["x", *names], got, wanted, strict=True):
        assert error(g, w) <= 1e-10, name


@pytest.mark.parametrize("settings", SETTINGS)
def test_gradients_of_the_loss_equal_those_of_transformers(settings, saved):
    ids = random_ids(2, 40)
    theirs = transformers_model(settings, 0.1)
    theirs(ids, labels=ids).loss.backward()
    ours = file_for(settings).LM.from_pretrained(saved(settings, 0.1))
    ours(ids, labels=ids)["loss"].backward()
    got, wanted = ({name: p.grad for name, p in model.named_parameters()} for model in (ours, theirs))
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert error(got[name], wanted[name]) <= 2e-4, name


def test_gradient_checkpointing_runs_a_block_twice_and_gives_the_same_gradients(file):
    ids, gradients, calls = random_ids(2, 30), {}, {}
    for mode in ("plain", "saving", "saving, in evaluation"):
        model = tiny(file, gradient_checkpointing=mode != "plain").train(mode != "saving, in evaluation")
        calls[mode] = []
        model.backbone.layers[0].mixer.register_forward_pre_hook(lambda *_, seen=calls[mode]: seen.append(1))
        model(ids, labels=ids)["loss"].backward()
        gradients[mode] = [p.grad for p in model.parameters()]
    assert [len(seen) for seen in calls.values()] == [1, 2, 1]
    for mode in ("saving", "saving, in evaluation"):
        assert all(torch.equal(*pair) for pair in zip(gradients[mode], gradients["plain"], strict=True))


def test_gradients_of_a_bfloat16_model_are_near_those_in_float32(file):
    model, ids = tiny(file).to(torch.bfloat16), random_ids(2, 20)
    exact = copy.deepcopy(model).float()
    for m in (model, exact):
        m(ids, labels=ids)["loss"].backward()
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert error(p.grad, q.grad) <= 0.05, name


@pytest.mark.parametrize("function", [mamba.selective_scan, mamba2.ssd])
def test_a_backward_pass_under_autocast_stays_in_float32(function):
    inputs = scan_inputs(2, 40, 4, 3, torch.float32)
    if function is mamba2.ssd:
        inputs = ssd_inputs(2, 40, 4, 3, 2, 5, torch.float32)
    gradients = []
    for inside in (True, False):
        leaves = [value.clone().requires_grad_() for value in inputs]
        with torch.autocast("cpu", torch.bfloat16):
            y, _ = function(*leaves)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            gradients.append(torch.autograd.grad(y.square().sum(), leaves))
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# The whole model against transformers and float64
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("settings", ODD_SETTINGS)
def test_in_float64_the_model_is_its_definition(settings, noise, ours_for):
    ids = random_ids(2, 150)
    exact = logits_by_definition(theirs_for(settings, noise), ids)
    assert error(logits_of(ours_for(settings, noise, dtype=torch.float64), ids), exact) <= 1e-12


@on_each_device
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    "settings, noise, bound",
    [(settings, 0.1, 2e-6) for settings in ODD_SETTINGS if settings != "falcon_mamba deep"]
    + [(settings, 0.3, 2e-4) for settings in ODD_SETTINGS],
)
def test_logits_equal_those_of_transformers(settings, noise, bound, length, device, ours_for):
    ids = random_ids(2, length, seed=length)
    wanted = their_logits(theirs_for(settings, noise), ids)
    got = logits_of(ours_for(settings, noise, device), ids)
    assert got.dtype == torch.float32
    assert error(got, wanted) <= bound


@on_each_device
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("settings", ODD_SETTINGS)
def test_float32_is_as_near_to_float64_as_that_of_transformers(settings, noise, length, device, ours_for):
    ids = random_ids(math.ceil(300 / length), length, seed=length)
    exact = logits_of(ours_for(settings, noise, dtype=torch.float64), ids)
    theirs = their_logits(theirs_for(settings, noise), ids)
    ours = logits_of(ours_for(settings, noise, device), ids)
    assert distance(ours, exact) <= 1.5 * distance(theirs, exact)


@pytest.mark.parametrize("settings", SETTINGS)
def test_hidden_states_equal_those_of_transformers(settings, ours_for):
    ids = random_ids(2, 70)
    with torch.no_grad():
        wanted = theirs_for(settings, 0.1).backbone(ids).last_hidden_state
        assert error(ours_for(settings, 0.1).backbone(ids), wanted) <= 2e-6


@pytest.mark.parametrize("settings", ODD_SETTINGS)
def test_greedy_generation_equals_that_of_transformers(settings, ours_for):
    ids = random_ids(2, 20)
    theirs = theirs_for(settings, 0.1)
    theirs.generation_config.eos_token_id = None
    limited = getattr(theirs.config, "time_step_limit", (0, math.inf)) != (0, math.inf)
    options = {"attention_mask": torch.ones_like(ids), "use_cache": not limited}  # their cached step ignores the limit
    wanted = theirs.generate(ids, max_new_tokens=50, do_sample=False, **options)
    got = ours_for(settings, 0.1).generate(ids, max_new_tokens=50, temperature=0)
    assert got.tolist() == wanted.tolist()


@pytest.mark.parametrize("settings", SETTINGS)
def test_loss_equals_that_of_transformers(settings, ours_for):
    ids = random_ids(3, 50)
    labels = ids.clone()
    labels[0, :20] = labels[2, 7] = labels[1, -1] = -100
    theirs, ours = theirs_for(settings, 0.1), ours_for(settings, 0.1)
    for target in (ids, labels):
        with torch.no_grad():
            out = ours(ids, labels=target)
            assert out["loss"].item() == pytest.approx(theirs(ids, labels=target).loss.item(), rel=1e-6)
        assert set(out) == {"loss", "logits"} and torch.equal(out["logits"], logits_of(ours, ids))


def test_ignored_labels_do_not_change_the_loss(file):
    model, ids = tiny(file), random_ids(2, 20)
    labels = ids.clone()
    labels[:, 10:] = -100
    with torch.no_grad():
        assert torch.allclose(model(ids, labels=labels)["loss"], model(ids[:, :10], labels=ids[:, :10])["loss"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_and_logits_are_float32_whatever_the_weights(file, dtype):
    ids = random_ids(2, 9)
    out = tiny(file).to(dtype)(ids, labels=ids)
    assert out["loss"].dtype == out["logits"].dtype == torch.float32


IN_HALF_PRECISION = [(settings, False) for settings in ["mamba", "falcon_mamba", "mamba2", *SETTINGS]]
# Token by token without limits of dt: transformers' cached step ignores them.
IN_HALF_PRECISION += [(settings, True) for settings in ["mamba", "falcon_mamba", "mamba2", *SETTINGS[:2]]]


@on_each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings, token_by_token", IN_HALF_PRECISION)
def test_half_precision_is_as_near_to_float32_as_that_of_transformers(
    settings, token_by_token, dtype, device, tmp_path
):
    ids = random_ids(4, 100)
    theirs = transformers_model(settings, 0.1).to(dtype)
    theirs.save_pretrained(tmp_path)
    load = functools.partial(file_for(settings).LM.from_pretrained, tmp_path)
    exact = logits_of(load(dtype=torch.float32), ids)  # the same rounded weights
    ours = load(device=device)
    assert {p.dtype for p in ours.parameters()} == {dtype}

    with torch.no_grad():
        if token_by_token:
            cache, params, got, wanted = None, file_for(settings).module.InferenceParams(), [], []
            for token in ids.unbind(1):
                out = theirs(token[:, None], cache_params=cache, use_cache=True)
                cache = out.cache_params
                wanted.append(out.logits[:, 0])
                got.append(ours.step(token.to(device), params).cpu())
            got, wanted = torch.stack(got, 1), torch.stack(wanted, 1)
        else:
            got, wanted = logits_of(ours, ids), theirs(ids).logits
    assert torch.isfinite(got).all()
    assert distance(got, exact) <= 1.2 * distance(wanted, exact)


@on_each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_weights_make_no_nan_in_half_precision(file, dtype, device):
    model = tiny(file, noise=0.3).to(device, dtype)
    params = file.module.InferenceParams()
    assert torch.isfinite(logits_of(model, random_ids(2, 100), params)).all()
    assert all(torch.isfinite(state).all() for state in states(params))


def test_the_residual_stream_may_stay_in_half_precision(file, tmp_path):
    ids, theirs = random_ids(3, 100), transformers_model(file.name, 0.1, residual_in_fp32=False).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    ours = file.LM.from_pretrained(tmp_path)
    exact = logits_of(file.LM.from_pretrained(tmp_path, dtype=torch.float32), ids)
    assert ours.config.residual_in_fp32 is False
    assert distance(logits_of(ours, ids), exact) <= 1.2 * distance(their_logits(theirs, ids), exact)


@pytest.mark.parametrize("residual_in_fp32, dtype", [(True, torch.float32), (False, torch.bfloat16)])
def test_the_residual_stream_has_the_type_that_the_settings_say(file, residual_in_fp32, dtype):
    model, seen = tiny(file, residual_in_fp32=residual_in_fp32).to(torch.bfloat16), []
    model.backbone.layers[1].register_forward_pre_hook(lambda layer, args: seen.append(args[0].dtype))
    logits_of(model, random_ids(2, 5))
    assert seen == [dtype]


def test_embeddings_may_stand_in_for_ids(file):
    model, ids = tiny(file), random_ids(2, 20)
    embeddings = model.backbone.embeddings.weight[ids]
    with torch.no_grad():
        assert error(model(embeddings), model(ids)) <= 1e-7
        assert error(model.backbone(embeddings), model.backbone(ids)) <= 1e-7


def test_an_encoder_of_the_same_weights_gives_the_same_hidden_states(file):
    model, ids = tiny(file), random_ids(2, 20)
    encoder = file.Encoder(model.config)
    weights = {k: v for k, v in model.backbone.state_dict().items() if k != "embeddings.weight"}
    encoder.load_state_dict(weights)
    with torch.no_grad():
        assert error(encoder(model.backbone.embeddings.weight[ids]), model.backbone(ids)) <= 1e-7


@pytest.mark.parametrize("settings", ["mamba", "falcon_mamba", "mamba2"])
def test_the_epsilon_of_the_norms_is_the_checkpoints(settings, tmp_path):
    theirs, ids = transformers_model(settings, 0.1, layer_norm_epsilon=0.5), random_ids(2, 9)
    theirs.save_pretrained(tmp_path)
    ours, exact = file_for(settings).LM.from_pretrained(tmp_path), their_logits(theirs, ids)
    assert error(logits_of(ours, ids), exact) <= 2e-6
    assert error(ours(ids), exact) <= 2e-6  # with gradients
    params = file_for(settings).module.InferenceParams()
    assert error(torch.stack([ours.step(token, params) for token in ids.unbind(1)], 1), exact) <= 5e-6


def test_a_step_of_a_bfloat16_model_keeps_the_residual_stream_in_float32(file):
    model, seen = tiny(file).to(torch.bfloat16), []
    layer = model.backbone.layers[1]
    step = layer.step
    layer.step = lambda x, *states: (seen.append(x.dtype), step(x, *states))[1]
    model.step(random_ids(2, 1)[:, 0], file.module.InferenceParams())
    assert seen == [torch.float32]


def test_the_decays_of_a_bfloat16_model_are_in_float32(file, monkeypatch):
    name, seen = ("selective_scan" if file.name == "mamba" else "ssd"), []
    function = getattr(file.module, name)
    watched = lambda u, dt, A, *rest, **more: (seen.append(A.dtype), function(u, dt, A, *rest, **more))[1]  # noqa: E731
    monkeypatch.setattr(file.module, name, watched)
    logits_of(tiny(file).to(torch.bfloat16), random_ids(2, 5))
    assert seen == [torch.float32] * 2


# ----------------------------------------------------------------------------------------------------------------------
# The cache: any split, any batch, padding, steps
# ----------------------------------------------------------------------------------------------------------------------

PIECES = {
    "token by token": [1] * 130,
    "one token first": [1, 129],
    "one token last": [129, 1],
    "odd pieces": [3, 60, 1, 2, 64],
    "whole chunks": [64, 64, 2],
    "empty pieces": [0, 65, 0, 0, 65, 0],
}


@on_each_device
@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("settings", SETTINGS)
def test_any_split_gives_the_same_logits_and_state(settings, noise, pieces, device, ours_for):
    model, module, ids = ours_for(settings, noise, device), file_for(settings).module, random_ids(3, 130)
    whole = module.InferenceParams()
    wanted = logits_of(model, ids, whole)
    split = module.InferenceParams()
    got = torch.cat([logits_of(model, piece, split) for piece in ids.split(pieces, dim=1)], dim=1)
    assert error(got, wanted) <= SPLIT_BOUNDS[noise]
    assert error(logits_of(model, ids), wanted) <= SPLIT_BOUNDS[noise]
    assert_same_states(states(split), states(whole), SPLIT_BOUNDS[noise])


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("settings", SETTINGS)
def test_steps_give_the_same_logits_and_state_as_one_forward_pass(settings, noise, ours_for):
    model, module, ids = ours_for(settings, noise), file_for(settings).module, random_ids(3, 70)
    whole, stepped = module.InferenceParams(), module.InferenceParams()
    wanted = logits_of(model, ids, whole)
    with torch.no_grad():
        got = torch.stack([model.step(token, stepped) for token in ids.unbind(1)], dim=1)
    assert got.dtype == torch.float32
    assert error(got, wanted) <= SPLIT_BOUNDS[noise]
    assert_same_states(states(stepped), states(whole), SPLIT_BOUNDS[noise])


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("settings", SETTINGS)
def test_rows_of_a_batch_do_not_touch_each_other(settings, noise, batch, ours_for):
    model, module, ids = ours_for(settings, noise), file_for(settings).module, random_ids(batch, 65)
    params = module.InferenceParams()
    together = logits_of(model, ids, params)
    for row in range(batch):
        alone = module.InferenceParams()
        assert error(together[row : row + 1], logits_of(model, ids[row : row + 1], alone)) <= SPLIT_BOUNDS[noise]
        own = [state[row : row + 1] for state in states(params)]
        assert_same_states(own, states(alone), SPLIT_BOUNDS[noise])


def test_an_empty_sequence_gives_no_logits_and_leaves_the_state(file):
    model, params = tiny(file), file.module.InferenceParams()
    assert logits_of(model, random_ids(2, 0)).shape == (2, 0, model.config.padded_vocab_size)
    assert logits_of(model, random_ids(2, 0), params).shape == (2, 0, model.config.padded_vocab_size)
    ids = random_ids(2, 9)
    assert error(logits_of(model, ids, params), logits_of(model, ids)) <= 5e-6
    before = snapshot(params)
    logits_of(model, random_ids(2, 0), params)
    assert_same_states(states(params), before, 0)


def test_an_empty_batch_gives_no_logits(file):
    model = tiny(file)
    assert logits_of(model, random_ids(0, 5)).shape == (0, 5, model.config.padded_vocab_size)


@pytest.mark.parametrize("k", [1, 3, 20])
def test_num_last_tokens_gives_the_last_logits(file, k):
    model, ids = tiny(file), random_ids(2, 20)
    assert error(logits_of(model, ids, num_last_tokens=k), logits_of(model, ids)[:, -k:]) <= 1e-6


def padded_batch(lengths, side):
    """Rows of these lengths, padded with token 7 on one side: ids, mask, and each row's own ids (1, its length)."""
    ids = random_ids(len(lengths), max(lengths))
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : length if side == "right" else None] = 1
        if side == "left":
            mask[row, : max(lengths) - length] = 0
    rows = [row[keep.bool()][None] for row, keep in zip(ids, mask, strict=True)]
    return ids.masked_fill(mask == 0, 7), mask, rows


@on_each_device
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("settings", SETTINGS)
def test_padded_rows_equal_their_unpadded_runs(settings, noise, side, device, ours_for):
    model, module = ours_for(settings, noise, device), file_for(settings).module
    ids, mask, rows = padded_batch([70, 65, 30, 2, 1, 0], side)
    params = module.InferenceParams()
    got = logits_of(model, ids, params, attention_mask=mask.to(device))
    for i, row in enumerate(rows):
        alone = module.InferenceParams()
        wanted = logits_of(model, row, alone)
        assert error(got[i : i + 1, mask[i].bool()], wanted) <= SPLIT_BOUNDS[noise]
        own = [state[i : i + 1] for state in states(params)]
        if row.shape[1] == 0:
            assert not any(state.any() for state in own)
        else:
            assert_same_states(own, states(alone), SPLIT_BOUNDS[noise])


@pytest.mark.parametrize("first, second", [("left", "left"), ("right", "right"), ("left", "right"), ("right", "left")])
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_padded_batch_continues_like_its_unpadded_rows(settings, first, second, ours_for):
    model, module = ours_for(settings, 0.1), file_for(settings).module
    ids1, mask1, rows1 = padded_batch([20, 11, 2, 1], first)
    ids2, mask2, rows2 = padded_batch([3, 9, 1, 2], second)
    tokens = random_ids(4, 3, seed=1)
    params = module.InferenceParams()
    logits_of(model, ids1, params, attention_mask=mask1)
    got = logits_of(model, ids2, params, attention_mask=mask2)
    with torch.no_grad():
        stepped = torch.stack([model.step(token, params) for token in tokens.unbind(1)], dim=1)
    for i in range(4):
        alone = module.InferenceParams()
        wanted = logits_of(model, torch.cat([rows1[i], rows2[i], tokens[i : i + 1]], dim=1), alone)
        real = torch.cat([got[i : i + 1, mask2[i].bool()], stepped[i : i + 1]], dim=1)
        assert error(real, wanted[:, rows1[i].shape[1] :]) <= 5e-6
        assert_same_states([state[i : i + 1] for state in states(params)], states(alone), 5e-6)


def test_a_mask_of_ones_changes_nothing(file):
    model, ids = tiny(file), random_ids(2, 20)
    for dtype in (torch.int64, torch.float32, torch.bool):
        mask = torch.ones(2, 20, dtype=dtype)
        assert error(logits_of(model, ids, attention_mask=mask), logits_of(model, ids)) <= 1e-6


def test_what_stands_in_padding_does_not_matter(file):
    model = tiny(file, bias=True)
    ids, mask, _ = padded_batch([12, 5], "left")
    other = torch.where(mask.bool(), ids, 3)
    a, b = (logits_of(model, i, attention_mask=mask)[mask.bool()] for i in (ids, other))
    assert torch.equal(a, b)


@pytest.mark.parametrize("row", [[1, 0, 1, 1], [0, 1, 0, 1], [1, 0, 0, 1], [1, 1, 0, 1]])
def test_a_mask_with_holes_raises(file, row):
    model, mask = tiny(file), torch.tensor([[1, 1, 1, 1], row])
    with pytest.raises(ValueError, match="attention_mask"):
        model(random_ids(2, 4), attention_mask=mask)


class InferenceCache:  # as in MiniMamba's README
    def __init__(self):
        self.seqlen_offset = 0
        self.key_value_memory_dict = {}


class OnlyTheDict:
    def __init__(self):
        self.key_value_memory_dict = {}


@pytest.mark.parametrize("foreign", [InferenceCache, OnlyTheDict])
def test_a_foreign_cache_class_works(file, foreign):
    model, ids, params = tiny(file), random_ids(2, 20), foreign()
    wanted = logits_of(model, ids)
    got = [logits_of(model, piece, params) for piece in ids[:, :18].split([10, 1, 7], dim=1)]
    with torch.no_grad():
        got += [model.step(token, params)[:, None] for token in ids[:, 18:].unbind(1)]
    assert error(torch.cat(got, dim=1), wanted) <= 5e-6
    model.reset_cache(params)
    assert vars(params) == vars(foreign())  # our own class alone has its seqlen_offset counted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_states_have_the_documented_shapes_and_types(file, dtype):
    model, params = tiny(file).to(dtype), file.module.InferenceParams()
    logits_of(model, random_ids(3, 2), params)
    conv_state, ssm_state = params.key_value_memory_dict[1]
    c = model.config
    if file.name == "mamba":
        assert conv_state.shape == (3, 64, c.d_conv) and ssm_state.shape == (3, 64, c.d_state)
    else:
        assert conv_state.shape == (3, 64 + 2 * c.ngroups * c.d_state, c.d_conv)
        assert ssm_state.shape == (3, c.nheads, c.headdim, c.d_state)
    assert conv_state.dtype == dtype
    assert ssm_state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert sorted(params.key_value_memory_dict) == [0, 1]
    assert not conv_state[..., : c.d_conv - 2].any() and conv_state[..., -2:].any()  # the newest stands last


def test_stored_states_are_detached_and_kept_in_place(file):
    model, params = tiny(file), file.module.InferenceParams()
    model(random_ids(2, 5), params).sum().backward()
    tensors = states(params)
    assert not any(state.requires_grad for state in tensors)
    model(random_ids(2, 3), params)
    model.step(random_ids(2, 1)[:, 0], params)
    assert not any(state.requires_grad for state in states(params))
    assert [state.data_ptr() for state in tensors] == [state.data_ptr() for state in states(params)]


def test_training_on_a_continued_sequence_has_the_right_gradient(file):
    model, params, ids = tiny(file).double(), file.module.InferenceParams(), random_ids(2, 12)
    with torch.no_grad():
        model(ids[:, :6], params)

    def loss():
        return model(ids[:, 6:], params.clone()).tanh().sum()

    loss().backward()
    slope, step = 0.0, 1e-6
    with torch.no_grad():
        directions = [torch.randn_like(p) for p in model.parameters()]
        for sign in (1, -1):
            for p, direction in zip(model.parameters(), directions, strict=True):
                p.add_(sign * step * direction)
            slope += sign * loss().item() / (2 * step)
            for p, direction in zip(model.parameters(), directions, strict=True):
                p.sub_(sign * step * direction)
    wanted = sum((p.grad * direction).sum().item() for p, direction in zip(model.parameters(), directions, strict=True))
    assert slope == pytest.approx(wanted, rel=1e-4)


def break_last_layer(model):
    weight = model.backbone.layers[-1].mixer.out_proj.weight
    model.backbone.layers[-1].mixer.out_proj.weight = torch.nn.Parameter(weight.detach()[:, :3].clone())


MISTAKES = {
    "token out of range": lambda model, params: model(torch.tensor([[1, 5000], [2, 3]]), params),
    "another batch size": lambda model, params: model(random_ids(3, 2), params),
    "mask with holes": lambda model, params: model(
        random_ids(2, 3), params, attention_mask=torch.tensor([[1, 0, 1]] * 2)
    ),
    "step out of range": lambda model, params: model.step(torch.tensor([1, 5000]), params),
    "failure in the last layer": lambda model, params: (break_last_layer(model), model(random_ids(2, 3), params)),
    "failure in the last layer, one token": lambda model, params: (
        break_last_layer(model),
        model(random_ids(2, 1), params),
    ),
    "failure in the last layer of a step": lambda model, params: (
        break_last_layer(model),
        model.step(random_ids(2, 1)[:, 0], params),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_an_error_leaves_the_cache_as_it_was(file, mistake):
    model, params = tiny(file), file.module.InferenceParams()
    logits_of(model, random_ids(2, 5), params)
    before, offset = snapshot(params), params.seqlen_offset
    with pytest.raises((ValueError, IndexError, TypeError, RuntimeError)), torch.no_grad():
        mistake(model, params)
    assert all(torch.equal(a, b) for a, b in zip(states(params), before, strict=True))
    assert params.seqlen_offset == offset


@pytest.mark.parametrize("mistake", [name for name in MISTAKES if name != "another batch size"])
def test_an_error_leaves_an_empty_cache_empty(file, mistake):
    model, params = tiny(file), file.module.InferenceParams()
    with pytest.raises((ValueError, IndexError, TypeError, RuntimeError)), torch.no_grad():
        MISTAKES[mistake](model, params)
    assert params.key_value_memory_dict == {} and params.seqlen_offset == 0


def test_inference_params_count_reset_clone_and_report(file):
    model, params = tiny(file), file.module.InferenceParams()
    logits_of(model, random_ids(2, 5), params)
    with torch.no_grad():
        model.step(random_ids(2, 1)[:, 0], params)
    assert params.seqlen_offset == 6
    info = model.get_cache_info(params)
    assert info == params.get_cache_info()
    assert info["cached_layers"] == 2 and info["total_tensors"] == 4 and info["seqlen_offset"] == 6
    assert info["memory_mb"] == pytest.approx(sum(s.nbytes for s in states(params)) / 1e6)

    twin, before = params.clone(), snapshot(params)
    logits_of(model, random_ids(2, 3), params)
    assert_same_states(states(twin), before, 0)
    assert twin.seqlen_offset == 6 and params.seqlen_offset == 9

    ids = random_ids(3, 4, seed=1)  # another batch size
    model.reset_cache(params)
    twin.reset()
    for cache in (params, twin):
        assert cache.seqlen_offset == 0
        assert torch.equal(logits_of(model, ids, cache), logits_of(model, ids, file.module.InferenceParams()))
        assert cache.seqlen_offset == 4


def test_the_state_is_as_large_after_1000_tokens_as_after_10(file):
    model, params, sizes = tiny(file), file.module.InferenceParams(), []
    for piece in random_ids(1, 1000).split([10, 900, 90], dim=1):
        logits_of(model, piece, params)
        sizes.append([(state.shape, state.untyped_storage().nbytes()) for state in states(params)])
    assert sizes[0] == sizes[1] == sizes[2]


def test_a_foreign_cache_is_reported_on(file):
    model, params = tiny(file), OnlyTheDict()
    logits_of(model, random_ids(2, 5), params)
    info = model.get_cache_info(params)
    assert info["cached_layers"] == 2 and info["seqlen_offset"] == 0


# ----------------------------------------------------------------------------------------------------------------------
# Initialisation and settings
# ----------------------------------------------------------------------------------------------------------------------


def fresh(file, **changes):
    torch.manual_seed(0)
    return file.LM(file.Config(**dict(d_model=256, n_layer=4, vocab_size=1000) | changes))


def parameters_named(model, *endings):
    found = [p.detach() for name, p in model.named_parameters() if name.endswith(endings)]
    assert found
    return found


def test_each_channel_starts_with_decays_from_1_to_n_and_each_head_with_one_in_1_to_16(file):
    for A_log in parameters_named(fresh(file, d_state=16), "A_log"):
        if file.name == "mamba":
            assert torch.allclose(A_log.exp(), torch.arange(1.0, 17).expand(512, 16), rtol=1e-6)
        else:
            assert A_log.shape == (8,) and A_log.exp().min() >= 1 and A_log.exp().max() <= 16.001


def test_the_decays_of_heads_start_spread_over_the_given_range():
    A = torch.cat(parameters_named(fresh(FILES["mamba2"], headdim=1, A_init_range=(2, 6)), "A_log")).exp()
    assert A.min() >= 2 and A.max() <= 6.001
    assert A.mean().item() == pytest.approx(4, abs=0.1) and A.std().item() == pytest.approx(4 / 12**0.5, abs=0.1)


def test_skip_connections_and_norms_start_at_one(file):
    for p in parameters_named(fresh(file), ".D", "norm.weight", "norm_f.weight"):
        assert (p == 1).all()


def test_dt_starts_log_uniform_between_its_bounds(file):
    many_heads = dict(headdim=1) if file.name == "mamba2" else {}
    dt = F.softplus(torch.cat(parameters_named(fresh(file, dt_min=0.01, dt_max=1.0, **many_heads), file.dt_bias)))
    assert dt.min() >= 0.01 * 0.999 and dt.max() <= 1.0 * 1.001
    log_dt = dt.log()
    assert log_dt.mean().item() == pytest.approx(math.log(0.1), abs=0.15)
    assert log_dt.std().item() == pytest.approx(math.log(100) / 12**0.5, abs=0.1)


def test_dt_starts_no_lower_than_its_floor(file):
    model = fresh(file, dt_min=1e-6, dt_max=1e-3, dt_init_floor=1e-4)
    dt = F.softplus(torch.cat(parameters_named(model, file.dt_bias)))
    assert dt.min().item() == pytest.approx(1e-4, rel=1e-2)


def test_dt_proj_starts_uniform_or_constant_at_the_scale_of_its_rank():
    bound = 16**-0.5 * 0.5
    for weight in parameters_named(fresh(FILES["mamba"], dt_scale=0.5), "dt_proj.weight"):
        assert weight.shape == (512, 16) and weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    for weight in parameters_named(fresh(FILES["mamba"], dt_scale=0.5, dt_init="constant"), "dt_proj.weight"):
        assert torch.allclose(weight, torch.tensor(bound))


def test_embeddings_start_normal(file):
    embedding = fresh(file).backbone.embeddings.weight.detach()
    assert embedding.std().item() == pytest.approx(0.02, rel=0.02) and abs(embedding.mean().item()) < 1e-3
    assert fresh(file, initializer_range=0.1).backbone.embeddings.weight.std().item() == pytest.approx(0.1, rel=0.02)


def test_linear_biases_start_at_zero(file):
    for p in parameters_named(fresh(file, bias=True), "in_proj.bias", "out_proj.bias"):
        assert not p.any()


def test_out_proj_starts_divided_by_the_root_of_the_depth(file):
    for weight in parameters_named(fresh(file), "out_proj.weight"):
        assert weight.abs().max() <= 512**-0.5 / 2 and weight.abs().max() >= 0.99 * 512**-0.5 / 2
    for weight in parameters_named(fresh(file, n_layer=1), "out_proj.weight"):
        assert weight.abs().max() >= 0.99 * 512**-0.5


def test_weight_decay_is_off_for_states_steps_skips_and_norms_alone(file):
    for name, p in fresh(file, bias=True, tie_embeddings=False).named_parameters():
        exempt = name.endswith(("A_log", ".D", file.dt_bias, "norm.weight", "norm_f.weight"))
        assert getattr(p, "_no_weight_decay", False) == exempt, name


def test_tied_models_share_one_matrix(file):
    tied, untied = tiny(file, tie_embeddings=True), tiny(file, tie_embeddings=False)
    assert tied.lm_head.weight is tied.backbone.embeddings.weight
    assert untied.lm_head.weight is not untied.backbone.embeddings.weight
    assert (
        sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters())
        == 32 * untied.config.padded_vocab_size
    )


def test_the_vocabulary_is_padded_to_the_multiple(file):
    assert tiny(file, vocab_size=97, pad_vocab_size_multiple=8).lm_head.weight.shape == (104, 32)
    assert file.Config(vocab_size=10000, pad_vocab_size_multiple=8).padded_vocab_size == 10000
    assert file.Config().padded_vocab_size == (50280 if file.name == "mamba" else 50288)


def test_defaults_are_those_of_the_design(file):
    c = file.Config()
    common = dict(d_model=768, n_layer=24, vocab_size=50277, d_conv=4, expand=2, bias=False, conv_bias=True)
    common |= dict(norm_epsilon=1e-5, residual_in_fp32=True, tie_embeddings=True, initializer_range=0.02)
    common |= dict(dt_min=0.001, dt_max=0.1, dt_init_floor=1e-4, gradient_checkpointing=False, num_labels=2)
    common |= dict(pooling_strategy="last", dropout=0.1)
    if file.name == "mamba":
        common |= dict(d_state=16, pad_vocab_size_multiple=8, dt_init="random", dt_scale=1.0, mixer_rms_eps=None)
    else:
        common |= dict(d_state=128, pad_vocab_size_multiple=16, headdim=64, ngroups=1, nheads=24)
        common |= dict(dt_limit=(0, math.inf), A_init_range=(1, 16))
    for field, value in common.items():
        got = getattr(c, field)
        assert (tuple(got) if isinstance(value, tuple) else got) == value, field


def test_settings_survive_a_round_trip_through_json(file, tmp_path):
    changes = dict(d_model=48, vocab_size=77, d_conv=3, bias=True, norm_epsilon=1e-6, tie_embeddings=False)
    changes |= dict(mixer_rms_eps=1e-6, dt_rank=5) if file.name == "mamba" else dict(headdim=24, dt_limit=(0.01, 0.5))
    for config in (file.Config(), file.Config(**changes)):
        assert file.Config.from_dict(config.to_dict()) == config
        assert file.Config.from_dict(json.loads(config.to_json_string())) == config
        config.save_to_json(tmp_path / "settings.json")
        assert file.Config.from_json(tmp_path / "settings.json") == config


WRONG_SETTINGS = [
    dict(d_model=0),
    dict(d_model=-8),
    dict(d_model="64"),
    dict(d_model=64.5),
    dict(n_layer=-1),
    dict(vocab_size=0),
    dict(pad_vocab_size_multiple=0),
    dict(d_state=0),
    dict(d_conv=0),
    dict(expand=0),
    dict(norm_epsilon=-1e-5),
    dict(initializer_range=-0.1),
    dict(dt_min=0.0),
    dict(dt_max=-1.0),
    dict(dt_min=0.5, dt_max=0.1),
    dict(dt_init_floor=-1.0),
    dict(num_labels=0),
    dict(pooling_strategy="first"),
    dict(dropout=1.5),
    dict(n_layer=True),
    dict(dropout=1.0),
    dict(norm_epsilon=math.inf),
    dict(norm_epsilon=math.nan),
    dict(norm_epsilon=True),
    *({name: "no"} for name in ("bias", "conv_bias", "residual_in_fp32", "tie_embeddings", "gradient_checkpointing")),
    dict(pad_token_id="<pad>"),
    dict(eos_token_id="</s>"),
    dict(eos_token_id=""),
    dict(eos_token_id=b"\1"),
    dict(eos_token_id=[1, 2.5]),
]
WRONG_SETTINGS_OF_ONE = {
    "mamba": [
        dict(dt_rank="all"),
        dict(dt_rank=0),
        dict(d_inner=0),
        dict(dt_init="zeros"),
        dict(dt_scale=-1.0),
        dict(mixer_rms_eps=-1.0),
    ],
    "mamba2": [
        dict(headdim=0),
        dict(headdim=100),
        dict(ngroups=0),
        dict(ngroups=7),
        dict(chunk_size=0),
        dict(dt_limit=(0.5, 0.1)),
        dict(A_init_range=(0, 16)),
        dict(A_init_range=(16, 1)),
        dict(A_init_range=(1, math.inf)),
    ],
}


@pytest.mark.parametrize(
    "name, changes",
    [(name, c) for name in FILES for c in WRONG_SETTINGS + WRONG_SETTINGS_OF_ONE[name]],
    ids=lambda v: v if isinstance(v, str) else ",".join(f"{k}={w}" for k, w in v.items()),
)
def test_a_wrong_setting_is_named(name, changes):
    with pytest.raises((ValueError, TypeError)) as caught:
        FILES[name].Config(**changes)
    message = str(caught.value)
    assert any(field in message and str(value).strip("()") in message for field, value in changes.items())


def test_an_unknown_setting_is_named(file):
    with pytest.raises((ValueError, TypeError), match="n_layers"):
        file.Config(n_layers=3)
    with pytest.raises((ValueError, TypeError), match="n_layers"):
        file.Config.from_dict({"n_layers": 3})


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ----------------------------------------------------------------------------------------------------------------------


def same_weights(a, b):
    """Whether two models hold the same tensors, bit by bit, under the same names."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("settings", ODD_SETTINGS)
def test_a_checkpoint_of_transformers_has_the_same_weights_here(settings, ours_for):
    ours, theirs = ours_for(settings, 0.1), theirs_for(settings, 0.1)
    assert same_weights(ours, theirs)
    assert ours.config.padded_vocab_size == VOCAB
    assert ours.config.tie_embeddings == theirs.config.tie_word_embeddings


@pytest.mark.parametrize("settings", ODD_SETTINGS)
def test_a_checkpoint_of_ours_loads_in_transformers(settings, ours_for, tmp_path):
    ours, ids = ours_for(settings, 0.1), random_ids(2, 65)
    ours.save_pretrained(tmp_path)
    theirs, info = TRANSFORMERS[ODD_SETTINGS[settings][0]][1].from_pretrained(tmp_path, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    assert same_weights(ours, theirs)
    assert torch.equal(their_logits(theirs, ids), their_logits(theirs_for(settings, 0.1), ids))
    assert type(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)) is type(theirs)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(theirs).__name__]


def test_a_model_born_here_loads_in_transformers(file, tmp_path):
    chunk_size = dict(chunk_size=64) if file.name == "mamba2" else {}  # the default: checkpoints' is not read
    model = tiny(file, vocab_size=97, pad_vocab_size_multiple=8, bias=True, **chunk_size)
    ids = random_ids(2, 40, vocab=97)
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.config.vocab_size == 104
    assert error(logits_of(model, ids), their_logits(theirs, ids)) <= 2e-6
    again = file.LM.from_pretrained(tmp_path)
    assert same_weights(again, model) and again.config == model.config


@pytest.mark.parametrize("settings", ["mamba", "falcon_mamba", "mamba2"])
def test_sharded_checkpoints_load(settings, tmp_path):
    theirs = theirs_for(settings, 0.1)
    theirs.save_pretrained(tmp_path, max_shard_size="50KB")
    assert (tmp_path / "model.safetensors.index.json").exists() and len(list(tmp_path.glob("*.safetensors"))) > 2
    assert same_weights(file_for(settings).LM.from_pretrained(tmp_path), theirs)


def with_bin_weights(directory, theirs, shards=1):
    """Store the weights of a transformers model as its older releases did."""
    theirs.config.save_pretrained(directory)
    items = list(theirs.state_dict().items())
    if shards == 1:
        torch.save(dict(items), directory / "pytorch_model.bin")
        return directory
    names = [f"pytorch_model-{i + 1:05}-of-{shards:05}.bin" for i in range(shards)]
    for i, name in enumerate(names):
        torch.save(dict(items[i::shards]), directory / name)
    weight_map = {key: names[i % shards] for i, (key, _) in enumerate(items)}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return directory


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("settings", ["mamba", "falcon_mamba", "mamba2"])
def test_checkpoints_in_pytorch_bin_files_load(settings, shards, tmp_path):
    theirs = theirs_for(settings, 0.1)
    assert same_weights(file_for(settings).LM.from_pretrained(with_bin_weights(tmp_path, theirs, shards)), theirs)


def test_a_pickle_that_runs_code_is_refused(file, tmp_path):
    model = tiny(file)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()

    class Payload:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "pwned"),))

    torch.save({"backbone.norm_f.weight": Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises((pickle.UnpicklingError, ValueError, RuntimeError)):
        file.LM.from_pretrained(tmp_path)
    assert not (tmp_path / "pwned").exists()


def in_state_spaces_format(directory, theirs, with_head=True, **changes):
    """Store a transformers model as state-spaces/mamba does; its vocabulary of 96 holds 93 tokens and padding."""
    c, directory = theirs.config, Path(directory)
    ssm_cfg = dict(
        d_state=c.state_size, d_conv=c.conv_kernel, expand=c.expand, bias=c.use_bias, conv_bias=c.use_conv_bias
    )
    if c.model_type == "mamba2":
        ssm_cfg |= dict(layer="Mamba2", headdim=c.head_dim, ngroups=c.n_groups, chunk_size=c.chunk_size)
        ssm_cfg |= dict(dt_limit=[0.0, math.inf])
    config = dict(d_model=c.hidden_size, n_layer=c.num_hidden_layers, vocab_size=93, ssm_cfg=ssm_cfg, rms_norm=True)
    config |= dict(d_intermediate=0, attn_layer_idx=[], attn_cfg={}, residual_in_fp32=True, fused_add_norm=True)
    config |= dict(pad_vocab_size_multiple=16, tie_embeddings=c.tie_word_embeddings)
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config | changes))
    weights = {k.replace("embeddings.", "embedding."): v for k, v in theirs.state_dict().items()}
    if not with_head:
        del weights["lm_head.weight"]
    torch.save(weights, directory / "pytorch_model.bin")
    return directory


STATE_SPACES_SETTINGS = [
    "mamba",
    "mamba expand 3, conv 3",
    "mamba expand 1, conv 2",
    "mamba2",
    "mamba2 expand 1, conv 2",
]


@pytest.mark.parametrize("settings", STATE_SPACES_SETTINGS)
def test_the_format_of_state_spaces_gives_the_same_logits(settings, tmp_path):
    LM, ids = file_for(settings).LM, random_ids(2, 65, vocab=93)
    theirs = transformers_model(settings, 0.1, vocab_size=96)
    theirs.save_pretrained(tmp_path / "transformers")
    model = LM.from_pretrained(in_state_spaces_format(tmp_path / "state-spaces", theirs))
    assert same_weights(model, theirs)
    assert torch.equal(logits_of(model, ids), logits_of(LM.from_pretrained(tmp_path / "transformers"), ids))
    assert error(logits_of(model, ids), their_logits(theirs, ids)) <= 2e-6
    assert model.config.vocab_size == 93 and model.config.padded_vocab_size == 96


@pytest.mark.parametrize("settings", ["mamba", "mamba2 expand 1, conv 2"])
def test_a_tied_checkpoint_may_lack_the_head(settings, tmp_path):
    theirs = transformers_model(settings, 0.1, vocab_size=96)
    directory = in_state_spaces_format(tmp_path, theirs, with_head=False)
    assert same_weights(file_for(settings).LM.from_pretrained(directory), theirs)


@pytest.mark.parametrize("settings, ssm_cfg", [("mamba", {}), ("mamba", None), ("mamba2", {"layer": "Mamba2"})])
def test_an_empty_ssm_cfg_means_the_defaults_of_state_spaces(settings, ssm_cfg, tmp_path):
    ids, fields = random_ids(2, 40, vocab=93), dict(vocab_size=96, tie_word_embeddings=True)
    if settings == "mamba2":
        fields |= dict(num_heads=2, head_dim=64, n_groups=1, state_size=128)
    theirs, LM = transformers_model(settings, 0.1, **fields), file_for(settings).LM
    theirs.save_pretrained(tmp_path / "transformers")
    model = LM.from_pretrained(in_state_spaces_format(tmp_path / "state-spaces", theirs, ssm_cfg=ssm_cfg))
    assert torch.equal(logits_of(model, ids), logits_of(LM.from_pretrained(tmp_path / "transformers"), ids))


def edit_json(path, remove=(), **changes):
    fields = json.loads(path.read_text())
    fields.update(changes)
    path.write_text(json.dumps({k: v for k, v in fields.items() if k not in remove}))


@pytest.mark.parametrize("settings", ["mamba", "falcon_mamba", "mamba2"])
def test_absent_fields_take_the_defaults_of_transformers(settings, tmp_path):
    config_class, model_class = TRANSFORMERS[settings]
    sizes = dict(hidden_size=32, vocab_size=VOCAB)
    if settings == "mamba2":
        sizes |= dict(num_heads=8, head_dim=8)
    torch.manual_seed(0)
    theirs = randomise(model_class(config_class(**sizes)), 0.02)
    theirs.save_pretrained(tmp_path)
    LM, ids = file_for(settings).LM, random_ids(2, 70)
    with_all_fields = LM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"model_type": settings}))
    model = LM.from_pretrained(tmp_path)
    assert same_weights(model, theirs)
    assert model.config == with_all_fields.config and model.config.tie_embeddings == (settings != "mamba2")
    assert torch.equal(logits_of(model, ids), logits_of(with_all_fields, ids))


def test_special_tokens_are_kept(file, tmp_path):
    theirs = transformers_model(file.name, 0.1)
    theirs.config.bos_token_id, theirs.config.pad_token_id = 3, 6
    theirs.config.eos_token_id, theirs.generation_config.eos_token_id = None, [4, 5]  # in another file
    theirs.save_pretrained(tmp_path)
    model = file.LM.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    kept = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (kept.bos_token_id, kept.eos_token_id, kept.pad_token_id) == (3, [4, 5], 6)
    model.config.eos_token_id = 7
    model.save_pretrained(tmp_path)
    assert file.LM.from_pretrained(tmp_path).config.eos_token_id == 7


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"eos_token_id": "x"}', '{"eos_token_id": [1, null]}'])
def test_a_broken_generation_config_does_no_harm(file, text, tmp_path):
    model = tiny(file)
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(text)
    assert same_weights(file.LM.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("infinity", [math.inf, {"__float__": "Infinity"}])
def test_every_spelling_of_infinity_is_read(infinity, tmp_path):
    theirs = theirs_for("mamba2 chunk 256", 0.1)
    theirs.save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", time_step_limit=[0.1, infinity])
    model = mamba2.Mamba2ForCausalLM.from_pretrained(tmp_path)
    assert tuple(model.config.dt_limit) == (0.1, math.inf)


def test_model_type_decides_where_a_config_holds_the_fields_of_both_formats(tmp_path):
    theirs, ids = theirs_for("mamba expand 3, conv 3", 0.1), random_ids(2, 40)
    theirs.save_pretrained(tmp_path)
    edit_json(
        tmp_path / "config.json", d_model=999, n_layer=9, ssm_cfg={}, d_inner=77, rms_norm=True, fused_add_norm=True
    )
    assert error(logits_of(mamba.MambaForCausalLM.from_pretrained(tmp_path), ids), their_logits(theirs, ids)) <= 2e-6


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_the_stored_type_is_kept_unless_another_is_asked_for(file, stored, tmp_path):
    model = tiny(file).to(stored)
    model.save_pretrained(tmp_path)
    assert same_weights(file.LM.from_pretrained(tmp_path), model)
    for wanted in (torch.float32, torch.bfloat16):
        loaded = file.LM.from_pretrained(tmp_path, dtype=wanted)
        assert {p.dtype for p in loaded.parameters()} == {wanted}
        assert same_weights(loaded, copy.deepcopy(model).to(wanted))
    assert {p.dtype for p in transformers.AutoModelForCausalLM.from_pretrained(tmp_path).parameters()} == {stored}
    edit_json(tmp_path / "config.json", dtype="float64")  # what is stored counts
    assert same_weights(file.LM.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("filename", ["model.safetensors", "pytorch_model.bin"])
def test_a_loaded_model_does_not_depend_on_its_files(file, filename, tmp_path):
    model = tiny(file)
    model.save_pretrained(tmp_path)
    if filename.endswith(".bin"):
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / filename)
    loaded = file.LM.from_pretrained(tmp_path)
    with open(tmp_path / filename, "r+b") as stored:  # in place, under a mapping that is still open
        stored.write(bytes((tmp_path / filename).stat().st_size))
    assert same_weights(loaded, model)


def test_loaded_models_are_ready_for_inference_and_training(file, tmp_path):
    tiny(file).save_pretrained(tmp_path)
    loaded = file.LM.from_pretrained(tmp_path)
    assert not loaded.training
    assert all(p.requires_grad for p in loaded.parameters())
    assert loaded.lm_head.weight is loaded.backbone.embeddings.weight
    exempt = {name for name, p in tiny(file).named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert exempt == {name for name, p in loaded.named_parameters() if getattr(p, "_no_weight_decay", False)}


def listing(directory):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def full_disk(tensors, filename, *args, **kwargs):
    Path(filename).write_bytes(b"half a file")
    raise OSError("No space left on device")


def fail_on_call(number, function):
    """A function that does its work until its call of this number, which raises."""
    calls = []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == number:
            raise OSError("Input/output error")
        return function(*args, **kwargs)

    return failing


def break_tensors(model, monkeypatch):
    for function in ("save_file", "save_model"):
        monkeypatch.setattr(safetensors.torch, function, full_disk)


def break_config(model, monkeypatch):
    model.config.eos_token_id = object()


def break_rename(number, model, monkeypatch):
    monkeypatch.setattr(os, "replace", fail_on_call(number, os.replace))


RENAMES = {f"rename {i}": functools.partial(break_rename, i) for i in (1, 2, 3, 4)}  # two files out, two in


BREAKING = {"tensors": break_tensors, "config": break_config, **RENAMES}


@pytest.mark.parametrize("breaking", BREAKING.values(), ids=BREAKING)
def test_a_failed_save_leaves_the_old_checkpoint_as_it_was(file, breaking, tmp_path, monkeypatch):
    directory = tmp_path / "model"
    tiny(file).save_pretrained(directory)
    (directory / "README.md").write_text("kept")
    before, model = listing(directory), tiny(file, noise=0.3, d_state=4)
    breaking(model, monkeypatch)
    with pytest.raises((OSError, TypeError, ValueError)):
        model.save_pretrained(directory)
    assert listing(directory) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failed_first_save_leaves_no_files(file, tmp_path, monkeypatch):
    break_tensors(None, monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        tiny(file).save_pretrained(tmp_path / "model")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_saving_over_a_sharded_checkpoint_replaces_it_and_keeps_other_files(file, tmp_path):
    old = transformers_model(file.name, 0.3)
    old.save_pretrained(tmp_path, max_shard_size="50KB")
    with_bin_weights(tmp_path, old, shards=3)
    with_bin_weights(tmp_path, old)
    (tmp_path / "README.md").write_text("kept")
    (tmp_path / "tokenizer.json").write_text("{}")
    new = tiny(file)
    new.save_pretrained(tmp_path)
    assert same_weights(file.LM.from_pretrained(tmp_path), new)
    assert same_weights(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), new)
    assert (tmp_path / "README.md").read_text() == "kept" and (tmp_path / "tokenizer.json").exists()
    kept = {"README.md", "tokenizer.json", "generation_config.json", "config.json", "model.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} <= kept


REFUSED_BY_BOTH = {
    "hybrid with attention": ("state-spaces", dict(attn_layer_idx=[1]), "attn_layer_idx"),
    "hybrid with an MLP": ("state-spaces", dict(d_intermediate=128), "d_intermediate"),
    "layer norm": ("state-spaces", dict(rms_norm=False), "rms_norm"),
    "another activation": ("transformers", dict(hidden_act="gelu"), "hidden_act"),
    "quantised": ("transformers", dict(quantization_config={"quant_method": "bitsandbytes"}), "quantization_config"),
    "another architecture": ("transformers", dict(model_type="gpt2"), "gpt2"),
    "Mamba-3": ("state-spaces", dict(ssm_cfg={"layer": "Mamba3"}), "Mamba-?3"),
    "unknown layer": ("state-spaces", dict(ssm_cfg={"layer": "Hyena"}), "Hyena"),
}
REFUSED_BY_ONE = {
    "mamba": {
        "the other file's model": ("transformers", dict(model_type="mamba2"), "mamba2"),
        "the other file's layer": ("state-spaces", dict(ssm_cfg={"layer": "Mamba2"}), "mamba2"),
        "unknown field of ssm_cfg": ("state-spaces", dict(ssm_cfg={"d_stat": 16}), "d_stat"),
    },
    "mamba2": {
        "the other file's model": ("transformers", dict(model_type="mamba"), r"mamba\b"),
        "falcon": ("transformers", dict(model_type="falcon_mamba"), "falcon_mamba"),
        "the other file's layer": ("state-spaces", dict(ssm_cfg={"layer": "Mamba1"}), r"mamba\b"),
        "the other file's default": ("state-spaces", dict(ssm_cfg={}), r"mamba\b"),
        "unknown field of ssm_cfg": ("state-spaces", dict(ssm_cfg={"layer": "Mamba2", "d_stat": 16}), "d_stat"),
        "norm before the gate": (
            "state-spaces",
            dict(ssm_cfg={"layer": "Mamba2", "norm_before_gate": True}),
            "norm_before_gate",
        ),
        "D per channel": ("state-spaces", dict(ssm_cfg={"layer": "Mamba2", "D_has_hdim": True}), "D_has_hdim"),
        "part without scan": ("state-spaces", dict(ssm_cfg={"layer": "Mamba2", "d_ssm": 64}), "d_ssm"),
    },
}
REFUSED = [(name, kind) for name in FILES for kind in (REFUSED_BY_BOTH | REFUSED_BY_ONE[name])]


@pytest.mark.parametrize("name, kind", REFUSED)
def test_a_checkpoint_of_another_kind_is_refused(name, kind, tmp_path):
    style, changes, message = (REFUSED_BY_BOTH | REFUSED_BY_ONE[name])[kind]
    file = FILES[name]
    theirs = transformers_model(name, 0.1, vocab_size=96, tie_word_embeddings=True)
    if style == "state-spaces":
        in_state_spaces_format(tmp_path, theirs, **changes)
    else:
        theirs.save_pretrained(tmp_path)
        edit_json(tmp_path / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        file.LM.from_pretrained(tmp_path)


def edit_weights(directory, edit):
    path = directory / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    edit(weights)
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})


WRONG_WEIGHTS = {
    "missing": ("layers.1.mixer.A_log", lambda w: w.pop("backbone.layers.1.mixer.A_log")),
    "extra": ("layers.2.norm.weight", lambda w: w.update({"backbone.layers.2.norm.weight": torch.ones(32)})),
    "misshapen": ("layers.0.mixer.D", lambda w: w.update({"backbone.layers.0.mixer.D": torch.ones(3)})),
    "no embedding": ("embedding", lambda w: w.pop(next(k for k in w if "embedding" in k))),
}


@pytest.mark.parametrize("name, edit", WRONG_WEIGHTS.values(), ids=WRONG_WEIGHTS)
def test_wrong_tensors_are_named(file, name, edit, tmp_path):
    tiny(file).save_pretrained(tmp_path)
    edit_weights(tmp_path, edit)
    with pytest.raises((ValueError, RuntimeError, KeyError), match=re.escape(name)):
        file.LM.from_pretrained(tmp_path)


def test_an_untied_checkpoint_without_head_is_refused(file, tmp_path):
    tiny(file, tie_embeddings=False).save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda w: w.pop("lm_head.weight"))
    with pytest.raises((ValueError, RuntimeError, KeyError), match=r"lm_head\.weight"):
        file.LM.from_pretrained(tmp_path)


def test_a_directory_without_config_or_weights_says_which_file_is_missing(file, tmp_path):
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        file.LM.from_pretrained(tmp_path)
    tiny(file).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises((OSError, ValueError), match=r"model\.safetensors"):
        file.LM.from_pretrained(tmp_path)


UNUSUAL = dict(d_model=48, vocab_size=60, pad_vocab_size_multiple=16, d_conv=3, norm_epsilon=1e-3, bias=True)
UNUSUAL |= dict(residual_in_fp32=False, initializer_range=0.3, bos_token_id=2, eos_token_id=[3, 4], pad_token_id=5)
UNUSUAL |= dict(num_labels=5, pooling_strategy="max", dropout=0.3, conv_bias=False, tie_embeddings=False)
UNUSUAL |= dict(dt_min=0.02, dt_max=0.5, dt_init_floor=0.003)
UNUSUAL_IN_ONE = {
    "mamba": dict(dt_init="constant", dt_scale=2.0, d_inner=80, dt_rank=5, mixer_rms_eps=1e-4),
    "mamba2": dict(headdim=24, ngroups=2, dt_limit=(0.1, 2.0)),
}


def test_all_settings_are_kept_in_a_checkpoint(file):
    config = file.Config(**UNUSUAL, **UNUSUAL_IN_ONE[file.name])
    assert file.Config.from_checkpoint(json.loads(json.dumps(config.to_checkpoint()))) == config


SSM_CFG = {
    "mamba": dict(dt_rank=3, dt_min=0.01, dt_max=0.2, dt_init="constant", dt_scale=2.0, dt_init_floor=0.005),
    "mamba2": dict(headdim=16, dt_limit=[0.1, 1.0], A_init_range=[2, 3], dt_min=0.01, dt_max=0.2, dt_init_floor=0.005),
}
OF_KERNELS = {
    "mamba": dict(use_fast_path=False),
    "mamba2": dict(conv_init=None, use_mem_eff_path=True, rmsnorm=True, D_has_hdim=False, norm_before_gate=False),
}


def test_the_fields_of_ssm_cfg_are_read(file):
    layer = {"mamba": "Mamba1", "mamba2": "Mamba2"}[file.name]
    ssm_cfg = {"layer": layer} | SSM_CFG[file.name] | OF_KERNELS[file.name]
    config = file.Config.from_checkpoint(
        dict(d_model=32, n_layer=1, vocab_size=50, residual_in_fp32=False, ssm_cfg=ssm_cfg)
    )
    assert config.residual_in_fp32 is False
    for name, value in SSM_CFG[file.name].items():
        assert getattr(config, name) == (tuple(value) if isinstance(value, list) else value), name


def test_written_files_are_as_readable_as_any(file, tmp_path):
    tiny(file).save_pretrained(tmp_path)
    file.Config().save_to_json(tmp_path / "settings.json")
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644}


def test_a_failed_save_of_settings_leaves_no_file(file, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", fail_on_call(1, os.replace))
    with pytest.raises(OSError, match="Input/output error"):
        file.Config().save_to_json(tmp_path / "settings.json")
    assert not list(tmp_path.iterdir())


def test_a_classifier_with_half_a_head_is_refused(file, tmp_path):
    model = classifier(file)
    model.save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda weights: weights.pop("classifier.bias"))
    with pytest.raises(ValueError, match=r"missing: classifier\.bias"):
        type(model).from_pretrained(tmp_path)


def test_a_missing_shard_is_named(file, tmp_path):
    transformers_model(file.name, 0.1).save_pretrained(tmp_path, max_shard_size="50KB")
    missing = sorted(tmp_path.glob("model-*.safetensors"))[1]
    missing.unlink()
    with pytest.raises(OSError, match=missing.name):
        file.LM.from_pretrained(tmp_path)


def test_what_can_not_be_on_the_hub_is_not_looked_for_there(file, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(OSError, match="no such directory, and no name of the form owner/model"):
        file.LM.from_pretrained("nowhere")


def test_a_type_given_as_a_word_is_refused(file, tmp_path):
    tiny(file).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^dtype must be None or a torch\.dtype, got 'bfloat16'"):
        file.LM.from_pretrained(tmp_path, dtype="bfloat16")


# ----------------------------------------------------------------------------------------------------------------------
# Generation
# ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def with_fixed_logits(file, logits, **changes):
    """A model that gives these logits at every position whatever came before."""
    model = tiny(file, d_model=16, n_layer=1, vocab_size=len(logits), tie_embeddings=False, **changes)
    for name, p in model.named_parameters():
        if "out_proj" in name:
            p.zero_()
    model.backbone.embeddings.weight.fill_(1.0)
    model.backbone.norm_f.weight.fill_((1 + model.config.norm_epsilon) ** 0.5)
    model.lm_head.weight.fill_(3.0)  # what stands in the padding of the vocabulary must not matter
    model.lm_head.weight[: len(logits)] = logits[:, None] / 16
    assert torch.allclose(model(random_ids(1, 2, vocab=3))[0, 1, : len(logits)], logits, atol=1e-5)
    return model


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


SAMPLING = [
    dict(),
    dict(temperature=0.7),
    dict(temperature=1.5),
    dict(top_k=1),
    dict(top_k=5),
    dict(top_k=3),  # a tie at the border
    dict(top_k=1000),
    dict(top_p=0.8),
    dict(top_p=0.31),
    dict(top_p=1e-6),
    dict(top_k=6, top_p=0.9),
    dict(temperature=0.6, top_k=7, top_p=0.85),
    dict(temperature=1.4, top_p=0.7),
]


@pytest.mark.parametrize("options", SAMPLING, ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()) or "plain")
def test_sampling_keeps_the_tokens_that_transformers_keeps(file, options):
    logits = torch.tensor([0.3, 2.0, -1.0, 1.1, 0.9, 0.9, -0.3, 1.7, 0.1, -0.7, 0.6])
    if "top_p" in options:
        logits[5] = 0.85  # the order of ties is nobody's promise
    model = with_fixed_logits(file, logits)
    ids = model.generate(torch.zeros(500, 1, dtype=torch.long), max_new_tokens=8, generator=generator(), **options)
    counts = torch.bincount(ids[:, 1:].flatten(), minlength=16)

    warped = TemperatureLogitsWarper(float(options.get("temperature", 1.0)))(None, logits[None])
    if "top_k" in options:
        warped = TopKLogitsWarper(options["top_k"])(None, warped)
    if "top_p" in options:
        warped = TopPLogitsWarper(options["top_p"])(None, warped)
    probabilities = F.pad(warped[0].softmax(-1), (0, 16 - len(logits)))
    assert (counts > 0).tolist() == (probabilities > 0).tolist()
    deviation = (4000 * probabilities * (1 - probabilities)).sqrt()
    assert ((counts - 4000 * probabilities).abs() <= 5 * deviation + 1e-3).all()


def test_padding_of_the_vocabulary_is_never_generated(file, tmp_path):
    logits = torch.full((11,), -2.0)
    model = with_fixed_logits(file, logits, pad_vocab_size_multiple=8)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["unpadded_vocab_size"] == 11
    loaded = file.LM.from_pretrained(tmp_path)
    for m in (model, loaded):
        prompt = torch.zeros(50, 2, dtype=torch.long)
        assert logits_of(m, prompt)[..., 11:].min() > 0  # the padding would win
        assert m.generate(prompt, max_new_tokens=5, generator=generator()).max() < 11
        assert m.generate(prompt, max_new_tokens=5, temperature=0).max() < 11
        assert (
            m.generate(prompt, max_new_tokens=5, temperature=2.0, top_k=5, top_p=0.9, generator=generator()).max() < 11
        )


@pytest.mark.parametrize("options", [dict(temperature=0), dict(), dict(temperature=1.3, top_k=20, top_p=0.9)])
def test_one_seed_gives_one_text_with_and_without_cache(file, options):
    model, ids = tiny(file), random_ids(3, 10)
    texts = [
        model.generate(ids, max_new_tokens=20, use_cache=use_cache, generator=generator(5), **options).tolist()
        for use_cache in (True, False, True)
    ]
    assert texts[0] == texts[1] == texts[2]


def test_the_smallest_temperature_is_nearly_greedy(file):
    model, ids = tiny(file), random_ids(3, 4)
    greedy = model.generate(ids, temperature=0)
    for temperature in (1e-30, 1e-40, 1e-300):
        assert torch.equal(model.generate(ids, temperature=temperature), greedy)


def test_different_seeds_give_different_texts(file):
    model, ids = tiny(file), random_ids(1, 10)
    texts = {tuple(model.generate(ids, max_new_tokens=20, generator=generator(s))[0].tolist()) for s in range(5)}
    assert len(texts) == 5


def test_without_a_generator_the_global_seed_decides(file):
    model, ids, texts = tiny(file), random_ids(1, 10), []
    for _ in range(2):
        torch.manual_seed(3)
        texts.append(model.generate(ids, max_new_tokens=10).tolist())
    assert texts[0] == texts[1]


def test_generate_gives_the_prompt_and_the_new_ids(file):
    model, ids = tiny(file), random_ids(2, 10)
    out = model.generate(ids)
    assert out.shape == (2, 60) and out.dtype == ids.dtype and torch.equal(out[:, :10], ids)
    assert torch.equal(model.generate(ids, max_new_tokens=0), ids)
    assert not out.requires_grad


def test_generate_ends_rows_as_transformers_does(file, ours_for):
    settings = file.name
    ids, theirs, ours = random_ids(4, 12), theirs_for(settings, 0.3), ours_for(settings, 0.3)
    theirs.generation_config.eos_token_id = None
    mask = torch.ones_like(ids)
    free = theirs.generate(ids, max_new_tokens=30, do_sample=False, attention_mask=mask)[:, 12:]
    for eos in (free[0, 3].item(), free[1, 10].item(), free[2, 0].item()):
        options = dict(eos_token_id=eos, pad_token_id=eos, attention_mask=mask)
        wanted = theirs.generate(ids, max_new_tokens=30, do_sample=False, **options)
        got = ours.generate(ids, max_new_tokens=30, temperature=0, eos_token_id=eos)
        assert got.tolist() == wanted.tolist()


def test_generation_stops_once_every_row_ended(file):
    logits = torch.zeros(8)
    logits[5] = 100.0
    out = with_fixed_logits(file, logits).generate(random_ids(3, 4, vocab=5), max_new_tokens=20, eos_token_id=5)
    assert out.shape == (3, 5) and (out[:, 4] == 5).all()


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_generates_what_each_row_generates_alone(file, side, use_cache):
    model = tiny(file, noise=0.3, bias=True)
    ids, mask, rows = padded_batch([20, 11, 3, 1], side)
    out = model.generate(ids, max_new_tokens=12, temperature=0, attention_mask=mask, use_cache=use_cache)
    assert torch.equal(out[:, :20], ids)
    for i, row in enumerate(rows):
        alone = model.generate(row, max_new_tokens=12, temperature=0)[0, row.shape[1] :]
        assert out[i, 20:].tolist() == alone.tolist()


@pytest.mark.parametrize("options", [dict(temperature=0), dict(top_k=20)])
def test_a_stream_of_one_row_yields_the_ints_that_generate_gives(file, options):
    model, ids = tiny(file), random_ids(1, 10)
    tokens = list(model.stream(ids, max_new_tokens=15, generator=generator(), **options))
    assert all(type(token) is int for token in tokens)
    assert tokens == model.generate(ids, max_new_tokens=15, generator=generator(), **options)[0, 10:].tolist()


def test_a_stream_of_several_rows_yields_the_columns_that_generate_gives(file):
    model, ids = tiny(file, noise=0.3), random_ids(3, 10)
    eos = model.generate(ids, max_new_tokens=15, temperature=0)[1, 14].item()
    for options in (dict(), dict(eos_token_id=eos)):
        columns = list(model.stream(ids, max_new_tokens=15, temperature=0, **options))
        wanted = model.generate(ids, max_new_tokens=15, temperature=0, **options)[:, 10:]
        assert torch.stack(columns, dim=1).tolist() == wanted.tolist()


def test_a_stream_yields_each_token_as_it_comes(file):
    model, ids = tiny(file), random_ids(1, 10)
    stream = model.stream(ids, max_new_tokens=10**9)
    assert len([next(stream) for _ in range(5)]) == 5


def test_generation_works_in_training_mode_and_keeps_it(file):
    model, ids = tiny(file).train(), random_ids(1, 5)
    model.generate(ids, max_new_tokens=2)
    assert model.training


def test_a_long_prompt_is_read_in_segments(file):
    model, ids, longest = tiny(file, d_model=16, n_layer=1), random_ids(1, 30_000), []
    model.backbone.layers[0].register_forward_pre_hook(lambda layer, args: longest.append(args[0].shape[1]))
    got = model.generate(ids, max_new_tokens=1, temperature=0)[0, -1]
    assert max(longest) < 30_000
    wanted = logits_of(model, ids, num_last_tokens=1)[0, -1, :VOCAB].argmax()
    assert got == wanted


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_long_padded_prompt_is_read_like_its_rows_alone(file, side):
    model = tiny(file, d_model=16, n_layer=1, noise=0.3, bias=True)
    ids, mask, rows = padded_batch([9000, 4500, 20], side)
    out = model.generate(ids, max_new_tokens=3, temperature=0, attention_mask=mask)[:, 9000:]
    for row, got in zip(rows, out, strict=True):
        assert got.tolist() == model.generate(row, max_new_tokens=3, temperature=0)[0, row.shape[1] :].tolist()


@on_each_device
def test_half_precision_models_generate_on_each_device(file, device):
    model = tiny(file).to(device, torch.bfloat16)
    ids = random_ids(2, 10, device=device)
    out = model.generate(ids, max_new_tokens=5)
    assert out.shape == (2, 15) and out.device == ids.device


def test_any_of_several_ids_ends_a_row_which_the_first_fills_up(file):
    model, ids = tiny(file, noise=0.3), random_ids(4, 6)
    free = model.generate(ids, 12, temperature=0)[:, 6:]
    eos = [free[0, 3].item(), free[1, 6].item()]
    got = model.generate(ids, 12, temperature=0, eos_token_id=eos)[:, 6:].tolist()
    for row, unstopped in zip(got, free.tolist(), strict=True):
        end = min((unstopped.index(token) + 1 for token in eos if token in unstopped), default=12)
        assert row == (unstopped[:end] + 12 * eos[:1])[: len(row)]
    always_5 = with_fixed_logits(file, torch.eye(8)[5] * 100)
    assert always_5.generate(random_ids(3, 4, vocab=5), max_new_tokens=9, eos_token_id=[2, 5]).shape == (3, 5)


def test_top_p_keeps_no_more_than_it_needs_and_always_the_likeliest(file):
    even = torch.zeros(1, 4)  # 1/4 each: two hold just 0.5
    kept = file.module.filter_logits(even, top_p=0.5).isfinite().sum()
    assert kept == TopPLogitsWarper(0.5)(None, even).isfinite().sum() == 2
    assert file.module.sample(torch.tensor([[0.0, 1.0]]), top_p=1e-9).item() == 1


def test_a_prompt_of_many_rows_is_read_in_shorter_pieces(file):
    model, sizes = tiny(file, d_model=16, n_layer=1), []
    model.backbone.layers[0].register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[:2].numel()))
    model.generate(random_ids(8, 400), max_new_tokens=1)
    assert max(sizes) <= file.module.PROMPT_SEGMENT and sum(sizes) == 8 * 400


# ----------------------------------------------------------------------------------------------------------------------
# Heads, and the snippets of the projects whose users come here
# ----------------------------------------------------------------------------------------------------------------------


def classifier(file, **settings):
    config = file.Config(d_model=32, n_layer=2, vocab_size=VOCAB, num_labels=3, **file.tiny, **settings)
    return getattr(file.module, file.LM.__name__.replace("CausalLM", "SequenceClassification"))(config).eval()


@pytest.mark.parametrize("strategy", ["last", "mean", "max"])
def test_a_classifier_pools_the_real_tokens_alone(file, strategy):
    torch.manual_seed(0)
    model, lengths = classifier(file, pooling_strategy=strategy), (9, 5, 1)
    ids = random_ids(3, 9)
    right = torch.tensor([[1] * n + [0] * (9 - n) for n in lengths])
    from_left = torch.stack([row.roll(9 - n) for row, n in zip(ids, lengths, strict=True)])
    with torch.no_grad():
        alone = torch.cat([model(row[None, :n]) for row, n in zip(ids, lengths, strict=True)])  # (3, num_labels)
        assert error(model(ids, right), alone) < 1e-5
        assert error(model(from_left, right.flip(1)), alone) < 1e-5
        assert error(model(model.backbone.embeddings(ids), right), alone) < 1e-5


def test_a_classifier_is_its_backbone_and_a_linear_layer(file):
    torch.manual_seed(0)
    model, ids, labels = classifier(file), random_ids(4, 7), torch.tensor([0, 2, 1, 1])
    with torch.no_grad():
        expected = F.linear(model.backbone(ids)[:, -1], model.classifier.weight, model.classifier.bias)
        out = model(ids, labels=labels)
    assert error(out["logits"], expected) < 1e-6
    assert torch.isclose(out["loss"], -expected.log_softmax(-1)[torch.arange(4), labels].mean())


def test_a_classifier_of_one_label_is_a_regression(file):
    torch.manual_seed(0)
    model = classifier(file)
    model.config.num_labels = 1
    model.reset_classifier()
    out, target = model(random_ids(4, 7), labels=torch.tensor([0.0, 1.0, -2.0, 3.0])), torch.tensor([0.0, 1, -2, 3])
    assert torch.isclose(out["loss"], (out["logits"][:, 0] - target).square().mean())


def test_the_heads_come_back_from_their_checkpoints(file, tmp_path):
    model, ids = classifier(file, pooling_strategy="max"), random_ids(2, 6)
    model.save_pretrained(tmp_path / "classifier")
    loaded = type(model).from_pretrained(tmp_path / "classifier")
    assert loaded.config.num_labels == 3 and loaded.config.pooling_strategy == "max"
    assert torch.equal(loaded(ids), model(ids))
    Features = getattr(file.module, file.LM.__name__.replace("CausalLM", "FeatureExtraction"))
    for vocab_size in (VOCAB, None):
        model = Features(file.Config(d_model=32, n_layer=1, vocab_size=vocab_size, **file.tiny)).eval()
        model.save_pretrained(tmp_path / f"features-{vocab_size}")
        inputs = torch.randn(2, 5, 32)
        assert torch.equal(Features.from_pretrained(tmp_path / f"features-{vocab_size}")(inputs), model(inputs))


def test_a_classifier_starts_from_the_backbone_of_a_language_model(file, tmp_path):
    model = file.LM(file.Config(d_model=32, n_layer=2, vocab_size=VOCAB, **file.tiny)).eval()
    model.save_pretrained(tmp_path)
    loaded = type(classifier(file)).from_pretrained(tmp_path)
    ids = random_ids(2, 6)
    assert torch.equal(loaded.backbone(ids), model.backbone(ids))
    assert loaded(ids).shape == (2, 2) and loaded(ids).isfinite().all()


def test_features_have_an_embedding_only_where_a_vocabulary_was_given():
    without = mamba.MambaForFeatureExtraction(mamba.BaseMambaConfig(d_model=32, n_layer=1))
    assert not hasattr(without.backbone, "embeddings") and without(torch.randn(2, 5, 32)).shape == (2, 5, 32)
    model = mamba.MambaForFeatureExtraction(mamba.BaseMambaConfig(d_model=32, n_layer=1, vocab_size=10))
    assert model(torch.tensor([[1, 2, 3]])).shape == (1, 3, 32)


def test_heads_name_the_argument_that_is_wrong(file):
    model, ids = classifier(file), random_ids(2, 6)
    for labels in (torch.tensor([0]), torch.tensor([0, 3]), torch.tensor([0, -1])):
        with pytest.raises(ValueError, match="labels"):
            model(ids, labels=labels)
    with pytest.raises(ValueError, match="at least one real token"):
        model(ids, torch.tensor([[0] * 6, [1] * 6]))
    with pytest.raises(ValueError, match="at least one real token"):
        model(ids[:, :0])
    with pytest.raises(ValueError, match="pooling_strategy"):
        classifier(file, pooling_strategy="first")
    with pytest.raises(ValueError, match="vocab_size"):
        file.LM(file.Config(d_model=32, n_layer=1, vocab_size=None, **file.tiny))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_training_step_compiles_whole_and_gives_the_same_numbers(file, backend):
    if backend == "inductor" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("there is no C++ compiler")
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, ids = file.LM(file.Config(d_model=32, n_layer=1, vocab_size=VOCAB, **file.tiny)), random_ids(2, 35)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    results = []
    for run_model in (compiled, model):
        model.zero_grad()
        out = run_model(ids, labels=ids)
        out["loss"].backward()
        results.append([out["logits"].detach(), *(p.grad for p in model.parameters())])
    for got, expected in zip(*results, strict=True):
        assert error(got, expected) < 1e-5
    with torch.no_grad():
        assert error(compiled(ids), model(ids)) < 1e-5


def test_a_bfloat16_model_compiles_for_training(file):
    torch._dynamo.reset()
    model, ids, results = tiny(file).to(torch.bfloat16), random_ids(2, 21), []
    for run_model in (torch.compile(model, backend="aot_eager", fullgraph=True), model):
        model.zero_grad()
        run_model(ids, labels=ids)["loss"].backward()
        results.append([run_model(ids).detach(), *(p.grad for p in model.parameters())])
    for got, exact in zip(*results, strict=True):
        assert error(got, exact) <= 0.03


def test_fake_results_of_the_operators_have_the_shapes_and_types_of_the_real_ones(file):
    check = functools.partial(torch.library.opcheck, test_utils=("test_schema", "test_faketensor"))
    leaf = lambda value, dtype: value.to(dtype, copy=True).requires_grad_()  # noqa: E731
    for dtype in (torch.float32, torch.bfloat16):
        if file.name == "mamba":
            u, dt, A, B, C, h = scan_inputs(2, 20, 3, 4, torch.float32)
            u, z, B, C = (leaf(value, dtype) for value in (u, u, B, C))
            inputs = (u, leaf(dt, torch.float32), A, B, C, torch.ones(3))
            check(mamba._scan, (*inputs, h.mT.contiguous(), z, 5, 1, True))
            y, final, borders = (v.detach() for v in mamba._scan(*inputs, h.mT.contiguous(), z, 5, 1, True))
            check(mamba._scan_backward, (y, final, *(v.detach() for v in (*inputs, z)), borders, 5, 1))
        else:
            x, dt, A, B, C, h = ssd_inputs(2, 20, 4, 3, 2, 5, torch.float32)
            x, B, C = (leaf(value, dtype) for value in (x, B, C))
            inputs = (x, leaf(dt, torch.float32), A, B, C, torch.ones(4))
            check(mamba2._ssd, (*inputs, h, 8, 0, True))
            y, final, borders = (value.detach() for value in mamba2._ssd(*inputs, h, 8, 0, True))
            check(mamba2._ssd_backward, (y, final, *(v.detach() for v in inputs), borders, 8, 0))
        x, before = torch.randn(2, 9, 6, dtype=dtype), torch.randn(2, 4, 6, dtype=dtype)
        check(file.module._conv, (x, before, torch.randn(4, 6), torch.randn(6)))


def gradients_and_results(function, arguments):
    arguments = [value.clone().requires_grad_() for value in arguments]
    y, state = function(*arguments)
    torch.manual_seed(0)
    total = (y * torch.randn(y.shape, dtype=y.dtype)).sum() + (state * torch.randn(state.shape, dtype=y.dtype)).sum()
    return [y.detach(), state.detach(), *torch.autograd.grad(total, arguments)]


def test_the_scan_in_groups_of_rows_is_its_definition():
    torch.manual_seed(0)
    b, l, e, n = 20, 35, 512, 16
    assert mamba._tiling(b, l, e, n, torch.device("cpu"), 0, 0)[2] < b
    u, dt, A = torch.randn(b, l, e), torch.rand(b, l, e), -torch.rand(e, n)
    arguments = [v.double() for v in (u, dt, A, *torch.randn(2, b, l, n), torch.randn(b, e, n))]
    results = [gradients_and_results(f, arguments) for f in (mamba.selective_scan, mamba.selective_scan_recurrence)]
    for got, exact in zip(*results, strict=True):
        assert error(got, exact) < 1e-12


def test_ssd_in_several_segments_is_its_definition():
    torch.manual_seed(0)
    b, l, h, p, n = 1, 2150, 8, 64, 4  # two segments of whole chunks, and a rest
    x, dt, A = torch.randn(b, l, h, p), torch.rand(b, l, h), -torch.rand(h)
    arguments = [v.double() for v in (x, dt, A, *torch.randn(2, b, l, 1, n), torch.randn(b, h, p, n))]
    results = [gradients_and_results(f, arguments) for f in (mamba2.ssd, mamba2.ssd_recurrence)]
    for got, exact in zip(*results, strict=True):
        assert error(got, exact) < 1e-11
    with torch.no_grad():  # y is written in place then
        for got, exact in zip(mamba2.ssd(*arguments), results[1], strict=False):
            assert error(got, exact) < 1e-11


@pytest.mark.parametrize("n_parallel", [1, 3, None])
@pytest.mark.parametrize("sizes", [(3, 65, 6, 4, 3, 8, 64), (2, 130, 4, 8, 2, 5, 16), (1, 7, 2, 3, 1, 4, 4)])
def test_ssd_with_chunks_side_by_side_is_its_definition(sizes, n_parallel):
    torch.manual_seed(0)
    b, l, h, p, g, n, q = sizes
    x, dt, A, D = torch.randn(b, l, h, p), torch.rand(b, l, h), -3 * torch.rand(h), torch.randn(h)
    arguments = [v.double() for v in (x, dt, A, *torch.randn(2, b, l, g, n), torch.randn(b, h, p, n), D)]
    chunked = functools.partial(mamba2.ssd, chunk_size=q, n_parallel=n_parallel)
    forms = (lambda *v, f=f: f(*v[:-1], D=v[-1]) for f in (chunked, mamba2.ssd_recurrence, mamba2.ssd_quadratic))
    results = [gradients_and_results(form, arguments) for form in forms]
    for got, exact, dual in zip(*results, strict=True):
        assert error(got, exact) < 1e-13 and error(dual, exact) < 1e-13


def test_the_number_of_operations_side_by_side_grows_slower_than_the_length(file):
    """Each is a kernel launch on a GPU, where the side by side form is the default."""

    def count(l):
        if file.name == "mamba":
            u, dt, B, C = torch.rand(1, l, 4), torch.rand(1, l, 4), torch.rand(1, l, 4), torch.rand(1, l, 4)
            arguments, settings = (
                (u, dt, -torch.rand(4, 4), B, C),
                dict(block_len=math.isqrt(l), n_parallel=math.isqrt(l)),
            )
        else:
            x, dt, B, C = torch.rand(1, l, 2, 4), torch.rand(1, l, 2), torch.rand(1, l, 1, 4), torch.rand(1, l, 1, 4)
            arguments, settings = (x, dt, -torch.rand(2), B, C), dict(chunk_size=16, n_parallel=l // 16)
        function = mamba.selective_scan if file.name == "mamba" else mamba2.ssd
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            function(*arguments, **settings)
        return sum(event.name.startswith("aten::") for event in profile.events())

    assert count(64 * 256) <= {"mamba": 9, "mamba2": 2}[file.name] * count(256)


def test_gradients_of_the_final_state_alone_and_of_y_alone(file):
    torch.manual_seed(0)
    if file.name == "mamba":
        fast, slow, shapes = mamba.selective_scan, mamba.selective_scan_recurrence, [(2, 35, 8), (2, 35, 8), (8, 4)]
        shapes += [(2, 35, 4), (2, 35, 4)]
    else:
        fast, slow, shapes = mamba2.ssd, mamba2.ssd_recurrence, [(2, 35, 4, 8), (2, 35, 4), (4,)]
        shapes += [(2, 35, 1, 4), (2, 35, 1, 4)]
    values = [torch.rand(shape, dtype=torch.float64) for shape in shapes]
    values[2] = -values[2]
    for which in (0, 1):
        gradients = []
        for function in (fast, slow):
            inputs = [value.clone().requires_grad_() for value in values]
            gradients.append(torch.autograd.grad(function(*inputs)[which].square().sum(), inputs, allow_unused=True))
        for got, exact in zip(*gradients, strict=True):
            assert error(got, torch.zeros_like(got) if exact is None else exact) < 1e-12


def prefilled(file):
    """A small model, the ids that come next, and the states that a prompt has left."""
    torch.manual_seed(0)
    model = file.LM(file.Config(d_model=32, n_layer=2, vocab_size=VOCAB, **file.tiny)).eval()
    params = file.module.InferenceParams()
    with torch.no_grad():
        model(random_ids(2, 9), params)
    return model, random_ids(2, 1)[:, 0], params


def test_advance_is_step_without_side_effects(file):
    model, ids, params = prefilled(file)
    before = params.clone()
    logits, states = model.advance(ids, params.key_value_memory_dict)
    for layer, pair in before.key_value_memory_dict.items():
        assert all(map(torch.equal, pair, params.key_value_memory_dict[layer]))
    assert torch.equal(logits, model.step(ids, params))
    for layer, pair in params.key_value_memory_dict.items():
        assert all(map(torch.equal, pair, states[layer]))


def a_tiny_model(file):
    torch.manual_seed(0)
    return file.LM(file.Config(d_model=32, n_layer=2, vocab_size=VOCAB, **file.tiny)).eval(), random_ids(2, 11)


@torch.no_grad()
def test_forward_compiles_whole_with_a_filled_cache_and_with_a_mask(file):
    torch._dynamo.reset()
    model, ids = a_tiny_model(file)
    compiled, params = torch.compile(model, backend="aot_eager", fullgraph=True), file.module.InferenceParams()
    pieces = [compiled(ids[:, :6], params), compiled(ids[:, 6:], params)]
    assert error(torch.cat(pieces, dim=1), model(ids)) < 1e-5
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    got, expected = (run(ids, attention_mask=mask)[mask.bool()] for run in (compiled, model))
    assert error(got, expected) < 1e-5


def test_a_cache_filled_in_inference_mode_goes_on_outside_of_it(file):
    model, ids = a_tiny_model(file)
    params = file.module.InferenceParams()
    with torch.inference_mode():
        model(ids[:, :10], params)
    logits = model.step(ids[:, 10], params)
    with torch.no_grad():
        assert error(logits, model(ids)[:, -1]) < 1e-5


def test_steps_of_the_encoder_leave_no_graph_in_the_cache(file):
    model, _ = a_tiny_model(file)
    params = file.module.InferenceParams()
    assert not model.backbone.step(torch.randn(2, 32), params).requires_grad
    assert not any(state.requires_grad for pair in params.key_value_memory_dict.values() for state in pair)


def test_nan_in_padded_vectors_stays_out_of_the_state(file):
    model, _ = a_tiny_model(file)
    x, mask, params = torch.randn(2, 11, 32), torch.ones(2, 11, dtype=torch.long), file.module.InferenceParams()
    mask[0, :4] = mask[1, 9:] = 0
    x[mask == 0] = math.nan
    with torch.no_grad():
        y = model.backbone(x, params, attention_mask=mask)
    assert y[mask.bool()].isfinite().all()
    assert all(state.isfinite().all() for pair in params.key_value_memory_dict.values() for state in pair)


def test_saving_keeps_the_other_weight_files_of_a_directory(file, tmp_path):
    model, _ = a_tiny_model(file)
    others = ["model_ema.safetensors", "model-epoch3.safetensors", "pytorch_model_best.bin"]
    for name in others:
        (tmp_path / name).write_text("mine")
    model.save_pretrained(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "config.json", "model.safetensors"])


def test_the_scan_counts_its_segments_without_making_them():
    for l, t, w in itertools.product((0, 1, 5, 16, 63, 64, 100), (1, 4, 7, 16, 64), (1, 2, 3, 9)):
        assert mamba._n_segments(l, t, w) == len(mamba._segments(l, t, w))


def test_training_at_changing_lengths_compiles_a_few_graphs(file):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model, _ = a_tiny_model(file)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for length in (12, 33, 64, 100, 129, 200, 300, 500, 777, 1000):
        ids = random_ids(2, length)
        assert error(compiled(ids, labels=ids)["loss"], model(ids, labels=ids)["loss"]) < 1e-5
    assert counter.frame_count <= 5


def test_the_backbone_s_checkpoint_loads_into_the_models_with_a_head(file, tmp_path):
    model, ids = a_tiny_model(file)
    model.backbone.save_pretrained(str(tmp_path / "backbone"))
    loaded = file.LM.from_pretrained(str(tmp_path / "backbone"))
    assert torch.equal(loaded(ids), model(ids))
    classifier(file).save_pretrained(str(tmp_path / "classifier"))
    stored = file.LM.from_pretrained(str(tmp_path / "classifier"))  # its head is left out
    assert set(stored.state_dict()) == set(model.state_dict())


def test_a_tensor_that_only_looks_like_a_head_s_is_an_error(file, tmp_path):
    model, _ = a_tiny_model(file)
    model.save_pretrained(str(tmp_path))
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    safetensors.torch.save_file(tensors | {"lm_head.bias": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"unexpected: lm_head\.bias"):
        file.LM.from_pretrained(str(tmp_path))


def test_a_new_classifier_is_of_the_backbone_s_type(file):
    model = classifier(file).to(torch.bfloat16)
    model.config.num_labels = 7
    model.reset_classifier()
    assert model(random_ids(2, 5)).shape == (2, 7) and model.classifier.weight.dtype == torch.bfloat16


def test_a_truncated_checkpoint_is_named(file, tmp_path):
    model, _ = a_tiny_model(file)
    model.save_pretrained(str(tmp_path))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(OSError, match=r"model\.safetensors"):
        file.LM.from_pretrained(str(tmp_path))


def test_the_command_line_ends_quietly_when_its_reader_leaves(file):
    command = f"{sys.executable} {file.name}.py ROMEO: --device cpu | head -c 3; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "ROM" and "rror" not in done.stderr and done.returncode == 141


@pytest.mark.parametrize("wrong", [["ROMEO:", "--seed", str(2**70)], [b"\xff"]], ids=["seed", "UTF-8"])
def test_a_seed_out_of_range_and_a_prompt_of_other_bytes_are_refused_in_one_line(file, wrong):
    command = [sys.executable, f"{file.name}.py", *wrong]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_step_gives_the_same_logits_without_compiling_again(file, backend):
    if backend == "inductor" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("there is no C++ compiler")
    torch._dynamo.reset()
    model, ids, params = prefilled(file)
    states = params.clone().key_value_memory_dict
    advance = torch.compile(model.advance, backend=backend, fullgraph=True)
    logits, states = advance(ids, states)
    assert error(logits, model.step(ids, params)) < 1e-6
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(20):
            ids = logits.argmax(-1)
            logits, states = advance(ids, states)
            assert error(logits, model.step(ids, params)) < 1e-5


def test_a_step_can_be_exported(file):
    class Step(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, token_ids, states):
            return self.model.advance(token_ids, states)

    model, ids, params = prefilled(file)
    program = torch.export.export(Step(model), (ids, params.key_value_memory_dict))
    got, expected = (f(ids, params.key_value_memory_dict) for f in (program.module(), model.advance))
    assert error(got[0], expected[0]) < 1e-6
    for layer, pair in expected[1].items():
        assert all(error(state, exact) < 1e-6 for state, exact in zip(got[1][layer], pair, strict=True))


@pytest.mark.skipif(torch.__version__ < (2, 7), reason="torch.export of torch 2.6 asks for one size")
def test_forward_can_be_exported_for_any_batch_and_length(file, tmp_path):
    model, sizes = tiny(file), ({0: torch.export.Dim("b"), 1: torch.export.Dim("l")},)
    with torch.no_grad():
        torch.export.save(
            torch.export.export(model, (random_ids(3, 12),), dynamic_shapes=sizes), tmp_path / "model.pt2"
        )
    program = torch.export.load(tmp_path / "model.pt2").module()
    for b, l in ((1, 1), (5, 3), (2, 130), (30, 2)):
        assert error(program(random_ids(b, l)), logits_of(model, random_ids(b, l))) < 1e-6


def test_the_convolution_is_the_same_text_in_both_files():
    texts = (Path(module.__file__).read_text() for module in (mamba, mamba2))
    one, two = (text[text.index("def causal_conv(") : text.index("Mixer(nn.Module)")] for text in texts)
    assert one.removesuffix("class Mamba") == two.removesuffix("class Mamba2")


@pytest.mark.parametrize("shape", [(1, 9001, 64), (70, 129, 64)])  # several tiles of time, of rows
def test_the_convolution_is_conv1d_however_it_is_cut_into_tiles(file, shape):
    generator = torch.Generator().manual_seed(0)
    x, state, weight, bias = (
        torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True)
        for s in (shape, (shape[0], 64, 4), (64, 1, 4), (64,))
    )
    assert len(file.module._tiles(x)) > 1
    window = torch.cat([state[..., 1:], x.mT], dim=-1)
    expected = F.silu(F.conv1d(window, weight, bias, groups=64)).mT
    y, newest = file.module.causal_conv(x, state, weight, bias)
    assert error(y, expected) < 1e-12 and torch.equal(newest, x[:, -4:].mT)
    direction = torch.randn(shape, generator=generator, dtype=torch.float64)
    inputs = (x, state, weight, bias)
    results = [torch.autograd.grad(v, inputs, direction) for v in (y, expected)]
    for got, exact in zip(*results, strict=True):
        assert error(got, exact) < 1e-12


def test_gradient_checkpointing_and_a_cache_go_together(file):
    config = dict(d_model=32, n_layer=2, vocab_size=VOCAB, **file.tiny)
    plain, saving = file.LM(file.Config(**config)), file.LM(file.Config(**config, gradient_checkpointing=True))
    saving.load_state_dict(plain.state_dict())
    ids = random_ids(2, 12)
    for model in (plain, saving):
        params = file.module.InferenceParams()
        model.train()(ids[:, :5], params)
        model(ids[:, 5:], params).square().mean().backward()
    for (name, p), q in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-5, atol=1e-8), name


def test_a_cache_of_another_number_of_layers_is_refused(file):
    small, large = (file.LM(file.Config(d_model=32, n_layer=n, vocab_size=VOCAB, **file.tiny)) for n in (1, 2))
    params = file.module.InferenceParams()
    small(random_ids(2, 4), params)
    for use in (lambda: large(random_ids(2, 4), params), lambda: large.step(torch.tensor([1, 2]), params)):
        with pytest.raises(ValueError, match="inference_params must hold states for layers 0 to 1"):
            use()


def test_autocast_leaves_the_scan_and_ssd_in_float32():
    torch.manual_seed(0)
    u, dt, A, B, C = torch.randn(2, 70, 8), torch.rand(2, 70, 8), -torch.rand(8, 4), *torch.randn(2, 2, 70, 4)
    x, steps, rate, groups = torch.randn(2, 70, 4, 8), torch.rand(2, 70, 4), -torch.rand(4), torch.randn(2, 2, 70, 1, 4)
    works = [(mamba.selective_scan, (u, dt, A, B, C)), (mamba2.ssd, (x, steps, rate, *groups))]
    for function, arguments in works:
        expected = function(*arguments)
        with torch.autocast("cpu", torch.bfloat16):
            got = function(*arguments)
        for value, exact in zip(got, expected, strict=True):
            assert value.dtype == torch.float32 and torch.equal(value, exact)


@pytest.mark.parametrize("arguments", [{"d_model": 64}, {}, {"config": mamba.MambaConfig(), "vocab_size": 9}], ids=str)
def test_the_language_model_mamba_is_not_taken_for_the_layer_of_that_name(arguments):
    with pytest.raises(TypeError, match="MambaMixer"):
        mamba.Mamba(**arguments)


def test_the_snippet_of_minimamba_0_2_runs(tmp_path):
    config = mamba.MambaConfig(d_model=64, n_layer=2, vocab_size=10000, d_state=16, d_conv=4, expand=2)
    model = mamba.Mamba(config=config).eval()
    fields = {"d_model": 64, "n_layer": 2, "vocab_size": 10000, "d_state": 16, "d_conv": 4, "expand": 2}
    older = mamba.Mamba(**fields)  # as in the README before it
    assert older.config == config
    older.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["MambaForCausalLM"]
    assert type(mamba.Mamba.from_pretrained(tmp_path)) is mamba.Mamba
    input_ids = torch.randint(0, config.vocab_size, (2, 128))
    assert model(input_ids).shape == (2, 128, 10000)
    assert model(input_ids[:, :0]).shape == (2, 0, 10000)

    class InferenceCache:
        def __init__(self):
            self.seqlen_offset = 0
            self.key_value_memory_dict = {}

    inference_params = InferenceCache()
    first = model(input_ids[:1, :1], inference_params=inference_params)
    inference_params.seqlen_offset += 1
    second = model(input_ids[:1, 1:2], inference_params=inference_params)
    assert error(torch.cat([first, second], 1), model(input_ids[:1, :2])) < 1e-5


def test_the_snippet_of_minimamba_1_0_runs():
    config = mamba.MambaLMConfig(d_model=64, n_layer=2, vocab_size=10000, d_state=16, d_conv=4, expand=2)
    model = mamba.MambaForCausalLM(config).eval()
    input_ids = torch.randint(0, 10000, (2, 20))
    settings = dict(max_new_tokens=50, temperature=0.8, top_p=0.9, use_cache=True)
    assert model.generate(input_ids[:1, :10], **settings).shape == (1, 60)
    inference_params = mamba.InferenceParams()
    model(input_ids, inference_params)
    with pytest.raises(ValueError, match="batch size"):
        model(torch.tensor([[1]]), inference_params)
    assert model(torch.tensor([[1], [2]]), inference_params).shape == (2, 1, 10000)
    assert model.get_cache_info(inference_params)["memory_mb"] > 0
    model.reset_cache(inference_params)
    assert inference_params.key_value_memory_dict == {}
    torch.manual_seed(0)
    streamed = list(model.generate_streaming(input_ids[:1], max_new_tokens=5))
    torch.manual_seed(0)
    assert streamed == model.generate(input_ids[:1], max_new_tokens=5)[0, -5:].tolist()


def test_the_snippet_of_mamba2_minimal_runs():
    model = mamba2.Mamba2(mamba2.Mamba2Config(d_model=768))
    for length in (64, 1, 37, 200):
        assert model(torch.randn(2, length, 768)).shape == (2, length, 768)
    assert mamba2.Mamba2LMHeadModel is mamba2.Mamba2ForCausalLM


def test_a_classifier_drops_out_in_training_starts_near_zero_and_answers_in_float32(file):
    torch.manual_seed(0)
    model, ids = classifier(file, dropout=0.5), random_ids(2, 5)
    assert torch.equal(model(ids), model(ids))
    assert not model.classifier.bias.any()
    assert model.classifier.weight.std().item() == pytest.approx(model.config.initializer_range, rel=0.3)
    assert not torch.equal(model.train()(ids), model(ids))
    assert model.to(torch.bfloat16)(ids).dtype == torch.float32


def test_features_continue_from_a_cache_and_take_a_mask(file):
    torch.manual_seed(0)
    features = getattr(file.module, file.LM.__name__.replace("CausalLM", "FeatureExtraction"))(tiny(file).config)
    ids, params = random_ids(2, 9), file.module.InferenceParams()
    pieces = torch.cat([features(ids[:, :4], params), features(ids[:, 4:], params)], 1)
    assert error(pieces, features(ids)) <= 5e-6
    mask = torch.ones(2, 9)
    mask[0, :3] = 0
    assert error(features(ids, attention_mask=mask)[:1, 3:], features(ids[:1, 3:])) <= 5e-6


# ----------------------------------------------------------------------------------------------------------------------
# In other people's hands: hooks, adapters, quantized weights, transformers' Trainer and its resized checkpoints
# ----------------------------------------------------------------------------------------------------------------------


def hooked_parts(model):
    block = model.backbone.layers[0]
    return {"mixer": block.mixer, "block": block, "norm": block.norm, "head": model.lm_head, "backbone": model.backbone}


@pytest.mark.parametrize("part", ["mixer", "block", "norm", "head", "backbone"])
def test_a_hook_runs_for_every_generated_token(file, part):
    model, ids, calls = tiny(file), random_ids(2, 7), []
    plain = model.generate(ids, 6, temperature=0)
    shift = torch.randn(32 if part != "head" else model.lm_head.out_features, generator=generator())

    def steer(module, inputs, output):
        calls.append(output.shape[1] if output.ndim == 3 else 1)
        return output + shift

    handle = hooked_parts(model)[part].register_forward_hook(steer)
    cached = model.generate(ids, 6, temperature=0)
    assert sum(calls) == (6 if part == "head" else 7 + 5)  # the prompt and five of the six tokens, one by one
    assert torch.equal(cached, model.generate(ids, 6, temperature=0, use_cache=False))
    assert not torch.equal(cached, plain)
    params = file.module.InferenceParams()
    steps = torch.stack([model.step(token, params) for token in ids.unbind(1)], 1)
    assert error(steps, logits_of(model, ids)) <= 5e-6
    handle.remove()
    assert torch.equal(model.generate(ids, 6, temperature=0), plain)


def test_a_replaced_forward_is_called_for_every_generated_token(file):  # as accelerate does it to offload weights
    model, ids = tiny(file), random_ids(2, 7)
    plain, mixer, calls = model.generate(ids, 6, temperature=0), model.backbone.layers[1].mixer, []
    original = mixer.forward
    mixer.forward = lambda *args: (calls.append(args[0].shape[1]), original(*args))[1]
    assert torch.equal(model.generate(ids, 6, temperature=0), plain)
    assert calls == [7, 1, 1, 1, 1, 1]


class Wrapper(torch.nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *args):
        return self.block(*args)


def test_a_wrapped_block_generates_the_same(file):
    model, ids, params = tiny(file), random_ids(2, 7), file.module.InferenceParams()
    plain, logits = model.generate(ids, 6, temperature=0), logits_of(model, ids)
    model.backbone.layers[0] = Wrapper(model.backbone.layers[0])
    assert torch.equal(model.generate(ids, 6, temperature=0), plain)
    assert error(torch.stack([model.step(token, params) for token in ids.unbind(1)], 1), logits) <= 5e-6


def test_compiled_layers_generate_in_steps(file, monkeypatch):
    model, ids, calls = tiny(file), random_ids(2, 7), []
    plain, advance = model.generate(ids, 6, temperature=0), model.advance
    for i, layer in enumerate(model.backbone.layers):
        model.backbone.layers[i] = torch.compile(layer, backend="eager")
    monkeypatch.setattr(model, "advance", lambda *args: (calls.append(1), advance(*args))[1])
    assert torch.equal(model.generate(ids, 6, temperature=0), plain)
    assert len(calls) == 5  # the compiled forward passes would be made anew for each layer


class Adapter(torch.nn.Module):
    """A layer and a correction of low rank beside it, as in LoRA."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        out_features, in_features = base.weight.shape
        self.down = torch.nn.Parameter(torch.randn(in_features, 2))
        self.up = torch.nn.Parameter(torch.randn(2, out_features))

    def forward(self, x):
        return self.base(x) + x @ self.down @ self.up


@pytest.mark.parametrize("layer", ["in_proj", "x_proj", "dt_proj", "out_proj"])
def test_an_adapter_around_a_projection_takes_part(file, layer):
    model, merged, ids = tiny(file), tiny(file), random_ids(2, 7)
    mixer = model.backbone.layers[0].mixer
    if not hasattr(mixer, layer):
        pytest.skip(f"Mamba-2 has no {layer}")
    adapter = Adapter(getattr(mixer, layer))
    setattr(mixer, layer, adapter)
    with torch.no_grad():
        getattr(merged.backbone.layers[0].mixer, layer).weight += (adapter.down @ adapter.up).T
    exact = logits_of(merged, ids)
    assert error(logits_of(model, ids), exact) <= 1e-5
    params = file.module.InferenceParams()
    assert error(torch.stack([model.step(token, params) for token in ids.unbind(1)], 1), exact) <= 1e-5
    model(ids, labels=ids)["loss"].backward()
    assert adapter.down.grad.abs().max() > 0 and adapter.up.grad.abs().max() > 0


class KnowsLinearAlone(torch.Tensor):
    """A weight that F.linear takes and other products refuse, like quantized ones."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if "mm" in function.__name__ or "matmul" in function.__name__ or "flatten" in function.__name__:
            raise NotImplementedError(function.__name__)
        result = super().__torch_function__(function, types, args, kwargs)
        return result.as_subclass(torch.Tensor) if function is F.linear else result


def test_a_weight_of_another_type_meets_nothing_but_linear(file):
    model, ids = tiny(file), random_ids(1, 7)
    plain = model.generate(ids, 5, temperature=0)
    for module in model.modules():
        if isinstance(module, file.module.Linear):
            weight = module.weight.detach().as_subclass(KnowsLinearAlone)
            module.weight = torch.nn.Parameter(weight, requires_grad=False)
    assert torch.equal(model.generate(ids, 5, temperature=0), plain)


def test_forward_mode_derivatives_raise_instead_of_being_zero(file):
    model, x = tiny(file).requires_grad_(False), torch.randn(2, 5, 32)
    for layer in (model, model.backbone.layers[0].mixer):
        with pytest.raises(NotImplementedError, match="reverse mode"):
            torch.func.jvp(layer, (x,), (x,))
    A, B, C = -torch.rand(32, 4), *torch.rand(2, 2, 5, 4)
    with pytest.raises(NotImplementedError, match="reverse mode"):
        torch.func.jacfwd(lambda dt: mamba.selective_scan(x, dt, A, B, C)[0])(x.abs())
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="reverse mode"):
        rate = torch.autograd.forward_ad.make_dual(-torch.rand(4), torch.ones(4))
        mamba2.ssd(x.unflatten(-1, (4, 8)), torch.rand(2, 5, 4), rate, *torch.rand(2, 2, 5, 1, 3))


def test_a_tied_model_is_stored_by_transformers_trainer(file, tmp_path):
    from safetensors.torch import load_file, save_file

    model, other = tiny(file), tiny(file, noise=0.2)
    assert model.lm_head.weight is model.backbone.embeddings.weight
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})  # what Trainer does
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert other.lm_head.weight is other.backbone.embeddings.weight
    ids = random_ids(2, 7)
    assert torch.equal(logits_of(other, ids), logits_of(model, ids))
    assert model.state_dict(prefix="a.").keys() == {f"a.{name}" for name in model.state_dict()}
    assert model.state_dict(keep_vars=True)["lm_head.weight"] is model.lm_head.weight
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.backbone.config.gradient_checkpointing


def test_transformers_trainer_trains_stores_and_resumes(file, tmp_path):
    pytest.importorskip("accelerate", reason="Trainer needs accelerate, which is not installed")
    model, ids = tiny(file), random_ids(8, 12)
    data = [{"input_ids": row, "labels": row} for row in ids]
    options = dict(output_dir=tmp_path, save_steps=1, use_cpu=True, report_to=[], activation_checkpointing=True)
    options |= dict(per_device_train_batch_size=4, disable_tqdm=True, save_total_limit=1)
    before = model(ids, labels=ids)["loss"].item()
    transformers.Trainer(model, transformers.TrainingArguments(**options, max_steps=2), train_dataset=data).train()
    longer = transformers.TrainingArguments(**options, max_steps=4)
    transformers.Trainer(model, longer, train_dataset=data).train(resume_from_checkpoint=True)
    assert model(ids, labels=ids)["loss"].item() < before


@pytest.mark.parametrize("rows", [80, 48], ids=["grown", "shrunk"])
def test_a_vocabulary_resized_in_transformers_is_all_there(file, rows, tmp_path):
    model = tiny(file, d_model=64, vocab_size=60)
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs.resize_token_embeddings(rows)
    theirs.save_pretrained(tmp_path)
    again, ids = file.LM.from_pretrained(tmp_path), random_ids(2, 7, vocab=48)
    assert again.config.vocab_size == again.config.padded_vocab_size == rows
    assert again.config.pad_vocab_size_multiple == model.config.pad_vocab_size_multiple
    assert error(logits_of(again, ids), their_logits(theirs, ids)) <= 2e-6


def test_a_checkpoint_stored_over_a_sharded_one_loads(file, tmp_path):
    tiny(file, d_model=64).save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    theirs.save_pretrained(tmp_path, max_shard_size="50KB")
    theirs.save_pretrained(tmp_path)
    if not (tmp_path / "model.safetensors.index.json").exists():  # this release leaves no index behind
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    ids = random_ids(2, 7)
    assert error(logits_of(file.LM.from_pretrained(tmp_path), ids), their_logits(theirs, ids)) <= 2e-6


def test_weights_in_torchs_oldest_file_format_load(file, tmp_path):
    model, ids = tiny(file, d_model=64), random_ids(2, 7)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(logits_of(file.LM.from_pretrained(tmp_path), ids), logits_of(model, ids))


@pytest.mark.parametrize("tie", [True, False])
def test_what_is_stored_is_tied_if_the_model_is(file, tie, tmp_path):
    model, ids = tiny(file, d_model=64, tie_embeddings=tie), random_ids(2, 7)
    if tie:
        model.lm_head.weight = torch.nn.Parameter(2 * model.lm_head.weight)
    else:
        model.lm_head.weight = model.backbone.embeddings.weight
    model.save_pretrained(tmp_path)
    again = file.LM.from_pretrained(tmp_path)
    assert again.config.tie_embeddings == (not tie)
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert error(their_logits(theirs, ids), logits_of(model, ids)) <= 2e-6


@pytest.mark.parametrize("settings", ["mamba", "falcon_mamba", "mamba2 expand 1, conv 2"])
@pytest.mark.parametrize("tensors", ["a head of its own", "only a head"])
def test_tensors_count_more_than_a_config_that_says_tied(settings, tensors, tmp_path):
    theirs, ids = transformers_model(settings, 0.1, tie_word_embeddings=True), random_ids(2, 9)
    theirs.save_pretrained(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    embeddings = weights["backbone.embeddings.weight"]
    if tensors == "only a head":
        weights["lm_head.weight"] = weights.pop("backbone.embeddings.weight")
    else:
        weights["lm_head.weight"] = embeddings + 0.1 * torch.randn(embeddings.shape)
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs, ours = type(theirs).from_pretrained(tmp_path), file_for(settings).LM.from_pretrained(tmp_path)
    assert error(logits_of(ours, ids), their_logits(theirs, ids)) <= 2e-6
    assert ours.config.tie_embeddings == (tensors == "only a head")
    ours.save_pretrained(tmp_path)
    assert same_weights(file_for(settings).LM.from_pretrained(tmp_path), ours)
    assert error(their_logits(type(theirs).from_pretrained(tmp_path), ids), logits_of(ours, ids)) <= 2e-6
    assert file_for(settings).LM.from_pretrained(tmp_path, device="meta").lm_head.weight.is_meta


def test_transformers_reads_whole_numbers_of_a_config(file, tmp_path):
    whole = dict(dt_min=1, dt_max=2, dt_init_floor=1, norm_epsilon=1, initializer_range=1)
    whole |= dict(dt_limit=(0, 3)) if file.name == "mamba2" else dict(dt_scale=1, mixer_rms_eps=1)
    model, ids = tiny(file, d_model=64, **whole), random_ids(2, 7)
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert error(their_logits(theirs, ids), logits_of(model, ids)) <= 2e-6


def test_tokens_that_transformers_took_from_the_padding_are_generated(file, tmp_path):
    model = with_fixed_logits(file, torch.zeros(61), pad_vocab_size_multiple=8)  # 64 rows
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs.resize_token_embeddings(64)  # nothing to do: the three rows are there
    theirs.save_pretrained(tmp_path)
    logits = logits_of(model, torch.zeros(1, 1, dtype=torch.long))[0, -1]
    assert logits.argmax() >= 61
    assert file.LM.from_pretrained(tmp_path).generate(torch.zeros(1, 1, dtype=torch.long), 1, 0)[0, 1] >= 61


@pytest.mark.parametrize("key", ["norm.weight", "in_proj.weight", "A_log", "lm_head.weight"])
def test_a_checkpoint_of_several_types_takes_that_of_its_config(file, key, tmp_path):
    theirs, ids = transformers_model(file.name, 0.1, tie_word_embeddings=False).bfloat16(), random_ids(2, 9)
    theirs.save_pretrained(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    some = {name: tensor.float() if name.endswith(key) else tensor for name, tensor in weights.items()}
    safetensors.torch.save_file(some, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if key == "in_proj.weight":  # the name that older releases write
        edit_json(tmp_path / "config.json", remove=["dtype"], torch_dtype="bfloat16")
    model = file.LM.from_pretrained(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and same_weights(model, theirs)
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.data = parameter.data.float() + 1e-4  # bfloat16 has no such number
    model.save_pretrained(tmp_path)
    assert same_weights(file.LM.from_pretrained(tmp_path), model)
    assert logits_of(model, ids).isfinite().all()


def test_compiled_layers_are_stored_under_their_own_names(file, tmp_path):
    model, ids = tiny(file), random_ids(2, 7)
    expected = logits_of(model, ids)
    model.backbone.layers[0] = torch.compile(model.backbone.layers[0], backend="eager")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(file.LM.from_pretrained(tmp_path), ids), expected)


def test_layers_wrapped_for_activation_checkpointing_are_stored_under_their_own_names(file, tmp_path):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    model, ids = tiny(file), random_ids(2, 7)
    expected = logits_of(model, ids)
    apply_activation_checkpointing(model, check_fn=lambda part: hasattr(part, "mixer"))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(file.LM.from_pretrained(tmp_path), ids), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_under_selective_checkpointing_are_the_same(file, dtype):
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    keep_products = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    model, x = tiny(file).to(dtype).backbone, torch.randn(2, 20, 32)

    def gradients(selective):
        y = x
        for layer in model.layers:
            y = checkpoint(layer, y, use_reentrant=False, context_fn=keep_products) if selective else layer(y)
        return torch.autograd.grad(y.square().sum(), list(model.layers.parameters()))

    assert all(torch.equal(*pair) for pair in zip(gradients(True), gradients(False), strict=True))


class Shell(torch.nn.Module):
    """A module around another one, whose weight it shows as its own: what adapters do."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x)


@pytest.mark.parametrize("part", ["lm_head", "embeddings"])
def test_adapters_around_the_embedding_and_its_tied_head(file, part):
    model, ids = tiny(file), random_ids(2, 7)
    before = model.state_dict()
    owner = model if part == "lm_head" else model.backbone
    setattr(owner, part, Shell(getattr(owner, part)))
    assert torch.equal(model.generate(ids, 3, 0), tiny(file).generate(ids, 3, 0))
    state = {name.replace("base_layer.", ""): value for name, value in model.state_dict().items()}
    assert state.keys() == before.keys()
    model.load_state_dict(model.state_dict(), assign=True)
    model.to(torch.float64)
    assert f"{part}.base_layer.weight" in {name.removeprefix("backbone.") for name in model.state_dict()}


def test_an_embedding_may_gather_its_weight_when_it_is_called(file):  # as DeepSpeed's ZeRO-3 does
    model, ids = tiny(file, tie_embeddings=False), random_ids(2, 7)
    expected, weight = logits_of(model, ids), model.backbone.embeddings.weight
    whole = weight.data
    weight.data = torch.empty(0)
    model.backbone.embeddings.register_forward_pre_hook(lambda *_: setattr(weight, "data", whole))
    assert torch.equal(logits_of(model, ids), expected)
    model.lm_head = None
    model.half()


@pytest.mark.parametrize("move", ["assign", "assign inside", "assign the head", "to_empty", "overwrite"])
def test_a_tied_model_stays_tied(file, move):
    model, other, ids = tiny(file), tiny(file, noise=0.3), random_ids(2, 7)
    if move == "to_empty":
        with torch.device("meta"):
            model = file.LM(other.config)
        model.to_empty(device="cpu").load_state_dict(other.state_dict())
    elif move == "assign":
        model.load_state_dict(other.state_dict(), assign=True)
    elif move == "assign inside":
        whole = torch.nn.ModuleDict({"lm": model})
        whole.load_state_dict(torch.nn.ModuleDict({"lm": other}).state_dict(), assign=True)
    elif move == "assign the head":
        model.load_state_dict(other.state_dict())
        with torch.no_grad():
            model.lm_head.weight.zero_()
        model.load_state_dict({"lm_head.weight": other.lm_head.weight.detach()}, strict=False, assign=True)
    else:
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            model = tiny(file, noise=0.3).double().float()
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert model.lm_head.weight is model.backbone.embeddings.weight
    assert torch.equal(logits_of(model, ids), logits_of(other, ids))


@pytest.mark.parametrize("head", ["LM", "Classifier", "Encoder"])
def test_what_should_not_decay_is_known_by_name(file, head):
    model = tiny(file)
    if head == "Classifier":
        model = classifier(file)
    elif head == "Encoder":
        model = model.backbone
    marked = {name for name, p in model.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert model.no_weight_decay() == marked and len(marked) > 6
    assert copy.deepcopy(model).no_weight_decay() == marked


def test_a_file_pasted_into_a_notebook_runs(file, monkeypatch):
    source = Path(file.module.__file__).read_text()
    pasted = ModuleType(f"pasted_{file.name}")  # a module without __file__
    monkeypatch.setitem(sys.modules, pasted.__name__, pasted)
    exec(source, vars(pasted))
    assert pasted.InferenceParams().seqlen_offset == 0


def test_a_compiled_tied_head_is_stored_tied(file, tmp_path):
    model, ids = tiny(file), random_ids(2, 7)
    expected = logits_of(model, ids)
    model.lm_head = torch.compile(model.lm_head, backend="eager")
    state = model.state_dict()
    safetensors.torch.save_file(state, tmp_path / "state.safetensors")  # nothing twice
    for assign in (False, True):
        model.load_state_dict(state, assign=assign)
    model.lm_head.weight = model.backbone.embeddings.weight
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(file.LM.from_pretrained(tmp_path), ids), expected)
    assert file.LM.from_pretrained(tmp_path).config.tie_embeddings


def parametrize_the_head(model):
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)
    return "lm_head.weight"


def adapt_the_head(model):
    model.lm_head = Shell(model.lm_head)
    return "lm_head.weight"


def share_a_weight(model):
    first, second = (layer.mixer for layer in model.backbone.layers)
    second.in_proj.weight = first.in_proj.weight
    return "backbone.layers.1.mixer.in_proj.weight"


def parametrize_a_weight(model):
    torch.nn.utils.parametrizations.weight_norm(model.backbone.layers[0].mixer.out_proj)
    return "backbone.layers.0.mixer.out_proj.weight"


def drop_a_layer(model):
    del model.backbone.layers[1]
    return "backbone.layers.1.mixer.A_log"


@pytest.mark.parametrize(
    "change", [share_a_weight, parametrize_a_weight, parametrize_the_head, adapt_the_head, drop_a_layer]
)
@pytest.mark.parametrize("tie", [True, False])
def test_a_model_that_nothing_could_load_is_not_stored(file, change, tie, tmp_path):
    model = tiny(file, tie_embeddings=tie)
    model.save_pretrained(tmp_path)
    before = listing(tmp_path)
    missing = change(model)
    with pytest.raises(ValueError, match=re.escape(missing)):
        model.save_pretrained(tmp_path)
    assert listing(tmp_path) == before


def test_a_subclass_with_arguments_and_weights_of_its_own_is_stored(file, tmp_path):
    class Larger(file.LM):
        def __init__(self, config, outputs):
            super().__init__(config)
            self.other_head = torch.nn.Linear(config.d_model, outputs)

    Larger(tiny(file).config, outputs=3).save_pretrained(tmp_path)
    assert "other_head.weight" in safetensors.torch.load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize("field, value", [("pad_vocab_size_multiple", None), ("hidden_act", "swish")])
def test_fields_mean_what_they_mean_in_transformers(file, field, value, tmp_path):
    theirs, ids = transformers_model(file.name, 0.1), random_ids(2, 7)
    theirs.save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", **{field: value})
    theirs = type(theirs).from_pretrained(tmp_path)
    assert error(logits_of(file.LM.from_pretrained(tmp_path), ids), their_logits(theirs, ids)) <= 2e-6


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_of_padded_rows_is_that_of_the_rows_alone(file, side, bias):
    model = tiny(file, bias=bias)
    ids, mask, rows = padded_batch([12, 5, 9], side)
    loss = model(ids, labels=ids, attention_mask=mask)["loss"]
    alone = [(model(row, labels=row)["loss"], row.shape[1] - 1) for row in rows]
    assert error(loss, sum(mean * n for mean, n in alone) / sum(n for _, n in alone)) <= 1e-6


def test_a_mean_of_many_large_float16_vectors_is_finite(file):
    torch.manual_seed(0)
    model, ids = classifier(file, pooling_strategy="mean"), torch.ones(1, 3000, dtype=torch.long)
    with torch.no_grad():
        model.backbone.norm_f.weight.fill_(20)
    exact = logits_of(model, ids)
    assert error(logits_of(model.half(), ids), exact) <= 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_under_autocast_keeps_the_state_in_float32(file, dtype):
    model, x = tiny(file), torch.randn(2, 32)
    mixer = model.backbone.layers[0].mixer
    with torch.no_grad(), torch.autocast("cpu", dtype):
        conv_state, ssm_state = mixer.new_states(2)
        ssm_state += 1e5  # float16 ends at 65504
        params = SimpleNamespace(key_value_memory_dict={0: (conv_state, ssm_state)})
        stepped = mixer.step(x, conv_state, ssm_state.clone())[0]
        whole = mixer(x[:, None], params)[:, 0]
    assert error(stepped.float(), whole.float()) <= 0.01


@pytest.mark.parametrize("part", ["mixer", "block"])
def test_a_pre_hook_sees_every_generated_token(file, part):
    model, lengths = tiny(file), []
    hooked_parts(model)[part].register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    model.generate(random_ids(2, 7), 4, temperature=0)
    assert lengths == [7, 1, 1, 1]


@pytest.mark.parametrize("part", ["norm", "mixer.in_proj", "mixer.out_proj"])
def test_hooks_see_a_generated_token_as_a_sequence_of_one(file, part):
    model, shapes = tiny(file), []
    hooked = model.backbone.layers[0].get_submodule(part)
    hooked.register_forward_hook(lambda _, inputs, output: shapes.append(tuple(output.shape[:-1])))
    model.generate(random_ids(2, 7), 3, temperature=0)
    assert shapes == [(2, 7), (2, 1), (2, 1)]


def test_forward_mode_is_refused_for_every_argument(file):
    x, state, weight = torch.randn(2, 5, 6), torch.zeros(2, 6, 4), torch.randn(6, 1, 4)
    function, inputs = mamba.selective_scan, scan_inputs(2, 5, 3, 4)
    arguments = dict(initial_state=inputs[-1], D=torch.ones(3).double(), z=inputs[0])
    if file.name == "mamba2":
        function, inputs = mamba2.ssd, ssd_inputs(2, 5, 4, 3, 2, 5)
        arguments = dict(initial_state=inputs[-1], D=torch.ones(4).double())
    cases = [(lambda v: file.module.causal_conv(x, state, v, None)[0], weight)]
    for name, value in arguments.items():
        cases.append((lambda v, name=name: function(*inputs[:5], **{name: v})[0], value))
    for case, value in cases:
        with pytest.raises(NotImplementedError, match="reverse mode"):
            torch.func.jvp(case, (value,), (value,))


# ----------------------------------------------------------------------------------------------------------------------
# Errors: one clear one each, naming the argument
# ----------------------------------------------------------------------------------------------------------------------

WRONG_CALLS = {
    "ids of one dimension": ("input_ids", lambda m, p: m(torch.tensor([1, 2, 3]))),
    "ids of four dimensions": ("input_ids", lambda m, p: m(torch.zeros(1, 2, 3, 4, dtype=torch.long))),
    "fractional ids": ("input_ids", lambda m, p: m(torch.rand(2, 3))),
    "boolean ids": ("input_ids", lambda m, p: m(torch.ones(2, 3, dtype=torch.bool))),
    "embeddings of another width": ("input_ids", lambda m, p: m(torch.randn(2, 3, 31))),
    "integer embeddings": ("input_ids", lambda m, p: m(torch.ones(2, 3, 32, dtype=torch.long))),
    "an id too large": ("5000", lambda m, p: m(torch.tensor([[1, 5000]]))),
    "the first id too large": ("104|112", lambda m, p: m(torch.tensor([[1, m.config.padded_vocab_size]]))),
    "a negative id": ("-1", lambda m, p: m(torch.tensor([[1, -1]]))),
    "labels of another shape": ("labels", lambda m, p: m(random_ids(2, 5), labels=random_ids(2, 4))),
    "labels out of range": ("labels", lambda m, p: m(random_ids(2, 5), labels=random_ids(2, 5) + 5000)),
    "fractional labels": ("labels", lambda m, p: m(random_ids(2, 5), labels=torch.rand(2, 5))),
    "a mask of another shape": ("attention_mask", lambda m, p: m(random_ids(2, 5), attention_mask=torch.ones(2, 4))),
    "a mask of twos": ("attention_mask", lambda m, p: m(random_ids(2, 5), attention_mask=torch.full((2, 5), 2))),
    "labels and a count": ("labels", lambda m, p: m(random_ids(2, 5), labels=random_ids(2, 5), num_last_tokens=2)),
    "a negative count": ("num_last_tokens", lambda m, p: m(random_ids(2, 5), num_last_tokens=-1)),
    "a cache of another batch size": ("batch", lambda m, p: m(random_ids(3, 1), p)),
    "a step with a cache of another batch size": ("batch", lambda m, p: m.step(random_ids(3, 1)[:, 0], p)),
    "a step of two dimensions": ("token_ids", lambda m, p: m.step(random_ids(2, 1), p)),
    "a step of fractional ids": ("token_ids", lambda m, p: m.step(torch.rand(2), p)),
    "a step with an id too large": ("5000", lambda m, p: m.step(torch.tensor([1, 5000]), p)),
    "a negative number of tokens": ("max_new_tokens", lambda m, p: m.generate(random_ids(2, 5), max_new_tokens=-1)),
    "a negative temperature": ("temperature", lambda m, p: m.generate(random_ids(2, 5), temperature=-0.5)),
    "temperature nan": ("temperature", lambda m, p: m.generate(random_ids(2, 5), temperature=math.nan)),
    "temperature infinity": ("temperature", lambda m, p: m.generate(random_ids(2, 5), temperature=math.inf)),
    "half a token": ("top_k", lambda m, p: m.generate(random_ids(2, 5), top_k=2.5)),
    "a negative top_k": ("top_k", lambda m, p: m.generate(random_ids(2, 5), top_k=-1)),
    "top_p over one": ("top_p", lambda m, p: m.generate(random_ids(2, 5), top_p=1.5)),
    "top_p zero": ("top_p", lambda m, p: m.generate(random_ids(2, 5), top_p=0.0)),
    "a word that ends": ("eos_token_id", lambda m, p: m.generate(random_ids(2, 5), eos_token_id="</s>")),
    "half an id that ends": ("eos_token_id", lambda m, p: m.generate(random_ids(2, 5), eos_token_id=[1, 2.5])),
    "an empty prompt": ("input_ids", lambda m, p: m.generate(random_ids(2, 0))),
    "a prompt of embeddings": ("input_ids", lambda m, p: m.generate(torch.randn(2, 3, 32))),
    "a stream with top_p over one": ("top_p", lambda m, p: next(m.stream(random_ids(1, 5), top_p=1.5))),
    "a row of padding": (
        "attention_mask must leave",
        lambda m, p: m.generate(random_ids(2, 5), attention_mask=torch.tensor([[1] * 5, [0] * 5])),
    ),
    "a mask for another prompt": (
        "attention_mask",
        lambda m, p: m.generate(random_ids(2, 5), attention_mask=torch.ones(2, 4)),
    ),
}


@pytest.mark.parametrize("message, call", WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_a_wrong_argument_is_named(file, message, call):
    model, params = tiny(file), file.module.InferenceParams()
    logits_of(model, random_ids(2, 3), params)
    with pytest.raises((ValueError, TypeError, IndexError), match=message):
        call(model, params)


@pytest.mark.parametrize("name", ["x", "B"])
def test_ssd_names_what_lacks_a_dimension(name):
    inputs = dict(zip(("x", "dt", "A", "B", "C"), ssd_inputs(1, 6, 4, 8, 2, 3)[:5], strict=True))
    inputs[name] = inputs[name][:, :, 0]
    with pytest.raises(ValueError, match=rf"^{name} must have shape \(b, l, "):
        mamba2.ssd(**inputs)


def test_a_model_on_the_meta_device_gives_shapes(file):
    with torch.device("meta"):
        model, ids = file.LM(file.Config(d_model=64, n_layer=1, vocab_size=32)), torch.zeros(2, 5).long()
    assert model(ids, labels=ids)["logits"].shape == (2, 5, 32)


def test_a_cache_of_another_model_is_refused(file):
    params = file.module.InferenceParams()
    logits_of(tiny(file), random_ids(2, 3), params)
    for other in (tiny(file, d_model=64), tiny(file, d_state=4), tiny(file, d_conv=3)):
        before = snapshot(params)
        with pytest.raises(ValueError, match="inference_params"):
            other(random_ids(2, 3), params)
        assert_same_states(states(params), before, 0)


def test_ids_may_be_int32(file):
    model, ids = tiny(file), random_ids(2, 5)
    assert torch.equal(logits_of(model, ids.int()), logits_of(model, ids))


def test_an_input_of_another_width_is_refused_by_layer_and_encoder(file):
    config = tiny(file).config
    for module in (file.Mixer(config), file.Encoder(config)):
        with pytest.raises((ValueError, RuntimeError), match="32"):
            module(torch.randn(2, 3, 31))


def run(*command, cwd=ROOT, stdin="", **environment):
    return subprocess.run(
        [sys.executable, *map(str, command)],
        check=False,
        cwd=cwd,
        input=stdin,
        env=os.environ
        | {"PYTHONPATH": "", "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
        | {k: str(v) for k, v in environment.items()},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=600,
    )


@pytest.mark.parametrize(
    "no_network",
    ["HF_HUB_OFFLINE", pytest.param("HF_ENDPOINT", marks=pytest.mark.slow)],  # huggingface_hub retries
)
def test_without_network_a_hub_name_gives_one_clear_error(file, no_network, tmp_path):
    value = "1" if no_network == "HF_HUB_OFFLINE" else "http://127.0.0.1:9"
    code = f"""
import {file.name}
try:
    {file.name}.{file.LM.__name__}.from_pretrained("state-spaces/no-such-model")
except (OSError, ValueError) as error:
    print(type(error).__name__, error)
"""
    done = run("-c", code, HF_HOME=tmp_path, **{no_network: value})
    assert done.returncode == 0, done.stderr
    assert "state-spaces/no-such-model" in done.stdout
    assert re.search("network|offline|connect|reach|download", done.stdout)


# ----------------------------------------------------------------------------------------------------------------------
# The two files as files
# ----------------------------------------------------------------------------------------------------------------------


def sections(file):
    """The numbered parts of a file: number -> source, taken from its banners."""
    source = (ROOT / f"{file.name}.py").read_text(encoding="utf-8")
    parts = re.split(r"(?m)^# (\d)\. ", source)
    return {int(number): text for number, text in zip(parts[1::2], parts[2::2], strict=True)}


def as_if_mamba(source):
    """The lines of a source with Mamba2 replaced by Mamba; the aliases, which end part 5, are left out."""
    source = source.split("# The names of the projects")[0]
    return re.sub(r"Mamba-?2", "Mamba", source).replace("mamba2", "mamba").splitlines()


@pytest.mark.parametrize("part", [5, 6, 7, 8])
def test_the_shared_parts_are_the_same_in_both_files(part):
    one, two = (as_if_mamba(sections(FILES[name])[part]) for name in ("mamba", "mamba2"))
    assert one == two


def test_the_cache_is_the_same_in_both_files():
    one, two = (as_if_mamba(inspect.getsource(FILES[name].module.InferenceParams)) for name in ("mamba", "mamba2"))
    assert one == two


def test_a_file_alone_in_a_directory_imports_without_transformers(file, tmp_path):
    shutil.copy(ROOT / f"{file.name}.py", tmp_path)
    code = f"""
import sys, {file.name}, torch
model = {file.name}.{file.LM.__name__}({file.name}.{file.Config.__name__}(d_model=64, n_layer=1, vocab_size=50))
print(model(torch.zeros(1, 3, dtype=torch.long)).shape[:2], len(model.generate(torch.zeros(1, 3, dtype=torch.long))[0]))
print([name for name in sys.modules if name.split(".")[0] in ("transformers", "huggingface_hub", "mamba_ssm")])
"""
    done = run("-c", code, cwd=tmp_path)
    assert done.stdout.splitlines() == ["torch.Size([1, 3]) 53", "[]"], done.stderr
    assert done.stderr == ""


def test_the_files_import_only_what_they_may(file):
    source = (ROOT / f"{file.name}.py").read_text(encoding="utf-8")
    at_top = set(re.findall(r"(?m)^(?:import|from) (\w+)", source))
    anywhere = set(re.findall(r"(?m)^\s*(?:import|from) (\w+)", source))
    assert at_top <= {"torch", "einops"} | set(sys.stdlib_module_names)
    for_checkpoints = {"transformers", "huggingface_hub", "safetensors", "tokenizers"}
    assert anywhere - at_top <= for_checkpoints | set(sys.stdlib_module_names)


def byte_tokenizer():
    """One token per byte, in the format that AutoTokenizer loads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def alphabet_models(tmp_path_factory):
    """Checkpoints that go on with the alphabet after any letter, with a tokenizer, by the name of the file."""
    directories, tokenizer = {}, byte_tokenizer()
    a, *rest = (tokenizer.convert_tokens_to_ids(letter) for letter in "abcdefghijklmnopqrstuvwxyz")
    for name, file in FILES.items():
        model = tiny(file, d_model=64, n_layer=1, vocab_size=256, tie_embeddings=False)
        with torch.no_grad():
            model.backbone.layers[0].mixer.out_proj.weight.zero_()
            model.backbone.norm_f.weight.fill_(1.0)
            embedding = F.normalize(torch.randn(256, 64, generator=generator()))
            model.backbone.embeddings.weight.copy_(embedding)
            for letter, following in zip([a, *rest], [*rest, a], strict=True):
                model.lm_head.weight[following] = 100 * embedding[letter]
        directories[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(directories[name])
        tokenizer.save_pretrained(directories[name])
    return directories


def run_command_line(file, *arguments, **kwargs):
    return run(f"{file.name}.py", *arguments, "--device", "cpu", HF_HUB_OFFLINE=1, **kwargs)


def test_the_command_line_continues_its_argument(file, alphabet_models):
    options = ["--model", alphabet_models[file.name], "--max-new-tokens", 5, "--temperature", 0]
    done = run_command_line(file, "x: abc", *options)
    assert done.returncode == 0, done.stderr
    assert "abcdefgh" in done.stdout and "abcdefghi" not in done.stdout
    summary = done.stderr.strip().splitlines()[-1]
    assert "cpu" in summary and "tokens/s" in summary


def test_the_command_line_continues_standard_input(file, alphabet_models):
    options = ["--model", alphabet_models[file.name], "--max-new-tokens", 4, "--temperature", 1.0, "--top-k", 1]
    done = run_command_line(file, *options, "--top-p", 0.9, "--seed", 1, "--dtype", "bfloat16", stdin="wx")
    assert done.returncode == 0, done.stderr
    assert "wxyzab" in done.stdout.replace("\n", "") and "wxyzabc" not in done.stdout


@pytest.fixture
def streamed(file, monkeypatch, capsys):
    """streamed(*arguments): what the command line hands to `stream`, by name, with what it printed."""

    def run_main(*arguments):
        given, stream = {}, file.LM.stream

        def watched(self, *args, **kwargs):
            given.update(inspect.signature(stream).bind(self, *args, **kwargs).arguments)
            return stream(self, *args, **kwargs)

        monkeypatch.setattr(file.LM, "stream", watched)
        assert file.module.main([*map(str, arguments), "--device", "cpu"]) == 0
        return given | dict(zip(("out", "err"), capsys.readouterr(), strict=True))

    return run_main


def test_the_options_of_the_command_line_arrive(file, streamed, alphabet_models):
    options = {"--max-new-tokens": 4, "--temperature": 0.5, "--top-k": 7, "--top-p": 0.6, "--seed": 3}
    options |= {"--dtype": "bfloat16", "--model": alphabet_models[file.name]}
    got = streamed("wx", *itertools.chain(*options.items()))
    names = ("max_new_tokens", "temperature", "top_k", "top_p")
    assert [got[name] for name in names] == [4, 0.5, 7, 0.6]
    assert got["generator"].initial_seed() == 3 and got["self"].lm_head.weight.dtype == torch.bfloat16
    for part in ("prompt 2 tokens", "generated 4 tokens", "bfloat16"):
        assert part in got["err"]


def test_the_command_line_runs_in_float32_on_a_cpu(file, streamed):
    assert streamed("ROMEO:", "--max-new-tokens", 2)["self"].lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize("place", ["config.json", "generation_config.json"])
def test_the_command_line_stops_where_the_checkpoint_says(file, place, streamed, alphabet_models, tmp_path):
    model = shutil.copytree(alphabet_models[file.name], tmp_path / "model")
    (model / "generation_config.json").write_text("{}")
    edit_json(model / place, eos_token_id=[0, byte_tokenizer().convert_tokens_to_ids("z")])
    got = streamed("wx", "--model", model, "--max-new-tokens", 9, "--temperature", 0)
    assert got["out"].strip() == "wxyz" and "generated 2 tokens" in got["err"]


def test_a_device_that_is_not_there_is_named(file, capsys):
    missing = next((name for name in ("cuda", "mps") if not getattr(torch, name).is_available()), None)
    with pytest.raises(SystemExit) as status:
        file.module.main(["a", "--device", missing])
    assert status.value.code == 2 and f"--device {missing}" in capsys.readouterr().err


def test_letters_of_several_tokens_are_printed_whole(file, monkeypatch, capsys, alphabet_models):
    text = "é東🐍"
    monkeypatch.setattr(file.LM, "stream", lambda *_, **__: iter(byte_tokenizer()(text).input_ids))
    file.module.main(["a", "--model", str(alphabet_models[file.name]), "--device", "cpu"])
    assert capsys.readouterr().out == f"a{text}\n"


def test_ctrl_c_ends_a_command_line_that_waits_for_its_prompt(file):
    default = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    code = f"import {file.name}, sys; print('ready', flush=True); sys.exit({file.name}.main([]))"
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, preexec_fn=default, **pipes) as process:
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
        assert process.returncode == 130 and process.stderr.read() == b""


def test_ctrl_c_ends_the_command_line_cleanly(file, alphabet_models):
    options = ["--model", alphabet_models[file.name], "--max-new-tokens", 10**9, "--device", "cpu"]
    command = [sys.executable, f"{file.name}.py", "abc", *map(str, options)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    default = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # tests in the background ignore Ctrl-C
    with subprocess.Popen(command, cwd=ROOT, preexec_fn=default, **pipes) as process:
        assert process.stdout.read(10)  # text streams out long before the end
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode in (0, 130)
    assert b"Traceback" not in errors and b"tokens/s" in errors


BAD_COMMANDS = {
    "unknown model": ["--model", "no/such-model"],
    "directory without config": ["--model", "."],
    "wrong temperature": ["--model", "{model}", "--temperature", "-1"],
    "wrong top_p": ["--model", "{model}", "--top-p", "2"],
}


@pytest.mark.parametrize("options", BAD_COMMANDS.values(), ids=BAD_COMMANDS)
def test_a_bad_command_line_ends_with_status_2_and_one_line(file, options, alphabet_models, tmp_path):
    options = [str(tmp_path) if o == "." else o.format(model=alphabet_models[file.name]) for o in options]
    done = run_command_line(file, "ROMEO:", *options)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("content", [None, "{", "text"], ids=["none", "cut", "text"])
@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_a_checkpoint_with_a_missing_or_broken_file_is_named(file, name, content, tmp_path, monkeypatch, capsys):
    tiny(file, d_model=64, vocab_size=256).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_text(content)
    assert file.module.main(["a", "--model", str(tmp_path), "--device", "cpu"]) == 2
    out, (line,) = (text.splitlines() for text in capsys.readouterr())
    assert out == [] and str(tmp_path) in line and name in line


def test_a_closed_standard_input_is_no_prompt(file, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(SystemExit) as stopped:
        file.module.main([])
    assert stopped.value.code == 2 and "no prompt" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# The embedded checkpoints
# ----------------------------------------------------------------------------------------------------------------------


def embedded(file):
    return ROOT / "pretrained" / f"shakespeare-{file.name}"


def test_the_embedded_checkpoint_is_small_and_stored_in_bfloat16(file):
    model = file.LM.from_pretrained(embedded(file))
    assert sum(p.numel() for p in model.parameters()) <= 3_000_000
    assert sum(path.stat().st_size for path in embedded(file).rglob("*")) <= 6_000_000
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert (embedded(file) / "README.md").exists()


def test_the_embedded_tokenizer_keeps_any_text(file):
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded(file))
    for text in ("ROMEO:\nBut, soft!", "naïve café, 東京 🐍\t\x00\n"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
        assert len(tokenizer(text).input_ids) == len(text.encode())


def test_the_embedded_model_knows_shakespeare(file):
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded(file))
    model = file.LM.from_pretrained(embedded(file), dtype=torch.float32)
    verse = "JULIET:\nO, swear not by the moon, the inconstant moon,\nThat monthly changes in her circled orb,\n"
    ids = torch.tensor([tokenizer(verse).input_ids])
    with torch.no_grad():
        assert model(ids, labels=ids)["loss"] < 2  # nats per character; log(256) = 5.5 untrained


def test_the_command_line_prints_shakespeare_at_once(file):
    done = run_command_line(file, "ROMEO:", "--max-new-tokens", 60, "--seed", 0)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ROMEO:") and len(done.stdout) > 60


# ----------------------------------------------------------------------------------------------------------------------
# Published weights (pytest -m hub)
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.hub
def test_mamba_130m_gives_the_published_logits_and_text():
    name = "state-spaces/mamba-130m-hf"
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    model = mamba.MambaForCausalLM.from_pretrained(name, dtype=torch.float32)
    ids = tokenizer("Hey how are you doing?", return_tensors="pt").input_ids
    published = torch.tensor([-55.6909, -69.7903, -49.8981, -51.7581, -57.6544, -57.9368, -56.9591, -57.9033])
    assert torch.allclose(logits_of(model, ids)[0, 0, :8], published, atol=1e-3)
    text = tokenizer.decode(model.generate(ids, max_new_tokens=10, temperature=0)[0])
    assert text == "Hey how are you doing?\n\nI'm so glad you're here."


# ----------------------------------------------------------------------------------------------------------------------
# Speed and memory (pytest -m slow), on two otherwise idle cores
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def seconds(repeats, **works):
    """Median seconds of each work, one after another in turn, after a turn that does not count."""
    times = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if turn:
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(t) for name, t in times.items()}
    print({name: f"{1000 * t:.1f} ms" for name, t in medians.items()})
    return medians


def limit(file, x):
    """The matrix products of one layer alone, which no implementation can do without."""
    e = 2 * x.shape[-1]
    sizes = [(48 + 32, e), (e, 48)] if file.name == "mamba" else []
    in_proj = 2 * e if file.name == "mamba" else 2 * e + 2 * 128 + e // 64
    weights = [torch.randn(in_proj, x.shape[-1]), *(torch.randn(s) for s in sizes), torch.randn(x.shape[-1], e)]
    inputs = [torch.randn(*x.shape[:-1], weight.shape[1]) for weight in weights]

    def products():
        for value, weight in zip(inputs, weights, strict=True):
            F.linear(value, weight)

    return products


def their_mixer(file):
    if file.name == "mamba":
        from transformers.models.mamba.modeling_mamba import MambaMixer

        return MambaMixer(transformers.MambaConfig(hidden_size=768), layer_idx=0).eval()
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = dict(hidden_size=768, num_heads=24, head_dim=64, n_groups=1, state_size=128, chunk_size=64)
    return Mamba2Mixer(transformers.Mamba2Config(**config), layer_idx=0).eval()


def forward_and_backward(layer, x):
    def work():
        x.grad = None
        layer(x).square().mean().backward()

    return work


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 48, 80])
@pytest.mark.parametrize("amd, amx", [(True, False), (False, True), (False, False)])
def test_linear_is_that_of_torch_for_few_vectors_and_many(file, rows, bias, dtype, amd, amx, monkeypatch):
    monkeypatch.setattr(file.module, "IS_AMD", amd)
    monkeypatch.setattr(file.module, "IS_AMD_AVX512", amd)
    monkeypatch.setattr(file.module, "HAS_AMX", amx)
    torch.manual_seed(0)
    layer = file.module.Linear(20, rows, bias=bias).to(dtype)
    for shape in [(20,), (1, 20), (1, 1, 20), (2, 20), (3, 5, 20), (16, 20), (17, 20), (0, 20), (2, 0, 20)]:
        x = torch.randn(shape).to(dtype)
        got, parameters = layer(x), [p.double() for p in layer.parameters()]
        wanted, size = F.linear(x.double(), *parameters), F.linear(x.double().abs(), *map(torch.abs, parameters))
        assert got.shape == wanted.shape and got.dtype == dtype
        assert ((got - wanted).abs() <= 2 * torch.finfo(dtype).eps * size).all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inputs, shape", [(300, (512,)), (300, (2, 300)), (1000, (3, 1, 200)), (129, (1100,))])
def test_linear_is_that_of_torch_as_a_convolution(file, inputs, shape, bias, monkeypatch):
    monkeypatch.setattr(file.module, "IS_AMD_AVX512", True)
    torch.manual_seed(0)
    layer, calls = file.module.Linear(inputs, 256, bias=bias), []
    monkeypatch.setattr(F, "conv2d", lambda *given, conv=F.conv2d: calls.append(1) or conv(*given))
    x = torch.randn(*shape[:-1], shape[-1], 2 * inputs)[..., ::2].requires_grad_()  # with gaps
    dy = torch.randn(*shape, 256)
    got = layer(x)
    assert len(calls) == -(-inputs // 256) and got.is_contiguous()
    exact, x_64 = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    wanted = F.linear(x_64, *exact.parameters())
    assert got.shape == wanted.shape and error(got, wanted) < 1e-6
    got = torch.autograd.grad(got, [x, *layer.parameters()], dy)
    wanted = torch.autograd.grad(wanted, [x_64, *exact.parameters()], dy.double())
    for one, other in zip(got, wanted, strict=True):
        assert one.shape == other.shape and error(one, other) < 2e-6
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    x = x.detach().double()
    assert torch.equal(exact(x), F.linear(x, *exact.parameters()))
    layer, x = layer.bfloat16(), x.bfloat16()
    assert torch.equal(layer(x), F.linear(x, *layer.parameters()))


@torch.no_grad()
@pytest.mark.skipif(not mamba.IS_AMD_AVX512, reason="many vectors are multiplied as by nn.Linear")
@pytest.mark.parametrize("inputs", [768, 1536, 5120])
def test_products_as_convolutions_are_about_as_near_to_float64(file, inputs):
    torch.manual_seed(0)
    x, layer = torch.randn(600, inputs), file.module.Linear(inputs, 700, bias=False)
    exact = F.linear(x.double(), layer.weight.double())
    ours, theirs = ((y - exact).square().mean().sqrt() for y in (layer(x), F.linear(x, layer.weight)))
    assert ours <= 1.5 * theirs


FAULTS_OF_LAYER = """
import importlib, itertools, resource, statistics, sys, torch
module, name = importlib.import_module(sys.argv[1]), sys.argv[2]
layer, x = getattr(module, name + "Mixer")(getattr(module, name + "Config")()), torch.randn(1, 512, 768)
faults = [0]
for _ in range(30):
    with torch.no_grad():
        layer(x)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(statistics.median(after - before for before, after in itertools.pairwise(faults)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this is about glibc's malloc")
def test_a_layer_computes_in_memory_that_the_process_has(file):
    name = file.LM.__name__.removesuffix("ForCausalLM")
    faults = float(run("-c", FAULTS_OF_LAYER, file.name, name, OMP_NUM_THREADS=2).stdout)
    assert faults < 200  # of 4 kB each; thousands where glibc gave the memory back


@pytest.mark.slow
def test_forward_is_near_the_limit_and_ahead_of_transformers(file, two_threads):
    torch.manual_seed(0)
    x, ours, theirs = torch.randn(1, 2048, 768), file.Mixer(file.Config()), their_mixer(file)
    with torch.no_grad():
        t = seconds(7, ours=lambda: ours(x), limit=limit(file, x), theirs=lambda: theirs(x))
    assert t["ours"] <= {"mamba": 2.0, "mamba2": 1.6}[file.name] * t["limit"]
    assert t["theirs"] >= {"mamba": 3.0, "mamba2": 1.0}[file.name] * t["ours"]


@pytest.mark.slow
def test_a_layer_at_length_2048_compiles_within_a_minute(file, two_threads, tmp_path, monkeypatch):
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("there is no C++ compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer, x = file.Mixer(file.Config()), torch.randn(1, 2048, 768)
    compiled = torch.compile(layer, fullgraph=True)
    start, results = time.perf_counter(), []
    for f in (compiled, layer):
        layer.zero_grad()
        y = f(x)
        y.square().mean().backward()
        results.append([y.detach(), *(p.grad for p in layer.parameters())])
        if f is compiled:
            took = time.perf_counter() - start
    print(f"forward and backward compiled and ran in {took:.0f} s")
    assert took < 60
    for got, expected in zip(*results, strict=True):
        assert error(got, expected) < 1e-5


@pytest.mark.slow
def test_training_mamba2_is_faster_than_in_transformers(two_threads):
    file, x = FILES["mamba2"], torch.randn(1, 2048, 768, requires_grad=True)
    ours, theirs = file.Mixer(file.Config()), their_mixer(file).train()
    t = seconds(5, ours=forward_and_backward(ours, x), theirs=forward_and_backward(theirs, x))
    assert t["ours"] < t["theirs"]


@pytest.mark.slow
def test_training_mamba_is_7_times_faster_than_in_mambapy(two_threads):
    peer = pytest.importorskip("mambapy.mamba", reason="mambapy is not installed")
    x = torch.randn(1, 512, 768, requires_grad=True)
    theirs = peer.MambaBlock(peer.MambaConfig(d_model=768, n_layers=1))
    ours = mamba.MambaMixer(mamba.MambaConfig())
    t = seconds(5, ours=forward_and_backward(ours, x), theirs=forward_and_backward(theirs, x))
    assert t["theirs"] >= 7 * t["ours"]


on_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")

# Not ru_maxrss: a child process starts from its parent's.
MEMORY = """
def megabytes(field):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(field))

def restart_peak():
    open("/proc/self/clear_refs", "w").write("5")
    return megabytes("VmRSS")
"""

PEAK_OF_TRAINING = (
    MEMORY
    + """
import sys, torch
torch.set_num_threads(2)
if sys.argv[1] == "ours":
    from mamba import MambaConfig, MambaMixer
    layer = MambaMixer(MambaConfig())
else:
    from mambapy.mamba import MambaConfig, MambaBlock
    layer = MambaBlock(MambaConfig(d_model=768, n_layers=1))
x = torch.randn(1, int(sys.argv[2]), 768, requires_grad=True)
layer(x[:, :8]).sum().backward()
before = restart_peak()
layer(x).square().mean().backward()
print(megabytes("VmHWM") - before)
"""
)


@on_linux
@pytest.mark.slow
def test_training_mamba_takes_a_fifth_of_the_memory_of_mambapy():
    if importlib.util.find_spec("mambapy") is None:
        pytest.skip("mambapy is not installed")
    ours, theirs = (float(run("-c", PEAK_OF_TRAINING, who, 2048).stdout) for who in ("ours", "theirs"))
    print(f"peak extra memory: ours {ours:.0f} MB, mambapy {theirs:.0f} MB")
    assert 5 * ours <= theirs


PEAK_OF_LOADING = (
    MEMORY
    + """
import importlib, sys, threading, time, torch
module = importlib.import_module(sys.argv[1])
import safetensors.torch, transformers
samples, done = [megabytes("RssAnon")], threading.Event()  # pages of a mapped file are the kernel's to drop

def watch():
    while not done.is_set():
        samples.append(megabytes("RssAnon"))
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
model = getattr(module, sys.argv[2]).from_pretrained(sys.argv[3])
done.set()
thread.join()
assert len(samples) > 20
print(sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20, max(samples) - samples[0])
"""
)


@on_linux
@pytest.mark.slow
@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_loading_does_not_hold_the_weights_twice(file, weights, tmp_path):
    file.LM(file.Config(d_model=1024, n_layer=16)).save_pretrained(tmp_path)
    if weights == "pytorch_model.bin":
        torch.save(safetensors.torch.load_file(tmp_path / "model.safetensors"), tmp_path / weights)
        (tmp_path / "model.safetensors").unlink()
    done = run("-c", PEAK_OF_LOADING, file.name, file.LM.__name__, tmp_path)
    size, extra = map(float, done.stdout.split())
    print(f"{size:.0f} MB of weights, {extra:.0f} MB of peak memory")
    assert extra <= 1.25 * size


LONG_PROMPT = (
    MEMORY
    + """
import importlib, sys, time, torch
torch.set_num_threads(2)
module, name = importlib.import_module(sys.argv[1]), sys.argv[2]
config, model = name.split(",")
torch.manual_seed(0)
model = getattr(module, model)(getattr(module, config)(d_model=64, n_layer=2, vocab_size=256))
ids = torch.randint(256, (1, int(sys.argv[3])))
start = time.perf_counter()
assert model.generate(ids, max_new_tokens=1).shape[1] == ids.shape[1] + 1
print(time.perf_counter() - start, megabytes("VmHWM"))
"""
)


@on_linux
@pytest.mark.slow
def test_a_million_tokens_take_linear_time_and_no_more_memory(file):
    names = f"{file.Config.__name__},{file.LM.__name__}"
    results = {}
    for length in (10_000, 100_000, 1_000_000):
        done = run("-c", LONG_PROMPT, file.name, names, length)
        results[length] = tuple(map(float, done.stdout.split()))
    print({length: f"{s:.2f} s, peak {mb:.0f} MB" for length, (s, mb) in results.items()})
    assert results[1_000_000][1] - results[10_000][1] <= 100
    assert results[1_000_000][0] <= 1.3 * 10 * results[100_000][0]


@pytest.mark.slow
def test_a_step_costs_the_same_at_position_10_and_100000(file, two_threads):
    torch.manual_seed(0)
    model = file.LM(file.Config(d_model=256, n_layer=4, vocab_size=256)).eval()
    token, params = torch.tensor([1]), {}
    with torch.no_grad():
        for position in (10, 100_000):
            params[position] = file.module.InferenceParams()
            for piece in random_ids(1, position, vocab=256).split(5000, dim=1):
                model(piece, params[position], num_last_tokens=1)
        t = seconds(200, early=lambda: model.step(token, params[10]), late=lambda: model.step(token, params[100_000]))
    assert t["late"] <= 1.1 * t["early"]


# ----------------------------------------------------------------------------------------------------------------------
# The benchmark
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench", ROOT / "benchmarks" / "bench.py")
    sys.modules["bench"] = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(sys.modules["bench"])
    return sys.modules["bench"]


def a_bench(bench, runs=2):
    options = SimpleNamespace(runs=runs)
    return bench.Bench(torch.device("cpu"), [], options, bench.tqdm(disable=True))


def test_the_benchmark_writes_a_page_of_tables(tmp_path):
    page = tmp_path / "RESULTS.md"
    options = ["--quick", "--only", "forward", "--lengths", 16, "--threads", 1, "--output", page]
    done = run("benchmarks/bench.py", *options)
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert "| Mamba-1, l | limit | ours | transformers |" in text
    assert "| Mamba-2, l | limit | ours | transformers |" in text
    assert all(part in done.stdout for part in text.split("\n\n"))
    assert "transformers fails" not in text
    assert os.listdir(tmp_path) == ["RESULTS.md"]


def test_the_benchmark_compares_layers_of_the_same_function(bench, file):
    peer = next(peer for peer in bench.find_peers({})[0] if (peer.name, peer.family) == ("transformers", file.name))
    x = torch.randn(1, 64, 768)
    with torch.no_grad():
        ours = bench.our_layer(bench.FAMILIES[file.name], x.device)(x)
        theirs = bench.output(bench.their_layer(peer, x.device), x)
    assert error(theirs, ours) < 1e-5


WRONG_BENCHMARK_OPTIONS = {
    "--only": ["--only", "backward"],
    "--lengths": ["--lengths", "512", "0"],
    "--threads": ["--threads", "0"],
    "--peer": ["--peer", "mambapy=."],
    "model.py": ["--peer", "mamba-minimal=benchmarks"],
    "--output": ["--output", "no/such/directory/RESULTS.md"],
    "--unknown": ["--unknown"],
}


@pytest.mark.parametrize("name, options", WRONG_BENCHMARK_OPTIONS.items(), ids=WRONG_BENCHMARK_OPTIONS)
def test_a_wrong_option_of_the_benchmark_is_named_in_one_line(bench, name, options, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(options)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and name in message


def test_an_interrupted_benchmark_leaves_the_old_page(bench, tmp_path, monkeypatch, capsys):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    page = tmp_path / "RESULTS.md"
    page.write_text("old")
    monkeypatch.setattr(bench, "layers", interrupt)
    assert bench.main(["--only", "forward", "--threads", "1", "--output", str(page)]) == 130
    assert page.read_text() == "old" and os.listdir(tmp_path) == ["RESULTS.md"]


def test_works_take_turns_and_the_first_turn_does_not_count(bench, monkeypatch):
    calls, times = [], iter([9.0, 8.0, 1.0, 4.0, 3.0, 6.0])
    monkeypatch.setattr(bench.Bench, "seconds", lambda self, work: work() or next(times))
    works = {"ours": lambda: calls.append("ours"), "theirs": lambda: calls.append("theirs")}
    results = a_bench(bench).measure(works)
    assert calls == ["ours", "theirs"] * 3
    assert (results["ours"].seconds, results["theirs"].seconds) == (2.0, 5.0)


def test_a_slow_work_runs_once_and_its_first_run_counts(bench, monkeypatch):
    monkeypatch.setattr(bench.Bench, "seconds", lambda self, work: work())
    results = a_bench(bench).measure({"ours": lambda: 1.0, "theirs": lambda: bench.SLOW + 1})
    assert (results["theirs"].seconds, results["theirs"].runs) == (bench.SLOW + 1, 1)
    assert bench.cell(results["theirs"], 2) == "11,000 (x1)"


def test_a_peer_that_fails_is_named_and_the_rest_is_measured(bench):
    def fail():
        raise RuntimeError("no kernel\nmore")

    this = a_bench(bench)
    results = this.measure({"ours": lambda: None, "theirs": fail})
    assert results["ours"].runs == 2 and results["theirs"].words == "fails"
    assert this.notes == ["theirs fails: no kernel"]
    with pytest.raises(RuntimeError, match="no kernel"):
        this.measure({"ours": fail})


def test_the_time_of_a_slow_peer_is_foreseen_from_shorter_lengths(bench):
    this = a_bench(bench)
    this.pace["theirs"] = [(128, 1.0)]
    assert this.expected("theirs", 512) == pytest.approx(4)  # linear until there is more to go by
    this.pace["theirs"].append((512, 16.0))
    assert this.expected("theirs", 2048) == pytest.approx(256)  # quadratic, as it was


# ----------------------------------------------------------------------------------------------------------------------
# Notebook
# ----------------------------------------------------------------------------------------------------------------------


def read_notebook():
    """demo.ipynb and its code cells."""
    notebook = nbformat.read(ROOT / "demo.ipynb", as_version=4)
    return notebook, [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts_of(cell):
    return [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs]


def test_the_notebook_runs_without_network(tmp_path, monkeypatch):
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "MAMBA2_CHECKPOINT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing answers there
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))  # and nothing was downloaded before
    mine = shutil.copytree(embedded(FILES["mamba"]), tmp_path / "mine")
    monkeypatch.setenv("MAMBA_CHECKPOINT", str(mine))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as in this process: see above
    notebook, cells = read_notebook()
    start = time.monotonic()
    NotebookClient(notebook, timeout=150, resources={"metadata": {"path": ROOT}}).execute()  # a failing cell raises
    assert time.monotonic() - start <= 150

    (loading,) = (cell for cell in cells if "def load(" in cell.source)
    ours, theirs, _ = "".join(texts_of(loading)).split("\n", 2)
    assert ours.startswith(f"{mine}: ") and theirs.endswith("we use the embedded pretrained/shakespeare-mamba2")
    times = loading.metadata.execution
    begin, end = (datetime.fromisoformat(times[key]) for key in ("iopub.execute_input", "shell.execute_reply"))
    assert (end - begin).total_seconds() <= 10


def test_the_outputs_in_the_notebook_are_those_of_one_clean_run():
    notebook, cells = read_notebook()
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}
    text = "\n".join(text for cell in cells for text in texts_of(cell))
    found = re.findall(r"/home|/tmp|/root|/work|/Users|\b[A-Z]:\\|Warning|Traceback|\r", text)
    assert not found


def test_the_picture_in_the_readme_is_one_of_the_notebook():
    pictures = [output.get("data", {}).get("image/png") for cell in read_notebook()[1] for output in cell.outputs]
    picture = (ROOT / "docs" / "selectivity.png").read_bytes()
    assert picture in [base64.b64decode(png) for png in pictures if png]


# ----------------------------------------------------------------------------------------------------------------------
# Quick start, examples, installation, and what MiniMamba claims
# ----------------------------------------------------------------------------------------------------------------------


def run_example(name, *arguments, cwd=ROOT):
    done = run(ROOT / "examples" / f"{name}.py", *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done


@functools.cache
def example(name):
    """A script of examples/ as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refusal(name, options, monkeypatch, capsys):
    """The one line with which a script of examples/ ends; in this process, because starting one takes seconds."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, options)])
    with pytest.raises(SystemExit) as stopped:
        example(name).main()
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and line.startswith(f"{name}.py: error: ")
    return line


def test_the_quick_start_reports_both_files(tmp_path):
    sizes = ["--d-model", 64, "--n-layer", 2, "--vocab-size", 100, "--seq-len", 16, "--new-tokens", 4]
    report = run_example("quickstart", "--device", "cpu", *sizes, cwd=tmp_path).stdout
    assert report.startswith("device: cpu")
    for name, file in FILES.items():
        config = file.Config(d_model=64, n_layer=2, vocab_size=100)
        parameters = sum(parameter.numel() for parameter in file.LM(config).parameters())
        part = report.split(f"{name}.py, random weights")[1].split(f"{name}.py, pretrained")[0]
        assert f"{parameters:,}" in part and "(2, 16) ids" in part
        assert f"(2, 16, {config.padded_vocab_size}) logits" in part
        assert len(re.findall(r"[1-9][\d,]* tokens/s", part)) == 2 and re.search(r"forward pass +\d+\.\d ms", part)
    assert report.count("pretrained/shakespeare") == 2


SHORT_SERIES = ["--season", 12, "--horizon", 12, "--context", 24, "--d-model", 32, "--n-layer", 1, "--steps", 3]


def seasonal_csv(path, length=400):
    """A trend and a season of 12 with noise, and a gap."""
    noise = torch.randn(length, generator=generator()).tolist()
    values = [0.05 * t + 3 * math.sin(2 * math.pi * t / 12) + 0.1 * noise[t] for t in range(length)]
    rows = [f"{t},{'' if t == 50 else values[t]}" for t in range(length)]
    path.write_text("month,level\n" + "\n".join(rows) + "\n")
    return values


def error_table(text):
    """Lines of the printed table: name -> numbers."""
    rows = (re.fullmatch(r"([^:]+?)((?: +\d+\.\d+)+)", line) for line in text.splitlines())
    return {row[1]: [float(number) for number in row[2].split()] for row in rows if row}


@pytest.mark.parametrize("model", FILES)
def test_forecasts_of_a_csv_are_compared_with_the_naive_ones(model, tmp_path):
    values = seasonal_csv(tmp_path / "level.csv")
    options = ["--csv", "level.csv", "--column", "level", *SHORT_SERIES, "--model", model, "--no-plot"]
    table = error_table(run_example("time_series", *options, cwd=tmp_path).stdout)
    assert list(table) == ["last value", "last season", "last season + change", model]
    ends = range(340 - 1, 400 - 12)  # the last known step of each forecast of the last 15%
    last = [statistics.mean(abs(values[t + h] - values[t]) for t in ends) for h in range(1, 13)]
    season = [statistics.mean(abs(values[t + h] - values[t + h - 12]) for t in ends) for h in range(1, 13)]
    for name, exact in (("last value", last), ("last season", season)):
        assert table[name][0] == pytest.approx(exact[0], abs=1e-3)
        assert table[name][-1] == pytest.approx(statistics.mean(exact), abs=1e-3)
    assert os.listdir(tmp_path) == ["level.csv"]


def test_forecasts_of_large_values_are_as_good(tmp_path):
    options = ["--csv", "level.csv", "--column", "level", *SHORT_SERIES, "--no-plot"]
    tables = []
    for level in (0, 2**30):
        values = seasonal_csv(tmp_path / "level.csv")
        (tmp_path / "level.csv").write_text("\n".join(["level", *(str(value + level) for value in values)]))
        tables.append(error_table(run_example("time_series", *options, cwd=tmp_path).stdout))
    for name, errors in tables[0].items():
        assert tables[1][name] == pytest.approx(errors, rel=0.02, abs=2e-3), name


def test_the_forecaster_reads_nothing_that_comes_later():
    script = example("time_series")
    args = SimpleNamespace(season=12, context=24, horizon=6, model="mamba", d_model=32, n_layer=1)
    torch.manual_seed(0)
    model, series = script.Forecaster(args).eval(), torch.randn(200)
    torch.nn.init.normal_(model.head.weight)
    ends, later = torch.tensor([60, 100]), series.clone()
    later[101:] += 100
    assert torch.equal(*(script.forecast(model, s, ends, args) for s in (series, later)))
    naive, naive_later = (script.naive_forecasts(s, ends, args) for s in (series, later))
    assert all(torch.equal(naive[name], naive_later[name]) for name in naive)
    assert script.ends_for(100, 120, 6).tolist() == list(range(99, 114))  # values 100 to 119 are to be forecast
    windows, targets = script.windows_at(series, ends, args)
    assert torch.equal(windows[:, -1], series[ends]) and torch.equal(targets[1, -1], series[101:107])
    gaps = torch.tensor([math.nan, 1.0, math.nan, math.nan, 2.0])
    assert script.fill_gaps(gaps).tolist() == [1.0, 1.0, 1.0, 2.0]


def test_forecasts_of_the_packaged_series_are_drawn(tmp_path):
    for package in ("statsmodels", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    options = ["--d-model", 32, "--n-layer", 1, "--steps", 1, "--plot", tmp_path / "pictures" / "co2.png"]
    done = run_example("time_series", *options)
    assert "2284 values" in done.stdout and len(error_table(done.stdout)) == 4
    assert (tmp_path / "pictures" / "co2.png").read_bytes().startswith(b"\x89PNG")
    assert os.listdir(tmp_path / "pictures") == ["co2.png"]


@pytest.mark.parametrize("model", FILES)
def test_digits_are_classified_and_compared_with_logistic_regression(model):
    if importlib.util.find_spec("sklearn") is None:
        pytest.skip("scikit-learn is not installed")
    report = run_example("classify", "--model", model, "--d-model", 32, "--n-layer", 1, "--epochs", 1).stdout
    scores = {line.split("  ")[0]: re.findall(r"([\d.]+)%", line) for line in report.splitlines() if "%" in line}
    name = "MambaForSequenceClassification" if model == "mamba" else "Mamba2ForSequenceClassification"
    assert list(scores) == ["logistic regression", "logistic regression, moved copies too", name]
    assert all(len(pair) == 2 and 0 < float(pair[1]) <= 100 for pair in scores.values())


BAD_EXAMPLES = {
    "no rows": ("quickstart", ["--batch-size", 0]),
    "no such device": ("quickstart", ["--device", "abacus"]),
    "a width that no head divides": ("quickstart", ["--model", "mamba2", "--d-model", 33]),
    "no such file": ("time_series", ["--csv", "none.csv", "--column", "a", "--season", 12]),
    "no such column": ("time_series", ["--csv", "level.csv", "--column", "depth", "--season", 12]),
    "no column": ("time_series", ["--csv", "level.csv"]),
    "words for numbers": ("time_series", ["--csv", "words.csv", "--column", "level", "--season", 1]),
    "too short a series": ("time_series", ["--csv", "level.csv", "--column", "level", "--season", 200]),
    "a picture of no known kind": ("time_series", ["--plot", "plot.doc"]),
    "an empty file": ("time_series", ["--csv", "empty.csv", "--column", "level", "--season", 12]),
    "no text": ("time_series", ["--csv", "latin1.csv", "--column", "level", "--season", 12]),
    "no season": ("time_series", ["--season", 0]),
    "no epochs": ("classify", ["--epochs", 0]),
    "another model": ("classify", ["--model", "transformer"]),
}


@pytest.mark.parametrize("name, options", BAD_EXAMPLES.values(), ids=BAD_EXAMPLES)
def test_an_example_ends_with_status_2_and_one_line(name, options, tmp_path, monkeypatch, capsys):
    seasonal_csv(tmp_path / "level.csv")
    (tmp_path / "words.csv").write_text("level\nhigh\n")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "latin1.csv").write_bytes("level,température\n1,2\n".encode("latin-1"))
    monkeypatch.chdir(tmp_path)
    line = refusal(name, [*options, "--no-plot"] if "--csv" in options else options, monkeypatch, capsys)
    if options[0:1] == ["--csv"] and options[1] in ("empty.csv", "latin1.csv"):
        assert options[1] in line
    assert sorted(os.listdir()) == ["empty.csv", "latin1.csv", "level.csv", "words.csv"]


@pytest.mark.parametrize(
    "name, package, options",
    [("time_series", "statsmodels", ["--no-plot"]), ("time_series", "matplotlib", []), ("classify", "sklearn", [])],
)
def test_an_example_names_the_package_that_is_missing(name, package, options, monkeypatch, capsys):
    for module in [package, *(m for m in sys.modules if m.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    line = refusal(name, options, monkeypatch, capsys)
    assert package in line and ".[examples]" in line


def test_the_extra_of_the_examples_names_what_they_import():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = [*project["dependencies"], *project["optional-dependencies"]["examples"]]
    named = {re.match(r"[\w-]+", requirement)[0].replace("scikit-learn", "sklearn") for requirement in required}
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "examples").glob("*.py")]
    imported = set(re.findall(r"(?m)^ *(?:import|from) (\w+)", "\n".join(sources)))
    imported -= {"mamba", "mamba2", "tokenizers", "safetensors", *sys.stdlib_module_names}  # transformers brings two
    assert imported <= named


def test_the_snippets_in_the_readme_run_one_after_the_other(tmp_path):
    text = (ROOT / "README.md").read_text()
    (tmp_path / "snippets.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)))
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    done = run("snippets.py", cwd=tmp_path, PYTHONPATH=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ROMEO:") and (tmp_path / "runs" / "new" / "config.json").exists()


@pytest.mark.parametrize("editable", [False, True])
def test_an_installation_imports_from_anywhere(editable, tmp_path):
    found = {d.name: d.version for d in importlib.metadata.distributions() if d.name in ("pip", "setuptools")}
    if len(found) < 2 or int(found["setuptools"].split(".")[0]) < 77:
        pytest.skip(f"pip and setuptools 77 or newer (torch brings it) are needed, found {found}")
    source, site, elsewhere = (tmp_path / name for name in ("source", "site", "elsewhere"))
    source.mkdir(), elsewhere.mkdir()
    for name in ("mamba.py", "mamba2.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    done = run(*command, "--no-build-isolation", "--target", site, *(["-e"] if editable else []), source)
    assert done.returncode == 0, done.stderr
    code = f"import site; site.addsitedir({str(site)!r}); import mamba, mamba2; print(mamba.__file__, mamba2.__file__)"
    done = run("-c", code, cwd=elsewhere)
    assert done.stdout.split() == [str((source if editable else site) / f"{name}.py") for name in FILES], done.stderr
    if not editable:  # the checkpoints stay in the repository
        done = run("-m", "mamba", "ROMEO:", cwd=elsewhere, PYTHONPATH=site)
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert "give --model" in done.stderr


@pytest.mark.slow
def test_a_training_step_is_10_times_faster_than_in_minimamba(two_threads):
    peer = pytest.importorskip("minimamba", reason="minimamba is not installed")
    torch.manual_seed(0)
    x = torch.randn(1, 512, 512)
    layers = {"ours": mamba.S6(mamba.MambaConfig(d_model=512)), "theirs": peer.S6(peer.BaseMambaConfig(d_model=512))}

    def training_step(layer):
        optimizer = torch.optim.AdamW(layer.parameters())

        def work():
            layer(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        return work

    t = seconds(5, **{name: training_step(layer) for name, layer in layers.items()})
    print(f"a training step of one layer: minimamba {peer.__version__} takes {t['theirs'] / t['ours']:.1f} times ours")
    assert t["theirs"] >= 10 * t["ours"]


# From 4096 tokens to the next: by a state that read them in pieces, by `generate`, by a forward pass over all of them.
PEAK_OF_GENERATION = (
    MEMORY
    + """
import importlib, sys, torch
module, names, way = importlib.import_module(sys.argv[1]), sys.argv[2].split(","), sys.argv[3]
config, model = (getattr(module, name) for name in names)
torch.manual_seed(0)
model = model(config(d_model=512, n_layer=6, vocab_size=10000)).eval()
ids = torch.randint(10000, (1, 4096))
model.generate(ids[:, :8], max_new_tokens=2)
before = restart_peak()
with torch.no_grad():
    if way == "cached":
        state = module.InferenceParams()
        for piece in ids.split(256, dim=1):
            logits = model(piece, state, num_last_tokens=1)[:, -1]
        for _ in range(64):
            logits = model.step(logits.argmax(-1), state)
    elif way == "generate":
        model.generate(ids, max_new_tokens=64, temperature=0)
    else:
        model(ids, num_last_tokens=1)
print(megabytes("VmHWM") - before)
"""
)


@on_linux
@pytest.mark.slow
def test_cached_generation_takes_half_the_memory_of_an_uncached_forward_as_minimamba_claims(file):
    names = f"{file.Config.__name__},{file.LM.__name__}"
    ways = ("cached", "generate", "uncached forward")
    peak = {way: float(run("-c", PEAK_OF_GENERATION, file.name, names, way).stdout) for way in ways}
    print(f"peak extra memory, 4096 tokens of context: { {way: f'{mb:.0f} MB' for way, mb in peak.items()} }")
    assert 2 * max(peak["cached"], peak["generate"]) <= peak["uncached forward"]


# ----------------------------------------------------------------------------------------------------------------------
# Mamba's synthetic tasks: examples/induction_heads.py and examples/selective_copying.py
# ----------------------------------------------------------------------------------------------------------------------


def task_script(name):
    specification = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


INDUCTION_MODELS = [path.name for path in sorted((ROOT / "pretrained").glob("induction-heads-*"))]


@pytest.mark.parametrize("piece", [4, 7, 64])
@pytest.mark.parametrize("length", [3, 4, 20])
def test_an_induction_sequence_holds_the_special_symbol_twice_and_its_answer(length, piece):
    task, generator = task_script("induction_heads"), torch.Generator().manual_seed(0)
    pieces, answers = zip(*task.sequences(200, length, piece, generator), strict=True)
    assert all(ids.shape[1] <= piece for ids in pieces)
    ids = torch.cat(pieces, dim=1)
    assert ids.shape == (200, length)
    places = (ids == task.SPECIAL).nonzero()[:, 1].view(200, 2)
    assert (places[:, 1] == length - 1).all()
    assert set(places[:, 0].tolist()) == set(range(length - 2))
    assert all(torch.equal(again, answers[0]) for again in answers)
    assert torch.equal(ids.gather(1, places[:, :1] + 1)[:, 0], answers[0])
    assert set(ids.flatten().tolist()) == set(range(16)) and set(answers[0].tolist()) == set(range(15))


def test_a_selective_copying_sequence_holds_its_answers_in_order_between_noise():
    task, generator = task_script("selective_copying"), torch.Generator().manual_seed(0)
    ids, answers = task.sequences(300, 40, generator)
    assert ids.shape == (300, 56) and answers.shape == (300, 16)
    assert (ids[:, 40:] == task.MARKER).all()
    for row, expected in zip(ids[:, :40], answers, strict=True):
        assert torch.equal(row[row != task.NOISE], expected)
    assert set(answers.flatten().tolist()) == set(range(15))
    assert (ids[:, :40] != task.NOISE).any(0).all()  # any place may hold a token
    ids, answers = task.sequences(2, 16, generator)
    assert torch.equal(ids[:, :16], answers)


def test_the_layer_without_selection_is_the_scan_with_constant_dt_b_and_c():
    task = task_script("selective_copying")
    torch.manual_seed(0)
    model = task.build("invariant")
    mixer, x = model.backbone.layers[0].mixer, torch.randn(2, 50, 64)
    with torch.no_grad():
        u, z = mixer.in_proj(x).chunk(2, dim=-1)
        conv = F.conv1d(F.pad(u.mT, (3, 0)), mixer.conv1d.weight, mixer.conv1d.bias, groups=128).mT
        u = F.silu(conv).double()
        A, C, dt = -mixer.A_log.double().exp(), mixer.C.double(), F.softplus(mixer.dt_bias.double())
        h, ys = torch.zeros(2, 128, 16, dtype=torch.float64), []
        for u_t in u.unbind(1):
            h = torch.exp(dt[:, None] * A) * h + (dt * u_t)[..., None]
            ys.append((h * C).sum(-1) + u_t * mixer.D)
        expected = mixer.out_proj((torch.stack(ys, 1) * F.silu(z)).float())
        torch.testing.assert_close(mixer(x), expected, rtol=1e-4, atol=1e-5)
    counts = [sum(p.numel() for p in task.build(layer).parameters()) for layer in task.LAYERS]
    assert abs(counts[0] - counts[1]) < 0.1 * counts[0]


@pytest.mark.parametrize("name", INDUCTION_MODELS)
def test_the_embedded_induction_heads_are_right_up_to_length_4096(name):
    task = task_script("induction_heads")
    model = task.load(ROOT / "pretrained" / name)
    assert sum(path.stat().st_size for path in (ROOT / "pretrained" / name).iterdir()) < 1_000_000
    for power in range(6, 13):
        right, _ = task.test(model, 2**power, 256 if power <= 8 else 64, seed=1)
        assert right == 1, f"length 2^{power}"


@pytest.mark.slow
@pytest.mark.parametrize("name", INDUCTION_MODELS)
def test_the_embedded_induction_heads_are_right_up_to_a_million_tokens(name):
    task = task_script("induction_heads")
    model = task.load(ROOT / "pretrained" / name)
    for power in range(6, 21):
        right, _ = task.test(model, 2**power, 256 if power <= 16 else 32, seed=2)
        print(f"length 2^{power}: {right:.2%}")
        assert right >= (1 if power <= 16 else 0.99), f"length 2^{power}"


def interrupt_after_saving_once(monkeypatch, task, *arguments):
    """Run a script's main in this process until it has saved its state."""
    save_state = task.save_state

    def save_and_stop(*state):
        save_state(*state)
        raise KeyboardInterrupt

    monkeypatch.setattr(task, "save_state", save_and_stop)
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    with pytest.raises(KeyboardInterrupt):
        task.main()


@pytest.mark.parametrize("model", ["mamba", "mamba2"])
def test_induction_heads_trains_and_resumes_to_the_same_weights(model, tmp_path, monkeypatch):
    options = ["--model", model, "--steps", 4, "--eval-every", 2, "--max-length", 64]
    done = run("examples/induction_heads.py", "--out", tmp_path / "whole", *options)
    assert done.returncode == 0, done.stderr
    assert "step 4" in done.stdout and re.search(r"\b64 +256 +\d", done.stdout)
    cut = ["--out", tmp_path / "cut", *options]
    interrupt_after_saving_once(monkeypatch, task_script("induction_heads"), *cut)
    assert not (tmp_path / "cut" / "config.json").exists()
    done = run("examples/induction_heads.py", "--out", tmp_path / "cut", "--resume", "--max-length", 64)
    assert done.returncode == 0, done.stderr
    whole, cut = (safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[key], cut[key]) for key in whole)
    assert not list(tmp_path.rglob("training_state*"))
    plotted = tmp_path / "plots" / "both.png"
    options = ["--evaluate", tmp_path / "whole", tmp_path / "cut", "--max-length", 64, "--plot", plotted]
    done = run("examples/induction_heads.py", *options)
    assert done.returncode == 0, done.stderr
    assert plotted.exists() == (importlib.util.find_spec("matplotlib") is not None)


def test_selective_copying_trains_and_resumes_to_the_same_curve(tmp_path, monkeypatch):
    options = ["--length", 20, "--steps", 4, "--eval-every", 2, "--batch-size", 2, "--lr", 0.001, "--d-inner", 24]
    done = run("examples/selective_copying.py", "--out", tmp_path / "whole", *options)
    assert done.returncode == 0, done.stderr
    assert re.search("selective, learning rate 0.001, 13,968 parameters", done.stdout)  # 67,008 with 128 channels
    assert re.search(r"(?m)^invariant +0.001 +4 ", done.stdout)
    (tmp_path / "whole" / "other.json").write_text("{}")  # not ours
    assert run("examples/selective_copying.py", "--out", tmp_path / "whole", *options).returncode == 0
    done = run("examples/selective_copying.py", "--out", tmp_path / "whole", *options, "--length", 21, "--lr", 0.002)
    assert done.returncode == 2 and "length 20" in done.stderr  # runs of other options don't get into one table
    resumed = [*options, "--length", 21, "--lr", 0.002, "--layer", "invariant", "--resume"]
    assert run("examples/selective_copying.py", "--out", tmp_path / "whole", *resumed).returncode == 0
    assert json.loads((tmp_path / "whole" / "invariant-0.002.json").read_text())["length"] == 20
    cut = [*options, "--out", tmp_path / "cut"]
    interrupt_after_saving_once(monkeypatch, task_script("selective_copying"), *cut)
    assert run("examples/selective_copying.py", *cut).returncode == 2  # an unfinished run is not overwritten
    done = run("examples/selective_copying.py", *cut, "--resume")
    assert done.returncode == 0, done.stderr
    for name in ("selective-0.001.json", "invariant-0.001.json"):
        whole, resumed = (json.loads((tmp_path / directory / name).read_text()) for directory in ("whole", "cut"))
        assert len(whole["curve"]) == 2 and whole["curve"] == resumed["curve"]
    assert not list(tmp_path.rglob("*.pt"))


BAD_TASKS = {
    "nowhere to store": ["induction_heads", []],
    "no steps": ["induction_heads", ["--out", "{}", "--steps", "0"]],
    "short test": ["induction_heads", ["--out", "{}", "--max-length", "63"]],
    "nothing to resume": ["induction_heads", ["--out", "{}", "--resume"]],
    "no checkpoint": ["induction_heads", ["--evaluate", "{}"]],
    "another task's checkpoint": ["induction_heads", ["--evaluate", "pretrained/shakespeare-mamba"]],
    "unknown model": ["induction_heads", ["--out", "{}", "--model", "mamba3"]],
    "a picture of no known kind": ["induction_heads", ["--out", "{}", "--plot", "plot.doc"]],
    "copying nowhere": ["selective_copying", []],
    "copying in no steps": ["selective_copying", ["--out", "{}", "--steps", "0"]],
    "copying in no channels": ["selective_copying", ["--out", "{}", "--d-inner", "0"]],
    "copying too short": ["selective_copying", ["--out", "{}", "--length", "15"]],
    "copying on no device": ["selective_copying", ["--out", "{}", "--device", "abacus"]],
}


@pytest.mark.parametrize("content", [b"", b"not a state", b"PK\3\4 cut off"], ids=["empty", "text", "cut"])
@pytest.mark.parametrize("script", ["train", "induction_heads", "selective_copying"])
def test_a_broken_training_state_is_named(script, content, tmp_path):
    name = "selective-0.001.pt" if script == "selective_copying" else "training_state.pt"
    (tmp_path / name).write_bytes(content)
    options = ["--lr", 0.001] if script == "selective_copying" else []
    options += ["--data", ROOT / "README.md"] if script == "train" else []
    done = run(f"examples/{script}.py", "--out", tmp_path, "--resume", *options)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1 and name in done.stderr, done.stderr
    assert (tmp_path / name).read_bytes() == content


@pytest.mark.parametrize(("script", "options"), BAD_TASKS.values(), ids=BAD_TASKS)
def test_a_wrong_task_option_is_one_line_and_status_2(script, options, tmp_path):
    done = run(f"examples/{script}.py", *(option.format(tmp_path) for option in options))
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"{script}.py: error: ")
