"""Choose the rates of `deepseek-moe plan` in view of the published runs, and say what leaving one out would give.

    python dev/fit_plan.py

Five rates move, each within bounds that measurements of others allow, toward the least squared log ratio with a weak
pull to their middle. The error that counts is of the row left out of the fit.
"""

import dataclasses
import math
from collections.abc import Sequence

from deepseek_training.launch.cluster.published import PublishedRun, published_runs, typical_error
from deepseek_training.launch.cluster.step_estimate import Rates

# Low, middle, high.
BOUNDS = {
    "dense": (0.50, 0.62, 0.75),
    "grouped": (0.30, 0.50, 0.60),
    "fp8": (0.45, 0.65, 0.85),
    "touches": (40.0, 70.0, 120.0),
    "moe_s": (0.0003, 0.002, 0.02),
}
_PULL = 0.02


def loss(rates: Rates, runs: Sequence[PublishedRun]) -> float:
    """Return the squared log ratios, with the pull to the bounds' middles."""
    errors = sum(math.log(run.ratio(rates)) ** 2 for run in runs)
    pulls = sum(
        (math.log(getattr(rates, name) / middle) / math.log(high / low)) ** 2
        for name, (low, middle, high) in BOUNDS.items()
    )
    return errors + _PULL * pulls


def fit(runs: Sequence[PublishedRun]) -> Rates:
    """Return the best rates, by steps along each rate in turn that shrink."""
    rates = dataclasses.replace(Rates(), **{name: middle for name, (_, middle, _) in BOUNDS.items()})
    best, step = loss(rates, runs), 0.2
    while step > 0.004:
        improved = False
        for name, (low, _, high) in BOUNDS.items():
            for factor in (1 + step, 1 / (1 + step)):
                value = min(high, max(low, getattr(rates, name) * factor))
                tried = dataclasses.replace(rates, **{name: value})
                found = loss(tried, runs)
                if found < best - 1e-9:
                    rates, best, improved = tried, found, True
        step = step if improved else step / 2
    return rates


def main() -> None:
    """Print the rates, each row's ratio, and the ratio of the row left out."""
    runs = list(published_runs())
    rates = fit(runs)
    print({name: round(getattr(rates, name), 5) for name in BOUNDS})
    left_out = []
    for place, run in enumerate(runs):
        without = fit(runs[:place] + runs[place + 1 :])
        left_out.append(run.ratio(without))
        print(f"{run.name:<45} fitted {run.ratio(rates):.2f}, left out {left_out[-1]:.2f}")
    fitted = [run.ratio(rates) for run in runs]
    print(f"typical factor: fitted {typical_error(fitted):.2f}, left out {typical_error(left_out):.2f}")


if __name__ == "__main__":
    main()
