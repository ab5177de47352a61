"""Train Mamba-2 and Mamba-3 to track a state: parity of a bit string, or a sum modulo 5. What the rotation is for.

    python examples/state_tracking.py --out runs/tracking                       # parity; table and plot
    python examples/state_tracking.py --out runs/tracking5 --modulus 5          # a running sum modulo 5

After a start symbol come digits 0 to m - 1, and at each the model must give the sum of all digits so far, modulo m. A
state that decays by a positive factor can't flip a sign with each 1; one that is rotated by half a turn can. Both have
--n-layer layers of width --d-model and nearly the same number of parameters. They train on fresh sequences of up to
--length digits, with each of three learning rates the same steps, and are tested on longer ones: the answers in their
last quarter are counted. The best learning rate is the one that is best at twice the training length.
Shapes: b batch, l sequence length, m the modulus.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where the model files are

from mamba2 import Mamba2Config, Mamba2ForCausalLM
from mamba3 import Mamba3Config, Mamba3ForCausalLM

MODELS = ("mamba2", "mamba3")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", required=True, type=Path, help="directory for the results and the plot")
    add("--model", choices=MODELS, nargs="+", default=MODELS)
    add("--lr", type=float, nargs="+", default=(1e-3, 3e-3, 5e-3), help="learning rates, one run each")
    add("--modulus", type=int, default=2)
    add("--length", type=int, default=40, help="the longest sequences in training")
    add("--steps", type=int, default=3000)
    add("--batch-size", type=int, default=64)
    add("--d-model", type=int, default=32)
    add("--n-layer", type=int, default=1)
    add("--d-state", type=int, default=16)
    add("--seed", type=int, default=0)
    add("--device", default="cpu")
    args = parser.parse_args()
    for name in ("modulus", "length", "steps", "batch_size", "d_model", "n_layer", "d_state"):
        if getattr(args, name) < (2 if name == "modulus" else 1):
            parser.error(f"--{name.replace('_', '-')} is too small: {getattr(args, name)}")
    return args


def sequences(b: int, l: int, m: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """ids (b, l + 1), the start symbol m and digits, and the running sums (b, l) that belong to the digits."""
    digits = torch.randint(m, (b, l), generator=generator)
    return F.pad(digits, (1, 0), value=m), digits.cumsum(1) % m


def new_model(name: str, args: argparse.Namespace) -> nn.Module:
    sizes = {"d_model": args.d_model, "n_layer": args.n_layer, "d_state": args.d_state, "headdim": 16, "expand": 2}
    sizes |= {"vocab_size": args.modulus + 1, "pad_vocab_size_multiple": 1, "tie_embeddings": False}
    if name == "mamba2":
        return Mamba2ForCausalLM(Mamba2Config(**sizes))
    return Mamba3ForCausalLM(Mamba3Config(rope_fraction=1.0, **sizes))


@torch.no_grad()
def accuracy(model: nn.Module, length: int, args: argparse.Namespace) -> float:
    """The share of right answers in the last quarter of 256 sequences of this length."""
    model.eval()
    ids, sums = sequences(256, length, args.modulus, torch.Generator().manual_seed(10**6 + length))
    answers = model(ids.to(args.device))[:, 1:, : args.modulus].argmax(-1).cpu()
    model.train()
    return (answers == sums)[:, -max(1, length // 4) :].float().mean().item()


def train(name: str, lr: float, args: argparse.Namespace) -> dict:
    """One run: its accuracy at 1 to 16 times the training length."""
    torch.manual_seed(args.seed)
    model, start = new_model(name, args).to(args.device), time.time()
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=args.steps, pct_start=0.1)
    bar = tqdm(range(args.steps), desc=f"{name}, {lr:g}", leave=False, disable=None)
    for step in bar:
        longest = 2 + int((args.length - 2) * min(1.0, 2 * step / args.steps))  # short ones first
        l = int(torch.randint(1, longest + 1, (), generator=generator))
        ids, sums = sequences(args.batch_size, l, args.modulus, generator)
        logits = model(ids.to(args.device))[:, 1:, : args.modulus]
        loss = F.cross_entropy(logits.flatten(0, 1), sums.to(args.device).flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    result = {"model": name, "lr": lr, "parameters": sum(p.numel() for p in model.parameters())}
    result |= {"accuracy": {args.length * k: accuracy(model, args.length * k, args) for k in (1, 2, 4, 8, 16)}}
    return result | {"seconds": time.time() - start}


def plot(best: list[dict], args: argparse.Namespace) -> None:
    """Accuracy against length, one line a model."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    for run in best:
        lengths, shares = zip(*run["accuracy"].items(), strict=True)
        axes.plot(lengths, [100 * share for share in shares], marker="o", label=f"{run['model']}, {run['lr']:g}")
    axes.axhline(100 / args.modulus, color="gray", linestyle=":", label="guessing")
    axes.axvline(args.length, color="gray", linewidth=0.8, linestyle="--")
    axes.set_xscale("log", base=2)
    axes.set_xticks([args.length * k for k in (1, 2, 4, 8, 16)], [args.length * k for k in (1, 2, 4, 8, 16)])
    axes.set(xlabel="digits (trained up to the dashed line)", ylabel="right answers, %", ylim=(0, 105))
    axes.set_title(f"Running sum modulo {args.modulus}")
    axes.legend(fontsize="small", title="model, learning rate", title_fontsize="small")
    figure.savefig(args.out / "accuracy.png", dpi=120)
    print(f"plot in {args.out / 'accuracy.png'}")


def main() -> None:
    args = read_options()
    args.out.mkdir(parents=True, exist_ok=True)
    runs = []
    for name in args.model:
        for lr in args.lr:
            runs.append(train(name, lr, args))
            (args.out / "results.json").write_text(json.dumps(runs, indent=2) + "\n")
            shares = "  ".join(f"{length}: {share:6.1%}" for length, share in runs[-1]["accuracy"].items())
            line = f"{name}, {runs[-1]['parameters']} parameters, learning rate {lr:g}, {runs[-1]['seconds']:.0f} s"
            print(f"{line}; right answers at length {shares}", flush=True)
    by_model = [[run for run in runs if run["model"] == name] for name in args.model]
    plot([max(group, key=lambda run: run["accuracy"][2 * args.length]) for group in by_model], args)


if __name__ == "__main__":
    main()
