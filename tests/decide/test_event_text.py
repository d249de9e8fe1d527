"""What an event prints: two lines of 120 characters at most, whatever the network; the log has everything."""

import pytest

from apoptosis import Event
from apoptosis.records import Certificate


def event(groups, parameters=(483_186, 373_650), **more):
    fields = {
        "step": 318, "tolerance": 0.01, "criterion": "interpolative", "groups": groups, "parameters": parameters,
        "macs": (2.0, 1.0), "bytes_freed": 1_314_432,
        "certificates": (Certificate(kind="empirical", subject="5", value=0.00939, rows=896),),
        "measured": {"output_rms": 0.0221, "flips": 0.0, "margin_share": 0.0222},
        "measured_on": "on 45 held-out examples", "seconds": 0.14,
    }  # fmt: skip
    return Event(**(fields | more))


def test_an_event_of_few_groups_says_all_of_them():
    assert str(event({"1": (736, 680), "3": (432, 368), "5": (264, 208), "7": (16, 16)})) == (
        "step 318: 3 432->368, 1 736->680, 5 264->208; parameters 483,186->373,650; 1.31 MB freed in 0.14 s\n"
        "  site error <= 0.00939 (896 rows); output rms 0.0221, flips 0, margin share 0.0222 on 45 held-out examples"
    )


LONG = "model.language_model.model.layers.{}.self_attn.compressed_projection:heads"


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 121])
@pytest.mark.parametrize("parameters", [(2_355, 779), (1_234_567_890_123, 1_034_567_890_123)])
def test_two_lines_of_120_characters_for_any_network(count, parameters):
    groups = {LONG.format(i): (100_000 + i, 50_000) for i in range(count)}
    measured = {f"some_long_measurement_of_{i}": 0.123456 for i in range(9)}
    for text in (
        str(event(groups, parameters, step=12_345_678, bytes_freed=10**13, seconds=12_345.6)),
        str(event(groups, parameters, measured=measured, outputs="training mode")),
    ):
        lines = text.split("\n")
        assert len(lines) == 2
        assert max(map(len, lines)) <= 120
        assert f"{100_000 + count - 1:,}->50,000" in text  # of the group that lost most
        assert ("more" in lines[0]) == (count > lines[0].count("->50,000"))


def test_nothing_removed_is_short_too():
    notes = tuple(
        f"'{LONG.format(i)}' (64 channels): a reason that is rather long and goes on and on {i}" for i in range(9)
    )
    for some in (notes, notes[:1], ()):
        text = str(event({}, notes=some))
        assert text.startswith("step 318: nothing removed")
        assert len(text.split("\n")) <= 2
        assert max(map(len, text.split("\n"))) <= 120
    assert "8 more in event.notes" in str(event({}, notes=notes))
