"""dinov2.py against the reference implementation's numbers (tests/golden/dinov2) and against its own promises."""

import functools
import inspect
import itertools
import math
import os
import random
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import Forked, kill_at_random, log_rows, run_several
from PIL import Image
from reference_dinov2 import eval_transform_pil, infinite_order, sharded_order, views_pil

import common
import dinov2
from dinov2 import Config, World
from common import random_crop

GOLDEN = Path(__file__).parent / "golden" / "dinov2"
ALONE = World(0, 1, torch.device("cpu"))


def golden(name):
    return np.load(GOLDEN / f"{name}.npz")


def tensor(array, dtype=torch.float32):
    return torch.from_numpy(np.asarray(array)).to(dtype)


def close(actual, expected, atol=1e-5, rtol=1e-4):
    """Assert that two arrays are equal within the tolerances of the golden files."""
    actual = torch.as_tensor(actual).detach().double()
    torch.testing.assert_close(actual, tensor(expected, torch.float64), atol=atol, rtol=rtol)


def pretrained(kind):
    """The tiny Backbone in the released layout, and its golden outputs."""
    path, heads = {"mlp": ("vit_mlp_pretrain.pth", 3), "reg4_swiglu": ("vit_reg4_swiglu_pretrain.pth", 2)}[kind]
    return dinov2.load_backbone(GOLDEN / path, heads), golden(f"vit_forward_{kind}")


KINDS = ["mlp", "reg4_swiglu"]

# ------------------------------------------------------------------------------------------------------------ parity


@pytest.mark.parametrize("kind", KINDS)
def test_forward(kind):
    """Tokens with and without masks, at other resolutions, of several layers, and of two sizes of crops at once."""
    backbone, g = pretrained(kind)
    first = 1 + backbone.registers
    x, masks = tensor(g["x"]), tensor(g["masks"], torch.bool)
    for prefix, mask in (("", None), ("masked_", masks)):
        tokens = backbone([x], mask)[0]
        close(tokens[:, 0], g[f"{prefix}x_norm_clstoken"])
        close(tokens[:, 1:first], g[f"{prefix}x_norm_regtokens"])
        close(tokens[:, first:], g[f"{prefix}x_norm_patchtokens"])
    close(backbone([x])[0][:, 0], g["default_forward"])
    close(backbone([x], masks, layers=[-1], norm=False)[0], g["masked_x_prenorm"])
    for size in ("nonsq", "small", "big"):
        tokens = backbone([tensor(g[f"{size}_x"])])[0]
        patches = tokens[:, first:]
        close(tokens[:, 0], g[f"{size}_cls"])
        close(patches.mean(1), g[f"{size}_patch_mean"])
        close(patches[:, :4], g[f"{size}_patch_first4"])
        close(patches[:, -4:], g[f"{size}_patch_last4"])
    layers = backbone([x], layers=[-2, -1])
    close(torch.stack([t[:1, first:] for t in layers]), g["il2_patch"])
    close(torch.stack([t[:, 0] for t in layers]), g["il2_cls"])
    depth_input = dinov2.dense_features(backbone, x[:1], [0, -1])  # patches and class token of each layer in turn
    maps = depth_input.unflatten(1, (2, 2, -1))[:, :, 0].transpose(0, 1)
    close(maps, g["il_list_nonorm_reshape"])
    both = backbone([x, tensor(g["list_local_x"])], masks)
    close(both[0][:, 0], g["list_cls_global"])
    close(both[1][:, 0], g["list_cls_local"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients(kind, recompute):
    backbone, g = pretrained(kind)
    backbone.requires_grad_(True).checkpointing = recompute
    tokens = backbone([tensor(g["x"])], tensor(g["masks"], torch.bool))[0]
    loss = (tokens[:, 0] ** 2).sum() + tokens[:, 1 + backbone.registers :].sin().sum()
    close(loss, g["grad_loss"])
    loss.backward()
    parameters = dict(backbone.named_parameters())
    assert set(g["grad_names"]) == set(parameters)
    for name, norm, shape in zip(g["grad_names"], g["grad_norms"], g["param_shapes"]):
        assert str(tuple(parameters[name].shape)).replace(" ", "") == str(shape).replace(" ", "")
        grad = parameters[name].grad
        close(torch.zeros(()) if grad is None else grad.norm(), norm, atol=2e-5)


def test_linear_probe_inputs():
    backbone, g = pretrained("mlp")
    _, concat4, _ = dinov2.encode(backbone, tensor(golden("vit_forward_mlp")["x"]))
    inputs = dinov2.probe_inputs(concat4, 12)
    g = golden("linear_input")
    names = {"1 block": "n1_avgpool0", "1 block + patches": "n1_avgpool1", "4 blocks": "n4_avgpool0"}
    for ours, theirs in (names | {"4 blocks + patches": "n4_avgpool1"}).items():
        close(inputs[ours], g[theirs])


def test_stochastic_depth():
    g = golden("stochastic_depth")
    x, w = tensor(g["x"]), tensor(g["W"])
    for i in range(3):
        chance = torch.Generator().manual_seed(int(g[f"seed_{i}"]))
        ((kept,),) = (pair[:1] for pair in dinov2.drop_subsets([float(g[f"ratio_{i}"])], [7], chance)[0])
        assert torch.equal(kept, tensor(g[f"perm_{i}"], torch.long)[: len(kept)])
        ours = dinov2.add_branch(lambda t, shapes: (t @ w).tanh(), x.flatten(0, 1), [(7, 3)], [kept])
        close(ours.view(7, 3, 4), g[f"y_{i}"])
    backbone, _ = pretrained("mlp")
    rates, images = dinov2.drop_rates(0.3, 4), [tensor(g["train_x"]), tensor(g["train_x_local"])]
    kept = dinov2.drop_subsets(rates, [5], torch.Generator().manual_seed(int(g["train_seed"])))
    close(backbone(images[:1], kept=kept)[0][:, 0], g["train_cls"])
    kept = dinov2.drop_subsets(rates, [5, 6], torch.Generator().manual_seed(int(g["train_list_seed"])))
    tokens = backbone(images, kept=kept)
    close(tokens[0][:, 0], g["train_list_cls_global"])
    close(tokens[1][:, 0], g["train_list_cls_local"])
    close(dinov2.drop_rates(0.3, 4, uniform=False), g["dpr_linear_example"], atol=1e-12)


@pytest.mark.parametrize("i", range(5))
def test_position_interpolation(i):
    g = golden("pos_embed")
    table, (_, *grid) = tensor(g[f"pe_{i}"]), g[f"hw_{i}"].tolist()
    for name, flags in (("off01", (0.1, False)), ("off0_aa", (0.0, True)), ("off0", (0.0, False))):
        close(dinov2.position_table(table, grid, *flags), g[f"out_{i}_{name}"], rtol=0)


def test_swiglu_sizes():
    for width, hidden in zip(*(golden("swiglu_sizes")[k].tolist() for k in ("dim", "hidden"))):
        with torch.device("meta"):
            assert common.OldSwiGLU(width, 4 * width).w3.in_features == hidden


def test_head():
    g = golden("dino_head")
    head = dinov2.Head(12, 20, 8, 24)
    common.old_load_state(head, torch.load(GOLDEN / "dino_head.pth", weights_only=True), "head")
    x = tensor(g["x"]).requires_grad_()
    y = head(x)
    close(y, g["y"])
    (y**2).sum().backward()
    parameters = dict(head.named_parameters())
    close(x.grad, g["x_grad"])
    close(torch.stack([parameters[n].grad.norm() for n in g["names"]]), g["grad_norms"])


def test_losses():
    g = golden("losses")
    student = tensor(g["dino_student"]).requires_grad_()
    targets = (tensor(g["dino_teacher_logits"]) / 0.07).softmax(-1)
    loss = dinov2.dino_loss(student, targets)
    loss.backward()
    close(loss, g["dino_loss"])
    close(student.grad, g["dino_grad"])
    for name, arguments in (("T0.04", (0.04,)), ("T0.07", (0.07,)), ("T0.07_iter1", (0.07, 1))):
        close(dinov2.sinkhorn(tensor(g["sk_in"]), *arguments), g[f"sk_out_{name}"])
    masks = tensor(g["ibot_masks"], torch.bool)
    places, weights = dinov2.masked_tokens(masks)
    close(weights, g["ibot_masks_weight"])
    assert torch.equal(places, masks.flatten().nonzero()[:, 0])
    targets = dinov2.sinkhorn(tensor(g["ibot_teacher_logits"]), 0.06)
    close(targets, g["ibot_sk_T006"])
    student = tensor(g["ibot_student"]).requires_grad_()
    loss = dinov2.ibot_loss(student, targets, weights, len(masks))
    loss.backward()
    close(loss, g["ibot_loss"])
    close(student.grad, g["ibot_grad"])
    x = tensor(g["koleo_x"]).requires_grad_()
    loss = dinov2.koleo_loss(x)
    loss.backward()
    close(loss, g["koleo_loss"])
    close(x.grad, g["koleo_grad"])


def test_softmax_centering_lags_by_a_step():
    g = golden("losses")
    for prefix, states, batches in (
        ("center", g["center_states"], list(zip(g["center_in"], g["center_out"]))),
        (
            "ibot_center",
            g["ibot_center_states"],
            [(g[f"ibot_center_in_{i}"], g[f"ibot_center_out_{i}"]) for i in range(3)],
        ),
    ):
        centre = torch.zeros(1, states.shape[-1])
        for state, (logits, expected) in zip(states, batches):
            close(centre.flatten(), state.flatten())
            targets, centre = dinov2.softmax_centering(tensor(logits), centre, 0.05)
            close(targets, expected), prefix
        close(centre.flatten(), states[-1].flatten())


def test_masks_are_the_reference_masks():
    g = golden("masks")
    for size, patch, largest in g["maxpatch_table"].tolist():
        assert dinov2.largest_block(int(size), int(patch)) == largest
    chance = random.Random(int(g["seed"]))
    for target, expected in zip(g["seeded_targets"].tolist(), g["masks_seeded"]):
        np.testing.assert_array_equal(dinov2.block_mask(target, 16, 128, chance), expected)
    chance = random.Random(int(g["seed"]) + 1)
    for target, stats, marginal in zip(g["targets"].tolist(), g["stats_mean_std_min_max_fracexact"], g["pos_marginal"]):
        masks = np.stack([dinov2.block_mask(target, 16, 128, chance) for _ in range(4000)])
        counts = masks.sum((1, 2))
        ours = [counts.mean(), counts.std(), counts.min(), counts.max(), (counts == target).mean()]
        np.testing.assert_allclose(ours, stats, rtol=1e-9)
        np.testing.assert_allclose(masks.mean(0), marginal, rtol=1e-5)


def official_collation(chance, crops=12, side=16):
    """Masks of a batch in the order in which the released collator draws: the blocks of one after its target."""
    masks = [
        dinov2.block_mask(target, side, 128, chance)
        for target in dinov2.mask_targets(crops, side * side, 0.5, (0.1, 0.5), chance)
    ]
    chance.shuffle(masks)
    return torch.from_numpy(np.stack(masks)).flatten(1)


def test_collation():
    g = golden("masks")
    masks = official_collation(random.Random(int(g["col_seed"])))
    np.testing.assert_array_equal(masks, g["col_masks"])
    places, weights = dinov2.masked_tokens(masks)
    np.testing.assert_array_equal(places, g["col_idx"])
    close(weights, g["col_w"])
    assert len(places) == g["col_n"]
    edges = np.linspace(0.1, 0.5, 7)
    assert sum(int(256 * e) for e in edges[1:]) == g["col_upper"] >= len(places)
    for kind in ("global", "local"):  # crop-major, as the views are stacked here
        crops = tensor(g[f"col_in_{kind}"])  # [B, crops, ...]
        close(crops.transpose(0, 1).flatten(0, 1), g[f"col_{kind}"])
    chance = random.Random(int(g["col_seed"]) + 1)
    counts = np.stack([np.sort(official_collation(chance).sum(1)) for _ in range(300)])
    np.testing.assert_allclose([counts.sum(1).mean(), counts.sum(1).std()], g["col_stats_total_mean_std"], rtol=1e-9)
    np.testing.assert_allclose(counts.mean(0), g["col_stats_sorted_mean"], rtol=1e-9)


SHORT = dict(lr=4e-3, weight_decay_final=0.4, momentum=0.992, freeze_last=0.01)
LONG = dict(lr=2e-4, weight_decay_final=0.2, momentum=0.994, freeze_last=1 / 500)
RUNS = {
    "vitl16_short": SHORT | dict(batch=2048, warmup=0.1, temp_warmup=0.3),
    "vitl14": LONG | dict(batch=3072, warmup=80 / 500, temp_warmup=30 / 500),
    "tiny": SHORT | dict(batch=64, lr=0.002, warmup=2 / 6, temp_warmup=3 / 6, freeze_last=1 / 6),
}


@pytest.mark.parametrize("name", RUNS)
def test_schedules(name):
    g = golden("schedules")
    config = Config(**RUNS[name])
    ours = [dinov2.schedules(config, int(it), int(g[f"{name}_T"])) for it in g[f"{name}_it"]]
    for field, key in dict(lr="lr", weight_decay="wd", momentum="momentum", teacher_temp="teacher_temp").items():
        np.testing.assert_allclose([getattr(s, field) for s in ours], g[f"{name}_{key}"], rtol=1e-12, atol=1e-18)
    np.testing.assert_allclose([s.last_layer_lr for s in ours], g[f"{name}_last_layer_lr"], rtol=1e-12, atol=1e-18)
    assert config.lr * math.sqrt(config.batch / 1024) == pytest.approx(float(g[f"{name}_peak_lr"]), rel=1e-12)


def test_presets_have_the_released_schedules():
    for name in ("vitl16_short", "vitl14"):
        preset = dinov2.PRESETS[name]
        for key, value in RUNS[name].items():
            assert preset[key] == pytest.approx(value), (name, key)
        assert preset["steps"] == golden("schedules")[f"{name}_T"]


@pytest.mark.parametrize("tag", ["A_d09_p02", "B_d09_p02", "B_d1_p02", "head_d09_p02", "chunked4x2_d09_p02"])
def test_parameter_groups(tag):
    g = golden("param_groups")
    depth = {"A": 4, "B": 2, "h": 4, "c": 4}[tag[0]]
    rules = [dinov2.parameter_rule(n, depth, 1.0 if "_d1_" in tag else 0.9, 0.2) for n in g[f"{tag}_names"]]
    np.testing.assert_allclose([r[0] for r in rules], g[f"{tag}_lr_mult"], rtol=1e-12)
    np.testing.assert_allclose([float(r[1]) for r in rules], g[f"{tag}_wd_mult"])
    assert [r[2] for r in rules] == g[f"{tag}_last"].tolist()
    assert len(set(rules)) == g[f"{tag}_nfused"]


SSL = dict(image_size=16, local_size=8, patch=4, width=12, depth=2, heads=2, head_hidden=20, bottleneck=8,
           prototypes=24, ibot_hidden=12, ibot_bottleneck=6, ibot_prototypes=18, lr_decay=0.9, batch=3,
           koleo_group=3)  # fmt: skip
VARIANTS = {
    "sk_sep": dict(registers=2, centering="sinkhorn", separate_heads=True),
    "center_shared": dict(registers=0, centering="softmax", separate_heads=False),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("together", [True, False])
def test_two_training_steps(name, together):
    """Forward, all losses, clipping, AdamW and EMA together against two steps of the reference."""
    g, inputs = golden(f"ssl_step_{name}"), golden("ssl_inputs")
    lr, decay, last_lr, momentum, temperature, clip = g["hyper_lr_wd_lastlr_mom_temp_clip"].tolist()
    config = Config(**SSL, **VARIANTS[name], together=together)
    student, teacher = dinov2.build(config)
    state = torch.load(GOLDEN / "ssl_student.pth", weights_only=True)["student"]
    student.load_state_dict({k: state[k] for k in student.state_dict()})
    with torch.no_grad():
        for ours, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
            ours.copy_(0.9 * theirs + 0.01)
    assert set(g["names"]) == {n for n, _ in student.named_parameters()}
    optimizer, ema = dinov2.make_optimizer(student, config), common.OLD_EMA(teacher, student)
    dinov2.set_rates(optimizer, dinov2.Schedule(lr, last_lr, decay, momentum, temperature))
    parts = dict(student.named_children())
    assert list(parts) == list(g["modules"]) and student.modules_to_clip() == list(parts.values())
    crops = [tensor(inputs["global"]), tensor(inputs["local"])]
    centres = [torch.zeros(1, k) for k in (24, 18 if config.separate_heads else 24)]
    for step in range(2):
        masks = tensor(inputs[f"masks{step}"], torch.bool)
        places, weights = dinov2.masked_tokens(masks)
        assert len(weights) <= int(inputs[f"upperbound{step}"]) and masks.shape[1] == g["ntok"]
        with torch.no_grad():
            _, logits, _, patch_logits = teacher(crops[:1], places=places)
        targets, patch_targets, centres = dinov2.teacher_targets(config, logits, patch_logits, centres, temperature)
        student_out = student(crops, masks, places)
        loss, terms = dinov2.total_loss(student_out, targets.view(2, 3, -1), patch_targets, weights, config)
        close(loss, g[f"s{step}_total"])
        # the reference shows iBOT and KoLeo halved, KoLeo weighted
        shown = terms * torch.tensor([1, 1, 0.5, 0.5 * config.koleo_weight])
        for i, key in enumerate(("dino_global_crops", "dino_local_crops", "ibot", "koleo")):
            close(shown[i], g[f"s{step}_display_{key}_loss"])
        loss.backward()
        gradients = {n: p.grad for n, p in student.named_parameters()}
        close(torch.stack([gradients[n].norm() for n in g["names"]]), g[f"s{step}_grad_norms"])
        close(dinov2.clip_gradients(student, clip), g[f"s{step}_clip_norms"])
        optimizer.step()
        optimizer.zero_grad()
        ema.update(momentum, torch.ones(()) if step else None)
        for kind, model in (("student", student), ("teacher", teacher)):
            parameters = dict(model.named_parameters())
            norms = torch.stack([parameters[n].norm() for n in g["names"]])
            close(norms, g[f"s{step}_{kind}_param_norms"], atol=5e-4, rtol=5e-4)
    close(student.backbone.cls_token, g["final_cls_token"], atol=5e-4)
    close(student.dino_head.last_layer.weight_g, g["final_last_layer_g"], atol=5e-4)
    close(teacher.backbone.norm.weight, g["final_teacher_norm_w"], atol=5e-4)


def test_knn():
    g = golden("knn")
    train, labels, test = tensor(g["train"]), tensor(g["train_labels"], torch.long), tensor(g["test"])
    scores = dinov2.knn(train, labels, test, ks=g["ks"].tolist(), temperature=float(g["T"]))
    total = scores[20].sum(1, keepdim=True)  # the reference votes with a softmax over the most neighbours
    for k in g["ks"].tolist():
        close(scores[k] / total, g[f"probas_{k}"])
        close(dinov2.accuracy(scores[k], tensor(g["test_labels"], torch.long)) / 100, g[f"top1_{k}"])
    np.testing.assert_array_equal(dinov2.few_shot(labels, 3, seed=1), g["filter_3_per_class_seed1"])


def test_retrieval():
    g = golden("retrieval")
    query, database, labels = tensor(g["query"]), tensor(g["db"]), tensor(g["labels"], torch.long)
    ranks = (F.normalize(query, dim=1) @ F.normalize(database, dim=1).T).argsort(dim=1, descending=True)
    np.testing.assert_array_equal(ranks, g["ranks"])
    ranked = labels.gather(1, ranks)
    close(dinov2.average_precision(ranked > 0), g["plain_ap"], atol=1e-9)
    revisited = {"E": ((1,), (2, 3)), "M": ((1, 2), (3,)), "H": ((2,), (1, 3))}  # relevant, junk labels
    for protocol, (relevant, junk) in revisited.items():
        ap = dinov2.average_precision(*(sum(ranked == v for v in values) > 0 for values in (relevant, junk)), True)
        np.testing.assert_allclose(ap, g[f"ap_{protocol}"], atol=1e-9)
        close(ap.nanmean(), g[f"map_{protocol}"], atol=1e-9)


def test_pca():
    g = golden("pca")
    x = tensor(g["features"], torch.float64)
    first, scores, values = dinov2.principal_components(x, 1)
    close(first[0], g["pc1"], atol=1e-9)
    close(scores[:, 0], g["proj1"], atol=1e-9)
    close(values, g["sv1"], atol=1e-9)
    three, scores, values = dinov2.principal_components(x[tensor(g["fg"], torch.bool)], 3)
    close(three, g["pc3"], atol=1e-9)
    close(scores, g["proj3"], atol=1e-9)
    close(values, g["sv3"], atol=1e-9)
    rgb, foreground = dinov2.pca_colours(x.view(3, 16, 6))
    close(rgb, g["rgb"], atol=1e-9)
    np.testing.assert_array_equal(foreground.flatten(), g["fg"])


def test_curation():
    g = golden("curation")
    pool, refs, queries, few = (tensor(g[k], torch.float64) for k in ("pool", "refs", "queries", "queries2"))
    k, threshold = int(g["k"]), float(g["rel_thr"])
    for block in (7, 4096):  # in pieces, the same
        label, kept = dinov2.self_dedup(pool, k, float(g["self_thr"]), block=block)
        np.testing.assert_array_equal(label, g["self_component"])
        np.testing.assert_array_equal(kept, g["self_keep"])
    pool = pool[kept]
    np.testing.assert_array_equal(dinov2.relative_dedup(pool, refs, k, threshold, True), g["rel_keep_direct"])
    rest = dinov2.relative_dedup(pool, refs, k, threshold)
    np.testing.assert_array_equal(rest, g["rel_keep_component"])
    pool = pool[rest]
    indices, similarity = dinov2.retrieve_by_sample(queries, pool, int(g["retr_k"]))
    np.testing.assert_array_equal(indices, g["retr_idx"])
    close(similarity, g["retr_sim"], atol=1e-9)
    np.testing.assert_array_equal(indices.unique(), g["retr_unique"])
    clusters = int(g["km_C"])
    centroids = dinov2.spherical_kmeans(pool, pool[:clusters], int(g["km_iters"]))
    close(centroids, g["km_centroids"], atol=1e-9)
    ours, theirs = (dinov2.assign(x, centroids) for x in (pool, few))
    np.testing.assert_array_equal(ours, g["km_assign"])
    np.testing.assert_array_equal(theirs, g["q2_assign"])
    np.testing.assert_array_equal(torch.bincount(theirs, minlength=clusters), g["q2_counts"])
    found = dinov2.retrieve_by_cluster(theirs, ours, clusters, more_than=int(g["min_count"]))
    np.testing.assert_array_equal(found, g["candidate_pool_idx"])
    assert set(ours[found].tolist()) == set(g["selected_clusters"].tolist())
    few_each = dinov2.retrieve_by_cluster(theirs, ours, clusters, int(g["min_count"]), take=2)
    assert len(few_each) == 4 and set(few_each.tolist()) <= set(found.tolist())
    assert len(dinov2.retrieve_by_cluster(theirs, ours, clusters, int(g["min_count"]), cap=3)) == 3


def test_whitening_makes_components_vary_alike():
    """What all rows share, and what varies most, no longer decides cosines."""
    torch.manual_seed(0)
    rows = torch.randn(4000, 8) * torch.tensor([9.0, 3, 1, 1, 1, 1, 1, 1]) + 20
    (white, few) = dinov2.whiten([rows.numpy(), torch.cat([rows[:2], torch.zeros(1, 8)]).numpy()], 6)
    white = torch.from_numpy(white).float()
    assert white.mean(0).abs().max() < 0.05 and white.std(0).max() / white.std(0).min() < 1.3
    np.testing.assert_array_equal(few[:2], white[:2].half())
    assert not few[2].any()


# ------------------------------------------------------------------------------------------------------------- views


def test_reference_pipeline_gives_the_golden_crops():
    """The image-by-image pipeline of tests/reference_dinov2.py is the reference of the batched one, compared below."""
    g = golden("augment")
    image = Image.fromarray(g["image"])
    for i in range(2):
        torch.manual_seed(int(g[f"aug{i}_seed"]))
        for kind, crops in zip(("global", "local"), views_pil(image, (24, 12), 2)):
            found = np.stack([np.asarray(crop).transpose(2, 0, 1) for crop in crops]).astype(int)
            assert abs(found - g[f"aug{i}_{kind}_crops_uint8"]).max() <= 1
            if i == 0 and kind == "local":
                ours = dinov2.normalize(torch.from_numpy(found[:1]))[0]
                close(ours, g["aug0_local0_normalized"], atol=0.02)  # a grey level
    torch.manual_seed(int(g["rrc_seed"]))
    for kind, scale in (("global", (0.32, 1.0)), ("local", (0.05, 0.32))):
        boxes = [random_crop(45, 37, scale, None) for _ in range(6)]
        np.testing.assert_array_equal(boxes, g[f"rrc_params_{kind}"])
    evaluated = dinov2.normalize(tensor(eval_transform_pil(image, 32, 28)).permute(2, 0, 1))
    close(evaluated, g["eval_resize32_crop28"], atol=0.02)


def test_batched_operations_are_the_golden_operations():
    g = golden("augment")
    image = tensor(g["op_in"]).permute(2, 0, 1)[None]
    neutral = dict(factors=torch.tensor([[1.0, 1.0, 1.0, 0.0]]), order=torch.tensor([[0, 1, 2, 3]]))
    neutral |= {name: torch.zeros(1) > 0 for name in ("grey", "solarize")} | dict(sigma=torch.zeros(1))
    assert torch.equal(dinov2.augment(image, **neutral), image)
    cases = {"brightness_1.3": (0, 1.3), "contrast_0.7": (1, 0.7), "saturation_1.2": (2, 1.2), "hue_0.08": (3, 0.08),
             "hue_m0.1": (3, -0.1)}  # fmt: skip
    cases = {name: dict(factors=neutral["factors"].clone().index_fill_(1, torch.tensor([i]), v))
             for name, (i, v) in cases.items()}  # fmt: skip
    cases |= {"gray": dict(grey=torch.ones(1) > 0), "solarize128": dict(solarize=torch.ones(1) > 0)}
    cases |= {f"blur9_sigma{s}": dict(sigma=torch.tensor([s])) for s in (0.5, 1.7)}
    for name, changed in cases.items():
        difference = dinov2.augment(image, **neutral | changed)[0].permute(1, 2, 0) - tensor(g[f"op_{name}"])
        limit = 7 if "hue" in name else 1  # PIL goes through HSV of 8 bits, so a hue that is off by one shows
        assert difference.abs().max() <= limit, (name, difference.abs().max())
        assert difference.abs().mean() < 0.1, (name, difference.abs().mean())
    images = tensor(g["image"]).permute(2, 0, 1)[None]
    crop = dinov2.crop_resize(images, torch.tensor([[3.0, 7.0, 20.0, 15.0]]), 12, bicubic=True).round()
    assert (crop[0].permute(1, 2, 0) - tensor(g["op_rrc_top3_left7_h20_w15_to12"])).abs().max() <= 1


def test_batched_views_have_the_reference_distribution():
    """Blur as often as in the released code, solarize on the second global crop only, and the rest alike."""
    g = golden("augment")
    config = Config()
    drawn = [dinov2.draw_photometric(kind, count, 3000, config, torch.Generator().manual_seed(kind))
             for kind, count in ((0, 2), (1, 2))]  # fmt: skip
    blurred = [(d["sigma"] > 0).double().mean(1) for d in drawn]
    np.testing.assert_allclose([*blurred[0], blurred[1][0]], g["blur_actual_fraction"], atol=0.03)
    np.testing.assert_allclose(1 - np.array(config.blur), g["blur_requested_p"], atol=1e-9)
    asked = replace(config, blur=(1.0, 0.1, 0.5))
    wanted = dinov2.draw_photometric(0, 2, 3000, asked, torch.Generator().manual_seed(0))["sigma"] > 0
    np.testing.assert_allclose(wanted.double().mean(1), [1.0, 0.1], atol=0.03)
    assert not drawn[0]["solarize"][0].any() and not drawn[1]["solarize"].any()
    assert abs(drawn[0]["solarize"][1].double().mean() - 0.2) < 0.03
    for d in drawn:
        for name, share in (("flip", 0.5), ("grey", 0.2)):
            assert abs(d[name].double().mean() - share) < 0.03
        jittered = (d["factors"] != torch.tensor([1.0, 1.0, 1.0, 0.0])).any(-1)
        assert abs(jittered.double().mean() - 0.8) < 0.03
        factors = d["factors"][jittered]
        low, high = torch.tensor([0.6, 0.6, 0.8, -0.1]), torch.tensor([1.4, 1.4, 1.2, 0.1])
        assert (factors >= low).all() and (factors <= high).all()
        close(factors.mean(0), (low + high) / 2, atol=0.02)
        assert (d["order"].sort(-1).values == torch.arange(4)).all()
        assert abs((d["order"][..., 0] == 3).double().mean() - 0.25) < 0.03
    # and the pixels: the mean and spread of many views of one image, both ways
    image = Image.fromarray(g["image"])
    torch.manual_seed(0)
    theirs = [views_pil(image, (24, 12), 1) for _ in range(400)]
    pixels = torch.from_numpy(g["image"]).permute(2, 0, 1)[None]
    split = dinov2.in_memory(pixels.repeat(400, 1, 1, 1), torch.zeros(400).long(), [str(i) for i in range(400)], [])
    kinds = [(2, 24, (0.32, 1.0)), (1, 12, (0.05, 0.32))]
    item = dinov2.MultiCrop(split, replace(config, batch=400), ALONE, 400, kinds)[0]
    ours = dinov2.make_crops(item, split.pixels, kinds, ALONE.device)
    for kind in range(2):
        for k in range(kinds[kind][0]):
            reference = torch.stack([tensor(np.array(t[kind][k])).permute(2, 0, 1) for t in theirs])
            batched = ours[kind][k]
            for statistic in (torch.mean, torch.std, lambda x, axes: x.diff(dim=3).abs().mean(axes)):
                a, b = (statistic(x, (1, 2, 3)) for x in (dinov2.normalize(reference), batched))
                error = (a.var() / 400 + b.var() / 400).sqrt()
                assert abs(a.mean() - b.mean()) < 4.5 * error, (kind, k)
                assert 0.7 < a.std() / b.std() < 1.4, (kind, k)


def test_reference_samplers():
    """The released order of the data (the script itself orders by seed and epoch): rank by rank, pass by pass."""
    g = golden("samplers")
    for rank in range(2):
        for name, order in (("sharded", sharded_order(11, rank, 2, int(g["seed"]))),
                            ("sharded_new", sharded_order(11, rank, 2, int(g["seed"]), new=True)),
                            ("infinite", infinite_order(11, rank, 2, int(g["seed"])))):  # fmt: skip
            assert list(itertools.islice(order, 15)) == g[f"{name}_r{rank}of2_n11"].tolist(), name


# -------------------------------------------------------------------------------------------------------------- runs

# a model so small that a step takes milliseconds
SMALL = "--width 16 --depth 2 --heads 2 --head-hidden 16 --bottleneck 8 --prototypes 16 --ibot-hidden 16".split()
SMALL += "--ibot-bottleneck 8 --ibot-prototypes 12 --batch 16 --local-crops 2 --eval none --log-every 1".split()
SMALL += "--device cpu --no-compile --precision fp32 --workers 0".split()


@pytest.fixture(autouse=True, scope="module")
def toy_images_once():
    """The toy images are always the same: draw each size once."""
    draw, common.old_toy_images = common.old_toy_images, functools.lru_cache(common.old_toy_images)
    yield
    common.old_toy_images = draw


@pytest.fixture(autouse=True)
def signals_as_before():
    """A run catches SIGTERM and SIGINT; tests that train in this process give them back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run(*flags):
    """The command line, in this process."""
    dinov2.main(list(map(str, flags)))


def refused(capsys, *flags, code=2):
    """Expect the command line to leave with `code`, and return the one line it printed."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*flags)
    printed = capsys.readouterr().err
    assert stop.value.code == code and printed.startswith("error: ") and printed.count("\n") == 1, printed
    return printed


def weights(out):
    state = torch.load(Path(out) / "last.pt", weights_only=True)
    return state["step"], {**state["model"], **{f"teacher.{k}": v for k, v in state["teacher"].items()}}


def assert_same(a, b, tolerance=0.0):
    (step_a, a), (step_b, b) = weights(a), weights(b)
    assert step_a == step_b and a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name], b[name], atol=tolerance, rtol=0), f"{name}: {(a[name] - b[name]).abs().max()}"


def photographs(folder, count=12, size=(48, 40), classes=("cat", "dog"), splits=("train", "val"), suffix="jpg"):
    """A labelled folder of random images."""
    chance = np.random.default_rng(0)
    for split in splits:
        for i in range(count):
            path = folder / split / classes[i % len(classes)] / f"{i}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(chance.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return folder


def interrupt(monkeypatch, name, after, action):
    """Let `action` happen in the `after`-th call of a function of the script."""
    function, calls = getattr(dinov2, name), []

    def wrapped(*args):
        calls.append(1)
        return action(function(*args)) if len(calls) == after else function(*args)

    monkeypatch.setattr(dinov2, name, wrapped)


@pytest.mark.parametrize("centering", ["sinkhorn", "softmax"])
def test_resume_is_bitwise(monkeypatch, centering):
    """A run that dies in the middle, and one that is told to stop, end like one that was left alone."""
    flags = [*SMALL, "--steps", 9, "--save-every", 3, "--drop-path", 0.3, "--centering", centering]
    run(*flags, "--out", "whole")
    with monkeypatch.context() as patch:

        def die(_):
            raise ConnectionError

        interrupt(patch, "total_loss", 5, die)
        with pytest.raises(ConnectionError):
            run(*flags, "--out", "died")
    assert weights("died")[0] == 3
    run(*flags, "--out", "died", "--resume")
    with monkeypatch.context() as patch:
        interrupt(patch, "total_loss", 5, lambda result: os.kill(os.getpid(), signal.SIGTERM) or result)
        with pytest.raises(SystemExit) as stop:
            run(*flags, "--out", "stopped")
    assert stop.value.code == 0 and weights("stopped")[0] == 5
    run(*flags, "--out", "stopped", "--resume")
    for other in ("died", "stopped"):
        assert_same("whole", other)
        assert [row["step"] for row in log_rows(other) if "step" in row] == list(range(1, 10))


def test_kill_and_resume_is_bitwise():
    """kill -9 at random moments, most of them while last.pt is written, then the same command again."""
    flags = [*SMALL, "--steps", 40, "--save-every", 1, "--drop-path", 0.3]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes that are killed: the order of sums depends on it
    began = time.monotonic()
    run(*flags, "--out", "whole")
    options = dict(times=2, seed=0, longest=0.7 * (time.monotonic() - began), start=Forked)
    killed = kill_at_random("dinov2.py", *flags, "--out", "killed", **options)
    assert killed, "none was killed before its end"
    run(*flags, "--out", "killed", "--resume")
    torch.set_num_threads(threads)
    assert_same("whole", "killed")
    assert [row["step"] for row in log_rows("killed") if "step" in row] == list(range(1, 41))


def test_two_ranks_are_one_process(tmp_path):
    """Sinkhorn, counts of masked patches and centres over all ranks; accumulation; FSDP2; and a sharded evaluation."""
    base = [*SMALL, "--steps", "4", "--lr", "1e-5", "--koleo-group", "4", "--warmup", "0", "--freeze-last", "0"]
    softmax = [*base, "--centering", "softmax", "--no-separate-heads"]
    knn = ["--eval", "knn", "--no-baselines", "--eval-limit", "300"]
    runs = {"two": [*base, *knn], "shard": [*base, *knn, "--shard"], "two-softmax": softmax}
    run_several(*(["dinov2", *flags, "--out", out] for out, flags in runs.items()), ranks=2)
    run(*base, *knn, "--out", "one")
    run(*base, "--out", "parts", "--accumulate", 4)
    run(*base, "--out", "apart", "--no-together", "--recompute")
    run(*softmax, "--out", "one-softmax")
    for one, other in (
        ("one", "two"),
        ("one", "shard"),
        ("one", "parts"),
        ("one", "apart"),
        ("one-softmax", "two-softmax"),
    ):
        assert_same(one, other, tolerance=1e-5)
        steps = ([row for row in log_rows(out) if "loss" in row] for out in (one, other))
        for a, b in zip(*steps, strict=True):
            for key in ("loss", "dino_global", "dino_local", "ibot", "koleo", "gradient_norm", "dino_head_norm"):
                assert b[key] == pytest.approx(a[key], rel=2e-5), (other, key)
    found = [log_rows(out)[-1]["eval"]["trained"]["knn20"] for out in ("one", "two", "shard")]
    assert max(found) - min(found) < 0.2
    assert all(type(v) is torch.Tensor for v in torch.load("shard/last.pt", weights_only=True)["model"].values())


def test_small_folder_with_duplicates_trains(tmp_path, capsys):
    """40 images, half of them twice, a batch of 8, 200 steps: finite, and features do not collapse."""
    photographs(tmp_path / "few", count=20, splits=(".",), classes=(".",), suffix="png")
    for i in range(20):
        (tmp_path / "few" / f"copy{i}.png").write_bytes((tmp_path / "few" / f"{i}.png").read_bytes())
    flags = [
        *SMALL,
        "--data",
        tmp_path / "few",
        "--preset",
        "toy",
        "--batch",
        8,
        "--image-size",
        32,
        "--local-size",
        16,
    ]
    run(*flags, "--patch", 8, "--steps", 200, "--lr", 2e-2, "--eval", "knn,linear", "--out", "few")
    rows = [row for row in log_rows("few") if "loss" in row]
    assert len(rows) == 200 and all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[-1]["feature_std"] > 0.02 and rows[-1]["feature_rank"] > 2
    assert "knn, linear: skipped" in capsys.readouterr().out
    assert Image.open("few/picture.png").size == (4 + 10 * 88, 20 + 6 * 88)


def test_files_read_by_workers_or_not_are_the_same(tmp_path):
    data = photographs(tmp_path / "photos")
    for name, workers in (("w0", 0), ("w2", 2)):
        run(*SMALL, "--data", data, "--preset", "toy", "--cache", 0, "--steps", 2, "--workers", workers, "--out", name)
    assert_same("w0", "w2")
    split = dinov2.open_data(Config(data=str(data)), "train")
    kinds = [(2, 24, (0.3, 1.0)), (3, 12, (0.1, 0.3))]
    item = dinov2.MultiCrop(split, Config(batch=6), ALONE, 6, kinds)[4]
    crops = dinov2.make_crops(item, None, kinds, ALONE.device)
    assert [list(c.shape) for c in crops] == [[2, 6, 3, 24, 24], [3, 6, 3, 12, 12]]
    half = [dinov2.MultiCrop(split, Config(batch=6), World(r, 2, ALONE.device), 6, kinds)[4] for r in range(2)]
    for key in ("pixels", "factors", "sigma"):
        both = torch.cat([h["crops"][1][key] for h in half], dim=1)
        assert torch.equal(both, item["crops"][1][key])
    assert torch.equal(torch.cat([h["masks"] for h in half], dim=1), item["masks"])


def test_masks_of_a_step():
    config = Config(batch=32, image_size=48, patch=4)
    masks = dinov2.sample_masks(config, 3)
    shares = masks.float().mean(2).flatten().sort().values
    assert masks.shape == (2, 32, 144) and (shares[:32] == 0).all()
    expected = 0.1 + 0.4 * (torch.arange(32) + 0.5) / 32
    assert (shares[32:] - expected).abs().max() < 0.06, "not stratified over the ratios"
    assert not torch.equal(masks, dinov2.sample_masks(config, 4))


# -------------------------------------------------------------------------------------------------------- evaluation


def test_official_checkpoints(tmp_path, capsys):
    """The released layouts, training snapshots with chunked blocks and heads, and how positions are interpolated."""
    flat = torch.load(GOLDEN / "vit_reg4_swiglu_pretrain.pth", weights_only=True)
    backbone, g = pretrained("reg4_swiglu")
    assert (backbone.offset, backbone.antialias, backbone.registers) == (0.0, True, 4)
    chunked = {re.sub(r"^blocks\.(\d+)", r"blocks.\1.\1", k): v for k, v in flat.items()}
    snapshot = {f"module.backbone.{k}": v for k, v in chunked.items()}
    snapshot |= {f"dino_head.{k}": v for k, v in torch.load(GOLDEN / "dino_head.pth", weights_only=True).items()}
    torch.save({"teacher": snapshot}, "teacher_checkpoint.pth")
    again = dinov2.load_backbone("teacher_checkpoint.pth", 2)
    assert all(torch.equal(a, b) for a, b in zip(backbone.parameters(), again.parameters(), strict=True))
    assert "add --heads" in refused(capsys, "--init", "teacher_checkpoint.pth", "--eval", "features")
    # trained on, at another resolution: positions are interpolated and heads start afresh, and both is said
    flags = ["--init", GOLDEN / "vit_mlp_pretrain.pth", "--heads", 3, "--image-size", 16, "--local-size", 8, "--lr", 0]
    given = [f for f in SMALL if f not in ("--width", "--depth", "--heads")]
    run(*given[given.index("--head-hidden") :], *flags, "--steps", 1, "--out", "tuned")
    printed = capsys.readouterr().out
    assert "interpolated from 6x6 to 4x4" in printed and "no heads" in printed
    theirs = torch.load(GOLDEN / "vit_mlp_pretrain.pth", weights_only=True)
    for name, value in weights("tuned")[1].items():
        name = name.removeprefix("teacher.").removeprefix("backbone.")
        if name in theirs and name != "pos_embed":
            torch.testing.assert_close(value, theirs[name], atol=1e-6, rtol=0)


def test_official_checkpoint_in_features_and_pictures_out(tmp_path, capsys):
    g = golden("vit_forward_mlp")
    data = photographs(tmp_path / "data", size=(24, 24), suffix="png")
    init = ["--init", GOLDEN / "vit_mlp_pretrain.pth", "--heads", 3, "--data", data, "--eval-size", 24]
    torch.manual_seed(0)
    torch.save({"weight": torch.randn(2, 24), "bias": torch.zeros(2)}, "linear_head.pth")
    torch.save({"weight": torch.randn(2, 60), "bias": torch.zeros(2)}, "linear4_head.pth")
    evaluations = "features,pca,match,knn,fewshot,linear,logistic,retrieval,segment,head"
    run(*init, "--tokens", "--eval", evaluations, "--linear-head", "linear_head.pth", "--out", "all",
        "--probe-epochs", 2, "--probe-batch", 8)  # fmt: skip
    found = np.load("all/features.npz")
    assert found["features"].dtype == np.float32 and found["features"].shape == (12, 12)
    assert found["tokens"].shape == (12, 36, 12) and found["labels"].dtype == np.int64
    assert list(found["paths"]) == sorted(f"val/{'cat' if i % 2 == 0 else 'dog'}/{i}.png" for i in range(12))
    pixels = np.stack([np.asarray(Image.open(data / p)) for p in found["paths"]])
    backbone = dinov2.load_backbone(GOLDEN / "vit_mlp_pretrain.pth", 3)
    tokens = backbone([dinov2.normalize(torch.from_numpy(pixels).permute(0, 3, 1, 2))])[0]
    np.testing.assert_allclose(found["features"], tokens[:, 0], atol=1e-5)
    np.testing.assert_allclose(found["tokens"], tokens[:, 1:], atol=1e-5)
    results = log_rows("all")[-1]["eval"]
    expected = {
        "knn",
        "knn, top-5",
        "knn20",
        "5 a class, knn",
        "linear",
        "linear, 4 blocks + patches",
        "logistic",
        "retrieval, mAP",
    }
    for network in ("trained", "random"):
        assert expected | {"segment, mIoU"} <= results[network].keys()
        assert all(0 <= v <= 100 for k, v in results[network].items() if not k.endswith("_head"))
    assert "official head" in results["trained"] and "knn20" in results["pixels"]
    assert Image.open("all/pca.png").size == (8 * 228 + 4, 2 * 228 + 4) and Image.open("all/match.png").size == (
        896,
        448,
    )
    run(*init, "--eval", "head,linear", "--linear-head", "linear4_head.pth", "--out", "four", "--probe-augment",
        "--probe-epochs", 1, "--probe-batch", 6, "--no-baselines")  # fmt: skip
    assert {"official head", "linear"} <= log_rows("four")[-1]["eval"]["trained"].keys()
    assert g["default_forward"].shape[1] == 12


def test_linear_probe_learns_what_is_linear():
    """On separable features all inputs reach 100 %; on labels without features chance."""
    torch.manual_seed(0)
    labels = torch.arange(400) % 4
    cls = F.one_hot(labels, 8).float() + 0.1 * torch.randn(400, 8)
    features = dinov2.Features(cls, cls.repeat(1, 5), None, labels, [])
    config = Config(probe_epochs=5, probe_batch=40, probe_lrs=(0.1, 1.0))
    batches = dinov2.cached_batches(features, config)
    found = dinov2.linear_probe(batches, features, 4, config, 50)
    assert all(v == 100 for k, v in found.items() if k != "linear_head"), found
    noise = replace(features, pooled=torch.randn(400, 8), concat4=torch.randn(400, 40))
    assert dinov2.linear_probe(dinov2.cached_batches(noise, config), noise, 4, config, 50)["linear"] < 60
    top1, c = dinov2.logistic_regression(features, features, 4)
    assert top1 == 100 and 1e-6 <= c <= 1e5


def test_depth_and_matches():
    """Equal logits give the mean of the bins; one bin alone its own depth. Patches match their own copies."""
    assert dinov2.depth_from_logits(torch.zeros(1, 256, 2, 2), 0.0, 10.0).allclose(torch.tensor(5.0))
    logits = torch.full((1, 11, 1, 1), -1.0)
    logits[0, 7] = 1e6
    assert dinov2.depth_from_logits(logits, 0.0, 10.0).item() == pytest.approx(7.0, abs=1e-3)
    places = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij"), dim=-1).view(-1, 2).float()
    features, order = torch.randn(36, 8), torch.randperm(36)
    pairs = dinov2.match_patches(features, features[order], places, places)
    assert len(pairs) >= 4 and all(order[j] == i for i, j in pairs.tolist())
    starts = places[pairs[:, 0]]
    assert torch.cdist(starts, starts).fill_diagonal_(9).min() > 2.0


# ----------------------------------------------------------------------------------- distillation and high resolution


def test_distillation_and_high_resolution(tmp_path, capsys):
    data = ["--data", photographs(tmp_path / "few", splits=(".",), classes=(".",)), "--preset", "toy"]
    run(*SMALL, *data, "--steps", 3, "--out", "teacher")
    before_lr = torch.load("teacher/last.pt", weights_only=True)["config"]["lr"]
    flags = [*SMALL, *data, "--width", 8, "--depth", 1, "--steps", 3, "--teacher", "teacher/last.pt"]
    run(*flags, "--prototypes", 99, "--out", "student")  # the teacher decides how many prototypes there are
    state = torch.load("student/last.pt", weights_only=True)
    assert state["model"]["dino_head.last_layer.weight_g"].shape[0] == 16
    before, after = dinov2.build(Config(**state["config"]))[0].state_dict(), state["model"]
    changed = {k for k in after if not torch.equal(before[k], after[k])}
    assert (
        "backbone.mask_token" not in changed and "backbone.cls_token" in changed and "dino_head.mlp.0.weight" in changed
    )
    assert not torch.equal(state["teacher"]["backbone.cls_token"], after["backbone.cls_token"]), "the spare average"
    run(*flags, "--out", "student", "--resume")
    run(*flags, "--distill-tokens", 0.3, "--out", "fewer")
    assert "exclude each other" in refused(capsys, *flags, "--high-res", "--init", "teacher/last.pt", "--out", "x")
    run(*SMALL[-7:], *data, "--high-res", "--init", "teacher/last.pt", "--steps", 2, "--eval", "none", "--out", "high")
    state = torch.load("high/last.pt", weights_only=True)
    assert (state["config"]["image_size"], state["config"]["local_size"]) == (52, 24)  # of 55.5 and 27.75
    assert state["config"]["prototypes"] == 16 and state["config"]["lr"] == pytest.approx(0.1 * before_lr)
    assert state["model"]["backbone.pos_embed"].shape[1] == 1 + (state["config"]["image_size"] // 4) ** 2
    assert "positions interpolated" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------- curation


def test_curate_command(tmp_path, capsys, monkeypatch):
    """Planted duplicates and leaks go, the list is trained on, and an interrupted call goes on where it was."""
    pixels = common.old_toy_images("val", 32)[0][:60].permute(0, 2, 3, 1).numpy()
    for i in range(60):
        for folder, image in (("pool", pixels[i]), ("refs", pixels[i]), ("queries", 255 - pixels[i])):
            wanted = dict(pool=i < 40, refs=30 <= i < 50, queries=i < 8)[folder]
            if wanted:
                (tmp_path / folder).mkdir(exist_ok=True)
                Image.fromarray(image).save(tmp_path / folder / f"{i:02d}.png")
        if i < 10:
            Image.fromarray(pixels[i]).save(tmp_path / "pool" / f"{i:02d}copy.jpg", quality=80)
    (tmp_path / "pool" / "broken.png").write_bytes(b"no image")
    flags = ["curate", "--pool", tmp_path / "pool", "--refs", tmp_path / "refs", "--out", "list.txt", "--workers", 0,
             "--self-threshold", 0.99, "--relative-threshold", 0.99, "--max-bad", 0.1, "--device", "cpu"]  # fmt: skip
    with monkeypatch.context() as patch:

        def die(_):
            raise ConnectionError

        interrupt(patch, "pixel_descriptor", 2, die)
        with pytest.raises(ConnectionError):
            run(*flags, "--batch", 16)
    with monkeypatch.context() as patch:
        seen = []
        patch.setattr(dinov2, "pixel_descriptor", lambda x, f=dinov2.pixel_descriptor: seen.append(len(x)) or f(x))
        run(*flags, "--batch", 16)
        assert sum(seen) == 51 - 16 + 20, "the first 16 images were embedded before"
        run(*flags, "--batch", 16)
        assert sum(seen) == 55, "all embeddings are there"
    lines = Path("list.txt").read_text().splitlines()
    assert [Path(p).name for p in lines] == [f"{i:02d}.png" for i in range(30)]
    printed = capsys.readouterr().out
    assert "components by size 1: 31, 2: 10" in printed and Image.open("list.txt.duplicates.png").size[1] > 900
    run(*flags, "--queries", tmp_path / "queries", "--retrieval", "sample", "--per-query", 2, "--out", "near.txt")
    near = Path("near.txt").read_text().splitlines()
    assert 2 <= len(near) <= 16 and set(near) <= set(lines)
    run(
        *flags,
        "--queries",
        tmp_path / "queries",
        "--clusters",
        3,
        "--more-than",
        1,
        "--per-cluster",
        5,
        "--out",
        "c.txt",
    )
    clusters = Path("c.txt").read_text().splitlines()
    assert 1 <= len(clusters) <= 15 and set(clusters) <= set(lines)
    run(*SMALL, "--data", "list.txt", "--preset", "toy", "--steps", 2, "--out", "trained")
    assert "30 images" in capsys.readouterr().out
    run(*flags, "--init", "trained/last.pt", "--size", 24, "--out", "own.txt")  # any checkpoint gives embeddings
    assert Path("own.txt").exists()
    assert "--queries" in refused(capsys, "curate", "--pool", "pool", "--querys", "x")
    assert "no data at data/nowhere" in refused(capsys, "curate", "--pool", "nowhere", "--out", "n.txt")
    Path("text.txt").write_text("hello\n")
    assert "no list of images" in refused(capsys, *SMALL, "--data", "text.txt", "--out", "text")
    monkeypatch.setattr(common, "lock", lambda folder: folder != Path("list.txt.work"))
    assert "another process is writing to list.txt.work" in refused(capsys, *flags)


# ------------------------------------------------------------------------------------------------------ the error table


def test_bad_data(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for data, words in {"nowhere": "data/nowhere", tmp_path / "empty": ".jpg"}.items():
        assert words in refused(capsys, "--data", data, "--out", "out")
    data = photographs(tmp_path / "photos", count=150, size=(32, 32))
    broken = data / "train" / "cat" / "0.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    for cache in (0, 2):
        run(*SMALL, "--data", data, "--preset", "toy", "--steps", 10, "--cache", cache, "--out", f"c{cache}")
        assert f"skipped an unreadable file: {broken}" in capsys.readouterr().out
    for i in range(1, 7):
        (data / "train" / ("cat", "dog")[i % 2] / f"{i}.jpg").write_bytes(b"")
    for cache in (0, 2):
        flags = ["--data", data, "--preset", "toy", "--steps", 40, "--cache", cache, "--out", f"bad{cache}"]
        with pytest.raises(SystemExit) as stop:
            run(*SMALL, *flags)
        assert stop.value.code == 2 and "--max-bad" in capsys.readouterr().err


def test_steps_that_are_not_finite(monkeypatch, capsys):
    """One is not applied, to weights or to centres; three in a row end the run with the last good weights."""
    flags = [*SMALL, "--centering", "softmax", "--save-every", 1]
    monkeypatch.setattr(dinov2, "schedules", lambda config, step, steps: dinov2.Schedule(1e-3, 1e-3, 0.04, 0.9, 0.05))

    def poison(result):
        return result[0] * float("nan"), result[1]

    with monkeypatch.context() as patch:
        interrupt(patch, "total_loss", 3, poison)
        run(*flags, "--steps", 3, "--out", "three")
    run(*flags, "--steps", 2, "--out", "two")
    (_, a), (_, b) = weights("two"), weights("three")
    assert all(torch.equal(a[k], b[k]) for k in a)
    centres = [torch.load(f"{out}/last.pt", weights_only=True)["centres"] for out in ("two", "three")]
    assert all(torch.equal(x, y) for x, y in zip(*centres, strict=True))
    total, calls = dinov2.total_loss, []
    with monkeypatch.context() as patch:
        patch.setattr(
            dinov2, "total_loss", lambda *args: calls.append(1) or (poison if len(calls) > 4 else tuple)(total(*args))
        )
        assert "last good" in refused(capsys, *flags, "--steps", 30, "--out", "bad", code=3)
    assert all(v.isfinite().all() for v in weights("bad")[1].values())


def test_checkpoints_that_are_none(tmp_path, capsys):
    run(*SMALL, "--steps", 1, "--out", "good")
    assert "already holds a run" in refused(capsys, *SMALL, "--steps", 2, "--out", "good")
    good, whole = torch.load("good/last.pt", weights_only=True), Path("good/last.pt").read_bytes()
    Path("cut.pt").write_bytes(whole[: len(whole) // 2])
    Path("text.pt").write_text("hello")
    torch.save({"script": "msn", "model": {}}, "other.pt")
    torch.save({"weights": torch.zeros(3)}, "strange.pt")
    torch.save([1, 2], "list.pt")
    torch.save(os.system, "code.pt")
    good["teacher"].pop("backbone.norm.weight")
    torch.save(good, "gap.pt")
    errors = dict(cut="truncated", text="not a checkpoint", other="msn", strange="found weights", code="read safely",
                  list="found list", gap="missing: norm.weight", absent="no checkpoint at")  # fmt: skip
    for name, words in errors.items():
        assert words in refused(capsys, "--init", f"{name}.pt", "--eval", "features", "--out", name)
    assert "no linear head" in refused(
        capsys,
        "--init",
        "good/last.pt",
        "--eval",
        "head",
        "--linear-head",
        "strange.pt",
        "--eval-limit",
        50,
        "--out",
        "h",
    )
    Path("good/last.pt").write_bytes(whole[:1000])
    assert "truncated" in refused(capsys, *SMALL, "--steps", 2, "--out", "good", "--resume")
    Path("good/last.pt").write_bytes(whole)
    assert "--width 16" in refused(capsys, *SMALL, "--steps", 2, "--out", "good", "--resume", "--width", 32)
    with pytest.MonkeyPatch.context() as patch:

        def full(*_):
            raise OSError(28, "No space left on device")

        patch.setattr(torch, "save", full)
        message = refused(capsys, *SMALL, "--steps", 2, "--out", "good", "--resume", code=1)
    assert "could not write" in message and "the previous last.pt is intact" in message
    assert Path("good/last.pt").read_bytes() == whole


def test_settings_that_cannot_work(capsys, monkeypatch):
    for flags, words in (
        ("--batch 10 --accumulate 3", "--batch"),
        ("--image-size 30", "--patch"),
        ("--local-size 10", "--local-size"),
        ("--width 66", "heads"),
        ("--koleo-group 48", "--koleo-group"),
        ("--wdith 32", "--width"),
        ("--preset cifra10", "cifar10"),
        ("--eval knnn", "knn"),
        ("--eval head", "--linear-head"),
        ("--centering funny", "sinkhorn"),
        ("--high-res", "--init"),
        ("--shard --precision fp16", "fp16"),
        ("--distill-tokens 0", "--distill-tokens"),
        ("--mask-ratio 0.9 0.1", "--mask-ratio"),
    ):
        assert words in refused(capsys, *flags.split())
        assert not Path("runs").exists(), "refused before any work"

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(dinov2, "train", full)
    printed = refused(capsys, "--out", "memory", "--device", "cpu", code=4)
    assert all(flag in printed for flag in ("--accumulate", "--recompute", "--precision", "--shard", "--batch"))


def test_presets_build():
    """Each preset passes its own checks on the ranks it is meant for, and gives the published numbers of parameters."""
    millions = {"folder": 22, "folder_b": 86, "vitl16_short": 304, "vitl14": 304, "vitg14": 1136}
    for name in dinov2.PRESETS:
        ranks = {"vitl16_short": 32, "vitl14": 96, "vitg14": 96}.get(name, 1)
        config = Config(**dinov2.PRESETS[name] | dict(preset=name))
        dinov2.check(config, World(0, ranks, ALONE.device))
        with torch.device("meta"):
            backbone = dinov2.DINOv2(config).backbone
        found = sum(p.numel() for p in backbone.parameters()) / 1e6
        assert name not in millions or abs(found / millions[name] - 1) < 0.02, (name, found)
        assert all(hasattr(config, k) for k in dinov2.PRESETS[name])


# ---------------------------------------------------------------------------------------------------------- learning


def test_it_learns():
    """In half a minute, on the toy images: two views agree on prototypes, and kNN beats a random backbone."""
    flags = (
        "--steps 100 --local-crops 1 --eval knn --eval-limit 1500 --device cpu --no-compile --precision fp32".split()
    )
    run(*flags, "--out", "learnt")
    *steps, own, evaluation = log_rows("learnt")
    assert own["view_information"] > 3 * own["chance_information"]
    results = evaluation["eval"]
    assert results["trained"]["knn20"] > results["random"]["knn20"] + 7
    assert steps[-1]["feature_std"] > 0.1 and steps[-1]["feature_rank"] > 5, "collapsed"
    assert steps[-1]["prototypes"] > 32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_run_matches_cpu_run():
    flags = [f for f in SMALL if f not in ("--device", "cpu")]
    run(*SMALL, "--steps", 3, "--out", "cpu")
    run(*flags, "--device", "cuda", "--steps", 3, "--out", "gpu")
    run(*[f for f in flags if f != "--no-compile"], "--device", "cuda", "--steps", 3, "--out", "compiled", "--compile")
    for other in ("gpu", "compiled"):
        for a, b in zip(log_rows("cpu")[:3], log_rows(other)[:3], strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


def test_help_lists_every_flag_with_its_meaning(capsys):
    with pytest.raises(SystemExit) as stop:
        run("--preset", "vitg14", "--help")
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert stop.value.code == 0 and "[1536]" in text
    comments = dict(re.findall(r"^    (\w+): [^#\n]*# (.+)$", inspect.getsource(Config), re.MULTILINE))
    for name in vars(Config()):
        assert f"--{name.replace('_', '-')}" in text, name
        assert name == "preset" or comments[name] in text, f"--{name} has no help"
    with pytest.raises(SystemExit):
        run("curate", "--help")
    assert "--relative-threshold" in capsys.readouterr().out
