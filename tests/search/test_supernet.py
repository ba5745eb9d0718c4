"""The gate vectors against the paper's superweights written out, on whole models in float64."""

import pytest
import search_models as models
import torch
from peft import LoraConfig, get_peft_model

from lvnas.errors import InputError
from lvnas.supernet import Supernet, check_space, factor, slice_masks, superweight_gates

SPACE = [0, 1, 2, 4, 8]
FAMILIES = {
    "mllama": (models.mllama, models.mllama_batch),
    "llama": (models.llama, models.text_batch),
    "qwen2_vl": (models.qwen2_vl, models.qwen2_vl_batch),
    "vit": (models.vit, models.vit_batch),
}


def double(batch):
    """The batch in float64, with its float input (pixels, or embeddings for text-only) as a leaf `x`."""
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    if "pixel_values" not in batch:
        ids = batch.pop("input_ids")
        batch["inputs_embeds"] = torch.randn(*ids.shape, 32, dtype=torch.float64)
    x = batch["pixel_values" if "pixel_values" in batch else "inputs_embeds"].requires_grad_()
    return batch, x


def centred_slices(ranks, highest):
    """The paper's slices as index ranges, written independently of `slice_masks`."""
    return [range((highest - r) // 2, (highest - r) // 2 + r) for r in ranks]


def written_out_loss(model, batch, alpha, matrices, ranks, scale):
    """Loss of the base with s * (sum_k p_k B[:, slice_k]) (sum_k p_k A[slice_k]) added to its weights."""
    weights = {}
    for p, (name, (a, b)) in zip(torch.softmax(alpha, dim=-1), matrices.items(), strict=True):
        a_super, b_super = torch.zeros_like(a), torch.zeros_like(b)
        for k, dims in enumerate(centred_slices(ranks, a.shape[0])):
            index = torch.tensor(list(dims), dtype=torch.long)
            a_super = a_super.index_add(0, index, p[k] * a[index])
            b_super = b_super.index_add(1, index, p[k] * b[:, index])
        weights[f"{name}.weight"] = model.get_submodule(name).weight + scale * b_super @ a_super
    return torch.func.functional_call(model, weights, kwargs=batch).loss


def random_lora(net, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for weight in net.weights():
        weight.data = weight.data.new_empty(weight.shape).normal_(std=0.2, generator=generator)


@pytest.mark.parametrize("ranks", [SPACE, [4, 8, 16, 32, 64]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_gates_equal_written_out_superweights(family, ranks):
    make, make_batch = FAMILIES[family]
    oracle = make().double().requires_grad_(False)
    net = Supernet(make().double(), "all", ranks, scale=1.5)
    random_lora(net)
    batch, x = double(make_batch())
    start = torch.randn(len(net.shapes), len(ranks), dtype=torch.float64)

    alpha = start.clone().requires_grad_()
    gates = superweight_gates(alpha, slice_masks(ranks, centred=True))
    for gate in net.gates.values():
        gate.data = gate.data.double()
    net.set_gates(gates.detach())
    loss = net.loss(batch)
    loss.backward()
    gates.backward(torch.stack([gate.grad for gate in net.gates.values()]))

    copies = {n: tuple(m.detach().clone().requires_grad_() for m in net.matrices(n)) for n in net.shapes}
    oracle_alpha = start.clone().requires_grad_()
    oracle_batch, oracle_x = double(make_batch())
    if "inputs_embeds" in batch:
        oracle_batch["inputs_embeds"] = oracle_x = batch["inputs_embeds"].detach().clone().requires_grad_()
    oracle_loss = written_out_loss(oracle, oracle_batch, oracle_alpha, copies, ranks, 1.5)
    oracle_loss.backward()

    close = {"rtol": 1e-6, "atol": 1e-9}
    torch.testing.assert_close(loss, oracle_loss, **close)
    torch.testing.assert_close(alpha.grad, oracle_alpha.grad, **close)
    torch.testing.assert_close(x.grad, oracle_x.grad, **close)
    assert oracle_alpha.grad.abs().max() > 1e-4
    for name, (a, b) in copies.items():
        for mine, theirs in zip(net.matrices(name), (a, b), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, **close)


@pytest.mark.parametrize("rank", SPACE)
def test_a_one_hot_alpha_is_lora_at_that_rank(rank):
    net = Supernet(models.mllama().double(), "all", SPACE)
    random_lora(net)
    masks = slice_masks(SPACE, centred=True)
    alpha = torch.full((len(net.shapes), len(SPACE)), -1e4)
    alpha[:, SPACE.index(rank)] = 0
    net.set_gates(superweight_gates(alpha, masks))
    batch, _ = double(models.mllama_batch())
    supernet_loss = net.loss(batch).item()

    plain = models.mllama().double()
    if rank:
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(net.shapes))
        dims = list(centred_slices([rank], max(SPACE))[0])
        plain = get_peft_model(plain, config)
        for name in net.shapes:
            a, b = net.matrices(name)
            layer = plain.base_model.model.get_submodule(name)
            layer.lora_A["default"].weight.data = a.data[dims]
            layer.lora_B["default"].weight.data = b.data[:, dims]
    assert supernet_loss == pytest.approx(plain(**batch).loss.item(), rel=1e-9)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = models.mllama()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        net = Supernet(model, "all", SPACE)
        random_lora(net)
        net.set_gates(torch.rand(len(net.shapes), max(SPACE), generator=torch.Generator().manual_seed(3)))
        net.peft.train()
        net.loss(models.mllama_batch()).backward()
        gradients.append((net.take_gate_gradients(), [weight.grad for weight in net.weights()]))
    (gates, weights), (gates_again, weights_again) = gradients
    reached = gates.abs().sum(dim=1) > 0
    assert reached.all()
    torch.testing.assert_close(gates, gates_again)
    torch.testing.assert_close(weights, weights_again)


@pytest.mark.parametrize("gates", ["ones", "halves"])
def test_gates_that_nobody_watches_cost_no_memory(gates):
    """What autograd keeps for the backward pass, against plain LoRA at the highest rank."""

    def kept(loss):
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = loss()
        del result
        return sum(storages.values())

    net = Supernet(models.mllama(), "all", [4, 64])
    config = LoraConfig(r=64, lora_alpha=64, target_modules=list(net.shapes))
    plain = get_peft_model(models.mllama(), config)
    batch = models.mllama_batch(size=8)
    expected = kept(lambda: plain(**batch).loss)
    if gates == "halves":
        net.set_gates(torch.full((len(net.shapes), 64), 0.5))
    watched = kept(lambda: net.loss(batch))
    net.watch_gates(False)
    assert kept(lambda: net.loss(batch)) < 1.02 * expected
    assert watched > 1.05 * expected


def test_half_precision_base():
    net = Supernet(models.mllama().to(torch.bfloat16), "all", SPACE)
    random_lora(net)
    batch = models.mllama_batch()
    batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
    net.loss(batch).backward()
    assert torch.isfinite(net.take_gate_gradients()).all()
    assert all(weight.grad.dtype == torch.float32 for weight in net.weights())


def test_factor_of_shapes_smaller_than_the_rank():
    a, b = torch.randn(8, 3, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    u, sigma, vt = factor(b, a)
    assert u.shape == (5, 8) and sigma.shape == (8,) and vt.shape == (8, 3)
    torch.testing.assert_close(u * sigma @ vt, b @ a)


def test_close_gives_the_base_back():
    model = models.mllama()
    expected = model(**models.mllama_batch()).loss
    net = Supernet(model, "all", SPACE)
    random_lora(net)
    assert net.loss(models.mllama_batch()) != expected
    base = net.close()
    assert base(**models.mllama_batch()).loss == expected
    assert not any("lora" in name for name, _ in base.named_parameters())


def test_bad_input():
    for ranks in ([], [4], [4, 4], [-1, 2]):
        with pytest.raises(InputError, match="two or more different"):
            check_space(ranks)
    with pytest.raises(InputError, match="match no linear module"):
        Supernet(models.llama(), "fc1", SPACE)
    with pytest.raises(InputError, match="already has LoRA"):
        Supernet(Supernet(models.llama(), "qk", SPACE).peft, "qk", SPACE)
