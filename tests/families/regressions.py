"""Networks that once broke an oracle, cut down to the smallest that still did (test_regressions.py runs them).

A case that is `open` is not mended yet: it is expected to fail, strictly; `open` goes when it does not any more.
"""

from __future__ import annotations

from dataclasses import dataclass

from families.generator import HEADER, INPUTS, Network


@dataclass(frozen=True)
class Case:
    """name: what broke. kind: of the input. body: of the module, after super().__init__().

    open: why it still fails. message: a pattern of such failures. hides: other networks may fail like that, too.
    """

    name: str
    kind: str
    body: str
    seed: int
    literal: bool = False
    open: str = ""
    message: str = ""
    hides: bool = True

    @property
    def network(self) -> Network:
        """The case as the oracles take it."""
        return Network(HEADER + self.body.lstrip("\n"), INPUTS[self.kind], self.literal, ())


CASES = (
    Case(
        "one_channel_of_shuffled_pixels",
        "image",
        """
        self.m0 = nn.Conv2d(3, 8, 3, padding=1)
        self.m1 = nn.Tanh()
        self.m2 = nn.Conv2d(8, 16, 1)
        self.m3 = nn.PixelShuffle(2)
        self.m4 = nn.Conv2d(4, 8, 3, padding=1)
        self.m5 = nn.Tanh()
        self.m6 = nn.Linear(8, 3)

    def forward(self, h):
        h = self.m2(self.m1(self.m0(h)))
        h = self.m5(self.m4(self.m3(h)))
        return self.m6(h.mean((2, 3)))
""",
        seed=442,
    ),
    Case(
        "one_channel_of_every_shuffled_row_under_a_norm",
        "image",
        """
        self.m0 = nn.Conv2d(3, 8, 3, padding=1)
        self.m1 = nn.Tanh()
        self.m2 = nn.Conv2d(8, 8, 1)
        self.num_groups = 4
        self.m3 = nn.InstanceNorm2d(8)
        self.m4 = nn.Conv2d(8, 8, 3, padding=1)
        self.m5 = nn.Tanh()
        self.m6 = nn.Linear(8, 3)

    def forward(self, h):
        h = self.m2(self.m1(self.m0(h)))
        h = h.unflatten(1, (self.num_groups, -1)).transpose(1, 2).flatten(1, 2)
        h = self.m5(self.m4(self.m3(h)))
        return self.m6(h.mean((2, 3)))
""",
        seed=379,
    ),
    Case(
        "gate_of_shuffled_pixels",
        "image",
        """
        self.m0 = nn.Conv2d(3, 16, 3, padding=1)
        self.m1 = nn.PixelShuffle(2)
        self.m2 = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Hardsigmoid())
        self.m3 = nn.Linear(4, 3)

    def forward(self, h):
        h = self.m1(torch.tanh(self.m0(h)))
        h = self.m2(F.adaptive_avg_pool2d(h, 1)) * h
        h = self.m3(h.mean((2, 3)))
        return h
""",
        seed=256,
    ),
    Case(
        "halves_by_literal_slices",
        "vector",
        """
        self.m0 = nn.Linear(6, 6)
        self.m1 = nn.Tanh()
        self.m2 = nn.Linear(6, 8)
        self.m3 = nn.Linear(4, 3)

    def forward(self, h):
        h = self.m0(h)
        h = self.m1(h)
        h = self.m2(h)
        h = h[..., :4] * h[..., 4:8]
        h = self.m3(h)
        return h
""",
        seed=65,
        literal=True,
    ),
    Case(
        "one_channel_of_four_positions",
        "image",
        """
        self.m0 = nn.Conv2d(3, 8, 3, padding=1)
        self.m1 = nn.Tanh()
        self.m2 = nn.Conv2d(8, 8, 1)
        self.m3 = nn.ChannelShuffle(2)
        self.m4 = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.m5 = nn.Linear(8, 3)

    def forward(self, h):
        h = self.m0(h)
        h = self.m1(h)
        h = self.m2(h)
        h = self.m3(h)
        h = self.m4(h)
        h = h.mean((2, 3))
        h = self.m5(h)
        return h
""",
        seed=2,
    ),
    Case(
        "attention_module_one_head",
        "sequence",
        """
        self.m0 = nn.Linear(6, 6, bias=False)
        self.m1 = nn.Tanh()
        self.m3 = nn.Linear(6, 6)
        self.m4 = nn.MultiheadAttention(6, 1, batch_first=True)
        self.m5 = nn.Linear(6, 6)
        self.m6 = nn.Linear(6, 3)

    def forward(self, h):
        h = self.m0(h)
        h = self.m1(h)
        x2 = h
        h = self.m3(h)
        h = self.m4(h, h, h, need_weights=False)[0]
        h = self.m5(h)
        h = h.mean(1)
        h = self.m6(h)
        return h
""",
        seed=116,
    ),
    Case(
        "attention_module_behind_linear",
        "tokens",
        """
        self.m0 = nn.Embedding(11, 8)
        self.m2 = nn.Linear(8, 6)
        self.m3 = nn.MultiheadAttention(6, 1, batch_first=True)
        self.m4 = nn.Linear(6, 8)
        self.m5 = nn.Linear(8, 3)

    def forward(self, h):
        h = self.m0(h)
        x1 = h
        h = self.m2(h)
        h = self.m3(h, h, h, need_weights=True)[0]
        h = self.m4(h)
        h = h.mean(1)
        h = self.m5(h)
        return h
""",
        seed=7,
    ),
    Case(
        "bias_free_site_with_large_mean",
        "image",
        """
        self.m0 = nn.Conv2d(3, 8, 3, padding=1)
        self.m1 = nn.Tanh()
        self.m2 = nn.Conv2d(8, 5, 1)
        self.m3 = nn.Conv2d(8, 6, 1)
        self.m4 = nn.Conv2d(6, 6, 1)
        self.m6 = nn.Sequential(nn.Conv2d(6, 4, 1), nn.SiLU(), nn.Conv2d(4, 6, 1), nn.Hardsigmoid())
        self.m7 = nn.Linear(6, 6, bias=False)
        self.m8 = nn.Tanh()
        self.m9 = nn.Linear(6, 3)

    def forward(self, h):
        h = self.m0(h)
        h = self.m1(h)
        h = self.m3(h)
        h = torch.tanh(self.m4(h))
        h = torch.tanh(self.m4(h))
        x5 = h
        h = F.adaptive_avg_pool2d(h, 1)
        h = self.m6(h)
        h = h * x5
        h = h.amax((2, 3))
        h = self.m7(h)
        h = self.m8(h)
        h = self.m9(h)
        return h
""",
        seed=5,
    ),
    Case(
        "lstm_projected_checkpoint",
        "sequence",
        """
        self.a = nn.LSTM(6, 6, batch_first=True, proj_size=3)
        self.b = nn.Linear(3, 3)

    def forward(self, h):
        return self.b(self.a(h)[0].mean(1))
""",
        seed=1,
    ),
    Case(
        "shuffle_by_four_rows_in_residual",
        "image",
        """
        self.m0 = nn.Conv2d(3, 4, 3, padding=1)
        self.m1 = nn.Tanh()
        self.m2 = nn.Conv2d(4, 8, 1)
        self.m4 = nn.Conv2d(8, 8, 1)
        self.num_groups = 4
        self.m6 = nn.Conv2d(8, 6, 1)
        self.m7 = nn.Tanh()
        self.m8 = nn.Conv2d(6, 8, 1)
        self.m9 = nn.Conv2d(8, 8, 3, padding=1)
        self.m10 = nn.Tanh()
        self.m11 = nn.Conv2d(8, 8, 3, padding=1)
        self.m12 = nn.Tanh()
        self.m13 = nn.Linear(8, 3)

    def forward(self, h):
        h = self.m0(h)
        h = self.m1(h)
        h = self.m2(h)
        h = h.transpose(0, 1).contiguous().transpose(0, 1)
        x3 = h
        h = self.m4(h)
        h = h.unflatten(1, (self.num_groups, -1)).transpose(1, 2).flatten(1, 2)
        h = self.m6(h)
        h = self.m7(h)
        h = self.m8(h)
        h = h + x3
        h = self.m9(h)
        h = self.m10(h)
        h = self.m11(h)
        h = self.m12(h)
        h = h.mean((2, 3))
        h = self.m13(h)
        return h
""",
        seed=21,
    ),
    Case(
        "whole_rows_by_attribute",
        "image",
        """
        self.m0 = nn.Conv2d(3, 8, 3, padding=1)
        self.m1 = nn.Tanh()
        self.m2 = nn.Conv2d(8, 8, 1)
        self.num_groups = 4
        self.m4 = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.m5 = nn.Linear(8, 3)

    def forward(self, h):
        h = self.m0(h)
        h = self.m1(h)
        h = self.m2(h)
        h = h.unflatten(1, (self.num_groups, -1)).transpose(1, 2).flatten(1, 2)
        h = self.m4(h)
        h = h.mean((2, 3))
        h = self.m5(h)
        return h
""",
        seed=124,
    ),
    Case(
        "lstm_projected_two_layers",
        "tokens",
        """
        self.m0 = nn.Embedding(11, 8)
        self.m2 = nn.LSTM(8, 6, batch_first=True, num_layers=2, proj_size=3)
        self.m3 = nn.Linear(3, 8)
        self.m4 = nn.Linear(8, 3)

    def forward(self, h):
        h = self.m0(h)
        x1 = h
        h = self.m2(h)[0]
        h = self.m3(h)
        h = h + x1
        h = h.mean(1)
        h = self.m4(h)
        return h
""",
        seed=240,
    ),
    Case(
        "hand_attention_all_groups",
        "sequence",
        """
        self.m0 = nn.Linear(6, 6)
        self.m1 = nn.Tanh()
        self.m6 = nn.Linear(6, 8)
        self.m7 = nn.Linear(6, 8)
        self.m8 = nn.Linear(6, 8)
        self.num_heads = 2
        self.m10 = nn.Linear(8, 6)
        self.m11 = nn.Linear(6, 6)
        self.m12 = nn.Tanh()
        self.m13 = nn.Linear(6, 3)

    def forward(self, h):
        h = self.m0(h)
        h = self.m1(h)
        x2 = h
        x3 = self.m6(h)
        x4 = self.m7(h)
        x5 = self.m8(h)
        x3 = x3.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        x4 = x4.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        x5 = x5.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        h = (x3 @ x4.transpose(-2, -1) / 2.0).softmax(-1) @ x5
        h = h.transpose(1, 2).flatten(2)
        h = self.m10(h)
        h = self.m11(h)
        h = self.m12(h)
        h = h.mean(1)
        h = self.m13(h)
        return h
""",
        seed=243,
    ),
    Case(
        "hand_attention_values",
        "sequence",
        """
        self.m0 = nn.Linear(6, 8, bias=False)
        self.m1 = nn.Tanh()
        self.m6 = nn.Linear(8, 8)
        self.m7 = nn.Linear(8, 8)
        self.m8 = nn.Linear(8, 8)
        self.num_heads = 2
        self.m10 = nn.Linear(8, 8)
        self.m11 = nn.Linear(8, 3)

    def forward(self, h):
        h = self.m0(h)
        h = self.m1(h)
        x2 = h
        x3 = self.m6(h)
        x4 = self.m7(h)
        x5 = self.m8(h)
        x3 = x3.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        x4 = x4.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        x5 = x5.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        h = (x3 @ x4.transpose(-2, -1) / 2.0).softmax(-1) @ x5
        h = h.transpose(1, 2).flatten(2)
        h = self.m10(h)
        h = h.mean(1)
        h = self.m11(h)
        return h
""",
        seed=307,
    ),
    Case(
        "shuffle_by_two_rows",
        "vector",
        """
        self.m0 = nn.Linear(6, 6)
        self.m1 = nn.Tanh()
        self.m2 = nn.LayerNorm(6)
        self.m3 = nn.Linear(6, 8)
        self.m4 = nn.Linear(8, 3)

    def forward(self, h):
        h = self.m0(h)
        h = self.m1(h)
        h = self.m2(h)
        h = self.m3(h)
        h = h.unflatten(-1, (2, -1)).transpose(-2, -1).flatten(-2, -1)
        h = self.m4(h)
        return h
""",
        seed=149,
    ),
    Case(
        "bias_free_site_with_large_mean_2",
        "vector",
        """
        self.m0 = nn.Linear(6, 6, bias=False)
        self.m1 = nn.Parameter(torch.randn(6))
        self.m3 = nn.Parameter(torch.randn(6))
        self.m4 = nn.Linear(6, 4)
        self.m6 = nn.Linear(6, 4, bias=False)
        self.m7 = nn.Tanh()
        self.m9 = nn.Linear(6, 6)
        self.m10 = nn.Tanh()
        self.m11 = nn.Linear(6, 4)
        self.m13 = nn.Linear(4, 6)
        self.m14 = nn.Tanh()
        self.m15 = nn.Linear(6, 6)
        self.m16 = nn.Tanh()
        self.m17 = nn.Linear(6, 3)

    def forward(self, h):
        h = self.m0(h)
        h = torch.sigmoid(h)
        h = self.m1 * h + 1.0
        x2 = h
        h = x2
        h = h + self.m3
        h = self.m4(h)
        x5 = h
        h = x2
        h = self.m6(h)
        h = self.m7(h)
        x8 = h
        h = x2
        h = self.m9(h)
        h = self.m10(h)
        h = self.m11(h)
        x12 = h
        h = x5 * x8 * x12
        h = self.m13(h)
        h = self.m14(h)
        h = self.m15(h)
        h = self.m16(h)
        h = self.m17(h)
        return h
""",
        seed=178,
    ),
    Case(
        "whole_heads_by_attribute",
        "sequence",
        """
        self.m0 = nn.Linear(6, 8)
        self.m1 = nn.Tanh()
        self.m3 = nn.Identity()
        self.m5 = nn.Linear(8, 12)
        self.m6 = nn.Linear(8, 12)
        self.m7 = nn.Linear(12, 8)
        self.m13 = nn.Linear(8, 12)
        self.m14 = nn.Linear(8, 12)
        self.m15 = nn.Linear(8, 12)
        self.num_heads = 3
        self.m17 = nn.Linear(12, 8)
        self.m18 = nn.Linear(8, 6)
        self.m20 = nn.Linear(8, 6)
        self.m21 = nn.Tanh()
        self.m22 = nn.Linear(6, 6)
        self.m23 = nn.Tanh()
        self.m25 = nn.Linear(6, 6)
        self.m26 = nn.Tanh()
        self.m27 = nn.Linear(6, 3)

    def forward(self, h):
        h = self.m0(h)
        h = self.m1(h)
        x2 = h
        h = self.m3(h)
        x4 = F.silu(self.m5(h))
        h = x4 * self.m6(h)
        h = self.m7(h)
        h = h + x2
        x8 = h
        h = x8
        x9 = h
        x10 = self.m13(h)
        x11 = self.m14(h)
        x12 = self.m15(h)
        x10 = x10.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        x11 = x11.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        x12 = x12.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        h = F.scaled_dot_product_attention(x10, x11, x12, is_causal=True)
        h = h.transpose(1, 2).flatten(2)
        h = self.m17(h)
        h = self.m18(h)
        x19 = h
        h = x8
        h = self.m20(h)
        h = self.m21(h)
        h = self.m22(h)
        h = self.m23(h)
        x24 = h
        h = x19 + x24
        h = self.m25(h)
        h = self.m26(h)
        h = h.mean(1)
        h = self.m27(h)
        return h
""",
        seed=292,
    ),
    Case(
        "two_attentions_in_one_module",
        "tokens",
        """
        self.m0 = nn.Embedding(11, 8)
        self.m1 = nn.Linear(8, 8)
        self.m6 = nn.Linear(8, 36)
        self.num_heads = 3
        self.m8 = nn.Linear(12, 8)
        self.m13 = nn.Linear(8, 24)
        self.n_heads = 2
        self.m15 = nn.Linear(8, 8)
        self.m16 = nn.Linear(8, 3)

    def forward(self, h):
        h = self.m0(h)
        h = self.m1(h)
        h = h.transpose(0, 1).contiguous().transpose(0, 1)
        x2 = h
        h = self.m6(h)
        x3, x4, x5 = h.chunk(3, -1)
        x3 = x3.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        x4 = x4.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        x5 = x5.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        h = (x3 @ x4.transpose(-2, -1) / 2.0).softmax(-1) @ x5
        h = h.transpose(1, 2).flatten(2)
        h = self.m8(h)
        x9 = h
        h = self.m13(h)
        x10, x11, x12 = h.chunk(3, -1)
        x10 = x10.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        x11 = x11.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        x12 = x12.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        h = (x10 @ x11.transpose(-2, -1) / 2.0).softmax(-1) @ x12
        h = h.transpose(1, 2).flatten(2)
        h = self.m15(h)
        h = h.mean(1)
        h = self.m16(h)
        return h
""",
        seed=323,
    ),
    Case(
        "instance_norm_without_tensors",
        "image",
        """
        self.m0 = nn.Conv2d(3, 8, 3, padding=1)
        self.m1 = nn.InstanceNorm2d(8)
        self.m2 = nn.Tanh()
        self.m3 = nn.Conv2d(8, 8, 3, padding=1)
        self.m4 = nn.Tanh()
        self.m5 = nn.Linear(8, 3)

    def forward(self, h):
        h = self.m0(h)
        h = self.m1(h)
        h = self.m2(h)
        h = self.m3(h)
        h = self.m4(h)
        h = h.mean((2, 3))
        h = self.m5(h)
        return h
""",
        seed=41,
    ),
    Case(
        "lstm_hidden_as_wide_as_projected",
        "sequence",
        """
        self.a = nn.LSTM(6, 6, batch_first=True, proj_size=3)
        self.b = nn.Linear(3, 3)

    def forward(self, h):
        return self.b(self.a(h)[0].mean(1))
""",
        seed=0,
    ),
    Case(
        "pixel_shuffle_flattened",
        "image",
        """
        self.m0 = nn.Conv2d(3, 8, 3)
        self.m1 = nn.Tanh()
        self.m2 = nn.Conv2d(8, 16, 1)
        self.m3 = nn.PixelShuffle(2)
        self.m4 = nn.Linear(256, 3)

    def forward(self, h):
        h = self.m0(h)
        h = self.m1(h)
        h = self.m2(h)
        h = self.m3(h)
        h = h.flatten(1)
        h = self.m4(h)
        return h
""",
        seed=412,
    ),
    Case(
        "two_attentions_of_other_head_numbers",
        "sequence",
        """
        self.m0 = nn.Linear(6, 6)
        self.m1 = nn.Tanh()
        self.m6 = nn.Linear(6, 6, bias=False)
        self.m7 = nn.Linear(6, 6, bias=False)
        self.m8 = nn.Linear(6, 6, bias=False)
        self.m9 = 1
        self.m10 = nn.Linear(6, 6)
        self.m15 = nn.Linear(6, 8)
        self.m16 = nn.Linear(6, 8)
        self.m17 = nn.Linear(6, 8)
        self.m18 = 2
        self.m19 = nn.Linear(8, 6)
        self.m20 = nn.Linear(6, 3)

    def forward(self, h):
        h = torch.tanh(self.m0(h))
        q, k, v = (f(h).unflatten(-1, (self.m9, -1)).transpose(1, 2) for f in (self.m6, self.m7, self.m8))
        h = (q @ k.transpose(-2, -1) / 2.0).softmax(-1) @ v
        h = self.m10(h.transpose(1, 2).flatten(2))
        q, k, v = (f(h).unflatten(-1, (self.m18, -1)).transpose(1, 2) for f in (self.m15, self.m16, self.m17))
        h = (q @ k.transpose(-2, -1) / 2.0).softmax(-1) @ v
        h = self.m19(h.transpose(1, 2).flatten(2))
        return self.m20(h.mean(1))
""",
        seed=509,
        literal=True,
    ),
    Case(
        "nearly_constant_channels",
        "tokens",
        """
        self.m0 = nn.Embedding(11, 8)
        self.m5 = nn.Linear(8, 6)
        self.m6 = nn.Linear(8, 6)
        self.m7 = nn.Linear(8, 6)
        self.m8 = nn.Parameter(torch.randn(3, 8))
        self.m9 = nn.Linear(8, 6)
        self.m10 = nn.Linear(8, 6)
        self.num_heads = 1
        self.m12 = nn.Linear(6, 8)
        self.m14 = nn.Linear(8, 6)
        self.m15 = nn.Tanh()
        self.m17 = nn.Linear(8, 6)
        self.m18 = nn.Tanh()
        self.m20 = nn.Linear(12, 3)

    def forward(self, h):
        h = self.m0(h)
        x1 = h
        x2 = self.m5(h)
        x3 = self.m6(h)
        x4 = self.m7(h)
        x3 = self.m9(self.m8).expand(len(h), -1, -1)
        x4 = self.m10(self.m8).expand(len(h), -1, -1)
        x2 = x2.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        x3 = x3.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        x4 = x4.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        h = (x2 @ x3.transpose(-2, -1) / 2.0).softmax(-1) @ x4
        h = h.transpose(1, 2).flatten(2)
        h = self.m12(h)
        x13 = h
        h = x13
        h = self.m14(h)
        h = self.m15(h)
        x16 = h
        h = x13
        h = self.m17(h)
        h = self.m18(h)
        x19 = h
        h = torch.cat([x16, x19], -1)
        h = h.mean(1)
        h = self.m20(h)
        return h
""",
        seed=2022,
    ),
    Case(
        "literal_channel_in_place",
        "vector",
        """
        self.m0 = nn.Linear(6, 6, bias=False)
        self.m1 = nn.BatchNorm1d(6)
        self.m2 = nn.ReLU()
        self.m5 = nn.LayerNorm(6)
        self.m6 = nn.Parameter(torch.randn(6))
        self.m8 = nn.Parameter(torch.randn(6))
        self.m10 = nn.Linear(6, 8, bias=False)
        self.m11 = nn.Parameter(torch.randn(8))
        self.m13 = nn.Linear(14, 6)
        self.m15 = nn.Parameter(torch.randn(6))
        self.m16 = nn.Linear(6, 5)
        self.m19 = nn.Linear(6, 8, bias=False)
        self.m21 = nn.Parameter(torch.randn(8))
        self.m22 = nn.Linear(8, 3)

    def forward(self, h):
        h = self.m0(h)
        h = self.m1(h)
        h = self.m2(h)
        x3 = h
        h = x3
        x4 = h
        h = self.m5(h)
        h = h * self.m6
        h += x4
        x7 = h
        h = x7
        h = h * self.m8
        x9 = h
        h = x7
        h = self.m10(h)
        h = h.transpose(0, 1).contiguous().transpose(0, 1)
        h = self.m11 * h + 1.0
        x12 = h
        h = torch.cat([x9, x12], -1)
        h = self.m13(h)
        x14 = h
        h = x3
        h = h * self.m15
        x17 = self.m16(h)
        x18 = h
        h = x14 * x18
        h = self.m19(h)
        h = h.clone()
        h.select(-1, 0).mul_(2.0)
        x20 = h
        h = h * self.m21
        h = h + x20
        h = self.m22(h)
        return h, x17
""",
        seed=2071,
        literal=True,
    ),
    Case(
        "positions_beside_values",
        "tokens",
        """
        self.m0 = nn.Embedding(11, 8)
        self.m2 = nn.Linear(5, 5)
        self.m4 = nn.Linear(8, 8)
        self.m8 = nn.Linear(60, 3)

    def forward(self, h):
        h = self.m0(h)
        x = self.m2(h.transpose(1, 2)).transpose(1, 2)
        a, b = self.m4(h).chunk(2, -1)
        return self.m8(torch.cat([x, a * torch.tanh(b)], -1).flatten(1))
""",
        seed=6990,
    ),
    Case(
        "recurrent_layers",
        "sequence",
        """
        self.r = nn.RNN(6, 6, batch_first=True, num_layers=2)
        self.o = nn.Linear(6, 3)

    def forward(self, h):
        return self.o(self.r(h)[0].mean(1))
""",
        seed=1,
    ),
    Case(
        "one_column_of_rows",
        "vector",
        """
        self.a, self.b = nn.Linear(6, 8), nn.Linear(4, 3)

    def forward(self, h):
        x, y = self.a(h).chunk(2, -1)
        return self.b(x * torch.tanh(y))
""",
        seed=0,
    ),
    Case(
        "one_value_channel",
        "sequence",
        """
        self.q, self.k, self.v = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.num_heads = 1
        self.o = nn.Linear(6, 3)

    def forward(self, h):
        q = self.q(h).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k = self.k(h).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        v = self.v(h).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        h = (q @ k.transpose(-2, -1) / 2.0).softmax(-1) @ v
        return self.o(h.transpose(1, 2).flatten(2).mean(1))
""",
        seed=19,
    ),
    Case(
        "recurrent_layer_beside_a_pinned_one",
        "sequence",
        """
        self.r = nn.RNN(6, 6, batch_first=True, num_layers=2)
        self.n = nn.LayerNorm(6)
        self.o = nn.Linear(6, 3)

    def forward(self, h):
        return self.o(self.n(self.r(h)[0]).mean(1))
""",
        seed=1,
    ),
    Case(
        "more_channels_than_rank",
        "tokens",
        """
        self.m0 = nn.Embedding(11, 8)
        self.m1 = nn.Softsign()
        self.m2 = nn.Linear(8, 12)
        self.m5 = nn.Linear(12, 6)
        self.m6 = nn.Tanh()
        self.m7 = nn.Linear(6, 3)

    def forward(self, h):
        h = self.m0(h)
        h = self.m1(h)
        h = self.m2(h)
        x3, x4 = h.chunk(2, -1)
        h = torch.cat([x4, x3], -1)
        h = self.m5(h)
        h = self.m6(h)
        h = h.mean(1)
        h = self.m7(h)
        return h
""",
        seed=21421,
    ),
    Case(
        "one_column_of_rows_flattened",
        "sequence",
        """
        self.m4 = nn.Linear(6, 8)
        self.m7 = nn.Linear(20, 6)
        self.m9 = nn.Linear(6, 3)

    def forward(self, h):
        x5, x6 = self.m4(h).chunk(2, -1)
        return self.m9(torch.tanh(self.m7((x5 * torch.tanh(x6)).flatten(1))))
""",
        seed=0,
    ),
    Case(
        "one_channel_of_every_block",
        "image",
        """
        self.m2 = nn.Conv2d(3, 8, 3, padding=1)
        self.num_groups = 4
        self.m3 = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.m4 = nn.Conv2d(8, 8, 3, padding=1)
        self.m10 = nn.Linear(8, 3)

    def forward(self, h):
        h = torch.tanh(self.m2(h))
        h = h.unflatten(1, (self.num_groups, -1)).transpose(1, 2).flatten(1, 2)
        h = torch.tanh(self.m4(torch.tanh(self.m3(h))))
        return self.m10(h.mean((2, 3)))
""",
        seed=0,
    ),
    Case(
        "outputs_in_which_channels_cancel",
        "vector",
        """
        self.m0 = nn.Linear(6, 4, bias=False)
        self.m1 = nn.Linear(4, 8)
        self.m2 = nn.GroupNorm(2, 8)
        self.m3 = nn.Tanh()
        self.m4 = nn.Linear(8, 4)
        self.m5 = nn.Linear(4, 4)
        self.m7 = nn.Dropout(0.3)
        self.m8 = nn.Linear(4, 4)
        self.m9 = nn.GroupNorm(2, 4)
        self.m10 = nn.Tanh()
        self.m11 = nn.Linear(4, 3)

    def forward(self, h):
        h = self.m0(h)
        h = h * torch.sigmoid(h)
        h = self.m1(h)
        h = self.m2(h)
        h = self.m3(h)
        h = self.m4(h)
        h = torch.tanh(self.m5(h))
        h = torch.tanh(self.m5(h))
        h = torch.tanh(self.m5(h))
        x6 = h
        h = self.m7(h)
        h = h + x6
        h = self.m8(h)
        h = self.m9(h)
        h = self.m10(h)
        h = self.m11(h)
        return h
""",
        seed=30036,
        open="round-off of channels that cancel in a site's output, to which errors relate",
        message="channels is redundant to round-off",
        hides=False,
    ),
    Case(
        "channels_silent_in_evaluation_alone",
        "image",
        """
        self.m0 = nn.Conv2d(3, 4, 3, bias=False)
        self.m1 = nn.GroupNorm(1, 4)
        self.m2 = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.m3 = nn.Sigmoid()
        self.m4 = nn.Parameter(torch.randn(4, 1, 1))
        self.m6 = nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.m7 = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Hardswish())
        self.m9 = nn.Sequential(nn.Conv2d(8, 4, 1), nn.SiLU(), nn.Conv2d(4, 8, 1), nn.Hardsigmoid())
        self.m10 = nn.Conv2d(8, 4, 1)
        self.m13 = nn.Linear(16, 3)

    def forward(self, h):
        h = self.m1(self.m0(h)).relu_()
        h = self.m3(self.m2(h)) * self.m4
        x5 = h
        h = self.m7(self.m6(h))
        h = self.m9(F.adaptive_avg_pool2d(h, 1)) * h
        h = self.m10(h) + x5
        return self.m13(h.reshape(h.shape[0], -1))
""",
        seed=50784,
    ),
    Case(
        "halves_of_whole_blocks",
        "vector",
        """
        self.m3 = nn.Linear(6, 8)
        self.m6 = nn.GroupNorm(2, 8)
        self.m8 = nn.Linear(8, 4)
        self.m20 = nn.Linear(4, 3)

    def forward(self, h):
        x4, x5 = torch.tanh(self.m3(h)).chunk(2, -1)
        h = self.m6(torch.cat([x5, x4], -1))
        return self.m20(torch.tanh(self.m8(h)))
""",
        seed=0,
        open="parts, of which the code takes a fixed number, that go as a whole (refused after the edit, not before)",
        message="hold others than before",
        hides=False,
    ),
)

#: Patterns of the failures that are known and not mended yet.
OPEN = tuple(dict.fromkeys(case.message for case in CASES if case.open and case.hides))
