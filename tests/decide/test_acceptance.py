"""The budget: what is granted, what is refused, and what is booked."""

import pytest
import torch

from apoptosis.decide.acceptance import ALPHA, SANITY_RMS, AcceptanceTest, ErrorBudget
from apoptosis.errors import BudgetError, CheckpointError
from apoptosis.model.evaluate import Change, make_probe
from apoptosis.numerics.bounds import alpha_for_attempt, clopper_pearson_upper, required_probe_rows


def change(flips=0, rows=1000, rms=0.01, losses=None, readable=True):
    return Change(
        moved=rms**2,
        spread=1.0,
        rows=rows,
        flips=flips,
        losses=flips if losses is None else losses,
        margin_share=0.0,
        readable=readable,
    )


INPUTS = ((torch.zeros(4, 3),), {})


def checked(acceptance, inputs=None, *, rows=1000, **found):
    """Return the result of a check of what was found on the next examples; rows None: as many as these are."""
    examples = acceptance.examples(inputs)
    return acceptance.check(examples, change(rows=examples.probe.rows if rows is None else rows, **found))


def test_a_check_keeps_nothing_between_its_steps():
    """Two attempts may be measured in turn: a result says by itself what is recorded."""
    acceptance = AcceptanceTest(None, None)
    kept, other = checked(acceptance, INPUTS, flips=3), checked(acceptance, INPUTS, flips=500)
    acceptance.record(kept)
    assert acceptance.training_flips == pytest.approx(0.003)
    assert (kept.change.flips, other.change.flips) == (3, 500)
    with pytest.raises(AttributeError):
        kept.refused = "no"


def probe(rows):
    return make_probe((torch.zeros(rows, 3), torch.zeros(rows, dtype=torch.long)), torch.zeros(2, 3))


def test_a_probe_too_small_names_the_number_needed():
    needed = required_probe_rows(0.002, alpha_for_attempt(1, ALPHA))
    AcceptanceTest(0.002, probe(needed)).check_budget(readable=True)
    with pytest.raises(BudgetError, match=str(needed)):
        AcceptanceTest(0.002, probe(needed - 1)).check_budget(readable=True)


def test_budget_needs_probe_and_classes():
    with pytest.raises(BudgetError, match="probe="):
        AcceptanceTest(0.01, None).check_budget(readable=True)
    with pytest.raises(BudgetError, match="logits="):
        AcceptanceTest(0.01, probe(5000)).check_budget(readable=False)
    AcceptanceTest(None, None).check_budget(readable=False)


def test_limits_add_up_and_attempts_spend_confidence():
    acceptance = AcceptanceTest(0.02, probe(20_000))
    total = 0.0
    for attempt in (1, 2, 3):
        result = checked(acceptance, rows=None)
        assert result.refused == ""
        acceptance.record(result)
        assert result.certificate.value == clopper_pearson_upper(
            0, result.change.rows, alpha_for_attempt(attempt, ALPHA)
        )
        total += result.certificate.value
    assert acceptance.error_budget.spent == pytest.approx(total)


def test_fresh_rows_first_then_all():
    error_budget = ErrorBudget(0.05, 3000)
    first = error_budget.next_rows()
    error_budget.attempt(*first, losses=0)
    second = error_budget.next_rows()
    assert second[0] == first[1]
    assert not error_budget.reused
    while not error_budget.reused:
        error_budget.attempt(*error_budget.next_rows(), losses=0)
    assert error_budget.next_rows() == (0, 3000)


def test_rows_judged_before_cost_confidence():
    error_budget = ErrorBudget(0.05, 3000)
    while not error_budget.reused:
        attempt = error_budget.attempts
        limit = error_budget.attempt(*error_budget.next_rows(), losses=0)
    fresh = clopper_pearson_upper(0, 3000, alpha_for_attempt(attempt + 1, ALPHA))
    assert limit == clopper_pearson_upper(0, 3000, alpha_for_attempt(attempt + 1, ALPHA, earlier_results=attempt))
    assert limit > fresh


def test_without_a_budget_every_attempt_has_its_own_block():
    error_budget = ErrorBudget(None, 800)
    blocks = []
    for _ in range(8):
        blocks.append(error_budget.next_rows())
        error_budget.attempt(*blocks[-1], losses=0)
    assert blocks == [(100 * i, 100 * (i + 1)) for i in range(8)]
    assert not error_budget.reused
    assert error_budget.next_rows() == (0, 800)


def test_rows_divided_anew_count_as_judged_by_all():
    error_budget = ErrorBudget(0.05, 3000, ranks=2)
    for _ in range(2):
        error_budget.spent += error_budget.attempt(*error_budget.next_rows(), losses=0, rows=900)
    spent = error_budget.spent
    error_budget.reshard_probe()
    assert (error_budget.spent, error_budget.attempts, error_budget.next_rows()) == (spent, 2, (0, 3000))
    limit = error_budget.attempt(0, 3000, losses=0, rows=6000)
    assert limit == clopper_pearson_upper(0, 6000, alpha_for_attempt(3, ALPHA, earlier_results=2))


def test_refused_attempt_is_not_booked_but_spends_confidence():
    acceptance = AcceptanceTest(0.005, probe(4000))
    assert "exceeds the budget" in checked(acceptance, flips=300).refused
    assert acceptance.error_budget.spent == 0.0
    assert acceptance.error_budget.attempts == 1


def test_sanity_limit_without_budget():
    acceptance = AcceptanceTest(None, None)
    assert "sanity" in checked(acceptance, INPUTS, rms=2 * SANITY_RMS).refused
    assert "sanity" in checked(acceptance, INPUTS, rms=float("inf")).refused
    assert acceptance.training_flips == 0.0  # what is not kept costs nothing
    result = checked(acceptance, INPUTS, rms=SANITY_RMS / 2, flips=3)
    assert result.refused == ""
    acceptance.record(result)
    assert not result.certificate.population
    assert "training inputs" in result.certificate.note
    assert acceptance.training_flips == pytest.approx(0.003)


def test_state_round_trip():
    acceptance = AcceptanceTest(0.02, probe(4000))
    acceptance.record(checked(acceptance, rows=4000))
    other = AcceptanceTest(0.02, probe(4000))
    other.load_state_dict(acceptance.state_dict())
    assert other.state_dict() == acceptance.state_dict()
    assert other.error_budget.next_rows() == acceptance.error_budget.next_rows()
    changed = acceptance.state_dict()
    changed["account"]["judged"] = [["x"]]
    with pytest.raises(ValueError, match="unpack"):
        other.load_state_dict(changed)
    assert other.state_dict() == acceptance.state_dict()


def test_budget_needs_to_know_that_outputs_are_classes():
    unlabelled = make_probe(torch.zeros(5000, 3), torch.zeros(2, 3))
    with pytest.raises(BudgetError, match="may be no classes: give labels with the probe or logits="):
        AcceptanceTest(0.01, unlabelled).check_budget(readable=True)
    AcceptanceTest(0.01, unlabelled).check_budget(readable=True, named=True)
    AcceptanceTest(0.01, probe(5000)).check_budget(readable=True)


def test_without_labels_or_logits_nothing_is_called_accuracy():
    unlabelled = make_probe(torch.zeros(800, 3), torch.zeros(2, 3))
    for given, named in ((unlabelled, False), (unlabelled, True), (probe(800), False)):
        acceptance = AcceptanceTest(None, given)
        acceptance.check_budget(readable=True, named=named)
        certificate = checked(acceptance, rows=None).certificate
        assert ("largest output changed" in certificate.note) == (given is unlabelled and not named)


def shuffled(rows):
    gen = torch.Generator().manual_seed(3)
    return torch.randn(rows, 3, generator=gen), torch.randint(0, 4, (rows,), generator=gen)


@pytest.mark.parametrize("budget", [None, 0.02])
def test_limits_go_on_only_with_their_own_probe(budget):
    x, y = shuffled(4000)
    example = x[:2]
    acceptance = AcceptanceTest(budget, make_probe((x, y), example))
    others = {
        "this run has none": None,
        "rows": make_probe((x[:3999], y[:3999]), example),
        "inputs": make_probe((x + 0.01, y), example),
        "labels": make_probe((x, 3 - y), example),
    }
    order = {"inputs": make_probe((x.flip(0), y.flip(0)), example)}
    fresh = acceptance.state_dict()
    for given in others.values():  # nothing was judged yet: any probe will do
        if given is not None or budget is None:
            AcceptanceTest(budget, given).load_state_dict(fresh)
    acceptance.record(checked(acceptance, rows=None))
    for cases in (others, order):
        for name, given in cases.items():
            run = AcceptanceTest(budget, given)
            before = run.state_dict()
            with pytest.raises(CheckpointError, match=name):
                run.load_state_dict(acceptance.state_dict())
            assert run.state_dict() == before
    AcceptanceTest(budget, make_probe((x.clone(), y.clone()), example)).load_state_dict(acceptance.state_dict())


def test_limits_on_training_inputs_do_not_go_on_with_a_probe():
    acceptance = AcceptanceTest(None, None)
    acceptance.record(checked(acceptance, INPUTS, flips=3))
    with pytest.raises(CheckpointError, match="no probe"):
        AcceptanceTest(None, probe(4000)).load_state_dict(acceptance.state_dict())
    AcceptanceTest(None, None).load_state_dict(acceptance.state_dict())
