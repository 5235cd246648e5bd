"""Values per image summed up over a set, in numbers that JSON can hold."""

from __future__ import annotations

import math

from evaluation.metrics import METRICS


def summarise(values: dict) -> dict:
    """{rung: {metric: [value per image]}} -> {rung: {metric: {mean, std, worst, worst_image}}}.

    `std` is over images (n - 1). `worst` is the least value where higher is better, else the greatest; not-a-number counts
    as worse than any number. `worst_image` is the index of that image in the list. Metrics with several numbers per image
    are left out.
    """
    summary = {}
    for rung, metrics in values.items():
        summary[rung] = {}
        for name, numbers in metrics.items():
            if numbers and METRICS[name].components == ():
                summary[rung][name] = _summary_of(numbers, -1 if METRICS[name].better > 0 else 1)
    return summary


def _summary_of(numbers, sign):
    mean = math.fsum(numbers) / len(numbers)
    std = None
    if math.isfinite(mean) and len(numbers) > 1:
        std = math.sqrt(math.fsum((number - mean) ** 2 for number in numbers) / (len(numbers) - 1))
    worst = max(range(len(numbers)), key=lambda index: math.inf if math.isnan(numbers[index]) else sign * numbers[index])
    return {"mean": finite(mean), "std": std, "worst": finite(numbers[worst]), "worst_image": worst}


def finite(value):
    """`value` with every number that JSON cannot hold replaced by None."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None


def mean_of(numbers: list):
    """Mean over images, per component for lists; None if it is not finite (the PSNR of identical images is infinite)."""
    if isinstance(numbers[0], list):
        return [mean_of(component) for component in zip(*numbers)]
    mean = math.fsum(numbers) / len(numbers)
    return mean if math.isfinite(mean) else None


def mean_and_interval(numbers) -> tuple[float | None, float | None]:
    """Mean of `numbers` and half the width of its 95% interval, by the normal distribution; None where undefined."""
    if not numbers:
        return None, None
    mean = math.fsum(numbers) / len(numbers)
    if len(numbers) == 1 or not math.isfinite(mean):
        return mean, None
    variance = math.fsum((one - mean) ** 2 for one in numbers) / (len(numbers) - 1)
    return mean, 1.96 * math.sqrt(variance / len(numbers))
