"""pmsn.py against numbers computed from the paper's formulas (golden/pmsn), and against msn.py."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import close, compare, golden_tensors
from test_msn import compare_parameters, train_steps

import common
import msn
import pmsn
from pmsn import Config

golden = functools.partial(golden_tensors, "pmsn")
NONE = torch.zeros(0, dtype=torch.long)

# ----------------------------------------------------------------------------------------- parity


def test_power_law_prior():
    g = golden("prior")
    for i, size in enumerate(g.K.tolist()):
        config = Config(prototypes=size, prior="power-law", tau=g.tau[i].item())
        prior = pmsn.make_prior(config, NONE)
        compare(g, atol=1e-12, **{f"pi_{i}": prior})
        compare(g, at=i, atol=1e-12, entropy=torch.special.entr(prior).sum())
    uniform = pmsn.make_prior(Config(prototypes=10, prior="uniform"), NONE)
    close(uniform, [0.1] * 10, atol=1e-12)


def test_loss_and_gradients():
    g = golden("loss")
    log_prior = g.prior.float().log()
    weight = g.lam.item()
    targets = g.targets_z
    for kind in ("total", "reg"):
        anchors = g.anchors.clone().requires_grad_()
        prototypes = g.prototypes.clone().requires_grad_()
        q = F.normalize(prototypes, dim=1)
        cross_entropy, kl, assigned = pmsn.pmsn_loss(anchors, targets, q, log_prior)
        total = cross_entropy + weight * kl
        (total if kind == "total" else kl).backward()
        found = {"ce_plain": cross_entropy, "kl_mean_to_prior": kl, "target_probs_plain": assigned}
        found.update(total_forward_kl=total)
        found[f"grad_anchors_{kind}"] = anchors.grad
        found[f"grad_prototypes_{kind}"] = prototypes.grad
        compare(g, atol=1e-5, **found)
    q = q.detach()
    mean = pmsn.log_assignments(anchors, q).exp().mean(0)
    to_uniform = pmsn.divergence(mean.log(), torch.full((10,), 0.1).log())
    compare(g, atol=1e-5, mean_anchor_probs=mean, kl_mean_to_uniform=to_uniform)
    # the re-implementation whose divergence is the other way round; its Sinkhorn is MSN's
    for rounds in (0, 3):
        anchors = g.anchors.clone().requires_grad_()
        cross_entropy, _, assigned = msn.msn_loss(anchors, targets, q, rounds)
        _, kl, _ = pmsn.pmsn_loss(anchors, targets, q, log_prior, reverse=True)
        total = cross_entropy + weight * kl
        total.backward()
        name = f"total_sink{rounds}", f"grad_anchors_sink{rounds}"
        found = dict(zip(name, (total, anchors.grad), strict=True))
        compare(g, "lightly_reverse_kl_", atol=1e-5, **found)
        compare(g, atol=1e-5, kl_prior_to_mean=kl)
    found = {"ce_sinkhorn_uniform": cross_entropy, "target_probs_sinkhorn_uniform": assigned}
    compare(g, atol=1e-5, **found)


def test_long_tail_sizes():
    g = golden("longtail")
    for key in (key for key in g if key.startswith("exp")):
        _, largest, classes, ratio = key.split("_")
        found = pmsn.tail_sizes(int(largest), int(classes), float(ratio))
        compare(g, **{key: found})
    assert pmsn.tail_sizes(7, 1, 100) == [7]


def test_accuracy_by_frequency():
    g = golden("metrics")
    accuracy = pmsn.class_accuracy(F.one_hot(g.preds, 10).float(), g.labels, 10)
    found = pmsn.by_frequency(accuracy, g.train_counts)
    names = {"balanced": "balanced_acc", "head": "head3", "mid": "mid4", "tail": "tail3"}
    names.update(many="many_gt100", medium="medium_20_100")
    assert found.keys() == names.keys()  # no class has fewer than 20 images
    shares = {names[name]: value / 100 for name, value in found.items()}
    usage = golden("loss").mean_anchor_probs
    entropy = -pmsn.divergence(usage.log(), torch.zeros(10))
    compare(g, atol=1e-10, per_class=accuracy / 100, proto_usage_entropy=entropy, **shares)


def test_four_training_steps():
    """MSN's model, optimizer and schedules with the divergence in place of ME-MAX."""
    g = golden("train_trace")
    _, weight, tau = g.hyper[8:].tolist()
    prior = pmsn.make_prior(Config(prototypes=10, tau=tau), NONE)
    compare(g, atol=1e-7, prior=prior)

    def loss_of(z, h, prototypes):
        cross_entropy, kl, _ = pmsn.pmsn_loss(z, h, prototypes, prior.log().float())
        return cross_entropy + weight * kl, {"ce": cross_entropy, "kl": kl}

    *_, (_, model, target) = train_steps(pmsn, g, "", loss_of)
    compare(g, atol=1e-3, prototypes_final=model.prototypes)
    compare_parameters(g, "encoder_norms", model.network, rtol=1e-3)
    compare_parameters(g, "target_norms", target, rtol=1e-3)


# --------------------------------------------------------------------------------------- promises


def test_a_uniform_prior_is_msn():
    """Term for term and in the gradients."""
    random = common.generator(0)
    sets = [torch.randn(n, 8, generator=random) for n in (24, 8, 12)]
    z, h, q = (x.requires_grad_() for x in sets)
    uniform = torch.full((12,), 1 / 12).log()
    found = []
    for loss, prior in ((msn.msn_loss, ()), (pmsn.pmsn_loss, (uniform,))):
        cross_entropy, spread, assigned = loss(z, h, F.normalize(q, dim=1), *prior)
        gradients = torch.autograd.grad(cross_entropy + 5 * spread, (z, q))
        found.append((cross_entropy, spread, assigned, *gradients))
    torch.testing.assert_close(*found, atol=1e-6, rtol=0)


def test_priors_from_counts_and_files(capsys):
    counts = torch.tensor([50, 0, 5000, 500])

    def make(size, prior, counts=NONE):
        return pmsn.make_prior(Config(prototypes=size, prior=prior), counts)

    close(make(3, "counts", counts), np.array([5000, 500, 50]) / 5550, atol=1e-12)
    stretched = 10.0 ** np.array([2, 1.5, 1, 0.5, 0])
    close(make(5, "counts", counts), stretched / stretched.sum(), atol=1e-12)
    np.save("good.npy", [1.0, 2.0, 1.0])
    np.save("zero.npy", [1.0, 0.0, 1.0, 1.0])
    close(make(3, "good.npy"), [0.25, 0.5, 0.25], atol=1e-12)
    bad = {"good.npy": "4 positive numbers", "zero.npy": "positive", "counts": "labelled"}
    for prior, words in {**bad, __file__: ".npy", "cubic": "power-law"}.items():
        with pytest.raises(SystemExit):
            make(4, prior)
        assert words in capsys.readouterr().err


def test_long_tailed_subset_is_seeded():
    whole = common.open_split("textures", "train")
    configs = [Config(imbalance=100.0, seed=seed) for seed in (0, 0, 1)]
    tails = [pmsn.long_tail(whole, config) for config in configs]
    for tail in tails:
        assert pmsn.class_counts(tail).tolist() == pmsn.tail_sizes(800, 10, 100.0)
    assert tails[0].names == tails[1].names != tails[2].names


def test_batches_of_few_classes_keep_every_image_equally_likely():
    split = common.open_split("textures", "train")
    config = Config(batch=40, classes_per_batch=2)
    batches = [pmsn.batch_indices(split, config, step) for step in range(4000)]
    assert all(len(split.labels[rows].unique()) == 2 for rows in batches[:50])
    seen = torch.tensor(batches).flatten().bincount(minlength=8000).float()
    assert seen.mean() == 20 and seen.std() < 6 and seen.min() > 2
    assert batches[3] == pmsn.batch_indices(split, config, 3) != batches[4]
