"""The budget: what is granted, what is refused, and what is booked."""

import pytest
import torch

from apoptosis.decide.acceptance import SANITY_RMS, AcceptanceTest
from apoptosis.decide.error_budget import ALPHA, ErrorBudget
from apoptosis.errors import BudgetError, CheckpointError
from apoptosis.model.evaluate import Change, make_probe
from apoptosis.numerics.bounds import alpha_for_attempt, clopper_pearson_upper, required_probe_rows


def change(flips=0, rows=1000, rms=0.01, losses=None, readable=True):
    return Change(
        rms=rms,
        rows=rows,
        flips=flips,
        losses=flips if losses is None else losses,
        margin_share=0.0,
        readable=readable,
    )


def probe(rows):
    return make_probe((torch.zeros(rows, 3), torch.zeros(rows, dtype=torch.long)), torch.zeros(2, 3))


def test_a_probe_too_small_names_the_number_needed():
    needed = required_probe_rows(0.002, alpha_for_attempt(1, ALPHA))
    AcceptanceTest(0.002, probe(needed)).check(readable=True)
    with pytest.raises(BudgetError, match=str(needed)):
        AcceptanceTest(0.002, probe(needed - 1)).check(readable=True)


def test_budget_needs_probe_and_classes():
    with pytest.raises(BudgetError, match="probe="):
        AcceptanceTest(0.01, None).check(readable=True)
    with pytest.raises(BudgetError, match="logits="):
        AcceptanceTest(0.01, probe(5000)).check(readable=False)
    AcceptanceTest(None, None).check(readable=False)


def test_limits_add_up_and_attempts_spend_confidence():
    acceptance = AcceptanceTest(0.02, probe(20_000))
    total = 0.0
    for attempt in (1, 2, 3):
        part = acceptance.begin(None)
        assert acceptance.evaluate(change(rows=part.rows)) == ""
        (certificate,) = acceptance.record()
        assert certificate.value == clopper_pearson_upper(0, part.rows, alpha_for_attempt(attempt, ALPHA))
        total += certificate.value
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
    acceptance.begin(None)
    assert "exceeds the budget" in acceptance.evaluate(change(flips=300))
    assert acceptance.error_budget.spent == 0.0
    assert acceptance.error_budget.attempts == 1


def test_sanity_limit_without_budget():
    acceptance = AcceptanceTest(None, None)
    acceptance.begin(((torch.zeros(4, 3),), {}))
    assert "sanity" in acceptance.evaluate(change(rms=2 * SANITY_RMS))
    assert "sanity" in acceptance.evaluate(change(rms=float("inf")))
    assert acceptance.evaluate(change(rms=SANITY_RMS / 2, flips=3)) == ""
    (certificate,) = acceptance.record()
    assert not certificate.population
    assert "training inputs" in certificate.note
    assert acceptance.training_flips == pytest.approx(0.003)


def test_state_round_trip():
    acceptance = AcceptanceTest(0.02, probe(4000))
    acceptance.begin(None)
    acceptance.evaluate(change(rows=4000))
    acceptance.record()
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
        AcceptanceTest(0.01, unlabelled).check(readable=True)
    AcceptanceTest(0.01, unlabelled).check(readable=True, named=True)
    AcceptanceTest(0.01, probe(5000)).check(readable=True)


def test_without_labels_or_logits_nothing_is_called_accuracy():
    unlabelled = make_probe(torch.zeros(800, 3), torch.zeros(2, 3))
    for given, named in ((unlabelled, False), (unlabelled, True), (probe(800), False)):
        acceptance = AcceptanceTest(None, given)
        acceptance.check(readable=True, named=named)
        part = acceptance.begin(None)
        acceptance.evaluate(change(rows=part.rows))
        (certificate,) = acceptance.record()
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
    part = acceptance.begin(None)
    acceptance.evaluate(change(rows=part.rows))
    acceptance.record()
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
    acceptance.begin(((torch.zeros(4, 3),), {}))
    acceptance.evaluate(change(flips=3))
    acceptance.record()
    with pytest.raises(CheckpointError, match="no probe"):
        AcceptanceTest(None, probe(4000)).load_state_dict(acceptance.state_dict())
    AcceptanceTest(None, None).load_state_dict(acceptance.state_dict())
