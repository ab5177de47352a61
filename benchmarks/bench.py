"""Time mamba.py and mamba2.py beside other implementations and beside what the machine allows, in one run.

    pip install ".[benchmark]"                                      # mambapy and minimamba
    python benchmarks/bench.py                                      # all of it, 20 to 25 minutes on two cores
    python benchmarks/bench.py --quick                              # small sizes and few runs, 2 to 3 minutes
    python benchmarks/bench.py --only forward decoding              # some sections
    python benchmarks/bench.py --device cuda
    python benchmarks/bench.py --peer mamba-minimal=DIR --peer mamba2-minimal=DIR2      # peers that are only a file

A full run writes benchmarks/RESULTS.md (with --device cuda, RESULTS-cuda.md); with --quick and --only the results are
only printed, unless --output names a file. Each section is printed as soon as it is measured. The works of a table take
turns, so that a slower minute of the machine meets them all. The layers of all implementations get the same weights,
and their results are compared. Letters: b batch, l sequence length.
"""

import argparse
import ctypes
import functools
import importlib.metadata
import importlib.util
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where the two model files are

import mamba
import mamba2

SECTIONS = ("forward", "training", "memory", "decoding", "prefill")
D_MODEL = 768
CHUNKS = (64, 128, 256)  # of SSD; each peer that has a chunk size is timed at its best of these
RUNS = 15  # of a work, at most; the figure is their median
BUDGET = 4.0  # seconds: a work is not run again once its counted runs took longer
SLOW = 10.0  # seconds: the first run of a work that takes longer counts, and is its only one
LIMIT = 60.0  # seconds: a work that is expected to take longer is left out
FEW = 5  # a figure of fewer runs says how many they were
SHORT = 2**10  # tokens of the prompts that long ones are compared with
PIECE = 2**13  # tokens of the longest prompt that peers read, and of a piece of longer ones
MINIMAL_FILES = {"mamba-minimal": "model.py", "mamba2-minimal": "mamba2.py"}

FAMILIES = {
    module.__name__: SimpleNamespace(name=module.__name__, title=title, Config=config, Mixer=mixer, LM=model)
    for module, title, config, mixer, model in (
        (mamba, "Mamba-1", mamba.MambaConfig, mamba.MambaMixer, mamba.MambaForCausalLM),
        (mamba2, "Mamba-2", mamba2.Mamba2Config, mamba2.Mamba2Mixer, mamba2.Mamba2ForCausalLM),
    )
}


def die(message: str) -> NoReturn:
    """Print one line and exit with status 2."""
    print("bench.py: error:", *message.split(), file=sys.stderr)
    raise SystemExit(2)


# ----------------------------------------------------------------------------------------------------------------------
# Peers
# ----------------------------------------------------------------------------------------------------------------------


class Peer:
    """Another implementation of one of the two layers: what it is called there, and how it is used."""

    name: str
    family: str
    package: str | None = None  # on the package index; None for a single file
    chunked = False  # has a chunk size
    generates = False  # has generation with a cache

    def layer(self) -> nn.Module:
        """A layer of width d_model; its parameters are named as ours."""
        raise NotImplementedError

    def model(self, config: Any) -> nn.Module:
        """A language model of our config's sizes."""
        raise NotImplementedError

    def weights(self, ours: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Our model's weights under the names that this peer's model has, or None to leave it with its own."""
        return None

    def read(self, model: nn.Module, ids: Tensor) -> Any:
        """Read a prompt (b, l) in one call."""
        return model(ids)

    def generate(self, model: nn.Module, ids: Tensor, n: int) -> Any:
        """Continue ids (b, l) by n tokens, greedily."""
        raise NotImplementedError


class Transformers(Peer):
    name = package = "transformers"
    family = "mamba"
    generates = True
    use_mambapy = False

    def config(self, **sizes: int) -> Any:
        return transformers.MambaConfig(hidden_size=D_MODEL, use_mambapy=self.use_mambapy, **sizes)

    def layer(self) -> nn.Module:
        from transformers.models.mamba.modeling_mamba import MambaMixer

        return MambaMixer(self.config(), layer_idx=0)

    def model(self, config: Any) -> nn.Module:
        sizes = dict(num_hidden_layers=config.n_layer, vocab_size=config.padded_vocab_size)
        model = transformers.AutoModelForCausalLM.from_config(self.config(**sizes))
        model.generation_config.eos_token_id = None  # all of the tokens that are asked for
        model.generation_config.pad_token_id = 0
        return model

    def weights(self, ours: dict[str, Tensor]) -> dict[str, Tensor]:
        return ours

    def read(self, model: nn.Module, ids: Tensor) -> Any:
        return self.generate(model, ids, 1)

    def generate(self, model: nn.Module, ids: Tensor, n: int) -> Any:
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False)


class TransformersMambapy(Transformers):
    name = "transformers, use_mambapy"
    package = "mambapy"
    use_mambapy = True


class Transformers2(Transformers):
    family = "mamba2"
    chunked = True

    def config(self, **sizes: int) -> Any:
        heads = dict(num_heads=2 * D_MODEL // 64, head_dim=64, n_groups=1, state_size=128)
        tied = dict(tie_word_embeddings=True)
        return transformers.Mamba2Config(hidden_size=D_MODEL, chunk_size=64, **heads, **tied, **sizes)

    def layer(self) -> nn.Module:
        from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

        return Mamba2Mixer(self.config(), layer_idx=0)


class Mambapy(Peer):
    name = package = "mambapy"
    family = "mamba"

    def layer(self) -> nn.Module:
        from mambapy.mamba import MambaBlock, MambaConfig

        return MambaBlock(MambaConfig(d_model=D_MODEL, n_layers=1))

    def model(self, config: Any) -> nn.Module:
        from mambapy.mamba import Mamba, MambaConfig  # its language model needs mamba_ssm: an embedding and the layers

        layers = Mamba(MambaConfig(d_model=D_MODEL, n_layers=config.n_layer))
        return nn.Sequential(nn.Embedding(config.padded_vocab_size, D_MODEL), layers)


class Minimamba(Peer):
    name = package = "minimamba"
    family = "mamba"

    def layer(self) -> nn.Module:
        from minimamba import S6, MambaLMConfig

        return S6(MambaLMConfig(d_model=D_MODEL, n_layer=1, device="cpu"))

    def model(self, config: Any) -> nn.Module:
        from minimamba import MambaForCausalLM, MambaLMConfig

        sizes = dict(d_model=D_MODEL, n_layer=config.n_layer, vocab_size=config.padded_vocab_size)
        return MambaForCausalLM(MambaLMConfig(**sizes, device="cpu"))


@dataclass
class MambaMinimal(Peer):
    file: Path
    name = "mamba-minimal"
    family = "mamba"

    def layer(self) -> nn.Module:
        module = load(self.file)
        return module.MambaBlock(module.ModelArgs(d_model=D_MODEL, n_layer=1, vocab_size=8))

    def model(self, config: Any) -> nn.Module:
        module = load(self.file)
        return module.Mamba(module.ModelArgs(D_MODEL, config.n_layer, config.padded_vocab_size))

    def weights(self, ours: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name.removeprefix("backbone.").replace("embeddings.", "embedding."): w for name, w in ours.items()}


@dataclass
class Mamba2Minimal(Peer):
    file: Path
    name = "mamba2-minimal"
    family = "mamba2"
    chunked = generates = True

    def layer(self) -> nn.Module:
        module = load(self.file)
        return module.Mamba2(module.Mamba2Config(d_model=D_MODEL, n_layer=1, vocab_size=16))

    def model(self, config: Any) -> nn.Module:
        module = load(self.file)
        sizes = dict(n_layer=config.n_layer, vocab_size=config.padded_vocab_size)
        return module.Mamba2LMHeadModel(module.Mamba2Config(d_model=D_MODEL, **sizes))

    def weights(self, ours: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name.replace("embeddings.", "embedding."): w for name, w in ours.items()}

    def generate(self, model: nn.Module, ids: Tensor, n: int) -> Any:
        # Its own generate takes one row. A prompt's last tokens go through its step as well, one by one.
        kind, weight = load(self.file).InferenceCache, model.lm_head.weight
        states = [kind.alloc(len(ids), model.args) for _ in range(model.args.n_layer)]
        states = [kind(*(part.to(weight) for part in state)) for state in states]
        tokens = list(ids.split(1, dim=1))
        for i in range(len(tokens) + n - 1):
            logits, states = model(tokens[i], states)
            if i + 1 >= ids.shape[1]:
                tokens.append(logits[:, -1:].argmax(-1))
        return torch.cat(tokens, dim=1)


def load(file: Path) -> ModuleType:
    """Import a file under a name of its own, since one of them is called as ours."""
    name = f"peer_{file.parent.name}_{file.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def find_peers(directories: dict[str, Path]) -> tuple[list[Peer], list[str]]:
    """The peers that are here, and the names of those that are not."""
    known = [Transformers(), TransformersMambapy(), Mambapy(), Minimamba(), Transformers2()]
    peers = [peer for peer in known if importlib.util.find_spec(peer.package)]
    missing = [peer.name for peer in known if peer not in peers]
    for kind in (MambaMinimal, Mamba2Minimal):
        if kind.name in directories:
            peers.append(kind(directories[kind.name] / MINIMAL_FILES[kind.name]))
        else:
            missing.append(f"{kind.name} (see --peer)")
    return peers, missing


def set_chunk(module: nn.Module, chunk: int) -> None:
    """Give all layers of a peer's module a chunk size: they read it in every call."""
    for part in module.modules():
        for owner in (part, getattr(part, "args", None)):
            if hasattr(owner, "chunk_size"):
                owner.chunk_size = chunk


# ----------------------------------------------------------------------------------------------------------------------
# Measuring
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What came of a work: the median time of its runs, or words that stand in for it."""

    seconds: float = math.inf
    runs: int = 0
    words: str = ""
    chunk: int | None = None


@dataclass
class Bench:
    """What all sections share."""

    device: torch.device
    peers: list[Peer]
    options: argparse.Namespace
    bar: tqdm
    pace: dict[tuple, list[tuple[int, float]]] = field(default_factory=dict)  # (length, seconds) of a peer's works
    notes: list[str] = field(default_factory=list)  # to stand under the next table

    def peers_of(self, family: SimpleNamespace) -> list[Peer]:
        return [peer for peer in self.peers if peer.family == family.name]

    def seconds(self, work: Callable[[], Any]) -> float:
        self.synchronize()
        start = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - start

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def measure(self, works: dict[Any, Callable[[], Any]], budget: float = BUDGET) -> dict[Any, Result]:
        """The works take turns; the first turn warms up and does not count. Works that raise get words instead."""
        times, failed = {key: [] for key in works}, {}
        for turn in range(1 + self.options.runs):
            for key, work in works.items():
                done = times[key]
                if key in failed or (turn and (done[0] > SLOW or sum(done[1:]) > budget)):
                    continue
                self.bar.set_postfix_str(" ".join(map(str, key)) if isinstance(key, tuple) else str(key))
                try:
                    done.append(self.seconds(work))
                except Exception as error:
                    failed[key] = self.failure(key, error)
        self.bar.update()
        results = {}
        for key, done in times.items():
            counted = done[1:] or done
            results[key] = failed.get(key) or Result(statistics.median(counted), len(counted))
        return results

    def failure(self, key: Any, error: Exception) -> Result:
        name = key[0] if isinstance(key, tuple) else key
        if name == "ours":
            raise error
        if isinstance(error, torch.OutOfMemoryError):
            return Result(words="out of memory")
        note = f"{name} fails: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
        if note not in self.notes:
            self.notes.append(note)
        return Result(words="fails")

    def chunks(self, peer: Peer) -> tuple[int, ...]:
        if not peer.chunked:
            return ()
        return CHUNKS[:1] if self.options.quick else CHUNKS

    def best_chunk(self, peer: Peer, module: nn.Module, work: Callable[[], Any]) -> int | None:
        """Leave a peer's module at the chunk size at which this work is fastest, and return that."""
        times = {}
        for chunk in self.chunks(peer):
            set_chunk(module, chunk)
            try:
                work()
                times[chunk] = self.seconds(work)
            except Exception:  # the length is not a multiple of it, say
                continue
        if not times:
            return None
        set_chunk(module, best := min(times, key=times.get))
        return best

    def expected(self, key: tuple, l: int) -> float:
        """Seconds that a peer's work at length l will take: linear in l, or as steep as it was so far."""
        points = self.pace.get(key, [])
        if not points:
            return 0.0
        (l1, t1), power = points[-1], 1.0
        if len(points) > 1:
            l0, t0 = points[-2]
            power = max(1.0, math.log(t1 / t0) / math.log(l1 / l0))
        return t1 * (l / l1) ** power

    def fits(self, family: SimpleNamespace, l: int) -> bool:
        """Whether there is memory for the tensors (b, l, e, n), about 10 of them, of other Mamba-1 implementations."""
        return family.name == "mamba2" or 10 * 4 * l * 2 * D_MODEL * 16 < available_bytes(self.device)


def available_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return math.inf
    return 1024.0 * next(int(line.split()[1]) for line in text.splitlines() if line.startswith("MemAvailable"))


# ----------------------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------------------


def figure(x: float) -> str:
    return f"{x:,.0f}" if x >= 99.5 else f"{x:.1f}" if x >= 9.95 else f"{x:.2f}"


def cell(result: Result | None, runs: int, scale: float = 1e3) -> str:
    """A time, with the chunk size and with the number of runs where they were few and not all of those asked for."""
    if result is None:
        return ""
    if result.words:
        return result.words
    text = figure(result.seconds * scale)
    if result.chunk:
        text += f", q {result.chunk}"
    return text if result.runs >= min(runs, FEW) else f"{text} (x{result.runs})"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def against_fastest(results: dict[str, Result], peers: Sequence[str]) -> str:
    """How much longer the fastest peer takes than we do."""
    times = {name: results[name].seconds for name in peers if name in results and results[name].runs}
    if not times:
        return ""
    fastest = min(times, key=times.get)
    return f"**{figure(times[fastest] / results['ours'].seconds)}** ({fastest})"


def section(bench: Bench, title: str, tables: Sequence[str]) -> str:
    text = "\n\n".join([f"## {title}", *tables])
    if bench.notes:
        text += "\n\n" + "\n".join(f"- {note}" for note in bench.notes)
    bench.notes = []
    return text


# ----------------------------------------------------------------------------------------------------------------------
# One layer: forward, forward and backward, memory
# ----------------------------------------------------------------------------------------------------------------------


def our_layer(family: SimpleNamespace, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return family.Mixer(family.Config(d_model=D_MODEL)).to(device)


def their_layer(peer: Peer, device: torch.device) -> nn.Module:
    """A peer's layer with our weights."""
    layer = place(peer.layer(), device, torch.float32)
    layer.load_state_dict(our_layer(FAMILIES[peer.family], device).state_dict())
    return layer


def place(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    for part in module.modules():
        if "device" in vars(part):  # mamba2-minimal asks its layers for it
            part.device = device
    return module.to(device, dtype)


def output(layer: nn.Module, x: Tensor) -> Tensor:
    y = layer(x)
    return y[0] if isinstance(y, tuple) else y  # mamba2-minimal gives the new state as well


def layer_work(layer: nn.Module, x: Tensor, backward: bool) -> Callable[[], Any]:
    if not backward:
        return torch.no_grad()(lambda: output(layer, x))
    dy = torch.randn_like(x)

    def forward_and_backward() -> None:
        for tensor in (x, *layer.parameters()):
            tensor.grad = None
        output(layer, x).backward(dy)

    return forward_and_backward


def products(layer: nn.Module, l: int, backward: bool) -> Callable[[], Any]:
    """The matrix products of our layer alone (in_proj, x_proj, dt_proj, out_proj), which every implementation needs."""
    weights = [m.weight.detach().clone().contiguous() for m in layer.modules() if isinstance(m, nn.Linear)]
    inputs = [torch.randn(1, l, w.shape[1], device=w.device) for w in weights]
    if not backward:
        return lambda: [F.linear(x, w) for x, w in zip(inputs, weights, strict=True)]
    tensors = [tensor.requires_grad_() for tensor in (*weights, *inputs)]
    gradients = [torch.randn(1, l, w.shape[0], device=w.device) for w in weights]

    def forward_and_backward() -> None:
        for tensor in tensors:
            tensor.grad = None
        torch.autograd.backward([F.linear(x, w) for x, w in zip(inputs, weights, strict=True)], gradients)

    return forward_and_backward


def layers(bench: Bench, backward: bool) -> str:
    """One layer at several lengths, in float32 and batch 1."""
    kind, tables = "training" if backward else "forward", []
    for family in FAMILIES.values():
        ours, peers = our_layer(family, bench.device).train(backward), bench.peers_of(family)
        theirs = {peer.name: their_layer(peer, bench.device).train(backward) for peer in peers}
        if not backward:
            compare(bench, family, ours, theirs)
        rows = []
        for l in bench.options.lengths:
            results = layer_results(bench, family, kind, l, ours, peers, theirs)
            cells = [cell(results[name], bench.options.runs) for name in ("limit", "ours", *theirs)]
            share = results["ours"].seconds / results["limit"].seconds
            rows.append([str(l), *cells, against_fastest(results, list(theirs)), f"**{figure(share)}**"])
        columns = [f"{family.title}, l", "limit", "ours", *theirs, "fastest peer / ours", "ours / limit"]
        tables.append(table(columns, rows))
    title = "One layer, forward and backward" if backward else "One layer, forward"
    return section(bench, f"{title}: ms", tables)


def compare(bench: Bench, family: SimpleNamespace, ours: nn.Module, theirs: dict[str, nn.Module]) -> None:
    """Note how far the results of the peers' layers are from ours, relative to the largest value."""
    x, distances = torch.randn(1, 256, D_MODEL, device=bench.device), []
    with torch.no_grad():
        y = output(ours, x)
        for name, layer in theirs.items():
            try:
                distances.append(f"{name} {((output(layer, x) - y).abs().max() / y.abs().max()).item():.0e}")
            except Exception as error:
                bench.failure(name, error)
    if distances:
        bench.notes.append(f"{family.title}, distance of the results from ours: " + ", ".join(distances) + ".")


def layer_results(
    bench: Bench,
    family: SimpleNamespace,
    kind: str,
    l: int,
    ours: nn.Module,
    peers: list[Peer],
    theirs: dict[str, nn.Module],
) -> dict[str, Result]:
    bench.bar.set_description(f"{kind}, {family.title}, l {l}")
    backward = kind == "training"
    x = torch.randn(1, l, D_MODEL, device=bench.device, requires_grad=backward)
    works = {"limit": products(ours, l, backward), "ours": layer_work(ours, x, backward)}
    chunks, left_out = {}, {}
    for peer in peers:
        layer, key = theirs[peer.name], (kind, peer.name, family.name)
        if key not in bench.pace and not peer.chunked:  # a shorter length first, to foresee the time of this one
            probe = layer_work(layer, x.detach()[:, : max(1, l // 4)].requires_grad_(backward), backward)
            try:
                bench.pace[key] = [(max(1, l // 4), bench.seconds(probe))]
            except Exception as error:
                left_out[peer.name] = bench.failure(peer.name, error)
                continue
        if bench.expected(key, l) > LIMIT:
            left_out[peer.name] = Result(words="over a minute")
        elif not bench.fits(family, l):
            left_out[peer.name] = Result(words="too little memory")
        else:
            works[peer.name] = layer_work(layer, x, backward)
            chunks[peer.name] = bench.best_chunk(peer, layer, works[peer.name])
    results = bench.measure(works)
    for peer in peers:
        if peer.name in left_out:
            results[peer.name] = left_out[peer.name]
        elif (result := results[peer.name]).runs:
            result.chunk = chunks[peer.name]
            bench.pace.setdefault((kind, peer.name, family.name), []).append((l, result.seconds))
    return results


def memory(bench: Bench) -> str:
    """Peak extra memory of forward and backward through one layer, each in a process of its own."""
    l, runs, rows = bench.options.memory_length, 1, []
    names = list(dict.fromkeys(peer.name for peer in bench.peers))
    for family in FAMILIES.values():
        bench.bar.set_description(f"memory, {family.title}")
        results = {"ours": peak_in_child(bench, family, "ours", None)}
        for peer in bench.peers_of(family):
            bench.bar.set_postfix_str(peer.name)
            results[peer.name] = peak_of_peer(bench, family, peer, l)
        least = {name: result.seconds for name, result in results.items() if result.runs and name != "ours"}
        ratio = against_fastest(results, list(least))
        cells = [cell(results.get(name), runs, 1e-6) for name in ("ours", *names)]
        rows.append([family.title, *cells, ratio])
        bench.bar.update()
    columns = [f"l {l}", "ours", *names, "least of a peer / ours"]
    return section(bench, "One layer, forward and backward: peak extra memory, MB", [table(columns, rows)])


def peak_of_peer(bench: Bench, family: SimpleNamespace, peer: Peer, l: int) -> Result:
    if bench.expected(("training", peer.name, family.name), l) > LIMIT:
        return Result(words="over a minute")
    if not bench.fits(family, l):
        return Result(words="too little memory")
    results = [peak_in_child(bench, family, peer.name, chunk) for chunk in bench.chunks(peer) or (None,)]
    return min(results, key=lambda result: result.seconds)


def peak_in_child(bench: Bench, family: SimpleNamespace, name: str, chunk: int | None) -> Result:
    """Run this file again for one figure; the bytes stand in the place of the seconds."""
    options = bench.options
    command = [sys.executable, __file__, "--peak", family.name, name, str(chunk or 0)]
    command += ["--lengths", str(options.memory_length), "--device", options.device, "--threads", str(options.threads)]
    command += [part for peer, path in options.peer.items() for part in ("--peer", f"{peer}={path}")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT + 30, check=False)
    except subprocess.TimeoutExpired:
        return Result(words="over a minute")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["killed"]
        return bench.failure(name, RuntimeError(lines[-1]))
    return Result(float(done.stdout), 1, chunk=chunk)


def print_peak(options: argparse.Namespace) -> None:
    """The child's side: print the bytes that training one layer takes beyond what was there before."""
    (family, name, chunk), (l,) = options.peak, options.lengths
    device = torch.device(options.device)
    if name == "ours":
        layer = our_layer(FAMILIES[family], device)
    else:
        peers, _ = find_peers(options.peer)
        layer = their_layer(next(peer for peer in peers if (peer.name, peer.family) == (name, family)), device)
    set_chunk(layer, int(chunk)) if int(chunk) else None
    x = torch.randn(1, l, D_MODEL, device=device, requires_grad=True)
    warm_up = x.detach()[:, : int(chunk) or 8].requires_grad_()
    layer_work(layer.train(), warm_up, True)()
    work = layer_work(layer, x, True)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        print(torch.cuda.max_memory_allocated() - before)
        return
    ctypes.CDLL(None).malloc_trim(0)  # give back what the warm-up freed, so that none of it is used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew; ru_maxrss would start from the parent's
    before = resident_bytes("VmRSS")
    work()
    print(resident_bytes("VmHWM") - before)


def resident_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


# ----------------------------------------------------------------------------------------------------------------------
# The 130M model: prompts and generated tokens
# ----------------------------------------------------------------------------------------------------------------------


def our_model(family: SimpleNamespace, device: torch.device, dtype: torch.dtype, **sizes: int) -> nn.Module:
    """A model with random weights, ready to generate."""
    torch.manual_seed(0)
    return family.LM(family.Config(d_model=D_MODEL, **sizes)).to(device, dtype).eval()


def their_model(peer: Peer, ours: nn.Module) -> nn.Module:
    weight = ours.lm_head.weight
    model = place(peer.model(ours.config), weight.device, weight.dtype).eval()
    if (weights := peer.weights(ours.state_dict())) is not None:
        model.load_state_dict(weights)
    return model


def greedy(model: nn.Module) -> Callable[[Tensor, int], Any]:
    return lambda ids, n: model.generate(ids, max_new_tokens=n, temperature=0)


def compiled(model: nn.Module) -> Callable[[Tensor, int], Any]:
    """`greedy` with the step of a token compiled; the states stand in a plain dict, without a counter of tokens."""
    mode = "reduce-overhead" if model.lm_head.weight.is_cuda else None
    step = torch.compile(model.step, mode=mode, dynamic=False)

    @torch.no_grad()
    def generate(ids: Tensor, n: int) -> Tensor:
        cache, tokens = SimpleNamespace(key_value_memory_dict={}), [ids]
        logits = model(ids, cache, num_last_tokens=1)[:, -1]
        for _ in range(n - 1):
            tokens.append(logits.argmax(-1, keepdim=True))
            logits = step(tokens[-1][:, 0], cache)
        return torch.cat([*tokens, logits.argmax(-1, keepdim=True)], dim=1)

    return generate


def read_bandwidth(bench: Bench, dtype: torch.dtype) -> float:
    """Bytes per second at which 512 MB are read: the best of a sum and of some products with one vector."""
    data = torch.ones(512 * 10**6 // dtype.itemsize // 2**16 * 16, 4096, device=bench.device, dtype=dtype)
    across, along = (torch.randn(1, width, device=bench.device, dtype=dtype) for width in data.shape[::-1])
    works = {
        "sum": lambda: data.sum(),
        "row-major product": lambda: F.linear(across, data),
        "column-major product": lambda: F.linear(along, data.t()),
        "product of blocks": lambda: torch.bmm(data.unflatten(0, (16, -1)), across.mT.expand(16, -1, -1)),
    }
    with torch.no_grad():
        results = bench.measure(works)
    return data.nbytes / min(result.seconds for result in results.values())


def decoding(bench: Bench) -> str:
    """Prompt and tokens of the 130M models, in float32 and bfloat16, at batch 1 and 8."""
    quick, runs = bench.options.quick, bench.options.runs
    steps, prompts, batches = [], [], (1,) if quick else (1, 8)
    names = {"reading": [], "generating": []}
    for peer in bench.peers:
        if peer.generates:
            names["reading"].append(peer.name)
        if peer.generates and peer.name != TransformersMambapy.name:  # the same steps as without
            names["generating"].append(peer.name)
    names = {what: list(dict.fromkeys(found)) for what, found in names.items()}
    for family in FAMILIES.values():
        in_float32 = {}
        for dtype in (torch.float32, torch.bfloat16):
            ours = our_model(family, bench.device, dtype, n_layer=4 if quick else 24)
            peers = [peer for peer in bench.peers_of(family) if peer.generates]
            theirs = {peer.name: their_model(peer, ours) for peer in peers}
            bench.bar.set_description(f"decoding, {family.title}, {short(dtype)}")
            limit = sum(p.nbytes for p in ours.parameters()) / read_bandwidth(bench, dtype)
            for batch in batches:
                where = [family.title, short(dtype), str(batch)]
                bench.bar.set_description(f"decoding, {', '.join(where[:2])}, batch {batch}")
                tokens = generating(bench, ours, peers, theirs, batch)
                in_float32.setdefault(batch, tokens.get("transformers"))
                steps.append(where + step_cells(tokens, limit, names["generating"], in_float32[batch], runs))
                read = reading(bench, ours, peers, theirs, batch)
                cells = [cell(read.get(name), runs) for name in ("ours", *names["reading"])]
                prompts.append([*where, *cells, against_fastest(read, names["reading"])])
    first = ["", "weights", "batch"]
    columns = [*first, "limit", "ours", "ours, compiled", *names["generating"]]
    columns += ["fastest peer / ours", "transformers float32 / ours, compiled", "limit / ours"]
    tables = [table(columns, steps), f"Prompt of {prompt_length(bench)} tokens and the first new one, ms:"]
    tables.append(table([*first, "ours", *names["reading"], "fastest peer / ours"], prompts))
    size = "4 layers of the 130M models" if quick else "130M models"
    return section(bench, f"{size}: ms for a generated token in each row", tables)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def generating(
    bench: Bench, ours: nn.Module, peers: list[Peer], theirs: dict[str, nn.Module], batch: int
) -> dict[str, Result]:
    """Time for each new token: what 1 + n tokens take longer than 1, divided by n."""
    n = 8 if bench.options.quick else 32
    ids = torch.randint(ours.config.vocab_size, (batch, 1), device=bench.device)
    generators, tokens = {"ours": greedy(ours)}, {}
    if ours.lm_head.weight.dtype == torch.bfloat16:
        torch.compiler.reset()
        fast = compiled(ours)
        try:  # before the turns, where the time of compiling would count
            seconds = bench.seconds(lambda: fast(ids, 2))
            bench.notes.append(f"{type(ours).__name__}, batch {batch}: compiling the step took {seconds:.0f} s.")
            generators["ours, compiled"] = fast
        except Exception as error:  # no C++ compiler, say
            tokens["ours, compiled"] = bench.failure("ours, compiled", error)
    for peer in peers:
        if peer.name != TransformersMambapy.name:
            generators[peer.name] = lambda ids, n, peer=peer: peer.generate(theirs[peer.name], ids, n)
    works = {}
    for name, generate in generators.items():
        for count in (1, 1 + n):
            works[name, count] = lambda generate=generate, count=count: generate(ids, count)
    with torch.no_grad():
        results = bench.measure(works)
    for name in generators:
        one, more = results[name, 1], results[name, 1 + n]
        tokens[name] = more if more.words else Result((more.seconds - one.seconds) / n, more.runs)
    return tokens


def step_cells(
    tokens: dict[str, Result], limit: float, peers: list[str], in_float32: Result | None, runs: int
) -> list[str]:
    cells = [figure(1e3 * limit), *(cell(tokens.get(name), runs) for name in ("ours", "ours, compiled", *peers))]
    fast = tokens.get("ours, compiled")
    both = fast and fast.runs and in_float32 and in_float32.runs
    cells += [against_fastest(tokens, peers), f"**{figure(in_float32.seconds / fast.seconds)}**" if both else ""]
    shares = [tokens[name].seconds for name in ("ours", "ours, compiled") if name in tokens and tokens[name].runs]
    return [*cells, ", ".join(f"{100 * limit / seconds:.0f}%" for seconds in shares)]


def prompt_length(bench: Bench) -> int:
    return 64 if bench.options.quick else 512


def reading(
    bench: Bench, ours: nn.Module, peers: list[Peer], theirs: dict[str, nn.Module], batch: int
) -> dict[str, Result]:
    """Time of a prompt and the first new token."""
    ids = torch.randint(ours.config.vocab_size, (batch, prompt_length(bench)), device=bench.device)
    works, chunks = {"ours": lambda: greedy(ours)(ids, 1)}, {}
    with torch.no_grad():
        for peer in peers:
            model = theirs[peer.name]
            works[peer.name] = lambda peer=peer, model=model: peer.read(model, ids)
            chunks[peer.name] = bench.best_chunk(peer, model, works[peer.name])
        results = bench.measure(works)
    for name, chunk in chunks.items():
        results[name].chunk = chunk
    return results


# ----------------------------------------------------------------------------------------------------------------------
# Long prompts
# ----------------------------------------------------------------------------------------------------------------------


def prefill(bench: Bench) -> str:
    """Time for each token of a prompt, from short ones to long ones, in two layers with a vocabulary of 256."""
    lengths = [SHORT, 2**12] if bench.options.quick else [SHORT, 2**12, PIECE]
    beyond = [2**14] if bench.options.quick else [2**15, 2**17, 2**18]
    tables = []
    for family in FAMILIES.values():
        bench.bar.set_description(f"prefill, {family.title}")
        peers = bench.peers_of(family)
        ours = our_model(family, bench.device, torch.float32, n_layer=2, vocab_size=256)
        ids = torch.randint(256, (1, beyond[-1]), device=bench.device)
        with torch.no_grad():
            works, chunks = prefill_works(bench, family, peers, ours, ids, lengths)
            results = bench.measure(works)
            for (name, l), result in results.items():
                result.chunk = chunks.get((name, l))
                result.seconds /= l
            same = {l: repeated(works["ours", l], lengths[-1] // l) for l in lengths}  # as many tokens in each
            alone = bench.measure(same, 3 * BUDGET)
            shares = {l: alone[l].seconds / alone[SHORT].seconds for l in lengths}
            for l, (mine, short) in long_prompt(bench, ours, ids, beyond).items():
                results["ours", l], shares[l] = Result(mine / l, 1), mine / short
        tables.append(prefill_table(family, shares, results, peers, bench.options.runs))
    return section(bench, "Long prompts, two layers: microseconds for each token", tables)


def repeated(work: Callable[[], Any], times: int) -> Callable[[], None]:
    def run_all() -> None:
        for _ in range(times):
            work()

    return run_all


def long_prompt(bench: Bench, model: nn.Module, ids: Tensor, lengths: list[int]) -> dict[int, tuple[float, float]]:
    """Seconds of a prompt (1, l) up to some lengths, and those of as many tokens in prompts of SHORT tokens.

    The short prompts take turns with pieces of the long one, which is read in segments as generate reads it.
    """
    cache, found, mine, short = SimpleNamespace(key_value_memory_dict={}), {}, 0.0, 0.0

    def read(piece: Tensor) -> None:
        for segment in piece.split(mamba.PROMPT_SEGMENT, dim=1):
            model(segment, cache, num_last_tokens=1)

    for end in range(PIECE, ids.shape[1] + 1, PIECE):
        mine += bench.seconds(functools.partial(read, ids[:, end - PIECE : end]))
        short += bench.seconds(lambda: greedy(model)(ids[:, :SHORT], 1)) * PIECE / SHORT
        if end in lengths:
            found[end] = mine, short
    return found


def prefill_works(
    bench: Bench, family: SimpleNamespace, peers: list[Peer], ours: nn.Module, ids: Tensor, lengths: list[int]
) -> tuple[dict[tuple[str, int], Callable[[], Any]], dict[tuple[str, int], int | None]]:
    """The works by name and length, and the chunk sizes of those that have one."""
    works, chunks = {("ours", l): lambda l=l: greedy(ours)(ids[:, :l], 1) for l in lengths}, {}
    for peer in peers:
        model = their_model(peer, ours)

        def read(l: int, chunk: int | None = None, peer: Peer = peer, model: nn.Module = model) -> None:
            if chunk:
                set_chunk(model, chunk)
            peer.read(model, ids[:, :l])

        for l in lengths:
            if bench.fits(family, l):
                chunk = bench.best_chunk(peer, model, functools.partial(read, l))
                works[peer.name, l], chunks[peer.name, l] = functools.partial(read, l, chunk), chunk
    return works, chunks


def prefill_table(
    family: SimpleNamespace, shares: dict[int, float], results: dict[tuple, Result], peers: list[Peer], runs: int
) -> str:
    rows, names = [], [peer.name for peer in peers]
    for l, share in shares.items():
        here = {name: result for (name, length), result in results.items() if length == l}
        cells = [cell(here.get(name), runs, 1e6) for name in ("ours", *names)]
        rows.append([f"{l:,}", *cells, against_fastest(here, names), f"{share:.2f}"])
    columns = [f"{family.title}, tokens", "ours", *names, "fastest peer / ours", f"ours, to {SHORT:,} tokens"]
    flat = max(shares.values()) / min(shares.values())
    return table(columns, rows) + f"\n\n{family.title}, ours: largest / smallest of the last column = **{flat:.2f}**."


# ----------------------------------------------------------------------------------------------------------------------
# The page
# ----------------------------------------------------------------------------------------------------------------------

HOW_TO_READ = f"""\
Compare the ratios. The times belong to this machine and this hour. The works of a table took turns in one process; a
figure is the median of up to {RUNS} runs (with --quick, 2), as many as fit into {BUDGET:.0f} seconds, after one that
warmed up; (x2) beside it says that there were only 2, and likewise below {FEW}. (x1) beside more than {SLOW:.0f}
seconds is a first run. What is expected to take longer than a minute is left out. Layers have d_model {D_MODEL}, batch
1 and the same weights everywhere; forward runs without gradients.

- **limit**, for a layer: its matrix products (in_proj, x_proj, dt_proj, out_proj) as F.linear, and their backward where
  the table has one. The products inside the scan or SSD do not count. For a generated token: the bytes of the weights
  over the read bandwidth, which is the best of a sum and of products with a vector, row-major, column-major and in
  blocks of rows, over 512 MB.
- **fastest peer / ours** above 1: ours is faster. **ours / limit** of 1 is what can't be beaten with F.linear; on AMD
  CPUs with AVX-512, ours calls oneDNN instead. **limit / ours**: how much of the bandwidth is used, for ours and where
  there is one for ours compiled.
- **q** is the chunk size of SSD, the best of 64, 128 and 256 for each peer and work. Ours keeps its default.
- **transformers** runs its plain PyTorch path; Mamba-1 has a second one with use_mambapy.
- **ours, to {SHORT:,} tokens**: a token's time in a long prompt to that in prompts of {SHORT:,} tokens, in turns
  without the peers. All lengths above {PIECE:,} are of one long prompt, read once, with short ones between its pieces.
"""


def describe(bench: Bench, missing: list[str]) -> str:
    """The top of the page: machine, versions, command."""
    options = bench.options
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    for name in ("transformers", "mambapy", "minimamba", "mamba-ssm", "causal-conv1d"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    machine = f"{processor()}, {os.cpu_count()} cores, {options.threads} threads"
    if bench.device.type == "cuda":
        machine += f"; {torch.cuda.get_device_name()}"
    lines = ["# Results of benchmarks/bench.py", "", f"- machine: {machine}", f"- versions: {', '.join(versions)}"]
    lines.append(f"- command: `python benchmarks/bench.py{command_line(options)}`")
    if missing:
        lines.append(f"- not installed, left out: {', '.join(missing)}")
    return "\n".join(lines) + "\n\n" + HOW_TO_READ


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def command_line(options: argparse.Namespace) -> str:
    """The options that change what is measured, without directories."""
    parts = ["--quick"] if options.quick else []
    parts += [] if list(options.only) == list(SECTIONS) else ["--only", *options.only]
    parts += [] if options.lengths == options.default_lengths else ["--lengths", *map(str, options.lengths)]
    parts += [] if options.device == "cpu" else ["--device", options.device]
    parts += [f"--peer {name}=DIRECTORY" for name in options.peer]
    return "".join(f" {part}" for part in parts)


def write(path: Path, text: str) -> None:
    """Write a file beside its place and rename it, so that it is there whole or the old one stays."""
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(beside, 0o644)
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = die  # one line, without the usage text
    add = parser.add_argument
    add("--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="SECTION", help=", ".join(SECTIONS))
    add("--quick", action="store_true", help="small sizes and few runs, to see that it works")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=int, default=torch.get_num_threads(), help="of the CPU (default: %(default)s)")
    add("--lengths", type=int, nargs="+", help="of the layer's sections (default: 512 2048 8192; with --quick, 256)")
    add("--peer", action="append", default=[], metavar="NAME=DIRECTORY", help="mamba-minimal or mamba2-minimal")
    add("--output", type=Path, help="file for the results (default: see above)")
    add("--peak", nargs=3, help=argparse.SUPPRESS)  # of the children that measure memory
    options = parser.parse_args(argv)
    options.runs = 2 if options.quick else RUNS
    options.default_lengths = [256] if options.quick else [512, 2048, 8192]
    options.memory_length = 256 if options.quick else 2048
    options.lengths = options.lengths or options.default_lengths
    if min(options.lengths) < 1:
        die(f"--lengths must be positive, got {min(options.lengths)}")
    if options.threads < 1:
        die(f"--threads must be positive, got {options.threads}")
    if options.device == "cuda" and not torch.cuda.is_available():
        die("--device cuda: torch finds no such device here")
    options.lengths = sorted(set(options.lengths))
    options.peer = dict(map(read_peer, options.peer))
    if options.output is None and not options.quick and set(options.only) == set(SECTIONS):
        name = "RESULTS.md" if options.device == "cpu" else "RESULTS-cuda.md"
        options.output = Path(__file__).resolve().parent / name
    if options.output and not options.output.resolve().parent.is_dir():
        die(f"--output must be in a directory that is there, got {options.output}")
    return options


def read_peer(text: str) -> tuple[str, Path]:
    name, _, directory = text.partition("=")
    if name not in MINIMAL_FILES or not directory:
        die(f"--peer must be NAME=DIRECTORY with a NAME of {', '.join(MINIMAL_FILES)}, got {text}")
    if not (Path(directory) / MINIMAL_FILES[name]).is_file():
        die(f"--peer {name}: {directory} must hold {MINIMAL_FILES[name]}")
    return name, Path(directory)


def run(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    if options.peak:
        print_peak(options)
        return
    peers, missing = find_peers(options.peer)
    measure = {
        "forward": lambda bench: layers(bench, backward=False),
        "training": lambda bench: layers(bench, backward=True),
        "memory": memory,
        "decoding": decoding,
        "prefill": prefill,
    }
    batches = 1 if options.quick else 2
    steps = dict(forward=2 * len(options.lengths), training=2 * len(options.lengths), memory=2)
    steps |= dict(decoding=4 * (1 + 2 * batches), prefill=4)
    only = [name for name in SECTIONS if name in options.only]
    if options.device == "cpu" and "memory" in only and not Path("/proc/self/clear_refs").exists():
        only.remove("memory")
        missing.append("memory (it is read from Linux's /proc)")
    with tqdm(total=sum(steps[name] for name in only), disable=None) as bar:
        bench = Bench(torch.device(options.device), peers, options, bar)
        page = [describe(bench, missing)]
        tqdm.write(page[0])
        for name in only:
            page.append(measure[name](bench))
            tqdm.write(page[-1] + "\n")
    if options.output:
        write(options.output, "\n\n".join(part.strip() for part in page) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = read_options(argv)
    try:
        run(options)
    except KeyboardInterrupt:
        print("bench.py: interrupted; no file was written", file=sys.stderr)
        return 130
    except OSError as error:
        die(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
