"""Formulas written out in float64, against which the quicker ones of the library are held."""

import torch

from apoptosis.numerics.decompose import mean_offset, solve_mix


def residual_gram(covariance_CC, mean_C, keep_K, mix_KC, offset_C):
    """R = E[(z - z_hat)(z - z_hat)^T] for z_hat = z_K @ mix + offset: of any mix and offset."""
    change = torch.eye(len(mean_C), dtype=torch.float64)
    change[keep_K] -= mix_KC.double()
    bias = mean_C.double() @ change
    bias = bias if offset_C is None else bias - offset_C.double()
    return change.T @ covariance_CC.double() @ change + torch.outer(bias, bias)


def site_diag(weight_OC, residual_CC):
    """diag(W R W^T), the mean squared error of every output."""
    weight = weight_OC.detach().double()
    return ((weight @ residual_CC) * weight).sum(1).clamp_min(0.0)


def fit_mix(gram_CC, keep_K, *, mean_C=None, ridge=None):
    """The mix of solve_mix from a matrix at hand, and its offset where a mean is given."""
    gram = gram_CC.double()
    mix = solve_mix(lambda rows, columns: gram[rows][:, columns], keep_K, len(gram), ridge)
    return mix, None if mean_C is None else mean_offset(mean_C, keep_K, mix)
