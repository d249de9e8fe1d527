"""The budget: what is granted, what is refused, and what is booked."""

import pytest
import torch

from apoptosis.decide.acceptance import SANITY_RMS, Verdict
from apoptosis.decide.error_budget import ALPHA, Account
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
    Verdict(0.002, probe(needed)).check(readable=True)
    with pytest.raises(BudgetError, match=str(needed)):
        Verdict(0.002, probe(needed - 1)).check(readable=True)


def test_budget_needs_probe_and_classes():
    with pytest.raises(BudgetError, match="probe="):
        Verdict(0.01, None).check(readable=True)
    with pytest.raises(BudgetError, match="logits="):
        Verdict(0.01, probe(5000)).check(readable=False)
    Verdict(None, None).check(readable=False)


def test_limits_add_up_and_attempts_spend_confidence():
    verdict = Verdict(0.02, probe(20_000))
    total = 0.0
    for attempt in (1, 2, 3):
        part = verdict.begin(None)
        assert verdict.judge(change(rows=part.rows)) == ""
        (certificate,) = verdict.settle()
        assert certificate.value == clopper_pearson_upper(0, part.rows, alpha_for_attempt(attempt, ALPHA))
        total += certificate.value
    assert verdict.account.spent == pytest.approx(total)


def test_fresh_rows_first_then_all():
    account = Account(0.05, 3000)
    first = account.next_rows()
    account.attempt(*first, losses=0)
    second = account.next_rows()
    assert second[0] == first[1]
    assert not account.reused
    while not account.reused:
        account.attempt(*account.next_rows(), losses=0)
    assert account.next_rows() == (0, 3000)


def test_rows_judged_before_cost_confidence():
    account = Account(0.05, 3000)
    while not account.reused:
        attempt = account.attempts
        limit = account.attempt(*account.next_rows(), losses=0)
    fresh = clopper_pearson_upper(0, 3000, alpha_for_attempt(attempt + 1, ALPHA))
    assert limit == clopper_pearson_upper(0, 3000, alpha_for_attempt(attempt + 1, ALPHA, earlier_verdicts=attempt))
    assert limit > fresh


def test_without_a_budget_every_attempt_has_its_own_block():
    account = Account(None, 800)
    blocks = []
    for _ in range(8):
        blocks.append(account.next_rows())
        account.attempt(*blocks[-1], losses=0)
    assert blocks == [(100 * i, 100 * (i + 1)) for i in range(8)]
    assert not account.reused
    assert account.next_rows() == (0, 800)


def test_rows_divided_anew_count_as_judged_by_all():
    account = Account(0.05, 3000, ranks=2)
    for _ in range(2):
        account.spent += account.attempt(*account.next_rows(), losses=0, rows=900)
    spent = account.spent
    account.divide_anew()
    assert (account.spent, account.attempts, account.next_rows()) == (spent, 2, (0, 3000))
    limit = account.attempt(0, 3000, losses=0, rows=6000)
    assert limit == clopper_pearson_upper(0, 6000, alpha_for_attempt(3, ALPHA, earlier_verdicts=2))


def test_refused_attempt_is_not_booked_but_spends_confidence():
    verdict = Verdict(0.005, probe(4000))
    verdict.begin(None)
    assert "exceeds the budget" in verdict.judge(change(flips=300))
    assert verdict.account.spent == 0.0
    assert verdict.account.attempts == 1


def test_sanity_limit_without_budget():
    verdict = Verdict(None, None)
    verdict.begin(((torch.zeros(4, 3),), {}))
    assert "sanity" in verdict.judge(change(rms=2 * SANITY_RMS))
    assert "sanity" in verdict.judge(change(rms=float("inf")))
    assert verdict.judge(change(rms=SANITY_RMS / 2, flips=3)) == ""
    (certificate,) = verdict.settle()
    assert not certificate.population
    assert "training inputs" in certificate.note
    assert verdict.training_flips == pytest.approx(0.003)


def test_state_round_trip():
    verdict = Verdict(0.02, probe(4000))
    verdict.begin(None)
    verdict.judge(change(rows=4000))
    verdict.settle()
    other = Verdict(0.02, probe(4000))
    other.load_state_dict(verdict.state_dict())
    assert other.state_dict() == verdict.state_dict()
    assert other.account.next_rows() == verdict.account.next_rows()
    changed = verdict.state_dict()
    changed["account"]["judged"] = [["x"]]
    with pytest.raises(ValueError, match="unpack"):
        other.load_state_dict(changed)
    assert other.state_dict() == verdict.state_dict()


def test_budget_needs_to_know_that_outputs_are_classes():
    unlabelled = make_probe(torch.zeros(5000, 3), torch.zeros(2, 3))
    with pytest.raises(BudgetError, match="may be no classes: give labels with the probe or logits="):
        Verdict(0.01, unlabelled).check(readable=True)
    Verdict(0.01, unlabelled).check(readable=True, named=True)
    Verdict(0.01, probe(5000)).check(readable=True)


def test_without_labels_or_logits_nothing_is_called_accuracy():
    unlabelled = make_probe(torch.zeros(800, 3), torch.zeros(2, 3))
    for given, named in ((unlabelled, False), (unlabelled, True), (probe(800), False)):
        verdict = Verdict(None, given)
        verdict.check(readable=True, named=named)
        part = verdict.begin(None)
        verdict.judge(change(rows=part.rows))
        (certificate,) = verdict.settle()
        assert ("largest output changed" in certificate.note) == (given is unlabelled and not named)


def shuffled(rows):
    gen = torch.Generator().manual_seed(3)
    return torch.randn(rows, 3, generator=gen), torch.randint(0, 4, (rows,), generator=gen)


@pytest.mark.parametrize("budget", [None, 0.02])
def test_limits_go_on_only_with_their_own_probe(budget):
    x, y = shuffled(4000)
    example = x[:2]
    verdict = Verdict(budget, make_probe((x, y), example))
    others = {
        "this run has none": None,
        "rows": make_probe((x[:3999], y[:3999]), example),
        "inputs": make_probe((x + 0.01, y), example),
        "labels": make_probe((x, 3 - y), example),
    }
    order = {"inputs": make_probe((x.flip(0), y.flip(0)), example)}
    fresh = verdict.state_dict()
    for given in others.values():  # nothing was judged yet: any probe will do
        if given is not None or budget is None:
            Verdict(budget, given).load_state_dict(fresh)
    part = verdict.begin(None)
    verdict.judge(change(rows=part.rows))
    verdict.settle()
    for cases in (others, order):
        for name, given in cases.items():
            run = Verdict(budget, given)
            before = run.state_dict()
            with pytest.raises(CheckpointError, match=name):
                run.load_state_dict(verdict.state_dict())
            assert run.state_dict() == before
    Verdict(budget, make_probe((x.clone(), y.clone()), example)).load_state_dict(verdict.state_dict())


def test_limits_on_training_inputs_do_not_go_on_with_a_probe():
    verdict = Verdict(None, None)
    verdict.begin(((torch.zeros(4, 3),), {}))
    verdict.judge(change(flips=3))
    verdict.settle()
    with pytest.raises(CheckpointError, match="no probe"):
        Verdict(None, probe(4000)).load_state_dict(verdict.state_dict())
    Verdict(None, None).load_state_dict(verdict.state_dict())
