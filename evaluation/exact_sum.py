"""Sums that do not depend on their order, to the last digit: so that several processes find what one finds."""

from __future__ import annotations

from collections.abc import Hashable

import torch

from runtime.processes import gathered, summed

FRACTION = 2.0**40  # values are rounded to multiples of its inverse


class ExactSum:
    """A sum of float64 vectors of one length. Each value is rounded to a multiple of 2^-40, and whole numbers are added, which
    no order changes. The sum's magnitude may reach 2^62, and 2^22 vectors may be added. It is not-a-number where a value was
    not finite.

    Attributes:
        limbs: (3, N) int64: the whole parts' sums, those of the fractions times 2^40, and how many values were not finite.
    """

    def __init__(self, length: int):
        self.limbs = torch.zeros(3, length, dtype=torch.int64)

    def add(self, values: torch.Tensor) -> None:
        """Add a vector (N), float64."""
        finite = values.isfinite()
        values = torch.where(finite, values, 0)
        whole = values.floor()
        self.limbs += torch.stack([whole.long(), ((values - whole) * FRACTION).round().long(), (~finite).long()])

    def total(self) -> torch.Tensor:
        """The sum (N), float64."""
        whole, fraction, not_finite = self.limbs
        total = whole.double() + fraction.double() / FRACTION
        return torch.where(not_finite > 0, torch.nan, total)


class ExactSums:
    """Exact sums of tuples of numbers and tensors, by key; those of one key are of the same shapes."""

    def __init__(self):
        self._sums = {}
        self._shapes = {}

    def add(self, key: Hashable, values: tuple) -> None:
        """Add a tuple of numbers and tensors to what was added under `key`."""
        tensors = [torch.as_tensor(value).cpu().double() for value in values]
        vector = torch.cat([tensor.reshape(-1) for tensor in tensors])
        if key not in self._sums:
            self._sums[key] = ExactSum(len(vector))
            self._shapes[key] = [tuple(tensor.shape) for tensor in tensors]
        self._sums[key].add(vector)

    def gather(self, accelerator) -> None:
        """Add up what all processes have added: each then holds the sums over all."""
        if accelerator is None or accelerator.num_processes == 1:
            return
        for shapes in gathered(self._shapes, accelerator):
            self._shapes = shapes | self._shapes
        for key in sorted(self._shapes):
            length = sum(torch.Size(shape).numel() for shape in self._shapes[key])
            total = self._sums.setdefault(key, ExactSum(length))
            total.limbs = summed(total.limbs, accelerator)

    @property
    def added(self) -> list:
        """The keys under which something was added, in order."""
        return sorted(self._sums)

    def total(self, keys) -> tuple[torch.Tensor, ...]:
        """The sum over several keys, as a tuple of float64 tensors of the shapes that were added."""
        keys = list(keys)
        whole = ExactSum(0)
        whole.limbs = sum(self._sums[key].limbs for key in keys)
        parts, place = [], 0
        vector = whole.total()
        for shape in self._shapes[keys[0]]:
            length = torch.Size(shape).numel()
            parts.append(vector[place : place + length].reshape(shape))
            place += length
        return tuple(parts)
