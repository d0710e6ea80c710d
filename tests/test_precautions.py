"""Unknown models: what is left alone, refused or warned about, and whether the reason is named."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import softshare
from softshare import banks, decay_groups, share_, unshare
from softshare.precautions import overlapping_weights


def stack(layers=4, bias=True, size=8):
    return nn.Sequential(*(nn.Linear(size, size, bias=bias) for _ in range(layers)))


# --------------------------------------------------------------------------------------------------------------- freezing


def freeze(module):
    for parameter in module.parameters():
        parameter.requires_grad = False


@pytest.mark.parametrize("bias", [True, False])
def test_freezing_the_layer_that_registers_the_bank_warns(bias):
    """It freezes the weights of all four layers."""
    model = nn.Sequential(*(nn.Sequential(layer, nn.LayerNorm(8)) for layer in stack(bias=bias)))
    share_(model, 2)
    freeze(model[0][0])
    with pytest.warns(UserWarning, match="the bank 'Linear 8x8' is frozen, .*all layers .*: 0.0, 1.0, 2.0, 3.0. To"):
        decay_groups(model, 0.1)


def test_freezing_another_layer_warns():
    """It freezes only a bias."""
    model = stack()
    share_(model, 2)
    freeze(model[3])
    with pytest.warns(
        UserWarning, match="the weights of 3 are not frozen, although .*bank 'Linear 8x8' and keep learning"
    ):
        decay_groups(model, 0.1)
    folded = softshare.fold(model, 1.0)
    with pytest.warns(UserWarning, match="the weights of 3 are not frozen"):
        decay_groups(folded, 0.1)


def whole_model(model):
    freeze(model)


def group(model):
    banks(model)["Linear 8x8"].requires_grad_(False)


def all_but_the_coefficients(model):
    model.requires_grad_(False)
    for bank in banks(model).values():
        bank.coefficients.requires_grad_(True)


def templates(model):
    banks(model)["Linear 8x8"].templates.requires_grad_(False)


def biases(model):
    for layer in model:
        layer.bias.requires_grad_(False)


@pytest.mark.parametrize("way", [whole_model, group, all_but_the_coefficients, templates, biases, lambda model: None])
def test_the_documented_ways_to_freeze_do_what_they_say_without_a_warning(way):
    model = stack()
    share_(model, 2)
    way(model)
    before = [layer.weight.detach().clone() for layer in model]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups = decay_groups(model, 0.0)
    if way is whole_model:
        return
    model(torch.randn(3, 8)).square().sum().backward()
    torch.optim.SGD(groups, lr=0.1).step()
    moved = [not torch.equal(layer.weight, old) for layer, old in zip(model, before, strict=True)]
    assert moved == [way is not group] * 4


def test_one_layer_is_frozen_before_sharing_and_stays_as_it_was():
    model = stack()
    model[1].weight.requires_grad_(False)
    old = model[1].weight.clone()
    with pytest.warns(UserWarning, match=r"alone: 1 \(frozen\)"):
        (bank,) = share_(model, 2).values()
    assert bank.num_layers == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = torch.optim.SGD(decay_groups(model, 0.1), lr=0.1)
    model(torch.randn(3, 8)).square().sum().backward()
    optimizer.step()
    assert torch.equal(model[1].weight, old)


def test_a_copy_and_a_frozen_fold_remember_the_purpose():
    import copy

    model = stack()
    share_(model, 2)
    group(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", softshare.folding.WithinChance)
        for each in (copy.deepcopy(model), softshare.fold(model, 0.1)):
            decay_groups(each, 0.1)
    banks(model)["Linear 8x8"].requires_grad_(True)
    freeze(model[0])
    with pytest.warns(UserWarning, match="is frozen"):
        decay_groups(model, 0.1)


# ---------------------------------------------------------------------------------------------------- what is left alone


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_layers_are_left_alone_by_name(dtype):
    model = nn.ModuleList([stack(2), stack(2).to(dtype)])
    before = model[1][0].weight
    with pytest.warns(UserWarning, match=r"1.0 \(its weight is of dtype complex\d+\), 1.1 \("):
        (bank,) = share_(model, 2).values()
    assert bank.num_layers == 2 and model[1][0].weight is before
    with pytest.raises(TypeError, match="floating-point one, got torch.complex64"):
        softshare.TemplateBank(2, 2, (3, 3), dtype=torch.complex64)


def test_weights_that_share_memory_are_left_alone_and_stay_tied():
    encoder, decoder = stack(3), nn.Linear(8, 8)
    decoder.weight = nn.Parameter(encoder[0].weight.t())
    model = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    with pytest.warns(UserWarning, match=r"encoder.0 \(its weight shares memory with another parameter\), decoder \("):
        (bank,) = share_(model, 2).values()
    assert bank.num_layers == 2 and torch.equal(decoder.weight, encoder[0].weight.t())


def test_weights_side_by_side_in_one_buffer_do_not_share_memory(recwarn):
    """Parameters that are flattened into one vector, as some optimizers want them."""
    model = stack(3)
    vector = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    nn.utils.vector_to_parameters(vector, model.parameters())
    assert model[0].weight.untyped_storage().data_ptr() == model[1].weight.untyped_storage().data_ptr()
    assert overlapping_weights(model) == set()
    assert next(iter(share_(model, 2).values())).num_layers == 3 and len(recwarn) == 0


def test_overlaps_are_found_whatever_their_order():
    memory = torch.randn(100)
    model = nn.Module()
    for name, start, size in (("a", 0, 50), ("b", 10, 5), ("c", 40, 20), ("d", 60, 40), ("lone", 0, 0)):
        model.register_parameter(name, nn.Parameter(memory[start : start + size]))
    found = overlapping_weights(model)
    assert {name for name, p in model.named_parameters() if id(p) in found} == {"a", "b", "c"}
    with torch.device("meta"):
        assert overlapping_weights(stack(3)) == set(), "on the meta device nothing has an address"


class Mine(nn.Linear):
    plain_class = "mine too"

    def __init__(self):
        super().__init__(8, 8)
        self.source, self.name, self.init = "mine", "a", "b"


def test_a_layers_own_attributes_survive():
    model = nn.Sequential(Mine(), Mine())
    share_(model, 2)
    for layer in (*model, *unshare(model)):
        assert (layer.source, layer.name, layer.init, layer.plain_class) == ("mine", "a", "b", "mine too")


# --------------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "way",
    [
        nn.utils.spectral_norm,
        nn.utils.weight_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: layer.register_parameter("weight", nn.Parameter(torch.zeros(8, 8))),
        lambda layer: layer._parameters.__setitem__("weight", nn.Parameter(torch.zeros(8, 8))),
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(8, 8))),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_giving_a_shared_layer_its_own_weight_is_refused_with_the_way_that_works(way):
    model = stack(2)
    share_(model, 2)
    before = model(torch.ones(1, 8))
    with pytest.raises((RuntimeError, AttributeError), match="mixed from its template bank .* softshare.unshare"):
        way(model[1])
    torch.testing.assert_close(model(torch.ones(1, 8)), before, msg="the model is broken")
    plain = unshare(model)
    way(plain[1])


@pytest.mark.parametrize("strict", [True, False])
def test_plain_weights_are_not_dropped_silently(strict):
    plain, model = stack(3), stack(3)
    share_(model, 2)
    with pytest.raises(RuntimeError, match=r"2.weight is a plain weight, .*before share_\(..., init=\"svd\"\)"):
        model.load_state_dict(plain.state_dict(), strict=strict)
    model.load_state_dict(model.state_dict(), strict=strict)


def test_reading_other_parameters_works_as_usual():
    model = stack(2)
    share_(model, 2)
    parameters = model[0]._parameters
    assert list(parameters) == ["bias"] and "weight" not in parameters and parameters.get("weight") is None
    with pytest.raises(KeyError):
        parameters["other"]
    del parameters["bias"]
    parameters["bias"] = nn.Parameter(torch.zeros(8))
    assert model(torch.ones(1, 8)).shape == (1, 8)


def test_what_is_made_under_inference_mode_learns_or_is_refused():
    with torch.inference_mode():
        model = stack(2)
        with pytest.raises(ValueError, match="'0.weight' of the model was made under torch.inference_mode"):
            share_(model, 2)
        with pytest.raises(ValueError, match="inference_mode"):
            softshare.models.swrn(16, 1)
    model = stack(2)
    with torch.inference_mode():
        share_(model, 2)
        made = [model, unshare(model), softshare.fold(model, 0.1), softshare.fold(model, 1.0)]
        bank = softshare.TemplateBank(2, 2, (3, 3))
    bank().sum().backward()
    for each in made:
        each(torch.ones(1, 8)).square().sum().backward()
        assert all(parameter.grad is not None for parameter in each.parameters())


@pytest.mark.parametrize("make", [lambda: softshare.models.wrn(10, 1), lambda: softshare.models.gridnet(2, 4)])
def test_our_networks_can_be_traced_and_report_that_they_cannot_be_scripted(make):
    model = make().eval()
    channels = 2 if isinstance(model, softshare.models.grid.GridNet) else 3
    x = torch.randn(2, channels, 16, 16)
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x), model(x))
    with contextlib.suppress(ImportError):
        torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))
    with pytest.raises(RuntimeError, match="cannot be scripted; use torch.compile, torch.export"):
        torch.jit.script(model)


def test_features_of_a_traced_network_are_its_stages():
    """What feature extractors do: cut the traced graph after a stage."""
    model = unshare(softshare.models.swrn(16, 1)).eval()
    traced = torch.fx.symbolic_trace(model)
    last = [node for node in traced.graph.nodes if node.op == "call_module" and str(node.target).startswith("stage2")][
        -1
    ]
    added = next(node for node in traced.graph.nodes if last in node.all_input_nodes)
    traced.graph.erase_node(next(node for node in traced.graph.nodes if node.op == "output"))
    traced.graph.output(added)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    x = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(traced(x), model.stage2(model.stage1(model.stem(x))))


def test_a_replaced_head_is_called():
    model = softshare.models.wrn(10, 1).eval()
    model.classifier = nn.Identity()
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 64)


def test_a_shared_model_reports_that_it_cannot_be_scripted():
    model = stack(2)
    share_(model, 2)
    with pytest.raises(RuntimeError, match="softly shared model cannot be scripted.*softshare.unshare"):
        torch.jit.script(model)
    torch.jit.script(unshare(model))


# ----------------------------------------------------------------------------------------- sharing at the wrong moment


def test_an_optimizer_made_before_sharing_warns_at_its_first_step():
    """It would silently train only the biases."""
    model = stack()
    early = torch.optim.Adam(model.parameters(), lr=0.1)
    share_(model, 2)
    late = torch.optim.SGD(decay_groups(model, 0.0), lr=0.1)
    model(torch.randn(3, 8)).square().sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        late.step()
    with pytest.warns(
        UserWarning, match="optimizer was made before share_: 4 of its parameters belong to no layer"
    ) as caught:
        early.step()
    assert caught[0].filename == __file__, "the warning points at the step"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        early.step()  # once is enough


def test_optimizers_of_other_models_do_not_warn():
    model, other = stack(), stack()
    kept = list(model.parameters())  # keeping a reference trains nothing
    share_(model, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.randn(3, 8)).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert len(kept) == 8


def test_a_model_that_is_already_wrapped_is_refused(tmp_path):
    """The wrapper already knows whose gradients it averages; those of the banks would differ between processes."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = stack()
        wrapped = nn.parallel.DistributedDataParallel(model)
        with pytest.raises(RuntimeError, match="share the model first, then wrap it in DistributedDataParallel"):
            share_(wrapped, 2)
        assert banks(model) == {}
        share_(model, 2)
        again = nn.parallel.DistributedDataParallel(model)
        again(torch.randn(3, 8)).sum().backward()
        assert banks(again)["Linear 8x8"].templates.grad is not None
    finally:
        torch.distributed.destroy_process_group()


def test_a_group_is_named_without_addresses():
    """Its name is written into plans, which must fit the same model in another process."""

    class Key:
        pass

    model, key = stack(), Key()
    share_(model, 2, lambda name, layer: key)
    (name,) = banks(model)
    assert "0x" not in name and "Key object" in name


def test_freezing_a_block_of_a_network_without_biases_is_warned_of():
    """Its BatchNorms show what was meant."""
    model = softshare.models.swrn(28, 1)
    model.stage1[2].requires_grad_(False)
    with pytest.warns(UserWarning, match="the weights of stage1.2.conv1, stage1.2.conv2 are not frozen, although"):
        decay_groups(model, 0.0)
    model = softshare.models.swrn(28, 1)
    model.requires_grad_(False)
    model.stage1[1].requires_grad_(True)  # to train this block alone
    with pytest.warns(UserWarning, match="the weights of .*stage1.2.conv1.* are not frozen, although"):
        decay_groups(model, 0.0)


def test_training_a_head_alone_is_no_reason_to_warn():
    for model in (stack(bias=False), nn.Sequential(*stack(bias=False), nn.LayerNorm(8))):
        model.append(nn.Linear(8, 2))
        share_(model, 2)
        model.requires_grad_(False)
        model[-1].requires_grad_(True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            decay_groups(model, 0.0)


@pytest.mark.parametrize("threshold", [0.01, 0.9])
def test_the_way_to_freeze_a_group_that_the_warning_names_works_after_a_fold_too(threshold):
    torch.manual_seed(3)
    model = stack(6)
    share_(model, 4)
    folded = softshare.fold(model, threshold)
    for layer in folded:
        for parameter in layer.parameters():
            parameter.requires_grad = False
        break
    layers = [layer for layer in folded if hasattr(layer, "softshare_source")]
    if not layers or any(p.requires_grad for p in layers[0].softshare_source[0].parameters()):
        pytest.skip("the first layer does not hold what the others draw from")
    with pytest.warns(UserWarning) as caught:
        decay_groups(folded, 0.0)
    way = str(caught[0].message).partition("call ")[2]
    eval(way, {"model": folded})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decay_groups(folded, 0.0)


def test_every_early_optimizer_is_warned_of_once():
    model = stack()
    first, second = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    share_(model, 2)
    model(torch.randn(3, 8)).sum().backward()
    for optimizer in (first, second):
        with pytest.warns(UserWarning, match="made before share_"):
            optimizer.step()


def test_buffers_made_under_inference_mode_are_refused_too():
    model = nn.Sequential(*stack(), nn.BatchNorm1d(8))
    with torch.inference_mode():
        model[-1].running_mean = torch.zeros(8)
    with pytest.raises(ValueError, match="'4.running_mean' of the model was made under torch.inference_mode"):
        share_(model, 2)
