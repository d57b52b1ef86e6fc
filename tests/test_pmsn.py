"""pmsn.py against numbers computed from the paper's formulas (tests/golden/pmsn), and against msn.py."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import msn
import pmsn
from pmsn import Config, World

GOLDEN = Path(__file__).parent / "golden" / "pmsn"
MSN_GOLDEN = Path(__file__).parent / "golden" / "msn"
TINY = dict(image_size=16, patch=4, focal_size=8, width=16, heads=2, depth=2, head_hidden=20, embedding=12,
            prototypes=10, batch=4, focal_views=3, drop=0.3)  # fmt: skip
ALONE = World(0, 1, torch.device("cpu"))
NOISE = {"norm.bias", "fc.fc1.bias", "fc.fc2.bias", "blocks.0.attn.qkv.bias", "blocks.1.attn.qkv.bias"}


def golden(name, folder=GOLDEN):
    return np.load(folder / f"{name}.npz")


def tensor(array, dtype=torch.float32):
    return torch.from_numpy(np.asarray(array)).to(dtype)


def close(actual, expected, atol=0.0, rtol=0.0):
    """Assert that two arrays are equal within tolerances."""
    actual, expected = (torch.as_tensor(np.asarray(x)).double() for x in (actual, expected))
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


# ----------------------------------------------------------------------------------------------------------- parity


def test_power_law_prior():
    g = golden("prior")
    for i, (count, tau) in enumerate(zip(g["K"], g["tau"])):
        prior = pmsn.power_law(int(count), float(tau))
        close(prior, g[f"pi_{i}"], atol=1e-12)
        close(torch.special.entr(prior).sum(), g["entropy"][i], atol=1e-12)
    close(pmsn.make_prior(Config(prototypes=10)), g["pi_0"], atol=1e-12)
    close(pmsn.make_prior(Config(prototypes=10, prior="uniform")), [0.1] * 10, atol=1e-12)


def test_loss_and_gradients():
    g = golden("loss")
    log_prior, weight = tensor(g["prior"]).log(), float(g["lam"])
    for total in (True, False):
        anchors, prototypes = (tensor(g[k]).requires_grad_() for k in ("anchors", "prototypes"))
        cross_entropy, kl, assigned = pmsn.pmsn_loss(
            anchors, tensor(g["targets_z"]), F.normalize(prototypes, dim=1), log_prior
        )
        close(cross_entropy.detach(), g["ce_plain"], atol=1e-5)
        close(kl.detach(), g["kl_mean_to_prior"], atol=1e-5)
        close(assigned, g["target_probs_plain"], atol=1e-5)
        close((cross_entropy + weight * kl).detach(), g["total_forward_kl"], atol=1e-5)
        (cross_entropy + weight * kl if total else kl).backward()
        kind = "total" if total else "reg"
        close(anchors.grad, g[f"grad_anchors_{kind}"], atol=1e-5)
        close(prototypes.grad, g[f"grad_prototypes_{kind}"], atol=1e-5)
    q, uniform = F.normalize(prototypes.detach(), dim=1), torch.full((10,), 0.1).log()
    mean = pmsn.log_assignments(anchors.detach(), q).exp().mean(0)
    close(mean, g["mean_anchor_probs"], atol=1e-6)
    for name, prior in (("uniform", uniform), ("prior", log_prior)):
        found = pmsn.pmsn_loss(anchors.detach(), tensor(g["targets_z"]), q, prior, sinkhorn_iterations=3)
        close(found[0], g[f"ce_sinkhorn_{name}"], atol=1e-5)
        close(found[2], g[f"target_probs_sinkhorn_{name}"], atol=1e-5)
    close(pmsn.divergence(mean.log(), uniform), g["kl_mean_to_uniform"], atol=1e-5)
    for rounds in (
        0,
        3,
    ):  # the re-implementation whose divergence is the other way round, and whose Sinkhorn is uniform
        anchors = tensor(g["anchors"]).requires_grad_()
        cross_entropy, kl, _ = pmsn.pmsn_loss(anchors, tensor(g["targets_z"]), q, log_prior, reverse=True)
        close(kl.detach(), g["kl_prior_to_mean"], atol=1e-5)
        if rounds:
            cross_entropy, _, _ = pmsn.pmsn_loss(anchors, tensor(g["targets_z"]), q, uniform, sinkhorn_iterations=3)
        total = cross_entropy + weight * kl
        close(total.detach(), g[f"lightly_reverse_kl_total_sink{rounds}"], atol=1e-5)
        total.backward()
        close(anchors.grad, g[f"lightly_reverse_kl_grad_anchors_sink{rounds}"], atol=1e-5)


def test_sinkhorn_to_a_prior():
    g = golden("sinkhorn_prior")
    log_q, log_prior = tensor(g["Q"], torch.float64).log(), tensor(g["marginal"], torch.float64).log()
    close(pmsn.sinkhorn(log_q, 3, log_prior).exp(), g["out3"], atol=1e-6)
    many = pmsn.sinkhorn(log_q, 50, log_prior).exp()
    close(many, g["out50"], atol=1e-6)
    close(many.mean(0), g["marginal"], atol=1e-6)
    close(pmsn.sinkhorn(log_q, 3, torch.zeros(6)).exp(), g["out3_uniform"], atol=1e-6)


def test_long_tail_sizes():
    g = golden("longtail")
    for key in g.files:
        kind, largest, classes, value = key.split("_")
        options = {"power": float(value)} if kind == "power" else {"imbalance": float(value)}
        assert pmsn.tail_sizes(int(largest), int(classes), **options) == g[key].tolist(), key
    assert pmsn.tail_sizes(7, 1, imbalance=100) == [7]


def test_accuracy_by_frequency():
    g = golden("metrics")
    found = pmsn.by_frequency(*(torch.from_numpy(g[k]) for k in ("preds", "labels")), g["train_counts"].tolist())
    close(found["per_class"], 100 * g["per_class"], atol=1e-10)
    names = dict(balanced="balanced_acc", head="head3", mid="mid4", tail="tail3", many="many_gt100",
                 medium="medium_20_100", spread="std_over_classes")  # fmt: skip
    for ours, theirs in names.items():
        close(found[ours], 100 * g[theirs], atol=1e-10)
    assert "few" not in found
    usage = torch.from_numpy(golden("loss")["mean_anchor_probs"])
    close(-pmsn.divergence(usage.log(), torch.zeros(10)), g["proto_usage_entropy"], atol=1e-10)


def test_four_training_steps():
    """MSN's model, optimizer and schedules with the divergence in place of ME-MAX, against a reference run."""
    g, forward = golden("train_trace"), golden("forward", MSN_GOLDEN)
    views = [tensor(forward[f"view{i}"]) for i in range(5)]
    per_epoch, epochs, warmup, start_lr, lr, final_lr, wd, final_wd, clip, weight, tau = g["hyper"]
    config = Config(**TINY, warmup=warmup / epochs, lr=lr, lr_start=start_lr, lr_final=final_lr, weight_decay=wd,
                    weight_decay_final=final_wd, momentum=0.996, schedule_scale=1.25, weight=weight,
                    tau=tau)  # fmt: skip
    model, _ = pmsn.build(config)
    close(model.log_prior.exp(), g["prior"], atol=1e-7)
    path = MSN_GOLDEN / "tiny_msn.pth.tar"
    pmsn.load_weights(model, copy.deepcopy(model.network), pmsn.read_checkpoint(path, heads=2), path)
    target = copy.deepcopy(model.network)
    optimizer, ema, network = (
        pmsn.make_optimizer(model),
        common.OLD_EMA(target, model.network),
        [*model.network.parameters()],
    )
    for step in range(4):
        rate, decay, momentum, sharpen = pmsn.schedules(config, step, int(per_epoch * epochs))
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = rate, decay if group["decay"] else 0.0
        view, anchors = pmsn.anchors_by_size([torch.stack(views[:2]), torch.stack(views[2:])])
        with torch.no_grad():
            h = target(view)
        z, prototypes = model(anchors, (tensor(g["keep"][step], torch.long) - 1).expand(1, 4, -1))
        loss, parts, _ = model.objective(z, h, prototypes, sharpen)
        loss.backward()
        for key, value in dict(loss=loss, ce=parts["ce"], kl=parts["kl"]).items():
            close(value.detach(), g[key][step], atol=1e-3)
        norm = common.old_gradient_norm(network)
        close(norm, g["gnorm"][step], rtol=1e-3)
        torch.nn.utils.clip_grads_with_norm_(network, clip, norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(momentum)
    close(model.prototypes.detach(), g["prototypes_final"], atol=1e-3)
    ours = ({n.removeprefix("encoder."): p.detach() for n, p in m.named_parameters()} for m in (model.network, target))
    for parameters, key in zip(ours, ("encoder_norms", "target_norms")):
        for name, norm in zip(g["param_names"], g[key]):
            if name not in NOISE:
                close(parameters[str(name)].norm(), norm, rtol=1e-3)


# ------------------------------------------------------------------------------------------------------- promises


def test_a_uniform_prior_is_msn():
    """Term for term and in the gradients, with and without Sinkhorn."""
    random = common.old_generator(0)
    z, h, q = (torch.randn(n, 8, generator=random) for n in (24, 8, 12))
    for rounds in (0, 3):
        gradients = []
        for script in ("msn", "pmsn"):
            anchors, prototypes = z.clone().requires_grad_(), q.clone().requires_grad_()
            unit = F.normalize(prototypes, dim=1)
            if script == "msn":
                cross_entropy, spread, assigned = msn.msn_loss(anchors, h, unit, sinkhorn_iterations=rounds)
            else:
                uniform = torch.full((12,), 1 / 12).log()
                cross_entropy, spread, assigned = pmsn.pmsn_loss(anchors, h, unit, uniform, sinkhorn_iterations=rounds)
            (cross_entropy + 5 * spread).backward()
            gradients.append((cross_entropy.detach(), spread.detach(), assigned, anchors.grad, prototypes.grad))
        for a, b in zip(*gradients):
            close(a, b, atol=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("prior", ["uniform", "power-law"])
def test_the_mean_assignment_moves_to_the_prior(prior, reverse):
    log_prior = pmsn.make_prior(Config(prototypes=6, prior=prior, tau=1.0)).log().float()
    other = pmsn.make_prior(Config(prototypes=6, prior="uniform" if prior == "power-law" else "power-law", tau=1.0))
    random = common.old_generator(1)
    z, q = (
        torch.randn(64, 8, generator=random).requires_grad_(),
        F.normalize(torch.randn(6, 8, generator=random), dim=1),
    )
    optimizer = torch.optim.Adam([z], lr=0.05)
    for _ in range(300):
        _, kl, _ = pmsn.pmsn_loss(z, z.detach(), q, log_prior, reverse=reverse)
        assert kl.item() > -1e-6
        optimizer.zero_grad()
        kl.backward()
        optimizer.step()
    mean = pmsn.log_assignments(z.detach(), q).exp().mean(0)
    assert kl.item() < 1e-3
    close(mean, log_prior.exp(), atol=0.02)
    assert pmsn.divergence(mean.log(), other.log().float()) > 0.1
    assert pmsn.divergence(log_prior, log_prior).item() == pytest.approx(0, abs=1e-7)


def test_priors_from_counts_and_files(tmp_path, capsys):
    counts = [50, 0, 5000, 500]
    close(pmsn.make_prior(Config(prototypes=3, prior="counts"), counts), np.array([5000, 500, 50]) / 5550, atol=1e-12)
    stretched = pmsn.make_prior(Config(prototypes=5, prior="counts"), counts)
    close(stretched, (x := 10.0 ** np.array([2, 1.5, 1, 0.5, 0])) / x.sum(), atol=1e-12)
    np.save(tmp_path / "prior.npy", np.array([1.0, 2.0, 1.0]))
    config = Config(prototypes=3, prior=str(tmp_path / "prior.npy"))
    close(pmsn.make_prior(config), [0.25, 0.5, 0.25], atol=1e-12)
    np.save(tmp_path / "zero.npy", np.array([1.0, 0.0, 1.0]))
    (tmp_path / "text.npy").write_text("hello")
    bad = (
        (config.prior, 4, "4 positive numbers"),
        (tmp_path / "zero.npy", 3, "positive"),
        (tmp_path / "text.npy", 3, ".npy"),
    )
    for prior, count, words in bad:
        with pytest.raises(SystemExit):
            pmsn.make_prior(Config(prototypes=count, prior=str(prior)))
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        pmsn.make_prior(Config(prior="counts"), [])


def toy_split(**changes):
    config = Config(batch=40, **changes)
    return config, pmsn.open_split(config, "train")


def test_long_tailed_subset_is_seeded():
    config, whole = toy_split(imbalance=100.0)
    log = common.OldLog("out", ALONE)
    tail = pmsn.long_tail(whole, config, log)
    assert pmsn.class_counts(tail) == pmsn.tail_sizes(800, 10, 100.0)
    again = pmsn.long_tail(whole, config, log)
    assert torch.equal(tail.pixels, again.pixels)
    other = pmsn.long_tail(whole, replace(config, seed=1), log)
    assert pmsn.class_counts(other) == pmsn.class_counts(tail) and not torch.equal(tail.pixels, other.pixels)
    mixed = pmsn.class_counts(pmsn.long_tail(whole, replace(config, tail_order=3), log))
    assert sorted(mixed) == sorted(pmsn.class_counts(tail)) and mixed != pmsn.class_counts(tail)
    Path("list.txt").write_text("".join(f"{p} {i}\n" for i, p in enumerate(whole.paths[:30])))
    listed = pmsn.long_tail(whole, replace(config, imbalance=0.0, train_list="list.txt"), log)
    assert listed.paths == whole.paths[:30]
    power = pmsn.long_tail(whole, replace(config, imbalance=0.0, power_tail=1.0), log)
    assert pmsn.class_counts(power) == pmsn.tail_sizes(800, 10, power=1.0)


def test_batches_of_few_classes_keep_every_image_equally_likely():
    config, split = toy_split(classes_per_batch=2, prototypes=16)
    order = torch.cat([pmsn.epoch_order(split, config, "train", epoch) for epoch in range(20)])
    assert len(order) == 20 * 8000
    classes = [len(rows.unique()) for rows in split.labels[order].view(-1, 40)]
    assert set(classes) == {2}
    seen = order.bincount(minlength=8000)
    # an image is drawn as often as any other: its count over 20 epochs scatters around 20
    assert 19.5 < seen.float().mean() < 20.5 and seen.float().std() < 3 and seen.min() > 5
    assert torch.equal(pmsn.epoch_order(split, config, "train", 3), pmsn.epoch_order(split, config, "train", 3))
    assert len(pmsn.epoch_order(split, config, "probe", 0).unique()) == 8000
    whole = pmsn.Views(split, config, ALONE, 40, pmsn.view_groups(config))[7]["indices"]
    half = pmsn.Views(split, config, World(1, 2, ALONE.device), 40, pmsn.view_groups(config))[7]["indices"]
    assert torch.equal(whole[20:], half) and len(split.labels[whole].unique()) == 2
    with pytest.raises(SystemExit):
        pmsn.epoch_order(split, replace(config, classes_per_batch=20), "train", 0)
