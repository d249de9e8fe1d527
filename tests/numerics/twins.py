"""Formulas written out in float64, against which the quicker ones of the library are held."""

import torch


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
