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
from pmsn import Config

GOLDEN = Path(__file__).parent / "golden" / "pmsn"
MSN_GOLDEN = Path(__file__).parent / "golden" / "msn"
TINY = {"image_size": 16, "patch": 4, "focal_size": 8, "width": 16, "heads": 2, "depth": 2}
TINY.update(head_hidden=20, embedding=12, prototypes=10, batch=4, focal_views=3, drop=0.3)
NOISE = {"norm.bias", "fc.fc1.bias", "fc.fc2.bias"}
NOISE |= {"blocks.0.attn.qkv.bias", "blocks.1.attn.qkv.bias"}
NONE = torch.zeros(0, dtype=torch.long)


def golden(name, folder=GOLDEN):
    return np.load(folder / f"{name}.npz")


def tensor(array, dtype=torch.float32):
    return torch.from_numpy(np.asarray(array)).to(dtype)


def close(actual, expected, atol=0.0, rtol=0.0):
    """Assert that two arrays are equal within tolerances."""
    actual, expected = (torch.as_tensor(np.asarray(x)).double() for x in (actual, expected))
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


# ----------------------------------------------------------------------------------------- parity


def test_power_law_prior():
    g = golden("prior")
    for i, (count, tau) in enumerate(zip(g["K"], g["tau"], strict=True)):
        prior = pmsn.power_law(int(count), float(tau))
        close(prior, g[f"pi_{i}"], atol=1e-12)
        close(torch.special.entr(prior).sum(), g["entropy"][i], atol=1e-12)
    close(pmsn.make_prior(Config(prototypes=10), NONE), g["pi_0"], atol=1e-12)
    uniform = pmsn.make_prior(Config(prototypes=10, prior="uniform"), NONE)
    close(uniform, [0.1] * 10, atol=1e-12)


def test_loss_and_gradients():
    g = golden("loss")
    log_prior, weight = tensor(g["prior"]).log(), float(g["lam"])
    targets = tensor(g["targets_z"])
    for kind in ("total", "reg"):
        anchors, prototypes = (tensor(g[k]).requires_grad_() for k in ("anchors", "prototypes"))
        q = F.normalize(prototypes, dim=1)
        cross_entropy, kl, assigned = pmsn.pmsn_loss(anchors, targets, q, log_prior)
        close(cross_entropy.detach(), g["ce_plain"], atol=1e-5)
        close(kl.detach(), g["kl_mean_to_prior"], atol=1e-5)
        close(assigned, g["target_probs_plain"], atol=1e-5)
        total = cross_entropy + weight * kl
        close(total.detach(), g["total_forward_kl"], atol=1e-5)
        (total if kind == "total" else kl).backward()
        close(anchors.grad, g[f"grad_anchors_{kind}"], atol=1e-5)
        close(prototypes.grad, g[f"grad_prototypes_{kind}"], atol=1e-5)
    q, uniform = q.detach(), torch.full((10,), 0.1).log()
    mean = pmsn.log_assignments(anchors.detach(), q).exp().mean(0)
    close(mean, g["mean_anchor_probs"], atol=1e-6)
    close(pmsn.divergence(mean.log(), uniform), g["kl_mean_to_uniform"], atol=1e-5)
    # the re-implementation whose divergence is the other way round; its Sinkhorn is MSN's
    for rounds in (0, 3):
        anchors = tensor(g["anchors"]).requires_grad_()
        cross_entropy, _, assigned = msn.msn_loss(anchors, targets, q, rounds)
        _, kl, _ = pmsn.pmsn_loss(anchors, targets, q, log_prior, reverse=True)
        close(kl.detach(), g["kl_prior_to_mean"], atol=1e-5)
        if rounds:
            close(cross_entropy.detach(), g["ce_sinkhorn_uniform"], atol=1e-5)
            close(assigned, g["target_probs_sinkhorn_uniform"], atol=1e-5)
        total = cross_entropy + weight * kl
        close(total.detach(), g[f"lightly_reverse_kl_total_sink{rounds}"], atol=1e-5)
        total.backward()
        close(anchors.grad, g[f"lightly_reverse_kl_grad_anchors_sink{rounds}"], atol=1e-5)


def test_long_tail_sizes():
    g = golden("longtail")
    for key in (key for key in g.files if key.startswith("exp")):
        _, largest, classes, ratio = key.split("_")
        assert pmsn.tail_sizes(int(largest), int(classes), float(ratio)) == g[key].tolist(), key
    assert pmsn.tail_sizes(7, 1, 100) == [7]


def test_accuracy_by_frequency():
    g = golden("metrics")
    predicted, labels = (torch.from_numpy(g[k]) for k in ("preds", "labels"))
    scores = F.one_hot(predicted, 10).float()
    accuracy = pmsn.class_accuracy(scores, labels, 10)
    close(accuracy, 100 * g["per_class"], atol=1e-10)
    found = pmsn.by_frequency(accuracy, torch.from_numpy(g["train_counts"]))
    names = {"balanced": "balanced_acc", "head": "head3", "mid": "mid4", "tail": "tail3"}
    names.update(many="many_gt100", medium="medium_20_100")
    for ours, theirs in names.items():
        close(found[ours], 100 * g[theirs], atol=1e-10)
    assert "few" not in found
    usage = torch.from_numpy(golden("loss")["mean_anchor_probs"])
    close(-pmsn.divergence(usage.log(), torch.zeros(10)), g["proto_usage_entropy"], atol=1e-10)


def test_four_training_steps():
    """MSN's model, optimizer and schedules with the divergence in place of ME-MAX."""
    g, forward = golden("train_trace"), golden("forward", MSN_GOLDEN)
    views = [tensor(forward[f"view{i}"]) for i in range(5)]
    per_epoch, epochs, warmup, start_lr, lr, final_lr, wd, final_wd, clip, weight, tau = g["hyper"]
    rates = {"warmup": warmup / epochs, "lr": lr, "lr_start": start_lr, "lr_final": final_lr}
    rates.update(weight_decay=wd, weight_decay_final=final_wd, momentum=0.996, schedule_scale=1.25)
    config = Config(**TINY, **rates, tau=tau)
    model, target = pmsn.build(config)
    prior = pmsn.make_prior(config, NONE)
    close(prior, g["prior"], atol=1e-7)
    path = MSN_GOLDEN / "tiny_msn.pth.tar"
    pmsn.load_weights(model, target, pmsn.read_weights(path, heads=2), path)
    target = copy.deepcopy(model.network)
    optimizer = pmsn.make_optimizer(model)
    ema = common.EMA(target, model.network)
    network = list(model.network.parameters())
    for step in range(4):
        rate, decay, momentum = pmsn.schedules(config, step, int(per_epoch * epochs))
        common.set_rates(optimizer, rate, decay)
        with torch.no_grad():
            h = target(views[0])
        keep = (tensor(g["keep"][step], torch.long) - 1).expand(4, -1)
        z, prototypes = model(views[1], keep, torch.cat(views[2:]))
        cross_entropy, kl, _ = pmsn.pmsn_loss(z, h, prototypes, prior.log().float())
        loss = cross_entropy + weight * kl
        loss.backward()
        for key, value in {"loss": loss, "ce": cross_entropy, "kl": kl}.items():
            close(value.detach(), g[key][step], atol=1e-3)
        norm = torch.nn.utils.clip_grad_norm_(network, clip)
        close(norm, g["gnorm"][step], rtol=1e-3)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(momentum, torch.ones(()))
    close(model.prototypes.detach(), g["prototypes_final"], atol=1e-3)
    for module, key in ((model.network, "encoder_norms"), (target, "target_norms")):
        ours = {n.removeprefix("encoder."): p.detach() for n, p in module.named_parameters()}
        for name, norm in zip(g["param_names"], g[key], strict=True):
            if name not in NOISE:
                close(ours[str(name)].norm(), norm, rtol=1e-3)


# --------------------------------------------------------------------------------------- promises


def test_a_uniform_prior_is_msn():
    """Term for term and in the gradients."""
    random = common.generator(0)
    z, h, q = (torch.randn(n, 8, generator=random) for n in (24, 8, 12))
    uniform = torch.full((12,), 1 / 12).log()
    found = []
    for loss in (msn.msn_loss, lambda *x: pmsn.pmsn_loss(*x, uniform)):
        anchors, prototypes = z.clone().requires_grad_(), q.clone().requires_grad_()
        cross_entropy, spread, assigned = loss(anchors, h, F.normalize(prototypes, dim=1))
        (cross_entropy + 5 * spread).backward()
        values = (cross_entropy.detach(), spread.detach(), assigned)
        found.append((*values, anchors.grad, prototypes.grad))
    for a, b in zip(*found, strict=True):
        close(a, b, atol=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_the_mean_assignment_moves_to_the_prior(tau, reverse):
    log_prior = pmsn.power_law(6, tau).log().float()
    other = pmsn.power_law(6, 1.0 - tau).log().float()
    random = common.generator(1)
    z = torch.randn(64, 8, generator=random).requires_grad_()
    q = F.normalize(torch.randn(6, 8, generator=random), dim=1)
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
    assert pmsn.divergence(mean.log(), other) > 0.1
    assert pmsn.divergence(log_prior, log_prior).item() == pytest.approx(0, abs=1e-7)


def test_priors_from_counts_and_files(tmp_path, capsys):
    counts = torch.tensor([50, 0, 5000, 500])
    found = pmsn.make_prior(Config(prototypes=3, prior="counts"), counts)
    close(found, np.array([5000, 500, 50]) / 5550, atol=1e-12)
    stretched = pmsn.make_prior(Config(prototypes=5, prior="counts"), counts)
    expected = 10.0 ** np.array([2, 1.5, 1, 0.5, 0])
    close(stretched, expected / expected.sum(), atol=1e-12)
    good, zero, text = (tmp_path / f"{name}.npy" for name in ("good", "zero", "text"))
    np.save(good, np.array([1.0, 2.0, 1.0]))
    np.save(zero, np.array([1.0, 0.0, 1.0]))
    text.write_text("hello")
    found = pmsn.make_prior(Config(prototypes=3, prior=str(good)), NONE)
    close(found, [0.25, 0.5, 0.25], atol=1e-12)
    bad = [(good, 4, "4 positive numbers"), (zero, 3, "positive"), (text, 3, ".npy")]
    for prior, count, words in [*bad, ("cubic", 3, "power-law"), ("counts", 3, "labelled")]:
        with pytest.raises(SystemExit):
            pmsn.make_prior(Config(prototypes=count, prior=str(prior)), NONE)
        assert words in capsys.readouterr().err


def test_long_tailed_subset_is_seeded():
    whole = common.open_split("textures", "train")
    config = Config(imbalance=100.0)
    tail = pmsn.long_tail(whole, config)
    assert pmsn.class_counts(tail).tolist() == pmsn.tail_sizes(800, 10, 100.0)
    assert pmsn.long_tail(whole, config).names == tail.names
    other = pmsn.long_tail(whole, replace(config, seed=1))
    assert pmsn.class_counts(other).tolist() == pmsn.class_counts(tail).tolist()
    assert other.names != tail.names
    Path("list.txt").write_text("\n".join(whole.names[:30]))
    listed = pmsn.long_tail(whole, Config(train_list="list.txt"))
    assert listed.names == whole.names[:30]


def test_batches_of_few_classes_keep_every_image_equally_likely():
    split = common.open_split("textures", "train")
    config = Config(batch=40, classes_per_batch=2)
    batches = [pmsn.batch_indices(split, config, step) for step in range(4000)]
    assert all(len(split.labels[rows].unique()) == 2 for rows in batches[:50])
    seen = torch.tensor(batches).flatten().bincount(minlength=8000).float()
    assert seen.mean() == 20 and seen.std() < 6 and seen.min() > 2
    by_class = torch.stack([seen[split.labels == k].mean() for k in range(10)])
    assert by_class.min() > 17 and by_class.max() < 23
    assert batches[3] == pmsn.batch_indices(split, config, 3) != batches[4]
    whole = pmsn.make_views(split, config, 0, 1, 7)
    half = pmsn.make_views(split, config, 1, 2, 7)
    assert torch.equal(whole[0][:, 20:], half[0])
