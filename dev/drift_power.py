"""False alarms and power of the drift check, by windows drawn from requests that were never seen by the reference.

    deepseek-moe monitor reference MODEL --data TEXTS --output NAME.npz --at-least 100 --max-tokens 16
    python dev/drift_power.py reference.npz held.npz finance=finance.npz --plot docs/images/drift.png

Windows without a shift are drawn from the held-out requests; of a shift, `--share` of each window comes from the other
text. A distribution warns here where it is significant once, twice as often as two checks in a row would at least.
"""

import argparse
from pathlib import Path

import numpy as np

from deepseek_serving.monitoring.drift import ALARM_NATS, DriftCheck
from deepseek_serving.monitoring.request_counts import RequestTable, join

SIZES = (20, 100, 500)
SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)


def draw(held: RequestTable, shifted: RequestTable | None, size: int, share: float, rng) -> RequestTable:
    """A window of `size` requests, `share` of them shifted."""
    num_shifted = 0 if shifted is None else max(1, round(size * share))
    parts = [held.take(rng.choice(len(held), size - num_shifted, replace=False))] if num_shifted < size else []
    if shifted is not None:
        parts.append(shifted.take(rng.choice(len(shifted), num_shifted, replace=num_shifted > len(shifted))))
    return parts[0] if len(parts) == 1 else join(parts)


def measure(check: DriftCheck, windows) -> dict[str, np.ndarray]:
    """Per distribution `[windows, 4]`: corrected KL (nan without verdict), alarm, significant, raw."""
    rows: dict[str, list] = {}
    for window in windows:
        for found in check.check(window):
            name = f"{found.distribution} {found.layer}".strip()
            corrected = np.nan if found.corrected is None else found.corrected
            rows.setdefault(name, []).append((corrected, found.is_alarm, found.is_significant, found.raw))
    return {name: np.array(row, float) for name, row in rows.items()}


def summarize(title: str, found: dict[str, np.ndarray]) -> None:
    """One line per distribution and one for any of them."""
    any_alarm = np.any([row[:, 1] for row in found.values()], axis=0).mean()
    any_warning = np.any([row[:, 2] for row in found.values()], axis=0).mean()
    print(f"{title:<28} any distribution: alarm {any_alarm:.1%}, significant {any_warning:.2%}", flush=True)
    for name, row in found.items():
        verdict = "no verdict" if np.isnan(row[0, 0]) else f"corrected {row[:, 0].mean():.4f}"
        print(f"    {name:<26} {verdict:<18} alarm {row[:, 1].mean():.1%}, significant {row[:, 2].mean():.1%}")


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path)
    parser.add_argument("held", type=Path)
    parser.add_argument("shifts", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--windows", type=int, default=1000)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    reference, held = RequestTable.load(args.reference), RequestTable.load(args.held)
    shifts = {name: RequestTable.load(Path(path)) for name, path in (one.split("=", 1) for one in args.shifts)}
    rng = np.random.default_rng(1)
    checks = {size: DriftCheck(reference, size) for size in SIZES}
    for size, check in checks.items():
        summarize(
            f"no shift, {size} requests", measure(check, (draw(held, None, size, 0, rng) for _ in range(args.windows)))
        )
    for name, shifted in shifts.items():
        windows = (draw(held, shifted, 100, 1.0, rng) for _ in range(args.windows))
        summarize(f"all {name}, 100 requests", measure(checks[100], windows))
    curves = {}
    for name, shifted in shifts.items():
        for share in SHARES:
            found = measure(checks[500], (draw(held, shifted, 500, share, rng) for _ in range(args.windows // 10)))
            curves[name, share] = found
            summarize(f"{share:.0%} {name}, 500 requests", found)
    if args.plot:
        plot(curves, list(shifts), args.plot)


def plot(curves, names: list[str], path: Path) -> None:
    """Corrected KL against the share of shifted traffic; filled where the check is significant in 95 % of windows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(names), figsize=(3.2 * len(names), 3.2), sharey=True, layout="constrained")
    for axis, name in zip(np.atleast_1d(axes), names, strict=True):
        for number, kind in enumerate(curves[name, SHARES[0]]):
            raw = [curves[name, share][kind][:, 3].mean() for share in SHARES]
            is_sure = [curves[name, share][kind][:, 2].mean() >= 0.95 for share in SHARES]
            color = f"C{number}"
            label = kind.replace("model.layers.", "layer ").replace(".mlp", "")
            axis.plot(SHARES, raw, color=color, lw=1, label=label)
            axis.scatter(SHARES, raw, s=16, color=[color if sure else "white" for sure in is_sure], edgecolors=color)
        axis.axhline(ALARM_NATS, color="black", lw=0.8, ls="--")
        axis.set(title=name, xscale="log", yscale="log", xlabel="share of 500 requests")
    np.atleast_1d(axes)[0].set_ylabel("KL to the reference, nats")
    np.atleast_1d(axes)[-1].legend(fontsize=6)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
