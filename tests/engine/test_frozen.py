"""Weights that require no gradient while others do stay as they are, unless the user lets them shrink."""

import copy

import pytest
import torch

from apoptosis import Apoptosis, load, save, shrink_
from apoptosis.errors import ArgumentError


def half_frozen(runs):
    """The first layer is frozen, the second and third are not; every layer has neurons twice."""
    net = runs.mlp()
    runs.doubled(net, 0)
    runs.doubled(net, 2)
    net[0].requires_grad_(False)
    return net


def trained(net):
    return torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=3e-3)


def test_channels_of_frozen_weights_are_pinned_by_name(runs):
    net = half_frozen(runs)
    frozen = copy.deepcopy(net[0].state_dict())
    optimizer = trained(net)
    apo = runs.start(net, optimizer)
    pin = next(pin for pin in apo.pins() if pin.group == "0")
    assert "'0.weight' requires no gradient" in pin.reason
    assert "frozen='cut'" in pin.remedy
    assert [group.name for group in apo.groups()] == ["2"]
    assert runs.train(net, optimizer, apo)
    assert net[2].out_features < 32
    assert runs.same(net[0].state_dict(), frozen)


def test_reading_weights_that_are_frozen_pin_too(runs):
    net = runs.mlp()
    net[2].requires_grad_(False)
    with pytest.warns(UserWarning, match="'2.weight' requires no gradient"):
        apo = runs.start(net, trained(net))
    assert {pin.group for pin in apo.pins()} == {"0", "2", "4"}
    apo.close()


def test_cut_lets_them_shrink(runs):
    net = half_frozen(runs)
    optimizer = trained(net)
    apo = runs.start(net, optimizer, frozen="cut")
    assert {group.name for group in apo.groups()} == {"0", "2"}
    assert runs.train(net, optimizer, apo)
    assert net[0].out_features <= 16
    assert not net[0].weight.requires_grad


def test_a_model_that_is_frozen_as_a_whole_is_a_trained_one(runs):
    net = half_frozen(runs).requires_grad_(False)
    event = shrink_(net, runs.inputs(4, 0), [runs.inputs(512, 1)], tolerance=1e-3)
    assert event.groups == {"0": (32, 16), "2": (32, 16)}


def test_shrink_keeps_frozen_parts_and_takes_the_option(runs):
    net = half_frozen(runs)
    twin = copy.deepcopy(net)
    event = shrink_(net, runs.inputs(4, 0), [runs.inputs(512, 1)], tolerance=1e-3)
    assert event.groups == {"2": (32, 16)}
    event = shrink_(twin, runs.inputs(4, 0), [runs.inputs(512, 1)], tolerance=1e-3, frozen="cut")
    assert event.groups == {"0": (32, 16), "2": (32, 16)}
    for wrong in ("keep_all", None, True):
        with pytest.raises(ArgumentError, match="frozen="):
            shrink_(net, runs.inputs(4, 0), [runs.inputs(512, 1)], tolerance=1e-3, frozen=wrong)


def test_a_gain_that_is_frozen_follows_the_weights_around_it(runs):
    net = runs.cnn()
    net[1].requires_grad_(False)
    apo = runs.start(net, trained(net), example=runs.inputs(4, 0, (2, 6, 6)))
    assert "0" in {group.name for group in apo.groups()}
    apo.close()


@pytest.mark.parametrize("whole", [False, True])
def test_what_is_unfrozen_in_a_run_shrinks_from_then_on(runs, whole):
    """Gradual unfreezing; where all but the head was frozen nothing was open at first, and a warning said so."""
    net = half_frozen(runs)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    if whole:
        net[2].requires_grad_(False)
        with pytest.warns(UserWarning, match="requires no gradient.*frozen='cut'"):
            apo = runs.start(net, optimizer, total_steps=200)
        assert not apo.groups()
        assert apo.decision.at_step is not None
    else:
        apo = runs.start(net, optimizer, total_steps=200)
    runs.train(net, optimizer, apo, steps=3)
    net.requires_grad_(True)
    runs.train(net, optimizer, apo, first=3, steps=120)
    assert net[0].out_features <= 16


def test_what_is_frozen_in_a_run_stays_from_then_on(runs):
    net = half_frozen(runs).requires_grad_(True)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    apo = runs.start(net, optimizer)
    net[0].requires_grad_(False)
    before = copy.deepcopy(net[0].state_dict())
    runs.train(net, optimizer, apo)
    assert net[2].out_features < 32
    assert runs.same(net[0].state_dict(), before)


def test_a_resumed_run_looks_at_what_is_frozen_now(runs, tmp_path):
    net = half_frozen(runs)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    apo = runs.start(net, optimizer)
    runs.train(net, optimizer, apo, steps=3)
    save(tmp_path / "a", net, optimizer, apo)
    again = runs.mlp(seed=1)
    optimizer = torch.optim.Adam(again.parameters(), lr=3e-3)
    resumed = runs.start(again, optimizer)
    load(tmp_path / "a", again, optimizer, resumed)
    assert {group.name for group in resumed.groups()} == {"0", "2"}


def small_llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=32, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_adapters_of_peft_fit_the_base_model_that_they_were_trained_on(tmp_path):
    peft = pytest.importorskip("peft")
    base = small_llama()
    kept = copy.deepcopy(base.state_dict())
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.randint(0, 32, (8, 12), generator=torch.Generator().manual_seed(0))
    example = {"input_ids": ids}
    apo = Apoptosis(model, optimizer, example, total_steps=30, tolerance=0.5, align=1, calibration=1.0)
    assert not apo.groups()
    reasons = [pin.reason for pin in apo.pins()]
    assert any("self_attn.k_proj.weight' requires no gradient" in reason for reason in reasons)
    assert any("lora_A" in reason and "adapter of peft" in reason for reason in reasons)
    assert any("mlp.down_proj.weight' requires no gradient" in reason for reason in reasons)
    for step in range(30):
        ids = torch.randint(0, 32, (8, 12), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not apo.step()
    model.save_pretrained(tmp_path)
    fresh = small_llama()
    assert all(torch.equal(value, kept[name]) for name, value in fresh.state_dict().items())
    again = peft.PeftModel.from_pretrained(fresh, tmp_path)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_base_model_under_adapters_shrinks_where_the_user_lets_it():
    peft = pytest.importorskip("peft")
    base = small_llama()
    with torch.no_grad():  # half of the inner neurons of the first block are copies
        mlp = base.model.layers[0].mlp
        for layer in (mlp.gate_proj, mlp.up_proj):
            layer.weight[24:] = layer.weight[:24]
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    ids = torch.randint(0, 32, (32, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model.eval()(input_ids=ids).logits
    event = shrink_(model, {"input_ids": ids}, [{"input_ids": ids}], tolerance=1e-4, frozen="cut")
    assert event
    assert mlp.up_proj.out_features <= 24
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, before, atol=1e-4, rtol=1e-3)
