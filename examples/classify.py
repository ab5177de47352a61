"""Classify sequences of vectors: handwritten digits, read row by row, with Mamba and with logistic regression.

    pip install -e ".[examples]"
    python examples/classify.py                       # or --model mamba2

The data are scikit-learn's digits: 1797 pictures of 8 x 8 pixels from 0 to 16 (E. Alpaydin, 1998). A picture is a
sequence of 8 vectors, its rows; a linear layer widens them to d_model and the classifier pools over the rows. In the
order of the file, the first 60% are for training, the next 20% for choosing (the best epoch, the strength of the
regularisation), and the last 20% are read once, for the table. Each picture in a training batch is moved by up to one
pixel; logistic regression is given the moved copies too, in a second row of the table.
Shapes: b batch.
"""

import argparse
import copy
import math
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where the model files are

from mamba import MambaConfig, MambaForSequenceClassification
from mamba2 import Mamba2Config, Mamba2ForSequenceClassification

Parts = list[tuple[Tensor, Tensor]]  # pictures (b, 8, 8) in [0, 1] and classes (b,) of training, validation, test
STRENGTHS = (0.01, 0.1, 1.0, 10.0)  # of logistic regression: the inverse of its weight decay


def die(message: str) -> NoReturn:
    """Print one line and exit with status 2."""
    print("classify.py: error:", *message.split(), file=sys.stderr)
    raise SystemExit(2)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = die  # one line, without the usage text
    add = parser.add_argument
    add("--model", choices=("mamba", "mamba2"), default="mamba")
    add("--d-model", type=int, default=64)
    add("--n-layer", type=int, default=2)
    add("--pooling-strategy", choices=("last", "mean", "max"), default="mean")
    add("--epochs", type=int, default=40)
    add("--batch-size", type=int, default=32)
    add("--lr", type=float, default=3e-3)
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    args = parser.parse_args()
    for name in ("d_model", "n_layer", "epochs", "batch_size"):
        if getattr(args, name) < 1:
            die(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    return args


def pick_device(name: str) -> torch.device:
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return torch.empty(0, device=best if name == "auto" else name).device


def read_digits() -> Parts:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pictures = torch.tensor(digits.images, dtype=torch.float32) / 16  # (1797, 8, 8)
    classes = torch.tensor(digits.target)
    sizes = [int(0.6 * len(classes)), int(0.8 * len(classes)) - int(0.6 * len(classes))]
    sizes.append(len(classes) - sum(sizes))
    return list(zip(pictures.split(sizes), classes.split(sizes), strict=True))


def moved(pictures: Tensor, down: int, right: int) -> Tensor:
    """The pictures (b, 8, 8), moved by -1, 0 or 1 pixels each way."""
    return F.pad(pictures, (1, 1, 1, 1))[:, 1 - down : 9 - down, 1 - right : 9 - right]


class RowClassifier(nn.Module):
    """Rows of pictures as vectors, and the classifier of mamba.py or mamba2.py on them."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        settings = {"d_model": args.d_model, "n_layer": args.n_layer, "vocab_size": None}  # no vocabulary: vectors
        settings |= {"num_labels": 10, "pooling_strategy": args.pooling_strategy}
        self.widen = nn.Linear(8, args.d_model)
        if args.model == "mamba":
            self.classifier = MambaForSequenceClassification(MambaConfig(**settings))
        else:
            config = Mamba2Config(**settings, d_state=16, headdim=math.gcd(2 * args.d_model, 32), chunk_size=8)
            self.classifier = Mamba2ForSequenceClassification(config)

    def forward(self, pictures: Tensor, labels: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """Logits (b, 10) for pictures (b, 8, 8); with labels (b,) a dict of "loss" and "logits"."""
        return self.classifier(self.widen(pictures), labels=labels)  # (b, 8, d_model) go in


@torch.inference_mode()
def accuracy(model: RowClassifier, pictures: Tensor, classes: Tensor) -> float:
    model.eval()
    device = model.widen.weight.device
    return (model(pictures.to(device)).argmax(-1).cpu() == classes).float().mean().item()


def train(model: RowClassifier, parts: Parts, args: argparse.Namespace) -> None:
    """Leave the model with the weights of the epoch that was best on the validation part."""
    (pictures, classes), validation, _ = parts
    device = model.widen.weight.device
    spared = {f"classifier.{name}" for name in model.classifier.no_weight_decay()}
    decayed = [p for name, p in model.named_parameters() if p.dim() >= 2 and name not in spared]
    others = [p for name, p in model.named_parameters() if p.dim() < 2 or name in spared]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr)
    steps = args.epochs * math.ceil(len(classes) / args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps + 1, pct_start=0.1)
    best, weights = -1.0, {}
    bar = tqdm(range(args.epochs), unit="epoch", disable=None)
    for _ in bar:
        model.train()
        for batch in torch.randperm(len(classes)).split(args.batch_size):
            down, right = torch.randint(-1, 2, (2,)).tolist()
            x, y = moved(pictures[batch], down, right).to(device), classes[batch].to(device)
            loss = model(x, labels=y)["loss"]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if not math.isfinite(loss.item()):
            die("the loss is not finite: try a lower --lr")
        score = accuracy(model, *validation)
        bar.set_postfix(loss=f"{loss.item():.3f}", validation=f"{score:.1%}", refresh=False)
        if score > best:
            best, weights = score, copy.deepcopy(model.state_dict())
    model.load_state_dict(weights)


def logistic_regression(parts: Parts, with_moved: bool) -> tuple[float, float]:
    """Accuracy on the validation and the test part, with the strength that is best on the former."""
    from sklearn.linear_model import LogisticRegression

    (pictures, classes), (val_pictures, val_classes), (test_pictures, test_classes) = parts
    moves = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)] if with_moved else [(0, 0)]
    pixels = torch.cat([moved(pictures, *move).flatten(1) for move in moves]).numpy()  # (b, 64)
    targets = classes.repeat(len(moves)).numpy()
    fits = [LogisticRegression(C=strength, max_iter=2000).fit(pixels, targets) for strength in STRENGTHS]
    scores = [fit.score(val_pictures.flatten(1).numpy(), val_classes.numpy()) for fit in fits]
    best = fits[scores.index(max(scores))]
    return max(scores), best.score(test_pictures.flatten(1).numpy(), test_classes.numpy())


def main() -> None:
    args = read_options()
    try:
        parts = read_digits()
        torch.manual_seed(args.seed)
        model = RowClassifier(args).to(pick_device(args.device))
        parameters, start = sum(p.numel() for p in model.parameters()), time.time()
        counts = ", ".join(str(len(classes)) for _, classes in parts)
        print(f"digits (training, validation, test: {counts}); {args.model}, {parameters:,} parameters")
        train(model, parts, args)
        print(f"trained in {time.time() - start:.0f} s\n")
        scores = {
            "logistic regression": logistic_regression(parts, with_moved=False),
            "logistic regression, moved copies too": logistic_regression(parts, with_moved=True),
            type(model.classifier).__name__: (accuracy(model, *parts[1]), accuracy(model, *parts[2])),
        }
        print(f"{'accuracy':38} {'validation':>10} {'test':>8}")
        for name, (validation, test) in scores.items():
            print(f"{name:38} {validation:10.1%} {test:8.1%}")
    except ModuleNotFoundError as error:
        die(f'{error.name} is missing: pip install -e ".[examples]"')
    except (OSError, ValueError, RuntimeError, AssertionError) as error:  # the last from a torch without CUDA
        die(str(error))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
