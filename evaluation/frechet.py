"""The Fréchet distance between two sets of features, from sums over them."""

from __future__ import annotations

from typing import NamedTuple

import torch


class FeatureSums(NamedTuple):
    """Sums over feature vectors: their number, their sum (F) and the sum of their outer products (F, F), float64. Memory does
    not grow with the number of vectors."""

    count: torch.Tensor | int
    sum: torch.Tensor
    products: torch.Tensor

    @classmethod
    def of(cls, features: torch.Tensor) -> FeatureSums:
        """Of features (B, F)."""
        features = features.cpu().double()
        return cls(len(features), features.sum(dim=0), features.T @ features)

    def mean_and_covariance(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (F) and covariance (F, F), over n - 1, in float64."""
        mean = self.sum / self.count
        return mean, (self.products - self.count * torch.outer(mean, mean)) / (self.count - 1)


def frechet_distance(first: FeatureSums, second: FeatureSums) -> float | None:
    """|m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½) of two sets of features (Heusel et al. 2017); None for fewer than two vectors,
    or features that are not finite."""
    if min(first.count, second.count) < 2 or not (first.products.isfinite().all() and second.products.isfinite().all()):
        return None
    mean1, covariance1 = first.mean_and_covariance()
    mean2, covariance2 = second.mean_and_covariance()
    # tr (C1 C2)^½ is the sum of the roots of the eigenvalues of C1^½ C2 C1^½, which is symmetric: ten times as fast
    values, vectors = torch.linalg.eigh(covariance1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    roots = torch.linalg.eigvalsh(root @ covariance2 @ root).clamp(min=0).sqrt().sum()
    return float((mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace() - 2 * roots)
