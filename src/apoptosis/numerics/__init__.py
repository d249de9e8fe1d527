"""Arithmetic on tensors and numbers; knows no nn.Module, no group, no policy."""
