"""Forecast a series of numbers with a small Mamba, and compare it with naive forecasts on values it has never seen.

    pip install -e ".[examples]"
    python examples/time_series.py                                     # CO2 at Mauna Loa, weekly, 1958 to 2001
    python examples/time_series.py --csv FILE --column NAME --season 24 --horizon 48 --context 336     # hourly values

The model reads embeddings of the values, not ids: a linear layer makes a vector of each step, MambaEncoder reads the
vectors, and a linear layer at every position forecasts the next --horizon steps, as changes from that position's value.

The first 70% of the series are for training (the scales too), the next 15% for choosing the best step of the training,
and the last 15% are read once, for the table: the mean absolute error, in the series' unit, of forecasts from every
possible step. What lies before a forecast may be read by it; nothing after it is.

The CO2 series is statsmodels' (C. D. Keeling and T. P. Whorf, 2004; public domain).
Shapes: b batch, l sequence length, s season, H horizon.
"""

import argparse
import copy
import csv
import io
import itertools
import math
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where the model files are

from mamba import MambaConfig, MambaEncoder
from mamba2 import Mamba2Config, Mamba2Encoder

EVAL_EVERY = 50  # steps


def die(message: str) -> NoReturn:
    """Print one line and exit with status 2."""
    print("time_series.py: error:", *message.split(), file=sys.stderr)
    raise SystemExit(2)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = die  # one line, without the usage text
    add = parser.add_argument
    add("--csv", type=Path, help="file with a header line; empty cells repeat the value before (default: CO2)")
    add("--column", help="the name of its column")
    add("--season", type=int, help="steps after which the series is about the same again (CO2: 52)")
    add("--horizon", type=int, default=52, help="steps to forecast")
    add("--context", type=int, default=104, help="steps that the model reads")
    add("--model", choices=("mamba", "mamba2"), default="mamba")
    add("--d-model", type=int, default=64)
    add("--n-layer", type=int, default=2)
    add("--steps", type=int, default=400)
    add("--batch-size", type=int, default=32)
    add("--lr", type=float, default=2e-3)
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    add("--plot", type=Path, default=Path("runs/time_series.png"), help="picture to write (default: %(default)s)")
    add("--no-plot", dest="plot", action="store_const", const=None)
    args = parser.parse_args()
    for name in ("horizon", "context", "d_model", "n_layer", "steps", "batch_size"):
        if getattr(args, name) < 1:
            die(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.csv is None:
        args.season = 52 if args.season is None else args.season
    elif args.column is None or args.season is None:
        die("--csv needs --column and --season")
    if args.plot and args.plot.suffix not in (".png", ".pdf", ".svg"):
        die(f"--plot must end with .png, .pdf or .svg, got {args.plot}")
    if args.season < 1:
        die(f"--season must be at least 1, got {args.season}")
    return args


def pick_device(name: str) -> torch.device:
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return torch.empty(0, device=best if name == "auto" else name).device


def read_co2() -> Tensor:
    """Weekly means of CO2 in the air at Mauna Loa, in parts per million, with NaN for missing weeks."""
    try:
        from statsmodels.datasets import co2
    except ImportError:
        die('statsmodels, which holds the CO2 series, is missing: pip install -e ".[examples]", or give --csv')
    return torch.tensor(co2.load_pandas().data["co2"].to_numpy(), dtype=torch.float64)


def read_csv(path: Path, column: str) -> Tensor:
    """The numbers of one column, with NaN for empty cells."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text: {error}") from None
    rows = csv.DictReader(io.StringIO(text))
    if column not in (names := rows.fieldnames or []):
        raise ValueError(f"--column must be one of {names} for {path}, got {column!r}")
    values = []
    for row in rows:
        try:
            values.append(float(row[column] or "nan"))
        except ValueError:
            place = f"{path}, line {rows.line_num}, column {column!r}"
            raise ValueError(f"{place}: not a number: {row[column]!r}") from None
    return torch.tensor(values, dtype=torch.float64)


def fill_gaps(series: Tensor) -> Tensor:
    """Missing values repeat the last one before them, so that a filled value knows nothing of later ones."""
    position = torch.arange(len(series)).masked_fill(~series.isfinite(), 0).cummax(0).values
    series = series[position]
    return series[series.isfinite()]  # nothing stands before the first value


def split(series: Tensor, args: argparse.Namespace) -> list[int]:
    """Borders of the three parts: training, validation, test."""
    borders = [0, int(0.7 * len(series)), int(0.85 * len(series)), len(series)]
    window = args.season + args.context + args.horizon
    if borders[1] < 2 * window or len(series) - borders[2] < 2 * args.horizon:
        raise ValueError(
            f"the series has {len(series)} values: 70% of them must be at least {2 * window} (2 (season + context + "
            f"horizon)), and 15% at least {2 * args.horizon} (2 horizon); try a shorter --context or --horizon"
        )
    return borders


class Forecaster(nn.Module):
    """Forecasts of the next H steps from every position of a window, as changes from the value there."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        sizes = {"d_model": args.d_model, "n_layer": args.n_layer, "vocab_size": None}  # no vocabulary: vectors
        self.season = args.season
        self.embedding = nn.Linear(3, args.d_model)
        if args.model == "mamba":
            self.encoder = MambaEncoder(MambaConfig(**sizes))
        else:
            heads = {"headdim": math.gcd(2 * args.d_model, 32), "d_state": 64, "chunk_size": 64}
            self.encoder = Mamba2Encoder(Mamba2Config(**sizes, **heads))
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(args.d_model, args.horizon)
        nn.init.zeros_(self.head.weight)  # the training starts from the last-value forecast
        nn.init.zeros_(self.head.bias)
        self.register_buffer("feature_scale", torch.ones(3))
        self.register_buffer("change_scale", torch.ones(()))

    def features(self, window: Tensor) -> Tensor:
        """(b, s + l) values to (b, l, 3): three differences, because the level itself will be new in the test part."""
        x = window[:, self.season :]  # (b, l)
        return torch.stack([x - x[:, :1], x - window[:, self.season - 1 : -1], x - window[:, : -self.season]], dim=-1)

    def set_scales(self, windows: Tensor, targets: Tensor) -> None:
        """Root mean squares of the features and of the changes to forecast, in training windows."""
        values = windows[:, self.season :, None]  # (b, l, 1)
        self.feature_scale.copy_(self.features(windows).square().mean((0, 1)).sqrt().clamp(min=1e-12))
        self.change_scale.copy_((targets - values).square().mean().sqrt().clamp(min=1e-12))

    def forward(self, window: Tensor) -> Tensor:
        """(b, s + l) values to forecasts (b, l, H)."""
        x = self.embedding(self.features(window) / self.feature_scale)  # (b, l, d_model)
        changes = self.head(self.dropout(self.encoder(x))) * self.change_scale  # (b, l, H)
        return window[:, self.season :, None] + changes


def windows_at(series: Tensor, ends: Tensor, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """The windows (b, s + l) that end at the positions `ends` (b,), and what follows each of the last l: (b, l, H)."""
    s, l, horizon = args.season, args.context, args.horizon
    pieces = series[ends[:, None] + torch.arange(1 - s - l, horizon + 1)]  # (b, s + l + H)
    return pieces[:, : s + l], pieces[:, s + 1 :].unfold(1, horizon, 1)


def ends_for(start: int, stop: int, horizon: int) -> Tensor:
    """The last known positions of all forecasts whose H values lie in series[start:stop]."""
    return torch.arange(start - 1, stop - horizon)


@torch.inference_mode()
def forecast(model: Forecaster, series: Tensor, ends: Tensor, args: argparse.Namespace) -> Tensor:
    """Forecasts (b, H) after each of the positions `ends`."""
    model.eval()
    windows = (windows_at(series, part, args)[0] for part in ends.split(256))
    device = model.head.weight.device
    return torch.cat([model(window.to(device))[:, -1].cpu() for window in windows])


def naive_forecasts(series: Tensor, ends: Tensor, args: argparse.Namespace) -> dict[str, Tensor]:
    """What anyone can forecast, (b, H) each."""
    ahead = torch.arange(1, args.horizon + 1)
    seasons = (ahead + args.season - 1) // args.season  # back to the latest season that is known
    season = series[ends[:, None] + ahead - seasons * args.season]
    last, change = series[ends, None], (series[ends] - series[ends - args.season])[:, None]
    return {
        "last value": last.expand_as(season),
        "last season": season,
        "last season + change": season + seasons * change,
    }


def train(model: Forecaster, series: Tensor, borders: list[int], args: argparse.Namespace) -> None:
    """Train on series[:borders[1]]; leave the model with the weights that were best on the validation part."""
    device = model.head.weight.device
    ends = torch.arange(args.season + args.context - 1, borders[1] - args.horizon)  # windows and targets lie inside
    sample = ends[:: math.ceil(len(ends) / 1000)]
    model.set_scales(*windows_at(series, sample, args))
    val_ends = ends_for(borders[1], borders[2], args.horizon)
    val_targets = series[val_ends[:, None] + torch.arange(1, args.horizon + 1)]
    spared = {f"encoder.{name}" for name in model.encoder.no_weight_decay()}
    decayed = [p for name, p in model.named_parameters() if p.dim() >= 2 and name not in spared]
    others = [p for name, p in model.named_parameters() if p.dim() < 2 or name in spared]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps + 1, pct_start=0.1)
    best, weights = math.inf, {}
    bar = tqdm(range(1, args.steps + 1), disable=None)
    for step in bar:
        model.train()
        window, targets = windows_at(series, ends[torch.randint(len(ends), (args.batch_size,))], args)
        forecasts = model(window.to(device))  # (b, l, H)
        known = args.context // 4  # forecasts from less context do not count
        loss = (forecasts - targets.to(device))[:, known:].abs().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % EVAL_EVERY == 0 or step == args.steps:
            val = (forecast(model, series, val_ends, args) - val_targets).abs().mean().item()
            if not math.isfinite(val):
                die(f"the validation error is not finite at step {step}: try a lower --lr")
            bar.set_postfix(train=f"{loss.item():.3f}", validation=f"{val:.3f}", refresh=False)
            if val < best:
                best, weights = val, copy.deepcopy(model.state_dict())
    model.load_state_dict(weights)
    print(f"mean absolute error on the validation part: {best:.3f}")


def print_table(errors: dict[str, Tensor], horizon: int) -> None:
    """The mean absolute errors (H,) of each forecast, some steps ahead and over all of them."""
    ahead = sorted({max(1, round(horizon * share)) for share in (0, 1 / 13, 1 / 4, 1 / 2, 1)})
    print(f"{'steps ahead':22}", *(f"{h:>8}" for h in ahead), f"{'1 to ' + str(horizon):>9}")
    for name, error in errors.items():
        print(f"{name:22}", *(f"{error[h - 1]:8.3f}" for h in ahead), f"{error.mean():9.3f}")


def plot(path: Path, series: Tensor, start: int, forecasts: dict[str, Tensor], errors: dict[str, Tensor]) -> None:
    """Some forecasts in the test part, and the errors by steps ahead."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    above, below = figure.subplots(2, 1)
    name, model = list(forecasts.items())[-1]
    horizon = model.shape[1]
    position = torch.arange(start - horizon, len(series))
    above.plot(position, series[position], color="black", linewidth=1, label="the series")
    for i in range(0, len(model), horizon):
        label = f"{name}: {horizon} steps from each dot" if i == 0 else None
        above.plot(start + i + torch.arange(horizon), model[i], color="tab:red", linewidth=2, alpha=0.8, label=label)
        above.plot(start + i - 1, series[start + i - 1], "o", color="tab:red", markersize=4)
    above.axvline(start - 0.5, color="gray", linestyle=":")
    above.set(title="Held-out part (right of the dotted line)", xlabel="step of the series", ylabel="value")
    above.legend()
    for (title, error), color in zip(errors.items(), ("tab:gray", "tab:blue", "tab:cyan", "tab:red"), strict=True):
        below.plot(torch.arange(1, horizon + 1), error, label=title, color=color)
    below.set(title="Held-out part, all forecasts", xlabel="steps ahead", ylabel="mean absolute error", ylim=(0, None))
    below.legend()
    beside = path.with_name(f".{path.name}.tmp")
    figure.savefig(beside, format=path.suffix[1:], dpi=120)
    os.replace(beside, path)
    print(f"plot written to {path}")


def main() -> None:
    args = read_options()
    try:
        if args.plot:
            import matplotlib  # noqa: F401 (missing, it is missed before the training)

            args.plot.parent.mkdir(parents=True, exist_ok=True)
        series = fill_gaps(read_csv(args.csv, args.column) if args.csv else read_co2())
        borders = split(series, args)
        level = series[: borders[1]].mean()  # only differences matter below, and float32 holds those of small numbers
        series = (series - level).float()
        torch.manual_seed(args.seed)
        model = Forecaster(args).to(pick_device(args.device))
        parameters, start = sum(p.numel() for p in model.parameters()), time.time()
        parts = ", ".join(str(stop - start) for start, stop in itertools.pairwise(borders))
        print(f"{len(series)} values (training, validation, test: {parts}); {args.model}, {parameters:,} parameters")
        train(model, series, borders, args)
        print(f"trained in {time.time() - start:.0f} s; mean absolute error on the test part:\n")
        ends = ends_for(borders[2], borders[3], args.horizon)
        targets = series[ends[:, None] + torch.arange(1, args.horizon + 1)]
        forecasts = naive_forecasts(series, ends, args) | {args.model: forecast(model, series, ends, args)}
        errors = {name: (values - targets).abs().mean(0) for name, values in forecasts.items()}  # (H,) each
        print_table(errors, args.horizon)
        if args.plot:
            forecasts = {name: values + level for name, values in forecasts.items()}
            plot(args.plot, series + level, borders[2], forecasts, errors)
    except ModuleNotFoundError as error:
        die(f'{error.name} is missing: pip install -e ".[examples]" (or --no-plot)')
    except (OSError, ValueError, RuntimeError, AssertionError, csv.Error) as error:  # assertions: a torch without CUDA
        die(str(error))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
