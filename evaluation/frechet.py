"""The Fréchet distance between two sets of features, from running sums."""

from __future__ import annotations

import torch


class FeatureStatistics:
    """Running mean and covariance of feature vectors: memory that does not grow with their number.

    Attributes: count of the vectors; their sum (F) and the sum of their outer products (F, F), float64.
    """

    def __init__(self, count: int = 0, total: torch.Tensor | int = 0, products: torch.Tensor | int = 0):
        self.count = count
        self.sum = total
        self.products = products

    def add(self, features: torch.Tensor) -> None:
        """Features (B, F)."""
        features = features.cpu().double()
        self.count += len(features)
        self.sum = self.sum + features.sum(dim=0)
        self.products = self.products + features.T @ features

    def mean_and_covariance(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (F) and covariance (F, F), over n - 1, in float64."""
        mean = self.sum / self.count
        return mean, (self.products - self.count * torch.outer(mean, mean)) / (self.count - 1)


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float | None:
    """|m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½) of two sets of features (Heusel et al. 2017); None for fewer than two vectors."""
    if min(first.count, second.count) < 2:
        return None
    mean1, covariance1 = first.mean_and_covariance()
    mean2, covariance2 = second.mean_and_covariance()
    # tr (C1 C2)^½ is the sum of the roots of the eigenvalues of C1^½ C2 C1^½, which is symmetric: ten times as fast
    values, vectors = torch.linalg.eigh(covariance1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    roots = torch.linalg.eigvalsh(root @ covariance2 @ root).clamp(min=0).sqrt().sum()
    return float((mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace() - 2 * roots)
