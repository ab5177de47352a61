"""Train a two-layer Mamba or Mamba-2 on induction heads at length 256, and test it at lengths up to a million tokens.

    python examples/induction_heads.py --out runs/induction                         # train, store, test
    python examples/induction_heads.py --out runs/induction --model mamba2
    python examples/induction_heads.py --out runs/induction --resume                # continue after an interruption
    python examples/induction_heads.py --evaluate pretrained/induction-heads-mamba  # only test: table and plot

The task is that of the Mamba paper's section 4.1.2 and Table 2. A sequence consists of 15 ordinary symbols, drawn
uniformly, and of one special symbol, which comes twice: somewhere in the sequence, and as its last token. The model
must answer with the symbol that followed the special one the first time, and the loss counts that answer alone. As in
the paper: 2 layers of width 64 (Mamba: state 16), Adam without weight decay, learning rate 1e-3, batches of 8, length
256. Not as there:
- The steps are few, and the learning rate falls in the second half of them.
- A batch is of length 16, 32, 64, 128 or 256, drawn at random: learning starts sooner, and a step costs less.
- dt starts between 1e-12 and 1e-10, not 1e-3 and 1e-1: a state then lasts for millions of steps unless the input says
  otherwise. The gradients of so small a dt are small too, hence Adam's eps of 1e-14.
- Every --eval-every steps the model is tested at length 2^16. The weights with the smallest loss there are kept.

Sequences are made and read piece by piece, so the test takes the same memory at any length.
Shapes: b batch, l sequence length, v vocabulary (16).
"""

import argparse
import json
import math
import os
import pickle
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where the model files are

import mamba
import mamba2

VOCABULARY = 16
SPECIAL = 15  # the ordinary symbols are 0 to 14
TRAIN_LENGTHS, VALIDATION_LENGTH, BATCH = (16, 32, 64, 128, 256), 2**16, 8
DT = {"dt_min": 1e-12, "dt_max": 1e-10, "dt_init_floor": 1e-12}  # steps this small let a state live for 10^7 of them
PIECE = 4096  # tokens, of all rows together, that are made and read at once
VALIDATION_SEED, TEST_SEED = 10**9 + 1, 10**9 + 2  # sequences that no training sees
FRESH = ("out", "resume", "evaluate", "max_length", "plot", "device")  # options that a resumed run takes anew

LanguageModel = mamba.MambaForCausalLM | mamba2.Mamba2ForCausalLM


def die(message: str) -> NoReturn:
    """Print one line and exit with status 2."""
    print("induction_heads.py: error:", *message.split(), file=sys.stderr)
    raise SystemExit(2)


def read_options() -> tuple[argparse.Namespace, dict]:
    """The options, and the state to resume from (empty for a new run)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = die  # one line, without the usage text
    add = parser.add_argument
    add("--out", type=Path, help="directory for the model and, while training, for training_state.pt")
    add("--resume", action="store_true", help="continue the run in --out with its options")
    add("--evaluate", type=Path, metavar="DIR", nargs="+", help="only test the checkpoints in these directories")
    add("--model", choices=("mamba", "mamba2"), default="mamba")
    add("--d-state", type=int, help="state size (default: mamba 16, mamba2 64)")
    add("--steps", type=int, default=6000)
    add("--lr", type=float, default=1e-3, help="falls linearly to 2%% of this in the second half")
    add("--eval-every", type=int, default=500, help="steps between evaluations")
    add("--seed", type=int, default=0)
    add("--max-length", type=int, default=2**20, help="longest sequence of the test")
    add("--plot", type=Path, help="file for accuracy against length (default: accuracy.png in --out)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, mps, ...")
    add("--threads", type=int, default=1, help="CPU threads; a seed gives the same model for the same number")
    args, state = parser.parse_args(), {}
    if not (args.out or args.evaluate):
        die("--out (or --evaluate) is required")
    if args.resume and not args.evaluate:
        state = load_state(args.out / "training_state.pt")
        vars(args).update(state["args"])
    for name in ("steps", "eval_every", "threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(args, name)}")
    if args.plot and args.plot.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"plot must end with .png, .pdf or .svg, got {args.plot}")
    if args.max_length < 64:
        raise ValueError(f"max_length must be at least 64, got {args.max_length}")
    return args, state


def sequences(b: int, l: int, piece: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """b random sequences of l tokens, in pieces of at most `piece`: ids (b, piece), and the answers (b,) every time."""
    place = torch.randint(l - 2, (b, 1), generator=generator)  # of the special symbol: any but the last two
    answers = torch.randint(SPECIAL, (b, 1), generator=generator)
    for start in range(0, l, piece):
        position = torch.arange(start, min(start + piece, l))
        ids = torch.randint(SPECIAL, (b, len(position)), generator=generator)
        ids = torch.where(position == place + 1, answers, ids)
        yield ids.masked_fill((position == place) | (position == l - 1), SPECIAL), answers[:, 0]


@torch.no_grad()
def test(model: LanguageModel, l: int, count: int, seed: int, rows: int = 32) -> tuple[float, float]:
    """Share of right answers and mean loss over `count` sequences of length l, `rows` at a time, piece by piece."""
    generator, device = torch.Generator().manual_seed(seed), next(model.parameters()).device
    right, loss = 0, 0.0
    for first in range(0, count, rows):
        b, cache = min(rows, count - first), mamba.InferenceParams()
        for ids, answers in sequences(b, l, PIECE // b, generator):  # noqa: B007
            logits = model(ids.to(device), cache, num_last_tokens=1)[:, 0].cpu()  # (b, v)
        right += (logits.argmax(-1) == answers).sum().item()
        loss += F.cross_entropy(logits, answers, reduction="sum").item()
    return right / count, loss / count


def build(args: argparse.Namespace) -> LanguageModel:
    d_state = {"mamba": 16, "mamba2": 64}[args.model] if args.d_state is None else args.d_state
    sizes = {"d_model": 64, "n_layer": 2, "vocab_size": VOCABULARY, "d_state": d_state, **DT}
    if args.model == "mamba":
        return mamba.MambaForCausalLM(mamba.MambaConfig(**sizes))
    return mamba2.Mamba2ForCausalLM(mamba2.Mamba2Config(**sizes, headdim=16, chunk_size=32))


def load(directory: Path) -> LanguageModel:
    """The stored model of either kind."""
    kind = json.loads((directory / "config.json").read_text()).get("model_type")
    model_class = mamba2.Mamba2ForCausalLM if kind == "mamba2" else mamba.MambaForCausalLM
    model = model_class.from_pretrained(str(directory), dtype=torch.float32)
    if model.config.vocab_size != VOCABULARY:
        raise ValueError(f"{directory} knows no induction heads: vocab_size is {model.config.vocab_size}, not 16")
    return model


def load_state(path: Path) -> dict:
    """What `save_state` wrote. Raises ValueError for a file that is cut off or something else."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, struct.error, pickle.UnpicklingError, RuntimeError):
        raise ValueError(f"{path} is not a whole training state: remove it to start anew") from None


def save_state(state: dict, args: argparse.Namespace) -> None:
    """Write what --resume needs, beside the old file and then in its place, so that one whole file is always there."""
    kept = {name: value for name, value in vars(args).items() if name not in FRESH}
    torch.save(state | {"args": kept}, args.out / "training_state.tmp")
    os.replace(args.out / "training_state.tmp", args.out / "training_state.pt")


def train(model: LanguageModel, args: argparse.Namespace, state: dict) -> dict:
    """Train, from state unless it is empty; return the weights with the smallest loss on long sequences."""
    device, n_parameters = next(model.parameters()).device, sum(p.numel() for p in model.parameters())
    print(f"{args.model}, {n_parameters:,} parameters, {device}, seed {args.seed}")
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.Adam(model.parameters(), args.lr, eps=1e-14, fused=True)
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        print(*state["log"], sep="\n")
    else:
        state = {"step": 0, "log": [], "seconds": 0.0, "best_loss": math.inf}

    start, losses = time.time() - state["seconds"], []
    bar = tqdm(range(state["step"], args.steps), initial=state["step"], total=args.steps, unit="step", disable=None)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, max(0.02, 2 * (1 - step / args.steps)))
        l = TRAIN_LENGTHS[torch.randint(len(TRAIN_LENGTHS), (), generator=generator)]
        ids, answers = next(sequences(BATCH, l, l, generator))  # (b, l), (b,)
        logits = model(ids.to(device), num_last_tokens=1)[:, 0]  # (b, v)
        loss = F.cross_entropy(logits, answers.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if (step + 1) % args.eval_every and step + 1 < args.steps:
            continue

        train_loss = torch.stack(losses).mean().item()
        losses.clear()
        if not math.isfinite(train_loss):
            die(f"the loss is not finite at step {step + 1}: try a lower --lr")
        near, _ = test(model, TRAIN_LENGTHS[-1], 256, VALIDATION_SEED)
        line = f"step {step + 1}: train {train_loss:.4f}, right at length {TRAIN_LENGTHS[-1]} {near:.1%}"
        far_loss = math.inf
        if near > 0.9:  # else long sequences tell nothing
            far, far_loss = test(model, VALIDATION_LENGTH, 16, VALIDATION_SEED)
            line += f", at {VALIDATION_LENGTH} {far:.1%} (loss {far_loss:.2e})"
        state |= {"step": step + 1, "seconds": time.time() - start}
        state["log"].append(f"{line}, {state['seconds']:.0f} s")
        tqdm.write(state["log"][-1])
        if far_loss <= state["best_loss"]:
            state |= {"best_loss": far_loss, "best": {name: p.clone() for name, p in model.state_dict().items()}}
        parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "generator": generator.get_state()}
        save_state(state | parts, args)
    return state["best"]


def peak_memory() -> float:
    """The most memory, in MB, that this process has held so far (nan on systems without /proc)."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1000 for line in lines if line.startswith("VmHWM")), math.nan)


def evaluate(name: str, model: LanguageModel, max_length: int) -> dict[int, float]:
    """Print the share of right answers at lengths 2^6, 2^7, ..., max_length, and return it."""
    print(f"{name}\n   length  sequences    right  seconds  peak MB so far")
    result, l = {}, 2**6
    while l <= max_length:
        count, start = 256 if l <= 2**16 else 32, time.time()
        result[l], _ = test(model, l, count, TEST_SEED)
        print(f"{l:9,}  {count:9}  {result[l]:7.2%}  {time.time() - start:7.1f}  {peak_memory():14.0f}")
        l *= 2
    return result


def plot(results: dict[str, dict[int, float]], path: Path) -> None:
    """Accuracy against length, one line a model."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no plot: it needs matplotlib (pip install matplotlib)")
        return
    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    for name, result in results.items():
        axes.plot(result.keys(), [100 * right for right in result.values()], "o-", label=name)
    axes.axvline(TRAIN_LENGTHS[-1], color="gray", linestyle="--", label="longest in training")
    axes.axhline(100 / SPECIAL, color="gray", linestyle=":", label="guessing")
    axes.set(xlabel="sequence length", ylabel="right answers, %", title="Induction heads", ylim=(0, 105))
    axes.set_xscale("log", base=2)
    axes.legend(loc="center right")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}")
    figure.savefig(beside, dpi=120, format=path.suffix.removeprefix("."))
    os.replace(beside, path)
    print(f"plot in {path}")


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)  # a log in a file can be read at once too
    try:
        args, state = read_options()
        torch.set_num_threads(args.threads)
        torch.manual_seed(args.seed)
        models = {str(path): load(path).to(args.device) for path in args.evaluate or ()}
        if args.plot:
            args.plot.parent.mkdir(parents=True, exist_ok=True)
        if not models:
            model = build(args).to(args.device)
            args.out.mkdir(parents=True, exist_ok=True)
            if not state and (args.out / "training_state.pt").exists():
                raise ValueError(f"{args.out} holds an unfinished run: add --resume, or remove its training_state.pt")
    except (OSError, ValueError, RuntimeError, AssertionError) as error:  # the last from a torch without CUDA
        die(str(error))
    if not models:
        model.load_state_dict(train(model, args, state))
        model.save_pretrained(str(args.out))
        print(f"stored in {args.out}")
        (args.out / "training_state.pt").unlink()
        models = {str(args.out): load(args.out).to(args.device)}
    results = {name: evaluate(name, model, args.max_length) for name, model in models.items()}
    if path := args.plot or (args.out and args.out / "accuracy.png"):
        plot(results, path)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print(
            "induction_heads.py: stopped; --resume continues from the last evaluation, if there was one",
            file=sys.stderr,
        )
        raise SystemExit(130) from None
