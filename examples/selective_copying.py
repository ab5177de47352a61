"""Train Mamba on selective copying, with its selection and without: the point of the Mamba paper's section 4.1.1.

    python examples/selective_copying.py --out runs/copying               # six runs: both layers, three learning rates
    python examples/selective_copying.py --out runs/copying --resume      # continue after an interruption
    python examples/selective_copying.py --out runs/copying --layer selective --lr 3e-3      # one of the runs
    python examples/selective_copying.py --out runs/copying4k --length 4096 --device cuda    # the paper's length

16 tokens, drawn from 15 symbols, are scattered at random places of a sequence that is noise otherwise; 16 markers
follow, and at them the model must answer with the tokens in their order. A convolution can't: it doesn't know where the
tokens are. Two models are compared, both of 2 layers of width --d-model and --d-inner channels, with the same short
convolution and gate:

    selective    Mamba's: step size dt, B and C are functions of the input
    invariant    dt, B and C are learned constants, each channel has its own: a time-invariant layer like S4 (S4D-Real)

Training: Adam without weight decay, fresh sequences in every batch. There is no noise at first; the sequences grow from
16 tokens to --length over the first half of the steps (by the same factor every step), because learning starts much
sooner that way. The learning rate falls linearly over the second half. Both layers get the same steps. Each run leaves
its curve in --out as a .json file, and the table and the plot show all curves that are there: runs can be shared among
processes.
Shapes: b batch, l sequence length (with the markers), v vocabulary, e channels, n state size.
"""

import argparse
import json
import math
import os
import pickle
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where mamba.py is

from mamba import MambaConfig, MambaForCausalLM, MambaMixer

MEMORIZED = 16  # tokens to remember, and markers
NOISE, MARKER, VOCABULARY = 15, 16, 17  # the symbols to remember are 0 to 14
VALIDATION_SEED = 10**9 + 1  # sequences that no training sees
LAYERS = ("selective", "invariant")
OPTIONS = ("length", "d_model", "d_inner", "steps", "batch_size", "seed")  # the same for all runs of a table
FRESH = ("out", "resume", "device", "threads", "layer", "lr")  # options that a resumed run takes anew


def die(message: str) -> NoReturn:
    """Print one line and exit with status 2."""
    print("selective_copying.py: error:", *message.split(), file=sys.stderr)
    raise SystemExit(2)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = die  # one line, without the usage text
    add = parser.add_argument
    add("--out", required=True, type=Path, help="directory for the curves, the plot and, while training, the states")
    add("--resume", action="store_true", help="continue the runs in --out, with their options")
    add("--layer", choices=LAYERS, nargs="+", default=LAYERS)
    add("--lr", type=float, nargs="+", default=(1e-3, 3e-3, 5e-3), help="learning rates, one run each")
    add("--length", type=int, default=256, help="tokens before the markers")
    add("--d-model", type=int, default=64, help="width of both models")
    add("--d-inner", type=int, help="channels inside their layers; twice the width if not given")
    add("--steps", type=int, default=9000, help="steps of each run")
    add("--batch-size", type=int, default=16)
    add("--eval-every", type=int, default=250, help="steps between evaluations")
    add("--seed", type=int, default=0)
    add("--device", default="cpu", help="cpu, cuda, cuda:1, mps, ...")
    add("--threads", type=int, default=1, help="CPU threads; a seed gives the same curves for the same number")
    args = parser.parse_args()
    for name in ("d_model", "d_inner", "steps", "batch_size", "eval_every", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(args, name)}")
    if args.length < MEMORIZED:
        raise ValueError(f"length must be at least {MEMORIZED}, got {args.length}")
    return args


def sequences(b: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """ids (b, length + 16) that end with the markers, and the answers (b, 16) that belong there."""
    answers = torch.randint(NOISE, (b, MEMORIZED), generator=generator)
    places = torch.rand(b, length, generator=generator).topk(MEMORIZED).indices.sort().values  # (b, 16), ascending
    ids = torch.full((b, length), NOISE).scatter(1, places, answers)
    return F.pad(ids, (0, MEMORIZED), value=MARKER), answers


class InvariantMixer(MambaMixer):
    """Mamba's layer without selection: dt, B and C are the same at every step, so the scan is a convolution.

    Its kernel is K_t = sum over n of C_n exp(dt A_n t) dt (B_n would only multiply C_n), long as the sequence.
    """

    def __init__(self, config: MambaConfig) -> None:
        super().__init__(config)
        self.dt_bias = nn.Parameter(self.dt_proj.bias.detach().clone())  # (e,), Mamba's initial step sizes
        self.C = nn.Parameter(torch.randn(config.d_inner, config.d_state))
        del self.x_proj, self.dt_proj

    def forward(self, x: Tensor, *state_lengths_seq_idx: None) -> Tensor:
        l = x.shape[1]
        u, z = self.in_proj(x).chunk(2, dim=-1)  # (b, l, e) each
        u = F.silu(self.conv1d(u))
        dt = F.softplus(self.dt_bias)  # (e,)
        decay = dt[:, None] * -torch.exp(self.A_log)  # (e, n)
        steps = torch.arange(l, device=x.device)[:, None, None]
        kernel = (torch.exp(decay * steps) * self.C).sum(-1) * dt  # (l, e)
        # transposed, because a transform along the last dimension reads memory in order
        spectrum = torch.fft.rfft(u.mT.contiguous(), 2 * l) * torch.fft.rfft(kernel.mT.contiguous(), 2 * l)
        y = torch.fft.irfft(spectrum, 2 * l)[..., :l].mT + u * self.D
        return self.out_proj(y * F.silu(z))


def build(layer: str, d_model: int = 64, d_inner: int | None = None) -> MambaForCausalLM:
    config = MambaConfig(d_model=d_model, d_inner=d_inner, n_layer=2, d_state=16, vocab_size=VOCABULARY)
    model = MambaForCausalLM(config)
    if layer == "invariant":
        for block in model.backbone.layers:
            block.mixer = InvariantMixer(config)
            block.mixer.out_proj.weight.data.div_(math.sqrt(config.n_layer))  # as the encoder does with its own
    return model


def answer(model: MambaForCausalLM, ids: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """The mean loss at the markers, and the share of the tokens that are right."""
    answers = answers.to(device := next(model.parameters()).device)
    logits = model(ids.to(device), num_last_tokens=MEMORIZED)  # (b, 16, v)
    return F.cross_entropy(logits.mT, answers), (logits.argmax(-1) == answers).float().mean()


@torch.no_grad()
def evaluate(model: MambaForCausalLM, length: int) -> float:
    """The share of the tokens that are right in 256 sequences of the full length."""
    generator = torch.Generator().manual_seed(VALIDATION_SEED)
    return sum(answer(model, *sequences(32, length, generator))[1].item() for _ in range(8)) / 8


def length_at(step: int, args: argparse.Namespace) -> int:
    """From 16 to args.length over the first half of the steps, by the same factor every step."""
    return round(MEMORIZED * (args.length / MEMORIZED) ** min(1, 2 * step / args.steps))


def learning_rate(step: int, lr: float, steps: int) -> float:
    """100 steps of linear warmup, constant until half of the steps, then falling linearly to 2%."""
    return lr * min(1, (step + 1) / 100, max(0.02, 2 * (1 - step / steps)))


def write(path: Path, save: Callable[[Path], Any]) -> None:
    """Call save with a path beside the given one and then move the file there: it is there whole or not at all."""
    save(path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def save_state(state: dict, path: Path) -> None:
    write(path, lambda beside: torch.save(state, beside))


def load_state(path: Path) -> dict:
    """What `save_state` wrote. Raises ValueError for a file that is cut off or something else."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, struct.error, pickle.UnpicklingError, RuntimeError):
        raise ValueError(f"{path} is not a whole training state: remove it to start anew") from None


def check_earlier_runs(args: argparse.Namespace) -> None:
    """Raise ValueError unless all runs of one directory have the same options; with --resume, take them from there."""
    for run in read_curves(args.out):
        options = {name: run[name] for name in OPTIONS if name in run}
        others = [f"{name} {value}" for name, value in options.items() if value != getattr(args, name)]
        if others and not args.resume:
            raise ValueError(f"{args.out} holds a run with {', '.join(others)}: choose another --out, or remove it")
        vars(args).update(options)
    for path in (args.out / f"{layer}-{lr:g}.pt" for layer in args.layer for lr in args.lr):
        if path.exists() and not args.resume:
            raise ValueError(f"{path} is of an unfinished run: add --resume, or remove it")


def train(layer: str, lr: float, args: argparse.Namespace) -> None:
    """One run; its curve goes to LAYER-LR.json in args.out, and what --resume needs to LAYER-LR.pt until it ends."""
    curve_path = args.out / f"{layer}-{lr:g}.json"
    state_path, state = curve_path.with_suffix(".pt"), {"step": 0, "curve": [], "seconds": 0.0}
    if curve_path.exists():
        print(f"{layer}, learning rate {lr:g}: done before")
        return
    if state_path.exists():
        state = load_state(state_path)
        args = argparse.Namespace(**vars(args) | state["args"])
    torch.manual_seed(args.seed)
    model = build(layer, args.d_model, args.d_inner).to(args.device)
    generator = torch.Generator().manual_seed(args.seed)
    print(f"{layer}, learning rate {lr:g}, {sum(p.numel() for p in model.parameters()):,} parameters, {args.device}")
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    if state["step"]:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])

    start, losses = time.time() - state["seconds"], []
    bar = tqdm(range(state["step"], args.steps), initial=state["step"], total=args.steps, unit="step", disable=None)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, lr, args.steps)
        loss, _ = answer(model, *sequences(args.batch_size, length_at(step, args), generator))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if (step + 1) % args.eval_every and step + 1 < args.steps:
            continue

        train_loss, right = torch.stack(losses).mean().item(), evaluate(model, args.length)
        losses.clear()
        if not math.isfinite(train_loss):
            die(f"the loss is not finite at step {step + 1}: try a lower --lr")
        state |= {"step": step + 1, "seconds": time.time() - start}
        state["curve"].append([step + 1, length_at(step, args), train_loss, right])
        tqdm.write(
            f"step {step + 1}: length {length_at(step, args)}, train {train_loss:.4f}, "
            f"right at length {args.length} {right:.1%}, {state['seconds']:.0f} s"
        )
        state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "generator": generator.get_state()}
        state["args"] = {name: value for name, value in vars(args).items() if name not in FRESH}
        save_state(state, state_path)
    result = {"layer": layer, "lr": lr, "seconds": state["seconds"], "curve": state["curve"], **state["args"]}
    write(curve_path, lambda beside: beside.write_text(json.dumps(result) + "\n"))
    state_path.unlink()


def read_curves(directory: Path) -> list[dict]:
    """All finished runs in a directory, selective ones first, the best first."""
    runs = [json.loads(path.read_text()) for layer in LAYERS for path in directory.glob(f"{layer}-*.json")]
    return sorted(runs, key=lambda run: (LAYERS.index(run["layer"]), -run["curve"][-1][-1], run["lr"]))


def print_table(runs: list[dict]) -> None:
    print("layer      learning rate   steps  right  after 3/4 of them  seconds")
    for run in runs:
        *_, right = run["curve"][-1]
        before = next(right for step, _, _, right in run["curve"] if step >= 0.75 * run["curve"][-1][0])
        start = f"{run['layer']:9}  {run['lr']:13g}  {run['steps']:6}"
        print(f"{start}  {right:5.1%}  {before:17.1%}  {run['seconds']:7.0f}")


def plot(runs: list[dict], path: Path) -> None:
    """Accuracy at the full length against steps, one line a run, the best of each layer drawn strongly."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no plot: it needs matplotlib (pip install matplotlib)")
        return
    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    seen = set()
    for run in runs:
        steps, _, _, right = zip(*run["curve"], strict=True)
        style = {"color": f"C{LAYERS.index(run['layer'])}", "alpha": 0.3 if run["layer"] in seen else 1}
        axes.plot(steps, [100 * share for share in right], label=f"{run['layer']}, {run['lr']:g}", **style)
        seen.add(run["layer"])
    axes.axhline(100 / NOISE, color="gray", linestyle=":", label="guessing")
    title = f"Selective copying, length {runs[0]['length']}"
    axes.set(xlabel="steps", ylabel="right tokens, %", title=title, ylim=(0, 105))
    axes.legend(loc="upper left", title="layer, learning rate", fontsize="small")
    write(path, lambda beside: figure.savefig(beside, dpi=120, format="png"))
    print(f"plot in {path}")


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)  # a log in a file can be read at once too
    try:
        args = read_options()
        torch.set_num_threads(args.threads)
        args.out.mkdir(parents=True, exist_ok=True)
        check_earlier_runs(args)
        for layer in args.layer:
            for lr in args.lr:
                train(layer, lr, args)
        runs = read_curves(args.out)
        print_table(runs)
        plot(runs, args.out / "accuracy.png")
    except (OSError, ValueError, RuntimeError, AssertionError) as error:  # the last from a torch without CUDA
        die(str(error))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print(
            "selective_copying.py: stopped; --resume continues from the last evaluation, if there was one",
            file=sys.stderr,
        )
        raise SystemExit(130) from None
