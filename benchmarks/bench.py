"""Time mamba.py, mamba2.py and mamba3.py beside other implementations and beside what the machine allows, in one run.

    pip install ".[benchmark]"                           # mambapy and minimamba
    python benchmarks/bench.py                           # all of it; needs 10 GB of free memory
    python benchmarks/bench.py --quick                   # small sizes and few runs, to see that it works
    python benchmarks/bench.py --only forward decoding   # some sections
    python benchmarks/bench.py --device cuda

A full run writes benchmarks/RESULTS.md (with --device cuda, RESULTS-cuda.md); other results are only printed, unless
--output names a file. Each section is printed as soon as it is measured. OMP_NUM_THREADS sets the threads of the CPU.
Letters: b batch, l sequence length.
"""

import argparse
import ctypes
import functools
import importlib.metadata
import importlib.util
import itertools
import multiprocessing
import os
import platform
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the model files
transformers.logging.set_verbosity_error()  # it runs without mamba_ssm's kernels, and says so

D_MODEL = 768
RUNS = 15  # of a work, at most; the figure is their median
BUDGET = 4.0  # seconds: a work is not run again once its counted runs took longer
SLOW = 10.0  # seconds: the first run of a work that takes longer counts, and is its only one
LIMIT = 60.0  # seconds: a work that is expected to take longer is left out
TOKENS = 32  # that a model generates in one run
OURS = ("limit", "ours", "ours, compiled")  # columns that are not a peer's
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# --- Families and peers -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """Another implementation of a layer; its parameters are named as ours."""

    name: str
    package: str
    file: str  # the module that has the layer
    make: Callable[[Any], nn.Module]
    config: Callable[..., Any] | None = None  # of the model, if it generates as transformers does

    def layer(self) -> nn.Module:
        return self.make(importlib.import_module(self.file))


def from_transformers(name: str, prefix: str, package: str = "transformers", **settings: Any) -> Peer:
    config = functools.partial(getattr(transformers, f"{prefix}Config"), hidden_size=D_MODEL, **settings)
    file = f"transformers.models.{prefix.lower()}.modeling_{prefix.lower()}"
    return Peer(name, package, file, lambda m: getattr(m, f"{prefix}Mixer")(config(), layer_idx=0), config)


@dataclass(frozen=True)
class Family:
    """One of our files: its name, the prefix of its classes, and who else has such a layer."""

    name: str
    title: str
    prefix: str
    known: list[Peer] = field(default_factory=list)

    @property
    def peers(self) -> list[Peer]:
        """Those that are installed."""
        return [peer for peer in self.known if importlib.util.find_spec(peer.package)]

    def get(self, name: str) -> Any:
        return getattr(importlib.import_module(self.name), name)

    def build(self, kind: str, **sizes: int) -> nn.Module:
        """Our layer ("Mixer") or model ("ForCausalLM") with random weights."""
        torch.manual_seed(0)
        return self.get(f"{self.prefix}{kind}")(self.get(f"{self.prefix}Config")(d_model=D_MODEL, **sizes))


MAMBA_PEERS = [
    from_transformers("transformers", "Mamba"),
    from_transformers("transformers, use_mambapy", "Mamba", "mambapy", use_mambapy=True),
    Peer("mambapy", "mambapy", "mambapy.mamba", lambda m: m.MambaBlock(m.MambaConfig(d_model=D_MODEL, n_layers=1))),
    Peer("minimamba", "minimamba", "minimamba", lambda m: m.S6(m.MambaLMConfig(D_MODEL, n_layer=1, device="cpu"))),
]
MAMBA2 = dict(num_heads=2 * D_MODEL // 64, head_dim=64, n_groups=1, state_size=128, tie_word_embeddings=True)
MAMBA2_PEERS = [from_transformers(f"transformers, q {q}", "Mamba2", chunk_size=q, **MAMBA2) for q in (64, 128, 256)]
FAMILIES = {
    "mamba": Family("mamba", "Mamba-1", "Mamba", MAMBA_PEERS),
    "mamba2": Family("mamba2", "Mamba-2", "Mamba2", MAMBA2_PEERS),
    "mamba3": Family("mamba3", "Mamba-3", "Mamba3"),  # the official layer runs on CUDA alone
}

# --- Measuring, and tables of it --------------------------------------------------------------------------------------

Results = dict[Any, float | str]  # seconds or bytes by the name of a work, or words that stand in for them


@dataclass(frozen=True)
class Bench:
    """What all sections share."""

    device: torch.device
    quick: bool = False

    def measure(self, works: dict[Any, Callable[[], Any]]) -> Results:
        """Medians. The works take turns; the first turn warms up and does not count."""
        times, failed = {key: [] for key in works}, {}
        for turn in range(1 + (2 if self.quick else RUNS)):
            for key, work in works.items():
                done = times[key]
                if key in failed or (turn and (done[0] > SLOW or sum(done[1:]) > BUDGET)):
                    continue
                try:
                    done.append(self.seconds(work))
                except Exception as error:
                    failed[key] = words(key, error)
        return {key: failed.get(key) or statistics.median(done[1:] or done) for key, done in times.items()}

    def seconds(self, work: Callable[[], Any]) -> float:
        synchronize = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        return time.perf_counter() - start


def words(key: Any, error: Exception) -> str:
    """What stands in the place of a peer's figure; an error of ours is raised."""
    if "ours" in (key, key[0]):
        raise error
    if isinstance(error, multiprocessing.TimeoutError):
        return "over a minute"
    print(f"bench.py: {key} fails: {error!r}", file=sys.stderr)
    return f"fails ({type(error).__name__})"


def figure(x: float | str, scale: float = 1.0) -> str:
    if isinstance(x, str):
        return x
    x *= scale
    return f"{x:,.0f}" if x >= 99.5 else f"{x:.1f}" if x >= 9.95 else f"{x:.2f}"


def table(title: str, rows: dict[str, Results], scale: float, ratio: str = "fastest peer / ours") -> str:
    """Results in Markdown; the last columns compare ours with the best of the peers, and with the limit."""
    names = list(dict.fromkeys(itertools.chain(*rows.values())))
    limited = ["ours / limit"] if "limit" in names else []
    lines = [[title, *names, ratio, *limited], ["---"] + ["---:"] * (len(names) + 1 + len(limited))]
    for label, results in rows.items():
        peers = {value: name for name, value in results.items() if isinstance(value, float) and name not in OURS}
        best = f"**{figure(min(peers) / results['ours'])}** ({peers[min(peers)]})" if peers else ""
        share = [f"**{figure(results['ours'] / results['limit'])}**" for _ in limited]
        lines.append([label, *(figure(results.get(name, ""), scale) for name in names), best, *share])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --- One layer: forward, forward and backward, memory -----------------------------------------------------------------


def layer_work(layer: nn.Module, x: Tensor, backward: bool) -> Callable[[], Any]:
    if not backward:
        return torch.no_grad()(lambda: layer(x))
    x, dy = x.clone().requires_grad_(), torch.randn_like(x)

    def forward_and_backward() -> None:
        for tensor in (x, *layer.parameters()):
            tensor.grad = None
        layer(x).backward(dy)

    return forward_and_backward


def products(layer: nn.Module, l: int, backward: bool) -> Callable[[], Any]:
    """The matrix products of our layer alone, which every implementation needs."""
    weights = [m.weight.detach().clone().requires_grad_(backward) for m in layer.modules() if isinstance(m, nn.Linear)]
    inputs = [w.new_empty(1, l, w.shape[1]).normal_().requires_grad_(backward) for w in weights]
    gradients = [w.new_empty(1, l, w.shape[0]).normal_() for w in weights]

    def run() -> None:
        for tensor in (*weights, *inputs):
            tensor.grad = None
        results = [F.linear(x, w) for x, w in zip(inputs, weights, strict=True)]
        if backward:
            torch.autograd.backward(results, gradients)

    return run


def layers(bench: Bench, backward: bool) -> str:
    """One layer at several lengths; on a GPU in bfloat16 as well, and with the kernels that our forward launches."""
    cuda, parts = bench.device.type == "cuda", [f"## One layer, forward{' and backward' * backward}: ms"]
    for family, dtype in itertools.product(FAMILIES.values(), list(DTYPES)[: 1 + cuda]):
        ours, theirs = family.build("Mixer").to(bench.device, DTYPES[dtype]).train(backward), {}
        for peer in family.peers:
            theirs[peer.name] = peer.layer().to(bench.device, DTYPES[dtype]).train(backward)
            theirs[peer.name].load_state_dict(ours.state_dict())
        rows, slow = {}, {}
        for l in [256] if bench.quick else [512, 2048, 8192]:
            x = torch.randn(1, l, D_MODEL, device=bench.device, dtype=DTYPES[dtype])
            works = {"limit": products(ours, l, backward), "ours": layer_work(ours, x, backward)}
            works |= {name: layer_work(theirs[name], x, backward) for name in theirs if name not in slow}
            results = rows[str(l)] = bench.measure(works) | slow
            expected = {name: 16 * t for name, t in results.items() if isinstance(t, float)}  # at the next l
            slow |= {name: "over a minute" for name, t in expected.items() if name in theirs and t > LIMIT}
            if cuda and not backward:
                results["kernels, ours"] = kernels(works["ours"])
        parts.append(table(f"{family.title}, {dtype}, l", rows, 1e3))
        if theirs and not backward:
            parts.append(compare(ours, theirs, x[:, :256]))
    return "\n\n".join(parts)


def kernels(work: Callable[[], Any]) -> str:
    """How many kernels a work launches on a GPU."""
    with torch.profiler.profile() as profile:
        work()
        torch.cuda.synchronize()
    return str(sum(event.count for event in profile.key_averages() if "LaunchKernel" in event.key))


@torch.no_grad()
def compare(ours: nn.Module, theirs: dict[str, nn.Module], x: Tensor) -> str:
    """How far the results of the peers' layers are from ours, relative to the largest value."""
    y, distances = ours(x), []
    for name, layer in theirs.items():
        try:
            distances.append(f"{name} {((layer(x) - y).abs().max() / y.abs().max()).item():.0e}")
        except Exception as error:
            distances.append(f"{name} {words(name, error)}")
    return f"Distance of the results from ours: {'; '.join(distances)}."


def memory(bench: Bench) -> str:
    """Peak extra memory of forward and backward through one layer."""
    l, parts = 256 if bench.quick else 2048, ["## One layer, forward and backward: peak extra memory, MB"]
    if bench.device.type == "cpu" and not Path("/proc/self/clear_refs").exists():
        return f"{parts[0]}\n\nLeft out: it is read from Linux's /proc."
    for family in FAMILIES.values():
        results = {}
        for name in ("ours", *(peer.name for peer in family.peers)):
            try:
                if bench.device.type == "cuda":
                    results[name] = peak(family.name, name, l, "cuda")
                else:
                    results[name] = in_a_fresh_process(peak, family.name, name, l)
            except Exception as error:
                results[name] = words(name, error)
        parts.append(table(f"{family.title}, float32, l", {str(l): results}, 1e-6, "least of a peer / ours"))
    return "\n\n".join(parts)


def in_a_fresh_process(function: Callable[..., float], *args: Any, limit: float = LIMIT + 30) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as process:
        return process.apply_async(function, args).get(limit)


def peak(family: str, name: str, l: int, device: str = "cpu") -> float:
    """Bytes that training one layer takes beyond what was there before; on a CPU, call it in a fresh process."""
    makers = {peer.name: peer.layer for peer in FAMILIES[family].peers}
    layer = (makers[name]() if name != "ours" else FAMILIES[family].build("Mixer")).to(device)
    layer_work(layer, torch.randn(1, 64, D_MODEL, device=device), True)()  # warms up
    work = layer_work(layer, torch.randn(1, l, D_MODEL, device=device), True)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return float(torch.cuda.max_memory_allocated() - before)
    ctypes.CDLL(None).malloc_trim(0)  # give back what the warm-up freed, so that none of it is used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew; ru_maxrss would start from the parent's
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def status(name: str) -> float:
    """Bytes that Linux counts for this process: VmRSS those it has, VmHWM the most it had."""
    return 1024.0 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


# --- Models: generated tokens, long prompts ---------------------------------------------------------------------------


def their_model(peer: Peer, ours: nn.Module) -> nn.Module:
    """transformers' model with our weights."""
    config = peer.config(num_hidden_layers=ours.config.n_layer, vocab_size=ours.config.padded_vocab_size)
    model, weight = transformers.AutoModelForCausalLM.from_config(config), next(ours.parameters())
    model.load_state_dict(ours.state_dict(), strict=False)  # lm_head is tied to the embedding
    model.generation_config.update(eos_token_id=None, pad_token_id=0)  # all of the tokens that are asked for
    return model.to(weight.device, weight.dtype).eval()


def greedy(model: nn.Module, ids: Tensor, n: int) -> Tensor:
    return model.generate(ids, max_new_tokens=n, temperature=0)


def their_greedy(model: nn.Module, ids: Tensor, n: int) -> Tensor:
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False)


def compiled_greedy(family: Family, model: nn.Module) -> Callable[[Tensor, int], Tensor]:
    """`greedy` with the step of a token compiled."""
    torch.compiler.reset()
    cuda = next(model.parameters()).is_cuda
    advance = torch.compile(model.advance, fullgraph=True, dynamic=False, mode="reduce-overhead" if cuda else None)

    @torch.no_grad()
    def generate(ids: Tensor, n: int) -> Tensor:
        cache, tokens = family.get("InferenceParams")(), [ids]
        logits = model(ids, cache, num_last_tokens=1)[:, -1]
        states = cache.key_value_memory_dict
        for _ in range(n - 1):
            tokens.append(logits.argmax(-1, keepdim=True))
            if cuda:  # the next replay of the graph writes over what this one has returned
                states = {i: tuple(tensor.clone() for tensor in state) for i, state in states.items()}
            logits, states = advance(tokens[-1][:, 0], states)
        return torch.cat([*tokens, logits.argmax(-1, keepdim=True)], dim=1)

    return generate


def training_memory(bench: Bench) -> str:
    """Peak memory of a process that trains a 130M model, with and without gradient checkpointing."""
    l, n_layer = (64, 2) if bench.quick else (2048, 24)
    part, rows = f"## Training 130M parameters, {n_layer} layers, AdamW, float32, batch 1, l {l}: peak memory, GB", {}
    if bench.device.type == "cpu" and not Path("/proc/self/clear_refs").exists():
        return f"{part}\n\nLeft out: it is read from Linux's /proc."
    for family, way in itertools.product(FAMILIES.values(), ("", ", checkpointing")):
        rows[family.title + way] = results = {}
        for name in ("ours", *[peer.name for peer in family.peers if peer.config][:2]):
            args = (family.name, name, bool(way), l, n_layer, bench.device.type)
            try:
                results[name] = in_a_fresh_process(trained, *args, limit=10 * LIMIT)
            except Exception as error:
                results[name] = words(name, error)
    return f"{part}\n\n{table('model', rows, 1e-9, 'least of a peer / ours')}"


def trained(family: str, name: str, checkpointing: bool, l: int, n_layer: int, device: str) -> float:
    """Bytes that two steps of training take in all; on a CPU, call it in a fresh process, which may take 20 GB."""
    if device == "cpu":
        resource.setrlimit(resource.RLIMIT_AS, (20 * 10**9, 20 * 10**9))
    torch.cuda.reset_peak_memory_stats() if device == "cuda" else None
    ours = FAMILIES[family].build("ForCausalLM", n_layer=n_layer).to(device)
    peers = {peer.name: peer for peer in FAMILIES[family].peers}
    model, options = (ours, {"loss_only": True}) if name == "ours" else (their_model(peers[name], ours), {})
    del ours
    if checkpointing:
        model.gradient_checkpointing_enable()
    optimizer, ids = torch.optim.AdamW(model.train().parameters()), torch.randint(50277, (1, l), device=device)
    for _ in range(2):  # the first makes the optimizer's state
        model(ids, labels=ids, **options)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(torch.cuda.max_memory_allocated()) if device == "cuda" else status("VmHWM")


def bandwidth(bench: Bench) -> float:
    """Bytes per second at which 512 MB are read: by a sum, or by a product with a vector if that is faster."""
    data, vector = torch.ones(2**15, 2**12, device=bench.device), torch.ones(2**12, device=bench.device)
    return data.nbytes / min(bench.measure({"sum": data.sum, "product": lambda: data @ vector}).values())


def decoding(bench: Bench) -> str:
    """Tokens of the 130M models, in float32 and bfloat16."""
    speed, rows, n_layer = bandwidth(bench), {}, 4 if bench.quick else 24
    ids = torch.zeros(1, 1, dtype=torch.long, device=bench.device)
    for family, dtype in itertools.product(FAMILIES.values(), DTYPES):
        ours = family.build("ForCausalLM", n_layer=n_layer).to(bench.device, DTYPES[dtype]).eval()
        fast, works = compiled_greedy(family, ours), {"ours": functools.partial(greedy, ours, ids, TOKENS)}
        limit = TOKENS * sum(parameter.nbytes for parameter in ours.parameters()) / speed
        results = {"limit": limit, "ours": 0.0, "ours, compiled": ""}
        try:
            fast(ids, 3)  # before the turns, where the time of compiling would count
            works["ours, compiled"] = functools.partial(fast, ids, TOKENS)
        except Exception as error:  # no C++ compiler, say
            results["ours, compiled"] = words("ours, compiled", error)
        for peer in [peer for peer in family.peers if peer.config][:1]:
            works["transformers"] = functools.partial(their_greedy, their_model(peer, ours), ids, TOKENS)
        rows[f"{family.title}, {dtype}"] = results | bench.measure(works)
    return f"## 130M models, {n_layer} layers: ms for a generated token\n\n{table('weights', rows, 1e3 / TOKENS)}"


def prefill(bench: Bench) -> str:
    """Time for each token of a prompt, from short ones to long ones, in two layers with a vocabulary of 256."""
    parts, lengths = ["## Prompts in two layers: microseconds for each token"], [2**10, 2**13, 2**15, 2**17]
    lengths = [2**8, 2**10, 2**12] if bench.quick else lengths
    ids = torch.randint(256, (1, lengths[-1]), device=bench.device)
    for family in FAMILIES.values():
        ours = family.build("ForCausalLM", n_layer=2, vocab_size=256).to(bench.device).eval()
        works = {("ours", l): functools.partial(greedy, ours, ids[:, :l], 1) for l in lengths}
        for peer in [peer for peer in family.peers if peer.config]:
            read = functools.partial(their_greedy, their_model(peer, ours))
            works |= {(peer.name, l): functools.partial(read, ids[:, :l], 1) for l in lengths[:2]}
        rows = {l: {} for l in lengths}
        for (name, l), t in bench.measure(works).items():
            rows[l][name] = t / l if isinstance(t, float) else t
        for results in rows.values():
            results["ours, to the first row"] = f"{results['ours'] / rows[lengths[0]]['ours']:.2f}"
        rows = {f"{l:,}": results for l, results in rows.items()}
        parts.append(table(f"{family.title}, float32, tokens", rows, 1e6))
    return "\n\n".join(parts)


# --- The page and the command line ------------------------------------------------------------------------------------

SECTIONS = {"forward": functools.partial(layers, backward=False), "training": functools.partial(layers, backward=True)}
SECTIONS |= {"memory": memory, "training-memory": training_memory, "decoding": decoding, "prefill": prefill}
HOW_TO_READ = f"""\
Compare the ratios. The times belong to this machine and this hour. The works of a table took turns in one process; a
figure is the median of up to {RUNS} runs (with --quick, 2), as many as fit into {BUDGET:.0f} seconds, after one that
warmed up. More than {SLOW:.0f} seconds is a single run. What is expected to take over a minute is left out. Layers have
d_model {D_MODEL}, batch 1 and the same weights everywhere.

- **limit**, for a layer: its matrix products (in_proj, x_proj, dt_proj, out_proj) as F.linear, and their backward where
  the table has one; those inside the scan or SSD do not count. For a generated token: the bytes of the weights over the
  bandwidth at which 512 MB are read, the best of a sum and a product with a vector.
- **fastest peer / ours** above 1: ours is faster. **ours / limit** of 1 can't be beaten.
- **transformers** runs its plain PyTorch path; Mamba-1 has a second one with use_mambapy. **q** is the chunk size of
  SSD. **minimamba** computes another function: it adds the bias of dt twice and gates without SiLU.
- **ours, compiled**: each token by `torch.compile(model.advance, fullgraph=True)`; **ours** is `generate`.
- **training**: the memory of the whole process (20 GB at most) after two steps, with blocks recomputed or not.
- **kernels, ours**: how many one forward of our layer launches on the GPU.
"""


def describe(device: str, command: str) -> str:
    """The top of the page: machine, versions, command."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    machine = f"{(names or [platform.machine()])[0]}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if device == "cuda":
        machine = f"{torch.cuda.get_device_name()}; {machine}"
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    for name in ("transformers", "mambapy", "minimamba"):
        found = importlib.util.find_spec(name)
        versions.append(f"{name} {importlib.metadata.version(name) if found else 'not installed, left out'}")
    lines = [f"- machine: {machine}", f"- versions: {', '.join(versions)}", f"- command: `{command}`"]
    return "\n".join(["# Results of benchmarks/bench.py", "", *lines, "", HOW_TO_READ])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"bench.py: error: {message}\n")  # one line, without the usage
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="small sizes and few runs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, help="file for the results")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no such device here")
    if options.output is None and not (options.quick or options.only):
        options.output = Path(__file__).parent / ("RESULTS.md" if options.device == "cpu" else "RESULTS-cuda.md")
    if options.output and not options.output.absolute().parent.is_dir():
        parser.error(f"--output must be in a directory that is there, got {options.output}")
    bench = Bench(torch.device(options.device), options.quick)
    command = " ".join(["python benchmarks/bench.py", *(sys.argv[1:] if argv is None else argv)])
    page = [describe(options.device, command)]
    print(page[0], flush=True)
    for section in [SECTIONS[name] for name in SECTIONS if name in (options.only or SECTIONS)]:
        page.append(section(bench) + "\n")
        print(page[-1], flush=True)
    if options.output:
        options.output.write_text("\n".join(page))
    return 0


if __name__ == "__main__":
    sys.exit(main())
